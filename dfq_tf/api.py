"""The method: a trained classifier in, an integer TFLite model out, no data.

Or first, with `distill`, into a smaller network, and that one quantized.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf import photographs
from dfq_tf.compat import is_of_layers, keras, own_defaults, tf, uses_onednn
from dfq_tf.context import Context, stage
from dfq_tf.distillation import (
    Budget,
    ObservedTeacher,
    Rounds,
    Sampler,
    Source,
    WarmedUp,
    check_source,
    choose_source,
    held_out_count,
    observe,
    phases,
    photographs_share,
    spread,
    synthesized,
    warmed_up,
    with_batch_size,
    with_photographs,
)
from dfq_tf.errors import ConfigError, ModelError, class_of
from dfq_tf.files import (
    check_no_pattern,
    damaged,
    digest,
    expanded,
    may_write_in,
    nearest_there,
    read_object,
    write_text,
)
from dfq_tf.graph import (
    Classifier,
    ModelDescription,
    agreement,
    description_beside,
    description_path,
    model_name,
)
from dfq_tf.importing import as_classifier, read_model, takes_pixels
from dfq_tf.procedural import natural_noise
from dfq_tf.quantization import (
    Calibrated,
    FittedBlock,
    QuantizedNetwork,
    check_widths,
    float_network,
    reconstruct,
    sqnr,
)
from dfq_tf.quantization import student as quantized_student
from dfq_tf.settings import (
    AUTO_METHOD,
    GENERATED,
    METHODS,
    PHOTOGRAPHS,
    PROCEDURAL,
    RECONSTRUCTING,
    SOURCES,
    TRAINING,
    BitWidths,
    BudgetConfig,
    CalibrationConfig,
    Checked,
    DistillationConfig,
    FileConfig,
    MixedWidths,
    ReconstructionConfig,
    RunConfig,
    check_value,
    is_small,
    recipe,
)
from dfq_tf.tflite import (
    SizedLayer,
    check_size,
    check_target,
    convert,
    sized_widths,
)
from dfq_tf.training import (
    Learner,
    check_device,
    check_model,
    check_one_process,
    randomized,
    resolve_precision,
    run_loop,
    with_precision,
)

# How much less a student may agree with the teacher after its training, without a
# warning: two standard errors, and some more.
_TOLERATED_LOSS = 0.02
# As much expected agreement makes training needless, with 8 bits.
_ENOUGH_AGREEMENT = 0.98
# Images of each kind by which DF-Q is judged, fewer if they are large; and the share of
# them on which the float network is surest. On the others a rounding decides, and a
# network is surer of images of its task (docs/experiments/images_and_ranges.md).
_JUDGING_IMAGES, _SURE_SHARE = 256, 0.75
# If more of a kind have the same class, agreement on them says nothing of the others.
_MOST_OF_A_CLASS = 0.95
# Images of a distillation that are given back.
_SHOWN = 100
# Keeps the bits of kernels that were chosen for a size.
_LAYER_BITS = "layer_bits.json"
# Of BatchNormalization in a student that learns, as the project's own networks have it.
_MOST_MOMENTUM = 0.9
# What the curve of a distillation calls the students' agreement with the teacher; and
# all columns of it that no `evaluate` fills.
_AGREEMENT = "agreement_on_generated_images"
_OWN_COLUMNS = ("step", "minutes", _AGREEMENT)
# Fewest channels of which oneDNN's gradient of a strided 1x1 kernel is right.
_LEAST_STRIDED = 8

# Argument -> its classes, and what it must be, in words.
_Kinds = Mapping[str, tuple[tuple[Any, ...], str]]
_OF_BOTH: _Kinds = {
    "strategy": (
        (tf.distribute.Strategy, types.NoneType),
        "a tf.distribute.Strategy, such as tf.distribute.MirroredStrategy(), or None",
    ),
    "directory": ((str, os.PathLike, types.NoneType), "the name of a folder, or None"),
    "show_progress": ((bool, np.bool_), "True or False"),
}
_OF_QUANTIZE: _Kinds = {
    "config": (
        (DistillationConfig,),
        "a DistillationConfig, such as dfq_tf.qat_recipe('pool')",
    ),
    "calibration": (
        (CalibrationConfig,),
        "a CalibrationConfig, such as dfq_tf.CalibrationConfig(images='photographs')",
    ),
    "reconstruction": (
        (ReconstructionConfig,),
        "a ReconstructionConfig, such as dfq_tf.ReconstructionConfig(rec_steps=200)",
    ),
    "widths": (
        (BitWidths,),
        "a BitWidths, such as dfq_tf.BitWidths(num_bits_weight=4)",
    ),
    "file": (
        (FileConfig,),
        "a FileConfig, such as dfq_tf.FileConfig(input_type='int8')",
    ),
    **_OF_BOTH,
}
_OF_DISTILL: _Kinds = {
    "config": (
        (BudgetConfig, DistillationConfig),
        "a BudgetConfig or DistillationConfig, such as dfq_tf.recipe('budget')",
    ),
    "evaluate": ((Callable, types.NoneType), "a function of a Learner, or None"),
    **_OF_BOTH,
}


@dataclasses.dataclass(frozen=True)
class Quantized:
    """What comes out.

    Attributes:
      network: the quantized network.
      tflite: the content of the `.tflite` file.
      generators: make images that the teacher takes for its training data; none where
        nothing was trained and the images came from elsewhere.
      prepared: what it was made from.
      measurements: what is expected of DF-Q, see `expected`. If something was trained,
        also the agreement with the teacher on images held out, before and after it,
        and the last losses, which a run that had finished before no longer has.
      method: one of `settings.METHODS`: what has been done.
      layers: the widths of kernels that were chosen for a size that `file` asks for,
        and what they do; empty where it asks for none.
      blocks: what reconstruction did for each block; empty without it.
    """

    # A notebook shows none of what fills pages.
    network: QuantizedNetwork = dataclasses.field(repr=False)
    tflite: bytes = dataclasses.field(repr=False)
    generators: Sequence[keras.Model] = dataclasses.field(repr=False)
    prepared: "Prepared" = dataclasses.field(repr=False)
    measurements: dict[str, float]
    method: str
    layers: Sequence[SizedLayer] = dataclasses.field(default=(), repr=False)
    blocks: Sequence[FittedBlock] = dataclasses.field(default=(), repr=False)

    @property
    def source(self) -> Source:
        """Where the images came from that calibrated."""
        return self.prepared.source

    @property
    def held_out(self) -> np.ndarray:
        """Other images from there, uint8, which trained and calibrated nothing."""
        return self.prepared.held_out

    @functools.cached_property
    @own_defaults()
    def student(self) -> keras.Model:
        """The fake-quantized Keras model; it gives logits and can be trained further.

        It is not fed as the teacher's model is, but with
        `network.description.normalize(pixels)`, of float32 pixels in [0, 255]. That is
        the pixels themselves, unless the teacher has one scale for all channels, and
        for its mean one whole number of 0 to 255.
        """
        return quantized_student.build(self.network)

    @own_defaults()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the student to `path` (.keras or .h5), for `load_quantized`.

        As it is now, if it was trained further. Its description goes beside it.

        Raises:
          ConfigError: no model file has such a name.
        """
        network = self.network
        if "student" in vars(self):  # somebody has it, and may have trained it
            network = quantized_student.trained(network, self.student)
        quantized_student.save(network, path)


