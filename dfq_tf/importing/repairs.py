"""Files that Keras would refuse though all is there: repaired in a copy, then read.

Which format a file has is in its content. Keras goes by its name; releases 2.12 to 2.15
gave the groups of weights other names, those from Windows with backslashes; layers have
had arguments that other releases do not know; Keras builds tfmot's layers of
quantization twice; and a file may name classes that only the training needs.
"""

import contextlib
import inspect
import io
import json
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import h5py

from dfq_tf.compat import keras, keras3
from dfq_tf.importing import wrappers
from dfq_tf.importing.keras_names import KNOWN_LAYERS, TRAINING_ONLY, TRAINING_SETTINGS

# Members of a `.keras` archive.
CONFIG, METADATA, WEIGHTS = "config.json", "metadata.json", "model.weights.h5"

_COMPILATION = "compile_config"
# Lambda reads more of its configuration than its constructor takes.
_READ_LAYERS = KNOWN_LAYERS - {"Lambda"}
# With False, this and all arguments of whose names it is the beginning say nothing.
_RENORM = "renorm"
# Initializers, regularizers and constraints of Keras.
TRAINING_CLASSES = frozenset(
    """
    ConstantV2 GlorotNormalV2 GlorotUniformV2 HeNormalV2 HeUniformV2 IdentityV2
    LecunNormalV2 LecunUniformV2 OnesV2 OrthogonalV2 RandomNormalV2 RandomUniformV2
    TruncatedNormalV2 VarianceScalingV2 ZerosV2

    Constant GlorotNormal GlorotUniform HeNormal HeUniform Identity IdentityInitializer
    LecunNormal LecunUniform Ones Orthogonal OrthogonalInitializer RandomNormal
    RandomUniform STFT TruncatedNormal VarianceScaling Zeros

    L1 L1L2 L2 MaxNorm MinMaxNorm NonNeg OrthogonalRegularizer RadialConstraint UnitNorm
    """.split()
)
# The classes of functional models in files, and what the configurations of these have.
FUNCTIONAL = ("Functional", "Model")
_OF_FUNCTIONAL = ("name", "layers", "input_layers", "output_layers")
# Where Keras 2.12 had Functional, which no later release finds there.
_OLD_PLACE = "keras.engine."
# What Keras 2 takes for any layer, though no constructor names it.
_OF_ANY_LAYER = frozenset(
    """
    activity_regularizer autocast batch_input_shape batch_size implementation input_dim
    input_shape weights
    """.split()
)
# Names of functions of TensorFlow -> of Keras, where they differ.
FUNCTION_NAMES = {"softmax_v2": "softmax", "swish": "silu"}

_OLD_GROUP, _GROUP = "_layer_checkpoint_dependencies", "layers"


@contextlib.contextmanager
def repaired(path: pathlib.Path, is_archive: bool, version: str) -> Iterator[Any]:
    """The path of a file that Keras reads: the given one, or a copy for a while.

    Args:
      path: of a model file that has been looked through.
      is_archive: whether it is a `.keras` archive; else it is HDF5.
      version: of the Keras that wrote it.
    """
    suffix = ".keras" if is_archive else ".h5"
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / f"model{suffix}"
        if is_archive:
            is_copied = _repair_archive(path, copy, version)
        else:
            is_copied = _repair_hdf5(path, copy, version)
        if not is_copied and path.suffix != suffix:
            shutil.copyfile(path, copy)
            is_copied = True
        yield copy if is_copied else path


