"""LiteRT runs a TFLite file."""

import dataclasses
import numbers
import os
import statistics
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema

from dfq_tf.compat import native_output_hidden
from dfq_tf.context import counted
from dfq_tf.errors import ConfigError, ExportError, ModelError, class_of
from dfq_tf.files import expanded
from dfq_tf.graph import check_images
from dfq_tf.tflite import metadata
from dfq_tf.tflite.ends import pixels_as
from dfq_tf.tflite.flatbuffer import with_all_outputs

_INPUT_TYPES = (np.uint8, np.int8, np.float32)


class TFLiteClassifier:
    """Runs a TFLite classifier on pixels. Threads may share one: each waits its turn.

    Args:
      content: of a TFLite file from one image to one row of scores; or its path.
      num_threads: threads of the interpreter; at least 1.

    Raises:
      ConfigError: `num_threads` is no such number.
      ExportError: the file is none of TFLite, or takes or gives something else.
      ModelError: there is no such file, or `content` is neither.
    """

    def __init__(
        self, content: bytes | str | os.PathLike[str], num_threads: int = 1
    ) -> None:
        content = _content_of(content)
        self._interpreter = open_interpreter(content, num_threads=num_threads)
        inputs = self._interpreter.get_input_details()
        outputs = self._interpreter.get_output_details()
        if len(inputs) != 1 or len(outputs) != 1:
            raise ExportError(
                f"the file has {len(inputs)} inputs and {len(outputs)} outputs; it "
                "must take one image and give one row of class scores"
            )
        (self._input,), (self._output,) = inputs, outputs
        self._feeding = Feeding(content, self._input)
        # The interpreter has one place for an image, and one for what it gives.
        self._running = threading.Lock()
        is_float = self._output["dtype"] == np.float32
        if not is_float and not self._output["quantization"][0]:
            raise ExportError(
                f"the file's output is {self._output['dtype'].__name__} without a "
                "scale; it must be quantized integers, or float32"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        height, width, channels = (int(n) for n in self._input["shape"][1:])
        return height, width, channels

    @property
    def num_classes(self) -> int:
        """The number of outputs, or 2 where one score stands for two classes."""
        return max(2, int(self._output["shape"][-1]))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each column of `scores`; empty where the file does not say.

        A file of one score has one label, which is the second class.
        """
        names = self._feeding.metadata.class_names
        return ("0", *names) if self._has_one_score and len(names) == 1 else names

    @property
    def _has_one_score(self) -> bool:
        """Whether the file gives the second class's score alone."""
        return int(self._output["shape"][-1]) == 1

    def interface(self) -> dict[str, Any]:
        """What an app puts in and takes out, as plain data.

        Returns:
          model: the name that the file says. input and output: each the name, shape,
          type, scale and zero_point (0 of floats); the input also mean and std, of a
          float one, which takes (pixel - mean) / std.
        """
        said = self._feeding.metadata
        feeding = {"mean": list(said.mean), "std": list(said.std)}
        return {
            "model": said.name,
            "input": {**_tensor(self._input), "name": "image", **feeding},
            "output": {**_tensor(self._output), "name": said.output_name},
        }

    @property
    def output_scale(self) -> float:
        """What one integer step of the output is worth; 0 of floats."""
        return float(self._output["quantization"][0])

    @property
    def num_pieces(self) -> int:
        """How many pieces of the graph XNNPACK has taken over.

        One is best: between two pieces, operators run in the slower built-in kernels.
        """
        with self._running:
            operators = self._interpreter._get_ops_details()
        return sum(operator["op_name"] == "DELEGATE" for operator in operators)

    def latency(self, runs: int = 300) -> float:
        """Median time of one image, in milliseconds, after a tenth as many to warm up.

        Args:
          runs: how often an image of zeros is run; at least 1.

        Raises:
          ConfigError: `runs` is no such number.
        """
        runs = _count("runs", runs)
        image = self._feeding.of(np.zeros((1, *self.image_shape), np.uint8))
        seconds = []
        with self._running:
            self._interpreter.set_tensor(self._input["index"], image)
            for _ in counted(range(runs + runs // 10), "runs of the file"):
                began = time.perf_counter()
                self._interpreter.invoke()
                seconds.append(time.perf_counter() - began)
        return 1000 * statistics.median(seconds[runs // 10 :])

    def scores(self, images: np.ndarray) -> np.ndarray:
        """What the file gives for images.

        Args:
          images: uint8 (n, height, width, channels), whatever the file takes.

        Returns:
          float32 (n, num_classes): (integer output - zero point) * scale, or floats as
          they come. Of a file of one score s, 1 - s and s.

        Raises:
          ModelError: there is no image, or they are of another shape or type.
        """
        check_images(images, self.image_shape)
        if images.dtype != np.uint8:
            raise ModelError(
                f"the images are {images.dtype}; a TFLite file takes uint8 pixels, "
                "0 to 255"
            )
        interpreter = self._interpreter
        outputs = []
        for image in counted(self._feeding.of(images), "images"):
            with self._running:
                interpreter.set_tensor(self._input["index"], image[None])
                interpreter.invoke()
                outputs.append(interpreter.get_tensor(self._output["index"])[0])
        scores = dequantized(np.stack(outputs), self._output)
        if self._has_one_score:
            scores = np.concatenate([1 - scores, scores], axis=-1)
        return scores


def _count(name: str, given: Any) -> int:
    """A number of at least 1, as Python's own type.

    Args:
      name: of the argument.
      given: of NumPy too.

    Raises:
      ConfigError: it is no such number.
    """
    is_integer = isinstance(given, numbers.Integral) and not isinstance(given, bool)
    if not is_integer or given < 1:
        raise ConfigError(f"{name} is {given!r}; it must be an integer of at least 1")
    return int(given)


def _content_of(file: Any) -> bytes:
    """The bytes of a file, which is given as these or as its path.

    Raises:
      ModelError: it is neither, or cannot be read.
    """
    if isinstance(file, bytes):
        return file
    if not isinstance(file, (str, os.PathLike)):
        raise ModelError(
            f"content is a {class_of(file)}; give the "
            "bytes of a TFLite file, or its path"
        )
    try:
        return expanded(file).read_bytes()
    except OSError as error:
        raise ModelError(
            f"{os.fspath(file)!r} cannot be read: {error.strerror}; give the path of a "
            "TFLite file"
        ) from error


def _tensor(details: Mapping[str, Any]) -> dict[str, Any]:
    scale, zero_point = details["quantization"]
    return {
        "shape": [int(size) for size in details["shape"]],
        "type": details["dtype"].__name__,
        "scale": float(scale),
        "zero_point": int(zero_point),
    }


class Feeding:
    """What a file takes for pixels.

    Args:
      content: of the file.
      image: LiteRT's details of its input.

    Raises:
      ExportError: the file takes no image, or one that nobody says how to make.
    """

    def __init__(self, content: bytes, image: Mapping[str, Any]) -> None:
        said = metadata.read(content)
        self._dtype = image["dtype"]
        self.metadata = said or metadata.Metadata()
        is_known = said is not None or self._dtype != np.float32
        if self._dtype not in _INPUT_TYPES or len(image["shape"]) != 4 or not is_known:
            raise ExportError(
                f"the file's input is {self._dtype.__name__} {image['shape']}; it must "
                "be uint8 pixels, (1, height, width, channels), or int8 ones, or "
                "float32 ones with metadata that say how they are normalised"
            )

    def of(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels, uint8 (n, height, width, channels), as the file takes them."""
        return pixels_as(pixels, self._dtype, self.metadata.mean, self.metadata.std)


def dequantized(values: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    """What integers of a tensor mean, float32; floats as they are.

    Args:
      values: of the tensor.
      tensor: LiteRT's details of it.
    """
    scale, zero_point = tensor["quantization"]
    if values.dtype == np.float32:
        return values
    return (values.astype(np.float32) - zero_point) * scale


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor of a file, for some images.

    Attributes:
      integers: (n, ...).
      scale: what one step is worth.
      zero_point: the integer that stands for 0.
    """

    integers: np.ndarray
    scale: float
    zero_point: int

    @property
    def values(self) -> np.ndarray:
        """What the integers mean, float32 (n, ...)."""
        return (self.integers.astype(np.float32) - self.zero_point) * self.scale


def stored_tensors(content: bytes, images: np.ndarray) -> dict[str, Stored]:
    """What each operator of a file writes, by the name of the tensor.

    Args:
      content: of a file that this project wrote.
      images: uint8 (n, height, width, channels).

    Raises:
      ExportError: LiteRT cannot run the file.
    """
    interpreter = open_interpreter(with_all_outputs(content))
    (image,) = interpreter.get_input_details()
    outputs = interpreter.get_output_details()
    integers: list[list[np.ndarray]] = [[] for _ in outputs]
    for pixels in counted(Feeding(content, image).of(images), "images"):
        interpreter.set_tensor(image["index"], pixels[None])
        interpreter.invoke()
        for found, output in zip(integers, outputs):
            found.append(interpreter.get_tensor(output["index"])[0])
    return {
        output["name"]: Stored(np.stack(found), *output["quantization"])
        for found, output in zip(integers, outputs)
    }


def kernel_types(content: bytes) -> dict[str, str]:
    """Node -> the type in which a file of this project stores its kernel, 'int4'."""
    names = {v: k.lower() for k, v in vars(schema.TensorType).items() if k.isupper()}
    model = schema.Model.GetRootAs(content, 0)
    subgraph = model.Subgraphs(0)
    tensors = [subgraph.Tensors(i) for i in range(subgraph.TensorsLength())]
    return {
        tensor.Name().decode().removesuffix("/kernel"): names[tensor.Type()]
        for tensor in tensors
        if tensor.Name().decode().endswith("/kernel")
    }


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
      num_threads: threads of the kernels; at least 1.
      delegates: whether XNNPACK may take operators over.
      keeps_tensors: whether the tensors between layers can be read after a run; no
        operator is taken over then.

    Raises:
      ConfigError: `num_threads` is no such number.
      ExportError: LiteRT cannot read the file.
    """
    num_threads = _count("num_threads", num_threads)
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
