"""Says what a model is, and what each of its layers becomes, before any work.

    python tools/inspect_model.py model.keras

Prints a table of the layers, why a layer cannot be quantized if one cannot, how large
the int8 file will be, and the command that makes it. With --costs it also takes a few
real steps, to tell how long the quantization takes on this machine. Writes nothing. The
exit code is 1 if a layer cannot be quantized.
"""

import pathlib
import sys
import textwrap
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common, teacher_flags
from dfq_tf.compat import modules_absent
from dfq_tf.errors import ConfigError, UnsupportedLayerError
from dfq_tf.reports import costs, inspection
from dfq_tf.settings import ReconstructionConfig

FLAGS = common.FLAGS

_WIDTH = 100
# The widest that columns of the table become; the name of the layer takes what is left.
_WIDEST = {"class": 18, "output": 11, "parameters": 10, "in the int8 file": 34}
_LEFT = 14  # of the lines above and below the table


def heading(found: inspection.Inspection, path: str) -> list[str]:
    """What the model is."""
    height, width, channels = found.image_shape
    classes = str(found.num_outputs)
    gives = {"sigmoid": "sigmoid scores, of classes that do not exclude each other"}
    said = gives.get(found.gives, found.gives)
    if found.num_outputs == 1:
        classes, said = "2", f"{found.gives}, one score for the second of two classes"
    if found.is_unclear:
        said = (
            "NOT KNOWN: one score without a sigmoid. Pass --output=logits if it is a "
            "logit, above 0 for the second of two classes; a regression is no "
            "classifier"
        )
    return [
        line("model", path),
        line("format", "Keras 3" if found.is_keras3 else "Keras 2 (tf_keras)"),
        line("images", f"{height} x {width} pixels, channels: {channels}"),
        line("classes", classes),
        line("gives", said),
        line("input", feeding(found)),
    ]


def feeding(found: inspection.Inspection) -> str:
    """How pixels become the model's input."""
    if found.description is None:
        why = "neither the model nor a flag says how pixels become its input"
        on_top = ""
        if found.is_on_top:
            why = "its own preprocessing was not made for pixels"
            on_top = " --input_on_top"
        way = found.findings.get("feeding")
        if way is not None:
            why += (
                ". Its BatchNormalization was frozen, and tells only how it was fed "
                f"before that: {way}. Pass --feeding={way}{on_top} if all training fed "
                "it so"
            )
        return (
            f"NOT KNOWN: {why}. Pass the flags: --input_mean=0 --input_scale=1/255"
            f"{on_top} if it was trained on pixels / 255, or --input_mean=0 "
            "--input_scale=1 for raw pixels"
        )
    mean, scale = found.description.input_mean, found.description.input_scale
    means, scales = (", ".join(f"{v:.6g}" for v in values) for values in (mean, scale))
    return f"(pixel - mean) * scale, mean {means}, scale {scales}"


def table(rows: Sequence[inspection.Row]) -> list[str]:
    """A line for each layer."""
    cells = [("layer", *_WIDEST)]
    cells += [
        (
            row.name,
            row.kind,
            "x".join("?" if size is None else str(size) for size in row.shape),
            f"{row.parameters:,}" if row.parameters else "",
            row.becomes,
        )
        for row in rows
    ]
    longest = [max(len(cell[i]) for cell in cells) for i in range(len(cells[0]))]
    others = [min(pair) for pair in zip(longest[1:], _WIDEST.values())]
    widths = [min(longest[0], _WIDTH - sum(others) - len(others)), *others]
    rest = _WIDTH - sum(widths[:-1]) - len(others)
    lines = []
    for *left, becomes in cells:
        name, kind, shape, parameters = map(shortened, left, widths)
        text = f"{name:{widths[0]}} {kind:{widths[1]}} {shape:{widths[2]}} "
        text += f"{parameters:>{widths[3]}} {shortened(becomes, rest)}"
        lines.append(text.rstrip())
    return lines


def shortened(text: str, width: int) -> str:
    """A text of at most `width` characters: what it has in the middle goes.

    A reason is best known by its beginning, a name by both of its ends.
    """
    if len(text) <= width:
        return text
    tail = 0 if " " in text and not text.startswith("in ") else (width - 2) // 2
    return text[: width - 2 - tail] + ".." + (text[-tail:] if tail else "")


def line(name: str, text: str) -> str:
    """A name and what is said of it, on as many lines as it needs."""
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"{name:{_LEFT}}",
        subsequent_indent=" " * _LEFT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def sums(found: inspection.Inspection) -> list[str]:
    """What the whole model amounts to."""
    count = found.num_batch_normalizations
    normalizations = str(count)
    if not count:
        normalizations = (
            "0. WARNING: without a BatchNormalization, nothing is known of the "
            "training images: 1/f noise stands for them; expect less"
        )
    partly = " (without the layers that cannot be read)" if found.problems else ""
    lines = [
        line("BN layers", normalizations),
        line("parameters", f"{found.parameters:,}"),
        line("MACs", f"{found.multiply_accumulates:,} for one image{partly}"),
    ]
    if found.file_bytes is not None:
        lines.append(line("int8 file", f"about {found.file_bytes / 1000:,.0f} kB"))
    return lines


