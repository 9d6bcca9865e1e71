"""The import graph is what the BUILD files and the architecture say it is."""

import ast
import functools
import pathlib
import re

from absl.testing import absltest, parameterized

ROOT = pathlib.Path(__file__).resolve().parents[1]
# The rooms that are folders of the package.
FOLDERS = (
    "distillation",
    "graph",
    "importing",
    "models",
    "photographs",
    "quantization",
    "reports",
    "tflite",
    "training",
    "with_data",
)
PACKAGES = (
    "dfq_tf",
    *(f"dfq_tf/{room}" for room in FOLDERS),
    "dfq_tf_command",
    "tools",
    "tests",
)
# Modules that a program may read without waiting for TensorFlow to load.
LIGHT = (
    "settings",
    "procedural",
    "graph.description",
    "graph.nodes",
    "errors",
    "files",
)
# The ground that every room stands on.
GROUND = {
    "compat",
    "context",
    "errors",
    "files",
    "photographs",
    "procedural",
    "settings",
}
# Room -> the rooms that it may import, besides the ground. A room is a folder of the
# package, or a module of its own.
MAY_IMPORT: dict[str, set[str]] = {
    "graph": set(),
    "models": set(),
    "importing": {"graph"},
    "quantization": {"graph"},
    "training": {"graph"},
    "tflite": {"graph", "quantization"},
    "distillation": {"graph", "training"},
    "with_data": {"distillation", "graph", "quantization", "training"},
    "api": {
        "distillation",
        "graph",
        "importing",
        "quantization",
        "tflite",
        "training",
    },
    "reports": {
        "distillation",
        "graph",
        "importing",
        "quantization",
        "tflite",
        "training",
    },
    "dfq_tf": {"api", "graph", "importing", "tflite"},
}
# Room -> its modules that other rooms import by name. All else comes through the room's
# `__init__`, which lists what the room is for.
DOORS: dict[str, set[str]] = {
    "distillation": {"phases", "steps"},
    "graph": {"layers", "rewriting", "running"},
    "importing": {"classifiers"},
    "quantization": {"grids", "post_training", "student"},
    "tflite": {"proof"},
    "training": {"devices", "optimizers"},
}
# Imports of one room by another, besides those of the ground.
MOST_THROUGH_WALLS = 100
LONGEST_FUNCTION = 60
RULES = ("py_library", "py_binary", "py_test")


def python_files() -> dict[str, pathlib.Path]:
    """Dotted name of each module of the project -> its file."""
    files = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).glob("*.py")):
            parts = package.split("/")
            if path.stem != "__init__":
                parts.append(path.stem)
            files[".".join(parts)] = path
    return files


MODULES = python_files()


@functools.cache
def imports_of(module: str) -> list[str]:
    """Dotted names that a module imports, at its top or inside a function."""
    names = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("a relative import hides what is imported")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def project_imports(name: str) -> set[str]:
    """Modules of the project that a module imports."""
    found = set()
    for imported in imports_of(name):
        # `from package import module` and `from module import name` look the same.
        candidates = (imported, imported.rpartition(".")[0])
        module = next((c for c in candidates if c in MODULES), None)
        if module is None and imported.split(".")[0] in PACKAGES:
            raise ValueError(f"{name} imports {imported}, which is not there")
        if module not in (None, name):
            found.add(module)
    return found


def imports_package(name: str, *packages: str) -> list[str]:
    """What a module imports of some packages, inside the project or outside."""
    return [
        imported
        for imported in imports_of(name)
        if any(f"{imported}.".startswith(f"{package}.") for package in packages)
    ]


def targets() -> dict[str, dict]:
    """Label of each target of the BUILD files -> the arguments of its rule."""
    found: dict[str, dict] = {}
    for package in PACKAGES:
        path = ROOT / package / "BUILD"
        scope = {name: lambda *args, **kwargs: None for name in _calls(path)}
        for kind in RULES:

            def rule(kind=kind, package=package, **arguments):
                label = f"//{package}:{arguments['name']}"
                if label in found:
                    raise ValueError(f"{label} is defined twice")
                found[label] = {"kind": kind, "package": package, **arguments}

            scope[kind] = rule
        exec(compile(path.read_text(), str(path), "exec"), scope)
    return found


def _calls(path: pathlib.Path) -> set[str]:
    return {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }


def absolute(label: str, package: str) -> str:
    """`:a` and `//b` in the form `//package:target`."""
    if label.startswith(":"):
        return f"//{package}{label}"
    if ":" not in label:
        return f"{label}:{label.rpartition('/')[2]}"
    return label


