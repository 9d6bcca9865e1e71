"""Makes a `Classifier` of what a user has: a file or a model, of Keras 2 or Keras 3.

The model is read layer by layer into a graph, whose answers are compared with the
model's own. Preprocessing at its head goes into the description, and a softmax or
sigmoid at its end is recognised.
"""

import contextlib
import dataclasses
import functools
import numbers
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.errors import (
    ConfigError,
    LayerProblem,
    ModelError,
    UnsupportedLayerError,
    class_of,
)
from dfq_tf.files import expanded
from dfq_tf.graph import (
    Classifier,
    Graph,
    Shape,
    activation_last,
    compute,
    description_beside,
    head_activation,
    logits_graph,
    names_of_classes,
    softmax,
    two_class_logits,
)
from dfq_tf.importing import feeding as feedings
from dfq_tf.importing import feeding_decision, preprocessing
from dfq_tf.importing.feeding_decision import Said, decide, how_to_say, said_by
from dfq_tf.importing.files import read_model
from dfq_tf.importing.preprocessing import (
    Preprocessing,
    described,
    reversed_channels,
    take_preprocessing,
)
from dfq_tf.importing.reading import (
    LayerRead,
    has_layers,
    is_keras3,
    outputs_of,
    read_layers,
    resized_to,
)
from dfq_tf.importing.wrappers import trimmed

# How far the graph may be from the model, as a share of its outputs: float rounding, or
# that of the 16 bits in which some layers compute.
_TOLERANCE, _TOLERANCE_16 = 1e-4, 5e-2
_SMALLEST_SIDE, _LARGEST_SIDE = 8, 640
_CHANNELS = (1, 3, 4)
_COMPARED_IMAGES = 2
_LESS_CONTRAST = 16
_LARGEST_PIXEL = 255
# Functions that a model of Keras 2 may call.
_FUNCTIONS = {"TFOpLambda", "SlicingOpLambda"}


def as_classifier(
    model: Any,
    *,
    input_mean: Sequence[float] | float | None = None,
    input_scale: Sequence[float] | float | None = None,
    feeding: str | None = None,
    output: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: Sequence[int] | None = None,
    head: str | None = None,
    input_on_top: bool = False,
    allow_code: bool = False,
) -> Classifier:
    """Makes a classifier of a model, or of the file of one.

    Args:
      model: a functional or Sequential model of Keras 3 or tf_keras, or the path of a
        file of one, beside which a `.json` may describe it; or what has a `model` and a
        `description`, which says all. A Classifier is given back.
      input_mean: in pixels; one value or one per channel. The model's input is
        `(pixel - input_mean) * input_scale`. What is given goes before what the `.json`
        says. Not needed where the model has a layer for it, such as Rescaling.
      input_scale: like `input_mean`; both or neither are given.
      feeding: in place of both, a usual way by its name in `feeding.FEEDINGS`, such as
        '-1..1'. Where nobody says any, the first BatchNormalization is asked.
      output: 'logits', 'softmax' or 'sigmoid'; by default what the last layer says.
        Needed for a model that gives one score without a sigmoid.
      class_names: one per class, two of a model of one output; by default numbers.
      image_size: (height, width), for a model that takes any and has no Resizing.
      head: the output to quantize, of a model that gives several: the name of its
        layer, or its key where the model gives a dictionary.
      input_on_top: whether what is said of the input comes before such a layer of the
        model; otherwise saying both is refused.
      allow_code: whether code that a file holds may be run, see `importing.files`.

    Returns:
      A classifier that answers as the model does. A softmax at its end is taken off,
      but for a model of float32 layers of tf_keras alone.

    Raises:
      ModelError: the file cannot be read, or the model is no image classifier.
      UnsupportedLayerError: layers cannot be read; they are named.
      ConfigError: an argument does not fit the model, is missing, or says what the
        model says itself.

    Warns:
      UserWarning: BatchNormalization finds the feeding, or contradicts it; a Resizing
        says the size; wrappers of tfmot are taken off; a file names a class of model
        that is not Keras' own.
    """
    said: dict[str, Any] = dict(input_mean=input_mean, input_scale=input_scale)
    said |= dict(feeding=feeding, input_on_top=input_on_top or None, output=output)
    said |= dict(class_names=class_names, image_size=image_size, head=head)
    if isinstance(model, Classifier):
        _check_says_nothing(said, "a Classifier")
        return model
    return classifier_of(read(model, **said, allow_code=allow_code))


