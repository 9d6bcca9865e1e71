import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.training import optimizers
from tests import helpers


class DescendTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(0.0, 0.5)
    def test_moves_by_gradient_and_decay_of_kernels_alone(self, weight_decay):
        model = helpers.small_learner((4, 4, 1)).model
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        before = helpers.copies(model.trainable_variables)
        inputs = helpers.random_inputs(model)
        with tf.GradientTape(persistent=True) as tape:
            loss = tf.reduce_mean(tf.square(model(inputs, training=True)))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizers.descend(tape, loss, model, optimizer, weight_decay)
        for variable, value, gradient in zip(
            model.trainable_variables, before, gradients
        ):
            decay = weight_decay if "kernel" in variable.name else 0.0
            expected = value - 0.1 * (gradient + decay * value)
            self.assertAllClose(variable, expected, atol=1e-6, msg=variable.name)


class DecayTest(tf.test.TestCase):
    def test_learning_rates_fall_to_0_by_a_cosine(self):
        cosine = 0.5 * (1 + np.cos(np.pi * np.arange(7).clip(max=5) / 5))
        sgd = helpers.displacements(lambda m: optimizers.sgd(m, 0.2, 5, 0.0), 7)
        self.assertAllClose(sgd, 0.2 * cosine, atol=1e-6)
        # Adam moves by its learning rate where the gradient stays the same.
        adam = helpers.displacements(lambda m: optimizers.adam(m, 0.01, 5), 7)
        self.assertAllClose(adam, 0.01 * cosine, atol=1e-5)

    def test_end_of_the_decay_may_be_known_later(self):
        end = tf.Variable(1)
        moved = []
        for value in (5, 3):
            end.assign(value)
            sgd = helpers.displacements(lambda m: optimizers.sgd(m, 0.2, end, 0.0), 4)
            moved.append(sgd)
        for found, value in zip(moved, (5, 3)):
            done = np.arange(4).clip(max=value) / value
            self.assertAllClose(found, 0.1 * (1 + np.cos(np.pi * done)), atol=1e-6)

    def test_steady_adam_keeps_its_learning_rate(self):
        def make(model):
            return optimizers.steady_adam(model.trainable_variables, 0.01, (0.5, 0.9))

        self.assertAllClose(helpers.displacements(make, 5), [0.01] * 5, atol=1e-6)

    def test_sgd_has_nesterov_momentum(self):
        moved = helpers.displacements(lambda m: optimizers.sgd(m, 1.0, 10**9, 0.5), 2)
        self.assertAllClose(moved, [1.5, 1.75], rtol=1e-4)


if __name__ == "__main__":
    tf.test.main()
