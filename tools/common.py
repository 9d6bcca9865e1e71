"""What the tools share: flags made from the package's settings, and one way to fail.

Only the tools read FLAGS; the package takes plain arguments.
"""

import contextlib
import dataclasses
import errno
import functools
import gc
import hashlib
import json
import os
import pathlib
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np
from absl import app, flags, logging

from dfq_tf import photographs
from dfq_tf.compat import gpu_names, native_output_hidden, own_defaults, tf
from dfq_tf.context import WORTH_A_LINE, Context, lines_alone
from dfq_tf.context import stage as shown_stage
from dfq_tf.errors import ConfigError, DfqError, WorkdirError
from dfq_tf.files import check_no_pattern, digest, locked, released
from dfq_tf.graph import description_path
from dfq_tf.importing import MODEL_SUFFIXES, files_of
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUTO,
    SIZE_SETTINGS,
    SOURCES,
    BudgetConfig,
    Checked,
    DistillationConfig,
    FileConfig,
    RunConfig,
    TeacherConfig,
    check_value,
    own_first,
)
from dfq_tf.training import devices, resolve_precision
from dfq_tf.with_data import datasets
from dfq_tf_command import SUBCOMMANDS

# What has been imported stays: Python need not look there for garbage.
gc.freeze()

FLAGS = flags.FLAGS
T = TypeVar("T", bound=Checked)
S = TypeVar("S", DistillationConfig, BudgetConfig, TeacherConfig)

# A file that takes so many seconds to read gets a line that says so.
LONG_READING = 5.0
# Flags that do not change a run's results: a run may continue with others. Where data
# lies is written down all the same, without which the run could not be repeated.
_PLACES = {"data_dir", "archive"}
_UNWRITTEN = {"workdir", "progress", "quiet"}
# What another tool, or a setting in Python, is called -> what it may be called here.
_MEANT = {
    "num_bits_activation": "widths",
    "num_bits_weight": "widths",
    "widths": "compare_widths",
}
# The folders that this run has claimed, and descriptors that keep others away.
_claimed: list[Workdir] = []
_held: dict[pathlib.Path, int] = {}
# Heading in the help -> name of each flag -> whether --help shows it.
_groups: dict[str, dict[str, bool]] = {}

# Of the flags that are made of settings, those that --help shows; --helpfull shows all.
# Which network, where from, where to, and for how long: the rest is seldom changed.
_FIRST = {
    "seed",
    "precision",
    "teacher_epochs",
    "batch_size",
    "warm_up_steps",
    "minutes",
    "qat_rounds",
    "images",
    "calibration_images",
    "file_output",
    "input_type",
    "output_type",
}
# Of the flags that are made of settings, those that name a file or folder.
_PATHS = {"images", "kernel_costs"}
# Settings without flags: nobody varies them, or another flag says the same (--widths).
# They are arguments in Python.
_AWAY = {
    "noise_dim",
    "synthesis_learning_rate",
    "latent_learning_rate",
    "student_optimizer",
    "student_momentum",
    "qat_generator_steps",
    "qat_student_optimizer",
    "qat_student_momentum",
    "qat_student_weight_decay",
    "qat_temperature",
    "qat_pool_images",
    "qat_pool_batch_size",
    "qat_answer_uses",
    "qat_noise_share",
    "qat_mixup_share",
    "qat_cutmix_share",
    "qat_bank_images",
    "qat_share_images",
    "learn_ranges",
    "qat_learn_ranges",
    "qat_adversarial_ramp_steps",
    "activation_percentile",
    "num_bits_weight",
    "num_bits_activation",
}

# Whether this file is part of the command dfq-tf, and not of a source tree.
_IS_INSTALLED = pathlib.Path(__file__).parents[1].name == "dfq_tf_command"

# What some editors write before the first line of a file.
_MARK = "\ufeff"

# Exit code, as shells give it to a program that SIGPIPE has ended.
_READER_GONE = 128 + 13


