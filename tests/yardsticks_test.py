import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.distillation import steps
from dfq_tf.errors import ConfigError
from dfq_tf.graph.classifier import agreement
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import Reconstructed
from dfq_tf.settings import (
    BitWidths,
    CalibrationConfig,
    DistillationConfig,
    ReconstructionConfig,
)
from dfq_tf.tflite import proof
from dfq_tf.training import loop
from dfq_tf.with_data import yardsticks
from dfq_tf.with_data.datasets import accuracy
from tests import digits, helpers

ALL_4_BITS = BitWidths(
    num_bits_weight=4, num_bits_first=4, num_bits_last=4, num_bits_depthwise=4
)
MIN_MAX = CalibrationConfig(
    calibration_images=64,
    activation_range="min_max",
    weight_range="min_max",
    bias_correction=False,
)
CONFIG = DistillationConfig(
    batch_size=64,
    rounds=60,
    student_steps=2,
    student_learning_rate=0.003,
)
# Enough to unlearn what was right.
THOROUGH = dataclasses.replace(CONFIG, rounds=120, student_learning_rate=0.03)
# Enough to see whether something was done.
TINY = DistillationConfig(
    batch_size=8, rounds=3, student_steps=2, student_learning_rate=0.01
)


def network_of(teacher, widths=BitWidths(), config=MIN_MAX, images=None):
    if images is None:
        images = digits.split("train").images
    return yardsticks.calibrated_with_data(teacher, images, config).quantized(widths)


@functools.cache
def digits_network(widths=BitWidths()):
    """What training starts from, on digits; nothing changes it."""
    return network_of(digits.teacher(), widths)


@functools.cache
def small_network(widths=BitWidths()):
    """What training starts from, on noise; nothing changes it."""
    return network_of(helpers.small_classifier(), widths, images=digits_like(20))


def train(teacher, network, images, labels, config=TINY, **kwargs):
    """The trained network, and the last measurements."""
    names = ("augmentation", "evaluate")
    given = {name: kwargs.pop(name) for name in names if name in kwargs}
    return yardsticks.train_with_data(
        teacher,
        network,
        images,
        labels,
        helpers.context(config, **{"seed": 1, **kwargs}),
        **{"augmentation": "none", **given},
    )


def weights_of(classifier):
    """All weights of a graph."""
    nodes = classifier.graph.nodes.values()
    return [weight for node in nodes for weight in node.weights.values()]


def tiny(seed=1, **kwargs):
    """The weights of a small network after six steps."""
    teacher = helpers.small_classifier()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 8, 8, 3)).astype(np.uint8)
    labels = rng.integers(0, 4, 20) if kwargs.pop("has_labels", False) else None
    with helpers.eagerly():
        trained, _ = train(
            teacher, small_network(), images, labels, seed=seed, **kwargs
        )
    return weights_of(trained.classifier)


def divergence(teacher_logits, logits):
    """Mean KL divergence in nats, in NumPy."""

    def log_softmax(values):
        values = values.astype(np.float64)
        values = values - values.max(axis=1, keepdims=True)
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    p, q = log_softmax(teacher_logits), log_softmax(logits)
    return np.mean(np.sum(np.exp(p) * (p - q), axis=1))


