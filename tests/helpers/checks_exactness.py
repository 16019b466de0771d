"""Evaluate and train every case; test_distributed.py compares the results of several worlds.

    python tests/helpers/checks_exactness.py OUTPUT IMAGES

IMAGES is a directory of 200 images in class directories. Each process writes
OUTPUT/process-RANK.json.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from shapes import make_shapes
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce

import evaluate
import train
from lab.data import DataConfig
from lab.data.image_folder import read_folder
from lab.data.images import in_memory
from lab.data.loaders import LoaderOptions, build_loader
from lab.data.transforms import BatchTransform
from lab.data.types import Split
from lab.distributed import build_accelerator
from lab.engine import training
from lab.engine.evaluation import predict_all
from lab.errors import run_script

SIZES = (2, 101)
BATCH_SIZES = (7, 128)

# 318 training samples: five batches of 61 and one of 13.
COMMON = """--recipe smoke --dataset digits --max-train-samples 318 --augment crop,flip,cutout
    --batch-size 61 --epochs 3 --max-steps 16 --optimizer sgd --lr 0.3 --schedule linear
    --threads 1 --mixed-precision no --log-every 1 --quiet"""
FOLDER = "--dataset IMAGES --model lenet5 --epochs 2 --augment crop,flip,mixup,cutmix "
# A last batch of one sample: every process but one has none.
EMPTY = "--max-train-samples 62 "
TRAININGS = {
    "plain": "",
    "empty-shards": EMPTY + "--balanced-sampling",
    "accumulate-empty": EMPTY + "--balanced-sampling --grad-accum-steps 3",
    "mixed-empty": EMPTY + "--augment mixup,cutmix --label-smoothing 0.1",
    "mixed-accumulate": EMPTY + "--augment mixup,cutmix --label-smoothing 0.1 --grad-accum-steps 3",
    "options": "--optimizer nesterov --schedule cosine --warmup-epochs 0.5 --max-grad-norm 0.5 "
    "--ema-decay 0.9 --label-smoothing 0.1 --class-weights balanced",
    "folder-mixed": FOLDER + "--loader resident",
    "folder-mixed-streaming": FOLDER + "--loader streaming --workers 1",
    "sample-augmentation": "--model lenet5 --dataset IMAGES --epochs 1 --workers 1 "
    "--augment resized-crop,flip,trivialaugment,erasing",
    # With BatchNorm that is synchronized over gloo: --sync-bn needs GPUs. A last batch of four: a
    # process cuts its share into three parts, two or one.
    "batch-norm-uneven-parts": "--max-train-samples 65 --grad-accum-steps 3",
    "dropout": "--max-train-samples 54 --batch-size 20 --epochs 1",
    "dropout-seed": "--max-train-samples 54 --batch-size 20 --max-steps 1 --seed 7",
}


def main() -> None:
    output, images = map(Path, sys.argv[1:])
    accelerator = build_accelerator(mixed_precision="no", threads=1)
    results = trainings(TRAININGS, output, images)
    results["evaluations"] = evaluations(accelerator, images)
    results["missing"] = error_of_a_missing_batch(accelerator)
    for name in ("plain", "folder-mixed"):
        evaluate.main([str(output / name), "--threads", "1", "--quiet"])
    if accelerator.num_processes > 1:
        group = distributed.group.WORLD._get_backend(accelerator.device)
        results["timeout"] = str(group.options._timeout)
    file = output / f"process-{accelerator.process_index}.json"
    file.write_text(json.dumps({**results, "world_size": accelerator.num_processes}))


def evaluations(accelerator: Accelerator, images: Path) -> dict:
    """Return the results of predict_all for every split size, batch size and loader."""
    files = read_folder(DataConfig(str(images), "data", 32, 0, 0, 0, 0, 0)).train
    files = files.select(torch.randperm(200, generator=torch.Generator().manual_seed(1)))
    decoded = in_memory(files, num_workers=1)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, (), accelerator.device)
    model = make_model(accelerator.process_index)
    results = {}
    for size in SIZES:
        for batch_size in BATCH_SIZES:
            for kind in ("resident", "streaming"):
                split = (decoded if kind == "resident" else files).select(torch.arange(size))
                options = LoaderOptions.create(accelerator, kind, num_workers=1)
                loader = build_loader(split, transform, options, batch_size=batch_size, seed=None)
                for tta, name in (("none", kind), ("flip", f"{kind}, flipped")):
                    if tta == "flip" and (size, batch_size) != (101, 7):
                        continue
                    predictions = predict_all(accelerator, model, loader, tta)
                    results[f"{size} samples, batches of {batch_size}, {name}"] = {
                        "true_labels": split.labels.tolist(),
                        "labels": predictions.labels.tolist(),
                        "predictions": predictions.predictions.tolist(),
                        "losses": predictions.losses.tolist(),
                        "report": predictions.report(),
                    }
                loader.close()
    return results


def error_of_a_missing_batch(accelerator: Accelerator) -> str:
    """Return the error of predict_all when the last process skips its last batch."""
    images, labels = make_shapes(101, seed=7)
    split = Split(images, labels, tuple("0123456789"))
    options = LoaderOptions.create(accelerator, "resident", num_workers=0)
    transform = BatchTransform((0.5,) * 3, (0.25,) * 3, (), accelerator.device)
    loader = build_loader(split, transform, options, batch_size=20, seed=None)
    if accelerator.is_last_process:
        batches = list(loader.batches())[:-1]
        loader.batches = lambda: iter(batches)
    try:
        predict_all(accelerator, make_model(accelerator.process_index), loader)
    except RuntimeError as error:
        return str(error)
    return ""


def make_model(rank: int) -> nn.Module:
    """Return a model that predicts every class for some images.

    As after training, its BatchNorm statistics differ between processes; those of rank 0 count.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=4),  # [n, 8, 7, 7]
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, 10),
    )
    assert isinstance(model[1].running_mean, torch.Tensor)
    model[1].running_mean += rank
    return model


