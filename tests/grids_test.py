import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.errors import ConfigError, UnsupportedLayerError
from dfq_tf.graph import running
from dfq_tf.graph.layers import KINDS, Exactly, Kind, NoFurther
from dfq_tf.graph.nodes import Graph
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization import grids
from dfq_tf.quantization.post_training import float_network
from dfq_tf.quantization.quantizers import ActivationQuantizer
from dfq_tf.settings import BitWidths, MixedWidths
from tests import networks
from tests.graphs import PIXELS, Sketch

# What a function of one value demands of its grid, as a table of its own.
DEMANDING = {
    "sigmoid": ("sigmoid", {}, Exactly(0.0, 255 / 256)),
    "tanh": ("tanh", {}, Exactly(-1.0, 127 / 128)),
    "top 1": ("relu", {"top": 1.0}, NoFurther(1.0)),
    "top 2.5": ("relu", {"top": 2.5}, NoFurther(2.5)),
}
POOL = dict(size=(2, 2), strides=(2, 2))
# Nodes that move, pick or average integers, in a chain behind an image of 8 x 8.
MOVING = {
    "nothing": (),
    "max_pool": (("max_pool", POOL),),
    "average_pool": (("average_pool", POOL),),
    "pad": (("pad", {"margins": ((1, 0), (0, 1))}),),
    "reshape": (("reshape", {"shape": (4, 16, 4)}),),
    "all": (
        ("max_pool", POOL),
        ("pad", {"margins": ((1, 1), (1, 1))}),
        ("average_pool", POOL),
        ("reshape", {"shape": (-1,)}),
    ),
    "global_max_pool": (("global_max_pool", {}),),
}


def fake_quantized(low, high, num_bits):
    """All values that the student's quantizer gives, in order."""
    margin = 0.1 * (high - low)
    inputs = np.linspace(low - margin, high + margin, 2 ** (num_bits + 5) + 1)
    quantizer = ActivationQuantizer(num_bits)
    weights = {
        "min": tf.constant(low, tf.float32),
        "max": tf.constant(high, tf.float32),
    }
    outputs = quantizer(tf.constant(inputs, tf.float32), False, weights).numpy()
    step = (high - low) / 2**num_bits
    outputs = np.unique(outputs)
    return outputs[np.diff(outputs, prepend=-np.inf) > 0.1 * step]


class ActivationGridTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(
        num_bits=(2, 3, 4, 5, 6, 7, 8),
        limits=((-1.0, 3.0), (0.0, 6.0), (-2.5, 0.0), (-0.37, 1.91), (-1e-4, 0.9)),
    )
    def test_holds_the_values_of_the_fake_quantization(self, num_bits, limits):
        grid = grids.activation_grid(*limits, num_bits)
        self.assertEqual(grid.highest, 127)
        self.assertEqual(grid.lowest, 127 - (2**num_bits - 1))
        self.assertBetween(grid.zero_point, grid.lowest, grid.highest)
        self.assertEqual((grid.scale.dtype, grid.scale.shape), (np.float32, (1,)))
        values = grid.scale * (np.arange(grid.lowest, 128) - grid.zero_point)
        self.assertAllClose(values, fake_quantized(*limits, num_bits), atol=1e-6)
        self.assertAllClose(grid.ends, (values[0], values[-1]), atol=1e-6)

    def test_holds_them_wherever_the_range_lies(self):
        rng = np.random.default_rng(0)
        for low, high in zip(-rng.exponential(size=50), rng.exponential(size=50)):
            grid = grids.activation_grid(low, high, 4)
            values = grid.scale * (np.arange(112, 128) - grid.zero_point)
            self.assertAllClose(values, fake_quantized(low, high, 4), atol=1e-5)

    def test_sixteen_bits_are_symmetric(self):
        grid = grids.activation_grid(-3.0, 3.0, 16)
        self.assertEqual(
            (grid.lowest, grid.zero_point, grid.highest), (-32767, 0, 32767)
        )
        self.assertAllClose(grid.scale, [3 / 32767], rtol=1e-6)
        values = fake_quantized(-3.0, 3.0, 16)
        self.assertAllClose(values, grid.scale * np.arange(-32767, 32768), atol=1e-6)

    def test_only_sixteen_bits_are(self):
        self.assertTrue(grids.is_symmetric(16))
        self.assertFalse(any(map(grids.is_symmetric, range(2, 9))))

    @parameterized.parameters(0, 1, 120, 255)
    def test_eight_bits_among_sixteen_mean_the_same(self, mean):
        grid = grids.activation_grid(-mean / 64, (255 - mean) / 64, 8)
        finer = grids.as_int16(grid)
        integers = np.arange(grid.lowest, 128) - grid.zero_point
        self.assertAllEqual(
            finer.scale * (128 * integers).astype(np.float32),
            grid.scale * integers.astype(np.float32),
        )
        self.assertEqual(
            (finer.zero_point, finer.lowest, finer.highest), (0, -32767, 32767)
        )
        self.assertLessEqual(np.abs(128 * integers).max(), 32767)

    def test_the_same_grid_has_scale_and_zero_point(self):
        grid = grids.activation_grid(-1.0, 3.0, 8)
        self.assertTrue(grid.same_as(grids.activation_grid(-1.0, 3.0, 8)))
        other = dataclasses.replace(grid, zero_point=grid.zero_point + 1)
        self.assertFalse(grid.same_as(other))
        other = dataclasses.replace(grid, scale=grid.scale * np.float32(1.00001))
        self.assertFalse(grid.same_as(other))


class MeasuredTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.product(top=(None, 6.0, 1.0), kind=("conv", "depthwise", "dense"))
    def test_a_kernel_is_not_where_one_relu_takes_it_in(self, top, kind):
        sketch = Sketch()
        getattr(sketch, kind)("kernel")
        sketch("relu", "relu", top=top)
        self.assertEqual(grids.measured(sketch.graph()), ["pixels", "relu"])
        self.assertTrue(grids.is_taken_in(sketch.graph(), "kernel"))
        self.assertNotIn("kernel", grids.owners(sketch.graph()))

    @parameterized.parameters("add", "subtract", "multiply")
    def test_a_merge_is_not_where_one_relu_takes_it_in(self, kind):
        sketch = Sketch()
        a, b = sketch.conv("a", "pixels"), sketch.conv("b", "pixels")
        sketch(kind, "merge", a, b)
        sketch("relu", "relu")
        self.assertEqual(grids.measured(sketch.graph()), ["pixels", "a", "b", "relu"])
        self.assertTrue(grids.is_taken_in(sketch.graph(), "merge"))

    def test_one_with_two_readers_is(self):
        sketch = Sketch()
        conv = sketch.conv("conv")
        sketch("add", "add", sketch("relu", "relu"), conv)
        self.assertEqual(
            grids.measured(sketch.graph()), ["pixels", "conv", "relu", "add"]
        )

    def test_one_that_a_merge_reads_twice_is(self):
        sketch = Sketch()
        sketch.conv("conv")
        sketch("add", "add", "conv", "conv")
        sketch("relu", "relu")
        self.assertEqual(grids.measured(sketch.graph()), ["pixels", "conv", "relu"])

    def test_the_network_s_output_is(self):
        sketch = Sketch()
        sketch("relu", "relu", sketch.conv("conv"))
        graph = Graph(sketch.nodes.values(), "conv")
        self.assertEqual(grids.measured(graph), ["pixels", "conv"])

    def test_only_the_first_of_two_relus_takes_it_in(self):
        sketch = Sketch()
        sketch.conv("conv")
        sketch("relu", "relu")
        sketch("relu", "relu6", top=6.0)
        self.assertEqual(grids.measured(sketch.graph()), ["pixels", "relu", "relu6"])

    @parameterized.parameters(
        ("leaky_relu", {"slope": 0.1}), ("sigmoid", {}), ("tanh", {})
    )
    def test_a_kernel_before_anything_else_is(self, kind, settings):
        sketch = Sketch()
        sketch.conv("conv")
        sketch(kind, "curve", **settings)
        self.assertEqual(grids.measured(sketch.graph()), ["pixels", "conv", "curve"])

    def test_what_only_moves_values_is_not(self):
        sketch = Sketch()
        sketch.conv("conv")
        for kind, settings in MOVING["all"]:
            sketch(kind, kind, **settings)
        graph = sketch.graph()
        # An average has new values, though on the same grid.
        self.assertEqual(grids.measured(graph), ["pixels", "conv", "average_pool"])
        self.assertEqual(grids.owners(graph)[graph.output], "conv")

    def test_what_gives_new_values_is(self):
        sketch = Sketch()
        a = sketch.conv("a", "pixels")
        sketch("concatenate", "both", a, sketch.conv("b", "pixels"))
        sketch("requantize", "again")
        sketch("global_average_pool", "mean")
        self.assertEqual(
            grids.measured(sketch.graph()),
            ["pixels", "a", "b", "both", "again", "mean"],
        )


class CheckWidthsTest(tf.test.TestCase, parameterized.TestCase):
    def pooled(self, side, kind="global_average_pool", **settings):
        sketch = Sketch((side, 256, 1))
        sketch("max_pool", "moved", size=(1, 1), strides=(1, 1))
        sketch(kind, "mean", **settings)
        return sketch.graph()

    @parameterized.parameters(
        ("global_average_pool", {}),
        ("average_pool", dict(size=(257, 256), strides=(1, 1))),
    )
    def test_sums_of_16_bits_must_fit_into_32(self, kind, settings):
        # 256 * 256 * 32767 is below 2 ** 31, 257 * 256 * 32767 is not.
        large, small = self.pooled(257, kind, **settings), self.pooled(256)
        grids.check_widths(small, BitWidths(8, 16))
        grids.check_widths(large, BitWidths(8, 8))
        with self.assertRaisesRegex(
            UnsupportedLayerError,
            rf"layer my mean \({kind}\) .* averages 65,792 values of 16 bits, .*A8",
        ) as caught:
            grids.check_widths(large, BitWidths(8, 16))
        self.assertLen(caught.exception.problems, 1)

    def test_bits_of_a_kernel_that_is_not_there_are_refused(self):
        sketch = Sketch()
        sketch.conv("stem")
        graph = sketch.graph()
        grids.check_widths(graph, MixedWidths(layer_bits={"stem": 4}))
        with self.assertRaisesRegex(
            ConfigError, "^layer_bits names 'nope', which is no node with .* are stem$"
        ):
            grids.check_widths(graph, MixedWidths(layer_bits={"nope": 4}))

    def test_a_table_has_no_16_bits(self):
        kind = Kind(says="x", compute=lambda node, inputs, weights: inputs[0])
        with mock.patch.dict(KINDS, {"odd": kind}):
            sketch = Sketch()
            sketch("odd", "curve")
            grids.check_widths(sketch.graph(), BitWidths())
            with self.assertRaisesRegex(
                UnsupportedLayerError, "my curve .odd. .* table of 256 values"
            ):
                grids.check_widths(sketch.graph(), BitWidths(8, 16))


class SlopesTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(
        [(0.1, -0.5, 0.3)], [(0.0, 0.0, 0.0)], [(-3.0, 1e-9, 2.0)]
    )
    def test_integers_are_as_near_as_they_can_be(self, slopes):
        integers, scale = grids.slope_integers(slopes)
        self.assertEqual(integers.dtype, np.int8)
        self.assertAllClose(integers * scale, slopes, rtol=0, atol=0.501 * scale)
        most = np.abs(slopes).max()
        self.assertAllClose(scale, most / 127 if most else 1.0)

    def test_rounded_slopes_are_rounded_to_themselves(self):
        sketch = Sketch()
        sketch("prelu", "prelu", slopes=(0.1, -0.7, 0.33))
        once = grids.with_rounded_slopes(sketch.graph())
        slopes = once.nodes["prelu"].settings["slopes"]
        self.assertAllClose(slopes, (0.1, -0.7, 0.33), rtol=0, atol=0.5 * 0.7 / 127)
        self.assertNotEqual(slopes, (0.1, -0.7, 0.33))
        twice = grids.with_rounded_slopes(once)
        self.assertEqual(twice.nodes["prelu"].settings["slopes"], slopes)

    def test_graph_without_slopes_is_given_back(self):
        sketch = Sketch()
        sketch.conv("conv")
        graph = sketch.graph()
        self.assertIs(grids.with_rounded_slopes(graph), graph)


class SharesGridTest(tf.test.TestCase, parameterized.TestCase):
    def test_these_kinds_cannot_rescale(self):
        shared = {name for name, kind in KINDS.items() if kind.grid == "shared"}
        expected = {"max_pool", "average_pool", "global_max_pool", "reshape", "pad"}
        expected |= {"crop", "nearest_upsampling", "bilinear_upsampling"}
        expected |= {"transpose", "depth_to_space", "maximum", "minimum"}
        self.assertEqual(shared, expected | {"concatenate", "channel_max"})

    @parameterized.product(
        behind=("max_pool", "average_pool", "pad", "reshape", "nothing"),
        top=(None, 6.0, 1.0, 2.5),
    )
    def test_a_relu_behind_them_has_their_grid_unless_it_has_a_top(self, behind, top):
        sketch = Sketch()
        first = sketch("leaky_relu", "leaky", sketch.conv("conv"), slope=0.1)
        for kind, settings in MOVING[behind]:
            sketch(kind, kind, **settings)
        sketch("relu", "relu", top=top)
        graph = sketch.graph()
        is_shared = behind != "nothing" and top in (None, 6.0)
        self.assertEqual(grids.shares_grid(graph, graph.nodes["relu"]), is_shared)
        owner = grids.owners(graph)["relu"]
        self.assertEqual(owner, first if is_shared else "relu")
        self.assertIn("relu", grids.measured(graph))

    def test_a_relu_behind_a_concatenation_has_its_grid(self):
        sketch = Sketch()
        a, b = sketch.conv("a", "pixels"), sketch.conv("b", "pixels")
        sketch("concatenate", "both", a, b)
        sketch("relu", "relu")
        groups = grids.groups(sketch.graph())
        self.assertEqual(
            groups, {"pixels": ["pixels"], "a": ["a", "b", "both", "relu"]}
        )


