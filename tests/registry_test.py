from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import UnsupportedLayerError
from dfq_tf.graph.graph import Graph
from dfq_tf.quantization import apply, registry
from dfq_tf.quantization.registry import LayerQuantizeConfig
from dfq_tf.settings import BitWidths
from tests import networks

layers = keras.layers


def image():
    return layers.Input((8, 8, 3), name="image")


def conv(x, name, **kwargs):
    return layers.Conv2D(4, 3, padding="same", name=name, **kwargs)(x)


def graph_of(inputs, output):
    return Graph.from_model(keras.Model(inputs, output))


def quantized(graph):
    return [
        n.name for n in graph.nodes.values() if registry.has_quantized_output(graph, n)
    ]


class QuantizedOutputTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        layers.ReLU,
        lambda name: layers.ReLU(6.0, name=name),
        lambda name: layers.Activation("relu", name=name),
    )
    def test_conv_is_not_where_one_relu_takes_it_in(self, relu):
        x = image()
        graph = graph_of(x, relu(name="relu")(conv(x, "conv")))
        self.assertEqual(quantized(graph), ["relu"])

    def test_conv_with_two_consumers_is(self):
        x = image()
        y = conv(x, "conv")
        z = layers.Add(name="add")([layers.ReLU(name="relu")(y), y])
        self.assertEqual(quantized(graph_of(x, z)), ["conv", "relu", "add"])

    def test_conv_with_an_activation_of_its_own_is(self):
        x = image()
        y = layers.ReLU(6.0, name="relu6")(conv(x, "conv", activation="relu"))
        self.assertEqual(quantized(graph_of(x, y)), ["conv", "relu6"])

    def test_conv_before_a_leaky_relu_is(self):
        x = image()
        y = layers.LeakyReLU(0.1, name="leaky")(conv(x, "conv"))
        self.assertEqual(quantized(graph_of(x, y)), ["conv", "leaky"])

    @parameterized.parameters(layers.Add, layers.Multiply)
    def test_add_and_multiply_are_not_where_one_relu_takes_them_in(self, merge):
        x = image()
        y = merge(name="merge")([conv(x, "conv1"), conv(x, "conv2")])
        graph = graph_of(x, layers.ReLU(name="relu")(y))
        self.assertCountEqual(quantized(graph), ["conv1", "conv2", "relu"])

    def test_layers_that_only_move_values_are_not(self):
        x = image()
        y = layers.ZeroPadding2D()(layers.MaxPooling2D()(conv(x, "conv")))
        y = layers.Flatten()(layers.AveragePooling2D()(y))
        graph = graph_of(x, layers.Reshape((1, 1, -1))(y))
        self.assertEqual(quantized(graph), ["conv"])
        self.assertEqual(registry.range_owner(graph, graph.output_name), "conv")

    def test_global_average_is(self):
        x = image()
        y = layers.GlobalAveragePooling2D(name="mean")(conv(x, "conv"))
        self.assertEqual(quantized(graph_of(x, y)), ["conv", "mean"])


class QuantizeConfigsTest(tf.test.TestCase):
    def test_bits_follow_from_the_node(self):
        x = image()
        y = layers.ReLU(name="relu")(conv(x, "conv1"))
        y = layers.ReLU(name="relu2")(conv(y, "conv2"))
        graph = graph_of(x, layers.Flatten(name="flat")(conv(y, "logits")))
        widths = BitWidths(4, 6, False, num_bits_first=5, num_bits_last=3)
        configs = registry.quantize_configs(graph, widths)
        self.assertEqual(list(configs), list(graph.nodes))
        bits = {
            name: (c.kernel, c.num_bits_weight, c.num_bits_activation)
            for name, c in configs.items()
        }
        self.assertEqual(
            bits,
            {
                "image": (None, None, None),
                "conv1": ("kernel", 5, None),
                "relu": (None, None, 6),
                "conv2": ("kernel", 4, None),
                "relu2": (None, None, 6),
                "logits": ("kernel", 3, 8),
                "flat": (None, None, None),
            },
        )
        self.assertEmpty(configs["conv1"].get_output_quantizers(None))
        self.assertEqual(configs["relu"].get_output_quantizers(None)[0].num_bits, 6)
        self.assertEqual(configs["logits"].get_output_quantizers(None)[0].num_bits, 8)

    def test_per_channel_is_that_of_the_widths(self):
        x = image()
        graph = graph_of(x, conv(x, "conv"))
        for per_channel in (False, True):
            widths = BitWidths(per_channel=per_channel)
            config = registry.quantize_configs(graph, widths)["conv"]
            self.assertEqual(config.per_channel, per_channel)


