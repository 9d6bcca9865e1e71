import dataclasses
import json
import math
import os
import pathlib
import re
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError, ModelError
from dfq_tf.graph.description import (
    ModelDescription,
    description_beside,
    description_path,
    model_name,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
_DESCRIPTION = ModelDescription(
    (120.0, 110.5, 100.0), (0.0156, 1 / 3, 0.02), "softmax", ("cat", "dög")
)


class DescriptionTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.path = pathlib.Path(self.get_temp_dir()) / "teacher.json"

    def test_save_and_load_give_the_same(self):
        _DESCRIPTION.save(self.path)
        self.assertEqual(ModelDescription.load(self.path), _DESCRIPTION)

    def test_path_may_begin_at_home(self):
        with mock.patch.dict(os.environ, HOME=str(self.path.parent)):
            _DESCRIPTION.save("~/teacher.json")
            self.assertEqual(ModelDescription.load("~/teacher.json"), _DESCRIPTION)
            self.assertEqual(description_beside("~/teacher.keras"), _DESCRIPTION)
        self.assertTrue(self.path.exists())

    def test_file_holds_every_field_as_json(self):
        _DESCRIPTION.save(self.path)
        fields = json.loads(self.path.read_text())
        self.assertEqual(fields["input_mean"], [120.0, 110.5, 100.0])
        self.assertEqual(fields["class_names"], ["cat", "dög"])
        names = {field.name for field in dataclasses.fields(ModelDescription)}
        self.assertEqual(set(fields), names)

    def test_path_is_beside_the_model(self):
        self.assertEqual(
            description_path("runs/a.b/teacher.keras"),
            pathlib.Path("runs/a.b/teacher.json"),
        )

    @parameterized.parameters(
        ("net_0.25", "net_0.25"),  # the folder of a SavedModel
        ("net_0.25/", "net_0.25"),
        ("net_0.25.keras", "net_0.25"),
        ("net_0.25.h5", "net_0.25"),
        ("net.hdf5", "net"),
        ("net.model", "net"),
        ("net.json", "net"),
        ("net", "net"),
    )
    def test_only_endings_of_models_are_no_part_of_their_names(self, model, name):
        self.assertEqual(model_name(f"runs/{model}"), name)
        self.assertEqual(
            description_path(f"runs/{model}"), pathlib.Path(f"runs/{name}.json")
        )

    @parameterized.parameters((".", "net_0.25"), ("..", "runs"), ("../..", "a.b"))
    def test_folder_of_the_program_has_a_name(self, model, name):
        folder = pathlib.Path(self.get_temp_dir()).resolve() / "a.b/runs/net_0.25"
        folder.mkdir(parents=True, exist_ok=True)
        before = os.getcwd()
        os.chdir(folder)
        try:
            self.assertEqual(model_name(model), name)
            path = description_path(model)
        finally:
            os.chdir(before)
        while folder.name != name:
            folder = folder.parent
        self.assertEqual(path, folder.parent / f"{name}.json")

    def test_what_lies_beside_a_model_may_be_something_else(self):
        model = self.path.with_suffix(".keras")
        self.assertIsNone(description_beside(model))
        # As Keras 2 and Keras 3 write it with `model.to_json()`.
        keras = {"class_name": "Functional", "config": {"name": "m"}}
        for more in ({"keras_version": "2.15.0"}, {"module": "keras"}):
            self.path.write_text(json.dumps({**keras, **more}))
            self.assertIsNone(description_beside(model))
        for text in ('{"class_name": "Functional"}', "[1]", "{"):
            self.path.write_text(text)
            with self.assertRaisesRegex(
                ModelError, r"teacher\.json is not .*\. If it is something else, give"
            ):
                description_beside(model)
        _DESCRIPTION.save(self.path)
        self.assertEqual(description_beside(model), _DESCRIPTION)

    def test_file_may_hold_any_alphabet(self):
        text = json.dumps(dataclasses.asdict(_DESCRIPTION), ensure_ascii=False)
        self.path.write_bytes(text.encode("utf-8"))
        self.assertEqual(ModelDescription.load(self.path), _DESCRIPTION)

    def test_missing_file_says_what_to_do(self):
        with self.assertRaisesRegex(
            ModelError,
            r"there is no description .*teacher\.json; .*--input_mean.* "
            r"docs/own_model\.md, in the project's folder",
        ):
            ModelDescription.load(self.path)

    def test_example_of_the_documents_is_one(self):
        text = (ROOT / "docs/own_model.md").read_text()
        (example,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
        self.path.write_text(example)
        said = ModelDescription.load(self.path)
        self.assertEqual(said.input_mean, (123.7, 116.3, 103.5))
        self.assertEqual((said.output, said.class_names), ("softmax", ("cat", "dog")))

    @parameterized.named_parameters(
        ("no_json", "{", "Expecting property name"),
        ("no_object", "[1, 2]", "must be a mapping"),
        ("null", "null", "must be a mapping"),
        (
            "missing_field",
            '{"input_mean": [0], "input_scale": [1], "output": "logits"}',
            r"it lacks class_names\.",
        ),
        (
            "missing_fields",
            '{"input_mean": [0], "input_scale": [1]}',
            r"it lacks output, class_names\. docs/own_model\.md, in the project's "
            "folder, has an example",
        ),
        (
            "unknown_field",
            '{"input_mean": [0], "input_scale": [1], "output": "logits", '
            '"class_names": ["a"], "colour": 1}',
            "it has colour, which no description has",
        ),
        (
            "number_for_list",
            '{"input_mean": 0, "input_scale": [1], "output": "logits", '
            '"class_names": ["a"]}',
            r"such as \[127\.5\]: .*not iterable",
        ),
        (
            "text_for_names",
            '{"input_mean": [0], "input_scale": [1], "output": "logits", '
            '"class_names": "cats"}',
            "class_names is 'cats'; give a name for each class",
        ),
        (
            "names_that_are_empty",
            '{"input_mean": [0], "input_scale": [1], "output": "logits", '
            '"class_names": ["", ""]}',
            "in which a name is empty",
        ),
        (
            "names_that_are_the_same",
            '{"input_mean": [0], "input_scale": [1], "output": "logits", '
            '"class_names": ["a", "a"]}',
            'give each class its own; in a .json beside the model write "0", "1" and ',
        ),
        (
            "bad_value",
            '{"input_mean": [0], "input_scale": [0], "output": "logits", '
            '"class_names": ["a"]}',
            "every value must be above 0",
        ),
    )
    def test_file_that_is_no_description_names_file_and_fault(self, text, fault):
        self.path.write_text(text)
        with self.assertRaisesRegex(
            ModelError, rf"teacher\.json is not a model description: .*{fault}"
        ):
            ModelDescription.load(self.path)

    def test_binary_file_is_no_description(self):
        self.path.write_bytes(b"\x89HDF\xff\xfe")
        with self.assertRaisesRegex(ModelError, r"is not a model description"):
            ModelDescription.load(self.path)

    @parameterized.parameters(
        (
            dict(input_mean=[[1]]),
            r"^input_mean is \[\[1\]\]; give one number, or one for each channel, su",
        ),
        (dict(input_scale=1), r"^input_scale is 1; give one .* \[127\.5\]: .*iterabl"),
        (dict(input_mean=("a",)), r"^input_mean is \('a',\); give one number, or one"),
        (dict(input_mean="127"), "^input_mean is '127'; give one number, .*is a text"),
        (dict(class_names=5), "^class_names is 5; give a name for each class, in the"),
        (dict(class_names=None), "^class_names is None; give a name for each class"),
        (dict(class_names="cats"), "^class_names is 'cats'; give a name for each cl"),
        (dict(class_names=("a", "")), "^class_names is .*, in which a name is empty"),
        (dict(class_names=("a", "a")), "^class_names has 2 times 'a' and no other na"),
        (dict(class_names=("a", None)), "^class_names has None, a NoneType; give tex"),
        (dict(input_mean=()), "input_mean is .*; give one finite value or more"),
        (dict(input_mean=(math.nan,)), "input_mean is .*; give one finite value"),
        (dict(input_scale=(math.inf,)), "input_scale is .*; give one finite value"),
        (dict(input_scale=(-1.0,)), r"input_scale is \(-1.0,\); every value must be"),
        (
            dict(output="probability"),
            r"output is 'probability'; it must be one of \['logits', 'softmax', 's",
        ),
    )
    def test_value_out_of_range_is_refused(self, change, message):
        with self.assertRaisesRegex(ConfigError, message):
            dataclasses.replace(_DESCRIPTION, **change)

    @parameterized.parameters(1, 3)
    def test_one_value_or_one_per_channel_fits(self, number):
        fitting = dataclasses.replace(
            _DESCRIPTION, input_mean=(1.0,) * number, input_scale=(1.0,) * number
        )
        self.assertIsNone(fitting.check_fits((8, 8, 3), 2))

    def test_wrong_number_of_channels_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError,
            "input_mean has 3 values for a model with 1 input channels; "
            "give one value or 1",
        ):
            _DESCRIPTION.check_fits((8, 8, 1), 2)
        one_mean = dataclasses.replace(_DESCRIPTION, input_mean=(0.0,))
        with self.assertRaisesRegex(ConfigError, "input_scale has 3 values .* 4 input"):
            one_mean.check_fits((8, 8, 4), 2)

    @parameterized.parameters("softmax", "sigmoid")
    def test_what_a_model_gives_says_what_makes_probabilities(self, output):
        said = dataclasses.replace(_DESCRIPTION, output=output, probabilities=None)
        self.assertEqual(said.probabilities, output)
        without_end = dataclasses.replace(said, output="logits")
        self.assertEqual(without_end.probabilities, output)
        with self.assertRaisesRegex(
            ConfigError,
            "probabilities is 'score' and output is '.*'; it must be one of",
        ):
            dataclasses.replace(said, probabilities="score")

    def test_files_of_earlier_versions_do_not_say_what_makes_probabilities(self):
        fields = dataclasses.asdict(_DESCRIPTION) | {"output": "logits"}
        del fields["probabilities"]
        self.path.write_text(json.dumps(fields))
        self.assertIsNone(ModelDescription.load(self.path).probabilities)

    def test_one_score_is_of_two_classes(self):
        said = ModelDescription((0.0,), (1.0,), "logits", ("a", "b", "c"), "score")
        with self.assertRaisesRegex(
            ConfigError, "probabilities is 'score' for a model with 3 outputs"
        ):
            said.check_fits((8, 8, 3), 3)

    def test_names_that_nobody_has_given_are_no_classifiers(self):
        unnamed = ModelDescription((0.0,), (1.0,), "logits", ("", ""))
        with self.assertRaisesRegex(ConfigError, "in which a name is empty"):
            unnamed.check_fits((8, 8, 3), 2)

    def test_wrong_number_of_class_names_is_refused(self):
        with self.assertRaisesRegex(
            ConfigError,
            "class_names has 2 names for a model with 10 outputs; "
            "give one name per output",
        ):
            _DESCRIPTION.check_fits((8, 8, 3), 10)

    def test_normalize_subtracts_mean_and_scales_each_channel(self):
        pixels = np.random.default_rng(0).uniform(0, 255, (2, 4, 4, 3))
        pixels = pixels.astype(np.float32)
        expected = np.empty_like(pixels)
        for c in range(3):
            mean, scale = _DESCRIPTION.input_mean[c], _DESCRIPTION.input_scale[c]
            expected[..., c] = (pixels[..., c] - mean) * scale
        self.assertAllClose(_DESCRIPTION.normalize(pixels), expected, rtol=1e-6)
        tensor = _DESCRIPTION.normalize(tf.constant(pixels))
        self.assertEqual(tensor.dtype, tf.float32)
        self.assertAllClose(tensor, expected, rtol=1e-6)


if __name__ == "__main__":
    tf.test.main()
