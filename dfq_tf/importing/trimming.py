"""A model cut to what is read of it: one output, without wrappers of training."""

import shlex
from typing import Any

from dfq_tf.compat import keras, keras3
from dfq_tf.errors import ConfigError
from dfq_tf.importing.reading import has_layers, is_keras3, named_outputs
from dfq_tf.importing.wrappers import unwrapped


def trimmed(model: Any, head: str | None = None) -> Any:
    """A model with the one output that is asked for.

    Args:
      model: of Keras 2 or 3; one that cannot be read is given back.
      head: the name of an output, see `reading.named_outputs`; needed where there are
        several.

    Raises:
      ConfigError: there are several outputs and no head, or none has that name.

    Warns:
      UserWarning: wrappers of pruning or of quantization are taken off.
    """
    if not has_layers(model) or not model.built or not model.outputs:
        return model
    model = unwrapped(model)
    outputs = named_outputs(model)
    if head is None and len(outputs) == 1:
        return model
    if head not in outputs:
        each = ", ".join(f"{k} {tuple(v.shape)}" for k, v in outputs.items())
        if len(outputs) == 1:
            raise ConfigError(
                f"head is {head!r}, but the model has one output, {each}; leave head "
                "out (--head)"
            )
        example = shlex.quote(next(iter(outputs)))
        wrong = "" if head is None else f"head is {head!r}, but "
        raise ConfigError(
            f"{wrong}the model has {len(outputs)} outputs: {each}; say which one gives "
            f"the scores of the classes, such as --head={example} (head)"
        )
    if len(outputs) == 1:
        return model
    library = keras3() if is_keras3(model) else keras
    return library.Model(model.inputs, outputs[head])
