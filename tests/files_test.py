import locale
import os
import pathlib
from unittest import mock

from absl.testing import parameterized

from dfq_tf import files
from dfq_tf.compat import tf
from dfq_tf.errors import ConfigError


class FilesTest(parameterized.TestCase, tf.test.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.get_temp_dir())

    def _names(self):
        return sorted(path.name for path in self.folder.iterdir())

    def test_text_and_bytes_are_written_and_replaced(self):
        path = self.folder / "result"
        files.write_text(path, "old and long")
        files.write_text(path, "new")
        self.assertEqual(path.read_text(), "new")
        files.write_bytes(path, b"\x00\xff")
        self.assertEqual(path.read_bytes(), b"\x00\xff")
        self.assertEqual(self._names(), ["result"])

    def test_text_is_utf_8_whatever_the_locale_is(self):
        path, text = self.folder / "labels.txt", "žába\n蛙\n"
        before = locale.setlocale(locale.LC_CTYPE)
        self.addCleanup(locale.setlocale, locale.LC_CTYPE, before)
        locale.setlocale(locale.LC_CTYPE, "C")
        files.write_text(path, text)
        self.assertEqual(path.read_bytes(), text.encode("utf-8"))
        self.assertEqual(files.read_text(path), text)

    def test_byte_order_mark_is_no_text(self):
        path = self.folder / "labels.txt"
        path.write_bytes(b"\xef\xbb\xbfcat\n")
        self.assertEqual(files.read_text(path), "cat\n")

    @parameterized.parameters(
        ("~/run", "/home/me/run"),
        ("~", "/home/me"),
        ("runs/~x", "runs/~x"),
        ("~of_nobody/run", "~of_nobody/run"),
    )
    def test_home_folder_is_filled_in(self, given, expected):
        with mock.patch.dict(os.environ, HOME="/home/me"):
            for path in (given, pathlib.Path(given)):
                self.assertEqual(files.expanded(path), pathlib.Path(expected))

    def test_text_is_written_and_read_at_home(self):
        with mock.patch.dict(os.environ, HOME=str(self.folder)):
            files.write_text("~/a/result", "x")
            self.assertEqual(files.read_text("~/a/result"), "x")
        self.assertEqual((self.folder / "a" / "result").read_text(), "x")

    def test_nearest_there_is_the_path_or_what_is_above_it(self):
        file = self.folder / "file"
        file.touch()
        for path, expected in (
            (self.folder, self.folder),
            (self.folder / "a" / "b", self.folder),
            (file / "a", file),
        ):
            self.assertEqual(files.nearest_there(path), expected)

    def test_object_is_what_json_says_by_name(self):
        path = self.folder / "run.json"
        self.assertEqual(files.read_object(path), {})
        path.write_text('{"seed": "1"}')
        self.assertEqual(files.read_object(path), {"seed": "1"})

    @parameterized.parameters(
        (b"", "Expecting value"),
        (b'{"seed": ', "Expecting value"),
        (b"[1]", "it has no names"),
        (b"\xff\xfe", "can't decode"),
    )
    def test_damaged_object_is_refused(self, content, what):
        path = self.folder / "run.json"
        path.write_bytes(content)
        message = f"run.json is not as a run has written it .*{what}.*--workdir"
        with self.assertRaisesRegex(ConfigError, message):
            files.read_object(path)

    def test_digest_is_of_the_contents(self):
        # FIPS 180-4's example, and the same bytes in two files.
        for name, content in (("whole", b"abc"), ("first", b"a"), ("rest", b"bc")):
            (self.folder / name).write_bytes(content)
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        for names in (["whole"], ["first", "rest"]):
            paths = [self.folder / name for name in names]
            self.assertEqual(files.digest(*paths), expected)

    def test_missing_folders_are_made(self):
        files.write_text(self.folder / "a" / "b" / "result", "x")
        self.assertEqual((self.folder / "a" / "b" / "result").read_text(), "x")

    @parameterized.parameters(OSError, KeyboardInterrupt)
    def test_failing_write_keeps_old_content_and_leaves_nothing(self, error):
        path = self.folder / "model.keras"
        path.write_text("old")
        with self.assertRaisesRegex(error, "disk full"):
            with files.replacing(path) as temporary:
                temporary.write_text("half of the n")
                raise error("disk full")
        self.assertEqual(path.read_text(), "old")
        self.assertEqual(self._names(), ["model.keras"])

    def test_failing_first_write_leaves_no_file(self):
        with self.assertRaisesRegex(TypeError, "data must be str"):
            files.write_text(self.folder / "result", b"bytes")
        self.assertEqual(self._names(), [])

    def test_content_appears_only_at_the_end(self):
        path = self.folder / "result"
        with files.replacing(path) as temporary:
            temporary.write_text("new")
            self.assertFalse(path.exists())
            # Keras chooses the format by the suffix.
            self.assertEqual(temporary.parent, self.folder)
        self.assertEqual(path.read_text(), "new")

    def test_temporary_path_keeps_the_suffix(self):
        with files.replacing(self.folder / "model.keras") as temporary:
            temporary.write_text("")
            self.assertEqual(temporary.suffix, ".keras")


if __name__ == "__main__":
    tf.test.main()
