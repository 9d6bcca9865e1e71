"""What all tools share: how they end, and what their flags take."""

import errno
import os
import shlex
import sys
import types
from unittest import mock

from absl import flags
from absl.testing import absltest, parameterized

from tools import common
from dfq_tf.compat import tf
from dfq_tf.files import digest
from tests.helpers import new_folder
from tests.tool_runner import ROOT, run_in_process


class EndTest(parameterized.TestCase):
    @parameterized.parameters("", "a line\n")
    def test_reader_that_has_gone_ends_the_tool_quietly(self, text):
        # As `inspect_model.py ... | head`, which closes its end.
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as stream:
            with mock.patch.object(sys, "stdout", stream):
                with self.assertRaises(SystemExit) as end:
                    with common._ends_with_its_reader():
                        print("what is buffered")
                        sys.stdout.flush() if text else None
                        print(text)
            # What is left goes nowhere, without an error.
            stream.write("more")
        self.assertEqual(end.exception.code, 141)

    def test_reader_that_is_there_reads_all(self):
        reading, writing = os.pipe()
        with os.fdopen(writing, "w") as stream, os.fdopen(reading) as reader:
            with mock.patch.object(sys, "stdout", stream):
                with common._ends_with_its_reader():
                    print("all")
            self.assertEqual(reader.readline(), "all\n")

    def test_exit_code_of_an_error_stays(self):
        with self.assertRaises(SystemExit) as end:
            with common._ends_with_its_reader():
                sys.exit(2)
        self.assertEqual(end.exception.code, 2)

    def test_disk_that_is_full_is_one_message(self):
        def main():
            raise OSError(errno.ENOSPC, "No space left on device", "run/df_q.keras")

        with mock.patch("builtins.print") as printed:
            with self.assertRaises(SystemExit) as end:
                common._run(main)
        self.assertEqual(end.exception.code, 1)
        ((message,), _) = printed.call_args
        self.assertRegex(message, r"^error: .* No space left .*'run/df_q.keras'\. When")
        self.assertNotIn("\n", message)

    def test_so_it_is_where_tensorflow_writes(self):
        def main():
            raise tf.errors.ResourceExhaustedError(
                None, None, "run/tensorboard/events; No space left on device\n[Op:...]"
            )

        with mock.patch("builtins.print") as printed:
            with self.assertRaises(SystemExit) as end:
                common._run(main)
        self.assertEqual(end.exception.code, 1)
        ((message,), _) = printed.call_args
        self.assertRegex(message, "^error: .*tensorboard/events; No space left .*When")
        self.assertNotIn("\n", message)

    def test_other_errors_of_tensorflow_stay_what_they_are(self):
        def main():
            raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

        with self.assertRaises(tf.errors.ResourceExhaustedError):
            common._run(main)

    @parameterized.parameters(KeyboardInterrupt, common._Terminated, OSError)
    def test_run_that_ends_before_anything_was_made_leaves_its_folder_free(self, end):
        path = new_folder()

        def main():
            common._claimed.append(common.Workdir(path, {"seed": "1"}))
            raise end

        with mock.patch("builtins.print"), self.assertRaises(SystemExit):
            common._run(main)
        self.assertEqual([*path.iterdir()], [])


class FlagfileTest(parameterized.TestCase):
    @parameterized.parameters(
        (
            "\ufeff--minutes=1\n",
            "utf-8",
            "a flagfile has a byte-order mark before its first line, '--minutes=1'. ",
        ),
        ("\ufeff# A comment.\n--minutes=1\n", "utf-8", "a flagfile has a byte-order"),
        ("--minutes=1\n", "utf-16", "a flagfile is no text in UTF-8: "),
    )
    def test_file_of_another_encoding_is_one_message(self, text, encoding, message):
        path = new_folder() / "flags.cfg"
        path.write_text(text, encoding)
        process = run_in_process("distill", f"--flagfile={path}")
        self.assertEqual(process.returncode, 2)
        self.assertStartsWith(process.stderr, f"error: {message}")
        end = "Save it as UTF-8 without a byte-order mark (BOM)\n"
        self.assertEndsWith(process.stderr, end)

    @parameterized.parameters(
        ("  # my run\n\t// of today\n", 1, "there is no model file absent.keras"),
        ("seed=1\n", 2, "a flagfile has the line 'seed=1', which is no flag; flags "),
    )
    def test_line_that_is_no_flag_is_no_teacher(self, line, exit_code, message):
        path = new_folder() / "flags.cfg"
        path.write_text(f"--teacher=absent.keras\n{line}")
        process = run_in_process("inspect_model", f"--flagfile={path}")
        self.assertEqual(process.returncode, exit_code)
        self.assertStartsWith(process.stderr, f"error: {message}")


class QuietTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.tool = new_folder() / "tool.py"
        cls.tool.write_text(
            "import os, sys\n"
            "sys.path.insert(0, os.getcwd())\n"
            "from tools import common\n"
            "def main():\n"
            "    common.say('what is done')\n"
            "    print('result', common.FLAGS.progress)\n"
            "    with common.stage('a stage', least_seconds=0): pass\n"
            "common.define_run_flags(None, trains=False)\n"
            "common.run(main, 'A tool.')\n"
        )

    @parameterized.parameters(
        ([], "what is done\nresult True\n", "a stage: done in 0 s\n"),
        (["--noprogress"], "what is done\nresult False\n", ""),
        (["--quiet"], "result True\n", "a stage: done in 0 s\n"),
        (["--quiet", "--noprogress"], "result False\n", ""),
    )
    def test_results_and_stages_alone_are_said(self, flags, output, progress):
        result = run_in_process(self.tool, *flags)
        self.assertEqual((result.stdout, result.stderr), (output, progress))


