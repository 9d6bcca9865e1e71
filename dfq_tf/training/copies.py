"""Copies of Keras models: in another number format, or with other weights.

bfloat16 speeds up convolutions only where the processor multiplies faster in it;
elsewhere it is slower than float32. Variables stay float32 in either case.
"""

import itertools
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from dfq_tf.compat import is_of_layers, keras, tf
from dfq_tf.settings import PRECISIONS, check_value
from dfq_tf.training.optimizers import is_kernel

# AMX is fast everywhere. Of those that have AVX-512's bfloat16, AMD's processors are
# faster in it than in float32, and Intel's nearly twice as slow:
# docs/experiments/speed.md.
_FAST = ({"amx_bf16"}, {"avx512_bf16", "AuthenticAMD"})


def has_fast_bfloat16(cpuinfo: str | None = None) -> bool:
    """Says whether the GPU, or else the processor, multiplies faster in bfloat16.

    Args:
      cpuinfo: the text of /proc/cpuinfo; by default it is read, and a machine
        without that file counts as one without bfloat16.
    """
    for gpu in tf.config.get_visible_devices("GPU"):
        capability = tf.config.experimental.get_device_details(gpu).get(
            "compute_capability", (0, 0)
        )
        return capability >= (8, 0)  # Ampere and later
    if cpuinfo is None:
        path = pathlib.Path("/proc/cpuinfo")
        cpuinfo = path.read_text() if path.exists() else ""
    words = set(cpuinfo.split())
    return any(needed <= words for needed in _FAST)


def resolve_precision(precision: str) -> str:
    """Turns 'auto' into 'bfloat16' or 'float32'.

    Raises:
      ConfigError: `precision` is not one of auto, float32, bfloat16.
    """
    check_value("precision", precision, {"choices": PRECISIONS})
    if precision != "auto":
        return precision
    return "bfloat16" if has_fast_bfloat16() else "float32"


def cloned(
    model: keras.Model,
    copy: Callable[[keras.layers.Layer, bool], keras.layers.Layer],
) -> keras.Model:
    """A model of copied layers, those of models inside it too; its weights are new.

    Args:
      model: functional or Sequential, as are those inside it.
      copy: copies a layer; it is told whether the layer gives the first output: the
        last one, or all from the last kernel on, see `_end_of`.
    """

    def of(inner: keras.Model, gives_output: bool) -> keras.Model:
        end = _end_of(inner) if gives_output else set[str]()

        def clone(layer: keras.layers.Layer) -> keras.layers.Layer:
            is_last = layer.name in end
            return (of if is_of_layers(layer) else copy)(layer, is_last)

        return keras.models.clone_model(inner, clone_function=clone)

    return of(model, True)


def _end_of(model: keras.Model) -> set[str]:
    """Names of the layers that compute a model's scores: from the last kernel on.

    The last layer alone where the way back to a kernel branches, or leads through a
    layer that the model calls twice; and of images, which are no scores.
    """
    last, end = {model.output_names[0]}, set[str]()
    tensor: Any = model.outputs[0]
    is_known = len(tensor.shape) == 2
    while is_known:
        layer = tensor._keras_history.layer
        end.add(layer.name)
        if any(map(is_kernel, layer.weights)):
            return end
        # Other models may have been made of its layers, whose calls these have too.
        calls = [node for node in _calls(model) if node.layer is layer]
        is_known = len(calls) == 1 and len(calls[0].keras_inputs) == 1
        if is_known:
            (tensor,) = calls[0].keras_inputs
    return last


def _calls(model: keras.Model) -> Iterator[Any]:
    """The calls of layers that a model is made of."""
    return itertools.chain.from_iterable(model._nodes_by_depth.values())


def with_precision(model: keras.Model, precision: str) -> keras.Model:
    """Copies a functional model so that it computes in `precision`.

    Args:
      model: a float32 functional or Sequential model; others may be inside it.
      precision: as in `resolve_precision`.

    Returns:
      A model with its own float32 variables, holding the same values. The layer that
      gives its first output computes in float32, and if it gives scores, so do those
      before it from the last kernel on; all others are of `precision`.
    """
    policy = {"float32": "float32", "bfloat16": "mixed_bfloat16"}[
        resolve_precision(precision)
    ]

    def copied(layer: keras.layers.Layer, gives_output: bool) -> keras.layers.Layer:
        config = layer.get_config()
        config.pop("rng_type", None)  # of `learner.random_states`
        if not isinstance(layer, keras.layers.InputLayer):
            config["dtype"] = "float32" if gives_output else policy
        return layer.__class__.from_config(config)

    copy = cloned(model, copied)
    copy.set_weights(model.get_weights())
    return copy


def randomized(model: keras.Model, seed: int) -> keras.Model:
    """A network like another, its weights drawn anew by the layers' initializers.

    The random state of the program stays as it is.

    Args:
      model: functional or Sequential; others may be inside it.
      seed: decides the weights.
    """
    numbers = itertools.count(seed * 10_007)

    def copied(layer: keras.layers.Layer, gives_output: bool) -> keras.layers.Layer:
        config = _with_seeds(layer.get_config(), numbers)
        return layer.__class__.from_config(config)

    # What a layer draws by no setting of its own comes from Python's state, or from one
    # that Keras has made in `set_random_seed`.
    draws = keras.src.backend._SEED_GENERATOR
    state, own = random.getstate(), getattr(draws, "generator", None)
    random.seed(seed)
    draws.generator = random.Random(seed)
    try:
        return cloned(model, copied)
    finally:
        random.setstate(state)
        draws.generator = own


def _with_seeds(config: Any, numbers: Iterator[int]) -> Any:
    """A layer's settings, with the next seeds for its initializers.

    Args:
      config: has the settings of layers inside it too, as those of a wrapper.
      numbers: the seeds that are left.
    """
    if isinstance(config, (list, tuple)):
        parts = [_with_seeds(each, numbers) for each in config]
        return tuple(parts) if isinstance(config, tuple) else parts
    if not isinstance(config, dict):
        return config
    seeded = {}
    for name, value in config.items():
        change = _seeded if str(name).endswith("_initializer") else _with_seeds
        seeded[name] = change(value, numbers)
    return seeded


def _seeded(initializer: Any, numbers: Iterator[int]) -> Any:
    """A layer's initializer, as its settings have it, with the next seed if it draws.

    Args:
      initializer: a dictionary, or a name; None for what Keras takes then.
      numbers: the seeds that are left.
    """
    if initializer is None or isinstance(initializer, str):
        named = keras.initializers.get(initializer or "glorot_uniform")
        initializer = keras.initializers.serialize(named)
    settings = initializer.get("config") if isinstance(initializer, dict) else None
    if not isinstance(settings, dict) or "seed" not in settings:
        return initializer  # one that draws nothing, or is not Keras' own
    return {**initializer, "config": {**settings, "seed": next(numbers) % 2**31}}
