"""Targets: what they refuse before any work, and what is written for them."""

import functools
import importlib
import pathlib
from unittest import mock

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import schema_py_generated as schema

from dfq_tf import api
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError, ExportError, UnsupportedLayerError
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import TARGETS, BitWidths, FileConfig, MixedWidths
from dfq_tf.tflite import check_target, targets
from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import TFLiteClassifier, kernel_types
from tests import networks
from tests.graphs import Sketch
from tests.tool_runner import run_in_process

OTHERS = ("micro", "ethos_u", "edge_tpu")


def check(sketch, target, widths=BitWidths(), **config):
    """Checks a sketched network, as it is before any work."""
    if len(sketch.nodes[sketch.last].shape) == 3:
        sketch.flatten("ends_in_a_vector")
    network = sketch.classifier()
    check_target(network, widths, FileConfig(target=target, **config))


def leaky():
    sketch = Sketch()
    sketch.conv("conv")
    sketch("leaky_relu", "leaky", slope=0.2)
    sketch.flatten("flat")
    sketch.dense("dense")
    return sketch


class RefusedTest(tf.test.TestCase, parameterized.TestCase):
    def test_each_target_of_the_settings_is_in_the_table(self):
        self.assertSequenceEqual(TARGETS, tuple(targets.TARGETS))

    @parameterized.parameters(
        ("ethos_u", "Vela, for the Ethos-U", "num_bits_weight", 4, "5 to 8"),
        ("ethos_u", "Vela, for the Ethos-U", "num_bits_first", 3, "5 to 8"),
        ("ethos_u", "Vela, for the Ethos-U", "num_bits_last", 4, "5 to 8"),
        ("ethos_u", "Vela, for the Ethos-U", "num_bits_depthwise", 2, "5 to 8"),
        ("edge_tpu", "the Edge TPU's compiler", "num_bits_weight", 4, "5 to 8"),
        ("edge_tpu", "the Edge TPU's compiler", "num_bits_activation", 16, "2 to 8"),
    )
    def test_width(self, target, says, setting, bits, taken):
        with self.assertRaises(ConfigError) as caught:
            check(leaky(), target, BitWidths(**{setting: bits}))
        self.assertEqual(
            str(caught.exception),
            f"{setting} is {bits}, and the target is {target}: {says} takes {taken} "
            f"bits there in a file of {BitWidths(**{setting: bits}).name}",
        )

    def test_four_bits_beside_sixteen(self):
        message = "num_bits_weight is 4, .* TFLite Micro takes 5 to 8 .* of W4A16"
        with self.assertRaisesRegex(ConfigError, message):
            check(leaky(), "micro", BitWidths(4, 16))

    def test_widths_that_are_taken(self):
        for target in ("android", "micro"):
            check(leaky(), target, BitWidths(2, 4))
        check(leaky(), "android", BitWidths(4, 16))
        for target in ("micro", "ethos_u"):
            check(leaky(), target, BitWidths(5, 16))
        check(leaky(), "edge_tpu", BitWidths(5, 4))

    @parameterized.parameters("ethos_u", "edge_tpu")
    def test_operator_with_the_name_of_the_layer(self, target):
        sketch = Sketch()
        sketch("softplus", "soft")
        says = targets.TARGETS[target].says
        message = (
            r"layer my soft \(softplus\) cannot be quantized: it needs CAST and GATHER,"
            rf" which {says} lacks\. Take another target than {target}"
        )
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            check(sketch, target)
        for other in ("android", "micro"):
            check(sketch, other)

    @parameterized.parameters("micro", "ethos_u", "edge_tpu")
    def test_each_operator_that_is_missing_is_named_once(self, target):
        sketch = Sketch()
        sketch("layer_normalization", "norm", epsilon=1e-3)
        missing = r"(CAST and )?SUM and FLOOR_DIV and LESS and SELECT_V2( and GATHER)?,"
        message = rf"my norm \(layer_normalization\) .*: it needs {missing} which"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            check(sketch, target)
        check(sketch, "android")

    @parameterized.parameters(
        ("ethos_u", "depthwise", dict(strides=(4, 4)), "strides up to 3 there, not"),
        ("ethos_u", "conv", dict(strides=(4, 4)), "strides up to 3 there, not"),
        ("edge_tpu", "conv", dict(dilation=(1, 2)), "one dilation for both axes, not"),
        ("edge_tpu", "conv", dict(groups=2), "it has 2 groups, .* no later one than 3"),
    )
    def test_window(self, target, kind, settings, message):
        sketch = Sketch()
        getattr(sketch, kind)("layer", **settings)
        with self.assertRaisesRegex(UnsupportedLayerError, f"my layer .*{message}"):
            check(sketch, target)

    @parameterized.parameters(
        ("conv", dict(size=3)),
        ("max_pool", dict(size=(2, 2))),
        ("average_pool", dict(size=(2, 2))),
    )
    def test_long_strides_of_ethos_u(self, kind, settings):
        """Vela takes them where nothing lies around the image."""
        for padding in ("valid", "same"):
            sketch = Sketch()
            make = getattr(sketch, kind, functools.partial(sketch, kind))
            make("layer", strides=(4, 5), padding=padding, **settings)
            if padding == "valid":
                check(sketch, "ethos_u")
                continue
            message = r"my layer .*strides up to 3 there, not \(4, 5\)"
            with self.assertRaisesRegex(UnsupportedLayerError, message):
                check(sketch, "ethos_u")

    def test_groups_beside_sixteen_bits(self):
        """CMSIS-NN takes them for one group, and drops its own error."""
        sketch = Sketch()
        sketch.conv("conv", outputs=8)
        sketch.conv("layer", groups=2)
        message = r"my layer .*has 2 groups, which CMSIS-NN .*; take 8 or fewer\. Take"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            check(sketch, "micro", BitWidths(8, 16))
        check(sketch, "micro", BitWidths(4, 8))
        for other in ("android", "ethos_u"):
            check(sketch, other, BitWidths(8, 16))

    @parameterized.parameters(
        ("micro", (8, 8, 3), (4, 3, 2, 1), "CMSIS-NN moves 4 axes at most, the batch"),
        ("ethos_u", (320, 320, 3), (1, 2, 4, 3), "moves 65,536 .* most, not 102,400"),
    )
    def test_moved_axes(self, target, shape, order, message):
        sketch = Sketch(shape)
        sketch.conv("conv", outputs=6)
        sketch("reshape", "split", shape=(*shape[:2], 2, 3))
        sketch("transpose", "layer", order=order)
        sketch("reshape", "joined", shape=(*shape[:2], 6))
        sketch("global_max_pool", "pool", keepdims=False)
        with self.assertRaisesRegex(UnsupportedLayerError, f"my layer .*{message}"):
            check(sketch, target)
        for other in {"android", "micro", "ethos_u", "edge_tpu"} - {target}:
            check(sketch, other)

    @parameterized.parameters(
        ("ethos_u", "nearest_upsampling", dict(size=(2, 4)), r"\(8, 8\) there, not"),
        ("ethos_u", "nearest_upsampling", dict(size=(3, 3)), r"\(8, 8\) there, not"),
        ("ethos_u", "bilinear_upsampling", dict(size=(4, 4)), r"\(2, 2\) there, not"),
        (
            "ethos_u",
            "depth_to_space",
            dict(block=2),
            "needs DEPTH_TO_SPACE, which Vela",
        ),
        ("edge_tpu", "bilinear_upsampling", dict(size=(2, 2)), "needs RESIZE_BILINEAR"),
        (
            "edge_tpu",
            "depth_to_space",
            dict(block=2),
            "needs DEPTH_TO_SPACE, which the",
        ),
    )
    def test_moved_pixels(self, target, kind, settings, message):
        sketch = Sketch()
        sketch.conv("conv", outputs=8)
        sketch(kind, "layer", **settings)
        sketch.flatten("flat")
        with self.assertRaisesRegex(UnsupportedLayerError, f"my layer .*{message}"):
            check(sketch, target)
        check(sketch, "micro")

    @parameterized.parameters(
        ("bilinear_upsampling", dict(size=(2, 2)), "RESIZE_BILINEAR", "micro"),
        ("global_max_pool", dict(keepdims=True), "REDUCE_MAX", "micro"),
        ("prelu", dict(slopes=(0.1, 0.2, 0.3)), "PRELU", "ethos_u"),
    )
    def test_operator_for_eight_bits_alone(self, kind, settings, operator, target):
        sketch = Sketch()
        sketch(kind, "layer", **settings)
        sketch.flatten("flat")
        message = rf"my layer .* it needs {operator}, which .* has for 8 bits alone"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            check(sketch, target, BitWidths(8, 16))
        check(sketch, target)
        for other in {"android", "micro", "ethos_u"} - {target}:
            check(sketch, other, BitWidths(8, 16))

    def test_padded_average_of_a_large_window(self):
        sketch = Sketch((16, 16, 3))
        sketch("average_pool", "pool", size=(9, 9), strides=(1, 1), padding="same")
        with self.assertRaisesRegex(UnsupportedLayerError, "my pool .* windows of 8 "):
            check(sketch, "ethos_u")
        check(sketch, "edge_tpu")

    @parameterized.product(
        target=("ethos_u", "edge_tpu"), setting=("input_type", "output_type")
    )
    def test_floats(self, target, setting):
        message = f"{setting} is 'float32', and the target is {target}: .* integers"
        with self.assertRaisesRegex(ConfigError, message):
            check(leaky(), target, **{setting: "float32"})
        check(leaky(), "micro", **{setting: "float32"})

    def test_tools_say_so_before_any_work(self):
        flags = "--dataset=digits", "--teacher=wrn_10_1", "--workdir=/nowhere/run"
        process = run_in_process("run", *flags, "--widths=W4A8", "--target=ethos_u")
        self.assertEqual(process.returncode, 2)
        message = (
            r"\Aerror: num_bits_weight is 4, and the target is ethos_u: [^\n]*\n\Z"
        )
        self.assertRegex(process.stderr, message)

    def test_python_says_so_before_any_work(self):
        sketch = Sketch(pixels=False)
        sketch.conv("conv")
        sketch("softplus", "soft")
        sketch.flatten("flat")
        sketch.dense("dense")
        file = FileConfig(target="edge_tpu")
        with mock.patch.object(api, "warmed_up") as work:
            with self.assertRaisesRegex(UnsupportedLayerError, "my soft .* lacks"):
                api.quantize(sketch.classifier(), method="df_q", file=file)
            with self.assertRaisesRegex(ConfigError, "num_bits_weight is 4"):
                api.quantize(leaky().classifier(), widths=BitWidths(4), file=file)
            one, ethos_u = MixedWidths(layer_bits=(("dense", 4),)), "ethos_u"
            sketch = Sketch(pixels=False)
            sketch.conv("conv")
            sketch.flatten("flat")
            sketch.dense("dense")
            message = r"my dense .*: its weights have 4 bits, and Vela, .* takes 5 to 8"
            with self.assertRaisesRegex(UnsupportedLayerError, message):
                file = FileConfig(target=ethos_u)
                teacher = sketch.classifier()
                api.quantize(teacher, method="df_q", widths=one, file=file)
        work.assert_not_called()

    def test_network_that_has_been_quantized_for_another_target(self):
        network = quantized("wrn_10_1", BitWidths(4, 16))
        message = r"its weights have 4 bits, and Vela, .* takes 5 to 8"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            convert(network, config=LOGITS["ethos_u"])
        message = r"its outputs have 16 bits, and the Edge TPU's compiler takes 2 to 8"
        with self.assertRaisesRegex(UnsupportedLayerError, message):
            convert(network, config=LOGITS["edge_tpu"])

    def test_what_is_asked_of_the_file_of_such_a_network(self):
        network = quantized("bn_first")
        for target, setting, value in (
            ("ethos_u", "input_type", "float32"),
            ("edge_tpu", "output_type", "float32"),
            ("micro", "favor", "size"),
        ):
            message = f"{setting} is '{value}', and the target is {target}: "
            with self.assertRaisesRegex(ConfigError, message):
                convert(network, config=FileConfig(target=target, **{setting: value}))

    def test_file_with_an_operator_that_is_too_new(self):
        network = quantized("bn_first")
        content = convert(network)
        message = r"LEAKY_RELU of version 2, and the Edge TPU's .* has no such operator"
        with self.assertRaisesRegex(ExportError, message):
            targets.check_file("edge_tpu", content)
        newer = convert(quantized("bn_first", BitWidths(4)), config=LOGITS["micro"])
        message = (
            "CONV_2D of version 7, and Vela, for the Ethos-U has version 4 at most"
        )
        with self.assertRaisesRegex(ExportError, message):
            targets.check_file("ethos_u", newer)


