"""What Keras 2, Keras 3 and TensorFlow call the kinds of `graph.layers`.

The one place to add a name. A reader of models finds here what a layer or a call is,
and what of its configuration and weights goes where; what a model file may name is
derived from it too (`importing.files`).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import Graph, Node, compute, frozen
from dfq_tf.importing import operations, preprocessing
from dfq_tf.importing.operations import Found, Maker, Unknown

# Functions of one value -> their names: of an activation in small letters, of an
# operation of Keras 3 with a capital, of a function of TensorFlow with a dot.
ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "linear": ("linear",),
    "relu": ("relu", "Relu", "nn.relu"),
    "relu6": ("relu6", "Relu6", "nn.relu6"),
    "leaky_relu": ("leaky_relu",),
    "sigmoid": ("sigmoid", "Sigmoid", "math.sigmoid", "nn.sigmoid"),
    "hard_sigmoid": ("hard_sigmoid", "HardSigmoid"),
    "silu": ("silu", "swish", "Silu", "nn.silu"),
    "hard_silu": ("hard_silu", "hard_swish", "HardSilu"),
    "tanh": ("tanh", "Tanh", "math.tanh", "nn.tanh"),
    "softmax": ("softmax", "softmax_v2"),
    "softplus": ("softplus", "Softplus", "nn.softplus", "math.softplus"),
    "elu": ("elu",),
    "selu": ("selu", "Selu", "nn.selu"),
    "gelu": ("gelu",),
    "mish": ("mish", "Mish"),
    "exponential": ("exponential", "Exp", "exp", "math.exp"),
}
# Other functions -> how they are called in Keras 3, with a capital, where arguments
# may be attributes of the operation, and in TensorFlow. Operands come first.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "add": (
        "Add(x1, x2)",
        "math.add(x, y)",
        "__operators__.add(x, y)",
        "nn.bias_add(value, bias, data_format)",
    ),
    "subtract": ("Subtract(x1, x2)", "math.subtract(x, y)"),
    "multiply": ("Multiply(x1, x2)", "math.multiply(x, y)"),
    "maximum": ("Maximum(x1, x2)", "math.maximum(x, y)"),
    "minimum": ("Minimum(x1, x2)", "math.minimum(x, y)"),
    "divide": (
        "Divide(x1, x2)",
        "TrueDivide(x1, x2)",
        "math.divide(x, y)",
        "math.truediv(x, y)",
    ),
    "negative": ("Negative(x)", "math.negative(x)"),
    "mean": (
        "Mean(x, axis, keepdims)",
        "math.reduce_mean(input_tensor, axis, keepdims)",
    ),
    "max": (
        "Max(x, axis, keepdims)",
        "math.reduce_max(input_tensor, axis, keepdims)",
    ),
    "concatenate": ("Concatenate(xs, axis)", "concat(values, axis)"),
    "stack": ("Stack(x, axis)",),
    "channels": ("GetItem(x, key)", "__operators__.getitem(tensor, slice_spec)"),
    "split": (
        "Split(x, indices_or_sections, axis)",
        "split(value, num_or_size_splits, axis)",
    ),
    "reshape": ("Reshape(x, newshape)", "reshape(tensor, shape)"),
    "axes": (
        "ExpandDims(x, axis)",
        "Squeeze(x, axis)",
        "expand_dims(input, axis)",
        "squeeze(input, axis)",
        "compat.v1.squeeze(input, axis, name)",
    ),
    "transpose": (
        "Transpose(x, axes)",
        "transpose(a, perm, conjugate)",
        "compat.v1.transpose(a, perm, name, conjugate)",
    ),
    "pad": (
        "Pad(x, pad_width, mode, constant_values)",
        "pad(tensor, paddings, mode, constant_values)",
        "compat.v1.pad(tensor, paddings, mode, name, constant_values)",
    ),
    "clip": (
        "Clip(x, x_min, x_max)",
        "clip_by_value(t, clip_value_min, clip_value_max)",
    ),
    "cast": ("Cast(x, dtype)", "cast(x, dtype)", "identity(input)"),
    "relu": ("ReLU(x, negative_slope, max_value, threshold)",),
    "leaky_relu": ("LeakyRelu(x, negative_slope)", "nn.leaky_relu(features, alpha)"),
    "elu": ("Elu(x, alpha)", "nn.elu(features)"),
    "gelu": ("Gelu(x, approximate)", "nn.gelu(features, approximate)"),
    "softmax": ("Softmax(x, axis)", "nn.softmax(logits, axis)"),
}
# What `operations.operate` calls arguments that are no operands.
ARGUMENTS = {
    "slice_spec": "key",
    "axes": "order",
    "perm": "order",
    "pad_width": "margins",
    "paddings": "margins",
    "constant_values": "value",
    "clip_value_min": "low",
    "clip_value_max": "top",
    "x_min": "low",
    "x_max": "top",
    "negative_slope": "slope",
    "alpha": "slope",
    "max_value": "top",
}


class LayerNames(NamedTuple):
    """What a layer of Keras is.

    Attributes:
      kind: of its node.
      settings: of the node -> names in the layer's configuration, of which it has one.
      weights: roles in Keras' order -> what in the configuration says whether the
        layer has them; '' for one that it always has.
      constant: settings of the node that are always the same.
    """

    kind: str
    settings: Mapping[str, str] = frozen()
    weights: Mapping[str, str] = frozen()
    constant: Mapping[str, Any] = frozen()


_WINDOW = {"strides": "strides", "padding": "padding", "dilation": "dilation_rate"}
_POOL = {"size": "pool_size", "strides": "strides", "padding": "padding"}
_KEPT = {"keepdims": "keepdims"}
_KERNEL = {"kernel": "", "bias": "use_bias"}
_NORMALIZATION = LayerNames(
    "batch_normalization",
    {"epsilon": "epsilon"},
    {"gamma": "scale", "beta": "center", "mean": "", "variance": ""},
)
LAYERS: dict[str, LayerNames] = {
    "Add": LayerNames("add"),
    "AveragePooling2D": LayerNames("average_pool", _POOL),
    "BatchNormalization": _NORMALIZATION,
    "SyncBatchNormalization": _NORMALIZATION,
    "Concatenate": LayerNames("concatenate", {"axis": "axis"}),
    "Conv2D": LayerNames("conv", {**_WINDOW, "groups": "groups"}, _KERNEL),
    "Cropping2D": LayerNames("crop", {"margins": "cropping"}),
    "Dense": LayerNames("dense", weights=_KERNEL),
    "DepthwiseConv2D": LayerNames("depthwise_conv", _WINDOW, _KERNEL),
    "ELU": LayerNames("elu", {"slope": "alpha"}),
    "Flatten": LayerNames("reshape", constant={"shape": (-1,)}),
    "GlobalAveragePooling2D": LayerNames("global_average_pool", _KEPT),
    "GlobalMaxPooling2D": LayerNames("global_max_pool", _KEPT),
    "LeakyReLU": LayerNames("leaky_relu", {"slope": "negative_slope alpha"}),
    "MaxPooling2D": LayerNames("max_pool", _POOL),
    "Maximum": LayerNames("maximum"),
    "Minimum": LayerNames("minimum"),
    "Multiply": LayerNames("multiply"),
    "Reshape": LayerNames("reshape", {"shape": "target_shape"}),
    "Subtract": LayerNames("subtract"),
    "ZeroPadding2D": LayerNames("pad", {"margins": "padding"}),
}

# How the settings end that say how weights are made and held small. What a user has
# written may be among them.
TRAINING_SETTINGS = ("_constraint", "_initializer", "_regularizer")

# Layers that pass their input on unchanged, except while they are trained.
TRAINING_ONLY = frozenset(
    """
    ActivityRegularization AlphaDropout AugMix CutMix Dropout Equalization
    GaussianDropout GaussianNoise Identity MixUp RandAugment RandomBrightness
    RandomColorDegeneration RandomColorJitter RandomContrast RandomElasticTransform
    RandomErasing RandomFlip RandomGaussianBlur RandomGrayscale RandomHeight RandomHue
    RandomInvert RandomPerspective RandomPosterization RandomRotation RandomSaturation
    RandomSharpness RandomShear RandomTranslation RandomWidth RandomZoom Solarization
    SpatialDropout2D StochasticDepth
    """.split()
)


def _signatures() -> dict[str, tuple[str, tuple[str, ...]]]:
    signatures: dict[str, tuple[str, tuple[str, ...]]] = {
        name: (activation, ())
        for activation, names in ACTIVATIONS.items()
        for name in names
        if name not in ACTIVATION_OF
    }
    for operation, calls in FUNCTIONS.items():
        for call in calls:
            name, _, parameters = call.removesuffix(")").partition("(")
            signatures[name] = (operation, tuple(parameters.split(", ")))
    return signatures


# Name of an activation in Keras -> what it is here.
ACTIVATION_OF = {
    name: activation
    for activation, names in ACTIVATIONS.items()
    for name in names
    if name.islower() and "." not in name
}
# Function of TensorFlow, or with a capital of Keras 3 -> what it is here, and the names
# of its arguments in order; none for a function of one value.
SIGNATURES = _signatures()


def add_layer(maker: Maker, found: Found) -> None:
    """Adds the nodes of a layer, its activation's among them.

    Raises:
      Unknown: it has none.
    """
    count = len(found.sources)
    if found.kind in _MERGING and count == 1:
        return
    if found.kind in KNOWN_LAYERS and found.kind not in _OF_SEVERAL and count != 1:
        raise Unknown(f"it has {count} inputs in place of 1")
    if found.kind in TRAINING_ONLY:
        return
    if found.config.get("data_format") == "channels_first":
        raise Unknown("its data_format is channels_first")
    if found.kind in _SPECIAL:
        _SPECIAL[found.kind](maker, found)
    elif found.kind in LAYERS:
        _activate(maker, found, _by_table(maker, found))
    elif found.is_keras2:
        raise Unknown("there is no integer form for it here")
    else:
        raise Unknown("Keras 3 layers of this class are not known here")


def _by_table(maker: Maker, found: Found) -> Node:
    entry, config = LAYERS[found.kind], found.config
    if not entry.settings and len(found.sources) > 1:
        return operations.merge(maker, entry.kind, found.name, found.sources)
    settings = dict(entry.constant)
    for setting, names in entry.settings.items():
        settings[setting] = next(
            _plain(config[n]) for n in names.split() if n in config
        )
    if config.get("renorm"):
        # Behind the moments are three weights that its training alone needs.
        found = dataclasses.replace(found, weights=found.weights[:-3])
    weights = float_weights(found, entry.weights)
    if entry.kind == "batch_normalization":
        _check_axis(found)
        channels = weights["mean"].shape
        weights.setdefault("gamma", np.ones(channels))
        weights.setdefault("beta", np.zeros(channels))
        if found.sources[0].kind == "image":
            deviation = np.sqrt(weights["variance"] + settings["epsilon"])
            preprocessing.check_scales(1 / deviation)
    kind = entry.kind
    if kind == "conv" and settings["groups"] > 1 and weights["kernel"].shape[2] == 1:
        # Each group is one channel: it is depthwise, for which there are kernels.
        kind, channels = "depthwise_conv", settings.pop("groups")
        height, width, _, outputs = weights["kernel"].shape
        shape = (height, width, channels, outputs // channels)
        weights["kernel"] = weights["kernel"].reshape(shape)
    return maker.add(kind, found.name, found.sources, settings, weights)


def _plain(value: Any) -> Any:
    """A setting as text, a number, or a tuple of such."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, (np.ndarray, np.generic)) else value