class SyncedBatchNorm(nn.BatchNorm2d):
    """Normalise by the statistics of all processes, as SyncBatchNorm does, on a CPU."""

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return super().forward(images)
        values = images.double()
        count = values.new_full((1,), images.numel() // self.num_features)
        totals = torch.cat((values.sum((0, 2, 3)), values.square().sum((0, 2, 3)), count))
        if distributed.is_initialized():
            totals = all_reduce(totals)  # in the backward pass, too
        mean, mean_square = (totals[:-1] / totals[-1]).view(2, -1)
        variance = mean_square - mean.square()
        with torch.no_grad():
            unbiased = variance * totals[-1] / (totals[-1] - 1)
            self.running_mean.lerp_(mean.float(), 0.1)
            self.running_var.lerp_(unbiased.float(), 0.1)
        scale = self.weight / (variance + self.eps).sqrt()
        shift = self.bias - mean * scale
        return (values * scale[:, None, None] + shift[:, None, None]).float()


def trainings(cases: dict[str, str], output: Path, images: Path) -> dict[str, dict[str, list]]:
    """Run train.py's main for every case, and return two lists of each that this process recorded.

    "weights" are digests of the weights after each epoch, and "masks" are the dropout masks of 64
    values at each step.
    """
    digests: dict[str, list] = {}
    masks: dict[str, list] = {}
    original, original_configure = training.train_one_epoch, training.configure_model

    def configure_model(model, config, device):
        if config.name.startswith("batch-norm"):
            model.features[1] = nn.Sequential(SyncedBatchNorm(6), nn.Tanh())
        elif config.name.startswith("dropout"):
            model.features.append(nn.Dropout())
        return original_configure(model, config, device)

    def train_one_epoch(train_step, *args, **kwargs):
        name = train_step.config.name

        def record_mask(*_):
            with torch.random.fork_rng(devices=[]):
                masks[name].append((F.dropout(torch.ones(64)) > 0).tolist())

        dropouts = [m for m in train_step.model.modules() if isinstance(m, nn.Dropout)]
        handles = [m.register_forward_pre_hook(record_mask) for m in dropouts[:1]]
        metrics = original(train_step, *args, **kwargs)
        for handle in handles:
            handle.remove()
        digest = hashlib.sha256()
        for tensor in train_step.model.state_dict().values():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        digests[name].append(digest.hexdigest())
        return metrics

    training.train_one_epoch, training.configure_model = train_one_epoch, configure_model
    for name, options in cases.items():
        digests[name], masks[name] = [], []
        options = options.replace("IMAGES", str(images))
        argv = [*COMMON.split(), *options.split(), "--output-dir", str(output), "--name", name]
        assert train.main(argv).path == output / name  # on every process
    return {"weights": digests, "masks": masks}


if __name__ == "__main__":
    sys.exit(run_script(main))
