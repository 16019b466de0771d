"""Every promise has tests that fail when the code breaks it: each mutant breaks one clause.

A mutant replaces a text in a copy of the code, and the test named with it must then fail. That the
test passes otherwise is shown by the rest of the suite.
"""

import compileall
import shutil
from py_compile import PycInvalidationMode

import pytest
from mutants import MUTANTS, rows
from worlds import ROOT, python, run


def test_the_design_page_has_the_table_of_the_mutants():
    """`python tests/helpers/mutants.py` prints it."""
    assert "\n".join(rows()) in (ROOT / "docs" / "design.md").read_text()


def test_the_text_of_each_mutant_occurs_exactly_once():
    texts = {file: (ROOT / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    wrong = [mutant for mutant in MUTANTS if texts[mutant.file].count(mutant.old) != 1]
    assert not wrong, "adapt tests/helpers/mutants.py"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code and its tests."""
    copy = tmp_path_factory.mktemp("mutants") / "tree"
    ignored = shutil.ignore_patterns("__pycache__", "logs")
    for name in ("lab", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy)
    # Compiled once; the hash shows which source has changed since, where a time may not.
    mode = PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(copy, quiet=2, invalidation_mode=mode)
    return copy


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.clause[:2]} {m.change}")
def test_a_test_fails_on_the_mutant(tree, mutant):
    path = tree / mutant.file
    text = path.read_text()
    path.write_text(text.replace(mutant.old, mutant.new))
    options = ["-p", "pytest_timeout", "-p", "no:cacheprovider", "--assert=plain"]
    options += ["-c", tree / "pyproject.toml", "--rootdir", tree, "--basetemp", tree.parent / "tmp"]
    try:
        ended = run(
            python(pytest.__path__[0] + "/__main__.py", *options, tree / "tests" / mutant.test),
            limit=200,
            env={"PYTHONPATH": str(tree), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
    finally:
        path.write_text(text)
    assert ended.code == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
