"""How a network is fed, as its first BatchNormalization tells; and 1/f noise."""

import shlex
import warnings

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ConfigError
from dfq_tf.graph import ModelDescription
from dfq_tf.importing import (
    FEEDINGS,
    as_classifier,
    classifiers,
    feeding,
    load_classifier,
)
from dfq_tf.procedural import natural_noise
from tests.helpers import new_folder
from tests.tool_runner import run_in_process

LIBRARIES = {"keras2": keras, "keras3": keras3()}
SHAPE = (16, 16, 3)
# Ways that are told apart by images of this size.
TOLD_APART = ("raw", "0..1", "-1..1", "-0.5..0.5", "cifar10", "caffe")


def fed(pixels, name):
    """Pixels as a network of a way is given them."""
    way = FEEDINGS[name]
    ordered = pixels[..., ::-1] if way.is_bgr else pixels
    return (ordered - np.array(way.mean)) * np.array(way.scale)


def model_of(library, shape, mean, variance, kernel):
    """A 1x1 convolution, a BatchNormalization with statistics, and a dense layer."""
    layers = library.layers
    image = layers.Input(shape)
    x = layers.Conv2D(kernel.shape[1], 1, use_bias=False, name="conv")(image)
    x = layers.BatchNormalization(name="first")(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x))
    model = library.Model(image, layers.Dense(3)(x))
    ones = np.ones_like(mean)
    model.get_layer("conv").set_weights([kernel[None, None]])
    model.get_layer("first").set_weights([ones, 0 * ones, mean, variance])
    return model


def trained_on(images, name, library=keras, seed=0):
    """A model whose BatchNormalization remembers images that were fed in a way."""
    kernel = np.random.default_rng(seed).normal(size=(images.shape[-1], 8))
    outputs = fed(images, name) @ kernel
    axes = (0, 1, 2)
    return model_of(
        library, images.shape[1:], outputs.mean(axes), outputs.var(axes), kernel
    )


def behind(model, layer):
    """A model behind a layer."""
    return keras.Sequential([keras.layers.Input(SHAPE), layer, model])


def pictures(shape=SHAPE):
    """Other ones than those that are looked at."""
    return natural_noise(5, 200, shape).astype(float)


class FindTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.product(name=TOLD_APART, library=list(LIBRARIES))
    def test_way_is_found_and_said(self, name, library):
        model = trained_on(pictures(), name, LIBRARIES[library])
        with self.assertWarnsRegex(
            UserWarning,
            f"{name}, comes within .*BatchNormalization first .*it is taken",
        ):
            classifier = as_classifier(model)
        images = pictures()[:20]
        expected = model(fed(images, name).astype(np.float32), training=False)
        scores = classifier.scores(images.astype(np.float32))
        self.assertAllClose(scores, np.asarray(expected), atol=2e-3, rtol=1e-3)

    def test_command_to_type_next_says_what_was_found(self):
        layers = keras.layers
        inner = trained_on(pictures(), "-1..1")
        outer = [layers.Input((None, None, 3)), layers.Resizing(*SHAPE[:2]), inner]
        for model, findings in (
            (inner, {"feeding": "-1..1"}),
            (keras.Sequential(outer), {"feeding": "-1..1", "image_size": [16, 16]}),
        ):
            path = new_folder() / "model.h5"
            model.save(path)
            process = run_in_process("inspect_model", str(path))
            self.assertEqual(process.returncode, 0, process.stderr)
            _, _, *flags = shlex.split(process.stdout.splitlines()[-1])
            said = {"feeding": "--feeding=-1..1", "image_size": "--image_size=16,16"}
            expected = {f"--teacher={path}", *(said[name] for name in findings)}
            self.assertEqual({*flags}, expected)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                as_classifier(path, **findings)
            # All is read, without a warning, and refused for what comes next.
            process = run_in_process("run", *flags, f"--workdir={path}/run")
            self.assertRegex(process.stderr, r"\Aerror: workdir is .*cannot be written")

    def test_size_decides_between_two_that_are_alike(self):
        for side, name in ((32, "cifar10"), (96, "imagenet")):
            for true in ("cifar10", "imagenet"):
                model = trained_on(pictures((side, side, 3))[:50], true)
                found = feeding.find(classifiers.read(model).graph)
                self.assertEqual(found.name, name)
                self.assertTrue(found.is_clear)

    def test_distance_is_that_of_two_normal_distributions(self):
        rng = np.random.default_rng(1)
        kernel, mean = rng.normal(size=(3, 5)), rng.normal(size=5)
        variance = rng.uniform(0.5, 2, 5)
        variance[2] = 0.0  # says nothing
        model = model_of(keras, SHAPE, mean, variance, kernel)
        graph = classifiers.read(model).graph
        images = pictures()[:10]
        found = feeding.distance_of(
            graph, graph.nodes["first"], images, FEEDINGS["0..1"]
        )
        values = (images / 255 @ kernel).reshape(-1, 5)
        own, stored = values.var(0) + 1e-3, variance + 1e-3
        shift = (values.mean(0) - mean) ** 2

        def divergence(one, other):
            return (shift + one) / (2 * other) - np.log(one / other) / 2 - 0.5

        both = (divergence(own, stored) + divergence(stored, own)) / 2
        self.assertAllClose(found, np.median(both[[0, 1, 3, 4]]), rtol=1e-3)

    def test_what_fits_no_way_is_left_open_with_the_distances(self):
        for images in (pictures() / 6, 255 - pictures() / 6):
            with self.assertRaisesRegex(
                ConfigError,
                "input_mean and input_scale are not given, .*BatchNormalization first "
                r"leaves it open: .* raw \d.*1/255.*--feeding, one of raw, 0..1, -1..1",
            ):
                as_classifier(trained_on(images, "0..1"))

    def test_grey_images_are_told_to_be_raw_and_no_more(self):
        for name, is_clear in (("raw", True), ("0..1", False), ("mnist", False)):
            model = trained_on(pictures((16, 16, 1)), name)
            found = feeding.find(classifiers.read(model).graph)
            self.assertEqual((found.name, found.is_clear), (name, is_clear))

    def test_without_memory_there_is_nothing_to_ask(self):
        zeros, ones = np.zeros(4), np.ones(4)
        kernel = np.ones((3, 4))
        new = model_of(keras, SHAPE, zeros, ones, kernel)
        self.assertIsNone(feeding.find(classifiers.read(new).graph))
        dead = model_of(keras, SHAPE, zeros, zeros, kernel)
        self.assertIsNone(feeding.find(classifiers.read(dead).graph))
        with self.assertRaisesRegex(ConfigError, "are not given, .*1/255"):
            as_classifier(new)

    @parameterized.parameters(*LIBRARIES)
    def test_memory_of_a_shared_layer_says_nothing(self, library):
        """It is of all that came to it, and the next one's is of what is fed."""
        library = LIBRARIES[library]
        trained = trained_on(pictures(), "-1..1", library)
        conv, first, *_ = trained.layers[1:]
        image = library.layers.Input(SHAPE)
        x, y = first(conv(image)), first(library.layers.ReLU()(conv(image)))
        x = library.layers.Add()([x, y])
        model = library.Model(image, library.layers.GlobalAveragePooling2D()(x))
        self.assertIsNone(feeding.find(classifiers.read(model).graph))
        images = fed(pictures(), "-1..1").astype(np.float32)
        values = np.asarray(library.Model(image, x)(images, training=False))
        moments = values.mean((0, 1, 2)), values.var((0, 1, 2))
        second = library.layers.BatchNormalization(name="second")
        outputs = library.layers.GlobalAveragePooling2D()(second(x))
        second.set_weights([np.ones(8), np.zeros(8), *moments])
        found = feeding.find(classifiers.read(library.Model(image, outputs)).graph)
        self.assertEqual((found.layer, found.name), ("second", "-1..1"))


