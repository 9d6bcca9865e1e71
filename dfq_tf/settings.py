"""Settings of every stage, as frozen dataclasses that check themselves.

Each field carries its help text and its limits, so that a tool can make a flag of
it: a default lives here and nowhere else. This module imports no TensorFlow.
"""

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dfq_tf.errors import ConfigError
from dfq_tf.files import check_text

PRECISIONS = ("auto", "float32", "bfloat16")
STRATEGIES = ("none", "mirrored", "multi_worker")
AUGMENTATIONS = ("none", "crop", "crop_flip")

# Value of a setting that follows from the networks; `auto` on the command line, and as
# a text in Python.
AUTO = 0

# Type of a default -> what a value may be, and what that is called. No number is True.
_KINDS: dict[type, tuple[Any, str]] = {
    bool: ((bool, np.bool_), "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: ((str, os.PathLike), "a text (str)"),
}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    choices: tuple[str, ...] | None = None,
    auto: bool = False,
) -> Any:
    """A dataclass field with a help text and limits.

    Args:
      default: the default value.
      help: one sentence for the help of its flag, with the unit.
      minimum: smallest allowed value, included.
      maximum: largest allowed value, included.
      above: limit that the value must exceed.
      choices: the allowed strings.
      auto: whether AUTO is allowed, outside the limits.
    """
    metadata = dict(
        help=help,
        minimum=minimum,
        maximum=maximum,
        above=above,
        choices=choices,
        auto=auto,
    )
    return dataclasses.field(default=default, metadata=metadata)