# All of them different.
WIDTHS = BitWidths(
    num_bits_weight=4, num_bits_first=7, num_bits_last=6, num_bits_depthwise=5
)


def weight_bits(graph):
    return {
        name: registry.weight_bits(graph, node, WIDTHS)
        for name, node in graph.nodes.items()
        if node.kind in registry.KERNELS
    }


class WeightBitsTest(tf.test.TestCase, parameterized.TestCase):
    def test_first_last_and_depthwise_kernels_have_their_own(self):
        x = image()
        y = conv(x, "stem")
        y = layers.DepthwiseConv2D(3, padding="same", name="depth")(y)
        y = layers.Add(name="add")([conv(y, "wide"), conv(y, "narrow")])
        graph = graph_of(x, layers.Flatten()(conv(y, "logits")))
        self.assertEqual(
            weight_bits(graph),
            {"stem": 7, "depth": 5, "wide": 4, "narrow": 4, "logits": 6},
        )

    def test_depthwise_kernels_at_either_end_are_depthwise(self):
        x = image()
        y = layers.DepthwiseConv2D(3, name="depth1")(x)
        y = conv(conv(conv(y, "conv1"), "conv2"), "conv3")
        graph = graph_of(x, layers.DepthwiseConv2D(3, name="depth2")(y))
        self.assertEqual(
            weight_bits(graph),
            {"depth1": 5, "conv1": 7, "conv2": 4, "conv3": 6, "depth2": 5},
        )

    @parameterized.parameters(*networks.NETWORKS)
    def test_first_reads_pixels_and_last_gives_the_logits(self, name):
        classifier = networks.build(name)
        graph, _ = apply.integer_ready(classifier)
        bits = weight_bits(graph)
        stem, *_ = (
            la for la in classifier.model.layers if isinstance(la, layers.Conv2D)
        )
        logits = classifier.model.layers[-1]
        self.assertIsInstance(logits, layers.Dense)
        self.assertEqual(bits.pop(stem.name), 7)
        self.assertEqual(bits.pop(f"{logits.name}_as_conv"), 6)
        for name, each in bits.items():
            is_depthwise = graph.nodes[name].kind == "DepthwiseConv2D"
            self.assertEqual(each, 5 if is_depthwise else 4, name)


class ActivationBitsTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters((4, 4, 8), (6, 6, 8), (8, 8, 8), (16, 16, 16))
    def test_pixels_have_eight_and_logits_at_least_eight(self, bits, inner, logits):
        x = image()
        y = layers.Activation("linear", name="pixels")(x)
        y = layers.ReLU(name="relu")(conv(y, "conv"))
        y = layers.Add(name="add")([y, conv(y, "conv2")])
        graph = graph_of(x, layers.Flatten(name="flat")(conv(y, "logits")))
        self.assertEqual(
            registry.activation_bits(graph, BitWidths(num_bits_activation=bits)),
            {
                "pixels": 8,
                "relu": inner,
                "conv2": inner,
                "add": inner,
                "logits": logits,
            },
        )

    @parameterized.parameters(4, 8, 16)
    def test_outputs_tied_to_the_logits_have_their_bits(self, bits):
        x = image()
        y = layers.Activation("linear", name="pixels")(x)
        y = layers.ReLU(name="relu")(conv(y, "conv"))
        a, b = (layers.Flatten()(conv(y, name)) for name in "ab")
        graph = graph_of(x, layers.Concatenate(name="ab")([a, b]))
        most = max(bits, 8)
        self.assertEqual(
            registry.activation_bits(graph, BitWidths(num_bits_activation=bits)),
            {"pixels": 8, "relu": bits, "a": most, "b": most, "ab": most},
        )

    @parameterized.parameters((4, 8), (16, 16))
    def test_outputs_tied_to_the_pixels_have_the_most_bits(self, bits, most):
        x = image()
        y = layers.Activation("linear", name="pixels")(x)
        y = layers.Concatenate(name="both")([y, conv(y, "conv")])
        y = layers.ReLU(name="relu")(conv(y, "conv2"))
        graph = graph_of(x, conv(y, "logits"))
        self.assertEqual(
            registry.activation_bits(graph, BitWidths(num_bits_activation=bits)),
            {
                "pixels": most,
                "conv": most,
                "both": most,
                "relu": bits,
                "logits": max(8, bits),
            },
        )

    def test_ties_among_others_have_the_bits_of_activations(self):
        x = image()
        y = layers.Concatenate(name="ab")([conv(x, "a"), conv(x, "b")])
        bits = registry.activation_bits(
            graph_of(x, conv(y, "logits")), BitWidths(num_bits_activation=4)
        )
        self.assertEqual(bits, {"a": 4, "b": 4, "ab": 4, "logits": 8})


