"""P3, P4 and P7: files of a run that are damaged, a stranger's, or hold a pickle."""

import hashlib
import json
import math
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import ROOT

import evaluate
import train
from lab.checkpoint import train_state
from lab.errors import run_script

WORDS = ["--dataset", "digits", "--recipe", "smoke", "--quiet", "--threads", "1"]
KINDS = ["halved", "emptied", "random", "flipped", "deleted", "pickle", "torch.save"]
FOREIGN = KINDS[2], *KINDS[5:]
MARKER = "marker"


class Payload:
    """What makes a folder when it is unpickled, in the current one."""

    def __reduce__(self):
        return os.mkdir, (MARKER,)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder, with the states of steps 12, 13 and 14, in its second epoch."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["--max-steps", "14", "--checkpoint-every", "1", "--keep-checkpoints", "3"]
    words += ["--final-checkpoints", "3"]
    train.main([*WORDS, *words, "--output-dir", str(folder), "--name", "run"])
    kept = sorted((folder / "run/checkpoints").glob("step-*"))
    assert [path.name[-2:] for path in kept] == ["12", "13", "14"]
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of it, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, tmp_path / "run")
    yield Path("run")
    assert not Path(MARKER).exists()


def damage(path: Path, kind: str) -> None:
    content, chosen = path.read_bytes(), random.Random(0)
    if kind == "deleted":
        path.unlink()
    elif kind == "torch.save":
        torch.save({"network": Payload()}, path)
    else:
        at = len(content) * 2 // 3
        flipped = content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]
        path.write_bytes(
            {
                "halved": content[: len(content) // 2],
                "emptied": b"",
                "random": chosen.randbytes(len(content)),
                "flipped": flipped,
                "pickle": pickle.dumps(Payload()),
            }[kind]
        )


def seal(folder: Path, state: object = None) -> None:
    """Makes the checksums of a state those of its content, as a stranger can."""
    path = folder / "state.json"
    state = json.loads(path.read_bytes())["metadata"] if state is None else state
    if isinstance(state, dict):
        content = (folder / "tensors.safetensors").read_bytes()
        state["tensors_sha256"] = hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({"metadata": state, "sha256": digest}))


def ends(capfd, script, *words: object) -> tuple[int, list[str], list[str]]:
    """(exit code, warnings, errors) of a script that shows no traceback."""
    capfd.readouterr()
    code = run_script(lambda: script.main([str(word) for word in words]))
    lines = capfd.readouterr().err.splitlines()
    told = [[line for line in lines if line.startswith(kind)] for kind in ("warning: ", "error: ")]
    assert sorted(lines) == sorted(told[0] + told[1])
    return code, told[0], told[1]


def test_the_payload_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Payload()))
    assert Path(MARKER).exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [train_state.METADATA_FILE, train_state.TENSORS_FILE])
def test_p3_a_damaged_state_gives_way_to_the_one_before(run, capfd, name, kind):
    damage(run / "checkpoints/step-00000014" / name, kind)
    code, warnings, errors = ends(capfd, train, "--resume", run, "--quiet", "--max-steps", 15)
    assert (code, errors) == (0, [])
    [warning] = warnings
    assert warning.startswith("warning: the checkpoint run/checkpoints/step-00000014 is damaged (")
    assert run_dir.RunDir(run).checkpoints[0].name == "step-00000015"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["--resume run", "--resume auto --name run --output-dir ."])
def test_p7_where_no_state_is_whole_the_run_says_so(run, capfd, kind, how):
    for number, folder in enumerate(sorted((run / "checkpoints").glob("step-*"))):
        damage(folder / (train_state.METADATA_FILE, train_state.TENSORS_FILE)[number % 2], kind)
    code, warnings, errors = ends(capfd, train, *how.split(), "--quiet")
    assert code == 2
    assert len(warnings) == 3
    [error] = errors
    assert error == "error: no checkpoint of run is complete. Start a new run."
    assert len(list((run / "checkpoints").glob("step-*"))) == 3  # none is taken away


