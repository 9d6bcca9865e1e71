"""Widths of single kernels for a file of a given size, chosen without data."""

import itertools
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError
from dfq_tf.quantization import chosen_bits, kernel_noise, with_kernel_bits
from dfq_tf.quantization import network as quantized
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig, MixedWidths
from dfq_tf.tflite import (
    as_table,
    check_size,
    check_target_takes,
    convert,
    sized_widths,
    sizing,
    writer,
)
from dfq_tf.tflite.running import kernel_types
from tests.graphs import Sketch, noise

SHAPE = (6, 6, 4)
CALIBRATION = CalibrationConfig(
    activation_range="min_max",
    pooled_margin=1.0,
    logits_margin=1.0,
    bias_correction=False,
)


def sketch():
    """Four kernels, of which the first is small and tells much."""
    drawn = Sketch(SHAPE)
    drawn.conv("first", outputs=16, size=1)
    drawn("relu", "relu_1", top=None)
    drawn.conv("second", outputs=64, size=1)
    drawn("relu", "relu_2", top=None)
    drawn.conv("third", outputs=64, size=1)
    drawn("global_average_pool", "pool", keepdims=False)
    drawn.dense("dense", outputs=8)
    return drawn


def many_grids():
    """Sums of convolutions, each of which has a grid of its own, as each sum has."""
    drawn = Sketch(SHAPE)
    first = total = drawn.conv("first", outputs=16, size=1)
    for i in range(24):
        branch = drawn.conv(f"conv_{i}", first, outputs=16, size=1)
        total = drawn("add", f"sum_{i}", total, branch)
    drawn("global_average_pool", "pool", keepdims=False)
    drawn.dense("dense", outputs=8)
    return drawn


class ChosenBitsTest(tf.test.TestCase, parameterized.TestCase):
    SIZES = {"a": 100, "b": 40, "c": 300}
    BYTES = {
        (name, bits): size * bits // 8
        for name, size in SIZES.items()
        for bits in (8, 4, 2)
    }
    NOISE = {
        ("a", 8): 0.0, ("a", 4): 1.0, ("a", 2): 30.0,
        ("b", 8): 0.0, ("b", 4): 2.0, ("b", 2): 2.5,
        ("c", 8): 0.0, ("c", 4): 9.0, ("c", 2): 99.0,
    }  # fmt: skip

    def chosen(self, to_save):
        return chosen_bits(self.NOISE, self.BYTES, to_save)

    def test_nothing_to_save(self):
        self.assertEqual(self.chosen(0), {"a": 8, "b": 8, "c": 8})

    def test_cheapest_bytes_first(self):
        self.assertEqual(self.chosen(50), {"a": 4, "b": 8, "c": 8})
        self.assertEqual(self.chosen(200), {"a": 4, "b": 8, "c": 4})

    def test_as_much_as_there_is(self):
        self.assertEqual(self.chosen(10_000), {"a": 2, "b": 2, "c": 2})

    @parameterized.parameters(*range(10, 331, 40))
    def test_little_more_noise_than_the_best_of_all(self, to_save):
        def saved(bits):
            return sum(self.BYTES[n, 8] - self.BYTES[n, b] for n, b in bits.items())

        def total(bits):
            return sum(self.NOISE[move] for move in bits.items())

        choices = itertools.product((8, 4, 2), repeat=3)
        everything = [dict(zip(self.SIZES, bits)) for bits in choices]
        best = min((b for b in everything if saved(b) >= to_save), key=total)
        found = self.chosen(to_save)
        self.assertGreaterEqual(saved(found), to_save)
        # One kernel's step more than needed is what greed may cost.
        self.assertLessEqual(total(found), total(best) + 12)

    def test_a_width_that_saves_nothing_is_left(self):
        same = {**self.BYTES, ("c", 2): self.BYTES["c", 4]}
        self.assertEqual(chosen_bits(self.NOISE, same, 10_000)["c"], 4)


