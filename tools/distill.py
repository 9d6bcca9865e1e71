"""Distils a trained classifier into another network, using no data.

    python tools/distill.py --teacher=teacher.keras --student=wrn_16_1

Generators make images by what the teacher knows of its training data, and look for such
on which the students still differ from it. Writes WORKDIR/student.keras, a float32
model like the teacher's file, WORKDIR/student.png, generated images,
WORKDIR/distillation_curve.csv, and WORKDIR/report.html, the page of the run.
"""

import dataclasses
import pathlib
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tools import common, quantize, teacher_flags
from dfq_tf import api, models
from dfq_tf.compat import keras
from dfq_tf.distillation import check_devices, phases, plan_of_steps, with_batch_size
from dfq_tf.distillation.batch_size import step_bytes_per_image
from dfq_tf.errors import ConfigError
from dfq_tf.graph import Classifier, description_path
from dfq_tf.importing import as_classifier, load_classifier
from dfq_tf.reports import facts, page, pictures
from dfq_tf.reports.workdir import Workdir
from dfq_tf.settings import (
    AUTO,
    PHASE_SETTINGS,
    POOL_SETTINGS,
    RECIPES,
    BudgetConfig,
    DistillationConfig,
    RunConfig,
    check_value,
    recipe,
    recipe_settings,
)
from dfq_tf.training import Learner, check_batch, seconds_in_steps
from dfq_tf.with_data import datasets
from dfq_tf.with_data.datasets import accuracy

FLAGS = common.FLAGS

# Test images from which the curve's accuracy is taken.
_CURVE_IMAGES = 2000
# Settings that belong to this phase alone. Some have no flag: they are the recipe's.
_SHARED = [
    f.name
    for f in dataclasses.fields(DistillationConfig)
    if f.name not in POOL_SETTINGS  # of the quantized student, or of the budget
]
_OF_ROUNDS = [n for n in _SHARED if n in (*PHASE_SETTINGS, "num_students")]
_OF_BUDGET = [f.name for f in dataclasses.fields(BudgetConfig) if f.name not in _SHARED]
_LENGTH = {"minutes", "steps"}
DISTILLATION_SETTINGS = (*_OF_BUDGET, *_OF_ROUNDS)


def define_distillation_flags() -> None:
    """Defines the flags of this phase, but those of `define_generator_flags`."""
    group = "Distillation to another network"
    common.define(
        group,
        "student",
        str,
        None,
        f"Network that learns from the teacher: {'; '.join(models.MODEL_NAMES)}.",
    )
    common.define(
        group,
        "recipe",
        str,
        "budget",
        "Settings for what no flag is given for: budget ends in --minutes; bank keeps "
        "past images and takes most steps on them; paper is the loop of Choi et al. "
        f"2020. One of: {', '.join(RECIPES)}.",
    )
    values = {name: dataclasses.asdict(recipe(name)) for name in RECIPES}
    common.define_config(group, BudgetConfig, _OF_BUDGET, recipes=values)
    common.define_config(group, DistillationConfig, _OF_ROUNDS, recipes=values)


def distillation_flags() -> list[str]:
    """Names of the flags of this phase alone, but for --student and --recipe."""
    return [name for name in DISTILLATION_SETTINGS if name in FLAGS]


def distillation_config() -> DistillationConfig | BudgetConfig:
    """The settings of this phase: the recipe's, unless a flag says otherwise.

    Raises:
      ConfigError: there is no such recipe, it has no such setting, or a value is
        outside its limits or without effect.
    """
    for field in dataclasses.fields(DistillationConfig):
        if field.name in FLAGS and FLAGS[field.name].value is not None:
            check_value(field.name, FLAGS[field.name].value, field.metadata)
    own = {field.name for field in dataclasses.fields(recipe(FLAGS.recipe))}
    # What says how long `budget` takes is for it alone: others have --rounds.
    names = ({*own, *DISTILLATION_SETTINGS} & set(FLAGS)) - (_LENGTH - own)
    given = {name: FLAGS[name].value for name in sorted(names)}
    config = recipe(FLAGS.recipe, **{k: v for k, v in given.items() if v is not None})
    config.check_effects()
    return config


