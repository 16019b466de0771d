"""A run on two hosts, which are network namespaces on this machine, whose link is then cut.

With `--resume auto` and `--checkpoint-every` the interrupted run continues.
"""

import time
from pathlib import Path

import pytest
from hosts import Network, two_hosts
from test_launch import check_same_run
from test_lost import rows, steps_taken
from worlds import Ended, accelerate, python, run_all, start

import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_STEPS, TIMEOUT_SECONDS = 200, 10
OPTIONS = [
    *("--recipe", "smoke", "--dataset", "digits", "--threads", 1, "--quiet"),
    *("--epochs", 20, "--max-steps", NUM_STEPS, "--log-every", 1),
    *("--timeout-seconds", TIMEOUT_SECONDS, "--name", "run"),
    *("--resume", "auto", "--checkpoint-every", 2),
]


def training(folder: Path, fault: str = "none") -> list[object]:
    return ["tests/helpers/checks_failures.py", fault, *OPTIONS, "--output-dir", folder]


def launch(network: Network, folder: Path, cut_after_steps: int = 0) -> tuple[list[Ended], float]:
    """Run `accelerate launch` with one process on each host; return how both ended, and the time of
    the cut.
    """
    commands = [
        host.command(
            accelerate(
                "multi_node",
                *("--num_machines", 2, "--num_processes", 2, "--machine_rank", machine),
                *("--main_process_ip", network.hosts[0].address, *training(folder)),
            )
        )
        for machine, host in enumerate(network.hosts)
    ]
    steps = folder / "run" / "steps.jsonl"
    with start(commands[0]) as first, start(commands[1]) as second:
        if cut_after_steps:
            first.until(lambda: steps.exists() and len(rows(steps)) >= cut_after_steps, limit=200)
            network.cut()
        cut_at = time.time()
        return [world.wait(200) for world in (first, second)], cut_at


def check_resumed(ends: list[Ended], folder: Path, whole: Path) -> None:
    """Check that both hosts resumed the run and wrote the uninterrupted run's files."""
    for ended in ends:
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
        assert steps_taken(ended)[0] < NUM_STEPS
    for name in ("best.safetensors", "report.json", "predictions.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()
    for name in ("history.jsonl", "steps.jsonl"):
        assert rows(folder / name) == rows(whole / name)


@pytest.fixture(scope="module")
def network():
    with two_hosts() as network:
        yield network


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory) -> Path:
    """The directory of an uninterrupted run on two hosts."""
    folder = tmp_path_factory.mktemp("whole")
    for ended in launch(network, folder)[0]:
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
        assert steps_taken(ended) == [NUM_STEPS]
    return folder / "run"


def test_p2_two_hosts_train_as_one_process_does(whole, tmp_path):
    train.main([*map(str, OPTIONS), "--output-dir", str(tmp_path)])
    check_same_run(whole, tmp_path / "run", world_size=2)


def test_p3_p7_a_cut_link_ends_both_hosts_and_the_run_can_be_resumed(network, whole, tmp_path):
    try:
        ends, cut_at = launch(network, tmp_path, cut_after_steps=20)
    finally:
        network.restore()
    for rank, ended in enumerate(ends):
        assert ended.code != 0
        [error] = ended.errors
        assert error.startswith(f"error: process {rank} timed out after {TIMEOUT_SECONDS} s")
        assert ended.end - cut_at < TIMEOUT_SECONDS + 60
        assert ended.left_behind == []
    folder = tmp_path / "run"
    assert 20 <= len(rows(folder / "steps.jsonl")) < NUM_STEPS
    assert not (folder / "report.json").exists()

    check_resumed(launch(network, tmp_path)[0], folder, whole)


def test_p3_torchrun_restarts_both_hosts(network, whole, tmp_path):
    first, *_ = network.hosts
    commands = [
        host.command(
            python(
                *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
                *("--max-restarts", 1, "--rdzv-backend", "c10d", "--rdzv-id", "x"),
                *("--rdzv-endpoint", f"{first.address}:29500", "--local-addr", host.address),
                *("--rdzv-conf", f"is_host={host is first}", *training(tmp_path, "killed-once")),
            )
        )
        for host in network.hosts
    ]
    ends = run_all(commands, 150, [{"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}] * 2)
    assert sum(ended.stdout.count("fault at") for ended in ends) == 1
    assert [ended.errors for ended in ends] == [[], []]
    check_resumed(ends, tmp_path / "run", whole)
