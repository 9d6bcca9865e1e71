"""What the writer puts into a file, held against the network and against NumPy.

A quantized network computes in float32 with rounded numbers, the file in integers. Both
give the same integers, but for what LiteRT's kernels do when they rescale sums:

- XNNPACK, which runs int8 activations with int8 kernels, rounds once. Its leaky ReLU
  and its requantization multiply by factors of 8 bits.
- LiteRT's own kernels, which run int4 kernels and what XNNPACK leaves, round twice:
  to halves of a step or finer, then to steps.
- For int16 they multiply by factors of 16 bits.

So each layer is fed with the file's own integers, and its unrounded output compared
with what the file stores: the distance has a limit that needs no statistics.
"""

import dataclasses
import functools
import os
import warnings
from unittest import mock

import flatbuffers
import numpy as np
import pytest
from absl.testing import parameterized
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.compat import keras, native_output_hidden, tf
from dfq_tf.errors import ExportError
from dfq_tf.graph import layers as graph_layers
from dfq_tf.graph import running as graph_running
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.graph.layers import KINDS, Kind, has_kernel
from dfq_tf.importing.reading import read_layers
from dfq_tf.quantization import float_network, grids, with_ranges
from dfq_tf.quantization.calibration import calibrate
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig
from dfq_tf.tflite import flatbuffer, proof, running, writer
from tests import networks

layers = keras.layers

# Steps between the exact output of a layer and the integer in the file.
ROUNDED_ONCE = 0.51  # measured: 0.5000
ROUNDED_TWICE = 0.76  # a half and a quarter; measured: 0.7499
COARSE_FACTOR = 1.01  # 1/512 of up to 255, and a half; measured: 0.70
INT16_FACTOR = 1.51  # 2^-15 of up to 2^15, and a half; measured: 1.21
INT16_CURVE = 3.0  # sigmoid and tanh are interpolated in a table; measured: 2.43
CURVES = ("sigmoid", "tanh")

ALL_FOUR_BITS = BitWidths(4, 4, True, 4, 4, 4)
# Name -> widths, and how many steps of the output a whole file may be from its
# network. Where activations have few bits, one that falls on the other side moves
# everything behind it; there, layers are compared one by one, and no more.
WIDTHS = {
    "W8A8": (BitWidths(), 3),  # measured: 2
    "W8A8 per tensor": (BitWidths(per_channel=False), 3),  # 2
    "W4A8": (BitWidths(4), 6),  # 4
    "W3A8": (BitWidths(3, 8, True, 3, 3, 4), 9),  # 6
    "W2A8": (BitWidths(2), 9),  # 5
    "W8A16": (BitWidths(8, 16), 9),  # 6, of 65535
    "W4A16": (BitWidths(4, 16), 9),  # 6
    "W4A4": (ALL_FOUR_BITS, None),
    "W8A3": (BitWidths(8, 3), None),
    "W3A6": (BitWidths(3, 6, True, 3, 3, 4), None),
    "W2A7": (BitWidths(2, 7), None),
}

INTEGERS = ("UINT8", "INT2", "INT4", "INT8", "INT16", "INT32", "INT64")
TYPES = {v: k for k, v in vars(schema.TensorType).items() if k.isupper()}
OPERATORS = {v: k for k, v in vars(schema.BuiltinOperator).items() if k.isupper()}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file: its integers for some images, and what they mean."""

    integers: np.ndarray
    scale: float
    zero_point: int

    @property
    def steps(self):
        return self.integers.astype(np.int64) - self.zero_point

    @property
    def real(self):
        return (self.steps * np.float64(self.scale)).astype(np.float32)


def prepared(classifier):
    """The float network, and its ranges."""
    network = float_network(classifier)
    images = networks.images(classifier.image_shape, 64, seed=1)
    config = CalibrationConfig(
        activation_range="min_max", pooled_margin=1.0, logits_margin=1.0
    )
    return network, calibrate(network, images, config=config)


def quantized(network, ranges, widths):
    return with_ranges(network, ranges, widths).with_rounded_biases()


def network_of(classifier, widths=BitWidths(), **given):
    """Any network, quantized; some of its ranges may be given."""
    network, ranges = prepared(classifier)
    return quantized(network, {**ranges, **given}, widths)


@functools.cache
def prepared_network(name):
    return prepared(networks.build(name))


@functools.cache
def network_named(name, widths):
    """A quantized network that tests share."""
    return quantized(*prepared_network(name), widths)


def model_of(image, x):
    """A model with random weights, whose dense layer reads `x`."""
    if len(x.shape) == 4:
        x = layers.Flatten()(x)
    x = layers.Dense(networks.NUM_CLASSES, name="logits")(x)
    model = keras.Model(image, x)
    networks.randomize(model, 0)
    return model


def classifier_of(image, x, mean=(120.0,), scale=(1 / 64,)):
    """The model of `model_of` as a classifier."""
    return described(model_of(image, x), mean, scale)


def described(model, mean=(120.0,), scale=(1 / 64,)):
    description = ModelDescription(mean, scale, "logits", tuple("abcde"))
    return Classifier(read_layers(model).graph, description)  # of images of any size


def parsed(content):
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def tensors_of(content):
    """Name -> tensor of the flatbuffer, all names being different."""
    tensors = parsed(content).subgraphs[0].tensors
    named = {tensor.name.decode(): tensor for tensor in tensors}
    assert len(named) == len(tensors)
    return named


def data_of(content, tensor):
    return np.asarray(parsed(content).buffers[tensor.buffer].data, np.uint8)


def operators_of(content):
    """Kind of each operator, and the name of its output."""
    model = parsed(content)
    graph = model.subgraphs[0]
    return [
        (
            OPERATORS[model.operatorCodes[operator.opcodeIndex].builtinCode],
            graph.tensors[operator.outputs[0]].name.decode(),
        )
        for operator in graph.operators
    ]


def read(content, images):
    """Every tensor that an operator of the file writes, by name.

    All of them are made outputs of the file, so that the kernels are those that a
    file runs with, XNNPACK's among them.
    """
    model = parsed(content)
    graph = model.subgraphs[0]
    graph.outputs = [i for operator in graph.operators for i in operator.outputs]
    model.signatureDefs = None
    builder = flatbuffers.Builder(2**16)
    builder.Finish(model.Pack(builder), b"TFL3")
    interpreter = running.open_interpreter(bytes(builder.Output()))
    (image,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    integers = [[] for _ in outputs]
    for pixels in images:
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        for values, output in zip(integers, outputs):
            values.append(interpreter.get_tensor(output["index"])[0])
    return {
        output["name"]: Stored(np.stack(values), *output["quantization"])
        for values, output in zip(integers, outputs)
    }


def integer_kernel(network, name):
    """A kernel's integers, int64, and scale, as the float kernel and its range say."""
    node, bits = network.graph.nodes[name], network.kernel_bits[name]
    largest = 2 ** (bits - 1) - 1
    scale = network.kernel_ranges[name].astype(np.float64) / largest
    kernel = node.weights["kernel"]
    outputs = kernel.shape[-KINDS[node.kind].kernel_outputs :]
    per_output = scale.reshape(outputs) if scale.ndim else scale
    exact = np.clip(kernel / per_output, -largest, largest)
    # Which way a half goes is the network's choice.
    integers, _ = network.kernel_integers(name)
    assert np.abs(exact - integers).max() < 0.5001
    return integers.astype(np.int64), per_output


