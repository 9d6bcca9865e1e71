import io
import json
import pathlib
import re
import shutil
import zipfile

import h5py
import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.importing.files import read_model
from dfq_tf.importing.repairs import CONFIG, METADATA, WEIGHTS

SHAPE = (8, 8, 3)
K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}


def small(library=keras, first=()):
    """A network with several layers of a kind, whose weights all differ."""
    L = library.layers
    model = library.Sequential(
        [
            L.Input(SHAPE),
            *first,
            L.Conv2D(4, 3, padding="same", name="b"),
            L.BatchNormalization(name="norm"),
            L.Conv2D(4, 3, padding="same", activation="relu", name="a"),
            L.Conv2D(4, 3, padding="same", name="c"),
            L.Flatten(),
            L.Dense(5),
            L.Dense(3),
        ]
    )
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    return model


def images(count=4, shape=SHAPE):
    return np.random.default_rng(1).normal(size=(count, *shape)).astype(np.float32)


class RepairsTest(tf.test.TestCase, parameterized.TestCase):
    def folder(self):
        return pathlib.Path(self.get_temp_dir())

    def assertReads(self, path, model, **kwargs):
        found = read_model(path)
        x = images()
        expected = model(x, training=False)
        self.assertAllClose(found(x, training=False), expected, rtol=1e-6, atol=1e-6)
        return found

    def rewritten(self, path, change):
        """The archive with its members changed: name -> content, in place."""
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        change(members)
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def change_layer(self, path, kind, settings, version=""):
        """Adds settings to the layers of a kind, in place."""

        def changed(config):
            for layer in config["config"]["layers"]:
                if layer["class_name"] == kind:
                    layer["config"] |= settings
            return json.dumps(config)

        def change(members):
            members[CONFIG] = changed(json.loads(members[CONFIG])).encode()
            if version:
                members[METADATA] = json.dumps({"keras_version": version}).encode()

        if path.suffix == ".keras":
            self.rewritten(path, change)
            return
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            file.attrs["model_config"] = changed(config)

    @parameterized.product(is_from_windows=(False, True), gap=(1, 2))
    def test_groups_of_weights_with_the_names_of_old_releases(
        self, is_from_windows, gap
    ):
        model, path = small(), self.folder() / "old.keras"
        model.save(path)

        def change(members):
            new, old = io.BytesIO(members[WEIGHTS]), io.BytesIO()
            with h5py.File(new, "r") as source, h5py.File(old, "w") as target:
                for name in source:
                    if name != "layers":
                        source.copy(name, target)
                for name in source["layers"]:
                    kind, _, number = name.rpartition("_")
                    if number.isdigit():  # of each kind, numbers may be left out
                        kind = f"{kind}_{gap * int(number)}"
                    else:
                        kind = name
                    parts = "_layer_checkpoint_dependencies", kind
                    group = target.create_group(
                        ("\\" if is_from_windows else "/").join(parts)
                    )
                    source.copy(f"layers/{name}/vars", group)
            members[WEIGHTS] = old.getvalue()
            members[METADATA] = json.dumps({"keras_version": "2.13.1"}).encode()

        self.rewritten(path, change)
        before = path.read_bytes()
        self.assertReads(path, model)
        self.assertEqual(path.read_bytes(), before)

    @parameterized.product(
        module=("keras.engine.functional", "keras.src.engine.functional"),
        is_inside=(False, True),
    )
    def test_functional_models_of_keras_2_12_and_2_13(self, module, is_inside):
        made, path = small(), self.folder() / "functional.keras"
        model = keras.Model(made.inputs[0], made.outputs[0])
        if is_inside:
            model = keras.Sequential([keras.layers.Input(SHAPE), model])
        model.save(path)

        def change(members):
            now = b"tf_keras.src.engine.functional"
            self.assertEqual(members[CONFIG].count(now), 1)
            members[CONFIG] = members[CONFIG].replace(now, module.encode())
            members[METADATA] = json.dumps({"keras_version": "2.12.0"}).encode()

        self.rewritten(path, change)
        self.assertReads(path, model)

    @parameterized.parameters("keras2.keras", "keras2.h5", "keras3.keras")
    def test_arguments_of_other_releases_of_layers_that_only_train(self, name):
        library = keras3() if name.startswith("keras3") else keras
        model = small(library, [library.layers.RandomRotation(0.1)])
        path = self.folder() / name
        model.save(path)
        self.change_layer(path, "RandomRotation", {"of_another_release": [0, 255]})
        found = self.assertReads(path, model)
        kinds = [type(layer).__name__ for layer in found.layers]
        self.assertIn("RandomRotation", kinds)

    def test_first_layer_of_an_old_file_says_the_shape_of_the_images(self):
        """Before TensorFlow 2.2 a Sequential model had no layer for its input."""
        model = small(first=[keras.layers.Dropout(0.2, input_shape=SHAPE)])
        path = self.folder() / "model.h5"
        model.save(path)
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            (first, *rest) = config["config"]["layers"]
            self.assertEqual(first["class_name"], "InputLayer")
            rest[0]["config"]["batch_input_shape"] = [None, *SHAPE]
            config["config"]["layers"] = rest
            config["config"].pop("build_input_shape", None)
            file.attrs["model_config"] = json.dumps(config)
        self.assertReads(path, model)

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_losses_of_models_inside_a_model_are_not_read(self, library, suffix):
        library = LIBRARIES[library]

        def loss_of_mine(labels, scores):
            return scores

        inner = small(library)
        inner.compile("adam", loss_of_mine, metrics=[library.metrics.Precision()])
        model = library.Sequential(
            [library.layers.Input(SHAPE), inner, library.layers.Softmax()]
        )
        model.compile("adam", loss_of_mine)
        path = self.folder() / f"{library.__name__}{suffix}"
        model.save(path)
        self.assertReads(path, model)

    @parameterized.parameters(".keras", ".h5", "")
    def test_functions_of_tensorflow_are_activations(self, suffix):
        model = K.Sequential(
            [
                K.layers.Input(SHAPE),
                K.layers.Conv2D(4, 3, activation=tf.nn.silu),
                K.layers.Flatten(),
                K.layers.Dense(3, activation=tf.nn.softmax),
            ]
        )
        given = self.folder() / f"functions{suffix}" if suffix else model
        if suffix:
            model.save(given)
        found = as_classifier(given, input_mean=0, input_scale=1)
        self.assertEqual(found.description.probabilities, "softmax")
        pixels = np.abs(images())
        probabilities = tf.nn.softmax(found.scores(pixels))
        self.assertAllClose(probabilities, np.asarray(model(pixels)), atol=1e-5)

    @parameterized.parameters(
        {"class_name": "PolicyV1", "config": {"name": "mixed_float16"}},
        {
            "class_name": "Policy",
            "config": {
                "name": "mixed_float16",
                "loss_scale": {"class_name": "DynamicLossScale", "config": {}},
            },
        },
    )
    def test_policies_of_old_releases(self, **policy):
        model = small()
        path = self.folder() / "policy.h5"
        model.save(path)
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            for layer in config["config"]["layers"]:
                if layer["class_name"] == "Dense":
                    layer["config"]["dtype"] = policy
                    kernel = layer["config"]["kernel_initializer"]
                    kernel["class_name"] = "GlorotUniformV2"
            file.attrs["model_config"] = json.dumps(config)
        found = read_model(path)
        self.assertAllClose(found.get_weights(), model.get_weights())

    def test_policies_of_keras_3_4(self):
        model, path = small(K), self.folder() / "policy.keras"
        model.save(path)
        policy = {"module": "keras", "class_name": "FloatDTypePolicy"}
        policy |= {"config": {"name": "float32"}, "registered_name": None}
        self.change_layer(path, "Dense", {"dtype": policy})
        self.assertReads(path, model)
        policy["class_name"] = "Unheard"
        self.change_layer(path, "Dense", {"dtype": policy})
        with self.assertRaisesRegex(ModelError, "names keras.Unheard, which is not"):
            read_model(path)

    def test_an_unknown_argument_of_a_layer_that_computes_is_refused(self):
        path = self.folder() / "model.keras"
        small().save(path)

        def change(members):
            config = json.loads(members[CONFIG])
            config["config"]["layers"][1]["config"]["of_another_release"] = 1
            members[CONFIG] = json.dumps(config).encode()

        self.rewritten(path, change)
        with self.assertRaisesRegex(ModelError, "said: .*of_another_release"):
            read_model(path)

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_unknown_arguments_that_say_nothing_are_left_out(self, library, suffix):
        model = small(LIBRARIES[library])
        path = self.folder() / f"idle_{library}{suffix}"
        model.save(path)
        renorm = dict(renorm=False, renorm_clipping=None, renorm_momentum=0.99)
        self.change_layer(path, "Dense", {"of_another_release": None, **renorm})
        self.assertReads(path, model)

    @parameterized.product(
        library=list(LIBRARIES),
        suffix=(".keras", ".h5"),
        own=(
            {"module": "absent.own", "class_name": "Mine", "config": {"rate": 1}},
            {"module": "keras.regularizers", "class_name": "OfAnotherRelease"},
            {"class_name": "own>Mine", "config": {}},
            "mine",
        ),
    )
    def test_settings_of_ones_own_that_only_train_are_left_out(
        self, library, suffix, own
    ):
        model = small(LIBRARIES[library])
        path = self.folder() / f"own_{library}{suffix}"
        model.save(path)
        settings = ("kernel_initializer", "bias_regularizer", "kernel_constraint")
        self.change_layer(path, "Dense", dict.fromkeys(settings, own))
        found = self.assertReads(path, model)
        self.assertIsNone(found.layers[-1].bias_regularizer)

    def test_constraints_of_keras_2_are_known(self):
        model, path = small(), self.folder() / "radial.keras"
        model.save(path)
        radial = {"module": "keras.constraints", "class_name": "RadialConstraint"}
        radial |= {"config": {}, "registered_name": None}
        self.change_layer(path, "Conv2D", {"kernel_constraint": radial})
        found = self.assertReads(path, model)
        constraint = found.get_layer("a").kernel_constraint
        self.assertIsInstance(constraint, keras.constraints.RadialConstraint)

    @parameterized.parameters(*LIBRARIES)
    def test_unknown_renormalization_is_refused(self, library):
        path = self.folder() / f"renorm_{library}.keras"
        small(LIBRARIES[library]).save(path)
        self.change_layer(path, "Dense", dict(renorm=True, renorm_momentum=0.99))
        with self.assertRaisesRegex(ModelError, "truncated or damaged. .*renorm"):
            read_model(path)

    @parameterized.parameters(
        ("keras2", "2.99.0", "tf_keras"), ("keras3", "3.99.1", "keras")
    )
    def test_files_of_newer_releases_name_both(self, library, version, package):
        library = LIBRARIES[library]
        path = self.folder() / f"{package}.keras"
        small(library).save(path)
        self.change_layer(path, "Dense", {"of_another_release": 1}, version)
        installed = re.escape(library.__version__)
        with self.assertRaisesRegex(
            ModelError,
            f"Keras {version} wrote it, and Keras {installed} is installed, .*: pip "
            f"install --upgrade {package}. The reader said: .*of_another_release",
        ):
            read_model(path)

    @parameterized.parameters("1.2.2", None)
    def test_files_of_keras_1(self, version):
        path = self.folder() / "keras_1.h5"
        small().save(path)
        with h5py.File(path, "r+") as file:
            config = file.attrs["model_config"].replace("Conv2D", "Convolution2D")
            config = config.replace('"module": "keras.layers", ', "")
            file.attrs["model_config"] = config
            if version:
                file.attrs["keras_version"] = version
            else:
                del file.attrs["keras_version"]
        with self.assertRaisesRegex(
            ModelError, f"by Keras {version or 1}, whose layers, such as .*tf_keras"
        ):
            read_model(path)

    def test_architectures_of_keras_1(self):
        small().save_weights(self.folder() / "architecture_1.h5")
        path = self.folder() / "architecture_1.json"
        config = json.loads(small().to_json()) | {"keras_version": "1.2.2"}
        path.write_text(json.dumps(config))
        with self.assertRaisesRegex(ModelError, "was written by Keras 1.2.2, whose"):
            read_model(path)

    @parameterized.parameters(
        (".h5", ".keras"), (".h5", ".hdf5"), (".h5", ".model"), (".keras", ".h5")
    )
    def test_the_content_says_the_format(self, suffix, other):
        model, folder = small(), self.folder()
        model.save(folder / f"model{suffix}")
        path = folder / f"other{other}"
        shutil.move(folder / f"model{suffix}", path)
        self.assertReads(path, model)
        self.assertTrue(path.is_file())

    @parameterized.parameters(
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"\x1c\0\0\0TFL3\0\0", "is a TFLite file"),
        (b"\x08\x07\x12\x07pytorch", "such as ONNX"),
    )
    def test_what_else_a_file_is(self, content, message):
        path = self.folder() / "model.keras"
        path.write_bytes(content)
        with self.assertRaisesRegex(ModelError, message):
            read_model(path)

    @parameterized.parameters(
        ("model.tflite", b"\x1c\0\0\0TFL3\0\0", "is a TFLite file, .* made of"),
        (
            "saved_model.pb",
            b"\x08\x01",
            "is one of the files of a SavedModel; name its",
        ),
        ("converted_keras.zip", b"PK\x03\x04\0", "is an archive; unpack it"),
    )
    def test_what_a_file_of_another_name_is(self, name, content, message):
        path = self.folder() / name
        path.write_bytes(content)
        with self.assertRaisesRegex(ModelError, f"{name} {message}"):
            read_model(path)


