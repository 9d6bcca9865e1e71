"""Files: written whole, under a temporary name first; told apart by content."""

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from dfq_tf.errors import ConfigError

try:
    import fcntl
except ImportError:  # of Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

# What TensorFlow takes for patterns in the names of checkpoints.
_OF_PATTERNS = "*?[\\"

# Endings of model files. Their content says which format it is.
MODEL_SUFFIXES = (".keras", ".h5", ".hdf5", ".model")


def expanded(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path as it is meant: ~ at its beginning is the home folder, as in a shell."""
    return pathlib.Path(os.path.expanduser(path))


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a temporary path; what is written there becomes `path` at the end.

    If the block raises, `path` stays as it was and nothing is left behind. The
    folder is made if it is not there.
    """
    path = expanded(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays: Keras chooses the format by it.
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file, in UTF-8 whatever the locale is, replacing it whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def nearest_there(path: str | os.PathLike[str]) -> pathlib.Path:
    """What a path names if it is there, else the nearest above it that is, absolute."""
    place = pathlib.Path(path).absolute()
    return next(p for p in (place, *place.parents) if os.path.lexists(p))


def may_write_in(folder: str | os.PathLike[str]) -> bool:
    """Whether files may be made in a folder that is there."""
    return os.access(os.fspath(folder), os.W_OK | os.X_OK)


def locked(folder: str | os.PathLike[str]) -> int | None:
    """Keeps a folder for this process until it is `released`, or the process ends.

    Args:
      folder: that is there.

    Returns:
      The descriptor; None where the file system has no locks, or no such folder.

    Raises:
      BlockingIOError: somebody else has it.
    """
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return descriptor


def released(descriptor: int) -> None:
    """Gives back what `locked` keeps, even if a forked process has it open too.

    Args:
      descriptor: from `locked`.
    """
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def check_no_pattern(name: str, folder: str) -> None:
    """Raises ConfigError, naming the setting, if checkpoints cannot be kept there.

    Where TensorFlow takes a name for a pattern, it finds no checkpoint, never deletes
    old ones, or takes those of another folder.
    """
    found = [each for each in _OF_PATTERNS if each in folder]
    if found:
        raise ConfigError(
            f"{name} is {folder!r}, with {found[0]} in it, which TensorFlow takes for "
            "a pattern: it would not find its checkpoints there, and keep all of them. "
            f"Name a folder without any of {' '.join(_OF_PATTERNS)}"
        )


def check_text(name: str, value: str) -> None:
    """Raises ConfigError, naming the setting, if a text cannot be written as UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{name} is {value!r}, which is no valid UTF-8 text; write it in UTF-8"
        ) from error


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file in UTF-8; a byte-order mark at its beginning is no text.

    Raises:
      OSError: it cannot be read.
      UnicodeDecodeError: it is no such file; this is a ValueError.
    """
    return expanded(path).read_text(encoding="utf-8-sig")


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads what a run has written down by name, in JSON; empty if the file is absent.

    Raises:
      OSError: it cannot be read.
      ConfigError: it is damaged.
    """
    if not os.path.exists(path):
        return {}
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(found, dict):
        raise damaged(path, "it has no names")
    return found


def damaged(path: str | os.PathLike[str], what: object) -> ConfigError:
    """The error to raise where a file of a run is not as the run has written it.

    Args:
      path: of the file.
      what: is wrong with it.
    """
    return ConfigError(
        f"{os.fspath(path)} is not as a run has written it ({what}). Delete the folder "
        "of that run, or name another one (--workdir)"
    )


def is_of_keras(fields: Any) -> bool:
    """Whether JSON is the architecture of a model, as Keras writes it.

    Args:
      fields: what `json.loads` gave.
    """
    return isinstance(fields, dict) and {"class_name", "config"} <= fields.keys()


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a binary file, replacing it whole."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def digest(*paths: str | os.PathLike[str]) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal."""
    contents = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                contents.update(block)
    return contents.hexdigest()
