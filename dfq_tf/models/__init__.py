"""Networks by name: `build_model("wrn_16_1", (32, 32, 3), 10)`."""

import re
from collections.abc import Callable

from dfq_tf.compat import keras
from dfq_tf.errors import ConfigError
from dfq_tf.models.mobilenet import mobilenet_v1
from dfq_tf.models.resnet import resnet
from dfq_tf.models.vgg import vgg
from dfq_tf.models.wide_resnet import wide_resnet

__all__ = ["MODEL_NAMES", "build_model", "is_model_name"]

# Pattern of a name -> builder(*numbers in the name, input_shape, num_classes).
_BUILDERS: dict[str, Callable[..., keras.Model]] = {
    r"wrn_(\d+)_(\d+)": wide_resnet,
    r"resnet_(\d+)": resnet,
    r"vgg_(\d+)": vgg,
    r"mobilenet_v1_(\d+)": mobilenet_v1,
}

MODEL_NAMES = (
    "wrn_DEPTH_WIDTH, such as wrn_16_1 or wrn_40_2",
    "resnet_18",
    "resnet_34",
    "vgg_11",
    "mobilenet_v1_PERCENT, such as mobilenet_v1_100 or mobilenet_v1_25",
)


def build_model(
    name: str,
    input_shape: tuple[int, int, int],
    num_classes: int,
    argument: str = "model",
) -> keras.Model:
    """Builds a classifier with random weights.

    Args:
      name: see MODEL_NAMES.
      input_shape: (height, width, channels).
      num_classes: number of outputs.
      argument: what a message calls the name.

    Returns:
      A functional model from normalised images to logits.

    Raises:
      ConfigError: the name is unknown, or its numbers are impossible.
    """
    for pattern, builder in _BUILDERS.items():
        match = re.fullmatch(pattern, name)
        if match:
            numbers = map(int, match.groups())
            shapes = dict(input_shape=input_shape, num_classes=num_classes)
            try:
                return builder(*numbers, **shapes)
            except ConfigError as error:
                raise ConfigError(f"{argument} is {name!r}: {error}") from error
    raise ConfigError(
        f"{argument} is {name!r}; the project builds: {'; '.join(MODEL_NAMES)}"
    )


def is_model_name(name: str) -> bool:
    """Says whether `name` has the form of a network that the project builds."""
    return any(re.fullmatch(pattern, name) for pattern in _BUILDERS)
