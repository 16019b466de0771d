"""Predictions for every sample of a split, each counted exactly once (promise P1)."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn

from lab.data.loaders import Loader
from lab.distributed import no_cudnn_benchmark
from lab.engine.calibration import coverage_table, expected_calibration_error
from lab.engine.metrics import report, roc_auc, scores

MAX_LOGITS_BYTES = 200_000_000  # float32 [N, K]; larger ones are not gathered


def predict_logits(model: nn.Module, images: Tensor, tta: str) -> Tensor:
    """Return the model's logits float32 [n, K] for images float32 [n, C, H, W].

    With `tta` "flip", return the logarithm of the mean softmax of each image and its mirror image,
    as Krizhevsky et al. 2012 (section 4.1) average over patches and their reflections. It can be
    used like logits, as its softmax is that mean.
    """
    logits = model(images).float()
    if tta == "none":
        return logits
    flipped_logits = model(images.flip(3)).float()
    return torch.logaddexp(logits.log_softmax(1), flipped_logits.log_softmax(1)) - math.log(2)


@dataclass(frozen=True)
class Predictions:
    """Predictions for a split, in its order, on the CPU, the same on every process."""

    labels: Tensor  # int64 [N]
    predictions: Tensor  # int64 [N]
    confidence: Tensor  # float64 [N], softmax of the predicted class
    losses: Tensor  # float64 [N], cross-entropy
    ranks: Tensor  # int64 [N], number of classes that come before the true class
    logits: Tensor | None  # float32 [N, K]; None if they take more than MAX_LOGITS_BYTES
    class_names: tuple[str, ...]

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> "Predictions":
        """Return the predictions by logits float32 [N, K] for samples with labels int64 [N]."""
        predictions, confidence, losses, ranks = _columns(logits, labels)
        return cls(
            labels, predictions, confidence.double(), losses.double(), ranks, logits, class_names
        )

    @classmethod
    def mean(cls, members: Sequence["Predictions"]) -> "Predictions":
        """Return the predictions by the mean probabilities of several models (an ensemble).

        All `members` have logits and the same samples and classes. The softmax of the result's
        logits is the mean.
        """
        first, *others = members
        if not others:
            return first
        logits = _log_probabilities(first)
        for member in others:
            logits = torch.logaddexp(logits, _log_probabilities(member))
        return cls.of(logits, first.labels, first.class_names)

    def csv(self, files: Sequence[str] | None = None) -> bytes:
        """Return a CSV file with one row for each sample: index, label, prediction, confidence
        and class names, and the sample's file if `files` [N] is given.

        The encoding is UTF-8; file and directory names that are not valid UTF-8 keep their bytes.
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

    def safetensors(self) -> bytes | None:
        """Return a safetensors file with the tensor `probabilities`, float32 [N, K], or None."""
        if self.logits is None:
            return None
        return safetensors.torch.save({"probabilities": self.logits.softmax(1)})

    def scores(self) -> dict[str, float]:
        """Return loss, accuracy and macro-F1, without the tables that `report` builds."""
        return scores(self.labels, self.predictions, self.losses, len(self.class_names))

    def report(self) -> dict:
        """Return the metrics of report.json, which docs/metrics.md defines."""
        metrics = report(self.labels, self.predictions, self.losses, self.class_names)
        if len(self.class_names) > 5:
            metrics["top5_accuracy"] = (self.ranks < 5).sum().item() / len(self.ranks)
        if self.logits is not None:
            metrics["roc_auc"] = roc_auc(self.labels, self.logits.softmax(1))
        correct = self.predictions == self.labels
        metrics["calibration_error"] = expected_calibration_error(self.confidence, correct)
        metrics["coverage"] = coverage_table(self.confidence, correct)
        return metrics


def _log_probabilities(predictions: Predictions) -> Tensor:
    assert predictions.logits is not None
    return predictions.logits.log_softmax(1)


def _columns(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the columns predictions, confidence, losses and ranks of `Predictions`, each [n].

    Logits are float32 [n, K], labels int64 [n]. Of equal logits, the first comes first, as in
    `argmax`; all classes come before one whose logit is NaN.
    """
    losses = F.cross_entropy(logits, labels, reduction="none")
    confidence, predictions = logits.softmax(1).max(1)
    own = logits.gather(1, labels[:, None])
    is_earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    ranks = (~(logits <= own) | ((logits == own) & is_earlier)).sum(1)
    return predictions, confidence, losses, ranks


@torch.no_grad()
def predict_all(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    tta: str = "none",
    temperature: float = 1.0,
) -> Predictions:
    """Return the predictions for a whole split, gathered across processes by sample index.

    `model` has no DistributedDataParallel wrapper, whose forward would wait for the other processes
    when they have different numbers of batches. For `tta` see `predict_logits`; the logits are
    divided by `temperature`, which changes confidences and losses but no prediction.

    Raises `RuntimeError` on every process if a sample was not evaluated exactly once.
    """
    if accelerator.num_processes > 1:  # BatchNorm statistics differ between processes until here
        for buffer in model.buffers():
            broadcast(buffer)
    model.eval()
    # Accelerate's gather_for_metrics guesses how many samples to drop: gather by index instead.
    # Row 0 counts the evaluations of each sample. float32 represents all of these values exactly.
    num_samples, num_classes = loader.sampler.num_samples, len(loader.class_names)
    table = torch.zeros(6, num_samples, device=accelerator.device)
    all_logits = None
    if 4 * num_samples * num_classes <= MAX_LOGITS_BYTES:
        all_logits = torch.zeros(num_samples, num_classes, device=accelerator.device)
    # Autocast around all batches converts the weights only once.
    with accelerator.autocast(), no_cudnn_benchmark():
        for batch in loader.batches():
            logits = predict_logits(model, batch.images, tta) / temperature
            predicted = _columns(logits, batch.labels)
            columns = (torch.ones_like(batch.labels), batch.labels, *predicted)
            table.index_add_(1, batch.indices, torch.stack([c.float() for c in columns]))
            if all_logits is not None:
                all_logits.index_add_(0, batch.indices, logits)
    table = accelerator.reduce(table).cpu()
    counts, labels, predictions, confidence, losses, ranks = table
    if not bool((counts == 1).all()):  # the reduced table is the same on all processes: all raise
        raise RuntimeError(
            f"not every sample was evaluated exactly once: of {len(counts)} samples, "
            f"{int((counts == 0).sum())} were missing and {int((counts > 1).sum())} repeated"
        )
    return Predictions(
        labels.long(),
        predictions.long(),
        confidence.double(),
        losses.double(),
        ranks.long(),
        None if all_logits is None else accelerator.reduce(all_logits).cpu(),
        loader.class_names,
    )
