"""Reads model files of Keras 2 and 3, of which no code is run.

A file is looked through before a library opens it: the layers that it names must be
known ones, since a name can stand for any function of any installed package; its
archive must stay inside its folder, and its weights inside the file.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import h5py

from dfq_tf.compat import (
    keras,
    keras3,
    native_output_hidden,
    no_garbage_collection,
)
from dfq_tf.errors import ModelError
from dfq_tf.files import MODEL_SUFFIXES
from dfq_tf.importing import parts, wrappers
from dfq_tf.importing.keras_names import ACTIVATION_OF, KNOWN_LAYERS, SIGNATURES
from dfq_tf.importing.repairs import (
    CONFIG,
    FUNCTIONAL,
    METADATA,
    TRAINING_CLASSES,
    WEIGHTS,
    drop_own_training,
    is_functional,
    is_of_tensorflow,
    name_model,
    repaired,
    serialized,
)

# A file that unpacks to more is no model for a phone.
_MOST_BYTES = 4 * 2**30
_ZIP_MAGIC, _HDF5_MAGIC = b"PK\x03\x04", b"\x89HDF\r\n\x1a\n"

_OF_SAVED_MODELS = ("saved_model.pb", "keras_metadata.pb", "fingerprint.pb")

_ALLOW = "pass --allow_code (allow_code=True)"
_KERAS_PACKAGES = ("keras", "tf_keras")
# Layers whose kernels Theano turned, and Keras 2 turned back. Kernels of depthwise and
# separable ones Keras turned itself before Theano: files have them as they are.
_TURNED_BY_THEANO = frozenset(
    {"Conv1D", "Conv2D", "Conv2DTranspose", "Conv3D", "ConvLSTM2D"}
)
# Layers that no later Keras has.
_OF_KERAS_1 = frozenset(
    """
    AtrousConvolution1D AtrousConvolution2D Convolution1D Convolution2D Convolution3D
    Deconvolution2D Deconvolution3D Highway MaxoutDense Merge ParametricSoftplus SReLU
    SeparableConvolution2D
    """.split()
)
# Layers and other parts that do nothing but compute. Those that run code, unpickle,
# or read other files have no place here: Lambda, TFSMLayer, TorchModuleWrapper,
# JaxLayer, FlaxLayer, StringLookup, TextVectorization and their like.
_KNOWN_CLASSES = ((KNOWN_LAYERS | TRAINING_CLASSES) - {"Lambda"}) | frozenset(
    """
    Custom>CustomScaleLayer

    AdaptiveAveragePooling2D AdaptiveMaxPooling2D AdditiveAttention Attention
    AveragePooling1D AveragePooling3D BatchNormalizationV1 BatchNormalizationV2
    Bidirectional CategoryEncoding Conv1D
    Conv1DTranspose Conv3D Conv3DTranspose ConvLSTM2D Cropping1D Cropping3D
    DepthwiseConv1D Dot EinsumDense Embedding GRU GRUCell GlobalAveragePooling1D
    GlobalAveragePooling3D GlobalMaxPooling1D GlobalMaxPooling3D InputLayer LSTM
    LSTMCell LocallyConnected1D LocallyConnected2D Masking MaxPooling1D MaxPooling3D
    MultiHeadAttention RNN RepeatVector SeparableConv1D SimpleRNN SimpleRNNCell
    SpatialDropout1D SpatialDropout3D SpectralNormalization SpectralNormalizationV2
    ThresholdedReLU TimeDistributed UpSampling1D UpSampling3D
    ZeroPadding1D ZeroPadding3D

    Functional Model Sequential

    DTypePolicy DTypePolicyMap DynamicLossScale FixedLossScale FloatDTypePolicy Policy
    PolicyV1 QuantizedDTypePolicy SeedGenerator

    Adadelta Adafactor Adagrad Adam AdamW Adamax Ftrl Lamb Lion LossScaleOptimizer Muon
    Nadam RMSprop SGD CosineDecay ExponentialDecay PiecewiseConstantDecay
    CategoricalCrossentropy SparseCategoricalCrossentropy BinaryCrossentropy
    CategoricalAccuracy SparseCategoricalAccuracy BinaryAccuracy Accuracy AUC Mean
    TopKCategoricalAccuracy SparseTopKCategoricalAccuracy
    """.split()
)
# Layers of Keras 2 that call a function, which it looks up in all of TensorFlow.
_OF_FUNCTIONS = ("SlicingOpLambda", "TFOpLambda")
# Values of JSON that are more than numbers and text, but no code.
_KNOWN_VALUES = frozenset(
    """
    __bytes__ __complex__ __dtype__ __ellipsis__ __keras_tensor__ __numpy__ __slice__
    __tensor__ __tuple__ TensorShape
    """.split()
)
# Operations of Keras 3 and functions of TensorFlow that a graph may call.
_KNOWN_OPERATIONS = {name for name in SIGNATURES if name[0].isupper()} | frozenset(
    """
    Abs Conv Einsum Log LogSoftmax Matmul Moveaxis Power Rsqrt Softsign Sqrt Square Sum
    Swapaxes
    """.split()
)
_KNOWN_FUNCTIONS = (SIGNATURES.keys() - _KNOWN_OPERATIONS) | frozenset(
    """
    compat.v1.shape math.abs math.pow math.reduce_sum math.rsqrt math.sqrt math.square
    shape stack
    """.split()
)
_KNOWN_ACTIVATIONS = ACTIVATION_OF.keys() | frozenset(
    """
    celu glu hard_shrink hard_tanh log_sigmoid log_softmax
    soft_shrink softsign sparse_plus sparse_sigmoid sparsemax squareplus tanh_shrink
    threshold

    ELU LeakyReLU PReLU ReLU Softmax ThresholdedReLU
    """.split()
)
# Those of them that Keras 2 has not.
_NOT_OF_KERAS_2 = frozenset(
    """
    celu exp glu hard_shrink hard_silu hard_swish hard_tanh log_sigmoid soft_shrink
    softmax_v2 sparse_plus sparse_sigmoid sparsemax squareplus tanh_shrink threshold
    """.split()
)
# Settings of layers that are functions.
_ACTIVATIONS = ("activation", "recurrent_activation")
# Classes of the project itself and of tfmot, whose students are files too.
_OWN_PREFIX = "dfq_tf>"
_TFMOT_CLASSES = frozenset(
    """
    QuantizeAnnotate QuantizeLayer QuantizeWrapper QuantizeWrapperV2

    Default8BitActivationQuantizeConfig Default8BitConvQuantizeConfig
    Default8BitConvTransposeQuantizeConfig Default8BitOutputQuantizeConfig
    Default8BitQuantizeConfig FixedQuantizeConfig NoOpQuantizeConfig OutputOnlyConfig

    AllValuesQuantizer FixedQuantizer LastValueQuantizer MovingAverageQuantizer
    NoQuantizer

    NoOpActivation QuantizeAwareActivation

    PruneLowMagnitude ConstantSparsity PolynomialDecay

    ClusterWeights
    """.split()
)
_OWN_MODULES = ("dfq_tf", "tensorflow_model_optimization")
# What Python says of the code of a Lambda layer that does not run.
_OF_OTHER_CODE = re.compile(r"marshal data|unknown opcode|name '\w+' is not defined")


def read_model(path: str | os.PathLike[str], *, allow_code: bool = False) -> Any:
    """Reads a model whole, with one clear error if that fails.

    Args:
      path: a `.keras` or `.h5` file, written by Keras 2 or 3; the `.json` file of an
        architecture with its weights beside it; the folder of an unpacked `.keras`
        file; or that of a SavedModel of tf.keras that has its configuration.
      allow_code: whether Python code that the file holds may be run, as Lambda layers
        have it, and classes that are not Keras' own be looked up.

    Returns:
      A model of tf_keras, or of Keras 3, as the file says.

    Raises:
      ModelError: the file is absent, damaged, of another kind, or not to be trusted.

    Warns:
      UserWarning: the class of a functional model is not Keras' own.
    """
    path = pathlib.Path(path)
    try:
        found = parts.parts_of(path)
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if found:
        return _read_parts(found, allow_code)
    _check_is_file(path)
    with path.open("rb") as file:
        start = file.read(200)
    is_archive = start.startswith(_ZIP_MAGIC)
    try:
        if is_archive:
            version = _check_archive(path, allow_code)
        elif start.startswith(_HDF5_MAGIC):
            version = _check_hdf5_model(path, allow_code)
        else:
            raise ModelError(f"{path} {_what_else(start)}")
    except (OSError, ValueError, KeyError, RecursionError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    load = _load_keras3 if version.startswith("3") else _load_keras2
    try:
        with (
            native_output_hidden(),
            no_garbage_collection(),
            repaired(path, is_archive, version) as readable,
        ):
            return _finalized(load(readable, allow_code))
    # Keras raises many kinds for a damaged file: from zipfile, h5py, json, itself.
    except Exception as error:
        raise _unreadable(path, error, version) from error


def _read_parts(found: parts.Parts, allow_code: bool) -> Any:
    """Reads a model of several files, when all of them have been looked through."""
    try:
        _check_version(found.path, found.version)
        library = keras3() if found.is_keras3 else keras
        _check_config(found.path, found.config, allow_code, library)
        if found.is_hdf5:
            with h5py.File(found.weights, "r") as file:
                _check_links(found.weights, file)
                # Newer weights do not say it, and no Keras with Theano wrote such.
                is_old = "layer_names" in file.attrs or "model_weights" in file
                said = found.config.get("backend") if is_old else None
                backend = file.attrs.get("backend", said)
            _check_kernels(found.weights, found.config, backend)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise _unreadable(found.weights, error) from error
    try:
        with native_output_hidden():
            return _finalized(parts.built(found, allow_code))
    except ModelError:
        raise
    # Keras raises many kinds for a damaged configuration.
    except Exception as error:
        raise _unreadable(found.path, error, found.version) from error


def _what_else(start: bytes) -> str:
    """What a file is that holds no Keras model, and the way out."""
    if start.startswith(b"version https://git-lfs"):
        return (
            "is a pointer that Git LFS left in place of the file; fetch the file with "
            "git lfs pull, or download it"
        )
    if start[4:8] == b"TFL3":
        return (
            "is a TFLite file, which has no layers; give the Keras model that it was "
            "made of"
        )
    if start.lstrip()[:1] == b"<":
        return "is a web page; download the file that the page offers"
    return (
        "cannot be read as a Keras model: it is neither a .keras archive nor an HDF5 "
        "file, but truncated, or of another format, such as ONNX. Save the model "
        "again with model.save"
    )


def _check_is_file(path: pathlib.Path) -> None:
    if _is_checkpoint(path):
        raise ModelError(
            f"{path} is a checkpoint of TensorFlow: weights without a model. Build the "
            "model, load_weights, and model.save('model.keras')"
        )
    if path.is_dir():
        is_saved_model = (path / "saved_model.pb").exists()
        raise ModelError(
            f"{path} is a SavedModel: functions without layers, which cannot be "
            "rewritten, and no keras_metadata.pb, which has the layers. Build the "
            "Keras model again, load_weights, and model.save('model.keras')"
            if is_saved_model
            else f"{path} is a folder; name a model file, .keras or .h5"
        )
    if path.suffix not in MODEL_SUFFIXES:
        raise ModelError(f"{path} {_of_other_name(path)}")
    if not path.is_file():
        raise ModelError(f"there is no model file {path}")


def _of_other_name(path: pathlib.Path) -> str:
    """What a file is that has not the name of a model's, and the way out."""
    if path.name in _OF_SAVED_MODELS:
        return "is one of the files of a SavedModel; name its folder"
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(200)
        if start[4:8] == b"TFL3":
            return _what_else(start)
        if start.startswith(_ZIP_MAGIC):
            return "is an archive; unpack it, and name the model file that was in it"
    return f"is not a model file; its name must end in {', '.join(MODEL_SUFFIXES)}"


