"""The shape of the project: what is packaged, who imports whom, what an import costs."""

import ast
import functools
import graphlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import TypeCheckError

ROOT = Path(__file__).resolve().parents[2]
# Folder -> the name it is imported by.
FOLDERS = {
    "hooked_alm": "hooked_alm",
    "converters": "hooked_alm.converters",
    "experiments": "hooked_alm.experiments",
}

# Rooms from the ground up: a module, or a folder with all that is in it. Each imports its own level
# and those before it.
LEVELS: tuple[set[str], ...] = (
    {"errors", "axes", "bundled", "containers", "display", "mpeg", "storage", "text_files",
     "turns"},
    {"samples", "chat_template", "config", "points", "spans"},
    {"audio", "hooks", "inputs"},
    {"components", "checkpoint", "offload"},
    {"hooked_transformer", "stacks"},
    {"masks"},
    {"encoder"},
    {"frontend"},
    {"encoder_rows"},
    {"log_mel"},
    {"prompts"},
    {"generation_loop"},
    {"whisper_generation"},
    {"generation"},
    {"model"},
    {"precision"},
    {"engine", "methods.result"},
    {"methods.statistics", "methods.reading", "methods.activations", "methods.dictionary"},
    {"methods.patching"},
    {"methods.adapters", "methods.attribution", "methods.neurons", "methods.robustness"},
    {"converters.devices"},
    {"converters.family", "converters.rules", "converters.strict_config"},
    {"converters.blocks"},
    {"converters.families"},
    {f"converters.{name}"
     for name in ("registry", "folders", "deltas", "dictionaries", "processors", "loading", "lora",
                  "hugging_face")},
    {"converters", "converters.parity", "converters.model_table"},
    {"experiments.workbench"},
    {"experiments.materials"},
    {f"experiments.{path.name}" for path in (ROOT / "experiments").iterdir()
     if path.is_dir() and path.name not in ("workbench", "materials", "assets", "__pycache__")},
    {"experiments", "experiments.registry", "experiments.cli"},
)  # fmt: skip
LEVEL = {f"hooked_alm.{room}": level for level, rooms in enumerate(LEVELS) for room in rooms}
# Folders whose modules or sub-folders know nothing of one another.
SEPARATE = ("hooked_alm.converters.families", "hooked_alm.experiments")

# The modules that may import transformer_lens.
TRANSFORMER_LENS = {"hooked_alm.hooks"}
# Only experiments make figures, tables, progress bars and command lines.
ONLY_IN_EXPERIMENTS = {"matplotlib", "pandas", "pyarrow", "tqdm", "typer", "rich"}
FILE_IO = {
    *("pathlib", "os", "io", "shutil", "tempfile", "glob", "json", "csv", "pickle", "yaml"),
    *("safetensors", "soundfile", "logging"),
}
# Of the methods, the store alone keeps files: what does not fit into memory is no tensor.
STORE = {f"hooked_alm.methods.activations.{name}" for name in ("store", "writer", "reader")}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "common", "misc", "types", "logging"}
GLOBAL_SEEDS = {
    *("random.seed", "np.random.seed", "numpy.random.seed"),
    *("torch.manual_seed", "torch.random.manual_seed", "torch.seed"),
}
# (importing module, function, imported name): the exceptions, each with its reason.
EXCEPTIONS = {
    # The name every user looks for; a three-line classmethod.
    ("hooked_alm.model", "HookedALM.from_pretrained", "hooked_alm.converters"),
    # On request only, inside the method: a result that cannot be looked at is half a result.
    ("hooked_alm.methods.patching.results", "PatchResult.to_dataframe", "pandas"),
    ("hooked_alm.methods.patching.results", "PatchResult.plot", "matplotlib"),
}


class Import(NamedTuple):
    """One imported name, absolute, and the function or class it is imported in."""

    module: str
    name: str
    scope: str
    line: int

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


class Source(NamedTuple):
    """A Python file of the package."""

    module: str
    path: Path
    tree: ast.Module


@functools.cache
def sources() -> tuple[Source, ...]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            module = ".".join((package, *parts))
            found.append(Source(module, path, ast.parse(path.read_text("utf-8"))))
    return tuple(found)


def outside_sources() -> Iterator[Source]:
    for folder in ("tests", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield Source(f"{folder}.{path.stem}", path, ast.parse(path.read_text("utf-8")))


def imports(source: Source) -> Iterator[Import]:
    is_package = source.path.name == "__init__.py"

    def walk(node: ast.AST, scope: tuple[str, ...]) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = (*scope, child.name)
            names: list[str] = []
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = source.module.split(".")
                    keep = len(parents) - child.level + is_package
                    base = ".".join([*parents[:keep], *filter(None, [child.module])])
                names = [f"{base}.{alias.name}" for alias in child.names]
            for name in names:
                yield Import(source.module, name, ".".join(scope), child.lineno)
            yield from walk(child, inner)

    yield from walk(source.tree, ())


@functools.cache
def all_imports() -> tuple[Import, ...]:
    return tuple(found for source in sources() for found in imports(source))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def room(module: str) -> str:
    """``hooked_alm.methods.reading.lens`` -> ``hooked_alm.methods.reading``; "" has no level."""
    parts = module.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 1, -1))
    return next((name for name in names if name in LEVEL), "")


