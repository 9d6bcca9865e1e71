"""What files are written for: the operators, versions and widths of each target.

TARGETS is the table, and says where each list is from. `make clients` runs the files of
each target in its client, where there is one to run.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from ai_edge_litert import schema_py_generated as schema

from dfq_tf.errors import ConfigError, ExportError, UnsupportedLayerError
from dfq_tf.graph import Graph, Node, frozen, problem
from dfq_tf.settings import BitWidths, FileConfig, MixedWidths
from dfq_tf.tflite import kernel_costs

_NAMES = {v: k for k, v in vars(schema.BuiltinOperator).items() if k.isupper()}

_ALL_KERNELS = (2, 3, 4, 5, 6, 7, 8)
# Weights of 4 bits and fewer are stored as int4, wider ones as int8.
_INT8_KERNELS = (5, 6, 7, 8)
_ALL_ACTIVATIONS = (2, 3, 4, 5, 6, 7, 8, 16)
_INT8_ACTIVATIONS = (2, 3, 4, 5, 6, 7, 8)


# The settings of the bits of kernels.
_OF_KERNELS = (
    "num_bits_weight",
    "num_bits_first",
    "num_bits_last",
    "num_bits_depthwise",
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a file is written for.

    Attributes:
      says: what it is, for messages.
      source: where its lists are from.
      versions: operator -> the highest version that it has; None where it has all
        that a file may hold.
      kernel_bits: the widths of weights that it takes.
      wide_kernel_bits: the same beside activations of 16 bits.
      activation_bits: the widths of activations that it takes.
      narrow: operators that it has for activations of 8 bits and fewer alone.
      instead: operator of a kind of node -> what is written in its place, for the same
        integers; see `operators`.
      refuses: (node, bits of the widest activations) -> what else it does not take, or
        None.
      misreads_int4: (node) -> whether it takes a kernel of int4 for another, without a
        word. Such a kernel is stored as int8.
      takes_floats: whether a file may take or give float32.
    """

    says: str
    source: str
    versions: Mapping[str, int] | None
    kernel_bits: tuple[int, ...] = _ALL_KERNELS
    wide_kernel_bits: tuple[int, ...] = _INT8_KERNELS
    activation_bits: tuple[int, ...] = _ALL_ACTIVATIONS
    narrow: tuple[str, ...] = ()
    instead: Mapping[str, str] = dataclasses.field(default_factory=frozen)
    refuses: Callable[[Node, int], str | None] = lambda node, bits: None
    misreads_int4: Callable[[Node], bool] = lambda node: False
    takes_floats: bool = True

    def kernel_bits_beside(self, activation_bits: int) -> tuple[int, ...]:
        """The widths of weights that it takes beside so wide activations."""
        return self.wide_kernel_bits if activation_bits > 8 else self.kernel_bits


# Of FULLY_CONNECTED, older kernels take the scales of all outputs for one. Where they
# look at no version, or know none so new, a convolution does the same. Of TRANSPOSE,
# they take few axes.
_FOR_OLDER_KERNELS = {
    "FULLY_CONNECTED": "POINTWISE",
    "TRANSPOSE": "TRANSPOSE_OF_FOUR",
}
# Axes that TRANSPOSE takes of CMSIS-NN, and of compilers for NPUs with few limits.
MOST_AXES = 4
# Vela takes no more values along all axes of TRANSPOSE but two.
_MOST_MOVED = 2**16


def axes_together(order: Sequence[int]) -> list[list[int]]:
    """Axes in their new order; those that stay side by side are one.

    Args:
      order: of all axes, as TRANSPOSE has it.
    """
    groups: list[list[int]] = []
    for axis in order:
        if groups and axis == groups[-1][-1] + 1:
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _sides_moved(node: Node) -> list[int]:
    """The sizes of the axes that a transpose node moves, those side by side as one."""
    order = (0, *node.settings["order"])
    sizes = dict(zip(order, (1, *(size or 1 for size in node.shape))))
    groups = axes_together(order)
    return [math.prod(sizes[axis] for axis in group) for group in groups]


def _micro_refuses(node: Node, bits: int) -> str | None:
    """What CMSIS-NN, which boards with a Cortex-M run, gets wrong without a word.

    arm_convolve_s16 knows no groups, and TRANSPOSE writes nothing of more axes.
    """
    groups = node.settings.get("groups", 1)
    if groups > 1 and bits > 8:
        return (
            f"it has {groups} groups, which CMSIS-NN takes for one beside activations "
            "of 16 bits; take 8 or fewer"
        )
    if node.kind != "transpose" or len(_sides_moved(node)) <= MOST_AXES:
        return None
    return f"CMSIS-NN moves {MOST_AXES} axes at most, the batch among them"