class OwnTest(parameterized.TestCase, tf.test.TestCase):
    """Models that prepare their input themselves."""

    @parameterized.parameters(
        (2.0, -1.0, "-1 to 509"),
        (255.0, 0.0, "0 to 6.502e[+]04"),
        (1.0, -0.5, "-0.5 to 254.5"),
        (1.0, 0.0, "has no preprocessing layer"),
        (0.5, 0.5, "0.5 to 128"),
        # From the mean and deviation of ImageNet back to 0..1.
        ([0.229, 0.224, 0.225], [0.485, 0.456, 0.406], "0.406 to 58.88"),
    )
    def test_what_is_made_for_other_numbers_is_asked_about(self, scale, offset, text):
        new = model_of(keras, SHAPE, np.zeros(4), np.ones(4), np.ones((3, 4)))
        model = behind(new, keras.layers.Rescaling(scale, offset))
        with self.assertRaisesRegex(ConfigError, f"are not given, .*{text}.*1/255"):
            as_classifier(model)
        if offset:
            classifier = as_classifier(model, feeding="0..1", input_on_top=True)
            self.assert_answers(classifier, model, lambda pixels: pixels / 255)
        classifier = as_classifier(model, feeding="raw")
        self.assert_answers(classifier, model, lambda pixels: pixels)

    @parameterized.parameters(1 / 255, 1 / 16, 1 / 8)
    def test_what_makes_a_few_units_is_made_for_pixels(self, scale):
        new = model_of(keras, SHAPE, np.zeros(4), np.ones(4), np.ones((3, 4)))
        found = as_classifier(behind(new, keras.layers.Rescaling(scale)))
        self.assertAllClose(found.description.input_scale, [scale])

    def test_memory_says_what_comes_before_it(self):
        trained = trained_on(pictures(), "-1..1")
        model = behind(trained, keras.layers.Rescaling(2.0, -1.0))
        reading = classifiers.read(model)
        self.assertEqual(reading.findings, {"feeding": "0..1", "input_on_top": True})
        with self.assertWarnsRegex(
            UserWarning, "0..1, comes .*is taken. --feeding=0..1 --input_on_top"
        ):
            classifier = as_classifier(model)
        self.assert_answers(classifier, model, lambda pixels: pixels / 255)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            as_classifier(model, **reading.findings)

    def test_memory_contradicts_it(self):
        # It had blue first, less the means, before its Rescaling.
        kernel = np.random.default_rng(0).normal(size=(3, 8))
        outputs = fed(pictures(), "caffe") / 255 @ kernel
        axes = (0, 1, 2)
        moments = outputs.mean(axes), outputs.var(axes)
        model = behind(
            model_of(keras, SHAPE, *moments, kernel), keras.layers.Rescaling(1 / 255)
        )
        with self.assertWarnsRegex(
            UserWarning,
            "own preprocessing may not be all .*--feeding=caffe --input_on_top",
        ):
            classifier = as_classifier(model)
        self.assertEqual(classifier.description.input_mean, (0.0,))
        self.assertEqual(classifiers.read(model).findings, {})

    def test_description_beside_the_file_comes_on_top(self):
        new = model_of(keras, SHAPE, np.zeros(4), np.ones(4), np.ones((3, 4)))
        path = new_folder() / "model.keras"
        behind(new, keras.layers.Rescaling(1 / 255)).save(path)
        for mean, both in ((127.5, True), (0.0, False)):
            ModelDescription((mean,), (1.0,), "logits", tuple("abc")).save(
                path.with_suffix(".json")
            )
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                description = load_classifier(path).description
            texts = [str(w.message) for w in caught]
            said = [text for text in texts if "input_mean (127.5,) and" in text]
            self.assertLen(said, both)
            for text in said:
                self.assertIn("write input_mean [0] and input_scale [1] there", text)
            self.assertAllClose(description.input_mean, [mean])

    @parameterized.parameters(*LIBRARIES)
    def test_what_cannot_be_taken_off_prepares_too(self, library):
        library = LIBRARIES[library]
        layers = library.layers

        def rescaled(x):
            return layers.Rescaling(1 / 127.5, -1)(x)

        image = layers.Input(SHAPE)
        padded = rescaled(layers.ZeroPadding2D(1)(image))
        branches = [layers.Rescaling(1 / 255)(image), layers.Rescaling(0.01)(image)]
        heads = (
            padded,
            layers.Add()(branches),
            rescaled(layers.Concatenate()([image, image])),
            rescaled(layers.AveragePooling2D(2)(image)),
            rescaled(layers.MaxPooling2D(2)(image)),
            rescaled(layers.UpSampling2D()(image)),
            rescaled(layers.ReLU(max_value=255)(image)),
        )
        for x in heads:
            x = layers.Conv2D(4, 3)(x)
            x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
            model = library.Model(image, x)
            self.assert_answers(as_classifier(model), model, lambda pixels: pixels)
            with self.assertRaisesRegex(ConfigError, "both would apply"):
                as_classifier(model, feeding="0..1")
        # One branch takes them as they are.
        x = layers.Conv2D(4, 1)(layers.Concatenate()([branches[0], image]))
        model = library.Model(image, layers.GlobalAveragePooling2D()(x))
        with self.assertRaisesRegex(ConfigError, "has no preprocessing layer"):
            as_classifier(model)

    def assert_answers(self, classifier, model, fed):
        images = pictures()[:20].astype(np.float32)
        expected = np.asarray(model(fed(images), training=False))
        self.assertAllClose(classifier.scores(images), expected, atol=2e-3, rtol=1e-3)