def limits_of(network, name):
    """Lowest and highest number of a node's grid, if it has one of its own."""
    if name not in network.bits:
        return -np.inf, np.inf
    (low, high), bits = network.ranges[name], network.bits[name]
    if bits == 16:
        return low, high
    scale = (high - low) / (2**bits - 1)
    zero = np.floor(-low / scale + 0.5)
    return -zero * scale, (2**bits - 1 - zero) * scale


def exact_output(network, node, sources):
    """What a node makes of numbers, not rounded, with its integer kernel."""
    weights = dict(node.weights)
    if has_kernel(node):
        integers, scale = integer_kernel(network, node.name)
        weights["kernel"] = (integers * scale).astype(np.float32)
    return KINDS[node.kind].compute(node, list(map(tf.constant, sources)), weights)


def distances(network, content, images):
    """How far each layer's integers are from the exact numbers, in steps.

    Returns:
      Name of the layer -> its kind, the distance, and the limit of that.
    """
    stored = read(content, images)
    types = {name: TYPES[t.type] for name, t in tensors_of(content).items()}
    graph = network.graph
    real = {name: stored[name].real for name in graph.nodes if name in stored}
    pixels = network.description.normalize(images.astype(np.float32))
    real[graph.image.name] = np.asarray(pixels)
    result = {}
    for name in list(graph.nodes)[1:]:
        if name not in real:
            continue
        chain = [name]  # what one operator of the file computes
        while any(source not in real for source in graph.nodes[chain[0]].inputs):
            chain.insert(0, graph.nodes[chain[0]].inputs[0])
        x = [real[source] for source in graph.nodes[chain[0]].inputs]
        for link in chain:
            x = [exact_output(network, graph.nodes[link], x)]
        tensor = stored[name]
        exact = np.clip(np.asarray(x[0], np.float64), *limits_of(network, name))
        steps = exact / tensor.scale + tensor.zero_point - tensor.integers
        kind = "+".join(graph.nodes[n].kind for n in chain)
        if tensor.integers.dtype == np.int16:
            limit = INT16_CURVE if kind in CURVES else INT16_FACTOR
        elif kind == "leaky_relu":
            limit = COARSE_FACTOR
        elif kind in ("relu", *CURVES):
            limit = ROUNDED_TWICE
        elif "INT4" in [types.get(f"{n}/kernel") for n in chain]:
            limit = ROUNDED_TWICE
        else:
            limit = ROUNDED_ONCE
        result[name] = kind, float(np.abs(steps).max()), limit
    return result


# All pairs take minutes, and are run with this variable set.
ALL = "DFQ_TF_ALL_NETWORKS"
PAIRS = [
    (name, widths)
    for name in networks.NETWORKS
    for widths in WIDTHS
    if os.environ.get(ALL)
    or widths == "W8A8"
    or name in ("mobilenet_v3_like", "resnet_like")
]


class NetworksTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*PAIRS)
    def test_file_computes_what_the_network_does(self, name, widths):
        bits, most_steps = WIDTHS[widths]
        network = network_named(name, bits)
        content = writer.write(network)
        types = {TYPES[tensor.type] for tensor in tensors_of(content).values()}
        self.assertContainsSubset(types, INTEGERS)
        images = networks.images(network.classifier.image_shape, 100, seed=2)
        layer_distances = distances(network, content, images[40:60])
        # Pixels, three layers with kernels or more, logits.
        self.assertGreater(len(layer_distances), 5)
        for layer, (kind, distance, limit) in layer_distances.items():
            self.assertLessEqual(distance, limit, f"{layer} ({kind})")
        if most_steps is not None:
            steps = proof.largest_difference(network, content, images)
            self.assertLessEqual(steps, most_steps)

    @parameterized.parameters("mobilenet_like", "bn_first")
    def test_four_bit_depthwise_kernels_and_sixteen_bit_activations(self, name):
        network = network_named(name, BitWidths(4, 16, True, 4, 4, 4))
        content = writer.write(network)
        images = networks.images(network.classifier.image_shape, 50, seed=2)
        steps = proof.largest_difference(network, content, images)
        self.assertLessEqual(steps, WIDTHS["W4A16"][1])

    @parameterized.parameters(
        ("mobilenet_like", BitWidths()), ("padded_pooling", BitWidths(4))
    )
    def test_equals_the_file_of_tensorflows_converter(self, name, widths):
        network = network_named(name, widths)
        # Theirs has int4 convolutions.
        config = FileConfig("logits", output_type="int8", favor="size")
        ours = writer.write(network, config)
        theirs = converted(network)
        images = networks.images(network.classifier.image_shape, 100, seed=2)
        scores = [running.TFLiteClassifier(c).scores(images) for c in (ours, theirs)]
        step = running.TFLiteClassifier(ours).output_scale
        self.assertGreater(np.ptp(scores[0]), 50 * step)
        # Not one integer differs; the scales may in the last bit of a float32.
        self.assertLess(np.abs(scores[0] - scores[1]).max(), 0.01 * step)


