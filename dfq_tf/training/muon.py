"""Muon, an optimizer for the kernels of convolutions."""

from collections.abc import Collection
from typing import Any

from dfq_tf.compat import keras, tf

# Of the polynomial a x + b x^3 + c x^5 that brings singular values in (0, 1] near 1 if
# it is applied five times: Jordan et al. 2024, "Muon: An optimizer for hidden layers in
# neural networks". They end between 0.7 and 1.2, which is near enough.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_TIMES = 5


def orthogonal(matrix: tf.Tensor) -> tf.Tensor:
    """A matrix with the singular vectors of another one, and singular values near 1.

    Args:
      matrix: float32 (m, n). Singular values below a thousandth of its norm end lower.

    Returns:
      float32 (m, n).
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = tf.transpose(matrix) if is_tall else matrix
    x = x / (tf.norm(x) + 1e-7)
    for _ in range(_TIMES):
        square = tf.matmul(x, x, transpose_b=True)
        x = a * x + tf.matmul(b * square + c * tf.matmul(square, square), x)
    return tf.transpose(x) if is_tall else x


class Muon(keras.optimizers.SGD):
    """SGD whose steps move a convolution's kernel by equal parts in all directions.

    The momentum of a kernel, as a matrix of inputs and outputs, is mostly a sum of few
    strong directions. `orthogonal` gives all of them the same strength (Jordan et al.
    2024). A step is as long as a share of the kernel's norm, and the norm stays as it
    was: where BatchNormalization follows, it has no meaning. A kernel of zeros has the
    length of its first step from then on. SGD with Nesterov momentum moves all else:
    depthwise kernels, those of dense layers, vectors, and kernels that read or give a
    single channel, such as the first ones for grey images.

    Args:
      learning_rate: of SGD; a number or a schedule.
      momentum: of both, in [0, 1).
      kernel_share: length of a step over the kernel's norm, for a learning rate of 1.
      others: kernels that SGD moves, though they look as those of convolutions.
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float,
        kernel_share: float,
        others: Collection[tf.Variable] = (),
    ) -> None:
        super().__init__(learning_rate, momentum=momentum, nesterov=True)
        self.kernel_share = kernel_share
        self._others = {self._var_key(variable) for variable in others}

    def update_step(self, gradient: tf.Tensor, variable: tf.Variable) -> None:
        """Moves a variable down its gradient."""
        shape = variable.shape
        is_other = self._var_key(variable) in self._others
        if is_other or shape.rank != 4 or min(shape[-2:]) == 1:
            super().update_step(gradient, variable)
            return
        momentum = self.momentums[self._index_dict[self._var_key(variable)]]
        momentum.assign(self.momentum * momentum + gradient)
        ahead = gradient + self.momentum * momentum
        step = orthogonal(tf.reshape(ahead, (-1, shape[-1])))
        share = tf.cast(self.learning_rate, variable.dtype) * self.kernel_share
        norm = tf.norm(variable)
        has_norm = norm > 0  # a kernel may begin with zeros, and its gradient be 0
        length = share * tf.where(has_norm, norm, 1.0)
        factor = tf.math.divide_no_nan(length, tf.norm(step))
        moved = variable - tf.reshape(step, shape) * factor
        back = tf.math.divide_no_nan(norm, tf.norm(moved))
        variable.assign(tf.where(has_norm, moved * back, moved))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments, without `others`."""
        rate = self._serialize_hyperparameter(self._learning_rate)
        return dict(
            learning_rate=rate, momentum=self.momentum, kernel_share=self.kernel_share
        )