class EndsTest(tf.test.TestCase, parameterized.TestCase):
    """What is around the network: images without channels, softmax before reshapes."""

    def assertScores(self, model, shape, **kwargs):
        classifier = as_classifier(model, input_mean=0.0, input_scale=1.0, **kwargs)
        x = np.abs(images(shape=shape)) * 20
        given = x if len(model.inputs[0].shape) == 4 else x[..., 0]
        expected = model(given).numpy()
        scores = classifier.scores(x)
        if classifier.description.output == "logits":
            scores = tf.nn.softmax(scores)
        self.assertAllClose(scores, expected, rtol=1e-5, atol=1e-6)
        return classifier

    @parameterized.product(library=(2, 3), is_flat=(False, True))
    def test_images_without_channels(self, library, is_flat):
        library = keras if library == 2 else keras3()
        L = library.layers
        head = [L.Flatten()]
        if not is_flat:
            head = [L.Reshape((8, 8, 1)), L.Conv2D(3, 3), L.Flatten()]
        model = library.Sequential(
            [L.Input((8, 8)), *head, L.Dense(4, activation="softmax")]
        )
        classifier = self.assertScores(model, (8, 8, 1))
        self.assertEqual(classifier.image_shape, (8, 8, 1))

    @parameterized.product(library=(2, 3), place=("first", "reshaped", "flat"))
    def test_rescaling_of_images_without_channels(self, library, place):
        library = keras if library == 2 else keras3()
        L = library.layers
        head = {
            "first": [L.Rescaling(1 / 127.5, -1), L.Reshape((8, 8, 1)), L.Conv2D(3, 3)],
            "reshaped": [L.Reshape((8, 8, 1)), L.Rescaling(1 / 127.5, -1)],
            "flat": [L.Flatten(), L.Rescaling(1 / 127.5, -1)],
        }[place]
        model = library.Sequential([L.Input((8, 8)), *head, L.Flatten(), L.Dense(4)])
        classifier = as_classifier(model)
        description = classifier.description
        self.assertAllClose(description.input_mean, [127.5])
        self.assertAllClose(description.input_scale, [1 / 127.5])
        self.assertNotIn("affine", [n.kind for n in classifier.graph.nodes.values()])
        pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
        expected = np.asarray(model(pixels[..., 0].astype(np.float32)))
        self.assertAllClose(classifier.scores(pixels), expected, atol=1e-5)
        with self.assertRaisesRegex(ConfigError, "has preprocessing of its own"):
            as_classifier(model, input_mean=0, input_scale=1 / 255)

    @parameterized.parameters(2, 3)
    def test_softmax_before_a_reshape(self, library):
        library = keras if library == 2 else keras3()
        L = library.layers
        model = library.Sequential(
            [
                L.Input(SHAPE),
                L.Conv2D(4, 8),
                L.Activation("softmax"),
                L.Reshape((4,)),
            ]
        )
        classifier = self.assertScores(model, SHAPE)
        self.assertEqual(classifier.description.probabilities, "softmax")


if __name__ == "__main__":
    tf.test.main()
