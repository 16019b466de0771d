"""P3 and P7: a run of which one process is killed or stops responding."""

import json
from pathlib import Path

import pytest
from worlds import Ended, python, run, start, world_by_hand

from lab import errors
from lab.errors import run_script

SHORT = ("--recipe", "smoke", "--dataset", "digits", "--threads", 1, "--quiet", "--log-every", 1)
TIMEOUT_SECONDS = 10  # longer than processes differ in their start on a loaded machine
MAX_SECONDS = 60  # from the fault to the end of the others; a collective waits for 600
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/"
RESUME = "train.py --resume auto continues from the last checkpoint."
TIMEOUT_HINT = (
    "One of them hangs, cannot be reached (see GLOO_SOCKET_IFNAME), or needs longer than "
    f"--timeout-seconds; {RESUME}"
)
LOST_HINT = f"See the error message of that process; {RESUME}"


class DistStoreError(RuntimeError):
    """Has the name of PyTorch's exception."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError(GLOO + "pair.cc:561] Connection closed by peer [10.0.0.2]:42381. This is"),
            f"process 3 lost the connection to another process (at 10.0.0.2). {LOST_HINT}",
        ),
        (
            RuntimeError(GLOO + "pair.cc:535] Read error [fe80::1]:8: Connection reset by peer"),
            f"process 3 lost the connection to another process (at fe80::1). {LOST_HINT}",
        ),
        (
            RuntimeError("NCCL error: remote process exited or there was a network error"),
            f"process 3 lost the connection to another process. {LOST_HINT}",
        ),
        (
            RuntimeError(GLOO + "unbound_buffer.cc:78] Timed out waiting 600000ms for recv opera"),
            f"process 3 timed out after 600 s waiting for the other processes. {TIMEOUT_HINT}",
        ),
        (
            DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
            f"process 3 timed out after 61 s waiting for the other processes. {TIMEOUT_HINT}",
        ),
        (
            DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//cpu//0/1"),
            f"process 3 timed out after 3 s waiting for the other processes. {TIMEOUT_HINT}",
        ),
        (
            RuntimeError(f"Gloo connectFullMesh failed with {GLOO}pair.h:311] Connect timeout [no"),
            f"process 3 timed out waiting for the other processes. {TIMEOUT_HINT}",
        ),
    ],
)
def test_p7_an_error_of_a_collective_is_one_line(monkeypatch, capsys, error, message):
    monkeypatch.setattr(errors, "LOST_PEER_DELAY", 0)
    monkeypatch.setenv("RANK", "3")

    def main():
        raise error

    assert run_script(main) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("I/O operation on closed file"),  # not of a collective
        TimeoutError("the read operation timed out"),
        RuntimeError(GLOO + "device.cc:186] Unable to find address for: eth9"),
    ],
)
def test_p7_another_exception_keeps_its_traceback(monkeypatch, capsys, error):
    monkeypatch.setattr(errors, "LOST_PEER_DELAY", 0)

    def main():
        raise error

    assert run_script(main) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1].endswith(str(error))


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("killed", "lost the connection to another process"),
        ("stopped", f"timed out after {TIMEOUT_SECONDS} s"),
    ],
)
def test_p7_the_remaining_process_prints_an_error_and_ends(tmp_path, fault, message):
    options = [*SHORT, "--output-dir", tmp_path, "--timeout-seconds", TIMEOUT_SECONDS]
    command = python("tests/helpers/checks_failures.py", fault, *options)
    envs = world_by_hand(2)
    with start(command, envs[0]) as remaining, start(command, envs[1]) as faulty:
        ended = remaining.wait(200)
        [line] = [line for line in faulty.stdout.read_text().splitlines() if "fault at" in line]
    [error] = ended.errors
    assert error.startswith(f"error: process 0 {message}")
    assert "Traceback" not in ended.stderr
    assert ended.code == 2
    assert ended.left_behind == []
    assert ended.end - float(line.split()[-1]) < MAX_SECONDS


def test_p7_restarts_that_may_fail_are_rejected_at_the_start():
    """torchrun --max-restarts without TORCH_DISABLE_SHARE_RDZV_TCP_STORE sets these variables."""
    env = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True",
           "RANK": "0", "WORLD_SIZE": "1"}  # fmt: skip
    ended = run(python("train.py", *SHORT), limit=200, env=env)
    assert ended.code == 2
    [error] = ended.errors
    assert "Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in error


def steps_taken(ended: Ended) -> list[int]:
    """Return the number of steps of each process that succeeded."""
    lines = ended.stdout.splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("steps taken: ")]


def rows(path: Path) -> list[dict]:
    """Return the rows of a file without the measured times."""
    times = ("train_seconds", "eval_seconds", "images_per_second")
    lines = path.read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]
