"""What trains a network: an optimizer with a cosine decay, and one step down."""

import math
from collections.abc import Sequence
from typing import Any

from dfq_tf.compat import keras, tf
from dfq_tf.training.muon import Muon
from dfq_tf.training.replicas import num_replicas

# What Keras calls variables that are no kernels, though they may have several axes:
# shifts, scales, and the slopes of PReLU.
_NO_KERNELS = ("bias", "beta", "gamma", "alpha")


def adam(
    model: keras.Model, learning_rate: float, num_steps: Any, times: int = 1
) -> Any:
    """Adam, built for a model, its learning rate falling to 0.

    Args:
      model: is trained.
      learning_rate: at first.
      num_steps: until it is 0: a number, or a variable, see `CosineOf`.
      times: what num_steps is to be multiplied by.
    """
    # The legacy one updates a variable in one operation: a fifth of the time that the
    # newer one takes for a generator.
    optimizer = keras.optimizers.legacy.Adam(_cosine(learning_rate, num_steps, times))
    # Variables that a compiled step made would have it traced twice.
    optimizer._create_all_weights(model.trainable_variables)
    return optimizer


def steady_adam(
    variables: Sequence[tf.Variable],
    learning_rate: float,
    betas: tuple[float, float],
) -> Any:
    """Adam, built for variables, its learning rate always the same.

    Args:
      variables: that it will change.
      learning_rate: as it is.
      betas: decay of the means of gradients and of their squares.
    """
    optimizer = keras.optimizers.legacy.Adam(learning_rate, *betas)
    optimizer._create_all_weights(variables)
    return optimizer


class CosineOf(keras.optimizers.schedules.LearningRateSchedule):
    """A cosine decay to 0 whose end is a variable, set once the end is known.

    Args:
      learning_rate: at step 0.
      num_steps: scalar variable, int64 or float32: a step that XLA compiles for a GPU
        does not reach int32, which TensorFlow keeps in the memory of the CPU.
      times: what it is to be multiplied by.
    """

    def __init__(
        self, learning_rate: float, num_steps: tf.Variable, times: int = 1
    ) -> None:
        super().__init__()
        self.learning_rate, self.num_steps = learning_rate, num_steps
        self.times = times

    def __call__(self, step: Any) -> tf.Tensor:
        """The learning rate at a step, float32."""
        end = tf.cast(self.num_steps * self.times, tf.float32)
        done = tf.minimum(tf.cast(step, tf.float32) / tf.maximum(end, 1.0), 1.0)
        return self.learning_rate * 0.5 * (1 + tf.cos(math.pi * done))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "learning_rate": self.learning_rate,
            "num_steps": self.num_steps,
            "times": self.times,
        }


def sgd(
    model: keras.Model,
    learning_rate: float,
    num_steps: Any,
    momentum: float,
    times: int = 1,
) -> Any:
    """SGD with Nesterov momentum, otherwise like `adam`.

    Args:
      model: is trained.
      learning_rate: at first.
      num_steps: a number, or a variable, see `CosineOf`.
      momentum: in [0, 1).
      times: see `adam`.
    """
    schedule = _cosine(learning_rate, num_steps, times)
    optimizer = keras.optimizers.SGD(schedule, momentum=momentum, nesterov=True)
    optimizer.build(model.trainable_variables)
    return optimizer


def muon(
    model: keras.Model,
    learning_rate: float,
    kernel_share: float,
    num_steps: Any,
    momentum: float,
) -> Muon:
    """Muon for kernels of convolutions, `sgd` for all else; both rates fall to 0.

    Depthwise kernels, and those that read or give a single channel, are no matrices of
    inputs and outputs; and the last kernel is to have the norm that the logits need:
    they are `sgd`'s too.

    Args:
      model: is trained.
      learning_rate: of SGD, at first.
      kernel_share: share of a kernel's norm by which a step moves it, at first.
      num_steps: a number, or a variable, see `CosineOf`.
      momentum: in [0, 1).
    """
    schedule = _cosine(learning_rate, num_steps, 1)
    kernels = [v for v in model.trainable_variables if is_kernel(v)]
    depthwise = [
        each.depthwise_kernel
        for each in model.submodules
        if hasattr(each, "depthwise_kernel")
    ]
    others = [*depthwise, *kernels[-1:]]
    optimizer = Muon(schedule, momentum, kernel_share / learning_rate, others)
    optimizer.build(model.trainable_variables)
    return optimizer


def descend(
    tape: tf.GradientTape,
    loss: tf.Tensor,
    model: keras.Model,
    optimizer: Any,
    weight_decay: float = 0.0,
) -> None:
    """Takes one step down the gradient of a loss, the mean of those of all replicas.

    Args:
      tape: has recorded the loss.
      loss: scalar.
      model: its trainable variables are changed.
      optimizer: built for them.
      weight_decay: weight_decay * w is added to the gradient of each kernel w;
        biases, scales, shifts and slopes are left alone.
    """
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    if weight_decay:
        gradients = [
            g if g is None or not is_kernel(v) else g + weight_decay * v
            for g, v in zip(gradients, variables)
        ]
    count = num_replicas()
    if count > 1:  # the optimizer adds up the gradients of all replicas
        gradients = [g if g is None else g / count for g in gradients]
    optimizer.apply_gradients(zip(gradients, variables))


def is_kernel(variable: tf.Variable) -> bool:
    """Whether a layer's variable is a kernel, and no bias, scale or slope.

    Args:
      variable: named by Keras.
    """
    name = variable.name.split("/")[-1].split(":")[0]
    return variable.shape.rank > 1 and name not in _NO_KERNELS


def _cosine(learning_rate: float, num_steps: Any, times: int) -> Any:
    if isinstance(num_steps, tf.Variable):
        return CosineOf(learning_rate, num_steps, times)
    end = max(1, num_steps * times)
    return keras.optimizers.schedules.CosineDecay(learning_rate, end)