class OwnersTest(tf.test.TestCase, parameterized.TestCase):
    def test_a_concatenation_has_the_grid_of_its_inputs(self):
        sketch = Sketch()
        sketch.conv("a", "pixels")
        a = sketch.flatten("a_flat", sketch("max_pool", "a_pool", **POOL))
        sketch("relu", "b", sketch.conv("conv", "pixels"))
        b = sketch.flatten("b_flat", sketch("max_pool", "b_pool", **POOL))
        sketch("concatenate", "both", a, b)
        self.assertEqual(
            grids.groups(sketch.graph()),
            {
                "pixels": ["pixels"],
                "a": ["a", "a_pool", "a_flat", "b", "b_pool", "b_flat", "both"],
            },
        )

    def test_concatenations_with_a_common_input_share_one(self):
        sketch = Sketch()
        a, b, c = (sketch.conv(name, "pixels") for name in "abc")
        ab = sketch("concatenate", "ab", a, b)
        bc = sketch("concatenate", "bc", b, c)
        sketch("add", "add", ab, bc)
        self.assertEqual(
            grids.groups(sketch.graph()),
            {"pixels": ["pixels"], "a": ["a", "b", "c", "ab", "bc"], "add": ["add"]},
        )

    def test_separate_concatenations_do_not(self):
        sketch = Sketch()
        a, b, c, d = (sketch.conv(name, "pixels") for name in "abcd")
        ab = sketch("concatenate", "ab", a, b)
        cd = sketch("concatenate", "cd", c, d)
        sketch("add", "add", ab, cd)
        groups = grids.groups(sketch.graph())
        self.assertEqual((groups["a"], groups["c"]), (["a", "b", "ab"], [*"cd", "cd"]))

    def test_nested_concatenations_share_one(self):
        sketch = Sketch()
        a, b, c = (sketch.conv(name, "pixels") for name in "abc")
        inner = sketch("concatenate", "inner", b, c)
        pooled = sketch("max_pool", "pooled", inner, padding="same", **POOL)
        pooled_a = sketch("max_pool", "pooled_a", a, padding="same", **POOL)
        sketch("concatenate", "outer", pooled_a, pooled)
        owners = grids.owners(sketch.graph())
        self.assertEqual(set(owners.values()), {"pixels", "a"})

    def test_without_anything_that_moves_values_each_has_its_own(self):
        sketch = Sketch()
        sketch("relu", "relu", sketch.conv("conv"))
        sketch("global_average_pool", "mean")
        sketch.dense("logits")
        owners = grids.owners(sketch.graph())
        names = ("pixels", "relu", "mean", "logits")
        self.assertEqual(owners, {name: name for name in names})

    def test_behind_the_pixels_they_are_the_pixels(self):
        sketch = Sketch()
        sketch("pad", "pad", margins=((1, 1), (1, 1)))
        sketch.conv("conv")
        self.assertEqual(grids.owners(sketch.graph())["pad"], "pixels")

    @parameterized.parameters(*range(12))
    def test_are_the_first_of_all_that_are_linked(self, seed):
        graph = grids.separated(random_graph(seed))
        owners = grids.owners(graph)
        self.assertEqual(
            owners,
            {n: min(g, key=list(owners).index) for n, g in linked(graph).items()},
        )
        self.assertLessEqual(set(owners.values()), set(grids.measured(graph)))
        for name in graph.nodes:
            is_stored = not grids.is_taken_in(graph, name) and name != "image"
            self.assertEqual(name in owners, is_stored)


def linked(graph):
    """Each stored node -> all nodes that it shares a grid with, found step by step."""
    stored = [
        name for name in list(graph.nodes)[1:] if not grids.is_taken_in(graph, name)
    ]
    pairs = {
        (name, source)
        for name in stored
        if grids.shares_grid(graph, graph.nodes[name])
        for source in graph.nodes[name].inputs
    }
    groups = {name: {name} for name in stored}
    for _ in stored:
        for a, b in pairs:
            groups[a] = groups[b] = groups[a] | groups[b]
        groups = {n: set().union(*(groups[m] for m in g)) for n, g in groups.items()}
    return groups


def random_graph(seed):
    """Branches of all kinds that come together in concatenations, again and again."""
    sketch = Sketch((4, 4, 4), seed=seed)
    rng = np.random.default_rng(seed)
    images = ["pixels"]
    unary = [
        ("relu", {}),
        ("relu", {"top": 6.0}),
        ("relu", {"top": 1.0}),
        ("relu", {"top": 2.5}),
        ("sigmoid", {}),
        ("tanh", {}),
        ("leaky_relu", {"slope": 0.1}),
        ("max_pool", dict(size=(2, 2), strides=(1, 1), padding="same")),
        ("average_pool", dict(size=(3, 3), strides=(1, 1), padding="same")),
        ("reshape", {"shape": (4, 4, -1)}),
    ]
    for index in range(16):
        name = f"n{index}"
        source = str(rng.choice(images[-4:]))
        if rng.random() < 0.2:
            images.append(sketch.conv(name, source))
        elif rng.random() < 0.35:
            others = rng.choice(images[-4:], int(rng.integers(1, 3)))
            images.append(sketch("concatenate", name, source, *map(str, others)))
        else:
            kind, settings = unary[int(rng.integers(len(unary)))]
            images.append(sketch(kind, name, source, **settings))
    sketch("concatenate", "all", *images[-3:])
    sketch.flatten("flat")
    sketch.dense("logits", outputs=3)
    return sketch.graph()


def demands(graph):
    """Owner of a grid -> all that its operators demand, without what they do not."""
    found = {}
    for owner, names in grids.groups(graph).items():
        each = {KINDS[graph.nodes[n].kind].bounds(graph.nodes[n], 8) for n in names}
        found[owner] = each
    return found


def outputs_of(graph, seed=0):
    shape = (3, *graph.image.shape)
    images = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return running.compute(graph, tf.constant(images), [graph.output])[0].numpy()


