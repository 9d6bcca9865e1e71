"""The one place that imports TensorFlow, Keras 2 (`tf_keras`) and tfmot.

tfmot accepts Keras 2 models only, while `tf.keras` has been Keras 3 since
TensorFlow 2.16. Every other module writes `from dfq_tf.compat import keras, tf`.
Models of Keras 3 are read, with `keras3()`, but none is made; a program that uses
Keras 3 goes on as before. The environment is after the import as it was before it, and
TensorFlow's log level is the program's: the tools set their own.
"""

import contextlib
import gc
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import IO, Any


class _Hiding:
    """Turns the standard error stream away while any block hides what is printed.

    The stream is that of the whole process: blocks of several threads share this.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks, self._has_failed = 0, False
        self._end = contextlib.ExitStack()

    def begin(self) -> None:
        """One more block, the first of which turns the stream away."""
        with self._lock:
            self._blocks += 1
            if self._blocks > 1:
                return
            self._has_failed = False
            with contextlib.ExitStack() as end:
                try:
                    stream = sys.stderr.fileno()
                    sys.stderr.flush()
                    saved = os.dup(stream)
                    end.callback(os.close, saved)
                    hidden = end.enter_context(tempfile.TemporaryFile())
                    os.dup2(hidden.fileno(), stream)
                except (AttributeError, OSError, TypeError, ValueError):
                    return  # no stream of a file, or no folder for a temporary one
                end.callback(self._put_back, stream, saved, hidden)
                self._end = end.pop_all()

    def leave(self, has_failed: bool) -> None:
        """One block less, the last of which puts the stream back.

        Args:
          has_failed: whether it has raised. What was hidden is shown then.
        """
        with self._lock:
            self._blocks -= 1
            self._has_failed |= has_failed
            if not self._blocks:
                self._end.close()

    def _put_back(self, stream: int, saved: int, hidden: IO[bytes]) -> None:
        os.dup2(saved, stream)
        if self._has_failed:
            hidden.seek(0)
            os.write(stream, hidden.read())


_hiding = _Hiding()


@contextlib.contextmanager
def native_output_hidden() -> Iterator[None]:
    """Hides what native code prints to the standard error stream in the block.

    TensorFlow and LiteRT log there about devices and delegates, past every setting.
    If the block raises, what was hidden is shown after all. Where the stream cannot be
    turned away, nothing is hidden.
    """
    _hiding.begin()
    has_failed = True
    try:
        yield
        has_failed = False
    finally:
        _hiding.leave(has_failed)


@contextlib.contextmanager
def modules_absent(*names: str) -> Iterator[None]:
    """Lets no import in the block find these modules, if they are not loaded yet.

    It saves the time of those that others import only if they are there.
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def traced(function: Callable[..., Any], *specs: "tf.TensorSpec") -> Any:
    """Compiles a function for tensors of these specifications, once and for all.

    Unlike a `tf.function`, it is never traced again, whatever the size of a batch.
    """
    compiled = tf.function(function, input_signature=specs, autograph=False)
    return compiled.get_concrete_function()


def keras3() -> Any:
    """The package `keras`, of version 3, which TensorFlow brings along.

    It takes seconds to load, and is asked for only where a model needs it.
    """
    import keras as keras_3

    return keras_3


def is_of_layers(model: Any) -> bool:
    """Whether it is a functional or Sequential model of Keras 2: one made of layers."""
    is_functional = getattr(model, "_is_graph_network", False)
    is_model = isinstance(model, keras.Model) and is_functional
    return is_model or isinstance(model, keras.Sequential)


# TensorFlow reads these once, when it is imported.
_KERAS, _ONEDNN = "TF_USE_LEGACY_KERAS", "TF_ENABLE_ONEDNN_OPTS"


@contextlib.contextmanager
def _chosen_for_import() -> Iterator[None]:
    """Sets for the block what TensorFlow reads; afterwards all is as it was before."""
    before = {name: os.environ.get(name) for name in (_KERAS, _ONEDNN)}
    if "tensorflow" not in sys.modules:
        # TensorFlow loads one Keras at once: 3, which takes two thirds as long as all
        # the rest and is not always needed, or 2 where this variable says so.
        # `tf.keras` stays what it is for the rest of the program, as a rule Keras 3,
        # loaded when it is first used.
        os.environ[_KERAS] = "1"
        # oneDNN's kernels: TensorFlow takes them by itself only on processors with
        # AVX-512 VNNI or newer, but with AVX2 alone they are 1.5 times faster too
        # (docs/experiments/speed.md). Who has set the variable has decided.
        if platform.machine().lower() in ("x86_64", "amd64"):
            os.environ.setdefault(_ONEDNN, "1")
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)  # tfmot sets it too
            if value is not None:
                os.environ[name] = value


def gpu_names() -> list[str]:
    """What the GPUs are called that TensorFlow sees and the program has not hidden."""
    details = tf.config.experimental.get_device_details
    gpus = tf.config.get_visible_devices("GPU")
    return [details(gpu).get("device_name", gpu.name) for gpu in gpus]


def uses_onednn() -> bool:
    """Whether TensorFlow computes with oneDNN's kernels, as far as is known."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and os.environ.get(_ONEDNN) != "0"


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For blocks that make objects and leave none, where looking only takes time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@contextlib.contextmanager
def own_defaults() -> Iterator[None]:
    """Has Keras 2 make layers of float32 and channels last in the block.

    A program may have set something else for its own layers, or keras.json, which
    Keras 2 and 3 share. Afterwards that holds again.
    """
    backend, precision = keras.backend, keras.mixed_precision
    floatx, data_format = backend.floatx(), backend.image_data_format()
    policy = precision.global_policy()
    backend.set_floatx("float32")
    backend.set_image_data_format("channels_last")
    precision.set_global_policy("float32")
    try:
        yield
    finally:
        # Where no policy was set, it follows floatx.
        precision.set_global_policy(None if policy.name == floatx else policy)
        backend.set_image_data_format(data_format)
        backend.set_floatx(floatx)


_is_keras2 = os.environ.get(_KERAS) in ("true", "True", "1")
with native_output_hidden(), _chosen_for_import(), no_garbage_collection():
    import tensorflow as tf
    import tf_keras as keras

    # tfmot looks at `tf.keras`, which would settle what it is, and in Keras 3 for what
    # Keras 2.13 had.
    _tf_keras, tf.keras = vars(tf)["keras"], keras
    with modules_absent("keras"):
        import tensorflow_model_optimization as tfmot
    tf.keras = _tf_keras
    if not _is_keras2:  # `import tensorflow.keras` looks here
        tf.__path__[:] = [
            p for p in tf.__path__ if f"{os.sep}tf_keras{os.sep}" not in p
        ]

__all__ = [
    "is_of_layers",
    "keras",
    "keras3",
    "modules_absent",
    "native_output_hidden",
    "no_garbage_collection",
    "own_defaults",
    "tf",
    "tfmot",
    "traced",
]
