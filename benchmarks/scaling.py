"""Predicted: what many GPUs would make of each network. Prints the tables of docs/scaling.md.

  python benchmarks/scaling.py        seconds on one CPU core; no GPU, no data, nothing measured

Counted on this tree: parameters, bytes exchanged, arithmetic, operators a step. Everything else is
a prediction from those counts and the assumptions that the second table lists. They lean to the
optimistic side: a cluster does worse.
"""

import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import recipes
from lab.data.augment import Preprocess
from lab.data.loaders import Plan, ResidentLoader
from lab.data.sources import Split
from lab.distributed import build_accelerator
from lab.engine import prepare, train_step
from lab.models import MODELS, build_model

FLOPS = {"bf16": 989.4e12, "no": 494.7e12}  # a second: dense bfloat16; dense TF32 for float32
UTILISATION = 0.3  # of FLOPS, in convolutions and dense layers
MEMORY = 3.35e12  # bytes a second
PASSES = 10  # over float32 parameters a step: optimizer 5, casts, forward, backward, buckets 5
LAUNCH = 5e-6  # seconds of host time an operator, without torch.compile
BACKWARD = 2 / 3  # of a step's time, during which gradients may travel
PER_MACHINE = 8  # GPUs
ACHIEVED = 0.8  # of a link's bandwidth
START = 10e-6  # seconds to start a collective
BUCKETS = (1 << 20, 25 << 20)  # bytes: DistributedDataParallel's first, and its others
LOCAL_STEPS = 8  # of local SGD between two averages of the weights
HOOKS = {"none": 0, "bf16": 2, "powersgd": 6}  # passes over float32 gradients to pack and unpack
BATCHES = (128, 1024, 8192)


@dataclass(frozen=True)
class Link:
    """What joins machines, or GPUs within one."""

    name: str
    bandwidth: float  # bytes a second in one direction, all ports of a machine (NVLink: of a GPU)
    hop: float  # seconds


NVLINK = Link("NVLink", 450e9, 2e-6)
INFINIBAND = Link("InfiniBand", PER_MACHINE * 50e9, 5e-6)
ETHERNET = Link("Ethernet", 12.5e9, 25e-6)
PLACES = ((8, NVLINK), (64, INFINIBAND), (1024, INFINIBAND), (64, ETHERNET), (1024, ETHERNET))

ASSUMPTIONS = [
    ("GPU", "H100 SXM: 989.4 TFLOP/s bfloat16, 494.7 TF32, both dense; 3.35 TB/s",
     "NVIDIA H100 datasheet, halved where it counts sparsity"),
    ("precision", "bfloat16 for large networks, TF32 for the others", "what lab chooses there"),
    ("of that reached", f"{UTILISATION:.0%}, whatever the batch", "assumed; optimistic if small"),
    ("weights and optimizer", f"{PASSES} passes over float32 parameters a step", "assumed"),
    ("host", f"{LAUNCH * 1e6:g} µs an operator; a step takes the longer of host and GPU",
     "assumed"),
    ("NVLink", "450 GB/s a GPU each way, 2 µs a hop", "datasheet (900 both ways); hop assumed"),
    ("InfiniBand", "400 Gb/s a GPU: 400 GB/s a machine of 8 each way, 5 µs a hop",
     "eight ConnectX-7 NDR as in DGX H100; hop assumed"),
    ("Ethernet", "100 Gb/s a machine: 12.5 GB/s each way, 25 µs a hop",
     "IEEE 802.3 rate, one port; hop assumed"),
    ("of a link reached", f"{ACHIEVED:.0%}", "assumed"),
    ("all-reduce", "the faster of ring, 2(W-1)/W bytes over bandwidth, and double tree, "
     f"2 bytes over bandwidth; hops as below; {START * 1e6:g} µs to start",
     "Patarasuk, Yuan 2009; Sanders et al. 2009"),
    ("hops, M machines", "ring 2(W-M) inside and 2(M-1) between; tree 2(W/M-1) and 2 log2 M",
     "as NCCL's tuning model counts them"),
    ("overlap", "exchange runs beside the backward pass, two thirds of a step, but for the last "
     "bucket", "assumed; DDP's buckets: 1 MiB, then 25 MiB"),
    ("fp16, bf16 hook", f"half the bytes; {HOOKS['bf16']} more passes over gradients",
     "passes assumed"),
    ("PowerSGD", "rank 1: n + m floats for a matrix n x m where that more than halves it, "
     f"three all-reduces a bucket; {HOOKS['powersgd']} more passes",
     "Vogels et al. 2019; passes assumed"),
    ("not counted", "reading data, evaluation, stragglers, other users of the network, host time "
     "of DDP and its hooks, BatchNorm's buffers", "optimistic"),
]  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A network's counts, which hold on every machine."""

    name: str
    precision: str
    shapes: Sequence[torch.Size]  # of its parameters, in their order
    multiply_adds: float  # an image, forward
    flops: float  # an image, forward and backward; a multiply-add is two
    operators: int  # a step, from batch to optimizer; views and allocations apart

    @property
    def num_parameters(self) -> int:
        """Of all tensors together."""
        return sum(map(math.prod, self.shapes))

    def buckets(self) -> list[list[torch.Size]]:
        """Parameters that travel together: last layer first, closed when a limit is reached."""
        buckets: list[list[torch.Size]] = [[]]
        for shape in reversed(self.shapes):
            limit = BUCKETS[0] if len(buckets) == 1 else BUCKETS[1]
            if 4 * sum(map(math.prod, buckets[-1])) >= limit:
                buckets.append([])
            buckets[-1].append(shape)
        return buckets