@own_defaults()
def quantize(
    teacher: Any,
    network: Any = None,
    *,
    method: str = AUTO_METHOD,
    config: DistillationConfig = DistillationConfig(),
    calibration: CalibrationConfig = CalibrationConfig(),
    reconstruction: ReconstructionConfig = ReconstructionConfig(),
    widths: BitWidths = BitWidths(),
    file: FileConfig = FileConfig(),
    seed: int = 0,
    precision: str = "auto",
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    show_progress: bool = True,
) -> Quantized:
    """Quantizes a classifier to an integer TFLite model, using no data.

    Images of a generator, or crops of photographs of anything, give the activation
    ranges (DF-Q), see `choose_source`. For DF-REC, one block after the other learns on
    these images to give what the float network's gives. For DF-QAT-KD, the student
    learns to answer as the teacher does on crops of them, for DF-REC-KD behind
    reconstruction; or generators learn against it (Choi et al. 2020), see
    `settings.qat_recipe`. Of before and after, the better is kept, see `better`.

    Args:
      teacher: the trained classifier; or a model or file that says itself how it is
        fed, of which `as_classifier` makes one. It is not changed.
      network: what is quantized, as `distill` gives it; None for the teacher.
      method: one of `settings.METHODS`; or 'auto': `needed_method` chooses.
      config: steps, batch size, learning rates, weights of the losses.
      calibration: how ranges are found, and what helps them.
      reconstruction: steps and learning rate of each block.
      widths: bits of weights and activations.
      file: what the file takes and gives, and what it says of itself.
      seed: decides all random numbers.
      precision: 'auto', 'float32' or 'bfloat16', of teacher and generator.
      strategy: the devices that train, see `devices.make_strategy`; None for one.
      directory: keeps checkpoints, from which the same call goes on; None for none.
      show_progress: whether to say how far it is: bars on a terminal, else lines.

    Raises:
      ConfigError: a setting or the feeding is wrong, the networks do not fit, or no
        file is as small as asked for.
      ModelError: the teacher is no image classifier, or its file cannot be read.
      UnsupportedLayerError: a layer has no integer form for the target; it is named.
      TrainingError: a loss or a weight became infinite or NaN, or a worker was lost.
      ExportError: the file does not compute what the network does.
    """
    _check_arguments(locals(), _OF_QUANTIZE)
    file = _named(file, teacher if network is None else network)
    teacher = as_classifier(teacher)
    network = teacher if network is None else as_classifier(network)
    config = with_batch_size(config, teacher, network, strategy)
    precision = resolve_precision(precision)
    context = Context(config, seed, precision, strategy, directory, show_progress)
    check_quantizes(method, teacher, network, widths, calibration, file, context)
    prepared = prepare(teacher, network, calibration, context)
    return quantize_prepared(prepared, method, widths, reconstruction, file)


def quantize_prepared(
    prepared: "Prepared",
    method: str,
    widths: BitWidths,
    reconstruction: ReconstructionConfig,
    file: FileConfig,
) -> Quantized:
    """Takes the steps of a method, behind `prepare` and `check_quantizes`.

    Several methods of one preparation share what takes long. Arguments and errors are
    those of `quantize`.
    """
    context = prepared.context
    network, layers = untrained(prepared, widths, file)
    calibrated = network
    generators, found = prepared.generators, expected(prepared, network)
    if method == AUTO_METHOD:
        expectation = found.get("expected_agreement")
        method = needed_method(prepared.teacher, network, expectation)
    blocks: Sequence[FittedBlock] = ()
    if method in RECONSTRUCTING:
        network, blocks, more = reconstructed(
            prepared, network, reconstruction, context
        )
        found |= more
    if method in TRAINING:
        behind = reconstruction if method in RECONSTRUCTING else None
        network, generators, more = trained(
            prepared, network, context, name=method, behind=behind
        )
        found |= more
    if network is not calibrated:
        with stage("expected agreement", context.progress):
            found |= _expected(prepared, network)
    content = _converted(network, prepared.held_out, file, context.progress)
    return Quantized(
        network, content, generators, prepared, found, method, layers, blocks
    )


def untrained(
    prepared: "Prepared", widths: BitWidths, file: FileConfig
) -> tuple[QuantizedNetwork, Sequence[SizedLayer]]:
    """DF-Q: the network with ranges from the images, nothing trained.

    Args:
      prepared: from `prepare`.
      widths: bits of weights and activations.
      file: may ask for a size, which then decides the bits of single kernels.

    Returns:
      The network; and what the widths of single kernels do, if a size decided.

    Raises:
      ConfigError: no file is so small; it says how small one can be; or what a run
        before has written down of it is damaged.
    """
    calibrated = prepared.calibrated  # its images have stages of their own
    if file.size_setting and prepared.context.directory is not None:
        _pictures(prepared)  # so has the digest
    with stage("calibration", prepared.context.progress):
        network = calibrated.quantized(widths)
        if file.size_setting is None:
            return network, ()
        mixed, layers = _sized(prepared, network, widths, file)
        return calibrated.quantized(mixed), layers