class Checked:
    """Mixin: checks every field against its type and the limits given to `setting`."""

    def __post_init__(self) -> None:
        """Raises ConfigError for the first field of another type or out of limits."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if not field.metadata:
                continue
            given = value = getattr(self, field.name)
            if field.metadata["choices"] is None:
                is_auto = field.metadata["auto"]
                value = _of_type(field.name, given, type(field.default), is_auto)
                object.__setattr__(self, field.name, value)
            shown = given if isinstance(given, int) else value  # 5, and not 5.0
            check_value(field.name, shown, field.metadata)

    def check_effects(self) -> None:
        """Raises ConfigError for a setting that another one leaves without effect.

        One that has its default, or is 0, need not have been given.
        """
        for name, (other, way_out) in self._idle().items():
            value = getattr(self, name)
            if value not in (0, getattr(type(self), name)):
                raise ConfigError(
                    f"{name} is {value}, which has no effect where {other} is "
                    f"{getattr(self, other)!r}. Leave {name} out, or give {way_out}"
                )

    def _idle(self) -> dict[str, tuple[str, str]]:
        """Settings without effect: name -> which one decides, what gives an effect."""
        return {}


def _of_type(name: str, value: Any, kind: type, is_auto: bool = False) -> Any:
    """The value of a setting as Python's own type; an integer may stand for a float.

    Args:
      name: of the setting.
      value: as it was given; of NumPy too, or a path for a text.
      kind: key of _KINDS.
      is_auto: whether the text 'auto' stands for AUTO.

    Raises:
      ConfigError: it is of another type.
    """
    if is_auto and isinstance(value, str) and value == "auto":
        return AUTO
    allowed, called = _KINDS[kind]
    is_bool = isinstance(value, bool)
    if not isinstance(value, allowed) or (is_bool and kind is not bool):
        rest = ", or 'auto'" if is_auto else ""
        raise ConfigError(f"{name} is {value!r}; it must be {called}{rest}")
    if kind is str:
        return os.fsdecode(value)
    return kind(value)


def check_value(name: str, value: Any, limits: Any) -> None:
    """Raises ConfigError, naming the setting and its limits, if `value` is outside."""
    choices = limits.get("choices")
    if choices is not None:
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{name} is {value!r}; it must be one of {list(choices)}")
        return
    auto = limits.get("auto")
    if auto and value == AUTO:
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name} is {value}; it must be a finite number")
    minimum, maximum, above = (limits.get(k) for k in ("minimum", "maximum", "above"))
    if minimum is not None and value < minimum:
        rest = f", or {AUTO} for auto" if auto else ""
        raise ConfigError(f"{name} is {value}; it must be at least {minimum}{rest}")
    if maximum is not None and value > maximum:
        raise ConfigError(f"{name} is {value}; it must be at most {maximum}")
    if above is not None and value <= above:
        raise ConfigError(f"{name} is {value}; it must be above {above}")


@dataclasses.dataclass(frozen=True)
class TeacherConfig(Checked):
    """Supervised training of a teacher on labelled images."""

    teacher_epochs: int = setting(
        60, "Passes over the training set when training a teacher.", minimum=1
    )
    teacher_batch_size: int = setting(128, "Images per teacher step.", minimum=1)
    teacher_learning_rate: float = setting(
        0.1, "Peak learning rate of SGD, with a cosine decay to 0.", above=0
    )
    teacher_weight_decay: float = setting(
        5e-4, "L2 penalty on kernels, added to their gradient.", minimum=0
    )
    augmentation: str = setting(
        "crop_flip",
        "Changes to training images: random crops after padding by an eighth of the "
        "side, and horizontal flips.",
        choices=AUGMENTATIONS,
    )
    teacher_initial_scale: float = setting(
        1.0,
        "Side of the training images in the first epoch over their full side. Below 1, "
        "images grow over the first 80 % of the epochs, and the small ones cost less.",
        above=0,
        maximum=1,
    )


@dataclasses.dataclass(frozen=True)
class RunConfig(Checked):
    """What every stage shares."""

    seed: int = setting(0, "Seed of all random numbers.", minimum=0, maximum=2**31 - 1)
    precision: str = setting(
        "auto",
        "Number format of teacher and generator; auto takes bfloat16 where the "
        "processor or GPU has it. Fake quantization is always float32.",
        choices=PRECISIONS,
    )
    distribute: str = setting(
        "none",
        "Devices that share each training step: one, all GPUs of the machine, or those "
        "of several machines, each of which runs the same command with a TF_CONFIG of "
        "its own. The results are the same but for rounding, where the number of "
        "devices divides all batches; else these are smaller.",
        choices=STRATEGIES,
    )


@dataclasses.dataclass(frozen=True)
class BitWidths(Checked):
    """How many bits weights and activations have.

    The pixels have 8 bits; what a normalisation makes of them, and the logits, have 8
    or more, whatever is set here. As in the literature, few bits are those of what a
    convolution or dense layer reads; factors of single channels, as of a
    BatchNormalization behind a sum, are none.
    """

    num_bits_weight: int = setting(8, "Bits of the weights.", minimum=2, maximum=8)
    num_bits_activation: int = setting(
        8, "Bits of the activations: 2 to 8, or 16.", minimum=2, maximum=16
    )
    per_channel: bool = setting(
        True, "One weight range per output channel, rather than one per layer."
    )
    num_bits_first: int = setting(
        8, "Bits of the first convolution's weights.", minimum=2, maximum=8
    )
    num_bits_last: int = setting(
        8, "Bits of the last layer's weights.", minimum=2, maximum=8
    )
    num_bits_depthwise: int = setting(
        8,
        "Bits of the weights of depthwise convolutions: few, and each of them tells.",
        minimum=2,
        maximum=8,
    )
    num_bits_sum: int = setting(
        8,
        "Bits, at least, of activations that no convolution or dense layer reads: "
        "branches that are added, and sums that a BatchNormalization or a pool reads.",
        minimum=2,
        maximum=8,
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a width that is out of its limits."""
        super().__post_init__()
        if 8 < self.num_bits_activation < 16:
            raise ConfigError(
                f"num_bits_activation is {self.num_bits_activation}; TFLite stores "
                "activations in 8 or 16 bits, so it must be 2 to 8, or 16"
            )

    @property
    def name(self) -> str:
        """Such as W4A8."""
        return f"W{self.num_bits_weight}A{self.num_bits_activation}"


@dataclasses.dataclass(frozen=True)
class MixedWidths(BitWidths):
    """Widths, of which those of some kernels are given one by one.

    Attributes:
      layer_bits: (name of a node, bits of its kernel), such as `quantize` chooses them
        for a file of a given size; or a mapping of them.
    """

    layer_bits: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """Raises ConfigError for a width that is out of its limits."""
        super().__post_init__()
        given: Any = self.layer_bits
        pairs = list(given.items()) if isinstance(given, Mapping) else given
        if not _are_pairs(pairs):
            raise ConfigError(
                f"layer_bits is {given!r}; give the bits of kernels by the names of "
                "their nodes, such as {'conv': 4}"
            )
        found: list[tuple[str, int]] = []
        for name, bits in pairs:
            setting_name = f"layer_bits of {name}"
            bits = _of_type(setting_name, bits, int)
            check_value(setting_name, bits, {"minimum": 2, "maximum": 8})
            if name in dict(found):
                raise ConfigError(
                    f"layer_bits has {name!r} twice; give the bits of a kernel once"
                )
            found.append((name, bits))
        object.__setattr__(self, "layer_bits", tuple(found))


def _are_pairs(values: Any) -> bool:
    """Whether values are a sequence of pairs, each with a text first."""
    return isinstance(values, (list, tuple)) and all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
        for pair in values
    )


