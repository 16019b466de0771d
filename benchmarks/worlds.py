"""Compare two processes on two cores with one process of two threads: AlexNet, same global batch.

  python benchmarks/worlds.py
  python benchmarks/worlds.py --worlds "1 process,2 processes" --rounds 6

Times steps on a prepared batch of 128 images, in the precision and memory format that lab selects.
The worlds run in turn, each started by torchrun. A round takes about a minute on 2 CPU cores.
"""

import argparse
import json
import time
from functools import partial

from common import child, in_turn, ratios, spread, write_json

BATCH_SIZE, STEPS = 128, 10
WARM_UP = 12
WORLDS = {  # number of processes, how gradients are averaged
    "1 process": (1, "none"),
    "2 processes": (2, "gloo"),
    "2 processes, no all-reduce": (2, "none"),  # independent processes: the upper bound
}


def run_one(averaging: str) -> dict | None:
    """Return the images per second of all processes on the main process, None on the others."""
    import torch
    from common import prepare

    from lab.config.recipes import resolve
    from lab.data.sampler import shard
    from lab.data.types import Batch
    from lab.distributed import build_accelerator
    from lab.models import build_model

    config = resolve({"model": "alexnet", "dataset": "images", "recipe": "notebook"})
    accelerator = build_accelerator(benefits_from_bf16=True)
    torch.manual_seed(0)
    model = build_model("alexnet", num_classes=10, in_chans=3, image_size=32)
    train_step = prepare(accelerator, model, config)
    part = shard(BATCH_SIZE, accelerator.process_index, accelerator.num_processes)
    images = torch.randn(BATCH_SIZE, 3, 32, 32)[part].to(accelerator.device)
    labels = torch.randint(10, (BATCH_SIZE,))[part].to(accelerator.device)
    batch = Batch(images, labels, labels, BATCH_SIZE)
    if averaging == "none":
        train_step.wrapped_model = train_step.model
    train_step.wrapped_model.train()
    for _ in range(WARM_UP):
        train_step.run(batch)
    accelerator.wait_for_everyone()
    start = time.perf_counter()
    for _ in range(STEPS):
        train_step.run(batch)
    accelerator.wait_for_everyone()
    speed = STEPS * BATCH_SIZE / (time.perf_counter() - start)
    return {"images_per_second": speed} if accelerator.is_main_process else None


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    worlds = list(WORLDS)
    parser.add_argument("--worlds", type=lambda names: names.split(","), default=worlds)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        if result := run_one(args.one):
            print(json.dumps(result), flush=True)
        return
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    contenders = {
        name: partial(child, *launch, count, __file__, "--one", averaging)
        for name in args.worlds
        for count, averaging in [WORLDS[name]]
    }
    results = in_turn(contenders, args.rounds, show="images_per_second")
    print("\n| | images/s | / 1 process |\n| --- | --- | --- |")
    for name, rows in results.items():
        against = spread(ratios(results, name, "1 process", "images_per_second"))
        print(f"| {name} | {spread([r['images_per_second'] for r in rows], '.0f')} | {against} |")
    write_json(args.json, {"results": results})


if __name__ == "__main__":
    main()
