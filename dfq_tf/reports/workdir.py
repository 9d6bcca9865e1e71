"""A working directory: who it belongs to, what was run in it, what came out.

flags.cfg      the settings, as a flagfile that repeats the run
run.json       the seed, the versions, the machine, the digests of the files read
metrics.json   the results
checkpoints/, tensorboard/   written by the loop
"""

import contextlib
import json
import os
import pathlib
import platform
import shutil
from collections.abc import Collection, Mapping
from importlib import metadata
from typing import Any

from dfq_tf.compat import gpu_names
from dfq_tf.errors import WorkdirError
from dfq_tf.files import damaged, may_write_in, read_object, read_text, write_text

_PACKAGES = (
    "tensorflow",
    "tf_keras",
    "tensorflow-model-optimization",
    "ai-edge-litert",
    "numpy",
)
# The files of every workdir.
FLAGS, RUN, METRICS = "flags.cfg", "run.json", "metrics.json"
# Settings of earlier versions -> the value with which they did nothing.
_GONE = {"leaves_share": "0.0"}


class Workdir:
    """A folder that one configuration owns.

    Args:
      path: the folder, made if it is not there.
      settings: name -> value of all flags, as text.
      free: names of settings that a later run there may change: they choose what is
        made, and not what comes out.
      defaults: name -> value of flags that are not given. A setting that the folder's
        run did not have, as an earlier version had no such flag, counts as this one.
      digests: name -> `files.digest` of what the setting of that name reads. If the
        folder's run did not keep it, the content counts as unchanged; if it kept the
        same, what is read may lie elsewhere now, under the name that it had.
      replaces: whether a run with other flags takes the folder all the same, and
        removes `metrics.json`: for what is made anew in moments.
      command: how the tool that runs is called, without its flags.
      makes: names of files that this run makes; those of a run that was interrupted are
        taken as they are.
      writes: whether the run takes the folder; else it is only looked at.

    Raises:
      WorkdirError: the folder cannot be written, or was made with other settings, or
        from files of the same names and other contents.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, str],
        free: Collection[str] = (),
        defaults: Mapping[str, str] | None = None,
        digests: Mapping[str, str] | None = None,
        replaces: bool = False,
        command: str = "",
        makes: Collection[str] = (),
        writes: bool = True,
    ) -> None:
        self._command, self._makes = command, makes
        self.path = pathlib.Path(path)
        try:
            if writes:
                self.path.mkdir(parents=True, exist_ok=True)
                if not may_write_in(self.path):
                    raise PermissionError("no permission to write there")
            changes = self._changes(settings, free, defaults or {}, digests or {})
            if changes and not replaces:
                raise WorkdirError(
                    f"workdir is {str(self.path)!r}, which holds a run with other "
                    "flags or files. Name another folder with --workdir, or delete "
                    "this one. What differs:\n" + "\n".join(changes)
                )
            if writes:
                self._claim(settings, digests or {}, is_other=bool(changes))
        except OSError as error:
            raise WorkdirError(
                f"workdir is {str(path)!r}, which cannot be written: {error}. Name "
                "another folder with --workdir"
            ) from error
        except ValueError as error:  # of a damaged file: it says the way out
            raise WorkdirError(f"workdir is {str(path)!r}: {error}") from error

    def _changes(
        self,
        settings: Mapping[str, str],
        free: Collection[str],
        defaults: Mapping[str, str],
        digests: Mapping[str, str],
    ) -> list[str]:
        """What differs from the run that the folder holds, a line each.

        Raises:
          WorkdirError: the folder has files of something else.
          ConfigError: a file of the run is damaged.
        """
        path = self.path / FLAGS
        # That metrics can be read is known before the work.
        found = {name: read_object(self.path / name) for name in (RUN, METRICS)}
        if not path.exists():
            for name in (*found, *self._makes):
                if (self.path / name).exists():
                    raise WorkdirError(
                        f"workdir is {str(self.path)!r}, which has {name} of something "
                        f"else: there is no {FLAGS} beside it. Name another folder "
                        "with --workdir"
                    )
            return []
        try:
            before = parse_flagfile(read_text(path))
        except UnicodeDecodeError as error:
            raise damaged(path, error) from error
        before = {name: v for name, v in before.items() if _GONE.get(name) != v}
        added = settings.keys() - before.keys()
        before |= {name: defaults[name] for name in added & defaults.keys()}
        known = found[RUN].get("digests", {})
        # By another name of its file, a model would be called otherwise from here on.
        moved = {
            name
            for name, value in digests.items()
            if name in before
            and known.get(name) == value
            and pathlib.Path(before[name]).name == pathlib.Path(settings[name]).name
        }
        changes = [
            f"  --{name}: {before.get(name, '(absent)')} -> "
            f"{settings.get(name, '(absent)')}"
            for name in sorted((before.keys() | settings.keys()) - set(free) - moved)
            if before.get(name) != settings.get(name)
        ]
        return changes + [
            f"  --{name}: {settings[name]}, whose content has changed since"
            for name in sorted(digests)
            if before.get(name) == settings[name]
            and known.get(name, digests[name]) != digests[name]
        ]

    def _claim(
        self, settings: Mapping[str, str], digests: Mapping[str, str], is_other: bool
    ) -> None:
        """Writes down whose folder it is, in place of another run if there is one."""
        if is_other:
            (self.path / METRICS).unlink(missing_ok=True)
        before = {} if is_other else read_object(self.path / RUN)
        lines = [f"--{name}={value}\n" for name, value in sorted(settings.items())]
        write_text(self.path / FLAGS, "".join(lines))
        kept = {
            "command": self._command,
            "seed": settings.get("seed"),
            **_places(before),
            "digests": dict(digests),
        }
        write_text(self.path / RUN, json.dumps(kept, indent=2) + "\n")

    def release(self) -> None:
        """Gives the folder up if nothing was made there: other flags may take it.

        A training that has saved no checkpoint has made nothing, and leaves nothing.
        A folder that cannot be read or written any more stays as it is.
        """
        with contextlib.suppress(OSError):
            begun = [FLAGS, RUN, "distillation_plan.json"]
            for name in (each.name for each in self.path.glob("checkpoints/*")):
                begun += [f"checkpoints/{name}/identity.json", f"{name}_curve.csv"]
                begun += [f"tensorboard/{name}/*"]
            known = {path for each in begun for path in self.path.glob(each)}
            folders = [self.path / name for name in ("checkpoints", "tensorboard")]
            found = {*self.path.iterdir()}.difference(folders)
            for folder in folders:
                found |= {p for p in folder.rglob("*") if p.is_symlink() or p.is_file()}
            if found <= known:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                # What still has its flags is of the same command, if this is ended too.
                for path in sorted(known, key=lambda each: each.name == FLAGS):
                    path.unlink(missing_ok=True)

    def metrics(self) -> dict[str, Any]:
        """What `metrics.json` holds; empty if it is not there."""
        return read_object(self.path / METRICS)

    def add_metrics(self, **metrics: Any) -> None:
        """Adds to `metrics.json`, replacing values of the same name."""
        merged = {**self.metrics(), **metrics}
        write_text(self.path / METRICS, json.dumps(merged, indent=2) + "\n")


def _places(before: Mapping[str, Any]) -> dict[str, Any]:
    """On what the run has begun, and on what else later calls have gone on.

    Args:
      before: what `RUN` held; empty for a new run.
    """
    names = ("python", "machine", "versions")
    machine = [platform.machine(), f"{os.cpu_count()} cores", *gpu_names()]
    now = {
        "python": platform.python_version(),
        "machine": ", ".join(machine),
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    first = {name: before.get(name, now[name]) for name in names}
    later = list(before.get("later", []))
    if now not in (first, *later):
        later.append(now)
    return {**first, "later": later} if later else first


def _version(package: str) -> str:
    """Of a package; another one may stand for it, as tensorflow-cpu for tensorflow."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not known)"


def parse_flagfile(text: str) -> dict[str, str]:
    """Reads a flagfile, in the form of `FLAGS` or written by hand.

    Args:
      text: of the file; a line that does not begin with -- is no flag.

    Returns:
      Name -> value of each flag; --name is 'true', --noname 'false'.
    """
    found = {}
    for line in text.splitlines():
        if line[:2] == "--":
            name, is_given, value = line[2:].partition("=")
            if not is_given:
                value = "false" if name.startswith("no") else "true"
                name = name.removeprefix("no")
            found[name] = value
    return found
