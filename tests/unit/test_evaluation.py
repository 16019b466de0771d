"""P1: predict_all counts every sample exactly once, with the same weights on all processes."""

import copy

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from trainers import FakeWorld, make_loader, place

from lab.engine import evaluation
from lab.engine.evaluation import predict_all


@pytest.fixture(scope="module")
def accelerator():
    return place("cpu")


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 10))


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda batches: batches[:-1], "1 were missing and 0 repeated"),
        (lambda batches: [*batches, batches[1]], "0 were missing and 8 repeated"),
        (lambda batches: [*batches[:-1], batches[0]], "1 were missing and 8 repeated"),
        (lambda batches: [], "33 were missing and 0 repeated"),
    ],
    ids=["missing", "repeated", "one instead of another", "all missing"],
)
def test_p1_a_missing_or_repeated_sample_raises(accelerator, change, counts):
    model = make_model()
    loader = make_loader(accelerator, seed=None)  # 33 samples, batches of 8
    assert len(predict_all(accelerator, model, loader).labels) == 33
    batches = change(list(loader.batches()))
    loader.batches = lambda: batches
    with pytest.raises(RuntimeError, match=f"of 33 samples, {counts}"):
        predict_all(accelerator, model, loader)


def test_p1_every_process_evaluates_with_the_buffers_of_rank_0(accelerator, monkeypatch):
    loader, main = make_loader(accelerator, seed=None), make_model()
    expected = predict_all(accelerator, main, loader)
    own = copy.deepcopy(main)  # after training on other samples
    own[1].running_mean += 1
    assert not torch.equal(predict_all(accelerator, own, loader).losses, expected.losses)
    buffers = iter(main.buffers())
    monkeypatch.setattr(evaluation, "broadcast", lambda buffer: buffer.copy_(next(buffers)))
    actual = predict_all(FakeWorld(accelerator, 2), own, loader)
    assert torch.equal(actual.losses, expected.losses)
    assert next(buffers, None) is None


def test_p1_top5_accuracy_equals_scikit_learn(accelerator):
    predictions = predict_all(accelerator, make_model(), make_loader(accelerator, seed=None))
    report, labels = predictions.report(), predictions.labels
    expected = [
        top_k_accuracy_score(labels, predictions.logits, k=k, labels=range(10)) for k in (4, 5, 6)
    ]
    assert len(set(expected)) == 3
    assert report["top5_accuracy"] == pytest.approx(expected[1], abs=1e-9)
