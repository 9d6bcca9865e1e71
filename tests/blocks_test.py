"""Which layers stand together when blocks are reconstructed."""

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.graph import blocks_of, compute
from dfq_tf.quantization.post_training import float_network
from tests import graphs, networks
from tests.graphs import Sketch


def layers_of(blocks):
    """The names of the nodes of each block."""
    return [list(block.nodes)[1:] for block in blocks]


def plain():
    sketch = Sketch()
    sketch("relu", "relu_a", sketch.conv("a"))
    sketch("max_pool", "pool", size=(2, 2), strides=(2, 2))
    sketch("relu", "relu_b", sketch.conv("b"))
    sketch.flatten("flat")
    sketch.dense("logits")
    return sketch.graph()


def residual():
    """Post-activation, the second with a projection."""
    sketch = Sketch()
    one = sketch("relu", "stem", sketch.conv("stem_conv"))
    sketch("relu", "r1", sketch.conv("a1", one))
    two = sketch("relu", "out_a", sketch("add", "sum_a", one, sketch.conv("a2")))
    sketch("relu", "r2", sketch.conv("b1", two, outputs=6))
    short = sketch.conv("short", two, outputs=6, size=1)
    sketch("add", "sum_b", sketch.conv("b2", "r2", outputs=6), short)
    sketch("global_average_pool", "pool")
    sketch.dense("logits")
    return sketch.graph()


def inverted():
    """Two inverted bottlenecks, the second with a merge; then layers in a row."""
    sketch = Sketch()
    sketch("relu", "stem", sketch.conv("stem_conv", outputs=8), top=6.0)
    sketch.depthwise("first", padding="same")
    source = sketch.conv("first_out", outputs=4, size=1)
    for name in ("a", "b"):
        sketch("relu", f"{name}_wide", sketch.conv(f"{name}_in", outputs=8, size=1))
        sketch("relu", f"{name}_deep", sketch.depthwise(f"{name}_dw", padding="same"))
        sketch.conv(f"{name}_out", outputs=4, size=1)
        if name == "b":
            sketch("add", "sum", source, "b_out")
        source = sketch.last
    sketch("relu", "wide", sketch.conv("widens", outputs=12, size=1))
    sketch("global_average_pool", "pool")
    sketch.dense("logits")
    return sketch.graph()


class BlocksTest(tf.test.TestCase, parameterized.TestCase):
    def test_each_layer_of_a_row_is_a_block(self):
        self.assertEqual(
            layers_of(blocks_of(plain())),
            [["pixels", "a", "relu_a", "pool"], ["b", "relu_b", "flat"], ["logits"]],
        )

    def test_what_is_merged_is_one_block_and_a_pool_goes_with_what_reads_it(self):
        self.assertEqual(
            layers_of(blocks_of(residual())),
            [
                ["pixels", "stem_conv", "stem"],
                ["a1", "r1", "a2", "sum_a", "out_a"],
                ["b1", "r2", "short", "b2", "sum_b"],
                ["pool", "logits"],
            ],
        )

    def test_inverted_bottlenecks_are_blocks_with_and_without_a_merge(self):
        a, b = (
            [f"{n}_in", f"{n}_wide", f"{n}_dw", f"{n}_deep", f"{n}_out"] for n in "ab"
        )
        self.assertEqual(
            layers_of(blocks_of(inverted())),
            [
                ["pixels", "stem_conv", "stem"],
                ["first", "first_out"],
                a,
                [*b, "sum"],
                ["widens", "wide"],
                ["pool", "logits"],
            ],
        )

    def test_a_pool_at_the_end_has_no_block_of_its_own(self):
        sketch = Sketch()
        sketch.conv("a")
        sketch("global_average_pool", "pool")
        self.assertEqual(
            layers_of(blocks_of(sketch.graph())), [["pixels", "a", "pool"]]
        )

    def test_a_network_without_kernels_has_none(self):
        sketch = Sketch()
        sketch("global_average_pool", "pool")
        self.assertEmpty(blocks_of(sketch.graph()))

    @parameterized.parameters("wrn_10_1", "densenet_like", "mobilenet_v3_like")
    def test_one_behind_the_other_they_are_the_network(self, name):
        classifier = float_network(networks.build(name))
        graph = classifier.graph
        blocks = blocks_of(graph)
        self.assertGreater(len(blocks), 3)
        names = [name for block in layers_of(blocks) for name in block]
        self.assertEqual(names, list(graph.nodes)[1:])
        images = graphs.noise(graph.image.shape, 2).astype(np.float32)
        values = pixels = classifier.description.normalize(tf.constant(images))
        for block in blocks:
            self.assertIn(block.image.name, graph.nodes)
            (values,) = compute(block, values, [block.output])
        self.assertAllEqual(values, compute(graph, pixels, [graph.output])[0])


if __name__ == "__main__":
    tf.test.main()
