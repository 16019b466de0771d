"""Measure what writing checkpoints and best weights costs per epoch: AlexNet with AdamW.

  python benchmarks/saving.py

Alternates blocks of 40 steps of 128 images in memory with and without writing, and prints the
difference as a share of an epoch of 45,000 images (352 steps). Takes five minutes on 2 CPU cores.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import spread, write_json

BATCH_SIZE, STEPS, STEPS_PER_EPOCH = 128, 40, 352


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()

    import torch
    from common import prepare

    from lab.checkpoint.atomic_io import AsyncWriter
    from lab.checkpoint.interrupt import InterruptHandler
    from lab.checkpoint.manager import CheckpointManager
    from lab.checkpoint.run_dir import RunDir
    from lab.checkpoint.train_state import TrainState
    from lab.checkpoint.weights import BestWeights
    from lab.config.recipes import resolve
    from lab.data.splits import Splits
    from lab.data.types import Batch, Split
    from lab.distributed import build_accelerator
    from lab.models import build_model

    # AdamW has the largest optimizer state: two moments for each parameter.
    config = resolve({"model": "alexnet", "dataset": "images", "optimizer": "adamw", "lr": 1e-3})
    accelerator = build_accelerator(benefits_from_bf16=True)
    torch.manual_seed(0)
    model = build_model("alexnet", num_classes=10, in_chans=3, image_size=32)
    train_step = prepare(accelerator, model, config)
    images = torch.randn(BATCH_SIZE, 3, 32, 32, device=accelerator.device)
    labels = torch.randint(10, (BATCH_SIZE,), device=accelerator.device)
    batch = Batch(images, labels, labels, BATCH_SIZE)
    train_step.wrapped_model.train()

    def steps(count: int) -> None:
        for _ in range(count):
            train_step.run(batch)
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()

    with (
        tempfile.TemporaryDirectory() as folder,
        AsyncWriter() as writer,
        InterruptHandler(accelerator, 0.0, 0.0, 0) as interrupts,
    ):
        run = RunDir(folder)
        run.create({})
        run.checkpoints_dir.mkdir()
        split = Split(images.cpu(), labels.cpu(), tuple("0123456789"))
        splits = Splits(split, split, split, (0.0,) * 3, (1.0,) * 3, "validation", {})
        checkpoints = CheckpointManager(run, writer, interrupts, train_step, splits, 0)
        best, state, row = BestWeights(run, writer), TrainState(), {"epoch": 1}
        steps(5)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        copying = []
        for _ in range(args.rounds):
            for saves in seconds:
                writer.wait()
                start = time.perf_counter()
                if saves:
                    state.step += 1
                    checkpoints.save(row, state)
                    copying.append(time.perf_counter() - start)
                steps(STEPS // 2)
                if saves:
                    best.save(train_step.eval_model, {}, row)
                steps(STEPS // 2)
                seconds[saves].append(time.perf_counter() - start)
        writer.wait()
        sizes = {p.name: p.stat().st_size / 1e6 for p in Path(folder).rglob("*.safetensors")}
    extra = [b - a for a, b in zip(seconds[False], seconds[True], strict=True)]
    epoch = statistics.median(seconds[False]) / STEPS * STEPS_PER_EPOCH
    shares = [100 * e / epoch for e in extra]
    print(f"{config.model} with {config.optimizer}")
    print(f"sizes in MB: {', '.join(f'{name} {size:.0f}' for name, size in sizes.items())}")
    print(f"an epoch takes {epoch:.1f} s; copying the training state {spread(copying)} s")
    print(
        f"one checkpoint and one best.safetensors cost {spread(extra)} s of it: {spread(shares)} %"
    )
    measured = {"plain": seconds[False], "saving": seconds[True], "copying": copying}
    write_json(args.json, {"model": config.model, "optimizer": config.optimizer, **measured})


if __name__ == "__main__":
    main()
