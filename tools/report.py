"""Makes the page of a run again, or one that puts several runs side by side.

    python tools/report.py runs/run
    python tools/report.py runs/run runs/second_seed --out=both.html

Of one workdir, of tools/run.py, tools/quantize.py or tools/distill.py, it writes
WORKDIR/report.html: one file that needs no network. Nothing is measured anew.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common
from dfq_tf.errors import ConfigError
from dfq_tf.files import expanded, may_write_in, nearest_there, write_text
from dfq_tf.reports import page, record

FLAGS = common.FLAGS


def main() -> None:
    """Reads and writes."""
    folders = [*map(expanded, FLAGS.workdirs)]
    if not folders:
        called = common.command_of("report")
        raise ConfigError(f"workdirs is empty; name a run's folder: {called} runs/run")
    if FLAGS.out and pathlib.Path(FLAGS.out).suffix != ".html":
        raise ConfigError(
            f"out is {FLAGS.out!r}; the page is an HTML file, so its name must end in "
            ".html"
        )
    runs = [record.read(folder) for folder in folders]
    if len(runs) == 1:
        text, path = page.of_run(runs[0]), folders[0] / page.NAME
    else:
        text, path = page.comparison(runs), pathlib.Path("comparison.html")
    path = pathlib.Path(FLAGS.out or path)
    folder = nearest_there(path.parent)
    if not folder.is_dir() or not may_write_in(folder):
        raise ConfigError(
            f"out is {str(path)!r}, but {folder} cannot be written; name a file in "
            "another folder with --out"
        )
    write_text(path, text)
    print(f"Wrote {path}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define(
        "Page",
        "workdirs",
        list,
        [],
        "Folders of runs, also given alone, without --workdirs: one for its page, "
        "several for a page that compares them.",
    )
    common.define(
        "Page",
        "out",
        str,
        None,
        "The page, a .html file (default: report.html in the workdir, or "
        "comparison.html here).",
    )


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="workdirs", several=True)