class SizedTest(tf.test.TestCase, parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.images = noise(SHAPE, 40)
        cls.float = float_network(sketch().classifier())
        cls.network = post_training(cls.float, cls.images, BitWidths(), CALIBRATION)

    def sized(self, **size):
        file = FileConfig(favor="size", **size)
        mixed, layers = sized_widths(
            self.network, self.images, BitWidths(), file, CALIBRATION.weight_range
        )
        network = post_training(self.float, self.images, mixed, CALIBRATION)
        return mixed, layers, network, convert(network, self.images, file)

    def test_noise_is_that_of_each_kernel_alone(self):
        found = kernel_noise(self.network, self.images, "mse")
        self.assertLen(found, 4 * 3)
        (exact,) = self.network.outputs(self.images, [self.network.graph.output])
        widths = MixedWidths(layer_bits=(("second", 2),))
        changed = post_training(self.float, self.images, widths, CALIBRATION)
        self.assertEqual(changed.kernel_bits["second"], 2)
        self.assertEqual(changed.kernel_bits["third"], 8)
        (noisy,) = changed.outputs(self.images, [changed.graph.output])
        expected = np.sum((noisy - exact) ** 2) / np.sum(exact**2)
        self.assertAllClose(found["second", 2], expected, rtol=0.05)
        self.assertEqual(found["second", 8], 0)
        for name in self.network.kernel_bits:
            self.assertGreater(found[name, 2], found[name, 4])

    def test_noise_does_not_hang_on_how_many_images_go_through_at_a_time(self):
        expected = kernel_noise(self.network, self.images, "mse")
        passed, whole = [], QuantizedNetwork.outputs

        def outputs(self, images, names):
            passed.append(len(images))
            return whole(self, images, names)

        with (
            mock.patch.object(quantized, "images_per_pass", return_value=16),
            mock.patch.object(QuantizedNetwork, "outputs", outputs),
        ):
            found = kernel_noise(self.network, self.images, "mse")
        self.assertEqual(set(passed), {16, 8})  # of 40
        self.assertEqual(found.keys(), expected.keys())
        for key, power in expected.items():
            self.assertAllClose(found[key], power, rtol=1e-5)

    def test_ranges_are_those_of_the_bits(self):
        changed = with_kernel_bits(self.network, {"third": 2}, "mse")
        widths = MixedWidths(layer_bits=(("third", 2),))
        expected = post_training(self.float, self.images, widths, CALIBRATION)
        for name, ranges in expected.kernel_ranges.items():
            self.assertAllEqual(changed.kernel_ranges[name], ranges)

    @parameterized.parameters(0.9, 0.75)
    def test_files_are_no_larger_than_asked_for(self, share):
        whole = len(writer.write(self.network, FileConfig(favor="size")))
        mixed, layers, network, content = self.sized(target_size=f"{share}x")
        self.assertLessEqual(len(content), share * whole)
        # And not much smaller: bits are kept where there is room.
        self.assertGreater(len(content), share * whole - 2100)
        self.assertEqual(dict(mixed.layer_bits), dict(network.kernel_bits))
        self.assertEqual({n.name: n.bits for n in layers}, network.kernel_bits)
        types = kernel_types(content)
        for layer in layers:
            self.assertEndsWith(layer.form, types[layer.name])
            self.assertGreater(layer.milliseconds, 0)
        lines = as_table(layers).splitlines()
        self.assertLen(lines, 5)
        self.assertIn("first", lines[1])

    def test_kib(self):
        _, layers, _, content = self.sized(target_kib=8)
        self.assertLessEqual(len(content), 8 * 1024)
        self.assertTrue(any(layer.bits < 8 for layer in layers))

    def test_more_room_than_needed_keeps_all_bits(self):
        mixed, layers, _, _ = self.sized(target_kib=1000)
        self.assertEqual(set(dict(mixed.layer_bits).values()), {8})
        self.assertEqual({layer.noise for layer in layers}, {0.0})

    def test_file_that_fits_keeps_all_bits(self):
        whole = len(writer.write(self.network, FileConfig(favor="size")))
        kib = -(-whole // 1024)
        mixed, *_ = self.sized(target_kib=kib)
        self.assertEqual(set(dict(mixed.layer_bits).values()), {8})
        # As large as that to the byte; no room is kept free where nothing changes.
        with mock.patch.object(sizing, "_RESERVE", 1024 * kib - whole + 1):
            mixed, *_ = self.sized(target_kib=kib)
        self.assertEqual(set(dict(mixed.layer_bits).values()), {8})

    def test_few_weights_are_not_worth_fewer_bits(self):
        with mock.patch.object(sizing, "_RESERVE", 10**6):
            with self.assertRaisesRegex(
                ConfigError,
                "target_size is '0.5x', and fewer bits make this file hardly smaller",
            ):
                self.sized(target_size="0.5x")

    @parameterized.parameters(("target_size", "0.1x"), ("target_kib", 1))
    def test_says_the_smallest(self, name, value):
        message = f"{name} is {value!r}, and the smallest file has .* ask for (.*)x or"
        with self.assertRaisesRegex(ConfigError, message) as caught:
            self.sized(**{name: value})
        share = str(caught.exception).split("ask for ")[1].split("x")[0]
        _, layers, _, content = self.sized(target_size=f"{share}x")
        self.assertEqual({layer.bits for layer in layers}, {2})
        whole = len(writer.write(self.network, FileConfig(favor="size")))
        self.assertLessEqual(len(content), float(share) * whole)
        # Before there are ranges, the same is known but for what tensors share.
        file = FileConfig(favor="size", **{name: value})
        with self.assertRaisesRegex(ConfigError, message) as early:
            check_size(self.float, BitWidths(), file)
        found = str(early.exception).split("ask for ")[1].split("x")[0]
        self.assertAlmostEqual(float(found), float(share), delta=0.01)
        file = FileConfig(favor="size", target_size=f"{share}x")
        check_size(self.float, BitWidths(), file)

    @parameterized.parameters((8_743, "9 KiB"), (8_735, "0.999x or 9 KiB"))
    def test_a_share_of_one_is_not_advised(self, least, advice):
        """Both with the bytes that are kept free: 8,999 and 8,991 of 9,000."""
        files = [bytes(9_000), bytes(least)]
        message = f"of 8-bit weights: ask for {advice} at the least$"
        with mock.patch.object(sizing, "write", side_effect=files):
            with self.assertRaisesRegex(ConfigError, message):
                file = FileConfig(favor="size", target_kib=1)
                check_size(self.float, BitWidths(), file)

    @parameterized.parameters(
        (BitWidths(), "android", True),
        (BitWidths(8, 16), "android", False),
        (BitWidths(), "micro", False),
    )
    def test_another_form_is_advised_where_there_is_one(self, widths, target, advised):
        file = FileConfig(target=target, target_kib=1)
        with self.assertRaisesRegex(ConfigError, "target_kib is 1, and") as caught:
            check_size(self.float, widths, file)
        self.assertEqual("favor='size'" in str(caught.exception), advised)

    def test_what_it_says_before_there_are_ranges_is_enough(self):
        """A grid takes some 36 bytes of a file, where no other tensor has the same."""
        network = float_network(many_grids().classifier())
        small = FileConfig(favor="size", target_kib=1)
        with self.assertRaisesRegex(ConfigError, "KiB at the least") as early:
            check_size(network, BitWidths(), small)
        kib = int(str(early.exception).split(" KiB at")[0].split()[-1])
        images, file = self.images[:8], FileConfig(favor="size", target_kib=kib)
        ranged = post_training(network, images, BitWidths(), CALIBRATION)
        mixed, _ = sized_widths(ranged, images, BitWidths(), file, "min_max")
        sized = post_training(network, images, mixed, CALIBRATION)
        self.assertLessEqual(len(writer.write(sized, file)), 1024 * kib)

    def test_size_of_the_int8_file_is_nearly_known_before_there_are_ranges(self):
        network = float_network(many_grids().classifier())
        ranged = post_training(network, self.images[:8], BitWidths(), CALIBRATION)
        size = len(writer.write(ranged, FileConfig()))
        self.assertAllClose(sizing.file_bytes(network), size, rtol=0.02)


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("half", "0.5", "1.5x", "0x", "x", "-0.5x")
    def test_what_is_no_share(self, value):
        with self.assertRaisesRegex(ConfigError, f"target_size is '{value}'; write a"):
            FileConfig(target_size=value)

    def test_two_sizes(self):
        with self.assertRaisesRegex(ConfigError, "give one of them"):
            FileConfig(target_size="0.5x", target_kib=100)

    def test_negative(self):
        with self.assertRaisesRegex(ConfigError, "target_kib is -1; it must be at"):
            FileConfig(target_kib=-1)

    def test_bits_of_a_layer(self):
        with self.assertRaisesRegex(ConfigError, "layer_bits of conv is 1; .* least 2"):
            MixedWidths(layer_bits=(("conv", 1),))

    def test_bits_of_a_layer_that_is_not_there(self):
        network = float_network(sketch().classifier())
        widths = MixedWidths(layer_bits=(("nowhere", 4),))
        message = "names 'nowhere', which is no node .* are first, second, third, dense"
        with self.assertRaisesRegex(ConfigError, message):
            post_training(network, noise(SHAPE, 8), widths, CALIBRATION)

    @parameterized.parameters(
        (BitWidths(4), "android", "num_bits_weight is 4: .* leave all weights at 8"),
        (BitWidths(num_bits_first=6), "android", "num_bits_first is 6: the bits of"),
        (BitWidths(num_bits_depthwise=3), "android", "num_bits_depthwise is 3"),
        (MixedWidths(layer_bits=(("conv", 4),)), "android", "and conv is 4: the bits"),
        (
            BitWidths(),
            "ethos_u",
            "the target is ethos_u: Vela, .* Leave target_kib out",
        ),
        (BitWidths(), "edge_tpu", "the target is edge_tpu"),
        (BitWidths(8, 16), "micro", "the target is micro"),
    )
    def test_bits_that_cannot_be_chosen(self, widths, target, message):
        file = FileConfig(target_kib=100, target=target)
        with self.assertRaisesRegex(ConfigError, message):
            check_target_takes(file, widths)

    def test_others_are_taken(self):
        for target in ("android", "micro"):
            check_target_takes(FileConfig(target_kib=100, target=target), BitWidths())


if __name__ == "__main__":
    tf.test.main()
