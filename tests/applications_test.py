"""The networks of `keras.applications`, with random weights: nothing is downloaded."""

import os

import numpy as np
from absl.testing import parameterized

import dfq_tf
from dfq_tf import api
from dfq_tf.compat import keras, keras3, tf
from dfq_tf.quantization import apply, calibration
from dfq_tf.quantization.integers import round_biases
from dfq_tf.tflite import export
from tests import applications

NETWORKS = [(name, "keras3") for name in applications.NETWORKS]
# The others take half a minute each, and are run with this variable set.
ALL = "DFQ_TF_ALL_NETWORKS"
QUICK = ("MobileNet", "MobileNetV2", "MobileNetV3Small")
# Keras 2 writes this one with functions of TensorFlow in place of layers.
NETWORKS += [("MobileNetV3Small", "keras2")]
SIDE = 32
CONFIG = dfq_tf.CalibrationConfig(activation_range="min_max", weight_range="min_max")


class ApplicationsTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(*NETWORKS)
    def test_float_network_is_the_same_and_the_file_is_integer(self, name, library):
        if name not in QUICK and not os.environ.get(ALL):
            self.skipTest(f"{name} takes long; {ALL}=1 runs it")
        library = {"keras3": keras3(), "keras2": keras}[library]
        model, fed = applications.build(library, name, (SIDE, SIDE, 3), 5)
        # Compares with the model's own answers.
        classifier = dfq_tf.as_classifier(model, **fed)
        images = applications.smooth_images((SIDE, SIDE, 3), 32, seed=0)[:16]
        graph, description = api.float_network(classifier, CONFIG)
        rewritten = graph.build()(description.normalize(images), training=False)
        expected = classifier.scores(images)
        spread = np.abs(expected).max()
        self.assertGreater(expected.std(axis=0).mean(), 0.001 * spread)
        self.assertAllClose(rewritten, expected, rtol=0, atol=1e-4 * spread)
        kinds = {node.kind for node in graph.nodes.values()}
        self.assertNotIn("BatchNormalization", kinds)

        ranges = calibration.calibrate(
            graph, description, images, dfq_tf.BitWidths(), CONFIG
        )
        student = apply.quantize_graph(
            graph, description, dfq_tf.BitWidths(), ranges, "min_max"
        )
        round_biases(student.model)
        content = export.convert(student)  # checks that it is integer-only
        tflite = dfq_tf.TFLiteClassifier(content)
        self.assertEqual(tflite.image_shape, (SIDE, SIDE, 3))
        # A byte for each weight, and a little more.
        self.assertBetween(len(content), classifier.model.count_params(), 1.5e8)
        # Random networks spread every rounding; the file and the student still are
        # much closer to each other than answers to different images are.
        ours, theirs = tflite.scores(images), student.scores(images)
        self.assertLess(np.abs(ours - theirs).mean(), 0.5 * theirs.std(axis=0).mean())


if __name__ == "__main__":
    tf.test.main()