class _CountOrAuto(flags.ArgumentParser):
    """Reads a positive integer, or the word auto, which becomes AUTO."""

    syntactic_help = "a positive integer, or auto"

    def parse(self, argument: Any) -> int:
        """Raises ValueError for anything else: AUTO has no number for users."""
        if argument in ("auto", AUTO):  # a default is no text
            return AUTO
        if not re.fullmatch("[0-9]*[1-9][0-9]*", str(argument)):
            raise ValueError("it must be an integer of at least 1, or auto")
        return int(argument)

    def flag_type(self) -> str:
        """What absl calls the kind of value."""
        return "int or auto"


class _AutoSerializer(flags.ArgumentSerializer):
    def serialize(self, value: int) -> str:
        return "auto" if value == AUTO else str(value)


class _TextParser(flags.ArgumentParser):
    """Reads a text; ~ at its beginning is the home folder, which no shell fills in."""

    def parse(self, argument: Any) -> str:
        """The text as it is meant."""
        return os.path.expanduser(argument)

    def flag_type(self) -> str:
        """What absl calls the kind of value."""
        return "string"


class _PathParser(_TextParser):
    """Reads the name of a file or folder, whose content counts."""


def _define_text(name: str, default: Any, help: str) -> None:
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_TextParser(), name, default, help, serializer=serializer)


def _define_path(name: str, default: Any, help: str) -> None:
    serializer = flags.ArgumentSerializer()
    flags.DEFINE(_PathParser(), name, default, help, serializer=serializer)


def _define_count_or_auto(name: str, default: Any, help: str) -> None:
    flags.DEFINE(_CountOrAuto(), name, default, help, serializer=_AutoSerializer())


_DEFINE_BY_TYPE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: _define_text,
    pathlib.Path: _define_path,
    list: flags.DEFINE_list,
    _CountOrAuto: _define_count_or_auto,
}


def define(
    group: str, name: str, kind: type, default: Any, help: str, *, first: bool = True
) -> None:
    """Defines one flag.

    Args:
      group: heading in the help.
      name: of the flag.
      kind: of its value; a path for a text that names a file or folder to be read.
      default: its value where it is not given.
      help: what it is.
      first: whether --help shows it, and not --helpfull alone.
    """
    _DEFINE_BY_TYPE[kind](name, default, help)
    _groups.setdefault(group, {})[name] = first


def define_config(
    group: str,
    config_class: type,
    names: Collection[str] | None = None,
    *,
    prefix: str = "",
    recipes: Mapping[str, Mapping[str, Any]] | None = None,
    first: bool = False,
) -> None:
    """Defines a flag for the fields of a settings class, with their defaults.

    Args:
      group: heading in the help.
      config_class: its fields are made by `settings.setting`.
      names: of the fields; by default all. Some have no flag in any case.
      prefix: of the flags' names.
      recipes: what decides where a flag is not given, instead of the default of the
        class: name -> all settings that it has. The flags' own default is then None.
      first: whether --help shows all of them.
    """
    for field in own_first(config_class):
        name = prefix + field.name
        if name in _AWAY or (names is not None and field.name not in names):
            continue
        help = field.metadata["help"]
        if field.metadata["choices"]:
            help += f" One of: {', '.join(field.metadata['choices'])}."
        default = field.default
        if recipes is not None:
            values = {k: v[field.name] for k, v in recipes.items() if field.name in v}
            help += f" Default: {', '.join(f'{v} ({k})' for k, v in values.items())}."
            default = None
        kind: type = _CountOrAuto if field.metadata["auto"] else type(field.default)
        kind = pathlib.Path if name in _PATHS else kind
        define(group, name, kind, default, help, first=first or name in _FIRST)