def parse_widths(
    name: str, widths: BitWidths = BitWidths(), argument: str = "widths"
) -> BitWidths:
    """Reads bit widths such as W4A8.

    Args:
      name: W, the bits of the weights, A, the bits of the activations.
      widths: gives all other settings.
      argument: what a message calls the name.

    Raises:
      ConfigError: it is not of that form, or a width is out of its limits.
    """
    match = re.fullmatch(r"[Ww](\d+)[Aa](\d+)", name.strip())
    if not match:
        raise ConfigError(
            f"{argument} is {name!r}; write the bits of weights and activations as W4A8"
        )
    weight, activation = map(int, match.groups())
    try:
        return dataclasses.replace(
            widths, num_bits_weight=weight, num_bits_activation=activation
        )
    except ConfigError as error:
        raise ConfigError(f"{argument} is {name!r}: {error}") from error


# Where images come from that stand for those of the task; or a folder's name.
GENERATED, PHOTOGRAPHS, PROCEDURAL = "generated", "photographs", "procedural"
SOURCES = ("auto", GENERATED, PHOTOGRAPHS, PROCEDURAL)

# Images of at most so many pixels are small: it takes seconds to learn to make them.
SMALL_IMAGE = 64 * 64


def is_small(image_shape: tuple[int, int, int]) -> bool:
    """Whether images, (height, width, channels), have at most SMALL_IMAGE pixels."""
    height, width, _ = image_shape
    return height * width <= SMALL_IMAGE


# How many images calibrate: the most, if they are small, and the least.
_CALIBRATION_IMAGES = (1024, 256)

RANGE_METHODS = ("auto", "min_max", "percentile", "mse")


