import dataclasses

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ExportError, ModelError
from dfq_tf.graph import running
from dfq_tf.graph.layers import KINDS, has_kernel
from dfq_tf.quantization import grids, with_ranges
from dfq_tf.quantization.network import (
    QuantizedNetwork,
    fake_quantized_kernel,
    fake_quantized_output,
)
from dfq_tf.quantization.post_training import (
    float_network,
    post_training,
)
from dfq_tf.settings import BitWidths, CalibrationConfig
from tests import graphs, networks
from tests.graphs import PIXELS, Sketch

POOL = dict(size=(2, 2), strides=(2, 2))
ALL_WIDTHS = (
    BitWidths(),
    BitWidths(per_channel=False),
    BitWidths(4, 4, True, 4, 4, 4),
    BitWidths(2, 6, False, 2, 2, 2),
    BitWidths(8, 16),
)


def chained():
    """Layers that keep the scale between two with kernels; one without a bias."""
    sketch = Sketch()
    sketch.conv("first", outputs=6, padding="valid")
    sketch("max_pool", "pool", **POOL)
    sketch("pad", "pad", margins=((1, 1), (1, 1)))
    sketch.depthwise("depth", multiplier=2)
    sketch("relu", "relu")
    sketch.conv("bare", size=1, bias=False)
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.classifier()


# Node with a kernel -> the one whose grid its input has.
SOURCES = {"first": "pixels", "depth": "first", "bare": "relu", "logits": "bare"}


def calibrated(network, images):
    """The lowest and highest value of each measured output, made fit."""
    inputs = network.description.normalize(images.astype(np.float32))
    names = grids.measured(network.graph)
    outputs = running.compute(network.graph, tf.constant(inputs), names)
    ranges = {n: (float(np.min(o)), float(np.max(o))) for n, o in zip(names, outputs)}
    return {**ranges, "pixels": PIXELS}


def unrounded(network, widths=BitWidths()):
    """A quantized network whose biases are still those of the float network."""
    images = networks.images(network.image_shape, 32, seed=1)
    return with_ranges(network, calibrated(network, images), widths)