def config_from_flags(
    config_class: type[T],
    prefix: str = "",
    own: Collection[str] = (),
    make: Callable[..., T] | None = None,
) -> T:
    """Builds a settings object from the flags that `define_config` made of it.

    Args:
      config_class: a settings class.
      prefix: of the flags of `own`.
      own: the settings whose flags have the prefix; where there is no such flag, the
        default of the class holds.
      make: makes the settings of those that have a value; by default the class does.

    Raises:
      ConfigError: a value is outside its limits, or without effect.
    """
    values = {}
    for field in dataclasses.fields(config_class):  # type: ignore[arg-type]
        flag = prefix + field.name if field.name in own else field.name
        if flag not in FLAGS or FLAGS[flag].value is None:
            continue  # it has none, or is of another tool, or up to a recipe
        values[field.name] = FLAGS[flag].value
        check_value(flag, values[field.name], field.metadata)
    try:
        config = (make or config_class)(**values)
        config.check_effects()
        return config
    except ConfigError as error:
        if not own:
            raise
        # A contradiction between settings: the message is to name their flags.
        names = rf"\b({'|'.join(own)})\b"
        raise ConfigError(re.sub(names, rf"{prefix}\1", str(error))) from error


def define_file_flags() -> None:
    """Defines what a TFLite file takes and gives, and what it says of itself."""
    names = {field.name for field in dataclasses.fields(FileConfig)}
    define_config("TFLite file", FileConfig, names - {*SIZE_SETTINGS})


def file_config(model_name: str) -> FileConfig:
    """What the flags of `define_file_flags` say.

    Args:
      model_name: where --model_name does not say it.

    Raises:
      ConfigError: a flag is wrong.
    """
    config = config_from_flags(FileConfig)
    for name, value in vars(config).items():
        if isinstance(value, str) and len(value.splitlines()) > 1:
            raise ConfigError(
                f"{name} is {value!r}, more than one line; give one, which a flagfile "
                "can hold"
            )
    return dataclasses.replace(config, model_name=config.model_name or model_name)


def context(
    settings: S, directory: pathlib.Path | None, *, on_one_device: bool = False
) -> Context[S]:
    """How the run runs, as the flags say.

    Args:
      settings: of the training, with a number for the batch size.
      directory: for checkpoints and scalars; None keeps nothing.
      on_one_device: whether --distribute is left out of account.

    Raises:
      ConfigError: a flag is wrong.
    """
    run = config_from_flags(RunConfig)
    return Context(
        settings,
        run.seed,
        resolve_precision(run.precision),
        None if on_one_device else strategy(),
        directory,
        FLAGS.progress,
    )


def define_run_flags(workdir: str | None, *, trains: bool = True) -> None:
    """Defines the flags of every run.

    Args:
      workdir: default of --workdir; None where it follows from another flag.
      trains: whether there is any training, by a seed and on devices to choose.
    """
    define("Run", "workdir", str, workdir, "Folder for all that the run writes.")
    if trains:
        define_config("Run", RunConfig)
    define_progress_flag()


def define_progress_flag() -> None:
    """Defines what turns bars and lines of stages off."""
    help = "Show a progress bar for each stage."
    define("Run", "progress", bool, True, help, first=False)


def define_dataset_flags(default: str | None) -> None:
    """Defines which labelled data is used, and where it lies."""
    define(
        "Data",
        "dataset",
        str,
        default,
        "Labelled images, to train a teacher and to measure accuracy; never seen by "
        f"the quantization. One of: {', '.join(datasets.dataset_names())}.",
    )
    define(
        "Data",
        "data_dir",
        str,
        None,
        "Folder of TensorFlow Datasets (default: ~/tensorflow_datasets).",
    )
    define(
        "Data",
        "archive",
        str,
        None,
        "A copy of tiny-imagenet-200.zip, where there is no network to download it.",
        first=False,
    )


def dataset_from_flags() -> datasets.Dataset:
    """The data set that --dataset names.

    Raises:
      DataError: see `datasets.open_dataset`.
    """
    return datasets.open_dataset(FLAGS.dataset, FLAGS.data_dir, FLAGS.archive)


