"""--tta flip: the mean softmax of a picture and its mirror image, apart from the plain result."""

import csv
import json

import pytest
import torch
from torch import nn

import evaluate
from lab.engine.evaluation import predict_logits


def softmaxes(images):
    """A network, and what it says of images and of their mirror images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 6))
    return model, model(images), model(images.flip(3)).softmax(1)


def test_plain_outputs_are_the_networks_own():
    images = torch.randn(7, 3, 4, 5)
    model, logits, _ = softmaxes(images)
    assert torch.equal(predict_logits(model, images, "none"), logits)


@pytest.mark.parametrize("scale", [1, 100])
def test_flip_gives_the_mean_softmax_of_both(scale):
    images = scale * torch.randn(7, 3, 4, 5)
    model, logits, mirrored = softmaxes(images)
    expected = (logits.softmax(1) + mirrored) / 2
    found = predict_logits(model, images, "flip")
    torch.testing.assert_close(found.softmax(1), expected)
    torch.testing.assert_close(found.exp(), expected)
    assert torch.isfinite(found).all()
    assert not torch.allclose(expected, logits.softmax(1))
    assert torch.equal(predict_logits(model, images.flip(3), "flip"), found)


def test_p1_evaluate_reports_it_apart(copied, capsys):
    plain = (copied / "report.json").read_bytes()
    evaluate.main([str(copied), "--threads", "1", "--quiet", "--tta", "flip"])
    assert (copied / "evaluate-test" / "report.json").read_bytes() == plain
    predictions = (copied / "predictions.csv").read_bytes()
    assert (copied / "evaluate-test" / "predictions.csv").read_bytes() == predictions
    apart = copied / "evaluate-test-tta-flip"
    report, before = json.loads((apart / "report.json").read_text()), json.loads(plain)
    assert report.keys() == before.keys() | {"tta"}
    assert (report["tta"], report["split"]) == ("flip", "test")
    assert report["loss"] != before["loss"]
    assert sum(map(sum, report["confusion_matrix"])) == report["num_samples"] == 100
    with open(apart / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    num_correct = sum(row["label"] == row["prediction"] for row in rows)
    assert report["accuracy"] == num_correct / 100
    headline, _, other = capsys.readouterr().out.partition("(--tta flip)")
    assert f"accuracy: {before['accuracy']:.4f}" in headline
    assert f"accuracy: {report['accuracy']:.4f}" in other
    assert f"report: {apart}" in other


def test_with_an_output_folder_it_lies_beside_that(copied, tmp_path):
    words = [str(copied), "--threads", "1", "--quiet", "--tta", "flip"]
    evaluate.main([*words, "--output", str(tmp_path / "e")])
    for name in ("e", "e-tta-flip"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert files == {"report.json", "predictions.csv"}
    assert not (copied / "evaluate-test").exists()
