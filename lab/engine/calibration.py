"""How far a model's confidence can be trusted, and the temperature that corrects it.

Confidence is the softmax of the predicted class. Source: Guo et al. 2017, "On Calibration of Modern
Neural Networks".
"""

import math

import torch
from torch import Tensor

from lab.errors import UserError

NUM_BINS = 15  # of Guo et al.
COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)
MAX_TEMPERATURE = 100.0


def reliability_bins(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the samples, the accuracy and the mean confidence of equal intervals of confidence.

    `confidence` is float64 [N], `correct` bool [N]; the results have NUM_BINS elements, float64. An
    interval without samples has accuracy and confidence 0.
    """
    # Open at the lower end. A confidence that is not a number makes its mean not a number.
    bins = (confidence.nan_to_num() * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    rows = torch.stack([torch.ones_like(confidence), correct.double(), confidence])
    counts, accuracy, mean = torch.zeros(3, NUM_BINS, dtype=torch.float64).index_add_(1, bins, rows)
    return counts, accuracy / counts.clamp(min=1), mean / counts.clamp(min=1)


def expected_calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """Return the mean difference between confidence and accuracy of the bins, by their samples."""
    counts, accuracy, mean = reliability_bins(confidence, correct)
    return ((counts * (accuracy - mean).abs()).sum() / counts.sum()).item()


def coverage_curve(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the thresholds of confidence, and the coverage and accuracy at each.

    Coverage is the fraction of the samples whose confidence is at least the threshold, accuracy
    that of these samples. The thresholds, float64 [n], are the values of `confidence`, descending.
    """
    ordered, order = confidence.sort(descending=True)
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64)
    accuracy = correct[order].cumsum(0) / counts
    last = torch.ones_like(ordered, dtype=torch.bool)  # of the samples with the same confidence
    last[:-1] = ordered[1:] != ordered[:-1]
    return ordered[last], (counts / len(ordered))[last], accuracy[last]


def coverage_table(confidence: Tensor, correct: Tensor) -> list[dict[str, float]]:
    """Return the point of the coverage curve at, or the first above, each of COVERAGES."""
    thresholds, coverage, accuracy = coverage_curve(confidence, correct)
    columns = torch.stack([coverage, thresholds, accuracy])
    wanted = torch.tensor(COVERAGES, dtype=torch.float64) - 1e-9  # for the rounding of n / N
    points = torch.searchsorted(coverage, wanted).unique()
    names = ("coverage", "min_confidence", "accuracy")
    return [dict(zip(names, columns[:, i].tolist(), strict=True)) for i in points.flip(0)]


def fit_temperature(logits: Tensor | None, labels: Tensor) -> float:
    """Return the temperature that minimizes the cross-entropy of `logits / temperature`.

    Logits are float32 [N, K], or None if they were too large to keep; labels are int64 [N]. Raise
    `UserError` without logits, or if there is no minimum between 1 / MAX_TEMPERATURE and
    MAX_TEMPERATURE: if all predictions are correct, the loss falls with the temperature.
    """
    if logits is None:
        raise UserError(
            "--calibrate needs the logits of all samples, and they take more than 200 MB",
            "Give --max-eval-samples",
        )
    relative = logits.double() - logits.gather(1, labels[:, None])

    def derivatives(inverse: float) -> tuple[float, float]:
        """Return those of the loss over 1 / temperature, in which it is convex."""
        probabilities = (relative * inverse).softmax(1)
        mean = torch.linalg.vecdot(probabilities, relative)
        variance = torch.linalg.vecdot(probabilities, relative.square()) - mean.square()
        return mean.mean().item(), variance.mean().item()

    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE
    if not derivatives(low)[0] < 0 < derivatives(high)[0]:
        raise UserError(
            f"no temperature fits these {len(labels)} samples: the predictions are all correct, or "
            "no better than chance",
            "Use a larger validation split, or train longer",
        )
    inverse = 1.0
    while high / low > 1 + 1e-9:  # Newton's method, or bisection where it leaves the interval
        slope, curvature = derivatives(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        last, inverse = inverse, inverse - slope / max(curvature, 1e-300)
        if abs(inverse / last - 1) < 1e-9:
            break
        if not low < inverse < high:
            inverse = math.sqrt(low * high)
    return 1 / inverse