def _sized(
    prepared: "Prepared", network: QuantizedNetwork, widths: BitWidths, file: FileConfig
) -> tuple[MixedWidths, Sequence[SizedLayer]]:
    """As `sized_widths`; a run that goes on keeps to what it began with.

    What is measured anew may choose otherwise, by a rounding of other threads or of
    another machine, and the checkpoints would be those of another run.
    """
    context, weight_range = prepared.context, prepared.calibration.weight_range
    measure = functools.partial(
        sized_widths, network, prepared.images, widths, file, weight_range
    )
    if context.directory is None:
        return measure()
    path = expanded(context.directory) / _LAYER_BITS
    asked = {
        **_identity(prepared, network, context),
        **phases.warm_up_identity(prepared.observed, context),  # the seed too
        "layers": ", ".join(network.kernel_bits),
        "file": str(dataclasses.replace(file, kernel_costs="")),  # their digest counts
        "costs of kernels": digest(expanded(file.kernel_costs))
        if file.kernel_costs
        else "",
    }
    kept = read_object(path)
    before = kept.get("asked")
    if not isinstance(before, dict) or any(
        before.get(name) != value for name, value in asked.items()
    ):
        mixed, layers = measure()
        made = [dataclasses.asdict(layer) for layer in layers]
        write_text(path, json.dumps({"asked": asked, "layers": made}, indent=2) + "\n")
        return mixed, layers
    try:
        layers = [SizedLayer(**each) for each in kept["layers"]]
    except (KeyError, TypeError) as error:
        raise damaged(path, error) from error
    bits = tuple((layer.name, layer.bits) for layer in layers)
    return MixedWidths(**vars(widths) | {"layer_bits": bits}), layers


def _converted(
    network: QuantizedNetwork, images: np.ndarray, file: FileConfig, progress: bool
) -> bytes:
    """The file, with a line for how long it and its proof took."""
    with stage("file and its proof", progress):
        return convert(network, images, file)


def _named(file: FileConfig, model: Any) -> FileConfig:
    """What is asked of a file, with the name of the model's own where none is given."""
    if file.model_name or not isinstance(model, (str, os.PathLike)):
        return file
    return dataclasses.replace(file, model_name=model_name(model))


def check_quantizes(
    method: str,
    teacher: Classifier,
    network: Classifier,
    widths: BitWidths,
    calibration: CalibrationConfig,
    file: FileConfig,
    context: Context[DistillationConfig],
) -> None:
    """Raises ConfigError or UnsupportedLayerError for what would fail later.

    Args:
      method: of `quantize`.
      teacher: the trained classifier.
      network: what is to be quantized, the teacher itself or another network.
      widths: bits of weights and activations.
      calibration: how ranges are found.
      file: what the file takes and gives.
      context: of the run.
    """
    if method in TRAINING:
        check_trains(teacher)
        phases.check_shares(context)
    check_reconstructs(method, calibration, context.strategy)
    with stage("pictures", context.progress):
        check_source(calibration.images)
    if context.settings.num_students != 1:
        raise ConfigError(
            f"num_students is {context.settings.num_students}, but one network is "
            "quantized; several students are for distill"
        )
    check_file(float_network(network, calibration), widths, file)