def _check_says_nothing(said: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError if arguments are given beside what says all itself."""
    given = {name: value for name, value in said.items() if value is not None}
    if given:
        each = ", ".join(f"{name} is {value!r}" for name, value in given.items())
        raise ConfigError(
            f"{each}, but the model is {what}, which says all that itself; leave it "
            "out, or make another description"
        )


def load_classifier(path: str | os.PathLike[str], **arguments: Any) -> Classifier:
    """Reads a classifier from a file; the arguments are those of `as_classifier`.

    Raises:
      ModelError: `path` is no path; or as `as_classifier`, as all its errors.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ModelError(
            f"path is a {class_of(path)}; load_classifier "
            "reads files; give a model to as_classifier"
        )
    return as_classifier(pathlib.Path(path), **arguments)


class Told(NamedTuple):
    """A model, and what the user and a description beside its file say of it.

    Attributes:
      model: of Keras 2 or 3.
      is_keras3: whether it is of Keras 3.
      said: how it is fed.
      resized_to: (height, width) of a Resizing, where nothing else says them.
      output: 'logits', 'softmax' or 'sigmoid', if somebody says so.
      class_names: one per class, if somebody says them.
      probabilities: as in `ModelDescription`, if somebody says so.
    """

    model: Any
    is_keras3: bool
    said: Said
    resized_to: Sequence[int] | None
    output: str | None
    class_names: Sequence[str] | None
    probabilities: str | None


@dataclasses.dataclass(frozen=True)
class ModelReading:
    """A model, layer by layer, and what is said of it.

    Attributes:
      told: the model, and what is said of it.
      layers: all its layers, as they were found.
      problems: one for each layer that cannot be read.
      graph: the whole network, for one size of images.
      is_plain: whether it has float32 layers of tf_keras alone, just as they are.
    """

    told: Told
    layers: Sequence[LayerRead]
    problems: Sequence[LayerProblem]
    graph: Graph
    is_plain: bool

    @functools.cached_property
    def network(self) -> "Network":
        """The network without the preprocessing at its head.

        Raises:
          ConfigError: what the user says does not fit.
        """
        return _network(self)

    @property
    def findings(self) -> dict[str, Any]:
        """What nobody said and was found: arguments of `as_classifier` that say it.

        A feeding that is suggested, and not taken, is for the user to confirm.
        """
        result: dict[str, Any] = {}
        found = self.network.found
        if found is not None and found.is_suggested:
            result["feeding"] = found.name
            if self.network.own is not None:
                result["input_on_top"] = True
        if self.told.resized_to is not None:
            result["image_size"] = list(self.told.resized_to)
        return result

    def fed_pixels(self) -> "ModelReading":
        """The same, with the word that the model takes pixels as they are."""
        said = Said(Preprocessing())
        return dataclasses.replace(self, told=self.told._replace(said=said))

    def giving_logits(self) -> "ModelReading":
        """The same, with the word that the model gives logits."""
        return dataclasses.replace(self, told=self.told._replace(output="logits"))


@dataclasses.dataclass(frozen=True)
class Network:
    """A network without the preprocessing at its head.

    Attributes:
      graph: what is left.
      own: what the preprocessing did, or None.
      told: as of the reading, with the feeding that was found, if nobody says any.
      found: what a BatchNormalization says of the feeding; None if it was not asked, or
        there is none.
      feeding: what pixels go through before `graph`; None if nobody says.
      gives: 'logits', 'softmax' or 'sigmoid'.
      is_binary: whether it gives one score, for two classes.
      is_unclear: whether nobody says that this score is a logit, and no layer does.
      probabilities: as in `ModelDescription`.
    """

    graph: Graph
    own: Preprocessing | None
    told: Told
    found: feedings.Found | None
    feeding: Preprocessing | None
    gives: str
    is_binary: bool
    is_unclear: bool
    probabilities: str | None


def read(
    model: Any,
    *,
    input_mean: Sequence[float] | float | None = None,
    input_scale: Sequence[float] | float | None = None,
    feeding: str | None = None,
    output: str | None = None,
    class_names: Sequence[str] | None = None,
    image_size: Sequence[int] | None = None,
    head: str | None = None,
    input_on_top: bool = False,
    allow_code: bool = False,
) -> ModelReading:
    """Reads a model to its end, whatever layers it has.

    The arguments are those of `as_classifier`; what is missing is not asked for.

    Raises:
      ModelError: the file cannot be read, or the model is no image classifier.
      ConfigError: an argument does not fit the model.
    """
    class_names = None if class_names is None else names_of_classes(class_names)
    description = None
    if isinstance(model, (str, os.PathLike)):
        _check_file(model, allow_code)
        path = expanded(model)
        model = read_model(path, allow_code=allow_code)
        description = description_beside(path)
    elif hasattr(model, "model") and hasattr(model, "description"):
        theirs: dict[str, Any] = dict(input_mean=input_mean, input_scale=input_scale)
        theirs |= dict(feeding=feeding, output=output, class_names=class_names)
        _check_says_nothing(theirs, "one with a description")
        model, description = model.model, model.description
    said = said_by(input_mean, input_scale, feeding, input_on_top, description)
    probabilities = None
    if description is not None:
        output = description.output if output is None else output
        class_names = description.class_names if class_names is None else class_names
        probabilities = description.probabilities
    model = trimmed(model, head)
    _check_has_layers(model)
    batch, *own_shape = model.inputs[0].shape
    resized_to = _size_of_resizing(model) if image_size is None else None
    shape = _image_shape(own_shape, resized_to if image_size is None else image_size)
    told = Told(
        model,
        is_keras3(model),
        said,
        resized_to,
        output,
        class_names,
        probabilities,
    )
    found = read_layers(model, shape)
    is_plain = [batch, *shape] == [None, *own_shape] and _is_plain(told, found.layers)
    return ModelReading(told, found.layers, found.problems, found.graph, is_plain)


def takes_pixels(model: Any) -> bool:
    """Whether a model begins with preprocessing that was made for pixels, 0 to 255.

    Args:
      model: functional or Sequential, with one image and one output, of a fixed size;
        it may have any layers.
    """
    _, own = take_preprocessing(read_layers(model).graph)
    return own is not None and own.takes_pixels


def _check_file(model: str | os.PathLike[str], allow_code: Any) -> None:
    """Raises ConfigError for an empty path, and for 'no' in the place of False."""
    if not os.fspath(model):
        raise ConfigError("the path of the model is empty; name a file")
    if not isinstance(allow_code, (bool, np.bool_)):
        raise ConfigError(f"allow_code is {allow_code!r}; it must be True or False")


def _is_plain(told: Told, found: Sequence[LayerRead]) -> bool:
    """Whether a model has float32 layers of tf_keras alone."""
    kinds = {layer.kind for layer in found}
    return (
        not told.is_keras3
        and not kinds & {*_FUNCTIONS, *preprocessing.LAYERS}
        and _compute_types(told.model) == {"float32"}
    )


def _network(reading: ModelReading) -> Network:
    """Takes the preprocessing off, and looks at what is given at the end.

    Raises:
      ConfigError: what the user says does not fit.
    """
    graph, own = take_preprocessing(reading.graph)
    graph = activation_last(graph)
    told, outputs = reading.told, _num_outputs(graph)
    frozen = {layer.name for layer in reading.layers if layer.is_frozen}
    integers = _integers(told.model)
    said, found = decide(reading.graph, own, told.said, frozen, integers)
    told = told._replace(said=said)
    gives, is_binary = _output(reading, graph), outputs == 1
    probabilities = told.probabilities if gives == "logits" else gives
    if is_binary and probabilities == "sigmoid":
        probabilities = "score"  # two logits stand for the one
    feeding = None
    if said.given is not None:
        feeding = said.given.then(own or Preprocessing())
        if said.is_bgr:
            graph, feeding = reversed_channels(graph), feeding.reversed()
    is_unclear = is_binary and gives == "logits" and told.output is None
    return Network(
        graph, own, told, found, feeding, gives, is_binary, is_unclear, probabilities
    )


def _integers(model: Any) -> str:
    """The type of a model's input, if it is of integers that hold pixels; else ''."""
    kind = tf.as_dtype(model.inputs[0].dtype)
    return kind.name if kind.is_integer and kind.max >= _LARGEST_PIXEL else ""


def classifier_of(reading: ModelReading, *, compiles: bool = True) -> Classifier:
    """The classifier that answers as the model does; see `as_classifier`.

    Args:
      reading: from `read`.
      compiles: whether it is compared in its compiled form, which takes seconds, and is
        what all else runs: TensorFlow's optimizer has computed another thing before.
    """
    if reading.problems:
        raise UnsupportedLayerError.of(reading.problems)
    found = reading.network
    graph, gives, feeding = found.graph, found.gives, found.feeding
    if feeding is None:
        raise ConfigError(how_to_say(found.found, found.own))
    _check_clear(found)
    feeding_decision.warn(reading.told.said, found.found, found.own)
    is_plain = reading.is_plain and not found.own and not found.told.said.is_bgr
    if found.is_binary or (gives == "softmax" and not is_plain):
        unnamed = ("",) * _num_outputs(graph)
        graph = logits_graph(graph, described(feeding, gives, unnamed))
        gives = "logits"
    if found.is_binary:
        graph = two_class_logits(graph, found.gives == "sigmoid")
    names: Sequence[str] = [*map(str, range(_num_outputs(graph)))]
    if reading.told.class_names is not None:
        names = reading.told.class_names
    if found.is_binary and len(names) == 1:
        raise ConfigError(
            f"class_names has one name, {names[0]!r}, but a model of one score has two "
            "classes; name both, the one of low scores first, or none; for none, write "
            '["0", "1"] in a .json beside the model'
        )
    description = dataclasses.replace(
        described(feeding, gives, names), probabilities=found.probabilities
    )
    result = Classifier(graph, description)
    _check_same(result, found, compiles=compiles)
    return result


def _check_clear(found: Network) -> None:
    """Raises an error for a single score that may be anything, or says nothing."""
    if found.is_binary and found.gives == "softmax":
        raise ModelError(
            f"the model ends in a softmax of one score, layer "
            f"{found.graph.last.layers[-1]}, which is 1 for any image. End it in a "
            "sigmoid, or in two scores and a softmax, and train it anew"
        )
    if found.is_unclear:
        raise ConfigError(
            "output is not given, and the model ends in one score without a sigmoid, "
            f"layer {found.graph.last.layers[0]}. Say output='logits' "
            "(--output=logits) if the score is a logit, above 0 for the second of two "
            "classes. A model that was trained on 0 and 1 with the mean squared error, "
            "or as a regression, is no classifier: end it with a sigmoid, and train it "
            "with the binary cross-entropy"
        )


def _num_outputs(graph: Graph) -> int:
    return graph.last.shape[-1] or 0


def _check_has_layers(model: Any) -> None:
    """Raises ModelError unless it is a float classifier of images, with layers."""
    if not has_layers(model):
        raise ModelError(
            f"the model is a {class_of(model)}; it must "
            "be a built functional or Sequential model of Keras, whose layers can be "
            "rewritten. A subclass of Model has functions in their place"
        )
    if any(type(layer).__name__ == "NodeWrapper" for layer in model.layers):
        raise ModelError(
            "the model is quantized already: it is a student that this project made. "
            "Give the float model that it was made of; or open it with "
            "dfq_tf.load_quantized, and write its file with tools/convert.py"
        )
    inputs, outputs = model.inputs or [], model.outputs or []
    if len(inputs) != 1 or len(outputs) != 1:
        raise ModelError(
            f"the model has {len(inputs)} inputs and {len(outputs)} outputs; it must "
            "be built, take one image and give one row of class scores"
        )
    if getattr(outputs[0].shape, "rank", 0) is None:
        raise ModelError(
            "the model's output has no known number of axes; where its end is "
            "tf.squeeze(x), name them, such as tf.squeeze(x, [1, 2])"
        )
    shape, scores = tuple(inputs[0].shape), tuple(outputs[0].shape)
    if len(shape) == 4 and shape[1] in _CHANNELS and shape[-1] not in _CHANNELS:
        raise ModelError(
            f"the model takes images of {shape[1:]}, channels first; build it with "
            "data_format='channels_last', whose convolutions have the same weights"
        )
    if len(shape) not in (3, 4) or shape[-1] is None:
        raise ModelError(
            f"the model's input shape is {shape}; it must be "
            "(None, height, width, channels) with fixed sizes, or (None, height, width)"
        )
    if len(scores) != 2 or not scores[-1]:
        is_flat = scores[-1] and set(scores[1:-1]) == {1}
        way_out = ". Add a layer behind it, keras.layers.Flatten()" if is_flat else ""
        raise ModelError(
            f"the model's output shape is {scores}; it must be (None, num_classes)"
            f"{way_out}"
        )


def _compute_types(model: Any) -> set[str]:
    """The types in which the layers of a model compute, such as 'float32'."""
    layers = model._flatten_layers()
    return {str(getattr(layer, "compute_dtype", "float32")) for layer in layers}


def _image_shape(own: Sequence[Any], image_size: Sequence[int] | None) -> Shape:
    """(height, width, channels) of the images.

    Args:
      own: as the model says; height and width may be None. Without channels, it has
        one.
      image_size: as the user says.
    """
    if None in own[:2] and image_size is None:
        raise ConfigError(
            f"the model takes images of any size, {tuple(own)}; say which one its "
            "file is to take with image_size (--image_size=HEIGHT,WIDTH)"
        )
    size = tuple(own[:2]) if image_size is None else image_size
    if image_size is not None:
        size = _size_said(image_size)
    if len(size) != 2 or any(s not in (None, n) for s, n in zip(own, size)):
        raise ConfigError(
            f"image_size is {size}, but the model takes images of "
            f"{tuple(own[:2])}; give (height, width) that it can take, or leave "
            "image_size out"
        )
    if not all(_SMALLEST_SIDE <= side <= _LARGEST_SIDE for side in size):
        who = "the model takes" if image_size is None else "image_size asks for"
        raise ModelError(
            f"{who} images of {size[0]} x {size[1]} pixels; both sides must be "
            f"{_SMALLEST_SIDE} to {_LARGEST_SIDE}"
        )
    channels = own[2] if len(own) == 3 else 1
    if channels not in _CHANNELS:
        raise ModelError(
            f"the model takes images of {channels} channels; they must have "
            f"{', '.join(map(str, _CHANNELS[:-1]))} or {_CHANNELS[-1]}"
        )
    return (*size, channels)


def _size_said(given: Any) -> tuple[int, ...]:
    """The sides of an image as a user gives them, integers of Python or NumPy.

    Raises:
      ConfigError: they are none; 28.0 neither, which TensorFlow does not take.
    """
    sides = tuple(given) if np.ndim(given) == 1 else ()
    are_integers = all(isinstance(side, numbers.Integral) for side in sides)
    if not sides or not are_integers:
        raise ConfigError(
            f"image_size is {given!r}; give (height, width), two integers such as "
            "(224, 224)"
        )
    return tuple(map(int, sides))


def _size_of_resizing(model: Any) -> Sequence[int] | None:
    """The size to which a model of any size brings its images first, if it does."""
    if None not in model.inputs[0].shape[1:3]:
        return None
    found = resized_to(model)
    if found is None:
        return None
    name, size = found
    warnings.warn(
        f"the model takes images of any size, and its layer {name} resizes them to "
        f"{size[0]} x {size[1]}: the file takes images of that size, and the app is to "
        "resize them",
        stacklevel=4,
    )
    return size


def _output(reading: ModelReading, graph: Graph) -> str:
    """What the model gives, by its last layer.

    Raises:
      ConfigError: the user says otherwise.
    """
    output, found = reading.told.output, head_activation(graph)
    if output is not None and output != found:
        name = graph.last.layers[0]
        kind = next(layer.kind for layer in reading.layers if layer.name == name)
        raise ConfigError(
            f"output is {output!r}, but the model's last layer {name} ({kind}) gives "
            f"{found}; leave output out; in a .json beside the model write {found!r}"
        )
    return found


def _check_same(result: Classifier, found: Network, *, compiles: bool) -> None:
    """Raises ModelError unless the graph answers as the model does.

    Args:
      result: has the graph.
      found: has the model.
      compiles: as of `classifier_of`.
    """
    told, graph = found.told, result.graph
    pixels = _compared_images(result)
    fed = told.said.fed(pixels)
    fixed = tuple(told.model.inputs[0].shape)[0]
    parts = np.split(fed, _COMPARED_IMAGES) if fixed == 1 else [fed]
    if fixed not in (None, 1):
        parts = [np.resize(fed, (fixed, *fed.shape[1:]))]
    is_half = not _compute_types(told.model).isdisjoint({"float16", "bfloat16"})
    with _without_tf32():
        expected = np.concatenate([outputs_of(told.model, part) for part in parts])
        is_finite = np.isfinite(expected).all(axis=1)
        if not is_finite.all() and not _has_finite_weights(graph):
            return  # the quantization names the layer whose weights are not finite
        if not is_finite.any():
            raise _not_finite(is_half)
        images = np.resize(pixels, (len(expected), *pixels.shape[1:]))[is_finite]
        one_by_one = functools.partial(_computed, result, images)
        scores = result.scores(images) if compiles else one_by_one(graph.output)
        is_logits = result.description.output == "logits"
        logits = scores if is_logits else one_by_one(graph.last.inputs[0])
    if found.is_binary:
        scores = logits = (scores[:, 1] - scores[:, 0])[:, None]
        if found.gives == "sigmoid":
            scores = tf.sigmoid(logits).numpy()
    elif found.gives != result.description.output:  # a softmax was taken off
        scores = softmax(logits)
    expected = expected[is_finite].astype(np.float32)
    for error, most in _errors(scores, expected, logits, found.gives, is_half):
        if error <= most:
            continue
        way_out = (
            "Its layers compute in 16 bits, whose rounding may add up to that: build "
            "it in float32, with the same weights. If it is refused then too, please "
            if is_half
            else "Please "
        )
        raise ModelError(
            "the model, rebuilt layer by layer, answers otherwise than the original, "
            f"by up to {error:.3g}: a layer of it does not do here what it does there. "
            f"{way_out}report it with the model's summary"
        )


def _errors(
    scores: np.ndarray,
    expected: np.ndarray,
    logits: np.ndarray,
    gives: str,
    is_half: bool,
) -> Iterator[tuple[float, float]]:
    """How far outputs are from those expected, and how far they may be.

    Probabilities are compared by their logarithms: of many classes each is small, and
    so is any difference. Those of 16 bits are compared as they are too.
    """
    tolerance = _TOLERANCE_16 if is_half else _TOLERANCE
    if is_half or gives == "logits":
        error, most = np.abs(scores - expected).max(), np.abs(expected).max()
        yield error, tolerance * max(1, most)
    if gives != "logits":
        if is_half:
            # That of a logit, and of what all are divided by, for more roundings of
            # deep networks: a wrong layer makes other answers, not slightly other ones.
            tolerance *= 4
        logarithms = [_logarithms(each, is_half) for each in (scores, expected)]
        error = np.abs(logarithms[0] - logarithms[1]).max()
        yield error, tolerance * max(1, np.abs(logits).max())


def _has_finite_weights(graph: Graph) -> bool:
    weights = (w for node in graph.nodes.values() for w in node.weights.values())
    return all(np.isfinite(weight).all() for weight in weights)


def _not_finite(is_half: bool) -> ModelError:
    """That a model whose weights are finite gives no numbers, and the way out."""
    way_out = (
        "Its layers compute in 16 bits, of which float16 ends at 65,504: build it in "
        "float32, with the same weights"
        if is_half
        else "See that it is fed as in its training (feeding); else a layer of it "
        "divides by 0, or its values grow too large"
    )
    return ModelError(
        "the model answers infinity or NaN to images of noise, though all its weights "
        f"are finite. {way_out}"
    )


def _compared_images(classifier: Classifier) -> np.ndarray:
    """Noise; behind the first image of little contrast, which saturates less."""
    shape = (_COMPARED_IMAGES, *classifier.image_shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    mean = np.clip(classifier.description.input_mean, 0, _LARGEST_PIXEL)
    pixels[1:] = np.round(mean + (pixels[1:] - mean) / _LESS_CONTRAST)
    return pixels


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Has GPUs compute with all bits of float32 in the block."""
    tf32 = tf.config.experimental
    before = tf32.tensor_float_32_execution_enabled()
    tf32.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf32.enable_tensor_float_32_execution(before)


def _computed(classifier: Classifier, images: np.ndarray, name: str) -> np.ndarray:
    """What a node gives for a few images, computed operation by operation."""
    fed = tf.constant(classifier.description.normalize(images))
    return compute(classifier.graph, fed, [name])[0].numpy()


def _logarithms(probabilities: np.ndarray, is_half: bool) -> np.ndarray:
    """Of probabilities and of their counterparts, as far down as their type has them.

    Where a softmax or sigmoid is as good as 0 or 1, they still tell scores apart.
    """
    least, least_counterpart = (2**-14, 2**-4) if is_half else (1e-30, 1e-3)
    values = probabilities.astype(np.float64)
    counterparts = np.maximum(1 - values, least_counterpart)
    return np.log([np.maximum(values, least), counterparts])
