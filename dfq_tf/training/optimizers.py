"""What trains a network: an optimizer with a cosine decay, and one step down."""

from typing import Any

from dfq_tf.compat import keras, tf
from dfq_tf.training.replicas import num_replicas


def adam(model: keras.Model, learning_rate: float, num_steps: int) -> Any:
    """Adam, built for a model, its learning rate falling to 0 over `num_steps`."""
    # The legacy one updates a variable in one operation: a fifth of the time that the
    # newer one takes for a generator.
    optimizer = keras.optimizers.legacy.Adam(_cosine(learning_rate, num_steps))
    # Variables that a compiled step made would have it traced twice.
    optimizer._create_all_weights(model.trainable_variables)
    return optimizer


def sgd(
    model: keras.Model, learning_rate: float, num_steps: int, momentum: float
) -> Any:
    """SGD with Nesterov momentum, otherwise like `adam`."""
    schedule = _cosine(learning_rate, num_steps)
    optimizer = keras.optimizers.SGD(schedule, momentum=momentum, nesterov=True)
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
        biases, scales and shifts are left alone.
    """
    variables = model.trainable_variables
    gradients = tape.gradient(loss, variables)
    if weight_decay:
        gradients = [
            g + weight_decay * v if v.shape.rank > 1 else g
            for g, v in zip(gradients, variables)
        ]
    count = num_replicas()
    if count > 1:  # the optimizer adds up the gradients of all replicas
        gradients = [g if g is None else g / count for g in gradients]
    optimizer.apply_gradients(zip(gradients, variables))


def _cosine(learning_rate: float, num_steps: int) -> Any:
    return keras.optimizers.schedules.CosineDecay(learning_rate, max(1, num_steps))
