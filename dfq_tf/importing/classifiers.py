"""Makes a `Classifier` of what a user has: a file or a model, of Keras 2 or Keras 3.

The model is read layer by layer into tf_keras layers, whose outputs are compared with
the model's own. Preprocessing at its head goes into the description, and a softmax or
sigmoid at its end is recognised.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, keras3
from dfq_tf.errors import ConfigError, LayerProblem, ModelError, UnsupportedLayerError
from dfq_tf.graph.classifier import Classifier, check_ends, check_has_layers
from dfq_tf.graph.description import ModelDescription, description_path
from dfq_tf.graph.graph import Graph, LayerRead, read_layers
from dfq_tf.graph.rewriting import head_activation, logits_graph, two_class_logits
from dfq_tf.importing.files import read_model
from dfq_tf.importing.keras2 import Keras2Reader
from dfq_tf.importing.keras3 import Keras3Reader, input_node
from dfq_tf.importing.preprocessing import Preprocessing, take_preprocessing
from dfq_tf.quantization.apply import is_quantized

# How far the rebuilt model may be from the original, as a share of its outputs: float
# rounding, or that of the 16 bits in which some layers compute.
_TOLERANCE, _TOLERANCE_16 = 1e-4, 5e-2
_SMALLEST_SIDE, _LARGEST_SIDE = 8, 512
_CHANNELS = (1, 3, 4)
_COMPARED_IMAGES = 4


def as_classifier(
    model: Any,
    *,
    input_mean: Sequence[float] | float | None = None,
    input_scale: Sequence[float] | float | None = None,
    output: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: Sequence[int] | None = None,
    allow_code: bool = False,
) -> Classifier:
    """Makes a classifier of a model, or of the file of one.

    Args:
      model: a functional or Sequential model of Keras 3 or tf_keras, or the path of a
        `.keras` or `.h5` file, beside which a `.json` may describe it; a Classifier
        is given back.
      input_mean: in pixels; one value or one per channel. The model's input is
        `(pixel - input_mean) * input_scale`. Not needed where the model has its own
        preprocessing, such as a Rescaling layer.
      input_scale: like `input_mean`; both or neither are given.
      output: 'logits', 'softmax' or 'sigmoid'; by default what the last layer says.
      class_names: one per class; by default their numbers. A model of one output has
        two classes.
      image_size: (height, width), for a model that takes any.
      allow_code: whether code that a file holds may be run, see `model_file`.

    Returns:
      A classifier that answers as the model does. One with Keras 3 layers, functions
      or preprocessing inside has been rebuilt to give logits.

    Raises:
      ModelError: the file cannot be read, or the model is no image classifier.
      UnsupportedLayerError: layers cannot be read; they are named.
      ConfigError: an argument does not fit the model, or is missing.
    """
    if isinstance(model, Classifier):
        return model
    told = _told(
        model,
        input_mean=input_mean,
        input_scale=input_scale,
        output=output,
        class_names=class_names,
        image_size=image_size,
        allow_code=allow_code,
    )
    if told.is_quantized:
        return _described(
            told.model, told.given, told.output or "logits", told.class_names
        )
    return classifier_of(_read(told))


def load_classifier(path: str | os.PathLike[str], **arguments: Any) -> Classifier:
    """Reads a classifier from a file; the arguments are those of `as_classifier`."""
    return as_classifier(pathlib.Path(path), **arguments)


@dataclasses.dataclass(frozen=True)
class _Told:
    """A model, and what the user and a description beside its file say of it."""

    model: Any
    is_keras3: bool
    given: Preprocessing | None
    output: str | None
    class_names: Sequence[str] | None
    image_size: Sequence[int] | None

    @property
    def is_quantized(self) -> bool:
        """Whether it is a student of this project."""
        has_layers = not self.is_keras3 and hasattr(self.model, "layers")
        return has_layers and is_quantized(self.model)


@dataclasses.dataclass(frozen=True)
class ModelReading:
    """A model, layer by layer, and what is said of it.

    Attributes:
      told: the model, and what is said of it.
      layers: all its layers, as they were found.
      problems: one for each layer that cannot be read.
      graph: the whole network, for one size of images where all could be read.
      must_build: whether that differs from the model.
    """

    told: _Told
    layers: Sequence[LayerRead]
    problems: Sequence[LayerProblem]
    graph: Graph
    must_build: bool

    def fed_pixels(self) -> "ModelReading":
        """The same, with the word that the model takes pixels as they are."""
        told = dataclasses.replace(self.told, given=_affine_of((0.0,), (1.0,)))
        return dataclasses.replace(self, told=told)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without the preprocessing at its head.

    Attributes:
      graph: what is left.
      own: what the preprocessing did, or None.
      feeding: what pixels go through before `graph`; None if nobody says.
      gives: 'logits', 'softmax' or 'sigmoid'.
      is_binary: whether it gives one score, for two classes.
    """

    graph: Graph
    own: Preprocessing | None
    feeding: Preprocessing | None
    gives: str
    is_binary: bool


