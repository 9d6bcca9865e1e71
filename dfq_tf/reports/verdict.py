"""What a run comes to, in one sentence, and what that rests on."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dfq_tf.reports.record import IMAGES, Record, Row
from dfq_tf.settings import METHODS, SIZE_SETTINGS, TRAINING, FileConfig

# Share of the images that a file may lose, and still be good or fair.
_GOOD, _FAIR = 0.01, 0.03
# What floats may add to the difference of two shares: 0.95 - 0.94 is above 0.01.
_ROUNDING = 1e-9
# SQNR in dB above which a layer loses nothing that anyone would see: less than a
# twentieth of its signal.
_QUIET_DB = 26.0
# Values of flags that ask for nothing.
_OFF = ("", "0")
# For which clients a file is, where no flag says it.
_TARGET = FileConfig().target
# Quantile of the normal distribution, for 95 %.
_Z = 1.96


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a run comes to.

    Attributes:
      level: 'good', 'fair' or 'poor'; 'unknown' where too little was measured.
      sentence: what was found.
      rests_on: what was measured, and what was not, a sentence each.
    """

    level: str
    sentence: str
    rests_on: Sequence[str]


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that was measured on `count` images."""
    middle = share + _Z**2 / (2 * count)
    square = share * (1 - share) / count + _Z**2 / (4 * count**2)
    spread = _Z * math.sqrt(square)
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def percent(share: float) -> str:
    """Such as '98.6 %', which does not break; 100 only where nothing is missing."""
    text = f"{100 * share:.1f}"
    if text == "100.0":
        text = "100" if share == 1 else "99.9"
    return f"{text}\N{NO-BREAK SPACE}%"


def of(record: Record) -> Verdict:
    """The verdict on a run."""
    best = record.best
    if best is None:
        return _of_distillation(record)
    rests = [*_measured(record, best), *_expected(record, best), *_proved(best)]
    if best.measured.get("accuracy") is not None and record.source is not None:
        return _by_labels(record, best, record.source, rests)
    return _by_agreement(record, best, rests)


def file_name(widths: str) -> str:
    """How a file of these widths, or of such a size, is called in a sentence."""
    return "int8 file" if widths == "W8A8" else f"{widths} file"


def _by_labels(record: Record, best: Row, exact: Row, rests: list[str]) -> Verdict:
    right, before = best.measured["accuracy"], exact.measured["accuracy"]
    count = best.measured["images"]
    lost = before - right
    if abs(lost) * count < 0.5:
        compared = f"as many as the {record.exact}"
    else:
        points = f"{100 * abs(lost):.2f} points {'fewer' if lost > 0 else 'more'}"
        compared = f"{points} than the {record.exact}"
    sentence = (
        f"The {file_name(record.widths)} is right on {percent(right)} of {count:,} "
        f"labelled test images, {compared}."
    )
    return Verdict(_level(lost), sentence, rests)


def _by_agreement(record: Record, best: Row, rests: list[str]) -> Verdict:
    expected = _expected_agreement(best)
    if best.agreement is None:
        return Verdict("unknown", "The file was made, and not measured.", rests)
    same, _ = best.agreement
    subject = file_name(record.widths) if best.measured else "quantized network"
    if not record.is_exclusive:
        sentence = (
            f"The {subject} and the {record.reference} have the same largest score on "
            f"{percent(same)} of {record.images_agreed_on}, but classes that do not "
            "exclude each other have a score each, of which that says little."
        )
        return Verdict("unknown", sentence, rests)
    sentence = (
        f"The {subject} answers as the {record.reference} on {percent(same)} of "
        f"{record.images_agreed_on}"
    )
    if _is_one_class(best):
        sentence += (
            ", but that finds one class in nearly all of them, so that it says little."
        )
        return Verdict("unknown", sentence, rests)
    if expected is None:
        exact = record.source.agreement if record.source else None
        whole = exact[0] if exact else 1.0
        return Verdict(_level(whole - same), f"{sentence}.", rests)
    images = _kinds_of_expected(best.training) or "images held out"
    if record.is_distilled:
        sure = f"{percent(expected)} of {images} of which that is sure"
        sentence += f", and as the float student on {sure}."
    else:
        sure = f"on {images} of which the float model is sure"
        sentence += f"; {sure}, {percent(expected)}."
    return Verdict(_level(1 - expected), sentence, rests)


def _level(lost: float) -> str:
    lost -= _ROUNDING
    return "good" if lost <= _GOOD else "fair" if lost <= _FAIR else "poor"


def _kinds_of_expected(training: Mapping[str, Any]) -> str:
    """On which images agreement is expected, in words; empty if that was not kept."""
    found = training.get("expected_on", ())
    return " and ".join(IMAGES.get(kind, kind) for kind in found)


def _expected_agreement(row: Row) -> float | None:
    """What is expected of a network; None where no images tell, or none were asked."""
    return row.training.get("expected_agreement")


def _is_one_class(row: Row) -> bool:
    """Whether the float model finds one class in nearly all images held out."""
    told = any(name.startswith("sqnr_") for name in row.training)
    return told and "expected_agreement" not in row.training


def _measured(record: Record, best: Row) -> list[str]:
    said = []
    measured = best.measured
    if measured.get("accuracy") is not None:
        said.append(_of_labels(record, measured, "file"))
    elif record.has_labels:
        said.append(
            "The run ended before its file was measured on the labelled images. The "
            "same command goes on."
        )
    else:
        said.append(
            "No labelled images were given: accuracy is not known, and agreement with "
            f"the {record.reference} stands in for it."
        )
    if measured.get("agreement") is not None:
        low, high = interval(measured["agreement"], measured["images"])
        count = f"{measured['images']:,}"
        is_real = measured.get("accuracy") is not None
        held_out = f"{count} {record.images_agreed_on}"
        images = f"those {count} images" if is_real else held_out
        said.append(
            f"File and {record.reference} give the same class on "
            f"{percent(measured['agreement'])} of {images} (95 % interval: "
            f"{percent(low)} to {percent(high)})."
        )
    return said


def _of_labels(record: Record, measured: Mapping[str, Any], what: str) -> str:
    low, high = interval(measured["accuracy"], measured["images"])
    dataset = record.flags.get("dataset") or "the data set"
    return (
        f"{measured['images']:,} labelled images of {dataset}, which took no part in "
        f"making the {what}. Of other images of the kind, it may be right on "
        f"{percent(low)} to {percent(high)} (95 % interval)."
    )


def _expected(record: Record, best: Row) -> list[str]:
    training, said = best.training, []
    expected = _expected_agreement(best)
    if expected is not None:
        kinds = _kinds_of_expected(training)
        # An earlier version did not keep the kinds.
        images = f" ({kinds})" if kinds else ", and of 1/f noise,"
        said.append(
            f"On the three quarters of images held out{images} of which the "
            f"{record.exact} is surest, both agree on {percent(expected)}. Real "
            "images of the task are mostly of that kind; images near a border between "
            "two classes are where a rounding decides."
        )
    if share := training.get("photographs_share"):
        part = f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
        generated = f"generated images, {part} of them replaced by "
        said.append(
            f"It learnt from {'' if share == 1 else generated}crops of the "
            "public-domain photographs that ship with the project. "
            "--images=generated leaves these out."
        )
    if training.get("unreconstructed_is_kept"):
        said.append(
            "Reconstruction was tried and did not help: the network before it was kept."
        )
    if training.get("untrained_is_kept"):
        said.append(
            "Training was tried and did not help: the file holds the network before it."
        )
    elif {"held_out_agreement_before", "held_out_agreement_after"} <= training.keys():
        said.append(
            "Training moved the agreement from "
            f"{percent(training['held_out_agreement_before'])} to "
            f"{percent(training['held_out_agreement_after'])}, the mean over images "
            "held out of each kind."
        )
    return said


def _proved(best: Row) -> list[str]:
    steps = best.measured.get("largest_difference_in_steps")
    if steps is None:
        return []
    count = best.measured.get("compared_images")  # an earlier version kept none
    images = f", on {count:,} images," if count else ""
    return [
        f"LiteRT ran the file itself: its logits{images} are at most {steps} "
        f"{'step' if steps == 1 else 'steps'} of an integer from what the quantized "
        "network computes."
    ]


def _of_distillation(record: Record) -> Verdict:
    student = next((row for row in record.rows if row.key == "student"), None)
    if student is None or student.agreement is None:
        return Verdict("unknown", "Nothing was made in this workdir yet.", [])
    same, count = student.agreement
    said = "The images were generated and held out from the training"
    if count:
        low, high = interval(same, count)
        said += f" (95 % interval: {percent(low)} to {percent(high)})"
    rests = [
        f"{said}. They find the student's faults, and tell little of how it does on "
        "real ones."
    ]
    sentence = (
        f"The student answers as the teacher on {percent(same)} of generated images"
    )
    right = student.measured.get("accuracy")
    if right is None:
        rests.append("No labelled images were given: accuracy is not known.")
        return Verdict("unknown", f"{sentence}.", rests)
    if student.measured["images"]:  # an earlier version kept no count
        rests.append(_of_labels(record, student.measured, "student"))
    sentence += f", and is right on {percent(right)} of the labelled test images."
    return Verdict("unknown", sentence, rests)


def worst_layer(layers: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The layer that adds the most noise; None where none is known."""
    known = [layer for layer in layers if layer["own_db"] is not None]
    return min(known, key=lambda layer: layer["own_db"], default=None)