class CalibratedWithDataTest(tf.test.TestCase, parameterized.TestCase):
    def _highest(self, images):
        """Highest output of each ReLU of the float network."""
        model = digits.learner().model
        tensors = [model.get_layer(name).output for name in ("relu1", "relu2")]
        inputs = ((images - 120.0) / 64).astype(np.float32)
        outputs = keras.Model(model.input, tensors)(inputs, training=False)
        return [output.numpy().max() for output in outputs]

    def _upper_ends(self, network):
        return [network.ranges[f"relu{i}"][1] for i in (1, 2)]

    @parameterized.parameters(1, 64, 5000)
    def test_ranges_are_those_of_the_first_calibration_images(self, count):
        images = digits.split("train").images[:200].copy()
        # What comes last has the highest outputs: no image of digits has these edges.
        images[100:] = 255 * (np.indices((8, 8)).sum(axis=0) % 2)[..., None]
        config = dataclasses.replace(MIN_MAX, calibration_images=count)
        network = network_of(digits.teacher(), config=config, images=images)
        expected = self._highest(images[:count])
        self.assertAllClose(self._upper_ends(network), expected, rtol=1e-4)
        if count < 100:
            self.assertNotAllClose(expected, self._highest(images), rtol=0.01)

    def test_first_images_are_a_fair_sample(self):
        teacher, test = digits.teacher(), digits.split("test").images
        scores = digits_network().scores(test)
        self.assertGreaterEqual(agreement(teacher.scores(test), scores), 0.95)

    def test_range_methods_and_widths_reach_the_student(self):
        default = digits_network(ALL_4_BITS)
        config = CalibrationConfig(
            calibration_images=64, activation_range="mse", bias_correction=False
        )
        least_squares = network_of(digits.teacher(), ALL_4_BITS, config)
        for first, second in zip(
            self._upper_ends(least_squares), self._upper_ends(default)
        ):
            self.assertLess(first, second)
        kernel = default.graph.nodes["conv2"].weights["kernel"]
        largest = np.abs(kernel).max(axis=(0, 1, 2))
        self.assertAllClose(default.kernel_ranges["conv2"], largest)
        self.assertEqual(default.kernel_bits["conv2"], 4)

    def test_bias_correction_uses_the_images(self):
        teacher = digits.teacher()
        images = digits.split("train").images[:64]
        goal = teacher.scores(images).mean(axis=0)
        shifts = []
        for is_corrected in (False, True):
            config = dataclasses.replace(MIN_MAX, bias_correction=is_corrected)
            network = network_of(teacher, ALL_4_BITS, config)
            shifts.append(np.abs(network.scores(images).mean(axis=0) - goal).mean())
        self.assertLess(shifts[1], 0.2 * shifts[0])

    def test_leaves_the_teacher_bit_for_bit(self):
        teacher = digits.teacher()
        before = helpers.copies(weights_of(teacher))
        network_of(teacher, config=dataclasses.replace(MIN_MAX, equalize=True))
        self.assertTrue(helpers.all_equal(weights_of(teacher), before))


class ReconstructWithDataTest(tf.test.TestCase):
    def test_blocks_learn_on_the_first_calibration_images(self):
        images = digits.split("train").images[:100]
        calibrated = yardsticks.calibrated_with_data(digits.teacher(), images, MIN_MAX)
        network, context = digits_network(), helpers.context(TINY, seed=3)
        config = ReconstructionConfig(rec_steps=3)
        made = Reconstructed("the result", [], 3, 64)
        with mock.patch.object(
            yardsticks, "reconstruct", return_value=made
        ) as reconstruct:
            result = yardsticks.reconstruct_with_data(
                network, calibrated, config, context
            )
        self.assertEqual(result, "the result")
        begun, exact, given, *others, run, name = reconstruct.call_args.args
        self.assertIs(begun, network)
        self.assertAllEqual(given, images[:64])
        self.assertEqual((others, name), ([config, 3], "rec"))
        self.assertEqual(
            (run.func, run.keywords), (loop.run_loop, {"context": context})
        )
        expected = digits.teacher().scores(images)
        self.assertAllClose(exact.scores(images), expected, atol=1e-4)


class LearningTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.teacher = digits.teacher()
        cls.train, cls.test = digits.split("train"), digits.split("test")
        cls.goal = cls.teacher.scores(cls.test.images)

    @property
    def next_digit(self):
        """The labels of the test images, each one wrong."""
        return (self.test.labels + 1) % 10

    def _off_course(self):
        """A network of 4 bits that must learn: its kernels are disturbed."""
        network = digits_network(ALL_4_BITS)
        rng = np.random.default_rng(0)
        changed = {}
        for name, largest in network.kernel_ranges.items():
            kernel = network.graph.nodes[name].weights["kernel"]
            noise = 0.3 * largest * rng.normal(size=kernel.shape)
            changed[name] = {"kernel": kernel + noise}
        return network.with_weights(changed)

    def test_qat_kd_draws_nearer_to_the_teacher(self):
        network = self._off_course()
        before = network.scores(self.test.images)
        weights = helpers.copies(weights_of(self.teacher))
        trained, measured = train(
            self.teacher, network, self.train.images, None, CONFIG
        )
        after = trained.scores(self.test.images)
        self.assertLess(
            divergence(self.goal, after), 0.2 * divergence(self.goal, before)
        )
        self.assertGreater(
            agreement(self.goal, after), agreement(self.goal, before) + 0.1
        )
        self.assertEqual(set(measured), {"distillation_loss", "agreement"})
        # The teacher stays, and the network is still one of integers.
        self.assertTrue(helpers.all_equal(weights_of(self.teacher), weights))
        self.assertAllEqual(network.scores(self.test.images), before)
        content = proof.convert(trained)
        difference = proof.largest_difference(trained, content, self.test.images)
        self.assertLessEqual(difference, 3)

    def test_qat_draws_nearer_to_the_labels(self):
        network = self._off_course()
        before = network.scores(self.test.images)
        trained, _ = train(
            self.teacher,
            network,
            self.train.images,
            self.train.labels,
            CONFIG,
            augmentation="crop",
        )
        after = trained.scores(self.test.images)
        self.assertGreater(
            accuracy(after, self.test.labels),
            accuracy(before, self.test.labels) + 0.1,
        )

    @pytest.mark.long
    def test_qat_kd_follows_the_teacher_whatever_is_true(self):
        # A teacher that takes each digit for the next one.
        learner = digits.learner()
        kernel, bias = learner.model.get_layer("logits").get_weights()
        learner.model.get_layer("logits").set_weights(
            [np.roll(kernel, 1, axis=1), np.roll(bias, 1)]
        )
        misled, network = as_classifier(learner), digits_network()
        trained, _ = train(misled, network, self.train.images, None, THOROUGH)
        scores = trained.scores(self.test.images)
        self.assertGreater(accuracy(scores, self.next_digit), 0.8)

    @pytest.mark.long
    def test_qat_follows_the_labels_whatever_the_teacher_says(self):
        network = digits_network()
        wrong = (self.train.labels + 1) % 10
        trained, measured = train(
            self.teacher, network, self.train.images, wrong, THOROUGH
        )
        scores = trained.scores(self.test.images)
        self.assertGreater(accuracy(scores, self.next_digit), 0.8)
        self.assertLess(agreement(self.goal, scores), 0.15)
        self.assertEqual(set(measured), {"loss", "accuracy"})


