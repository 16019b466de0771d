"""What a world of this many processes says of every case: JSON, compared by test_distributed.py.

    python tests/checks_exactness.py OUTPUT PICTURES                    a world of one
    torchrun --standalone --nproc-per-node 3 tests/checks_exactness.py OUTPUT PICTURES

One launch does all cases, as most of a launch is the import of PyTorch.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

import evaluate
import train
from lab import engine, exchange
from lab.data import DataConfig
from lab.data.augment import Preprocess
from lab.data.folder import read_folder
from lab.data.loaders import build_loader
from lab.data.sources import Split, in_memory
from lab.data.toy import make_shapes
from lab.distributed import build_accelerator, loader_place
from lab.errors import run_script
from lab.evaluation import predict_all

SIZES = (2, 101, 1000)
BATCH_SIZES = (7, 128)

# Digits have 1,294 training samples: 21 batches of 61 and one of 13.
COMMON = """--recipe smoke --dataset digits --limit-train 0 --augment crop,flip,cutout
    --batch-size 61 --epochs 3 --max-steps 60 --optimizer sgd --lr 0.05 --schedule one-cycle
    --threads 1 --mixed-precision no --log-every 1 --quiet"""
TRAININGS = {
    "plain": "",
    "accumulate": "--accumulate 3",
    "streaming": "--loader streaming",
    # A last batch of one sample: every process but one has none.
    "empty-shards": "--limit-train 62 --epochs 10",
    "accumulate-empty": "--limit-train 62 --epochs 10 --accumulate 3",
    # A last batch of four: a process cuts its share into three parts, two or one.
    "uneven-parts": "--limit-train 65 --epochs 10 --accumulate 3",
    "options": "--optimizer nesterov --schedule cosine --warmup-epochs 0.5 --clip-norm 0.5 "
    "--ema 0.9 --label-smoothing 0.1",
    "adamw": "--optimizer adamw --lr 0.001",
    "muon": "--optimizer muon --lr 0.001",
    "pictures": "--dataset folder --epochs 1 --max-steps 0 --loader resident",
    "pictures-streaming": "--dataset folder --epochs 1 --max-steps 0 --loader streaming "
    "--workers 2",
    "mixed": "--augment crop,random-augment,mixup,cutmix --label-smoothing 0.1 --max-steps 30",
    "mixed-accumulate": "--augment crop,random-augment,mixup,cutmix --label-smoothing 0.1 "
    "--max-steps 30 --accumulate 3",
    "mixed-empty": "--augment mixup,cutmix --limit-train 62 --epochs 5",
    "pictures-mixed": "--dataset folder --epochs 1 --augment flip,random-augment,mixup,cutmix "
    "--max-steps 8 --loader resident",
    "pictures-mixed-streaming": "--dataset folder --epochs 1 --max-steps 8 --workers 2 "
    "--augment flip,random-augment,mixup,cutmix --loader streaming",
    "hook-bf16": "--comm-hook bf16",
    "hook-powersgd": "--comm-hook powersgd",
    "dropout": "--model alexnet --dataset shapes --num-samples 50 --limit-eval 10 --epochs 1 "
    "--max-steps 3 --batch-size 20 --lr 0.01 --init kaiming",
}


def main() -> None:
    output, pictures = map(Path, sys.argv[1:])
    exchange.SMALL = 0  # LeNet-5's gradients take the way of larger ones
    # A run destroys its process group when it ends; here all runs share one.
    Accelerator.end_training = lambda self: None
    accelerator = build_accelerator(mixed_precision="no", threads=1)
    results = {
        "evaluations": evaluations(accelerator, pictures),
        "missing": error_of_a_missing_batch(accelerator),
        "weights": trainings(output, pictures),
    }
    evaluate.main([str(output / "plain"), "--threads", "1", "--quiet"])
    file = output / f"process-{accelerator.process_index}.json"
    file.write_text(json.dumps({**results, "world_size": accelerator.num_processes}))


def evaluations(accelerator: Accelerator, pictures: Path) -> dict:
    """What predict_all and its report say, for every size of split, size of batch and loader."""
    files = read_folder(DataConfig("folder", str(pictures), 32, 0, 0, 0, 0, 0, 0)).train
    files = files.take(torch.randperm(1000, generator=torch.Generator().manual_seed(1)))
    decoded = in_memory(files, num_workers=1)
    preprocess = Preprocess((0.5,) * 3, (0.25,) * 3, (), accelerator.device)
    network = some_network(accelerator.process_index)
    results = {}
    for size in SIZES:
        for batch_size in BATCH_SIZES:
            for kind in ("resident", "streaming"):
                split = (decoded if kind == "resident" else files).take(torch.arange(size))
                place = loader_place(accelerator, kind, workers=2)
                loader = build_loader(split, preprocess, batch_size=batch_size, seed=None, **place)
                for tta, name in (("none", kind), ("flip", f"{kind}, mirrored")):
                    if tta == "flip" and size != 101:
                        continue
                    found = predict_all(accelerator, network, loader, tta)
                    results[f"{size} samples, batches of {batch_size}, {name}"] = {
                        "true_labels": split.labels.tolist(),
                        "labels": found.labels.tolist(),
                        "predictions": found.predictions.tolist(),
                        "losses": found.losses.tolist(),
                        "report": found.report(),
                    }
    return results


def error_of_a_missing_batch(accelerator: Accelerator) -> str:
    """Return what predict_all raises when the last process leaves out its last batch."""
    pictures, labels = make_shapes(101, seed=7)
    split = Split(pictures, labels, tuple("0123456789"))
    place = loader_place(accelerator, "resident", workers=0)
    preprocess = Preprocess((0.5,) * 3, (0.25,) * 3, (), accelerator.device)
    loader = build_loader(split, preprocess, batch_size=20, seed=None, **place)
    if accelerator.is_last_process:
        batches = list(loader.batches())[:-1]
        loader.batches = lambda: iter(batches)
    try:
        predict_all(accelerator, some_network(accelerator.process_index), loader)
    except RuntimeError as error:
        return str(error)
    return ""


def some_network(rank: int) -> nn.Module:
    """A network that predicts every class now and then.

    Its BatchNorm has seen other statistics on each process, as after training: those of process 0
    count.
    """
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),  # [n, 8, 7, 7]
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    )
    assert isinstance(network[1].running_mean, torch.Tensor)
    network[1].running_mean += rank
    return network


def trainings(output: Path, pictures: Path) -> dict[str, list[str]]:
    """Runs train.py's main for every case; a digest of this process's weights after each epoch."""
    digests: dict[str, list[str]] = {}
    original = engine.train_one_epoch

    def train_one_epoch(trainer, *args, **kwargs):
        trained = original(trainer, *args, **kwargs)
        digest = hashlib.sha256()
        for tensor in trainer.network.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        digests[trainer.config.name].append(digest.hexdigest())
        return trained

    engine.train_one_epoch = train_one_epoch
    for name, options in TRAININGS.items():
        digests[name] = []
        words = [*COMMON.split(), *options.split(), "--output-dir", str(output), "--name", name]
        if "--dataset folder" in options:
            words += ["--data-dir", str(pictures)]
        train.main(words)
    return digests


if __name__ == "__main__":
    sys.exit(run_script(main))
