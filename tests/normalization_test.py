"""Layer normalization in integers, held against NumPy."""

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.quantization import Grid
from dfq_tf.tflite import normalization
from dfq_tf.tflite.flatbuffer import File
from dfq_tf.tflite.running import open_interpreter

STEP, ZERO, OUTPUT_STEP, OUTPUT_ZERO = 0.05, 10, 0.05, -5
ROWS = 24
# What a row holds: all integers in use or few, about the zero point or far from it.
KINDS = {
    "wide": lambda rng, shape: rng.normal(0, 30, shape),
    "of_all_sizes": lambda rng, shape: rng.normal(
        0, np.exp(rng.normal(1.6, 1.5, (*shape[:-1], 1))), shape
    ),
    "of_few_ones": lambda rng, shape: rng.random(shape) < 0.02,
    "of_one_other_value": lambda rng, shape: np.eye(*shape, dtype=np.int64)[::-1] * 3,
    "extreme": lambda rng, shape: rng.choice([-128, 127], shape),
    "far_from_zero": lambda rng, shape: (
        rng.normal(0, 2, shape) + rng.integers(-110, 110, (*shape[:-1], 1))
    ),
    "constant": lambda rng, shape: np.broadcast_to(
        rng.integers(-128, 128, (*shape[:-1], 1)), shape
    ),
}


def grid(step, zero):
    return Grid(np.array([step], np.float32), zero, -128, 127)


def normalized(rows, epsilon, is_centered, step=STEP):
    """What LiteRT makes of integers, all rows in one batch, and of each row alone."""
    file = File()
    shape = (1, *rows.shape[1:])
    source = file.tensor("source", shape, np.int8, grid(step, ZERO))
    output = file.tensor("output", shape, np.int8, grid(OUTPUT_STEP, OUTPUT_ZERO))
    normalization.add(
        file, "norm", source, output, epsilon=epsilon, is_centered=is_centered
    )
    interpreter = open_interpreter(file.finish(source, output, "output", {}))
    answers = []
    for batch in (rows, rows[:1]):
        index = interpreter.get_input_details()[0]["index"]
        interpreter.resize_tensor_input(index, batch.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(index, batch)
        interpreter.invoke()
        index = interpreter.get_output_details()[0]["index"]
        answers.append(interpreter.get_tensor(index).astype(int))
    return answers


def expected(rows, epsilon, is_centered, step=STEP):
    values = step * (rows.astype(np.float64) - ZERO)
    if is_centered:
        values = values - values.mean(axis=-1, keepdims=True)
    square = np.mean(values**2, axis=-1, keepdims=True)
    steps = values / np.sqrt(square + epsilon) / OUTPUT_STEP + OUTPUT_ZERO
    return np.clip(steps, -128, 127)


def integers(kind, shape):
    rows = KINDS[kind](np.random.default_rng(0), shape)
    return np.clip(np.rint(rows), -128, 127).astype(np.int8)


class NormalizationTest(parameterized.TestCase, tf.test.TestCase):
    def check(self, rows, epsilon, is_centered, step=STEP):
        answers, alone = normalized(rows, epsilon, is_centered, step)
        self.assertAllEqual(answers[:1], alone)
        distance = np.abs(answers - expected(rows, epsilon, is_centered, step))
        # A half is rounding, the rest of the table: 0.4 % of 133 steps at most.
        self.assertLess(distance.max(), 1.01)

    @parameterized.product(
        kind=list(KINDS), length=(1, 3, 96, 768, 2500), is_centered=(True, False)
    )
    def test_is_that_of_numpy(self, kind, length, is_centered):
        self.check(integers(kind, (ROWS, length)), 1e-3, is_centered)

    @parameterized.product(kind=list(KINDS), is_centered=(True, False))
    def test_longest_row(self, kind, is_centered):
        rows = integers(kind, (4, (2**31 - 1) // 255**2))
        self.check(rows, 1e-3, is_centered)

    @parameterized.parameters((1e-12, STEP), (0.5, STEP), (1e-3, 1e-3), (1e-3, 20.0))
    def test_epsilon_counts_in_the_unit_of_the_values(self, epsilon, step):
        for kind in KINDS:
            self.check(integers(kind, (ROWS, 96)), epsilon, True, step)

    @parameterized.parameters([(7, 5, 6)], [(4, 6)])
    def test_last_axis_of_an_image(self, shape):
        self.check(integers("wide", (2, *shape)), 1e-3, True)

    def test_two_of_a_file_share_their_table(self):
        sizes = []
        for count in (1, 2):
            file, shape = File(), (1, 96)
            tensors = [
                file.tensor(f"tensor_{i}", shape, np.int8, grid(STEP, ZERO))
                for i in range(count + 1)
            ]
            for i, pair in enumerate(zip(tensors, tensors[1:])):
                normalization.add(
                    file, f"norm_{i}", *pair, epsilon=1e-3, is_centered=True
                )
            sizes.append(len(file.finish(tensors[0], tensors[-1], "output", {})))
        self.assertBetween(sizes[0], 32_000, 40_000)
        self.assertLess(sizes[1] - sizes[0], 5_000)


if __name__ == "__main__":
    tf.test.main()