class FrozenTest(parameterized.TestCase, tf.test.TestCase):
    """A pretrained base was fed -1..1; the layers on top of it were trained later."""

    def tuned(self, how, library=keras):
        base = trained_on(pictures(), "-1..1", library)
        image = library.layers.Input(SHAPE)
        if how == "trainable":
            base.trainable = False
            features = base(image)
        else:
            features = base(image, training=False)
        return library.Model(image, library.layers.Dense(4)(features))

    @parameterized.product(
        case=(("trainable", "keras2"), ("trainable", "keras3"), ("called", "keras2")),
        suffix=("object", ".keras", ".h5"),
    )
    def test_what_it_remembers_is_not_taken(self, case, suffix):
        how, library = case
        model = source = self.tuned(how, LIBRARIES[library])
        if suffix != "object":
            source = new_folder() / f"model{suffix}"
            model.save(source)
        with self.assertRaisesRegex(
            ConfigError,
            "are not given, .*BatchNormalization first was frozen, .*distances .* are "
            "-1..1 0.*Say --feeding=-1..1 if all training fed it so.*1/255",
        ):
            as_classifier(source)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = as_classifier(source, feeding="0..1")
        self.assertAllClose(found.description.input_scale, [1 / 255])
        images = pictures()[:20].astype(np.float32)
        expected = np.asarray(model(images / 255, training=False))
        self.assertAllClose(found.scores(images), expected, atol=1e-3, rtol=1e-3)

    def test_call_without_training_freezes_nothing_in_keras_3(self):
        """A call of the whole model with training=True, as in fit, goes before it."""
        model = self.tuned("called", LIBRARIES["keras3"])
        norm = model.layers[1].get_layer("first")
        before = norm.moving_mean.numpy().copy()
        model(fed(pictures()[:8], "-1..1").astype(np.float32), training=True)
        self.assertNotAllClose(norm.moving_mean.numpy(), before)
        with self.assertWarnsRegex(UserWarning, "-1..1, comes .*first .*is taken"):
            as_classifier(model)

    def test_it_does_not_contradict_the_layers_of_the_model(self):
        # As in OwnTest.test_memory_contradicts_it.
        kernel = np.random.default_rng(0).normal(size=(3, 8))
        outputs = fed(pictures(), "caffe") / 255 @ kernel
        axes = (0, 1, 2)
        moments = outputs.mean(axes), outputs.var(axes)
        base = model_of(keras, SHAPE, *moments, kernel)
        base.trainable = False
        model = behind(base, keras.layers.Rescaling(1 / 255))
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            description = as_classifier(model).description
        self.assertAllClose(description.input_scale, [1 / 255])

    def test_what_is_trained_before_it_is_asked(self):
        base = trained_on(pictures(), "-1..1")
        base.trainable = False
        first = keras.layers.BatchNormalization(name="own")
        model = keras.Sequential([keras.layers.Input(SHAPE), first, base])
        values = fed(pictures(), "0..1")
        moments = values.mean((0, 1, 2)), values.var((0, 1, 2))
        first.set_weights([np.ones(3), np.zeros(3), *moments])
        with self.assertWarnsRegex(UserWarning, "0..1, comes .*own .*is taken"):
            as_classifier(model)

    @parameterized.parameters(False, True)
    def test_command_to_type_next_offers_it(self, is_on_top):
        model = self.tuned("trainable")
        if is_on_top:
            model = behind(model, keras.layers.Rescaling(2.0, -1.0))
        way = "0..1" if is_on_top else "-1..1"
        path = new_folder() / "model.keras"
        model.save(path)
        process = run_in_process("inspect_model", str(path))
        self.assertEqual(process.returncode, 0, process.stderr)
        text = " ".join(process.stdout.split())
        on_top = " --input_on_top" * is_on_top
        self.assertIn(f"before that: {way}. Pass --feeding={way}{on_top} if all", text)
        self.assertIn(f"Next, if all training fed it {way} (see 'input'", text)
        _, _, *flags = shlex.split(process.stdout.splitlines()[-1])
        expected = [f"--teacher={path}", f"--feeding={way}"]
        expected += ["--input_on_top=true"] * is_on_top
        self.assertCountEqual(flags, expected)


