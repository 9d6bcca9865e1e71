"""Times one round of the paper's loop, ours and PyTorch's, in turn, on one machine.

    pip install torch==2.13.0    # no dependency of the project
    python benchmarks/torch_round.py

WRN-40-2 to WRN-16-1 with random weights, batch 64; a round is one generator step and
one student step on fresh noise, or, shared, on the images of the generator step.
PyTorch's loop does what the usual re-implementations do, tuned: channels last, bfloat16
by autocast where the processor is faster in it, the teacher's weights frozen, no graph
for what the student step generates, hooks that take the BN statistics. Rounds
alternate, so that a drift of the machine meets all.
"""

import functools
import pathlib
import statistics
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import torch
from torch import nn
from torch.nn import functional

from dfq_tf import models
from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.distillation import phases, steps
from dfq_tf.distillation.generator import make_generators
from dfq_tf.distillation.teacher import observe
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.settings import DistillationConfig
from dfq_tf.training import optimizers
from dfq_tf.training.copies import resolve_precision, with_precision
from dfq_tf.training.learner import Learner

ROUNDS, BATCH, NOISE = 15, 64, 512
PRECISION = resolve_precision("auto")


class Block(nn.Module):
    """Pre-activation residual block of WRN."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """BN and ReLU before each convolution."""
        y = functional.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(functional.relu(self.bn2(self.conv1(y))))


def wide_resnet(depth: int, width: int) -> nn.Module:
    """WRN for 32x32 images and 10 classes."""
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    inputs = 16
    for group, outputs in enumerate((16 * width, 32 * width, 64 * width)):
        for block in range((depth - 4) // 6):
            stride = 2 if group and not block else 1
            layers.append(Block(inputs, outputs, stride))
            inputs = outputs
    head = [nn.BatchNorm2d(inputs), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network = nn.Sequential(*layers, *head, nn.Linear(inputs, 10))
    return network.to(memory_format=torch.channels_last)


def generator() -> nn.Module:
    """The generator of the public re-implementations, for 32x32 images."""
    layers: list[nn.Module] = [
        nn.Linear(NOISE, 8 * 8 * 128),
        nn.Unflatten(1, (128, 8, 8)),
        nn.BatchNorm2d(128),
    ]
    for outputs in (128, 64):
        layers += [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(128, outputs, 3, 1, 1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(0.2),
        ]
    layers += [nn.Conv2d(64, 3, 3, 1, 1), nn.Tanh(), nn.BatchNorm2d(3, affine=False)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """KL(softmax(teacher) || softmax(student)), the mean over the batch."""
    return functional.kl_div(
        functional.log_softmax(student.float(), -1),
        functional.log_softmax(teacher.float(), -1),
        reduction="batchmean",
        log_target=True,
    )


def _autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=PRECISION == "bfloat16")


class TorchLoop:
    """PyTorch's round."""

    def __init__(self) -> None:
        self.teacher, self.student = wide_resnet(40, 2).eval(), wide_resnet(16, 1)
        self.teacher.requires_grad_(False)
        self.generator = generator()
        self.inputs: list[tuple[nn.BatchNorm2d, torch.Tensor]] = []
        for module in self.teacher.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(
                    lambda bn, args, _: self.inputs.append((bn, args[0]))
                )
        self.adam = torch.optim.Adam(self.generator.parameters(), 1e-3)
        self.sgd = torch.optim.SGD(
            self.student.parameters(), 0.1, momentum=0.9, nesterov=True
        )

    def generator_step(self) -> float:
        """Trains the generator; its loss."""
        self.inputs.clear()
        self.student.eval()
        with _autocast():
            images = self.generator(torch.randn(BATCH, NOISE))
            images = images.contiguous(memory_format=torch.channels_last)
            logits = self.teacher(images)
            answers = self.student(images)
        bn_loss = torch.zeros(())
        for bn, values in self.inputs:
            variance, mean = torch.var_mean(values.float(), (0, 2, 3), correction=0)
            ratio = variance / bn.running_var
            distance = (mean - bn.running_mean) ** 2 / bn.running_var
            bn_loss = bn_loss + 0.5 * (distance + ratio - ratio.log() - 1).sum()
        shares = functional.softmax(logits.float(), -1)
        instance = -(shares * functional.log_softmax(logits.float(), -1)).sum(-1).mean()
        mean_share = shares.mean(0)
        batch = -(mean_share * (mean_share + 1e-10).log()).sum()
        loss = bn_loss + instance - batch - divergence(logits, answers)
        self.adam.zero_grad(set_to_none=True)
        loss.backward()
        self.adam.step()
        return loss.item()

    def student_step(self) -> float:
        """Trains the student; its loss."""
        self.inputs.clear()
        self.student.train()
        with _autocast():
            with torch.no_grad():
                images = self.generator(torch.randn(BATCH, NOISE))
                images = images.contiguous(memory_format=torch.channels_last)
                logits = self.teacher(images)
            answers = self.student(images)
        loss = divergence(logits, answers)
        self.sgd.zero_grad(set_to_none=True)
        loss.backward()
        self.sgd.step()
        return loss.item()

    def round(self, index: int) -> None:
        """One step of each."""
        self.generator_step()
        self.student_step()


class OurLoop:
    """The project's round.

    Args:
      is_shared: whether the student step takes the images of the generator step.
    """

    def __init__(self, is_shared: bool) -> None:
        self._is_shared = is_shared
        config = DistillationConfig(batch_size=BATCH, noise_dim=NOISE)
        names = tuple("0123456789")
        description = ModelDescription((120,), (1 / 64,), "logits", names)
        teacher, student = (
            Learner(models.build_model(name, (32, 32, 3), 10), description)
            for name in ("wrn_40_2", "wrn_16_1")
        )
        student = Learner(with_precision(student.model, PRECISION), description)
        context = Context(config, 0, PRECISION, None, None, False)
        generators = make_generators(teacher.image_shape, context)
        state = steps.State(
            observe(as_classifier(teacher), PRECISION),
            generators,
            [optimizers.adam(generators[0], 1e-3, 1000)],
            [student],
            [optimizers.sgd(student.model, 0.1, 1000, 0.9)],
        )
        self._generator_step, self._student_step, self._answered_step = (
            phases.compiled(functools.partial(step, state, config))
            for step in (steps.generator_step, steps.student_step, steps.answered_step)
        )

    def round(self, index: int) -> None:
        """One step of each."""
        seed_and_step = tf.constant([0, index])
        made = self._generator_step(seed_and_step)
        _wait(made)
        if self._is_shared:
            _wait(self._answered_step(made.images, made.teacher_logits, seed_and_step))
        else:
            _wait(self._student_step(seed_and_step))


def _wait(results: Any) -> None:
    for value in tf.nest.flatten(results):
        value.numpy()


def main() -> None:
    """Times and prints the medians."""
    keras.utils.set_random_seed(0)
    torch.manual_seed(0)
    loops = {
        "PyTorch, tuned": TorchLoop(),
        "ours": OurLoop(is_shared=False),
        "ours, shared": OurLoop(is_shared=True),
    }
    print(f"{PRECISION}, batch {BATCH}, medians of {ROUNDS} rounds")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for index in range(ROUNDS + 3):
        for name, loop in loops.items():
            began = time.perf_counter()
            loop.round(index)
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times[3:]) for name, times in seconds.items()}
    for name, median in medians.items():
        ratio = median / medians["PyTorch, tuned"]
        print(f"{name:16} {median:.3f} s a round, {ratio:.2f}x")


if __name__ == "__main__":
    main()
