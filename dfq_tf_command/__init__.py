"""The command `dfq-tf`: each subcommand is one of the tools, the same file.

    dfq-tf run model.keras --input_mean=0 --input_scale=1/255

An installed package has the tools beside this file, a source tree in `tools/`. What
only asks for help or versions does not wait for TensorFlow.
"""

import ast
import pathlib
import platform
import re
import runpy
import sys
from importlib import metadata

# Subcommand -> name of the tool.
SUBCOMMANDS = {
    "run": "run",
    "inspect": "inspect_model",
    "quantize": "quantize",
    "distill": "distill",
    "convert": "convert",
    "evaluate": "evaluate",
    "compare": "compare",
    "report": "report",
    "noise": "layer_noise",
}
# What a report of a bug should name.
_PACKAGES = (
    "tensorflow",
    "tf_keras",
    "keras",
    "tensorflow-model-optimization",
    "ai-edge-litert",
    "numpy",
    "h5py",
    "flatbuffers",
    "protobuf",
    "jinja2",
    "tensorboard",
    "tensorflow-datasets",
    "scikit-learn",
    "matplotlib",
)
_HERE = pathlib.Path(__file__).parent


def tools_folder() -> pathlib.Path:
    """Where the tools are."""
    beside = _HERE / "tools"
    return beside if beside.is_dir() else _HERE.parent / "tools"


def main() -> None:
    """Runs a subcommand; exits as its tool does, with 2 for one that is not there."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(help_text())
    elif name in ("--version", "version"):
        print(versions())
    elif name not in SUBCOMMANDS:
        print(
            f"error: {name!r} is no subcommand; it must be one of "
            f"{', '.join(SUBCOMMANDS)}. See dfq-tf --help",
            file=sys.stderr,
        )
        sys.exit(2)
    else:
        path = str(tools_folder() / f"{SUBCOMMANDS[name]}.py")
        sys.argv = [path, *sys.argv[2:]]
        runpy.run_path(path, run_name="__main__")


def help_text() -> str:
    """The subcommands, with the first line of what each says of itself."""
    lines = [
        "dfq-tf: a trained Keras image classifier goes in, an integer TFLite model",
        "comes out, and no data is used on the way.",
        "",
    ]
    for name, tool in SUBCOMMANDS.items():
        source = (tools_folder() / f"{tool}.py").read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(source)) or ""
        lines.append(f"  {name:9} {said.splitlines()[0]}")
    lines += ["", "dfq-tf SUBCOMMAND --help tells the rest; --version is for a report."]
    return "\n".join(lines)


def versions() -> str:
    """The versions of all that matters to a report of a bug, a line each."""
    path = _HERE.parent / "dfq_tf" / "__init__.py"
    found = re.search(r'^__version__ = "(.+)"$', path.read_text(), re.MULTILINE)
    lines = [
        f"dfq_tf {found[1] if found else '(unknown)'}",
        f"Python {platform.python_version()}, {platform.platform()}",
    ]
    for package in _PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed")
    return "\n".join(lines)
