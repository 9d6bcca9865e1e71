import numpy as np
from absl.testing import parameterized

from dfq_tf import calibration
from dfq_tf.compat import keras, tf
from dfq_tf.errors import TrainingError
from dfq_tf.quantization import apply
from tests import networks


class CalibrateTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters("vgg_like", "resnet_like", "mobilenet_like")
    def test_ranges_are_the_extremes_of_the_float_network(self, name):
        classifier = networks.build(name)
        images = networks.images(classifier.image_shape, 50, seed=3)
        graph, description = apply.integer_ready(classifier)
        ranges = calibration.calibrate(graph, description, images, batch_size=16)
        # Activations and sums mean the same in the rewritten network and before.
        kinds = (keras.layers.ReLU, keras.layers.Activation, keras.layers.Add)
        kinds += (keras.layers.GlobalAveragePooling2D,)
        common = [
            layer
            for layer in classifier.model.layers
            if isinstance(layer, kinds) and layer.name in ranges
        ]
        self.assertGreaterEqual(len(common), 3)
        observed = keras.Model(classifier.model.input, [la.output for la in common])
        pixels = images.astype(np.float32)
        outputs = observed(classifier.description.normalize(pixels), training=False)
        for layer, output in zip(common, outputs):
            low, high = ranges[layer.name]
            self.assertAllClose(low, min(np.min(output), 0.0), atol=1e-4)
            self.assertAllClose(high, np.max(output), rtol=1e-4)

    def test_last_short_batch_counts(self):
        classifier = networks.build("resnet_like")
        graph, description = apply.integer_ready(classifier)
        # The only image that is not black comes last, in a batch of its own.
        images = np.zeros((5, *classifier.image_shape), np.uint8)
        images[4] = networks.images(classifier.image_shape, 1)
        ranges = calibration.calibrate(graph, description, images, batch_size=4)
        black = calibration.calibrate(graph, description, images[:4], batch_size=4)
        both = calibration.calibrate(graph, description, images, batch_size=5)
        self.assertNotAllClose(list(ranges.values()), list(black.values()))
        self.assertAllClose(list(ranges.values()), list(both.values()), atol=1e-4)

    def test_every_quantized_output_has_a_range(self):
        classifier = networks.build("densenet_like")
        graph, description = apply.integer_ready(classifier)
        images = networks.images(classifier.image_shape, 8)
        ranges = calibration.calibrate(graph, description, images)
        self.assertCountEqual(ranges, apply.quantized_nodes(graph))
        for low, high in ranges.values():
            self.assertLessEqual(low, 0.0)
            self.assertGreater(high, low)

    def test_pixels_have_their_full_range_whatever_the_images(self):
        classifier = networks.build("resnet_like")
        graph, description = apply.integer_ready(classifier)
        images = np.full((2, *classifier.image_shape), 100, np.uint8)
        ranges = calibration.calibrate(graph, description, images)
        self.assertEqual(ranges["pixels"], (-120 / 64, 135 / 64))

    def test_names_the_layer_that_is_not_finite(self):
        classifier = networks.build("resnet_like")
        logits = classifier.model.layers[-1]
        # Finite weights whose output is not.
        logits.kernel.assign(np.full(logits.kernel.shape, 3e38))
        logits.bias.assign([0, 0, 3e38, 0, 0])
        graph, description = apply.integer_ready(classifier)
        images = networks.images(classifier.image_shape, 2)
        with self.assertRaisesRegex(
            TrainingError,
            f"output of layer {logits.name}.* is not finite on the calibration",
        ):
            calibration.calibrate(graph, description, images)


if __name__ == "__main__":
    tf.test.main()
