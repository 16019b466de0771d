"""What the processes of a world find when they average gradients in shared memory and over gloo.

    torchrun --standalone --nproc-per-node 3 tests/checks_exchange.py OUTPUT

Each process writes JSON into its file, compared by test_exchange.py.
"""

import copy
import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lab import exchange
from lab.errors import run_script
from lab.exchange import share_gradients

STEPS = 4  # DistributedDataParallel makes its buckets anew after the first


def network(frozen: bool = False) -> nn.Module:
    """Of 1,301,213 parameters: several buckets, which no world divides evenly."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(100, 1000), nn.Linear(1000, 1100), nn.Linear(1100, 90))
    layers.append(nn.Linear(90, 7))
    layers.append(nn.Linear(7, 2))
    layers[1].requires_grad_(not frozen)
    return layers


def gradients(shared: bool, frozen: bool = False, parts: int = 1) -> tuple[bool, list[list]]:
    """Whether gradients were shared, and those of each step; every process has other pictures."""
    model = DistributedDataParallel(network(frozen), gradient_as_bucket_view=True, bucket_cap_mb=1)
    shares = shared and share_gradients(model)
    draws = torch.Generator().manual_seed(dist.get_rank())
    steps = []
    for _ in range(STEPS):
        model.zero_grad()
        for part in range(parts):
            with nullcontext() if part == parts - 1 else model.no_sync():
                model(torch.randn(3, 100, generator=draws)).square().sum().backward()
        steps.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    return shares, steps


def refused(**patches: Callable) -> bool:
    """Whether gradients were shared although a process could not do what is patched away."""
    originals = {name: getattr(exchange, name) for name in patches}
    for name, patch in patches.items():
        setattr(exchange, name, patch)
    shares, _ = gradients(shared=True)
    for name, original in originals.items():
        setattr(exchange, name, original)
    return shares


def raises(*_: object) -> None:
    raise OSError("refused")


def mapped() -> int:
    """How often this process has memory of the exchange mapped, or open."""
    links = [f"/proc/self/fd/{file}" for file in os.listdir("/proc/self/fd")]
    opened = sum("memfd:lab-" in os.readlink(link) for link in links if os.path.islink(link))
    return opened + Path("/proc/self/maps").read_text().count("memfd:lab-")


def main() -> None:
    dist.init_process_group("gloo")
    exchange.SMALL = 200_000  # the frozen network's are a few more
    rank, found = dist.get_rank(), {}
    for name, options in {
        "plain": {},
        "frozen": {"frozen": True},
        "accumulated": {"parts": 3},
    }.items():
        shares, means = gradients(shared=True, **options)
        _, expected = gradients(shared=False, **options)
        differences = [
            ((a - b).abs().max() / b.abs().max()).item()
            for step, other in zip(means, expected, strict=True)
            for a, b in zip(step, other, strict=True)
        ]
        digest = hashlib.sha256()
        for tensor in (tensor for step in means for tensor in step):
            digest.update(tensor.numpy().tobytes())
        found[name] = {
            "shares": shares,
            "difference": max(differences),
            "digest": digest.hexdigest(),
        }
    gc.collect()
    found["mapped after"] = mapped()
    model = DistributedDataParallel(copy.deepcopy(network()))
    share_gradients(model)
    found["mapped"] = mapped()
    last = rank == dist.get_world_size() - 1
    found["refused"] = {
        "no room": refused(_reserve=raises),
        "one cannot map": refused(_map=raises if last else exchange._map),
        "another's file": refused(_reserve=lambda name, size: exchange_reserve("x", size)),
    }
    (Path(sys.argv[1]) / f"process-{rank}.json").write_text(json.dumps(found))


exchange_reserve = exchange._reserve


if __name__ == "__main__":
    sys.exit(run_script(main))