class Operators(TorchDispatchMode):
    """Counts the operators that a GPU would be sent."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += not (func.is_view or "empty" in func.__name__)
        return func(*args, **(kwargs or {}))


def count(name: str, num_images: int = 4) -> Network:
    """What one training step of lab does, counted on a CPU with `num_images` random images."""
    # LeNet-5 as on most data sets; on MNIST it starts from Muon.
    given = {"optimizer": "nesterov"} if name == "lenet5" else {}
    config = recipes.resolve({"model": name, **given})
    precision = "bf16" if MODELS[name].large else "no"
    accelerator = build_accelerator(mixed_precision=precision, threads=1, quiet=True)
    device = accelerator.device
    channels, num_classes = (1, 10) if "mnist" in config.dataset else (3, 10)
    size = config.image_size
    network = build_model(name, num_classes=num_classes, channels=channels, image_size=size)
    trainer = prepare(accelerator, network, config)
    images = torch.randint(0, 256, (3 * num_images, channels, size, size), dtype=torch.uint8)
    split = Split(images, torch.arange(len(images)) % num_classes, ("",) * num_classes)
    preprocess = Preprocess((0.5,) * channels, (0.5,) * channels, config.augmentations, device)
    plan = Plan(len(images), num_images, config.seed, rank=0, world_size=1)
    batches = ResidentLoader(split, plan, preprocess, device).batches(1)
    train_step(trainer, next(batches))  # makes the optimizer's state
    with Operators() as operators:
        train_step(trainer, batch := next(batches))
    with FlopCounterMode(display=False) as both:
        train_step(trainer, next(batches))
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        network(batch.images)
    flops = forward.get_total_flops() / 2 / num_images, both.get_total_flops() / num_images
    return Network(name, precision, [p.shape for p in network.parameters()], *flops, operators.num)


def messages(shapes: Sequence[torch.Size], hook: str) -> list[float]:
    """Bytes of each all-reduce that a bucket of gradients takes under a hook."""
    numbers = [math.prod(shape) for shape in shapes]
    if hook != "powersgd":
        return [(2 if hook == "bf16" else 4) * sum(numbers)]
    whole = left = right = 0  # rank 1: a matrix n x m becomes n and m numbers
    for shape, number in zip(shapes, numbers, strict=True):
        rows, columns = shape[0], number // shape[0]
        if len(shape) > 1 and 2 * (rows + columns) < number:
            left, right = left + rows, right + columns
        else:
            whole += number
    return [4 * numbers for numbers in (whole, left, right) if numbers]


def all_reduce(num_bytes: float, world_size: int, link: Link) -> float:
    """Predicted seconds until every process has the sum of `num_bytes`."""
    machines = math.ceil(world_size / PER_MACHINE)
    link = link if machines > 1 else NVLINK
    bandwidth = ACHIEVED * min(link.bandwidth, NVLINK.bandwidth)
    ring = 2 * (world_size - machines) * NVLINK.hop + 2 * (machines - 1) * link.hop
    ring += 2 * (world_size - 1) / world_size * num_bytes / bandwidth
    tree = 2 * (world_size / machines - 1) * NVLINK.hop + 2 * math.log2(machines) * link.hop
    tree += 2 * num_bytes / bandwidth
    return START + min(ring, tree)


def exchange(network: Network, world_size: int, link: Link, hook: str) -> tuple[float, float]:
    """Predicted seconds of all gradients' all-reduces, and of the last bucket's alone."""
    sizes = [messages(bucket, hook) for bucket in network.buckets()]
    each = [sum(all_reduce(size, world_size, link) for size in bucket) for bucket in sizes]
    return sum(each), each[-1]


def passes(network: Network, number: int) -> float:
    """Predicted seconds of `number` passes over the float32 parameters."""
    return number * 4 * network.num_parameters / MEMORY


def compute(network: Network, num_images: float) -> tuple[float, float]:
    """Predicted seconds of a step on one GPU without exchange: of its host, of the GPU."""
    arithmetic = num_images * network.flops / (UTILISATION * FLOPS[network.precision])
    return network.operators * LAUNCH, arithmetic + passes(network, PASSES)


def step(network: Network, batch: int, world_size: int, link: Link, hook: str = "none") -> float:
    """Predicted seconds of a step of a global batch; `hook` may be "local" for local SGD."""
    seconds = max(compute(network, batch / world_size))
    if world_size == 1:
        return seconds
    if hook == "local":
        return seconds + all_reduce(4 * network.num_parameters, world_size, link) / LOCAL_STEPS
    total, last = exchange(network, world_size, link, hook)
    packing = passes(network, HOOKS[hook])
    return seconds + packing + max(last, total - BACKWARD * seconds)


def speed(network: Network, batch: int, world_size: int, link: Link, hook: str = "none") -> float:
    """Images a second of `world_size` GPUs over those of one with a batch of 128."""
    return batch / 128 * step(network, 128, 1, link) / step(network, batch, world_size, link, hook)


def table(title: str, note: str, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Prints a Markdown table; fractions with three digits."""
    print(f"\n### {title}\n" * bool(title) + f"\n{note}\n" * bool(note))
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        cells = (f"{x:,.3g}" if isinstance(x, float) else str(x) for x in row)
        print("| " + " | ".join(cells) + " |")


