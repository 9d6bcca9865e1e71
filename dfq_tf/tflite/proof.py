"""No file without proof: LiteRT runs it, and it computes what the network does."""

from collections.abc import Collection

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.errors import ExportError
from dfq_tf.graph import KINDS, Graph, Node, check_images, compute, macs_of, title
from dfq_tf.quantization import QuantizedNetwork
from dfq_tf.settings import FileConfig
from dfq_tf.tflite import targets, writer
from dfq_tf.tflite.ends import Ends, answers, ends_of
from dfq_tf.tflite.flatbuffer import with_output
from dfq_tf.tflite.running import TFLiteClassifier, open_interpreter, stored_tensors

# How far an output may be from the network's, in integer steps, and one layer from what
# the network makes of the file's own integers: for int8, and for int16. Both round the
# same numbers, and part where one lies between two integers. Of sound layers, the most
# that was measured is 1, and 3 of a tanh of int16, which LiteRT reads from a table.
_MOST_STEPS = {False: 3, True: 16}
_MOST_STEPS_OF_A_LAYER = {False: 2, True: 4}

# How far softmax and sigmoid may be from NumPy's, in steps of int8 and of int16, for
# which LiteRT reads them from tables. Its softmax of int16 takes no class for less
# likely than exp(-10) times the first: of 10, 100 and 300 classes, the most that was
# measured is 18, 195 and 508 steps, and no more of 1000.
_MOST_STEPS_OF_A_FUNCTION = {False: 1, True: 16}
_STEPS_OF_A_CLASS, _MOST_STEPS_OF_ALL_CLASSES = 3, 1000
# Steps of int16 in one of int8.
_INT8_STEP = 256

# Images of each kind, and how many multiply-accumulates all of them may take.
_MOST_IMAGES, _MOST_MACS = 16, 8 * 10**9
# Layers are compared on the images whose outputs are the farthest apart.
_WORST_IMAGES = 4

# Operators whose output has the scale of their input: pixels stay pixels.
_COPYING = (
    "MAX_POOL_2D",
    "AVERAGE_POOL_2D",
    "REDUCE_MAX",
    "PAD",
    "RESHAPE",
    "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR",
    "STRIDED_SLICE",
    "TRANSPOSE",
)
_INTEGERS = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_)


def convert(
    network: QuantizedNetwork,
    images: np.ndarray | None = None,
    config: FileConfig = FileConfig(),
) -> bytes:
    """Writes a network as an integer TFLite model, and proves it.

    By default the file takes raw pixels, uint8 (1, height, width, channels), and gives
    what the model gave that the network was made of: probabilities or logits, uint8
    (1, number of outputs), int16 at A16. The normalisation of pixels is in the input's
    scale and zero point, so that an app has nothing to compute.

    Args:
      network: from `post_training`, or back from its training.
      images: uint8 (n, height, width, channels), of which some are run beside random
        ones; None for random ones alone.
      config: what the file takes and gives, and what it says of itself.

    Returns:
      The content of the file.

    Raises:
      ConfigError: the target does not take a type or a choice of forms.
      ExportError: a layer cannot be written, LiteRT cannot run the file, or a layer
        of it computes something else than the network, or its end something else of
        the logits.
      UnsupportedLayerError: layers are not for the target; they are named.
      ModelError: the images do not fit the network.
    """
    targets.check_types(config)
    ends = ends_of(network, config)
    bits = network.kernel_bits, network.bits
    writer.check_layers(network.classifier, config, *bits)
    content = writer.write(network, config)
    targets.check_file(config.target, content)
    check_integer_only(content, _requantizing(network.graph), ends)
    images = _images(network, images)
    logits = _logits(network, content, images)
    _prove(network, content, images, logits)
    _prove_ends(ends, content, images, logits)
    return content


def check_integer_only(
    content: bytes, requantized: Collection[str] = (), ends: Ends | None = None
) -> None:
    """Checks the file itself: every tensor integer, no float operator.

    A QUANTIZE of pixels, as from the uint8 input to int8, is allowed.

    Args:
      content: of the file.
      requantized: names of tensors that a QUANTIZE inside the graph may give.
      ends: of the file, which may have a float input or output, and end in a QUANTIZE
        or DEQUANTIZE, if these say so; None for none of it.

    Raises:
      ExportError: naming the tensor or the operator that is not integer.
    """
    interpreter = open_interpreter(content, delegates=False)
    pixels = {tensor["index"] for tensor in interpreter.get_input_details()}
    given = {tensor["index"] for tensor in interpreter.get_output_details()}
    operators, floats = interpreter._get_ops_details(), set()
    if ends is not None:
        floats |= pixels if ends.input_type == np.float32 else set()
        floats |= given if ends.output_type == np.float32 else set()
        first = len(operators) - len(ends.steps)
        if [o["op_name"] for o in operators[first:]] == [
            s.operator for s in ends.steps
        ]:
            operators = operators[:first]
    names = {}
    for tensor in interpreter.get_tensor_details():
        names[tensor["index"]] = tensor["name"]
        is_end = tensor["index"] in floats and tensor["dtype"] == np.float32
        if tensor["dtype"] not in _INTEGERS and not is_end:
            raise ExportError(
                f"tensor {tensor['name']} of the TFLite file is "
                f"{np.dtype(tensor['dtype']).name}, not an integer"
            )
    for operator in operators:
        name, outputs = operator["op_name"], operator["outputs"]
        if name == "QUANTIZE" and set(operator["inputs"]) <= pixels:
            pixels.update(outputs)
        elif name in _COPYING and operator["inputs"][0] in pixels:
            pixels.update(outputs)
        elif name == "QUANTIZE" and names[outputs[0]] in requantized:
            continue
        elif name in ("QUANTIZE", "DEQUANTIZE"):
            raise ExportError(f"the TFLite file has a {name} inside its graph")


