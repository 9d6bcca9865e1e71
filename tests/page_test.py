"""The page of a run: what stands on it, and what must not."""

import hashlib
import html
import io
import json
import math
import os
import pathlib
import re
from html.parser import HTMLParser
from unittest import mock

import numpy as np
from absl.testing import parameterized

from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError, WorkdirError
from dfq_tf.graph.description import ModelDescription
from dfq_tf.reports import charts, facts, page, record, scalars, verdict
from tests import pages
from tests.helpers import new_folder
from tests.tool_runner import ROOT, run_in_process

VOID = {"meta", "link", "img", "br"}
SECTIONS = ("rests", "models", "images", "noise", "ranges", "layers", "training", "app")
SECTIONS = (*SECTIONS, "again")


class Parsed(HTMLParser):
    """Elements of a page: all that are opened are closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if "style" not in self.open and "script" not in self.open:
            self.text.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def words(self):
        return " ".join("".join(self.text).replace("\xa0", " ").split())


def made(**more):
    folder = pages.write(new_folder() / "run", **more)
    text = page.write(folder).read_text()
    return folder, text, Parsed(text)


class RunPageTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder, cls.text, cls.page = made()

    def test_has_all_parts_once_and_links_to_them(self):
        ids = [a["id"] for a in self.page.all("section")]
        self.assertCountEqual(ids, SECTIONS)
        links = [a["href"][1:] for a in self.page.all("a")]
        self.assertContainsSubset(set(links), {*ids, "main"})
        self.assertLen(self.page.all("h1"), 1)

    def test_asks_for_nothing(self):
        for tag, attributes in self.page.elements:
            for name in ("src", "href", "srcset", "action", "data", "poster"):
                value = attributes.get(name, "#")
                self.assertRegex(value, r"\A(#|data:)", f"{tag} {name}")
        self.assertNotIn("@import", self.text)
        self.assertNotRegex(self.text, r"url\(")
        self.assertNotIn("http:", self.text)
        self.assertNotIn("https:", self.text)
        self.assertIn("default-src 'none'", self.text)

    def test_text_of_others_is_text(self):
        self.assertLen(self.page.all("script"), 1)
        self.assertNotIn("alert(1)</script>", self.text.replace("&lt;", "<?"))
        self.assertIn(html.escape(pages.NAMES[0]), self.text)
        for name in (*pages.NAMES, "stem<b>", "tiny & small"):
            self.assertIn(name, self.page.words)
        self.assertNotIn("b", [tag for tag, _ in self.page.elements if tag == "stem"])

    def test_figures_are_those_of_the_metrics(self):
        words = self.page.words
        for figure in (
            "87.5 %",  # the teacher's accuracy
            "86.2 %",  # the file's
            "96.2 %",  # agreement
            "16.0 kB",
            "64.0 kB",
            "4.0 times smaller",
            "0.25 ms",
            "11.8 dB",  # SQNR of the scores
            "512 generated images set the ranges",
            "at most 2 steps",
            "98.4 %",  # expected
            "1,234 MiB",
            "made_up, 2 cores",
            "tensorflow 2.21.0",
            "0123abc",
            hashlib.sha256(b"of no meaning").hexdigest(),
            "middle: 12.3 dB",
            "--num_bits_depthwise=8",
            "--widths=W4A8",
            f"tools/run.py --flagfile={self.folder}/flags.cfg",
        ):
            self.assertIn(figure, words)

    def test_shows_images_with_the_teachers_class_and_confidence(self):
        shown = [a for a in self.page.all("img") if a["src"].startswith("data:image/")]
        self.assertLen(shown, facts.NUM_SHOWN)
        kept = facts.read(self.folder, "df_q")["generated"]
        first = kept["shown"][0]
        self.assertIn(f"base64,{first['png']}", self.text)
        said = f"{pages.NAMES[first['class']]}{100 * first['confidence']:.0f} %"
        self.assertIn(said, self.page.words)
        for count in kept["per_class"]:
            self.assertIn(f">{count}</text>", self.text)

    def test_charts_name_the_noisiest_layer_and_what_stands_where(self):
        labels = [a["aria-label"] for a in self.page.all("svg") if "aria-label" in a]
        said = "The noisiest layer is middle with 12.3 dB."
        self.assertLen([each for each in labels if said in each], 2)  # and on phones
        self.assertIn("middle 12.3 dB</text>", self.text)
        self.assertIn("BatchNormalization -1 to 2", html.unescape(self.text))

    def test_is_small_and_says_how_it_is_shown(self):
        self.assertLess(len(self.text.encode()), 3e6)
        self.assertIn("prefers-color-scheme: dark", self.text)
        self.assertIn("@media print", self.text)
        self.assertIn("width=device-width", self.text)

    def test_large_images_make_a_page_of_less_than_3_mb(self):
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (48, 224, 300, 3), np.uint8)
        scores = rng.normal(size=(48, 3)).astype(np.float32)
        description = ModelDescription((0.0,), (1.0,), "logits", pages.NAMES)
        kept = facts.generated(images, scores, description)
        folder = pages.write(new_folder() / "run", page=("file",), curves=False)
        facts.add(folder, "df_q", generated=kept)
        self.assertLess(page.write(folder).stat().st_size, 3e6)

    @parameterized.parameters(
        (dict(page=("generated", "file")), ("noise", "ranges", "layers")),
        (dict(page=("layers", "file")), ("images",)),
        (dict(page=("layers", "generated")), ("app",)),
        (dict(curves=False), ("training",)),
        (
            dict(page=(), curves=False),
            ("images", "noise", "ranges", "layers", "training", "app"),
        ),
    )
    def test_what_was_not_measured_is_left_out(self, given, absent):
        _, text, parsed = made(**given)
        ids = [a["id"] for a in parsed.all("section")]
        self.assertCountEqual(ids, {*SECTIONS} - {*absent})
        links = [a["href"][1:] for a in parsed.all("a")]
        self.assertNoCommonElements(links, absent)
        self.assertNotIn("None", parsed.words)
        self.assertNotIn("nan", parsed.words.split())

    def test_blocks_that_learnt_are_listed(self):
        blocks = [{"name": "end<b>", "before_db": 11.24, "after_db": 13.96}]
        training = {**pages.METRICS["df_q_training"], "blocks": blocks}
        metrics = {**pages.METRICS, "df_q_training": training}
        _, _, parsed = made(metrics=metrics, page=(), curves=False)
        self.assertIn("blocks", [a["id"] for a in parsed.all("section")])
        self.assertIn("#blocks", [a["href"] for a in parsed.all("a")])
        self.assertIn("end<b>11.214.0", parsed.words)

    def test_without_labels_there_is_no_accuracy(self):
        metrics = {
            key: {k: v for k, v in value.items() if k != "accuracy"}
            | {"accuracy": None}
            if key in ("teacher", "df_q")
            else value
            for key, value in pages.METRICS.items()
        }
        _, _, parsed = made(metrics=metrics)
        self.assertNotIn("Accuracy, labelled images", parsed.words)
        self.assertIn("accuracy is not known", parsed.words)
        self.assertIn("on 96.2 % of generated images", parsed.words)
        self.assertIn("of 160 generated images", parsed.words)

    def test_where_the_images_come_from_is_said(self):
        training = {**pages.METRICS["df_q_training"]}
        training["calibration_sources"] = {"photographs": 1256, "generated": 3}
        folder = pages.write(
            new_folder() / "run",
            {**pages.METRICS, "df_q_training": training},
            curves=False,
        )
        shown = facts.read(folder, "df_q")["generated"]
        facts.add(folder, "df_q", generated={**shown, "kind": "photographs"})
        words = Parsed(page.write(folder).read_text()).words
        said = "1,256 crops of photographs and 3 generated images set the ranges"
        self.assertIn(said, words)
        self.assertIn("Classes among 60 crops of photographs", words)
        self.assertNotIn("generator", words)
        self.assertIn("none of them is of the task's data", words)

    def test_files_are_measured_on_images_of_the_first_method(self):
        """The best one, of generated images, on the photographs of the first."""
        metrics = {"df_q_training": pages.METRICS["df_q_training"]}
        for method, share in (("df_q", 0.5), ("df_qat_kd", 0.75)):
            row = {"agreement": share, "images": 160, "bytes": 1, "kind": "photographs"}
            metrics[method] = row
        folder = pages.write(new_folder() / "run", metrics, curves=False)
        for method, kind in (("df_q", "photographs"), ("df_qat_kd", "generated")):
            shown = {**facts.read(folder, "df_q")["generated"], "kind": kind}
            facts.add(folder, method, layers=pages.LAYERS, generated=shown)
        words = Parsed(page.write(folder).read_text()).words
        self.assertIn("the float model on 75.0 % of crops of photographs", words)
        self.assertIn("on 75.0 % of 160 crops of photographs (95 %", words)
        self.assertIn("Classes among 60 generated images", words)
        said = "crops of photographs (DF-Q W4A8) and generated images (DF-QAT-KD W4A8)"
        self.assertIn(f"{said}, which do not compare.", words)

    def test_pictures_of_the_user_are_not_said_to_be_none_of_the_tasks(self):
        sources = {"calibration_sources": {"pictures": 64, "procedural": 2}}
        training = {**pages.METRICS["df_q_training"], **sources}
        metrics = {**pages.METRICS, "df_q_training": training}
        _, _, parsed = made(metrics=metrics, curves=False)
        self.assertIn(
            "64 crops of pictures and 2 images of 1/f noise set", parsed.words
        )
        self.assertIn("of the folder that --images names", parsed.words)
        self.assertNotIn("none of them is of the task's", parsed.words)

    def test_size_that_was_asked_for_is_named_in_place_of_widths(self):
        for size, name in (
            ({"target_size": "0.5x"}, "0.5x"),
            ({"target_kib": "90"}, 0),
        ):
            flags = {**pages.FLAGS, "widths": "W8A8", **size}
            q = {"accuracy": 0.5, "agreement": 0.5, "images": 160, "bytes": 64000}
            _, _, parsed = made(
                metrics={**pages.METRICS, "q": q}, flags=flags, curves=False
            )
            self.assertIn(f"The {name or '90 KiB'} file is right on", parsed.words)
            self.assertIn(f"DF-Q {name or '90 KiB'}", parsed.words)
            self.assertIn("Q, real images W8A8", parsed.words)
            self.assertNotIn("int8 file", parsed.words)

    @parameterized.parameters(
        ({"teacher": "nets/net_0.25"}, "net_0.25"),
        ({"teacher": "nets/tiny.v2.keras"}, "tiny.v2"),
        ({"teacher": "tiny.keras", "student": "wide_0.5"}, "wide_0.5"),
        ({}, "run_0.5"),
    )
    def test_network_is_named_as_its_file_is(self, flags, name):
        folder = new_folder() / "run_0.5"
        pages.write(folder, page=("generated",), flags=flags, curves=False)
        text = page.write(folder).read_text()
        self.assertIn(f"<h1>{name}, DF-Q", text)

    def test_places_where_a_run_went_on_are_named(self):
        folder = pages.write(new_folder() / "run", curves=False)
        run = json.loads((folder / "run.json").read_text())
        later = [{"python": "3.12.1", "machine": "arm", "versions": {"numpy": "9.8"}}]
        (folder / "run.json").write_text(json.dumps({**run, "later": later}))
        words = Parsed(page.write(folder).read_text()).words
        self.assertIn("Continued onarm, Python 3.12.1, numpy 9.8", words)

    def test_run_of_an_earlier_version_has_a_page(self):
        training = {"agreement_on_generated_images": 0.8125, "seconds": 1.0}
        _, _, parsed = made(
            metrics={"df_q_training": training},
            flags={**pages.FLAGS, "calibration_images": "96"},
        )
        self.assertIn("81.2 % of generated images", parsed.words)
        self.assertIn("96 generated images set the ranges", parsed.words)

    def test_folder_without_a_run_is_refused(self):
        folder = new_folder()
        with self.assertRaisesRegex(WorkdirError, "there is no metrics.json in"):
            page.write(folder)
        for text in ("{", "[1]", '{"df_q": [1]}', '{"df_q_training": 1}'):
            (folder / "metrics.json").write_text(text)
            with self.assertRaisesRegex(WorkdirError, "cannot be read as a workdir"):
                page.write(folder)
        self.assertEqual([p.name for p in folder.iterdir()], ["metrics.json"])

    @parameterized.parameters(
        (3, "uint8", "uint8", True),
        (3, "float32", "float32", True),
        (3, "int8", "uint8", False),
        (3, "uint8", "int16", False),
        (1, "uint8", "uint8", False),
        (4, "uint8", "uint8", False),
    )
    def test_code_for_mediapipe_is_of_files_that_it_opens(
        self, channels, takes, gives, opens
    ):
        image = {**pages.FILE["input"], "shape": [1, 4, 4, channels], "type": takes}
        output = {**pages.FILE["output"], "type": gives}
        folder = pages.write(new_folder() / "run", page=(), curves=False)
        facts.add(folder, "df_q", file={**pages.FILE, "input": image, "output": output})
        words = Parsed(page.write(folder).read_text()).words
        self.assertEqual("ImageClassifier.createFromOptions" in words, opens)
        count = f"{channels} channel{'s' * (channels > 1)}"
        said = f"this file has {count}, takes {takes} and gives {gives}."
        self.assertEqual(said in words, not opens)
        where = "docs/android.md, part 2, in dfq_tf's folder"
        self.assertEqual(where in words, not opens)

    @parameterized.parameters("uint8", "int8", "float32")
    def test_python_of_the_page_reads_a_photo(self, kind):
        """The code runs as it stands; LiteRT gives what it was fed."""
        file = {**pages.FILE, "input": {**pages.FILE["input"], "type": kind}}
        file["input"] |= {"mean": [10.0, 20.0, 30.0], "std": [2.0]}
        code = _python(file=file)
        image = np.random.default_rng(1).integers(0, 256, (4, 4, 3), np.uint8)
        fed, said = _run(code, image)
        expected = {
            "uint8": image,
            "int8": image.astype(int) - 128,
            "float32": (image - np.array([10.0, 20, 30])) / 2,
        }[kind]
        self.assertEqual(fed.dtype, np.dtype(kind))
        np.testing.assert_array_equal(fed[0], expected.astype(kind))
        self.assertEqual(said, f"two {200 * 0.00390625}")

    def test_python_of_the_page_names_the_packages_that_it_imports(self):
        self.assertIn("# pip install ai-edge-litert pillow\n", _python(file=pages.FILE))

    def test_pixels_below_a_whole_mean_are_fed_below_0(self):
        """Of bytes that are subtracted from bytes, 100 - 120 is 236."""
        file = {**pages.FILE, "input": {**pages.FILE["input"], "type": "float32"}}
        file["input"] |= {"mean": [120.0], "std": [64.0]}
        image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5
        fed, _ = _run(_python(file=file), image)
        self.assertEqual(fed.dtype, np.float32)
        np.testing.assert_array_equal(fed[0], (image.astype(float) - 120) / 64)
        self.assertEqual(fed[0, 1, 2, 2], (100 - 120) / 64)  # of image[1, 2, 2] == 100

    @parameterized.parameters((127, "one"), (128, "one"), (129, "two"))
    def test_one_score_is_that_of_the_second_class(self, score, name):
        file = {**pages.FILE, "output": {**pages.FILE["output"], "shape": [1, 1]}}
        shown = {"class_names": ["one", "two"], "count": 1, "per_class": [1, 0]}
        code = _python(file=file, generated={"shown": [], **shown})
        _, said = _run(code, np.zeros((4, 4, 3), np.uint8), [score])
        self.assertEqual(said, f"{name} {score * 0.00390625}")


class PythonOfThePageTest(parameterized.TestCase):
    """For another image than a square one of three colours."""

    @parameterized.parameters(1, 3, 4)
    def test_a_wide_photo_is_fed_as_it_is(self, channels):
        shape = [1, 2, 6, channels]
        file = {**pages.FILE, "input": {**pages.FILE["input"], "shape": shape}}
        image = np.random.default_rng(1).integers(0, 256, shape[1:], np.uint8)
        photo = image[..., 0] if channels == 1 else image
        fed, _ = _run(_python(file=file), photo)
        np.testing.assert_array_equal(fed[0], image)


def _python(**kept):
    """The Python of a page, of which this was kept."""
    folder = pages.write(new_folder() / "run", curves=False)
    facts.add(folder, "df_q", **kept)
    text = page.write(folder).read_text()
    return html.unescape(re.search(r'<code id="python">(.*?)</code>', text, re.S)[1])


def _run(code, image, scores=(3, 200, 1)):
    """Runs the Python of a page, LiteRT being made up: what it feeds, and prints."""
    from unittest import mock

    from PIL import Image

    fed, folder = [], new_folder()
    Image.fromarray(image).save(folder / "photo.png")
    (folder / "labels.txt").write_text("one\ntwo\nthree\n")

    class Interpreter:
        def __init__(self, path):
            assert path == "df_q.tflite"

        def allocate_tensors(self):
            pass

        def get_input_details(self):
            return [{"index": 0}]

        def get_output_details(self):
            return [{"index": 9}]

        def set_tensor(self, index, values):
            fed.append(values)

        def invoke(self):
            pass

        def get_tensor(self, index):
            return np.array([scores], np.uint8)

    out, before = io.StringIO(), os.getcwd()
    try:
        os.chdir(folder)
        with (
            mock.patch("ai_edge_litert.interpreter.Interpreter", Interpreter),
            mock.patch("sys.stdout", out),
        ):
            exec(compile(code, "page", "exec"), {})
    finally:
        os.chdir(before)
    return fed[0], out.getvalue().strip()


class RecordTest(parameterized.TestCase):
    def test_flags_without_a_value_are_true_or_false(self):
        folder = pages.write(new_folder(), curves=False)
        (folder / "flags.cfg").write_text(
            "# by hand\n--noequalize\n--allow_code\n--widths=W4A8\n"
        )
        expected = {"equalize": "false", "allow_code": "true", "widths": "W4A8"}
        self.assertEqual(record.read(folder).flags, expected)

    @parameterized.parameters("python tools/compare.py", "dfq-tf convert")
    def test_what_has_no_page_is_refused(self, command):
        folder = pages.write(new_folder(), curves=False)
        run = json.loads((folder / "run.json").read_text())
        (folder / "run.json").write_text(json.dumps({**run, "command": command}))
        with self.assertRaisesRegex(WorkdirError, "made, which has no page; name the"):
            record.read(folder)


class BestTest(parameterized.TestCase):
    @parameterized.parameters(
        (("df_q", "df_rec", "df_qat_kd"), (0.5, 0.8, 0.6), "df_rec"),
        (("df_q", "df_rec"), (0.5, 0.5), "df_rec"),
        (("df_q", "df_qat_kd"), (None, None), "df_qat_kd"),
    )
    def test_page_is_of_the_file_that_is_right_most_often(self, made, shares, best):
        metrics = {
            name: {"accuracy": share, "agreement": share, "images": 10, "bytes": 1}
            for name, share in zip(made, shares)
        }
        read = record.read(pages.write(new_folder() / "run", metrics, curves=False))
        self.assertEqual(read.best.key, best)

    @parameterized.parameters(
        ("auto", (0.5, 0.6), "on this machine, behind DF-Q W4A8"),
        ("auto", (0.6, 0.5), "on this machine"),
        ("df_qat_kd,df_q", (0.6, 0.5), "on this machine, behind DF-QAT-KD W4A8"),
        ("df_qat_kd,df_q", (0.5, 0.6), "on this machine"),
    )
    def test_time_is_said_to_be_behind_that_of_the_first_method(
        self, methods, shares, said
    ):
        metrics, flags = {}, {**pages.FLAGS, "methods": methods}
        for name, share, seconds in zip(("df_q", "df_qat_kd"), shares, (5.0, 6.0)):
            metrics[name] = {"agreement": share, "images": 10, "bytes": 1}
            metrics[f"{name}_seconds"] = seconds
        folder = pages.write(new_folder() / "run", metrics, flags=flags, curves=False)
        words = Parsed(page.write(folder).read_text()).words
        self.assertIn(said, words)
        self.assertEqual("behind" in words, "behind" in said)


class ComparisonTest(parameterized.TestCase):
    def test_puts_runs_side_by_side_with_what_differs(self):
        folders = [
            pages.write(new_folder() / "first", curves=False),
            pages.write(
                new_folder() / "second",
                flags={**pages.FLAGS, "calibration_images": "<64>"},
                metrics={**pages.METRICS, "df_q_seconds": 77.0},
                curves=False,
            ),
        ]
        out = new_folder() / "both.html"
        process = run_in_process("report", *map(str, folders), f"--out={out}")
        self.assertEqual(process.returncode, 0, process.stderr)
        parsed = Parsed(out.read_text())
        for words in ("first", "second", "--calibration_imagesauto<64>", "77 s"):
            self.assertIn(words, parsed.words)
        self.assertNotIn("--widths", parsed.words)  # it is the same
        self.assertLen(parsed.all("script"), 1)

    def test_folder_that_cannot_be_written_needs_another_file(self):
        folder = pages.write(new_folder() / "run", curves=False)
        out = new_folder() / "page.html"
        # No permission holds root back.
        with mock.patch("os.access", lambda path, mode: path != str(folder)):
            process = run_in_process("report", str(folder))
            self.assertEqual(process.returncode, 2, process.stderr)
            self.assertRegex(
                process.stderr,
                f"^error: out is .*report.html', but {folder} cannot be writ.*--out",
            )
            process = run_in_process("report", str(folder), f"--out={out}")
        self.assertEqual(process.returncode, 0, process.stderr)
        self.assertTrue(out.exists())
        self.assertFalse((folder / "report.html").exists())

    def test_one_tool_that_was_called_in_two_ways_is_one(self):
        flags = ({**pages.FLAGS}, {**pages.FLAGS, "seed": "1"})
        calls = ("python tools/run.py", "'/a b/bin/python' '/a b/tools/run.py'")
        folders = []
        for given, command in zip(flags, calls):
            folder = pages.write(new_folder() / "run", flags=given, curves=False)
            run = {**pages.RUN, "command": command}
            (folder / "run.json").write_text(json.dumps(run))
            folders.append(folder)
        text = page.comparison([record.read(folder) for folder in folders])
        self.assertIn("--seed", text)
        self.assertIn("All other flags have the same values", text)

    def test_runs_of_one_name_are_told_apart(self):
        folders = [pages.write(new_folder() / "run", curves=False) for _ in range(2)]
        text = page.comparison([record.read(folder) for folder in folders])
        for folder in folders:
            self.assertIn(f"{folder.parent.name}/run", text)
        with self.assertRaisesRegex(ConfigError, "a workdir is given twice"):
            page.comparison([record.read(folders[0])] * 2)


class ToolTest(parameterized.TestCase):
    def test_makes_the_page_again(self):
        folder = pages.write(new_folder() / "run", curves=False)
        process = run_in_process("report", str(folder))
        self.assertEqual(process.stdout, f"Wrote {folder}/report.html\n")
        self.assertEqual((folder / "report.html").read_text(), made_text(folder))

    def test_wrong_arguments_are_one_message(self):
        process = run_in_process("report")
        self.assertEqual(process.returncode, 2)
        self.assertStartsWith(process.stderr, "error: workdirs is empty; name a run's")
        process = run_in_process("report", "absent")
        self.assertEqual(process.returncode, 1)
        self.assertStartsWith(process.stderr, "error: there is no metrics.json")


def made_text(folder):
    return page.of_run(record.read(folder))


class VerdictTest(parameterized.TestCase):
    @parameterized.parameters((0, 40), (40, 40), (7, 10), (398, 400), (1, 1))
    def test_interval_is_wilsons(self, right, count):
        """Its ends are where the share is 1.96 standard errors off, of the ends."""
        share = right / count
        for end in verdict.interval(share, count):
            error = math.sqrt(end * (1 - end) / count)
            self.assertAlmostEqual(abs(share - end), 1.96 * error, places=6)

    @parameterized.parameters(
        (1.0, "100 %"), (0.99999, "99.9 %"), (0.9994, "99.9 %"), (0.05, "5.0 %")
    )
    def test_percent_is_100_only_of_all(self, share, text):
        self.assertEqual(verdict.percent(share).replace("\xa0", " "), text)

    @parameterized.parameters(
        (0.875, "good", "as many as the float model"),
        (0.8625, "fair", "1.25 points fewer"),
        (0.80, "poor", "7.50 points fewer"),
        (0.9, "good", "2.50 points more"),
    )
    def test_labels_decide(self, accuracy, level, words):
        df_q = {**pages.METRICS["df_q"], "accuracy": accuracy}
        metrics = {**pages.METRICS, "df_q": df_q}
        folder = pages.write(new_folder(), metrics, curves=False)
        found = verdict.of(record.read(folder))
        self.assertEqual(found.level, level)
        self.assertIn(words, found.sentence)

    @parameterized.parameters(
        (0.95, 0.94, "good"),  # their difference is above 0.01, as floats
        (0.97, 0.94, "fair"),  # and that of these above 0.03
        (0.95, 0.9399999, "fair"),  # one image of 10 million more
        (0.97, 0.9399999, "poor"),
    )
    def test_a_whole_percent_that_is_lost_is_no_more_than_that(self, old, new, level):
        metrics = {
            "teacher": {**pages.METRICS["teacher"], "accuracy": old},
            "df_q": {**pages.METRICS["df_q"], "accuracy": new},
        }
        folder = pages.write(new_folder(), metrics, curves=False)
        self.assertEqual(verdict.of(record.read(folder)).level, level)

    @parameterized.parameters((0.99, "good"), (0.97, "fair"), (0.96, "poor"))
    def test_a_whole_percent_of_agreement_is_no_more_either(self, share, level):
        training = {**pages.METRICS["df_q_training"], "expected_agreement": share}
        folder = pages.write(new_folder(), {"df_q_training": training}, curves=False)
        self.assertEqual(verdict.of(record.read(folder)).level, level)

    def test_quantized_students_workdir_is_judged_by_its_agreement(self):
        folder = pages.write(
            new_folder(),
            {"df_q_training": pages.METRICS["df_q_training"]},
            curves=False,
        )
        found = verdict.of(record.read(folder))
        self.assertEqual(found.level, "fair")
        self.assertIn("93.8", found.sentence)
        self.assertIn("98.4", found.sentence)

    @parameterized.parameters(1.0, 0.5, 0.0)
    def test_photographs_are_told_wherever_something_was_learnt_from_them(self, share):
        training = {**pages.METRICS["df_q_training"], "photographs_share": share}
        metrics = {"df_q_training": training}
        folder = pages.write(new_folder(), metrics, curves=False)
        said = " ".join(verdict.of(record.read(folder)).rests_on).replace("\xa0", " ")
        self.assertEqual(" 50 % of them replaced by crops" in said, share == 0.5)
        self.assertEqual("It learnt from crops of the public" in said, share == 1)
        self.assertEqual("--images=generated leaves" in said, share > 0)

    @parameterized.parameters(
        (["generated"], "held out (generated images) of which"),
        (
            ["procedural", "photographs"],
            "held out (images of 1/f noise and crops of photographs) of which",
        ),
        (None, "held out, and of 1/f noise, of which"),  # of an earlier version
    )
    def test_images_are_named_on_which_agreement_is_expected(self, kinds, words):
        training = {**pages.METRICS["df_q_training"]}
        if kinds is not None:
            training["expected_on"] = kinds
        folder = pages.write(new_folder(), {"df_q_training": training}, curves=False)
        found = verdict.of(record.read(folder))
        said = " ".join(found.rests_on)
        self.assertIn(f"On the three quarters of images {words} the float model", said)
        named = words.partition("(")[2].partition(")")[0] or "images held out"
        sure = f"; on {named} of which the float model is sure, "
        self.assertIn(sure, found.sentence)

    def test_agreement_on_one_class_alone_is_no_verdict(self):
        training = {
            "agreement_on_held_out_images": 1.0,
            "agreement_procedural": 1.0,
            "sqnr_procedural": 4.3,
        }
        for more, level in (({}, "unknown"), ({"expected_agreement": 1.0}, "good")):
            metrics = {"df_q_training": {**training, **more}}
            folder = pages.write(new_folder(), metrics, curves=False)
            found = verdict.of(record.read(folder))
            self.assertEqual(found.level, level)
            says_so = "one class in nearly all of them" in found.sentence
            self.assertEqual(says_so, level == "unknown")

    def test_largest_score_alone_is_no_verdict_where_several_classes_may_be(self):
        training = {"agreement_on_held_out_images": 0.9375, "sqnr_generated": 30.0}
        expected = {"expected_agreement": 1.0}
        for kept, more, level in (
            ({"is_exclusive": False}, {}, "unknown"),
            # A run of an earlier version, which expected something of that score.
            ({"is_exclusive": False}, expected, "unknown"),
            ({"is_exclusive": True}, expected, "good"),
            ({}, expected, "good"),
        ):
            metrics = {"df_q_training": {**training, **more}}
            folder = pages.write(new_folder(), metrics, page=(), curves=False)
            facts.add(folder, "df_q", generated={"kind": "generated", **kept})
            found = verdict.of(record.read(folder))
            self.assertEqual(found.level, level)
            says_so = "classes that do not exclude each other" in found.sentence
            self.assertEqual(says_so, level == "unknown")
            self.assertIn("93.8", found.sentence)
            self.assertNotIn("one class", found.sentence)

    def test_run_that_was_interrupted_before_its_file_was_measured_has_a_page(self):
        metrics = {key: pages.METRICS[key] for key in ("df_q_training", "teacher")}
        folder, _, parsed = made(metrics=metrics, curves=False)
        found = verdict.of(record.read(folder))
        self.assertEqual(found.level, "fair")
        self.assertIn("93.8", found.sentence)
        self.assertIn("ended before its file was measured", parsed.words)
        self.assertNotIn("No labelled images were given", parsed.words)

    def test_what_was_compared_with_the_file_is_told(self):
        compared = {"compared_images": 1000}
        for more, images in (({}, ""), (compared, ", on 1,000 images,")):
            df_q = {**pages.METRICS["df_q"], **more}
            metrics = {**pages.METRICS, "df_q": df_q}
            folder = pages.write(new_folder(), metrics, page=(), curves=False)
            rests_on = verdict.of(record.read(folder)).rests_on
            (told,) = (each for each in rests_on if "LiteRT" in each)
            self.assertIn(f"its logits{images} are at most 2 steps of an", told)

    def test_what_blocks_gave_is_judged_as_what_they_were_given(self):
        training = {**pages.METRICS["df_q_training"], "unreconstructed_is_kept": False}
        metrics = {"df_rec_training": {**training, "expected_agreement": 0.995}}
        folder = pages.write(new_folder(), metrics, curves=False)
        found = verdict.of(record.read(folder))
        self.assertEqual(found.level, "good")
        self.assertIn("99.5", found.sentence)

    def test_file_of_a_student_is_judged_by_the_student(self):
        """The teacher is another model, and its loss is none of the file's."""
        teacher = {"accuracy": 0.9, "agreement": 1.0, "images": 160, "bytes": 99000}
        student = {**teacher, "accuracy": 0.8, "agreement": 0.8125, "bytes": 32000}
        df_q = {**pages.METRICS["df_q"], "accuracy": 0.8, "agreement": 0.80}
        metrics = {"teacher": teacher, "student": student, "df_q": df_q}
        folder = pages.write(new_folder(), metrics, curves=False)
        found = verdict.of(record.read(folder))
        self.assertEqual(found.level, "good")
        self.assertIn("test images, as many as the float student.", found.sentence)
        self.assertIn("File and teacher give the same class", found.rests_on[1])
        text = made_text(folder)
        self.assertIn("2.0 times smaller than float32", text)
        self.assertIn("float student: 80.0", text)
        self.assertIn("Same class as the teacher", text)
        for each in (teacher, student, df_q):
            each["accuracy"] = None
        expected = {"expected_agreement": 0.995}
        kinds = {"expected_on": ["generated", "procedural"]}
        for training, level, images in (
            ({}, "fair", None),
            (expected, "good", "images held out"),
            (expected | kinds, "good", "generated images and images of 1/f noise"),
        ):
            metrics["df_q_training"] = training
            folder = pages.write(new_folder(), metrics, curves=False)
            found = verdict.of(record.read(folder))
            self.assertEqual(found.level, level)
            said = found.sentence.replace("\xa0", " ")
            self.assertIn("as the teacher on 80.0 % of generated images", said)
            self.assertEqual("float student" in said, images is not None)
            if images:
                of_student = f"as the float student on 99.5 % of {images} of which that"
                self.assertIn(of_student, said)

    def test_student_is_rated_on_all_images_held_out(self):
        training = {"agreements_on_generated_images": [0.5], "held_out_images": 256}
        folder = new_folder()
        pages.write(folder, {"student_training": training}, page=(), curves=False)
        shown = {"class_names": ["a"], "count": 100, "per_class": [100], "shown": []}
        facts.add(folder, "student", generated=shown)
        (row,) = record.read(folder).rows
        self.assertEqual(row.agreement, (0.5, 256))
        words = Parsed(made_text(folder)).words
        self.assertIn("images that the generators have made", words)
        self.assertNotIn("held out. Below", words)

    def test_distilled_student(self):
        training = {"agreements_on_generated_images": [0.5, 0.75], "seconds": 3.0}
        metrics = {"student_training": training, "student_accuracy": 0.625}
        folder = pages.write(new_folder(), metrics, page=(), curves=False)
        found = verdict.of(record.read(folder))
        self.assertRegex(found.sentence, "75.0.%.*62.5.%")
        self.assertNotIn("interval", " ".join(found.rests_on))  # of how many?

    def test_shares_of_a_distilled_student_have_their_intervals(self):
        training = {"agreements_on_generated_images": [0.75], "held_out_images": 256}
        metrics = {"student_accuracy": 0.6, "student_images": 10}
        metrics["student_training"] = training
        folder = pages.write(new_folder(), metrics, page=(), curves=False)
        agreed, right = verdict.of(record.read(folder)).rests_on
        # Wilson's, of 192 of 256 and of 6 of 10, by hand.
        self.assertIn("(95 % interval: 69.4 % to 79.9 %)", agreed.replace("\xa0", " "))
        self.assertStartsWith(right, "10 labelled images of digits, ")
        self.assertIn("on 31.3 % to 83.2 % (95 %", right.replace("\xa0", " "))
        self.assertIn("31.3 % to 83.2 %", Parsed(made_text(folder)).words)

    @parameterized.parameters(
        ("int4", "conv", 8, 0, "--num_bits_first=8"),
        ("int4", "conv", 8, 1, "--widths=W8A8"),
        ("int2", "conv", 8, 1, "--widths=W8A8"),
        ("int4", "dense", 8, 2, "--num_bits_last=8"),
        ("int4", "depthwise_conv", 8, 1, "--num_bits_depthwise=8"),
        ("int8", "depthwise_conv", 8, 1, "--widths=W8A16"),
        ("int8", "conv", 5, 1, "--widths=W8A8"),
        ("int8", "conv", 8, 1, "--widths=W8A16"),
    )
    def test_advice_names_flags_of_the_tools(self, weights, kind, bits, place, flag):
        layers = [{**each, "weights": "int8"} for each in pages.LAYERS[1:]]
        layers[place] |= {"weights": weights, "kind": kind, "bits": bits, "own_db": 5}
        worst = verdict.worst_layer(layers)
        self.assertIs(worst, layers[place])
        self.assertIn(flag, verdict.advice(layers, worst))
        help = run_in_process("run", "--helpfull").stdout
        self.assertIn(f"  {flag.partition('=')[0]} ", help)

    @parameterized.parameters(
        (
            ("df_q",),
            {"target_size": "", "target_kib": "0"},
            "--methods=df_rec or df_qat_kd, or --widths=W8A8.",
        ),
        (("df_q", "df_rec"), {}, "--methods=df_qat_kd, or --widths=W8A8."),
        (("df_rec", "df_qat_kd"), {}, "--methods=df_rec_kd, or --widths=W8A8."),
        (("df_q", "df_rec_kd"), {}, "--widths=W8A8."),
        (
            ("df_q",),
            {"method": "df_q"},
            "--method=df_rec or df_qat_kd, or --widths=W8A8.",
        ),
        (("df_q",), {"target_size": "0.5x"}, "a larger --target_size."),
    )
    def test_advice_is_of_what_was_not_tried(self, made, flags, expected):
        layers = [dict(each, weights="int8") for each in pages.LAYERS[1:]]
        layers[1] |= {"weights": "int4", "kind": "conv", "own_db": 5}
        found = verdict.advice(layers, layers[1], made, flags)
        self.assertEqual(found, f"Its weights have 4 bits. Try {expected}")

    @parameterized.parameters(
        (("df_q",), "--methods=df_rec, or --widths=W8A8."),
        (("df_q", "df_rec"), "--widths=W8A8."),
    )
    def test_advice_is_no_student_where_none_can_learn(self, made, expected):
        layers = [dict(each, weights="int8") for each in pages.LAYERS[1:]]
        layers[1] |= {"weights": "int4", "kind": "conv", "own_db": 5}
        found = verdict.advice(layers, layers[1], made, is_exclusive=False)
        self.assertEqual(found, f"Its weights have 4 bits. Try {expected}")

    @parameterized.parameters((5, 16, "W8A16"), (4, 8, "W8A8"), (2, 8, "W8A8"))
    def test_advice_is_of_the_bits_and_not_of_how_they_are_stored(
        self, kernel_bits, bits, widths
    ):
        layers = [dict(each, weights="int8") for each in pages.LAYERS[1:]]
        layers[1] |= {"kind": "conv", "bits": bits, "own_db": 5}
        layers[1]["kernel_bits"] = kernel_bits
        found = verdict.advice(layers, layers[1], ["df_q", "df_rec_kd"])
        expected = f"Its weights have {kernel_bits} bits. Try --widths={widths}."
        self.assertEqual(found, expected)

    def test_table_has_the_bits_where_more_store_them(self):
        folder = pages.write(new_folder() / "run", page=(), curves=False)
        bits = (None, 4, 3, 8)
        layers = [{**la, "kernel_bits": n} for la, n in zip(pages.LAYERS, bits)]
        facts.add(folder, "df_q", layers=layers)
        cells = re.findall(r'"text">(int\d.*?)</td>', page.write(folder).read_text())
        self.assertEqual(cells, ["int4", "int4 (3 bits)", "int8"])

    @parameterized.parameters(
        # It balances few networks, and kernels have a scale for each channel anyway.
        ("depthwise_conv", {"equalize": "false"}, "A16", "--equalize"),
        ("conv", {"activation_range": "mse"}, "A16", "--activation_range"),
    )
    def test_advice_is_no_flag_that_does_nothing(self, kind, flags, named, not_named):
        layers = [dict(each, weights="int8") for each in pages.LAYERS[1:]]
        layers[1] |= {"kind": kind, "own_db": 5}
        found = verdict.advice(layers, layers[1], ["df_q"], flags)
        self.assertIn(named, found)
        self.assertNotIn(not_named, found)

    @parameterized.parameters(
        (16, {}, "Weights and outputs have the most bits"),
        (8, {"target": "edge_tpu"}, "Try --activation_range=mse."),
        (8, {"target": "edge_tpu", "activation_range": "mse"}, "Nothing else"),
        (8, {"target": "android"}, "Try --activation_range=mse, or activations of 16"),
    )
    def test_advice_is_what_the_file_can_have(self, bits, flags, expected):
        layers = [dict(each, weights="int8", kind="conv") for each in pages.LAYERS]
        layers[1] |= {"own_db": 5, "bits": bits}
        found = verdict.advice(layers, layers[1], ["df_q"], flags)
        self.assertStartsWith(found, expected)

    def test_the_page_advises_nothing_that_the_run_has_made(self):
        folder = pages.write(new_folder(), pages.METRICS)
        run = record.read(folder)
        with mock.patch.object(verdict, "advice", return_value="") as advised:
            page.of_run(run)
        *_, made, flags = advised.call_args.args
        self.assertContainsSubset(["df_q"], made)
        self.assertEqual(flags, run.flags)
        said = {"is_exclusive": True, "takes_16_bits": True}
        self.assertEqual(advised.call_args.kwargs, said)

    @parameterized.parameters(True, False)
    def test_the_page_advises_16_bits_where_all_layers_can_have_them(self, takes):
        folder = pages.write(new_folder(), pages.METRICS, curves=False)
        layers = [{**each, "weights": "int8", "kind": "conv"} for each in pages.LAYERS]
        facts.add(folder, "df_q", layers=layers, takes_16_bits=takes)
        words = Parsed(page.write(folder).read_text()).words
        self.assertEqual("--widths=W8A16" in words, takes)
        self.assertIn("Try --activation_range=mse", words)

    def test_quiet_layers_need_nothing(self):
        layers = [{**each, "own_db": 40.0} for each in pages.LAYERS]
        self.assertIn("nothing to mend", verdict.advice(layers, layers[0]))


