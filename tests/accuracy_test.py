import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.graph.classifier import agreement
from dfq_tf.with_data.accuracy import accuracy

_SCORES = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.1, 0.2, 0.3], [9.0, 0, 0]])


class AccuracyTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ([0, 1, 2, 0], 1.0), ([0, 1, 2, 1], 0.75), ([1, 2, 0, 1], 0.0)
    )
    def test_accuracy_is_share_of_labels_with_largest_score(self, labels, expected):
        self.assertEqual(accuracy(_SCORES, np.array(labels)), expected)

    def test_agreement_compares_classes_and_not_scores(self):
        other = np.array([[0.1, 0.0, 0.0], [0, 1, 0], [1, 0, 0], [0, 0, 1.0]])
        self.assertEqual(agreement(_SCORES, other), 0.5)
        self.assertEqual(agreement(_SCORES, -100 + _SCORES / 7), 1.0)

    def test_agreement_is_symmetric(self):
        rng = np.random.default_rng(0)
        a, b = rng.normal(size=(2, 50, 3))
        self.assertEqual(agreement(a, b), agreement(b, a))
        self.assertEqual(agreement(a, b), accuracy(a, b.argmax(axis=1)))


if __name__ == "__main__":
    tf.test.main()
