"""Tiny-ImageNet as a data set of TensorFlow Datasets, which has none.

200 classes of ImageNet in 64x64 pixels: 500 training images a class, and 50 to test
on, the archive's validation images; those of its test folder have no labels (Stanford
CS231n, https://www.kaggle.com/c/tiny-imagenet). `checksums.tsv` beside this file says
what the archive must be; `tiny_imagenet_classes.tsv` has its classes in order.
"""

import functools
import io
import pathlib
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from dfq_tf.errors import DataError
from dfq_tf.files import digest, write_text

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_FOLDER = "tiny-imagenet-200"
_WNIDS = f"{_FOLDER}/wnids.txt"
_ANNOTATIONS = f"{_FOLDER}/val/val_annotations.txt"
# In the folder of TensorFlow Datasets, beside what was read from an archive.
_DIGEST = "archive.sha256"
_TRAIN = re.compile(rf"{_FOLDER}/train/(n\d+)/images/[^/]+\.JPEG")


class TinyImagenet(tfds.core.GeneratorBasedBuilder):
    """Reads the archive, from its home or from a file.

    Args:
      archive: a copy of the archive; None to download it. Parts of it will do, as long
        as they are in its layout.
      **kwargs: see `tfds.core.GeneratorBasedBuilder`.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, archive: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._archive = archive

    def _info(self) -> tfds.core.DatasetInfo:
        names = list(_classes().values())
        features = {
            "image": tfds.features.Image(shape=(64, 64, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(names=names),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            homepage="http://cs231n.stanford.edu",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
        path = self._archive or dl_manager.download(URL)
        check_archive(path)
        return {"train": self._train_images(path), "test": self._test_images(path)}

    def _generate_examples(self, *args: Any) -> Iterator[Any]:
        """Not used: each split has a generator of its own."""
        raise AssertionError

    def _train_images(self, path: str) -> Iterator[Any]:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                match = _TRAIN.fullmatch(name)
                if match:
                    yield name, self._example(archive, name, match[1])

    def _test_images(self, path: str) -> Iterator[Any]:
        with zipfile.ZipFile(path) as archive:
            for line in archive.read(_ANNOTATIONS).decode().splitlines():
                name, wnid = _image_and_class(line)
                yield name, self._example(archive, name, wnid)

    def _example(
        self, archive: zipfile.ZipFile, name: str, wnid: str
    ) -> dict[str, Any]:
        # Read and never unpacked: nothing in the archive names a place on the disk.
        image = io.BytesIO(archive.read(name))
        return {"image": image, "label": list(_classes()).index(wnid)}


@functools.cache
def _classes() -> dict[str, str]:
    """WordNet identifier of each class -> its name, in the order of the labels."""
    table = pathlib.Path(__file__).with_name("tiny_imagenet_classes.tsv")
    return dict(line.split("\t") for line in table.read_text().splitlines())


def _image_and_class(line: str) -> tuple[str, str]:
    """Member and WordNet identifier that a line of _ANNOTATIONS speaks of."""
    file_name, wnid = line.split("\t")[:2]
    return f"{_FOLDER}/val/images/{file_name}", wnid


def keep_digest(builder: TinyImagenet, archive: str) -> None:
    """Notes in the builder's folder which archive it was filled from."""
    write_text(builder.data_path / _DIGEST, digest(archive))


def check_same_archive(builder: TinyImagenet, archive: str) -> None:
    """Raises DataError if the builder's folder was filled from another archive."""
    path = builder.data_path / _DIGEST
    downloaded = builder.url_infos[URL].checksum
    if digest(archive) != (path.read_text() if path.exists() else downloaded):
        raise DataError(
            f"archive is {archive!r}, but data_dir holds Tiny-ImageNet of another one, "
            f"in {builder.data_path}. Delete that folder, leave out --archive to use "
            "it, or name another folder with --data_dir"
        )


def check_archive(path: str) -> None:
    """Refuses what is not Tiny-ImageNet.

    Args:
      path: of a zip file.

    Raises:
      DataError: it is absent, not a zip file, lacks what Tiny-ImageNet has, or has a
        member outside its folder, or lists what it has not.
    """
    expected = f"; it must be tiny-imagenet-200.zip, as {URL} has it"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            wnids, annotations = (
                archive.read(name).decode() if name in names else ""
                for name in (_WNIDS, _ANNOTATIONS)
            )
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"archive is {path!r}, which cannot be read: {error}{expected}"
        ) from error
    for name in names:
        parts = name.split("/")
        if parts[0] != _FOLDER or ".." in parts or "\\" in name:
            raise DataError(
                f"archive is {path!r}, which has a member outside the folder "
                f"{_FOLDER}: {name!r}{expected}"
            )
    wanted = {_WNIDS, _ANNOTATIONS}
    missing = sorted(wanted - set(names))
    if not missing and not any(map(_TRAIN.fullmatch, names)):
        missing = [f"{_FOLDER}/train/n.../images/*.JPEG"]
    tested = []
    for line in annotations.splitlines():
        if line.count("\t") < 1:
            raise DataError(
                f"archive is {path!r}, whose {_ANNOTATIONS} has a line without image "
                f"and class: {line!r}{expected}"
            )
        tested.append(_image_and_class(line))
    missing = missing or sorted({image for image, _ in tested} - set(names))
    if missing:
        raise DataError(f"archive is {path!r}, which has no {missing[0]}{expected}")
    folders = {match[1] for match in map(_TRAIN.fullmatch, names) if match}
    classes = {*wnids.split(), *folders, *(wnid for _, wnid in tested)}
    unknown = sorted(classes - set(_classes()))
    if unknown:
        raise DataError(
            f"archive is {path!r}, which has a class that is not one of the 200: "
            f"{unknown[0]}{expected}"
        )