def check_flags(recipe_alone: bool = False) -> None:
    """Refuses, before any work, what the recipe cannot do.

    Args:
      recipe_alone: whether no other phase takes the flags that all of them share.

    Raises:
      ConfigError: see `distillation_config`; or --student is no network, several
        devices are to train, or flags are given that the recipe does not have.

    Warns:
      UserWarning: a length is given that another recipe has.
    """
    if not models.is_model_name(FLAGS.student):
        raise ConfigError(
            f"student is {FLAGS.student!r}, no network that the project builds: "
            f"{'; '.join(models.MODEL_NAMES)}. In Python, dfq_tf.distill takes any"
        )
    config = distillation_config()
    if not isinstance(config, BudgetConfig):
        # No error: a flagfile may have them, behind which another recipe is named.
        for name in sorted(_LENGTH):
            if FLAGS[name].value:
                warnings.warn(
                    f"{name} is {FLAGS[name].value:g}, of which the recipe "
                    f"{FLAGS.recipe} takes no notice: it has "
                    f"--rounds={config.rounds}, or fewer if --max_minutes says so",
                    stacklevel=2,
                )
        return
    check_devices(common.strategy())
    shared = ({*_SHARED} & {*FLAGS}) - {*DISTILLATION_SETTINGS}
    for name in sorted(shared) if recipe_alone else ():
        if not hasattr(config, name) and FLAGS[name].value != FLAGS[name].default:
            raise ConfigError(
                f"{name} is {FLAGS[name].value}, but the recipe budget has no such "
                "setting; leave it out, or take another recipe, such as --recipe=bank"
            )


def check_minutes(teacher: Classifier) -> None:
    """Refuses --minutes that are too few for one round, before the teacher is trained.

    Steps on this machine tell, for which random weights will do. That takes a minute.

    Args:
      teacher: the network that is to be trained.

    Raises:
      ConfigError: they are too few.
    """
    config = distillation_config()
    if not isinstance(config, BudgetConfig) or config.steps:
        return
    common.say(f"Are {config.minutes:g} minutes enough for a round? Some steps tell")
    student = new_learner(teacher)
    config = with_batch_size(config, teacher, student, common.strategy())
    api.check_minutes(teacher, student, common.context(config, None))


def resolved_flags() -> dict[str, Any]:
    """Name -> value of the flags whose default is the recipe's; None if it has none."""
    config = dataclasses.asdict(distillation_config())
    own = recipe_settings(FLAGS.recipe)
    found = {name: config[name] for name in distillation_flags() if name in own}
    return {**dict.fromkeys(_LENGTH), **found}


def new_learner(teacher: Classifier) -> Learner:
    """The network that --student names, for the teacher's images; its weights random.

    Raises:
      ConfigError: there is no such network.
    """
    keras.utils.set_random_seed(FLAGS.seed)
    shape, classes = teacher.image_shape, teacher.num_classes
    return Learner(
        models.build_model(FLAGS.student, shape, classes, "student"),
        dataclasses.replace(teacher.description, output="logits"),
    )


def distilled_student(
    teacher: Classifier, dataset: datasets.Dataset | None, workdir: Workdir
) -> Classifier:
    """Distils, or reads the student if an earlier run made it.

    Args:
      teacher: the trained classifier.
      dataset: where there is one, the curve has the accuracy on test images too;
        nothing is chosen by it.
      workdir: keeps student.keras, checkpoints and metrics.
    """
    path = workdir.path / "student.keras"
    if common.is_made(path, description_path(path)):
        return load_classifier(path)
    run, strategy = common.config_from_flags(RunConfig), common.strategy()
    student = new_learner(teacher)
    config = with_batch_size(distillation_config(), teacher, student, strategy)
    common.say(plan(teacher, student, config))
    # An earlier call may have been interrupted.
    names = ("warm_up", *phases.run_names("distillation"))
    earlier = seconds_in_steps(workdir.path, *names)
    began = time.monotonic() - earlier
    result = api.distill(
        teacher,
        student,
        config=config,
        seed=run.seed,
        precision=run.precision,
        strategy=strategy,
        directory=workdir.path,
        evaluate=_accuracy_on(dataset) if dataset else None,
        show_progress=FLAGS.progress,
    )
    seconds = time.monotonic() - began
    images = result.images
    with common.stage("images for the page"):
        pictures.write_preview(images, workdir.path, "student")
        generated = facts.generated(images, teacher.scores(images), teacher.description)
        facts.add(workdir.path, "student", generated=generated)
    workdir.add_metrics(
        student_training={
            "seconds": round(seconds, 1),
            "agreements_on_generated_images": list(result.agreements),
            "held_out_images": result.num_held_out,
            "batch_size": config.batch_size,
            **result.measurements,
        },
        **quantize.warm_up_of(workdir, quantize.STUDENT),
    )
    result.student.save(path)
    return as_classifier(result.student)