def advice(
    layers: Sequence[Mapping[str, Any]],
    worst: Mapping[str, Any],
    made: Collection[str] = (),
    flags: Mapping[str, str] | None = None,
    is_exclusive: bool = True,
    takes_16_bits: bool = True,
) -> str:
    """What to try about the worst layer of a file, of what was not tried yet.

    Args:
      layers: of the file.
      worst: one of them.
      made: the methods whose files the run has.
      flags: of the run, as a flagfile has them.
      is_exclusive: whether a class excludes all others; else no student learns them.
      takes_16_bits: whether all layers can have activations of 16 bits.
    """
    flags = {k: v for k, v in (flags or {}).items() if v not in _OFF}
    if worst["own_db"] >= _QUIET_DB:
        return "All layers are quiet. There is nothing to mend."
    if (bits := _kernel_bits(worst)) < 8:
        tries = _of_few_bits(layers, worst, made, flags, is_exclusive)
        return f"Its weights have {bits} bits. Try {tries}."
    if worst["bits"] < 8:
        return "Its outputs have few bits. Try --widths=W8A8."
    if worst["bits"] > 8:
        return (
            "Weights and outputs have the most bits there are: nothing else mends it."
        )
    left = [] if flags.get("activation_range") == "mse" else ["--activation_range=mse"]
    is_target = flags.get("target", _TARGET) == _TARGET  # not all others take as many
    if is_target and takes_16_bits:
        left.append("activations of 16 bits: --widths=W8A16")
    return f"Try {', or '.join(left)}." if left else "Nothing else mends it."