def _micro_misreads_int4(node: Node) -> bool:
    """Whether CMSIS-NN takes a kernel of int4 for another.

    arm_convolve_s4 knows no groups. arm_depthwise_conv_s4 loses its place among the
    halves of bytes where channels are odd; it is asked where there is a multiplier or
    a dilation.
    """
    if node.kind == "depthwise_conv":
        channels, multiplier = node.weights["kernel"].shape[2:]
        is_plain = multiplier == 1 and set(node.settings["dilation"]) == {1}
        return channels % 2 == 1 and not is_plain
    return node.settings.get("groups", 1) > 1


def _ethos_u_refuses(node: Node, bits: int) -> str | None:
    """Vela's constraints on single layers, for the Ethos-U55 and U65."""
    settings = node.settings
    strides, padding = settings.get("strides", (1, 1)), settings.get("padding")
    if node.kind == "average_pool" and padding == "same" and max(settings["size"]) > 8:
        return f"Vela takes windows of 8 pixels a side there, not {settings['size']}"
    is_plain = padding == "valid" and set(settings.get("dilation", (1, 1))) == {1}
    if node.kind in ("nearest_upsampling", "bilinear_upsampling"):
        factors = ((2, 2),) if node.kind.startswith("b") else ((2, 2), (4, 4), (8, 8))
        if settings["size"] not in factors:
            return (
                f"Vela takes sizes of {_listed(factors)} there, not {settings['size']}"
            )
    if max(strides) > 3 and (node.kind == "depthwise_conv" or not is_plain):
        return f"Vela takes strides up to 3 there, not {tuple(strides)}"
    if node.kind == "transpose":
        moved = math.prod(sorted(s for s in _sides_moved(node) if s > 1)[2:])
        if moved > _MOST_MOVED:
            return f"Vela moves {_MOST_MOVED:,} values there at most, not {moved:,}"
    return None


