"""Models kept in parts: an architecture as JSON or in a SavedModel, and weights."""

import inspect
import json
import shutil
import zipfile

import h5py
import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ModelError
from dfq_tf.importing import files, parts
from dfq_tf.importing.classifiers import as_classifier
from tests import helpers, networks

K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}


def network(library, *links):
    """A model with a model inside; all weights are random, and positive variances."""
    layers = library.layers
    inner = library.Sequential(
        [layers.Input((6, 6, 4)), layers.Conv2D(4, 3), layers.BatchNormalization()]
    )
    image = layers.Input((8, 8, 3))
    x = layers.Rescaling(1 / 255)(image)
    for link in links:
        x = link(x)
    x = layers.GlobalAveragePooling2D()(inner(layers.Conv2D(4, 3, name="conv")(x)))
    model = library.Model(image, layers.Dense(4, name="last")(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 1, w.shape) for w in model.get_weights()])
    return model


def sequential():
    """A model of Keras 2 without any other inside."""
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Rescaling(1 / 255, input_shape=(8, 8, 3)),
            layers.Conv2D(4, 3),
            layers.Flatten(),
            layers.Dense(4),
        ]
    )


def pixels():
    return networks.images((8, 8, 3), 8)


def normalized(library):
    """A model with one inside that is adapted to mean 100 and deviation 50."""
    layers = library.layers
    head = layers.Normalization()
    head.adapt(np.float32([3 * [50.0], 3 * [150.0]]))
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(4, 8)(head(image))
    inner = library.Model(image, layers.Flatten()(x))
    return library.Sequential([layers.Input((8, 8, 3)), inner, layers.Dense(4)])


class PartsTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = helpers.new_folder()

    def written(self, model, weights="model.weights.h5"):
        (self.folder / "model.json").write_text(model.to_json())
        model.save_weights(self.folder / weights)
        return self.folder / "model.json"

    def check_is(self, path, model):
        loaded = files.read_model(path)
        self.assertTrue(helpers.all_equal(loaded.get_weights(), model.get_weights()))
        self.check_scores(path, model)

    def check_scores(self, path, model):
        expected = model(pixels().astype(np.float32), training=False)
        scores = as_classifier(path).scores(pixels())
        self.assertAllClose(scores, np.asarray(expected), rtol=1e-4, atol=1e-4)

    def damage(self, path, version=None):
        """Gives the last layer of an architecture what no Keras here knows."""
        config = json.loads(path.read_text())
        if version:
            config["keras_version"] = version
        config["config"]["layers"][-1]["config"]["of_another_release"] = 1
        path.write_text(json.dumps(config))


