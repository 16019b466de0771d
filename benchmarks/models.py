"""Measure the cost of each model: latency of one image, speed of training and evaluation, memory.

  python benchmarks/models.py                        all but the largest, about 20 minutes
  python benchmarks/models.py --models lenet5,alexnet --rounds 5 --threads 1

Uses images of 32 pixels with 3 channels, 10 classes, the recipe's optimizer, and the precision and
memory format that lab selects. The models run in turn, each in its own process. Figures are medians
over the rounds, with the minimum and maximum. Memory is the peak minus that after the imports:
weights, gradients, optimizer state and the activations of a batch.
"""

import argparse
import json
import resource
import statistics
import time
from functools import partial

from common import child, in_turn, spread, write_json

MODELS = (
    "lenet5,alexnet,googlenet,densenet,densenet121,mobilenet_v2,mobilenet_v3_small,efficientnet_b0,"
    "vit_tiny,vit_small,vit_hybrid"
)
BATCH_SIZE = 64
CALLS = {"cpu": (1, 2, 10), "cuda": (10, 100, 200)}  # warm-up and timed steps; single images


def run_one(model: str, threads: int) -> dict:
    """Return the measurements of one model, made in this process."""
    import torch
    from common import prepare

    from lab.config.recipes import resolve
    from lab.data.types import Batch
    from lab.distributed import build_accelerator
    from lab.models import build_model, find_model

    spec = find_model(model)
    config = resolve({"model": model, "dataset": "cifar10"})
    accelerator = build_accelerator(
        benefits_from_bf16=spec.benefits_from_bf16,
        cpu_bf16=spec.cpu_bf16,
        threads=threads,
        quiet=True,
    )
    device = accelerator.device
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.manual_seed(0)
    built_model = build_model(model, num_classes=10, in_chans=3, image_size=32, init=config.init)
    train_step = prepare(accelerator, built_model, config)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, device=device)
    labels = torch.randint(10, (BATCH_SIZE,), device=device)
    batch = Batch(images, labels, labels, BATCH_SIZE)

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    warm_up, steps, single = CALLS[device.type]
    train_step.set_training_mode()
    for _ in range(warm_up):
        train_step.run(batch)
    start = wait()
    for _ in range(steps):
        train_step.run(batch)
    training = steps * BATCH_SIZE / (wait() - start)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - idle) / 1024
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 2**20

    built_model.eval()
    with torch.inference_mode(), accelerator.autocast():
        for _ in range(warm_up):
            built_model(images)
        start = wait()
        for _ in range(warm_up):
            built_model(images)
        evaluation = warm_up * BATCH_SIZE / (wait() - start)
        times = []
        for _ in range(single + 3):
            start = wait()
            built_model(images[:1])
            times.append(wait() - start)
    return {
        "latency_ms": 1000 * statistics.median(times[3:]),
        "train_images_per_second": training,
        "eval_images_per_second": evaluation,
        "memory_mb": memory,
        "precision": accelerator.mixed_precision,
        "optimizer": config.optimizer,
    }


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=MODELS, help="comma-separated list")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as train.py")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.threads)))
        return
    contenders = {
        name: partial(child, __file__, "--one", name, "--threads", args.threads)
        for name in args.models.split(",")
    }
    results = in_turn(contenders, args.rounds, show="train_images_per_second")
    print("\n| | latency of one image, ms | training, images/s | evaluation, images/s | MB |")
    print("| --- | --- | --- | --- | --- |")
    for name, rows in results.items():
        keys = ("latency_ms", "train_images_per_second", "eval_images_per_second", "memory_mb")
        cells = [spread([row[key] for row in rows], ",.2f") for key in keys]
        print(f"| {name} | {' | '.join(cells)} |")
    write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()
