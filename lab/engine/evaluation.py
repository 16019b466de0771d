"""predict_all: what a network says of every sample of a split, each seen once (promise P1)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lab.data.loaders import Loader
from lab.distributed import no_cudnn_benchmark
from lab.engine.metrics import report, scores


def predict_logits(model: nn.Module, images: Tensor, tta: str) -> Tensor:
    """The network's logits float32 [n, K] of images [n, C, H, W].

    With `tta` "flip", logarithms of class probabilities: the mean of the softmax for each image and
    for it mirrored left to right, as Krizhevsky et al. 2012 (section 4.1) average those of patches
    and their reflections. They serve as logits: their softmax is the mean.
    """
    logits = model(images).float()
    if tta == "none":
        return logits
    mirrored = model(images.flip(3)).float()
    return torch.logaddexp(logits.log_softmax(1), mirrored.log_softmax(1)) - math.log(2)


@dataclass(frozen=True)
class Predictions:
    """One entry a sample, in the split's order, on the CPU, the same on every process."""

    labels: Tensor  # int64 [N]
    predictions: Tensor  # int64 [N]
    confidence: Tensor  # float64 [N], softmax of the predicted class
    losses: Tensor  # float64 [N], cross-entropy
    class_names: tuple[str, ...]

    def csv(self, files: Sequence[str] | None = None) -> bytes:
        """Return a CSV row for each sample: index, label, prediction, confidence, and class names.

        If samples come from `files` [N], the last column is the file. Names are UTF-8, but for
        names of files and folders that are not: these keep their bytes.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        labels, predictions = self.labels.tolist(), self.predictions.tolist()
        columns: dict[str, Sequence[object]] = {
            "index": range(len(labels)),
            "label": labels,
            "prediction": predictions,
            "confidence": [f"{value:.6f}" for value in self.confidence.tolist()],
            "label_name": [self.class_names[label] for label in labels],
            "prediction_name": [self.class_names[label] for label in predictions],
        }
        if files is not None:
            columns["file"] = files
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        return text.getvalue().encode("utf-8", "surrogateescape")

    def scores(self) -> dict[str, float]:
        """Return loss, accuracy and macro-F1, without the tables that `report` builds."""
        return scores(self.labels, self.predictions, self.losses, len(self.class_names))

    def report(self) -> dict:
        """The numbers of report.json, but for what they were measured on."""
        return report(self.labels, self.predictions, self.losses, self.class_names)


@torch.no_grad()
def predict_all(
    accelerator: Accelerator, model: nn.Module, loader: Loader, tta: str = "none"
) -> Predictions:
    """The predictions for a whole split, gathered across processes by the samples' index.

    `tta` "flip": of each picture and its mirror image together (`lab.engine.evaluation`).
    `network` is the plain one: processes may have different numbers of batches, and
    DistributedDataParallel's forward would wait for its peers.

    Raises `RuntimeError`, on every process, if a sample was not seen exactly once.
    """
    if accelerator.num_processes > 1:  # BatchNorm's statistics are each process's own until here
        for buffer in model.buffers():
            broadcast(buffer)
    model.eval()
    # Accelerate's gather_for_metrics trims by a count that it guesses: gather by index instead.
    # Row 0 counts how often each sample was seen; float32 holds each value here exactly.
    table = torch.zeros(5, loader.sampler.num_samples, device=accelerator.device)
    # Around all batches: weights are converted once.
    with accelerator.autocast(), no_cudnn_benchmark():
        for batch in loader.batches():
            logits = predict_logits(model, batch.images, tta)
            losses = F.cross_entropy(logits, batch.labels, reduction="none")
            confidence, predictions = logits.softmax(1).max(1)
            columns = (torch.ones_like(losses), batch.labels, predictions, confidence, losses)
            table.index_add_(1, batch.indices, torch.stack([c.float() for c in columns]))
    table = accelerator.reduce(table).cpu()
    seen, labels, predictions, confidence, losses = table
    if not bool((seen == 1).all()):  # the reduced table is the same everywhere: all raise
        raise RuntimeError(
            f"the evaluation did not see every sample exactly once: of {len(seen)} samples, "
            f"{int((seen == 0).sum())} were missing and {int((seen > 1).sum())} repeated"
        )
    return Predictions(
        labels.long(),
        predictions.long(),
        confidence.double(),
        losses.double(),
        loader.class_names,
    )
