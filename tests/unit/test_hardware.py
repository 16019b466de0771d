"""The available memory of the host, or of the container of the process."""

import psutil
import pytest

from lab import distributed

GB = 10**9


@pytest.mark.parametrize(("limit", "expected"), [(None, 64), ("max", 64), ("100", 64), ("8", 8)])
def test_the_limit_of_a_container_applies(tmp_path, monkeypatch, limit, expected):
    free = psutil.virtual_memory()._replace(available=64 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    path = tmp_path / "memory.max"
    monkeypatch.setattr(distributed, "MEMORY_LIMITS", (str(path),))
    if limit:
        path.write_text(limit + ("\n" if limit == "max" else f"{'0' * 9}\n"))
    assert distributed.available_memory() == expected * GB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    share = distributed.memory_for_data(distributed.torch.device("cpu"))
    assert share == expected * GB / 8  # half of a quarter