def float_weights(found: Found, roles: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The layer's weights, by role.

    Raises:
      Unknown: they are no floats, or others than such a layer has.
    """
    kinds = {
        weight.dtype.name
        for weight in found.weights
        if weight.dtype.kind != "f" and weight.dtype.name != "bfloat16"
    }
    if kinds:
        raise Unknown(f"its weights are {', '.join(sorted(kinds))}; give a float model")
    present = [
        role for role, flag in roles.items() if not flag or found.config.get(flag, True)
    ]
    if len(present) != len(found.weights):
        raise Unknown(f"it has {len(found.weights)} weights in place of {len(present)}")
    return dict(zip(present, found.weights))


def _check_axis(found: Found) -> None:
    axis = _plain(found.config["axis"])
    axis = axis[0] if isinstance(axis, tuple) and len(axis) == 1 else axis
    if axis not in (-1, len(found.shape)):
        raise Unknown(f"it has axis {axis}; only the last axis, the channels, can be")


def _activate(
    maker: Maker, found: Found, source: Node, name: str | None = None
) -> None:
    """Adds the activation that a layer has among its settings.

    Args:
      maker: makes its nodes.
      found: the layer.
      source: what the activation is computed of.
      name: of the node that gives it; by default that of the layer and the activation.
    """
    activation = found.config.get("activation")
    if activation is None:
        return
    own = "a function of your own"
    if isinstance(activation, dict):
        inner, kind = activation.get("config"), activation.get("class_name")
        if kind in _ACTIVATION_LAYERS:
            if not _is_of(found.activation, "keras.", "tf_keras."):
                raise Unknown(f"its activation is a class of your own, {kind}")
            within = dataclasses.replace(
                found,
                name=name or f"{found.name}_{kind}",
                kind=kind,
                config=inner or {},
                weights=(),
                sources=[source],
                activation=getattr(found.activation, "activation", None),
            )
            add_layer(maker, within)
            return
        activation = inner if isinstance(inner, str) else kind
        activation = own if activation == "__lambda__" else activation
    # A registered function has its package before its name.
    activation = str(activation or "").rpartition(">")[2]
    if activation not in ACTIVATION_OF:
        raise Unknown(f"its activation is {activation or own}")
    known: str | None = ACTIVATION_OF[activation]
    if known == "hard_sigmoid" and found.is_keras2:
        known = "hard_sigmoid_keras2"
    keras = "tf_keras." if found.is_keras2 else "keras.src.activations."
    if not _is_of(found.activation, keras, "tensorflow."):
        known = _computed_by(found.activation, ACTIVATION_OF[activation], source)
    if known is None:
        raise Unknown(
            f"its activation is {own}, which is another than the {activation} of "
            "Keras; write it with functions of Keras or TensorFlow behind the layer"
        )
    operations.activate(maker, known, name or f"{found.name}_{activation}", source)


def _is_of(activation: Any, *modules: str) -> bool:
    """Whether a function, or the class of an object, is of one of some modules.

    Args:
      activation: the function or object; None, for one that is not known, is.
      modules: how their names begin.
    """
    module = str(getattr(activation, "__module__", ""))
    return activation is None or module.startswith(modules)


def _computed_by(function: Any, activation: str, source: Node) -> str | None:
    """Which activation, or variant of it, a function is that has its name.

    Users write what Keras has too: older releases of it had it not.

    Args:
      function: of the user.
      activation: what its name says, of `ACTIVATIONS`.
      source: what the layer computes it of.

    Returns:
      None if it computes something else, or fails.
    """
    shape = (64, *(min(size or 8, 8) for size in source.shape))
    values = tf.constant(np.random.default_rng(0).uniform(-8, 8, shape), tf.float32)
    try:
        given = np.asarray(function(values), np.float64)
    # It is the user's, and may raise anything.
    except Exception:
        return None
    for variant in (activation, *_VARIANTS.get(activation, ())):
        image = Node("values", "image", (), shape[1:])
        maker = Maker("activation", {image.name: image}, ())
        operations.activate(maker, variant, maker.layer, image)
        nodes = [image, *maker.nodes]
        graph = Graph(nodes, nodes[-1].name)
        (expected,) = compute(graph, values, [graph.output])
        if given.shape == shape and np.allclose(given, expected, 1e-5, 1e-5):
            return variant
    return None


def _add_activation(maker: Maker, found: Found) -> None:
    _activate(maker, found, found.sources[0], found.name)


def _add_relu(maker: Maker, found: Found) -> None:
    names = ("max_value", "negative_slope", "threshold")
    given = {ARGUMENTS.get(name, name): found.config.get(name) for name in names}
    operations.relu(maker, found.name, found.sources[0], given)


def _add_softmax(maker: Maker, found: Found) -> None:
    axis = found.config.get("axis", -1)
    operations.softmax(maker, found.name, found.sources[0], axis)


def _add_separable(maker: Maker, found: Found) -> None:
    """A depthwise convolution and a 1x1 convolution."""
    roles = {"depthwise": "", "kernel": "", "bias": "use_bias"}
    weights = float_weights(found, roles)
    kernel = {"kernel": weights.pop("depthwise")}
    settings = {key: _plain(found.config[name]) for key, name in _WINDOW.items()}
    first = maker.add(
        "depthwise_conv", f"{found.name}_depthwise", found.sources, settings, kernel
    )
    conv = maker.add("conv", found.name, [first], weights=weights)
    _activate(maker, found, conv)


def _add_average(maker: Maker, found: Found) -> None:
    """The sum, and a share of it."""
    sources = found.sources
    total = operations.merge(maker, "add", f"{found.name}_sum", sources)
    operations.affine(maker, found.name, total, 1 / len(sources), 0.0)


def _add_conv_transpose(maker: Maker, found: Found) -> None:
    """A transposed convolution; in Keras its kernel has outputs before inputs."""
    config = found.config
    if config.get("output_padding") is not None:
        raise Unknown("it has an output_padding; only None has an integer form here")
    if set(_plain(config["dilation_rate"])) != {1} or config.get("groups", 1) != 1:
        raise Unknown("it has a dilation or groups, which have no integer form here")
    weights = float_weights(found, _KERNEL)
    weights["kernel"] = np.swapaxes(weights["kernel"], 2, 3)
    settings = {key: _plain(config[key]) for key in ("strides", "padding")}
    conv = maker.add("conv_transpose", found.name, found.sources, settings, weights)
    _activate(maker, found, conv)


def _add_permute(maker: Maker, found: Found) -> None:
    order = _plain(found.config["dims"])
    if order != tuple(sorted(order)):
        maker.add("transpose", found.name, found.sources, {"order": order})


def _add_prelu(maker: Maker, found: Found) -> None:
    """Slopes of channels, or one for all."""
    slopes = float_weights(found, {"slopes": ""})["slopes"].astype(np.float64)
    rows = slopes.reshape(-1, slopes.shape[-1])
    if (rows != rows[0]).any():
        raise Unknown(
            f"it has slopes of shape {slopes.shape}, which differ from position to "
            "position; only those of channels have an integer form, as with "
            "shared_axes=[1, 2]"
        )
    if len(set(rows[0])) == 1:
        slope = float(rows[0, 0])
        maker.add("leaky_relu", found.name, found.sources, {"slope": slope})
    else:
        settings = {"slopes": tuple(rows[0].tolist())}
        maker.add("prelu", found.name, found.sources, settings)


def _add_upsampling(maker: Maker, found: Found) -> None:
    interpolation, size = found.config["interpolation"], _plain(found.config["size"])
    if interpolation not in ("nearest", "bilinear"):
        raise Unknown(
            f"its interpolation is {interpolation}; only nearest and bilinear have an "
            "integer form"
        )
    if size != (1, 1):
        kind = f"{interpolation}_upsampling"
        maker.add(kind, found.name, found.sources, {"size": size})


def _add_scaled_sum(maker: Maker, found: Found) -> None:
    """The first input, and a share of the second: InceptionResNetV2's own layer."""
    if len(found.sources) != 2:
        raise Unknown(f"it has {len(found.sources)} inputs in place of 2")
    first, second = found.sources
    scaled = operations.affine(
        maker, f"{found.name}_scaled", second, found.config["scale"], 0.0
    )
    maker.add("add", found.name, [first, scaled])


def _add_layer_normalization(maker: Maker, found: Found) -> None:
    """Each position by its own mean and variance, then a factor and a sum."""
    _check_axis(found)
    if found.config.get("rms_scaling"):
        raise Unknown("it has rms_scaling; RMSNormalization has an integer form")
    weights = float_weights(found, {"scale": "scale", "offset": "center"})
    _normalize_and_rescale(maker, found, weights)


def _add_rms_normalization(maker: Maker, found: Found) -> None:
    """Each position by the mean of its squares, then a factor."""
    _check_axis(found)
    weights = float_weights(found, {"scale": ""})
    _normalize_and_rescale(maker, found, weights, is_centered=False)


def _add_group_normalization(maker: Maker, found: Found) -> None:
    """Groups of channels as rows of their own, then a factor and a sum."""
    _check_axis(found)
    (source,), groups = found.sources, found.config["groups"]
    shape, name = source.shape, found.name
    channels = shape[-1] or 0
    groups = channels if groups == -1 else groups
    if None in shape:
        raise Unknown(
            "it normalizes images of any size; give the model one size, as with "
            "--image_size"
        )
    weights = float_weights(found, {"scale": "scale", "offset": "center"})
    order = {"order": (2, 1, 3)}

    def reshaped(of: Node, what: str, *target: int) -> Node:
        return maker.add("reshape", f"{name}_{what}", [of], {"shape": target})

    rows = source
    if groups > 1:
        split = reshaped(rows, "split", -1, groups, channels // groups)
        rows = maker.add("transpose", f"{name}_groups", [split], order)
    rows = reshaped(rows, "rows", groups, -1)
    rows = _normalize(maker, found, rows, f"{name}_normalized")
    if groups > 1:
        split = reshaped(rows, "split", groups, -1, channels // groups)
        rows = maker.add("transpose", f"{name}_positions", [split], order)
    last = f"{name}_image" if weights else name
    image = maker.add("reshape", last, [rows], {"shape": shape})
    _rescale(maker, found, image, weights)


def _normalize(
    maker: Maker, found: Found, source: Node, name: str, *, is_centered: bool = True
) -> Node:
    """Adds a normalization of the last axis."""
    settings = {"epsilon": found.config["epsilon"], "is_centered": is_centered}
    return maker.add("layer_normalization", name, [source], settings)


def _normalize_and_rescale(
    maker: Maker,
    found: Found,
    weights: Mapping[str, np.ndarray],
    *,
    is_centered: bool = True,
) -> None:
    name = f"{found.name}_normalized" if weights else found.name
    (source,) = found.sources
    normalized = _normalize(maker, found, source, name, is_centered=is_centered)
    _rescale(maker, found, normalized, weights)


def _rescale(
    maker: Maker, found: Found, source: Node, weights: Mapping[str, np.ndarray]
) -> None:
    """Adds the 'scale' and the 'offset' of a normalization, where it has any."""
    if weights:
        factors = {"scale": 1.0, "offset": 0.0, **weights}
        operations.affine(maker, found.name, source, **factors)


def _add_layer_scale(maker: Maker, found: Found) -> None:
    """A factor for each channel: ConvNeXt's own layer."""
    scale = float_weights(found, {"scale": ""})["scale"]
    operations.affine(maker, found.name, found.sources[0], scale, 0.0)


def _add_unit_normalization(maker: Maker, found: Found) -> None:
    """Each position divided by its length: by the root of the sum of its squares."""
    _check_axis(found)
    length = found.shape[-1] or 1
    scale = {"scale": np.asarray(1 / math.sqrt(length))}
    config = {**found.config, "epsilon": _LEAST_SQUARE / length}
    found = dataclasses.replace(found, config=config)
    _normalize_and_rescale(maker, found, scale, is_centered=False)


def _add_pipeline(maker: Maker, found: Found) -> None:
    """Layers one behind the other, which are augmentation as a rule."""
    layers = found.config["layers"]
    inside = {f"{layer['module']}.{layer['class_name']}" for layer in layers}
    others = inside - {f"keras.layers.{kind}" for kind in TRAINING_ONLY}
    if others:
        raise Unknown(
            f"it has {', '.join(sorted(others))} in it, which do not only train; put "
            "its layers into the model one by one"
        )


def _refuse_contrast(maker: Maker, found: Found) -> None:
    raise Unknown(
        "it stretches the values of each image, when the model is used too; take it "
        "out, and let the app do it"
    )


# Functions that go by the name of an activation too.
_VARIANTS = {
    "gelu": ("gelu_by_tanh",),
    "hard_sigmoid": ("hard_sigmoid_keras2",),
}
# What Keras takes for the square of a length at least, where it divides by one.
_LEAST_SQUARE = 1e-12
# Layers that make one of several inputs; of one, that.
_MERGING = frozenset(
    "Add Average Concatenate Maximum Minimum Multiply Subtract".split()
)
_OF_SEVERAL = _MERGING | {"CustomScaleLayer"}
# Layers that may be an activation too, as objects.
_ACTIVATION_LAYERS = ("Activation", "ReLU", "LeakyReLU", "ELU", "Softmax")
# Layers that the table does not tell whole.
_SPECIAL: dict[str, Callable[[Maker, Found], None]] = {
    "Activation": _add_activation,
    "AutoContrast": _refuse_contrast,
    "Average": _add_average,
    "Conv2DTranspose": _add_conv_transpose,
    "CustomScaleLayer": _add_scaled_sum,
    "GroupNormalization": _add_group_normalization,
    "LayerNormalization": _add_layer_normalization,
    "LayerScale": _add_layer_scale,
    "PReLU": _add_prelu,
    "Permute": _add_permute,
    "Pipeline": _add_pipeline,
    "RMSNormalization": _add_rms_normalization,
    "ReLU": _add_relu,
    "SeparableConv2D": _add_separable,
    "Softmax": _add_softmax,
    "UnitNormalization": _add_unit_normalization,
    "UpSampling2D": _add_upsampling,
    **preprocessing.LAYERS,
}
# Layers that are read; a model file may hold more.
KNOWN_LAYERS = frozenset({*LAYERS, *_SPECIAL, *TRAINING_ONLY})