@dataclasses.dataclass(frozen=True)
class CalibrationConfig(Checked):
    """How ranges are found, and what helps them, all of it without training."""

    images: str = setting(
        "auto",
        "Images from which activation ranges are found: generated ones, crops of the "
        "public-domain photographs that ship with the project, procedural ones (1/f "
        "noise), or crops of the pictures in a folder. Auto takes procedural ones for "
        "a network without BatchNormalization; the photographs if images are larger "
        "than 64x64 and photographs cause the statistics that BatchNormalization "
        "remembers; else generated ones.",
    )
    calibration_images: int = setting(
        AUTO,
        "How many of them; auto takes 1024, and fewer, but at least 256, if they are "
        "larger than 64x64.",
        minimum=1,
        auto=True,
    )
    synthesized_in_lessons: float = setting(
        0.5,
        "Share of images that are made for it among those that blocks learn from, "
        "where generated ones of at most 64x64 calibrate: for each batch of them the "
        "generator learns anew. 0 saves a minute or more.",
        minimum=0,
        maximum=0.9,
    )
    photographs_in_lessons: float = setting(
        0.5,
        "Share of crops of the public-domain photographs that ship with the project "
        "that blocks and students learn from, in place of so many of the images that "
        "calibrate, where --images=auto takes generated ones. Ranges come of generated "
        "images alone.",
        minimum=0,
        maximum=1,
    )
    activation_range: str = setting(
        "auto",
        "Range of activations: their lowest and highest value, a percentile, or what "
        "makes the mean squared error of the rounding least. Auto takes the first "
        "where it costs little on images held out, else the last. 16 bits always have "
        "the first.",
        choices=RANGE_METHODS,
    )
    activation_percentile: float = setting(
        99.99,
        "Share of the values, in percent, that lie below the upper end of a range, "
        "and above its lower end, with --activation_range=percentile.",
        above=50,
        maximum=100,
    )
    pooled_margin: float = setting(
        1.5,
        "How many times as wide as on the calibration images the ranges of global "
        "pools and of vectors behind them are made, as real images reach further; 1 "
        "where that costs too much on images held out.",
        minimum=1,
    )
    logits_margin: float = setting(
        2.5,
        "How many times as wide, about its centre, the range of the logits is made; 1 "
        "where that costs too much on images held out.",
        minimum=1,
    )
    photographs_logits_margin: float = setting(
        1.5,
        "The same where the photographs that ship with the project calibrate, which "
        "reach nearer to the images of a task than generated ones.",
        minimum=1,
    )
    weight_range: str = setting(
        "mse",
        "Range of weights: their largest magnitude, or what makes the mean squared "
        "error of the rounding least.",
        choices=("min_max", "mse"),
    )
    equalize: bool = setting(
        False,
        "Balance the weights of neighbouring layers first (cross-layer equalization, "
        "Nagel et al. 2019).",
    )
    bias_correction: bool = setting(
        True,
        "Move biases so that the mean of each channel is that of the float network "
        "(Nagel et al. 2019), on the calibration images; kept where images held out "
        "are answered better for it.",
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting that is out of its limits."""
        super().__post_init__()
        check_text("images", self.images)
        if not self.images:
            raise ConfigError(
                f"images is empty; it takes one of {list(SOURCES)}, or a folder"
            )

    def _idle(self) -> dict[str, tuple[str, str]]:
        """What 'auto' takes is not known here."""
        images, found = self.images, dict[str, tuple[str, str]]()
        if self.activation_range != "percentile":
            way_out = "activation_range='percentile'"
            found["activation_percentile"] = "activation_range", way_out
        if images not in ("auto", GENERATED):
            way_out = f"images={GENERATED!r}"
            found["synthesized_in_lessons"] = "images", way_out
        if images != "auto":
            found["photographs_in_lessons"] = "images", "images='auto'"
        if images == PHOTOGRAPHS:
            found["logits_margin"] = "images", "photographs_logits_margin"
        elif images != "auto":
            found["photographs_logits_margin"] = "images", "logits_margin"
        return found

    def image_count(self, image_shape: tuple[int, int, int]) -> int:
        """How many images calibrate: as many as are asked for, or what auto takes."""
        if self.calibration_images != AUTO:
            return self.calibration_images
        most, least = _CALIBRATION_IMAGES
        fitting = most * SMALL_IMAGE // (image_shape[0] * image_shape[1])
        return max(least, min(most, fitting))


# What students see besides generated images as they are.
IMAGE_KINDS = ("noise", "photographs", "mixup", "cutmix")


@dataclasses.dataclass(frozen=True)
class MixedImages(Checked):
    """Shares of the students' images that are of IMAGE_KINDS, and uses of a crop."""

    answer_uses: int = setting(
        4,
        "Student steps on each crop, about, before the teacher answers a new one in "
        "its place.",
        minimum=1,
    )
    noise_share: float = setting(
        0.15, "Share of the students' images that are 1/f noise.", minimum=0
    )
    mixup_share: float = setting(
        0.075, "Share that are means of two images, generated or of a pool.", minimum=0
    )
    cutmix_share: float = setting(
        0.075, "Share that are such images with a box out of another one.", minimum=0
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting out of its limits, or too many shares."""
        super().__post_init__()
        given = {f"{kind}_share": self.share_of(kind) for kind in IMAGE_KINDS}
        shares = {name: value for name, value in given.items() if hasattr(self, name)}
        total = sum(shares.values())
        if total > 1 + 1e-9:  # such as 0.4 + 0.2 + 0.3 + 0.1, as floats add up
            each = ", ".join(f"{name} {value:g}" for name, value in shares.items())
            raise ConfigError(
                f"the shares are {each}, {total:.10g} together; they must be at most "
                "1, and what is left is generated images"
            )

    def share_of(self, kind: str) -> float:
        """Share of the students' images that are of a kind of IMAGE_KINDS."""
        return getattr(self, f"{kind}_share", 0.0)


@dataclasses.dataclass(frozen=True)
class DistillationConfig(MixedImages):
    """What a quantized student learns from, and how long; and the warm-up before it.

    The defaults suit a student that is the teacher's own network, quantized: it learns
    from a pool of images that the warmed-up generators have made. `qat_recipe` has
    other settings for it, among them the loop of Choi et al. 2020, generators against
    students. For another network, trained from scratch, see `recipe`.
    """

    batch_size: int = setting(
        AUTO,
        "Generated images per step; auto takes 128, or the next lower power of two "
        "with which a step needs no more than about 4 GiB of memory.",
        minimum=1,
        auto=True,
    )
    noise_dim: int = setting(512, "Length of a noise vector.", minimum=1)
    warm_up_steps: int = setting(
        100, "Steps that train the generator alone, on the auxiliary loss.", minimum=0
    )
    warm_up_batch_size: int = setting(
        32, "Generated images per such step, or batch_size if it is less.", minimum=1
    )
    num_generators: int = setting(
        1,
        "Generators; each has its own updates, and the students' batches are drawn "
        "from all of them.",
        minimum=1,
    )
    num_students: int = setting(
        1,
        "Students of different random weights, of which the generators must fool all; "
        "the one that agrees best with the teacher is kept.",
        minimum=1,
    )
    rounds: int = setting(
        300, "Rounds of generator and student steps in turn.", minimum=0
    )
    max_minutes: float = setting(
        20.0,
        "Minutes that the rounds take at most on this machine: there are fewer of them "
        "if all would take longer; 0 for as long as they take.",
        minimum=0,
    )
    generator_steps: int = setting(0, "Generator steps per round.", minimum=0)
    student_steps: int = setting(10, "Student steps per round.", minimum=1)
    generator_learning_rate: float = setting(
        1e-3, "Peak learning rate of Adam, with a cosine decay to 0.", above=0
    )
    student_optimizer: str = setting(
        "adam",
        "What trains the student: adam suits folded weights of any scale; sgd, with "
        "Nesterov momentum, a network trained from scratch.",
        choices=("adam", "sgd"),
    )
    student_learning_rate: float = setting(
        2e-4, "Peak learning rate of the student, with a cosine decay to 0.", above=0
    )
    student_momentum: float = setting(
        0.9, "Momentum of the student's sgd.", minimum=0, maximum=0.999
    )
    student_weight_decay: float = setting(
        0.0, "L2 penalty on the student's kernels, added to their gradient.", minimum=0
    )
    temperature: float = setting(
        1.0,
        "Divides the logits in the students' loss (Hinton et al. 2015); the "
        "generators' loss is at 1.",
        above=0,
    )
    pool_images: int = setting(
        8192,
        "How many images, of where those for the ranges come from, student steps take "
        "crops of, which the teacher answers; or fewer where they take more than 512 "
        "MiB. Images of generator steps take the place of the oldest. 0 for no pool, "
        "nor noise, mixup and cutmix, which are parts of it.",
        minimum=0,
    )
    pool_batch_size: int = setting(
        32,
        "Images per student step on crops of a pool, or batch_size if it is less.",
        minimum=1,
    )
    bank_images: int = setting(
        0,
        "How many of the last generated images are kept, with the teacher's answers, "
        "for the student steps to draw from, or fewer where they take more than 512 "
        "MiB; with 0 and no pool, each student step generates its own.",
        minimum=0,
    )
    share_images: bool = setting(
        False,
        "Take the student steps of a round on the images of its generator steps, whose "
        "answers are known, in place of fresh ones: they then need neither generator "
        "nor teacher.",
    )
    student_augmentation: str = setting(
        "crop_flip",
        "Changes to the images of student steps, those of a pool before the teacher "
        "answers them: random crops after padding by an eighth of the side, and "
        "horizontal flips.",
        choices=AUGMENTATIONS,
    )
    learn_ranges: bool = setting(
        True,
        "Whether the ranges of a quantized student's kernels and activations of less "
        "than 8 bits learn too, by their step sizes (LSQ, Esser et al. 2020); with "
        "adam alone, as their gradients are sums over all values.",
    )
    adversarial_ramp_steps: int = setting(
        0,
        "Generator steps over which the distillation loss grows to its full weight in "
        "the generators' loss: a random student is too easily fooled.",
        minimum=0,
    )
    alpha: float = setting(
        1.0, "Weight of the auxiliary loss against the distillation loss.", minimum=0
    )
    bn_statistics_weight: float = setting(
        1.0, "Weight of the BN statistics in the auxiliary loss.", minimum=0
    )
    instance_entropy_weight: float = setting(
        1.0, "Weight of the instance entropy in the auxiliary loss.", minimum=0
    )
    batch_entropy_weight: float = setting(
        1.0, "Weight of the batch entropy in the auxiliary loss.", minimum=0
    )

    def __post_init__(self) -> None:
        """Raises ConfigError for a setting out of its limits, or a contradiction."""
        super().__post_init__()
        if AUTO < self.batch_size < self.num_generators:
            raise ConfigError(
                f"num_generators is {self.num_generators}, more than the batch_size "
                f"{self.batch_size}: a batch has an image of each generator"
            )
        sources = ("pool_images", "bank_images", "share_images")
        given = [name for name in sources if getattr(self, name)]
        if len(given) > 1:
            first, second = given[:2]
            raise ConfigError(
                f"{first} is {getattr(self, first)} and {second} is "
                f"{getattr(self, second)}; a student step takes its images from one of "
                f"them. Set {first} to 0, or leave {second} out"
            )
        if (
            given[:1] in (["bank_images"], ["share_images"])
            and not self.generator_steps
        ):
            raise ConfigError(
                f"{given[0]} is {getattr(self, given[0])} and generator_steps is 0; "
                "the images are those of generator steps"
            )

    def _idle(self) -> dict[str, tuple[str, str]]:
        found: dict[str, tuple[str, str]] = {}
        if self.student_optimizer != "sgd":
            found["student_momentum"] = "student_optimizer", "student_optimizer='sgd'"
        if not self.pool_images:
            found |= dict.fromkeys(POOL_SETTINGS, ("pool_images", "pool_images"))
        return found

    @property
    def needs_generators(self) -> bool:
        """Whether generators train against students, or make the images of a step."""
        return self.generator_steps > 0 or not self.pool_images

    @property
    def trains_ranges(self) -> bool:
        """Whether ranges of a quantized student learn, see `learn_ranges`."""
        return self.learn_ranges and self.student_optimizer == "adam"


@dataclasses.dataclass(frozen=True)
class BudgetConfig(MixedImages):
    """Distillation from scratch in a given time: the recipe `budget`.

    A round makes one new batch of images, in `generator_steps`, and takes
    `student_steps` on past ones; as many rounds are taken as fit into the time. The
    values are those of Fang et al. 2022 ("Up to 100x Faster Data-free Knowledge
    Distillation") where it has them; docs/experiments/distillation.md has the figures
    of the others.
    """

    minutes: float = setting(
        30.0,
        "Minutes that the distillation takes on this machine, about, with compiling "
        "and all; other recipes have --rounds.",
        above=0,
    )
    steps: int = setting(
        0,
        "Student steps in all, rounded up to whole rounds, in place of minutes; 0 for "
        "as many as fit into these.",
        minimum=0,
    )
    batch_size: int = setting(
        AUTO,
        "Images per step; auto takes 128, or the next lower power of two with which a "
        "step needs no more than about 4 GiB of memory.",
        minimum=1,
        auto=True,
    )
    noise_dim: int = setting(256, "Length of a noise vector.", minimum=1)
    num_generators: int = setting(
        1, "Generators, which make the new batches in turn.", minimum=1
    )
    num_students: int = setting(
        1,
        "Students of different random weights; the one that agrees best with the "
        "teacher is kept.",
        minimum=1,
    )
    generator_steps: int = setting(
        5, "Generator steps for a new batch, of which the best images stay.", minimum=1
    )
    draws_first_layer: bool = setting(
        True,
        "Whether each new batch draws the generator's first layer anew, so that things "
        "are not always in the same places; where they are, as digits in the middle, "
        "it may be learnt with the others.",
    )
    student_steps: int = setting(80, "Student steps for each new batch.", minimum=1)
    first_share: float = setting(
        0.1,
        "Share of the batches that are made before the first student step.",
        minimum=0,
        maximum=0.9,
    )
    bank_images: int = setting(
        40_000,
        "How many of the last generated images are kept, or fewer where they take more "
        "than 512 MiB.",
        minimum=1,
    )
    photographs_share: float = setting(
        0.0,
        "Share that are crops of the public-domain photographs of the project.",
        minimum=0,
    )
    student_augmentation: str = setting(
        "crop_flip",
        "Changes to all images before the teacher sees them: random crops after "
        "padding by an eighth of the side, and horizontal flips.",
        choices=AUGMENTATIONS,
    )
    synthesis_learning_rate: float = setting(
        2e-3, "Learning rate of Adam for the generator.", above=0
    )
    latent_learning_rate: float = setting(
        0.01, "Learning rate of Adam for the noise of a batch.", above=0
    )
    bn_distance_weight: float = setting(
        10.0, "Weight of the BN statistics in the generators' loss.", minimum=0
    )
    class_weight: float = setting(
        0.4, "Weight of the cross entropy to the classes that are drawn.", minimum=0
    )
    adversarial_weight: float = setting(
        1.1,
        "Weight of the divergence of the students, where they have the teacher's "
        "class, from the students' first step on.",
        minimum=0,
    )
    student_optimizer: str = setting(
        "muon",
        "What trains the student: muon moves kernels of convolutions by equal parts in "
        "all directions (Jordan et al. 2024), and leaves all else to sgd, and kernels "
        "that read or give a single channel; sgd, with Nesterov momentum, trains "
        "everything.",
        choices=("muon", "sgd"),
    )
    muon_learning_rate: float = setting(
        0.05,
        "Share of its norm by which muon moves a kernel in a step, with a cosine decay "
        "to 0.",
        above=0,
        maximum=1,
    )
    student_learning_rate: float = setting(
        0.1,
        "Peak learning rate of the student's SGD, with a cosine decay to 0.",
        above=0,
    )
    student_momentum: float = setting(
        0.9, "Momentum of the student's muon and SGD.", minimum=0, maximum=0.999
    )
    student_weight_decay: float = setting(
        1e-4, "L2 penalty on the student's kernels, added to their gradient.", minimum=0
    )
    temperature: float = setting(
        20.0, "Divides the logits in the students' loss (Hinton et al. 2015).", above=0
    )

    def _idle(self) -> dict[str, tuple[str, str]]:
        if self.student_optimizer == "muon":
            return {}
        way_out = "student_optimizer='muon'"
        return {"muon_learning_rate": ("student_optimizer", way_out)}


# Those that say what students learn from a pool.
POOL_SETTINGS = (
    "pool_images",
    "pool_batch_size",
    "answer_uses",
    "noise_share",
    "mixup_share",
    "cutmix_share",
)
# The settings of one phase, generators against students; those of the second phase,
# on the quantized student, have flags of their own. All others hold for both.
PHASE_SETTINGS = (
    "rounds",
    "max_minutes",
    "generator_steps",
    "student_steps",
    "student_optimizer",
    "student_learning_rate",
    "student_momentum",
    "student_weight_decay",
    "temperature",
    *POOL_SETTINGS,
    "bank_images",
    "share_images",
    "student_augmentation",
    "learn_ranges",
    "adversarial_ramp_steps",
)

# What differs from the defaults when a network is trained from scratch. `paper` is the
# loop of Choi et al. 2020: generator and student in turn, every step on fresh noise,
# with the settings of its public re-implementation, which has batches of 256. `bank`
# keeps past images, on which most steps run (Fang et al. 2022, "Up to 100x Faster
# Data-free Knowledge Distillation").
_WITHOUT_POOL = dict(
    max_minutes=0.0,
    pool_images=0,
    noise_share=0.0,
    mixup_share=0.0,
    cutmix_share=0.0,
    student_augmentation="none",
)
_FROM_SCRATCH = dict(_WITHOUT_POOL, student_optimizer="sgd", student_learning_rate=0.1)
# `budget` is of another kind: see BudgetConfig.
RECIPES: dict[str, dict[str, Any]] = {
    "budget": {},
    "bank": dict(
        _FROM_SCRATCH,
        rounds=1000,
        generator_steps=2,
        student_steps=10,
        student_weight_decay=5e-4,
        temperature=20.0,
        bank_images=40_000,
        adversarial_ramp_steps=200,
    ),
    "paper": dict(
        _FROM_SCRATCH,
        rounds=80_000,
        generator_steps=1,
        student_steps=1,
    ),
}


# The same for a student that is the teacher's own network, quantized. `pool` has the
# defaults of DistillationConfig; `paper` is the loop of Choi et al. 2020.
QAT_RECIPES: dict[str, dict[str, Any]] = {
    "pool": {},
    "paper": dict(
        _WITHOUT_POOL,
        generator_steps=1,
        student_steps=3,
        student_learning_rate=1e-4,
        learn_ranges=False,
    ),
}


def recipe_settings(name: str) -> list[str]:
    """The settings that a recipe has, of RECIPES or of QAT_RECIPES.

    Raises:
      ConfigError: there is no such recipe.
    """
    names = tuple({**RECIPES, **QAT_RECIPES})
    check_value("recipe", name, {"choices": names})
    kind = BudgetConfig if name == "budget" else DistillationConfig
    without = () if name in ("budget", "pool") else POOL_SETTINGS
    return [f.name for f in own_first(kind) if f.name not in without]


def own_first(kind: type) -> "list[dataclasses.Field[Any]]":
    """The settings of a class; those that other classes have too come last."""
    own = vars(kind)
    return sorted(dataclasses.fields(kind), key=lambda field: field.name not in own)


def recipe(name: str, **changes: Any) -> DistillationConfig | BudgetConfig:
    """Settings for a student trained from scratch.

    Args:
      name: key of RECIPES.
      **changes: settings that differ from the recipe's; of BudgetConfig for `budget`,
        else of DistillationConfig.

    Raises:
      ConfigError: there is no such recipe, it has no such setting, or a setting is out
        of its limits.
    """
    check_value("recipe", name, {"choices": tuple(RECIPES)})
    _check_has(name, changes)
    kind = BudgetConfig if name == "budget" else DistillationConfig
    return kind(**{**RECIPES[name], **changes})


def qat_recipe(name: str, **changes: Any) -> DistillationConfig:
    """Settings for a student that is the teacher's own network, quantized.

    Args:
      name: key of QAT_RECIPES.
      **changes: settings that differ from the recipe's.

    Raises:
      ConfigError: as `recipe`.
    """
    check_value("qat_recipe", name, {"choices": tuple(QAT_RECIPES)})
    _check_has(name, changes)
    return DistillationConfig(**{**QAT_RECIPES[name], **changes})


def _check_has(name: str, changes: Mapping[str, Any]) -> None:
    names = recipe_settings(name)
    for each, value in changes.items():
        if each not in names:
            raise ConfigError(
                f"{each} is {value}, but the recipe {name} has no such setting; it has "
                f"{', '.join(names)}"
            )


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig(Checked):
    """Blocks that learn to give what they give in the float network."""

    rec_steps: int = setting(500, "Steps of each block.", minimum=1)
    rec_minutes: float = setting(
        20.0,
        "Minutes that the steps of all blocks may take on this machine: each has fewer "
        "steps, but at least 20, if these would take longer; 0 for any time. How many "
        "they were is in metrics.json.",
        minimum=0,
    )
    rec_batch_size: int = setting(
        32,
        "Images of a step; fewer, but at least 4, in blocks where they are larger than "
        "32x32.",
        minimum=1,
    )
    rec_learning_rate: float = setting(
        0.1,
        "Peak learning rate of Adam for the rounding of weights; it decays to 0.",
        above=0,
    )
    rec_drop: float = setting(
        0.5,
        "Share of a block's inputs and activations, chosen at random in each step, "
        "that are not quantized (QDrop, Wei et al. 2022).",
        minimum=0,
        maximum=1,
    )


# Ranges alone; blocks reconstructed behind that; the student trained, from ranges or
# from reconstructed blocks.
METHODS = ("df_q", "df_rec", "df_qat_kd", "df_rec_kd")
RECONSTRUCTING, TRAINING = ("df_rec", "df_rec_kd"), ("df_qat_kd", "df_rec_kd")
# DF-Q first, and another one where it is needed.
AUTO_METHOD = "auto"


TARGETS = ("android", "micro", "ethos_u", "edge_tpu")
FAVORS = ("balanced", "speed", "size")

# Settings of FileConfig that ask for a size, which then decides of bits of weights.
SIZE_SETTINGS = ("target_size", "target_kib")


@dataclasses.dataclass(frozen=True)
class FileConfig(Checked):
    """What a TFLite file takes and gives, and what it says of itself."""

    file_output: str = setting(
        "auto",
        "What the file gives: probabilities, or the logits before them; auto gives "
        "what the model gave. Where the model does not say, probabilities are the "
        "softmax of its logits.",
        choices=("auto", "probabilities", "logits"),
    )
    input_type: str = setting(
        "uint8",
        "What the file takes: pixels in uint8; pixel - 128 in int8; or float32, "
        "normalised as the file's metadata say.",
        choices=("uint8", "int8", "float32"),
    )
    output_type: str = setting(
        "auto",
        "Type of what the file gives; auto is uint8, and int16 where activations have "
        "16 bits.",
        choices=("auto", "uint8", "int8", "float32"),
    )
    target: str = setting("android", "What the file is for.", choices=TARGETS)
    favor: str = setting(
        "balanced",
        "How kernels of few bits are stored: speed, as fast as can be; size, as small "
        "as can be; balanced, as small as they can be at no more than 1.3 times the "
        "time of int8. Answers are the same, but for one step of an integer with size.",
        choices=FAVORS,
    )
    kernel_costs: str = setting(
        "",
        "Table of times by which that is chosen, as benchmarks/kernels.py makes it; by "
        "default that of the project.",
    )
    target_size: str = setting(
        "",
        "Size of the file over that of the file of 8-bit weights, such as 0.5x: layers "
        "get 8, 4 or 2 bits for it, by the noise that they make in the logits of "
        "the images that calibrate.",
    )
    target_kib: int = setting(
        0, "The same in KiB (1,024 bytes); 0 for any size.", minimum=0
    )
    model_name: str = setting(
        "", "Name in the file's metadata; by default that of the model's file."
    )
    model_description: str = setting("", "What the model does, in the metadata.")
    model_version: str = setting("", "Version of the model, in the metadata.")
    model_author: str = setting("", "Who made the model, in the metadata.")
    model_license: str = setting("", "Licence of the model, in the metadata.")

    def __post_init__(self) -> None:
        """Raises ConfigError for a value that is not allowed, or no text."""
        super().__post_init__()
        for name, value in vars(self).items():
            if isinstance(value, str):
                check_text(name, value)
        if self.target_size and not 0 < (self.size_share or 0) < 1:
            raise ConfigError(
                f"target_size is {self.target_size!r}; write a share of the size of "
                "the file of 8-bit weights, such as 0.5x"
            )
        if self.target_size and self.target_kib:
            raise ConfigError(
                f"target_size is {self.target_size!r} and target_kib is "
                f"{self.target_kib}; give one of them"
            )

    @property
    def size_setting(self) -> str | None:
        """Which of SIZE_SETTINGS asks for a size; None if the file may have any."""
        return next((name for name in SIZE_SETTINGS if getattr(self, name)), None)

    @property
    def size_share(self) -> float | None:
        """The number in `target_size`; None where it holds none."""
        match = re.fullmatch(r"(\d*\.?\d+)x", self.target_size.strip())
        return float(match[1]) if match else None