@functools.cache
def strategy() -> tf.distribute.Strategy:
    """The devices that --distribute names, made at the first call.

    That comes before any network is read: see `devices.make_strategy`.

    Raises:
      ConfigError: TF_CONFIG is not as it must be.
    """
    name = config_from_flags(RunConfig).distribute
    if name == "multi_worker":
        say("Waiting for the other workers that TF_CONFIG names")
    return devices.make_strategy(name)


def say(text: str) -> None:
    """Prints what is neither a result nor an error, unless --quiet is given."""
    if "quiet" not in FLAGS or not FLAGS.quiet:
        print(text, flush=True)


def stage(
    name: str, least_seconds: float = WORTH_A_LINE
) -> contextlib.AbstractContextManager[None]:
    """A stage that is shown, see `context.stage`, unless flags say that none is."""
    is_shown = "progress" not in FLAGS or FLAGS.progress
    return shown_stage(name, is_shown, least_seconds)


def is_made(*paths: pathlib.Path) -> bool:
    """Whether an earlier run made these files; with several workers, all of theirs.

    All workers then train, or none does.
    """
    return agreed(all(path.exists() for path in paths))


def agreed(is_so: bool) -> bool:
    """Whether something is so on all workers, which must all ask."""
    return bool(devices.of_all_workers([is_so], strategy=strategy()).all())


def floats(name: str, values: list[str]) -> tuple[float, ...]:
    """The numbers in a list flag, each written as 0.5 or 1/255.

    Raises:
      ConfigError: a value is not a number.
    """
    try:
        return tuple(_number(value) for value in values)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{name} is {','.join(values)!r}; give numbers with commas between them"
        ) from error


def _number(value: str) -> float:
    numerator, *denominator = value.split("/", 1)
    return float(numerator) / (float(denominator[0]) if denominator else 1.0)


def check_workdir(
    free: Collection[str] = (), resolved: Mapping[str, Any] | None = None
) -> None:
    """Refuses, before any work, a folder that holds a run with other flags or files.

    `open_workdir` does so too, when all is read; nothing is written here.

    Args:
      free: as of `open_workdir`.
      resolved: as of `open_workdir`.

    Raises:
      ConfigError: as of `open_workdir`.
      WorkdirError: see `Workdir`; or another run is at work there.
    """
    path = _workdir_path(None)
    if path.is_dir():
        _hold(path)
        Workdir(path, *_claim(free, resolved), writes=False)


def open_workdir(
    default: pathlib.Path | None = None,
    free: Collection[str] = (),
    *,
    resolved: Mapping[str, Any] | None = None,
    replaces: bool = False,
    makes: Collection[str] = (),
) -> Workdir:
    """The folder that --workdir names, claimed for the flags of this run.

    With several workers, each has one: the first that one, and the others worker_1,
    worker_2 and so on in it.

    Args:
      default: the folder where --workdir is not given.
      free: flags that a later run there may change, and that workers may differ in.
      resolved: name -> value of flags whose default depends on another flag.
      replaces: whether a later run with other flags may take it, see `Workdir`.
      makes: names of files that this run makes, see `Workdir`.

    Raises:
      ConfigError: the workers have not the same flags, or other files; or the folder's
        name is empty, or one that TensorFlow takes for a pattern.
      WorkdirError: see `Workdir`; or another run is at work there.
    """
    claim = _claim(free, resolved)
    if "distribute" in FLAGS:
        same = {n: text for n, text in claim.settings.items() if n not in claim.free}
        _check_same_on_all_workers(same, claim.digests)
    path = _workdir_path(default)
    command = command_of(pathlib.Path(sys.argv[0]).stem)
    with contextlib.suppress(OSError):  # `Workdir` says what hinders it
        path.mkdir(parents=True, exist_ok=True)
    _hold(path)
    workdir = Workdir(path, *claim, replaces, command, makes)
    _claimed.append(workdir)
    return workdir


class _Claim(NamedTuple):
    """Arguments of `Workdir`, in its order."""

    settings: dict[str, str]
    free: set[str]
    defaults: dict[str, str]
    digests: dict[str, str]


