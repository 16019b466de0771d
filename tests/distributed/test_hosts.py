"""A run on two hosts, which are network namespaces on this machine, whose link is then cut.

With `--resume auto` and `--checkpoint-every` the interrupted run continues.
"""

from pathlib import Path

import pytest
from hosts import two_hosts
from test_launch import check_same_run
from test_lost import rows, steps_taken
from worlds import Ended, accelerate, python, run_all, start

import train

NUM_STEPS, TIMEOUT_SECONDS = 100, 10
OPTIONS = [
    *("--recipe", "smoke", "--dataset", "digits", "--threads", 1, "--quiet"),
    *("--epochs", 10, "--max-steps", NUM_STEPS, "--log-every", 1),
    *("--timeout-seconds", TIMEOUT_SECONDS, "--name", "run"),
    *("--resume", "auto", "--checkpoint-every", 2),
]


def with_torchrun(host, hosts, *script) -> list[str]:
    """Return the command that runs a script on a host and restarts the processes of both once."""
    first = hosts[0]
    return host.command(
        python(
            *("-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1),
            *("--max-restarts", 1, "--rdzv-backend", "c10d", "--rdzv-id", "x"),
            *("--rdzv-endpoint", f"{first.address}:29500", "--local-addr", host.address),
            *("--rdzv-conf", f"is_host={host is first}", *script),
        )
    )


def with_accelerate(rank, hosts, *script) -> list[str]:
    """Return the command that runs a script on the host of a rank."""
    return hosts[rank].command(
        accelerate(
            "multi_node",
            *("--num_machines", 2, "--num_processes", 2, "--machine_rank", rank),
            *("--main_process_ip", hosts[0].address, *script),
        )
    )


def until_the_link_is_cut(network, commands, steps: Path) -> list[Ended]:
    with start(commands[0]) as first, start(commands[1]) as second:
        first.until(lambda: steps.exists() and len(rows(steps)) >= 20, limit=200)
        network.cut()
        try:
            return [world.wait(TIMEOUT_SECONDS + 60) for world in (first, second)]
        finally:
            network.restore()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_p2_p3_p7_two_hosts_survive_a_cut_link_and_a_killed_process(tmp_path):
    """`accelerate launch` until the link is cut; then torchrun, which restarts both hosts.

    The run ends with the losses of a run in one process.
    """
    run_dir = tmp_path / "run"
    script = ["tests/helpers/checks_failures.py", "none", *OPTIONS, "--output-dir", tmp_path]
    with two_hosts() as network:
        commands = [with_accelerate(rank, network.hosts, *script) for rank in (0, 1)]
        ends = until_the_link_is_cut(network, commands, run_dir / "steps.jsonl")
        for rank, ended in enumerate(ends):
            assert ended.code != 0
            [error] = ended.errors
            assert error.startswith(f"error: process {rank} timed out after {TIMEOUT_SECONDS} s")
            assert ended.left_behind == []
        assert 20 <= len(rows(run_dir / "steps.jsonl")) < NUM_STEPS
        assert not (run_dir / "report.json").exists()

        script[1] = "killed"
        commands = [with_torchrun(host, network.hosts, *script) for host in network.hosts]
        ends = run_all(commands, 200, [{"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}] * 2)
    assert sum(ended.stdout.count("fault at") for ended in ends) == 1
    for ended in ends:
        assert ended.code == 0, ended.stderr
        assert ended.errors == []
        assert ended.left_behind == []
        assert steps_taken(ended)[0] < NUM_STEPS - 20
    train.main([*map(str, OPTIONS), "--output-dir", str(tmp_path / "single")])
    check_same_run(run_dir, tmp_path / "single" / "run", world_size=2)
