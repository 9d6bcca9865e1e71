"""Which files are opened, and that no code in them is run unless it is allowed."""

import base64
import inspect
import json
import os
import sys
import zipfile

import h5py
import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ModelError
from dfq_tf.importing import files
from dfq_tf.importing.classifiers import as_classifier, load_classifier
from dfq_tf.quantization import post_training, student
from tests import helpers

K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}


def network(library, *links):
    layers = library.layers
    image = x = layers.Input((8, 8, 3))
    for link in links:
        x = link(x)
    x = layers.Flatten()(x)
    return library.Model(image, layers.Dense(4, "softmax", name="last")(x))


def with_activation(library, activation):
    """The configuration of a network whose last layer has an activation."""
    config = json.loads(network(library).to_json())
    config["config"]["layers"][-1]["config"]["activation"] = activation
    return config


class ModelFileTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = helpers.new_folder()

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_model_is_that_of_its_own_library(self, library, suffix):
        library = LIBRARIES[library]
        model = network(library, library.layers.Conv2D(4, 3, activation="relu6"))
        model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
        path = self.folder / f"model{suffix}"
        model.save(path)
        loaded = files.read_model(path)
        self.assertIsInstance(loaded, library.Model)
        self.assertTrue(helpers.all_equal(loaded.get_weights(), model.get_weights()))

    def test_archive_may_be_called_h5_and_hdf5_keras(self):
        model = network(keras)
        model.save(self.folder / "a.keras")
        model.save(self.folder / "b.h5")
        (self.folder / "a.keras").rename(self.folder / "c.h5")
        (self.folder / "b.h5").rename(self.folder / "d.keras")
        for name in ("c.h5", "d.keras"):
            loaded = files.read_model(self.folder / name)
            self.assertTrue(
                helpers.all_equal(loaded.get_weights(), model.get_weights())
            )

    def test_folder_of_the_program_may_be_a_saved_model(self):
        model = network(keras)
        model.save(self.folder / "saved", save_format="tf")
        helpers.description(4, "softmax").save(self.folder / "saved.json")
        before = os.getcwd()
        os.chdir(self.folder / "saved")
        try:
            classifier = load_classifier(".")
        finally:
            os.chdir(before)
        self.assertEqual(classifier.description.class_names[0], "class_0")

    @parameterized.product(
        kind=(
            ("keras2", ".keras"),
            ("keras2", ".h5"),
            ("keras2", ""),
            ("keras3", ".keras"),
            ("keras3", ".h5"),
        ),
        name=("gelu", "hard_sigmoid", "leaky_relu", "mish", "relu6", "swish"),
    )
    def test_activations_of_keras_are_read(self, kind, name):
        library, suffix = LIBRARIES[kind[0]], kind[1]
        model = network(library, library.layers.Conv2D(4, 3, activation=name))
        path = self.folder / f"model{suffix}"
        settings = {} if suffix else dict(save_format="tf")
        model.save(path, **settings)
        self.check_answers(path, model)

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_class_of_a_functional_model_does_not_count(self, library, suffix):
        library = LIBRARIES[library]

        class Own(library.Model):
            def train_step(self, data):
                return {}

        made = network(library, library.layers.Conv2D(4, 3))
        model = Own(made.inputs[0], made.outputs[0])
        path = self.folder / f"model{suffix}"
        model.save(path)
        with self.assertWarnsRegex(UserWarning, "a functional model of the class Own,"):
            self.check_answers(path, made)

    def check_answers(self, path, model):
        """A file's classifier answers as the model whose probabilities it has."""
        found = as_classifier(path, input_mean=0, input_scale=1 / 64)
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        scores = tf.constant(found.scores(images))
        if found.description.output == "logits":
            scores = tf.nn.softmax(scores)
        self.assertAllClose(scores, model(np.float32(images / 64)), atol=1e-5)

    def test_module_of_a_functional_model_does_count(self):
        config = json.loads(network(K).to_json()) | {"module": "os"}
        with self.assertRaisesRegex(ModelError, "names os.Functional"):
            files._check_config(self.folder, config, False, K)

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_lambda_is_run_only_if_it_is_allowed(self, library, suffix):
        library = LIBRARIES[library]
        half = library.layers.Lambda(lambda x: (x - 100.0) / 50.0, name="half")
        model = network(library, half)
        path = self.folder / f"model{suffix}"
        model.save(path)
        with self.assertRaisesRegex(ModelError, r"Python code \(half, a Lambda layer"):
            as_classifier(path)
        classifier = as_classifier(path, allow_code=True)
        self.assertAllClose(classifier.description.input_mean, [100.0])
        self.assertAllClose(classifier.description.input_scale, [1 / 50])

    def test_code_of_another_python_is_told(self):
        half = keras.layers.Lambda(lambda x: x / 2, name="half")
        path = self.folder / "model.h5"
        network(keras, half).save(path)
        with h5py.File(path, "a") as file:
            config = json.loads(file.attrs["model_config"])
            function = config["config"]["layers"][1]["config"]["function"]
            function[0] = base64.b64encode(b"\xff").decode()  # no code of any Python
            file.attrs["model_config"] = json.dumps(config)
        with self.assertRaisesRegex(
            ModelError, "of another Python or Keras, or .* as Keras layers, .* marshal"
        ):
            files.read_model(path, allow_code=True)

    def test_kernels_that_theano_has_turned_are_refused(self):
        path = self.folder / "model.h5"
        network(keras, keras.layers.Conv2D(4, 3)).save(path)
        with h5py.File(path, "a") as file:
            file.attrs["backend"] = b"theano"
        with self.assertRaisesRegex(
            ModelError, r"model.h5 has .* of Conv2D as Theano .*\[::-1, ::-1\]"
        ):
            files.read_model(path)
        # Without such a convolution nothing was turned.
        depthwise = keras.layers.DepthwiseConv2D(3)
        separable = keras.layers.SeparableConv2D(4, 3)
        for links in ((), (depthwise,), (separable,)):
            network(keras, *links).save(path)
            with h5py.File(path, "a") as file:
                file.attrs["backend"] = b"theano"
            self.assertIsInstance(files.read_model(path), keras.Model)

    @parameterized.parameters(
        (SystemError("unknown opcode"), "is of another Python or Keras"),
        (NameError("name 'tf' is not defined"), "or needs names of the program that"),
        (ValueError("no file"), "may be truncated or damaged"),
    )
    def test_why_a_file_cannot_be_read(self, error, why):
        self.assertRegex(str(files._unreadable(self.folder, error)), why)

    def test_batch_normalization_has_other_names_in_files_of_tensorflow_1(self):
        model = network(keras, keras.layers.BatchNormalization(name="norm"))
        images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
        path = self.folder / "model.h5"
        for name in ("BatchNormalizationV1", "BatchNormalizationV2"):
            model.save(path)
            with h5py.File(path, "a") as file:
                config = file.attrs["model_config"]
                old = '"class_name": "BatchNormalization"'
                self.assertIn(old, config)
                file.attrs["model_config"] = config.replace(
                    old, f'"class_name": "{name}"'
                )
            classifier = as_classifier(path, input_mean=0, input_scale=1 / 255)
            expected = model(images / np.float32(255), training=False)
            self.assertAllClose(
                classifier.scores(images), expected, rtol=1e-4, atol=1e-4
            )

    @parameterized.product(library=list(LIBRARIES), as_function=(False, True))
    def test_module_that_a_file_names_is_not_imported(self, library, as_function):
        library = LIBRARIES[library]
        path = self.folder / "model.keras"
        network(library, library.layers.Conv2D(4, 3, name="conv")).save(path)
        (self.folder / "dfq_tf_trap.py").write_text("class Conv2D: pass\n\nrelu = 1\n")
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        config = json.loads(members["config.json"])
        conv = config["config"]["layers"][1]
        trap = dict(module="dfq_tf_trap", registered_name=None)
        if as_function:
            trap |= dict(class_name="function", config="relu")
            conv["config"]["activation"] = trap
        else:
            conv.update(trap)
        members["config.json"] = json.dumps(config).encode()
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        sys.path.insert(0, str(self.folder))
        try:
            with self.assertRaisesRegex(
                ModelError, r"names dfq_tf_trap.(Conv2D|relu)[^.]*, which is not"
            ):
                files.read_model(path)
        finally:
            sys.path.remove(str(self.folder))
        self.assertNotIn("dfq_tf_trap", sys.modules)

    @parameterized.parameters("SlicingOpLambda", "TFOpLambda")
    def test_function_of_tensorflow_that_deletes_is_not_run(self, kind):
        path, precious = self.folder / "model.h5", self.folder / "precious"
        precious.mkdir()
        network(keras).save(path)
        remove = {"class_name": kind, "name": "remove"}
        remove["config"] = {"trainable": True, "function": "io.gfile.rmtree"}
        # Keras calls it while it reads: it hangs on no input.
        remove["inbound_nodes"] = [["_CONSTANT_VALUE", -1, str(precious), {}]]
        with h5py.File(path, "a") as file:
            config = json.loads(file.attrs["model_config"])
            config["config"]["layers"].append(remove)
            file.attrs["model_config"] = json.dumps(config)
        with self.assertRaisesRegex(
            ModelError, rf"names {kind} of io.gfile.rmtree \(layer remove\), which is"
        ):
            files.read_model(path)
        self.assertTrue(precious.is_dir())

    @parameterized.parameters(
        ({"class_name": "__tuple__", "module": "os"}, "os.__tuple__,"),
        ({"class_name": "TensorShape", "registered_name": "own>a"}, ".*own>a,"),
        (
            {"class_name": "Dense", "module": "keras", "registered_name": "TFOpLambda"},
            "keras.Dense, registered as TFOpLambda,",
        ),
        (
            {"class_name": "function", "config": "relu", "registered_name": "eval"},
            ".*eval,",
        ),
        ({"class_name": "InstanceMethod", "module": "keras"}, "keras.InstanceMethod,"),
        ({"class_name": "ClassMethod"}, "ClassMethod,"),
    )
    def test_names_that_keras_2_looks_up_anywhere_are_refused(self, part, name):
        with self.assertRaisesRegex(ModelError, f"names {name} which is not known"):
            files._check_config(self.folder, {"config": {}} | part, False, keras)

    def test_function_of_the_program_that_made_the_file_is_refused(self):
        own = {"module": "__main__", "class_name": "function", "config": "mine"}
        config = with_activation(K, own)
        with self.assertRaisesRegex(
            ModelError, r"names __main__.mine \(.* last\), .*Write it as Keras layers$"
        ):
            files._check_config(self.folder, config, False, K)

    @parameterized.product(
        library=list(LIBRARIES), as_text=(False, True), allow_code=(False, True)
    )
    def test_activation_that_keras_has_not_is_named(self, library, as_text, allow_code):
        library = LIBRARIES[library]
        given = rf"\({library.__name__}.saving.register_keras_serializable\), and call"
        for name, way_out in (
            ("own>mish", given),
            ("own>my_mish", "Write it as Keras layers$"),
            ("my_mish", "Write it as Keras layers$"),
        ):
            own = {"module": "builtins", "class_name": "function", "config": name}
            config = with_activation(library, name if as_text else own)
            with self.assertRaisesRegex(
                ModelError,
                rf"names {name} \(activation of layer last\), which is not of Keras "
                rf"[\d.]+, .*{way_out}",
            ):
                files._check_config(self.folder, config, allow_code, library)

    def test_activations_are_known_where_keras_2_has_them(self):
        its_own = vars(keras.src.activations)
        for name in filter(str.islower, files._KNOWN_ACTIVATIONS):
            found = files._has_activation(keras, name)
            self.assertEqual(found, name in its_own, name)
        for name in ("celu", "hard_swish"):
            files._check_config(self.folder, with_activation(K, name), False, K)
        with self.assertRaisesRegex(ModelError, "names celu .* as Keras layers$"):
            config = with_activation(keras, "celu")
            files._check_config(self.folder, config, False, keras)
        # As a function of TensorFlow it is renamed.
        softmax = {"module": "builtins", "class_name": "function"}
        config = with_activation(keras, softmax | {"config": "softmax_v2"})
        files._check_config(self.folder, config, False, keras)

    # Of an .h5 file, it finds none that it has written itself.
    def test_activation_that_keras_2_has_not_may_be_given_to_it(self):
        def hard_swish(x):
            return x * tf.nn.relu6(x + 3.0) / 6.0

        model = network(keras, keras.layers.Conv2D(4, 3, activation=hard_swish))
        path = self.folder / "model.keras"
        model.save(path)
        with self.assertRaisesRegex(
            ModelError,
            "names hard_swish .* not of Keras 2.* "
            r"\(tf_keras.utils.get_custom_objects\(\)\['hard_swish'\] = hard_swish\)",
        ):
            files.read_model(path)
        given = keras.utils.get_custom_objects()
        given["hard_swish"] = hard_swish
        self.addCleanup(given.pop, "hard_swish")
        self.check_answers(path, model)

    @parameterized.parameters(*LIBRARIES)
    def test_function_that_the_other_keras_was_given_is_not_found(self, library):
        (other,) = LIBRARIES.keys() - {library}
        package, library = f"dfq_tf_{other}", LIBRARIES[library]
        register = LIBRARIES[other].saving.register_keras_serializable
        register(package, "mish")(lambda x: x)
        config = with_activation(library, f"{package}>mish")
        with self.assertRaisesRegex(
            ModelError, rf"names {package}>mish .*\({library.__name__}.saving.register"
        ):
            files._check_config(self.folder, config, False, library)

    # What tf_keras writes of such a function to an .h5 file, it cannot read itself.
    @parameterized.parameters(
        ("keras2", ".keras"), ("keras3", ".keras"), ("keras3", ".h5")
    )
    def test_registered_function_that_is_its_namesake_of_keras(self, library, suffix):
        library = LIBRARIES[library]

        @library.saving.register_keras_serializable("dfq_tf_test", "mish")
        def own_mish(x):
            return x * tf.tanh(tf.math.softplus(x))

        model = network(library, library.layers.Conv2D(4, 3, activation=own_mish))
        path = self.folder / f"model{suffix}"
        model.save(path)
        self.check_answers(path, model)

    # Their layers are many, and each must be among those that are known.
    @parameterized.parameters(*LIBRARIES)
    def test_applications_of_keras_may_be_read(self, library):
        self.check_application(library, "MobileNetV3Small")

    @parameterized.parameters(*LIBRARIES)
    @pytest.mark.long
    def test_large_applications_of_keras_may_be_read(self, library):
        self.check_application(library, "EfficientNetB0")

    def check_application(self, library, name):
        library = LIBRARIES[library]
        make = getattr(library.applications, name)
        model = make(weights=None, input_shape=(32, 32, 3), classes=3)
        config = json.loads(model.to_json())
        files._check_config(self.folder, config, False, library)

    @parameterized.product(library=list(LIBRARIES), suffix=(".keras", ".h5"))
    def test_scaled_sum_of_inception_resnet_is_read(self, library, suffix):
        library = LIBRARIES[library]
        module = inspect.getmodule(library.applications.InceptionResNetV2)
        image = library.layers.Input((8, 8, 3))
        more = library.layers.Conv2D(3, 1, name="more")
        total = module.CustomScaleLayer(0.25)([image, more(image)])
        model = library.Model(image, library.layers.GlobalAveragePooling2D()(total))
        path = self.folder / f"model{suffix}"
        model.save(path)
        images = np.random.default_rng(0).uniform(0, 255, (4, 8, 8, 3))
        images = images.astype(np.float32)
        kernel = np.asarray(more.get_weights()[0])[0, 0]
        expected = (images + 0.25 * images @ kernel).mean((1, 2))
        found = as_classifier(path, input_mean=0, input_scale=1, output="logits")
        self.assertAllClose(found.scores(images), expected, rtol=1e-5)

    # Keras 3 itself does not read its own HDF5 of sums.
    @parameterized.parameters(
        ("keras2", ".keras"), ("keras2", ".h5"), ("keras3", ".keras")
    )
    def test_convnext_is_read(self, library, suffix):
        library = LIBRARIES[library]
        module = inspect.getmodule(library.applications.ConvNeXtTiny)
        model = module.ConvNeXt(
            depths=[1, 1, 2, 1],
            projection_dims=[4, 6, 8, 10],
            drop_path_rate=0.2,
            layer_scale_init_value=0.5,
            weights=None,
            input_shape=(32, 32, 3),
            classes=5,
            classifier_activation=None,
        )
        path = self.folder / f"model{suffix}"
        model.save(path)
        images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
        expected = np.asarray(model(images.astype(np.float32)))
        self.assertGreater(np.ptp(expected), 0.1)
        found = as_classifier(path)
        self.assertAllClose(found.scores(images), expected, atol=1e-4)

    def test_pipeline_is_looked_through(self):
        path = self.folder / "model.keras"
        network(K, K.layers.Pipeline([K.layers.RandomFlip()])).save(path)
        found = as_classifier(path, input_mean=0, input_scale=1)
        kinds = [node.kind for node in found.graph.nodes.values()]
        self.assertEqual(kinds, ["image", "reshape", "dense"])
        half = K.layers.Lambda(lambda x: 0.5 * x, name="inside")
        network(K, K.layers.Pipeline([half])).save(path)
        with self.assertRaisesRegex(ModelError, r"Python code \(inside"):
            files.read_model(path)

    def test_model_of_models_is_looked_through(self):
        inner = network(K, K.layers.Lambda(lambda x: 2 * x, name="inside"))
        image = K.layers.Input((8, 8, 3))
        path = self.folder / "model.keras"
        K.Model(image, inner(image)).save(path)
        with self.assertRaisesRegex(ModelError, r"Python code \(inside"):
            files.read_model(path)

    def test_quantized_student_is_read_and_is_no_classifier(self):
        images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 3), np.uint8)
        network = post_training.post_training(
            post_training.float_network(helpers.small_classifier()), images
        )
        path = self.folder / "student.keras"
        student.save(network, path)
        loaded = files.read_model(path)
        expected = student.build(network)(pixels := images.astype(np.float32))
        self.assertAllEqual(loaded(pixels), expected)
        with self.assertRaisesRegex(ModelError, "dfq_tf.load_quantized"):
            as_classifier(path)


if __name__ == "__main__":
    tf.test.main()
