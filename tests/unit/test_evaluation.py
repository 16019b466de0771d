"""P1: predict_all counts every sample exactly once, with the same weights on all processes."""

import copy
import csv
import json

import pytest
import torch
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from trainers import FakeWorld, make_loader, place

import evaluate
from lab.engine import evaluation
from lab.engine.evaluation import Predictions, predict_all, predict_logits


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
    five = Predictions.of(torch.eye(5), torch.arange(5), tuple("abcde"))
    assert "top5_accuracy" not in five.report()  # it would be 1 for any model


def test_logits_are_gathered_up_to_a_number_of_bytes(accelerator, monkeypatch):
    for num_bytes, gathers in ((4 * 33 * 10, True), (4 * 33 * 10 - 1, False)):
        monkeypatch.setattr(evaluation, "MAX_LOGITS_BYTES", num_bytes)
        predictions = predict_all(accelerator, make_model(), make_loader(accelerator, seed=None))
        assert (predictions.logits is not None) == gathers


def test_p1_equal_logits_are_ranked_in_the_order_of_the_classes_and_nan_last():
    names = tuple("abcdefg")
    labels = torch.arange(7)
    assert Predictions.of(torch.ones(7, 7), labels, names).ranks.tolist() == list(range(7))
    assert Predictions.of(torch.full((7, 7), torch.nan), labels, names).ranks.tolist() == [7] * 7


# --tta flip: the mean softmax of an image and its mirror image, reported separately


def softmaxes(images):
    """Return a model, its logits for images, and its softmax for their mirror images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6))
    return model, model(images), model(images.flip(3)).softmax(1)


def test_without_tta_the_logits_are_the_models():
    images = torch.randn(7, 3, 4, 5)
    model, logits, _ = softmaxes(images)
    assert torch.equal(predict_logits(model, images, "none"), logits)


@pytest.mark.parametrize("scale", [1, 100])
def test_flip_gives_the_mean_softmax_of_both(scale):
    images = scale * torch.randn(7, 3, 4, 5)
    model, logits, flipped = softmaxes(images)
    expected = (logits.softmax(1) + flipped) / 2
    logits_mean = predict_logits(model, images, "flip")
    torch.testing.assert_close(logits_mean.softmax(1), expected)
    torch.testing.assert_close(logits_mean.exp(), expected)
    assert torch.isfinite(logits_mean).all()
    assert not torch.allclose(expected, logits.softmax(1))
    assert torch.equal(predict_logits(model, images.flip(3), "flip"), logits_mean)


def test_p1_evaluate_writes_a_separate_report(copied, capsys):
    plain = (copied / "report.json").read_bytes()
    evaluate.main([str(copied), "--threads", "1", "--quiet", "--tta", "flip"])
    assert (copied / "evaluate-test" / "report.json").read_bytes() == plain
    predictions = (copied / "predictions.csv").read_bytes()
    assert (copied / "evaluate-test" / "predictions.csv").read_bytes() == predictions
    directory = copied / "evaluate-test-tta-flip"
    report, before = json.loads((directory / "report.json").read_text()), json.loads(plain)
    assert report.keys() == before.keys() | {"tta"}
    assert (report["tta"], report["split"]) == ("flip", "test")
    assert report["loss"] != before["loss"]
    assert sum(map(sum, report["confusion_matrix"])) == report["num_samples"] == 100
    with open(directory / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    num_correct = sum(row["label"] == row["prediction"] for row in rows)
    assert report["accuracy"] == num_correct / 100
    headline, _, other = capsys.readouterr().out.partition("(--tta flip)")
    assert f"accuracy: {before['accuracy']:.4f}" in headline
    assert f"accuracy: {report['accuracy']:.4f}" in other
    assert f"report: {directory}" in other