def steps_of(network, name):
    """What one integer of a node's input and of its kernel is worth, float64."""
    widths = {"input": network.bits[SOURCES[name]], "kernel": network.kernel_bits[name]}
    low, high = network.ranges[SOURCES[name]]
    if widths["input"] == 16:
        input_step = high / 32767
    else:
        input_step = (high - low) / (2 ** widths["input"] - 1)
        # Pixels among layers of 16 bits are int16 too, in finer steps.
        input_step /= 128 if 16 in network.bits.values() else 1
    largest = 2 ** (widths["kernel"] - 1) - 1
    return input_step, network.kernel_ranges[name].astype(np.float64) / largest


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    def joined(self, **changes):
        """Two curves, a ReLU with a top, a concatenation; with other ranges."""
        sketch = Sketch()
        a, b = (sketch.conv(name, "pixels") for name in "ab")
        sketch("concatenate", "ab", a, sketch("max_pool", "pool", b, **SAME))
        curves = [
            sketch("sigmoid", "sigmoid", sketch.conv("s", "ab")),
            sketch("tanh", "tanh", sketch.conv("t", "ab")),
            sketch("relu", "top", sketch.conv("r", "ab"), top=2.5),
        ]
        sketch("multiply", "product", *curves[:2])
        sketch("multiply", "all", "product", curves[2])
        sketch.flatten("flat")
        sketch.dense("logits")
        classifier = sketch.classifier()
        ranges = dict.fromkeys(grids.measured(classifier.graph), (-1.0, 2.0))
        network = with_ranges(
            classifier, ranges, BitWidths(8, changes.pop("width", 8)), "min_max"
        )
        bits = {**network.bits, **changes.pop("bits", {})}
        return dataclasses.replace(
            network, bits=bits, ranges={**network.ranges, **changes}
        )

    @parameterized.parameters(8, 16)
    def test_what_with_ranges_gives_is_taken(self, width):
        network = self.joined(width=width)
        self.assertEqual(network.ranges["b"], network.ranges["ab"])

    @parameterized.parameters("b", "ab")
    def test_ranges_that_differ_on_one_grid(self, name):
        with self.assertRaisesRegex(
            ExportError,
            rf"^{name} has the range \(-1.0, 2.5\) in 8 bits and shares a grid with a, "
            r"which has \(-1.0, 2.0\) in 8 bits$",
        ):
            self.joined(**{name: (-1.0, 2.5)})

    def test_bits_that_differ_on_one_grid(self):
        with self.assertRaisesRegex(
            ExportError, "^b has the range .* in 6 bits and shares a grid with a"
        ):
            self.joined(bits={"b": 6})

    @parameterized.parameters(
        ("sigmoid", 8, (0.0, 1.0)),
        ("sigmoid", 8, (-0.1, 255 / 256)),
        ("sigmoid", 8, (-32767 / 32768, 32767 / 32768)),
        ("sigmoid", 16, (-1.0, 1.0)),
        ("tanh", 8, (-1.0, 1.0)),
        ("tanh", 16, (-1.0, 127 / 128)),
        ("pixels", 8, (-1.9, 135 / 64)),
        ("pixels", 16, (-1.875, 2.2)),
    )
    def test_ranges_that_an_operator_has_otherwise(self, name, width, wrong):
        with self.assertRaisesRegex(
            ExportError,
            rf"^{name} \({name}\) has the range \({wrong[0]}, {wrong[1]}\), but its "
            r"operator demands Exactly\(low=",
        ):
            self.joined(width=width, **{name: wrong})

    @parameterized.parameters(8, 16)
    def test_ranges_that_go_past_a_top(self, width):
        low = -2.6 if width == 16 else 0.0
        with self.assertRaisesRegex(
            ExportError,
            rf"^top \(relu\) has the range \({low}, 2.6\), but its operator demands "
            r"NoFurther\(high=2.5\)$",
        ):
            self.joined(width=width, top=(low, 2.6))
        self.joined(width=width, top=(low, 2.4))

    def test_a_bound_of_all_that_share_a_grid_is_that_of_each(self):
        sketch = Sketch()
        sketch("relu", "top", sketch.conv("conv"), top=2.5)
        sketch("max_pool", "pool", **POOL)
        sketch("relu", "again")  # has the pooling's grid
        sketch.flatten("flat")
        sketch.dense("logits")
        classifier = sketch.classifier()
        ranges = dict.fromkeys(grids.measured(classifier.graph), (0.0, 4.0))
        network = with_ranges(classifier, ranges, BitWidths())
        self.assertEqual(network.ranges["top"], (0.0, 2.5))
        self.assertEqual(network.ranges["again"], (0.0, 2.5))
        with self.assertRaisesRegex(ExportError, "operator demands NoFurther"):
            both = {"top": (0.0, 4.0), "again": (0.0, 4.0)}
            dataclasses.replace(network, ranges={**network.ranges, **both})

    @parameterized.parameters(8, 16)
    def test_what_float32_makes_of_a_bound_is_taken(self, width):
        network = self.joined(width=width, top=(0.0, float(np.float32(2.5))))
        rounded = {
            name: tuple(float(np.float32(end)) for end in ends)
            for name, ends in network.ranges.items()
        }
        dataclasses.replace(network, ranges=rounded)
        sketch = Sketch()
        sketch("relu", "top", sketch.conv("conv"), top=2.7)  # float32 has a bit more
        sketch.flatten("flat")
        classifier = sketch.classifier()
        ranges = dict.fromkeys(grids.measured(classifier.graph), (0.0, 5.0))
        network = with_ranges(classifier, ranges, BitWidths(8, width))
        rounded = {**network.ranges, "top": (0.0, float(np.float32(2.7)))}
        self.assertGreater(rounded["top"][1], 2.7)
        dataclasses.replace(network, ranges=rounded)


SAME = dict(size=(2, 2), strides=(1, 1), padding="same")


