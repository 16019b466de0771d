"""--tta flip: the mean softmax of an image and its mirror image, reported separately."""

import csv
import json

import pytest
import torch
from torch import nn

import evaluate
from lab.engine.evaluation import predict_logits


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


def test_with_output_the_report_is_next_to_that_directory(copied, tmp_path):
    argv = [str(copied), "--threads", "1", "--quiet", "--tta", "flip"]
    evaluate.main([*argv, "--output", str(tmp_path / "e")])
    for name in ("e", "e-tta-flip"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"report.json", "predictions.csv", "predictions.safetensors"}
    assert not (copied / "evaluate-test").exists()