class ArchitectureTest(PartsTest):
    @parameterized.parameters(
        ("keras2", "model.h5"),
        ("keras2", "model.hdf5"),
        ("keras2", "model.weights.h5"),
        ("keras2", "other.h5"),
        ("keras3", "model.weights.h5"),
        ("keras3", "best.weights.h5"),
    )
    def test_model_is_that_of_its_library_with_its_weights(self, library, weights):
        library = LIBRARIES[library]
        model = network(library)
        path = self.written(model, weights)
        self.assertIsInstance(files.read_model(path), library.Model)
        self.check_is(path, model)

    @parameterized.parameters(*LIBRARIES)
    def test_layers_of_applications_are_found(self, library):
        library = LIBRARIES[library]
        module = inspect.getmodule(library.applications.ConvNeXtTiny)
        model = network(library, module.LayerScale(1.0, 3), module.StochasticDepth(0.1))
        self.check_is(self.written(model), model)

    @parameterized.parameters(*LIBRARIES)
    def test_losses_are_not_read(self, library):
        model = network(LIBRARIES[library])
        model.compile("adam", loss=lambda labels, scores: scores)
        self.check_is(self.written(model), model)

    @parameterized.parameters(*LIBRARIES)
    def test_whole_model_beside_it_has_weights_too(self, library):
        model = network(LIBRARIES[library])
        (self.folder / "model.json").write_text(model.to_json())
        model.save(self.folder / "model.h5")
        self.check_is(self.folder / "model.json", model)
        self.check_is(self.folder / "model.h5", model)

    @parameterized.parameters(*LIBRARIES)
    def test_class_of_a_functional_model_does_not_count(self, library):
        class Own(LIBRARIES[library].Model):
            pass

        made = network(LIBRARIES[library])
        model = Own(made.inputs[0], made.outputs[0])
        self.check_is(self.written(model), model)

    def test_configuration_of_an_archive_of_keras_2(self):
        """It names the module of its class, as those of Keras 3 do."""
        model = network(keras)
        path = self.written(model)
        config = keras.saving.serialize_keras_object(model)
        self.assertStartsWith(config["module"], "tf_keras.")
        path.write_text(json.dumps(config))
        self.check_is(path, model)

    @parameterized.product(library=list(LIBRARIES), beside=(False, True))
    def test_normalization_inside_of_an_old_file(self, library, beside):
        model = normalized(LIBRARIES[library])
        model.save(self.folder / "model.h5")
        path = self.folder / "model.h5"
        if beside:
            path = self.folder / "model.json"
            path.write_text(model.to_json())
        self.check_scores(path, model)
        mean = as_classifier(path).description.input_mean
        self.assertAllClose(mean, [100.0], rtol=1e-5)

    def test_what_the_weights_are_is_in_them_and_not_in_their_name(self):
        model = network(keras)
        path = self.written(model, "model.h5")
        (self.folder / "model.h5").rename(self.folder / "model.weights.h5")
        self.check_is(path, model)

    def test_weights_of_the_same_name_go_before_others(self):
        model = network(keras)
        path = self.written(model)
        network(keras).save_weights(self.folder / "another.h5")
        self.check_is(path, model)
        self.assertEqual(parts.files_of(path), [path, self.folder / "model.weights.h5"])

    def test_names_may_have_dots(self):
        models = [network(keras) for _ in range(2)]
        for version, model in zip(("1.0", "1.1"), models):
            model.save_weights(self.folder / f"net_{version}.weights.h5")
        path = self.folder / "net_1.0.json"
        path.write_text(models[0].to_json())
        self.check_is(path, models[0])
        (self.folder / "net_1.0.weights.h5").rename(self.folder / "another.h5")
        with self.assertRaisesRegex(ModelError, "another.h5, net_1.1.weights.h5. Put"):
            files.read_model(path)

    def test_weights_that_are_not_there_or_several(self):
        path = self.written(network(keras), "a.h5")
        network(keras).save_weights(self.folder / "b.h5")
        with self.assertRaisesRegex(
            ModelError, "model.json is an architecture, .*; found: a.h5, b.h5. Put"
        ):
            files.read_model(path)
        for name in ("a.h5", "b.h5"):
            (self.folder / name).unlink()
        with self.assertRaisesRegex(ModelError, "found: none"):
            files.read_model(path)

    @parameterized.parameters(*LIBRARIES)
    def test_weights_of_another_model(self, library):
        library = LIBRARIES[library]
        path = self.written(network(library))
        layers = library.layers
        other = library.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(5, 3)])
        other.save_weights(self.folder / "model.weights.h5")
        with self.assertRaisesRegex(
            ModelError, "model.weights.h5 are not the weights of the model in .*json"
        ):
            files.read_model(path)

    def test_description_is_no_architecture(self):
        path = self.folder / "model.json"
        helpers.description(4).save(path)
        with self.assertRaisesRegex(
            ModelError, "is no architecture .*name the model's"
        ):
            files.read_model(path)
        path.write_text("{")
        with self.assertRaisesRegex(ModelError, "model.json cannot be read"):
            files.read_model(path)

    def test_architecture_of_a_newer_release_names_both(self):
        path = self.written(network(keras))
        self.damage(path, "2.99.0")
        with self.assertRaisesRegex(
            ModelError, "Keras 2.99.0 wrote it, and Keras .* --upgrade tf_keras. The"
        ):
            files.read_model(path)

    def test_model_of_tensorflow_js_says_the_way_out(self):
        path = self.folder / "model.json"
        path.write_text('{"modelTopology": {}, "weightsManifest": []}')
        with self.assertRaisesRegex(
            ModelError,
            "model.json is a model of TensorFlow.js. .*Tensorflow, then Keras.*"
            "--input_format=tfjs_layers_model --output_format=keras .*model.json model",
        ):
            files.read_model(path)

    def test_graph_model_of_tensorflow_js_has_another_way_out(self):
        path = self.folder / "model.json"
        path.write_text(
            '{"format": "graph-model", "modelTopology": {}, "weightsManifest": []}'
        )
        with self.assertRaisesRegex(
            ModelError,
            "model.json is a graph model of TensorFlow.js: functions without layers, "
            ".* Give the Keras model that it was made of$",
        ):
            files.read_model(path)

    def test_weights_alone_name_the_architecture_beside_them(self):
        self.written(network(keras), "model.h5")
        with self.assertRaisesRegex(ModelError, "or name its architecture, .*model.js"):
            files.read_model(self.folder / "model.h5")

    @parameterized.parameters(*LIBRARIES)
    def test_code_is_refused_unless_it_is_allowed(self, library):
        library = LIBRARIES[library]
        half = library.layers.Lambda(lambda x: x * 0.5, name="half")
        model = network(library, half)
        path = self.written(model)
        with self.assertRaisesRegex(ModelError, r"Python code \(half, a Lambda layer"):
            files.read_model(path)
        classifier = as_classifier(path, allow_code=True)
        self.assertAllClose(classifier.description.input_scale, [0.5 / 255])

    def test_class_that_is_not_known_is_refused(self):
        path = self.written(network(K))
        config = json.loads(path.read_text())
        config["config"]["layers"][1].update(module="os", class_name="system")
        path.write_text(json.dumps(config))
        with self.assertRaisesRegex(ModelError, "names os.system .*not known"):
            files.read_model(path)

    @parameterized.parameters("weights", "architecture")
    def test_kernels_that_theano_has_turned_are_refused(self, where):
        path = self.written(network(keras), "model.h5")
        config = json.loads(path.read_text())
        with h5py.File(self.folder / "model.h5", "a") as file:
            if where == "weights":
                file.attrs["backend"] = b"theano"
            else:
                del file.attrs["backend"]
                path.write_text(json.dumps(config | {"backend": "theano"}))
        with self.assertRaisesRegex(ModelError, r"model.h5 has .* as Theano has them"):
            files.read_model(path)

    def test_weights_of_a_file_elsewhere_are_refused(self):
        path = self.written(network(keras))
        with h5py.File(self.folder / "model.weights.h5", "a") as file:
            file["stolen"] = h5py.ExternalLink("/etc/passwd", "/")
        with self.assertRaisesRegex(ModelError, "takes 'stolen' from another file"):
            files.read_model(path)