def problems(rows: Sequence[inspection.Row]) -> list[str]:
    """Which layers cannot be quantized, and why, with nothing left out."""
    lines = ["Cannot be quantized:"]
    for row in rows:
        text = f"{row.name} ({row.kind}): {row.problem}"
        lines.append(
            textwrap.fill(
                text,
                _WIDTH,
                initial_indent="  ",
                subsequent_indent="    ",
                break_on_hyphens=False,
            )
        )
    return lines


def duration(seconds: float) -> str:
    """Such as 'about 25 minutes'."""
    if seconds < 90:
        return f"about {max(10, round(seconds, -1)):.0f} seconds"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} minutes"
    return f"about {seconds / 3600:.1f} hours"


def expectation(cost: costs.Costs, is_exclusive: bool) -> list[str]:
    """Time and memory, and which methods the command makes that is printed below.

    Args:
      cost: was measured.
      is_exclusive: whether a class excludes all others; else no student learns them.
    """
    most = duration(60 * ReconstructionConfig().rec_minutes)
    trained = f"{duration(cost.df_qat_kd_seconds)}, those of DF-Q in it"
    made = (
        "DF-Q by the command below, and DF-REC if less than 98 % agreement is expected "
        "of DF-Q; DF-QAT-KD with --methods=df_qat_kd alone"
    )
    if not is_exclusive:
        trained = "not possible: classes do not exclude each other"
        made = "DF-Q by the command below; DF-REC with --methods=df_rec alone"
    return [
        line("DF-Q", duration(cost.df_q_seconds)),
        line("DF-REC", f"{most} more for the steps of its blocks, at the most"),
        line("DF-QAT-KD", trained),
        line(
            "memory",
            f"about {cost.memory_bytes / 2**30:.1f} GiB at batch_size "
            f"{cost.batch_size}",
        ),
        line(
            "",
            "measured in a few small steps, of which those of DF-QAT-KD need the most "
            f"memory, cores at hand: {cost.cores}; with the default settings",
        ),
        line("made", made),
    ]


def following(found: inspection.Inspection) -> list[str]:
    """What to type next."""
    said = {"teacher": FLAGS.teacher, **teacher_flags.given(), **found.findings}
    text = "Next:"
    if found.description is None and "feeding" in found.findings:
        text = (
            f"Next, if all training fed it {found.findings['feeding']} (see 'input' "
            "above; put in what it was trained on):"
        )
    elif found.description is None:
        text = (
            "Next, if the model was trained on pixels / 255 (see 'input' above; put in "
            "what it was trained on):"
        )
        said |= {"input_mean": ["0"], "input_scale": ["1/255"]}
        if found.is_on_top:
            said["input_on_top"] = True
    if found.is_unclear:
        said["output"] = "logits"
    command = common.as_command("run", said)
    return ["", "All layers can be quantized.", *textwrap.wrap(text, _WIDTH), command]


def main() -> None:
    """Reads, reports, and times if that is asked for."""
    if not FLAGS.teacher:
        called = common.command_of("inspect_model")
        raise ConfigError(f"teacher is empty; name a model file: {called} model.keras")
    # Keras 3 would take longer to import these than all the rest; nothing here draws.
    reading = common.stage(f"reading of {FLAGS.teacher}", common.LONG_READING)
    with modules_absent("matplotlib", "sklearn"), reading:
        found = inspection.inspect(FLAGS.teacher, **teacher_flags.arguments())
    print("\n".join(heading(found, FLAGS.teacher)))
    print()
    print("\n".join(table(found.rows)))
    print()
    print("\n".join(sums(found)), flush=True)
    if found.classifier is None:
        print()
        print("\n".join(problems(found.problems)))
        count = len(found.problems)
        raise UnsupportedLayerError(
            f"{count} of {len(found.rows)} layers cannot be quantized; see above"
        )
    if FLAGS.costs:
        with common.stage("steps to measure"):
            measured = costs.measure(found.classifier)
        is_exclusive = found.classifier.description.is_exclusive
        print("\n".join(expectation(measured, is_exclusive)))
    print("\n".join(following(found)))


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Teacher",
        "teacher",
        str,
        None,
        "Model file (.keras or .h5); its name alone, without --teacher, will do.",
    )
    teacher_flags.define()
    common.define(
        "Costs",
        "costs",
        bool,
        False,
        "Take a few training steps, to tell how long the quantization will take and "
        "how much memory.",
    )
    common.define_progress_flag()


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
