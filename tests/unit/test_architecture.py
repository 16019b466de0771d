"""The layout of docs/design.md, held: who may import whom, and what is imported when."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = SCRIPTS + sorted((ROOT / "lab").rglob("*.py"))

# Imports point down: a part may import from any level below its own.
LEVELS = [
    {"scripts"},
    {"api"},
    {"keeper"},
    {"states", "finetune", "report", "card", "scatter"},
    {"pictures"},
    {
        "engine",
        "evaluation",
        "export",
        "prediction",
        "checkpoint",
        "comparison",
        "plots",
        "recipes",
        "tracking",
        "hub",
    },
    {"finished"},
    {"models", "data", "optim", "rundir"},
    {
        "metrics",
        "distributed",
        "tables",
        "commandline",
        "stopping",
        "markdown",
        "tta",
        "graphs",
        "losses",
    },
    {"config", "muon"},
    {"options", "hardware", "disk", "versions"},
    {"errors"},
    {"console"},
]
OWNERS = {  # who alone imports a library
    "accelerate": {
        "scripts",
        "api",
        "distributed",
        "engine",
        "evaluation",
        "prediction",
        "checkpoint",
        "states",
        "keeper",
        "tracking",
    },
    "huggingface_hub": {"card", "hub"},
    "rich": {"console"},
    "matplotlib": {"plots", "scatter"},
    "jinja2": {"report"},
}


def part_of(path):
    """The part of the layout that a file belongs to."""
    if path.parent == ROOT:
        return "scripts"
    return path.relative_to(ROOT / "lab").parts[0].removesuffix(".py")


def level(part):
    [found] = [number for number, parts in enumerate(LEVELS) if part in parts]
    return found


def test_the_layers_of_the_design_page_are_these():
    page = (ROOT / "docs" / "design.md").read_text()
    lines = page.partition("\n## Layers\n")[2].split("```")[1].strip().splitlines()
    shown = [set(line.split(", ")) for line in lines]
    assert shown[0] == {path.name for path in SCRIPTS}
    assert shown[1:] == LEVELS[1:]


def imports(path, type_checking=False):
    """Dotted names that a file imports anywhere in it: `from a import b` gives a.b."""
    tree = ast.parse(path.read_text())
    skipped = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                skipped |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_walk_sees_the_project():
    assert {"train.py", "evaluate.py"} <= {p.name for p in SCRIPTS}
    assert {part_of(p) for p in SOURCES} >= set.union(*LEVELS) - {"plots"}
    assert "lab.engine.training.prepare" in imports(ROOT / "train.py")
    assert "accelerate.Accelerator" in imports(ROOT / "lab" / "engine.py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    part = part_of(path)
    if part == "__init__":
        assert not any(name.startswith("lab.") for name in imports(path))
        return
    for name in imports(path, type_checking=True):
        words = name.split(".")
        if words[0] != "lab" or len(words) == 1 or words[1] == "__version__":
            continue
        assert part == words[1] or level(part) < level(words[1]), f"{path.name} imports {name}"


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_has_its_owners(library):
    users = {part_of(p) for p in SOURCES for n in imports(p, True) if n.split(".")[0] == library}
    assert users <= OWNERS[library]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_leave_details_to_those_who_know(script):
    names = {name.split(".")[0] for name in imports(script)}
    assert not names & {"rich", "matplotlib", "safetensors", "torchvision"}
    text = script.read_text()
    for detail in ("rank == 0", '.safetensors"', '.jsonl"', "process_index"):
        assert detail not in text


def test_nothing_is_imported_by_star():
    assert not [p for p in SOURCES for name in imports(p) if name.endswith("*")]


def dotted(node):
    return ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve"}
UNSAFE_MODULES |= {"marshal"}
UNSAFE_CALLS = {f"{a}.{b}" for a in ("torch", "np", "numpy") for b in ("load", "save", "savez")}
UNSAFE_METHODS = {"save_state", "load_state", "register_for_checkpointing"}  # of Accelerator


def unsafe(path):
    """What a file uses that writes or reads pickles."""
    names = imports(path, type_checking=True)
    found = {n for n in names if n.split(".")[0] in UNSAFE_MODULES or n in UNSAFE_CALLS}
    for node in ast.walk(ast.parse(path.read_text())):
        name = dotted(node)
        if name in UNSAFE_CALLS or (name and name.split(".")[-1] in UNSAFE_METHODS):
            found.add(name)
        if isinstance(node, ast.Call) and dotted(node.func) in ("eval", "exec"):
            found.add(dotted(node.func))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_p4_no_pickle(path):
    assert unsafe(path) == set()


def test_p4_the_check_finds_pickles(tmp_path):
    path = tmp_path / "x.py"
    for line in (
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "import torch\ntorch.save(1, 'x')",
        "import numpy as np\nnp.load('x')",
        "accelerator.save_state('x')",
        "eval('1')",
    ):
        path.write_text(line + "\n")
        assert unsafe(path), line
    path.write_text("import json, safetensors.torch\njson.load(f)\nsafetensors.torch.save({})\n")
    assert not unsafe(path)


def modules_after(code, *words):
    """The top-level modules that are imported once a fresh Python has run `code`."""
    code = f"import sys\nsys.argv = {list(words)!r}\n{code}\nprint('MODULES', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    output, _, names = done.stdout.rpartition("MODULES")
    return output, {name.split(".")[0] for name in names.split()}


HEAVY = {"torch", "torchvision", "accelerate", "numpy", "safetensors"}
HELP = """
import runpy
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    assert not end.code
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_help_comes_before_the_heavy_imports(script):
    output, modules = modules_after(HELP.format(script=script.name), script.name, "--help")
    assert f"usage: {script.name}" in output
    assert not modules & HEAVY


def test_listing_models_data_sets_and_recipes_imports_nothing_heavy():
    output, modules = modules_after(
        "import lab, lab.models, lab.data, lab.config.recipes, lab.config, lab.rundir\n"
        "print(*lab.models.MODELS, *lab.data.DATASETS, *lab.config.recipes.RECIPES)"
    )
    assert {"lenet5", "mnist", "default"} <= set(output.split())
    assert not modules & HEAVY


def test_import_of_the_package_imports_nothing_else():
    _, before = modules_after("pass")
    _, after = modules_after("import lab; lab.__version__")
    assert after - before == {"lab"}
