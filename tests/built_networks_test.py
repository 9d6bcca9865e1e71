"""Every network that the project builds goes the whole way to an integer file."""

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.models import build_model
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.reports import layer_noise
from dfq_tf.settings import BitWidths, CalibrationConfig, parse_widths
from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import TFLiteClassifier
from dfq_tf.training.learner import Learner
from tests import networks


def classifier_of(name, shape):
    """The network, its BN statistics those of a pass over images."""
    keras.utils.set_random_seed(0)
    model = build_model(name, shape, networks.NUM_CLASSES)
    images = (networks.images(shape, 64).astype(np.float32) - 120) / 64
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
    model(images, training=True)
    names = tuple(map(str, range(networks.NUM_CLASSES)))
    description = ModelDescription((120.0,), (1 / 64,), "logits", names)
    return as_classifier(Learner(model, description))


class BuiltNetworksTest(tf.test.TestCase, parameterized.TestCase):
    def test_file_computes_every_layer(self):
        self.check("mobilenet_v1_25", (32, 32, 3), "W8A8")

    @parameterized.parameters(
        ("mobilenet_v1_25", (32, 32, 3), "W4A8"),
        ("resnet_18", (16, 16, 3), "W8A8"),
        ("vgg_11", (32, 32, 3), "W8A8"),
        ("resnet_18", (16, 16, 3), "W4A8"),
    )
    @pytest.mark.long
    def test_file_of_a_large_network_computes_every_layer(self, name, shape, widths):
        self.check(name, shape, widths)

    def check(self, name, shape, widths):
        classifier = classifier_of(name, shape)
        config = CalibrationConfig(activation_range="min_max")
        network = float_network(classifier, config)
        images = networks.images(shape, 48, seed=1)
        # The float rewrite is the same function.
        scores = classifier.scores(images)
        rewritten = network.scores(images)
        self.assertGreater(np.ptp(scores, axis=0).min(), 0)
        self.assertAllClose(rewritten, scores, rtol=1e-3, atol=1e-3 * np.ptp(scores))

        quantized = post_training(
            network, images, parse_widths(widths, BitWidths()), config
        )
        content = convert(quantized, images)
        tflite = TFLiteClassifier(content)
        noise = layer_noise.measure(network, content, images[:4])
        # 8 bits are worth about 40 dB in every layer by itself, 4 bits half of that.
        least = 25 if widths == "W8A8" else 10
        self.assertGreater(layer_noise.worst(noise).own_db, least)
        if widths == "W8A8":
            # Such random networks spread each rounding through all their layers.
            error = np.abs(tflite.scores(images) - scores).mean()
            self.assertLess(error, 0.05 * np.ptp(scores))
            self.assertEqual(tflite.num_pieces, 1)
        types = {layer.weights for layer in noise if layer.kind.startswith("conv")}
        self.assertEqual("int4" in types, widths == "W4A8")


if __name__ == "__main__":
    tf.test.main()
