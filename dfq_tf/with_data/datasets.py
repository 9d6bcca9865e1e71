"""Labelled images: to train a teacher and to measure accuracy, and for nothing else.

No other module of the package imports this one; the tools do. That is what makes
"data-free" visible in the import graph.
"""

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dfq_tf.errors import DataError, not_installed

# Values for --dataset that TensorFlow Datasets serves.
TFDS_NAMES = ("cifar10", "cifar100", "svhn_cropped", "mnist", "fashion_mnist")
# Served in the same way, by a builder of the project.
_TINY_IMAGENET = "tiny_imagenet"
# What is said to somebody who has others.
OTHER_IMAGES = (
    "Labelled images of your own are measured with a few lines of Python: "
    "docs/own_model.md, in the project's folder, has them"
)


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 (n, height, width, channels), and labels, int32 (n,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A labelled data set.

    Attributes:
      name: what --dataset said.
      image_shape: (height, width, channels).
      class_names: one per class, in the order of the labels.
      load: 'train' or 'test' -> Split, reading it on each call.
    """

    name: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    load: Callable[[str], Split]


def accuracy(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of images whose highest score is that of their label, in [0, 1].

    Args:
      scores: (n, num_classes).
      labels: integer (n,).
    """
    return float(np.mean(np.argmax(scores, axis=-1) == labels))


def dataset_names() -> list[str]:
    """All values that `open_dataset` takes."""
    return ["digits", *TFDS_NAMES, _TINY_IMAGENET]


def open_dataset(
    name: str, data_dir: str | None = None, archive: str | None = None
) -> Dataset:
    """Opens a data set, downloading it if need be; images are read by `load`.

    Args:
      name: one of `dataset_names()`. 'digits' ships with scikit-learn: 1,797 images
        of 8x8 pixels, every fifth of which is the test split.
      data_dir: where TensorFlow Datasets keeps its files, None for its default.
      archive: a copy of tiny-imagenet-200.zip, in place of the download; it is read
        once, and then found in `data_dir`.

    Raises:
      DataError: the name is unknown, the data is absent and cannot be downloaded, or
        the archive is not what it should be, belongs to another data set, or is not
        the one that `data_dir` was filled from.
    """
    if archive is not None and name != _TINY_IMAGENET:
        raise DataError(
            f"archive is {archive!r}, but dataset is {name!r}: only {_TINY_IMAGENET} "
            "is read from an archive"
        )
    if name == "digits":
        _of_sklearn()  # that it is missing is known before any training
        return Dataset("digits", (8, 8, 1), tuple("0123456789"), _load_digits)
    if name not in dataset_names():
        raise DataError(
            f"dataset is {name!r}; it must be one of {dataset_names()}. {OTHER_IMAGES}"
        )
    return _open_tfds(name, data_dir, archive)


def _of_extra(module: str, package: str) -> Any:
    """A module that data sets alone need.

    Raises:
      DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            not_installed(f"{package}, which has the data set", "data")
        ) from error


def _of_sklearn() -> Any:
    return _of_extra("sklearn.datasets", "scikit-learn")


def _load_digits(split: str) -> Split:
    digits = _of_sklearn().load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    is_test = np.arange(len(images)) % 5 == 4
    chosen = is_test if split == "test" else ~is_test
    return Split(images[chosen], digits.target[chosen].astype(np.int32))


def _open_tfds(name: str, data_dir: str | None, archive: str | None) -> Dataset:
    # Slow to import, and not needed for digits.
    tfds = _of_extra("tensorflow_datasets", "tensorflow-datasets")
    from dfq_tf.with_data import tiny_imagenet

    if data_dir is not None and not os.path.isdir(data_dir):
        raise DataError(f"data_dir is {data_dir!r}; there is no such folder")
    if name == _TINY_IMAGENET:
        if archive is not None:
            tiny_imagenet.check_archive(archive)
        builder = tiny_imagenet.TinyImagenet(data_dir=data_dir, archive=archive)
    else:
        builder = tfds.builder(name, data_dir=data_dir)
    if not builder.data_path.exists():
        _prepare(builder, archive)
    elif archive is not None:
        tiny_imagenet.check_same_archive(builder, archive)

    def load(split: str) -> Split:
        arrays = tfds.as_numpy(builder.as_dataset(split=split, batch_size=-1))
        return Split(arrays["image"], arrays["label"].astype(np.int32))

    features = builder.info.features
    return Dataset(name, features["image"].shape, tuple(features["label"].names), load)


def _prepare(builder: Any, archive: str | None) -> None:
    """Downloads a data set, or reads its archive, into the builder's folder."""
    import requests
    from tensorflow_datasets import download

    from dfq_tf.with_data import tiny_imagenet

    name = builder.name
    folder = builder.data_path.parents[1]
    if name == _TINY_IMAGENET:
        way_out = f"fetch {tiny_imagenet.URL} and name the file with --archive"
    else:
        way_out = f"prepare it (tfds build {name}) and name its folder with --data_dir"
    absent = f"the data set {name} is not in data_dir {folder} and cannot be downloaded"
    if archive is None:
        try:
            _check_network(builder.info.homepage)
        except OSError as error:
            raise DataError(
                f"{absent}: there is no network, or its server does not answer. On "
                f"another machine, {way_out} here"
            ) from error
    try:
        builder.download_and_prepare()
    except (
        download.DownloadError,
        download.download_manager.NonMatchingChecksumError,
        requests.exceptions.RequestException,  # an OSError, and none of the disk
    ) as error:
        raise DataError(f"{absent}: {error}. Elsewhere, {way_out}") from error
    except OSError as error:
        raise DataError(
            f"the data set {name} cannot be written to data_dir {folder}: {error}. "
            "Name a folder with room and permission to write with --data_dir"
        ) from error
    if archive is not None:
        tiny_imagenet.keep_digest(builder, archive)


def _check_network(homepage: str) -> None:
    """Raises OSError within seconds where there is no network.

    TFDS itself retries for over three minutes before it gives up.
    """
    import requests

    for url in (homepage, "https://storage.googleapis.com"):
        try:
            requests.head(url, timeout=10)
            return
        except requests.exceptions.RequestException as error:
            last_error = error
    raise last_error