def with_convolutions(graph):
    """A graph with 1x1 convolutions of one pixel in place of dense layers.

    TensorFlow's converter has one scale per channel of those alone.
    """
    replacements = {}
    for name, node in graph.nodes.items():
        if node.kind == "dense":
            (source,), make = graph.sources(node), graph_layers.node
            shape = {"shape": (1, 1, *source.shape)}
            pixel = make("reshape", f"{name}_as_pixel", [source], shape)
            kernel = node.weights["kernel"][None, None]
            weights = {**node.weights, "kernel": kernel}
            middle = make("conv", f"{name}_as_conv", [pixel], weights=weights)
            back = make("reshape", name, [middle], {"shape": node.shape})
            replacements[name] = [pixel, middle, back]
    return graph.replaced(replacements)


def converted(network):
    """A network as TensorFlow's own converter writes it."""
    signature = [tf.TensorSpec((1, *network.classifier.image_shape), tf.float32)]
    graph = with_convolutions(network.graph)

    def kernel(node, values):
        # In the shape that the converter knows: the outputs on the last axis.
        is_depthwise = node.kind == "depthwise_conv"
        shape = (*values.shape[:2], 1, -1) if is_depthwise else values.shape
        name = node.name.removesuffix("_as_conv")
        high = network.kernel_ranges[name]
        rounded = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            tf.reshape(values, shape) if is_depthwise else values,
            -high,
            high,
            network.kernel_bits[name],
            narrow_range=True,
        )
        return tf.reshape(rounded, values.shape) if is_depthwise else rounded

    def output(node, values):
        if node.kind == "reshape":
            return values
        name = node.name.removesuffix("_as_conv")
        return network.rounded_output(dataclasses.replace(node, name=name), values)

    @tf.function(input_signature=signature, autograph=False)
    def logits(image):
        hooks = {"kernel": kernel, "output": output}
        return graph_running.compute(graph, image, [graph.output], **hooks)[0]

    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [logits.get_concrete_function()]
    )
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.inference_input_type = tf.uint8
    converter.inference_output_type = tf.int8
    with warnings.catch_warnings(), native_output_hidden():
        warnings.simplefilter("ignore")
        return converter.convert()


class NumPyTwinTest(tf.test.TestCase, parameterized.TestCase):
    """A network small enough to compute in NumPy, from its weights and ranges."""

    def setUp(self):
        super().setUp()
        keras.utils.set_random_seed(0)
        image = layers.Input((6, 5, 2))
        x = layers.Conv2D(3, 3, padding="same", name="conv")(image)
        self.classifier = classifier_of(image, layers.ReLU(name="relu")(x))
        self.images = networks.images((6, 5, 2), 100, seed=2)

    def hidden(self, network):
        """Sums of the convolution, times what makes them steps of the ReLU."""
        kernel, scale = integer_kernel(network, "conv")
        bias = network.graph.nodes["conv"].weights["bias"]
        bias = np.round(bias / (scale / 64)).astype(np.int64)
        pixels = np.pad(
            self.images.astype(np.int64) - 120, ((0, 0), (1, 1), (1, 1), (0, 0))
        )
        sums = sum(
            pixels[:, i : i + 6, j : j + 5] @ kernel[i, j]
            for i in range(3)
            for j in range(3)
        )
        (low, high), bits = network.ranges["relu"], network.bits["relu"]
        self.assertEqual(low, 0.0)
        step = high / (2**bits - 1)
        steps = (sums + bias) * (scale / 64 / step)
        return np.clip(steps, 0, 2**bits - 1), step

    def logits(self, network, hidden, step):
        kernel, scale = integer_kernel(network, "logits")
        bias = network.graph.nodes["logits"].weights["bias"]
        bias = np.round(bias / (scale * step)).astype(np.int64)
        sums = hidden.reshape(len(hidden), -1) @ kernel + bias
        low, high = network.ranges["logits"]
        step_out = (high - low) / 255
        zero = round(-low / step_out)
        return np.clip(sums * (scale * step / step_out) + zero, 0, 255) - 128

    @parameterized.parameters(
        BitWidths(), BitWidths(8, 5), BitWidths(5), BitWidths(per_channel=False)
    )
    def test_int8_kernels_give_these_very_integers(self, widths):
        network = network_of(self.classifier, widths)
        stored = read(writer.write(network), self.images)
        steps, step = self.hidden(network)
        hidden = np.round(steps).astype(np.int64)
        self.assertGreater(len(np.unique(hidden)), 25)
        self.assertAllEqual(stored["relu"].steps, hidden)
        expected = np.round(self.logits(network, hidden, step))
        self.assertAllEqual(stored["logits"].integers, expected)
        self.assertGreater(len(np.unique(expected)), 100)

    @parameterized.parameters(2, 3, 4)
    def test_int4_kernels_do_but_for_rounding_twice(self, num_bits):
        widths = BitWidths(num_bits, num_bits_first=num_bits, num_bits_last=num_bits)
        network = network_of(self.classifier, widths)
        stored = read(writer.write(network), self.images)
        steps, step = self.hidden(network)
        distance = np.abs(steps - stored["relu"].steps).max()
        self.assertLessEqual(distance, ROUNDED_TWICE)
        # And so it is with the dense layer, fed with what the file has.
        logits = self.logits(network, stored["relu"].steps, step)
        distance = np.abs(logits - stored["logits"].integers).max()
        self.assertLessEqual(distance, ROUNDED_TWICE)


def unpacked_int4(data, count):
    """`count` integers, the first of each two in the lower half of a byte."""
    halves = np.stack([data & 15, data >> 4], axis=-1).ravel()[:count].astype(int)
    return np.where(halves > 7, halves - 16, halves)


class PackedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        ([], []),
        ([1], [0x01]),
        ([-1], [0x0F]),
        ([1, -2], [0xE1]),
        ([-8, 7, -7], [0x78, 0x09]),
    )
    def test_first_of_two_is_in_the_lower_half(self, values, expected):
        packed = flatbuffer.packed(np.array(values, np.int8), 4)
        self.assertEqual(packed.dtype, np.uint8)
        self.assertAllEqual(packed, np.array(expected, np.uint8))

    @parameterized.parameters(
        ([], []),
        ([1], [0b01]),
        ([-1], [0b11]),
        ([1, -2, 0, -1], [0b11_00_10_01]),
        ([0, 0, 0, 1, -1], [0b01_00_00_00, 0b11]),
    )
    def test_first_of_four_is_in_the_lowest_bits(self, values, expected):
        packed = flatbuffer.packed(np.array(values, np.int8), 2)
        self.assertEqual(packed.dtype, np.uint8)
        self.assertAllEqual(packed, np.array(expected, np.uint8))

    @parameterized.parameters((16,), (3, 5), (2, 3, 3, 5), (1, 7))
    def test_unpacks_to_the_same(self, *shape):
        values = np.random.default_rng(0).integers(-8, 8, shape).astype(np.int8)
        # As a kernel comes: transposed, and not contiguous.
        values = np.transpose(values)
        packed = flatbuffer.packed(values, 4)
        self.assertLen(packed, -(-values.size // 2))
        self.assertAllEqual(unpacked_int4(packed, values.size), values.ravel())


class FileTest(tf.test.TestCase, parameterized.TestCase):
    def test_says_that_it_is_tflite(self):
        network = network_named("padded_pooling", BitWidths())
        content = writer.write(network)
        self.assertIsInstance(content, bytes)
        self.assertEqual(content[4:8], b"TFL3")
        self.assertEqual(parsed(content).version, 3)

    @parameterized.parameters(
        ("mobilenet_like", ALL_FOUR_BITS, "INT4"),
        ("vgg_like", BitWidths(3, 8, True, 2, 4, 4), "INT4"),
        ("mobilenet_like", BitWidths(5, 8, False, 5, 5, 5), "INT8"),
        ("resnet_like", BitWidths(8, 16), "INT8"),
    )
    def test_kernels_are_the_integers_of_the_network(self, name, widths, kind):
        network = network_named(name, widths)
        content = writer.write(network, FileConfig(favor="size"))
        tensors = tensors_of(content)
        kernels = [name for name in tensors if name.endswith("/kernel")]
        self.assertGreaterEqual(len(kernels), 4)
        for name in kernels:
            tensor = tensors[name]
            self.assertEqual(TYPES[tensor.type], kind)
            data, count = data_of(content, tensor), int(np.prod(tensor.shape))
            if kind == "INT4":
                self.assertLen(data, -(-count // 2))
                integers = unpacked_int4(data, count)
            else:
                self.assertLen(data, count)
                integers = data.view(np.int8).astype(int)
            node = network.graph.nodes[name.removesuffix("/kernel")]
            expected, scale = integer_kernel(network, node.name)
            if node.kind == "depthwise_conv":
                axis = 3
                expected = expected.reshape(1, *expected.shape[:2], -1)
            elif node.kind == "dense":
                axis, expected = 0, expected.T
            elif len(tensor.shape) == 2:  # a convolution as FULLY_CONNECTED
                axis, expected = 0, np.transpose(expected, (3, 1, 0, 2))
                expected = expected.reshape(len(expected), -1)
            else:
                axis, expected = 0, np.transpose(expected, (3, 0, 1, 2))
            self.assertAllEqual(tensor.shape, expected.shape)
            quantization = tensor.quantization
            channels = expected.shape[axis] if widths.per_channel else 1
            self.assertLen(quantization.scale, channels)
            self.assertAllEqual(quantization.zeroPoint, np.zeros(channels))
            self.assertEqual(quantization.quantizedDimension, axis)
            self.assertAllClose(quantization.scale, np.ravel(scale), rtol=1e-6)
            self.assertAllEqual(integers.reshape(expected.shape), expected)
            # And they are not all of them 0, or cut off.
            self.assertGreater(np.mean(integers != 0), 0.3)

    @parameterized.parameters((BitWidths(), "INT32"), (BitWidths(8, 16), "INT64"))
    def test_biases_are_those_of_the_network(self, widths, kind):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, use_bias=False, name="without")(image)
        network = network_of(classifier_of(image, layers.ReLU()(x)), widths)
        content = writer.write(network)
        tensors = tensors_of(content)
        dtype = np.dtype(kind.lower())
        bias, none = tensors["logits/bias"], tensors["without/bias"]
        self.assertEqual(TYPES[bias.type], kind)
        self.assertEqual(TYPES[none.type], kind)
        self.assertAllEqual(data_of(content, none).view(dtype), np.zeros(4))
        source, kernel = tensors["re_lu"], tensors["logits/kernel"]
        scale = source.quantization.scale * kernel.quantization.scale
        self.assertAllClose(bias.quantization.scale / scale, np.ones(5))
        values = data_of(content, bias).view(dtype) * scale.astype(np.float64)
        expected = network.graph.nodes["logits"].weights["bias"]
        self.assertGreater(np.abs(values).min(), 0.0)
        self.assertAllClose(values, expected, rtol=1e-5)

    @parameterized.parameters(BitWidths(), BitWidths(4), BitWidths(4, 16))
    def test_constants_start_at_multiples_of_16_bytes(self, widths):
        network = network_named("mobilenet_like", widths)
        content = writer.write(network)
        model = schema.Model.GetRootAs(content, 0)
        starts = []
        for i in range(model.BuffersLength()):
            table = model.Buffers(i)._tab
            field = table.Offset(4)  # the first field of a Buffer: data
            if field:
                starts.append(table.Vector(field))
                self.assertGreater(table.VectorLen(field), 0)
        self.assertGreater(len(starts), 10)
        self.assertAllEqual(np.array(starts) % 16, np.zeros(len(starts)))
        # It is the file that they are found in, not a copy of it.
        tensors = tensors_of(content)
        first = next(tensors[name] for name in tensors if name.endswith("/kernel"))
        table = model.Buffers(first.buffer)._tab
        start = table.Vector(table.Offset(4))
        data = data_of(content, first).tobytes()
        self.assertEqual(content[start : start + len(data)], data)

    @parameterized.product(
        name=list(networks.NETWORKS), widths=(BitWidths(), ALL_FOUR_BITS)
    )
    def test_tensors_have_the_names_of_layers(self, name, widths):
        network = network_named(name, widths)
        content = writer.write(network)
        written = {output for _, output in operators_of(content)}
        graph = network.graph
        self.assertContainsSubset(grids.measured(graph), written)
        # What a file stores beside: nodes that copy integers, and what is cut off.
        rest = {tensor.removesuffix("/raw") for tensor in written}
        rest = {tensor for tensor in rest if not tensor.startswith("between/")}
        rest -= set(grids.measured(graph))
        copying = {KINDS[graph.nodes[node].kind].grid for node in rest}
        self.assertContainsSubset(copying, {"shared"})
        kernels = {
            f"{node.name}/{part}"
            for node in graph.nodes.values()
            if has_kernel(node)
            for part in ("kernel", "bias")
        }
        self.assertContainsSubset(kernels, tensors_of(content))

    def test_signature_takes_an_image_and_gives_logits(self):
        network = network_named("resnet_like", BitWidths())
        content = writer.write(network)
        interpreter = running.open_interpreter(content)
        self.assertEqual(
            interpreter.get_signature_list(),
            {"serving_default": {"inputs": ["image"], "outputs": ["logits"]}},
        )
        runner = interpreter.get_signature_runner()
        images = networks.images(network.classifier.image_shape, 3)
        tflite = running.TFLiteClassifier(content)
        for image, scores in zip(images, tflite.scores(images)):
            outputs = runner(image=image[None])
            self.assertEqual(list(outputs), ["logits"])
            self.assertEqual(outputs["logits"].dtype, np.int8)
            (output,) = interpreter.get_output_details()
            scale, zero_point = output["quantization"]
            logits = (outputs["logits"][0].astype(np.float32) - zero_point) * scale
            self.assertAllClose(logits, scores)

    @parameterized.product(
        name=("mobilenet_like", "densenet_like"),
        widths=("W4A4", "W3A6", "W8A8", "W8A16"),
    )
    def test_scales_and_zero_points_are_those_of_the_ranges(self, name, widths):
        network = network_named(name, WIDTHS[widths][0])
        content = writer.write(network)
        tensors = tensors_of(content)
        signed = 0
        for name, (low, high) in network.ranges.items():
            if name == "pixels":
                continue
            bits = network.bits[name]
            if bits == 16:
                scale, zero_point = high / 32767, 0
            else:
                scale = (high - low) / (2**bits - 1)
                zero_point = 127 - (2**bits - 1) + round(-low / scale)
            tensor = tensors[name]
            self.assertEqual(TYPES[tensor.type], "INT16" if bits == 16 else "INT8")
            self.assertAllClose(tensor.quantization.scale / scale, [1.0])
            self.assertAllEqual(tensor.quantization.zeroPoint, [zero_point])
            signed += low < 0
        self.assertGreater(signed, 0)

    @parameterized.parameters((4, True), (7, True), (8, False), (16, False))
    def test_few_bits_below_zero_are_cut_off(self, num_bits, is_cut_off):
        keras.utils.set_random_seed(0)
        image = layers.Input((6, 6, 3))
        x = layers.ReLU(name="positive")(layers.Conv2D(4, 3, name="conv")(image))
        x = layers.Conv2D(4, 3, name="signed")(x)
        network = network_of(
            classifier_of(image, x),
            BitWidths(8, num_bits),
            signed=(-0.5, 0.5),
        )
        content = writer.write(network)
        operators = operators_of(content)
        self.assertIn(("CONV_2D", "positive"), operators)
        cut_off = [output for kind, output in operators if kind == "MAXIMUM"]
        self.assertEqual(cut_off, ["signed"] if is_cut_off else [])
        images = networks.images((6, 6, 3), 20, seed=2)
        stored = read(content, images)
        if is_cut_off:
            lowest = 127 - (2**num_bits - 1)
            raw = stored["signed/raw"].integers
            self.assertLess(raw.min(), lowest)
            self.assertAllEqual(stored["signed"].integers, np.maximum(raw, lowest))
            self.assertEqual(stored["signed"].integers.min(), lowest)
        # Where the range ends, above and below, the network ends too.
        self.assertAllInRange(stored["signed"].real, -0.54, 0.54)
        self.assertLess(stored["signed"].real.min(), -0.46)
        self.assertGreater(stored["signed"].real.max(), 0.46)
        self.assertEqual(stored["positive"].real.min(), 0.0)

    @parameterized.product(is_fused=(True, False), num_bits=(4, 8, 16))
    def test_relu6_ends_at_six_however_far_the_range_goes(self, is_fused, num_bits):
        keras.utils.set_random_seed(0)
        image = layers.Input((6, 6, 3))
        x = layers.Conv2D(4, 3, kernel_initializer="he_normal", name="conv")(image)
        y = layers.ReLU(6.0, name="six")(x)
        model = model_of(image, y if is_fused else layers.Add()([x, y]))
        kernel = model.get_layer("conv").kernel
        kernel.assign(8 * kernel)
        network = network_of(described(model), BitWidths(8, num_bits), six=(0.0, 12.0))
        content = writer.write(network)
        outputs = [output for _, output in operators_of(content)]
        self.assertEqual("conv" in outputs, not is_fused)
        stored = read(content, networks.images((6, 6, 3), 20, seed=2))["six"]
        # The integer next to 6, of those of the range.
        step = 12 / (2 ** min(num_bits, 15) - 1)
        self.assertAllClose(stored.real.max(), 6.0, atol=0.51 * step)
        self.assertEqual(stored.real.min(), 0.0)

    @parameterized.product(
        normalisation=(
            ((0.0,), (1 / 255,)),
            ((120.0,), (1 / 64,)),
            ((255.0,), (0.017,)),
            ((123.7, 116.3, 103.5), (0.017, 0.0175, 0.02)),
        ),
        num_bits=(4, 8, 16),
    )
    def test_pixels_come_in_exactly(self, normalisation, num_bits):
        keras.utils.set_random_seed(0)
        image = layers.Input((16, 16, 3))
        x = layers.Conv2D(4, 3, strides=4, activation="relu")(image)
        classifier = classifier_of(image, x, *normalisation)
        network = network_of(classifier, BitWidths(8, num_bits))
        (mean,), (scale,) = (
            (getattr(network.description, f"input_{name}")[:1])
            for name in ("mean", "scale")
        )
        content = writer.write(network)
        pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
        stored = read(content, pixels)
        self.assertEqual(
            [kind for kind, _ in operators_of(content)].count("QUANTIZE"),
            2 if num_bits == 16 else 1,
        )
        exact = pixels.astype(int) - round(mean)
        if num_bits == 16:  # by way of int8, and 128 steps for each of a pixel's
            half_way = stored["pixels/int8"].integers
            self.assertEqual(half_way.dtype, np.int8)
            self.assertAllEqual(half_way, pixels.astype(int) - 128)
            self.assertEqual(stored["pixels"].integers.dtype, np.int16)
            self.assertAllEqual(stored["pixels"].integers, 128 * exact)
        else:
            self.assertEqual(stored["pixels"].integers.dtype, np.int8)
            self.assertAllEqual(stored["pixels"].steps, exact)
        self.assertAllClose(stored["pixels"].real, exact * scale, rtol=1e-5)
        if "normalize" in stored:  # of the channel that reaches farthest
            levels = np.unique(stored["normalize"].integers[..., 2])
            self.assertGreater(len(levels), 250)

    def test_names_the_layer_that_it_cannot_write(self):
        network = network_named("mobilenet_v3_like", BitWidths())
        graph = network.graph
        name = next(n for n, node in graph.nodes.items() if node.kind == "sigmoid")
        odd = graph_layers.node("softmax", name, graph.sources(graph.nodes[name]))
        classifier = Classifier(graph.replaced({name: [odd]}), network.description)
        network = dataclasses.replace(network, classifier=classifier)
        with self.assertRaisesRegex(
            ExportError, rf"layer {name} \(softmax\) cannot be"
        ):
            writer.write(network)

    def test_refuses_a_grid_that_its_operator_cannot_keep(self):
        network = network_named("padded_pooling", BitWidths())
        (flat,) = (n for n in network.graph.nodes.values() if n.kind == "reshape")
        grid = QuantizedNetwork.grid

        def another(network, name):
            found = grid(network, name)
            if name == flat.name:
                found = dataclasses.replace(found, zero_point=found.zero_point + 1)
            return found

        with (
            mock.patch.object(QuantizedNetwork, "grid", another),
            self.assertRaisesRegex(
                ExportError,
                rf"{flat.name} \(reshape\) has another grid than {flat.inputs[0]}, wh",
            ),
        ):
            writer.write(network)

    @parameterized.parameters(
        (BitWidths(), 1e-9, 2**31 - 1), (BitWidths(8, 16), 1e-14, 2**47 - 1)
    )
    def test_refuses_a_bias_that_its_integers_cannot_hold(self, widths, shrunk, limit):
        image = layers.Input((8, 8, 3))
        x = layers.Conv2D(4, 3, name="conv")(image)
        network = network_of(classifier_of(image, layers.ReLU()(x)), widths)
        magnitudes = network.kernel_ranges["conv"] * np.float32([1, 1, shrunk, 1])
        ranges = {**network.kernel_ranges, "conv": magnitudes}
        with self.assertRaisesRegex(
            ExportError, rf"bias of layer conv \(conv\) reaches .* which end at {limit}"
        ):
            writer.write(dataclasses.replace(network, kernel_ranges=ranges))

    @parameterized.product(
        name=list(networks.NETWORKS),
        widths=("W8A8", "W4A4", "W4A16"),
        delegates=(True, False),
    )
    def test_takes_any_batch(self, name, widths, delegates):
        network = network_named(name, WIDTHS[widths][0])
        content = writer.write(network)
        images = networks.images(network.classifier.image_shape, 3, seed=2)
        alone, together = (
            run(content, images, size, delegates=delegates) for size in (1, 3)
        )
        self.assertAllEqual(together, alone)
        self.assertGreater(np.ptp(alone.astype(int), axis=0).max(), 5)


def run(content, images, batch_size, delegates=True):
    """The integers that a file gives, some images at a time."""
    interpreter = running.open_interpreter(content, delegates=delegates)
    (image,), (output,) = (
        interpreter.get_input_details(),
        interpreter.get_output_details(),
    )
    interpreter.resize_tensor_input(image["index"], (batch_size, *images.shape[1:]))
    interpreter.allocate_tensors()
    outputs = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        interpreter.set_tensor(image["index"], batch)
        interpreter.invoke()
        outputs.append(interpreter.get_tensor(output["index"]))
    return np.concatenate(outputs)


def conv(x, filters=6, size=3, padding="same", **settings):
    return layers.Conv2D(filters, size, padding=padding, **settings)(x)


def depthwise(x, padding="same", **settings):
    return layers.DepthwiseConv2D(3, padding=padding, **settings)(x)


def squeeze_and_excitation(image):
    x = conv(image, activation="relu")
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    return layers.Multiply()([x, conv(gate, 6, 1, activation="relu6")])


def beside_itself(layer):
    """A layer with its input added, so that no convolution can take it in."""

    def build(image):
        x = conv(image)
        return layers.Add()([layer(x), x])

    return build


def concatenated(*branches):
    return lambda image: conv(layers.Concatenate()([b(image) for b in branches]))


# Name -> from an image to what the dense layer reads.
LAYERS = {
    "strided": lambda i: conv(conv(i, strides=2), strides=2),
    "strided valid": lambda i: conv(i, strides=2, padding="valid"),
    "even kernel": lambda i: conv(conv(i, size=4), size=2, strides=2),
    "oblong kernel": lambda i: conv(i, size=(5, 2), strides=(3, 1)),
    "dilated": lambda i: conv(conv(i), dilation_rate=2),
    "dilated valid": lambda i: conv(i, padding="valid", dilation_rate=(2, 1)),
    "grouped": lambda i: conv(conv(i), groups=2),
    "grouped strided": lambda i: conv(conv(i), groups=3, strides=2, activation="relu6"),
    "depthwise strided": lambda i: depthwise(conv(i), strides=2),
    "depthwise dilated": lambda i: depthwise(conv(i), dilation_rate=2),
    "depth multiplier": lambda i: depthwise(i, "valid", depth_multiplier=2),
    "depth multiplier 3": lambda i: depthwise(
        conv(i), strides=2, depth_multiplier=3, activation="relu"
    ),
    "max pooling": lambda i: layers.MaxPooling2D((3, 2), (2, 1), "same")(conv(i)),
    "average pooling": lambda i: layers.AveragePooling2D(3, 2, "same")(conv(i)),
    "average of pixels": lambda i: conv(layers.AveragePooling2D((2, 3), 1)(i)),
    "global maximum": lambda i: layers.GlobalMaxPooling2D()(conv(i)),
    "global maximum kept": lambda i: conv(
        layers.GlobalMaxPooling2D(keepdims=True)(conv(i))
    ),
    "global average kept": lambda i: conv(
        layers.GlobalAveragePooling2D(keepdims=True)(conv(i))
    ),
    "multiply": lambda i: layers.Multiply()([conv(i), conv(i)]),
    "multiply relu": lambda i: layers.ReLU()(layers.Multiply()([i, conv(i, 3)])),
    "multiply broadcast": squeeze_and_excitation,
    "padding": lambda i: conv(
        layers.ZeroPadding2D(((0, 1), (2, 0)))(conv(i)), padding="valid", strides=2
    ),
    "padded pixels": lambda i: conv(
        layers.ZeroPadding2D(((3, 0), (0, 1)))(i), padding="valid"
    ),
    "relu": beside_itself(layers.ReLU()),
    "relu6": beside_itself(layers.ReLU(6.0)),
    "relu activation": beside_itself(layers.Activation("relu")),
    "leaky relu": beside_itself(layers.LeakyReLU(0.1)),
    "relu6 of pixels": lambda i: conv(layers.ReLU(6.0)(i)),
    "relu behind a pooling": lambda i: layers.ReLU()(layers.MaxPooling2D()(conv(i))),
    "top behind a pooling": concatenated(
        lambda i: layers.MaxPooling2D(2, 1, "same")(layers.ReLU(1.0)(conv(i))), conv
    ),
    "dense layers of an image": lambda i: layers.Dense(5)(
        layers.Dense(6, activation="relu")(conv(i))
    ),
    "dense layers of a vector": lambda i: layers.Dense(6)(
        layers.Dense(7, activation=tf.nn.relu6)(layers.Flatten()(conv(i)))
    ),
    "vector beside an image": lambda i: conv(
        layers.Subtract()([layers.GlobalMaxPooling2D()(conv(i)), conv(i)])
    ),
    "raw pixels beside": concatenated(lambda i: i, conv),
    "pooled pixels beside": concatenated(
        layers.MaxPooling2D(padding="same"), lambda i: conv(i, strides=2)
    ),
    "many beside": concatenated(*[functools.partial(conv, size=1)] * 11),
    "rows below rows": lambda i: conv(
        layers.Concatenate(axis=1)([conv(i), conv(i, activation="relu")])
    ),
    "reshaped": lambda i: conv(layers.Reshape((-1, 7, 3))(conv(i))),
}


# What itself has a kernel; the others are only between some.
WITH_KERNELS = (
    *[name for name in LAYERS if name.startswith(("strided", "depth", "grouped"))],
    *("even kernel", "oblong kernel", "dilated", "dilated valid"),
    *("dense layers of an image", "dense layers of a vector"),
)


@functools.cache
def prepared_layer(layer):
    keras.utils.set_random_seed(0)
    # Odd and even sides, so that a stride divides one and not the other.
    image = layers.Input((7, 10, 3))
    return prepared(classifier_of(image, LAYERS[layer](image)))


class LayersTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(layer=list(LAYERS), widths=(BitWidths(), BitWidths(8, 16)))
    def test_layer_is_what_it_is_in_the_network(self, layer, widths):
        self.check(quantized(*prepared_layer(layer), widths))

    @parameterized.parameters(*WITH_KERNELS)
    def test_so_it_is_with_kernels_of_four_bits(self, layer):
        self.check(quantized(*prepared_layer(layer), ALL_FOUR_BITS))

    @parameterized.parameters(*(each for each in LAYERS if each not in WITH_KERNELS))
    @pytest.mark.long
    def test_so_it_is_beside_kernels_of_four_bits(self, layer):
        self.check(quantized(*prepared_layer(layer), ALL_FOUR_BITS))

    def test_at_most_five_tensors_are_put_side_by_side_at_a_time(self):
        """XNNPACK takes no more, and TFLite Micro ten."""
        network = quantized(*prepared_layer("many beside"), BitWidths())
        graph = parsed(writer.write(network)).subgraphs[0]
        kinds = [kind for kind, _ in operators_of(writer.write(network))]
        counts = [
            len(operator.inputs)
            for kind, operator in zip(kinds, graph.operators)
            if kind == "CONCATENATION"
        ]
        self.assertEqual(counts, [5, 5, 3])  # eleven, and what is joined already

    @parameterized.product(
        shape=((6, 6, 1), (5, 9, 4)), widths=(BitWidths(), BitWidths(4, 16))
    )
    def test_images_of_other_shapes(self, shape, widths):
        keras.utils.set_random_seed(0)
        image = layers.Input(shape)
        x = depthwise(conv(image, strides=2))
        self.check(network_of(classifier_of(image, x), widths))

    @parameterized.parameters("pool", "flatten", "relu")
    def test_networks_that_do_not_end_in_a_dense_layer(self, last):
        def model():
            image = layers.Input((5, 5, 3))
            x = conv(image, activation="relu")
            if last == "pool":
                x = layers.GlobalAveragePooling2D()(conv(x, 5))
            elif last == "flatten":
                x = layers.Flatten()(conv(x, 5, size=5, padding="valid"))
            else:
                x = layers.ReLU()(layers.Dense(5)(layers.Flatten()(x)))
            return keras.Model(image, x)

        keras.utils.set_random_seed(0)
        network = network_of(described(model()))
        content = writer.write(network)
        images = networks.images((5, 5, 3), 50, seed=2)
        tflite = running.TFLiteClassifier(content)
        self.assertGreater(np.ptp(network.scores(images)), 50 * tflite.output_scale)
        self.assertLessEqual(proof.largest_difference(network, content, images), 1)

    def check(self, network):
        images = networks.images(network.classifier.image_shape, 12, seed=2)
        content = proof.convert(network, images)
        result = distances(network, content, images)
        self.assertIn("logits", result)
        for name, (kind, distance, limit) in result.items():
            self.assertLessEqual(distance, limit, f"{name} ({kind})")


class FullyConnectedTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        widths=("W8A8", "W8A8 per tensor", "W4A4", "W8A16", "W4A16"),
        shape=((6, 5, 3), (1, 1, 3)),
        delegates=(True, False),
    )
    def test_both_kernels_of_litert_compute_it(self, widths, shape, delegates):
        keras.utils.set_random_seed(0)
        image = layers.Input((8, 8, shape[-1]))
        # Of an image, or of a vector: an odd number of values, as int4 is packed.
        x = image if shape[0] > 1 else layers.GlobalMaxPooling2D()(image)
        x = layers.Dense(7, activation="relu", name="dense")(x)
        network = network_of(classifier_of(image, x), WIDTHS[widths][0])
        content = writer.write(network)
        images = networks.images((8, 8, 3), 20, seed=2)
        (kind, version) = next(
            (OPERATORS[code.builtinCode], code.version)
            for code in parsed(content).operatorCodes
            if OPERATORS[code.builtinCode] == "FULLY_CONNECTED"
        )
        # Runtimes before TensorFlow 2.10 read its scales per channel as 0, and know
        # no such version.
        self.assertGreaterEqual(version, 10)
        integers = run(content, images, 1, delegates=delegates)
        (low, high), bits = network.ranges["logits"], network.bits["logits"]
        step = high / 32767 if bits == 16 else (high - low) / (2**bits - 1)
        zero = 0 if bits == 16 else 127 - (2**bits - 1) + round(-low / step)
        expected = network.scores(images) / step + zero
        limit = {"W8A8": 1.01, "W8A16": 4.0, "W4A16": 6.0}
        distance = np.abs(integers - expected)
        self.assertLessEqual(distance.mean(), 0.6)
        self.assertLessEqual(distance.max(), limit.get(widths, 2.01))


class LookupTest(tf.test.TestCase, parameterized.TestCase):
    """A kind without an operator of TFLite, added to the table for these tests."""

    def setUp(self):
        super().setUp()
        kind = Kind(
            says="log(1 + exp(x))",
            compute=lambda node, inputs, weights: tf.math.softplus(inputs[0]),
        )
        self.enter_context(mock.patch.dict(KINDS, {"softplus": kind}))
        keras.utils.set_random_seed(0)
        image = layers.Input((6, 6, 3))
        x = layers.Conv2D(4, 3, kernel_initializer="he_normal", name="conv")(image)
        x = layers.LeakyReLU(0.1, name="curve")(layers.Rescaling(3.0)(x))
        float_twin = float_network(classifier_of(image, conv(x)))
        graph = float_twin.graph
        curve = graph_layers.node(
            "softplus", "curve", graph.sources(graph.nodes["curve"])
        )
        graph = graph.replaced({"curve": [curve]})
        self.network = Classifier(graph, float_twin.description)
        self.images = networks.images((6, 6, 3), 20, seed=2)

    def quantized(self, widths):
        return quantized(self.network, calibrate(self.network, self.images), widths)

    @parameterized.parameters(BitWidths(), BitWidths(8, 5, num_bits_sum=5))
    def test_each_integer_has_its_answer(self, widths):
        network = self.quantized(widths)
        content = proof.convert(network, self.images)
        kinds = [kind for kind, _ in operators_of(content)]
        start = kinds.index("CAST") - 1
        self.assertEqual(kinds[start : start + 3], ["QUANTIZE", "CAST", "GATHER"])
        stored = read(content, self.images)
        answers = np.log1p(np.exp(stored["conv"].real.astype(np.float64)))
        curve, bits = stored["curve"], widths.num_bits_activation
        steps = answers / curve.scale + curve.zero_point
        expected = np.clip(np.rint(steps), 127 - (2**bits - 1), 127)
        self.assertAllEqual(curve.integers, expected)
        self.assertGreater(len(np.unique(expected)), 2 ** (bits - 2))
        # The lowest and highest inputs are read, not only those in the middle.
        inputs = stored["conv"].integers
        self.assertEqual((inputs.min(), inputs.max()), (128 - 2**bits, 127))

    def test_micro_has_no_cast_of_uint8(self):
        network = self.quantized(BitWidths())
        usual = proof.convert(network, self.images)
        content = proof.convert(network, self.images, FileConfig(target="micro"))
        kinds = [kind for kind, _ in operators_of(content)]
        start = kinds.index("CAST")
        self.assertEqual(kinds[start : start + 3], ["CAST", "ADD", "GATHER"])
        graph = parsed(content).subgraphs[0]
        (source,) = graph.operators[start].inputs
        self.assertEqual(graph.tensors[source].type, schema.TensorType.INT8)
        curves = [read(each, self.images)["curve"] for each in (usual, content)]
        self.assertAllEqual(curves[0].integers, curves[1].integers)

    def test_takes_any_batch(self):
        content = writer.write(self.quantized(BitWidths()))
        alone, together = (run(content, self.images[:3], size) for size in (1, 3))
        self.assertAllEqual(together, alone)

    def test_sixteen_bits_are_refused(self):
        with self.assertRaisesRegex(
            ExportError, r"layer curve \(softplus\) is read from a table .* 16 bits"
        ):
            writer.write(self.quantized(BitWidths(8, 16)))


if __name__ == "__main__":
    tf.test.main()
