"""Which output of a model is read, and what is taken off before."""

import pathlib

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf, tfmot
from dfq_tf.errors import ConfigError, ModelError, UnsupportedLayerError
from dfq_tf.importing.classifiers import as_classifier
from tests import helpers, networks

K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}
FED = dict(input_mean=0, input_scale=1 / 255)


def pixels():
    return networks.images((8, 8, 3), 20)


def heads(library, *, as_dictionary=False, between=None):
    """A model of three outputs, and one of each alone, with the same weights."""
    layers = library.layers
    image = layers.Input((8, 8, 3), name="photo")
    x = layers.Conv2D(4, 3, activation="relu", name="conv")(image)
    y = layers.GlobalAveragePooling2D()(x)
    outputs = {
        "kind": layers.Dense(5, "softmax", name="kind_dense")(y),
        "age": layers.Dense(3, name="age_dense")(y),
        "mask": layers.Conv2D(2, 1, name="mask_conv")(between(x) if between else x),
    }
    given = outputs if as_dictionary else list(outputs.values())
    alone = {name: library.Model(image, each) for name, each in outputs.items()}
    return library.Model(image, given), alone


def answers(model):
    return np.asarray(model(pixels() / np.float32(255), training=False))


class HeadTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(
        library=list(LIBRARIES),
        as_dictionary=(False, True),
        suffix=("object", ".keras", ".h5"),
    )
    def test_one_of_several_outputs(self, library, as_dictionary, suffix):
        model, alone = heads(LIBRARIES[library], as_dictionary=as_dictionary)
        source = model
        if suffix != "object":
            source = pathlib.Path(self.get_temp_dir()) / f"{library}{suffix}"
            model.save(source)
        name = "age" if as_dictionary else "age_dense"
        classifier = as_classifier(source, **FED, head=name)
        self.assertEqual(classifier.num_classes, 3)
        expected = answers(alone["age"])
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-5)

    @parameterized.product(library=list(LIBRARIES), as_dictionary=(False, True))
    def test_error_lists_the_outputs(self, library, as_dictionary):
        model, _ = heads(LIBRARIES[library], as_dictionary=as_dictionary)
        kind, age, mask = (
            ("kind", "age", "mask")
            if as_dictionary
            else ("kind_dense", "age_dense", "mask_conv")
        )
        for each in (
            rf"{kind} \(None, 5\)",
            rf"{age} \(None, 3\)",
            rf"{mask} \(None, 6, 6, 2\)",
        ):
            expected = rf"the model has 3 outputs: .*{each}.*--head="
            with self.assertRaisesRegex(ConfigError, f"^{expected}"):
                as_classifier(model, **FED)
            with self.assertRaisesRegex(ConfigError, f"^head is 'ag', but {expected}"):
                as_classifier(model, **FED, head="ag")

    @parameterized.parameters(*LIBRARIES)
    def test_output_that_is_no_row_of_scores(self, library):
        model, _ = heads(LIBRARIES[library])
        with self.assertRaisesRegex(ModelError, r"output shape is \(None, 6, 6, 2\)"):
            as_classifier(model, **FED, head="mask_conv")

    @parameterized.parameters(*LIBRARIES)
    def test_row_of_scores_in_more_axes(self, library):
        layers = LIBRARIES[library].layers
        model = LIBRARIES[library].Sequential(
            [layers.Input((8, 8, 3)), layers.Conv2D(4, 8)]
        )
        with self.assertRaisesRegex(
            ModelError, r"\(None, 1, 1, 4\); .*Add a layer behind it, .*Flatten\(\)"
        ):
            as_classifier(model, **FED)

    @parameterized.parameters(*LIBRARIES)
    def test_layers_of_other_outputs_are_not_read(self, library):
        layers = LIBRARIES[library].layers
        model, alone = heads(
            LIBRARIES[library], between=layers.Softmax(axis=1, name="rows")
        )
        scores = as_classifier(model, **FED, head="age_dense").scores(pixels())
        self.assertAllClose(scores, answers(alone["age"]), atol=1e-5)

    @parameterized.parameters(*LIBRARIES)
    def test_head_of_a_model_of_one_output(self, library):
        _, alone = heads(LIBRARIES[library])
        classifier = as_classifier(alone["age"], **FED, head="age_dense")
        expected = answers(alone["age"])
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-5)
        with self.assertRaisesRegex(
            ConfigError, r"head is 'kind', but .* one output, age_dense \(None, 3\)"
        ):
            as_classifier(alone["age"], **FED, head="kind")

    def test_head_of_what_says_all_itself(self):
        with self.assertRaisesRegex(ConfigError, "head is 'x', but the model is a Cl"):
            as_classifier(helpers.small_classifier(), head="x")

    @parameterized.product(library=list(LIBRARIES), as_list=(False, True))
    def test_one_output_of_a_model_inside_another(self, library, as_list):
        library = LIBRARIES[library]
        layers = library.layers
        inner, alone = heads(
            library, as_dictionary=not as_list, between=layers.Softmax(axis=1)
        )
        image = layers.Input((8, 8, 3))
        given = inner([image] if as_list else {"photo": image})
        x = layers.ReLU()(given[1] if as_list else given["age"])
        model = library.Model(image, {"scores": layers.Dense(4, name="last")(x)})
        features = np.maximum(answers(alone["age"]), 0)
        kernel, bias = model.get_layer("last").get_weights()
        scores = as_classifier(model, **FED).scores(pixels())
        self.assertAllClose(scores, features @ kernel + bias, atol=1e-5)

    @parameterized.parameters(*LIBRARIES)
    def test_layer_of_several_outputs_is_refused_by_name(self, library):
        class Two(LIBRARIES[library].layers.Layer):
            def call(self, x):
                return x, x

            def compute_output_shape(self, shape):
                return shape, shape

        layers = LIBRARIES[library].layers
        image = layers.Input((8, 8, 3))
        x = layers.Flatten()(Two(name="two")(image)[1])
        model = LIBRARIES[library].Model(image, layers.Dense(4)(x))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer two \(Two\).* gives several outputs"
        ):
            as_classifier(model, **FED)


