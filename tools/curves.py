"""Draws curves of distillations over the minutes that they took, in one plot.

    python tools/curves.py --curves=paper:a/curve.csv,bank:b/curve.csv --out=curves.png

A distillation writes such a table, WORKDIR/distillation_curve.csv; tools/compare.py
writes one for each training, WORKDIR/WIDTHS/METHOD_curve.csv. --column names a column.
"""

import csv
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common
from dfq_tf.errors import ConfigError
from dfq_tf.files import expanded
from dfq_tf.reports import plots
from dfq_tf.reports.record import NO_CURVES, columns

FLAGS = common.FLAGS


def read(path: pathlib.Path) -> dict[str, list[float]]:
    """Column -> values of a curve's table.

    Raises:
      ConfigError: there is no such file, or it is not such a table.
    """
    try:
        table = columns(path)
        if not table:
            raise ValueError("it has no row of numbers")
    except (OSError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(
            f"curves has {str(path)!r}, which is not a table of numbers: {error!r}. "
            "Name a table that a run has written, such as "
            "runs/distill/distillation_curve.csv"
        ) from error
    if "minutes" not in table:
        raise ConfigError(f"curves has {str(path)!r}, which has no column minutes")
    return table


def draw(
    curves: dict[str, dict[str, list[float]]], column: str, path: pathlib.Path
) -> None:
    """Draws one line per curve.

    Args:
      curves: label -> table, see `read`.
      column: what is drawn, a share in [0, 1].
      path: of the picture.

    Raises:
      ConfigError: a curve has no such column, or it is no share.
    """
    if column in NO_CURVES:
        raise ConfigError(
            f"column is {column!r}, which is no share; name a column of shares, such "
            "as accuracy or agreement_on_generated_images"
        )
    for label, table in curves.items():
        if column not in table:
            raise ConfigError(
                f"column is {column!r}, but {label} has {', '.join(table)}"
            )
    figure, axes = plots.pyplot().subplots(figsize=(8, 5))
    for label, table in curves.items():
        values = [100 * value for value in table[column]]
        axes.plot(table["minutes"], values, "o-", label=label)
    axes.set_xlabel("minutes of training steps")
    axes.set_ylabel(f"{column.replace('_', ' ')} in %")
    axes.grid(alpha=0.3)
    axes.legend()
    plots.save(figure, path)


def main() -> None:
    """Reads and draws."""
    if not FLAGS.curves:
        raise ConfigError("curves is empty; give LABEL:FILE, with commas between them")
    if pathlib.Path(FLAGS.out).suffix != ".png":
        raise ConfigError(
            f"out is {FLAGS.out!r}; the picture is a PNG file, so its name must end "
            "in .png"
        )
    curves: dict[str, dict[str, list[float]]] = {}
    for item in FLAGS.curves:
        label, separator, path = item.partition(":")
        if not separator:
            raise ConfigError(f"curves has {item!r}; it must be LABEL:FILE")
        if label in curves:
            raise ConfigError(
                f"curves has the label {label!r} twice; give each curve another one"
            )
        curves[label] = read(expanded(path))
    draw(curves, FLAGS.column, pathlib.Path(FLAGS.out))
    print(f"Wrote {FLAGS.out}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    group = "Curves"
    common.define(group, "curves", list, [], "LABEL:FILE of each curve.")
    common.define(
        group,
        "column",
        str,
        "accuracy",
        "What is drawn: a column of all tables. A distillation's has "
        "agreement_on_generated_images, and accuracy with --dataset; one of "
        "tools/compare.py has agreement_on_held_out_images, and accuracy and agreement "
        "with --dataset.",
    )
    common.define(group, "out", str, "curves.png", "The picture, a .png file.")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__)
