"""The available memory of the host, or of the container of the process."""

import psutil
import pytest

from lab import distributed

GB = 10**9


@pytest.mark.parametrize(("limit", "expected"), [(None, 64), ("max", 64), ("100", 64), ("8", 3)])
def test_the_limit_of_a_container_applies(tmp_path, monkeypatch, limit, expected):
    """The container uses 6 GB, of which 1 GB are cached files."""
    free = psutil.virtual_memory()._replace(available=64 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    container = (str(tmp_path), "memory.max", "memory.current")
    monkeypatch.setattr(distributed, "CONTAINERS", (container,))
    (tmp_path / "memory.current").write_text(f"{6 * GB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {5 * GB}\ninactive_file {GB}\n")
    if limit:
        text = "max" if limit == "max" else str(int(limit) * GB)
        (tmp_path / "memory.max").write_text(f"{text}\n")
    assert distributed.available_memory() == expected * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share = distributed.memory_for_data(distributed.torch.device("cpu"))
    assert share == expected * GB / 8  # half of a quarter