def read(model: Any, **arguments: Any) -> ModelReading:
    """Reads a model to its end, whatever layers it has.

    Args:
      model: as in `as_classifier`.
      **arguments: as in `as_classifier`; what is missing is not asked for.

    Raises:
      ModelError: the file cannot be read, or the model is no image classifier.
      ConfigError: an argument does not fit the model.
    """
    told = _told(model, **arguments)
    if told.is_quantized:
        raise ModelError(
            "the model is quantized already: it is a student that this project made. "
            "Give the float model that it was made of"
        )
    return _read(told)


def network(reading: ModelReading) -> Network:
    """Takes the preprocessing off, and looks at what is given at the end.

    Raises:
      ConfigError: what the user says does not fit.
    """
    graph, own = take_preprocessing(reading.graph)
    given, image = reading.told.given, graph.nodes[graph.input_name]
    outputs = graph.nodes[graph.output_name].shape[-1]
    if given is not None:
        described(given, "logits", ("",) * outputs).check_fits(image.shape, outputs)
    return Network(
        graph,
        own,
        _composed(given, own),
        _output(graph, reading.told.output),
        outputs == 1,
    )


def classifier_of(reading: ModelReading) -> Classifier:
    """The classifier that answers as the model does; see `as_classifier`."""
    if reading.problems:
        raise UnsupportedLayerError.of(reading.problems)
    told, found = reading.told, network(reading)
    graph, gives = found.graph, found.gives
    if not (reading.must_build or found.own or found.is_binary):
        return _described(told.model, found.feeding, gives, told.class_names)
    if found.feeding is None:
        raise _no_feeding()
    if gives == "softmax" or found.is_binary:
        names = ("",) * graph.nodes[graph.output_name].shape[-1]
        graph = logits_graph(graph, described(found.feeding, gives, names))
        gives = "logits"
    if found.is_binary:
        graph = two_class_logits(graph)
    result = _described(graph.build(), found.feeding, gives, told.class_names)
    _check_same(
        told.model, told.is_keras3, result, told.given, found.gives, found.is_binary
    )
    return result


def _told(
    model: Any,
    *,
    input_mean: Sequence[float] | float | None = None,
    input_scale: Sequence[float] | float | None = None,
    output: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: Sequence[int] | None = None,
    allow_code: bool = False,
) -> _Told:
    """The arguments are those of `as_classifier`."""
    said = None
    if isinstance(model, (str, os.PathLike)):
        path = pathlib.Path(model)
        model = read_model(path, allow_code=allow_code)
        if input_mean is None and description_path(path).exists():
            said = ModelDescription.load(description_path(path))
    if said is not None:
        input_mean, input_scale = said.input_mean, said.input_scale
        output = output or said.output
        class_names = class_names or said.class_names
    if (input_mean is None) != (input_scale is None):
        raise ConfigError(
            f"input_mean is {input_mean} and input_scale is {input_scale}; give both "
            "or neither"
        )
    given = None
    if input_mean is not None:
        given = _affine_of(_tuple(input_mean), _tuple(input_scale))
    return _Told(model, _is_keras3(model), given, output, class_names, image_size)


