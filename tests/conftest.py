"""The fixtures that several test files share."""

import os
import shutil
from pathlib import Path

import pytest
from mistakes import tree

from lab.errors import run_script

# Tests run in parallel: with one thread per core in each process they would slow each other down.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep decoded images out of the user's cache, also in launched processes."""
    os.environ["LAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def _undrawn():
    """Turn off plots and pages at the end of training, which take a second, also when launched."""
    os.environ["LAB_DRAW"] = "0"


@pytest.hookimpl(optionalhook=True)  # some tests start pytest without xdist
def pytest_xdist_auto_num_workers():
    """Return the number of workers of `-n auto`: one more than cores, as tests often wait."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(items):
    """Run files with slow tests first, so that none of them is left alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def fails(tmp_path, monkeypatch, capfd):
    """Return a function that runs a script which must fail as P7 says, and returns its message."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the same messages on a machine with GPUs

    def call(script, *words: object, leaves: tuple[str, ...] = (), warnings: int = 0) -> str:
        before = tree(tmp_path)
        capfd.readouterr()
        code = run_script(lambda: script.main([str(word) for word in words]))
        captured = capfd.readouterr()
        assert code == 2, captured.err
        assert captured.out.count("\n") <= 1  # "reading ..." at most
        *warned, line = captured.err.splitlines()
        assert [text[:9] for text in warned] == ["warning: "[:9]] * warnings
        assert line.startswith("error: ")
        assert {k: v for k, v in tree(tmp_path).items() if not k.startswith(leaves)} == before
        return line.removeprefix("error: ")

    return call


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The finished run of 12 steps, with plots and two checkpoints. Do not change it."""
    from resuming import LENET, start  # imports PyTorch, which not every test file needs

    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LAB_DRAW")
        start(folder, *LENET, "--checkpoint-every", "3")
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))
