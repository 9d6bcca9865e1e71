"""What a file says of itself, read with the numbers of tflite-support's schema."""

import dataclasses
import io
import zipfile

import numpy as np
from absl.testing import absltest, parameterized
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import number_types
from flatbuffers.table import Table

from dfq_tf.errors import ConfigError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.settings import FileConfig
from dfq_tf.tflite import metadata, writer
from tests import ends_test

NAMES = ("žába", "two words", "a", "4")
CONFIG = FileConfig(
    model_name="Frogs",
    model_description="Says what a frog is.",
    model_version="1.2",
    model_author="Jana Nováková",
    model_license="Apache-2.0",
)


def content_of(config=CONFIG, **changes):
    made = ends_test.network("softmax", **{"class_names": NAMES, **changes})
    return writer.write(made, config)


class Raw:
    """A table of a flatbuffer, read without this project's reader."""

    def __init__(self, buffer, place):
        self.table = Table(buffer, place)

    def place(self, slot):
        offset = self.table.Offset(4 + 2 * slot)
        assert offset, f"there is no field {slot}"
        return offset

    def text(self, slot):
        return self.table.String(self.table.Pos + self.place(slot)).decode()

    def byte(self, slot):
        place = self.table.Pos + self.place(slot)
        return self.table.Get(number_types.Int8Flags, place)

    def inside(self, slot):
        place = self.table.Indirect(self.table.Pos + self.place(slot))
        return Raw(self.table.Bytes, place)

    def one(self, slot):
        assert self.table.VectorLen(self.place(slot)) == 1
        return Raw(
            self.table.Bytes, self.table.Indirect(self.table.Vector(self.place(slot)))
        )

    def number(self, slot):
        assert self.table.VectorLen(self.place(slot)) == 1
        start = self.table.Vector(self.place(slot))
        return self.table.Get(number_types.Float32Flags, start)


def raw(content):
    model = schema.Model.GetRootAs(content, 0)
    assert model.Metadata(0).Name() == b"TFLITE_METADATA"
    buffer = model.Buffers(model.Metadata(0).Buffer()).DataAsNumpy().tobytes()
    assert buffer[4:8] == b"M001"
    return Raw(buffer, int.from_bytes(buffer[:4], "little"))


class MetadataTest(parameterized.TestCase):
    def test_fields_stand_where_the_schema_has_them(self):
        model = raw(content_of())
        said = [model.text(slot) for slot in (0, 1, 2, 4, 5, 7)]
        self.assertEqual(
            said,
            [
                "Frogs",
                "Says what a frog is.",
                "1.2",
                "Jana Nováková",
                "Apache-2.0",
                "1.0.0",
            ],
        )
        subgraph = model.one(3)
        image, output = subgraph.one(2), subgraph.one(3)
        self.assertEqual((image.text(0), output.text(0)), ("image", "probabilities"))
        rgb, properties = 1, 2
        self.assertEqual(image.inside(3).byte(0), properties)
        self.assertEqual(image.inside(3).inside(1).byte(0), rgb)
        normalization = image.one(4)
        self.assertEqual(normalization.byte(0), 1)
        self.assertEqual([normalization.inside(1).number(i) for i in (0, 1)], [0, 1])
        for tensor in (image, output):
            highest, lowest = (tensor.inside(5).number(i) for i in (0, 1))
            self.assertEqual((lowest, highest), (0, 255))
        labels, axis_labels = output.one(6), 2
        self.assertEqual((labels.text(0), labels.byte(2)), ("labels.txt", axis_labels))

    def test_class_names_are_a_packed_file(self):
        content = content_of()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            (entry,) = archive.infolist()
            text = archive.read(entry).decode()
        self.assertEqual(entry.filename, "labels.txt")
        self.assertEqual(entry.compress_type, zipfile.ZIP_STORED)
        self.assertEqual(text, "žába\ntwo words\na\n4\n")
        self.assertEqual(content_of(), content)  # no date is in it

    @parameterized.parameters(
        ("uint8", 120.0, (0.0,), (1.0,), (0.0, 255.0)),
        ("int8", 120.0, (128.0,), (1.0,), (-128.0, 127.0)),
        ("float32", 120.0, (120.0,), (20.0,), (-6.0, 6.75)),
        ("float32", 125.3, (0.0,), (1.0,), (0.0, 255.0)),
    )
    def test_says_how_pixels_are_fed(self, input_type, of_model, mean, std, limits):
        config = dataclasses.replace(CONFIG, input_type=input_type)
        said = metadata.read(content_of(config, mean=of_model))
        self.assertEqual((said.mean, said.input_range), (mean, limits))
        np.testing.assert_allclose(said.std, std, rtol=1e-6)

    @parameterized.parameters(
        (dict(), "probabilities", (0.0, 255.0)),
        (dict(output_type="int8"), "probabilities", (-128.0, 127.0)),
        (dict(output_type="float32"), "probabilities", (0.0, 1.0)),
        (dict(output_type="float32", file_output="logits"), "logits", None),
    )
    def test_says_what_is_given(self, fields, name, limits):
        said = metadata.read(content_of(dataclasses.replace(CONFIG, **fields)))
        self.assertEqual((said.output_name, said.output_range), (name, limits))

    def test_is_read_as_it_was_written(self):
        said = metadata.read(content_of())
        found = [said.name, said.description, said.version, said.author, said.license]
        self.assertEqual(found, list(dataclasses.astuple(CONFIG)[-5:]))
        self.assertEqual((said.channels, said.class_names), (3, NAMES))

    def test_of_a_file_without(self):
        made = ends_test.network()
        self.assertIsNone(metadata.read(writer.write(made)))
        said = metadata.read(writer.write(made, FileConfig()))
        self.assertEqual((said.name, said.license, said.version), ("", "", ""))


class BadTextTest(parameterized.TestCase):
    @parameterized.parameters("model_name", "model_license", "model_description")
    def test_no_utf_8_is_refused(self, name):
        with self.assertRaisesRegex(
            ConfigError, rf"{name} is '\\udcff', which is no valid UTF-8 text; write it"
        ):
            FileConfig(**{name: "\udcff"})

    @parameterized.parameters(
        ("\udcff", r"class_names is '\\udcff', which is no valid UTF-8"),
        ("a\nb", r"class_names has 'a\\nb', which is more than one line"),
        ("b\n", r"class_names has 'b\\n', which is .*, or ends one; .* text\.split"),
    )
    def test_class_names_must_fit_a_file_of_labels(self, name, message):
        with self.assertRaisesRegex(ConfigError, message):
            ModelDescription((0.0,), (1.0,), "logits", ("a", name))

    @parameterized.parameters("file_output", "input_type", "output_type", "target")
    def test_choices_are_named(self, name):
        with self.assertRaisesRegex(ConfigError, rf"{name} is 'int4'; it must be one"):
            FileConfig(**{name: "int4"})


if __name__ == "__main__":
    absltest.main()