def _is_keras3(model: Any) -> bool:
    modules = [each.__module__ for each in type(model).__mro__]
    return any(module.split(".")[0] == "keras" for module in modules)


def _read(told: _Told) -> ModelReading:
    """Reads the layers.

    Raises:
      ModelError: it is no image classifier with layers.
      ConfigError: `image_size` is missing, or given though the model has one.
    """
    model, is_keras3, image_size = told.model, told.is_keras3, told.image_size
    if not is_keras3:
        check_has_layers(model)
    elif not hasattr(getattr(model, "_functional", model), "operations"):
        raise ModelError(
            f"the model is a {type(model).__module__}.{type(model).__name__}; it must "
            "be a built functional or Sequential model, whose layers can be "
            "rewritten. A subclass of Model has functions in their place"
        )
    check_ends(model.inputs, model.outputs, any_size=True)
    reader = Keras3Reader(keras3()) if is_keras3 else Keras2Reader()
    reading = read_layers(model, reader)
    graph = reading.graph
    batch, *shape = model.inputs[0].shape
    # A policy of mixed precision is a dictionary.
    types = {str(n.config.get("dtype", "float32")) for n in graph.nodes.values()}
    must_build = reader.has_rewritten or batch is not None or types != {"float32"}
    if None in shape[:2] and image_size is None:
        raise ConfigError(
            f"the model takes images of any size, {tuple(shape)}; say which one its "
            "file is to take with image_size (--image_size=HEIGHT,WIDTH)"
        )
    if image_size is not None:
        size = tuple(image_size)
        if len(size) != 2 or any(s not in (None, n) for s, n in zip(shape, size)):
            raise ConfigError(
                f"image_size is {size}, but the model takes images of "
                f"{tuple(shape[:2])}; give (height, width) that it can take, or leave "
                "image_size out"
            )
        must_build |= list(size) != shape[:2]
        shape = [*size, shape[-1]]
    if must_build:
        graph = _float_graph(graph, shape, is_whole=not reading.problems)
    _check_image_shape(graph)
    return ModelReading(told, reading.layers, reading.problems, graph, must_build)


def _float_graph(graph: Graph, shape: Sequence[int], is_whole: bool) -> Graph:
    """The graph for one size of images, in float32."""
    nodes = [
        dataclasses.replace(node, config={**node.config, "dtype": "float32"})
        for node in graph.nodes.values()
    ]
    nodes[0] = input_node(graph.input_name, shape)
    graph = Graph(nodes, graph.output_name)
    if not is_whole:
        return graph
    # Building tells the shapes behind images that could be of any size.
    return Graph.from_model(graph.build())


def _check_image_shape(graph: Graph) -> None:
    shape = graph.nodes[graph.input_name].shape
    sides, channels = shape[:2], shape[-1]
    if not all(_SMALLEST_SIDE <= side <= _LARGEST_SIDE for side in sides):
        raise ModelError(
            f"the model takes images of {sides[0]} x {sides[1]} pixels; both sides "
            f"must be {_SMALLEST_SIDE} to {_LARGEST_SIDE}"
        )
    if channels not in _CHANNELS:
        raise ModelError(
            f"the model takes images of {channels} channels; they must have "
            f"{', '.join(map(str, _CHANNELS[:-1]))} or {_CHANNELS[-1]}"
        )


def _no_feeding() -> ConfigError:
    return ConfigError(
        "input_mean and input_scale are not given, and the model has no "
        "preprocessing layer that says how pixels, 0 to 255, become its input. "
        "Give both: --input_mean=0 --input_scale=1/255 for a model that was "
        "trained on pixels / 255, or --input_mean=0 --input_scale=1 for raw pixels"
    )


def _composed(
    given: Preprocessing | None, own: Preprocessing | None
) -> Preprocessing | None:
    """What pixels go through: what the user says, then what the model has.

    None if neither says anything.
    """
    if given is None and own is None:
        return None
    return (given or Preprocessing()).then(own or Preprocessing())