@functools.cache
def modules() -> frozenset[str]:
    return frozenset(source.module for source in sources())


def module_of(name: str) -> str:
    """The module that an imported name is, or is taken from."""
    return name if name in modules() else name.rpartition(".")[0]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def listed(offenders: Iterator[Any]) -> str:
    return "\n".join(str(offender) for offender in offenders)


# --- What is packaged


def test_every_folder_with_python_files_is_packaged() -> None:
    folders = {source.path.parent.relative_to(ROOT).as_posix() for source in sources()}
    setuptools = pyproject()["tool"]["setuptools"]
    mapping = setuptools["package-dir"]

    def folder(name: str) -> str:
        """Where setuptools looks: a sub-package follows the folder it is mapped with."""
        parent, _, last = name.rpartition(".")
        return mapping.get(name) or "/".join(filter(None, (parent and folder(parent), last)))

    packaged = {folder(name) for name in setuptools["packages"]}
    assert packaged == folders
    assert not listed(folder for folder in folders if not (ROOT / folder / "__init__.py").is_file())
    for folder, package in FOLDERS.items():
        if folder != package:
            link = ROOT / "typings" / package.replace(".", "/")
            assert link.resolve() == ROOT / folder, "mypy finds a mapped folder through this link"


def test_every_import_is_declared_and_every_declaration_is_pinned() -> None:
    project = pyproject()["project"]
    requirements = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[^\w-]", line)[0].lower().replace("_", "-") for line in requirements}
    imported_as = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
    # Trainers that the project is compared with, each in an environment of its own: they exclude
    # the transformer_lens that it needs, or each other.
    apart = {"sae_lens", "dictionary_learning", "sparsify"}
    ours = {"hooked_alm", "cases", *apart, *(source.path.stem for source in outside_sources())}
    undeclared = (
        found
        for source in (*sources(), *outside_sources())
        for found in imports(source)
        if (top := found.name.split(".")[0]) not in sys.stdlib_module_names | ours
        and imported_as.get(top, top.replace("_", "-")) not in declared
    )
    assert not listed(undeclared)

    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.partition("==") for line in lines if not line.startswith("#")]
    assert declared <= {name.lower().replace("_", "-") for name, _, _ in pins}
    assert not listed(name for name, _, version in pins if not version or "+" in version)


def test_no_module_is_named_after_nothing() -> None:
    assert not listed(s.path for s in sources() if s.path.stem in FORBIDDEN_NAMES)


# --- Who imports whom


def test_every_module_has_a_level() -> None:
    packages = {"hooked_alm", "hooked_alm.methods"}  # which hold rooms, and no code
    assert not listed(name for name in modules() - packages if not room(name))


def is_excepted(found: Import) -> bool:
    return any(
        (found.module, found.scope) == (module, scope) and within(found.name, name)
        for module, scope, name in EXCEPTIONS
    )


def test_imports_run_downwards() -> None:
    def offends(found: Import) -> bool:
        importer, imported = room(found.module), room(module_of(found.name))
        return bool(importer and imported) and LEVEL[imported] > LEVEL[importer]

    ours = [found for found in all_imports() if within(found.name, "hooked_alm")]
    assert len(ours) > 1000
    assert not listed(found for found in ours if offends(found) and not is_excepted(found))


def test_families_and_experiments_do_not_import_each_other() -> None:
    def apart(found: Import, folder: str) -> bool:
        importer, target = found.module, module_of(found.name)
        if not (within(importer, folder) and within(target, folder)):
            return False
        own, other = (name.removeprefix(folder).split(".")[1:2] for name in (importer, target))
        below = {"workbench", "materials"}
        above = {"cli", "registry"}
        return own != other and not below & {*other} and not above & {*own}

    assert not listed(
        found for found in all_imports() for folder in SEPARATE if apart(found, folder)
    )


def test_no_circle_of_files() -> None:
    graph = {name: set[str]() for name in modules()}
    for found in all_imports():
        if within(found.name, "hooked_alm") and not is_excepted(found):
            graph[found.module].add(module_of(found.name))
    graph = {name: reads - {name} for name, reads in graph.items()}
    assert sum(map(len, graph.values())) > 500
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_mapped_folders_are_imported_by_their_full_name() -> None:
    bare = (
        found
        for source in (*sources(), *outside_sources())
        for found in imports(source)
        if found.name.split(".")[0] in {"converters", "experiments"}
    )
    assert not listed(bare), "from the root this makes a second copy of the module"


def test_transformer_lens_is_imported_at_the_seam_only() -> None:
    assert not listed(
        found
        for found in all_imports()
        if within(found.name, "transformer_lens") and found.module not in TRANSFORMER_LENS
    )


def test_figures_tables_and_progress_live_in_experiments() -> None:
    assert not listed(
        found
        for found in all_imports()
        if found.name.split(".")[0] in ONLY_IN_EXPERIMENTS
        and not within(found.module, "hooked_alm.experiments")
        and not (found.module in STORE and found.name.split(".")[0] == "pyarrow")
        and not is_excepted(found)
    )


