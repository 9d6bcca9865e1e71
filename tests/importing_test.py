"""From a model of any kind to a classifier that answers as it does."""

import pathlib
import re
import warnings

import numpy as np
from absl.testing import parameterized

from dfq_tf import api
from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ConfigError, ModelError, UnsupportedLayerError
from dfq_tf.graph import rewriting, running
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.training.learner import Learner
from tests import helpers, networks

K = keras3()
LIBRARIES = {"keras2": keras, "keras3": K}
# What models of each library call functions of.
FUNCTIONS = {"keras2": tf, "keras3": K.ops}
CLASSES = 4


def model_of(library, *links, shape=(8, 8, 3), head=None, units=CLASSES):
    """Links, a convolution, a dense layer and what is behind that; random weights."""
    layers = library.layers
    image = x = layers.Input(shape)
    for link in links:
        x = link(x)
    x = layers.Conv2D(6, 3, strides=2, name="conv")(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(units, activation=head, name="last")(x)
    return randomised(library, library.Model(image, x))


def randomised(library, model):
    if library is K:
        return helpers.randomise_keras3(model)
    names = ("Conv2D", "Dense", "BatchNormalization")
    for layer in model.layers:
        if type(layer).__name__ in names:
            helpers.randomise(layer)
    return model


def answers(model, inputs):
    outputs = model(inputs.astype(np.float32), training=False)
    return np.asarray(outputs if isinstance(outputs, tf.Tensor) else outputs.numpy())


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kinds(classifier):
    return [node.kind for node in classifier.graph.nodes.values()]


def of_sums(policy, weight, kernel=(1.0, -1.0), head=None):
    """A model of one dense layer behind the mean of weighted sums of channels."""
    layers = keras.layers
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(1, 1, use_bias=False, dtype=policy, name="sum")(image)
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(len(kernel), head, use_bias=False)(x)
    model = keras.Model(image, x)
    model.set_weights([np.full((1, 1, 3, 1), weight), np.array([kernel])])
    return model


# What is behind the convolution of `model_of`.
BODY = ["batch_normalization", "relu"]


def pixels(shape=(8, 8, 3)):
    return networks.images(shape, 20)


class PreprocessingTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(library=list(LIBRARIES), suffix=("object", ".keras", ".h5"))
    def test_layers_at_the_head_go_into_the_description(self, library, suffix):
        library = LIBRARIES[library]
        layers = library.layers
        model = model_of(
            library,
            layers.RandomFlip("horizontal"),
            layers.Rescaling(1 / 127.5, offset=-1),
            layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[0.5, 0.6, 0.7]),
        )
        source = model
        if suffix != "object":
            source = pathlib.Path(self.get_temp_dir()) / f"model{suffix}"
            model.save(source)
        classifier = as_classifier(source)
        mean, deviation = np.array([0.1, 0.2, 0.3]), np.sqrt([0.5, 0.6, 0.7])
        described = classifier.description
        self.assertAllClose(described.input_scale, 1 / 127.5 / deviation)
        self.assertAllClose(described.input_mean, 127.5 * (1 + mean))
        self.assertEqual(described.output, "logits")
        self.assertEqual(described.class_names, ("0", "1", "2", "3"))
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )
        self.assertEqual(
            kinds(classifier),
            ["image", "conv", *BODY, "global_average_pool", "dense"],
        )

    @parameterized.parameters(*LIBRARIES)
    def test_functions_at_the_head_go_into_the_description(self, library):
        model = model_of(LIBRARIES[library], lambda x: x / 127.5 - 1.0)
        classifier = as_classifier(model)
        self.assertAllClose(classifier.description.input_mean, [127.5])
        self.assertAllClose(classifier.description.input_scale, [1 / 127.5])
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )

    @parameterized.product(library=list(LIBRARIES), padded=(False, True))
    def test_order_of_channels_goes_into_the_first_kernel(self, library, padded):
        # As ResNet50, VGG16 and others: blue first, less a mean for each channel.
        library = LIBRARIES[library]
        links = [library.applications.resnet50.preprocess_input]
        links += [library.layers.ZeroPadding2D(1)] * padded
        model = model_of(library, *links)
        suffix = "keras" if library is K else "h5"
        path = pathlib.Path(self.get_temp_dir()) / f"bgr.{suffix}"
        model.save(path)
        classifier = as_classifier(path if padded else model)
        described = classifier.description
        self.assertAllClose(described.input_mean, [123.68, 116.779, 103.939])
        self.assertAllClose(described.input_scale, [1.0])
        expected = answers(model, pixels())
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-3)
        graph = rewriting.fold(classifier.graph)
        convolutions = [n for n in graph.nodes.values() if n.kind == "conv"]
        self.assertLen(convolutions, 1)
        fed = described.normalize(tf.constant(pixels(), tf.float32))
        (folded,) = running.compute(graph, fed, [graph.output])
        self.assertAllClose(folded, expected, atol=1e-3)

    @parameterized.parameters(*LIBRARIES)
    def test_orders_and_scales_at_the_head_in_turn(self, library):
        scale = np.array([0.01, 0.02, 0.03], np.float32)
        model = model_of(
            LIBRARIES[library],
            lambda x: x * scale,
            lambda x: x[..., ::-1],
            lambda x: x * scale + scale,
            lambda x: x[..., ::-1],
            lambda x: x - 1.0,
        )
        classifier = as_classifier(model)
        self.assertAllClose(
            classifier.description.input_scale, scale * scale[::-1], rtol=1e-5
        )
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )

    @parameterized.parameters(*LIBRARIES)
    def test_what_the_user_says_comes_before_the_models_own(self, library):
        library = LIBRARIES[library]
        model = model_of(library, library.layers.Rescaling(2.0, offset=1.0))
        said = dict(input_mean=100, input_scale=[0.1])
        with self.assertRaisesRegex(
            ConfigError,
            r"input_mean \(100.0,\) and input_scale \(0.1,\) are given, and the model "
            "has preprocessing of its own, .*: both would apply.*--input_on_top",
        ):
            as_classifier(model, **said)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            classifier = as_classifier(model, **said, input_on_top=True)
        self.assertAllClose(classifier.description.input_scale, [0.2])
        expected = answers(model, (pixels() - 100.0) * 0.1)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)

    def test_on_top_of_nothing(self):
        rescaled = model_of(keras, keras.layers.Rescaling(1 / 255))
        with self.assertRaisesRegex(ConfigError, "input_on_top .* without input_mean"):
            as_classifier(rescaled, input_on_top=True)
        with self.assertRaisesRegex(ConfigError, "input_on_top .* no preprocessing"):
            as_classifier(model_of(keras), feeding="raw", input_on_top=True)

    def test_no_warning_where_pixels_go_through_one_of_them(self):
        rescaled = model_of(keras, keras.layers.Rescaling(1 / 255))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            as_classifier(rescaled)
            as_classifier(rescaled, input_mean=0, input_scale=1)
            as_classifier(model_of(keras), input_mean=3, input_scale=0.1)

    @parameterized.parameters(
        (dict(input_mean=0, input_scale="1/255"), "input_scale is '1/255'; give a num"),
        (dict(input_mean=[1, 1], input_scale=1), "input_mean has 2 values .* give one"),
        (
            dict(input_mean=0, input_scale=[1, 1]),
            "input_scale has 2 values .* give one",
        ),
        *(
            (
                dict(input_mean=mean, input_scale=1),
                rf"^input_mean is {re.escape(repr(mean))}; give a number, or one for e",
            )
            for mean in ([[1]], np.ones((1, 3)), {}, "a")
        ),
        (
            dict(feeding="raw", input_mean=np.ones(3)),
            r"^feeding is 'raw', and input_mean is \[1\. 1\. 1\.\] .*; give one or the",
        ),
        (dict(feeding=["raw"]), r"^feeding is \['raw'\]; it must be one of raw"),
        *(
            (
                dict(feeding="raw", class_names=names),
                rf"^class_names is {re.escape(repr(names))}; give a name for each clas",
            )
            for names in (5, {0: "cat"}, {"cat"}, b"abcd", "abcd", np.array("abcd"))
        ),
        (
            dict(feeding="raw", class_names=["a", " ", "c", "d"]),
            r"^class_names is \['a', ' ', 'c', 'd'\], in which a name is empty; give o",
        ),
        (dict(feeding="raw", class_names=[""] * 4), "in which a name is empty; give "),
        (
            dict(feeding="raw", class_names=["cat"] * 4),
            "^class_names has 4 times 'cat' and no other name; .* out for numbers$",
        ),
        (dict(feeding="raw", image_size=8), "image_size is 8; give .height, width."),
        *(
            (
                dict(feeding="raw", image_size=size),
                rf"^image_size is {re.escape(repr(size))}; give .height, width., two i",
            )
            for size in ((8.0, 8.0), ("8", "8"), "8,8", (None, None), ())
        ),
        *(
            (
                dict(feeding="raw", class_names=["cat", name, "c", "d"]),
                rf"^class_names has {name!r}, a {kind}; give texts \(str\), such as b'",
            )
            for name, kind in (
                (b"dog", "bytes"),
                (None, "NoneType"),
                (float("nan"), "float"),
            )
        ),
    )
    def test_what_is_no_such_argument_is_refused(self, said, message):
        with self.assertRaisesRegex(ConfigError, message):
            as_classifier(model_of(keras), **said)

    def test_names_may_be_an_array(self):
        names = np.array(["a", "b", "c", "d"])
        classifier = as_classifier(model_of(keras), feeding="raw", class_names=names)
        self.assertEqual(classifier.description.class_names, (*"abcd",))

    def test_two_classes_may_have_one_name(self):
        names = ["crane", "crane", "b", "c"]
        classifier = as_classifier(model_of(keras), feeding="raw", class_names=names)
        self.assertEqual(classifier.description.class_names, tuple(names))

    @parameterized.parameters(*LIBRARIES)
    def test_scale_below_zero_stays_in_the_network(self, library):
        library = LIBRARIES[library]
        for scale, offset in ((-1 / 255, 1.0), (-1.0, 255.0)):
            model = model_of(library, library.layers.Rescaling(scale, offset=offset))
            for said in ({}, dict(input_mean=0, input_scale=1)):
                classifier = as_classifier(model, **said)
                self.assertEqual(kinds(classifier)[:2], ["image", "affine"])
                self.assertAllClose(
                    classifier.scores(pixels()), answers(model, pixels()), atol=1e-3
                )
        of_others = model_of(library, library.layers.Rescaling(-1.0, offset=1.0))
        with self.assertRaisesRegex(ConfigError, "input_mean and input_scale are not"):
            as_classifier(of_others)

    def check_refused(self, library, adapted, moments, message):
        """A Normalization at the head, and a BatchNormalization of the same moments."""
        layers = library.layers
        remembers = layers.BatchNormalization(name="head")
        remembers.build((None, 8, 8, 3))
        remembers.set_weights([np.ones(3), np.zeros(3), *map(np.array, moments)])
        for head in (adapted, remembers):
            image = layers.Input((8, 8, 3))
            model = library.Model(image, model_of(library)(head(image)))
            with self.assertRaisesRegex(UnsupportedLayerError, message):
                as_classifier(model, input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_channel_that_was_always_the_same_is_refused(self, library):
        """At the head it would take all integers from the others."""
        library = LIBRARIES[library]
        images = np.random.default_rng(0).uniform(0, 255, (64, 8, 8, 3))
        images[..., 1] = 7.0
        adapted = library.layers.Normalization(name="head")
        adapted.adapt(images.astype(np.float32))
        moments = images.mean((0, 1, 2)), images.var((0, 1, 2))
        message = "layer head .* it scales channel 1 .* variance"
        self.check_refused(library, adapted, moments, message)

    @parameterized.parameters(*LIBRARIES)
    def test_channels_that_were_always_the_same_are_refused_if_they_are_most(
        self, library
    ):
        library = LIBRARIES[library]
        mean, variance = [99.0, 7.0, 7.0], [3600.0, 0.0, 0.0]
        adapted = library.layers.Normalization(
            mean=mean, variance=variance, name="head"
        )
        message = "layer head .* it scales channels 1, 2 .* varia"
        self.check_refused(library, adapted, (mean, variance), message)

    @parameterized.product(library=list(LIBRARIES), axis=(-1, 3, None))
    def test_adapted_normalization_goes_into_the_description(self, library, axis):
        library = LIBRARIES[library]
        layer = library.layers.Normalization(axis=axis)
        images = np.random.default_rng(0).uniform(0, [90, 180, 255], (64, 8, 8, 3))
        layer.adapt(images.astype(np.float32))
        image = library.layers.Input((8, 8, 3))
        model = library.Model(image, model_of(library)(layer(image)))
        classifier = as_classifier(model)
        over = None if axis is None else (0, 1, 2)
        mean, deviation = images.mean(over), images.std(over)
        described = classifier.description
        self.assertAllClose(described.input_mean, np.atleast_1d(mean), rtol=1e-4)
        self.assertAllClose(
            described.input_scale, np.atleast_1d(1 / deviation), rtol=1e-4
        )
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )

    @parameterized.product(library=list(LIBRARIES), axis=(1, (1, 2, 3)))
    def test_normalization_over_other_axes_is_refused_by_name(self, library, axis):
        library = LIBRARIES[library]
        layer = library.layers.Normalization(axis=axis, name="norm")
        layer.adapt(np.random.default_rng(0).uniform(size=(4, 8, 8, 3)))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer norm \(Normalization\) .*it has axis"
        ):
            as_classifier(model_of(library, layer))

    @parameterized.parameters(*LIBRARIES)
    def test_rescaling_of_an_array_and_of_each_place(self, library):
        library = LIBRARIES[library]
        scale = np.array([0.01, 0.02, 0.03])
        model = model_of(library, library.layers.Rescaling(scale))
        self.assertAllClose(as_classifier(model).description.input_scale, scale)
        places = np.linspace(0.01, 0.02, 24).reshape(8, 3).tolist()
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer places .*constant of shape \(8, 3\)"
        ):
            as_classifier(
                model_of(library, library.layers.Rescaling(places, name="places"))
            )

    def test_rescaling_of_tensors(self):
        scale = [0.01, 0.02, 0.03]
        layer = K.layers.Rescaling(tf.constant(scale), tf.constant(-1.0))
        found = as_classifier(model_of(K, layer)).description
        self.assertAllClose(found.input_scale, scale)
        self.assertAllClose(found.input_mean, 1 / np.array(scale))

    @parameterized.parameters(*LIBRARIES)
    def test_nothing_said_is_an_error_that_says_what_to_say(self, library):
        with self.assertRaisesRegex(
            ConfigError, "input_mean and input_scale are not given, .*1/255"
        ):
            as_classifier(model_of(LIBRARIES[library]))

    def test_one_of_two_is_not_enough(self):
        with self.assertRaisesRegex(
            ConfigError, "input_mean is 3.0 and input_scale is None; give both"
        ):
            as_classifier(model_of(keras), input_mean=3.0)


class FusionTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters("swish, leaky_relu", "add, leaky_relu", "bn, tanh")
    def test_what_tensorflow_would_fuse_and_not_compute(self, behind):
        """What stands behind a convolution."""
        layers = keras.layers
        image = layers.Input((8, 8, 3))
        if behind == "swish, leaky_relu":
            x = layers.Conv2D(6, 1, activation="swish", name="conv")(image)
            x = layers.LeakyReLU()(x)
        elif behind == "add, leaky_relu":
            first = layers.Conv2D(6, 1, name="first")(image)
            x = layers.Add()([layers.Conv2D(6, 1, name="conv")(image), first])
            x = layers.LeakyReLU(0.3)(x)
        else:
            x = layers.Conv2D(6, 1, use_bias=False, name="conv")(image)
            x = layers.Activation("tanh")(layers.BatchNormalization()(x))
        model = keras.Model(image, layers.Dense(CLASSES)(layers.Flatten()(x)))
        classifier = as_classifier(randomised(keras, model), feeding="raw")
        expected = model(pixels().astype(np.float32), training=False)  # one by one
        self.assertAllClose(classifier.scores(pixels()), expected, rtol=1e-4, atol=1e-2)


class HeadTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(library=list(LIBRARIES), as_layer=(False, True))
    def test_softmax_becomes_logits(self, library, as_layer):
        library = LIBRARIES[library]
        model = model_of(
            library,
            library.layers.Rescaling(1 / 255),
            head=None if as_layer else "softmax",
        )
        if as_layer:
            last = library.layers.Softmax()(model.outputs[0])
            model = library.Model(model.inputs, last)
        classifier = as_classifier(model)
        self.assertEqual(classifier.description.output, "logits")
        scores = classifier.scores(pixels())
        self.assertGreater(np.ptp(scores.sum(-1)), 0.1)
        self.assertAllClose(softmax(scores), answers(model, pixels()), atol=1e-5)

    def test_keras_2_model_as_it_is_keeps_its_softmax(self):
        model = model_of(keras, head="softmax")
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        self.assertEqual(classifier.description.output, "softmax")
        self.assertEqual(classifier.graph.last.kind, "softmax")
        expected = answers(model, pixels() / 255)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-5)

    @parameterized.product(library=list(LIBRARIES), head=("sigmoid", None))
    def test_one_score_becomes_two_logits(self, library, head):
        model = model_of(LIBRARIES[library], head=head, units=1)
        classifier = as_classifier(
            model,
            input_mean=0,
            input_scale=1 / 255,
            class_names=("cat", "dog"),
            output=head or "logits",
        )
        self.assertEqual(classifier.num_classes, 2)
        self.assertEqual(classifier.description.output, "logits")
        expected = answers(model, pixels() / 255)[:, 0]
        scores = classifier.scores(pixels())
        if head is None:
            self.assertAllClose(scores[:, 1] - scores[:, 0], expected, atol=1e-4)
        else:
            self.assertAllClose(softmax(scores)[:, 1], expected, atol=1e-5)

    @parameterized.parameters(*LIBRARIES)
    def test_input_of_a_layer_may_be_given_by_its_name(self, library):
        library = LIBRARIES[library]
        inner = library.Sequential(
            [library.layers.Input((8, 8, 3)), library.layers.Conv2D(3, 3)]
        )
        scaled = library.layers.LeakyReLU(name="scaled")
        model = model_of(library, lambda x: scaled(inputs=inner(inputs=x)))
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels() / 255), atol=1e-4
        )

    @parameterized.parameters(*LIBRARIES)
    def test_images_with_channels_first_are_refused(self, library):
        layers = LIBRARIES[library].layers
        pooled = layers.GlobalAveragePooling2D(data_format="channels_first")
        for size, text, end in (
            (32, "32, 32", layers.Flatten()),
            (None, "None, None", pooled),
        ):
            links = [layers.Input((3, size, size)), end, layers.Dense(4)]
            model = LIBRARIES[library].Sequential(links)
            with self.assertRaisesRegex(
                ModelError, rf"takes images of \(3, {text}\), channels first; build it"
            ):
                as_classifier(model, input_mean=0, input_scale=1 / 255)

    @parameterized.parameters(*LIBRARIES)
    def test_softmax_of_one_score_is_refused(self, library):
        model = model_of(LIBRARIES[library], head="softmax", units=1)
        with self.assertRaisesRegex(
            ModelError, "softmax of one score, layer .*, which is 1 for any image"
        ):
            as_classifier(model, input_mean=0, input_scale=1 / 255)

    @parameterized.parameters(*LIBRARIES)
    def test_one_score_that_may_be_anything_is_asked_for(self, library):
        model = model_of(LIBRARIES[library], units=1)
        fed = dict(input_mean=0, input_scale=1 / 255)
        with self.assertRaisesRegex(
            ConfigError, r"one score without a sigmoid, layer last.*--output=logits"
        ):
            as_classifier(model, **fed)
        # A description says it too, and two scores are no question.
        description = ModelDescription((0,), (1 / 255,), "logits", ("cat", "dog"))
        path = pathlib.Path(self.get_temp_dir()) / "model.keras"
        model.save(path)
        description.save(path.with_suffix(".json"))
        self.assertEqual(as_classifier(path).num_classes, 2)
        as_classifier(model_of(LIBRARIES[library], units=2), **fed)

    @parameterized.product(library=list(LIBRARIES), is_merge=(False, True))
    def test_one_score_of_a_merge_or_a_maximum(self, library, is_merge):
        library = LIBRARIES[library]
        layers = library.layers
        image = layers.Input((8, 8, 3))
        x = layers.GlobalMaxPooling2D()(layers.Conv2D(1, 3)(image))
        if is_merge:
            flat = layers.Flatten()(image)
            x = layers.Add()([layers.Dense(1)(flat), layers.Dense(1)(flat)])
        model = library.Model(image, layers.Activation("sigmoid")(x))
        model = randomised(library, model)
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        expected = answers(model, pixels() / 255)[:, 0]
        self.assertGreater(np.ptp(expected), 1e-3)
        probabilities = softmax(classifier.scores(pixels()))
        self.assertAllClose(probabilities[:, 1], expected, atol=1e-5)
        rewriting.check_supported(rewriting.fold(classifier.graph))

    @parameterized.parameters(*LIBRARIES)
    def test_several_sigmoids_stay(self, library):
        model = model_of(LIBRARIES[library], head="sigmoid")
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        self.assertEqual(classifier.description.output, "sigmoid")
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels() / 255), atol=1e-5
        )

    def test_output_that_the_model_has_not_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError, r"output is 'logits', but .* last \(Dense\) gives softmax"
        ):
            as_classifier(
                model_of(keras, head="softmax"),
                input_mean=0,
                input_scale=1,
                output="logits",
            )

    def test_output_of_a_description_is_written_as_the_message_says(self):
        path = pathlib.Path(self.get_temp_dir()) / "model.keras"
        model_of(keras, head="softmax").save(path)
        said = ModelDescription((0,), (1 / 255,), "logits", ("a", "b", "c", "d"))
        said.save(path.with_suffix(".json"))
        with self.assertRaisesRegex(
            ConfigError, "gives softmax; .* a .json beside the model write 'softmax'$"
        ):
            as_classifier(path)
        said = ModelDescription((0,), (1 / 255,), "softmax", ("a", "b", "c", "d"))
        said.save(path.with_suffix(".json"))
        self.assertEqual(as_classifier(path).description.output, "softmax")

    @parameterized.parameters(*LIBRARIES)
    def test_one_output_in_a_dictionary_or_a_list(self, library):
        library = LIBRARIES[library]
        model = model_of(library, library.layers.Rescaling(1 / 255))
        expected = as_classifier(model).scores(pixels())
        for output in ({"scores": model.outputs[0]}, [model.outputs[0]]):
            other = library.Model(model.inputs[0], output)
            self.assertAllClose(as_classifier(other).scores(pixels()), expected)