class StepsTest(tf.test.TestCase, parameterized.TestCase):
    def test_number_size_and_order_of_the_batches(self):
        images = np.zeros((20, 8, 8, 3), np.uint8)
        images += np.arange(20, dtype=np.uint8)[:, None, None, None]
        seen = []

        def step(student, optimizer, pixels, logits, **settings):
            tf.py_function(lambda x: seen.append(x.numpy()), [pixels[:, 0, 0, 0]], [])
            return {"distillation_loss": tf.constant(0.0)}

        teacher = helpers.small_classifier()
        with mock.patch.object(steps, "distillation_step", step):
            for config in (TINY, dataclasses.replace(TINY, batch_size=20)):
                train(teacher, small_network(), images, None, config)
        # 3 rounds of 2 steps.
        numbers = [np.rint(batch).astype(int) for batch in seen]
        self.assertEqual([len(batch) for batch in numbers], 6 * [8] + 6 * [20])
        # Two batches of 8 are an epoch: no image comes twice.
        epochs = [tuple(np.concatenate(numbers[i : i + 2])) for i in (0, 2, 4)]
        for epoch in epochs:
            self.assertLen(set(epoch), 16)
        self.assertLen(set(epochs), 3)
        for batch in numbers[6:]:
            self.assertCountEqual(batch, range(20))

    def test_labels_are_those_of_the_images(self):
        images = np.zeros((20, 8, 8, 3), np.uint8)
        images += np.arange(20, dtype=np.uint8)[:, None, None, None]
        seen = []

        def step(model, optimizer, inputs, labels, weight_decay):
            self.assertEqual(weight_decay, 0.0)
            pixels = inputs[:, 0, 0, 0] * 64 + 120
            tf.py_function(lambda *x: seen.append(x), [pixels, labels], [])
            return {"loss": tf.constant(0.0)}

        teacher = helpers.small_classifier()
        with mock.patch.object(yardsticks, "supervised_step", step):
            train(teacher, small_network(), images, np.arange(20, dtype=np.int64) + 100)
        self.assertLen(seen, 6)
        for pixels, labels in seen:
            self.assertAllClose(pixels.numpy() + 100, labels.numpy(), atol=1e-4)

    @parameterized.parameters(False, True)
    def test_seed_decides_the_order(self, has_labels):
        one, same, other = (tiny(seed, has_labels=has_labels) for seed in (1, 1, 2))
        self.assertTrue(helpers.all_equal(one, same))
        self.assertFalse(helpers.all_equal(one, other))

    @parameterized.parameters(False, True)
    def test_interrupted_run_continues_to_the_same_weights(self, has_labels):
        run = functools.partial(tiny, has_labels=has_labels, augmentation="crop_flip")
        whole = run()
        directory = self.get_temp_dir()

        def run_loop(name, step, *args, **kwargs):
            def interrupted(index):
                if index == 3:
                    raise KeyboardInterrupt
                return step(index)

            return loop.run_loop(
                name, interrupted, *args, measure_every=2, save_seconds=0, **kwargs
            )

        with mock.patch.object(yardsticks, "run_loop", run_loop):
            with self.assertRaises(KeyboardInterrupt):
                run(directory=directory)
        self.assertTrue(helpers.all_equal(run(directory=directory), whole))
        # And once more, of the finished run: nothing is left to do.
        with mock.patch.object(yardsticks, "run_loop", self._finished):
            self.assertTrue(helpers.all_equal(run(directory=directory), whole))

    @staticmethod
    def _finished(name, step, *args, **kwargs):
        def refuse(index):
            raise AssertionError("a step was taken")

        return loop.run_loop(name, refuse, *args, **kwargs)

    def test_qat_and_qat_kd_share_a_directory(self):
        directory = self.get_temp_dir()
        qat_kd = tiny(directory=directory)
        qat = tiny(directory=directory, has_labels=True)
        self.assertFalse(helpers.all_equal(qat_kd, qat))
        self.assertTrue(helpers.all_equal(tiny(has_labels=True), qat))

    @parameterized.parameters((False, "qat_kd"), (True, "qat"))
    def test_evaluations_make_a_curve_of_about_ten_points(self, has_labels, name):
        directory = self.get_temp_dir()
        config = dataclasses.replace(TINY, rounds=13)
        tiny(
            config=config,
            directory=directory,
            has_labels=has_labels,
            evaluate=lambda student: {"accuracy": 0.5},
        )
        with open(f"{directory}/{name}_curve.csv") as file:
            header, *rows = file.read().splitlines()
        self.assertEqual(header, "step,minutes,accuracy")
        steps_of, minutes, accuracies = np.loadtxt(rows, delimiter=",").T
        self.assertAllEqual(steps_of, [*range(0, 26, 2), 26])
        self.assertAllEqual(accuracies, np.full(14, 0.5))
        self.assertAllEqual(minutes, sorted(minutes))

    def test_batch_larger_than_the_training_set_is_refused(self):
        teacher = helpers.small_classifier()
        images, network = digits_like(20), small_network()
        before = helpers.copies(weights_of(network.classifier))
        config = dataclasses.replace(TINY, batch_size=21)
        with self.assertRaisesRegex(
            ConfigError, "batch_size is 21, but there are only 20 training images"
        ):
            train(teacher, network, images, None, config)
        self.assertTrue(helpers.all_equal(weights_of(network.classifier), before))

    def test_biases_end_on_whole_steps(self):
        teacher = helpers.small_classifier()
        network = small_network(ALL_4_BITS)
        with helpers.eagerly():
            trained, _ = train(teacher, network, digits_like(20), None)
        low, high = trained.ranges["relu1"]
        step = (high - low) / 255 * trained.kernel_ranges["conv2"] / 7
        numbers = trained.graph.nodes["conv2"].weights["bias"] / step
        self.assertAllClose(numbers, np.round(numbers), rtol=0, atol=2e-3)
        self.assertGreater(np.abs(numbers).max(), 3)


def digits_like(count):
    """Noise of the shape that `helpers.small_classifier` takes."""
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


class AugmentedTest(tf.test.TestCase):
    def test_what_is_trained_on_is_augmented(self):
        images = digits_like(10)
        seen = []

        def step(student, optimizer, pixels, logits, **settings):
            tf.py_function(lambda x: seen.append(x.numpy()), [pixels], [])
            return {"distillation_loss": tf.constant(0.0)}

        teacher = helpers.small_classifier()
        network = small_network()
        config = dataclasses.replace(TINY, batch_size=10)
        with mock.patch.object(steps, "distillation_step", step):
            for seed in (1, 2):
                train(
                    teacher,
                    network,
                    images,
                    None,
                    config,
                    augmentation="crop",
                    seed=seed,
                )
        # Where each place of each batch was cut out, of whichever image it holds.
        crops = []
        for results in seen:
            found = [
                {helpers.offset_in_padded(result, image, 120.0) for image in images}
                - {None}
                for result in results
            ]
            self.assertEqual({len(each) for each in found}, {1})
            crops.append(tuple(offset for each in found for offset in each))
        self.assertLen(set().union(*crops), 9)
        # Others at each step of each seed.
        self.assertLen(crops, 12)
        self.assertLen(set(crops), 12)


if __name__ == "__main__":
    tf.test.main()
