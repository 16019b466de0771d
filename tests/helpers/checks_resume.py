"""train.py with its sample order logged; stopped after a step, or given pictures of no number.

    python tests/helpers/checks_resume.py FOLDER STOP SPOIL [options of train.py]

FOLDER gets order-RANK.jsonl, a line a batch: the step and this process's positions in the split.
STOP is the step after which all stop as by SIGTERM, SPOIL is RANK:STEP; 0 for neither.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path

import train
from lab.checkpoint.interrupt import InterruptHandler
from lab.data.loaders import ResidentLoader
from lab.engine import training
from lab.errors import run_script


def main() -> int:
    folder, stop, spoil, *argv = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    log = Path(folder) / f"order-{rank}.jsonl"
    original, eager_step, reason = (
        ResidentLoader.batches,
        training.eager_step,
        InterruptHandler.stop_reason,
    )
    steps = []  # begun by this process

    def batches(loader, epoch=0, first=0):
        for number, batch in enumerate(original(loader, epoch, first), first):
            if loader.sampler.seed is not None:  # in training
                step = (epoch - 1) * loader.sampler.num_batches + number
                row = {"step": step, "index": batch.indices.tolist()}
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
            yield batch

    def spoiled(train_step, batch):
        steps.append(len(steps) + 1)
        if spoil == f"{rank}:{steps[-1]}":
            batch.images[:] = math.nan
        return train_step.run(batch)

    def stopped(interrupts, step, must_ask=False):
        return signal.SIGTERM if step == int(stop) else reason(interrupts, step, must_ask)

    ResidentLoader.batches, training.eager_step, InterruptHandler.stop_reason = batches, spoiled, stopped
    return train.main(argv)


if __name__ == "__main__":
    sys.exit(run_script(main))
