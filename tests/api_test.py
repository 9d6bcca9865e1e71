import contextlib
import csv
import dataclasses
import functools
import os
import platform
import re
import tempfile
import warnings
import zipfile
from unittest import mock

import numpy as np
import pytest
from absl.testing import absltest, parameterized
from ai_edge_litert import schema_py_generated as schema

from dfq_tf import api, photographs
from dfq_tf.compat import keras, tf
from dfq_tf.distillation import batch_size, budget, generator, phases, pool
from dfq_tf.distillation.generator import generate
from dfq_tf.distillation.sources import with_photographs
from dfq_tf.distillation.teacher import observe
from dfq_tf.errors import (
    ConfigError,
    ModelError,
    TrainingError,
    UnsupportedLayerError,
)
from dfq_tf.graph.classifier import Classifier, agreement
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.procedural import natural_noise
from dfq_tf.quantization import FittedBlock, Reconstructed, choosing
from dfq_tf.quantization import student as quantized_student
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import (
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    FileConfig,
    MixedWidths,
    ReconstructionConfig,
    parse_widths,
    qat_recipe,
    recipe,
)
from dfq_tf.tflite import proof
from dfq_tf.tflite.running import TFLiteClassifier
from dfq_tf.training.learner import Learner
from dfq_tf.with_data.datasets import accuracy
from tests import digits, helpers

layers = keras.layers

CONFIG = DistillationConfig(
    batch_size=64, noise_dim=32, warm_up_steps=30, rounds=15, pool_images=512
)
CALIBRATION = CalibrationConfig(images="generated", calibration_images=128)
# Enough to see whether something was done.
TINY = qat_recipe(
    "paper",
    batch_size=16,
    noise_dim=8,
    warm_up_steps=3,
    rounds=3,
    student_learning_rate=1e-5,  # more would harm: what is trained is kept
)
# On a pool of images.
TINY_POOL = qat_recipe(
    "pool",
    batch_size=16,
    noise_dim=8,
    warm_up_steps=3,
    rounds=2,
    student_steps=2,
    student_learning_rate=1e-5,
    pool_images=32,
    pool_batch_size=8,
)
TINY_CALIBRATION = CalibrationConfig(
    images="generated",
    calibration_images=32,
    bias_correction=False,
    synthesized_in_lessons=0.0,
)
FEW_STEPS = ReconstructionConfig(rec_steps=5, rec_minutes=0, rec_batch_size=8)
# What is measured of DF-Q.
EXPECTED = {
    "agreement_generated",
    "agreement_procedural",
    "expected_agreement",
    "sqnr_generated",
    "sqnr_procedural",
}
ALL_4_BITS = BitWidths(
    num_bits_weight=4, num_bits_first=4, num_bits_last=4, num_bits_depthwise=4
)


def quantize(teacher, **kwargs):
    settings = dict(
        method="df_qat_kd",
        config=CONFIG,
        calibration=CALIBRATION,
        precision="float32",
        show_progress=False,
    )
    return api.quantize(teacher, **{**settings, **kwargs})


def few_held_out(count=48):
    """Students are compared on so few images; `generator_test` counts the others."""
    stack = contextlib.ExitStack()
    for module in (api, generator):
        stack.enter_context(
            mock.patch.object(module, "held_out_count", return_value=count)
        )
    return stack


@pytest.mark.long
class OwnDefaultsTest(parameterized.TestCase, tf.test.TestCase):
    """What a program, or keras.json, has set for its own layers does no harm."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # Those of the program: a call trains one of them.
        cls.students = [helpers.small_learner(seed=1).model for _ in range(4)]
        cls.expected = cls.made()

    @classmethod
    def made(cls):
        """A file, what its student answers, and weights of a distilled network."""
        teacher = helpers.small_classifier()
        settings = dict(precision="float32", show_progress=False)
        with few_held_out(), helpers.eagerly():
            result = api.quantize(
                teacher,
                method="df_qat_kd",
                config=TINY,
                calibration=TINY_CALIBRATION,
                **settings,
            )
            config = recipe("bank", batch_size=8, warm_up_steps=1, rounds=1)
            student = cls.students.pop()
            distilled = api.distill(teacher, student, config=config, **settings)
        images = natural_noise(0, 4, teacher.image_shape)
        inputs = teacher.description.normalize(images)
        weights = distilled.student.model.get_weights()
        return result.tflite, result.student(inputs).numpy(), weights

    @parameterized.parameters("channels_first", "float64", "mixed_float16")
    def test_networks_are_made_as_ever(self, what):
        backend, precision = keras.backend, keras.mixed_precision
        if what == "channels_first":
            setting, default = backend.set_image_data_format, "channels_last"
        elif what == "float64":
            setting, default = backend.set_floatx, "float32"
        else:
            setting, default = precision.set_global_policy, None
        setting(what)
        try:
            found = self.made()
            self.assertIn(
                what,
                (
                    backend.image_data_format(),
                    backend.floatx(),
                    precision.global_policy().name,
                ),
            )
        finally:
            setting(default)
        self.assertTrue(found[0] == self.expected[0])
        self.assertAllEqual(found[1], self.expected[1])
        self.assertTrue(helpers.all_equal(found[2], self.expected[2]))


def _inverted(warmed, count, context):
    """Images of their own, in place of `lessons.synthesized`."""
    return 255 - natural_noise(7, count, (8, 8, 1))


@contextlib.contextmanager
def quickly(count=48, channels=16):
    """A few steps, of a small generator, that are compared on few images."""
    small = functools.partial(generator.build_generator, channels=channels)
    with (
        helpers.eagerly(),
        few_held_out(count),
        mock.patch.object(generator, "build_generator", small),
    ):
        yield


def tiny(teacher, channels=16, **kwargs):
    settings = dict(config=TINY, calibration=TINY_CALIBRATION)
    with quickly(channels=channels):
        return quantize(teacher, **{**settings, **kwargs})


def variables_of(network, name):
    """Weights and ranges of a node of a quantized network."""
    values = dict(network.graph.nodes[name].weights)
    if name in network.kernel_ranges:
        values["kernel_max"] = network.kernel_ranges[name]
    if name in network.ranges:
        values["output_min"], values["output_max"] = network.ranges[name]
    return values


def weights_of(classifier):
    """All weights of a graph."""
    nodes = classifier.graph.nodes.values()
    return [weight for node in nodes for weight in node.weights.values()]


def kernel_types(content):
    """Name of each kernel in a file -> its type, read from the flatbuffer."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    return {
        tensor.name.decode(): tensor.type
        for tensor in model.subgraphs[0].tensors
        if tensor.name.decode().endswith("/kernel")
    }


def assert_no_training():
    def refuse(*args, **kwargs):
        raise AssertionError("a step was taken")

    names = ("warm_up_step", "generator_step", "student_step")
    return mock.patch.multiple(phases.steps, **{name: refuse for name in names})


class QuantizeTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.teacher = digits.teacher()
        cls.test = digits.split("test")
        cls.scores = cls.teacher.scores(cls.test.images)
        # One warm-up is enough for all of them.
        cls.folder = helpers.new_folder()

    @parameterized.parameters("df_q", "df_qat_kd")
    def test_file_answers_as_the_teacher_which_stays_as_it_was(self, method):
        self.assertGreater(accuracy(self.scores, self.test.labels), 0.9)
        before = helpers.copies(weights_of(self.teacher))
        result = quantize(self.teacher, method=method, directory=self.folder)
        tflite = TFLiteClassifier(result.tflite)
        scores = tflite.scores(self.test.images)
        self.assertGreaterEqual(agreement(self.scores, scores), 0.9)
        self.assertLessEqual(
            proof.largest_difference(result.network, result.tflite, self.test.images),
            3,
        )
        self.assertTrue(helpers.all_equal(weights_of(self.teacher), before))
        images = generate(result.generators, CONFIG, 64, seed=3)
        self.assertEqual(images.shape, (64, 8, 8, 1))
        self.assertGreater(images.std(), 10)
        measured = {"distillation_loss", "agreement"} if method != "df_q" else set()
        self.assertContainsSubset(measured, result.measurements)
        self.assertContainsSubset(EXPECTED, result.measurements)
        trained = {*result.measurements} - EXPECTED
        self.assertEqual(bool(trained), method == "df_qat_kd")
        self.assertEqual(result.method, method)

    def test_4_bit_weights_lie_in_the_file_as_int4(self):
        result = quantize(
            self.teacher,
            method="df_q",
            widths=BitWidths(num_bits_weight=4),
            file=FileConfig(favor="size"),
            directory=self.folder,
        )
        int4, int8 = schema.TensorType.INT4, schema.TensorType.INT8
        # First and last layer have 8 bits unless they are given fewer.
        self.assertEqual(
            kernel_types(result.tflite),
            {"conv1/kernel": int8, "conv2/kernel": int4, "logits/kernel": int8},
        )
        tflite = TFLiteClassifier(result.tflite)
        self.assertLessEqual(
            proof.largest_difference(result.network, result.tflite, self.test.images),
            3,
        )
        scores = tflite.scores(self.test.images)
        self.assertGreaterEqual(agreement(self.scores, scores), 0.8)

    def test_photographs_calibrate_without_a_step(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, images="photographs")
        with assert_no_training():
            result = tiny(self.teacher, method="df_q", calibration=calibration)
        self.assertEqual((result.source.name, result.generators), ("photographs", []))
        self.assertGreater(result.source.distance, 0)
        kinds = ("photographs", "procedural")
        measured = {
            f"{what}_{kind}" for what in ("agreement", "sqnr") for kind in kinds
        }
        self.assertEqual({*result.measurements}, measured | {"expected_agreement"})
        shape = self.teacher.image_shape
        self.assertAllEqual(result.held_out, photographs.crops(1, 48, shape))
        network = float_network(self.teacher)
        margin = calibration.photographs_logits_margin
        config = dataclasses.replace(calibration, logits_margin=margin)
        for count, is_same in ((32, True), (31, False)):
            images = photographs.crops(0, count, shape)
            expected = post_training(network, images, BitWidths(), config)
            found = result.network.ranges
            self.assertEqual(found == expected.ranges, is_same)

    def test_images_that_judge_calibrate_nothing_of_whatever_kind(self):
        for name in ("procedural", "photographs"):
            calibration = dataclasses.replace(TINY_CALIBRATION, images=name)
            with few_held_out():
                context = helpers.context(TINY, seed=3)
                made = api.prepare(self.teacher, self.teacher, calibration, context)
                calibrating = {image.tobytes() for image in made.images}
                self.assertLen(calibrating, 32)
                for judging in (made.held_out, made.procedural):
                    self.assertLen(judging, 48)
                    judged = {image.tobytes() for image in judging}
                    self.assertLen(judged, 48)
                    self.assertEmpty(calibrating & judged)

    def test_students_learn_from_photographs_where_these_calibrate(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, images="photographs")
        with (
            mock.patch.object(
                phases, "warm_up", side_effect=AssertionError("no generator is needed")
            ),
            mock.patch.object(phases, "Pool", side_effect=pool.Pool) as made,
        ):
            result = tiny(self.teacher, calibration=calibration, config=TINY_POOL)
        self.assertEqual(result.generators, [])
        self.assertIn("distillation_loss", result.measurements)
        images = made.call_args.args[1]()
        self.assertAllEqual(
            images, photographs.crops(phases.POOL_SEED, 32, self.teacher.image_shape)
        )

    def test_students_of_the_paper_learn_from_generators_all_the_same(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, images="photographs")
        result = tiny(self.teacher, calibration=calibration)
        self.assertLen(result.generators, 1)
        self.assertIn("distillation_loss", result.measurements)

    def test_images_of_a_pool_calibrate_and_judge_nothing(self):
        with quickly():
            context = helpers.context(TINY_POOL, seed=3)
            made = api.prepare(self.teacher, self.teacher, TINY_CALIBRATION, context)
            with mock.patch.object(
                pool, "natural_noise", side_effect=natural_noise
            ) as f:
                phases.Pool(
                    made.observed,
                    lambda: made.pool,
                    len(made.pool),
                    TINY_POOL,
                    context.seed,
                    phases.compiled,
                ).fill()
            noise = f.side_effect(*f.call_args.args)
            learnt = {image.tobytes() for image in (*made.pool, *noise)}
            for others in (made.images, made.held_out, made.procedural):
                self.assertEmpty(learnt & {image.tobytes() for image in others})
            self.assertIs(made.pool, made.pool)

    @pytest.mark.long
    def test_seed_decides_every_byte_and_a_finished_run_is_not_repeated(self):
        folder = self.get_temp_dir()
        first = tiny(self.teacher, seed=1, directory=folder)
        same = tiny(self.teacher, seed=1)
        other = tiny(self.teacher, seed=2)
        self.assertNotEqual(first.tflite, other.tflite)
        with assert_no_training():
            again = tiny(self.teacher, seed=1, directory=folder)
        self.assertNotEmpty(first.measurements)
        self.assertEqual(
            again.measurements.keys(),
            {
                "held_out_agreement_before",
                "held_out_agreement_after",
                "untrained_is_kept",
                *EXPECTED,
            },
        )
        images = self.test.images[:50]
        for result in (same, again):
            self.assertAllEqual(
                result.network.scores(images), first.network.scores(images)
            )
            self.assertEqual(result.tflite, first.tflite)

    @parameterized.parameters(
        (
            dict(method="magic"),
            r"method is 'magic'; it must be one of \['auto', 'df_q'",
        ),
        (dict(seed=-1), "seed is -1; it must be at least 0"),
        *(
            (dict(seed=seed), f"^seed is {seed!r}; it must be an integer$")
            for seed in ("a", None, 1.5, True)
        ),
        (
            dict(widths="W4A8"),
            "^widths is 'W4A8'; it must be a BitWidths, such as "
            r"dfq_tf\.BitWidths\(num_bits_weight=4\)$",
        ),
        (
            dict(widths=MixedWidths(layer_bits={"nope": 4})),
            "^layer_bits names 'nope', which is no node with a kernel; those are ",
        ),
        (dict(widths=BitWidths), "^widths is <class '.*'>; it must be a BitWidths, su"),
        (
            dict(file="x.tflite"),
            r"^file is 'x\.tflite'; it must be a FileConfig, such as dfq_tf\.File",
        ),
        *(
            (
                dict(config=config),
                f"^config is {shown}; it must be a DistillationConfig, such as "
                r"dfq_tf\.qat_recipe\('pool'\)$",
            )
            for config, shown in (
                ({}, "{}"),
                (None, "None"),
                ("budget", "'budget'"),
                (recipe("budget"), "a BudgetConfig"),
            )
        ),
        (
            dict(calibration={}),
            r"^calibration is {}; it must be a CalibrationConfig, such as dfq_tf\.Cali",
        ),
        (
            dict(calibration=CalibrationConfig(activation_percentile=99.0)),
            r"^activation_percentile is 99\.0, which has no effect where activation_ra",
        ),
        (
            dict(reconstruction=None),
            "^reconstruction is None; it must be a ReconstructionConfig, such as d",
        ),
        (
            dict(strategy="mirrored"),
            r"^strategy is 'mirrored'; it must be a tf\.distribute\.Strategy, such as "
            r"tf\.distribute\.MirroredStrategy\(\), or None$",
        ),
        (
            dict(strategy=tf.distribute.OneDeviceStrategy("CPU:1")),
            "^strategy is of CPU:1 alone, .* CUDA_VISIBLE_DEVICES=1, and give no strat",
        ),
        (dict(directory=""), r"^directory is empty; name a folder, such as '\.', or"),
        (dict(directory="a?"), r"^directory is 'a\?', with \? in it, which Tens.*Name"),
        (dict(directory=5), "^directory is 5; it must be the name of a folder, or N"),
        (dict(directory=__file__), r"^directory is '.*api_test\.py', a file; name a f"),
        (dict(precision="float8"), "precision is 'float8'; it must be one of"),
        (
            dict(config=dataclasses.replace(TINY, num_students=3)),
            "num_students is 3, but one network is quantized; .* for distill",
        ),
    )
    def test_bad_settings_are_named_before_any_work(self, settings, message):
        with assert_no_training(), self.assertRaisesRegex(ConfigError, message):
            quantize(self.teacher, **settings)

    @parameterized.parameters(
        ("df_qat_kd", TINY, "batch_size is 7, which does not divide into equal shares"),
        ("df_qat_kd", TINY_POOL, None),
        ("df_q", TINY, None),
    )
    def test_batch_is_shared_out_where_it_is_taken(self, method, config, message):
        """Of two devices: asked before any work, where a step takes all of it."""
        devices = mock.Mock(spec=tf.distribute.Strategy, num_replicas_in_sync=2)
        config = dataclasses.replace(config, batch_size=7)
        reached = RuntimeError("work begins")
        error, said = (ConfigError, message) if message else (RuntimeError, "begins")
        with (
            mock.patch.object(api, "prepare", side_effect=reached),
            self.assertRaisesRegex(error, said),
        ):
            quantize(self.teacher, method=method, config=config, strategy=devices)

    @parameterized.parameters(
        lambda: tf.Graph().as_default(),
        lambda: tf.distribute.OneDeviceStrategy("CPU:0").scope(),
    )
    def test_call_in_a_graph_or_a_scope_is_refused(self, opened):
        for call in (
            lambda: api.quantize("no such file"),
            lambda: api.distill("no such file", None),
        ):
            with (
                opened(),
                self.assertRaisesRegex(
                    ConfigError,
                    r"^the call is in a graph, .* or a strategy\.scope\(\) of .*; make "
                    "it outside of that",
                ),
            ):
                call()

    def test_unsupported_layer_is_named_before_any_work(self):
        image = layers.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, activation="softsign", name="odd")(image)
        x = layers.BatchNormalization()(x)
        model = keras.Model(image, layers.Dense(10)(layers.Flatten()(x)))
        with (
            assert_no_training(),
            self.assertRaisesRegex(UnsupportedLayerError, "layer odd .*softsign"),
        ):
            quantize(Learner(model, digits.DESCRIPTION))

    def test_student_is_a_keras_model_that_answers_as_the_network(self):
        result = tiny(self.teacher, method="df_q")
        images = self.test.images[:50]
        learner = Learner(result.student, result.network.description)
        self.assertIs(result.student, learner.model)
        scores = result.network.scores(images)
        self.assertAllEqual(learner.scores(images), scores)
        path = helpers.new_folder() / "df_q.keras"
        result.save(path)
        loaded = api.load_quantized(path)
        self.assertAllEqual(loaded.scores(images), scores)
        self.assertEqual(proof.convert(loaded), result.tflite)
        # Trained further, it is written as it is then.
        for variable in result.student.trainable_variables:
            if "bias" in variable.name:
                variable.assign_add(tf.ones_like(variable))
        result.save(path)
        before, after = (
            network.graph.last.weights["bias"]
            for network in (result.network, api.load_quantized(path))
        )
        self.assertAllClose(after, before + 1, atol=0.1)
        path.with_suffix(".json").unlink()
        with self.assertRaisesRegex(
            ModelError, r"no description .*df_q\.json, .* again: with result\.save"
        ):
            api.load_quantized(path)

    def test_file_of_an_earlier_version_is_told(self):
        network = tiny(self.teacher, method="df_q").network
        path = helpers.new_folder() / "df_q.keras"
        quantized_student.save(network, path)
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        config = parts["config.json"].replace(b"NodeQuantizeConfig", b"LayerConfig")
        with zipfile.ZipFile(path, "w") as archive:
            for name, part in {**parts, "config.json": config}.items():
                archive.writestr(name, part)
        with self.assertRaisesRegex(
            ModelError,
            "If an earlier version of the project wrote it, quantize .*again",
        ):
            api.load_quantized(path)
        with self.assertRaisesRegex(ModelError, "^there is no model file"):
            api.load_quantized(path.with_name("absent.keras"))

    def test_quantized_file_may_lie_at_home(self):
        with (
            mock.patch.dict(os.environ, HOME="/nowhere"),
            self.assertRaisesRegex(ModelError, "model file /nowhere/absent.keras"),
        ):
            api.load_quantized("~/absent.keras")

    def test_float_file_is_no_quantized_network(self):
        path = helpers.new_folder() / "float.keras"
        digits.learner().save(path)
        with self.assertRaisesRegex(ModelError, "the student is a float model"):
            api.load_quantized(path)

    def test_what_is_no_path_is_no_quantized_network(self):
        for given, named in ((None, "builtins.NoneType"), (b"a", "builtins.bytes")):
            with self.assertRaisesRegex(
                ModelError, f"^path is a {named}; load_quantized reads files .*network$"
            ):
                api.load_quantized(given)


