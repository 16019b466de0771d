"""The available memory of the host, or of the container of the process."""

from pathlib import Path

import psutil
import pytest

from lab import distributed
from lab.distributed import available_memory

GB, HOST = 10**9, 64 * 10**9


@pytest.fixture
def root(tmp_path, monkeypatch):
    """Return a function that writes proc/self/cgroup and files of a host with 64 GB available."""
    free = psutil.virtual_memory()._replace(available=HOST)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)

    def make(groups: str, files: dict[str, str]) -> Path:
        for name, text in {"proc/self/cgroup": groups, **files}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


def group(limit: int | str, used: int, inactive: int, version: int = 2) -> dict[str, str]:
    """Return the files of a control group."""
    if version == 2:
        stat = f"anon 5\ninactive_anon 7\ninactive_file {inactive}"
        return {"memory.max": str(limit), "memory.current": str(used), "memory.stat": stat}
    stat = f"inactive_file 3\ntotal_inactive_anon 7\ntotal_inactive_file {inactive}"
    return {
        "memory.limit_in_bytes": str(limit),
        "memory.usage_in_bytes": str(used),
        "memory.stat": stat,
    }


def below(directory: str, files: dict[str, str]) -> dict[str, str]:
    return {f"sys/fs/cgroup/{directory}/{name}": text for name, text in files.items()}


UNLIMITED = 9223372036854771712  # what version 1 uses for "no limit"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        # A container: its own group is the root of what it sees.
        ("0::/", below(".", group(8 * GB, 3 * GB, 0)), 5 * GB),
        ("0::/", below(".", group(8 * GB, 3 * GB, 2 * GB)), 7 * GB),  # cached files can go
        ("0::/", below(".", group("max", 3 * GB, 0)), HOST),
        # A step of a job: the limit may be that of any group around it.
        (
            "0::/slurm/job_7/step_0",
            below("slurm/job_7/step_0", group("max", GB, 0))
            | below("slurm/job_7", group(16 * GB, 6 * GB, 0))
            | below("slurm", group(40 * GB, 10 * GB, 0)),
            10 * GB,
        ),
        # Version 1.
        (
            "5:cpu,cpuacct:/x\n4:memory:/jobs/7\n0::/",
            below("memory/jobs/7", group(UNLIMITED, GB, 0, 1))
            | below("memory/jobs", group(12 * GB, 4 * GB, GB, 1)),
            9 * GB,
        ),
        # In Docker the path is the host's; what it sees is its own group at the root.
        ("4:memory:/docker/0a1b", below("memory", group(2 * GB, GB, 0, 1)), GB),
    ],
)
def test_available_memory_heeds_the_limit_of_every_control_group(root, groups, files, expected):
    assert available_memory(root(groups, files)) == expected


def test_processes_of_a_host_share_what_its_container_may_hold(root, monkeypatch):
    place = root("0::/", below(".", group(9 * GB, GB, 0)))
    monkeypatch.setattr(distributed, "available_memory", lambda: available_memory(place))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert distributed.memory_for_data(distributed.torch.device("cpu")) == GB  # half of a quarter