@pytest.mark.parametrize("kind", KINDS)
def test_p7_damaged_best_weights_are_told_at_once(run, capfd, kind):
    damage(run / "best.safetensors", kind)
    code, _, [error] = ends(capfd, evaluate, run, "--quiet")
    assert code == 2
    what = "not a weights file of train.py. " if kind in FOREIGN else "damaged ("
    told = "run contains no best" if kind == "deleted" else f"run/best.safetensors is {what}"
    assert error.startswith(f"error: {told}")
    code, warnings, errors = ends(capfd, train, "--resume", run, "--quiet", "--max-steps", 15)
    assert (code, errors) == (0, [])
    [warning] = warnings
    if kind == "deleted":
        told = "there is no file run/best.safetensors. "
    assert warning.startswith(f"warning: {told}")
    assert warning.endswith("The best epoch is selected again.")
    assert ends(capfd, evaluate, run, "--quiet") == (0, [], [])


# A stranger's state, whose checksums fit.


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
def test_p4_a_pickle_is_never_read(run, capfd, kind):
    for folder in (run / "checkpoints").glob("step-*"):
        damage(folder / train_state.TENSORS_FILE, kind)
        seal(folder)
    code, warnings, [error] = ends(capfd, train, "--resume", run, "--quiet")
    assert code == 2
    assert all("tensors.safetensors: " in warning for warning in warnings)
    assert error == "error: no checkpoint of run is complete. Start a new run."


def test_p4_a_run_is_written_and_read_without_pickle(run, capfd, monkeypatch):
    """No function of pickle may be called, also not by a library."""

    def refuse(*_, **__):
        raise AssertionError("a pickle is read or written")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    words = ("--resume", run, "--quiet", "--max-steps", 15)
    assert ends(capfd, train, *words) == (0, [], [])
    words = ("--max-steps", 2, "--checkpoint-every", 1, "--output-dir", ".", "--name", "new")
    assert ends(capfd, train, *WORDS, *words) == (0, [], [])
    assert ends(capfd, evaluate, "new", "--quiet") == (0, [], [])


def test_p4_pickles_beside_a_state_are_left_alone(run, capfd):
    for folder in (run, run / "checkpoints", run / "checkpoints/step-00000014"):
        for name in ("optimizer.pt", "optimizer.bin", "random_states_0.pkl", "scheduler.bin"):
            damage_with_pickle(folder / name)
    words = ("--resume", run, "--quiet", "--max-steps", 15)
    assert ends(capfd, train, *words) == (0, [], [])
    assert ends(capfd, evaluate, run, "--quiet") == (0, [], [])


def damage_with_pickle(path: Path) -> None:
    torch.save(Payload(), path)


HUGE = 10**400
HOSTILE = [
    *({key: value} for key in ("train_state", "totals", "best", "config", "fingerprints", "precision",
      "format", "scaler") for value in (..., 5, {"a": {}})),
    *({f"train_state.{key}": value} for key in train_state.TRAIN_STATE_TYPES
      for value in (..., "1", -1, 1.5, HUGE, math.nan)),
    {"train_state.code": 1},
    {"train_state.batch": 10**9},
    {"train_state.step": 2**52},
    {"train_state.epoch": 0},
    *({"totals": value} for value in ([], [[]], [[1.0, 2.0]], [[1.0, 2.0, "x"]], [[HUGE, 1.0, 1.0]],
      [[math.nan] * 3], [None], [[[1.0]] * 3], [[1.0] * 3, [1.0]], [[1.0] * 3] * 1000)),
    *({f"config.{key}": value} for key in ("model", "dataset", "epochs", "lr", "augment", "name",
      "batch_size", "seed", "mixed_precision", "image_size")
      for value in (None, "\x1b[31m../../x", math.nan, HUGE)),
    {"config.model": "os.system"},
    {"config.dataset": "../../etc"},
    {"config.recipe": "nosuch"},
    {"config.model": "alexnet"},
    {"config.code": 1},
    {"config.optimizer": "sgd"},
    {"config.ema": 0.5},
    {"config.output_dir": "/nosuch", "config.name": "elsewhere", "config.resume": "other"},
    {"config.model": ...},
    {"config.epochs": ...},
    {"best.epoch": "x"},
    {"best.val_accuracy": ...},
    {"best.val_accuracy": "x"},
    {"fingerprints.train": ["x"]},
    {"precision": "fp16"},
    {"scaler": {"scale": 1.0}},
]  # fmt: skip


