"""Models kept in parts: an architecture as JSON or in a SavedModel, and its weights.

An unpacked `.keras` archive is one too, as `model.save("net", zipped=False)` writes it.

Nothing here runs a function of a file. The architecture is configurations of layers, of
which `files` lets only known ones through; the weights are numbers.
"""

import contextlib
import dataclasses
import io
import json
import pathlib
import shlex
import shutil
import tempfile
from typing import Any

import h5py

from dfq_tf.compat import keras, keras3, tf
from dfq_tf.errors import ModelError
from dfq_tf.files import is_of_keras, read_text
from dfq_tf.importing import repairs, wrappers

_WEIGHTS = (".h5", ".hdf5")
_METADATA, _VARIABLES = "keras_metadata.pb", "variables/variables"
_OF_TENSORFLOW_JS = {"modelTopology", "weightsManifest"}
_NETWORKS = (*repairs.FUNCTIONAL, "Sequential")
# Modules of its functional models.
_OF_KERAS2 = ("tf_keras.", "keras.engine.", "keras.src.engine.")


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of a model.

    Attributes:
      path: the file of the architecture; of a SavedModel, its folder.
      config: of the model, as Keras writes it; not looked through yet.
      is_keras3: whether Keras 3 wrote it.
      weights: the HDF5 file; of a SavedModel, the checkpoint's name without an ending.
      version: of the Keras that wrote it; '' if that is not known.
    """

    path: pathlib.Path
    config: dict[str, Any]
    is_keras3: bool
    weights: pathlib.Path
    version: str = ""

    @property
    def is_hdf5(self) -> bool:
        """Whether the weights are an HDF5 file."""
        return self.weights.suffix in _WEIGHTS


def parts_of(path: pathlib.Path) -> Parts | None:
    """The parts of a model in a `.json` file, a SavedModel or an unpacked archive.

    Returns:
      None if the path is no such thing, a SavedModel without Keras' configuration
      among them.

    Raises:
      ModelError: something is missing, or the model has no layers.
      OSError, ValueError: a file cannot be read.
    """
    if path.is_dir() and (path / _METADATA).is_file():
        return _saved_model(path)
    if _version_in(path):
        return _json(path / repairs.CONFIG)
    if path.suffix == ".json" and path.is_file():
        return _json(path)
    return None


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """The files that a model, or anything else, consists of.

    A file is one of its own; a folder that is no model has none.
    """
    try:
        parts = parts_of(path)
    except (ModelError, OSError, ValueError):
        parts = None
    if parts is None:
        return [path] if path.is_file() else []
    if parts.is_hdf5:
        return [parts.path, parts.weights]
    return [path / _METADATA, *sorted(path.glob(f"{_VARIABLES}.*"))]


def architecture_beside(path: pathlib.Path) -> pathlib.Path | None:
    """The `.json` of the architecture that weights belong to, if it is there."""
    stem = path.name.removesuffix(path.suffix).removesuffix(".weights")
    beside = path.with_name(f"{stem}.json")
    try:
        is_there = beside.is_file() and is_of_keras(json.loads(read_text(beside)))
    except (OSError, ValueError):
        is_there = False
    return beside if is_there else None


def _json(path: pathlib.Path) -> Parts:
    config = json.loads(read_text(path))
    if isinstance(config, dict) and config.keys() & _OF_TENSORFLOW_JS:
        if config.get("format") == "graph-model":
            raise ModelError(
                f"{path} is a graph model of TensorFlow.js: functions without layers, "
                "which cannot be rewritten. Give the Keras model that it was made of"
            )
        raise ModelError(
            f"{path} is a model of TensorFlow.js. Teachable Machine exports one of "
            "Keras too: Tensorflow, then Keras. For another, pip install tensorflowjs, "
            "and tensorflowjs_converter --input_format=tfjs_layers_model "
            f"--output_format=keras {shlex.quote(str(path))} model.h5"
        )
    if not is_of_keras(config):
        raise ModelError(
            f"{path} is no architecture of a model, as model.to_json() writes it. If "
            "it describes a model, name the model's file, .keras or .h5, beside it"
        )
    version = _version_in(path.parent) if path.name == repairs.CONFIG else ""
    if version:
        weights = path.with_name(repairs.WEIGHTS)
        if not weights.is_file():
            raise ModelError(
                f"{path} is of an unpacked .keras file, whose weights are to lie "
                f"beside it in {weights.name}, which is not there. Unpack the file "
                "again, or save the model whole with model.save('model.keras')"
            )
        return Parts(path, config, version.startswith("3"), weights, version)
    # Keras 3 names the module of the class; Keras 2 its own version, or its own place.
    module = str(config.get("module") or "")
    is_keras3 = bool(module) and "keras_version" not in config
    is_keras3 = is_keras3 and not module.startswith(_OF_KERAS2)
    version = str(config.get("keras_version") or "")
    return Parts(path, config, is_keras3, _weights_beside(path), version)


def _version_in(folder: pathlib.Path) -> str:
    """The version of Keras that wrote an unpacked archive; '' of what is none.

    Raises:
      OSError, ValueError: a file cannot be read.
    """
    metadata = folder / repairs.METADATA
    if not metadata.is_file() or not (folder / repairs.CONFIG).is_file():
        return ""
    fields = json.loads(read_text(metadata))
    return str(fields.get("keras_version", "")) if isinstance(fields, dict) else ""


def _weights_beside(path: pathlib.Path) -> pathlib.Path:
    """The weights of an architecture: of the same name, or the only ones there."""
    all_there = sorted(p for p in path.parent.iterdir() if p.suffix in _WEIGHTS)
    same = [p for p in all_there if p.stem.removesuffix(".weights") == path.stem]
    found = same or all_there
    if len(found) == 1:
        return found[0]
    listed = ", ".join(p.name for p in found) or "none"
    raise ModelError(
        f"{path} is an architecture, whose weights are to lie beside it in one file, "
        f"{path.stem}.weights.h5 or {path.stem}.h5, as model.save_weights writes it; "
        f"found: {listed}. Put the right one into the folder alone, or save the model "
        "whole with model.save('model.keras')"
    )


def _saved_model(path: pathlib.Path) -> Parts:
    metadata = keras.protobuf.saved_metadata_pb2.SavedMetadata()
    try:
        metadata.ParseFromString((path / _METADATA).read_bytes())
        (root,) = [node for node in metadata.nodes if node.node_path == "root"]
        said = json.loads(root.metadata)
    # A library's own error for a damaged file.
    except Exception as error:
        raise ModelError(
            f"{path} is a SavedModel whose {_METADATA} cannot be read; it is damaged"
        ) from error
    config = {name: said.get(name) for name in ("class_name", "config")}
    is_network = config["class_name"] in _NETWORKS and config["config"]
    if not is_network and not repairs.is_functional(config):
        raise ModelError(
            f"{path} is a SavedModel of {config['class_name']}, a subclass of Model: "
            "functions without layers, which cannot be rewritten. Build a functional "
            "or Sequential model, give it the weights, and model.save('model.keras')"
        )
    version = str(said.get("keras_version") or "")
    return Parts(path, config, False, path / _VARIABLES, version)


def built(parts: Parts, allow_code: bool) -> Any:
    """The model, when its configuration and weights have been looked through.

    Raises:
      ModelError: the weights are not those of the architecture.
      Exception: of many kinds, from Keras, for a damaged file.
    """
    repairs.repair(parts.config, parts.is_keras3)
    if parts.is_keras3:
        library = keras3()
        # In an archive, numbers tell what several parts have in common.
        sharing = library.src.saving.serialization_lib.ObjectSharingScope()
        hidden = contextlib.redirect_stdout(io.StringIO())
        with wrappers.known_to(library), sharing, hidden:
            model = library.saving.deserialize_keras_object(
                parts.config, safe_mode=not allow_code
            )
    else:
        # What `load_model` has as an argument, no other function of Keras 2 has.
        safe_mode = keras.src.saving.serialization_lib.SafeModeScope(not allow_code)
        with wrappers.known_to(keras), safe_mode:
            model = keras.models.model_from_json(json.dumps(parts.config))
    load = _load_hdf5 if parts.is_hdf5 else _load_checkpoint
    try:
        load(model, parts.weights)
    # Keras and TensorFlow raise many kinds for weights that do not fit.
    except Exception as error:
        raise ModelError(
            f"{parts.weights} are not the weights of the model in {parts.path}, or "
            f"damaged. {said_by_reader(error)}"
        ) from error
    return model


def said_by_reader(error: BaseException) -> str:
    """A sentence that ends a message: what Keras, or another reader of files, said.

    Args:
      error: whose text may have any length; its first line is said, or else its kind.
        Keras 3 gives the reason behind what it says of all errors.
    """
    lines = str(error).rpartition("Exception encountered:")[2].strip().splitlines()
    return f"The reader said: {lines[0][:300] if lines else type(error).__name__}"


def _load_hdf5(model: Any, path: pathlib.Path) -> None:
    """Loads weights by what the file holds; Keras would go by its name."""
    with tempfile.TemporaryDirectory() as folder:
        with h5py.File(path, "r") as file:
            is_old = "layer_names" in file.attrs or "model_weights" in file
        copy = pathlib.Path(folder) / ("all.h5" if is_old else "all.weights.h5")
        shutil.copyfile(path, copy)
        if not is_old:
            with h5py.File(copy, "r+") as file:
                repairs.rename_groups(file)
        model.load_weights(copy)


def _load_checkpoint(model: Any, prefix: pathlib.Path) -> None:
    """Loads weights by the places of their layers in the model.

    Raises:
      AssertionError: some are not there.
    """
    with tempfile.TemporaryDirectory() as folder:
        # TensorFlow takes a name such as a[1] for a pattern: it reads by another one.
        link = pathlib.Path(folder) / prefix.parent.name
        link.symlink_to(prefix.parent.absolute())
        status = tf.train.Checkpoint(root=model).read(str(link / prefix.name))
    status.expect_partial()  # its optimizer is of no use here
    status.assert_existing_objects_matched()