# fmt: off
def main() -> None:
    """Prints every table."""
    os.environ["ACCELERATE_USE_CPU"] = "true"  # counts are the same, and need no GPU
    networks = [count(name) for name in ("lenet5", "alexnet")]
    table("Bytes against arithmetic: counted", "",
        ["network", "parameters", "MB all-reduced a step", "fp16, bf16 hook", "PowerSGD",
         "million multiply-adds an image, forward", "GFLOP a step of 128", "FLOP a byte",
         "operators a step"],
        [[n.name, f"{n.num_parameters:,}",
          *(sum(map(sum, (messages(b, hook) for b in n.buckets()))) / 1e6 for hook in HOOKS),
          n.multiply_adds / 1e6, 128 * n.flops / 1e9,
          f"{128 * n.flops / (4 * n.num_parameters):,.0f}", n.operators] for n in networks])
    table("Assumptions", "", ["what", "value", "source"], ASSUMPTIONS)
    table("One GPU, milliseconds a step: predicted", "",
        ["network", "host", *(f"GPU, batch {b:,}" for b in BATCHES), "GPU the slower from batch"],
        [[n.name, compute(n, 0)[0] * 1e3, *(compute(n, b)[1] * 1e3 for b in BATCHES), even(n)]
         for n in networks])
    table("Exchange of the gradients, milliseconds: predicted", "",
        ["network", "hook", *(f"{w:,} GPUs, {link.name}" for w, link in PLACES)],
        [[n.name, hook, *(exchange(n, w, link, hook)[0] * 1e3 for w, link in PLACES)]
         for n in networks for hook in HOOKS])
    print("\n### Efficiency: predicted\n\nNo hook / bf16 or fp16 hook / PowerSGD.",
          "Strong: the batch is all GPUs' together; one GPU with all of it is 1.",
          "Weak: 128 a GPU; one GPU with 128 is 1.", sep="\n")
    for n in networks:
        table("", f"**{n.name}**",
            ["GPUs", "link", *(f"strong, {b:,}" for b in BATCHES), "weak, 128 a GPU"],
            [[f"{w:,}", link.name,
              *("refused" if b < w else
                triple(speed(n, b, w, link, h) / w / speed(n, b, 1, link) for h in HOOKS)
                for b in BATCHES),
              triple(speed(n, 128 * w, w, link, h) / w for h in HOOKS)] for w, link in PLACES])
    worlds = [2**k for k in range(8)]
    faster = [replace(n, name=f"{n.name}, host 5 times as fast", operators=n.operators // 5)
              for n in networks]
    table("Where strong scaling ends, batch 128: predicted",
        "Speed of 1, 2, 4 ... 128 GPUs over that of one; InfiniBand beyond 8.",
        ["network", *map(str, worlds)],
        [[n.name, *(f"{speed(n, 128, w, INFINIBAND):.2f}" for w in worlds)]
         for n in (*networks, *faster)])
    remedies = {
        "batch 128": (128, "none"), "bf16 hook": (128, "bf16"), "PowerSGD": (128, "powersgd"),
        f"local SGD, {LOCAL_STEPS} steps": (128, "local"),
        "batch 1,024": (1024, "none"), "batch 8,192": (8192, "none"),
        "batch 8,192, bf16 hook": (8192, "bf16"),
    }
    table("What helps, 64 GPUs: predicted",
        "Images a second over those of one GPU with batch 128. The last column is ONE GPU's.",
        ["network", "link", *remedies, "ONE GPU, batch 8,192"],
        [[n.name, link.name,
          *(speed(n, b, 64, link, h) for b, h in remedies.values()), speed(n, 8192, 1, link)]
         for n in networks for link in (INFINIBAND, ETHERNET)])
# fmt: on


def even(network: Network) -> str:
    """The batch a GPU from which it, not its host, sets the pace."""
    host, fixed = compute(network, 0)
    image = compute(network, 1)[1] - fixed
    return f"{max(1, math.ceil((host - fixed) / image)):,}"


def triple(numbers: Iterable[float]) -> str:
    """One cell of the table of efficiencies."""
    return " / ".join(f"{x:.2f}" if x >= 0.005 else "<.01" for x in numbers)


if __name__ == "__main__":
    main()