class SavedModelTest(PartsTest):
    def saved(self, model):
        model.save(self.folder / "saved", save_format="tf")
        return self.folder / "saved"

    def test_model_is_built_of_its_configuration(self):
        model = network(keras, keras.layers.RandomFlip("horizontal"))
        model.compile("adam", "mse")
        model.fit(pixels()[:2], np.zeros((2, 4)), verbose=0)
        self.check_is(self.saved(model), model)

    def test_normalization_has_the_moments_that_it_was_adapted_to(self):
        model = normalized(keras)
        path = self.saved(model)
        self.check_scores(path, model)
        found = as_classifier(path)
        self.assertAllClose(found.description.input_mean, [100.0], rtol=1e-5)
        self.assertAllClose(found.description.input_scale, [1 / 50], rtol=1e-5)

    def test_no_function_of_it_is_read(self):
        model = network(keras)
        path = self.saved(model)
        (path / "saved_model.pb").write_bytes(b"nothing")
        self.check_is(path, model)
        names = {p.name for p in parts.files_of(path)}
        self.assertContainsSubset({"keras_metadata.pb", "variables.index"}, names)
        self.assertNotIn("saved_model.pb", names)

    def test_folder_whose_name_tensorflow_takes_for_a_pattern(self):
        model = network(keras)
        path = self.saved(model).rename(self.folder / r"v[2] a?b*c\d")
        self.check_is(path, model)

    def test_sequential_model(self):
        model = sequential()
        self.check_is(self.saved(model), model)

    def test_weights_that_are_not_all_there(self):
        path = self.saved(network(keras))
        layers = keras.layers
        other = keras.Sequential([layers.Input((8, 8, 3)), layers.Conv2D(4, 3)])
        other.save(self.folder / "other", save_format="tf")
        shutil.rmtree(path / "variables")
        message = "variables are not the weights of the model in .*saved"
        with self.assertRaisesRegex(ModelError, message):
            files.read_model(path)
        shutil.copytree(self.folder / "other/variables", path / "variables")
        with self.assertRaisesRegex(ModelError, message):
            files.read_model(path)

    def test_code_is_refused(self):
        half = keras.layers.Lambda(lambda x: x * 0.5, name="half")
        path = self.saved(network(keras, half))
        with self.assertRaisesRegex(ModelError, r"Python code \(half, a Lambda layer"):
            files.read_model(path)
        classifier = as_classifier(path, allow_code=True)
        self.assertAllClose(classifier.description.input_scale, [0.5 / 255])

    @parameterized.parameters(
        ("\n first\nsecond", "first"),
        ("a" * 400, "a" * 300),
        ("", "ValueError"),
        ("<class 'Model'> could not.\n\nException encountered: No f.\nx", "No f."),
    )
    def test_of_what_a_reader_said_the_first_line_is_told(self, text, told):
        found = parts.said_by_reader(ValueError(text))
        self.assertEqual(found, f"The reader said: {told}")

    def test_subclass_has_no_layers(self):
        class Own(keras.Model):
            def call(self, x):
                return tf.reduce_mean(x, (1, 2))

        model = Own()
        model(pixels().astype(np.float32))
        with self.assertRaisesRegex(ModelError, "a SavedModel of Own, a subclass of M"):
            files.read_model(self.saved(model))

    def test_class_of_a_functional_model_does_not_count(self):
        said = json.loads(network(keras).to_json()) | {"class_name": "Own"}
        metadata = keras.protobuf.saved_metadata_pb2.SavedMetadata()
        metadata.nodes.add(node_path="root", metadata=json.dumps(said))
        path = self.folder / "own"
        path.mkdir()
        (path / "keras_metadata.pb").write_bytes(metadata.SerializeToString())
        found = parts.parts_of(path)
        self.assertEqual(found.config["config"], said["config"])

    @parameterized.parameters(b"nothing", b"")
    def test_configuration_that_is_damaged(self, content):
        path = self.saved(network(keras))
        (path / "keras_metadata.pb").write_bytes(content)
        with self.assertRaisesRegex(ModelError, "keras_metadata.pb cannot be read"):
            files.read_model(path)

    def test_functions_alone_are_refused(self):
        path = self.saved(network(keras))
        (path / "keras_metadata.pb").unlink()
        with self.assertRaisesRegex(ModelError, "is a SavedModel: .*no keras_metadata"):
            files.read_model(path)