class ShownTest(absltest.TestCase):
    """What a notebook shows of a result: none of what fills pages."""

    def test_quantized(self):
        found = {"expected_agreement": 0.5}
        result = api.Quantized(None, b"content", [None], None, found, "df_q")
        self.assertEqual(
            repr(result),
            "Quantized(measurements={'expected_agreement': 0.5}, method='df_q')",
        )

    def test_distilled(self):
        images = np.zeros((1, 2, 2, 1), np.uint8)
        result = api.Distilled(None, [0.5], [None], images, {"loss": 1.0}, 48)
        self.assertEqual(
            repr(result),
            "Distilled(agreements=[0.5], measurements={'loss': 1.0}, num_held_out=48)",
        )


@pytest.mark.long
class StructureTest(parameterized.TestCase):
    """What checkpoints of a float student belong to."""

    def structure(self, activation="relu", strides=1, pool=2, nested=False, **names):
        layers = keras.layers
        image = layers.Input((8, 8, 1))
        x = layers.Conv2D(4, 3, strides, "same", activation=activation, **names)(image)
        body = keras.Sequential([layers.Dense(4), layers.ReLU()]) if nested else None
        x = layers.GlobalAveragePooling2D()(layers.MaxPooling2D(pool)(x))
        return api._structure(
            keras.Model(image, layers.Dense(3)(body(x) if body else x))
        )

    def test_names_do_not_count(self):
        for nested in (False, True):
            first = self.structure(nested=nested)
            self.assertEqual(self.structure(nested=nested, name="other"), first)

    @parameterized.parameters(
        dict(activation="tanh"), dict(strides=2), dict(pool=4), dict(nested=True)
    )
    def test_settings_without_weights_count(self, **changes):
        self.assertNotEqual(self.structure(**changes), self.structure())

    def test_a_layer_that_cannot_tell_its_settings_is_named(self):
        class Scaled(keras.layers.Layer):
            def __init__(self, factor, name=None):
                super().__init__(name=name)
                self.factor = factor

            def call(self, inputs):
                return self.factor * inputs

        learner = small_student()
        # Of plain numbers alone, Keras would tell them itself.
        outputs = Scaled(np.float32([2.0]), name="twice")(learner.model.output)
        model = keras.Model(learner.model.input, outputs)
        for each in (model, keras.Sequential([layers.Input((8, 8, 1)), model])):
            with self.assertRaisesRegex(
                ConfigError, "layer twice is a Scaled without get_config"
            ):
                api._learner(each, digits.teacher())


class DirectoryTest(tf.test.TestCase, parameterized.TestCase):
    """A directory belongs to the run that filled it."""

    CONFIG = qat_recipe("paper", batch_size=8, noise_dim=8, warm_up_steps=1, rounds=1)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = helpers.new_folder()
        cls.teacher = helpers.small_classifier((8, 8, 1), seed=1)
        cls.first = cls.quantize()

    @classmethod
    def quantize(cls, teacher=None, **changes):
        settings = dict(config=cls.CONFIG, directory=cls.folder)
        return tiny(teacher or cls.teacher, **{**settings, **changes})

    def refused(self, difference, *args, **changes):
        with (
            assert_no_training(),
            self.assertRaisesRegex(
                TrainingError,
                r"has the checkpoints of another run\. Name another directory .* What "
                rf"differs:\n  {difference}\Z",
            ),
        ):
            self.quantize(*args, **changes)

    def test_another_teacher_is_refused(self):
        other = helpers.small_classifier((8, 8, 1), seed=2)
        difference = r"teacher: [0-9a-f]{64}, fed .* -> [0-9a-f]{64}, fed .*"
        self.refused(difference, other, method="df_q")

    @parameterized.parameters(
        (dict(seed=3), "seed: 0 -> 3"),
        (dict(widths=ALL_4_BITS), "bits of kernels: 8 x 3 -> 4 x 3"),
        (dict(widths=BitWidths(8, 6)), "bits of activations: 8 x 5 -> 8, 6, 8, 6, 8"),
        (dict(widths=BitWidths(per_channel=False)), "per_channel: True -> False"),
        (
            dict(calibration=dataclasses.replace(TINY_CALIBRATION, equalize=True)),
            "network: .* -> .*\n  equalize: False -> True",
        ),
        (dict(config=dataclasses.replace(CONFIG, rounds=2)), "rounds: 1 -> 2"),
    )
    def test_other_settings_are_refused(self, changes, difference):
        self.refused(difference, **changes)

    def test_another_network_is_refused(self):
        student = helpers.small_classifier((8, 8, 1), seed=3)
        self.refused("network: .* -> .*", network=student)

    def test_the_same_once_more_takes_what_is_there(self):
        with assert_no_training():
            again = self.quantize()
            self.quantize(method="df_q", widths=ALL_4_BITS)
        self.assertEqual(again.tflite, self.first.tflite)