class IntegersTest(parameterized.TestCase, tf.test.TestCase):
    """Models whose Input takes integers."""

    def model(self, library, dtype="uint8"):
        layers = library.layers
        image = layers.Input(SHAPE, dtype=dtype)
        to_float = tf.cast if library is keras else keras3().ops.cast
        x = layers.Conv2D(4, 3)(to_float(image, "float32"))
        return library.Model(image, layers.Dense(3)(layers.Flatten()(x)))

    @parameterized.product(library=list(LIBRARIES), dtype=("uint8", "int32"))
    def test_they_are_pixels(self, library, dtype):
        model = self.model(LIBRARIES[library], dtype)
        images = pictures()[:20].astype(np.uint8)
        expected = np.asarray(model(images.astype(dtype), training=False))
        for said in ({}, dict(feeding="raw")):
            found = as_classifier(model, **said)
            self.assertAllClose(found.scores(images), expected, atol=0.01, rtol=1e-4)

    @parameterized.parameters(*LIBRARIES)
    def test_another_feeding_is_refused(self, library):
        path = new_folder() / "model.keras"
        self.model(LIBRARIES[library]).save(path)
        message = r"given, but the model's Input takes integers \(uint8\)"
        with self.assertRaisesRegex(ConfigError, message):
            as_classifier(path, feeding="0..1")
        description = ModelDescription((0,), (1 / 255,), "logits", tuple("abc"))
        description.save(path.with_suffix(".json"))
        with self.assertRaisesRegex(ConfigError, message):
            as_classifier(path)

    def test_those_that_hold_no_pixels_are_asked_about(self):
        with self.assertRaisesRegex(ConfigError, "are not given"):
            as_classifier(self.model(keras, "int8"))