def test_methods_take_and_return_tensors_only() -> None:
    methods = [source for source in sources() if within(source.module, "hooked_alm.methods")]
    assert methods
    offenders = [
        str(found)
        for source in methods
        for found in imports(source)
        if found.name.split(".")[0] in FILE_IO and source.module not in STORE
    ]
    for source in methods:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in {"print", "input", "open", "torch.save", "torch.load", *GLOBAL_SEEDS}:
                    offenders.append(f"{source.module}:{node.lineno} calls {called}")
    assert not offenders


def test_no_folder_is_imported_by_its_bare_name() -> None:
    """Neither those at the top of the tree, nor those of the tests that mirror the code."""
    program = """
import importlib.util
assert importlib.util.find_spec("tiny"), "the path is not that of the tests"
for name in ("converters", "experiments", "engine"):
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    folders = pyproject()["tool"]["pytest"]["ini_options"]["pythonpath"]
    path = os.pathsep.join(str(ROOT / folder) for folder in folders)
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
    )
    expected = (f"No module named {name!r}" for name in ("converters", "experiments", "engine"))
    assert done.stdout.splitlines() == [*expected]


# --- Names


def test_a_type_has_one_meaning() -> None:
    """No two modules give one name to two classes, or to two types."""
    homes: dict[str, list[str]] = {}
    for source in sources():
        for node in source.tree.body:
            names = [node.name] if isinstance(node, ast.ClassDef) else []
            if isinstance(node, ast.Assign):
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            for name in names:
                if re.fullmatch(r"[A-Z]+[a-z]\w*", name):
                    homes.setdefault(name, []).append(source.module)
    assert len(homes) > 200
    assert not listed((name, *where) for name, where in homes.items() if len(where) > 1)


def test_hook_names_are_built_by_the_table() -> None:
    """No f-string puts a block before a point: ``points.hook_name`` does."""
    glued = re.compile(r"\.(\w+\.)*hook_\w+")
    offenders = [
        f"{source.module}:{node.lineno}"
        for source in sources()
        for node in ast.walk(source.tree)
        if isinstance(node, ast.JoinedStr)
        for before, after in itertools.pairwise(node.values)
        if isinstance(before, ast.FormattedValue) and isinstance(after, ast.Constant)
        if glued.match(str(after.value))
    ]
    # Text of a message, about a stack that has no short names.
    assert offenders == [one for one in offenders if one.startswith("hooked_alm.generation:")]
    assert len(offenders) == 1


# --- What an import costs

HEAVY = {
    *("transformers.models", "transformers.modeling_utils"),
    *("transformer_lens", "datasets", "matplotlib"),
}


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import hooked_alm", id="import"),
        pytest.param(
            "from hooked_alm.experiments.cli import main\n"
            "sys.argv = ['hooked-alm', '--help']\n"
            "try:\n    main()\nexcept SystemExit as exit:\n    assert not exit.code",
            id="help",
        ),
    ],
)
def test_light_imports(code: str) -> None:
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert not [name for name in loaded if any(within(name, heavy) for heavy in HEAVY)]


# --- Run-time checks of shapes

PROBE = """
from jaxtyping import Float
from torch import Tensor

def add(left: Float[Tensor, "batch pos"], right: Float[Tensor, "batch pos"]) -> Tensor:
    return left + right
"""


@pytest.mark.parametrize("package", FOLDERS.values())
def test_a_wrong_shape_raises(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A new module of the package goes through whatever the test run does to all of them.
    (tmp_path / "shape_probe.py").write_text(PROBE)
    parent = importlib.import_module(package)
    monkeypatch.setattr(parent, "__path__", [*parent.__path__, str(tmp_path)])
    probe = importlib.import_module(f"{package}.shape_probe")
    monkeypatch.delitem(sys.modules, f"{package}.shape_probe")

    assert probe.add(torch.zeros(2, 3), torch.ones(2, 3)).sum() == 6
    with pytest.raises(TypeCheckError, match="right"):
        probe.add(torch.zeros(2, 3), torch.ones(2, 1))
    with pytest.raises(TypeCheckError, match="left"):
        probe.add(torch.zeros(2), torch.zeros(2))


def test_texts_are_read_and_written_as_utf_8() -> None:
    """Whatever the locale: nothing opens a text file without naming its encoding."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and leaves_the_encoding_open(node)
    ]
    assert not bare


def leaves_the_encoding_open(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    given = {keyword.arg for keyword in call.keywords}
    if name in ("read_text", "write_text"):
        # `read_text` of a front-end is no file's.
        is_path = len(call.args) < 3 and not isinstance(call.func, ast.Name)
        return is_path and "encoding" not in given and len(call.args) < 1 + (name == "write_text")
    if name in ("run", "Popen", "check_output"):
        return "text" in given and "encoding" not in given
    modes = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    # `open` of an experiment, or of the os module, opens no text.
    is_text = name in ("open", "fdopen") and bool(modes or "newline" in given)
    return is_text and not any("b" in mode for mode in modes) and "encoding" not in given