class CalibrationTest(tf.test.TestCase, parameterized.TestCase):
    """Settings of the calibration, one at a time, behind one finished warm-up."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.teacher = digits.teacher()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = folder.name
        cls.plain = cls.quantized()

    @classmethod
    def quantized(cls, widths=ALL_4_BITS, **changes):
        return tiny(
            cls.teacher,
            channels=128,  # its images differ as much as they do in a run
            method="df_q",
            calibration=dataclasses.replace(TINY_CALIBRATION, **changes),
            widths=widths,
            directory=cls.folder,
        )

    def float_means(self, images):
        """Mean of each channel of the two BNs, and of each logit, in the teacher."""
        model = digits.learner().model
        names = ("bn1", "bn2", "logits")
        observed = keras.Model(model.input, [model.get_layer(n).output for n in names])
        inputs = (images.astype(np.float32) - 120) / 64
        return [self.channel_means(o) for o in observed(inputs, training=False)]

    def student_means(self, network, images):
        outputs = network.outputs(images, ["conv1", "conv2", "logits"])
        return [self.channel_means(o) for o in outputs]

    @staticmethod
    def channel_means(output):
        return np.asarray(output, np.float64).mean(axis=tuple(range(output.ndim - 1)))

    def test_bias_correction_gives_the_means_of_the_float_network(self):
        corrected = self.quantized(bias_correction=True)
        # The images that the student was calibrated on: the same draw.
        images = generate(corrected.generators, TINY, 32, seed=0)
        expected = self.float_means(images)
        plain = self.student_means(self.plain.network, images)
        means = self.student_means(corrected.network, images)
        for before, after, goal in zip(plain, means, expected):
            # Biases end on the steps of int32, and logits on those of int8.
            self.assertAllClose(after, goal, rtol=0, atol=0.02 * np.ptp(goal))
            self.assertGreater(
                np.abs(before - goal).mean(), 4 * np.abs(after - goal).mean()
            )

    def test_equalize_balances_neighbours(self):
        student = self.quantized(equalize=True).network
        first, second = (variables_of(student, f"conv{i}")["kernel"] for i in (1, 2))
        written = np.abs(first).max(axis=(0, 1, 2))
        read = np.abs(second).max(axis=(0, 1, 3))
        alive = np.minimum(written, read) > 1e-6
        self.assertGreater(alive.sum(), 8)
        self.assertAllClose(written[alive], read[alive], rtol=1e-3)
        plain = variables_of(self.plain.network, "conv1")["kernel"]
        self.assertGreater(np.ptp(plain / first), 0.1)

    def test_weight_range_is_the_largest_magnitude_or_less(self):
        least_squares = variables_of(self.plain.network, "conv2")
        student = self.quantized(weight_range="min_max").network
        extremes = variables_of(student, "conv2")
        largest = np.abs(extremes["kernel"]).max(axis=(0, 1, 2))
        self.assertAllClose(extremes["kernel_max"], largest, rtol=1e-6)
        self.assertLess(np.mean(least_squares["kernel_max"] / largest), 0.95)

    def test_activation_range_is_the_extreme_or_less(self):
        result = self.quantized(activation_range="min_max", weight_range="min_max")
        images = generate(result.generators, TINY, 32, seed=0)
        model = digits.learner().model
        observed = keras.Model(model.input, model.get_layer("relu1").output)
        output = observed((images.astype(np.float32) - 120) / 64, training=False)
        high = variables_of(result.network, "relu1")["output_max"]
        self.assertAllClose(high, np.max(output), rtol=1e-4)
        cut = self.quantized(activation_range="percentile", activation_percentile=90.0)
        percentile = variables_of(cut.network, "relu1")["output_max"]
        self.assertAllClose(percentile, np.percentile(output, 90), rtol=0.02)

    def test_ranges_are_those_of_so_many_images(self):
        result = self.quantized(activation_range="min_max", calibration_images=3)
        images = generate(result.generators, TINY, 3, seed=0)
        model = digits.learner().model
        observed = keras.Model(model.input, model.get_layer("relu1").output)
        output = observed((images.astype(np.float32) - 120) / 64, training=False)
        high = variables_of(result.network, "relu1")["output_max"]
        self.assertAllClose(high, np.max(output), rtol=1e-4)


def small_student(seed=3, shape=(8, 8, 1), classes=10):
    """A network that has learnt nothing, narrower than the teacher."""
    keras.utils.set_random_seed(seed)
    image = x = layers.Input(shape)
    for filters, strides in ((8, 1), (16, 2)):
        x = layers.Conv2D(filters, 3, strides, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    x = layers.Dense(classes)(layers.GlobalAveragePooling2D()(x))
    names = digits.DESCRIPTION.class_names[:classes]
    description = dataclasses.replace(digits.DESCRIPTION, class_names=names)
    return Learner(keras.Model(image, x), description)


class BatchSizeTest(tf.test.TestCase):
    """Where it is auto, the entrances find it, and all that is inside has it."""

    def setUp(self):
        super().setUp()
        self.seen = set()
        self.enter_context(quickly(8))
        for module, name in (
            (phases, "warm_up"),
            (phases, "distill"),
            (generator, "Sampler"),
            (api, "Sampler"),
        ):
            self._watch(module, name)
        self.config = dataclasses.replace(
            recipe("bank", bank_images=50, rounds=1, student_steps=1),
            noise_dim=8,
            warm_up_steps=1,
        )
        self.teacher = helpers.small_classifier()
        # Of a teacher and generator as large as this, four images and some more.
        each = batch_size.step_bytes_per_image(self.teacher, self.teacher, self.config)
        self.enter_context(mock.patch.object(batch_size, "STEP_MEMORY", 5 * each))

    def _watch(self, module, name):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            values = [getattr(v, "settings", v) for v in (*args, *kwargs.values())]
            sizes = [v.batch_size for v in values if isinstance(v, DistillationConfig)]
            self.assertLen(sizes, 1)
            self.seen.add((name, *sizes))
            return function(*args, **kwargs)

        self.enter_context(mock.patch.object(module, name, watched))

    @pytest.mark.long
    def test_distillation(self):
        student = helpers.small_learner(seed=1)
        api.distill(self.teacher, student, config=self.config, show_progress=False)
        self.assertEqual(self.seen, {("warm_up", 4), ("Sampler", 4), ("distill", 4)})

    def test_quantization(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one step makes nobody agree more
            api.quantize(
                self.teacher,
                method="df_qat_kd",
                config=self.config,
                calibration=TINY_CALIBRATION,
                show_progress=False,
            )
        self.assertEqual(self.seen, {("warm_up", 4), ("Sampler", 4), ("distill", 4)})

    def test_training_takes_no_auto(self):
        observed = observe(self.teacher)
        with self.assertRaisesRegex(ConfigError, "batch_size is 0, auto, where a"):
            phases.warm_up(observed, [], helpers.context(self.config))


class DistillTest(tf.test.TestCase, parameterized.TestCase):
    """Into a smaller network, from random weights."""

    FAST = recipe(
        "bank",
        batch_size=64,
        noise_dim=32,
        warm_up_steps=30,
        warm_up_batch_size=64,
        rounds=60,
        bank_images=4000,
        adversarial_ramp_steps=20,
    )
    TINY = dataclasses.replace(FAST, batch_size=16, warm_up_steps=2, rounds=2)

    def distill(self, student=None, **kwargs):
        settings = dict(config=self.TINY, precision="float32", show_progress=False)
        settings |= kwargs
        is_short = settings["config"].rounds <= self.TINY.rounds
        with contextlib.ExitStack() as stack:
            if is_short:
                stack.enter_context(quickly())
            return api.distill(digits.teacher(), student or small_student(), **settings)

    @pytest.mark.long
    def test_student_learns_the_digits_and_its_file_too(self):
        teacher, student = digits.teacher(), small_student()
        before = [
            helpers.copies(w) for w in (weights_of(teacher), student.model.weights)
        ]
        test = digits.split("test")
        start = accuracy(student.scores(test.images), test.labels)
        self.assertLess(start, 0.3)
        result = self.distill(student, config=self.FAST)
        learnt = accuracy(result.student.scores(test.images), test.labels)
        self.assertGreater(learnt, 0.65)
        after = [weights_of(teacher), student.model.weights]
        for one, other in zip(before, after):
            self.assertTrue(helpers.all_equal(one, other))
        self.assertEqual(
            [layer.name for layer in result.student.model.layers],
            [layer.name for layer in student.model.layers],
        )
        # It is that network that is quantized, and not the teacher.
        quantized = quantize(teacher, network=result.student, method="df_q")
        self.assertLess(len(quantized.tflite), len(quantize(teacher).tflite))
        tflite = TFLiteClassifier(quantized.tflite)
        same = agreement(result.student.scores(test.images), tflite.scores(test.images))
        self.assertGreater(same, 0.9)

    def test_recipe_budget(self):
        config = recipe(
            "budget", batch_size=4, steps=2, student_steps=1, generator_steps=1
        )
        teacher, student = digits.teacher(), small_student()
        before = [
            helpers.copies(w) for w in (weights_of(teacher), student.model.weights)
        ]
        # Each batch held out takes a generator step.
        few = mock.patch.object(budget, "_HELD_OUT_IMAGES", 8)
        others = mock.patch.multiple(pool, _OTHERS=8, _ANSWERED=2)
        with quickly(), few, others:
            result = api.distill(
                teacher,
                student,
                config=config,
                precision="float32",
                show_progress=False,
            )
        for one, other in zip(before, [weights_of(teacher), student.model.weights]):
            self.assertTrue(helpers.all_equal(one, other))
        learnt = result.student.model.trainable_weights
        self.assertFalse(helpers.all_equal(learnt, student.model.trainable_weights))
        self.assertLen(result.agreements, 1)
        self.assertEqual(result.images.shape[1:], teacher.image_shape)
        self.assertContainsSubset(
            {"synthesis_loss", "distillation_loss"}, result.measurements
        )

    @pytest.mark.long
    def test_quantized_network_learns_from_the_teacher(self):
        # Training on its own answers would leave it as ignorant as it is.
        teacher, network = digits.teacher(), as_classifier(small_student())
        images = digits.split("test").images
        answers = teacher.scores(images)
        # What an untrained network gives says nothing of margins.
        narrow = dataclasses.replace(
            CALIBRATION, activation_range="mse", pooled_margin=1.0, logits_margin=1.0
        )

        def agreement_of(method):
            config = dataclasses.replace(
                self.FAST,
                rounds=200,
                student_optimizer="adam",
                student_learning_rate=0.003,
            )
            result = quantize(
                teacher,
                network=network,
                method=method,
                config=config,
                calibration=narrow,
            )
            scores = TFLiteClassifier(result.tflite).scores(images)
            return agreement(answers, scores)

        self.assertGreater(agreement_of("df_qat_kd"), agreement_of("df_q") + 0.15)

    @parameterized.parameters("float32", "bfloat16")
    @pytest.mark.long
    def test_student_is_float32_whatever_it_was_trained_in(self, precision):
        student = self.distill(precision=precision).student
        for layer in student.model.layers:
            self.assertEqual(layer.compute_dtype, "float32")

    @pytest.mark.long
    def test_seed_decides_and_a_finished_run_is_not_repeated(self):
        folder = self.get_temp_dir()
        first = self.distill(seed=1, directory=folder)
        same, other = self.distill(seed=1), self.distill(seed=2)
        weights = first.student.model.weights
        self.assertTrue(helpers.all_equal(weights, same.student.model.weights))
        self.assertFalse(helpers.all_equal(weights, other.student.model.weights))
        with mock.patch.object(phases.steps, "answered_step") as step:
            again = self.distill(seed=1, directory=folder)
        step.assert_not_called()
        self.assertTrue(helpers.all_equal(weights, again.student.model.weights))

    def test_statistics_of_a_student_follow_its_last_steps(self):
        """Those of published networks would be the first ones after a short run."""
        learner = small_student()

        def momenta(student):
            kind = layers.BatchNormalization
            found = student.model._flatten_layers()
            return [each.momentum for each in found if isinstance(each, kind)]

        slow, *_ = (
            each
            for each in learner.model.layers
            if isinstance(each, layers.BatchNormalization)
        )
        slow.momentum = 0.999
        # A published one may be inside of a model.
        whole = keras.Sequential([layers.Input((8, 8, 1)), learner.model])
        for given in (learner, Learner(whole, learner.description)):
            (student,) = api._students(given, 1, 0, "float32")
            self.assertEqual(momenta(student), [0.9, 0.9])
            self.assertEqual(momenta(given), [0.999, 0.9])
            best = api._best([student], [1.0], given)
            self.assertEqual(momenta(best), [0.999, 0.9])

    def test_student_that_is_fed_in_another_way_is_another_run(self):
        folder, student = self.get_temp_dir(), small_student()
        self.distill(student, directory=folder)
        fed = dataclasses.replace(student.description, input_scale=(1 / 255,))
        with self.assertRaisesRegex(TrainingError, "student's feeding: .* -> .*0.0039"):
            self.distill(Learner(student.model, fed), directory=folder)

    def test_curve_has_agreement_and_what_the_caller_measures(self):
        folder = self.get_temp_dir()
        images = digits.split("test").images[:20]
        seen = []

        def evaluate(student):
            seen.append(student.scores(images).mean())
            return {"mean": seen[-1]}

        self.distill(directory=folder, evaluate=evaluate)
        with open(f"{folder}/distillation_curve.csv") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["step"] for row in rows], ["0", "1", "2"])
        for row, value in zip(rows, seen):
            self.assertBetween(float(row["agreement_on_generated_images"]), 0, 1)
            self.assertAllClose(float(row["mean"]), value, rtol=1e-3)
        self.assertLen(set(seen), 3)

    def test_measurements_without_a_place_for_them_are_refused(self):
        with self.assertRaisesRegex(
            ConfigError,
            "evaluate is given and directory is None; .* Name one, or leave",
        ):
            self.distill(evaluate=lambda student: {})

    @parameterized.parameters(None, 0.5, ({"mean": "high"},), ({"mean": [1, 2]},))
    def test_what_an_evaluation_gave_is_told_if_it_is_no_number(self, value):
        with self.assertRaisesRegex(
            ConfigError,
            f"^evaluate gave {re.escape(repr(value))}; it must return names and numb",
        ):
            self.distill(directory=self.get_temp_dir(), evaluate=lambda _: value)

    @parameterized.parameters(
        ("step", "a column of the run's own"),
        ("minutes", "a column of the run's own"),
        ("agreement_on_generated_images", "a column of the run's own"),
        ("top\n5", "more than one line"),
        ("top 5\u2028", "more than one line, or ends one"),
    )
    def test_a_name_that_no_column_can_have_is_refused(self, name, message):
        with self.assertRaisesRegex(
            ConfigError,
            f"^evaluate gave the name {re.escape(repr(name))}, which is {message}",
        ):
            api._numbers({"accuracy": 0.5, name: 1.0})
        given = {"top 5, of ten": np.float32(0.5)}
        self.assertEqual(api._numbers(given), {"top 5, of ten": 0.5})

    @parameterized.parameters(
        *(
            (dict(config=config), f"config is {shown}; it must be a BudgetConfig or ")
            for config, shown in (
                ("budget", "'budget'"),
                (None, "None"),
                (BitWidths(), "a BitWidths"),
            )
        ),
        (
            dict(config=recipe("bank", student_optimizer="adam", student_momentum=0.5)),
            "student_momentum is 0.5, which has no effect where student_optimizer is",
        ),
        (dict(seed=1.5), "seed is 1.5; it must be an integer"),
        (dict(precision="half"), "precision is 'half'; it must be one of"),
        (dict(strategy="mirrored"), "strategy is 'mirrored'; it must be a tf"),
        (dict(directory=""), "directory is empty; name a folder"),
        (dict(directory="runs/[1]"), r"directory is 'runs/\[1\]', with \[ in it, .*Na"),
        (dict(directory=5), "directory is 5; it must be the name of a folder, or None"),
        (dict(directory=__file__), "directory is '.*', a file; name a folder"),
        (dict(show_progress="no"), "show_progress is 'no'; it must be True or False"),
        (dict(evaluate=5), "evaluate is 5; it must be a function of a Learner, or"),
    )
    def test_bad_arguments_are_named_before_any_work(self, arguments, message):
        with self.assertRaisesRegex(ConfigError, f"^{message}"):
            api.distill("no such file", None, **arguments)

    def test_directory_that_cannot_be_written_is_told_before_any_work(self):
        folder = self.get_temp_dir()
        absent, below = os.path.join(folder, "a", "b"), os.path.join(__file__, "a")
        with mock.patch.object(os, "access", lambda path, mode: path != folder):
            for directory, message in (
                (folder, f"directory is '{folder}', where you may not write; name"),
                (absent, f"directory is '{absent}', below {folder}, where you may"),
                (below, f"directory is '{below}', below {__file__}, a file; name"),
            ):
                with self.assertRaisesRegex(ConfigError, message):
                    api.distill("no such file", None, directory=directory)
        with self.assertRaisesRegex(ModelError, "no such file"):
            api.distill("no such file", None, directory=absent)

    def test_directory_may_begin_at_home(self):
        folder, file = os.path.split(__file__)
        with mock.patch.dict(os.environ, HOME=folder):
            with self.assertRaisesRegex(
                ConfigError, f"^directory is '{__file__}', a file; name a folder"
            ):
                api.distill("no such file", None, directory=f"~/{file}")

    @pytest.mark.long
    def test_bank_of_another_size_is_not_taken(self):
        config = dataclasses.replace(self.TINY, bank_images=64)
        folder = self.get_temp_dir()
        self.distill(directory=folder, config=config)
        config = dataclasses.replace(self.TINY, bank_images=32)
        with self.assertRaisesRegex(TrainingError, r"\n  bank_images: 64 -> 32\Z"):
            self.distill(directory=folder, config=config)

    @pytest.mark.long
    def test_student_that_agrees_best_is_kept(self):
        config = dataclasses.replace(self.TINY, num_students=3)
        trained = []
        distill = phases.distill

        def watched(warmed, students, *args, **kwargs):
            trained.extend(students)
            return distill(warmed, students, *args, **kwargs)

        with mock.patch.object(phases, "distill", watched):
            result = self.distill(config=config)
        self.assertLen(result.agreements, 3)
        best = trained[int(np.argmax(result.agreements))]
        others = [each for each in trained if each is not best]
        weights = result.student.model.weights
        self.assertTrue(helpers.all_equal(weights, best.model.weights))
        for other in others:
            self.assertFalse(helpers.all_equal(weights, other.model.weights))
        # Each agreement is of its own student, on images that all see.
        images = generate(result.generators, config, 50, seed=9)
        self.assertLen({each.scores(images).tobytes() for each in trained}, 3)

    @parameterized.parameters(
        (
            dict(shape=(8, 8, 3)),
            r"image shape is \(8, 8, 3\), the teacher's \(8, 8, 1\)",
        ),
        (dict(classes=9), "number of classes is 9, the teacher's 10"),
    )
    def test_student_for_other_images_or_classes_is_refused(self, changes, message):
        student = small_student(**changes)
        with self.assertRaisesRegex(ConfigError, f"^the student's {message}; "):
            self.distill(student)
        with self.assertRaisesRegex(ConfigError, f"^the student's {message}; "):
            self.distill(student.model)
        with self.assertRaisesRegex(ConfigError, f"^the student's {message}; "):
            tiny(digits.teacher(), network=student)

    @parameterized.parameters(
        ("softmax", "softmax"), ("logits", "softmax"), ("softmax", "logits")
    )
    def test_student_that_gives_no_logits_is_refused(self, said, given):
        student = small_student()
        model = student.model
        if given == "softmax":
            outputs = keras.layers.Softmax()(model.output)
            model = keras.Model(model.input, outputs)
        description = dataclasses.replace(student.description, output=said)
        with self.assertRaisesRegex(
            ConfigError,
            f"^the student's description says {said}, .* gives {given}; .*'logits'",
        ):
            self.distill(Learner(model, description))

    @parameterized.parameters(
        (layers.Softmax(), "softmax"),
        (layers.Activation("softmax"), "softmax"),
        (layers.Dense(10, "sigmoid", name="last"), "sigmoid"),
        (tf.nn.softmax, "softmax"),
        (lambda x: keras.Sequential([layers.Softmax()])(x), "softmax"),
    )
    def test_model_that_gives_no_logits_is_refused(self, last, given):
        model = small_student().model
        with self.assertRaisesRegex(
            ConfigError, f"^the student's last layer gives {given}; a student learns"
        ):
            self.distill(keras.Model(model.input, last(model.output)))

    def test_keras_model_is_fed_as_the_teacher_is(self):
        student = small_student()
        config = dataclasses.replace(self.TINY, warm_up_steps=1, rounds=1)
        one, other = (self.distill(s, config=config) for s in (student, student.model))
        description = digits.teacher().description
        self.assertEqual(other.student.description, description)
        weights = one.student.model.weights
        self.assertTrue(helpers.all_equal(weights, other.student.model.weights))

    def test_student_with_preprocessing_of_its_own_is_refused(self):
        """It would come behind the teacher's: pixels would be prepared twice."""
        model, image = small_student().model, layers.Input((8, 8, 1))
        prepares = keras.Model(image, model(layers.Rescaling(1 / 255)(image)))
        with self.assertRaisesRegex(
            ConfigError,
            r"^the student has preprocessing .* input_mean \(120.0,\) .*Leave the stud",
        ):
            self.distill(prepares)
        # Of what the teacher is fed, a student may make more: these are no pixels.
        doubles = keras.Model(image, model(layers.Rescaling(2.0, -1.0)(image)))
        api._learner(doubles, digits.teacher())
        # A Learner says itself how it is fed; a teacher may take pixels as they are.
        api._learner(Learner(prepares, digits.DESCRIPTION), digits.teacher())
        raw = ModelDescription((0.0,), (1.0,), "logits", tuple("0123456789"))
        teacher = dataclasses.replace(digits.teacher(), description=raw)
        self.assertEqual(api._learner(prepares, teacher).description, raw)

    def test_student_of_integers_is_refused(self):
        image = layers.Input((8, 8, 1), dtype="uint8")
        model = keras.Model(image, small_student().model(layers.Rescaling(1.0)(image)))
        for given in (model, Learner(model, digits.DESCRIPTION)):
            with self.assertRaisesRegex(
                ConfigError, "^the student's Input takes uint8, .*leave its dtype out"
            ):
                self.distill(given)

    def test_student_whose_layers_are_frozen_is_refused(self):
        student = small_student()
        student.model.trainable = False
        for given in (student, student.model):
            with self.assertRaisesRegex(
                ConfigError, "^the student has no trainable .*student.trainable = True"
            ):
                self.distill(given)
        student.model.trainable = True  # one layer is enough
        for layer in student.model.layers[1:-1]:
            layer.trainable = False
        before = helpers.copies(student.model.weights)
        learnt = self.distill(student).student.model.weights
        self.assertFalse(helpers.all_equal(before[-2:], learnt[-2:]))
        self.assertTrue(helpers.all_equal(before[:1], learnt[:1]))

    def test_student_whose_gradient_would_corrupt_memory_is_refused(self):
        image = keras.layers.Input((8, 8, 1))
        x = keras.layers.Conv2D(4, 3, padding="same")(image)
        narrow = keras.layers.Conv2D(8, 1, strides=2, name="narrow")
        x = keras.layers.Flatten()(narrow(x))
        model = keras.Model(image, keras.layers.Dense(10)(x))
        message = "student's layer narrow is a 1x1 .* 4 channels.*ONEDNN_OPTS=0"
        with mock.patch.dict(os.environ):
            os.environ.pop("TF_ENABLE_ONEDNN_OPTS", None)
            with mock.patch.object(platform, "machine", return_value="x86_64"):
                with self.assertRaisesRegex(ConfigError, message):
                    self.distill(model)
                os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
                api._check_can_learn(model)
            os.environ.pop("TF_ENABLE_ONEDNN_OPTS")
            with mock.patch.object(platform, "machine", return_value="aarch64"):
                api._check_can_learn(model)
            narrow.trainable = False
            api._check_can_learn(model)

    def test_student_with_a_weight_that_is_no_number_is_refused(self):
        for value in (np.nan, np.inf):
            model = small_student().model
            kernel, *others = model.get_weights()
            kernel[0, 0, 0, 0] = value
            model.set_weights([kernel, *others])
            name = model.weights[0].name
            with self.assertRaisesRegex(
                ConfigError, f"^the student's weight {name} has values that are NaN"
            ):
                self.distill(model)

    def test_what_is_no_functional_model_is_refused(self):
        with self.assertRaisesRegex(ModelError, "the model is a builtins.str"):
            self.distill("student.keras")

    def test_classes_in_another_order_are_refused(self):
        student = small_student()
        names = tuple(reversed(student.description.class_names))
        description = dataclasses.replace(student.description, class_names=names)
        with self.assertRaisesRegex(ConfigError, "^the student's class names is"):
            self.distill(dataclasses.replace(student, description=description))