class GridTest(tf.test.TestCase, parameterized.TestCase):
    def test_network_is_shown_without_what_each_layer_has(self):
        shown = repr(unrounded(chained()))
        self.assertStartsWith(shown, "QuantizedNetwork(classifier=Classifier(graph=<")
        self.assertNotIn("first", shown)

    def test_each_stored_output_has_the_grid_of_its_owner(self):
        network = unrounded(chained(), BitWidths(4, 5))
        for name, owner in grids.owners(network.graph).items():
            bits = 5 if owner in ("first", "relu", "bare") else 8
            self.assertEqual(network.bits[owner], bits)
            grid = network.grid(name)
            low, high = network.ranges[owner]
            step = (high - low) / (2**bits - 1)
            self.assertAllClose(grid.scale, [step], rtol=1e-6)
            self.assertEqual(grid.zero_point, 128 - 2**bits + round(-low / step))
            self.assertEqual((grid.lowest, grid.highest), (128 - 2**bits, 127))
        self.assertTrue(network.grid("pad").same_as(network.grid("first")))
        self.assertEqual(network.grid("relu").zero_point, 127 - 31)

    def test_what_is_never_stored_has_none(self):
        network = unrounded(chained())
        for name in ("depth", "image"):
            with self.assertRaises(KeyError):
                network.grid(name)

    def test_pixels_among_sixteen_bits_have_a_finer_grid(self):
        network = unrounded(chained(), BitWidths(8, 16))
        self.assertTrue(network.is_wide)
        pixels = network.grid("pixels")
        # A pixel's step is 1 / 64; 128 of the finer steps make one.
        self.assertAllClose(pixels.scale, [1 / 64 / 128])
        self.assertEqual(
            (pixels.zero_point, pixels.lowest, pixels.highest), (0, -32767, 32767)
        )
        for name in ("first", "pad", "relu", "logits"):
            high = network.ranges[grids.owners(network.graph)[name]][1]
            grid = network.grid(name)
            self.assertAllClose(grid.scale, [high / 32767], rtol=1e-6)
            self.assertEqual((grid.zero_point, grid.highest), (0, 32767))

    def test_without_sixteen_bits_it_is_not_wide(self):
        self.assertFalse(unrounded(chained(), BitWidths(8, 6)).is_wide)


class KernelIntegersTest(tf.test.TestCase, parameterized.TestCase):
    def network(self, kind, num_bits, per_channel, method="min_max"):
        sketch = Sketch()
        if kind == "depthwise":
            sketch.depthwise("kernel", multiplier=2)
        elif kind == "grouped":
            sketch.conv("kernel", sketch.conv("before"), outputs=6, groups=2)
        elif kind == "dense of pixels":
            sketch.dense("kernel", outputs=6)
        elif kind == "dense":
            sketch.dense("kernel", sketch.flatten("flat"))
        elif kind == "one output":
            sketch.conv("kernel", outputs=1)
        else:
            sketch.conv("kernel", outputs=6)
        sketch("relu", "relu")
        if len(sketch.nodes["relu"].shape) > 1:
            sketch.flatten("end")
        classifier = sketch.classifier()
        ranges = dict.fromkeys(grids.measured(classifier.graph), (-1.0, 2.0))
        widths = BitWidths(num_bits, 8, per_channel, num_bits, num_bits, num_bits)
        return with_ranges(classifier, ranges, widths, method)

    @parameterized.product(
        num_bits=(2, 3, 4, 8),
        kind=("conv", "depthwise", "grouped", "dense", "dense of pixels", "one output"),
        per_channel=(True, False),
    )
    def test_are_the_fake_quantized_kernel(self, num_bits, kind, per_channel):
        network = self.network(kind, num_bits, per_channel)
        node = network.graph.nodes["kernel"]
        kernel = node.weights["kernel"].astype(np.float64)
        axes = kernel.ndim - (2 if kind == "depthwise" else 1)
        high = np.abs(kernel).max(axis=tuple(range(axes)) if per_channel else None)
        largest = 2 ** (num_bits - 1) - 1
        integers, grid = network.kernel_integers("kernel")
        self.assertEqual((integers.dtype, integers.shape), (np.int8, kernel.shape))
        self.assertEqual(np.abs(integers.astype(int)).max(), largest)
        self.assertEqual((grid.lowest, grid.highest), (-largest, largest))
        self.assertEqual((grid.zero_point, grid.scale.dtype), (0, np.float32))
        self.assertEqual(grid.scale.shape, (high.size,))
        self.assertAllClose(grid.scale, np.ravel(high) / largest, rtol=1e-6)
        # A NumPy twin, but for ties, which float32 may round the other way.
        exact = kernel * largest / high
        self.assertAllInRange(integers - exact, -0.501, 0.501)
        # scale * integers is what fake quantization gives, and what is computed with.
        values = integers * grid.scale.reshape(np.shape(high))
        rounded = fake_quantized_kernel(
            node.weights["kernel"], network.kernel_ranges["kernel"], num_bits
        )
        self.assertAllClose(rounded, values, rtol=1e-5, atol=0)
        (source,) = node.inputs
        images = graphs.noise((8, 8, 3), 3)
        inputs, outputs = network.outputs(images, [source, "kernel"])
        weights = {**node.weights, "kernel": values}
        expected = KINDS[node.kind].compute(node, [tf.constant(inputs)], weights)
        self.assertAllClose(outputs, expected, rtol=1e-4, atol=1e-5)

    @parameterized.product(num_bits=(2, 3, 4, 8), per_channel=(True, False))
    def test_what_a_range_cuts_off_is_within_the_bits(self, num_bits, per_channel):
        network = self.network("conv", num_bits, per_channel)
        narrow = {n: m / np.float32(3) for n, m in network.kernel_ranges.items()}
        network = dataclasses.replace(network, kernel_ranges=narrow)
        integers, grid = network.kernel_integers("kernel")
        self.assertAllInRange(integers, grid.lowest, grid.highest)
        self.assertGreater(np.mean(np.abs(integers.astype(int)) == grid.highest), 0.02)

    @parameterized.parameters(True, False)
    def test_bias_steps_are_those_of_the_products(self, per_channel):
        for width in (8, 5, 16):
            widths = BitWidths(4, width, per_channel, 5, 6, 3)
            network = unrounded(chained(), widths)
            self.assertEqual(
                network.kernel_bits, {"first": 5, "depth": 3, "bare": 4, "logits": 6}
            )
            for name in SOURCES:
                input_step, kernel_step = steps_of(network, name)
                scale = network.bias_scale(name)
                self.assertEqual(scale.dtype, np.float64)
                outputs = {"first": 6, "depth": 12, "bare": 4, "logits": 5}[name]
                self.assertEqual(scale.shape, (outputs if per_channel else 1,))
                expected = np.atleast_1d(input_step * kernel_step)
                self.assertAllClose(scale, expected, rtol=1e-6, atol=0)


class RoundedBiasesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*ALL_WIDTHS)
    def test_biases_become_multiples_of_their_step(self, widths):
        before = unrounded(chained(), widths)
        after = before.with_rounded_biases()
        for name in ("first", "depth", "logits"):
            step = np.multiply(*steps_of(before, name))
            self.assertEqual(step.ndim, int(widths.per_channel))
            old, bias = (n.graph.nodes[name].weights["bias"] for n in (before, after))
            # The scale of a file is a float32, and so the twin's is not quite it.
            exact = before.bias_scale(name)
            self.assertAllClose(exact, np.atleast_1d(step), 1e-6, 0)
            multiples = (np.round(bias / exact) * exact).astype(np.float32)
            self.assertAllEqual(bias, multiples)
            # It was not so before. None has moved by more than half a step, and by
            # what float32 makes of millions of steps.
            self.assertNotAllEqual(old, bias)
            self.assertAllInRange((bias - old) / step, -0.7, 0.7)

    @parameterized.product(
        name=("mobilenet_like", "bn_first"),
        widths=(BitWidths(), BitWidths(4, 4, num_bits_sum=4), BitWidths(8, 16)),
    )
    def test_no_layer_moves_by_more_than_a_step(self, name, widths):
        before = unrounded(float_network(networks.build(name)), widths)
        after = before.with_rounded_biases()
        images = networks.images(before.classifier.image_shape, 16, seed=2)
        outputs = dict(
            zip(before.graph.nodes, before.outputs(images, list(before.graph.nodes)))
        )
        owners = grids.owners(before.graph)
        moved = 0
        for name, node in before.graph.nodes.items():
            if "bias" not in node.weights:
                continue
            source = tf.constant(outputs[node.inputs[0]])
            old, new = (
                KINDS[node.kind].compute(node, [source], each.graph.nodes[name].weights)
                for each in (before, after)
            )
            distance = np.abs(np.asarray(new) - np.asarray(old)).max()
            # What it is rounded to is its own grid, or that of its ReLU.
            stored = name
            if stored not in owners:
                stored = before.graph.consumers(name)[0].name
            low, high = before.ranges[owners[stored]]
            bits = before.bits[owners[stored]]
            self.assertLess(distance, (high - low) / (2**bits - 1))
            moved += distance > 0
        self.assertGreater(moved, 2)

    @parameterized.parameters(
        BitWidths(), BitWidths(3, 5, True, 3, 3, 3), BitWidths(8, 16)
    )
    def test_twice_is_once(self, widths):
        before = unrounded(float_network(networks.build("mobilenet_like")), widths)
        once = before.with_rounded_biases()
        self.assertFalse(same_weights(before, once))
        self.assertTrue(same_weights(once, once.with_rounded_biases()))

    def test_changes_biases_and_nothing_else(self):
        before = unrounded(chained(), BitWidths(4, 4))
        after = before.with_rounded_biases()
        self.assertEqual(list(after.graph.nodes), list(before.graph.nodes))
        for name, node in before.graph.nodes.items():
            for role, weight in node.weights.items():
                is_same = np.array_equal(after.graph.nodes[name].weights[role], weight)
                self.assertEqual(is_same, role != "bias", (name, role))
        fields = ("bits", "ranges", "kernel_bits", "kernel_ranges", "description")
        for field in fields:
            self.assertIs(getattr(after, field), getattr(before, field), field)
        self.assertTrue(same_weights(before, unrounded(chained(), BitWidths(4, 4))))

    def test_large_steps_of_a_tiny_kernel_are_rounded_once_too(self):
        # A bias of 10^9 steps and more: float32 does not hold each of them.
        classifier = with_weights(
            chained(), "first", lambda kernel, bias: (kernel * TINY, bias + LARGE)
        )
        before = unrounded(classifier, BitWidths(8, 16))
        steps = before.graph.nodes["first"].weights["bias"] / before.bias_scale("first")
        self.assertGreater(np.abs(steps).max(), 1e9)
        once = before.with_rounded_biases()
        bias = once.graph.nodes["first"].weights["bias"]
        self.assertAllClose(bias, before.graph.nodes["first"].weights["bias"], 1e-6)
        self.assertTrue(same_weights(once, once.with_rounded_biases()))