def _is_checkpoint(path: pathlib.Path) -> bool:
    """Whether it is a checkpoint, one of its files, or the folder that has it."""
    if path.is_dir():
        return (path / "checkpoint").is_file()
    name = path.name
    is_part = name.endswith(".index") or ".data-0000" in name
    return is_part or path.with_name(f"{name}.index").is_file()


def _check_archive(path: pathlib.Path, allow_code: bool) -> str:
    """Looks a `.keras` archive through; returns the version of Keras."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for name in names:
            place = pathlib.PurePosixPath(name.replace("\\", "/"))
            if place.is_absolute() or ".." in place.parts or ":" in name:
                raise ModelError(
                    f"{path} has a member {name!r} outside its own folder; do not "
                    "trust this file"
                )
        if len(set(names)) != len(names):
            raise ModelError(f"{path} has two members of one name; it is damaged")
        if sum(member.file_size for member in members) > _MOST_BYTES:
            raise ModelError(
                f"{path} unpacks to more than {_MOST_BYTES >> 30} GiB; it is damaged, "
                "or made to fill the disk"
            )
        missing = {CONFIG, METADATA, WEIGHTS} - set(names)
        if missing:
            raise ModelError(
                f"{path} has no {', '.join(sorted(missing))}: it is no Keras model, or "
                "damaged. Save it again with model.save"
            )
        config = json.loads(archive.read(CONFIG))
        metadata = json.loads(archive.read(METADATA))
        weights = archive.read(WEIGHTS)
    version = str(metadata.get("keras_version", "2"))
    _check_config(path, config, allow_code, _library_of(version))
    with h5py.File(io.BytesIO(weights), "r") as file:
        _check_links(path, file)
    return version


def _check_hdf5_model(path: pathlib.Path, allow_code: bool) -> str:
    """Looks an `.h5` file through; returns the version of Keras."""
    with h5py.File(path, "r") as file:
        if "model_config" not in file.attrs:
            beside = parts.architecture_beside(path)
            other = f"; or name its architecture, {beside}" if beside else ""
            raise ModelError(
                f"{path} holds weights without a model; build the model, load_weights, "
                f"and model.save('model.keras'){other}"
            )
        config = json.loads(_text(file.attrs["model_config"]))
        version = _text(file.attrs.get("keras_version", "2"))
        backend = file.attrs.get("backend")
        _check_links(path, file)
    _check_version(path, version)
    _check_config(path, config, allow_code, _library_of(version))
    _check_kernels(path, config, backend)
    return version


def _library_of(version: str) -> Any:
    """The library that reads what a version of Keras wrote."""
    return keras3() if version.startswith("3") else keras


def _check_version(path: pathlib.Path, version: str) -> None:
    """Refuses what Keras 1 wrote: it gave layers other names and settings."""
    if version.split(".")[0] == "1":
        raise _of_keras_1(path, version)


def _of_keras_1(path: pathlib.Path, version: str) -> ModelError:
    return ModelError(
        f"{path} was written by Keras {version}, whose layers, such as Convolution2D, "
        "no later Keras reads. Build the model again with tf_keras, load_weights of "
        "this file, and model.save('model.keras')"
    )


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _check_links(path: pathlib.Path, group: Any) -> None:
    """Refuses weights that lie in other files: reading them would give those away."""
    for name in group:
        link = group.get(name, getlink=True)
        if isinstance(link, h5py.ExternalLink):
            raise ModelError(
                f"{path} takes {name!r} from another file; do not trust it"
            )
        item = group[name]
        if isinstance(item, h5py.Group):
            if isinstance(link, h5py.HardLink):
                _check_links(path, item)
        elif item.external or item.is_virtual:
            raise ModelError(
                f"{path} takes {name!r} from another file; do not trust it"
            )


def _check_config(
    path: pathlib.Path, config: Any, allow_code: bool, library: Any
) -> None:
    """Refuses a configuration that names anything but known parts of Keras.

    What `repair` will change in a copy is changed here too, and does not count.

    Args:
      path: of the file.
      config: of the model.
      allow_code: see `read_model`.
      library: Keras 2 or 3, which will read the file.
    """
    if not isinstance(config, dict):
        raise ModelError(f"{path} has no configuration of a model; it is damaged")
    own = config.get("class_name")
    is_own = own not in FUNCTIONAL and is_functional(config)
    name_model(config)
    if is_own:
        warnings.warn(
            f"{path} has a functional model of the class {own}, which is not of Keras: "
            "its layers are read, and no function of the class. If it has a call of "
            "its own, its answers are others than these",
            stacklevel=6,
        )
    drop_own_training(config)
    for part in serialized(config):
        _check_activations(path, part, library)
        if not allow_code and not _is_known(part, library):
            raise _refusal(path, part)


def _check_kernels(path: pathlib.Path, config: Mapping[str, Any], backend: Any) -> None:
    """Refuses kernels that Theano has turned by half a circle: not depthwise ones.

    Keras 2.3 and before turned them back for another backend. tf_keras, which reads the
    same files, does not.

    Args:
      path: of the file that has the kernels.
      config: of the model, which has been looked through.
      backend: what computed when the file was written, as it says; None if it does not.
    """
    if backend is None or _text(backend) != "theano":
        return
    kinds = {part["class_name"] for part in serialized(config)}
    turned = sorted(kinds & _TURNED_BY_THEANO)
    if turned:
        raise ModelError(
            f"{path} has the kernels of {', '.join(turned)} as Theano has them, turned "
            "by half a circle: read as they are, they compute something else. Open the "
            "model with tf_keras; for each such layer, w = layer.get_weights(), w[0] = "
            "w[0][::-1, ::-1], layer.set_weights(w); and model.save('model.keras')"
        )


def _check_activations(
    path: pathlib.Path, part: Mapping[str, Any], library: Any
) -> None:
    """Refuses a layer whose activation Keras will not find, whatever is allowed.

    It goes by the name, and looks among its own functions and registered ones alone.
    """
    settings = part.get("config")
    if part["class_name"] not in _KNOWN_CLASSES or not isinstance(settings, dict):
        return
    for setting in _ACTIVATIONS:
        activation: Any = settings.get(setting)
        if isinstance(activation, str):
            activation = {"class_name": "function", "config": activation}
        if not isinstance(activation, dict):
            continue
        is_function = activation.get("class_name") == "function"
        if is_function and not _is_known(activation, library):
            raise _unknown_activation(path, activation, _name_of(part), library)


def _unknown_activation(
    path: pathlib.Path, activation: Mapping[str, Any], layer: str, library: Any
) -> ModelError:
    name, way_out = str(activation.get("config")), "Write it as Keras layers"
    is_there = activation.get("module") in (None, "", "builtins")
    if is_there and _bare(name) in ACTIVATION_OF:  # others would be refused later
        how = "saving.register_keras_serializable"
        if ">" not in name:  # that gives every name a package
            how = f"utils.get_custom_objects()[{name!r}] = {name}"
        way_out += (
            "; or, if it computes what the function of that name in Keras does, "
            f"register it in your own program ({library.__name__}.{how}), and call "
            "load_classifier there"
        )
    return ModelError(
        f"{path} names {_called(activation)} (activation of layer {layer}), which is "
        f"not of Keras {library.__version__}, nor in the file. {way_out}"
    )


def _refusal(path: pathlib.Path, part: Mapping[str, Any]) -> ModelError:
    """That part of a configuration may run code, and the way out."""
    kind, module = part["class_name"], str(part.get("module") or "")
    name, way_out = _name_of(part), "Write it as Keras layers"
    if kind in ("Lambda", "__lambda__"):
        what = "a lambda"
        if kind == "Lambda":
            what = "a Lambda layer"
            way_out += (
                "; or, if it is one scale and one offset for each channel, a mean, a "
                f"maximum or a reshape, and you trust who made the file, {_ALLOW}"
            )
        return ModelError(
            f"{path} holds Python code ({name or kind}, {what}), which loading would "
            f"run. {way_out}"
        )
    if not module and kind in _OF_KERAS_1:  # its files may not say the version
        return _of_keras_1(path, "1")
    where = _called(part)
    where += f" of {_function_of(part)}" if kind in _OF_FUNCTIONS else ""
    if not _is_registered_as_itself(part):
        where += f", registered as {part['registered_name']}"
    where += f" (layer {name})" if name else ""
    return ModelError(
        f"{path} names {where}, which is not known here, and loading would import and "
        f"run it. {way_out}"
    )


def _is_known(part: Mapping[str, Any], library: Any) -> bool:
    """Whether part of a configuration names nothing but a known part of Keras."""
    kind, module = part["class_name"], str(part.get("module") or "")
    if kind in _KNOWN_VALUES:  # with a module, Keras 2 looks such a name up there
        return not module and not part.get("registered_name")
    if not _is_registered_as_itself(part):
        return False
    package = module.split(".")[0]
    if kind == "function":
        if is_of_tensorflow(part):
            return True
        is_there = package in ("", "builtins", *_KERAS_PACKAGES)
        name = str(part.get("config"))
        return is_there and _has_activation(library, name)
    own = _OWN_PREFIX + kind.removeprefix(_OWN_PREFIX)
    if kind in _TFMOT_CLASSES or own in keras.utils.get_custom_objects():
        return package in ("", *_OWN_MODULES)
    if package not in ("", *_KERAS_PACKAGES):
        return False
    if kind in _OF_FUNCTIONS:
        return _function_of(part) in _KNOWN_FUNCTIONS
    if ".ops." in module:
        return kind in _KNOWN_OPERATIONS
    return kind in _KNOWN_CLASSES


def _is_registered_as_itself(part: Mapping[str, Any]) -> bool:
    """Whether a part has no other name, which Keras would look up too."""
    own = [part["class_name"]]
    if part["class_name"] == "function":
        own.append(str(part.get("config")))
    registered = str(part.get("registered_name") or own[0])
    return _bare(registered) in map(_bare, own)


def _has_activation(library: Any, name: str) -> bool:
    """Whether Keras 2 or 3 has a function, or was given one by the program itself."""
    is_missing = library is keras and name in _NOT_OF_KERAS_2
    is_own = name in _KNOWN_ACTIVATIONS and not is_missing
    return is_own or name in library.utils.get_custom_objects()


def _bare(name: str) -> str:
    """A name without the package under which it is registered."""
    return name.rpartition(">")[2]


def _called(part: Mapping[str, Any]) -> str:
    """The class or function that a part names, with its module."""
    kind, module = part["class_name"], str(part.get("module") or "")
    if kind == "function":
        kind = str(part.get("config"))
        module = "" if module == "builtins" else module  # Keras writes it for all
    return f"{module}.{kind}" if module else kind


def _function_of(part: Mapping[str, Any]) -> str:
    """The function of TensorFlow that one of `_OF_FUNCTIONS` calls."""
    config = part.get("config")
    return str(config.get("function")) if isinstance(config, dict) else ""


def _name_of(part: Mapping[str, Any]) -> str:
    """The name of a layer; '' of all other parts, though some have names too."""
    config = part.get("config")
    settings = config if isinstance(config, dict) else {}
    is_layer = "inbound_nodes" in part or "trainable" in settings
    return str(part.get("name") or settings.get("name") or "") if is_layer else ""


def _load_keras2(path: pathlib.Path, allow_code: bool) -> Any:
    with wrappers.known_to(keras):
        return keras.models.load_model(path, compile=False, safe_mode=not allow_code)


def _load_keras3(path: pathlib.Path, allow_code: bool) -> Any:
    library = keras3()
    with wrappers.known_to(library), contextlib.redirect_stdout(io.StringIO()):
        return library.models.load_model(path, compile=False, safe_mode=not allow_code)


def _finalized(model: Any) -> Any:
    """A model whose layers compute with the weights that were read.

    Some, as Normalization, compute with constants that they make of their weights. Not
    all ways of reading make them anew.
    """
    for layer in model._flatten_layers():
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
    return model


def _unreadable(
    path: pathlib.Path, error: BaseException, version: str = ""
) -> ModelError:
    """That a file cannot be read, and why.

    Args:
      path: of the file.
      error: what a reader of it raised.
      version: of the Keras that wrote it, if that is known.
    """
    why = "it may be truncated or damaged"
    library = _library_of(version)
    installed = library.__version__
    if _numbers(version) > _numbers(installed):
        why = (
            f"Keras {version} wrote it, and Keras {installed} is installed, which may "
            f"be too old for it. Upgrade it: pip install --upgrade {library.__name__}"
        )
    if _OF_OTHER_CODE.search(str(error)):
        why = (
            "its Python code, of a Lambda layer, does not run here: it is of another "
            "Python or Keras, or needs names of the program that made it. Write it as "
            "Keras layers, or save the model anew without it"
        )
    return ModelError(
        f"{path} cannot be read as a Keras model; {why}. {parts.said_by_reader(error)}"
    )


def _numbers(version: str) -> list[int]:
    """The numbers of a version, of which '3.10' has higher ones than '3.9'."""
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
