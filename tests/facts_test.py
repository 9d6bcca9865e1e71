import base64

import numpy as np
from absl.testing import parameterized
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.compat import tf
from dfq_tf.graph.description import ModelDescription
from dfq_tf.quantization import grids
from dfq_tf.quantization.calibration import with_ranges
from dfq_tf.quantization.post_training import float_network
from dfq_tf.reports import facts, layer_noise
from dfq_tf.settings import BitWidths, FileConfig
from dfq_tf.tflite import TFLiteClassifier, kernel_types, proof
from tests.graphs import Sketch
from tests.helpers import new_folder


def network():
    """Three kinds of BatchNormalization: folded, behind a sum, with a ReLU behind."""
    sketch = Sketch(pixels=False)
    first = sketch.conv("first", bias=False)
    sketch.normalization("first_bn")
    sketch("relu", "first_relu", top=6.0)
    sketch.conv("second")
    sketch.normalization("second_bn")
    shortcut = sketch.conv("shortcut", first, size=1)
    sketch("add", "sum", "second_bn", shortcut)
    sketch.normalization("sum_bn")
    sketch("relu", "sum_relu")
    sketch("global_average_pool", "pool")
    sketch.dense("logits", outputs=4)
    return sketch.classifier(output="logits")


class LayersTest(tf.test.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.source = network()
        cls.exact = float_network(cls.source)
        ranges = dict.fromkeys(grids.measured(cls.exact.graph), (-3.0, 5.0))
        widths = BitWidths(num_bits_weight=4, num_bits_last=8)
        cls.quantized = with_ranges(cls.exact, ranges, widths)
        cls.content = proof.convert(cls.quantized)
        graph, types = cls.exact.graph, kernel_types(cls.content)
        noise = []
        for name in cls.quantized.ranges:
            (before, *_) = graph.nodes[name].inputs
            is_one = grids.is_taken_in(graph, before)
            inside = [before, name] if is_one else [name]
            kinds = "+".join(graph.nodes[each].kind for each in inside)
            kernel = next((types[each] for each in inside if each in types), "")
            noise.append(layer_noise.LayerNoise(name, kinds, kernel, np.inf, 20.123))
        cls.noise = noise
        cls.rows = {
            row["name"]: row for row in facts.layers(cls.source, cls.quantized, noise)
        }

    def test_ranges_and_bits_are_the_networks(self):
        self.assertEqual([*self.rows], [*self.quantized.ranges])
        for name, row in self.rows.items():
            self.assertAllClose(
                (row["low"], row["high"]), self.quantized.ranges[name], atol=1e-5
            )
            self.assertEqual(row["bits"], 8)
            self.assertEqual((row["own_db"], row["total_db"]), (None, 20.12))

    def test_bits_of_kernels_are_not_those_that_store_them(self):
        widths = BitWidths(num_bits_weight=5)
        quantized = with_ranges(self.exact, self.quantized.ranges, widths)
        names = ("first", "second", "pool", "logits")
        noise = [layer_noise.LayerNoise(name, "", "int8", 1.0, 1.0) for name in names]
        rows = facts.layers(self.source, quantized, noise)
        self.assertEqual([row["kernel_bits"] for row in rows], [8, 5, None, 8])

    def stored(self, content):
        """Node -> bytes of its weights in a file, by its tensors."""
        model = schema.Model.GetRootAs(content, 0)
        subgraph = model.Subgraphs(0)
        stored = {}
        for i in range(subgraph.TensorsLength()):
            tensor = subgraph.Tensors(i)
            name, _, role = tensor.Name().decode().rpartition("/")
            size = model.Buffers(tensor.Buffer()).DataLength()
            if role in ("kernel", "bias"):
                stored[name] = stored.get(name, 0) + size
        return stored

    def test_bytes_of_two_bits_are_what_the_file_grows_by(self):
        ranges = self.quantized.ranges
        widths = BitWidths(num_bits_weight=2, num_bits_first=4, num_bits_last=2)
        quantized = with_ranges(self.exact, ranges, widths)
        content = proof.convert(quantized, config=FileConfig(favor="size"))
        types, stored = kernel_types(content), self.stored(content)
        self.assertContainsSubset({"int4", "int2"}, {*types.values()})
        for name, kind in types.items():
            found = facts._bytes(quantized.graph.nodes[name], kind, 4)
            self.assertEqual(found, stored[name], f"{name}, {kind}")

    def test_bytes_are_what_the_file_grows_by(self):
        stored = self.stored(self.content)
        self.assertEqual({each.weights for each in self.noise}, {"int4", "int8", ""})
        for layer in self.noise:
            inside = layer_noise.nodes_inside(self.quantized.graph, layer.name)
            size = sum(stored.get(each, 0) for each in inside)
            self.assertEqual(self.rows[layer.name]["bytes"], size, layer.name)

    def test_multiply_accumulates(self):
        self.assertEqual(self.rows["first"]["macs"], 8 * 8 * 3 * 3 * 3 * 4)
        self.assertEqual(self.rows["first_relu"]["macs"], 8 * 8 * 4)  # its BN
        self.assertEqual(self.rows["logits"]["macs"], 4 * 4)

    def test_memory_is_mean_and_deviations_of_the_training(self):
        """Of values with the mean and variance that a layer has stored."""
        nodes = self.source.graph.nodes

        def remembered(name, mean, spread):
            low, high = mean - 3 * spread, mean + 3 * spread
            return low.min(), high.max()

        second, sums = nodes["second_bn"].weights, nodes["sum_bn"].weights
        expected = {
            # It has gone into the kernel: what it gives.
            "second": remembered("second", second["beta"], second["gamma"]),
            # It stands behind a sum, whose values it has counted.
            "sum": remembered("sum", sums["mean"], np.sqrt(sums["variance"])),
            "sum_relu": np.maximum(remembered("sum", sums["beta"], sums["gamma"]), 0),
        }
        for name, ends in expected.items():
            row = self.rows[name]
            self.assertAllClose((row["bn_low"], row["bn_high"]), ends, atol=1e-4)
        for name in ("shortcut", "pool", "logits"):
            self.assertIsNone(self.rows[name]["bn_low"])

    def test_no_memory_where_layers_were_scaled(self):
        noise = [layer_noise.LayerNoise("sum", "add", "", 1.0, 1.0)]
        (row,) = facts.layers(self.source, self.quantized, noise, has_memory=False)
        self.assertIsNone(row["bn_low"])

    def test_interface_is_what_litert_says(self):
        said = TFLiteClassifier(self.content).interface()
        self.assertEqual(said["input"]["shape"], [1, 8, 8, 3])
        self.assertEqual(said["input"]["type"], "uint8")
        self.assertEqual(said["output"]["shape"], [1, 4])
        grid = self.quantized.grid("logits")
        self.assertAlmostEqual(said["output"]["scale"], grid.scale.item(), places=6)


class WidthsTest(parameterized.TestCase):
    @parameterized.parameters(
        ("relu", dict(top=6.0), True),
        ("elu", {}, False),
        ("layer_normalization", dict(epsilon=1e-3), False),
        ("depth_to_space", dict(block=2), False),
    )
    def test_some_layers_cannot_have_16_bits(self, kind, settings, takes):
        sketch = Sketch()
        sketch.conv("conv")
        sketch(kind, "behind", **settings)
        self.assertEqual(facts.takes_16_bits(sketch.graph()), takes)


class GeneratedTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ("logits", None, [0.2, 0.8]),
        ("logits", "sigmoid", [1 / (1 + 1), 0.8]),
        ("softmax", None, [0.0, np.log(4)]),
    )
    def test_confidence_is_the_probability_of_the_class(self, output, kind, expected):
        scores = np.array([[0.0, np.log(4)], [np.log(4), 0.0]], np.float32)
        description = ModelDescription((0.0,), (1.0,), output, ("a", "b"), kind)
        images = np.zeros((2, 4, 4, 1), np.uint8)
        kept = facts.generated(images, scores, description)
        self.assertEqual(kept["is_exclusive"], kind != "sigmoid")
        self.assertEqual([each["class"] for each in kept["shown"]], [1, 0])
        for each in kept["shown"]:
            self.assertAlmostEqual(each["confidence"], expected[1], places=3)
        self.assertEqual((kept["count"], kept["per_class"]), (2, [1, 1]))

    def test_pictures_are_the_images_and_means_of_large_ones(self):
        rng = np.random.default_rng(0)
        description = ModelDescription((0.0,), (1.0,), "logits", ("a", "b"))
        for shape, times in (((5, 7, 3), 1), ((162, 90, 3), 3)):
            images = rng.integers(0, 256, (60, *shape), np.uint8)
            kept = facts.generated(images, np.zeros((60, 2)), description)
            self.assertLen(kept["shown"], facts.NUM_SHOWN)
            png = base64.b64decode(kept["shown"][3]["png"])
            picture = tf.io.decode_png(png).numpy()
            expected = tf.nn.avg_pool2d(
                images[3:4].astype(np.float32), times, times, "VALID"
            )
            self.assertAllClose(picture, np.rint(expected[0]), atol=1)

    def test_what_is_kept_is_added_to(self):
        folder = new_folder()
        self.assertEqual(facts.read(folder, "df_q"), {})
        facts.add(folder, "df_q", a=1, b=[2])
        facts.add(folder, "df_q", b=3)
        self.assertEqual(facts.read(folder, "df_q"), {"a": 1, "b": 3})


if __name__ == "__main__":
    tf.test.main()
