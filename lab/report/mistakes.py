"""Save images for the reports of a run: the first training batch and the test mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.checkpoint.atomic_io import write_atomically
from lab.checkpoint.run_dir import IMAGES, RunDir
from lab.data.images import AugmentedImages
from lab.data.sampler import ShardedBatchSampler
from lab.data.splits import Splits
from lab.data.transforms import BatchTransform
from lab.data.types import Images
from lab.report.explain import GradCam

if TYPE_CHECKING:
    from lab.config.schema import TrainConfig
    from lab.engine.evaluation import Predictions


MAX_SIDE = 64  # pixels; larger images are resized
MAX_BATCH = 64  # images of the first training batch
NUM_MOST_CONFIDENT = 24  # mistakes of any class that are saved first
MAX_PER_CELL = 12  # further mistakes of one cell of the confusion matrix
NUM_EXPLAINED = 36  # of the saved mistakes, the first
MAX_MISTAKES = 1000
MAX_MISTAKES_BYTES = 4 * 2**20


def save_images(
    run: RunDir,
    config: TrainConfig,
    splits: Splits,
    predictions: Predictions,
    grad_cam: GradCam | None = None,
) -> None:
    """Write images.safetensors on the main process.

    Its tensors are `batch`, uint8 [n, C, H, W], and `mistakes`, uint8 [m, C, H, W]. Each has the
    int64 tensors NAME_labels, the true classes, and NAME_index, the indices in the training or test
    split. They depend only on the settings and the predictions, so that a run that was resumed, or
    trained on several processes, has the same ones.

    With `grad_cam`, the tensor `heatmaps`, uint8 [k, h, w], explains the predicted classes of the
    first k mistakes.
    """
    if not run.is_main_process:
        return
    images, batch = first_batch(config, splits)
    mistakes = select_mistakes(predictions, _max_mistakes(splits.test.images))
    tensors = {
        "batch": images,
        "batch_labels": splits.train.labels[batch],
        "batch_index": batch,
        "mistakes": shrink(splits.test.images[mistakes]),
        "mistakes_labels": splits.test.labels[mistakes],
        "mistakes_index": mistakes,
    }
    explained = mistakes[:NUM_EXPLAINED]
    if grad_cam is not None and len(explained):
        tensors["heatmaps"] = grad_cam(
            splits.test.images[explained], predictions.predictions[explained]
        )
    content = safetensors.torch.save({name: t.contiguous() for name, t in tensors.items()})
    write_atomically(run.path / IMAGES, content)


def first_batch(config: TrainConfig, splits: Splits) -> tuple[Tensor, Tensor]:
    """Return the first images of the first epoch as the model sees them, augmented and mixed.

    The result is (uint8 [n, C, H, W], their indices in the training split, int64 [n]). The
    normalization is undone.
    """
    num_samples = len(splits.train.labels)
    transform = BatchTransform(
        splits.mean, splits.std, config.augmentations, "cpu", config.mixup_alpha
    )
    sampler = ShardedBatchSampler(
        num_samples, config.batch_size, config.seed, rank=0, world_size=1,
        labels=splits.train.labels, balanced_sampling=config.balanced_sampling,
    )  # fmt: skip
    batch = next(sampler.slices())
    batch = replace(batch, parts=(batch.parts[0][:MAX_BATCH],))
    mixup = transform.mixup
    order = sampler.order(1)
    index = sampler.take(order, batch, mixup is not None)
    bits = sampler.take(sampler.bits(1, order), batch, mixup is not None)
    items = index
    if isinstance(splits.train.images, AugmentedImages):
        items = torch.stack((index, bits), 1)
    images = transform(splits.train.images[items], bits)
    if mixup is not None:
        images, index = mixup.draw(config.seed, 1, 0, *images.shape[2:])(images), index[1:]
    pixels = (images - transform.shift) / transform.scale
    return shrink(pixels.round().clamp(0, 255).byte()), index


def select_mistakes(predictions: Predictions, limit: int) -> Tensor:
    """Return the indices of the wrong predictions to save, int64 [m] with m <= `limit`.

    First come the most confident mistakes of all classes. Then come the most confident mistake of
    each cell of the confusion matrix, the second of each cell, and so on up to MAX_PER_CELL; of two
    cells, the one with more mistakes comes first.
    """
    wrong = (predictions.labels != predictions.predictions).nonzero().flatten()
    wrong = wrong[predictions.confidence[wrong].argsort(descending=True, stable=True)]
    num_classes = len(predictions.class_names)
    cells = predictions.labels[wrong] * num_classes + predictions.predictions[wrong]
    by_cell = cells.argsort(stable=True)
    counts = cells.bincount(minlength=num_classes**2)
    first = counts.cumsum(0) - counts  # the position in `by_cell` at which each cell begins
    place = torch.empty_like(cells)  # of each mistake within its cell, by confidence
    place[by_cell] = torch.arange(len(cells)) - first[cells[by_cell]]
    # Sorted by place, then by size of the cell; stable sorts keep the order by confidence.
    order = (-counts[cells]).argsort(stable=True)
    order = order[place[order].argsort(stable=True)]
    order = order[(place[order] < MAX_PER_CELL) & (order >= NUM_MOST_CONFIDENT)]
    return torch.cat((wrong[:NUM_MOST_CONFIDENT], wrong[order]))[:limit]


def shrink(images: Tensor) -> Tensor:
    """Return images uint8 [n, C, H, W] resized to at most MAX_SIDE pixels a side."""
    if max(images.shape[-2:]) <= MAX_SIDE or not len(images):
        return images
    resized = F.interpolate(images.float(), (MAX_SIDE, MAX_SIDE), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def _max_mistakes(images: Images) -> int:
    in_chans, height, width = images.shape[1:]
    num_bytes = in_chans * min(MAX_SIDE, height) * min(MAX_SIDE, width)
    return min(MAX_MISTAKES, MAX_MISTAKES_BYTES // num_bytes)
