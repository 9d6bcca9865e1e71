"""From a fake-quantized student to an integer-only TFLite file, and proof of it."""

import statistics
import time

import numpy as np
from ai_edge_litert import interpreter as litert

from dfq_tf.compat import native_output_hidden
from dfq_tf.errors import ExportError, ModelError
from dfq_tf.graph.classifier import Classifier
from dfq_tf.quantization import apply
from dfq_tf.tflite import writer

# Operators whose output has the scale of their input: pixels stay pixels.
_COPYING = ("MAX_POOL_2D", "AVERAGE_POOL_2D", "REDUCE_MAX", "PAD", "RESHAPE")
_INTEGERS = (np.uint8, np.int8, np.int16, np.int32, np.int64, np.bool_)


def convert(student: Classifier) -> bytes:
    """Writes a fake-quantized student as an integer-only TFLite model.

    The file takes raw pixels, uint8 (1, height, width, channels), and gives int8
    logits (1, num_classes), int16 ones at A16. The normalisation of pixels is in the
    input's scale and zero point, so that an app has nothing to compute.

    Args:
      student: from `quantization.apply.quantize_graph`.

    Returns:
      The content of the file.

    Raises:
      ModelError: the student is not fake-quantized.
      ExportError: a layer cannot be written, or LiteRT cannot run the file.
    """
    if not apply.is_quantized(student.model):
        raise ModelError(
            "the student is a float model without fake quantization; make a quantized "
            "one of it with dfq_tf.quantize or tools/quantize.py"
        )
    (mean, *_), (scale, *_) = (
        student.description.input_mean,
        student.description.input_scale,
    )
    content = writer.write(student.model, scale, round(mean))
    check_integer_only(content)
    return content


class TFLiteClassifier:
    """Runs a TFLite classifier on pixels.

    Args:
      content: the content of a TFLite file with one uint8 image as input.
      num_threads: threads of the interpreter.

    Raises:
      ExportError: the file cannot be read, or takes something else.
    """

    def __init__(self, content: bytes, num_threads: int = 1) -> None:
        self._interpreter = open_interpreter(content, num_threads=num_threads)
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()
        if self._input["dtype"] != np.uint8 or len(self._input["shape"]) != 4:
            raise ExportError(
                f"the file's input is {self._input['dtype'].__name__} "
                f"{self._input['shape']}; it must be uint8 pixels, (1, height, width, "
                "channels)"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = (int(n) for n in self._input["shape"][1:])
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """The number of outputs."""
        return int(self._output["shape"][-1])

    @property
    def output_scale(self) -> float:
        """What one integer step of the output is worth."""
        return float(self._output["quantization"][0])

    @property
    def num_pieces(self) -> int:
        """How many pieces of the graph XNNPACK has taken over.

        One is best: between two pieces, operators run in the slower built-in kernels.
        """
        operators = self._interpreter._get_ops_details()
        return sum(operator["op_name"] == "DELEGATE" for operator in operators)

    def latency(self, runs: int = 300) -> float:
        """Median time of one image, in milliseconds, after a tenth as many to warm up.

        Args:
          runs: how often an image of zeros is run.
        """
        image = np.zeros((1, *self.image_shape), np.uint8)
        self._interpreter.set_tensor(self._input["index"], image)
        seconds = []
        for _ in range(runs + runs // 10):
            began = time.perf_counter()
            self._interpreter.invoke()
            seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds[runs // 10 :])

    def scores(self, images: np.ndarray) -> np.ndarray:
        """Logits of images.

        Args:
          images: uint8 (n, height, width, channels).

        Returns:
          float32 (n, num_classes), (integer output - zero point) * scale.
        """
        interpreter = self._interpreter
        outputs = []
        for image in images:
            interpreter.set_tensor(self._input["index"], image[None])
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(self._output["index"])[0])
        scale, zero_point = self._output["quantization"]
        return (np.stack(outputs).astype(np.float32) - zero_point) * scale


def check_integer_only(content: bytes) -> None:
    """Checks the file itself: every tensor integer, no float operator.

    A QUANTIZE of pixels, as from the uint8 input to int8, is the only one allowed.

    Raises:
      ExportError: naming the tensor or the operator that is not integer.
    """
    interpreter = open_interpreter(content, delegates=False)
    for tensor in interpreter.get_tensor_details():
        if tensor["dtype"] not in _INTEGERS:
            raise ExportError(
                f"tensor {tensor['name']} of the TFLite file is "
                f"{np.dtype(tensor['dtype']).name}, not an integer"
            )
    pixels = {tensor["index"] for tensor in interpreter.get_input_details()}
    for operator in interpreter._get_ops_details():
        name = operator["op_name"]
        if name == "QUANTIZE" and set(operator["inputs"]) <= pixels:
            pixels.update(operator["outputs"])
        elif name in _COPYING and operator["inputs"][0] in pixels:
            pixels.update(operator["outputs"])
        elif name in ("QUANTIZE", "DEQUANTIZE"):
            raise ExportError(f"the TFLite file has a {name} inside its graph")


def largest_difference(
    student: Classifier, tflite: TFLiteClassifier, images: np.ndarray
) -> int:
    """How far the file is from the student that it was made of.

    Args:
      student: the fake-quantized model.
      tflite: the file.
      images: uint8 (n, height, width, channels).

    Returns:
      The largest difference of any output, in integer steps of the output.
    """
    difference = np.abs(student.scores(images) - tflite.scores(images))
    return int(np.round(difference.max() / tflite.output_scale))


def open_interpreter(
    content: bytes,
    *,
    num_threads: int = 1,
    delegates: bool = True,
    keeps_tensors: bool = False,
) -> litert.Interpreter:
    """LiteRT's interpreter of a file, ready to run.

    Args:
      content: of the file.
      num_threads: threads of the kernels.
      delegates: whether XNNPACK may take operators over.
      keeps_tensors: whether the tensors between layers can be read after a run; no
        operator is taken over then.

    Raises:
      ExportError: LiteRT cannot read the file.
    """
    resolver = litert.OpResolverType
    plain = keeps_tensors or not delegates
    try:
        with native_output_hidden():
            interpreter = litert.Interpreter(
                model_content=content,
                num_threads=num_threads,
                experimental_op_resolver_type=(
                    resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
                    if plain
                    else resolver.AUTO
                ),
                experimental_preserve_all_tensors=keeps_tensors,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ExportError(f"not a TFLite model that LiteRT can run: {error}") from error
    return interpreter
