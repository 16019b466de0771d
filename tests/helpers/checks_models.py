"""Train a model with BatchNorm, then only its head, on several processes, for test_adapted.py.

    torchrun --standalone --nproc-per-node 2 tests/helpers/checks_models.py OUTPUT

Each process writes RANK.json, with a digest of its weights after each training.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

import train
from lab.engine import training
from lab.errors import run_script

# 25 samples in batches of 12: the last batch has one sample, so one process has none.
COMMON = """--recipe smoke --dataset digits --max-train-samples 25 --batch-size 12
    --image-size 16 --epochs 1 --max-eval-samples 10 --threads 1 --mixed-precision no --quiet"""
MODEL, FROZEN = "mobilenet_v3_small", "mobilenet_v3_small, frozen"
TRAININGS = {MODEL: f"--model {MODEL}", FROZEN: f"--model {MODEL} --freeze backbone"}


def main() -> None:
    output = Path(sys.argv[1])
    digests = {}
    original = training.train_one_epoch

    def train_one_epoch(train_step, *args, **kwargs):
        metrics = original(train_step, *args, **kwargs)
        digest = hashlib.sha256()
        for parameter in train_step.model.parameters():
            assert torch.isfinite(parameter).all()
            digest.update(parameter.detach().contiguous().numpy().tobytes())
        digests[train_step.config.name] = digest.hexdigest()
        return metrics

    training.train_one_epoch = train_one_epoch
    for name, options in TRAININGS.items():
        argv = [*COMMON.split(), *options.split(), "--output-dir", str(output), "--name", name]
        if name == FROZEN:
            argv += ["--init-checkpoint", str(output / MODEL)]
        train.main(argv)
    rank = torch.distributed.get_rank()
    (output / f"{rank}.json").write_text(json.dumps(digests))


if __name__ == "__main__":
    sys.exit(run_script(main))