class SeparatedTest(tf.test.TestCase, parameterized.TestCase):
    def branches(self, demanding, moving, *others):
        """A demanding node, and others, each moved alike, in one concatenation."""
        sketch = Sketch()
        ends = []
        for index, branch in enumerate((demanding, *others)):
            sketch.conv(f"conv{index}", "pixels")
            if branch in DEMANDING:
                kind, settings, _ = DEMANDING[branch]
                sketch(kind, f"curve{index}", **settings)
            for kind, settings in MOVING[moving]:
                sketch(kind, f"{kind}{index}", **settings)
            ends.append(sketch.last)
        sketch("concatenate", "both", *ends)
        sketch.flatten("flat")
        sketch.dense("logits")
        return sketch.graph(), ends

    @parameterized.product(demanding=list(DEMANDING), moving=list(MOVING))
    def test_a_demand_keeps_its_grid_however_far_away(self, demanding, moving):
        graph, ends = self.branches(demanding, moving, "nothing")
        result = grids.separated(graph)
        added = [n for n in result.nodes.values() if n.kind == "requantize"]
        self.assertEqual([n.inputs for n in added], [(ends[0],)])
        self.assertEqual(result.nodes["both"].inputs, (added[0].name, ends[1]))
        self.assertEqual(added[0].name, f"{ends[0]}_requantized")
        # The demand is still that of its own group, and of no other.
        bounds = DEMANDING[demanding][2]
        owners = grids.owners(result)
        self.assertIn(bounds, demands(result)[owners["curve0"]])
        for owner in (owners["conv1"], owners["both"], owners[added[0].name]):
            self.assertEqual(demands(result)[owner], {None})
        self.assertEqual(owners["conv1"], owners["both"])
        self.assertAllEqual(outputs_of(result), outputs_of(graph))

    @parameterized.product(demanding=list(DEMANDING), moving=("nothing", "all"))
    def test_the_same_demand_is_shared(self, demanding, moving):
        graph, _ = self.branches(demanding, moving, demanding)
        self.assertIs(grids.separated(graph), graph)
        owners = grids.owners(graph)
        self.assertEqual(owners["curve0"], owners["curve1"])
        self.assertEqual(owners["curve0"], owners["both"])

    @parameterized.parameters(*itertools.combinations(DEMANDING, 2))
    def test_two_demands_are_both_rescaled(self, first, second):
        graph, ends = self.branches(first, "all", second, "nothing")
        result = grids.separated(graph)
        self.assertEqual(
            result.nodes["both"].inputs,
            (f"{ends[0]}_requantized", f"{ends[1]}_requantized", ends[2]),
        )
        self.assertAllEqual(outputs_of(result), outputs_of(graph))

    def test_a_relu_behind_a_pooling_needs_no_help(self):
        for top in (None, 6.0, 1.0, 2.5):
            sketch = Sketch()
            sketch("sigmoid", "sigmoid", sketch.conv("conv"))
            sketch("max_pool", "pool", **POOL)
            sketch("relu", "relu", top=top)
            graph = sketch.graph()
            self.assertIs(grids.separated(graph), graph)

    def test_pixels_are_rescaled_beside_others(self):
        sketch = Sketch()
        sketch("concatenate", "both", sketch.conv("conv"), "pixels")
        result = grids.separated(sketch.graph())
        self.assertEqual(result.nodes["both"].inputs, ("conv", "pixels_requantized"))
        self.assertEqual(grids.groups(result)["pixels"], ["pixels"])

    def test_pixels_beside_pixels_are_not(self):
        sketch = Sketch()
        pooled = dict(size=(2, 2), strides=(1, 1), padding="same")
        sketch("concatenate", "both", sketch("max_pool", "pool", **pooled), "pixels")
        graph = sketch.graph()
        self.assertIs(grids.separated(graph), graph)
        self.assertEqual(demands(graph), {"pixels": {Exactly(*PIXELS), None}})

    def test_pixels_that_are_a_curve_at_eight_bits_are_rescaled_beside_it(self):
        sketch = Sketch(pixels=False)
        sketch("pixels", "pixels", low=-1.0, high=127 / 128)
        curve = sketch("tanh", "tanh", sketch.conv("conv"))
        sketch("concatenate", "both", "pixels", curve)
        result = grids.separated(sketch.graph())
        self.assertEqual(
            result.nodes["both"].inputs, ("pixels_requantized", "tanh_requantized")
        )

    def test_nested_concatenations_are_parted_at_the_outer_one(self):
        sketch = Sketch()
        a, b = (sketch("tanh", n, sketch.conv(f"{n}_in", "pixels")) for n in "ab")
        inner = sketch("concatenate", "inner", a, b)
        pooled = sketch("max_pool", "pool", inner, **POOL)
        plain = sketch("max_pool", "plain", sketch.conv("c", "pixels"), **POOL)
        sketch("concatenate", "outer", plain, pooled)
        result = grids.separated(sketch.graph())
        self.assertEqual(result.nodes["inner"].inputs, ("a", "b"))
        self.assertEqual(result.nodes["outer"].inputs, ("plain", "pool_requantized"))
        owners = grids.owners(result)
        self.assertEqual((owners["a"], owners["pool"]), ("a", "a"))

    def test_what_reads_a_rescaled_node_elsewhere_still_does(self):
        sketch = Sketch()
        curve = sketch("tanh", "tanh", sketch.conv("a", "pixels"))
        both = sketch("concatenate", "both", curve, sketch.conv("b", "pixels"), curve)
        sketch("multiply", "gate", curve, sketch.conv("c", both))
        result = grids.separated(sketch.graph())
        copy = "tanh_requantized"
        # One copy is enough for a node that is read twice.
        self.assertEqual(result.nodes["both"].inputs, (copy, "b", copy))
        self.assertEqual(result.nodes["gate"].inputs, ("tanh", "c"))

    def test_names_that_are_taken_are_left(self):
        sketch = Sketch()
        curve = sketch("tanh", "tanh", sketch.conv("a", "pixels"))
        other = sketch.conv("tanh_requantized", "pixels")
        sketch("concatenate", "both", curve, other)
        result = grids.separated(sketch.graph())
        self.assertEqual(
            result.nodes["both"].inputs, ("tanh_requantized_2", "tanh_requantized")
        )

    @parameterized.parameters(*range(12))
    def test_no_grid_has_two_demands(self, seed):
        graph = random_graph(seed)
        before = [len(each - {None}) for each in demands(graph).values()]
        result = grids.separated(graph)
        for owner, each in demands(result).items():
            self.assertLessEqual(len(each - {None}), 1, owner)
        if max(before) > 1:
            self.assertGreater(len(result.nodes), len(graph.nodes))
        self.assertAllEqual(outputs_of(result), outputs_of(graph))
        self.assertIs(grids.separated(result), result)

    def test_some_of_those_had_two(self):
        conflicts = [
            any(len(each - {None}) > 1 for each in demands(random_graph(seed)).values())
            for seed in range(12)
        ]
        self.assertGreater(sum(conflicts), 6)