def check_file(rewritten: Classifier, widths: BitWidths, file: FileConfig) -> None:
    """Raises ConfigError or UnsupportedLayerError for a file that cannot be made.

    Args:
      rewritten: from `float_network`, of the network; its weights are of no matter.
      widths: bits of weights and activations.
      file: what it takes and gives, and what it is for.
    """
    check_widths(rewritten.graph, widths)
    check_target(rewritten, widths, file)
    if file.size_setting is not None:
        check_size(rewritten, widths, file)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What all quantized networks of one float network start from.

    What takes long is made when it is first asked for, and kept.

    Attributes:
      teacher: the trained classifier.
      observed: the same, frozen, with its BN statistics.
      network: the float network, rewritten for integers.
      calibration: as it was given.
      context: of the run.
      source: where the images come from.
    """

    teacher: Classifier
    observed: ObservedTeacher
    network: Classifier
    calibration: CalibrationConfig
    context: Context[DistillationConfig]
    source: Source

    @functools.cached_property
    def warmed(self) -> WarmedUp:
        """The teacher, and generators that are warmed up."""
        return warmed_up(self.observed, self.context)

    @property
    def generators(self) -> list[keras.Model]:
        """Those that made the images; none if these come from elsewhere."""
        return self.warmed.generators if self.source.name == GENERATED else []

    @functools.cached_property
    def _draw(self) -> Callable[[int, int], np.ndarray]:
        """Gives so many images of the source by a seed, uint8."""
        if made := self.generators:
            return Sampler(made, self.context.settings)
        shape = self.network.image_shape
        return lambda count, seed: self.source.draw(seed, count, shape)

    @functools.cached_property
    def pictures_digest(self) -> str:
        """Of the contents of the folder that is the source."""
        with stage("digest of the pictures", self.context.progress):
            return digest(*photographs.pictures_in(self.source.name))

    @functools.cached_property
    def images(self) -> np.ndarray:
        """Calibration images, uint8."""
        count = self.calibration.image_count(self.network.image_shape)
        draw = self._draw  # behind the generators' warm-up, a stage of its own
        with stage("images for the ranges", self.context.progress):
            return draw(count, self.context.seed)

    @functools.cached_property
    def photographs_share(self) -> float:
        """Of the images of the source, where students learn from them; 0 to 1."""
        is_auto, context = self.calibration.images == "auto", self.context
        most = self.calibration.photographs_in_lessons if is_auto else 0.0
        return photographs_share(
            self.observed, self.source, most, context.seed, context.strategy
        )

    @functools.cached_property
    def lessons(self) -> np.ndarray:
        """Images from which blocks learn, uint8.

        Those that calibrate, photographs among them; and some that are made for this,
        evenly spread.
        """
        images = self._for_learning(self.images, self.context.seed)
        count = self._num_synthesized
        if not count:
            return images
        context = dataclasses.replace(self.context, strategy=None)
        return spread(images, synthesized(self.warmed, count, context))

    @property
    def _num_synthesized(self) -> int:
        """None without BatchNormalization, whose statistics make images good ones.

        And none of large images, which take long.
        """
        is_generated = self.source.name == GENERATED and bool(self.observed.bn_inputs)
        if not (is_generated and is_small(self.network.image_shape)):
            return 0
        share = self.calibration.synthesized_in_lessons
        return round(share / (1 - share) * len(self.images))

    @property
    def photographs_share_in_lessons(self) -> float:
        """The same of what blocks learn from, those made for it among them; 0 to 1."""
        return self.photographs_share * len(self.images) / len(self.lessons)

    @functools.cached_property
    def calibrated(self) -> Calibrated:
        """Makes DF-Q of them, in any widths."""
        config = self.calibration
        if self.source.kind == PHOTOGRAPHS:
            margin = config.photographs_logits_margin
            config = dataclasses.replace(config, logits_margin=margin)
        return Calibrated(self.network, self.images, config)

    @functools.cached_property
    def pool(self) -> np.ndarray:
        """Images of the same source for students to learn from, uint8."""
        config, seed = self.context.settings, self.context.seed + phases.POOL_SEED
        images = self._draw(phases.pool_count(config, self.network.image_shape), seed)
        return self._for_learning(images, seed)

    def _for_learning(self, images: np.ndarray, seed: int) -> np.ndarray:
        """Images of the source, photographs among them if they are generated."""
        if self.source.name != GENERATED:
            return images
        return with_photographs(images, self.photographs_share, seed)

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """Other images of the same source, which train and calibrate nothing."""
        count = held_out_count(self.network.image_shape)
        return self._draw(count, self.context.seed + 1)

    @functools.cached_property
    def procedural(self) -> np.ndarray:
        """1/f noise, uint8, which calibrates nothing.

        As many images as are held out, but at most 256; these themselves, if they are
        of that kind.
        """
        count = min(_JUDGING_IMAGES, len(self.held_out))
        if self.source.name == PROCEDURAL:
            return self.held_out[:count]
        return natural_noise(self.context.seed, count, self.network.image_shape)

    @functools.cached_property
    def exact_by_kind(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Kind -> images that tell how well a network does, and exact scores.

        Procedural images, and as many of those held out; the scores are those of the
        float network.
        """
        kinds = {PROCEDURAL: self.procedural}
        kinds[self.source.kind] = self.held_out[: len(self.procedural)]
        return {kind: (each, self.network.scores(each)) for kind, each in kinds.items()}

    @functools.cached_property
    def telling(self) -> list[str]:
        """The kinds of `exact_by_kind` on which agreement tells how well networks do.

        Not those of which the float network answers nearly all images with one class;
        and none where classes do not exclude each other.
        """
        if not self.teacher.description.is_exclusive:
            return []
        return [
            kind
            for kind, (_, exact) in self.exact_by_kind.items()
            if np.bincount(exact.argmax(-1)).max() <= _MOST_OF_A_CLASS * len(exact)
        ]

    @functools.cached_property
    def answers(self) -> np.ndarray:
        """The teacher's scores for the images held out."""
        return self.teacher.scores(self.held_out)

    @functools.cached_property
    def judging(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Images of each kind that compare networks, with the teacher's scores.

        Those held out and procedural ones; and other crops of the same photographs, if
        these are among generated lessons.
        """
        kinds = [self.procedural]
        if self.source.name == GENERATED and self.photographs_share:
            count, seed = len(self.procedural), self.context.seed + 1
            shape = self.network.image_shape
            kinds.append(Source(PHOTOGRAPHS).draw(seed, count, shape))
        scored = [(images, self.teacher.scores(images)) for images in kinds]
        return [(self.held_out, self.answers), *scored]


def prepare(
    teacher: Classifier,
    network: Classifier,
    calibration: CalibrationConfig,
    context: Context[DistillationConfig],
) -> Prepared:
    """Everything that does not depend on bit widths: rewriting, and images.

    Args:
      teacher: the trained classifier.
      network: what is to be quantized, the teacher itself or another network.
      calibration: says where the images come from and how many are drawn, and whether
        layers are balanced.
      context: of the run.

    Raises:
      ConfigError: teacher and network do not fit, or no images of that source can be
        had.
      UnsupportedLayerError: a layer has no integer form; it is named.
      TrainingError: see `quantize`.
    """
    check_pair(teacher, network)
    with stage("preparation", context.progress):
        rewritten = float_network(network, calibration)
        observed = observe(teacher, context.precision, context.strategy)
        source = choose_source(
            observed, calibration.images, context.seed, context.strategy
        )
    return Prepared(teacher, observed, rewritten, calibration, context, source)


def expected(prepared: Prepared, network: QuantizedNetwork) -> dict[str, float]:
    """What can be said without data of how well a network does, on images held out.

    Args:
      prepared: from `prepare`.
      network: quantized.

    Returns:
      agreement_KIND: the share of images, in [0, 1], on which the network answers as
        the float network does; of 'procedural' images, and of the kind that was
        calibrated with, see `Source.kind`. expected_agreement: the same, the mean over
        the kinds, of the three quarters of images on which the largest logit is
        farthest from the next; without kinds of which the float network answers nearly
        all images with one class, and not there if none is left, nor for sigmoid
        scores, whose classes do not exclude each other. sqnr_KIND: of the scores, in
        dB.

    Warns:
      UserWarning: all images have one class, so that there is no expected_agreement.
    """
    with stage("expected agreement", prepared.context.progress):
        found = _expected(prepared, network)
    is_told = "expected_agreement" in found
    if not is_told and prepared.teacher.description.is_exclusive:
        warnings.warn(
            "the float network answers nearly all images that are to be had here with "
            "one class: that the quantized network does so too says little of it. "
            "Measure the file on images of your own, or give pictures of all classes, "
            "unlabelled (--images=FOLDER; in Python, "
            "CalibrationConfig(images=FOLDER))",
            stacklevel=3,
        )
    return found


def _expected(prepared: Prepared, network: QuantizedNetwork) -> dict[str, float]:
    found: dict[str, float] = {}
    sure = []
    for kind, (images, exact) in prepared.exact_by_kind.items():
        scores = network.scores(images)
        found[f"agreement_{kind}"] = agreement(scores, exact)
        found[f"sqnr_{kind}"] = sqnr(exact, scores)
        if kind not in prepared.telling:
            continue
        top = np.sort(exact, axis=-1)[:, -2:]
        order = np.argsort(top[:, 0] - top[:, 1])  # the surest first
        surest = order[: max(1, round(_SURE_SHARE * len(order)))]
        sure.append(agreement(scores[surest], exact[surest]))
    return {**found, "expected_agreement": float(np.mean(sure))} if sure else found


def needed_method(
    teacher: Classifier, network: QuantizedNetwork, expected_agreement: float | None
) -> str:
    """What 'auto' stands for: the method that is worth its time.

    A network of few bits is reconstructed, which did as well as training or better, in
    less time. So is one of 8 bits where less agreement than 98 % is expected of DF-Q:
    that gained up to 5 points, or 3 dB (docs/experiments/few_bits.md). But that
    agreement, on the one class, says little of sigmoid scores, whose classes do not
    exclude each other.

    Args:
      teacher: the trained classifier.
      network: DF-Q, whose bits count.
      expected_agreement: of it, see `expected`; None where nothing tells.
    """
    has_few = min([*network.bits.values(), *network.kernel_bits.values()]) < 8
    share = 1.0 if expected_agreement is None else expected_agreement
    is_poor = teacher.description.is_exclusive and share < _ENOUGH_AGREEMENT
    return "df_rec" if has_few or is_poor else "df_q"


def reconstructed(
    prepared: "Prepared",
    network: QuantizedNetwork,
    config: ReconstructionConfig,
    context: Context[DistillationConfig],
) -> tuple[QuantizedNetwork, list[FittedBlock], dict[str, float]]:
    """Each block learns, on the calibration images, to give what the float one gives.

    One device does it, whatever the strategy.

    Args:
      prepared: from `prepare`.
      network: from `post_training`; it is not changed.
      config: of the reconstruction.
      context: of the run; its directory keeps checkpoints of each block.

    Returns:
      The better of the network before and after it, see `better`; what each block has
      gained, nothing if that is not kept; and the agreement on images held out before
      and after, unreconstructed_is_kept, and reconstruction_steps (of each block) and
      reconstruction_images, as of `Reconstructed`.

    Warns:
      UserWarning: the reconstruction made the agreement much worse.
    """
    check_one_process(context.strategy, "the reconstruction")
    identity = {
        **_identity(prepared, network, context),
        "seed": str(context.seed),
        **_texts(config),
    }
    run = functools.partial(
        run_loop,
        context=dataclasses.replace(context, strategy=None),
        identity=identity,
    )
    made = reconstruct(
        network, prepared.network, prepared.lessons, config, context.seed, run
    )
    has_gained = any(block.after_db > block.before_db for block in made.blocks)
    candidate = made.network if has_gained else network
    result, before, after = better(prepared, network, candidate, "reconstructed")
    # What they gained is not in the file if that is not kept.
    blocks = [] if result is network else made.blocks
    found = {
        "reconstruction_steps": made.num_steps,
        "reconstruction_images": made.num_images,
        "agreement_before_reconstruction": before,
        "agreement_after_reconstruction": after,
        "unreconstructed_is_kept": result is network,
    }
    if result is not network:
        found["photographs_share"] = prepared.photographs_share_in_lessons
    return result, blocks, found


def trained(
    prepared: Prepared,
    network: QuantizedNetwork,
    context: Context[DistillationConfig],
    evaluate: Callable[[Learner], Mapping[str, float]] | None = None,
    name: str = "df_qat_kd",
    behind: ReconstructionConfig | None = None,
) -> tuple[QuantizedNetwork, list[keras.Model], dict[str, float]]:
    """Quantization-aware training: on a pool of images, against generators, or both.

    Args:
      prepared: from `prepare`.
      network: from `post_training` or `reconstructed`; it is not changed.
      context: of the run.
      evaluate: measures the student now and then, see `loop.run_loop`.
      name: of the phase, for its checkpoints and curves.
      behind: how the network was reconstructed; None if it was not.

    Returns:
      The better of the network that was given and the trained one, see `better`; the
      generators as they are after that, none where none are needed; and the last
      measurements, with the agreement on images held out before and after, and
      untrained_is_kept.

    Warns:
      UserWarning: the training made the agreement much worse.
    """
    config = context.settings
    student = quantized_student.build(network, config.trains_ranges)
    learner = Learner(student, network.description)
    # Without generator steps they stay as they are, and other images need none.
    generators = prepared.generators
    if config.needs_generators:
        generators = [
            with_precision(generator, context.precision)
            for generator in prepared.warmed.generators
        ]
    measurements = phases.distill(
        WarmedUp(prepared.observed, generators),
        [learner],
        context,
        name=name,
        identity={
            **_identity(prepared, network, context),
            **phases.identity_of(prepared.observed, context),  # not its warm-up's
            **_texts(behind),
        },
        images=lambda: prepared.pool,
        evaluate=None if evaluate is None else functools.partial(evaluate, learner),
    )
    result = quantized_student.trained(network, learner.model)
    result, before, after = better(prepared, network, result, "trained")
    found = {
        "held_out_agreement_before": before,
        "held_out_agreement_after": after,
        "untrained_is_kept": result is network,
    }
    if result is not network and config.pool_images:
        found["photographs_share"] = prepared.photographs_share
    return result, generators, {**measurements, **found}


def better(
    prepared: Prepared, before: QuantizedNetwork, after: QuantizedNetwork, what: str
) -> tuple[QuantizedNetwork, float, float]:
    """The network that agrees more with the teacher; of equals, the later.

    Args:
      prepared: has images held out of several kinds, each of which counts as much.
      before: a quantized network.
      after: the same, after something was done to it.
      what: was done to it: 'trained'.

    Returns:
      One of the two; and the agreement of each on images held out, the mean over their
      kinds, which decides. Of sigmoid scores, whose classes do not exclude each other,
      it is the share of classes, over all images, to which both say the same.

    Warns:
      UserWarning: the second is much worse.
    """
    with stage(f"agreement before and after being {what}", prepared.context.progress):
        old = _agreements(prepared, before)
        new = old if after is before else _agreements(prepared, after)
    means = float(np.mean(old)), float(np.mean(new))
    if means[1] < means[0] - _TOLERATED_LOSS:
        warnings.warn(
            f"being {what} made the student agree less with the teacher: on images "
            f"held out of each kind {_percents(old)} before it, "
            f"{_percents(new)} after. The student that is not {what} is given. A lower "
            "learning rate may help",
            stacklevel=3,
        )
    return (before if means[1] < means[0] else after), *means


def _agreements(prepared: Prepared, network: QuantizedNetwork) -> list[float]:
    """With the teacher, on images held out of each kind."""
    teacher = prepared.teacher
    yes = 0.5 if teacher.description.output == "sigmoid" else 0.0

    def same(scores: np.ndarray, answers: np.ndarray) -> float:
        if teacher.description.is_exclusive:
            return agreement(scores, answers)
        return float(np.mean((scores > 0) == (answers > yes)))

    return [
        same(network.scores(images), answers) for images, answers in prepared.judging
    ]


def _percents(shares: Iterable[float]) -> str:
    return ", ".join(f"{100 * share:.1f} %" for share in shares)


def _identity(
    prepared: Prepared, network: QuantizedNetwork, context: Context[DistillationConfig]
) -> dict[str, str]:
    """What the training of a quantized network hangs on, see `loop.run_loop`.

    Nothing that is computed of images is in it: a rounding would make another run of
    it. But a folder may have other pictures than it had, and generators another
    warm-up.
    """
    settings = dataclasses.asdict(prepared.calibration)
    if prepared.source.name not in SOURCES:
        del settings["images"]  # the folder may lie elsewhere now
    if context.directory is not None:
        settings |= _pictures(prepared)
    if prepared.source.name == GENERATED:
        settings |= phases.warm_up_identity(prepared.observed, prepared.context)
    return {
        "network": prepared.network.graph.digest(),
        "bits of activations": _runs(network.bits.values()),
        "bits of kernels": _runs(network.kernel_bits.values()),
        "per_channel": str(network.is_per_channel),
        **{name: str(value) for name, value in settings.items()},
    }


def _texts(config: ReconstructionConfig | None) -> dict[str, str]:
    """Settings by name, see `loop.run_loop`; none where nothing was reconstructed."""
    return {name: str(value) for name, value in vars(config).items()} if config else {}


def _pictures(prepared: Prepared) -> dict[str, str]:
    """Of a folder that is the source, what its pictures are told by."""
    if prepared.source.name in SOURCES:
        return {}
    return {"digest of the pictures": prepared.pictures_digest}


def _runs(values: Iterable[int]) -> str:
    """Such as '8, 4 x 18, 8'."""
    counted = [(value, len(list(run))) for value, run in itertools.groupby(values)]
    return ", ".join(f"{v} x {n}" if n > 1 else f"{v}" for v, n in counted)


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A student that has learnt from a teacher, and no data.

    Attributes:
      student: float32, of the network that was asked for.
      agreements: share of held-out generated images, in [0, 1], on which each
        student answers as the teacher does; `student` is the best of them.
      generators: as they were at the end.
      images: some that they have made, uint8 (at most 100, height, width, channels).
      measurements: the last losses; empty for a run that had finished before.
      num_held_out: images that `agreements` are of.
    """

    student: Learner = dataclasses.field(repr=False)
    agreements: Sequence[float]
    generators: Sequence[keras.Model] = dataclasses.field(repr=False)
    images: np.ndarray = dataclasses.field(repr=False)
    measurements: dict[str, float]
    num_held_out: int


@own_defaults()
def distill(
    teacher: Any,
    student: keras.Model | Learner,
    *,
    config: DistillationConfig | BudgetConfig = recipe("budget"),
    seed: int = 0,
    precision: str = "auto",
    strategy: tf.distribute.Strategy | None = None,
    directory: str | os.PathLike[str] | None = None,
    evaluate: Callable[[Learner], Mapping[str, float]] | None = None,
    show_progress: bool = True,
) -> Distilled:
    """Teaches a network to answer as the teacher does, using no data.

    Generators learn from what the teacher knows of its training data, and look for
    images on which student and teacher still differ (Choi et al. 2020).

    Args:
      teacher: as in `quantize`; it is not changed.
      student: a tf_keras model for the same images and classes, which gives logits; it
        is fed as the teacher is, and so has no Rescaling of its own; a Learner says
        itself how it is fed. Students start from its weights, further ones from random
        ones.
      config: see `settings.recipe`.
      seed: as in `quantize`.
      precision: 'auto', 'float32' or 'bfloat16', of all networks.
      strategy: as in `quantize`.
      directory: as in `quantize`.
      evaluate: gives numbers by name, of the first student now and then, which go to
        `distillation_curve.csv` in `directory`; nothing is chosen by them.
      show_progress: as in `quantize`.

    Raises:
      ConfigError: a setting, the minutes, a network or what `evaluate` gives is wrong.
      ModelError: teacher or student is no image classifier, or a file cannot be read.
      UnsupportedLayerError: a layer of the teacher cannot be read; it is named.
      TrainingError: as in `quantize`.
    """
    _check_arguments(locals(), _OF_DISTILL)
    teacher = as_classifier(teacher)
    learner = _learner(student, teacher)
    check_trains(teacher)
    config = with_batch_size(config, teacher, learner, strategy)
    precision = resolve_precision(precision)
    context = Context(config, seed, precision, strategy, directory, show_progress)
    students, run = _begun(teacher, learner, context)
    same = _held_out_agreement(teacher, run)

    def measured() -> dict[str, float]:
        more = _numbers(evaluate(students[0])) if evaluate else {}
        return {_AGREEMENT: same(students[0]), **more}

    found = run.run(_learns_as(learner), measured)
    with stage("agreement of the students", show_progress):
        agreements = [same(each) for each in students]
    best = _best(students, agreements, learner)
    images, count = run.sample(_SHOWN), len(run.held_out)
    return Distilled(best, agreements, run.generators, images, found, count)


def check_minutes(
    teacher: Classifier, student: Learner, context: Context[BudgetConfig]
) -> None:
    """Raises ConfigError if a distillation has no time for one round on this machine.

    Some steps are taken, and forgotten: for where a long training of the teacher would
    come before the same steps.

    Args:
      teacher: its weights are of no matter.
      student: what is to learn from it; it is not changed.
      context: of the distillation, without a directory.
    """
    _begun(teacher, student, context)


def _begun(
    teacher: Classifier, student: Learner, context: Context[Any]
) -> tuple[list[Learner], Any]:
    """Students, and the run that will train them, before its first round."""
    config, seed, precision = context.settings, context.seed, context.precision
    with stage("preparation", context.progress):
        observed = observe(teacher, precision, context.strategy)
        students = _students(student, config.num_students, seed, precision)
    kind: Any = Budget if isinstance(config, BudgetConfig) else Rounds
    return students, kind(observed, students, context)


def _learns_as(learner: Learner) -> dict[str, str]:
    """What a run hangs on of its student: its layers, and how it is fed."""
    fed = learner.description
    return {
        "student": _structure(learner.model),
        "student's feeding": f"{fed.input_mean}, {fed.input_scale}",
    }


def _numbers(measurements: Any) -> dict[str, float]:
    """What an `evaluate` gave, as floats.

    Raises:
      ConfigError: it is not a mapping of names to numbers, or the curve cannot have a
        column of such a name.
    """
    try:
        found = {str(name): float(value) for name, value in measurements.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"evaluate gave {measurements!r}; it must return names and numbers, such "
            "as {'accuracy': 0.9}"
        ) from error
    for name in found:
        what = "a column of the run's own" if name in _OWN_COLUMNS else ""
        if "".join(name.splitlines()) != name:
            what = "more than one line, or ends one"
        if what:
            raise ConfigError(
                f"evaluate gave the name {name!r}, which is {what}; give that number "
                "another name, such as 'accuracy'"
            )
    return found


def _held_out_agreement(
    teacher: Classifier, run: Budget | Rounds
) -> Callable[[Learner], float]:
    """Gives the share of a run's images held out that have the teacher's class."""
    known: list[np.ndarray] = []

    def same(learner: Learner) -> float:
        images = run.held_out
        if not known or not np.array_equal(known[0], images):
            # A run may replace the images of its beginning.
            known[:] = images, teacher.scores(images)
        return agreement(learner.scores(images), known[1])

    return same


def _check_arguments(given: Mapping[str, Any], kinds: _Kinds) -> None:
    """Raises ConfigError for an argument that cannot be, before there is any work.

    Args:
      given: the arguments of `quantize` or `distill`.
      kinds: _OF_QUANTIZE or _OF_DISTILL.
    """
    if not tf.executing_eagerly() or tf.distribute.has_strategy():
        raise ConfigError(
            "the call is in a graph, a tf.function or a strategy.scope() of your "
            "program; make it outside of that. Devices that train go in strategy=..."
        )
    for name, (classes, wanted) in kinds.items():
        value = given[name]
        if not isinstance(value, classes):
            is_config = isinstance(value, Checked)
            shown = f"a {type(value).__name__}" if is_config else repr(value)
            raise ConfigError(f"{name} is {shown}; it must be {wanted}")
        if isinstance(value, Checked):
            value.check_effects()
    if "method" in given:
        choices = (AUTO_METHOD, *METHODS)
        check_value("method", given["method"], {"choices": choices})
    RunConfig(seed=given["seed"], precision=given["precision"])
    check_device(given["strategy"])
    directory = given["directory"]
    if directory is not None:
        _check_directory(os.fspath(directory))
    if given.get("evaluate") is not None and directory is None:
        raise ConfigError(
            "evaluate is given and directory is None; its measurements go to "
            "distillation_curve.csv in the directory. Name one, or leave evaluate out"
        )


def _check_directory(directory: str) -> None:
    """Raises ConfigError if nothing can be written there; it need not be there yet."""
    if not directory:
        raise ConfigError("directory is empty; name a folder, such as '.', or None")
    directory = str(expanded(directory))
    check_no_pattern("directory", directory)
    place = nearest_there(directory)
    what = "" if os.path.lexists(directory) else f", below {place}"
    if not place.is_dir():
        raise ConfigError(f"directory is {directory!r}{what}, a file; name a folder")
    if not may_write_in(place):
        raise ConfigError(
            f"directory is {directory!r}{what}, where you may not write; name another "
            "folder"
        )


def _learner(student: keras.Model | Learner, teacher: Classifier) -> Learner:
    """A student with its description.

    Raises:
      ConfigError: it is for other images or classes, prepares pixels that are prepared
        already, does not give logits, or cannot learn.
    """
    if isinstance(student, Learner):
        check_pair(teacher, student)
        student = _with_probabilities_of(teacher, student)
        said = f"the student's description says {student.description.output}, its"
        advice = ", and say output='logits' in its description"
    else:
        check_model(student)
        _check_same("image shape", teacher.image_shape, student.input_shape[1:])
        classes = student.output_shape[-1]
        _check_same("number of classes", teacher.num_classes, classes)
        description = dataclasses.replace(teacher.description, output="logits")
        _check_fed_once(student, description)
        student = Learner(student, description)
        said, advice = "the student's", ""
    gives = _head_activation(student.model)
    if (student.description.output, gives) != ("logits", "logits"):
        raise ConfigError(
            f"{said} last layer gives {gives}; a student learns logits: let it end "
            f"without softmax or sigmoid{advice}"
        )
    _check_can_be_copied(student.model)
    _check_can_learn(student.model)
    return student


def _check_fed_once(student: keras.Model, description: ModelDescription) -> None:
    """Raises ConfigError if pixels would be prepared twice."""
    mean, scale = description.input_mean, description.input_scale
    if {*mean} == {0.0} and {*scale} == {1.0}:
        return  # pixels as they are
    if takes_pixels(student):
        raise ConfigError(
            "the student has preprocessing of its own, such as a Rescaling layer, and "
            f"is fed as the teacher is, with input_mean {mean} and input_scale "
            f"{scale}: both would apply, one behind the other. Leave the student's out"
        )


def _check_can_be_copied(student: keras.Model) -> None:
    """Raises ConfigError for a layer that does not tell its settings."""
    for layer in student._flatten_layers():
        try:
            if not is_of_layers(layer):  # else what is in it is asked
                layer.get_config()
        except NotImplementedError as error:
            raise ConfigError(
                f"the student's layer {layer.name} is a {type(layer).__name__} without "
                "get_config, so that no copy of it can be made; let its class have a "
                "get_config that returns all arguments of its __init__"
            ) from error


def _check_can_learn(student: keras.Model) -> None:
    """Raises ConfigError if no weight may change, or one is NaN or infinite.

    Or if it takes integers, through which no generator learns.
    Or if a gradient would write past its memory, in oneDNN's kernels of TensorFlow
    2.21: that of a strided 1x1 convolution of few channels. The program would end.
    """
    kind = tf.as_dtype(student.inputs[0].dtype)
    if not kind.is_floating:
        raise ConfigError(
            f"the student's Input takes {kind.name}, through which no generator "
            "learns; leave its dtype out, for float32"
        )
    for layer in student._flatten_layers() if uses_onednn() else ():
        if (
            type(layer) is keras.layers.Conv2D
            and layer.kernel_size == (1, 1)
            and max(layer.strides) > 1
            and layer.kernel.shape[2] < _LEAST_STRIDED
            and layer.trainable
        ):
            raise ConfigError(
                f"the student's layer {layer.name} is a 1x1 convolution with strides "
                f"of {layer.kernel.shape[2]} channels, whose gradient TensorFlow's "
                "oneDNN computes wrongly; give it no strides and put an average "
                "pooling before it, or start the program with TF_ENABLE_ONEDNN_OPTS=0"
            )
    if not student.trainable_weights:
        raise ConfigError(
            "the student has no trainable weights, so that it cannot learn; set "
            "student.trainable = True before dfq_tf.distill, or give another network"
        )
    for weight in student.weights:
        if not np.isfinite(weight.numpy()).all():
            raise ConfigError(
                f"the student's weight {weight.name} has values that are NaN or "
                "infinite; give a network with finite weights, such as a new one"
            )


def _with_probabilities_of(teacher: Classifier, student: Learner) -> Learner:
    """A student whose logits mean what the teacher's do, unless it says otherwise."""
    said = student.description
    if said.probabilities is None:
        theirs = teacher.description.probabilities
        said = dataclasses.replace(said, probabilities=theirs)
    return Learner(student.model, said)


def _structure(model: keras.Model) -> str:
    """A digest of a tf_keras model, but for the values of its weights and names."""
    layers = list(model._flatten_layers())
    numbers: dict[str, int] = {}  # a name -> when it is met first
    for layer in layers:
        numbers.setdefault(layer.name, len(numbers))

    def numbered(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(key): numbered(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [numbered(each) for each in value]
        if isinstance(value, str):
            return numbers.get(value, value)
        known = value is None or isinstance(value, (bool, int, float))
        return value if known else type(value).__name__

    config = numbered(model.get_config())
    kinds = [type(layer).__name__ for layer in layers]
    shapes = [tuple(weight.shape) for weight in model.weights]
    return hashlib.sha256(repr((kinds, shapes, config)).encode()).hexdigest()


def _head_activation(model: keras.Model) -> str:
    """What the last layer of a tf_keras model gives: 'logits', 'softmax', 'sigmoid'."""
    layer = model.get_layer(model.output_names[0])
    if isinstance(layer, keras.Model):
        return _head_activation(layer)
    if isinstance(layer, keras.layers.Softmax):
        return "softmax"
    # Of a layer, or the TensorFlow function that a layer was made of.
    function = getattr(layer, "activation", None) or getattr(layer, "function", None)
    name = getattr(function, "__name__", "").removesuffix("_v2")
    return name if name in ("softmax", "sigmoid") else "logits"


def _students(learner: Learner, count: int, seed: int, precision: str) -> list[Learner]:
    """Copies of a network in a precision, from the second on randomized."""
    models = [learner.model]
    models += [randomized(learner.model, seed + i) for i in range(1, count)]
    learners = [Learner(model, learner.description) for model in models]
    return [_quick(_of_precision(each, precision)) for each in learners]


def _of_precision(learner: Learner, precision: str) -> Learner:
    """A copy of a network in a precision."""
    return Learner(with_precision(learner.model, precision), learner.description)


def _best(
    students: Sequence[Learner], agreements: Sequence[float], asked: Learner
) -> Learner:
    """The student that agrees most, in float32; its settings are those asked for."""
    best = _of_precision(students[int(np.argmax(agreements))], "float32")
    pairs = zip(best.model._flatten_layers(), asked.model._flatten_layers())
    for layer, own in pairs:
        if isinstance(own, keras.layers.BatchNormalization):
            layer.momentum = own.momentum  # see `_quick`
    return best


def _quick(learner: Learner) -> Learner:
    """The network, whose BN statistics follow the images of the last few steps.

    Those of published networks follow the last thousands (momentum 0.999), which a
    distillation in minutes does not take.
    """
    for layer in learner.model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = min(layer.momentum, _MOST_MOMENTUM)
    return learner


@own_defaults()
def load_quantized(path: str | os.PathLike[str]) -> QuantizedNetwork:
    """Reads a quantized network that `Quantized.save` or tools/quantize.py has written.

    Args:
      path: of the file.

    Raises:
      ModelError: there is no such file, or it holds no quantized student; or an earlier
        version of the project wrote it; or its description is not beside it; or `path`
        is no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ModelError(
            f"path is a {class_of(path)}; load_quantized "
            "reads files that Quantized.save or tools/quantize.py wrote. What "
            "dfq_tf.quantize gives has its quantized network already, result.network"
        )
    path = expanded(path)
    try:
        model = read_model(path)
    except ModelError as error:
        if not path.exists():
            raise
        raise ModelError(
            f"{path} cannot be read as a quantized network. If an earlier version of "
            f"the project wrote it, quantize the model again. ({error})"
        ) from error
    quantized_student.check_student(model)
    description = description_beside(path)
    if description is None:
        raise ModelError(
            f"there is no description {description_path(path)}, which was written "
            "together with the student; put it there, or write both again: with "
            "result.save(...) of what dfq_tf.quantize gives, not result.student.save, "
            "or with tools/quantize.py"
        )
    return quantized_student.network_of(model, description)


def check_trains(teacher: Classifier) -> None:
    """Raises ConfigError if nothing can learn from the teacher's answers.

    The losses compare the softmax of logits, which says nothing of how high all of them
    are; but scores of classes that do not exclude each other hang on that.
    """
    if not teacher.description.is_exclusive:
        raise ConfigError(
            "the teacher gives sigmoid scores, of classes that do not exclude each "
            "other, from which no student can be trained. To quantize the teacher "
            "itself without training, take the method df_q (--methods=df_q in "
            "tools/run.py), or df_rec with fewer bits"
        )


def check_reconstructs(
    method: str,
    calibration: CalibrationConfig,
    strategy: tf.distribute.Strategy | None,
) -> None:
    """Raises ConfigError for one image, or several workers, that cannot reconstruct.

    Args:
      method: of any kind; what 'auto' does is not known before there is a network.
      calibration: says how many images there are.
      strategy: None for one device.
    """
    what = "the reconstruction"
    if method == AUTO_METHOD:
        what += " that the method auto may do (the method df_q does none)"
    elif method not in RECONSTRUCTING:
        return
    check_one_process(strategy, what)
    if calibration.calibration_images == 1:
        raise ConfigError(
            f"calibration_images is 1; {what} learns from some and is judged by "
            "others, so that it needs at least 2, and does well with 1,024"
        )


def check_pair(teacher: Classifier, student: Classifier | Learner) -> None:
    """Raises ConfigError unless both take the same images and give the same classes."""
    names = (each.description.class_names for each in (teacher, student))
    _check_same("image shape", teacher.image_shape, student.image_shape)
    _check_same("number of classes", teacher.num_classes, student.num_classes)
    _check_same("class names", *names)


def _check_same(name: str, theirs: Any, its: Any) -> None:
    if theirs != its:
        raise ConfigError(
            f"the student's {name} is {its}, the teacher's {theirs}; the student must "
            "be made for the teacher's images and classes"
        )
