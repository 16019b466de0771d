"""Every promise has tests that fail when the code breaks it: each mutant breaks one clause.

A mutant replaces a text in a copy of the code, and the test named with it must then fail.
"""

import compileall
import os
import shutil
import subprocess
import sys
from py_compile import PycInvalidationMode

import fork_server
import pytest
from mutants import MUTANTS, rows
from worlds import ROOT

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(fork_server.JOB_LIMIT_SECONDS + 60)


def test_the_design_page_has_the_table_of_the_mutants():
    """`python tests/helpers/mutants.py` prints it."""
    assert "\n".join(rows()) in (ROOT / "docs" / "design.md").read_text()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.clause[:2]} {m.change}")
def test_the_text_of_a_mutant_occurs_exactly_once(mutant):
    count = (ROOT / mutant.file).read_text().count(mutant.old)
    assert count == 1, (
        f"adapt tests/helpers/mutants.py: {mutant.file} has {count} times {mutant.old!r}"
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the code and its tests."""
    copy = tmp_path_factory.mktemp("mutants") / "tree"
    for name in ("lab", "tests"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        # Compiled once; the hash shows which source has changed since.
        mode = PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(copy / name, quiet=2, invalidation_mode=mode)
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, copy)
    return copy


@pytest.fixture(scope="module")
def run_tests(tree):
    """A function that runs tests of the copy and returns (pytest's exit code, its output)."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    server = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "helpers" / "fork_server.py", tree],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env | {"OMP_NUM_THREADS": "1"},
    )

    def run(tests):
        job = "\t".join(f"tests/{test}" for test in tests)
        print(job, file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return code, (tree / fork_server.OUTPUT).read_text(errors="replace")

    yield run
    server.stdin.close()
    server.wait(30)


@slow
def test_the_tests_pass_without_a_mutant(run_tests):
    code, output = run_tests(dict.fromkeys(mutant.test for mutant in MUTANTS))
    assert code == pytest.ExitCode.OK, output


@slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.clause[:2]} {m.change}")
def test_a_test_fails_on_the_mutant(tree, run_tests, mutant):
    path = tree / mutant.file
    text = path.read_text()
    assert mutant.old in text
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        code, output = run_tests([mutant.test])
    finally:
        path.write_text(text)
    assert code == pytest.ExitCode.TESTS_FAILED, f"pytest ended with {code}\n{output}"