def _claim(free: Collection[str], resolved: Mapping[str, Any] | None) -> _Claim:
    """What this run is known by; see `open_workdir`."""
    names = {name for group in _groups.values() for name in group} - _UNWRITTEN
    values = {name: FLAGS[name].value for name in names}
    # Where a recipe decides, what it gives is the default.
    left_out = {n: v for n, v in (resolved or {}).items() if FLAGS[n].value is None}
    defaults = {name: FLAGS[name].default for name in names}
    return _Claim(
        _as_texts({**values, **(resolved or {})}),
        # What a recipe has not has no effect; an earlier version wrote it down.
        {*free, *_PLACES, *(n for n, v in (resolved or {}).items() if v is None)},
        _as_texts({**defaults, **left_out}),
        _digests(values),
    )


def _workdir_path(default: pathlib.Path | None) -> pathlib.Path:
    """The folder of this worker.

    Raises:
      ConfigError: --workdir is empty, as a variable of the shell that is not set; or
        TensorFlow takes it for a pattern.
    """
    if FLAGS.workdir == "":
        raise ConfigError("workdir is empty; name a folder with --workdir")
    path = pathlib.Path(FLAGS.workdir or default or ".")
    if "distribute" not in FLAGS:
        return path
    check_no_pattern("workdir", str(path))  # it trains, and keeps checkpoints
    index = devices.worker_index(strategy())
    return path / f"worker_{index}" if index else path


def _hold(folder: pathlib.Path) -> None:
    """Keeps a folder for this run until it ends, however it ends.

    Where the file system has no locks, nothing is kept.

    Raises:
      WorkdirError: another run has it.
    """
    key = folder.resolve()
    if key in _held:
        return
    try:
        descriptor = locked(folder)
    except BlockingIOError as error:
        raise WorkdirError(
            f"workdir is {str(folder)!r}, where another run is at work. Wait until it "
            "has ended, or name another folder with --workdir"
        ) from error
    if descriptor is not None:
        _held[key] = descriptor


def _digests(values: Mapping[str, Any]) -> dict[str, str]:
    """Flag -> digest of the files that its value names; other values have none."""
    found = {}
    for name, value in values.items():
        is_path = value and isinstance(FLAGS[name].parser, _PathParser)
        if not is_path or value in SOURCES:
            continue
        # A network's name is none either, where a folder of pictures is called so.
        is_read = name == "images" or files_of(pathlib.Path(value))
        if is_read and (paths := _files_of(value)):
            with stage(f"digest of {value}", LONG_READING):
                found[name] = digest(*paths)
    return found


def _files_of(path: str) -> list[pathlib.Path]:
    """The files whose contents a flag's value stands for.

    A model has all of its own, its description among them.
    """
    paths = files_of(pathlib.Path(path))
    if not paths and os.path.isdir(path):
        return photographs.files_in(pathlib.Path(path))
    is_model = path.endswith(MODEL_SUFFIXES) or os.path.isdir(path)
    if paths and is_model and description_path(path).is_file():
        paths.append(description_path(path))
    return paths


def _check_same_on_all_workers(
    settings: Mapping[str, str], digests: Mapping[str, str]
) -> None:
    text = json.dumps([settings, digests], sort_keys=True)
    number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)
    numbers = devices.of_all_workers([number], strategy=strategy())
    if len(set(numbers[:, 0])) > 1:
        others = np.flatnonzero(numbers[:, 0] != numbers[0, 0])
        raise ConfigError(
            f"the workers {', '.join(map(str, others))} have other flags than worker "
            "0, or files of other contents. Give all of them the same, but for "
            + ", ".join(f"--{name}" for name in sorted(_PLACES | _UNWRITTEN))
        )


def _as_texts(values: Mapping[str, Any]) -> dict[str, str]:
    """Values of flags as texts, by name, without those that have none."""
    return {
        name: _as_text(FLAGS[name], value)
        for name, value in values.items()
        if value not in (None, [])
    }


