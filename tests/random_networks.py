"""Random small networks of the layers that the project accepts, for comparisons.

The same seed gives the same network, weights and images, whatever was built before:
all choices come from a generator of the seed's own, and all layers have names of their
own. Nothing of the package is used but Keras itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf

layers = keras.layers

_MOST_CHANNELS = 24
_FEWEST_LAYERS, _MOST_LAYERS = 4, 14
# Layers kept free for what comes behind the last image: pooling and the last layer.
_ENDING = 2
_WIDTHS = {"W8A8": 0.6, "W4A8": 0.2, "W8A16": 0.1, "W4A6": 0.05, "W3A8": 0.05}
# How often each activation is drawn.
_ACTIVATIONS = {
    "relu": 0.26,
    "relu6": 0.14,
    "relu_top": 0.16,
    "leaky_relu": 0.12,
    "sigmoid": 0.08,
    "tanh": 0.08,
    "swish": 0.08,
    "hard_sigmoid": 0.08,
}
_TOPS = (0.5, 1.0, 1.0, 2.5, 4.0, 20.0)
# Those that a layer with a kernel takes as its setting.
_INSIDE: dict[str, Any] = {
    "relu": "relu",
    "relu6": tf.nn.relu6,
    "sigmoid": "sigmoid",
    "tanh": "tanh",
    "swish": "swish",
    "hard_sigmoid": "hard_sigmoid",
}


def random_model(seed: int) -> keras.Model:
    """A classifier of 4 to 14 layers, giving logits or a softmax of 2 to 10 classes."""
    return _Maker(seed).model()


def random_images(seed: int, shape: tuple[int, int, int], count: int) -> np.ndarray:
    """uint8 (count, *shape), half of them uniform noise, half smooth ramps.

    Half of the channels reach 0 and 255, or nearly; the others have any range.
    """
    rng = np.random.default_rng([seed, 1])
    noise = rng.random((count - count // 2, *shape))
    height, width, channels = shape
    rows, columns = np.mgrid[0:height, 0:width]
    slopes = rng.uniform(-1, 1, (count // 2, 2, 1, 1, channels))
    ramps = rows[..., None] * slopes[:, 0] + columns[..., None] * slopes[:, 1]
    low = ramps.min(axis=(1, 2), keepdims=True)
    high = ramps.max(axis=(1, 2), keepdims=True)
    images = np.concatenate([noise, (ramps - low) / (high - low)])
    ends = np.sort(rng.uniform(0, 255, (2, count, 1, 1, channels)), axis=0)
    is_whole = rng.random(ends.shape[1:]) < 0.5
    low, high = np.where(is_whole, 0, ends[0]), np.where(is_whole, 255, ends[1])
    return np.round(low + images * (high - low)).astype(np.uint8)


def widths_of(seed: int) -> str:
    """Bit widths to quantize the seed's network with, such as 'W8A8', the most usual.

    The logits have at least 8 bits with all of them.
    """
    rng = np.random.default_rng([seed, 2])
    return str(rng.choice(list(_WIDTHS), p=list(_WIDTHS.values())))


class _Maker:
    """Makes one network, layer by layer; every choice and every weight is drawn."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._rng = np.random.default_rng([seed, 0])
        self._count = 0
        self._target = int(self._rng.integers(_FEWEST_LAYERS, _MOST_LAYERS + 1))

    def model(self) -> keras.Model:
        """The whole network."""
        height = int(self._rng.integers(8, 18))
        width = height if self._chance(0.6) else int(self._rng.integers(8, 18))
        image = layers.Input((height, width, self._pick(1, 3, 3)), name="image")
        x = self._first(image)
        stages = [x]
        while True:
            left = self._target - self._count - _ENDING
            possible = {name: p for name, (p, cost) in _BLOCKS.items() if cost <= left}
            if not possible:
                break
            x = self._block(self._draw(possible), x, stages)
            stages.append(x)
        classes = int(self._rng.integers(2, 11))
        return keras.Model(image, self._end(x, classes), name=f"random_{self._seed}")

    # Choices.

    def _chance(self, share: float) -> bool:
        return bool(self._rng.random() < share)

    def _pick(self, *options: Any) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def _draw(self, shares: dict[str, float]) -> str:
        values = np.array(list(shares.values()))
        return str(self._rng.choice(list(shares), p=values / values.sum()))

    def _channels(self, most: int = _MOST_CHANNELS) -> int:
        return min(most, int(self._pick(1, 2, 3, 4, 5, 6, 8, 8, 10, 12, 16, 24)))

    # Layers.

    def _call(self, kind: Any, name: str, inputs: Any, **settings: Any) -> Any:
        """Calls a new layer with random weights."""
        self._count += 1
        layer = kind(name=f"{name}_{self._count}", **settings)
        output = layer(inputs)
        layer.set_weights(self._weights(layer))
        return output

    def _weights(self, layer: keras.layers.Layer) -> list[np.ndarray]:
        weights: list[np.ndarray] = []
        reach = np.zeros(1)
        for variable in layer.weights:
            name = variable.name.split("/")[-1].split(":")[0]
            shape = tuple(variable.shape)
            if "kernel" in name:
                kernel, reach = self._kernel(shape, name.startswith("depthwise"))
                weights.append(kernel)
            elif name == "bias":
                weights.append(self._bias(reach))
            else:
                weights.append(self._statistic(name, shape))
        return weights

    def _kernel(
        self, shape: tuple[int, ...], is_depthwise: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """A kernel, and the largest size of a weight for each of its outputs."""
        outputs = shape[-2:] if is_depthwise else shape[-1:]
        inputs = shape[: len(shape) - len(outputs)]
        spread = self._pick(1.0, 1.0, 3.0, 3.0, 10.0, 100.0)
        factors = spread ** self._rng.uniform(-1, 0, outputs)
        factors = factors / factors.max() * self._rng.uniform(0.5, 2.0)
        if self._chance(0.1) and factors.size > 1:
            factors.flat[int(self._rng.integers(factors.size))] = 0.0
        kernel = self._rng.normal(0, 1 / np.sqrt(np.prod(inputs)), shape) * factors
        return kernel, np.abs(kernel).max(axis=tuple(range(len(inputs)))).ravel()

    def _bias(self, reach: np.ndarray) -> np.ndarray:
        """A bias, at most 100 times the kernel's reach, but for dead channels."""
        size = self._pick(0.1, 0.3, 1.0)
        bias = self._rng.normal(0, size, reach.shape) * reach
        if self._chance(0.5):
            dead = self._rng.normal(0, 0.3, reach.shape)
            bias = np.where(reach > 0, bias, dead)
        if self._chance(0.04):
            index = int(self._rng.integers(reach.size))
            sign = self._pick(-1, 1)
            bias[index] = sign * self._rng.uniform(10, 100) * reach[index]
        return bias

    def _statistic(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name == "gamma":
            signs = np.where(self._rng.random(shape) < 0.1, -1, 1)
            return signs * self._rng.uniform(0.3, 2.0, shape)
        if name == "moving_variance":
            return np.exp(self._rng.uniform(np.log(0.05), np.log(3), shape))
        assert name in ("beta", "moving_mean"), name
        return self._rng.normal(0, 0.4, shape)

    def _conv(self, x: Any, channels: int, **settings: Any) -> Any:
        settings = {"use_bias": self._chance(0.6), **settings}
        return self._call(
            layers.Conv2D,
            "conv",
            x,
            filters=channels,
            kernel_initializer="zeros",
            **settings,
        )

    def _depthwise(self, x: Any, **settings: Any) -> Any:
        settings = {"use_bias": self._chance(0.6), **settings}
        return self._call(
            layers.DepthwiseConv2D,
            "depthwise",
            x,
            depthwise_initializer="zeros",
            **settings,
        )

    def _separable(self, x: Any, channels: int, **settings: Any) -> Any:
        return self._call(
            layers.SeparableConv2D,
            "separable",
            x,
            filters=channels,
            use_bias=self._chance(0.6),
            depthwise_initializer="zeros",
            pointwise_initializer="zeros",
            **settings,
        )

    def _dense(self, x: Any, units: int, **settings: Any) -> Any:
        settings = {"use_bias": self._chance(0.8), **settings}
        return self._call(
            layers.Dense,
            "dense",
            x,
            units=units,
            kernel_initializer="zeros",
            **settings,
        )

    def _bn(self, x: Any) -> Any:
        scale, center = self._chance(0.85), self._chance(0.85)
        return self._call(
            layers.BatchNormalization, "bn", x, scale=scale, center=center
        )

    def _activation(self, x: Any, name: str | None = None) -> Any:
        name = name or self._draw(_ACTIVATIONS)
        if name == "relu_top":
            top = self._pick(*_TOPS)
            return self._call(layers.ReLU, "relu", x, max_value=top)
        if name == "leaky_relu":
            slope = self._pick(0.1, 0.2, 0.3)
            return self._call(layers.LeakyReLU, "leaky_relu", x, alpha=slope)
        if name in ("relu", "relu6") and self._chance(0.5):
            top = 6.0 if name == "relu6" else None
            return self._call(layers.ReLU, name, x, max_value=top)
        return self._call(layers.Activation, name, x, activation=_INSIDE[name])

    def _inside(self, share: float) -> dict[str, Any]:
        """The setting of an activation, in a share of the layers."""
        if not self._chance(share):
            return {}
        return {"activation": _INSIDE[self._pick(*_INSIDE)]}

    def _rescaling(self, x: Any) -> Any:
        scale, offset = self._pick(
            (1 / 6, 0.0), (0.5, 0.0), (2.0, -1.0), (-1.0, 0.5), (1.0, 3.0)
        )
        return self._call(layers.Rescaling, "rescaling", x, scale=scale, offset=offset)

    def _merge(self, kind: str, inputs: Sequence[Any]) -> Any:
        kinds = {
            "add": layers.Add,
            "subtract": layers.Subtract,
            "multiply": layers.Multiply,
            "concatenate": layers.Concatenate,
        }
        return self._call(kinds[kind], kind, list(inputs))

    def _window(self, x: Any, *, keeps_size: bool = False) -> dict[str, Any]:
        """Kernel size, strides, padding and dilation that fit an image."""
        height, width = x.shape[1:3]
        size = self._pick(1, 2, 3, 3, 3, 5)
        settings = {"kernel_size": size, "padding": "same"}
        if keeps_size:
            return settings
        smallest = min(height, width)
        if size > 1 and self._chance(0.15):
            settings["dilation_rate"] = 2
        elif smallest > 3:
            settings["strides"] = self._pick(1, 1, 2)
        reach = (size - 1) * settings.get("dilation_rate", 1) + 1
        if reach <= smallest and self._chance(0.35):
            settings["padding"] = "valid"
        return settings

    # Blocks: each takes an image and gives one.

    def _first(self, image: Any) -> Any:
        """What reads the pixels, never what could count as their preprocessing."""
        if self._target > 5 and self._chance(0.1):
            return self._bn(image)
        if self._target > 5 and self._chance(0.08):
            return self._pooling(image)
        if self._chance(0.1):
            return self._depthwise(image, **self._window(image))
        return self._conv(
            image, self._channels(), **self._window(image), **self._inside(0.4)
        )

    def _block(self, name: str, x: Any, stages: Sequence[Any]) -> Any:
        if name == "skip":
            return self._skip(x, stages)
        blocks: dict[str, Callable[[Any], Any]] = {
            "conv": self._conv_block,
            "depthwise": self._depthwise_block,
            "separable": self._separable_block,
            "dense": self._dense_block,
            "activation": self._activation,
            "bn": self._bn,
            "rescaling": self._rescaling,
            "pooling": self._pooling,
            "padding": self._padding,
            "dropout": self._dropout,
            "squeeze": self._squeeze,
            "residual": self._residual,
            "inverted": self._inverted,
            "branches": self._branches,
        }
        return blocks[name](x)

    def _around(self, x: Any, kernel: Callable[[Any], Any]) -> Any:
        """A layer with a kernel, BN and an activation, in one of several orders."""
        order = self._pick("kba", "kba", "kab", "bak", "ka", "kb", "bk")
        for each in order:
            if each == "k":
                x = kernel(x)
            elif each == "b":
                x = self._bn(x)
            else:
                x = self._activation(x)
        return x

    def _conv_block(self, x: Any) -> Any:
        return self._around(
            x,
            lambda y: self._conv(
                y, self._channels(), **self._window(y), **self._inside(0.2)
            ),
        )

    def _depthwise_block(self, x: Any) -> Any:
        def kernel(y: Any) -> Any:
            is_few = 2 * y.shape[-1] <= _MOST_CHANNELS
            multiplier = 2 if is_few and self._chance(0.4) else 1
            return self._depthwise(
                y,
                depth_multiplier=multiplier,
                **self._window(y),
                **self._inside(0.2),
            )

        return self._around(x, kernel)

    def _separable_block(self, x: Any) -> Any:
        return self._around(
            x,
            lambda y: self._separable(
                y,
                self._channels(),
                depth_multiplier=self._pick(1, 1, 2),
                **self._window(y),
                **self._inside(0.2),
            ),
        )

    def _dense_block(self, x: Any) -> Any:
        return self._dense(x, self._channels(), **self._inside(0.5))

    def _dropout(self, x: Any) -> Any:
        return self._call(layers.Dropout, "dropout", x, rate=0.3)

    def _pooling(self, x: Any) -> Any:
        kind = self._pick(layers.MaxPooling2D, layers.AveragePooling2D)
        name = "max_pooling" if kind is layers.MaxPooling2D else "average_pooling"
        height, width = x.shape[1:3]
        size = self._pick(2, 2, 3)
        settings: dict[str, Any] = {"pool_size": size}
        if kind is layers.AveragePooling2D and self._chance(0.15):
            settings["pool_size"] = (height, width)
        elif min(height, width) < size or self._chance(0.5):
            settings.update(padding="same", strides=self._pick(1, 2, 2))
        return self._call(kind, name, x, **settings)

    def _padding(self, x: Any) -> Any:
        margins = self._pick(1, (1, 2), ((0, 1), (0, 1)), ((1, 0), (2, 1)))
        return self._call(layers.ZeroPadding2D, "padding", x, padding=margins)

    def _squeeze(self, x: Any) -> Any:
        """Squeeze and excite: each channel times a gate."""
        channels = x.shape[-1]
        kind = self._pick("keepdims", "keepdims", "reshape")
        y = self._call(
            layers.GlobalAveragePooling2D,
            "gap",
            x,
            **({"keepdims": True} if kind == "keepdims" else {}),
        )
        if kind == "reshape":
            y = self._reshape(y, (1, 1, channels))
        is_dense = self._chance(0.5)

        def layer(tensor: Any, units: int, activation: str) -> Any:
            if is_dense:
                return self._dense(tensor, units, activation=activation)
            return self._conv(tensor, units, kernel_size=1, activation=activation)

        y = layer(y, self._channels(8), self._pick("relu", "swish"))
        gate = layer(y, channels, self._pick("sigmoid", "hard_sigmoid"))
        return self._merge("multiply", [x, gate])

    def _residual(self, x: Any) -> Any:
        channels = x.shape[-1]
        y = self._conv(x, self._channels(), **self._window(x, keeps_size=True))
        if self._chance(0.5):
            y = self._bn(y)
        y = self._activation(y)
        y = self._conv(y, channels, **self._window(y, keeps_size=True))
        if self._chance(0.5):
            y = self._bn(y)
        y = self._merge("add", [x, y] if self._chance(0.5) else [y, x])
        return self._activation(y) if self._chance(0.6) else y

    def _inverted(self, x: Any) -> Any:
        """1x1 convolution to more channels, depthwise one, 1x1 one, and the sum."""
        channels = x.shape[-1]
        y = self._conv(x, min(_MOST_CHANNELS, 2 * channels), kernel_size=1)
        if self._chance(0.5):
            y = self._bn(y)
        y = self._activation(y, self._pick("relu6", "relu", "swish"))
        y = self._depthwise(y, kernel_size=self._pick(3, 5), padding="same")
        y = self._activation(y, self._pick("relu6", "relu", "relu_top"))
        y = self._bn(self._conv(y, channels, kernel_size=1))
        return self._merge("add", [x, y])

    def _branches(self, x: Any) -> Any:
        """Two or three branches side by side, and what merges them."""
        kind = self._pick("concatenate", "concatenate", "add", "subtract", "multiply")
        count = 2 if kind == "subtract" or self._chance(0.6) else 3
        # A pooling behind each of two branches of one layer is the most there may be.
        pools = count == 2 and min(x.shape[1:3]) > 3 and self._chance(0.4)
        most = _MOST_CHANNELS // count
        channels = x.shape[-1]
        outputs = []
        for i in range(count):
            what = self._pick("itself", "conv", "activation", "activation", "pooling")
            if what == "itself" and i:
                what = "activation"
            if kind == "concatenate" and channels > most:
                what = "conv"
            units = self._channels(most) if kind == "concatenate" else channels
            y = x
            if what == "conv":
                window = self._window(x, keeps_size=True)
                y = self._conv(x, units, **window, **self._inside(0.6))
            elif what == "activation":
                y = self._activation(x)
            elif what == "pooling":
                pooling = self._pick(layers.MaxPooling2D, layers.AveragePooling2D)
                y = self._call(
                    pooling, "pooling", x, pool_size=3, strides=1, padding="same"
                )
            if pools:
                pooling = self._pick(layers.MaxPooling2D, layers.AveragePooling2D)
                y = self._call(pooling, "pooling", y)
            outputs.append(y)
        return self._merge(kind, outputs)

    def _skip(self, x: Any, stages: Sequence[Any]) -> Any:
        """Merges an image with an earlier one of its size, if there is one."""
        same = [s for s in stages[:-1] if s.shape[1:3] == x.shape[1:3]]
        kinds = {
            "concatenate": lambda s: s.shape[-1] + x.shape[-1] <= _MOST_CHANNELS,
            "add": lambda s: s.shape[-1] == x.shape[-1],
            "subtract": lambda s: s.shape[-1] == x.shape[-1],
        }
        kind = self._pick(*kinds)
        fitting = [s for s in same if kinds[kind](s)]
        if not fitting:
            return self._activation(x)
        other = self._pick(*fitting)
        return self._merge(kind, [x, other] if self._chance(0.5) else [other, x])

    # Vectors, and the end.

    def _reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        return self._call(layers.Reshape, "reshape", x, target_shape=shape)

    def _flatten(self, x: Any) -> Any:
        if self._chance(0.2):
            return self._reshape(x, (int(np.prod(x.shape[1:])),))
        return self._call(layers.Flatten, "flatten", x)

    def _end(self, x: Any, classes: int) -> Any:
        """From the last image to the scores."""
        left = _MOST_LAYERS - self._count
        endings = {
            "flatten": 0.25,
            "gap": 0.3,
            "gmp": 0.1,
            "pixel": 0.15 if left >= 4 else 0.0,
            "convolution": 0.08,
            "two_poolings": 0.06 if left >= 4 else 0.0,
            "two_branches": 0.06 if left >= 7 else 0.0,
        }
        ending = self._draw(endings)
        if ending == "convolution":
            x = self._conv(x, classes, kernel_size=1)
            x = self._call(layers.GlobalAveragePooling2D, "gap", x)
            return self._with_softmax(x)
        if ending == "pixel":
            x = self._call(layers.GlobalAveragePooling2D, "gap", x, keepdims=True)
            if left >= 6 and self._chance(0.5):
                x = self._dense(x, self._channels(), **self._inside(0.7))
            x = self._flatten(self._dense(x, classes))
            return self._with_softmax(x)
        x = self._vector(ending, x)
        left = _MOST_LAYERS - self._count - 1
        wanted = int(self._pick(0, 0, 1, 2))
        for _ in range(min(wanted, left // 3)):
            x = self._vector_block(x)
        if self._chance(0.15):
            return self._dense(x, classes, activation="softmax")
        return self._with_softmax(self._dense(x, classes))

    def _vector(self, ending: str, x: Any) -> Any:
        pools = {
            "gap": layers.GlobalAveragePooling2D,
            "gmp": layers.GlobalMaxPooling2D,
        }
        if ending == "flatten":
            return self._flatten(x)
        if ending in pools:
            return self._call(pools[ending], ending, x)
        if ending == "two_poolings":
            both = [self._call(kind, name, x) for name, kind in pools.items()]
            return self._merge("concatenate", both)
        activated = self._activation(x)
        pooled = self._pooling(x)
        both = [self._flatten(activated), self._flatten(pooled)]
        return self._merge("concatenate", both)

    def _vector_block(self, x: Any) -> Any:
        """At most three layers."""
        what = self._pick("dense", "dense", "bn", "activation", "dropout", "add")
        if what == "dense":
            return self._around(
                x, lambda y: self._dense(y, self._channels(), **self._inside(0.2))
            )
        if what == "add":
            units = self._channels()
            both = [self._dense(x, units, **self._inside(0.5)) for _ in range(2)]
            return self._merge(self._pick("add", "multiply", "subtract"), both)
        return self._block(what, x, ())

    def _with_softmax(self, x: Any) -> Any:
        if self._count >= _MOST_LAYERS or not self._chance(0.2):
            return x
        if self._chance(0.5):
            return self._call(layers.Softmax, "softmax", x)
        return self._call(layers.Activation, "softmax", x, activation="softmax")


# Of each block, how often it is drawn, and the most layers that it has.
_BLOCKS: dict[str, tuple[float, int]] = {
    "conv": (0.22, 3),
    "depthwise": (0.12, 3),
    "separable": (0.06, 3),
    "dense": (0.02, 1),
    "activation": (0.06, 1),
    "bn": (0.04, 1),
    "rescaling": (0.03, 1),
    "pooling": (0.08, 1),
    "padding": (0.05, 1),
    "dropout": (0.01, 1),
    "squeeze": (0.08, 5),
    "residual": (0.08, 7),
    "inverted": (0.06, 8),
    "branches": (0.12, 5),
    "skip": (0.06, 1),
}
