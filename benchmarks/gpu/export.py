"""Writes a distillation's steps as XLA programs, for a GPU without TensorFlow.

    python benchmarks/gpu/export.py --teacher=MODEL --student=wrn_16_1 --out=FOLDER

TensorFlow lowers each step of the recipe `budget` to HLO; benchmarks/gpu/run.py runs it
through JAX's runtime, which is all that it needs. A step takes (seed, step); everything
else that it reads or changes is a variable, which becomes a parameter and, where it
changes, a result. `--read=FILE` writes a student that came back to --out as .keras.
"""

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl import app, flags

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.distillation import budget, observe, pool
from dfq_tf.importing import load_classifier
from dfq_tf.settings import IMAGE_KINDS, BudgetConfig
from dfq_tf.training import Learner, with_precision

FLAGS = flags.FLAGS


def write(
    folder: pathlib.Path,
    steps: Mapping[str, Callable[[tf.Tensor], Mapping[str, tf.Tensor]]],
    variables: Mapping[str, tf.Variable],
    generator_steps: int,
) -> None:
    """Writes STEP.hlo for each step, and program.json, which says what goes in.

    Args:
      folder: is made; beside it, in `arrays`, are the values, named by their content,
        so that programs share them.
      steps: each a function of (seed, step), int32 (2,), that gives scalars.
      variables: name -> variable, for those that are to be known by name.
      generator_steps: of each batch, by which the start's rate goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    arrays = folder.parent / "arrays"
    arrays.mkdir(exist_ok=True)
    names = {id(v.handle): name for name, v in variables.items()}
    values: dict[str, Any] = {}
    program: dict[str, Any] = {
        "generator_steps": generator_steps,
        "steps": {},
        "values": values,
    }
    alive = []  # the names hang on ids, which those that are gone would give away

    def known(captured: tf.Tensor) -> str:
        name = names.setdefault(id(captured), f"unnamed/{len(names)}")
        if name not in values:
            values[name] = _kept(_value(captured), arrays)
        return name

    for name, step in steps.items():
        compiled = tf.function(step, jit_compile=True, autograph=False)
        specification = tf.TensorSpec((2,), tf.int32)
        concrete = compiled.get_concrete_function(specification)
        alive.append(concrete)
        parameters = [known(captured) for captured in concrete.captured_inputs]
        hlo = compiled.experimental_get_compiler_ir(specification)(
            stage="hlo_serialized"
        )
        (folder / f"{name}.hlo").write_bytes(hlo)
        program["steps"][name] = {
            "parameters": parameters,
            "measurements": sorted(concrete.structured_outputs),
        }
    (folder / "program.json").write_text(json.dumps(program, indent=1))


def _value(captured: tf.Tensor) -> np.ndarray:
    """Of a constant, or of the variable whose handle it is."""
    if captured.dtype != tf.resource:
        return captured.numpy()
    (kind,) = captured._handle_data.shape_and_type
    return tf.raw_ops.ReadVariableOp(resource=captured, dtype=kind.dtype).numpy()


def _kept(value: np.ndarray, folder: pathlib.Path) -> dict[str, Any]:
    """Shape, type and file of a value; it has no file if it is all 0."""
    about = {"shape": value.shape, "dtype": str(value.dtype)}
    if value.size > 1 and not value.any():
        return about
    content = value.tobytes()
    name = hashlib.sha256(content + repr(about).encode()).hexdigest()[:16]
    # As bytes: .npy has no bfloat16.
    np.savez_compressed(folder / name, value=np.frombuffer(content, np.uint8))
    return {**about, "file": name}


def training(config: BudgetConfig, precision: str) -> budget.Training:
    """Networks, images and optimizers as `dfq_tf.distill` makes them."""
    teacher = load_classifier(FLAGS.teacher)
    context = Context(config, FLAGS.seed, precision, None, None, False)
    keras.utils.set_random_seed(FLAGS.seed)
    network = models.build_model(
        FLAGS.student, teacher.image_shape, teacher.num_classes
    )
    description = dataclasses.replace(teacher.description, output="logits")
    student = Learner(with_precision(network, precision), description)
    return budget.Training(observe(teacher, precision), [student], context)


def _evaluation(
    student: Learner, path: str
) -> Callable[[tf.Tensor], dict[str, tf.Tensor]]:
    """A step that finds the accuracy on labelled images, and changes nothing."""
    with np.load(path) as file:
        images, labels = tf.constant(file["images"]), tf.constant(file["labels"])

    def evaluate(seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        del seed_and_step
        right = []
        for part, wanted in zip(tf.split(images, 4), tf.split(labels, 4)):
            logits = student.logits(tf.cast(part, tf.float32), training=False)
            found = tf.argmax(logits, -1, wanted.dtype)
            right.append(tf.cast(found == wanted, tf.float32))
        return {"accuracy": tf.reduce_mean(tf.stack(right))}

    return evaluate


def main(arguments: list[str]) -> None:
    """Writes a program, or reads a student back."""
    del arguments
    config = BudgetConfig(
        batch_size=FLAGS.batch_size,
        generator_steps=FLAGS.generator_steps,
        student_learning_rate=0.1 * FLAGS.batch_size / 128,
        bank_images=FLAGS.bank_images,
        # So that programs have them; each run sets its own values.
        photographs_share=1e-6,
        adversarial_weight=1.0,
    )
    pool._OTHERS = FLAGS.others
    made = training(config, FLAGS.precision)
    student = made.students[0]
    if FLAGS.read:
        with np.load(FLAGS.read) as values:
            for i, variable in enumerate(student.model.variables):
                variable.assign(values[f"student/{i}"])
        model = with_precision(student.model, "float32")
        Learner(model, student.description).save(FLAGS.out)
        return
    (synthesizer,) = made.synthesizers

    def keep(seed_and_step: tf.Tensor) -> dict[str, tf.Tensor]:
        made.bank.add(images=synthesizer.keep(seed_and_step))
        return {}

    steps = {
        "begin": synthesizer.begin,
        "improve": synthesizer.improve,
        "hand_over": lambda _: synthesizer.hand_over(made.answers.store),
        "keep": keep,
        "answer": made.answers.refresh,
        "student": made.student_step,
    }
    if FLAGS.images:
        steps["evaluate"] = _evaluation(student, FLAGS.images)
    variables = {
        **{f"student/{i}": v for i, v in enumerate(student.model.variables)},
        **{f"{kind}_share": made.answers.shares[kind] for kind in IMAGE_KINDS},
        "adversarial_weight": synthesizer.adversarial_weight,
        "total_student_steps": made.total_student_steps,
        "bank": made.bank.variables[0],
    }
    write(pathlib.Path(FLAGS.out), steps, variables, config.generator_steps)


if __name__ == "__main__":
    flags.DEFINE_string("teacher", None, "Its file.", required=True)
    flags.DEFINE_string("student", "wrn_16_1", "The network that learns.")
    flags.DEFINE_string("out", None, "Folder of the program, or file.", required=True)
    flags.DEFINE_string("read", None, "A student of benchmarks/gpu/run.py, .npz.")
    flags.DEFINE_string("images", "", "Labelled images on which runs are measured.")
    flags.DEFINE_integer("others", 4096, "Images of each kind of formula.")
    flags.DEFINE_integer("batch_size", 128, "Images per step.")
    flags.DEFINE_integer(
        "generator_steps", BudgetConfig.generator_steps, "Steps for each batch."
    )
    flags.DEFINE_integer("bank_images", 40_000, "Images that the bank holds.")
    flags.DEFINE_integer("seed", 0, "Of weights and images.")
    flags.DEFINE_string("precision", "bfloat16", "Of all networks.")
    app.run(main)