def _as_text(flag: flags.Flag, value: Any) -> str:
    """A value as it is written behind a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return flag.serializer.serialize(value)


def as_command(tool: str, values: Mapping[str, Any]) -> str:
    """A command line that can be pasted into a shell.

    Args:
      tool: name of one in tools/.
      values: of its flags, by their names; they are flags of this tool too.
    """
    given = [f"--{name}={text}" for name, text in _as_texts(values).items()]
    return " ".join([command_of(tool), *map(shlex.quote, given)])


def step_memory(num_images: int, num_bytes: int) -> str:
    """How much memory a training takes, for its plan.

    Args:
      num_images: of its largest step.
      num_bytes: that the step takes.
    """
    return (
        f"a step of {num_images} images takes about {num_bytes / 2**20:,.0f} MiB, and "
        "the program 1 to 2 GiB"
    )


def device() -> str:
    """What the run computes on, for its plan."""
    gpus = gpu_names()
    if not gpus:
        return f"the CPU ({os.cpu_count()} cores), as TensorFlow sees no GPU"
    return ", ".join(gpus[:1] if FLAGS.distribute == "none" else gpus)


def command_of(tool: str) -> str:
    """How a user calls a tool in the current folder, as a shell takes it.

    By dfq-tf where that was installed, else by the Python that runs now.

    Args:
      tool: name of one in tools/.
    """
    names = {tool: name for name, tool in SUBCOMMANDS.items()}
    if _IS_INSTALLED and tool in names:
        return f"dfq-tf {names[tool]}"
    path = pathlib.Path(__file__).with_name(f"{tool}.py")
    return shlex.join(map(_shortest, [sys.executable or "python", str(path)]))


def _shortest(path: str) -> str:
    """A path from the current folder, where that is shorter and is seen to be one."""
    relative = os.path.relpath(path)
    return relative if os.sep in relative and len(relative) < len(path) else path


def run(
    main: Callable[[], None],
    description: str,
    *,
    positional: str | None = None,
    several: bool = False,
) -> None:
    """Runs a tool: parses the flags, calls `main`, and turns our errors into exits.

    Exit codes: 0 done, 1 the work failed, 2 a flag is wrong, 130 interrupted, 141 who
    read the output has gone, 143 ended by SIGTERM.

    Args:
      main: the work.
      description: for --help.
      positional: the flag whose value may also be given alone, without its name.
      several: whether that is a list, each of whose values is an argument of its own.
    """
    if "quiet" not in FLAGS:
        help = "Say nothing but results, warnings, errors and a line for each stage."
        define("Run", "quiet", bool, False, help)

    def parse(argv: list[str]) -> list[str]:
        asked = {"--help", "-h", "-help", "--helpfull"}.intersection(argv[1:])
        if asked:
            with _ends_with_its_reader():
                print(_help(description, is_full="--helpfull" in asked))
            sys.exit(0)
        rest = _parsed(argv)
        if positional and len(rest) > 1:
            # What a flagfile says gives way, as to a flag behind it.
            name = re.compile(f"--?{positional}(=|$)")
            if any(map(name.match, argv[1:])):
                _fail(f"{positional} is given twice: {rest[1]!r} is another one", 2)
            if several:
                FLAGS[positional].value, rest = rest[1:], rest[:1]
            else:
                FLAGS[positional].value = FLAGS[positional].parser.parse(rest.pop(1))
        if len(rest) > 1:
            _fail(
                f"unexpected argument {rest[1]!r}; flags begin with --. See --help", 2
            )
        return rest

    def run_main(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)
        warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
        with (
            own_defaults(),
            _ends_with_its_reader(),
            lines_alone(FLAGS.quiet),
            _ends_in_order(),
        ):
            _run(main)

    with native_output_hidden():  # TensorFlow looks for GPUs, and logs that it did
        tf.config.list_physical_devices()
    app.run(run_main, flags_parser=parse)


def _parsed(argv: list[str]) -> list[str]:
    """Reads the flags, those of flagfiles too; gives the arguments that are none.

    A flagfile has flags and comments alone.
    """
    wanted = "Save it as UTF-8 without a byte-order mark (BOM)"
    rest = argv
    try:
        rest = FLAGS(argv)
    except UnicodeDecodeError as error:
        _fail(f"a flagfile is no text in UTF-8: {error}. {wanted}", 2)
    except flags.Error as error:
        meant = _MEANT.get(getattr(error, "flagname", ""), "")
        if meant in FLAGS:
            error = f"{error.args[0].split('. Did')[0]}. It is --{meant} here"
        _fail(f"{error}. See --help", 2)
    for text in rest:
        if text in argv or text.startswith(("#", "//")):  # an indented comment
            continue
        if text.startswith(_MARK):
            line = text.removeprefix(_MARK)
            _fail(
                f"a flagfile has a byte-order mark before its first line, {line!r}. "
                f"{wanted}",
                2,
            )
        _fail(
            f"a flagfile has the line {text!r}, which is no flag; flags begin with --, "
            "as --seed=1, and comments with #",
            2,
        )
    return [text for text in rest if text in argv]


def _run(main: Callable[[], None]) -> None:
    """Calls `main`, and turns errors that a user can mend into exits.

    A flag may turn out to be wrong, or be seen to be, when its folder is claimed
    already. If nothing was made there when the tool fails or is interrupted, the folder
    is free again for the same command with that flag mended.
    """
    _claimed.clear()
    try:
        try:
            main()
            if "distribute" in FLAGS:
                agreed(True)  # the others would miss a worker that ends before them
        except BaseException:
            for workdir in _claimed:
                workdir.release()
            raise
    except DfqError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:
        raise
    except (OSError, tf.errors.OpError) as error:
        if not isinstance(error, OSError) and not _is_of_files(error):
            raise
        _fail(
            f"a file cannot be read or written: {_first_line(error)}. When that is "
            "mended, the same command continues",
            1,
        )
    except KeyboardInterrupt as error:
        what, code = "interrupted", 130
        if isinstance(error, _Terminated):
            what, code = "ended by SIGTERM", 143
        _fail(f"{what}; give the same command again to continue", code)
    finally:
        while _held:
            released(_held.popitem()[1])


def _is_of_files(error: BaseException) -> bool:
    """Whether an error of TensorFlow is one of the disk, as its writers raise them."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG)
    return any(os.strerror(number) in str(error) for number in numbers)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextlib.contextmanager