def label_of(module: str) -> str:
    path = MODULES[module]
    package = path.parent.relative_to(ROOT).as_posix()
    target = path.parent.name if path.stem == "__init__" else path.stem
    return f"//{package}:{target}"


class BuildFilesTest(parameterized.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.targets = targets()

    @parameterized.parameters(*MODULES)
    def test_deps_are_the_imports(self, module):
        label = label_of(module)
        self.assertIn(label, self.targets, f"{module} has no target {label}")
        target = self.targets[label]
        deps = {absolute(dep, target["package"]) for dep in target.get("deps", [])}
        imports = {label_of(name) for name in project_imports(module)}
        self.assertEmpty(imports - deps, f"{module}: deps missing in BUILD")
        self.assertEmpty(deps - imports, f"{module}: deps that it does not import")

    @parameterized.parameters(*MODULES)
    def test_target_is_of_the_right_kind(self, module):
        target = self.targets[label_of(module)]
        self.assertEqual(target["srcs"], [MODULES[module].name], module)
        is_test = module.startswith("tests.") and module.endswith("_test")
        self.assertEqual(target["kind"], "py_test" if is_test else "py_library")
        self.assertEqual("size" in target, is_test, f"{module}: size of its target")

    def test_every_tool_is_a_program(self):
        programs = {
            (target["package"], *target["srcs"])
            for target in self.targets.values()
            if target["kind"] == "py_binary"
        }
        tools = {
            ("tools", path.name)
            for name, path in MODULES.items()
            if name.startswith("tools.") and "__main__" in path.read_text()
        }
        self.assertNotEmpty(tools)
        self.assertEqual(programs, tools)

    def test_every_target_has_a_file(self):
        for label, target in self.targets.items():
            for name in target["srcs"]:
                path = ROOT / target["package"] / name
                self.assertTrue(path.is_file(), f"{label}: there is no {path}")

    def test_every_source_is_listed_for_this_test(self):
        # Bazel shows a test only the files that a target lists.
        root = (ROOT / "BUILD").read_text()
        for package in PACKAGES:
            self.assertEqual(root.count(f'        "//{package}:sources",'), 1, package)
            text = (ROOT / package / "BUILD").read_text()
            for path in (ROOT / package).glob("*.py"):
                self.assertEqual(text.count(f'        "{path.name}",'), 1, path)


def room_of(module: str) -> str:
    """The room of a module of the package; 'dfq_tf' for the package itself."""
    _, *parts = module.split(".")
    return parts[0] if parts else "dfq_tf"


def of_package(package: str) -> list[str]:
    return [n for n in MODULES if f"{n}.".startswith(f"{package}.")]


def through_walls() -> list[tuple[str, str]]:
    """Imports of one room by another, without those of the ground."""
    return [
        (module, imported)
        for module in of_package("dfq_tf")
        for imported in sorted(project_imports(module))
        if room_of(imported) not in {room_of(module), *GROUND}
    ]


class RoomsTest(parameterized.TestCase):
    def test_every_room_is_in_the_table(self):
        rooms = {room_of(module) for module in of_package("dfq_tf")}
        self.assertEqual(rooms, {*MAY_IMPORT, *GROUND})

    def test_imports_are_those_of_the_table(self):
        for module, imported in through_walls():
            room = room_of(module)
            self.assertNotIn(room, GROUND, f"{module} imports {imported}")
            allowed = MAY_IMPORT[room]
            self.assertIn(room_of(imported), allowed, f"{module} imports {imported}")

    def test_imports_go_through_doors(self):
        for module, imported in through_walls():
            room = room_of(imported)
            name = imported.removeprefix(f"dfq_tf.{room}").removeprefix(".")
            if name:
                self.assertIn(name, DOORS[room], f"{module} imports {imported}")

    def test_few_imports_go_through_walls(self):
        self.assertLessEqual(len(through_walls()), MOST_THROUGH_WALLS)

    def test_every_door_is_used(self):
        used = {imported for _, imported in through_walls()}
        used |= {i for m in of_package("tools") for i in project_imports(m)}
        for room, doors in DOORS.items():
            for door in doors:
                self.assertIn(f"dfq_tf.{room}.{door}", used)

    def test_the_table_has_no_circle(self):
        below = {room: set(rooms) for room, rooms in MAY_IMPORT.items()}
        while below:
            ground = {room for room, rooms in below.items() if not rooms & below.keys()}
            self.assertNotEmpty(ground, f"a circle: {below}")
            for room in ground:
                del below[room]

    def test_functions_are_short(self):
        for module in [*of_package("dfq_tf"), *of_package("tools")]:
            for node in ast.walk(ast.parse(MODULES[module].read_text())):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                    length = (node.end_lineno or start) - start + 1
                    self.assertLessEqual(
                        length, LONGEST_FUNCTION, f"{module}.{node.name}"
                    )


class ImportDirectionsTest(parameterized.TestCase):
    def assertImportsNone(self, modules, *packages: str):
        self.assertNotEmpty(modules)
        for module in modules:
            found = imports_package(module, *packages)
            self.assertEmpty(found, f"{module} imports {found}")

    def test_package_never_sees_data(self):
        others = set(of_package("dfq_tf")) - set(of_package("dfq_tf.with_data"))
        self.assertIn("dfq_tf.with_data.datasets", MODULES)
        self.assertImportsNone(
            others, "dfq_tf.with_data", "tensorflow_datasets", "sklearn"
        )

    def test_package_knows_neither_tools_nor_tests(self):
        self.assertImportsNone(of_package("dfq_tf"), "tools", "tests")

    def test_only_tools_touch_flags(self):
        self.assertImportsNone(of_package("dfq_tf"), "absl")
        self.assertNotEmpty(
            [m for m in of_package("tools") if imports_package(m, "absl.flags")]
        )

    def test_losses_know_tensors_only(self):
        found = imports_package("dfq_tf.distillation.losses", "dfq_tf")
        self.assertEqual(found, ["dfq_tf.compat.tf", "dfq_tf.training.replica_mean"])
        replicas = project_imports("dfq_tf.training.replicas")
        self.assertEqual(replicas, {"dfq_tf.compat"})

    def test_the_representation_knows_no_keras(self):
        rooms = ("dfq_tf.graph", "dfq_tf.quantization", "dfq_tf.tflite")
        modules = [module for room in rooms for module in of_package(room)]
        readers = {"dfq_tf.quantization.student", "dfq_tf.quantization.quantizers"}
        keras = [m for m in modules if "dfq_tf.compat.keras" in imports_of(m)]
        self.assertContainsSubset(set(keras), readers)

    @parameterized.parameters(*LIGHT)
    def test_light_modules_load_without_tensorflow(self, name):
        todo, seen = [f"dfq_tf.{name}"], set()
        while todo:
            module = todo.pop()
            seen.add(module)
            todo += project_imports(module) - seen
        self.assertImportsNone(
            seen,
            "dfq_tf.compat",
            "tensorflow",
            "tf_keras",
            "keras",
            "tensorflow_model_optimization",
        )

    def test_compat_alone_imports_tensorflow_and_keras(self):
        modules = {*of_package("dfq_tf"), *of_package("tools")}
        others = modules - {"dfq_tf.compat"}
        packages = ("tensorflow", "tf_keras", "tensorflow_model_optimization")
        self.assertImportsNone(others, *packages, "keras")
        for package in packages:
            self.assertLen(imports_package("dfq_tf.compat", package), 1)

    def test_there_are_no_cycles(self):
        done: set[str] = set()

        def visit(module: str, path: tuple[str, ...]) -> None:
            self.assertNotIn(module, path, f"a cycle: {' -> '.join(path)}")
            if module not in done:
                for imported in sorted(project_imports(module)):
                    visit(imported, (*path, module))
                done.add(module)

        for module in MODULES:
            visit(module, ())


class DesignPageTest(absltest.TestCase):
    def test_what_it_names_is_where_it_says(self):
        page = (ROOT / "docs/design.md").read_text()
        said = re.findall(r"([a-z_/]+\.py): ((?:`[\w.]+`(?:, )?)+)", page)
        said += re.findall(r"`([a-z_/]+\.py): ([\w, ]+)`", page)
        self.assertGreater(len(said), 80)
        files = [*(ROOT / "dfq_tf").rglob("*.py")]
        for file, names in said:
            found = [path for path in files if str(path).endswith(f"/{file}")]
            text = "\n".join(path.read_text() for path in found)
            for name in re.findall(r"\w+", names):
                defined = rf"(?m)^ *(?:def|class) {name}\b|^{name}\b"
                self.assertRegex(text, defined, f"{file}: {name}")


if __name__ == "__main__":
    absltest.main()