class SaidTest(parameterized.TestCase, tf.test.TestCase):
    def test_what_is_said_goes_before_what_is_found(self):
        model = trained_on(pictures(), "-1..1")
        with self.assertWarnsRegex(
            UserWarning, "may be wrong: .*-1..1, comes within .*--feeding=-1..1"
        ):
            classifier = as_classifier(model, input_mean=0, input_scale=1 / 255)
        self.assertEqual(classifier.description.input_mean, (0.0,))

    @parameterized.parameters("feeding", "numbers", "nearly")
    def test_what_is_right_brings_no_warning(self, how):
        said = {
            "feeding": dict(feeding="-1..1"),
            "numbers": dict(input_mean=127.5, input_scale=1 / 127.5),
            "nearly": dict(input_mean=120, input_scale=1 / 120),
        }[how]
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            as_classifier(trained_on(pictures(), "-1..1"), **said)

    def test_a_way_that_is_said_is_that_way(self):
        model = trained_on(pictures(), "raw")
        for name, way in FEEDINGS.items():
            if name in ("mnist", "caffe"):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                description = as_classifier(model, feeding=name).description
            self.assertAllClose(description.input_mean, way.mean)
            self.assertAllClose(description.input_scale, way.scale)

    def test_bad_ways(self):
        model = trained_on(pictures(), "raw")
        with self.assertRaisesRegex(ConfigError, "feeding is 'tf'; .*one of raw, 0..1"):
            as_classifier(model, feeding="tf")
        with self.assertRaisesRegex(ConfigError, "feeding is 'raw', and input_mean is"):
            as_classifier(model, feeding="raw", input_mean=0, input_scale=1)
        with self.assertRaisesRegex(ConfigError, "input_mean has 3 values .* 1 input"):
            as_classifier(trained_on(pictures((16, 16, 1)), "raw"), feeding="caffe")


class NaturalNoiseTest(tf.test.TestCase):
    def test_the_same_seed_gives_the_same_images(self):
        images = natural_noise(3, 4, (12, 10, 3))
        self.assertEqual((images.shape, images.dtype), ((4, 12, 10, 3), np.uint8))
        self.assertAllEqual(images, natural_noise(3, 4, (12, 10, 3)))
        self.assertNotAllEqual(images, natural_noise(4, 4, (12, 10, 3)))

    def test_amplitudes_fall_as_frequencies_grow(self):
        images = natural_noise(0, 50, (64, 64, 3)).astype(float)
        powers = np.abs(np.fft.fft2(images, axes=(1, 2))) ** 2
        frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(64), np.fft.fftfreq(64)))
        means = [
            powers[:, (frequencies >= low) & (frequencies < 1.3 * low)].mean()
            for low in (0.05, 0.1, 0.2)
        ]
        slopes = np.diff(np.log2(np.sqrt(means)))  # for a frequency twice as high
        self.assertAllInRange(slopes, -1.6, -0.8)

    def test_channels_go_together_and_pixels_spread(self):
        images = natural_noise(0, 100, (32, 32, 3)).astype(float)
        together = [
            np.corrcoef(image[..., 0].ravel(), image[..., 1].ravel())[0, 1]
            for image in images
        ]
        self.assertBetween(np.mean(together), 0.5, 0.8)
        self.assertBetween(images.mean(), 110, 140)
        self.assertAllInRange(images.std(axis=(1, 2, 3)), 5, 90)

    def test_alpha_is_full_and_hides_nothing_else(self):
        images = natural_noise(3, 4, (12, 10, 4))
        self.assertAllEqual(images[..., 3], np.full((4, 12, 10), 255))
        self.assertAllInRange(images[..., :3].std(axis=(1, 2)), 1, 127)


if __name__ == "__main__":
    tf.test.main()