def changed(state: dict, change: dict) -> dict:
    for key, value in change.items():
        *groups, name = key.split(".")
        group = state[groups[0]] if groups else state
        group[name] = value
        if value is ...:
            del group[name]
    return state


@pytest.mark.slow
def test_p7_a_strangers_state_ends_in_one_line_or_goes_on(run, capfd, finished):
    """Never in a traceback, whatever it holds; many in one test, for each needs little time."""
    states_folder, wrong = run / "checkpoints", []
    for change in HOSTILE:
        shutil.rmtree(states_folder)
        shutil.copytree(finished / "checkpoints/step-00000014", states_folder / "step-00000014")
        state = json.loads(
            (states_folder / "step-00000014" / train_state.METADATA_FILE).read_bytes()
        )["metadata"]
        seal(states_folder / "step-00000014", changed(state, change))
        try:
            words = ("--resume", run, "--quiet", "--max-steps", 15, "--patience", 5)
            code, _, errors = ends(capfd, train, *words)
            assert (code == 2 and len(errors) == 1) or (code == 0 and not errors)
        except BaseException as error:
            wrong.append((change, repr(error)[:2000]))
    assert not wrong, wrong


@pytest.mark.parametrize(
    "content",
    [b"[", b"[]", b"{}", b"null", b"5", b'"x"', b"[" * 100_000, b'{"metadata": {}, "sha256": 5}',
     b'{"metadata": [], "sha256": {}}', b"\xff\xfe", b'{"a": ' * 50_000, b"1" * 10_000],
)  # fmt: skip
def test_p7_a_state_file_of_anything(run, capfd, content):
    for folder in (run / "checkpoints").glob("step-*"):
        (folder / train_state.METADATA_FILE).write_bytes(content)
    code, warnings, [error] = ends(capfd, train, "--resume", run, "--quiet")
    assert (code, len(warnings)) == (2, 3)
    assert error == "error: no checkpoint of run is complete. Start a new run."


def test_p7_a_strangers_optimizer_is_another_networks(run, capfd):
    folder, words = run / "checkpoints/step-00000014", ("--resume", run, "--quiet", "--max-steps", 15)
    tensors = train_state.read_checkpoint(folder)[1]
    name = "optimizer.exp_avg.features.0.weight"
    for value in (None, torch.zeros(3), torch.zeros(())):
        given = {k: v for k, v in (tensors | {name: value}).items() if v is not None}
        (folder / train_state.TENSORS_FILE).write_bytes(train_state.safetensors.torch.save(given))
        seal(folder)
        code, _, [error] = ends(capfd, train, *words)
        assert (code, error) == (
            2, "error: run holds the checkpoint of another architecture. Start a new run.",
        )  # fmt: skip
    # What has no place in the optimizer is not put there.
    given = tensors | {"optimizer.x": torch.zeros(1), "optimizer.code.features.0.weight": value}
    (folder / train_state.TENSORS_FILE).write_bytes(train_state.safetensors.torch.save(given))
    seal(folder)
    assert ends(capfd, train, *words) == (0, [], [])


def test_p7_files_changed_at_random_never_crash_the_readers(finished):
    """2,000 of them, in a process of its own that may take one GiB more than it begins with."""
    command = [sys.executable, "tests/helpers/checks_fuzz.py", str(finished), "1000"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=200
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    counts = json.loads(ended.stdout.splitlines()[-1])
    assert counts["weights refused"] + counts["weights loaded"] == 1000
    assert counts["states refused"] + counts["states loaded"] == 1000
    assert min(counts["weights refused"], counts["states refused"]) > 500
    assert counts["MiB more"] < 1024