class ChartsTest(parameterized.TestCase):
    @parameterized.parameters((0, 1), (-3, 17), (0.001, 0.0042), (5, 5), (-2, 900))
    def test_ticks_are_round_and_hold_all(self, low, high):
        marks = charts.ticks(low, high)
        self.assertLessEqual(marks[0], low)
        self.assertGreaterEqual(marks[-1], high)
        self.assertBetween(len(marks), 2, 8)
        steps = np.diff(marks)
        np.testing.assert_allclose(steps, steps[0])
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        self.assertTrue(np.isclose(mantissa, [1, 2, 5]).any(), mantissa)

    def test_stems_end_where_the_axis_says(self):
        """A layer of twice as many dB has a stem twice as long."""
        layers = [{**pages.LAYERS[1], "own_db": db, "total_db": db} for db in (10, 20)]
        drawn = charts.noise(layers, 900)
        stems = re.findall(r'class="stem" d="M\S+ (\S+)L\S+ (\S+)"', drawn)
        short, long = (float(a) - float(b) for a, b in stems)
        self.assertAlmostEqual(long / short, 2, places=1)

    def test_range_that_would_flatten_all_others_is_cut_and_named(self):
        layers = [{**pages.LAYERS[1]} for _ in range(20)]
        self.assertNotIn("↑", charts.ranges(layers, 900))
        layers[3] |= {"high": 1000.0}
        self.assertIn("↑ 1,000", charts.ranges(layers, 900))

    def test_nothing_known_is_no_chart(self):
        layers = [pages.LAYERS[0]]
        self.assertEqual(charts.noise(layers, 900), "")

    def test_curve_names_its_last_value(self):
        drawn = charts.curve([(0, 0.5), (10, 0.75), (20, 0.875)], is_share=True)
        self.assertIn(">87.5 %<", drawn)
        self.assertIn(">step 20<", drawn)

    @parameterized.parameters((1.0, True, 0), (0.0, True, 1), (0.0, False, 1))
    def test_curve_of_one_value_is_a_flat_line(self, value, is_share, place):
        drawn = charts.curve([(0, value), (10, value)], is_share)
        # From the top of the field to its bottom.
        self.assertIn(f'cy="{(22.0, 120.0)[place]}"', drawn)


