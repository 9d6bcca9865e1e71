"""Runs the tools as a user meets them: in a process of their own, or in this one.

    result = run_in_process("run", "--batch_size=0")
    result.returncode, result.stdout, result.stderr

A process costs seconds, for it imports TensorFlow; a call in this one milliseconds. It
runs the same file as `__main__`, with flags, streams and loggers as they are in a new
process, and leaves this process as it was, but for the seeds of TensorFlow and Keras.
What depends on those, or on a TensorFlow that has computed nothing yet, and what is
killed or interrupted from outside, needs `run_tool`; so does what takes long.
"""

import contextlib
import copy
import functools
import logging
import os
import pathlib
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from unittest import mock

import numpy as np
from absl import app, flags
from absl import logging as absl_logging

from tools import common
from dfq_tf.compat import tf

ROOT = pathlib.Path(__file__).resolve().parents[1]

# absl defines these once; in a run whose flags are undone, they would be lost.
app.define_help_flags()


def run_tool(
    tool: str | os.PathLike, *args: str, timeout: float = 300
) -> subprocess.CompletedProcess:
    """Runs a tool in a new process.

    Args:
      tool: name of one in tools/, or the path of another.
      args: the command line's flags.
      timeout: in seconds.
    """
    return subprocess.run(
        [sys.executable, _path(tool), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


def run_in_process(tool: str | os.PathLike, *args: str) -> subprocess.CompletedProcess:
    """Runs a tool in this process; arguments and result are those of `run_tool`."""
    path = str(_path(tool))
    command = [path, *args]
    with _captured("stdout") as stdout, _captured("stderr") as stderr:
        with _new_state(command):
            try:
                runpy.run_path(path, run_name="__main__")
                code = 0
            except SystemExit as exit:
                code = _exit_code(exit.code)
            except Exception as error:
                # A process shows the frames from the tool's own on.
                frames = error.__traceback__
                while frames and frames.tb_frame.f_code.co_filename != path:
                    frames = frames.tb_next
                traceback.print_exception(type(error), error, frames)
                code = 1
    return subprocess.CompletedProcess(
        [sys.executable, *command], code, "".join(stdout), "".join(stderr)
    )


def _path(tool: str | os.PathLike) -> pathlib.Path:
    return ROOT / f"tools/{tool}.py" if isinstance(tool, str) else pathlib.Path(tool)


def _exit_code(code: object) -> int:
    if code is None:
        return 0
    if isinstance(code, int):
        return code & 0xFF
    print(code, file=sys.stderr)  # as Python does
    return 1


@contextlib.contextmanager
def _captured(name: str) -> Iterator[list[str]]:
    """Collects what goes to a stream, past Python too; the list is filled at the end.

    The descriptor is that of a process, as `compat.native_output_hidden` works on it.
    """
    number = {"stdout": 1, "stderr": 2}[name]
    texts: list[str] = []
    getattr(sys, name).flush()
    saved = os.dup(number)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), number)
        buffering = 1 if name == "stderr" else -1
        stream = os.fdopen(number, "w", buffering, closefd=False)
        try:
            with mock.patch.object(sys, name, stream):
                yield texts
        finally:
            stream.flush()
            os.dup2(saved, number)
            os.close(saved)
            file.seek(0)
            texts.append(file.read())


@contextlib.contextmanager
def _new_state(argv: list[str]) -> Iterator[None]:
    """What a new process has of its own, as far as the tools can change it."""
    folder = os.getcwd()
    seeds = random.getstate(), np.random.get_state()
    strategy = functools.cache(common.strategy.__wrapped__)
    try:
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "path", [os.path.dirname(argv[0]), *sys.path]),
            mock.patch.dict(os.environ),
            mock.patch.dict(common._groups, clear=True),
            mock.patch.object(common, "strategy", strategy),
            # Sets the process up once, with its name and its handler of crashes.
            mock.patch.object(app._run_init, "done", True),
            _new_loggers(),
            _new_flags(),  # the new --verbosity sets the loggers' levels
            _new_warnings(),
        ):
            os.chdir(ROOT)
            yield
    finally:
        os.chdir(folder)
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])


@contextlib.contextmanager
def _new_flags() -> Iterator[None]:
    """Only the flags of libraries are defined, and none is set.

    The tools and absl share one FLAGS, which they have by reference: it stays, and its
    content is another one. Flags of before are not touched.
    """
    new = flags.FlagValues()
    for module, defined in common.FLAGS.flags_by_module_dict().items():
        # Of a test that defined a tool's flags, and of absl's for tests.
        if not module.startswith(("tools.", "absl.testing.")):
            for flag in defined:
                flags.DEFINE_flag(copy.deepcopy(flag), new, module)
    with mock.patch.dict(vars(common.FLAGS), vars(new), clear=True):
        for name in common.FLAGS:
            common.FLAGS[name].unparse()
        yield


@contextlib.contextmanager
def _new_loggers() -> Iterator[None]:
    """Loggers write to the streams of now, and not to those of the tests."""
    own = absl_logging.get_absl_handler().python_handler
    tensorflow, absl = tf.get_logger(), absl_logging.get_absl_logger()
    levels = {each: each.level for each in (logging.root, tensorflow, absl)}
    # TensorFlow makes one unless the root had any, as it has in tests.
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    before = own.setStream(sys.stderr)
    try:
        with (
            mock.patch.object(logging.root, "handlers", []),
            mock.patch.object(tensorflow, "handlers", [handler]),
        ):
            tensorflow.setLevel(logging.NOTSET)
            absl_logging.use_absl_handler()
            yield
    finally:
        own.setStream(before or sys.stderr)
        for each, level in levels.items():
            each.setLevel(level)


@contextlib.contextmanager
def _new_warnings() -> Iterator[None]:
    """Warnings go to stderr under Python's filters, where tests collect them."""

    def show(message, category, filename, lineno, file=None, line=None):
        print(
            warnings.formatwarning(message, category, filename, lineno, line),
            end="",
            file=file or sys.stderr,
        )

    with (
        warnings.catch_warnings(),
        mock.patch.object(warnings, "formatwarning", warnings.formatwarning),
    ):
        warnings.showwarning = show
        warnings.resetwarnings()
        for hidden in (
            DeprecationWarning,
            PendingDeprecationWarning,
            ImportWarning,
            ResourceWarning,
        ):
            warnings.simplefilter("ignore", hidden)
        warnings.filterwarnings("default", "", DeprecationWarning, "__main__")
        yield