def _repair_archive(path: pathlib.Path, copy: pathlib.Path, version: str) -> bool:
    """Writes a repaired copy, if there is anything to repair."""
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read(CONFIG))
        weights = io.BytesIO(archive.read(WEIGHTS))
        # Keras is told not to read how the model itself was compiled.
        is_changed = repair(config, version.startswith("3"), of_models_inside=True)
        with h5py.File(weights, "r+") as file:
            is_changed |= rename_groups(file)
        if not is_changed:
            return False
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {CONFIG: json.dumps(config).encode(), WEIGHTS: weights.getvalue()}
    with zipfile.ZipFile(copy, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return True


def _repair_hdf5(path: pathlib.Path, copy: pathlib.Path, version: str) -> bool:
    """Writes a repaired copy, if there is anything to repair."""
    with h5py.File(path, "r") as file:
        config = json.loads(file.attrs["model_config"])
    if not repair(config, version.startswith("3")):
        return False
    shutil.copyfile(path, copy)
    with h5py.File(copy, "r+") as file:
        file.attrs["model_config"] = json.dumps(config)
    return True


def repair(config: Any, is_keras3: bool, of_models_inside: bool = False) -> bool:
    """Makes a configuration one that this release reads, in place.

    Args:
      config: of a model.
      is_keras3: whether Keras 3 wrote it.
      of_models_inside: see `drop_compilations`.

    Returns:
      Whether anything was changed.
    """
    is_changed = name_model(config)
    is_changed |= drop_own_training(config)
    is_changed |= drop_unknown_arguments(config, is_keras3)
    is_changed |= drop_early_builds(config)
    is_changed |= name_functions(config)
    is_changed |= drop_compilations(config, of_models_inside)
    return is_changed


def is_functional(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a functional model, whatever its class is."""
    arguments = config.get("config")
    return isinstance(arguments, dict) and arguments.keys() >= {*_OF_FUNCTIONAL}


def name_model(config: Any) -> bool:
    """Gives functional models a class that Keras finds, in place: the public one.

    The model's own class may have another training, of which nothing is needed.

    Args:
      config: of a model; inside it, what has its place in Keras 2.12 alone is named.

    Returns:
      Whether anything had another class.
    """
    is_changed = False
    for part in serialized(config):
        is_old = str(part.get("module")).startswith(_OLD_PLACE)
        if is_old and part["class_name"] in FUNCTIONAL and is_functional(part):
            part |= {"module": "keras", "class_name": "Model", "registered_name": None}
            is_changed = True
    if config.get("class_name") in FUNCTIONAL or not is_functional(config):
        return is_changed
    arguments = config["config"]
    names = (*_OF_FUNCTIONAL, "trainable")
    config["config"] = {name: arguments[name] for name in names if name in arguments}
    config["class_name"] = "Model"
    if "module" in config:
        config |= {"module": "keras", "registered_name": None}
    return True


def drop_own_training(config: Any) -> bool:
    """Drops initializers, regularizers and constraints that Keras has not, in place.

    It takes others for them, and the weights that were trained are in the file.

    Returns:
      Whether there were any.
    """
    is_changed = False
    for arguments, name, value in _settings(config):
        if name.endswith(TRAINING_SETTINGS) and not _is_of_training(value):
            is_changed = True
            del arguments[name]
    return is_changed


def _is_of_training(setting: Any) -> bool:
    """Whether a setting is None, or one of `TRAINING_CLASSES`."""
    if not isinstance(setting, dict):
        return setting is None
    package = str(setting.get("module") or "").split(".")[0]
    is_known = str(setting.get("class_name")) in TRAINING_CLASSES
    return is_known and package in ("", "keras", "tf_keras")


def drop_unknown_arguments(config: Any, is_keras3: bool) -> bool:
    """Drops what this release does not know of layers, and what changes nothing.

    Of layers that only train, that is all; of others, what says nothing.

    Args:
      config: of a model.
      is_keras3: whether Keras 3 wrote it.

    Returns:
      Whether anything was dropped.
    """
    library = keras3() if is_keras3 else keras
    is_changed = False
    for part in serialized(config):
        kind, arguments = part["class_name"], part.get("config")
        if kind not in _READ_LAYERS or not isinstance(arguments, dict):
            continue
        known = _arguments(getattr(library.layers, kind, None))
        unknown = arguments.keys() - known - _OF_ANY_LAYER if known else set()
        renorm = arguments.get(_RENORM)
        for name in unknown:
            is_idle = not renorm and name.startswith(_RENORM)
            if kind in TRAINING_ONLY or arguments[name] is None or is_idle:
                is_changed = True
                del arguments[name]
    return is_changed


def drop_early_builds(config: Any) -> bool:
    """Lets tfmot's layers of quantization be built when they are called, no sooner.

    A `.keras` file says how each layer is built, and Keras does so before the call,
    which builds it too. These layers then make all their weights twice.

    Returns:
      Whether anything was changed.
    """
    is_changed = False
    for part in serialized(config):
        if part["class_name"] in wrappers.OF_QUANTIZATION:
            is_changed |= part.pop("build_config", None) is not None
    return is_changed


def drop_compilations(config: Any, of_models_inside: bool = False) -> bool:
    """Drops how models were compiled, in place: their losses and metrics are not read.

    Args:
      config: of a model.
      of_models_inside: whether that of the model itself stays.

    Returns:
      Whether anything was dropped.
    """
    is_changed = False
    for part in serialized(config):
        if not (of_models_inside and part is config):
            is_changed |= part.pop(_COMPILATION, None) is not None
    return is_changed


def name_functions(config: Any) -> bool:
    """Names activations as Keras does that were functions of TensorFlow, in place.

    Keras 3 keeps tf.nn.softmax as a function of a module, which it does not find again.

    Returns:
      Whether there were any.
    """
    is_changed = False
    for arguments, name, value in _settings(config):
        if is_of_tensorflow(value):
            arguments[name] = FUNCTION_NAMES[value["config"]]
            is_changed = True
    return is_changed


def is_of_tensorflow(part: Any) -> bool:
    """Whether part of a configuration is a function that `name_functions` names."""
    return (
        isinstance(part, dict)
        and part.get("class_name") == "function"
        and str(part.get("module")).startswith(("tensorflow.python.ops.", "builtins"))
        and part.get("config") in FUNCTION_NAMES
    )


def serialized(config: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in a configuration that stand for an object.

    But for what models were compiled with, see `drop_compilations`.
    """
    todo = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            is_object = isinstance(value.get("class_name"), str)
            if is_object:
                yield value
            todo.extend(
                each
                for name, each in value.items()
                if not (is_object and name == _COMPILATION)
            )
        elif isinstance(value, list):
            todo.extend(value)


def _settings(config: Any) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """All settings of all objects: those of the object, a name of them, and its value.

    Whoever looks may change or delete the setting.
    """
    for part in serialized(config):
        arguments = part.get("config")
        if isinstance(arguments, dict):
            for name, value in list(arguments.items()):
                yield arguments, name, value


def _arguments(layer: Any) -> set[str]:
    """What the constructors of a class of layers take; empty if there is none."""
    classes = inspect.getmro(layer) if layer else ()
    return {
        name
        for each in classes
        if "__init__" in vars(each)
        for name in inspect.signature(vars(each)["__init__"]).parameters
    }


def rename_groups(file: Any) -> bool:
    """Gives the groups of an HDF5 file of weights the names that Keras looks for.

    Returns:
      Whether they had others.
    """
    is_old = any(name.replace("\\", "/").startswith(_OLD_GROUP) for name in file)
    if is_old:
        _rename_groups(file)
    return is_old


def _rename_groups(group: Any) -> None:
    """Gives the groups of layers, at any depth, the names that Keras looks for.

    It looks for `layers/conv2d`, `layers/conv2d_1`, ... in the order of the layers of
    each kind. Of the old names the order is right, but numbers may be left out.
    """
    for name in list(group):
        if "\\" in name:
            group.move(name, name.replace("\\", "/"))
    if _OLD_GROUP in group:
        group.move(_OLD_GROUP, _GROUP)
        kinds: Mapping[str, list[tuple[int, str]]] = defaultdict(list)
        for name in group[_GROUP]:
            kind, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name).groups()  # type: ignore[union-attr]
            kinds[kind].append((int(number or 0), name))
        for kind, names in kinds.items():
            for place, (_, name) in enumerate(sorted(names)):
                wanted = f"{kind}_{place}" if place else kind
                if wanted != name:
                    group[_GROUP].move(name, wanted)
    for child in group.values():
        if isinstance(child, h5py.Group):
            _rename_groups(child)