class PruningAndClusteringTest(parameterized.TestCase, tf.test.TestCase):
    def wrapped(self, model, kind):
        """The model in wrappers of a kind, after a step of their training."""
        if kind == "PruneLowMagnitude":
            return tfmot.sparsity.keras.prune_low_magnitude(model)
        clustering = tfmot.clustering.keras
        result = clustering.cluster_weights(
            model,
            number_of_clusters=4,
            cluster_centroids_init=clustering.CentroidInitialization.LINEAR,
        )
        result(tf.zeros((1, 8, 8, 3)), training=True)  # weights go to their clusters
        return result

    @parameterized.product(
        kind=("PruneLowMagnitude", "ClusterWeights"),
        suffix=("object", ".h5", ".keras"),
    )
    def test_wrappers_are_taken_off(self, kind, suffix):
        layers = keras.layers
        model = keras.Sequential(
            [
                layers.Input((8, 8, 3)),
                layers.Conv2D(4, 3, name="conv"),
                layers.BatchNormalization(),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(4, name="last"),
            ]
        )
        for layer in model.layers:
            helpers.randomise(layer)
        source = wrapped = self.wrapped(model, kind)
        expected = answers(wrapped)
        if suffix != "object":
            source = pathlib.Path(self.get_temp_dir()) / f"wrapped{suffix}"
            wrapped.save(source)
        with self.assertWarnsRegex(
            UserWarning, rf"has \d layers in {kind} wrappers.*are taken off"
        ):
            classifier = as_classifier(source, **FED)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)
        kernel = classifier.graph.nodes["conv"].weights["kernel"]
        self.assertAllEqual(kernel, model.get_layer("conv").kernel.numpy())
        if kind == "ClusterWeights":
            self.assertLen(np.unique(kernel), 4)


class QuantizationTest(parameterized.TestCase, tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        layers, quantization = keras.layers, tfmot.quantization.keras
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="conv")(image)
        x = layers.BatchNormalization(name="bn")(x)
        x = y = layers.ReLU()(x)
        x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
        x = layers.Flatten()(layers.Add()([x, y]))
        x = layers.Dense(4, "softmax", name="last")(x)
        cls.model = keras.Model(image, x)
        for layer in cls.model.layers:
            helpers.randomise(layer)
        quantized = quantization.quantize_model(cls.model)
        image = layers.Input((8, 8, 3))
        x = quantized(layers.ReLU(name="head")(image))
        cls.wrapped = {
            "quantized": quantized,
            "annotated": quantization.quantize_annotate_model(cls.model),
            "inside another": keras.Model(image, x),
        }

    @parameterized.parameters(
        ("quantized", "object"),
        ("quantized", ".h5"),
        ("quantized", ".keras"),
        ("annotated", "object"),
        ("annotated", ".keras"),
        ("inside another", "object"),
        ("inside another", ".keras"),
    )
    def test_wrappers_of_quantization_are_taken_off(self, which, suffix):
        source = self.wrapped[which]
        if suffix != "object":
            path = pathlib.Path(self.get_temp_dir()) / f"wrapped{suffix}"
            source.save(path)
            source = path
        count = 7 if which == "annotated" else 8
        with self.assertWarnsRegex(
            UserWarning, rf"has {count} layers of tfmot.*taken off.*ranges .* anew"
        ):
            classifier = as_classifier(source, **FED)
        expected = answers(self.model)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-5)
        for name in ("conv", "last"):
            kernel = classifier.graph.nodes[name].weights["kernel"]
            self.assertAllEqual(kernel, self.model.get_layer(name).get_weights()[0])

    def test_model_in_memory_stays_as_it_is(self):
        before = answers(self.wrapped["quantized"])
        with self.assertWarns(UserWarning):
            as_classifier(self.wrapped["quantized"], **FED)
        self.assertAllEqual(answers(self.wrapped["quantized"]), before)
        # The wrappers do round: what is read above is another thing.
        self.assertGreater(np.abs(before - answers(self.model)).max(), 1e-3)


if __name__ == "__main__":
    tf.test.main()
