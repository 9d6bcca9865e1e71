"""Small networks and data that several tests share."""

import atexit
import contextlib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from dfq_tf.compat import keras, tf
from dfq_tf.context import Context
from dfq_tf.graph.classifier import Classifier
from dfq_tf.graph.description import ModelDescription
from dfq_tf.importing.classifiers import as_classifier
from dfq_tf.settings import DistillationConfig
from dfq_tf.training.learner import Learner

layers = keras.layers


@contextlib.contextmanager
def eagerly() -> Iterator[None]:
    """Runs compiled steps operation by operation in the block.

    For a few steps that takes less time than compiling them, where the order of things
    is what is tested and not the compiled function.
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


class Reused:
    """Models that several tests have one after the other.

    Building a small model takes longer than a step of it. Each test gets them as they
    were when they were new, and after `begin` they may be had again.
    """

    def __init__(self, build: Callable[..., keras.Model]):
        self._build = build
        self._made: dict[tuple, list[tuple[keras.Model, list[np.ndarray]]]] = {}
        self._taken: dict[tuple, int] = {}

    def begin(self) -> None:
        """A new test: none of the models is in use."""
        self._taken.clear()

    def __call__(self, *args: Any) -> keras.Model:
        """A model as `build` makes it of these arguments, which is not in use."""
        made = self._made.setdefault(args, [])
        place = self._taken.get(args, 0)
        self._taken[args] = place + 1
        if place == len(made):
            model = self._build(*args)
            made.append((model, model.get_weights()))
        model, weights = made[place]
        model.set_weights(weights)
        return model


def new_folder() -> pathlib.Path:
    """An empty folder, which is removed when the tests end."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="dfq_tf_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def randomise(model: keras.Model, seed: int = 0) -> keras.Model:
    """Gives every weight a random value, BN scales and variances a positive one.

    Fresh networks have biases of 0 and BN layers that do nothing, so that a rewrite
    that forgets them would still seem right.
    """
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        name = variable.name.split("/")[-1].split(":")[0]
        variable.assign(_random_weight(rng, name, variable.shape))
    return model


def randomise_keras3(model: Any, seed: int = 0) -> Any:
    """As `randomise`, of a Keras 3 model; what is no float stays as it is."""
    rng = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if "Normalization" == type(layer).__name__:
            continue
        for variable in layer.weights:
            if "float" in str(variable.dtype) and layer.get_weights():
                variable.assign(_random_weight(rng, variable.name, variable.shape))
    return model


def _random_weight(rng: Any, name: str, shape: Sequence[int]) -> np.ndarray:
    if name in ("gamma", "moving_variance"):
        return rng.uniform(0.5, 2.0, shape)
    if name in ("beta", "moving_mean", "bias"):
        return rng.normal(0.0, 0.5, shape)
    fan_in = np.prod(shape) / shape[-1]
    return rng.normal(0.0, 1.0 / np.sqrt(fan_in), shape)


def description(num_classes: int, output: str = "logits") -> ModelDescription:
    """One mean and one scale for all channels."""
    names = tuple(f"class_{i}" for i in range(num_classes))
    return ModelDescription((120.0,), (1 / 64,), output, names)


@functools.cache
def small_classifier(
    image_shape: Sequence[int] = (8, 8, 3), num_classes: int = 4, seed: int = 0
) -> Classifier:
    """The network of `small_learner` as a teacher, which nothing changes: shared."""
    return as_classifier(small_learner(image_shape, num_classes, seed))


def small_learner(
    image_shape: Sequence[int] = (8, 8, 3), num_classes: int = 4, seed: int = 0
) -> Learner:
    """Two conv-BN-ReLU blocks and a dense layer, with random weights."""
    image = x = layers.Input(tuple(image_shape))
    for i, strides in enumerate((1, 2), start=1):
        x = layers.Conv2D(
            6, 3, strides, padding="same", use_bias=False, name=f"conv{i}"
        )(x)
        x = layers.BatchNormalization(name=f"bn{i}")(x)
        x = layers.ReLU(name=f"relu{i}")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(num_classes, name="logits")(x)
    model = randomise(keras.Model(image, x), seed)
    return Learner(model, description(num_classes))


def noisy_learner(image_shape: Sequence[int] = (8, 8, 3)) -> Learner:
    """A network with layers that draw numbers, its weights the same each time."""
    image = x = layers.Input(tuple(image_shape))
    x = layers.GaussianNoise(0.5)(x)
    x = layers.SpatialDropout2D(0.25)(layers.Conv2D(4, 3)(x))
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    model = keras.Model(image, layers.Dense(4)(x))
    return Learner(randomise(model), description(4))


def classifier(model: keras.Model, output: str = "logits") -> Classifier:
    """A tf_keras model as a teacher, with the mean and scale of `description`."""
    return as_classifier(Learner(model, description(model.output_shape[-1], output)))


def context(
    settings: Any = DistillationConfig(batch_size=8), **changes: Any
) -> Context:
    """How a run of a test runs: on one device, with seed 0, and nothing is kept."""
    fields = dict(
        seed=0, precision="float32", strategy=None, directory=None, progress=False
    )
    return Context(settings, **{**fields, **changes})  # type: ignore[arg-type]


def random_inputs(model: keras.Model, batch_size: int = 4, seed: int = 0) -> np.ndarray:
    """Standard normal inputs for a model, float32."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch_size, *model.input_shape[1:])).astype(np.float32)


def copies(weights: Sequence) -> list[np.ndarray]:
    """The values that some variables have now."""
    return [np.array(_numpy(variable)) for variable in weights]


def all_equal(first: Sequence, second: Sequence) -> bool:
    """Whether two lists of arrays or variables are the same, bit for bit."""
    return len(first) == len(second) and all(
        np.array_equal(_numpy(a), _numpy(b)) for a, b in zip(first, second)
    )


def _numpy(value: object) -> np.ndarray:
    return value if isinstance(value, np.ndarray) else value.numpy()  # a variable


def displacements(make_optimizer: Callable[..., Any], num_steps: int) -> np.ndarray:
    """How far each step moves a weight whose gradient is 1 throughout.

    Args:
      make_optimizer: gives one that is built for a model.
      num_steps: how many steps are taken.
    """
    image = layers.Input((1,))
    model = keras.Model(image, layers.Dense(1, use_bias=False)(image))
    optimizer = make_optimizer(model)
    (weight,) = model.trainable_variables
    values = [weight.numpy().item()]
    for _ in range(num_steps):
        optimizer.apply_gradients([(tf.ones_like(weight), weight)])
        values.append(weight.numpy().item())
    return -np.diff(values)


def offset_in_padded(
    result: np.ndarray, image: np.ndarray, mean: float | Sequence[float]
) -> tuple[int, int] | None:
    """Where a result was cut out of an image padded with the mean; None if nowhere."""
    height, width, channels = image.shape
    padded = np.empty((height + 2, width + 2, channels))
    padded[:] = mean
    padded[1:-1, 1:-1] = image
    for row in range(3):
        for column in range(3):
            window = padded[row : row + height, column : column + width]
            if np.allclose(result, window, rtol=0, atol=1e-3):
                return row, column
    return None
