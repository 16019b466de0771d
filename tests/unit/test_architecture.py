"""The directions of imports, the owners of libraries, and what is imported when.

Imports are read from the source, including those inside functions and under TYPE_CHECKING.
"""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = SCRIPTS + sorted((ROOT / "lab").rglob("*.py"))

# A package or module of lab imports only itself and later layers.
LAYERS = [
    {"scripts", "__init__"},
    {"loggers"},
    {"report", "inference", "export"},
    {"engine"},
    {"checkpoint"},
    {"data", "models"},
    {"config"},
    {"cuda_graph", "distributed", "own_code"},
    {"errors"},
    {"console"},
]
OWNERS = {
    "rich": ("lab.console",),
    "matplotlib": ("lab.report",),
    "jinja2": ("lab.report",),
    "huggingface_hub": ("lab.report", "lab.checkpoint.weights", "lab.models.pretrained"),
    "timm": ("lab.models.external", "lab.engine.optimizer"),
    "captum": ("lab.report.explain",),
    "datasets": ("lab.data.hugging_face",),
    "pyarrow": ("lab.data.hugging_face",),
    "optuna": ("sweep",),
}
NO_ACCELERATE = ("lab.data", "lab.models", "lab.engine.metrics")


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path):
    """Return the dotted names that a file imports; `from a import b` gives a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {module_name(path): imports(path) for path in SOURCES}


def imported_modules(name):
    """Return the modules of this project that a module imports."""
    modules = {n if n in IMPORTS else n.rpartition(".")[0] for n in IMPORTS[name]}
    return modules & IMPORTS.keys()


def layer(name):
    root, _, rest = name.partition(".")
    part = (rest.partition(".")[0] or "__init__") if root == "lab" else "scripts"
    [number] = [i for i, parts in enumerate(LAYERS) if part in parts]
    return number, part


def test_the_imports_are_found():
    assert "lab.engine.training.train_one_epoch" in IMPORTS["train"]
    assert {"lab.console", "lab.data", "lab.data.loaders"} <= imported_modules("train")
    assert {layer(name)[1] for name in IMPORTS} == set.union(*LAYERS)


@pytest.mark.parametrize("name", IMPORTS)
def test_imports_point_to_lower_layers(name):
    for imported in imported_modules(name) - {"lab"}:
        (own, part), (other, other_part) = layer(name), layer(imported)
        assert own < other or part == other_part, f"{name} imports {imported}"


def test_no_imports_are_circular():
    graph = {name: imported_modules(name) - {"lab"} for name in IMPORTS}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_by_its_owner_only(library):
    users = {name for name, names in IMPORTS.items() for n in names if n.split(".")[0] == library}
    assert users
    assert all(name.startswith(OWNERS[library]) for name in users)


def imports_at_start(path):
    """Return the dotted names that are imported when a module of this project is."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_training_starts_without_torchvision():
    """Importing it takes a second or two; only models and datasets that need it do so."""
    paths = {module_name(path): path for path in SOURCES}
    reached, modules = set(), imported_modules("train")
    while modules - reached:
        name = (modules - reached).pop()
        reached.add(name)
        names = imports_at_start(paths[name])
        assert not any(n.split(".")[0] in ("torchvision", "matplotlib", "captum") for n in names), (
            name
        )
        found = {n if n in IMPORTS else n.rpartition(".")[0] for n in names}
        modules |= found & IMPORTS.keys()
    assert "lab.data.splits" in reached


def test_models_data_and_metrics_do_not_import_accelerate():
    for name in (name for name in IMPORTS if name.startswith(NO_ACCELERATE)):
        assert not any(n.split(".")[0] == "accelerate" for n in IMPORTS[name]), name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_contains_no_file_names_and_no_ranks(script):
    names = {name.split(".")[0] for name in IMPORTS[script.stem]}
    assert not names & {"safetensors", "torchvision"}
    text = script.read_text()
    for detail in ("rank == 0", '.safetensors"', '.jsonl"', "process_index"):
        assert detail not in text


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_MODULES |= {"marshal"}
UNSAFE_CALLS = {f"{a}.{b}" for a in ("torch", "np", "numpy") for b in ("load", "save", "savez")}
UNSAFE_METHODS = {"save_state", "load_state", "register_for_checkpointing"}  # of Accelerator


def unsafe_names(path):
    """Return the names in a file that read or write pickles, or run code."""
    names = imports(path)
    unsafe = {n for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS}
    for node in ast.walk(ast.parse(path.read_text())):
        name = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if name in UNSAFE_CALLS or name.split(".")[-1] in UNSAFE_METHODS:
            unsafe.add(name)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("eval", "exec"):
            unsafe.add(ast.unparse(node.func))
    return unsafe


def test_p4_no_pickle(tmp_path):
    assert {path.name: names for path in SOURCES if (names := unsafe_names(path))} == {}
    path = tmp_path / "x.py"
    for code in (
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "import torch\ntorch.save(1, 'x')",
        "import numpy as np\nnp.load('x')",
        "accelerator.save_state('x')",
        "eval('1')",
    ):
        path.write_text(code)
        assert unsafe_names(path), code
    path.write_text("import json, safetensors.torch\njson.load(f)\nsafetensors.torch.save({})")
    assert not unsafe_names(path)


HEAVY = {"torch", "torchvision", "accelerate", "numpy", "safetensors"}
RUN_SCRIPT = """
import runpy
for arguments, code in ((["--help"], 0), (["--no-such-option"], 2)):
    sys.argv[1:] = arguments
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        assert (end.code or 0) == code, end.code
"""


def run_python(code, *argv):
    """Run `code` in a new Python. Return its output and the top-level modules it imported."""
    code = f"import sys\nsys.argv = {list(argv)!r}\n{code}\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    output, _, names = done.stdout.rpartition("MODULES")
    return output, {name.split(".")[0] for name in names.split()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_and_mistakes_are_answered_before_torch_is_imported(script):
    output, modules = run_python(RUN_SCRIPT, script.name)
    assert f"usage: {script.name}" in output
    assert not modules & HEAVY