class BoundsTest(tf.test.TestCase, parameterized.TestCase):
    def bounds(self, kind, num_bits, **settings):
        sketch = Sketch()
        sketch(kind, "curve", sketch.conv("conv"), **settings)
        sketch("max_pool", "pool", **POOL)
        group = grids.groups(sketch.graph())["curve"]
        return grids.bounds_of(sketch.graph(), group, num_bits)

    @parameterized.parameters(*DEMANDING)
    def test_are_those_of_the_operator(self, demanding):
        kind, settings, expected = DEMANDING[demanding]
        self.assertEqual(self.bounds(kind, 8, **settings), expected)
        if kind != "relu":
            expected = Exactly(-32767 / 32768, 32767 / 32768)
        self.assertEqual(self.bounds(kind, 16, **settings), expected)

    @parameterized.parameters((8, (-2.0, 1.0)), (16, (-2.0, 2.0)))
    def test_pixels_that_share_a_grid_of_16_bits_are_all_in_it(self, bits, expected):
        sketch = Sketch(pixels=False)
        sketch("pixels", "pixels", low=-2.0, high=1.0)
        sketch("average_pool", "mean", **POOL)
        group = grids.groups(sketch.graph())["pixels"]
        self.assertEqual(group, ["pixels", "mean"])
        found = grids.bounds_of(sketch.graph(), group, bits)
        self.assertEqual(found, Exactly(*expected))

    def test_others_have_none(self):
        for top in (None, 6.0):
            self.assertIsNone(self.bounds("relu", 8, top=top))
        self.assertIsNone(self.bounds("leaky_relu", 8, slope=0.2))


# All of them different.
WIDTHS = BitWidths(
    num_bits_weight=4, num_bits_first=7, num_bits_last=6, num_bits_depthwise=5
)


