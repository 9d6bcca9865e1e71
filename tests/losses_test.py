import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.distillation import losses


def _softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _logits(shape, seed=0, scale=3.0):
    return np.random.default_rng(seed).normal(0, scale, shape).astype(np.float32)


class DistillationLossTest(tf.test.TestCase):
    def test_equal_logits_give_zero(self):
        logits = _logits((5, 7))
        self.assertEqual(losses.distillation_loss(logits, logits).numpy(), 0.0)

    def test_shifted_logits_give_zero(self):
        logits = _logits((5, 7))
        self.assertAllClose(
            losses.distillation_loss(logits, logits + 4.0), 0, atol=1e-5
        )

    def test_equals_kl_divergence_of_teacher_from_student(self):
        teacher, student = _logits((6, 5), 1), _logits((6, 5), 2)
        p, q = (
            _softmax(teacher.astype(np.float64)),
            _softmax(student.astype(np.float64)),
        )
        expected = np.mean([np.sum(a * np.log(a / b)) for a, b in zip(p, q)])
        loss = losses.distillation_loss(teacher, student)
        self.assertAllClose(loss, expected, rtol=1e-5)

    def test_temperature_divides_the_logits_and_its_square_multiplies(self):
        teacher, student = _logits((6, 5), 1), _logits((6, 5), 2)
        p, q = (_softmax(x.astype(np.float64) / 4) for x in (teacher, student))
        expected = 16 * np.mean([np.sum(a * np.log(a / b)) for a, b in zip(p, q)])
        loss = losses.distillation_loss(teacher, student, temperature=4.0)
        self.assertAllClose(loss, expected, rtol=1e-5)

    def test_is_finite_where_the_teacher_is_certain(self):
        teacher = np.array([[200.0, -200.0]], np.float32)
        student = np.array([[0.0, 0.0]], np.float32)
        loss = losses.distillation_loss(teacher, student)
        self.assertAllClose(loss, np.log(2.0))

    def test_gradient_of_student_logits_is_difference_of_probabilities(self):
        teacher, student = _logits((4, 3), 1), tf.constant(_logits((4, 3), 2))
        with tf.GradientTape() as tape:
            tape.watch(student)
            loss = losses.distillation_loss(teacher, student)
        expected = (_softmax(student.numpy()) - _softmax(teacher)) / 4
        self.assertAllClose(tape.gradient(loss, student), expected, atol=1e-6)


class EntropyTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(2, 10, 100)
    def test_uniform_logits_give_log_of_classes(self, num_classes):
        logits = tf.ones((3, num_classes)) * 5.0
        expected = np.log(num_classes)
        self.assertAllClose(losses.instance_entropy(logits), expected, rtol=1e-5)
        self.assertAllClose(losses.batch_entropy(logits), expected, rtol=1e-5)

    def test_certain_answers_of_all_classes_tell_the_two_entropies_apart(self):
        logits = tf.eye(4) * 100.0
        self.assertAllClose(losses.instance_entropy(logits), 0.0, atol=1e-6)
        self.assertAllClose(losses.batch_entropy(logits), np.log(4.0), rtol=1e-5)

    def test_certain_answers_of_one_class_give_zero(self):
        logits = tf.one_hot([2, 2, 2], 4) * 100.0
        self.assertAllClose(losses.instance_entropy(logits), 0.0, atol=1e-6)
        self.assertAllClose(losses.batch_entropy(logits), 0.0, atol=1e-6)

    def test_instance_entropy_equals_mean_of_entropies(self):
        logits = _logits((6, 5))
        p = _softmax(logits.astype(np.float64))
        expected = -np.mean(np.sum(p * np.log(p), axis=1))
        self.assertAllClose(losses.instance_entropy(logits), expected, rtol=1e-5)

    def test_batch_entropy_equals_entropy_of_mean(self):
        logits = _logits((6, 5))
        p = _softmax(logits.astype(np.float64)).mean(axis=0)
        expected = -np.sum(p * np.log(p))
        self.assertAllClose(losses.batch_entropy(logits), expected, rtol=1e-5)


def _standardised(shape, seed=0):
    """Values whose mean is 0 and whose variance is 1 in each channel."""
    values = np.random.default_rng(seed).normal(size=shape)
    axes = tuple(range(len(shape) - 1))
    return (values - values.mean(axes)) / values.std(axes)


class ChannelMomentsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(((7, 3),), ((4, 5, 6, 3),), ((2, 3, 4, 5, 3),))
    def test_values_and_gradient_equal_numpy(self, shape):
        rng = np.random.default_rng(0)
        values = rng.normal(3.0, 2.0, shape)
        d_mean, d_variance = rng.normal(size=(2, 3))
        axes = tuple(range(len(shape) - 1))
        count = values.size / 3
        # By hand: d m / d x = 1 / n and d v / d x = 2 (x - m) / n.
        centred = values - values.mean(axes)
        expected = (d_mean + 2 * d_variance * centred) / count
        x = tf.constant(values, tf.float32)
        with tf.GradientTape() as tape:
            tape.watch(x)
            mean, variance = losses.channel_moments(x)
            loss = tf.reduce_sum(d_mean * mean + d_variance * variance)
        self.assertAllClose(mean, values.mean(axes), rtol=1e-5)
        self.assertAllClose(variance, values.var(axes), rtol=1e-5)
        gradient = tape.gradient(loss, x)
        self.assertAllClose(gradient, expected, rtol=1e-5, atol=1e-6)

    def test_variance_far_from_zero_is_exact(self):
        # The mean of squares less the square of the mean would lose all digits here.
        values = tf.constant(1000.0 + _standardised((4096, 2)), tf.float32)
        self.assertAllClose(losses.channel_moments(values)[1], [1.0, 1.0], rtol=1e-3)

    def test_one_value_has_no_variance(self):
        mean, variance = losses.channel_moments(tf.constant([[2.0, 3.0]]))
        self.assertAllEqual(mean, [2.0, 3.0])
        self.assertAllEqual(variance, [0.0, 0.0])


class BnStatisticsLossTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(((16, 3),), ((4, 5, 6, 3),))
    def test_matching_statistics_give_zero(self, shape):
        mean = np.array([0.0, -2.0, 5.0], np.float32)
        variance = np.array([1.0, 0.25, 9.0], np.float32)
        values = _standardised(shape) * np.sqrt(variance) + mean
        loss = losses.bn_statistics_loss(
            [tf.constant(values, tf.float32)], [mean], [variance]
        )
        self.assertAllClose(loss, 0.0, atol=1e-4)

    def test_equals_sum_of_gaussian_kl_divergences(self):
        rng = np.random.default_rng(0)
        shapes = [(4, 6, 6, 2), (4, 3, 3, 5), (4, 7)]
        inputs = [rng.normal(1.0, 2.0, shape).astype(np.float32) for shape in shapes]
        means = [rng.normal(size=s[-1]).astype(np.float32) for s in shapes]
        variances = [rng.uniform(0.5, 3.0, s[-1]).astype(np.float32) for s in shapes]
        expected = 0.0
        for values, mu, var in zip(inputs, means, variances):
            for channel in range(values.shape[-1]):
                x = values[..., channel].astype(np.float64)
                m, v = x.mean(), x.var()
                expected += (
                    ((m - mu[channel]) ** 2 + v) / (2 * var[channel])
                    - np.log(np.sqrt(v) / np.sqrt(var[channel]))
                    - 0.5
                )
        loss = losses.bn_statistics_loss(
            [tf.constant(x) for x in inputs], means, variances
        )
        self.assertAllClose(loss, expected, rtol=1e-5)

    def test_shifted_mean_costs_half_its_square(self):
        values = tf.constant(_standardised((64, 1)) + 3.0, tf.float32)
        loss = losses.bn_statistics_loss([values], [tf.zeros(1)], [tf.ones(1)])
        self.assertAllClose(loss, 4.5, rtol=1e-4)

    def test_bfloat16_inputs_give_float32_statistics(self):
        # 4096 values: sums in bfloat16, of 8 bits, would stop growing at 256.
        values = tf.cast(_standardised((4096, 2)) + 1.0, tf.bfloat16)
        mean, variance = tf.constant([0.5, 0.0]), tf.constant([2.0, 1.0])
        loss = losses.bn_statistics_loss([values], [mean], [variance])
        exact = losses.bn_statistics_loss(
            [tf.cast(values, tf.float32)], [mean], [variance]
        )
        self.assertEqual(loss.dtype, tf.float32)
        self.assertAllClose(loss, exact, rtol=1e-6)
        # Means 1 against 0.5 and 0, variances 1 against 2 and 1.
        expected = (0.25 + 1) / 4 + 0.5 * np.log(2.0) - 0.5 + 0.5
        self.assertAllClose(loss, expected, atol=0.02)

    def test_channel_of_one_value_stays_finite(self):
        values = tf.zeros((4, 3, 3, 2))
        with tf.GradientTape() as tape:
            tape.watch(values)
            loss = losses.bn_statistics_loss([values], [tf.ones(2)], [tf.zeros(2)])
        self.assertTrue(np.isfinite(loss.numpy()))
        self.assertTrue(np.all(np.isfinite(tape.gradient(loss, values).numpy())))

    def test_no_layers_give_zero(self):
        self.assertEqual(losses.bn_statistics_loss([], [], []).numpy(), 0.0)


class SynthesisLossesTest(tf.test.TestCase):
    def test_divergence_where_the_first_class_is_the_same(self):
        rng = np.random.default_rng(0)
        teacher = rng.normal(size=(6, 4)).astype(np.float32)
        student = rng.normal(size=(6, 4)).astype(np.float32)
        student[:3] = teacher[:3] * 2  # these agree
        same = teacher.argmax(-1) == student.argmax(-1)
        self.assertBetween(same.sum(), 3, 5)
        p, q = (
            np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student)
        )
        expected = ((p * np.log(p / q)).sum(-1) * same).sum() / 6
        found = losses.agreeing_divergence(teacher, student)
        self.assertAllClose(found, expected, rtol=1e-5)

    def test_bn_distance_is_the_sum_of_norms(self):
        found = [np.float32([3.0, 0.0]), np.float32([1.0])]
        stored = [np.float32([0.0, 4.0]), np.float32([-1.0])]
        self.assertAllClose(losses.bn_distance(found, stored), 5.0 + 2.0)

    def test_bn_distance_has_a_gradient_where_it_is_0(self):
        value = tf.constant([1.0, 2.0])
        with tf.GradientTape() as tape:
            tape.watch(value)
            distance = losses.bn_distance([value], [[1.0, 2.0]])
        self.assertAllClose(tape.gradient(distance, value), [0.0, 0.0])


if __name__ == "__main__":
    tf.test.main()
