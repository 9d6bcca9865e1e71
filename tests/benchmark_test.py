import importlib.util
import os
import sys
from unittest import mock

from tools import benchmark
from dfq_tf.compat import keras, tf
from dfq_tf.distillation.teacher import observe
from dfq_tf.graph.layers import KINDS
from tests import helpers
from tests.tool_runner import ROOT, run_in_process

layers = keras.layers


class FlagsTest(tf.test.TestCase):
    def test_no_step_is_refused_before_the_work(self):
        result = run_in_process("benchmark", "--steps=0")
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stderr, "error: steps is 0; it must be at least 1\n")

    def test_wrong_network_is_told_by_its_flag(self):
        for flag in ("model", "student"):
            flags = ("--model=wrn_10_1", f"--{flag}=wrn_11_1")
            result = run_in_process("benchmark", *flags)
            self.assertEqual(result.returncode, 2)
            self.assertStartsWith(
                result.stderr, f"error: {flag} is 'wrn_11_1': depth is 11; a WRN needs"
            )


class CountOperationsTest(tf.test.TestCase):
    def test_counts_each_network_in_each_direction(self):
        # Named as in a step: the teacher's operations begin with 'teacher'.
        def model(name, kernel, strides):
            image = layers.Input((8, 6, 3))
            x = layers.Conv2D(5, kernel, strides, padding="same", name="conv")(image)
            x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
            x = layers.ReLU()(layers.BatchNormalization()(x))
            x = layers.Dense(4, name="logits")(layers.GlobalAveragePooling2D()(x))
            return keras.Model(image, x, name=name)

        teacher, student = model("teacher", 3, 2), model("small", 1, 1)

        @tf.function
        def step(images):
            with tf.GradientTape(persistent=True) as tape:
                tape.watch(images)
                answers = tf.reduce_sum(teacher(images, training=False) ** 2)
                loss = tf.reduce_sum(student(images, training=True) ** 2)
            return tape.gradient(answers, images), [
                tape.gradient(loss, student.trainable_variables)
            ]

        graph = step.get_concrete_function(tf.TensorSpec((2, 8, 6, 3))).graph
        # 2 images; of the teacher 4 x 3 positions, of the student 8 x 6.
        teacher_forward = 2 * (24 * 5 * 27 + 24 * 5 * 9 + 2 * 4 * 5)
        student_forward = 2 * (96 * 5 * 3 + 96 * 5 * 9 + 2 * 4 * 5)
        expected = {
            # Back to the image alone: as many operations as forward.
            "teacher backward": teacher_forward,
            "teacher forward": teacher_forward,
            # To weights and values, but not to the image.
            "student backward": 2 * student_forward - 2 * 96 * 5 * 3,
            "student forward": student_forward,
        }
        counted = benchmark.count_operations(graph)
        self.assertEqual(counted.keys(), expected.keys())
        for key, count in expected.items():
            self.assertAllClose(counted[key] * 1e9, count)

    def test_networks_of_a_step_are_told_apart(self):
        teacher, student = helpers.small_classifier(), helpers.small_learner()
        observed = observe(teacher)

        @tf.function
        def step(pixels):
            answers = student.model(student.description.normalize(pixels))
            return observed(pixels)[0] - answers

        graph = step.get_concrete_function(tf.TensorSpec((2, 8, 8, 3))).graph
        macs = sum(KINDS[n.kind].macs(n) for n in teacher.graph.nodes.values())
        self.assertAllClose(
            benchmark.count_operations(graph),
            dict.fromkeys(("student forward", "teacher forward"), 2 * 2 * macs / 1e9),
        )


class GpuTest(tf.test.TestCase):
    """Of benchmarks/gpu: what writes steps, and what takes them where JAX is."""

    def module(self, name):
        path = ROOT / f"benchmarks/gpu/{name}.py"
        specification = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module

    def test_batch_takes_the_generator_steps_of_its_program(self):
        folder, taken = helpers.new_folder() / "program", []
        self.module("export").write(folder, {}, {}, generator_steps=3)
        names = ("jax", "jax._src", "jax._src.lib")
        absent = mock.patch.dict(sys.modules, {n: mock.MagicMock() for n in names})
        with absent, mock.patch.dict(os.environ):
            module = self.module("run")
            program = module.Program(folder, None)
        run = module.Run(program, {"name": "a"}, seed=0)
        run._take = lambda kind, number: taken.append((kind, number))
        run._batch(2, gives_answers=True)
        improved = [number for kind, number in taken if kind == "improve"]
        self.assertEqual(improved, [6, 7, 8])
        handed_over = [number for kind, number in taken if kind == "hand_over"]
        self.assertEqual(handed_over, [7, 8])
        with self.assertRaisesRegex(ValueError, "^generator_steps is of the program"):
            module.Run(program, {"generator_steps": 10}, seed=0)


if __name__ == "__main__":
    tf.test.main()