def _ends_in_order() -> Iterator[None]:
    """Lets SIGTERM, which `kill` and containers send, end a tool as Ctrl+C does."""

    def end(*_: object) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _ends_with_its_reader() -> Iterator[None]:
    """Ends the program quietly when nobody reads its output any more, as with `head`.

    What the block prints is written at its end, where that may be told.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # What is still to be written would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(_READER_GONE)


def _fail(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(exit_code)


def _help(description: str, is_full: bool) -> str:
    called = re.sub(
        r"python tools/(\w+)\.py", lambda found: command_of(found[1]), description
    )
    lines = [called.strip(), ""]
    for group, names in _groups.items():
        shown = [name for name, is_first in names.items() if is_first or is_full]
        if not shown:
            continue
        lines.append(f"{group}:")
        for name in shown:
            flag = FLAGS[name]
            default = ""
            if flag.default not in (None, []):
                default = f" (default: {_as_text(flag, flag.default)})"
            lines.append(f"  --{name}{default}")
            lines.append(flags.text_wrap(flag.help, 80, "      "))
        lines.append("")
    lines.append("--flagfile=FILE reads flags from a file, one per line.")
    hidden = sum(
        not is_first for names in _groups.values() for is_first in names.values()
    )
    if hidden and not is_full:
        lines.append(f"--helpfull shows {hidden} more flags.")
    return "\n".join(lines)