class TrainingsTest(parameterized.TestCase, tf.test.TestCase):
    """Layers of which training has made more than inference needs."""

    def check_scores(self, model):
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 64)
        expected = answers(model, pixels() / 64)
        self.assertGreater(np.ptp(expected), 0.01)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)
        return classifier

    @parameterized.parameters(
        {}, dict(scale=False), dict(center=False), dict(scale=False, center=False)
    )
    def test_renormalized_batches(self, **settings):
        bn = keras.layers.BatchNormalization(renorm=True, name="bn", **settings)
        model = helpers.randomise(model_of(keras, bn))
        bn.moving_variance.assign([0.5, 0.9, 1.7])
        classifier = self.check_scores(model)
        weights = classifier.graph.nodes["bn"].weights
        self.assertAllEqual(weights["mean"], bn.moving_mean)
        self.assertAllEqual(weights["variance"], bn.moving_variance)

    @parameterized.product(library=list(LIBRARIES), suffix=("object", ".keras", ".h5"))
    def test_spectral_normalization_is_what_it_wraps(self, library, suffix):
        library = LIBRARIES[library]
        layers = library.layers
        conv = layers.Conv2D(6, 3, activation="relu")
        links = [
            layers.Input((8, 8, 3)),
            layers.SpectralNormalization(conv, name="normal"),
            layers.GlobalMaxPooling2D(),
            layers.SpectralNormalization(layers.Dense(CLASSES), power_iterations=2),
        ]
        model = library.Sequential(links)
        model.compile("sgd", "mse")
        target = np.random.default_rng(0).normal(size=(20, CLASSES))
        model.fit(pixels() / 64, target, epochs=2, verbose=0)
        source = model
        if suffix != "object":
            source = pathlib.Path(self.get_temp_dir()) / f"model{suffix}"
            model.save(source)
        classifier = as_classifier(source, input_mean=0, input_scale=1 / 64)
        expected = answers(model, pixels() / 64)
        self.assertGreater(np.ptp(expected), 0.01)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)
        self.assertAllEqual(
            classifier.graph.nodes["normal"].weights["kernel"], conv.get_weights()[0]
        )

    @parameterized.parameters(*LIBRARIES)
    def test_spectral_normalization_of_ones_own_is_refused(self, library):
        layers = LIBRARIES[library].layers

        class Conv2D(layers.Conv2D):
            def call(self, inputs):
                return 2 * super().call(inputs)

        wrapped = layers.SpectralNormalization(Conv2D(3, 3), name="wrapped")
        with self.assertRaisesRegex(
            UnsupportedLayerError, "layer wrapped .*it is a class of your own"
        ):
            as_classifier(
                model_of(LIBRARIES[library], wrapped), input_mean=0, input_scale=1
            )


class ShapeTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*LIBRARIES)
    def test_model_of_any_size_is_made_for_one(self, library):
        model = model_of(LIBRARIES[library], shape=(None, None, 3))
        fed = dict(input_mean=0, input_scale=1 / 255)
        with self.assertRaisesRegex(
            ConfigError, r"any size, \(None, None, 3\); .*--image_size=HEIGHT,WIDTH"
        ):
            as_classifier(model, **fed)
        classifier = as_classifier(model, **fed, image_size=(10, 14))
        self.assertEqual(classifier.image_shape, (10, 14, 3))
        images = pixels((10, 14, 3))
        self.assertAllClose(
            classifier.scores(images), answers(model, images / 255), atol=1e-4
        )

    @parameterized.product(library=list(LIBRARIES), behind_others=(False, True))
    def test_size_of_a_model_that_resizes_is_that(self, library, behind_others):
        library = LIBRARIES[library]
        layers = library.layers
        others = [lambda x: x / 51.0, layers.Rescaling(1 / 5), layers.RandomFlip()]
        links = others * behind_others
        model = model_of(
            library, *links, layers.Resizing(12, 10, name="fit"), shape=(None, None, 3)
        )
        said = {} if behind_others else dict(input_mean=0, input_scale=1 / 255)
        with self.assertWarnsRegex(
            UserWarning, "any size, and its layer fit resizes them to 12 x 10: the file"
        ):
            classifier = as_classifier(model, **said)
        self.assertEqual(classifier.image_shape, (12, 10, 3))
        # As the app gives them: large images, resized before.
        images = pixels((30, 20, 3)).astype(np.float32)
        resized = tf.image.resize(images, (12, 10)).numpy()
        expected = answers(model, images if behind_others else images / 255)
        self.assertAllClose(classifier.scores(resized), expected, atol=1e-3)
        with self.assertRaisesRegex(UnsupportedLayerError, "layer fit .*makes images"):
            as_classifier(model, **said, image_size=(30, 20))

    @parameterized.product(
        library=list(LIBRARIES), shape=((13, 12, 3), (None, None, 3))
    )
    def test_center_crop_of_larger_images(self, library, shape):
        library = LIBRARIES[library]
        layers = library.layers
        scale = [1 / 50, 1 / 60, 1 / 70]
        model = model_of(
            library,
            layers.Resizing(13, 12),
            layers.CenterCrop(8, 9),
            layers.CenterCrop(8, 9),
            layers.Rescaling(scale, offset=-1),
            shape=shape,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says the size
            classifier = as_classifier(model)
        self.assertEqual(classifier.image_shape, (13, 12, 3))
        self.assertEqual(kinds(classifier)[:3], ["image", "crop", "conv"])
        self.assertAllClose(classifier.description.input_scale, scale)
        images = pixels((13, 12, 3))
        expected = answers(model, images)
        self.assertAllClose(classifier.scores(images), expected, atol=1e-4)

    @parameterized.product(library=list(LIBRARIES), size=((9, 8), (4, 9), (10, 10)))
    def test_center_crop_of_smaller_images_is_refused(self, library, size):
        layers = LIBRARIES[library].layers
        crop = layers.CenterCrop(*size, name="crop")
        with self.assertRaisesRegex(
            UnsupportedLayerError, "layer crop .*it makes images of .* of those of"
        ):
            as_classifier(
                model_of(LIBRARIES[library], crop), input_mean=0, input_scale=1
            )

    @parameterized.parameters(*LIBRARIES)
    def test_resizing_behind_a_convolution_says_nothing_of_the_image(self, library):
        layers = LIBRARIES[library].layers
        conv = layers.Conv2D(3, 3)
        model = model_of(
            LIBRARIES[library], conv, layers.Resizing(9, 9), shape=(None, None, 3)
        )
        with self.assertRaisesRegex(ConfigError, "any size, .*--image_size"):
            as_classifier(model, input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_batch_of_a_fixed_size_becomes_free(self, library):
        library = LIBRARIES[library]
        image = library.layers.Input((8, 8, 3), batch_size=2)
        x = library.layers.Flatten()(image)
        model = library.Model(image, library.layers.Dense(CLASSES)(x))
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        self.assertAllClose(
            classifier.scores(pixels())[:2], answers(model, pixels()[:2] / 255), 1e-4
        )

    @parameterized.parameters(
        ((7, 8, 3), "7 x 8 pixels; both sides must be 8 to 640"),
        ((8, 641, 3), "8 x 641 pixels"),
        ((8, 8, 2), "2 channels; they must have 1, 3 or 4"),
    )
    def test_shape_out_of_range_is_refused(self, shape, message):
        with self.assertRaisesRegex(ModelError, message):
            as_classifier(model_of(K, shape=shape), input_mean=0, input_scale=1 / 255)

    def test_image_size_out_of_range_is_refused(self):
        model = model_of(K, shape=(None, None, 3))
        with self.assertRaisesRegex(
            ModelError, "^image_size asks for images of 7 x 8 pixels; both sides must"
        ):
            as_classifier(model, feeding="raw", image_size=(7, 8))

    def test_path_that_is_empty_is_refused(self):
        with self.assertRaisesRegex(ConfigError, "path of the model is empty; name"):
            as_classifier("")

    def test_allow_code_is_true_or_false(self):
        for value in ("no", 1, None):
            with self.assertRaisesRegex(
                ConfigError, f"allow_code is {value!r}; it must be True or False"
            ):
                as_classifier("model.keras", allow_code=value)

    def test_image_size_that_it_cannot_take_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError, r"image_size is \(9, 9\), but the model takes .*\(8, 8\)"
        ):
            as_classifier(model_of(K), input_mean=0, input_scale=1, image_size=(9, 9))


class KindTest(parameterized.TestCase, tf.test.TestCase):
    def test_classifier_is_given_back(self):
        classifier = helpers.small_classifier()
        self.assertIs(as_classifier(classifier), classifier)

    @parameterized.parameters(
        dict(input_mean=0.0),
        dict(input_scale=1 / 255),
        dict(feeding="raw"),
        dict(output="softmax"),
        dict(class_names=tuple("abcd")),
        dict(image_size=(8, 8)),
    )
    def test_classifier_says_all_itself(self, **said):
        ((name, value),) = said.items()
        expected = rf"{name} is .*{re.escape(repr(value))}, but the model is"
        with self.assertRaisesRegex(ConfigError, f"{expected} a Classifier, which"):
            as_classifier(helpers.small_classifier(), **said)
        if name != "image_size":
            with self.assertRaisesRegex(ConfigError, f"{expected} one with a descript"):
                as_classifier(helpers.small_learner(), **said)

    @parameterized.parameters("logits", "softmax")
    def test_description_of_a_learner_decides(self, output):
        model = model_of(keras, head=None if output == "logits" else output)
        description = ModelDescription((100.0,), (0.02,), output, tuple("abcd"))
        classifier = as_classifier(Learner(model, description))
        self.assertEqual(classifier.description, description)
        expected = answers(model, (pixels() - 100.0) * 0.02)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)

    def test_quantized_student_is_refused(self):
        class NodeWrapper(keras.layers.Wrapper):  # as students have it
            def call(self, inputs):
                return self.layer(inputs)

        model = model_of(keras)
        model = keras.models.clone_model(
            model,
            clone_function=lambda layer: (
                NodeWrapper(layer) if layer.name == "conv" else layer
            ),
        )
        with self.assertRaisesRegex(
            ModelError,
            "quantized already: .*dfq_tf.load_quantized, .* tools/convert.py",
        ):
            as_classifier(model, input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_subclass_has_no_layers_to_read(self, library):
        class Own(LIBRARIES[library].Model):
            def call(self, x):
                return x

        with self.assertRaisesRegex(ModelError, r"Own; it must be a .*functional"):
            as_classifier(Own(), input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_model_that_is_not_built_is_refused(self, library):
        library = LIBRARIES[library]
        model = library.Sequential([library.layers.Dense(3)])
        with self.assertRaisesRegex(ModelError, "must be( a)? built"):
            as_classifier(model, input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_two_inputs_are_refused(self, library):
        layers = LIBRARIES[library].layers
        images = [layers.Input((8, 8, 3)) for _ in range(2)]
        x = layers.Dense(3)(layers.Flatten()(layers.Add()(images)))
        with self.assertRaisesRegex(ModelError, "2 inputs and 1 outputs"):
            as_classifier(
                LIBRARIES[library].Model(images, x), input_mean=0, input_scale=1
            )

    def test_something_else_is_refused(self):
        with self.assertRaisesRegex(ModelError, "the model is a builtins.int"):
            as_classifier(3, input_mean=0, input_scale=1)

    @parameterized.parameters(
        ("half", "mixed_bfloat16"), ("brain", "mixed_float16"), ("full", "float32")
    )
    def test_keras_2_precision_becomes_float32(self, name, policy):
        layers = keras.layers
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, dtype=policy, name=name)(image)
        x = layers.Dense(CLASSES, dtype="float32")(layers.Flatten()(x))
        model = keras.Model(image, x)
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        kernel = classifier.graph.nodes[name].weights["kernel"]
        self.assertEqual(kernel.dtype, np.float32)
        self.assertAllEqual(kernel, model.get_layer(name).kernel)

    def test_rebuilt_model_that_answers_otherwise_is_an_error(self):
        model = model_of(K, K.layers.Rescaling(1 / 255))
        # A layer whose class promises something else than it does.
        model.get_layer("conv").call = lambda x: x[:, :3, :3, :1] * np.ones(6)
        with self.assertRaisesRegex(ModelError, "answers otherwise than the original"):
            as_classifier(model)

    @parameterized.product(
        library=list(LIBRARIES),
        head=(
            ("softmax", [[40.0, -40.0]]),
            ("softmax", [[400.0, -400.0]]),
            ("sigmoid", [[-40.0]]),
            ("sigmoid", [[40.0]]),
            ("sigmoid", [[40.0, -40.0]]),
        ),
    )
    def test_saturation_hides_no_difference(self, library, head):
        layers = LIBRARIES[library].layers
        activation, kernel = head
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(1, 1, use_bias=False, name="mean")(image)
        x = layers.GlobalAveragePooling2D()(x)
        dense = layers.Dense(len(kernel[0]), activation, use_bias=False)
        model = LIBRARIES[library].Model(image, dense(x))
        model.set_weights([np.full((1, 1, 3, 1), 1 / 3), np.array(kernel)])
        fed = dict(input_mean=0, input_scale=1 / 255)
        as_classifier(model, **fed)
        # What is 9 / 10 of it differs in bits that no probability near 0 or 1 has.
        mean = model.get_layer("mean")
        mean.call = lambda x: 0.3 * tf.reduce_sum(x, -1, keepdims=True)
        self.assertAllClose(
            answers(model, pixels()[:1] / 255), np.float32(np.array(kernel) > 0), 1e-6
        )
        with self.assertRaisesRegex(ModelError, "answers otherwise than the original"):
            as_classifier(model, **fed)

    @parameterized.parameters("mixed_float16", "mixed_bfloat16")
    def test_small_probabilities_of_16_bits_hide_no_difference(self, policy):
        # Of 100 classes; none is above 0.05 here, and halving makes no such difference.
        model = of_sums(policy, 1 / 3, np.linspace(-4, 4, 100), "softmax")
        fed = dict(input_mean=0, input_scale=1 / 255)
        as_classifier(model, **fed)
        layer = model.get_layer("sum")
        layer.call = lambda x: tf.reduce_sum(x, -1, keepdims=True) / 6
        with self.assertRaisesRegex(ModelError, "answers otherwise than the original"):
            as_classifier(model, **fed)

    def test_image_that_float16_cannot_sum_is_left_out(self):
        model = of_sums("mixed_float16", 400.0)  # 65,504 is less than 400 * 3 * 255
        as_classifier(model, feeding="raw")
        layer = model.get_layer("sum")
        layer.call = lambda x: 200 * tf.reduce_sum(x, -1, keepdims=True)
        with self.assertRaisesRegex(ModelError, "answers otherwise than the original"):
            as_classifier(model, feeding="raw")

    @parameterized.parameters(
        ("mixed_float16", 1e5, "in 16 bits, .*: build it in float32, with the same w"),
        ("float32", 3e38, "fed as in its training"),
    )
    def test_model_that_gives_no_numbers_is_refused(self, policy, weight, way_out):
        model = of_sums(policy, weight)
        message = f"infinity or NaN .* finite. .*{way_out}"
        with self.assertRaisesRegex(ModelError, message):
            as_classifier(model, feeding="raw")

    def test_way_out_of_16_bits_is_said(self):
        layers = keras.layers
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, dtype="mixed_bfloat16", name="conv")(image)
        x = layers.Dense(CLASSES, dtype="float32")(layers.Flatten()(x))
        model = keras.Model(image, x)
        model.get_layer("conv").call = lambda x: tf.zeros((2, 6, 6, 4))
        with self.assertRaisesRegex(
            ModelError, "in 16 bits, .*: build it in float32, with the same weights"
        ):
            as_classifier(model, input_mean=0, input_scale=1 / 255)

    def test_comparison_is_without_tf32(self):
        enabled = tf.config.experimental.tensor_float_32_execution_enabled
        self.assertTrue(enabled())
        model = model_of(K, K.layers.Rescaling(1 / 255))
        conv, seen = model.get_layer("conv"), []
        call = conv.call
        conv.call = lambda x: seen.append(enabled()) or call(x)
        as_classifier(model)
        self.assertEqual(set(seen), {False})
        self.assertTrue(enabled())

    def test_layers_without_integer_form_are_named_by_quantize(self):
        model = model_of(
            K, K.layers.Rescaling(1 / 255), K.layers.Masking(name="masked")
        )
        with self.assertRaisesRegex(UnsupportedLayerError, r"layer masked \(Masking\)"):
            api.quantize(model)


def gated(library, features, gate):
    """A model that scales each channel of some features by a gate, made of a vector."""
    layers = library.layers
    image = layers.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same")(image)
    s = layers.GlobalAveragePooling2D()(x)
    s = layers.Dense(6, activation="sigmoid")(s)
    x = layers.GlobalMaxPooling2D()(features(x) * gate(s))
    return randomised(library, library.Model(image, layers.Dense(CLASSES)(x)))


class IdiomsTest(parameterized.TestCase, tf.test.TestCase):
    """What models write with functions, in both libraries."""

    def check_scores(self, model, shape=(8, 8, 3)):
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 64)
        images = pixels(shape)
        expected = answers(model, images.reshape(20, *model.inputs[0].shape[1:]) / 64)
        self.assertGreater(np.ptp(expected), 0.01)
        self.assertAllClose(classifier.scores(images), expected, atol=1e-4)
        rewriting.check_supported(rewriting.fold(classifier.graph))
        return classifier

    def check_refused(self, library, function, reason):
        """A model that begins with the function is, for this reason."""
        with self.assertRaisesRegex(UnsupportedLayerError, reason):
            as_classifier(
                model_of(LIBRARIES[library], function), input_mean=0, input_scale=1
            )

    @parameterized.product(
        library=list(LIBRARIES),
        gate=(
            lambda s: s[:, None, None, :],
            lambda s: s[:, None, None],
            lambda s: s[..., None, None, :],
            lambda s: s[:, None, ..., None, :],
        ),
    )
    def test_new_axes_of_a_gate(self, library, gate):
        model = gated(LIBRARIES[library], lambda x: x, gate)
        classifier = self.check_scores(model)
        self.assertEqual(kinds(classifier).count("reshape"), 1)

    @parameterized.parameters(*LIBRARIES)
    def test_new_axis_of_rows_makes_channels(self, library):
        library = LIBRARIES[library]
        model = model_of(library, lambda x: x[..., None], shape=(8, 8))
        self.check_scores(model, (8, 8, 1))

    @parameterized.product(
        library=list(LIBRARIES),
        case=(
            (lambda x: x[None, ...][0], "it adds an axis before that of the batch"),
            (lambda x: x[:, None, 1:][:, 0], r"it takes .*None.*; only channels"),
        ),
    )
    def test_other_new_axes_are_refused(self, library, case):
        self.check_refused(library, *case)

    @parameterized.product(library=list(LIBRARIES), by_tuple=(False, True))
    def test_axes_of_length_one_come_and_go(self, library, by_tuple):
        functions = FUNCTIONS[library]

        def gate(s):
            s = functions.expand_dims(functions.expand_dims(s, 1), axis=-2)
            s = functions.squeeze(s, (1, 2) if by_tuple else [-2, -3])
            return functions.expand_dims(s, 1)[:, :, None]

        self.check_scores(gated(LIBRARIES[library], lambda x: x, gate))

    @parameterized.parameters(*LIBRARIES)
    def test_axes_of_length_one_of_images_of_any_size(self, library):
        library, functions = LIBRARIES[library], FUNCTIONS[library]
        layers = library.layers
        image = layers.Input((None, None, 3))
        x = layers.Conv2D(6, 3)(image)
        x = functions.squeeze(functions.expand_dims(x, 1), 1)
        x = functions.squeeze(x[:, None], [-4])
        x = layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))
        model = library.Model(image, x)
        fed = dict(input_mean=0, input_scale=1 / 64)
        classifier = as_classifier(model, **fed, image_size=(8, 9))
        images = pixels((8, 9, 3))
        expected = answers(model, images / 64)
        self.assertGreater(np.ptp(expected), 0.01)
        self.assertAllClose(classifier.scores(images), expected, atol=1e-4)
        shapes = [node.shape for node in classifier.graph.nodes.values()]
        self.assertEqual(shapes[2:6], [(1, 6, 7, 6), (6, 7, 6)] * 2)

    # Keras 3 itself reads no functions from HDF5.
    @parameterized.parameters(
        ("keras2", ".keras"), ("keras2", ".h5"), ("keras3", ".keras")
    )
    def test_axes_in_a_file(self, library, suffix):
        functions = FUNCTIONS[library]
        model = gated(
            LIBRARIES[library],
            lambda x: x,
            lambda s: functions.expand_dims(
                functions.squeeze(s[:, None, None], [1, 2])[:, None], 1
            ),
        )
        path = pathlib.Path(self.get_temp_dir()) / f"model{suffix}"
        model.save(path)
        classifier = as_classifier(path, input_mean=0, input_scale=1 / 64)
        expected = answers(model, pixels() / 64)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)

    @parameterized.parameters(*LIBRARIES)
    def test_axis_of_the_batch_stays(self, library):
        functions = FUNCTIONS[library]
        for function in (
            lambda x: functions.squeeze(functions.expand_dims(x, 0), 0),
            lambda x: functions.squeeze(functions.expand_dims(x, -5), -5),
        ):
            self.check_refused(library, function, "it changes the axis of the batch")

    def test_layers_that_change_the_size_in_training_only(self):
        layers = keras.layers
        model = model_of(
            keras,
            layers.RandomHeight(0.2),
            layers.RandomWidth(0.2),
            layers.Rescaling(1 / 255),
        )
        classifier = as_classifier(model)
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )

    @parameterized.parameters("object", ".h5", ".keras")
    def test_synchronized_normalization_is_normalization(self, suffix):
        layers = keras.layers
        norm = layers.experimental.SyncBatchNormalization()
        model = model_of(keras, layers.Rescaling(1 / 255), layers.Conv2D(4, 3), norm)
        given = model
        if suffix != "object":
            given = pathlib.Path(self.get_temp_dir()) / f"model{suffix}"
            model.save(given)
        classifier = as_classifier(given)
        self.assertIn("batch_normalization", kinds(classifier))
        self.assertAllClose(
            classifier.scores(pixels()), answers(model, pixels()), atol=1e-4
        )

    def test_squeeze_that_names_no_axes_at_the_end(self):
        image = keras.layers.Input((8, 8, 3))
        x = keras.layers.GlobalAveragePooling2D(keepdims=True)(image)
        model = keras.Model(image, tf.squeeze(x))
        with self.assertRaisesRegex(ModelError, r"name them, such as tf.squeeze\(x, "):
            as_classifier(model, input_mean=0, input_scale=1)

    def test_squeeze_that_names_no_axes_is_refused(self):
        def squeezed(x):
            x = keras.layers.GlobalAveragePooling2D(keepdims=True)(x)
            return tf.reshape(tf.squeeze(x), (-1, 1, 1, 3))

        image = keras.layers.Input((8, 8, 3))
        x = keras.layers.Dense(CLASSES)(keras.layers.Flatten()(squeezed(image)))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"names no axes .* such as tf.squeeze\(x, \[1, 2\]"
        ):
            as_classifier(keras.Model(image, x), input_mean=0, input_scale=1)

    @parameterized.parameters(*LIBRARIES)
    def test_transposed_axes(self, library):
        functions = FUNCTIONS[library]

        def shuffled(x):
            """Channels of two groups in turn, and height and width in each other's."""
            x = functions.reshape(x, (-1, 8, 8, 2, 3))
            x = functions.transpose(x, [0, 1, 2, 4, 3])
            x = functions.reshape(x, (-1, 8, 8, 6))
            x = functions.transpose(x, [0, 1, 2, 3])
            return functions.transpose(x, (0, 2, 1, 3)) - x

        model = gated(LIBRARIES[library], shuffled, lambda s: s[:, None, None])
        classifier = self.check_scores(model)
        self.assertEqual(kinds(classifier).count("transpose"), 2)

    @parameterized.product(library=list(LIBRARIES), order=((3, 1, 2, 0), None))
    def test_transposed_batch_is_refused(self, library, order):
        transpose = FUNCTIONS[library].transpose
        self.check_refused(
            library,
            lambda x: transpose(transpose(x, order), order),
            "it moves the axis of the batch",
        )

    @parameterized.parameters(*LIBRARIES)
    def test_padding_with_zeros(self, library):
        pad = FUNCTIONS[library].pad

        def padded(x):
            x = pad(x, [[0, 0], [1, 2], [0, 1], [0, 0]])
            x = pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)), "constant")
            return pad(x, [[0, 0], [1, 0], [1, 0], [0, 0]], constant_values=0.0)

        model = gated(LIBRARIES[library], padded, lambda s: s[:, None, None])
        classifier = self.check_scores(model)
        margins = [
            node.settings["margins"]
            for node in classifier.graph.nodes.values()
            if node.kind == "pad"
        ]
        expected = [((1, 2), (0, 1)), ((0, 0), (0, 1)), ((1, 0), (1, 0))]
        self.assertEqual(margins, expected)
        # At the head too, where pixels are not yet what zeros are.
        self.check_scores(model_of(LIBRARIES[library], padded))

    @parameterized.product(
        library=list(LIBRARIES),
        case=(
            (
                lambda pad, x: pad(x, [[0, 0], [1, 1], [1, 1], [0, 0]], "reflect"),
                "it pads with reflect; only zeros",
            ),
            (
                lambda pad, x: pad(
                    x, [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=2
                ),
                "it pads with a constant of 2; only zeros",
            ),
            (
                lambda pad, x: pad(x, [[0, 0], [0, 0], [0, 0], [1, 2]]),
                r"it pads \(8, 8, 3\) by .*\[1, 2\]\], the batch first; only height",
            ),
        ),
    )
    def test_other_paddings_are_refused(self, library, case):
        function, reason = case
        pad = FUNCTIONS[library].pad
        self.check_refused(library, lambda x: function(pad, x), reason)

    @parameterized.parameters(*LIBRARIES)
    def test_split_of_channels(self, library):
        split = FUNCTIONS[library].split
        # TensorFlow takes sizes, Keras 3 the places between them.
        sizes = [1, 3, 2] if library == "keras2" else [1, 4]

        def parts(x):
            left, right = split(x, 2, axis=-1)
            first, _, last = split(x, sizes, 3)
            x = LIBRARIES[library].layers.Concatenate()([right, first, last])
            return x * LIBRARIES[library].layers.Concatenate()([left, right])

        model = gated(LIBRARIES[library], parts, lambda s: s[:, None, None])
        classifier = self.check_scores(model)
        orders = [
            node.settings["order"]
            for node in classifier.graph.nodes.values()
            if node.kind == "channels"
        ]
        self.assertCountEqual(orders, [(0, 1, 2), (3, 4, 5), (0,), (4, 5)])

    @parameterized.parameters(*LIBRARIES)
    def test_split_of_rows_is_refused(self, library):
        split = FUNCTIONS[library].split
        self.check_refused(
            library,
            lambda x: split(x, 2, axis=1)[1],
            "it splits the axis 1; only channels of an image",
        )

    @parameterized.parameters(*LIBRARIES)
    def test_other_functions_of_several_outputs_are_refused(self, library):
        layers = LIBRARIES[library].layers
        image = layers.Input((8, 8, 3))
        x = FUNCTIONS[library].unstack(image, 8, axis=1)[0]
        x = layers.Dense(CLASSES)(layers.Flatten()(x))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"several outputs; write slices, .* x\[..., :c\]"
        ):
            as_classifier(
                LIBRARIES[library].Model(image, x), input_mean=0, input_scale=1
            )


class FunctionsOfTensorFlowTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.named_parameters(
        ("constants", lambda x: 1 - (x * 2.0 + 3) / 4),
        ("tensors", lambda x: x * (x + x) - x),
        ("channels", lambda x: tf.nn.bias_add(x, [1.0, 2.0, 3.0]) * [0.1, 0.2, 0.3]),
        ("negative", lambda x: -x),
        ("clip", lambda x: tf.clip_by_value(x, 0.0, 0.7)),
        ("activations", lambda x: tf.nn.silu(tf.tanh(tf.sigmoid(tf.nn.relu6(x))))),
        ("elu", tf.nn.elu),
        ("gelu", lambda x: tf.nn.gelu(tf.nn.gelu(x), approximate=True)),
        ("keras_hard_sigmoid", keras.activations.hard_sigmoid),
        ("concat", lambda x: tf.concat([x, x], -1)),
        ("order", lambda x: tf.nn.relu(x)[..., ::-1]),
        ("some_channels", lambda x: x[:, :, :, 1:] * [0.5, 2.0]),
        ("cast", lambda x: tf.cast(x, tf.float32)),
        ("mean", lambda x: tf.reduce_mean(x, [1, 2], keepdims=True)),
        ("reshape", lambda x: tf.reshape(x, (-1, 4, 16, 3))),
    )
    def test_outputs_are_those_of_tensorflow(self, function):
        layers = keras.layers
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(3, 3, padding="same")(image)
        x = layers.Flatten()(function(x))
        model = keras.Model(image, layers.Dense(CLASSES)(x))
        randomised(keras, model)
        classifier = as_classifier(model, input_mean=0, input_scale=1 / 64)
        expected = answers(model, pixels() / 64)
        self.assertGreater(np.ptp(expected), 0.01)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)
        # The quantization knows what has become of it.
        rewriting.check_supported(rewriting.fold(classifier.graph))

    @parameterized.parameters("object", ".keras", ".h5")
    def test_reshape_may_be_told_the_size_of_the_batch(self, suffix):
        def shuffled(x):
            x = tf.reshape(x, [tf.shape(x)[0], 8, 8, 2, 3])
            x = tf.transpose(x, [0, 1, 2, 4, 3])
            return tf.reshape(tensor=x, shape=[tf.shape(x)[0], 8, 8, 6])

        model = gated(keras, shuffled, lambda s: s[:, None, None])
        given = model
        if suffix != "object":
            given = pathlib.Path(self.get_temp_dir()) / f"model{suffix}"
            model.save(given)
        classifier = as_classifier(given, input_mean=0, input_scale=1 / 64)
        expected = answers(model, pixels() / 64)
        self.assertAllClose(classifier.scores(pixels()), expected, atol=1e-4)
        self.assertEqual(kinds(classifier).count("reshape"), 3)

    @parameterized.parameters(
        (lambda x: tf.expand_dims(x[..., 0], -1), "it takes one channel alone"),
        (lambda x: x[:, 1:], "only channels of an image"),
        (lambda x: x[1:], "only channels of an image"),
    )
    def test_other_slices_are_named(self, function, reason):
        with self.assertRaisesRegex(UnsupportedLayerError, reason):
            as_classifier(model_of(keras, function), input_mean=0, input_scale=1)

    def test_function_without_integer_form_is_named(self):
        model = model_of(keras, lambda x: tf.math.erf(x))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer tf.math.erf.* no .* of TensorFlow's math.erf"
        ):
            as_classifier(model, input_mean=0, input_scale=1)


if __name__ == "__main__":
    tf.test.main()
