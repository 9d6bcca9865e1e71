"""A model cut to what is read of it: one output, without the wrappers of tfmot.

These are of pruning, of clustering and of quantization.
"""

import contextlib
import inspect
import shlex
import warnings
from collections.abc import Iterator
from typing import Any

from dfq_tf.compat import keras, keras3, tfmot
from dfq_tf.errors import ConfigError
from dfq_tf.importing.reading import has_layers, is_keras3, named_outputs

# Of weights that a training made zero, or few: what they did; and what takes them off.
_OF_WEIGHTS = {
    "PruneLowMagnitude": (
        "pruned it in its training; they are taken off (strip_pruning), and the zeros "
        "stay. An int8 file is no smaller for zeros",
        tfmot.sparsity.keras.strip_pruning,
    ),
    "ClusterWeights": (
        "clustered its weights in its training; they are taken off (strip_clustering), "
        "and the weights stay. An int8 file is no smaller for clusters",
        tfmot.clustering.keras.strip_clustering,
    ),
}
_WRAPPERS = ("QuantizeWrapperV2", "QuantizeWrapper", "QuantizeAnnotate")
_OF_TENSORS = "QuantizeLayer"  # wraps nothing: it rounds what passes
# Classes of tfmot's layers that quantize.
OF_QUANTIZATION = (*_WRAPPERS, _OF_TENSORS)
# Layers of keras.applications' own -> a network that has them.
_OF_APPLICATIONS = {
    "CustomScaleLayer": "InceptionResNetV2",
    "LayerScale": "ConvNeXtTiny",
    "StochasticDepth": "ConvNeXtTiny",
}


class _BuiltInside(tfmot.quantization.keras.QuantizeWrapperV2):
    """A wrapper that builds its layer first, as it was when a `.keras` file was made.

    Otherwise it has fewer weights than the file.
    """

    def build(self, input_shape: Any) -> None:
        """Called by Keras."""
        if not self.layer.built:
            self.layer.build(input_shape)
            self.layer.built = True
        super().build(input_shape)


_BuiltInside.__name__ = "QuantizeWrapperV2"


@contextlib.contextmanager
def known_to(library: Any) -> Iterator[None]:
    """Lets Keras read models in the block of which it would not find all layers.

    These are layers of its own applications and, of Keras 2, wrappers of tfmot.

    Args:
      library: Keras 2 or 3.
    """
    known = {
        kind: getattr(inspect.getmodule(getattr(library.applications, network)), kind)
        for kind, network in _OF_APPLICATIONS.items()
    }
    with contextlib.ExitStack() as scopes:
        if library is keras:
            own = keras.layers.SpectralNormalization  # which it writes, and cannot find
            known |= {"QuantizeWrapperV2": _BuiltInside, own.__name__: own}
            scopes.enter_context(tfmot.quantization.keras.quantize_scope())
            scopes.enter_context(tfmot.sparsity.keras.prune_scope())
            scopes.enter_context(tfmot.clustering.keras.cluster_scope())
        scopes.enter_context(library.utils.custom_object_scope(known))
        yield


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
    model = _unwrapped(model)
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


def _unwrapped(model: Any) -> Any:
    """A model without the wrappers of tfmot, with the float weights in them.

    Args:
      model: functional or Sequential, of Keras 2 or 3.

    Warns:
      UserWarning: wrappers are taken off.
    """
    if is_keras3(model):
        return model  # tfmot has none for it
    for name, (what, strip) in _OF_WEIGHTS.items():
        if count := _count(model, name):
            warnings.warn(
                f"the model has {count} layers in {name} wrappers, which {what}",
                stacklevel=5,
            )
            model = strip(model)
    return _without_quantization(model)


def _count(model: Any, *kinds: str) -> int:
    return sum(type(layer).__name__ in kinds for layer in model._flatten_layers())


def _without_quantization(model: Any) -> Any:
    count = _count(model, *OF_QUANTIZATION)
    if not count:
        return model
    warnings.warn(
        f"the model has {count} layers of tfmot ({_WRAPPERS[0]} and its like), "
        "which quantized it in its training; they are taken off. The float weights "
        "are kept, and all ranges are found anew",
        stacklevel=6,
    )
    return _float_copy(model)


def _float_copy(model: Any) -> Any:
    """A copy of a model in which wrapped layers are new, and all others the same."""
    made = []

    def copy(layer: Any) -> Any:
        kind = type(layer).__name__
        if kind == _OF_TENSORS:
            return keras.layers.Identity(name=layer.name)
        if kind in _WRAPPERS:
            made.append((layer, _float_layer(layer.layer)))
            return made[-1][1]
        return _float_copy(layer) if has_layers(layer) else layer

    result = keras.models.clone_model(model, clone_function=copy)
    for wrapper, layer in made:
        weights = _float_weights(wrapper)
        layer.set_weights([weights[_role(each)] for each in layer.weights])
    return result


def _float_layer(layer: Any) -> Any:
    """A layer like one in a wrapper, which has put its own activation there."""
    config = layer.get_config()
    if "activation" in config:
        activation = layer.activation
        if type(activation).__name__ == "QuantizeAwareActivation":
            activation = activation.activation
        if type(activation).__name__ == "NoOpActivation":
            activation = keras.activations.linear
        config["activation"] = keras.activations.serialize(activation)
    return type(layer).from_config(config)


def _float_weights(wrapper: Any) -> dict[str, Any]:
    """The weights of a wrapped layer, by role.

    The wrapper keeps those that it rounds; the layer has the rounded ones in place.
    """
    rounded = [weight for weight, *_ in getattr(wrapper, "_weight_vars", ())]
    return {_role(each): each.numpy() for each in [*wrapper.layer.weights, *rounded]}


def _role(weight: Any) -> str:
    """Such as 'kernel', of 'conv/kernel:0'."""
    return weight.name.split(":")[0].split("/")[-1]
