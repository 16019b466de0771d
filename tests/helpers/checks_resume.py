"""train.py with its sample order logged; interrupted after a step, or with NaN in an image.

    python tests/helpers/checks_resume.py DIRECTORY STOP NAN [options of train.py]

DIRECTORY receives order-RANK.jsonl, a line for each batch: the step and the indices of the samples.
STOP is the step after which all processes stop as by SIGTERM; NAN is RANK:STEP. 0 means never.
"""

import itertools
import json
import math
import os
import sys
from pathlib import Path

import train
from lab.checkpoint.interrupt import InterruptHandler, StopReason
from lab.data.loaders import ResidentLoader
from lab.engine.training import TrainStep
from lab.errors import run_script


def main() -> int:
    directory, stop, nan, *argv = sys.argv[1:]
    rank = os.environ.get("RANK", "0")
    log = Path(directory) / f"order-{rank}.jsonl"
    original_batches, original_run = ResidentLoader.batches, TrainStep.run
    original_stop_reason, steps = InterruptHandler.stop_reason, itertools.count(1)

    def batches(loader, epoch=0, first=0):
        for number, batch in enumerate(original_batches(loader, epoch, first), first):
            if loader.sampler.seed is not None:  # a training batch
                step = (epoch - 1) * loader.sampler.num_batches + number
                row = {"step": step, "index": batch.indices.tolist()}
                with open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
            yield batch

    def run(train_step, batch):
        if nan == f"{rank}:{next(steps)}":
            batch.images[:] = math.nan
        return original_run(train_step, batch)

    def stop_reason(interrupts, step, check_now=False):
        if step == int(stop):
            return StopReason.SIGTERM
        return original_stop_reason(interrupts, step, check_now)

    ResidentLoader.batches, TrainStep.run = batches, run
    InterruptHandler.stop_reason = stop_reason
    return train.main(argv).exit_code


if __name__ == "__main__":
    sys.exit(run_script(main))
