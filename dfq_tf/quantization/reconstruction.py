"""Reconstruction: each block learns to give what it gives in the float network.

One block after the other, from the image on (Li et al. 2021, BRECQ). A block is fed as
it will be in the quantized network; for half of its inputs, element by element, the
float network's are taken, and half of its activations stay float (Wei et al. 2022,
QDrop). Rounding and step sizes learn (`learnt`), by Adam on the squared error of the
block's output. All of it needs images, and no labels.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import tf
from dfq_tf.graph import (
    FLOAT,
    Classifier,
    Graph,
    blocks_of,
    compute,
    images_per_pass,
    keep,
    num_values,
)
from dfq_tf.quantization.learnt import BlockLearner
from dfq_tf.quantization.network import QuantizedNetwork
from dfq_tf.quantization.noise import sqnr
from dfq_tf.settings import ReconstructionConfig

# (name, step, number of steps, what it changes) -> the last measurements: takes the
# steps, and goes on where an earlier run was interrupted; `training.run_loop`.
Run = Callable[
    [str, Callable[[int], Mapping[str, Any]], int, Mapping[str, Any]], Mapping[str, Any]
]

# Images per pass.
_MOST_IMAGES = 128
# Of the images, so many teach nothing: they say whether a block has gained.
_JUDGING_SHARE, _MOST_JUDGING = 0.125, 128
# What enters and leaves a block may take so many bytes. At most so many tensors as
# large as the largest of them are alive: what enters it, in float and quantized; what
# leaves it, in float, before its steps and after them; and the passes of the last,
# until they are one tensor.
BLOCK_MEMORY, _ALIVE = 3 * 2**30, 6
# The fewest steps that a limit of time leaves a block.
_FEWEST_STEPS = 20
_NAME = "df_rec"


@dataclasses.dataclass(frozen=True)
class FittedBlock:
    """What reconstruction has done for a block, on images that taught nothing.

    Attributes:
      name: of the node that gives its output.
      before_db: SQNR of its output with nearest rounding, in dB, all before it being
        quantized; the signal is the float network's.
      after_db: the same with what it has learnt, which is kept only if it is more.
    """

    name: str
    before_db: float
    after_db: float


@dataclasses.dataclass(frozen=True)
class Reconstructed:
    """A network whose blocks have learnt, and how.

    Attributes:
      network: computes what its file does.
      blocks: what each has gained.
      num_steps: that each block took: with `rec_steps` of so many and `rec_minutes` of
        0, another run gives the same.
      num_images: that had room in memory, those that judge among them.
    """

    network: QuantizedNetwork
    blocks: list[FittedBlock]
    num_steps: int
    num_images: int


def run_names(name: str = _NAME) -> tuple[str, str]:
    """Patterns of what `reconstruct` calls its runs, for `seconds_in_steps`."""
    return f"{name}_timing", f"{name}_*_of_*"


def reconstruct(
    network: QuantizedNetwork,
    exact: Classifier,
    images: np.ndarray,
    config: ReconstructionConfig,
    seed: int,
    run: Run,
    name: str = _NAME,
) -> Reconstructed:
    """The network whose blocks have learnt to round.

    Ranges of 8 bits and more, and of 4 and more from global pools on, stay as they are:
    they are wider than generated images need, for those of the task.

    Args:
      network: from `post_training.post_training`; it is not changed.
      exact: the float network that it was made of.
      images: uint8 (n, height, width, channels), of which an eighth teaches nothing.
      config: how many steps, of how many images.
      seed: decides all random numbers.
      run: see `Run`.
      name: of the whole, for the names of its runs.

    Raises:
      TrainingError: an error is not finite.

    Warns:
      UserWarning: there is no room in memory for all of the images.
    """
    blocks = blocks_of(network.graph)
    learners = [
        BlockLearner(block, network, config, [seed, i])
        for i, block in enumerate(blocks)
    ]
    num_steps = _num_steps(learners, config, run, name)
    exact_blocks = blocks_of(exact.graph)
    images = _fitting(images, exact_blocks)
    count = min(_MOST_JUDGING, max(1, int(_JUDGING_SHARE * len(images))))
    inputs = fed = exact.description.normalize(tf.constant(images, tf.float32))
    found = []
    for i, (learner, exact_block) in enumerate(zip(learners, exact_blocks)):
        wanted = _outputs(exact_block, inputs)
        # The step of a bias hangs on the range before it, which may have learnt.
        network, before = _judged(network, i, fed)
        error = tf.reduce_mean(tf.math.squared_difference(before, wanted)[count:])
        step = learner.step(inputs, fed, wanted, count, error, num_steps)
        run(f"{name}_{i + 1}_of_{len(blocks)}", step, num_steps, learner.trackables)
        changed, after = _judged(learner.result(network), i, fed)
        judged = [each[:count].numpy() for each in (wanted, before, after)]
        ratings = sqnr(judged[0], judged[1]), sqnr(judged[0], judged[2])
        found.append(FittedBlock(exact_block.output, ratings[0], max(ratings)))
        is_better = ratings[1] > ratings[0]
        network = changed if is_better else network
        inputs, fed = wanted, after if is_better else before
        del step, wanted, before, after  # else they stay in memory beside the next ones
    return Reconstructed(network, found, num_steps, len(images))


def _judged(
    network: QuantizedNetwork, place: int, fed: tf.Tensor
) -> tuple[QuantizedNetwork, tf.Tensor]:
    """The network with the biases of a block as a file has them, and what it gives.

    Args:
      network: with biases of any value in that block.
      place: of the block.
      fed: what enters it, of all images.
    """
    names = blocks_of(network.graph)[place].nodes
    network = network.with_room_for_biases().with_rounded_biases(names)
    return network, _outputs(blocks_of(network.graph)[place], fed, network)


def _num_steps(
    learners: Sequence[BlockLearner], config: ReconstructionConfig, run: Run, name: str
) -> int:
    """Steps of each block: what is asked for, or as many as there is time for.

    How long a step of each block takes is measured once; a run that goes on keeps to
    what was found.
    """
    if not config.rec_minutes:
        return config.rec_steps
    found = tf.Variable(0, trainable=False)

    def measure(index: int) -> Mapping[str, tf.Tensor]:
        seconds = sum(learner.step_seconds() for learner in learners)
        affordable = int(60 * config.rec_minutes / max(seconds, 1e-9))
        found.assign(min(config.rec_steps, max(_FEWEST_STEPS, affordable)))
        return {"steps": found.read_value()}

    run(f"{name}_timing", measure, 1, {"steps": found})
    return int(found.numpy())


def _fitting(images: np.ndarray, blocks: Sequence[Graph]) -> np.ndarray:
    """As many images as have room in memory between two blocks; two at least.

    It warns if these are not all of them.
    """
    ends = [node for block in blocks for node in (block.image, block.last)]
    most = max(
        (math.prod(size or 1 for size in node.shape) for node in ends), default=1
    )
    count = max(2, min(len(images), BLOCK_MEMORY // (_ALIVE * FLOAT * most)))
    if count < len(images):
        warnings.warn(
            f"the reconstruction takes {count:,} of the {len(images):,} images: what "
            "enters and leaves a block has no room in memory for more",
            stacklevel=3,
        )
    return images[:count]


def _outputs(
    block: Graph, inputs: tf.Tensor, network: QuantizedNetwork | None = None
) -> tf.Tensor:
    """What a block gives, some images at a time.

    Args:
      block: with its weights.
      inputs: (n, ...), of all images.
      network: which quantizes it; None for the float block.
    """
    kernel = network.rounded_kernel if network else keep
    output = network.rounded_output if network else keep
    count = images_per_pass(FLOAT * num_values(block), _MOST_IMAGES)
    wanted = [block.output]
    # One pass is cut out after the other: all of them are as large as the inputs.
    passes = (inputs[i : i + count] for i in range(0, len(inputs), count))
    return tf.concat(
        [compute(block, x, wanted, kernel=kernel, output=output)[0] for x in passes],
        axis=0,
    )
