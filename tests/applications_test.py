"""The networks of `keras.applications`, with random weights: nothing is downloaded."""

import numpy as np
import pytest
from absl.testing import parameterized

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.quantization.post_training import float_network, post_training
from dfq_tf.settings import BitWidths, CalibrationConfig, FileConfig
from dfq_tf.tflite.proof import convert
from dfq_tf.tflite.running import TFLiteClassifier
from tests import applications

QUICK = [("MobileNetV2", "keras3")]
# The others take half a minute each. Keras 2 writes the last one with functions of
# TensorFlow in place of layers.
LONG = [(name, "keras3") for name in applications.NETWORKS if name != "MobileNetV2"]
LONG += [("MobileNetV3Small", "keras2")]
SIDE = 32
CONFIG = CalibrationConfig(activation_range="min_max", weight_range="min_max")


class ApplicationsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*QUICK)
    @pytest.mark.long
    def test_float_network_is_the_same_and_the_file_is_integer(self, name, library):
        self.check(name, library)

    @parameterized.parameters(*LONG)
    @pytest.mark.long
    def test_so_it_is_with_all_others(self, name, library):
        self.check(name, library)

    def check(self, name, library):
        library = {"keras3": keras3(), "keras2": keras}[library]
        model, fed = applications.build(library, name, (SIDE, SIDE, 3), 5)
        # Compares with the model's own answers.
        classifier = as_classifier(model, **fed)
        images = applications.smooth_images((SIDE, SIDE, 3), 32, seed=0)[:16]
        network = float_network(classifier, CONFIG)
        expected = classifier.scores(images)
        spread = np.abs(expected).max()
        self.assertGreater(expected.std(axis=0).mean(), 0.001 * spread)
        rewritten = network.scores(images)
        self.assertAllClose(rewritten, expected, rtol=0, atol=1e-4 * spread)
        kinds = {node.kind for node in network.graph.nodes.values()}
        self.assertNotIn("batch_normalization", kinds)

        quantized = post_training(network, images, BitWidths(), CONFIG)
        logits = FileConfig(file_output="logits")
        content = convert(quantized, images, logits)  # checks that it is integer-only
        tflite = TFLiteClassifier(content)
        self.assertEqual(tflite.image_shape, (SIDE, SIDE, 3))
        # A byte for each weight, and a little more.
        self.assertBetween(len(content), model.count_params(), 1.5e8)
        # Random networks spread every rounding; the file and the network still are
        # much closer to each other than answers to different images are.
        ours, theirs = tflite.scores(images), quantized.scores(images)
        self.assertLess(np.abs(ours - theirs).mean(), 0.5 * theirs.std(axis=0).mean())


if __name__ == "__main__":
    tf.test.main()