def _output(graph: Graph, output: str | None) -> str:
    """What the model gives, by its last layer.

    Raises:
      ConfigError: the user says otherwise.
    """
    found = head_activation(graph)
    if output is not None and output != found:
        last = graph.nodes[graph.output_name]
        raise ConfigError(
            f"output is {output!r}, but the model's last layer {last.name} "
            f"({last.kind}) gives {found}; leave it out"
        )
    return found


def _described(
    model: keras.Model,
    feeding: Preprocessing | None,
    output: str,
    class_names: Sequence[str] | None,
) -> Classifier:
    classes = model.output_shape[-1]
    names = class_names or tuple(map(str, range(classes)))
    if feeding is None:
        raise _no_feeding()
    return Classifier(model, described(feeding, output, names))


def described(
    feeding: Preprocessing, output: str, class_names: Sequence[str]
) -> ModelDescription:
    """The description of a network that pixels reach through `feeding`."""
    scale = feeding.scale
    mean = -feeding.offset / scale + 0.0  # + 0 makes 0 of -0
    return ModelDescription(_tuple(mean), _tuple(scale), output, tuple(class_names))


def _affine_of(
    input_mean: tuple[float, ...], input_scale: tuple[float, ...]
) -> Preprocessing:
    # Checks the values, whatever the model is.
    checked = ModelDescription(input_mean, input_scale, "logits", ())
    mean, scale = np.array(checked.input_mean), np.array(checked.input_scale)
    if mean.size == 1:
        mean = mean.reshape(())
    if scale.size == 1:
        scale = scale.reshape(())
    if mean.ndim and scale.ndim and mean.shape != scale.shape:
        raise ConfigError(
            f"input_mean has {mean.size} values and input_scale {scale.size}; give "
            "one value, or one for each channel"
        )
    return Preprocessing(scale, -mean * scale)


def _tuple(values: Any) -> tuple[float, ...]:
    values = np.atleast_1d(np.asarray(values, np.float64))
    return tuple(values[:1] if (values == values[0]).all() else values)


def _check_same(
    model: Any,
    is_keras3: bool,
    result: Classifier,
    given: Preprocessing | None,
    output: str,
    is_binary: bool,
) -> None:
    """Raises ModelError unless the rebuilt model answers as the original does."""
    rng = np.random.default_rng(0)
    shape = (_COMPARED_IMAGES, *result.image_shape)
    pixels = rng.integers(0, 256, shape).astype(np.float32)
    fed = pixels
    if given is not None:
        fed = (given.scale * pixels + given.offset).astype(np.float32)
    fixed = tuple(model.inputs[0].shape)[0]
    parts = np.split(fed, _COMPARED_IMAGES) if fixed == 1 else [fed]
    if fixed not in (None, 1):
        parts = [np.resize(fed, (fixed, *shape[1:]))]
    to_numpy = keras3().ops.convert_to_numpy if is_keras3 else np.asarray
    expected = np.concatenate([to_numpy(model(p, training=False)) for p in parts])
    if not np.isfinite(expected).all():
        return  # the quantization names the layer whose weights are not finite
    scores = result.scores(np.resize(pixels, (len(expected), *shape[1:])))
    if is_binary:
        scores = (scores[:, 1] - scores[:, 0])[:, None]
        if output == "sigmoid":
            scores = 1 / (1 + np.exp(-scores))
    elif output == "softmax":
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    half = ("float16", "bfloat16")
    is_half = any(getattr(each, "compute_dtype", "") in half for each in model.layers)
    tolerance = _TOLERANCE_16 if is_half else _TOLERANCE
    error = np.abs(scores - expected.astype(np.float32)).max()
    if not error <= tolerance * max(1.0, np.abs(expected).max()):
        raise ModelError(
            "the model, rebuilt layer by layer, answers otherwise than the original, "
            f"by up to {error:.3g}: a layer of it does not do here what it does there. "
            "Please report it with the model's summary"
        )