def plan(
    teacher: Classifier, student: Learner, config: DistillationConfig | BudgetConfig
) -> str:
    """One line: what is to be done, where, in how much memory, and how long if known.

    Args:
      teacher: the trained classifier.
      student: what learns from it.
      config: has a number for the batch size.
    """
    if isinstance(config, DistillationConfig):
        work = (
            f"up to {config.warm_up_steps:,} steps of warm-up, then {config.rounds:,} "
            f"rounds of {config.generator_steps:,} generator steps and "
            f"{config.student_steps:,} student steps"
        )
        if config.max_minutes:
            work += f", at most {config.max_minutes:g} minutes"
    elif config.steps:
        steps = plan_of_steps(config).total_student_steps
        work = f"{steps:,} student steps"
        if steps > config.steps:
            work += f" (--steps={config.steps}, in whole rounds)"
    else:
        work = f"as many steps as fit into {config.minutes:g} minutes"
    size = config.batch_size
    memory = common.step_memory(
        size, size * step_bytes_per_image(teacher, student, config)
    )
    return (
        f"Distilling into {FLAGS.student}, with generated images, recipe "
        f"{FLAGS.recipe}: {work}; on {common.device()}; {memory}"
    )


def _accuracy_on(
    dataset: datasets.Dataset,
) -> Callable[[Learner], Mapping[str, float]]:
    test = dataset.load("test")
    images, labels = test.images[:_CURVE_IMAGES], test.labels[:_CURVE_IMAGES]
    return lambda student: {"accuracy": accuracy(student.scores(images), labels)}


def main() -> None:
    """Distils and reports."""
    for name in ("teacher", "student"):
        if not FLAGS[name].value:
            raise ConfigError(f"{name} is empty; name it with --{name}")
    common.config_from_flags(RunConfig)
    check_flags(recipe_alone=True)
    config, strategy = distillation_config(), common.strategy()
    if config.batch_size != AUTO:
        check_batch(strategy, config.batch_size, config.num_generators)
    common.check_workdir(resolved=resolved_flags())
    teacher = teacher_flags.read_teacher(FLAGS.teacher)
    api.check_trains(teacher)
    new_learner(teacher)  # refuses a wrong name before anything is written
    teacher, dataset = teacher_flags.with_dataset(teacher)
    workdir = common.open_workdir(
        resolved=resolved_flags(), makes=[page.NAME, "student.keras"]
    )
    student = distilled_student(teacher, dataset, workdir)
    best = max(workdir.metrics()["student_training"]["agreements_on_generated_images"])
    print(f"Agreement with the teacher on generated images: {100 * best:.1f} %")
    if dataset:
        with common.stage("evaluation of the student"):
            test = dataset.load("test")
            right = accuracy(student.scores(test.images), test.labels)
        workdir.add_metrics(student_accuracy=right, student_images=len(test.labels))
        print(f"Student: {100 * right:.2f} % of {len(test.labels)} test images")
    print(f"The page of the run: {page.write(workdir.path)}")
    path = workdir.path / "student.keras"
    said = {name: FLAGS[name].value for name in ("dataset", "data_dir", "archive")}
    said["workdir"] = str(workdir.path / "file")
    print(f"Wrote {path}; its TFLite file is made by")
    print(f"  {common.as_command('run', {'teacher': str(path), **said})}")


def define_flags() -> None:
    """Defines the flags of this tool."""
    common.define_dataset_flags(None)
    common.define(
        "Teacher", "teacher", pathlib.Path, None, "Model file (.keras or .h5)."
    )
    teacher_flags.define()
    quantize.define_generator_flags()
    define_distillation_flags()
    common.define_run_flags("runs/distill")


if __name__ == "__main__":
    define_flags()
    common.run(main, __doc__, positional="teacher")