class TiedOutputsTest(tf.test.TestCase):
    def test_concatenation_shares_the_range_of_its_inputs(self):
        x = image()
        y = layers.MaxPooling2D()(conv(x, "conv1"))
        z = layers.MaxPooling2D()(layers.ReLU(name="relu")(conv(x, "conv2")))
        graph = graph_of(x, layers.Concatenate(name="concat")([y, z]))
        self.assertEqual(registry.tied_outputs(graph), [{"conv1", "relu", "concat"}])

    def test_concatenations_with_a_common_input_share_one_range(self):
        x = image()
        a, b, c = (conv(x, name) for name in "abc")
        ab = layers.Concatenate(name="ab")([a, b])
        bc = layers.Concatenate(name="bc")([b, c])
        output = layers.Add(name="add")([ab, bc])
        groups = registry.tied_outputs(graph_of(x, output))
        self.assertEqual(groups, [{"a", "b", "c", "ab", "bc"}])

    def test_separate_concatenations_do_not(self):
        x = image()
        a, b, c, d = (conv(x, name) for name in "abcd")
        ab = layers.Concatenate(name="ab")([a, b])
        cd = layers.Concatenate(name="cd")([c, d])
        output = layers.Add(name="add")([ab, cd])
        groups = registry.tied_outputs(graph_of(x, output))
        self.assertCountEqual(groups, [{"a", "b", "ab"}, {"c", "d", "cd"}])

    def test_networks_without_concatenation_have_none(self):
        x = image()
        self.assertEmpty(registry.tied_outputs(graph_of(x, conv(x, "conv"))))


class CheckSupportedTest(tf.test.TestCase, parameterized.TestCase):
    def test_names_the_layer_and_what_can_be_quantized(self):
        x = image()
        y = layers.UpSampling2D(name="bigger")(conv(x, "conv"))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            r"layer bigger \(UpSampling2D\) cannot be quantized: there is no integer "
            r"form.*What can be: Conv2D, DepthwiseConv2D, .*Concatenate",
        ):
            registry.check_supported(graph_of(x, y))

    @parameterized.parameters("elu", "gelu", "softplus")
    def test_names_the_activation(self, activation):
        x = image()
        with self.assertRaisesRegex(
            UnsupportedLayerError, rf"layer conv \(Conv2D\).*activation is {activation}"
        ):
            registry.check_supported(
                graph_of(x, conv(x, "conv", activation=activation))
            )
        y = layers.Activation(activation, name="act")(conv(x, "conv2"))
        with self.assertRaisesRegex(
            UnsupportedLayerError, rf"layer act .*activation is {activation}"
        ):
            registry.check_supported(graph_of(x, y))

    @parameterized.parameters(
        dict(max_value=0.0), dict(negative_slope=0.1), dict(threshold=0.5)
    )
    def test_refuses_unusual_relus(self, **kwargs):
        x = image()
        y = layers.ReLU(name="odd", **kwargs)(conv(x, "conv"))
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer odd \(ReLU\).*only a ReLU without slope"
        ):
            registry.check_supported(graph_of(x, y))

    @parameterized.parameters(layers.Add, layers.Multiply)
    def test_refuses_merges_of_three(self, merge):
        # TFLite adds two tensors at a time; its sum of several is a float operator.
        x = image()
        y = merge(name="sum")([conv(x, name) for name in "abc"])
        with self.assertRaisesRegex(
            UnsupportedLayerError, r"layer sum .*cannot be quantized: it has 3 inputs"
        ):
            registry.check_supported(graph_of(x, y))


class LayerQuantizeConfigTest(tf.test.TestCase):
    def test_config_gives_the_arguments_back(self):
        config = dict(
            kernel="depthwise_kernel",
            num_bits_weight=5,
            num_bits_activation=7,
            per_channel=True,
        )
        self.assertEqual(LayerQuantizeConfig(**config).get_config(), config)

    def test_depthwise_kernel_gets_a_depthwise_quantizer(self):
        layer = layers.DepthwiseConv2D(3)
        layer.build((None, 8, 8, 3))
        config = LayerQuantizeConfig("depthwise_kernel", 8, 8, True)
        ((weight, quantizer),) = config.get_weights_and_quantizers(layer)
        self.assertIs(weight, layer.depthwise_kernel)
        self.assertTrue(quantizer.is_depthwise)


if __name__ == "__main__":
    tf.test.main()