# Three of six channels are dead, or nearly so.
TINY = np.array([1e-9, 1e-9, 1e-9, 1, 1, 1])
LARGE = np.array([10, 10, 10, 0, 0, 0])


def with_weights(classifier, name, change):
    """A classifier with another kernel and bias in one node."""
    weights = classifier.graph.nodes[name].weights
    kernel, bias = change(weights["kernel"], weights["bias"])
    graph = classifier.graph.with_weights({name: {"kernel": kernel, "bias": bias}})
    return dataclasses.replace(classifier, graph=graph)


def same_weights(first, second):
    return all(
        np.array_equal(weight, second.graph.nodes[name].weights[role])
        for name, node in first.graph.nodes.items()
        for role, weight in node.weights.items()
    )


def pruned(size=30.0, bias=1.0, scale=0.01):
    """Small activations, and behind them a kernel with four dead channels of eight.

    The dead channels' outputs are a constant, which the last bias takes back.
    """
    sketch = Sketch(pixels=False)
    sketch("relu", "relu", sketch.conv("first", outputs=8))
    sketch("affine", "scaled", scale=scale, offset=0.0)
    sketch.conv("dead", outputs=8, size=1)
    sketch("relu", "relu2")
    sketch("global_average_pool", "mean")
    sketch.dense("logits", outputs=10)
    classifier = sketch.classifier()

    def killed(kernel, old):
        kernel, old = size * kernel, np.array(old)
        kernel[..., :4], old[:4] = 0, bias
        return kernel, old

    classifier = with_weights(classifier, "dead", killed)
    return with_weights(
        classifier, "logits", lambda k, b: (k, -np.maximum(bias, 0) * k[:4].sum(axis=0))
    )


class RoomForBiasesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        (BitWidths(), False, 1.0),
        (BitWidths(), True, 1.0),
        (BitWidths(), True, -20.0),
        (BitWidths(), True, 1e4),
        (BitWidths(4, 8, True, 4, 4, 4), False, 1.0),
        (BitWidths(4, 8, True, 4, 4, 4), True, 1.0),
        (BitWidths(8, 8, False), True, 1.0),
        (BitWidths(8, 16), False, 1.0),
        (BitWidths(8, 16), True, 1e4),
        (BitWidths(4, 16, True, 4, 4, 4), True, -20.0),
    )
    def test_no_bias_is_cut_off(self, widths, corrected, bias):
        teacher = pruned(bias=bias)
        network = float_network(teacher)
        images = networks.images((8, 8, 3), 40, seed=1)
        config = CalibrationConfig(bias_correction=corrected)
        found = post_training(network, images, widths, config)
        most = 2**31 - 1 if widths.num_bits_activation == 8 else 2**47 - 1
        for name in found.kernel_bits:
            steps = found.graph.nodes[name].weights["bias"] / found.bias_scale(name)
            # With room for the products that are added to it.
            self.assertAllInRange(steps, -most / 2, most / 2)
        scores, expected = found.scores(images), network.scores(images)
        self.assertAllClose(expected, teacher.scores(images), 0, 1e-5 * abs(bias))
        # A grid's step is a share of what the dead channels give.
        error = np.abs(scores - expected).max()
        self.assertLess(error, 0.1 * np.ptp(expected) + 0.1 * abs(bias))

    def test_without_room_it_would_be(self):
        network = float_network(pruned())
        found = post_training(network, networks.images((8, 8, 3), 40), BitWidths())
        dead = found.kernel_ranges["dead"][:4]
        share = 1e-4 * np.abs(found.graph.nodes["dead"].weights["bias"][:4])
        # The bias's share alone, as it was, would not do behind small activations.
        self.assertAllGreater(dead / share, 2)
        (source,) = found.graph.nodes["dead"].inputs
        steps = 1 / (share / 127 * found.grid(source).scale)
        self.assertAllGreater(steps, 2**31)

    def test_beside_sixteen_bits_a_bias_has_forty(self):
        """Vela leaves a layer to the CPU whose bias has more, the sign among them."""
        network = unrounded(float_network(pruned(scale=1e-3)), BitWidths(8, 16))
        for name in network.kernel_bits:
            bias = network.graph.nodes[name].weights["bias"]
            steps = np.abs(bias / network.bias_scale(name))
            self.assertLess(steps.max(), 2**39)

    @parameterized.parameters(*ALL_WIDTHS)
    def test_where_there_is_room_ranges_stay(self, widths):
        network = unrounded(chained(), widths)
        again = network.with_room_for_biases()
        for name, magnitudes in network.kernel_ranges.items():
            self.assertEqual(magnitudes.dtype, np.float32)
            self.assertAllEqual(again.kernel_ranges[name], magnitudes)
            kernel = network.graph.nodes[name].weights["kernel"]
            self.assertLessEqual(magnitudes.max(), np.abs(kernel).max() * (1 + 1e-6))

    def test_one_range_for_all_has_room_for_the_largest_bias(self):
        classifier = with_weights(
            chained(), "first", lambda k, b: (0 * k, np.geomspace(1e-6, 50, b.size))
        )
        network = unrounded(classifier, BitWidths(per_channel=False))
        self.assertAllClose(network.kernel_ranges["first"], 50e-4, rtol=1e-5)

    def test_ranges_are_not_made_narrower(self):
        network = unrounded(float_network(pruned()))
        wide = {n: 2 * m for n, m in network.kernel_ranges.items()}
        network = dataclasses.replace(network, kernel_ranges=wide)
        for name, magnitudes in network.with_room_for_biases().kernel_ranges.items():
            self.assertAllEqual(magnitudes, wide[name])

    @parameterized.product(
        size=(0.0, 1e-40, 1e-37, 1e-30),
        widths=(BitWidths(), BitWidths(8, 8, False), BitWidths(8, 16)),
    )
    def test_kernels_of_next_to_nothing_give_their_bias(self, size, widths):
        images = networks.images((8, 8, 3), 6)
        for bias in (0.0, 1e-38, 1e-30, 0.3):

            def vanishing(kernel, old, bias=bias):
                return size * kernel / np.abs(kernel).max(), np.full_like(old, bias)

            classifier = with_weights(chained(), "first", vanishing)
            network = unrounded(classifier, widths).with_rounded_biases()
            first, logits = network.outputs(images, ["first", "logits"])
            step = network.grid("first").scale[0]
            self.assertAllClose(first, np.full_like(first, bias), rtol=0, atol=step)
            self.assertTrue(np.isfinite(logits).all())
            integers, grid = network.kernel_integers("first")
            self.assertAllInRange(integers, -127, 127)
            self.assertAllGreater(grid.scale, 1e-30)


def symmetric(kernel, num_bits, per_channel):
    """Quantizes and dequantizes a kernel by its largest magnitude, float64."""
    axes = tuple(range(kernel.ndim - 1)) if per_channel else None
    scale = np.abs(kernel).max(axis=axes) / (2 ** (num_bits - 1) - 1)
    return np.round(kernel / scale) * scale


def affine(values, low, high, num_bits):
    """Quantizes and dequantizes values, 0 being one of them, float64."""
    scale = (high - low) / (2**num_bits - 1)
    zero_point = np.round(-low / scale)
    integers = np.floor(values / scale + zero_point + 0.5)
    return (np.clip(integers, 0, 2**num_bits - 1) - zero_point) * scale


def conv_dense():
    """Convolution with ReLU, flatten, dense: small enough for a NumPy twin."""
    sketch = Sketch()
    sketch("relu", "relu", sketch.conv("conv", outputs=6))
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.classifier()


RANGES = {"pixels": PIXELS, "relu": (0.0, 2.0), "logits": (-3.0, 4.0)}


class ScoresTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        BitWidths(),
        BitWidths(4, 6, False, 4, 4, 4),
        BitWidths(8, 6, False, num_bits_first=4, num_bits_last=3),
        BitWidths(8, 4, True, 8, 8, 8),
    )
    def test_equal_float_layers_fed_with_quantized_numbers(self, widths):
        classifier = conv_dense()
        images = networks.images(classifier.image_shape, 16)
        network = with_ranges(classifier, RANGES, widths, "min_max")
        bits, per_channel = widths.num_bits_activation, widths.per_channel
        kernel, dense = (
            symmetric(
                classifier.graph.nodes[name].weights["kernel"].astype(np.float64),
                num_bits,
                per_channel,
            )
            for name, num_bits in (
                ("conv", widths.num_bits_first),
                ("logits", widths.num_bits_last),
            )
        )
        bias, dense_bias = (
            classifier.graph.nodes[name].weights["bias"] for name in ("conv", "logits")
        )
        x = affine((images.astype(np.float64) - 120) / 64, *PIXELS, 8)
        x = tf.nn.conv2d(x, kernel, 1, "SAME").numpy() + bias
        x = affine(np.maximum(x, 0), *RANGES["relu"], bits)
        x = x.reshape(len(x), -1) @ dense + dense_bias
        expected = affine(x, *RANGES["logits"], 8)
        step = 7.0 / 255
        steps = np.round(np.abs(network.scores(images) - expected) / step)
        # A ReLU that float32 puts on the other side moves the logits by a share of
        # its own step, which is wider than theirs.
        self.assertLessEqual(steps.max(), 1 if bits == 8 else 8)
        self.assertLess(np.mean(steps > 0), 0.05)

    def test_lie_on_the_grid_of_their_range(self):
        ranges = {**RANGES, "logits": (-255.0, 0.0)}
        network = with_ranges(conv_dense(), ranges, BitWidths())
        scores = network.scores(networks.images((8, 8, 3), 16))
        self.assertAllClose(scores, np.round(scores), atol=1e-4)
        self.assertLessEqual(scores.max(), 0.0)
        self.assertGreater(len(np.unique(scores)), 1)

    def test_of_sixteen_bits_lie_on_their_grid(self):
        ranges = {**RANGES, "logits": (-7.0, 4.0)}
        network = with_ranges(conv_dense(), ranges, BitWidths(8, 16))
        self.assertEqual(
            network.ranges,
            {"pixels": PIXELS, "relu": (-2.0, 2.0), "logits": (-7.0, 7.0)},
        )
        scores = network.scores(networks.images((8, 8, 3), 16))
        integers = scores * (32767 / 7.0)
        self.assertAllClose(integers, np.round(integers), rtol=0, atol=0.02)
        # No grid of 8 bits has them all.
        self.assertNotAllClose(
            scores * (127 / 7), np.round(scores * (127 / 7)), atol=0.1
        )

    def test_of_fine_widths_come_close_to_the_float_network(self):
        network = float_network(networks.build("resnet_like"))
        images = networks.images(network.image_shape, 32)
        scores = network.scores(images)
        errors = []
        for weight, activation in ((2, 4), (4, 6), (8, 8), (8, 16)):
            widths = BitWidths(weight, activation, True, weight, weight, weight)
            found = unrounded(network, widths).scores(images)
            errors.append(np.mean(np.abs(found - scores)))
        for coarse, fine in zip(errors, errors[1:]):
            self.assertGreater(coarse, fine)
        self.assertLess(errors[2], 0.02 * np.ptp(scores))

    def test_do_not_depend_on_how_many_images_there_are(self):
        network = unrounded(chained())
        images = graphs.noise((8, 8, 3), 300)
        scores = network.scores(images)
        self.assertEqual((scores.shape, scores.dtype), ((300, 5), np.float32))
        self.assertAllEqual(network.scores(images[131:140]), scores[131:140])
        self.assertAllEqual(network.scores(images.astype(np.float32)), scores)

    def test_an_image_without_a_batch_is_refused(self):
        network = unrounded(chained())
        with self.assertRaisesRegex(ModelError, r"array of shape \(8, 8, 3\); give at"):
            network.scores(graphs.noise((8, 8, 3), 1)[0])

    def test_of_other_weights_are_others(self):
        network = unrounded(conv_dense())
        images = graphs.noise((8, 8, 3), 4)
        scores = network.scores(images)
        bias = network.graph.nodes["logits"].weights["bias"]
        changed = network.with_weights({"logits": {"bias": bias + 0.5}})
        self.assertNotAllClose(changed.scores(images), scores, atol=0.1)
        self.assertAllEqual(network.scores(images), scores)


class OutputsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(BitWidths(), BitWidths(4, 5), BitWidths(8, 16))
    def test_lie_on_their_grids(self, widths):
        network = unrounded(float_network(networks.build("densenet_like")), widths)
        images = networks.images((8, 8, 3), 5)
        names = list(grids.owners(network.graph))
        for name, output in zip(names, network.outputs(images, names)):
            self.assertEqual(output.dtype, np.float32)
            self.assertEqual(output.shape, (5, *network.graph.nodes[name].shape))
            grid = network.grid(name)
            integers = output / grid.scale
            atol = 0.02 if widths.num_bits_activation == 16 else 1e-3
            self.assertAllClose(integers, np.round(integers), rtol=0, atol=atol)
            integers = np.round(integers) + grid.zero_point
            self.assertAllInRange(integers, grid.lowest, grid.highest)

    def test_of_the_last_are_the_scores(self):
        network = unrounded(chained())
        images = graphs.noise((8, 8, 3), 7)
        pixels, logits = network.outputs(images, ["pixels", "logits"])
        self.assertAllEqual(logits, network.scores(images))
        self.assertAllClose(pixels, (images.astype(np.float64) - 120) / 64, atol=1e-6)

    def test_of_what_is_never_stored_are_not_rounded(self):
        network = unrounded(chained(), BitWidths(8, 4))
        depth, relu = network.outputs(graphs.noise((8, 8, 3), 7), ["depth", "relu"])
        self.assertLess(depth.min(), 0)
        self.assertGreater(len(np.unique(depth)), 16 * 7)
        self.assertBetween(len(np.unique(relu)), 5, 16)

    def test_of_a_top_end_there(self):
        sketch = Sketch()
        sketch("relu", "top", sketch.conv("conv"), top=1.0)
        sketch("max_pool", "pool", **POOL)
        other = sketch("max_pool", "pool2", sketch.conv("b", "pixels"), **POOL)
        sketch("concatenate", "both", "pool", other)
        sketch.flatten("flat")
        sketch.dense("logits")
        network = float_network(_without_pixels(sketch.classifier()))
        network = unrounded(network)
        images = networks.images((8, 8, 3), 20)
        top, both = network.outputs(images, ["top", "both"])
        self.assertEqual(top.max(), 1.0)
        self.assertEqual(network.ranges["top"], (0.0, 1.0))
        self.assertGreater(network.ranges["both"][1], 1.0)
        self.assertAllInRange(both[..., :4], 0, 1 + network.grid("both").scale[0])


def _without_pixels(classifier):
    """As it is before `float_network`."""
    graph = classifier.graph.replaced({"pixels": []}, {"pixels": "image"})
    return dataclasses.replace(classifier, graph=graph)


class FieldsTest(tf.test.TestCase):
    def test_graph_and_description_are_the_classifier_s(self):
        network = unrounded(chained())
        self.assertIsInstance(network, QuantizedNetwork)
        self.assertIs(network.graph, network.classifier.graph)
        self.assertIs(network.description, network.classifier.description)
        kernels = [n.name for n in network.graph.nodes.values() if has_kernel(n)]
        self.assertEqual(list(network.kernel_ranges), kernels)
        self.assertEqual(list(network.bits), grids.measured(network.graph))


class AverageTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((8, -3.0, 5.0), (4, 0.0, 1.5), (5, -2.0, 0.0))
    def test_halves_are_rounded_away_from_the_integer_0(self, bits, low, high):
        grid = grids.activation_grid(low, high, bits)
        first = np.arange(grid.lowest, grid.highest)
        averages = first + 0.5
        values = ((averages - grid.zero_point) * grid.scale[0]).astype(np.float32)
        found = fake_quantized_output(values, low, high, bits, is_average=True)
        integers = np.rint(found / grid.scale[0]) + grid.zero_point
        self.assertAllEqual(integers, np.where(averages > 0, first + 1, first))

    def test_halves_at_16_bits(self):
        values = np.array([-2.5, -0.5, 0.5, 2.5], np.float32)
        found = fake_quantized_output(values, -32767.0, 32767.0, 16, is_average=True)
        self.assertAllEqual(found, [-3.0, -1.0, 1.0, 3.0])

    def test_others_are_rounded_to_the_nearest(self):
        values = np.linspace(-3, 5, 999, dtype=np.float32)
        plain, average = (
            fake_quantized_output(values, -3.0, 5.0, 8, is_average)
            for is_average in (False, True)
        )
        steps = values / (8 / 255)
        is_half = np.abs(np.abs(steps - np.rint(steps)) - 0.5) < 0.01
        self.assertAllEqual(plain[~is_half], average[~is_half])


if __name__ == "__main__":
    tf.test.main()