LOGITS = {
    target: FileConfig(target=target, file_output="logits", output_type="int8")
    for target in TARGETS
}


@functools.cache
def quantized(name, widths=BitWidths()):
    """A network that nothing changes."""
    classifier = networks.build(name)
    images = networks.images(classifier.image_shape, 32, seed=1)
    return post_training(float_network(classifier), images, widths)


ALL_FOUR = BitWidths(4, num_bits_first=4, num_bits_last=4, num_bits_depthwise=4)


def shapes_moved(content):
    """The shapes of what each TRANSPOSE of a file reads."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    (graph,), codes = model.subgraphs, model.operatorCodes
    return [
        tuple(graph.tensors[operator.inputs[0]].shape)
        for operator in graph.operators
        if codes[operator.opcodeIndex].builtinCode == schema.BuiltinOperator.TRANSPOSE
    ]


class WrittenTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        name=("vgg_like", "mobilenet_v3_like"), widths=(BitWidths(), BitWidths(4))
    )
    def test_dense_layers_as_convolutions_give_the_same_integers(self, name, widths):
        network = quantized(name, widths)
        images = networks.images(network.classifier.image_shape, 30, seed=2)
        scores = {
            target: TFLiteClassifier(convert(network, config=config)).scores(images)
            for target, config in LOGITS.items()
            if target in ("android", "micro") or widths == BitWidths()
        }
        # Of int4 kernels, LiteRT rounds the sums of convolutions twice.
        step = network.grid(network.graph.output).scale[0]
        most = 0 if widths == BitWidths() else 1.01 * step
        for found in scores.values():
            self.assertAllClose(found, scores["android"], rtol=0, atol=most)

    @parameterized.parameters(*OTHERS)
    def test_operators_are_those_of_the_target(self, target):
        content = convert(quantized("mobilenet_v3_like"), config=LOGITS[target])
        found = targets.operator_versions(content)
        self.assertNotIn("FULLY_CONNECTED", found)
        for operator, version in found.items():
            self.assertLessEqual(version, targets.TARGETS[target].versions[operator])

    @parameterized.parameters(*OTHERS)
    def test_shuffled_channels(self, target):
        """Those of two groups in turn; kernels of TRANSPOSE take four axes there."""
        sketch = Sketch(pixels=False)
        sketch.conv("conv", outputs=6)
        sketch("reshape", "split", shape=(8, 8, 2, 3))
        sketch("transpose", "turned", order=(1, 2, 4, 3))
        sketch("reshape", "joined", shape=(8, 8, 6))
        sketch.conv("last")
        sketch.flatten("flat")
        sketch.dense("dense")
        images = networks.images((8, 8, 3), 40, seed=3)
        network = post_training(float_network(sketch.classifier()), images)
        scores, shapes = {}, {}
        for each in ("android", target):
            content = convert(network, config=LOGITS[each])
            scores[each] = TFLiteClassifier(content).scores(images)
            shapes[each] = shapes_moved(content)
        self.assertEqual(shapes["android"], [(1, 8, 8, 2, 3)])
        self.assertEqual(shapes[target], [(64, 2, 3)])
        self.assertAllEqual(scores[target], scores["android"])

    def test_kernels_that_micro_takes_for_others_are_int8(self):
        """CMSIS-NN knows no groups in int4, nor a multiplier of an odd number."""
        sketch = Sketch(pixels=False)
        sketch.depthwise("odd", multiplier=2)
        sketch.conv("plain", outputs=8)
        sketch.conv("grouped", outputs=8, groups=2)
        sketch.depthwise("even", multiplier=2)
        sketch.flatten("flat")
        sketch.dense("dense")
        images = networks.images((8, 8, 3), 40, seed=3)
        network = post_training(float_network(sketch.classifier()), images, ALL_FOUR)
        found = kernel_types(convert(network, config=LOGITS["micro"]))
        int4 = dict.fromkeys(("plain", "even", "dense"), "int4")
        self.assertEqual(found, {"odd": "int8", "grouped": "int8", **int4})

    def test_clients_are_shown_the_newest_version_of_an_operator(self):
        """A file has CONV_2D of int4, and behind it an older one, of int8."""
        clients = importlib.import_module("clients.check")
        network = quantized("bn_first", BitWidths(4, num_bits_first=4))
        path = pathlib.Path(self.get_temp_dir()) / "file.tflite"
        path.write_bytes(convert(network, config=LOGITS["micro"]))
        versions = targets.TARGETS["ethos_u"].versions
        shown = (np.zeros(0), (), versions, "")
        case = clients.Case("file", path, "ethos_u", False, *shown)
        (row,) = clients.check_versions(case)
        self.assertFalse(row.holds)
        self.assertIn("CONV_2D 7", row.says)

    @parameterized.parameters(0.2, 0.0, 1.5)
    def test_leaky_relu_of_the_edge_tpu_is_a_prelu(self, slope):
        sketch = Sketch(pixels=False)
        sketch.conv("conv")
        sketch("leaky_relu", "leaky", slope=slope)
        sketch.flatten("flat")
        sketch.dense("hidden")
        sketch("leaky_relu", "vector", slope=slope)
        sketch.dense("dense")
        images = networks.images((8, 8, 3), 40, seed=3)
        network = post_training(float_network(sketch.classifier()), images)
        scores, found = {}, {}
        for target in ("android", "edge_tpu"):
            content = convert(network, config=LOGITS[target])
            found[target] = targets.operator_versions(content)
            scores[target] = TFLiteClassifier(content).scores(images)
        self.assertIn("PRELU", found["edge_tpu"])
        self.assertNotIn("LEAKY_RELU", found["edge_tpu"])
        difference = np.abs(scores["edge_tpu"] - scores["android"]).max()
        step = TFLiteClassifier(content).output_scale
        self.assertLessEqual(difference, 2.01 * step)

    @parameterized.parameters(6.0, None)
    def test_relu_of_micro_that_nothing_takes_in_is_a_product(self, top):
        """Its RELU6 takes the grid of what comes in for that of what goes out."""
        sketch = Sketch(pixels=False)
        sketch.conv("conv")
        sketch("relu", "relu", "conv", top=top)
        sketch("add", "both", "conv", "relu")
        sketch.flatten("flat")
        sketch.dense("dense")
        images = networks.images((8, 8, 3), 40, seed=3)
        network = post_training(float_network(sketch.classifier()), images)
        self.assertNotEqual(network.grid("relu").scale, network.grid("conv").scale)
        usual, content = (
            convert(network, config=LOGITS[t]) for t in ("android", "micro")
        )
        found = targets.operator_versions(content)
        self.assertIn("MUL", found)
        self.assertNoCommonElements({"RELU", "RELU6"}, found)
        self.assertContainsSubset(
            {"RELU6" if top else "RELU"}, targets.operator_versions(usual)
        )
        scores = [TFLiteClassifier(each).scores(images) for each in (usual, content)]
        step = TFLiteClassifier(content).output_scale
        self.assertAllClose(*scores, rtol=0, atol=1.01 * step)


if __name__ == "__main__":
    tf.test.main()
