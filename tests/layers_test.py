import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import keras, tf
from dfq_tf.graph import layers
from dfq_tf.graph.layers import KINDS, Exactly, NoFurther
from dfq_tf.graph.nodes import Graph

K = keras.layers
IMAGE = (5, 7, 6)
BATCH = 3
# They stand for what has no function.
WITHOUT_CASE = {"image", "unknown"}
# f(s x) = s f(x) for them too. But the range of the first two is fixed, and the inputs
# of the last may be one node.
HOMOGENEOUS_UNSAID = {"pixels", "requantize", "multiply"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A node, and what it is compared with.

    Attributes:
      twin: the same function in NumPy, float64, of the inputs and, by name, of the
        settings and weights.
      shapes: of the inputs, without the batch.
      settings: of the node, those that are not the defaults.
      weights: role -> shape.
      layer: makes the Keras layer of the same function, if there is one.
      size: standard deviation of the inputs.
    """

    twin: Callable[..., np.ndarray]
    shapes: Sequence[tuple[int, ...]]
    settings: Mapping[str, Any]
    weights: Mapping[str, tuple[int, ...]]
    layer: Callable[[], Any] | None
    size: float


def case(
    twin: Callable[..., np.ndarray],
    layer: Callable[[], Any] | None = None,
    *,
    shapes: Sequence[tuple[int, ...]] = (IMAGE,),
    settings: Mapping[str, Any] | None = None,
    weights: Mapping[str, tuple[int, ...]] | None = None,
    size: float = 2.0,
) -> Case:
    """A case of one image, without settings and weights, unless it is said."""
    return Case(twin, shapes, settings or {}, weights or {}, layer, size)


# The functions in NumPy.


def patches(
    x: np.ndarray,
    size: Sequence[int],
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int] = (1, 1),
    fill: float = 0.0,
) -> np.ndarray:
    """The windows of images, (batch, rows, columns, *size, channels)."""
    places, margins = [], []
    for side, window, stride, step in zip(x.shape[1:3], size, strides, dilation):
        reach = (window - 1) * step + 1
        missing = 0
        if padding == "same":
            missing = max((math.ceil(side / stride) - 1) * stride + reach - side, 0)
        # What is odd goes to the end.
        margins.append((missing // 2, missing - missing // 2))
        starts = np.arange(0, side + missing - reach + 1, stride)
        places.append(starts[:, None] + np.arange(0, reach, step))
    padded = np.pad(x, [(0, 0), *margins, (0, 0)], constant_values=fill)
    rows, columns = places
    return padded[:, rows[:, None, :, None], columns[None, :, None, :]]


def convolution(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: Any = 0.0,
    *,
    strides: Sequence[int],
    padding: str,
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    windows = patches(x, kernel.shape[:2], strides, padding, dilation)
    parts = zip(np.split(windows, groups, axis=-1), np.split(kernel, groups, axis=-1))
    outputs = [np.einsum("bhwijc,ijco->bhwo", *part) for part in parts]
    return np.concatenate(outputs, axis=-1) + bias


def depthwise(
    x: np.ndarray, kernel: np.ndarray, bias: Any = 0.0, **window: Any
) -> np.ndarray:
    windows = patches(x, kernel.shape[:2], **window)
    outputs = np.einsum("bhwijc,ijcm->bhwcm", windows, kernel)
    return outputs.reshape(*outputs.shape[:3], -1) + bias


def dense(x: np.ndarray, kernel: np.ndarray, bias: Any = 0.0) -> np.ndarray:
    return x @ kernel + bias


def normalized(
    x: np.ndarray,
    gamma: np.ndarray,
    beta: np.ndarray,
    mean: np.ndarray,
    variance: np.ndarray,
    epsilon: float,
) -> np.ndarray:
    return gamma * (x - mean) / np.sqrt(variance + epsilon) + beta


def by_row(x: np.ndarray, epsilon: float, is_centered: bool) -> np.ndarray:
    if is_centered:
        x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def max_pool(x: np.ndarray, size: Sequence[int], **window: Any) -> np.ndarray:
    return patches(x, size, fill=-np.inf, **window).max(axis=(3, 4))


def average_pool(x: np.ndarray, size: Sequence[int], **window: Any) -> np.ndarray:
    # What is padded does not count.
    return np.nanmean(patches(x, size, fill=np.nan, **window), axis=(3, 4))


def softmax(x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def side_by_side(*inputs: np.ndarray, axis: int) -> np.ndarray:
    return np.concatenate(inputs, axis)


def by_pixel(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """A function of an image and a vector for all its pixels, in either order."""

    def twin(*inputs: np.ndarray) -> np.ndarray:
        return function(*(x if x.ndim == 4 else x[:, None, None] for x in inputs))

    return twin


def reshaped(x: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    return x.reshape(len(x), *shape)


def padded(x: np.ndarray, margins: Any) -> np.ndarray:
    (top, bottom), (left, right) = margins
    height, width = x.shape[1:3]
    values = np.zeros(
        (len(x), top + height + bottom, left + width + right, x.shape[-1])
    )
    values[:, top : top + height, left : left + width] = x
    return values


def cropped(x: np.ndarray, margins: Any) -> np.ndarray:
    (top, bottom), (left, right) = margins
    height, width = x.shape[1:3]
    return x[:, top : height - bottom, left : width - right]


def repeated(x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    rows, columns = (np.arange(n * k) // k for n, k in zip(x.shape[1:3], size))
    return x[:, rows[:, None], columns]


def between_pixels(x: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Bilinear, where a pixel's colour is that of its middle."""
    for axis, factor in enumerate(size, start=1):
        count = x.shape[axis]
        places = np.clip((np.arange(count * factor) + 0.5) / factor - 0.5, 0, count - 1)
        lower = np.floor(places).astype(int)
        upper = np.minimum(lower + 1, count - 1)
        share = (places - lower).reshape((-1,) + (1,) * (3 - axis))
        x = (1 - share) * x.take(lower, axis) + share * x.take(upper, axis)
    return x


def blocks(x: np.ndarray, block: int) -> np.ndarray:
    batch, height, width, channels = x.shape
    values = np.zeros((batch, height * block, width * block, channels // block**2))
    for i in range(block**2):
        row, column = divmod(i, block)
        part = np.split(x, block**2, axis=-1)[i]
        values[:, row::block, column::block] = part
    return values


def transposed_convolution(
    x: np.ndarray,
    kernel: np.ndarray,
    bias: Any = 0.0,
    *,
    strides: Sequence[int],
    padding: str,
) -> np.ndarray:
    """Each pixel is spread by the kernel; 'same' keeps the middle."""
    sizes = [
        max(n * stride, (n - 1) * stride + k)
        for n, stride, k in zip(x.shape[1:3], strides, kernel.shape)
    ]
    values = np.zeros((len(x), *sizes, kernel.shape[-1]))
    for row, column in np.ndindex(*x.shape[1:3]):
        top, left = row * strides[0], column * strides[1]
        spread = np.einsum("bc,ijco->bijo", x[:, row, column], kernel)
        bottom, right = top + kernel.shape[0], left + kernel.shape[1]
        values[:, top:bottom, left:right] += spread
    if padding == "same":
        kept = [n * stride for n, stride in zip(x.shape[1:3], strides)]
        top, left = ((size - keep) // 2 for size, keep in zip(sizes, kept))
        values = values[:, top : top + kept[0], left : left + kept[1]]
    return values + bias


STATISTICS = {role: (6,) for role in ("gamma", "beta", "mean", "variance")}
TWO, VECTOR, PIXEL = (IMAGE, IMAGE), (6,), (1, 1, 6)


def in_keras(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a convolution, by their names in Keras."""
    return {{"dilation": "dilation_rate"}.get(k, k): v for k, v in settings.items()}


def conv_case(
    kernel: tuple[int, ...],
    shape: tuple[int, ...] = IMAGE,
    *,
    bias: bool = True,
    **settings: Any,
) -> Case:
    """A convolution, with the Keras layer of the same settings."""
    weights = {"kernel": kernel, **({"bias": kernel[-1:]} if bias else {})}
    make = functools.partial(
        K.Conv2D, kernel[-1], kernel[:2], use_bias=bias, **in_keras(settings)
    )
    return case(convolution, make, shapes=(shape,), settings=settings, weights=weights)


def depthwise_case(
    kernel: tuple[int, ...],
    shape: tuple[int, ...] = IMAGE,
    *,
    bias: bool = True,
    **settings: Any,
) -> Case:
    """A depthwise convolution, as `conv_case`."""
    channels = kernel[-2] * kernel[-1]
    weights = {"kernel": kernel, **({"bias": (channels,)} if bias else {})}
    make = functools.partial(
        K.DepthwiseConv2D,
        kernel[:2],
        depth_multiplier=kernel[-1],
        use_bias=bias,
        **in_keras(settings),
    )
    return case(depthwise, make, shapes=(shape,), settings=settings, weights=weights)


def transposed_case(
    kernel: tuple[int, ...],
    strides: tuple[int, int] = (1, 1),
    padding: str = "valid",
    *,
    bias: bool = True,
) -> Case:
    """A transposed convolution. That of Keras has its kernel in another layout."""
    weights = {"kernel": kernel, **({"bias": kernel[-1:]} if bias else {})}
    settings = {"strides": strides, "padding": padding}
    return case(transposed_convolution, settings=settings, weights=weights)


def pool_case(
    twin: Callable[..., np.ndarray],
    layer: Callable[..., Any],
    size: tuple[int, int],
    strides: tuple[int, int],
    padding: str = "valid",
    shape: tuple[int, ...] = IMAGE,
) -> Case:
    """A pooling."""
    settings = {"size": size, "strides": strides, "padding": padding}
    make = functools.partial(layer, size, strides, padding)
    return case(twin, make, shapes=(shape,), settings=settings)


# Kind, or kind/what is special -> Case. A function of one value is one line:
#   "softplus": case(lambda x: np.log1p(np.exp(x))),
CASES: dict[str, Case] = {
    "pixels": case(lambda x, low, high: x, settings={"low": -2.0, "high": 2.0}),
    "requantize": case(lambda x: x),
    "conv": conv_case((3, 3, 6, 6)),
    "conv/same": conv_case((3, 2, 6, 4), padding="same"),
    "conv/no_bias": conv_case((1, 5, 6, 4), bias=False),
    "conv/strided": conv_case((2, 3, 6, 4), strides=(2, 3)),
    "conv/strided_same": conv_case(
        (3, 3, 2, 4), (8, 9, 2), strides=(2, 2), padding="same"
    ),
    "conv/strided_same_1x1": conv_case((1, 1, 6, 4), strides=(3, 2), padding="same"),
    "conv/dilated": conv_case((2, 3, 6, 4), dilation=(3, 2)),
    "conv/dilated_same": conv_case((3, 3, 6, 4), dilation=(2, 1), padding="same"),
    "conv/grouped": conv_case((3, 3, 2, 9), groups=3),
    "conv/grouped_strided_same": conv_case(
        (3, 3, 3, 4), groups=2, strides=(2, 2), padding="same"
    ),
    "conv/grouped_dilated": conv_case((2, 2, 1, 6), groups=6, dilation=(2, 2)),
    "depthwise_conv": depthwise_case((3, 3, 6, 1)),
    "depthwise_conv/of_two": depthwise_case((3, 2, 6, 2), padding="same"),
    "depthwise_conv/no_bias": depthwise_case((5, 1, 6, 3), bias=False),
    "depthwise_conv/strided": depthwise_case((2, 3, 6, 1), strides=(2, 2)),
    "depthwise_conv/strided_same": depthwise_case(
        (3, 3, 2, 2), (8, 9, 2), strides=(2, 2), padding="same"
    ),
    "depthwise_conv/dilated": depthwise_case((2, 3, 6, 1), dilation=(2, 2)),
    "depthwise_conv/dilated_same": depthwise_case(
        (3, 3, 6, 2), dilation=(2, 1), padding="same"
    ),
    # The layer of Keras 2 has neither.
    "depthwise_conv/two_strides": case(
        depthwise,
        settings=dict(strides=(2, 1), padding="same", dilation=(1, 1)),
        weights={"kernel": (3, 2, 6, 2), "bias": (12,)},
    ),
    "depthwise_conv/strided_dilated": case(
        depthwise,
        settings=dict(strides=(2, 2), padding="valid", dilation=(2, 1)),
        weights={"kernel": (2, 3, 6, 1), "bias": (6,)},
    ),
    "conv_transpose": transposed_case((3, 2, 6, 6)),
    "conv_transpose/same": transposed_case((3, 4, 6, 4), padding="same"),
    "conv_transpose/strided": transposed_case((3, 5, 6, 4), (2, 2)),
    "conv_transpose/strided_1x1": transposed_case((1, 1, 6, 4), (2, 2), bias=False),
    "conv_transpose/two_strides": transposed_case((2, 3, 6, 4), (1, 3)),
    "dense": case(
        dense,
        lambda: K.Dense(6),
        shapes=[(6,)],
        weights={"kernel": (6, 6), "bias": (6,)},
    ),
    "dense/no_bias": case(
        dense,
        lambda: K.Dense(4, use_bias=False),
        shapes=[(6,)],
        weights={"kernel": (6, 4)},
    ),
    "dense/of_pixels": case(
        dense, lambda: K.Dense(6), weights={"kernel": (6, 6), "bias": (6,)}
    ),
    "dense/of_rows": case(
        dense,
        lambda: K.Dense(4),
        shapes=[(7, 6)],
        weights={"kernel": (6, 4), "bias": (4,)},
    ),
    "batch_normalization": case(
        normalized,
        lambda: K.BatchNormalization(epsilon=1e-3),
        settings={"epsilon": 1e-3},
        weights=STATISTICS,
    ),
    "batch_normalization/of_vectors": case(
        normalized,
        lambda: K.BatchNormalization(epsilon=0.5),
        shapes=[VECTOR],
        settings={"epsilon": 0.5},
        weights=STATISTICS,
    ),
    "batch_normalization/of_rows": case(
        normalized,
        lambda: K.BatchNormalization(epsilon=1e-3),
        shapes=[(7, 6)],
        settings={"epsilon": 1e-3},
        weights=STATISTICS,
    ),
    "layer_normalization": case(
        by_row,
        lambda: K.LayerNormalization(epsilon=0.02, center=False, scale=False),
        settings={"epsilon": 0.02},
    ),
    "layer_normalization/of_vectors": case(
        by_row,
        lambda: K.LayerNormalization(epsilon=1e-3, center=False, scale=False),
        shapes=[VECTOR],
        settings={"epsilon": 1e-3},
    ),
    "layer_normalization/not_centered": case(
        by_row, settings={"epsilon": 0.02, "is_centered": False}
    ),
    "affine": case(
        lambda x, scale, offset: scale * x + offset,
        lambda: K.Rescaling(-0.5, 3.0),
        settings={"scale": -0.5, "offset": 3.0},
    ),
    "affine/by_channel": case(
        lambda x, scale, offset: np.multiply(scale, x) + offset,
        lambda: K.Rescaling([1.0, -2.0, 3.0], [0.5, 0.0, -1.5]),
        shapes=[(4, 4, 3)],
        settings={"scale": (1.0, -2.0, 3.0), "offset": (0.5, 0.0, -1.5)},
    ),
    "relu": case(lambda x, top: np.maximum(x, 0), K.ReLU),
    "relu/6": case(
        lambda x, top: np.clip(x, 0, 6),
        lambda: K.ReLU(6.0),
        settings={"top": 6.0},
        size=9,
    ),
    "relu/top": case(
        lambda x, top: np.clip(x, 0, 1.5), lambda: K.ReLU(1.5), settings={"top": 1.5}
    ),
    "leaky_relu": case(
        lambda x, slope: np.where(x > 0, x, 0.2 * x),
        lambda: K.LeakyReLU(0.2),
        settings={"slope": 0.2},
    ),
    "prelu": case(
        lambda x, slopes: np.where(x > 0, x, slopes * x),
        settings={"slopes": (0.1, -0.5, 0.0, 1.5, 0.3, 0.2)},
    ),
    "sigmoid": case(lambda x: 1 / (1 + np.exp(-x)), lambda: K.Activation("sigmoid")),
    "softplus": case(lambda x: np.log1p(np.exp(x)), lambda: K.Activation("softplus")),
    "elu": case(lambda x, slope: np.where(x > 0, x, np.expm1(x)), lambda: K.ELU()),
    "elu/slope": case(
        lambda x, slope: np.where(x > 0, x, 0.3 * np.expm1(x)),
        lambda: K.ELU(0.3),
        settings={"slope": 0.3},
    ),
    "selu": case(
        lambda x: 1.05070099 * np.where(x > 0, x, 1.67326324 * np.expm1(x)),
        lambda: K.Activation("selu"),
    ),
    "gelu": case(
        lambda x, approximate: x * (1 + np.vectorize(math.erf)(x / 2**0.5)) / 2,
        lambda: K.Activation("gelu"),
    ),
    "gelu/approximate": case(
        lambda x, approximate: (
            x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2
        ),
        settings={"approximate": True},
    ),
    "mish": case(
        lambda x: x * np.tanh(np.log1p(np.exp(x))), lambda: K.Activation("mish")
    ),
    "exponential": case(np.exp, lambda: K.Activation("exponential")),
    "tanh": case(np.tanh, lambda: K.Activation("tanh")),
    "softmax": case(softmax, K.Softmax),
    "softmax/of_vectors": case(softmax, K.Softmax, shapes=[VECTOR]),
    "add": case(np.add, K.Add, shapes=TWO),
    "add/pixel": case(np.add, K.Add, shapes=(PIXEL, IMAGE)),
    "add/vector": case(by_pixel(np.add), K.Add, shapes=(IMAGE, VECTOR)),
    "subtract": case(np.subtract, K.Subtract, shapes=TWO),
    "subtract/vector_first": case(
        by_pixel(np.subtract), K.Subtract, shapes=(VECTOR, IMAGE)
    ),
    "subtract/vectors": case(np.subtract, K.Subtract, shapes=(VECTOR, VECTOR)),
    "multiply": case(np.multiply, K.Multiply, shapes=TWO),
    "multiply/pixel": case(np.multiply, K.Multiply, shapes=(IMAGE, PIXEL)),
    "multiply/map": case(np.multiply, K.Multiply, shapes=(IMAGE, (5, 7, 1))),
    "maximum": case(np.maximum, K.Maximum, shapes=TWO),
    "maximum/vector": case(by_pixel(np.maximum), shapes=(IMAGE, VECTOR)),
    "minimum": case(np.minimum, K.Minimum, shapes=TWO),
    "minimum/pixel": case(np.minimum, K.Minimum, shapes=(PIXEL, IMAGE)),
    "concatenate": case(
        side_by_side, K.Concatenate, shapes=(IMAGE, (5, 7, 2), (5, 7, 1))
    ),
    "concatenate/rows": case(
        side_by_side,
        lambda: K.Concatenate(1),
        shapes=(IMAGE, (2, 7, 6)),
        settings={"axis": 1},
    ),
    "concatenate/columns": case(
        side_by_side,
        lambda: K.Concatenate(2),
        shapes=(IMAGE, (5, 1, 6)),
        settings={"axis": -2},
    ),
    "concatenate/vectors": case(
        side_by_side, K.Concatenate, shapes=((4,), (1,)), settings={"axis": 1}
    ),
    "max_pool": pool_case(max_pool, K.MaxPooling2D, (2, 3), (2, 3)),
    "max_pool/same": pool_case(max_pool, K.MaxPooling2D, (3, 2), (1, 2), "same"),
    "max_pool/even_same": pool_case(
        max_pool, K.MaxPooling2D, (2, 2), (2, 2), "same", (7, 8, 3)
    ),
    "average_pool": pool_case(average_pool, K.AveragePooling2D, (2, 3), (3, 1)),
    "average_pool/same": pool_case(
        average_pool, K.AveragePooling2D, (3, 2), (1, 2), "same"
    ),
    "average_pool/whole": pool_case(average_pool, K.AveragePooling2D, (5, 7), (5, 7)),
    "global_average_pool": case(
        lambda x, keepdims: x.mean(axis=(1, 2)), K.GlobalAveragePooling2D
    ),
    "global_average_pool/pixel": case(
        lambda x, keepdims: x.mean(axis=(1, 2))[:, None, None],
        lambda: K.GlobalAveragePooling2D(keepdims=True),
        settings={"keepdims": True},
    ),
    "global_max_pool": case(
        lambda x, keepdims: x.max(axis=(1, 2)), K.GlobalMaxPooling2D
    ),
    "global_max_pool/pixel": case(
        lambda x, keepdims: x.max(axis=(1, 2))[:, None, None],
        lambda: K.GlobalMaxPooling2D(keepdims=True),
        settings={"keepdims": True},
    ),
    "channel_max": case(lambda x: x.max(axis=-1, keepdims=True)),
    "reshape": case(reshaped, K.Flatten, settings={"shape": (-1,)}),
    "reshape/rows": case(
        reshaped, lambda: K.Reshape((-1, 6)), settings={"shape": (-1, 6)}
    ),
    "reshape/fixed": case(
        reshaped, lambda: K.Reshape((10, 7, 3)), settings={"shape": (10, 7, 3)}
    ),
    "reshape/vector": case(
        reshaped,
        lambda: K.Reshape((1, 1, 6)),
        shapes=[VECTOR],
        settings={"shape": (1, 1, 6)},
    ),
    "pad": case(
        padded,
        lambda: K.ZeroPadding2D(((1, 2), (0, 3))),
        settings={"margins": ((1, 2), (0, 3))},
    ),
    "crop": case(
        cropped,
        lambda: K.Cropping2D(((1, 2), (0, 3))),
        settings={"margins": ((1, 2), (0, 3))},
    ),
    "crop/nothing": case(
        cropped,
        lambda: K.Cropping2D(0),
        settings={"margins": ((0, 0), (0, 0))},
    ),
    "nearest_upsampling": case(
        repeated, lambda: K.UpSampling2D((2, 3)), settings={"size": (2, 3)}
    ),
    "bilinear_upsampling": case(
        between_pixels,
        lambda: K.UpSampling2D((2, 4), interpolation="bilinear"),
        settings={"size": (2, 4)},
    ),
    "bilinear_upsampling/by_three": case(
        between_pixels,
        lambda: K.UpSampling2D(3, interpolation="bilinear"),
        settings={"size": (3, 3)},
    ),
    "transpose": case(
        lambda x, order: x.transpose(0, *order),
        lambda: K.Permute((3, 1, 2)),
        settings={"order": (3, 1, 2)},
    ),
    "transpose/rows": case(
        lambda x, order: x.transpose(0, *order),
        lambda: K.Permute((2, 1)),
        shapes=[(7, 6)],
        settings={"order": (2, 1)},
    ),
    "depth_to_space": case(blocks, shapes=[(3, 4, 8)], settings={"block": 2}),
    "channels": case(
        lambda x, order: x[..., order], settings={"order": [2, 0, 1, 5, 4, 3]}
    ),
    "channels/some": case(
        lambda x, order: x[..., order], settings={"order": [4, 0, 4]}
    ),
}
NAMED = [(name.replace("/", "_of_"), name) for name in CASES]
WITH_LAYER = [(title, name) for title, name in NAMED if CASES[name].layer]


def kind_of(name: str) -> str:
    return name.split("/")[0]


@functools.cache
def made(name: str) -> tuple[layers.Node, list[np.ndarray]]:
    """The node of a case, with random weights, and inputs."""
    rng = np.random.default_rng(0)
    each = CASES[name]
    weights = {
        role: rng.uniform(0.3, 2, shape)
        if role in ("gamma", "variance")
        else rng.normal(0, 0.5, shape)
        for role, shape in each.weights.items()
    }
    sources = [layers.image(f"image_{i}", shape) for i, shape in enumerate(each.shapes)]
    node = layers.node(kind_of(name), "node", sources, each.settings, weights)
    inputs = [rng.normal(0, each.size, (BATCH, *shape)) for shape in each.shapes]
    return node, [x.astype(np.float32) for x in inputs]


def computed(node: layers.Node, inputs: Sequence[Any]) -> Any:
    tensors = [tf.constant(x) for x in inputs]
    return KINDS[node.kind].compute(node, tensors, node.weights)


def in_numpy(name: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
    node, _ = made(name)
    exact = [x.astype(np.float64) for x in inputs]
    weights = {role: w.astype(np.float64) for role, w in node.weights.items()}
    return CASES[name].twin(*exact, **weights, **node.settings)


class FloatMeaningTest(tf.test.TestCase, parameterized.TestCase):
    def test_each_kind_has_a_case(self):
        self.assertEqual({*map(kind_of, CASES)}, KINDS.keys() - WITHOUT_CASE)

    @parameterized.named_parameters(NAMED)
    def test_equals_numpy(self, name):
        node, inputs = made(name)
        expected = in_numpy(name, inputs)
        size = np.abs(expected).max()
        self.assertGreater(np.ptp(expected), 0.1)
        self.assertAllClose(computed(node, inputs), expected, rtol=0, atol=2e-6 * size)

    @parameterized.named_parameters(WITH_LAYER)
    def test_equals_keras_and_so_do_gradients(self, name):
        node, inputs = made(name)
        layer = CASES[name].layer()
        tensors = [tf.constant(x) for x in inputs]
        argument = tensors[0] if len(tensors) == 1 else tensors
        layer(argument)
        layer.set_weights(list(node.weights.values()))
        results = []
        for function in (
            lambda: KINDS[node.kind].compute(node, tensors, node.weights),
            lambda: layer(argument, training=False),
        ):
            with tf.GradientTape() as tape:
                tape.watch(tensors)
                output = function()
                # Each value counts another way.
                weight = tf.reshape(
                    tf.sin(tf.range(tf.size(output), dtype=tf.float32)), output.shape
                )
                loss = tf.reduce_sum(weight * output)
            results.append([output, *tape.gradient(loss, tensors)])
        for ours, theirs in zip(*results):
            self.assertAllClose(ours, theirs, rtol=1e-6, atol=1e-6)

    @parameterized.named_parameters(NAMED)
    def test_is_the_same_in_a_compiled_function_of_any_batch(self, name):
        node, inputs = made(name)
        specs = [tf.TensorSpec((None, *x.shape[1:]), tf.float32) for x in inputs]
        function = tf.function(
            lambda *tensors: KINDS[node.kind].compute(node, tensors, node.weights),
            input_signature=specs,
        )
        output = function(*inputs)
        self.assertEqual(
            function.get_concrete_function().output_shapes.rank, len(node.shape) + 1
        )
        self.assertAllClose(output, computed(node, inputs), rtol=1e-6, atol=1e-6)

    @parameterized.named_parameters(NAMED)
    def test_computes_in_the_type_of_its_inputs(self, name):
        node, inputs = made(name)
        narrow = [tf.cast(x, tf.bfloat16) for x in inputs]
        weights = dict(node.weights)
        if node.kind != "batch_normalization":
            weights = {role: tf.cast(w, tf.bfloat16) for role, w in weights.items()}
        output = KINDS[node.kind].compute(node, narrow, weights)
        self.assertEqual(output.dtype, tf.bfloat16)
        expected = in_numpy(name, [tf.cast(x, tf.float32).numpy() for x in narrow])
        size = np.abs(expected).max()
        self.assertAllClose(
            tf.cast(output, tf.float32), expected, rtol=0, atol=0.03 * size
        )

    @parameterized.parameters([IMAGE], [VECTOR], [(7, 6)])
    def test_batch_normalization_keeps_float32_statistics(self, shape):
        # All of them would be other numbers in bfloat16.
        values = {"gamma": 1.003, "beta": -99.7, "mean": 100.3, "variance": 0.01}
        weights = {role: np.full(6, value) for role, value in values.items()}
        source, settings = layers.image("image", shape), {"epsilon": 1e-3}
        node = layers.node("batch_normalization", "bn", [source], settings, weights)
        x = tf.cast(100 + tf.random.stateless_uniform((2, *shape), (0, 1)), tf.bfloat16)
        output = KINDS[node.kind].compute(node, [x], node.weights)
        self.assertEqual(output.dtype, tf.bfloat16)
        exact = normalized(tf.cast(x, tf.float32).numpy(), **values, epsilon=1e-3)
        # Half a step of bfloat16, that of the output alone.
        self.assertAllClose(tf.cast(output, tf.float32), exact, rtol=2**-8, atol=0)

    def test_kernel_of_one_pixel_with_strides_learns(self):
        # TensorFlow's own gradient of it corrupts memory where there are few channels.
        x = tf.constant(np.random.default_rng(0).normal(size=(2, 5, 4, 3)), tf.float32)
        image = layers.image("image", x.shape[1:])
        weights = {"kernel": np.ones((1, 1, 3, 6), np.float32)}
        settings = {"strides": (2, 3)}
        node = layers.node("conv", "a", [image], settings, weights)

        @tf.function
        def gradient(kernel):
            with tf.GradientTape() as tape:
                tape.watch(kernel)
                total = tf.reduce_sum(
                    KINDS["conv"].compute(node, [x], {"kernel": kernel})
                )
            return tape.gradient(total, kernel)

        kernel = tf.constant(weights["kernel"])
        graph = gradient.get_concrete_function(kernel).graph
        operators = [op for op in graph.get_operations() if "Conv2D" in op.type]
        self.assertNotEmpty(operators)
        for operator in operators:
            self.assertEqual(operator.get_attr("strides"), [1, 1, 1, 1])
        expected = x.numpy()[:, ::2, ::3].sum((0, 1, 2))[:, None] * np.ones((1, 6))
        self.assertAllClose(gradient(kernel)[0, 0], expected, rtol=1e-5)

    def test_unknown_cannot_be_computed(self):
        source = layers.image("image", IMAGE)
        node = layers.unknown("odd", [source], (2,), "Lambda", "it holds code")
        with self.assertRaisesRegex(
            ValueError, "odd cannot be computed: it holds code"
        ):
            computed(node, [np.zeros((1, *IMAGE))])


class ShapeTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.named_parameters(NAMED)
    def test_is_that_of_what_it_computes(self, name):
        node, inputs = made(name)
        self.assertEqual(node.shape, tuple(computed(node, inputs).shape[1:]))
        self.assertEqual(node.shape, in_numpy(name, inputs).shape[1:])

    @parameterized.named_parameters(
        (title, name)
        for title, name in NAMED
        if len({*CASES[name].shapes}) == 1 and len(CASES[name].shapes[0]) == 3
    )
    def test_is_found_when_the_size_of_the_image_is(self, name):
        node, inputs = made(name)
        each = CASES[name]
        *sides, channels = each.shapes[0]
        image = layers.image("image", (None, None, channels))
        open_node = layers.node(
            node.kind,
            "node",
            [image] * len(each.shapes),
            each.settings,
            node.weights,
            ["layer"],
        )
        graph = Graph([image, open_node], "node")
        self.assertLen(open_node.shape, len(node.shape))
        for size, known in zip(open_node.shape, node.shape):
            self.assertIn(size, (None, known))
        resized = layers.resized(graph, (*sides, channels))
        self.assertEqual(resized.image.shape, each.shapes[0])
        self.assertEqual(resized.last.shape, node.shape)
        self.assertEqual(resized.last.layers, ("layer",))
        # The graph itself is as it was.
        self.assertEqual(graph.image.shape, (None, None, channels))
        self.assertEqual(graph.last.shape, open_node.shape)

    @parameterized.parameters(
        ("conv", (None, None, 6)),
        ("max_pool", (None, None, 6)),
        ("pad", (None, None, 6)),
        ("crop", (None, None, 6)),
        ("nearest_upsampling", (None, None, 6)),
        ("conv_transpose/strided", (None, None, 4)),
        ("transpose", (6, None, None)),
        ("relu", (None, None, 6)),
        ("add", (None, None, 6)),
        ("concatenate/rows", (None, None, 6)),
        ("reshape", (None,)),
        ("reshape/rows", (None, 6)),
        ("global_average_pool", (6,)),
        ("global_max_pool/pixel", (1, 1, 6)),
    )
    def test_behind_images_of_any_size(self, name, expected):
        each = CASES[name]
        image = layers.image("image", (None, None, 6))
        node = layers.node(
            kind_of(name),
            "node",
            [image] * len(each.shapes),
            each.settings,
            made(name)[0].weights,
        )
        self.assertEqual(node.shape, expected)

    def test_one_side_alone_may_be_any(self):
        image = layers.image("image", (None, 9, 3))
        pool = layers.node(
            "max_pool", "pool", [image], {"size": (2, 2), "strides": (2, 2)}
        )
        self.assertEqual(pool.shape, (None, 4, 3))
        graph = layers.resized(Graph([image, pool], "pool"), (7, 5, 3))
        self.assertEqual(graph.last.shape, (3, 2, 3))

    def test_pixel_meets_an_image_of_any_size(self):
        image = layers.image("image", (None, None, 3))
        gate = layers.node("global_average_pool", "gate", [image], {"keepdims": True})
        vector = layers.node("global_average_pool", "vector", [image])
        for sources in ([image, gate], [gate, image], [vector, image]):
            product = layers.node("multiply", "product", sources)
            self.assertEqual(product.shape, (None, None, 3))

    def test_unknown_keeps_its_shape(self):
        image = layers.image("image", (None, None, 3))
        odd = layers.unknown("odd", [image], (None, 4), "Lambda", "it holds code")
        self.assertEqual(odd.shape, (None, 4))
        graph = layers.resized(Graph([image, odd], "odd"), (8, 8, 3))
        self.assertEqual(graph.last.shape, (None, 4))

    @parameterized.parameters(
        (-1, 3, 2), (3, 3, 2), (1, 3, 0), (-3, 3, 0), (-1, 1, 0), (1, 1, 0)
    )
    def test_concatenation_axis_counts_the_batch(self, axis, rank, expected):
        self.assertEqual(layers.concatenation_axis(axis, rank), expected)


class NodeTest(tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.image = layers.image("image", (8, 8, 3), ["input"])
        self.kernel = np.ones((3, 3, 3, 4))

    def test_has_what_is_given_and_defaults(self):
        node = layers.node(
            "conv",
            "name",
            [self.image],
            {"strides": (2, 2)},
            {"kernel": self.kernel},
            ["layer", "bn"],
        )
        self.assertEqual((node.name, node.kind), ("name", "conv"))
        self.assertEqual(node.inputs, ("image",))
        self.assertEqual(node.shape, (3, 3, 4))
        self.assertEqual(node.layers, ("layer", "bn"))
        self.assertEqual(
            dict(node.settings),
            {"strides": (2, 2), "padding": "valid", "dilation": (1, 1), "groups": 1},
        )
        self.assertEqual({*node.weights}, {"kernel"})  # a bias may be left out
        self.assertEqual(node.weights["kernel"].dtype, np.float32)

    def test_cannot_be_changed(self):
        node = layers.node("relu", "name", [self.image])
        with self.assertRaises(TypeError):
            node.settings["top"] = 6
        with self.assertRaises(TypeError):
            node.weights["kernel"] = self.kernel
        with self.assertRaises(dataclasses.FrozenInstanceError):
            node.name = "other"

    def test_image(self):
        self.assertEqual(self.image.kind, "image")
        self.assertEqual(self.image.inputs, ())
        self.assertEqual(self.image.shape, (8, 8, 3))
        self.assertEqual(self.image.layers, ("input",))

    def test_missing_setting_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"leaky_relu a lacks {'slope'}"):
            layers.node("leaky_relu", "a", [self.image])

    def test_further_setting_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"relu a .* has no {'slope'}"):
            layers.node("relu", "a", [self.image], {"slope": 0.1})

    def test_missing_weight_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"dense a lacks {'kernel'}"):
            layers.node("dense", "a", [self.image], weights={"bias": np.ones(4)})
        weights = {role: np.ones(3) for role in ("gamma", "beta", "mean")}
        with self.assertRaisesRegex(ValueError, r"lacks {'variance'}"):
            layers.node(
                "batch_normalization", "a", [self.image], {"epsilon": 1e-3}, weights
            )

    def test_further_weight_is_an_error(self):
        with self.assertRaisesRegex(ValueError, r"relu a .* has no {'kernel'}"):
            layers.node("relu", "a", [self.image], weights={"kernel": self.kernel})

    def test_title_of_an_unknown_node_is_its_class(self):
        odd = layers.unknown("odd", [self.image], (4,), "Lambda", "it holds code")
        self.assertEqual(layers.title(odd), "Lambda")
        self.assertEqual(odd.layers, ("odd",))
        self.assertEqual(layers.title(self.image), "image")


class TableTest(tf.test.TestCase, parameterized.TestCase):
    @parameterized.parameters(*KINDS)
    def test_says_what_it_is(self, kind):
        entry = KINDS[kind]
        self.assertNotEmpty(entry.says)
        self.assertIn(entry.grid, ("own", "shared"))
        # What has a kernel says where its inputs and outputs are, and nothing else.
        has_kernel = "kernel" in entry.weights
        self.assertEqual(entry.kernel_outputs > 0, has_kernel)
        self.assertEqual(entry.kernel_inputs is not None, has_kernel)

    @parameterized.named_parameters(
        (title, name) for title, name in NAMED if KINDS[kind_of(name)].grid == "shared"
    )
    def test_output_of_a_shared_grid_is_within_its_inputs(self, name):
        node, inputs = made(name)
        output = computed(node, inputs).numpy()
        self.assertGreaterEqual(output.min(), min(0, *(x.min() for x in inputs)))
        self.assertLessEqual(output.max(), max(0, *(x.max() for x in inputs)))

    @parameterized.named_parameters(NAMED)
    def test_is_homogeneous_where_it_says_so(self, name):
        node, inputs = made(name)
        says = KINDS[node.kind].homogeneous(node)
        if node.shape[-1] != inputs[0].shape[-1]:
            return  # its output has other channels
        factors = np.array([0.3, 0.5, 2, 4, 8, 10][: node.shape[-1]], np.float32)
        # Equalization scales what one node gives.
        scaled = computed(node, [factors * inputs[0], *inputs[1:]])
        expected = factors * computed(node, inputs).numpy()
        if says or node.kind in HOMOGENEOUS_UNSAID:
            self.assertAllClose(scaled, expected, rtol=1e-5, atol=1e-5)
        else:
            self.assertNotAllClose(scaled, expected, rtol=1e-2, atol=1e-2)

    def test_these_are_homogeneous(self):
        names = [
            name for name in CASES if KINDS[kind_of(name)].homogeneous(made(name)[0])
        ]
        self.assertEqual(
            {*map(kind_of, names)},
            {
                "relu",
                "leaky_relu",
                "max_pool",
                "average_pool",
                "global_average_pool",
                "global_max_pool",
                "reshape",
                "pad",
                "crop",
                "prelu",
                "nearest_upsampling",
                "bilinear_upsampling",
            },
        )
        self.assertNotIn("relu/6", names)
        self.assertNotIn("relu/top", names)

    @parameterized.parameters(
        ("relu", 8, None),
        ("relu/6", 8, None),
        ("relu/top", 8, NoFurther(1.5)),
        ("relu/top", 16, NoFurther(1.5)),
        # 256 or 65535 integers, as LiteRT has them.
        ("sigmoid", 8, Exactly(0, 255 / 256)),
        ("sigmoid", 4, Exactly(0, 255 / 256)),
        ("sigmoid", 16, Exactly(-32767 / 32768, 32767 / 32768)),
        ("tanh", 8, Exactly(-1, 127 / 128)),
        ("tanh", 16, Exactly(-32767 / 32768, 32767 / 32768)),
        ("pixels", 8, Exactly(-2, 2)),
    )
    def test_bounds(self, name, num_bits, expected):
        node, _ = made(name)
        self.assertEqual(KINDS[node.kind].bounds(node, num_bits), expected)

    def test_nothing_else_has_bounds(self):
        bounded = {
            kind_of(name)
            for name in CASES
            for bits in (4, 8, 16)
            if KINDS[kind_of(name)].bounds(made(name)[0], bits) is not None
        }
        self.assertEqual(bounded, {"relu", "sigmoid", "tanh", "pixels"})

    @parameterized.named_parameters(NAMED)
    def test_macs_are_the_products_of_kernel_and_input(self, name):
        node, inputs = made(name)
        macs = KINDS[node.kind].macs(node)
        if not layers.has_kernel(node):
            self.assertEqual(macs, 0)
            return
        # With ones for weights and no padding, outputs count the products.
        ones = {"kernel": np.ones_like(node.weights["kernel"])}
        if node.settings.get("padding") == "same":
            positions = math.prod(node.shape)
            products = layers.by_output(node, ones["kernel"]).shape[0]
            self.assertEqual(macs, positions * products)
            return
        image = [tf.ones_like(inputs[0][:1])]
        output = KINDS[node.kind].compute(node, image, ones)
        self.assertEqual(macs, int(tf.reduce_sum(output)))

    def test_sizes_that_may_be_any_count_as_one(self):
        image = layers.image("image", (None, None, 3))
        node = layers.node(
            "conv", "a", [image], weights={"kernel": np.ones((1, 1, 3, 4))}
        )
        self.assertEqual(KINDS["conv"].macs(node), 12)

    @parameterized.named_parameters(
        (title, name)
        for title, name in NAMED
        if "kernel" in KINDS[kind_of(name)].weights
    )
    def test_by_output_has_a_column_for_each_channel(self, name):
        node, inputs = made(name)
        self.assertTrue(layers.has_kernel(node))
        kernel = node.weights["kernel"]
        matrix = layers.by_output(node, kernel)
        self.assertEqual(matrix.shape, (kernel.size / node.shape[-1], node.shape[-1]))
        for channel in range(node.shape[-1]):
            alone = np.zeros_like(matrix)
            alone[:, channel] = matrix[:, channel]
            weights = {"kernel": alone.reshape(kernel.shape)}
            output = KINDS[node.kind].compute(node, [tf.constant(inputs[0])], weights)
            is_zero = (output.numpy() == 0).reshape(-1, node.shape[-1]).all(axis=0)
            self.assertAllEqual(np.flatnonzero(~is_zero), [channel])

    @parameterized.named_parameters(
        (title, name)
        for title, name in NAMED
        if "kernel" in KINDS[kind_of(name)].weights
        and CASES[name].settings.get("groups", 1) == 1
    )
    def test_kernel_inputs_is_the_axis_of_the_inputs_channels(self, name):
        node, inputs = made(name)
        kernel = np.moveaxis(
            node.weights["kernel"].copy(), KINDS[node.kind].kernel_inputs, 0
        )
        self.assertLen(kernel, inputs[0].shape[-1])
        x = inputs[0].copy()
        x[..., 1] = 0
        expected = KINDS[node.kind].compute(node, [tf.constant(x)], node.weights)
        kernel[1] = 0
        weights = {
            **node.weights,
            "kernel": np.moveaxis(kernel, 0, KINDS[node.kind].kernel_inputs),
        }
        output = KINDS[node.kind].compute(node, [tf.constant(inputs[0])], weights)
        self.assertAllClose(output, expected, rtol=1e-5, atol=1e-5)

    @parameterized.parameters(
        ("dense/of_rows", r"input of shape \(7, 6\); .* put a Flatten before it"),
        ("batch_normalization", r"input of shape \(5, 7, 6\); only images and vectors"),
        ("batch_normalization/of_rows", r"input of shape \(7, 6\); only images and"),
        ("affine", r"input of shape \(5, 7, 6\); only images and vectors"),
        ("softmax", "a softmax that is not at the network's end"),
        ("channels", "its channels cannot be reordered here"),
        ("conv_transpose/two_strides", r"has the strides \(1, 3\); only one stride"),
        ("bilinear_upsampling/by_three", r"\(3, 3\) .* 1024ths of a pixel, so that"),
    )
    def test_refused(self, name, reason):
        node, _ = made(name)
        self.assertRegex(KINDS[node.kind].refuses(node), reason)

    def test_unknown_is_refused_with_its_reason(self):
        source = layers.image("image", IMAGE)
        node = layers.unknown("odd", [source], (2,), "Lambda", "it holds code")
        self.assertEqual(KINDS[node.kind].refuses(node), "it holds code")

    def test_nothing_else_is_refused(self):
        refused = {
            name for name in CASES if KINDS[kind_of(name)].refuses(made(name)[0])
        }
        kinds = {*map(kind_of, refused)}
        never = {"batch_normalization", "affine", "softmax", "channels"}
        others = {
            "dense/of_rows",
            "conv_transpose/two_strides",
            "bilinear_upsampling/by_three",
        }
        self.assertEqual(kinds, never | {*map(kind_of, others)})
        self.assertEqual({n for n in refused if kind_of(n) not in never}, others)

    def test_pixels_are_repeated_as_often_as_litert_finds_them(self):
        image = layers.image("image", (4, 4, 3))
        for size, is_refused in (((40, 1), False), ((1, 41), True)):
            node = layers.node("nearest_upsampling", "node", [image], {"size": size})
            reason = KINDS[node.kind].refuses(node)
            self.assertEqual(reason is not None, is_refused)


if __name__ == "__main__":
    tf.test.main()
