"""What docs/scaling.md promises of data at scale, and that its files are what they say."""

import gc
import importlib
import math
import weakref
from collections import Counter
from types import FunctionType, ModuleType

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from worlds import ROOT

from lab.data.augment import Preprocess
from lab.data.loaders import Plan, ResidentLoader, StreamingLoader
from lab.data.sources import Split

NUM_SAMPLES, BATCH_SIZE = 1_300_000, 8192
CPU = torch.device("cpu")
NAMES = ("a", "b")
LOADERS = [ResidentLoader, StreamingLoader]


@pytest.mark.parametrize("seed", [0, None], ids=["training", "evaluation"])
@pytest.mark.parametrize("world_size", [64, 1024])
def test_p1_a_large_world_sees_each_of_1_3_million_samples_once(world_size, seed):
    plans = [Plan(NUM_SAMPLES, BATCH_SIZE, seed, rank, world_size) for rank in range(world_size)]
    cuts = [list(plan.cuts()) for plan in plans]
    stops = {start: stop for each in cuts for start, stop, _ in each if start < stop}
    position = 0
    while position < NUM_SAMPLES:  # end to end: no hole, no overlap
        position = stops.pop(position)
    assert position == NUM_SAMPLES
    assert not stops
    assert torch.equal(plans[-1].order(3).bincount(), torch.ones(NUM_SAMPLES, dtype=torch.int64))
    if seed is None:  # whole batches are dealt out
        sizes = [len(each) for each in cuts]
        assert max(sizes) - min(sizes) <= 1
    else:
        for batch in zip(*cuts, strict=True):
            sizes = [stop - start for start, stop, _ in batch]
            assert max(sizes) - min(sizes) <= 1


def make_loader(kind, images, rank, world_size, batch_size=1024):
    num_samples = len(images)
    split = Split(images, torch.arange(num_samples) % 2, NAMES)
    plan = Plan(num_samples, batch_size, 3, rank, world_size)
    preprocess = Preprocess((0.5,), (0.5,), ("crop", "flip"), CPU)
    workers = () if kind is ResidentLoader else (0,)
    return kind(split, plan, preprocess, CPU, *workers)


def storages_of(root):
    """Address -> bytes of the tensors' storages that can be reached from an object."""
    found, seen, queue = {}, set(), [root]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, (dict, list, tuple)) or hasattr(item, "__dict__"):
            inside = gc.get_referents(item)
            queue += [x for x in inside if not isinstance(x, (type, ModuleType, FunctionType))]
    return found


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it have held at once."""

    def __init__(self):
        super().__init__()
        self.uses, self.held, self.peak = Counter(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                address, size = storage.data_ptr(), storage.nbytes()
                self.uses[address] += 1
                if self.uses[address] == 1:
                    self.held += size
                weakref.finalize(tensor, self.drop, address, size)
        self.peak = max(self.peak, self.held)
        return made

    def drop(self, address, size):
        self.uses[address] -= 1
        if not self.uses[address]:
            self.held -= size


@pytest.mark.parametrize("kind", LOADERS)
def test_memory_a_process_does_not_grow_with_the_world(kind):
    images = torch.zeros(20_011, 1, 8, 8, dtype=torch.uint8)
    held, peaks = [], []
    for world_size in (1, 64, 1024):
        loader = make_loader(kind, images, 0, world_size)
        storages = storages_of(loader)
        assert storages.pop(images.data_ptr()) == images.nbytes  # the split itself, not a copy
        held.append(sum(storages.values()))
        with Peak() as peak:
            num_batches = sum(1 for _ in loader.batches(1))
        assert num_batches == math.ceil(len(images) / 1024)
        peaks.append(peak.peak)
    labels, scale_and_shift = 8 * len(images), 8
    assert held == [labels + scale_and_shift] * 3
    assert peaks == sorted(peaks, reverse=True)
    orders = 8 * len(images)  # the epoch's order is one int64 a sample
    assert all(peak >= orders for peak in peaks)


class Recorded:
    """Pictures in files, as far as a loader can tell; keeps the positions that are read."""

    def __init__(self, num_samples):
        self.shape, self.read = (num_samples, 1, 8, 8), []

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        self.read += index.tolist()
        return torch.zeros(len(index), *self.shape[1:], dtype=torch.uint8)


def test_each_process_reads_only_its_part():
    num_samples, world_size = 3001, 64
    read = []
    for rank in range(world_size):
        images = Recorded(num_samples)
        for batch in make_loader(StreamingLoader, images, rank, world_size, 500).batches(1):
            assert images.read[-len(batch.index) :] == batch.index.tolist() or not len(batch.index)
        assert len(images.read) <= math.ceil(500 / world_size) * math.ceil(num_samples / 500)
        read += images.read
    assert sorted(read) == list(range(num_samples))


@pytest.fixture
def scaling(monkeypatch):
    """benchmarks/scaling.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return importlib.import_module("scaling")


def test_lenet5_is_counted_as_by_hand(scaling):
    network = scaling.count("lenet5")
    first = 6 * 28 * 28 * 25
    multiply_adds = first + 16 * 10 * 10 * 6 * 25 + 120 * 16 * 25 + 120 * 84 + 84 * 10
    assert network.num_parameters == 61_706
    assert network.multiply_adds == multiply_adds
    assert network.flops == 2 * (3 * multiply_adds - first)  # nobody asks for the images' gradient
    assert [len(bucket) for bucket in network.buckets()] == [10]
    assert 40 < network.operators < 80


def test_messages_and_their_times_are_as_by_hand(scaling):
    bucket = [torch.Size(shape) for shape in [(2048,), (2048, 4096), (64, 3, 3, 3), (4, 2)]]
    numbers = 2048 + 2048 * 4096 + 64 * 27 + 8
    assert scaling.messages(bucket, "none") == [4 * numbers]
    assert scaling.messages(bucket, "bf16") == [2 * numbers]
    assert scaling.messages(bucket, "powersgd") == [
        4 * (2048 + 8),
        4 * (2048 + 64),
        4 * (4096 + 27),
    ]
    inside = scaling.all_reduce(1e9, 8, scaling.ETHERNET)  # one machine: NVLink
    assert inside == pytest.approx(10e-6 + 14 * 2e-6 + 2 * 7 / 8 * 1e9 / (0.8 * 450e9))
    ring = 10e-6 + 112 * 2e-6 + 14 * 25e-6 + 2 * 63 / 64 * 1e9 / 10e9
    assert scaling.all_reduce(1e9, 64, scaling.ETHERNET) == pytest.approx(ring)
    tree = 10e-6 + 14 * 2e-6 + 14 * 5e-6 + 2 * 1e3 / (0.8 * 400e9)
    assert scaling.all_reduce(1e3, 1024, scaling.INFINIBAND) == pytest.approx(tree)