class UnpackedTest(PartsTest):
    def unpacked(self, model):
        model.save(self.folder / "whole.keras")
        with zipfile.ZipFile(self.folder / "whole.keras") as archive:
            archive.extractall(self.folder / "net")
        return self.folder / "net"

    @parameterized.product(library=list(LIBRARIES), named=("", "config.json"))
    def test_archive_is_read_as_a_folder(self, library, named):
        model = network(LIBRARIES[library])
        model.compile("adam", "mse")
        folder = self.unpacked(model)
        network(keras).save_weights(folder / "another.h5")
        self.check_is(folder / named, model)
        names = ("config.json", "model.weights.h5")
        self.assertEqual(parts.files_of(folder / named), [folder / n for n in names])

    def test_version_says_which_keras_wrote_it(self):
        model = sequential()
        folder = self.unpacked(model)
        # As Keras 3 has it too.
        config = json.loads((folder / "config.json").read_text())
        self.assertEqual(config["module"], "keras")
        self.assertNotIn("keras_version", config)
        self.assertIsInstance(files.read_model(folder), keras.Sequential)
        self.check_is(folder, model)

    @parameterized.parameters(
        ("keras2", "2.99.0", "tf_keras"), ("keras3", "3.99.1", "keras")
    )
    def test_archive_of_a_newer_release_names_both(self, library, version, package):
        folder = self.unpacked(network(LIBRARIES[library]))
        self.damage(folder / "config.json")
        metadata = json.loads((folder / "metadata.json").read_text())
        metadata["keras_version"] = version
        (folder / "metadata.json").write_text(json.dumps(metadata))
        with self.assertRaisesRegex(
            ModelError,
            f"Keras {version} wrote it, and Keras .* --upgrade {package}. The reader",
        ):
            files.read_model(folder)

    def test_weights_that_are_missing(self):
        folder = self.unpacked(network(K))
        weights = folder / "model.weights.h5"
        # Others, such as a copy of a checkpoint, are not taken for them.
        for name in ("best.weights.h5", "config.weights.h5"):
            weights = weights.rename(folder / name)
            with self.assertRaisesRegex(
                ModelError,
                "config.json is of an unpacked .keras file, .* in model.weights.h5, ",
            ):
                files.read_model(folder)
            self.assertEmpty(parts.files_of(folder))

    def test_other_folders_are_none(self):
        (self.folder / "config.json").write_text("{}")
        (self.folder / "metadata.json").write_text('["a"]')
        with self.assertRaisesRegex(ModelError, "is a folder; name a model file"):
            files.read_model(self.folder)


class CheckpointTest(PartsTest):
    def test_message_says_what_it_is(self):
        network(keras).save_weights(self.folder / "cp.ckpt")
        for name in ("", "cp.ckpt", "cp.ckpt.index", "cp.ckpt.data-00000-of-00001"):
            with self.assertRaisesRegex(
                ModelError, r"is a checkpoint of TensorFlow: weights without a model"
            ):
                files.read_model(self.folder / name)


if __name__ == "__main__":
    tf.test.main()
