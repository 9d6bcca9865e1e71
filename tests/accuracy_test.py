import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.with_data.accuracy import accuracy

_SCORES = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 1.0], [0.1, 0.2, 0.3], [9.0, 0, 0]])


class AccuracyTest(parameterized.TestCase, tf.test.TestCase):
    @parameterized.parameters(
        ([0, 1, 2, 0], 1.0), ([0, 1, 2, 1], 0.75), ([1, 2, 0, 1], 0.0)
    )
    def test_accuracy_is_share_of_labels_with_largest_score(self, labels, expected):
        self.assertEqual(accuracy(_SCORES, np.array(labels)), expected)


if __name__ == "__main__":
    tf.test.main()
