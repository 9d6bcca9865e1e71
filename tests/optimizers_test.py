import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.training import muon, optimizers
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

    def test_decay_leaves_slopes_and_scales_of_several_axes_alone(self):
        layers = keras.layers
        image = layers.Input((4, 4, 2))
        x = layers.PReLU("ones", shared_axes=[1, 2])(image)
        x = layers.LayerNormalization(axis=[1, 2, 3])(x)
        model = keras.Model(image, layers.Dense(3)(layers.Flatten()(x)))
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        before = helpers.copies(model.trainable_variables)
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(0 * v) for v in model.trainable_variables])
        optimizers.descend(tape, loss, model, optimizer, weight_decay=0.5)
        for variable, value in zip(model.trainable_variables, before):
            factor = 0.95 if "kernel" in variable.name else 1.0
            self.assertAllClose(variable, factor * value, msg=variable.name)


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


class MuonTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters((5, 9), (9, 5), (6, 6))
    def test_singular_values_are_near_1_and_vectors_stay(self, m, n):
        given = np.random.default_rng(0).normal(size=(m, n)).astype(np.float32)
        left, values, right = np.linalg.svd(given, full_matrices=False)
        # Its five steps as polynomials of the singular values, in float64.
        expected = values.astype(np.float64) / np.linalg.norm(given)
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        found = muon.orthogonal(tf.constant(given)).numpy()
        self.assertAllClose(found, (left * expected) @ right, atol=1e-4)
        self.assertAllInRange(expected, 0.6, 1.3)

    def test_kernel_moves_by_its_share_and_keeps_its_norm(self):
        rng = np.random.default_rng(1)
        start, *gradients = rng.normal(size=(3, 3, 3, 4, 5)).astype(np.float32)
        kernel = tf.Variable(start)
        optimizer = muon.Muon(0.5, 0.9, 0.2)
        optimizer.build([kernel])
        expected, momentum = start.reshape(36, 5), 0.0
        for gradient in gradients:
            momentum = 0.9 * momentum + gradient.reshape(36, 5)
            ahead = tf.constant(gradient.reshape(36, 5) + 0.9 * momentum)
            step = muon.orthogonal(ahead).numpy()
            norm = np.linalg.norm(expected)
            moved = expected - 0.5 * 0.2 * norm * step / np.linalg.norm(step)
            expected = moved * norm / np.linalg.norm(moved)
            optimizer.apply_gradients([(tf.constant(gradient), kernel)])
        self.assertAllClose(kernel, expected.reshape(start.shape), atol=1e-5)
        self.assertAllClose(tf.norm(kernel), np.linalg.norm(start), rtol=1e-5)

    @parameterized.parameters("kernel", "gradient")
    def test_zeros_stay_finite(self, what):
        start, gradient = np.random.default_rng(3).normal(size=(2, 3, 3, 4, 5))
        start, gradient = (
            np.zeros_like(value) if name == what else value
            for name, value in (("kernel", start), ("gradient", gradient))
        )
        kernel = tf.Variable(start.astype(np.float32))
        optimizer = muon.Muon(0.5, 0.9, 0.2)
        optimizer.build([kernel])
        for _ in range(2):
            optimizer.apply_gradients([(tf.constant(gradient, tf.float32), kernel)])
        if what == "gradient":
            self.assertAllClose(kernel, start, rtol=1e-6)
            return
        # A tenth of a norm of 1, and down the gradient.
        self.assertAllClose(tf.norm(kernel), 0.1, rtol=1e-5)
        self.assertLess(np.sum(kernel.numpy() * gradient), 0)

    @parameterized.parameters(
        ((4, 5),), ((5,),), ((3, 3, 4, 1),), ((3, 3, 1, 4),), ((3, 4, 5),)
    )
    def test_all_else_moves_as_by_sgd(self, shape):
        rng = np.random.default_rng(2)
        start, *gradients = rng.normal(size=(3, *shape)).astype(np.float32)
        found = []
        for optimizer in (
            muon.Muon(0.1, 0.9, 0.2),
            keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
        ):
            variable = tf.Variable(start)
            optimizer.build([variable])
            for gradient in gradients:
                optimizer.apply_gradients([(tf.constant(gradient), variable)])
            found.append(variable.numpy())
        self.assertAllClose(*found, rtol=1e-6)

    def test_depthwise_kernels_and_the_last_one_are_moved_by_sgd(self):
        """Muon would mix channels of the first, and keep the norm of the logits'."""
        layers = keras.layers
        model = keras.Sequential(
            [
                layers.Input((6, 6, 3)),
                layers.DepthwiseConv2D(3, depth_multiplier=2),
                layers.SeparableConv2D(4, 3, depth_multiplier=2),
                layers.Conv2D(5, 1),
                layers.GlobalAveragePooling2D(),
            ]
        )
        optimizer = optimizers.muon(model, 0.2, 0.05, 10, 0.9)
        rng, moved = np.random.default_rng(4), {}
        for kernel in (v for v in model.trainable_variables if v.shape.rank == 4):
            gradient = tf.constant(rng.normal(size=kernel.shape).astype(np.float32))
            twin = tf.Variable(kernel)
            sgd = keras.optimizers.SGD(0.2, momentum=0.9, nesterov=True)
            sgd.build([twin])
            optimizer.apply_gradients([(gradient, kernel)])
            sgd.apply_gradients([(gradient, twin)])
            moved[kernel.name.split("/")[-1]] = np.allclose(kernel, twin, rtol=1e-5)
            optimizer.iterations.assign(0)
        expected = {"depthwise_kernel:0": True, "pointwise_kernel:0": False}
        self.assertEqual(moved, {**expected, "kernel:0": True})

    def test_last_kernel_is_the_last_one_before_slopes_too(self):
        layers = keras.layers
        convs = [layers.Conv2D(4, 1), layers.Conv2D(5, 1)]
        slopes = layers.PReLU(shared_axes=[1, 2])
        model = keras.Sequential(
            [layers.Input((6, 6, 3)), *convs, slopes, layers.GlobalAveragePooling2D()]
        )
        optimizer = optimizers.muon(model, 0.2, 0.05, 10, 0.9)
        self.assertEqual(optimizer._others, {optimizer._var_key(convs[1].kernel)})

    def test_weight_without_a_gradient_stays(self):
        model = keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(2)])
        before = helpers.copies(model.trainable_variables)
        optimizer = optimizers.sgd(model, 0.1, 10, 0.9)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model.layers[-1].bias)
        optimizers.descend(tape, loss, model, optimizer, weight_decay=0.1)
        kernel, bias = model.trainable_variables
        self.assertAllEqual(kernel, before[0])
        self.assertNotAllEqual(bias, before[1])

    def test_both_rates_fall_to_0_by_a_cosine(self):
        end = tf.Variable(4)
        model = helpers.small_learner((4, 4, 1)).model
        optimizer = optimizers.muon(model, 0.2, 0.05, end, 0.9)
        expected = 0.5 * (1 + np.cos(np.pi * np.arange(6).clip(max=4) / 4))
        found = [optimizer._learning_rate(step) for step in range(6)]
        self.assertAllClose(found, 0.2 * expected, atol=1e-7)
        self.assertAllClose(optimizer.kernel_share * 0.2, 0.05)


if __name__ == "__main__":
    tf.test.main()