class StagesTest(tf.test.TestCase, parameterized.TestCase):
    """`prepare`, `post_training` and `trained`."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        stack.enter_context(quickly(200))
        cls.context = helpers.context(TINY, seed=1)
        cls.networks = {}
        teacher = digits.teacher()
        cls.prepared = api.prepare(teacher, teacher, TINY_CALIBRATION, cls.context)
        cls.generators = cls.prepared.warmed.generators
        cls.before = helpers.copies(cls.generators[0].weights)
        cls.first, cls.first_generator = cls.trained(BitWidths())
        cls.other, _ = cls.trained(ALL_4_BITS)

    @classmethod
    def network(cls, widths):
        if widths not in cls.networks:
            cls.networks[widths] = post_training(
                cls.prepared.network, cls.prepared.images, widths, TINY_CALIBRATION
            )
        return cls.networks[widths]

    @classmethod
    def trained(cls, widths, directory=None, evaluate=None):
        context = helpers.context(TINY, seed=1, directory=directory)
        network, (trained,), _ = api.trained(
            cls.prepared, cls.network(widths), context, evaluate
        )
        return network, trained

    def reconstructed(self, network, config=None, directory=None, prepared=None):
        context = helpers.context(TINY, seed=1, directory=directory)
        return api.reconstructed(
            prepared or self.prepared, network, config or FEW_STEPS, context
        )

    def test_images_are_drawn_from_the_generator(self):
        expected = generate(self.generators, TINY, 32, seed=1)
        self.assertAllEqual(self.prepared.images, expected)
        self.assertEqual(self.prepared.images.dtype, np.uint8)

    def test_students_of_one_preparation_do_not_touch_each_other(self):
        second, second_generator = self.trained(BitWidths())
        weights = [weights_of(each.classifier) for each in (second, self.first)]
        self.assertTrue(helpers.all_equal(*weights))
        self.assertTrue(
            helpers.all_equal(second_generator.weights, self.first_generator.weights)
        )
        self.assertTrue(helpers.all_equal(self.generators[0].weights, self.before))

    def test_student_and_a_copy_of_the_generator_are_trained(self):
        networks = (self.first, self.network(BitWidths()))
        weights = [weights_of(each.classifier) for each in networks]
        self.assertFalse(helpers.all_equal(*weights))
        self.assertFalse(helpers.all_equal(self.first_generator.weights, self.before))

    def test_stages_one_by_one_give_what_quantize_gives(self):
        whole = tiny(digits.teacher(), seed=1)
        self.assertEqual(whole.tflite, proof.convert(self.first))
        self.assertTrue(
            helpers.all_equal(whole.generators[0].weights, self.first_generator.weights)
        )

    def test_held_out_images_are_others(self):
        expected = generate(self.generators, TINY, 200, seed=2)
        self.assertAllEqual(self.prepared.held_out, expected)
        scores = digits.teacher().scores(expected)
        self.assertAllClose(self.prepared.answers, scores, atol=1e-5)

    def agreements(self, network):
        """With the teacher, on generated images held out and on 1/f noise."""
        teacher = digits.teacher()
        return [
            agreement(network.scores(images), teacher.scores(images))
            for images in (self.prepared.held_out, self.prepared.procedural)
        ]

    @parameterized.parameters(1e-5, 0.5)
    def test_training_that_harms_is_noticed(self, learning_rate):
        network = self.network(BitWidths())
        config = dataclasses.replace(TINY, student_learning_rate=learning_rate)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trained, _, measured = api.trained(
                self.prepared, network, helpers.context(config, seed=1)
            )
        before, after = (
            measured[f"held_out_agreement_{when}"] for when in ("before", "after")
        )
        per_kind = self.agreements(network)
        self.assertLen(per_kind, 2)
        self.assertEqual(before, sum(per_kind) / 2)
        messages = [str(w.message) for w in caught if "agree less" in str(w.message)]
        self.assertEqual(bool(messages), learning_rate == 0.5)
        self.assertEqual(trained is network, learning_rate == 0.5)
        self.assertEqual(measured["untrained_is_kept"], learning_rate == 0.5)
        if trained is not network:
            self.assertEqual(after, sum(self.agreements(trained)) / 2)
        for message in messages:
            self.assertLess(after, before)
            old = ", ".join(f"{100 * share:.1f} %" for share in per_kind)
            self.assertRegex(
                message, rf"{old} before it, [\d.]+ %, [\d.]+ % after.*not trained is g"
            )
            new = re.search(r"it, ([\d.]+) %, ([\d.]+) % after", message)
            self.assertAlmostEqual(sum(map(float, new.groups())) / 2, 100 * after, 0)

    def test_blocks_are_reconstructed_and_what_is_measured_is_that(self):
        network = self.network(ALL_4_BITS)
        result, blocks, found = self.reconstructed(network)
        self.assertEqual([b.name for b in blocks], ["relu1", "relu2", "logits"])
        self.assertIsNot(result, network)
        self.assertFalse(found["unreconstructed_is_kept"])
        for when, each in (("before", network), ("after", result)):
            expected = sum(self.agreements(each)) / 2
            self.assertEqual(found[f"agreement_{when}_reconstruction"], expected)
        held_out = self.prepared.held_out
        self.assertEqual(found["reconstruction_steps"], FEW_STEPS.rec_steps)
        self.assertEqual(found["reconstruction_images"], 32)
        self.assertEqual(found["photographs_share"], self.prepared.photographs_share)
        content = proof.convert(result)
        self.assertLessEqual(proof.largest_difference(result, content, held_out), 1)

    def test_lessons_have_photographs_and_so_has_what_judges_them(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, images="auto")
        teacher = digits.teacher()
        prepared = api.prepare(teacher, teacher, calibration, self.context)
        vars(prepared).update(warmed=self.prepared.warmed)
        self.assertEqual(prepared.photographs_share, 0.5)
        crops = photographs.crops(1, 16, prepared.network.image_shape)
        self.assertAllEqual(prepared.lessons[::2], crops)
        self.assertAllEqual(prepared.lessons[1::2], prepared.images[1::2])
        config = dataclasses.replace(TINY, pool_images=24)
        pooling = dataclasses.replace(prepared, context=helpers.context(config, seed=1))
        vars(pooling).update(warmed=prepared.warmed)
        pool, seed = pooling.pool, 1 + phases.POOL_SEED
        half = len(pool) // 2
        self.assertAllEqual(
            pool[::2], photographs.crops(seed, half, prepared.network.image_shape)
        )
        made = generate(self.generators, config, 2 * half, seed)
        self.assertAllEqual(pool[1::2], made[1::2])
        *_, (images, answers) = prepared.judging
        others = photographs.crops(2, len(images), prepared.network.image_shape)
        self.assertAllEqual(images, others)
        self.assertAllEqual(answers, prepared.teacher.scores(others))
        # Images that calibrate are generated, all of them.
        self.assertAllEqual(
            prepared.images, generate(self.generators, TINY, 32, seed=1)
        )

    def test_blocks_learn_from_lessons(self):
        made = Reconstructed(self.network(ALL_4_BITS), [], 5, 32)
        prepared = dataclasses.replace(self.prepared)
        vars(prepared).update(images=self.prepared.images, photographs_share=0.5)
        with mock.patch.object(api, "reconstruct", return_value=made) as reconstruct:
            self.reconstructed(made.network, prepared=prepared)
        self.assertAllEqual(reconstruct.call_args[0][2], prepared.lessons)
        self.assertNotAllEqual(prepared.lessons, prepared.images)

    def test_photographs_alone_are_lessons_as_they_are(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, images="photographs")
        teacher = digits.teacher()
        prepared = api.prepare(teacher, teacher, calibration, self.context)
        self.assertEqual(prepared.photographs_share, 1)
        self.assertIs(prepared.lessons, prepared.images)
        crops = photographs.crops(1, 32, prepared.network.image_shape)
        self.assertAllEqual(prepared.images, crops)
        # Those held out are such crops already.
        self.assertLen(prepared.judging, 2)

    @parameterized.parameters((0.5, 32, 0.25), (0.2, 8, 0.4))
    def test_lessons_have_images_that_are_made_for_them(self, share, count, left):
        calibration = dataclasses.replace(
            TINY_CALIBRATION, images="auto", synthesized_in_lessons=share
        )
        prepared = dataclasses.replace(self.prepared, calibration=calibration)
        vars(prepared).update(warmed=self.prepared.warmed)
        with mock.patch.object(api, "synthesized", side_effect=_inverted) as asked:
            lessons = prepared.lessons
        self.assertEqual(asked.call_args[0][1], count)
        self.assertIs(asked.call_args[0][0], self.prepared.warmed)
        usual = with_photographs(prepared.images, 0.5, seed=1)
        expected = [*usual, *_inverted(None, count, None)]
        self.assertCountEqual(map(bytes, lessons), map(bytes, expected))
        self.assertNotAllEqual(lessons[: len(usual)], usual)
        self.assertEqual(prepared.photographs_share_in_lessons, left)
        # Students learn from other images.
        self.assertEqual(prepared.photographs_share, 0.5)

    def test_nothing_is_made_for_lessons_without_batch_normalization(self):
        calibration = dataclasses.replace(TINY_CALIBRATION, synthesized_in_lessons=0.5)
        observed = dataclasses.replace(self.prepared.observed, bn_inputs=[])
        prepared = dataclasses.replace(
            self.prepared, calibration=calibration, observed=observed
        )
        vars(prepared).update(images=self.prepared.images)
        self.assertIs(prepared.lessons, self.prepared.images)

    def test_generated_images_alone_are_to_be_had(self):
        self.assertEqual(self.prepared.photographs_share, 0)
        self.assertEqual(self.prepared.calibration.images, "generated")
        self.assertIs(self.prepared.lessons, self.prepared.images)
        self.assertLen(self.prepared.judging, 2)

    def test_blocks_that_gained_nothing_leave_the_network_as_it_is(self):
        network = self.network(ALL_4_BITS)
        same = dataclasses.replace(network)
        blocks = [FittedBlock("conv", 20.0, 20.0), FittedBlock("logits", 9.0, 9.0)]
        made = Reconstructed(same, blocks, 5, 32)
        with mock.patch.object(api, "reconstruct", return_value=made):
            result, blocks, found = self.reconstructed(network)
        self.assertIs(result, network)
        self.assertEmpty(blocks)
        self.assertTrue(found["unreconstructed_is_kept"])

    def test_what_reconstruction_harms_is_not_given(self):
        network = self.network(ALL_4_BITS)
        (name, *_) = network.kernel_bits
        kernel = np.zeros_like(network.graph.nodes[name].weights["kernel"])
        harmed = network.with_weights({name: {"kernel": kernel}})
        made = Reconstructed(harmed, [FittedBlock("logits", 1.0, 2.0)], 5, 32)
        with mock.patch.object(api, "reconstruct", return_value=made):
            with self.assertWarnsRegex(UserWarning, "not reconstructed is given"):
                result, blocks, found = self.reconstructed(network)
        self.assertIs(result, network)
        self.assertEmpty(blocks)
        self.assertTrue(found["unreconstructed_is_kept"])
        before, after = (
            found[f"agreement_{when}_reconstruction"] for when in ("before", "after")
        )
        self.assertLess(after, before)
        # Nothing in the file has learnt from photographs.
        self.assertNotIn("photographs_share", found)

    def test_what_rewriting_makes_is_refused_before_any_image(self):
        """A transposed convolution ends in DEPTH_TO_SPACE, which has 8 bits."""
        layers = keras.layers
        image = layers.Input((8, 8, 3))
        x = layers.Conv2DTranspose(4, 2, strides=2)(image)
        x = layers.Dense(3)(layers.GlobalAveragePooling2D()(x))
        teacher = as_classifier(keras.Model(image, x), input_mean=0, input_scale=1)
        begun = mock.patch.object(api, "prepare", side_effect=KeyError("begun"))
        wide = BitWidths(num_bits_activation=16)
        with begun, self.assertRaisesRegex(UnsupportedLayerError, "DEPTH_TO_SPACE"):
            api.quantize(teacher, method="df_q", widths=wide)
        with begun, self.assertRaisesRegex(KeyError, "begun"):
            api.quantize(teacher, method="df_q")

    @parameterized.parameters(
        ("procedural", {}, 2.5),
        ("photographs", {}, 1.5),
        ("photographs", {"photographs_logits_margin": 2.0}, 2.0),
        ("photographs", {"logits_margin": 3.0}, 1.5),
    )
    def test_margin_of_the_logits_hangs_on_what_calibrates(self, images, more, margin):
        teacher = digits.teacher()
        calibration = CalibrationConfig(
            images=images,
            calibration_images=3,  # none is held out to choose by
            activation_range="min_max",
            bias_correction=False,
            **more,
        )
        prepared = api.prepare(teacher, teacher, calibration, helpers.context(TINY))
        network = prepared.calibrated.quantized(BitWidths())
        low, high = network.ranges[network.graph.output]
        scores = teacher.scores(prepared.images)
        width = max(0, scores.max()) - min(0, scores.min())
        self.assertAlmostEqual((high - low) / width, margin, places=3)

    def test_size_that_no_file_has_is_refused_before_any_image(self):
        begun = mock.patch.object(api, "prepare", side_effect=KeyError("begun"))
        with begun, self.assertRaisesRegex(ConfigError, "target_kib is 1, and"):
            api.quantize(digits.teacher(), file=FileConfig(target_kib=1))
        with begun, self.assertRaisesRegex(KeyError, "begun"):
            api.quantize(digits.teacher(), file=FileConfig(target_kib=100))

    @parameterized.parameters(
        ("df_rec", BitWidths(), True),
        ("auto", BitWidths(num_bits_first=4), True),
        ("auto", BitWidths(num_bits_activation=4), True),
        ("auto", BitWidths(), True),
        ("df_q", BitWidths(), False),
        ("df_qat_kd", ALL_4_BITS, False),
    )
    def test_one_image_is_too_few_to_reconstruct_from(self, method, widths, refused):
        calibration = dataclasses.replace(TINY_CALIBRATION, calibration_images=1)
        begun = mock.patch.object(api, "prepare", side_effect=KeyError("begun"))
        error = ConfigError if refused else KeyError
        words = "calibration_images is 1; .* at least 2" if refused else "begun"
        with begun, self.assertRaisesRegex(error, words):
            api.quantize(
                digits.teacher(), method=method, widths=widths, calibration=calibration
            )

    def test_checkpoints_of_another_reconstruction_are_refused(self):
        folder, network = self.get_temp_dir(), self.network(BitWidths())
        self.reconstructed(network, directory=folder)
        others = dataclasses.replace(TINY_CALIBRATION, weight_range="min_max")
        prepared = dataclasses.replace(self.prepared, calibration=others)
        vars(prepared).update(images=self.prepared.images)
        longer = helpers.context(dataclasses.replace(TINY, warm_up_steps=9), seed=1)
        warmed = dataclasses.replace(self.prepared, context=longer)
        vars(warmed).update(images=self.prepared.images)
        for change in (
            dict(prepared=prepared),
            dict(prepared=warmed),
            dict(config=dataclasses.replace(FEW_STEPS, rec_drop=0.0)),
            dict(network=self.network(ALL_4_BITS)),
        ):
            with self.assertRaisesRegex(TrainingError, "df_rec_1_of_3: .* another run"):
                self.reconstructed(**{"network": network, **change}, directory=folder)

    @parameterized.parameters(("generated", {"warm_up_steps"}), ("photographs", set()))
    def test_what_generators_made_hangs_on_their_warm_up(self, source, expected):
        network, found = self.network(BitWidths()), []
        for steps in (3, 9):
            config = dataclasses.replace(TINY, warm_up_steps=steps)
            context = helpers.context(config, seed=1)
            prepared = dataclasses.replace(
                self.prepared, source=api.Source(source), context=context
            )
            found.append(api._identity(prepared, network, context))
        before, after = found
        self.assertEqual(before.keys(), after.keys())
        self.assertEqual({k for k in after if before[k] != after[k]}, expected)

    def test_student_behind_another_reconstruction_is_another_run(self):
        network, found = self.network(BitWidths()), []
        for steps in (5, 6):
            behind = dataclasses.replace(FEW_STEPS, rec_steps=steps)
            with mock.patch.object(phases, "distill", return_value={}) as distill:
                api.trained(self.prepared, network, self.context, behind=behind)
            found.append(distill.call_args.kwargs["identity"])
        before, after = found
        self.assertEqual({k for k in after if before[k] != after[k]}, {"rec_steps"})
        self.assertEqual((before["rec_steps"], after["rec_steps"]), ("5", "6"))

    def test_other_pictures_in_the_same_folder_are_another_run(self):
        folder, network = helpers.new_folder(), self.network(BitWidths())
        kept = helpers.context(TINY, seed=1, directory=self.get_temp_dir())
        found = []
        for content in (b"first", b"other", b"first"):
            (folder / "a.png").write_bytes(content)
            source = api.Source(str(folder))
            prepared = dataclasses.replace(self.prepared, source=source)
            found.append(api._identity(prepared, network, kept))
        self.assertEqual(found[0], found[2])
        self.assertNotEqual(found[0], found[1])
        # Where nothing is kept, the pictures are not read for it.
        self.assertLess(
            api._identity(prepared, network, self.context).items(), found[2].items()
        )

    def test_pictures_that_have_moved_are_the_same_run(self):
        network, found = self.network(BitWidths()), []
        kept = helpers.context(TINY, seed=1, directory=self.get_temp_dir())
        for folder in map(str, (helpers.new_folder(), helpers.new_folder())):
            with open(f"{folder}/a.png", "wb") as file:
                file.write(b"the same")
            calibration = dataclasses.replace(TINY_CALIBRATION, images=folder)
            source = api.Source(folder)
            prepared = dataclasses.replace(
                self.prepared, calibration=calibration, source=source
            )
            found.append(api._identity(prepared, network, kept))
        self.assertEqual(found[0], found[1])

    @parameterized.parameters("df_rec", "df_rec_kd")
    def test_methods_of_reconstruction_take_their_stages(self, method):
        network, given = self.network(BitWidths()), self.prepared.warmed.generators
        blocks = [api.FittedBlock("logits", 1.0, 2.0)]
        with (
            mock.patch.object(api, "prepare", return_value=self.prepared),
            mock.patch.object(api, "untrained", return_value=(network, ())),
            mock.patch.object(
                api, "reconstructed", return_value=(self.other, blocks, {"rec": 1.0})
            ) as reconstructed,
            mock.patch.object(
                api, "trained", return_value=(self.first, given, {"loss": 1.0})
            ) as trained,
        ):
            result = quantize(digits.teacher(), method=method, reconstruction=FEW_STEPS)
        trains = method == "df_rec_kd"
        self.assertEqual((result.method, result.blocks), (method, blocks))
        self.assertIs(result.network, self.first if trains else self.other)
        self.assertIs(reconstructed.call_args.args[1], network)
        self.assertIs(reconstructed.call_args.args[2], FEW_STEPS)
        self.assertEqual(trained.call_count, int(trains))
        if trains:
            self.assertIs(trained.call_args.args[1], self.other)
            self.assertIs(trained.call_args.kwargs["behind"], FEW_STEPS)
        self.assertEqual("loss" in result.measurements, trains)
        self.assertIn("rec", result.measurements)

    def test_what_is_expected_is_measured_on_both_kinds(self):
        network = self.network(BitWidths())
        found = api.expected(self.prepared, network)
        self.assertEqual(found.keys(), EXPECTED)
        count = len(self.prepared.procedural)
        self.assertEqual(count, min(256, len(self.prepared.held_out)))
        sure = []
        for kind in ("held_out", "procedural"):
            images = getattr(self.prepared, kind)[:count]
            exact = self.prepared.network.scores(images)
            scores = network.scores(images)
            same = exact.argmax(-1) == scores.argmax(-1)
            name = {"held_out": "generated"}.get(kind, kind)
            self.assertAllClose(found[f"agreement_{name}"], np.mean(same))
            ordered = np.sort(exact, axis=-1)
            margins = ordered[:, -1] - ordered[:, -2]
            three_quarters = margins >= np.sort(margins)[round(count / 4)]
            sure.append(np.mean(same[three_quarters]))
            noise = np.sum(np.square(scores - exact))
            decibels = 10 * np.log10(np.sum(np.square(exact)) / noise)
            self.assertAllClose(found[f"sqnr_{name}"], decibels, atol=1e-2)
        self.assertAllClose(found["expected_agreement"], np.mean(sure), atol=1e-6)

    def test_images_of_one_class_tell_nothing(self):
        network = self.network(BitWidths())
        scores = self.prepared.network.scores(self.prepared.held_out)
        several = self.prepared.held_out[:40]
        (most, *_) = np.argsort(-np.bincount(scores.argmax(-1)))
        one = self.prepared.held_out[scores.argmax(-1) == most]
        one = np.resize(one, several.shape)

        def expected(**kwargs):
            prepared = dataclasses.replace(self.prepared)
            vars(prepared).update(kwargs)
            return api.expected(prepared, network)

        found = expected(held_out=one, procedural=several)
        alone = expected(held_out=several, procedural=several)
        self.assertEqual(found["expected_agreement"], alone["expected_agreement"])
        with self.assertWarnsRegex(
            UserWarning,
            r"images .* with one class.*; in Python, CalibrationConfig\(images=FOLDER",
        ):
            found = expected(held_out=one, procedural=one)
        self.assertEqual(found.keys(), EXPECTED - {"expected_agreement"})

    def test_kinds_that_count_are_those_of_several_classes(self):
        classes = self.prepared.network.scores(self.prepared.held_out).argmax(-1)
        several = self.prepared.held_out[:40]
        (most, *_) = np.argsort(-np.bincount(classes))
        one = np.resize(self.prepared.held_out[classes == most], several.shape)
        for held_out, procedural, kinds in (
            (several, several, ["procedural", "generated"]),
            (one, several, ["procedural"]),
            (several, one, ["generated"]),
            (one, one, []),
        ):
            prepared = dataclasses.replace(self.prepared)
            vars(prepared).update(held_out=held_out, procedural=procedural)
            self.assertEqual(prepared.telling, kinds)

    def test_one_class_says_nothing_of_sigmoid_scores(self):
        teacher = digits.teacher()
        description = dataclasses.replace(teacher.description, probabilities="sigmoid")
        several = Classifier(teacher.graph, description)
        prepared = dataclasses.replace(self.prepared, teacher=several)
        vars(prepared).update(
            held_out=self.prepared.held_out, procedural=self.prepared.procedural
        )
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = api.expected(prepared, self.network(BitWidths()))
        self.assertEqual(found.keys(), EXPECTED - {"expected_agreement"})

    @parameterized.parameters(("logits", 0.0), ("sigmoid", 0.5))
    def test_the_better_of_sigmoid_scores_says_yes_as_often(self, output, yes):
        """Not the one that has the same largest score."""
        answers = np.array([[3.0, 2.0, -1.0], [1.0, 2.0, -3.0]])
        one_largest = np.array([[3.0, -2.0, 1.0], [-1.0, 3.0, 2.0]])
        same_sides = np.array([[2.0, 3.0, -1.0], [2.0, 1.0, -3.0]])
        if output == "sigmoid":
            answers = 1 / (1 + np.exp(-answers))
        teacher = digits.teacher()
        description = dataclasses.replace(
            teacher.description, output=output, probabilities="sigmoid"
        )
        several = Classifier(teacher.graph, description)
        prepared = dataclasses.replace(self.prepared, teacher=several)
        vars(prepared)["judging"] = [(None, answers)]
        first, second = (
            mock.Mock(scores=lambda images, given=given: given)
            for given in (one_largest, same_sides)
        )
        with self.assertWarns(UserWarning):
            found, *shares = api.better(prepared, second, first, "trained")
        self.assertIs(found, second)
        self.assertAllClose(shares, [1.0, 2 / 6])

    @parameterized.parameters(
        ("W8A8", None, "df_q"),
        ("W4A8", None, "df_rec"),
        ("W8A8", 0.98, "df_q"),
        ("W8A8", 0.97, "df_rec"),
        ("W8A16", 0.99, "df_q"),
        ("W8A16", 0.97, "df_rec"),
        ("W4A8", 1.0, "df_rec"),
        ("W4A16", 1.0, "df_rec"),
        ("W8A4", 1.0, "df_rec"),
        ("W4A4", 1.0, "df_rec"),
    )
    def test_more_is_done_for_few_bits_or_little_agreement(self, widths, share, method):
        network = self.network(parse_widths(widths))
        needed = functools.partial(
            api.needed_method, network=network, expected_agreement=share
        )
        self.assertEqual(needed(digits.teacher()), method)
        for output, probabilities in (("sigmoid", None), ("logits", "sigmoid")):
            description = dataclasses.replace(
                digits.teacher().description,
                output=output,
                probabilities=probabilities,
            )
            several = Classifier(digits.teacher().graph, description)
            # An agreement on the one class says nothing of these; few bits do.
            few = "df_q" if widths.startswith("W8A8") or widths == "W8A16" else "df_rec"
            self.assertEqual(needed(several), few)
            with self.assertRaisesRegex(ConfigError, "from which no student can be"):
                api.check_trains(several)

    def test_a_file_of_a_given_size_is_calibrated_by_one_look(self):
        prepared = dataclasses.replace(self.prepared)  # nothing is kept of before
        vars(prepared)["images"] = self.prepared.images
        mixed = MixedWidths(layer_bits=(("conv2", 4),))
        with (
            mock.patch.object(choosing, "observe", wraps=choosing.observe) as looked,
            mock.patch.object(api, "sized_widths", return_value=(mixed, ["table"])),
        ):
            file = FileConfig(target_size="0.5x")
            network, layers = api.untrained(prepared, BitWidths(), file)
        self.assertEqual((looked.call_count, layers), (1, ["table"]))
        self.assertEqual(network.kernel_bits["conv2"], 4)
        self.assertEqual(proof.convert(network), proof.convert(self.network(mixed)))

    @contextlib.contextmanager
    def measured_once(self):
        """What keeps the bits of its kernels in a folder, and what these are.

        To measure them a second time is an error.
        """
        context = helpers.context(TINY, seed=1, directory=self.get_temp_dir())
        prepared = dataclasses.replace(self.prepared, context=context)
        known = self.prepared
        vars(prepared).update(images=known.images, calibrated=known.calibrated)
        chosen = [api.SizedLayer("conv2", 4, "CONV_2D int4", 100, None, 0.1)]
        mixed = MixedWidths(layer_bits=(("conv2", 4),))
        measured = [(mixed, chosen), KeyError("measured anew")]
        with mock.patch.object(api, "sized_widths", side_effect=measured):
            yield prepared, chosen

    def test_a_run_that_goes_on_keeps_the_bits_that_were_chosen(self):
        with self.measured_once() as (prepared, chosen):
            for _ in range(2):
                file = FileConfig(target_size="0.5x")
                network, layers = api.untrained(prepared, BitWidths(), file)
                self.assertEqual(network.kernel_bits["conv2"], 4)
                self.assertEqual(layers, chosen)
            with self.assertRaisesRegex(KeyError, "measured anew"):
                file = FileConfig(target_size="0.6x")
                api.untrained(prepared, BitWidths(), file)

    def test_costs_that_have_moved_leave_the_bits_that_were_chosen(self):
        with self.measured_once() as (prepared, chosen):
            for content in ("one", "one", "another"):
                costs = helpers.new_folder() / "costs.json"
                costs.write_text(content)
                file = FileConfig(target_size="0.5x", kernel_costs=str(costs))
                if content == "one":
                    _, layers = api.untrained(prepared, BitWidths(), file)
                    self.assertEqual(layers, chosen)
            with self.assertRaisesRegex(KeyError, "measured anew"):
                api.untrained(prepared, BitWidths(), file)

    def test_few_bits_of_any_kernel_count(self):
        for name, method in (
            ("num_bits_first", "df_rec"),
            ("num_bits_last", "df_rec"),
            ("num_bits_depthwise", "df_q"),  # it has none
        ):
            network = self.network(BitWidths(**{name: 4}))
            found = api.needed_method(digits.teacher(), network, 1.0)
            self.assertEqual(found, method)

    @parameterized.parameters(
        (0.0, BitWidths(), "df_q"),
        (2.0, BitWidths(), "df_rec"),
        (0.0, ALL_4_BITS, "df_rec"),
    )
    def test_auto_does_what_is_needed(self, enough, widths, method):
        network, given = self.network(widths), self.prepared.warmed.generators
        with (
            mock.patch.object(api, "_ENOUGH_AGREEMENT", enough),
            mock.patch.object(api, "prepare", return_value=self.prepared),
            mock.patch.object(api, "untrained", return_value=(network, ())),
            mock.patch.object(
                api, "reconstructed", return_value=(self.other, [], {"loss": 2.0})
            ),
            mock.patch.object(
                api, "trained", return_value=(self.first, given, {"loss": 1.0})
            ),
        ):
            result = quantize(digits.teacher(), method="auto", widths=widths)
        self.assertEqual(result.method, method)
        expected, loss = {
            "df_q": (network, None),
            "df_rec": (self.other, 2.0),
        }[method]
        self.assertIs(result.network, expected)
        self.assertEqual(result.measurements.get("loss"), loss)
        found = api.expected(self.prepared, expected)
        self.assertContainsSubset(found.items(), result.measurements.items())

    def test_evaluations_make_a_curve_and_change_nothing(self):
        folder = self.get_temp_dir()
        images = digits.split("test").images[:50]
        answers = []

        def evaluate(student):
            answers.append(student.scores(images))
            return {"mean": answers[-1].mean()}

        network, _ = self.trained(BitWidths(), folder, evaluate)
        with open(f"{folder}/df_qat_kd_curve.csv") as file:
            table = list(csv.DictReader(file))
        self.assertEqual([row["step"] for row in table], ["0", "1", "2", "3"])
        for row, scores in zip(table, answers):
            self.assertAllClose(float(row["mean"]), scores.mean(), rtol=1e-4)
        # Measured before the first step, and after the last.
        self.assertAllEqual(answers[0], self.network(BitWidths()).scores(images))
        self.assertNotAllEqual(answers[-1], answers[-2])
        weights = [weights_of(each.classifier) for each in (network, self.first)]
        self.assertTrue(helpers.all_equal(*weights))

    def test_biases_are_whole_steps_of_input_times_kernel(self):
        for network in (self.network(ALL_4_BITS), self.other):
            first, second = (variables_of(network, f"conv{i}") for i in (1, 2))
            relu = variables_of(network, "relu1")
            input_scales = (1 / 64, (relu["output_max"] - relu["output_min"]) / 255)
            for scale, variables in zip(input_scales, (first, second)):
                steps = variables["bias"] / (scale * variables["kernel_max"] / 7)
                self.assertAllClose(steps, np.round(steps), rtol=0, atol=2e-3)
                self.assertGreater(np.abs(steps).max(), 3)


if __name__ == "__main__":
    tf.test.main()