def _listed(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(map(str, sizes))


def _edge_tpu_refuses(node: Node, bits: int) -> str | None:
    """The Edge TPU's constraints on convolutions."""
    if node.settings.get("groups", 1) > 1:
        return (
            f"it has {node.settings['groups']} groups, a convolution of version 6 of "
            "TFLite, and the Edge TPU's compiler takes no later one than 3"
        )
    dilation = node.settings.get("dilation", (1, 1))
    if len(set(dilation)) > 1:
        return f"the Edge TPU takes one dilation for both axes, not {tuple(dilation)}"
    return None


TARGETS: dict[str, Target] = {
    "android": Target(
        says="LiteRT",
        source="ai-edge-litert 2.3.0, which runs each file before it is given",
        versions=None,
        wide_kernel_bits=_ALL_KERNELS,
    ),
    "micro": Target(
        says="TFLite Micro",
        # RELU6 is left out: its kernel takes the grid of its input for its output's.
        source="tflite-micro, python/tflite_micro/python_ops_resolver.cc; it looks at "
        "no version: these are of the types that its kernels have",
        versions=frozen(
            {
                "ADD": 3,
                "AVERAGE_POOL_2D": 3,
                "CAST": 1,
                "CONCATENATION": 3,
                "CONV_2D": 7,
                "DEPTHWISE_CONV_2D": 7,
                "DEPTH_TO_SPACE": 2,
                "DEQUANTIZE": 3,
                "GATHER": 2,
                "LEAKY_RELU": 2,
                "LOGISTIC": 3,
                "MAXIMUM": 4,
                "MAX_POOL_2D": 3,
                "MEAN": 3,
                "MINIMUM": 4,
                "MUL": 4,
                "PAD": 3,
                "PRELU": 1,
                "QUANTIZE": 2,
                "REDUCE_MAX": 3,
                "RELU": 3,
                "RESHAPE": 1,
                "RESIZE_BILINEAR": 3,
                "RESIZE_NEAREST_NEIGHBOR": 4,
                "SOFTMAX": 3,
                "STRIDED_SLICE": 4,
                "SUB": 5,
                "TANH": 3,
                "TRANSPOSE": 5,
            }
        ),
        narrow=("REDUCE_MAX", "RESIZE_BILINEAR"),
        instead=frozen(
            {
                **_FOR_OLDER_KERNELS,
                "LOOKUP": "LOOKUP_OF_INT8",
                "RELU": "RELU_IN_MUL",
            }
        ),
        refuses=_micro_refuses,
        misreads_int4=_micro_misreads_int4,
    ),
    "ethos_u": Target(
        says="Vela, for the Ethos-U",
        source="ethos-u-vela 5.2.0, `vela --supported-ops-report`, Ethos-U55 and U65; "
        "versions are those of their types",
        versions=frozen(
            {
                "ADD": 3,
                "AVERAGE_POOL_2D": 3,
                "CONCATENATION": 3,
                "CONV_2D": 4,
                "DEPTHWISE_CONV_2D": 5,
                "LEAKY_RELU": 2,
                "LOGISTIC": 3,
                "MAXIMUM": 4,
                "MAX_POOL_2D": 3,
                "MEAN": 3,
                "MINIMUM": 4,
                "MUL": 4,
                "PAD": 3,
                "PRELU": 1,
                "QUANTIZE": 2,
                "REDUCE_MAX": 3,
                "RELU": 3,
                "RELU6": 3,
                "RESHAPE": 1,
                "RESIZE_BILINEAR": 4,
                "RESIZE_NEAREST_NEIGHBOR": 4,
                "SOFTMAX": 3,
                "STRIDED_SLICE": 4,
                "SUB": 5,
                "TANH": 3,
                "TRANSPOSE": 5,
            }
        ),
        kernel_bits=_INT8_KERNELS,
        narrow=("PRELU",),
        instead=frozen(_FOR_OLDER_KERNELS),
        refuses=_ethos_u_refuses,
        takes_floats=False,
    ),
    "edge_tpu": Target(
        says="the Edge TPU's compiler",
        source="coral.ai/docs/edgetpu/models-intro, supported operations; versions as "
        "TensorFlow 2.3 registers them: compiler 16.0 is older than those of "
        "google-coral/edgetpu, issues 631 (CONV_2D 6) and 879 (QUANTIZE 3)",
        versions=frozen(
            {
                "ADD": 2,
                "AVERAGE_POOL_2D": 2,
                "CONCATENATION": 2,
                "CONV_2D": 3,
                "DEPTHWISE_CONV_2D": 3,
                "LOGISTIC": 2,
                "MAXIMUM": 4,
                "MAX_POOL_2D": 2,
                "MEAN": 2,
                "MINIMUM": 4,
                "MUL": 3,
                "PAD": 2,
                "PRELU": 1,
                "QUANTIZE": 2,
                "REDUCE_MAX": 2,
                "RELU": 2,
                "RELU6": 2,
                "RESHAPE": 1,
                "RESIZE_NEAREST_NEIGHBOR": 2,
                "SOFTMAX": 2,
                "STRIDED_SLICE": 2,
                "SUB": 3,
                "TANH": 2,
                "TRANSPOSE": 2,
            }
        ),
        kernel_bits=_INT8_KERNELS,
        activation_bits=_INT8_ACTIVATIONS,
        instead=frozen({**_FOR_OLDER_KERNELS, "LEAKY_RELU": "PRELU"}),
        refuses=_edge_tpu_refuses,
        takes_floats=False,
    ),
}


def has_forms(name: str) -> bool:
    """Whether a file for a target may have a kernel in another operator than its own.

    The times by which a form is chosen are those of LiteRT, and older runtimes and
    other ones have no FULLY_CONNECTED of one scale for each output.
    """
    return TARGETS[name].versions is None


def check_target_takes(file: FileConfig, widths: BitWidths) -> None:
    """Raises ConfigError for a width that a target does not take, or as `check_types`.

    And for a size of the file where bits cannot be chosen.

    Args:
      file: what is asked for, the target among it.
      widths: bits of weights and activations.
    """
    name, target = file.target, TARGETS[file.target]
    check_types(file)
    _check_size(file, widths)
    for field in dataclasses.fields(widths):
        setting, bits = field.name, getattr(widths, field.name)
        # Sums have at least the bits of other activations.
        if not setting.startswith("num_bits") or setting == "num_bits_sum":
            continue
        taken = target.kernel_bits_beside(widths.num_bits_activation)
        if setting == "num_bits_activation":
            taken = target.activation_bits
        if bits not in taken:
            raise ConfigError(
                f"{setting} is {bits}, and the target is {name}: {target.says} takes "
                f"{_spelled(taken)} bits there in a file of {widths.name}"
            )


def check_types(file: FileConfig) -> None:
    """Raises ConfigError for a type or a choice of forms that a target does not take.

    And for a table of kernel costs that cannot be read. No width counts here: a network
    may have been quantized for another target.

    Args:
      file: what is asked for, the target among it.
    """
    name, target = file.target, TARGETS[file.target]
    kernel_costs.read(file.kernel_costs)
    plain = FileConfig()
    for setting in ("favor", "kernel_costs"):
        value = getattr(file, setting)
        if not has_forms(name) and value != getattr(plain, setting):
            raise ConfigError(
                f"{setting} is {value!r}, and the target is {name}: the choice "
                f"is by LiteRT's times, for the target {plain.target} alone. Leave "
                f"{setting} out"
            )
    for setting in ("input_type", "output_type"):
        if getattr(file, setting) == "float32" and not target.takes_floats:
            raise ConfigError(
                f"{setting} is 'float32', and the target is {name}: {target.says} "
                "takes integers there, uint8 or int8"
            )


def _check_size(file: FileConfig, widths: BitWidths) -> None:
    """Raises ConfigError for a size where no bits of weights can be chosen for it."""
    setting = file.size_setting
    if setting is None:
        return
    said, target = f"{setting} is {getattr(file, setting)!r}", TARGETS[file.target]
    given = dict(widths.layer_bits) if isinstance(widths, MixedWidths) else {}
    of_kernels = {name: getattr(widths, name) for name in _OF_KERNELS}
    for name, bits in {**of_kernels, **given}.items():
        if bits < 8:
            raise ConfigError(
                f"{said} and {name} is {bits}: the bits of each layer follow from the "
                "size; leave all weights at 8, as in W8A8"
            )
    if 4 not in target.kernel_bits_beside(widths.num_bits_activation):
        raise ConfigError(
            f"{said}, for which weights would get 4 bits or fewer, and the target is "
            f"{file.target}: {target.says} takes 8 there. Leave {setting} out"
        )


def check_layers(
    name: str,
    graph: Graph,
    operators: Mapping[str, Sequence[str]],
    kernel_bits: Mapping[str, int] = frozen(),
    bits: Mapping[str, int] = frozen(),
) -> None:
    """Raises UnsupportedLayerError, naming all layers that a target does not take.

    Args:
      name: key of TARGETS.
      graph: rewritten for integers.
      operators: node -> its operators in a file for this target.
      kernel_bits: node -> the bits of its kernel, where they are known.
      bits: node -> the bits of its output, where they are known.
    """
    target = TARGETS[name]
    widest = max(bits.values(), default=8)
    kernels = target.kernel_bits_beside(widest)
    problems = []
    for each, node in graph.nodes.items():
        reason = (
            _lacks(target, operators[each], widest)
            or _misfit(target, "weights", kernel_bits.get(each), kernels)
            or _misfit(target, "outputs", bits.get(each), target.activation_bits)
            or target.refuses(node, widest)
        )
        if reason:
            problems.append(problem(node, reason))
    if problems:
        advice = f"Take another target than {name}"
        raise UnsupportedLayerError.of(problems, advice)


def _lacks(target: Target, operators: Sequence[str], bits: int) -> str | None:
    """Why a target cannot have a node with these operators, or None."""
    if target.versions is None:
        return None
    narrow = [each for each in operators if bits > 8 and each in target.narrow]
    if narrow:
        return (
            f"it needs {' and '.join(narrow)}, which {target.says} has for 8 bits alone"
        )
    missing = [x for x in dict.fromkeys(operators) if x not in target.versions]
    if not missing:
        return None
    return f"it needs {' and '.join(missing)}, which {target.says} lacks"


def _misfit(
    target: Target, what: str, bits: int | None, taken: tuple[int, ...]
) -> str | None:
    """Why a target cannot have integers of so many bits, or None."""
    if bits is None or bits in taken:
        return None
    return f"its {what} have {bits} bits, and {target.says} takes {_spelled(taken)}"


def _spelled(bits: tuple[int, ...]) -> str:
    """Such as '4 to 8, or 16'."""
    narrow = [each for each in bits if each <= 8]
    wide = ["or " + str(each) for each in bits if each > 8]
    return ", ".join([f"{narrow[0]} to {narrow[-1]}", *wide])


def check_file(name: str, content: bytes) -> None:
    """Checks a written file against a target's list.

    Args:
      name: key of TARGETS.
      content: of the file.

    Raises:
      ExportError: an operator that the target lacks, or a version that is too new.
    """
    target = TARGETS[name]
    if target.versions is None:
        return
    for operator, version in operator_versions(content).items():
        highest = target.versions.get(operator, 0)
        if version > highest:
            has = f"version {highest} at most" if highest else "no such operator"
            raise ExportError(
                f"the TFLite file has {operator} of version {version}, and "
                f"{target.says} has {has}. Please report it"
            )


def operator_versions(content: bytes) -> dict[str, int]:
    """Operator -> its highest version in a file."""
    model = schema.Model.GetRootAs(content, 0)
    found: dict[str, int] = {}
    for i in range(model.OperatorCodesLength()):
        code = model.OperatorCodes(i)
        name = _NAMES[code.BuiltinCode()]
        found[name] = max(code.Version(), found.get(name, 0))
    return found
