"""Blocks that learn to give what the float network's give."""

import dataclasses
import functools
import weakref
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import TrainingError
from dfq_tf.graph import Classifier, blocks_of, compute
from dfq_tf.quantization import (
    learnt,
    post_training,
    reconstruction,
    step_sizes,
)
from dfq_tf.settings import BitWidths, CalibrationConfig, ReconstructionConfig
from dfq_tf.tflite import proof
from dfq_tf.training import run_loop, seconds_in_steps
from tests import graphs, helpers, networks
from tests.graphs import Sketch

WIDTHS = BitWidths(num_bits_weight=2, num_bits_activation=6)
CONFIG = ReconstructionConfig(rec_steps=100, rec_batch_size=16, rec_minutes=0)
# Of random kernels, 2 bits leave little: nearest rounding is far from the best.
CALIBRATION = CalibrationConfig(bias_correction=False)


def network():
    """Three blocks, the second residual."""
    sketch = Sketch((6, 6, 3))
    stem = sketch("relu", "stem", sketch.conv("stem_conv", outputs=8))
    sketch("relu", "hidden", sketch.conv("in", stem, outputs=8))
    sketch("add", "sum", stem, sketch.conv("out", outputs=8))
    sketch("global_average_pool", "pool", sketch("relu", "last", "sum"))
    sketch.dense("logits")
    return sketch.classifier()


def run(context, name, step, num_steps, trackables):
    """What `reconstruct` takes its steps by."""
    return run_loop(name, step, num_steps, trackables, context, identity={"a": "b"})


def untraced():
    """Steps run operation by operation: few are not worth compiling."""
    return mock.patch.object(learnt, "traced", lambda function, *specs: function)


class Interrupted(Exception):
    """Stands for a machine that is switched off."""


class ReconstructionTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.exact = network()
        cls.images = graphs.noise((6, 6, 3), 160)
        cls.nearest = post_training.post_training(
            cls.exact, cls.images, WIDTHS, CALIBRATION
        )
        cls.made = cls.reconstructed()
        cls.result, cls.found = cls.made.network, cls.made.blocks

    @classmethod
    def reconstructed(cls, directory=None, config=CONFIG, take=run):
        context = helpers.context(directory=directory)
        return reconstruction.reconstruct(
            cls.nearest,
            cls.exact,
            cls.images,
            config,
            0,
            functools.partial(take, context),
        )

    @parameterized.parameters((1_000_000, 40), (30, 30))
    def test_a_limit_of_time_is_that_of_all_blocks_together(self, most, expected):
        """A minute, of three blocks whose steps take half a second each."""
        asked = []

        def noted(context, name, step, num_steps, trackables):
            if name.endswith("_timing"):
                return step(0)
            asked.append(num_steps)
            return {}

        config = dataclasses.replace(CONFIG, rec_steps=most, rec_minutes=1.0)
        seconds = mock.patch.object(
            learnt.BlockLearner, "step_seconds", return_value=0.5
        )
        with untraced(), seconds:
            made = self.reconstructed(config=config, take=noted)
        self.assertEqual(asked, [expected] * 3)
        self.assertEqual(made.num_steps, expected)

    @parameterized.parameters((0.0, "exact"), (1.0, "fed"))
    def test_values_that_no_share_takes_do_not_count(self, drop, unused):
        """`rec_drop` is the share of the float network's values."""
        block = blocks_of(self.nearest.graph)[1]
        config = ReconstructionConfig(rec_drop=drop, rec_batch_size=4)
        learner = learnt.BlockLearner(block, self.nearest, config, [0, 0])
        given = {name: tf.zeros((8, *block.image.shape)) for name in ("exact", "fed")}
        given[unused] += np.nan
        wanted = tf.zeros((8, *block.last.shape))
        with untraced():
            step = learner.step(
                given["exact"], given["fed"], wanted, 0, tf.constant(1.0), 10
            )
            self.assertTrue(np.isfinite(step(0)["error"]))

    @parameterized.parameters(0.2, 0.8)
    def test_so_large_a_share_is_drawn(self, share):
        random = learnt._Random(1, tf.constant(0))
        mask = random.mask(tf.zeros((2, 40, 40, 3)), share)
        self.assertAllClose(np.mean(mask), share, atol=0.03)

    def block_errors(self, quantized, place):
        """Squared error of a block's output on other images, fed by the float one."""
        images = graphs.noise((6, 6, 3), 64, seed=5).astype(np.float32)
        inputs = self.exact.description.normalize(tf.constant(images))
        exact = blocks_of(self.exact.graph)[place]
        name = exact.image.name
        if name != self.exact.graph.image.name:
            inputs = compute(self.exact.graph, inputs, [name])[0]
        (wanted,) = compute(exact, inputs, [exact.output])
        (given,) = compute(
            blocks_of(quantized.graph)[place],
            inputs,
            [exact.output],
            kernel=quantized.rounded_kernel,
            output=quantized.rounded_output,
        )
        return float(tf.reduce_mean(tf.square(wanted - given)))

    def test_blocks_err_less_than_with_nearest_rounding(self):
        before, after = (
            self.block_errors(each, 1) for each in (self.nearest, self.result)
        )
        self.assertLess(after, 0.8 * before)
        self.assertEqual([b.name for b in self.found], ["stem", "last", "logits"])
        self.assertGreater(self.found[1].after_db, self.found[1].before_db + 1)
        for block in self.found:
            self.assertGreaterEqual(block.after_db, block.before_db)

    def test_before_is_the_block_behind_what_has_been_reconstructed(self):
        images = self.images[:20]  # an eighth of them teaches nothing
        (wanted,) = compute(
            self.exact.graph,
            self.exact.description.normalize(tf.constant(images, tf.float32)),
            ["stem"],
        )
        (given,) = self.nearest.outputs(images, ["stem"])
        noise = np.sum((given - wanted.numpy()) ** 2)
        expected = 10 * np.log10(np.sum(wanted.numpy() ** 2) / noise)
        self.assertAllClose(self.found[0].before_db, expected, atol=1e-3)

    def test_after_is_what_the_file_gives(self):
        images = self.images[:20]
        exact = self.exact.graph
        pixels = self.exact.description.normalize(tf.constant(images, tf.float32))
        names = [block.name for block in self.found]
        wanted = compute(exact, pixels, names)
        given = self.result.outputs(images, names)
        for block, signal, noisy in zip(self.found, wanted, given):
            signal = signal.numpy()
            noise = np.sum((noisy - signal) ** 2)
            expected = 10 * np.log10(np.sum(signal**2) / noise)
            self.assertAllClose(block.after_db, expected, atol=1e-3)

    def test_the_file_is_exact(self):
        images = graphs.noise((6, 6, 3), 32, seed=5)
        content = proof.convert(self.result, images)
        self.assertEqual(proof.largest_difference(self.result, content, images), 0)

    def test_rounding_moves_by_one_step_at_most_and_ranges_of_8_bits_stay(self):
        changed = 0
        for name in self.nearest.kernel_bits:
            integers = [
                each.kernel_integers(name)[0].astype(int)
                for each in (self.nearest, self.result)
            ]
            self.assertLessEqual(np.abs(integers[1] - integers[0]).max(), 1)
            changed += np.sum(integers[1] != integers[0])
        self.assertGreater(changed, 10)
        for name in ("pixels", "pool", "logits"):
            self.assertEqual(self.result.ranges[name], self.nearest.ranges[name])
        self.assertNotEqual(self.result.ranges["hidden"], self.nearest.ranges["hidden"])
        self.assertEqual(self.result.ranges["hidden"][0], 0)

    @parameterized.parameters((3, True), (4, False))
    def test_ranges_from_a_global_pool_on_learn_with_less_than_4_bits(self, bits, do):
        widths = BitWidths(num_bits_activation=bits)
        network = post_training.post_training(
            self.exact, self.images[:16], widths, CALIBRATION
        )
        self.assertEqual(network.bits["pool"], bits)
        found = step_sizes.growing(network)
        self.assertEqual("pool" in found, do)
        self.assertIn("hidden", found)
        self.assertNotIn("logits", found)

    def assert_same(self, made):
        """Everything is as in the run of the class, bit for bit."""
        self.assertEqual(made.blocks, self.found)
        self.assertEqual(made.network.graph.digest(), self.result.graph.digest())
        self.assertEqual(made.network.ranges, self.result.ranges)
        for name, expected in self.result.kernel_ranges.items():
            self.assertAllEqual(made.network.kernel_ranges[name], expected)

    def test_a_run_that_was_interrupted_goes_on_bit_for_bit(self):
        """In the middle of a block; steps 51 to 57 are lost, as every tenth is kept."""
        folder, taken = helpers.new_folder(), []

        def noted(context, name, step, num_steps, trackables):
            def one(index):
                if name == "df_rec_2_of_3" and index == stop:
                    raise Interrupted
                taken.append((name, index))
                return step(index)

            often = dict(identity={"a": "b"}, save_seconds=0.0)
            return run_loop(name, one, num_steps, trackables, context, **often)

        stop = 57
        with self.assertRaises(Interrupted):
            self.reconstructed(folder, take=noted)
        self.assertGreater(seconds_in_steps(folder, *reconstruction.run_names()), 0)
        self.assertEqual(seconds_in_steps(folder, *reconstruction.run_names("rec")), 0)
        self.assertEqual(taken[-1], ("df_rec_2_of_3", 56))
        taken.clear()
        stop = None
        made = self.reconstructed(folder, take=noted)
        self.assertEqual(taken[0], ("df_rec_2_of_3", 50))
        self.assertLen(taken, 50 + 100)
        self.assert_same(made)

    def test_a_limit_of_time_gives_all_blocks_fewer_steps_and_changes_nothing(self):
        asked = []

        def noted(context, name, step, num_steps, trackables):
            before = [variable.numpy() for variable in trackables.values()]
            asked.append(num_steps)
            measured = step(0)
            if name == "df_rec_timing":
                self.assertBetween(int(measured["steps"]), 20, 59)
            for variable, value in zip(trackables.values(), before):
                if name != "df_rec_timing":
                    variable.assign(value)
            return measured

        config = ReconstructionConfig(
            rec_steps=10**6, rec_batch_size=2, rec_minutes=1e-6
        )
        with untraced():
            made = self.reconstructed(config=config, take=noted)
        self.assertEqual(asked, [1, 20, 20, 20])  # the fewest
        self.assertEqual(made.num_steps, 20)
        for name in self.nearest.kernel_bits:
            self.assertAllEqual(
                made.network.kernel_integers(name)[0],
                self.nearest.kernel_integers(name)[0],
            )

    @parameterized.parameters(
        # The largest within the block is what it reads.
        ((32, 64, 3), 2, 16, 8),
        ((64, 64, 3), 2, 8, 4),
        ((64, 64, 3), 2, 3, 3),
        ((6, 6, 3), 1, 16, 16),
    )
    def test_a_step_has_fewer_of_large_images(self, shape, stride, most, count):
        sketch = Sketch(shape)
        sketch.conv("conv", strides=(stride, stride), outputs=2)
        sketch("global_average_pool", "pool")
        sketch.dense("logits")
        exact = sketch.classifier()
        nearest = post_training.post_training(
            exact, graphs.noise(shape, 4), WIDTHS, CALIBRATION
        )
        (block, *_) = blocks_of(nearest.graph)
        config = ReconstructionConfig(rec_batch_size=most)
        step = learnt.BlockLearner(block, nearest, config, [0])
        drawn = []

        def integers(random, count, limit):
            drawn.append(count)
            return tf.zeros((count,), tf.int32)

        with untraced(), mock.patch.object(learnt._Random, "integers", integers):
            step.step_seconds()
        self.assertEqual({*drawn}, {count})

    def test_a_run_of_limited_time_can_be_repeated_by_its_steps(self):
        config = dataclasses.replace(CONFIG, rec_minutes=1e-6)
        made = self.reconstructed(config=config)
        config = ReconstructionConfig(rec_steps=made.num_steps, rec_batch_size=16)
        self.assertLess(made.num_steps, CONFIG.rec_steps)
        again = self.reconstructed(
            config=dataclasses.replace(config, rec_minutes=0)
        ).network
        self.assertEqual(again.graph.digest(), made.network.graph.digest())
        self.assertEqual(again.ranges, made.network.ranges)

    def test_images_without_room_are_named(self):
        self.assertEqual(self.made.num_images, 160)
        config = ReconstructionConfig(rec_steps=1, rec_minutes=0)
        with mock.patch.object(reconstruction, "BLOCK_MEMORY", 40 * 24 * 6 * 6 * 8):
            with (
                untraced(),
                self.assertWarnsRegex(UserWarning, "takes 40 of the 160 images"),
            ):
                made = self.reconstructed(config=config)
        self.assertEqual(made.num_images, 40)

    def test_images_that_had_room_before_have_room_now(self):
        """All lessons of 64 channels of 32x32, as of VGG, and 3 GiB of tensors."""
        sketch = Sketch((32, 32, 64), pixels=False)
        sketch("relu", "relu", sketch.conv("conv", outputs=64))
        sketch.dense("logits", sketch("global_average_pool", "pool"))
        images = np.zeros((2049, 1, 1, 1), np.uint8)
        with self.assertWarnsRegex(UserWarning, "takes 2,048 of the 2,049 images"):
            reconstruction._fitting(images, blocks_of(sketch.graph()))

    def test_all_tensors_that_are_alive_are_counted(self):
        results, alive = [], []
        concat = tf.concat

        def watched(passes, axis):
            # Those of before, these passes, and what they become.
            alive.append(sum(each() is not None for each in results) + 2)
            result = concat(passes, axis)
            results.append(weakref.ref(result))
            return result

        config = ReconstructionConfig(rec_steps=1, rec_minutes=0)
        with untraced(), mock.patch.object(tf, "concat", watched):
            self.reconstructed(config=config)
        self.assertLen(alive, 3 * 3)  # wanted, before and after of each block
        self.assertEqual(max(alive), reconstruction._ALIVE)

    def test_an_error_that_is_not_finite_is_told(self):
        weights = {"out": {"bias": np.full(8, np.nan)}}
        broken = self.exact.graph.with_weights(weights)
        told = "df_rec_2_of_3: error is not finite"
        with untraced(), self.assertRaisesRegex(TrainingError, told):
            reconstruction.reconstruct(
                self.nearest,
                Classifier(broken, self.exact.description),
                self.images,
                ReconstructionConfig(rec_steps=1, rec_minutes=0),
                0,
                functools.partial(run, helpers.context()),
            )


class NetworksTest(tf.test.TestCase, parameterized.TestCase):
    """Layers of all kinds."""

    @parameterized.parameters(*networks.NETWORKS)
    @pytest.mark.long
    def test_any_network_can_be_reconstructed(self, name):
        exact = post_training.float_network(networks.build(name))
        images = networks.images(exact.image_shape, 32)
        nearest = post_training.post_training(exact, images, WIDTHS, CALIBRATION)
        made = reconstruction.reconstruct(
            nearest,
            exact,
            images,
            ReconstructionConfig(rec_steps=4, rec_batch_size=8),
            0,
            functools.partial(run, helpers.context()),
        )
        result = made.network
        self.assertLen(made.blocks, len(blocks_of(exact.graph)))
        content = proof.convert(result, images)
        allowed = proof.largest_difference(nearest, proof.convert(nearest), images)
        steps = proof.largest_difference(result, content, images)
        self.assertLessEqual(steps, allowed + 2)


if __name__ == "__main__":
    tf.test.main()
