import time
from unittest import mock

from dfq_tf.compat import tf
from dfq_tf.training import mean_seconds, unchanged


class TimingTest(tf.test.TestCase):
    def test_variables_have_their_values_back(self):
        first, second = tf.Variable([1.0, 2.0]), tf.Variable(3)
        with unchanged([first, second]):
            first.assign_add([1.0, 1.0])
            second.assign(7)
            self.assertAllEqual(first, [2.0, 3.0])
        self.assertAllEqual(first, [1.0, 2.0])
        self.assertEqual(second, 3)

    def test_they_have_them_back_after_an_error(self):
        variable = tf.Variable(1)
        with self.assertRaisesRegex(ValueError, "^no step$"):
            with unchanged([variable]):
                variable.assign(2)
                raise ValueError("no step")
        self.assertEqual(variable, 1)

    def test_time_is_the_mean_without_the_first_step(self):
        clock, taken = [0.0], []

        def step(number):
            taken.append(number)
            clock[0] += 100.0 if len(taken) == 1 else number  # the first is compiled
            return {"loss": tf.constant(1.0)}

        with mock.patch.object(time, "monotonic", lambda: clock[0]):
            self.assertEqual(mean_seconds(step, range(4, 7)), 5.0)
        self.assertEqual(taken, [4, 4, 5, 6])


if __name__ == "__main__":
    tf.test.main()