def _kernel_bits(layer: Mapping[str, Any]) -> int:
    """Bits of a layer's weights; they may be stored in more. 8 without weights."""
    # What an earlier version kept tells how they are stored alone.
    stored = layer["weights"].removeprefix("int")
    return int(layer.get("kernel_bits") or stored or 8)


def _of_few_bits(
    layers: Sequence[Mapping[str, Any]],
    worst: Mapping[str, Any],
    made: Collection[str],
    flags: Mapping[str, str],
    is_exclusive: bool,
) -> str:
    """What to try about a layer whose weights have few bits."""
    if size := next((name for name in SIZE_SETTINGS if flags.get(name)), None):
        return f"a larger --{size}"
    kernels = [layer for layer in layers if layer["weights"]]
    if "depthwise" in worst["kind"]:
        return "--num_bits_depthwise=8"
    if worst is kernels[0]:
        return "--num_bits_first=8"
    if worst is kernels[-1]:
        return "--num_bits_last=8"
    # The last of them does what the others do.
    *alone, both = METHODS[1:]
    left = [] if both in made else [name for name in alone if name not in made]
    if not left and both not in made:
        left = [both]
    if not is_exclusive:
        left = [name for name in left if name not in TRAINING]
    flag = "method" if "method" in flags else "methods"  # of tools/quantize.py
    widths = "W8A16" if worst["bits"] > 8 else "W8A8"
    return ", or ".join(
        [*([f"--{flag}={' or '.join(left)}"] if left else []), f"--widths={widths}"]
    )