def _digest(path):
    return digest(*common._files_of(str(path)))


class DigestTest(parameterized.TestCase):
    def test_of_a_model_in_parts_is_that_of_all_of_them(self):
        folder = new_folder()
        path, weights = folder / "model.json", folder / "model.h5"
        path.write_text('{"class_name": "Functional", "config": {}}')
        seen = set()
        for content in (b"1", b"2"):
            weights.write_bytes(content)
            seen.add(_digest(path))
        # The description beside a whole model counts too.
        (folder / "whole.keras").write_bytes(b"3")
        for content in ("", "4"):
            (folder / "whole.json").write_text(content)
            seen.add(_digest(folder / "whole.keras"))
        self.assertLen(seen, 4)

    def test_folder_that_is_no_model_has_no_files(self):
        self.assertEmpty(common._files_of(str(new_folder())))

    def test_of_a_folder_of_pictures_is_that_of_all_of_them(self):
        folder = new_folder()
        (folder / "a.png").write_bytes(b"1")
        (folder / "notes.txt").write_bytes(b"2")
        one = _digest(folder)
        (folder / "b.png").write_bytes(b"3")
        both = _digest(folder)
        (folder / "b.png").write_bytes(b"4")
        self.assertLen({one, both, _digest(folder)}, 3)


class CommandTest(parameterized.TestCase):
    @parameterized.parameters(
        ("inspect_model", "dfq-tf inspect"),
        ("convert", "dfq-tf convert"),
        ("curves", None),  # it is no subcommand
    )
    def test_it_is_called_as_the_user_can(self, tool, installed):
        folder = new_folder() / "it's mine"
        folder.mkdir()
        self.addCleanup(os.chdir, os.getcwd())
        for place in (folder, ROOT, ROOT / "tools"):
            os.chdir(place)
            called = common.command_of(tool)
            for path, named in zip(
                (sys.executable, ROOT / f"tools/{tool}.py"), shlex.split(called)
            ):
                self.assertTrue(os.path.samefile(path, named), called)
            with mock.patch.object(common, "_IS_INSTALLED", True):
                self.assertEqual(common.command_of(tool), installed or called)

    def test_paths_are_short_and_such_that_a_shell_takes_them_for_paths(self):
        home = new_folder() / "a b"
        (home / "bin").mkdir(parents=True)
        self.addCleanup(os.chdir, os.getcwd())
        with mock.patch.object(sys, "executable", f"{home}/bin/python3"):
            os.chdir(home)
            self.assertStartsWith(common.command_of("run"), "bin/python3 ")
            # A bare name would be looked for elsewhere.
            os.chdir(home / "bin")
            self.assertStartsWith(common.command_of("run"), f"'{home}/bin/python3' ")
        os.chdir(ROOT)
        self.assertEndsWith(common.command_of("convert"), " tools/convert.py")

    @parameterized.parameters(True, False)
    def test_help_calls_a_tool_as_the_user_can(self, is_installed):
        text = "Converts.\n\n    python tools/convert.py --student=a.keras\n"
        with (
            mock.patch.dict(common._groups, clear=True),
            mock.patch.object(common, "_IS_INSTALLED", is_installed),
        ):
            called = "dfq-tf convert" if is_installed else common.command_of("convert")
            shown = common._help(text, is_full=False)
        self.assertIn(f"\n    {called} --student=a.keras\n", shown)


class TextFlagTest(parameterized.TestCase):
    @parameterized.parameters(
        ("~/run", "/home/me/run"),
        ("~", "/home/me"),
        ("runs/~x", "runs/~x"),
        ("wrn_16_1", "wrn_16_1"),
    )
    def test_a_path_may_begin_at_home(self, given, expected):
        values = flags.FlagValues()
        with (
            mock.patch.object(flags, "DEFINE", _define_in(values)),
            mock.patch.dict(common._groups, clear=True),
            mock.patch.dict(os.environ, HOME="/home/me"),
        ):
            common.define("Run", "place", str, "runs/run", "Folder.")
            values(["tool", f"--place={given}"])
        self.assertEqual(values.place, expected)
        self.assertEqual(values["place"].default, "runs/run")


def _define_in(values):
    define = flags.DEFINE
    return lambda *args, **kwargs: define(*args, flag_values=values, **kwargs)


class DeviceTest(parameterized.TestCase):
    @parameterized.parameters(
        ([], "none", r"the CPU \(\d+ cores\), as TensorFlow sees no GPU"),
        (["H200", "T4"], "none", "H200"),
        (["H200", "T4"], "mirrored", "H200, T4"),
    )
    def test_it_is_named(self, gpus, distribute, expected):
        given = types.SimpleNamespace(distribute=distribute)
        with (
            mock.patch.object(common, "gpu_names", return_value=gpus),
            mock.patch.object(common, "FLAGS", given),
        ):
            self.assertRegex(common.device(), f"^{expected}$")


if __name__ == "__main__":
    absltest.main()