class KernelBitsTest(tf.test.TestCase, parameterized.TestCase):
    def test_first_last_and_depthwise_kernels_have_their_own(self):
        sketch = Sketch()
        sketch.conv("stem")
        x = sketch.depthwise("depth", padding="same")
        sketch("add", "add", sketch.conv("wide", x), sketch.conv("narrow", x))
        sketch.dense("logits")
        self.assertEqual(
            grids.kernel_bits(sketch.graph(), WIDTHS),
            {"stem": 7, "depth": 5, "wide": 4, "narrow": 4, "logits": 6},
        )

    def test_depthwise_kernels_at_either_end_are_depthwise(self):
        sketch = Sketch()
        sketch.depthwise("depth1")
        for name in ("conv1", "conv2", "conv3"):
            sketch.conv(name)
        sketch.depthwise("depth2")
        self.assertEqual(
            grids.kernel_bits(sketch.graph(), WIDTHS),
            {"depth1": 5, "conv1": 7, "conv2": 4, "conv3": 6, "depth2": 5},
        )

    def test_the_only_kernel_is_the_first(self):
        sketch = Sketch()
        sketch.conv("conv")
        self.assertEqual(grids.kernel_bits(sketch.graph(), WIDTHS), {"conv": 7})

    def test_kernels_that_any_bits_hold_are_no_ends(self):
        """A mean of the colours before, a halved score behind."""
        sketch = Sketch()
        third = {"kernel": np.full((1, 1, 3, 1), 1 / 3)}
        sketch("conv", "grey", weights=third)
        for name in ("first", "middle", "last"):
            sketch.conv(name)
        sketch.flatten("flat")
        count = sketch.nodes["flat"].shape[0]
        half = np.where(np.arange(count) > 2, 0.0, 0.5)[:, None]
        sketch("dense", "two", weights={"kernel": np.hstack([-half, half])})
        self.assertEqual(
            grids.kernel_bits(sketch.graph(), WIDTHS),
            {"grey": 4, "first": 7, "middle": 4, "last": 6, "two": 4},
        )

    def test_each_stem_is_a_first_one_and_each_head_a_last_one(self):
        """Stems of different depth; heads of 5 and 7 classes, one a layer deeper."""
        sketch = Sketch()
        deep = sketch.conv("further", sketch.conv("stem1", "pixels"))
        sketch("add", "sum", deep, sketch.conv("stem2", "pixels"))
        x = sketch("global_average_pool", "pool", sketch.conv("middle"))
        five = sketch.dense("five", x, outputs=5)
        seven = sketch.dense("seven", sketch.dense("hidden", x), outputs=7)
        sketch("concatenate", "logits", five, seven)
        stems, heads = dict.fromkeys(("stem1", "stem2"), 7), dict(five=6, seven=6)
        inner = dict.fromkeys(("further", "middle", "hidden"), 4)
        found = grids.kernel_bits(sketch.graph(), WIDTHS)
        self.assertEqual(found, {**stems, **inner, **heads})
        bits = grids.kernel_bits(sketch.graph(), BitWidths(num_bits_weight=4))
        self.assertEqual({name for name in bits if bits[name] == 8}, {*stems, *heads})

    def test_both_of_two_networks_have_a_first_and_a_last_one(self):
        """Classifiers are added up; the only kernel of the last one is its first."""
        sketch = Sketch()
        for name in ("a", "b"):
            sketch.conv(f"{name}1", "pixels")
            sketch.conv(f"{name}2")
            sketch("global_average_pool", f"{name}3")
            sketch.dense(name)
        sketch("global_average_pool", "mean", "pixels")
        sketch("add", "two", "a", "b")
        sketch("add", "three", "two", sketch.dense("c", "mean"))
        expected = {f"{name}{i}": bits for name in "ab" for i, bits in ((1, 7), (2, 4))}
        self.assertEqual(
            grids.kernel_bits(sketch.graph(), WIDTHS),
            {**expected, "a": 6, "b": 6, "c": 7},
        )

    def test_there_may_be_none(self):
        sketch = Sketch()
        sketch("global_average_pool", "mean")
        self.assertEmpty(grids.kernel_bits(sketch.graph(), WIDTHS))

    @parameterized.parameters(*networks.FEW)
    def test_first_reads_pixels_and_last_gives_the_logits(self, name):
        self.check_ends(name)

    @parameterized.parameters(*networks.OTHERS)
    @pytest.mark.long
    def test_so_it_is_in_the_others(self, name):
        self.check_ends(name)

    def check_ends(self, name):
        learner = networks.learner(name)
        graph = float_network(as_classifier(learner)).graph
        bits = grids.kernel_bits(graph, WIDTHS)
        kinds = (keras.layers.Conv2D, keras.layers.Dense)
        with_kernels = [la for la in learner.model.layers if isinstance(la, kinds)]
        stem, logits = with_kernels[0], with_kernels[-1]
        self.assertIsInstance(logits, keras.layers.Dense)
        self.assertEqual(bits.pop(stem.name), 7)
        self.assertEqual(bits.pop(logits.name), 6)
        for name, each in bits.items():
            is_depthwise = graph.nodes[name].kind == "depthwise_conv"
            self.assertEqual(each, 5 if is_depthwise else 4, name)