class ScalarsTest(tf.test.TestCase):
    def test_reads_what_tensorboard_was_given(self):
        folder = pathlib.Path(self.get_temp_dir()) / "warm_up"
        for start in (0, 6):  # a run, and its continuation from step 6 on
            writer = tf.summary.create_file_writer(str(folder))
            with writer.as_default():
                for step in range(start, start + 10):
                    tf.summary.scalar("loss", step + start / 100, step=step)
                    tf.summary.image("picture", np.zeros((1, 2, 2, 3)), step=step)
            writer.close()
        found = scalars.read(folder)
        expected = [(i, i + 0.06 * (i >= 6)) for i in range(16)]
        self.assertEqual([*found], ["loss"])
        self.assertAllClose(found["loss"], expected)

    def test_tenth_file_of_a_second_is_read_behind_the_ninth(self):
        folder = pathlib.Path(self.get_temp_dir()) / "ten"
        for number in (9, 10):
            one = folder / str(number)
            writer = tf.summary.create_file_writer(str(one))
            with writer.as_default():
                tf.summary.scalar("loss", number, step=0)
            writer.close()
            (path,) = one.iterdir()
            path.rename(folder / f"events.out.tfevents.1000000000.host.7.{number}.v2")
        self.assertEqual(scalars.read(folder)["loss"], [(0, 10)])

    def test_file_that_was_cut_off_is_read_as_far_as_it_goes(self):
        folder = pathlib.Path(self.get_temp_dir()) / "cut"
        writer = tf.summary.create_file_writer(str(folder))
        with writer.as_default():
            for step in range(3):
                tf.summary.scalar("loss", step, step=step)
        writer.close()
        (path,) = folder.iterdir()
        path.write_bytes(path.read_bytes()[:-5])
        self.assertEqual(scalars.read(folder)["loss"], [(0, 0), (1, 1)])

    def test_long_curves_are_thinned_and_keep_their_ends(self):
        thin = scalars._thinned([(i, i) for i in range(10001)])
        self.assertLess(len(thin), 300)
        self.assertEqual((thin[0], thin[-1]), ((0, 0), (10000, 10000)))


class ReadmeTest(parameterized.TestCase):
    def test_is_short_and_shows_the_page(self):
        lines = (ROOT / "README.md").read_text().splitlines()
        self.assertLessEqual(len(lines), 120)
        (picture,) = re.findall(r"!\[[^]]+\]\((\S+\.png)\)", "\n".join(lines[:40]))
        self.assertLess((ROOT / picture).stat().st_size, 300_000)


if __name__ == "__main__":
    tf.test.main()