def largest_difference(
    network: QuantizedNetwork, content: bytes, images: np.ndarray
) -> int:
    """How far a file is from the network that it was made of, in its logits.

    Args:
      network: by fake quantization.
      content: of the file.
      images: uint8 (n, height, width, channels).

    Returns:
      The largest difference of any logit, in integer steps.
    """
    logits = _logits(network, content, images)
    return int(_differences(network, images, logits).max())


def _logits(
    network: QuantizedNetwork, content: bytes, images: np.ndarray
) -> np.ndarray:
    """The logits inside a file, whatever it gives: float32 (n, num_classes)."""
    inside = TFLiteClassifier(with_output(content, network.graph.output))
    return inside.scores(images)[:, -network.classifier.num_classes :]


def _differences(
    network: QuantizedNetwork, images: np.ndarray, logits: np.ndarray
) -> np.ndarray:
    """The largest difference of a file's logits for each image, in steps: (n,)."""
    difference = np.abs(network.scores(images) - logits).max(axis=-1)
    return np.round(difference / network.grid(network.graph.output).scale)


def _requantizing(graph: Graph) -> set[str]:
    """The tensors that QUANTIZE may give, besides those of pixels.

    It is the first operator of a table, and the last one of a normalization.
    """
    names = set()
    for node in graph.nodes.values():
        if KINDS[node.kind].operator == "LOOKUP":
            names.add(f"{node.name}/unsigned")
        elif KINDS[node.kind].operator == "NORMALIZE":
            names.update((node.name, f"{node.name}/raw"))
    return names


def _images(network: QuantizedNetwork, given: np.ndarray | None) -> np.ndarray:
    """Some of the given images, and random pixels; few where the network is large."""
    macs = macs_of(network.graph.nodes.values())
    count = int(np.clip(_MOST_MACS // (2 * macs + 1), 1, _MOST_IMAGES))
    shape = (count, *network.classifier.image_shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if given is None:
        return pixels
    check_images(given, shape[1:])
    return np.concatenate([given[:count], pixels])


def _prove_ends(
    ends: Ends, content: bytes, images: np.ndarray, logits: np.ndarray
) -> None:
    """Compares what a file gives with what its ends are to make of its logits.

    Raises:
      ExportError: it is something else.
    """
    most = _most_steps(ends, logits.shape[-1])
    expected = answers(logits, ends)
    scores = TFLiteClassifier(content).scores(images)[:, -expected.shape[-1] :]
    (scale,) = ends.grid.scale
    steps = np.round(np.abs(scores - expected).max() / scale)
    if not steps <= most:
        operators = ", ".join(step.operator for step in ends.steps)
        raise ExportError(
            f"the TFLite file gives {ends.output_name} up to {steps:.0f} steps away "
            f"from what {operators} makes of its logits. Please report it with the "
            "model's summary"
        )


def _most_steps(ends: Ends, classes: int) -> int:
    """How far what a file gives may be from NumPy's: a change of type is exact."""
    most = 0
    for operator, dtype, _ in ends.steps:
        is_wide = dtype == np.int16
        if operator in ("SOFTMAX", "LOGISTIC"):
            most = _MOST_STEPS_OF_A_FUNCTION[is_wide]
        if operator == "SOFTMAX" and is_wide:
            most += min(_STEPS_OF_A_CLASS * classes, _MOST_STEPS_OF_ALL_CLASSES)
        elif operator == "QUANTIZE" and dtype == np.int8:  # it rounds int16
            most = 1 + most // _INT8_STEP
    return most


def _prove(
    network: QuantizedNetwork, content: bytes, images: np.ndarray, logits: np.ndarray
) -> None:
    """Compares a file with its network.

    Where the outputs are further apart than rounding takes them, each layer is
    compared by itself: few bits or many layers may spread a rounding as well as a
    fault.

    Raises:
      ExportError: naming the first layer that computes something else.
    """
    differences = _differences(network, images, logits)
    if differences.max() <= _MOST_STEPS[network.is_wide]:
        return
    worst = images[np.argsort(differences)[-_WORST_IMAGES:]]
    for name, steps in layer_differences(network, content, worst).items():
        if not steps <= _MOST_STEPS_OF_A_LAYER[network.is_wide]:  # NaN is no proof
            node = network.graph.nodes[name]
            raise ExportError(
                f"the TFLite file is up to {differences.max():.0f} steps of its output "
                f"away from the network that it was made of: layer {name} "
                f"({title(node)}) is the first to compute something else, by up "
                f"to {steps:.0f} steps. Please report it with the model's summary"
            )


def layer_differences(
    network: QuantizedNetwork, content: bytes, images: np.ndarray
) -> dict[str, float]:
    """How far each layer of a file is from the network's, fed with the same integers.

    Args:
      network: by fake quantization.
      content: of its file.
      images: uint8 (n, height, width, channels).

    Returns:
      Name of each node that the file stores, in order -> the largest difference of
      its output, in steps.
    """
    stored = stored_tensors(content, images)
    differences: dict[str, float] = {}

    def output(node: Node, values: tf.Tensor) -> tf.Tensor:
        tensor = stored.get(node.name)
        if tensor is None:  # a ReLU takes it in
            return values
        values = network.rounded_output(node, values)
        steps = np.abs(values.numpy() - tensor.values) / tensor.scale
        differences[node.name] = float(np.round(steps.max()))
        return tf.constant(tensor.values)  # what the layers behind are fed with

    pixels = network.description.normalize(images.astype(np.float32))
    compute(
        network.graph,
        tf.constant(pixels),
        [network.graph.output],
        kernel=network.rounded_kernel,
        output=output,
    )
    return differences