class ActivationBitsTest(tf.test.TestCase, parameterized.TestCase):
    def bits(self, sketch, width, sums=2):
        graph = grids.separated(sketch.graph())
        widths = BitWidths(num_bits_activation=width, num_bits_sum=sums)
        return grids.activation_bits(graph, widths)

    def residual(self):
        """Two blocks; the second has a BatchNormalization behind its sum."""
        sketch = Sketch()
        x = sketch("relu", "relu1", sketch.conv("stem"))
        x = sketch("add", "sum1", x, sketch.conv("branch1", x))
        x = sketch("relu", "relu2", x)
        x = sketch("add", "sum2", x, sketch.conv("branch2", x))
        x = sketch("relu", "relu3", sketch.depthwise("scale", x, size=1))
        sketch.depthwise("depth", sketch("max_pool", "largest", x, **POOL))
        sketch("global_average_pool", "mean")
        sketch.dense("logits")
        return sketch

    @parameterized.parameters((4, 6, 6), (4, 3, 4), (7, 6, 7), (8, 6, 8), (16, 8, 16))
    def test_what_no_kernel_reads_has_the_bits_of_sums(self, width, sums, wide):
        bits = self.bits(self.residual(), width, sums=sums)
        # relu3: its maximum, on the same grid, goes to a depthwise convolution.
        narrow = {"relu1", "relu2", "relu3", "mean"}
        self.assertEqual(
            bits,
            {
                **dict.fromkeys(narrow, width),
                **dict.fromkeys(("branch1", "branch2", "sum2", "depth"), wide),
                "pixels": 8,
                "logits": max(8, width),
            },
        )

    @parameterized.parameters((4, 4, 8), (6, 6, 8), (8, 8, 8), (16, 16, 16))
    def test_pixels_have_eight_and_logits_at_least_eight(self, width, inner, logits):
        sketch = Sketch()
        x = sketch("relu", "relu", sketch.conv("conv"))
        sketch("add", "add", x, sketch.conv("conv2", x))
        sketch.flatten("flat", sketch.conv("logits"))
        self.assertEqual(
            self.bits(sketch, width),
            {
                "pixels": 8,
                "relu": inner,
                "conv2": inner,
                "add": inner,
                "logits": logits,
            },
        )

    @parameterized.parameters(4, 8, 16)
    def test_outputs_tied_to_the_logits_have_their_bits(self, width):
        sketch = Sketch()
        x = sketch("relu", "relu", sketch.conv("conv"))
        a, b = (sketch.flatten(f"{n}_flat", sketch.conv(n, x)) for n in "ab")
        sketch("concatenate", "ab", a, b)
        most = max(width, 8)
        self.assertEqual(
            self.bits(sketch, width),
            {"pixels": 8, "relu": width, "a": most, "b": most, "ab": most},
        )

    @parameterized.parameters((4, 8), (8, 8), (16, 16))
    def test_the_score_that_two_logits_are_made_of_has_their_bits(self, width, wide):
        sketch = Sketch()
        x = sketch.flatten("flat", sketch.conv("conv"))
        sketch("add", "score", *(sketch.dense(name, x, outputs=1) for name in "ab"))
        sketch("dense", "two", weights={"kernel": np.array([[-0.5, 0.5]])})
        self.assertEqual(
            self.bits(sketch, width),
            {
                "pixels": 8,
                **dict.fromkeys(("conv", "a", "b"), width),
                **dict.fromkeys(("score", "two"), wide),
            },
        )

    @parameterized.parameters(4, 8, 16)
    def test_pixels_keep_eight_beside_others(self, width):
        sketch = Sketch()
        x = sketch("concatenate", "both", "pixels", sketch.conv("conv", "pixels"))
        sketch("relu", "relu", sketch.conv("conv2", x))
        sketch.conv("logits")
        most = max(8, width)
        self.assertEqual(
            self.bits(sketch, width),
            {
                "pixels": 8,
                "conv": most,
                "pixels_requantized": most,
                "both": most,
                "relu": width,
                "logits": most,
            },
        )

    @parameterized.parameters((4, 8), (8, 8), (16, 16))
    def test_pixels_keep_eight_where_their_channels_are_scaled(self, width, wide):
        """A normalisation, a BatchNormalization with its ReLU, and one of a vector."""
        sketch = Sketch()
        x = sketch.depthwise("normalize", size=1)
        sketch("relu", "relu", sketch.depthwise("scale", x, size=1))
        x = sketch.conv("conv", sketch("pad", "pad", margins=((1, 1), (1, 1))))
        sketch("reshape", "row", "pixels", shape=(1, 1, -1))
        sketch.dense("dense", sketch.flatten("flat", sketch.depthwise("rows", size=1)))
        sketch("add", "add", "dense", sketch.dense("logits", sketch.flatten("end", x)))
        self.assertEqual(
            self.bits(sketch, width),
            {
                "pixels": 8,
                **dict.fromkeys(("normalize", "relu", "rows", "add"), wide),
                **dict.fromkeys(("conv", "dense", "logits"), width),
            },
        )

    def test_ties_among_others_have_the_bits_of_activations(self):
        sketch = Sketch()
        a, b = (sketch.conv(name, "pixels") for name in "ab")
        sketch("concatenate", "ab", a, b)
        sketch.conv("logits")
        self.assertEqual(
            self.bits(sketch, 4), {"pixels": 8, "a": 4, "b": 4, "ab": 4, "logits": 8}
        )

    @parameterized.parameters((4, 8), (8, 8), (16, 16))
    def test_curves_have_at_least_eight_and_all_that_share_their_grid(self, width, own):
        sketch = Sketch()
        for index, kind in enumerate(("sigmoid", "sigmoid", "tanh")):
            sketch(kind, f"curve{index}", sketch.conv(f"conv{index}", "pixels"))
        x = sketch("concatenate", "two", "curve0", "curve1")
        # A ReLU behind a pooling has the pooling's grid.
        x = sketch("relu", "relu", sketch("max_pool", "pool", x, **POOL))
        x = sketch("concatenate", "all", x, sketch("max_pool", "p", "curve2", **POOL))
        sketch.conv("logits")
        bits = self.bits(sketch, width)
        for name in ("curve0", "curve1", "curve2", "two", "relu"):
            self.assertEqual(bits[name], own, name)
        for name in ("relu_requantized", "p_requantized", "all", "conv0", "conv2"):
            self.assertEqual(bits[name], width, name)


if __name__ == "__main__":
    tf.test.main()
