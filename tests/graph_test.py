"""Graphs themselves: order, replacing, the user's layers, pruning, errors."""

import dataclasses

import numpy as np
from absl.testing import absltest, parameterized

from dfq_tf.graph import layers
from dfq_tf.graph.nodes import Graph, unique_name

IMAGE = layers.image("image", (4, 4, 2), layers=("input",))


def node(kind, name, *sources, of=None, **settings):
    """A node that stands for a layer of its name, or for those of `of`."""
    owners = (name,) if of is None else of
    return layers.node(kind, name, sources, settings, layers=owners)


def diamond():
    """Two branches of the image that meet: left, right, both, flat."""
    left, right = node("sigmoid", "left", IMAGE), node("tanh", "right", IMAGE)
    both = node("subtract", "both", left, right)
    flat = node("reshape", "flat", both, shape=(-1,))
    return Graph([IMAGE, left, right, both, flat], "flat")


class GraphTest(parameterized.TestCase):
    def test_nodes_keep_their_order(self):
        graph = diamond()
        self.assertEqual(list(graph.nodes), ["image", "left", "right", "both", "flat"])
        self.assertIs(graph.image, IMAGE)
        self.assertEqual(graph.last.name, "flat")
        names = [source.name for source in graph.sources(graph.nodes["both"])]
        self.assertEqual(names, ["left", "right"])

    def test_what_leads_nowhere_is_left_out(self):
        nodes = list(diamond().nodes.values())
        graph = Graph(nodes, "left")
        self.assertEqual(list(graph.nodes), ["image", "left"])
        self.assertEqual([n.name for n in graph.consumers("image")], ["left"])
        # The image stays, even if it is all there is.
        self.assertEqual(list(Graph(nodes, "image").nodes), ["image"])

    def test_consumers_are_each_listed_once_in_order(self):
        square = node("multiply", "square", IMAGE, IMAGE)
        curve = node("tanh", "curve", IMAGE)
        end = node("add", "end", curve, square)
        graph = Graph([IMAGE, square, curve, end], "end")
        names = [n.name for n in graph.consumers("image")]
        self.assertEqual(names, ["square", "curve"])
        self.assertEqual(list(graph.consumers("end")), [])

    @parameterized.named_parameters(
        ("twice", [IMAGE, node("relu", "a", IMAGE), node("tanh", "a", IMAGE)], "a"),
        ("too_early", [IMAGE, node("relu", "b", node("relu", "a", IMAGE))], "b"),
        ("two_images", [IMAGE, layers.image("other", (4, 4, 2))], "other"),
        ("no_image", [node("relu", "a", IMAGE)], "a"),
    )
    def test_nodes_that_are_no_graph_are_an_error(self, nodes, named):
        with self.assertRaisesRegex(ValueError, f"node {named}"):
            Graph(nodes, nodes[-1].name)

    def test_digest_is_of_what_it_computes(self):
        def network(*, factor=1.0, name="curve", kind="tanh", slope=0.1, swapped=False):
            kernel = np.ones((2, 3)) * factor
            weights = {"kernel": kernel, "bias": np.zeros(3)}
            dense = layers.node("dense", "dense", [IMAGE], weights=weights)
            leaky = node("leaky_relu", "leaky", dense, slope=slope)
            curve = node(kind, name, dense)
            inputs = (curve, leaky) if swapped else (leaky, curve)
            end = node("subtract", "end", *inputs)
            return Graph([IMAGE, dense, leaky, curve, end], "end").digest()

        self.assertEqual(network(), network())
        self.assertEqual(network(name="other"), network())
        changes = (
            dict(factor=np.nextafter(np.float32(1), np.float32(2))),
            dict(kind="sigmoid"),
            dict(slope=0.2),
            dict(swapped=True),
        )
        self.assertLen({network(), *(network(**change) for change in changes)}, 5)
        ends = [Graph(diamond().nodes.values(), name).digest() for name in ("both",)]
        self.assertNotIn(diamond().digest(), ends)

    def test_nothing_can_be_changed(self):
        graph = diamond()
        with self.assertRaises(TypeError):
            graph.nodes["new"] = IMAGE
        with self.assertRaises(TypeError):
            graph.nodes["flat"].settings["shape"] = (3,)
        with self.assertRaises(dataclasses.FrozenInstanceError):
            graph.nodes["flat"].name = "other"

    def test_replaced_exchanges_and_removes_nodes(self):
        graph = diamond()
        relu = node("relu", "relu", graph.nodes["both"], of=())
        changed = graph.replaced(
            {"flat": [relu], "right": []}, {"flat": "relu", "right": "image"}
        )
        self.assertEqual(list(changed.nodes), ["image", "left", "both", "relu"])
        self.assertEqual(changed.output, "relu")
        self.assertEqual(changed.nodes["both"].inputs, ("left", "image"))
        # The graph itself is as it was.
        self.assertEqual(list(graph.nodes), ["image", "left", "right", "both", "flat"])
        self.assertEqual(graph.nodes["both"].inputs, ("left", "right"))

    def test_replaced_follows_names_to_the_end(self):
        graph = diamond()
        gone = {"both": "left", "flat": "both"}
        changed = graph.replaced({"both": [], "flat": []}, gone)
        self.assertEqual(changed.output, "left")
        self.assertEqual(list(changed.nodes), ["image", "left"])

    def test_layers_go_along(self):
        graph = diamond()
        first = node("relu", "first", graph.nodes["both"], of=())
        second = node("reshape", "flat", first, of=("own",), shape=(-1,))
        changed = graph.replaced({"flat": [first, second]})
        # A new node without layers has those of the node in whose place it stands.
        self.assertEqual(changed.nodes["first"].layers, ("flat",))
        self.assertEqual(changed.nodes["flat"].layers, ("own",))
        # One that is read instead of another one stands for its layers too.
        shorter = changed.replaced(
            {"first": [], "both": []}, {"first": "both", "both": "left"}
        )
        self.assertEqual(shorter.nodes["left"].layers, ("left", "flat", "both"))
        self.assertEqual(shorter.nodes["flat"].inputs, ("left",))
        again = shorter.replaced({"flat": []}, {"flat": "left"})
        self.assertEqual(again.nodes["left"].layers, ("left", "flat", "both", "own"))

    def test_weights_are_exchanged_as_float32(self):
        kernel = np.ones((2, 3))
        dense = layers.node("dense", "dense", [IMAGE], weights={"kernel": kernel})
        graph = Graph([IMAGE, dense], "dense")
        changed = graph.with_weights(
            {"dense": {"kernel": 2 * kernel, "bias": [1, 2, 3]}}
        )
        weights = changed.nodes["dense"].weights
        self.assertEqual({w.dtype for w in weights.values()}, {np.dtype("float32")})
        self.assertEqual(weights["kernel"].sum(), 12)
        self.assertEqual(weights["bias"].tolist(), [1, 2, 3])
        self.assertEqual(list(graph.nodes["dense"].weights), ["kernel"])
        self.assertEqual(changed.nodes["dense"].layers, graph.nodes["dense"].layers)

    def test_node_that_reads_another_one_is_the_same_otherwise(self):
        graph = diamond()
        moved = graph.nodes["both"].reading("right", "left")
        self.assertEqual(moved.inputs, ("right", "left"))
        self.assertEqual(moved.reading("left", "right"), graph.nodes["both"])

    def test_unique_name_takes_the_first_free_number(self):
        self.assertEqual(unique_name([], "a"), "a")
        self.assertEqual(unique_name(["b"], "a"), "a")
        self.assertEqual(unique_name(["a", "a_2", "a_4"], "a"), "a_3")


if __name__ == "__main__":
    absltest.main()
