"""The plots, images and page of a finished run."""

import html
import json
import os
import re
import shutil
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from handmade import HOSTILE, make_run, predicted, splits
from PIL import Image
from safetensors.torch import load_file, save_file

import compare
from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.data.images import AugmentedImages
from lab.data.loaders import LoaderOptions, ResidentLoader, build_loader
from lab.data.sampler import ShardedBatchSampler
from lab.data.transforms import BatchTransform, EvalTransform, SampleTransform
from lab.errors import UserError
from lab.models import with_input_defaults
from lab.report import explain, mistakes, plots, results
from lab.report import html as html_module
from lab.report.run_reader import read_run

PLOTS = {"curves.png", "confusion_matrix.png", "per_class.png", "calibration.png", "mistakes.png",
         "batch.png"}  # fmt: skip
MAX_PAGE_BYTES = 3_000_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return a run with plots and page, whose classes have hostile names."""
    path = make_run(tmp_path_factory.mktemp("made") / "hostile", augment="crop,cutout")
    (path / "README.md").write_text("edited")
    compare.main([str(path)])
    return path


def embedded(path):
    """Return the JSON data of a page."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>',
                        path.read_text(), re.DOTALL)  # fmt: skip
    return json.loads(text)


def test_training_writes_plots_images_and_page(finished):
    assert {p.name for p in (finished / "plots").iterdir()} == PLOTS
    assert "<h1>lenet5 on digits</h1>" in (finished / "report.html").read_text()
    assert len(load_file(finished / "images.safetensors")["batch"]) == 32


def test_compare_of_one_run_draws_its_plots_and_page_and_leaves_the_card(hostile):
    assert {p.name for p in (hostile / "plots").iterdir()} == PLOTS
    assert (hostile / "report.html").exists()
    assert (hostile / "README.md").read_text() == "edited"


def test_no_plot_is_blank_and_all_are_opaque(hostile):
    for name in PLOTS:
        with Image.open(hostile / "plots" / name) as plot:
            assert plot.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert max(plot.size) < 4000
            assert len(plot.convert("RGB").reduce(4).getcolors(10**6)) > 20


def test_a_page_is_small_and_self_contained(hostile):
    page = hostile / "report.html"
    assert page.stat().st_size < MAX_PAGE_BYTES
    text = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {link.partition(":")[0] for link in links} == {"data"} | {f"plots/{n}" for n in PLOTS}
    assert "default-src 'none'" in text


def test_p4_hostile_names_stay_text(hostile):
    text = (hostile / "report.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2  # the page's own
    assert "<img src=x" not in text
    assert "<b>" not in text
    assert "{{" in html.unescape(text)  # a name, not expanded as a template
    names = [name.replace("\udcff", "?") or "(no name)" for name in HOSTILE]
    assert [name.replace("\udcff", "?") for name in embedded(hostile / "report.html")["names"]] == (
        names
    )


def test_the_page_has_the_metrics_of_the_run(hostile):
    path = hostile
    run, text = read_run(path), (path / "report.html").read_text()
    for key in ("accuracy", "macro_f1", "balanced_accuracy", "calibration_error", "loss"):
        assert f"<dd>{run.report[key]:.4f}</dd>" in text
    low, high = run.report["accuracy_interval"]
    assert f"{low:.3f} to {high:.3f}" in text
    for row in run.report["coverage"]:
        assert f'<td class="n">{row["min_confidence"]:.4f}</td>' in text
    cells = re.findall(r'<button data-cell="(\d+),(\d+)">([\d,]+)</button>', text)
    matrix = run.report["confusion_matrix"]
    expected = {(i, j): n for i, row in enumerate(matrix) for j, n in enumerate(row) if n}
    expected = {cell: n for cell, n in expected.items() if cell[0] != cell[1]}
    assert {(int(i), int(j)): int(n.replace(",", "")) for i, j, n in cells} == expected
    shown = embedded(path / "report.html")["mistakes"]
    assert len(shown) > 100
    for label, prediction, name, confidence, *_ in shown:
        index = int(name.removeprefix("#"))
        assert (run.labels[index], run.predictions[index]) == (label, prediction)
        assert run.confidence[index] == pytest.approx(confidence, abs=1e-4)


def test_p6_the_page_says_on_which_split_the_epoch_was_selected(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    report = json.loads((path / "report.json").read_text()) | {"selection_split": "test"}
    (path / "report.json").write_text(json.dumps(report))
    assert "<strong>Note:</strong>" in html_module.write(path).read_text()
    assert "<strong>Note:</strong>" not in (hostile / "report.html").read_text()


def test_a_page_of_many_classes_lists_confusions_instead_of_the_matrix(tmp_path):
    path = make_run(tmp_path / "run", [str(k) for k in range(130)], num_test=400)
    text = html_module.write(path).read_text()
    assert len(text) < MAX_PAGE_BYTES
    assert 'id="matrix"' not in text
    assert text.count("data-cell=") == html_module.NUM_CONFUSIONS


@pytest.mark.parametrize(
    ("mixes", "balanced"), [("flip,mixup", False), ("cutmix", False), ("crop,mixup", True)]
)
def test_p2_a_mixed_batch_equals_that_of_the_loader(mixes, balanced):
    settings = {"dataset": "digits", "augment": mixes, "batch_size": 70}
    settings["balanced_sampling"] = balanced
    config, data = recipes.resolve(settings), splits("ab", num_test=2)
    transform = BatchTransform(data.mean, data.std, config.augmentations, "cpu", config.mixup_alpha)
    sampler = ShardedBatchSampler(
        len(data.train.labels), 70, config.seed, rank=0, world_size=1, labels=data.train.labels,
        balanced_sampling=balanced,
    )  # fmt: skip
    loader = ResidentLoader(data.train, sampler, transform, torch.device("cpu"))
    batch = next(iter(loader.batches(1)))
    assert batch.targets is not None
    images, index = mistakes.first_batch(config, data)
    assert torch.equal(index, batch.indices[:64])
    expected = ((batch.images[:64] - transform.shift) / transform.scale).round()
    assert torch.equal(images.float(), expected)


def test_p2_the_first_batch_is_shown_with_the_augmentation_of_the_workers():
    config, data = recipes.resolve({"dataset": "digits"}), splits("ab", num_test=2)
    names = ("resized-crop", "trivialaugment")
    transform = SampleTransform(names, EvalTransform(data.train.images.shape[2]), (0.0,))
    augmented = AugmentedImages(data.train.images, data.train.images, transform)
    data = replace(data, train=replace(data.train, images=augmented))
    options = LoaderOptions(0, 1, torch.device("cpu"), "streaming", 0, 0.0)
    normalize = BatchTransform(data.mean, data.std, (), "cpu")
    loader = build_loader(
        data.train, normalize, options, batch_size=config.batch_size, seed=config.seed
    )
    batch = next(iter(loader.batches(1)))
    images, index = mistakes.first_batch(replace(config, augment=",".join(names)), data)
    assert torch.equal(index, batch.indices[:64])
    expected = ((batch.images[:64] - normalize.shift) / normalize.scale).round()
    assert torch.equal(images.float(), expected)


def test_the_automatic_number_of_epochs_does_not_differ_from_the_recipe():
    config = with_input_defaults(recipes.resolve({"dataset": "photos"}))
    config = recipes.resolve_epochs(config, 10)
    assert [row[0] for row in html_module.settings(asdict(config)) if row[3]] == []
    config = replace(config, lr=0.5)
    assert [row[0] for row in html_module.settings(asdict(config)) if row[3]] == ["lr"]


def test_the_most_confident_mistakes_of_every_cell_are_selected():
    predictions = predicted(splits([str(k) for k in range(30)], num_test=6000, size=1).test)
    wrong = (predictions.labels != predictions.predictions).nonzero().flatten().tolist()
    selected = mistakes.select_mistakes(predictions, 1200).tolist()
    assert len(set(selected)) == len(selected) == 1200
    assert set(selected) <= set(wrong)
    by_confidence = sorted(wrong, key=lambda i: -predictions.confidence[i])
    assert selected[:24] == by_confidence[:24]

    pairs = list(zip(predictions.labels.tolist(), predictions.predictions.tolist(), strict=True))
    cells = {pairs[i]: [] for i in wrong}
    for i in by_confidence:
        cells[pairs[i]].append(i)
    for cell in cells.values():
        selected_of_cell = sorted(set(cell) & set(selected), key=cell.index)
        assert selected_of_cell
        assert selected_of_cell == cell[: len(selected_of_cell)]
    sizes = [len(cells[pairs[i]]) for i in selected[24 : 24 + len(cells) // 2]]  # the first of each
    assert sizes == sorted(sizes, reverse=True)


def test_a_page_with_a_part_of_the_mistakes_has_their_number(hostile, monkeypatch):
    run = read_run(hostile)
    monkeypatch.setattr(html_module, "MAX_IMAGE_BYTES", 20_000)
    context = html_module._run_context(run)
    assert 0 < context["num_images"] < context["num_mistakes"]
    assert context["num_mistakes"] == (run.predictions != run.labels).sum()


def test_the_plots_show_the_numbers_of_the_run(hostile, tmp_path):
    run = read_run(hostile)
    classes, matrix = run.report["per_class"], np.array(run.report["confusion_matrix"])

    loss, _, rate = plots.curves(run).axes
    train, val, _, best = (line.get_xydata().tolist() for line in loss.lines)
    assert train == [[1, 1], [2, 1 / 2], [3, 1 / 3]]
    assert val == [[epoch, 1.1 / epoch] for epoch in (1, 2, 3)]
    assert best == val[-1:]
    assert rate.lines[0].get_xydata().tolist() == [[10, 0.1], [20, 0.1 / 2], [30, 0.1 / 3]]
    (tmp_path / "steps.jsonl").write_text('{"step": 10, "learning_rate": 0.1}\n')
    rate = plots.curves(replace(run, path=tmp_path)).axes[2]  # fewer steps than epochs
    assert rate.get_xlabel() == "epoch"
    assert rate.lines[0].get_xydata().tolist() == [[1, 0.1], [2, 0.1 / 2], [3, 0.1 / 3]]

    axes = plots.confusion_matrix(run).axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted class", "true class")
    assert np.allclose(axes.images[0].get_array(), matrix / matrix.sum(1, keepdims=True))
    shown = {text.get_position()[::-1]: text.get_text().split()[0] for text in axes.texts}
    assert shown == {(i, j): str(matrix[i, j]) for i, j in zip(*matrix.nonzero(), strict=True)}

    axes = plots.per_class(run).axes[0]
    for points, key in zip(axes.collections[1:], ("precision", "recall", "f1"), strict=True):
        values = points.get_offsets()[:, 0].tolist()
        assert values == [row[key] for row in sorted(classes, key=lambda row: row["f1"])]
        assert axes.get_xlim()[0] < min(values) <= max(values) < axes.get_xlim()[1]
    assert axes.lines[0].get_xdata()[0] == run.report["macro_f1"]

    correct = run.predictions == run.labels
    reliability, selective = plots.calibration(replace(run, confidence=run.confidence / 2)).axes
    bins = reliability.lines[1].get_xydata()
    assert len(bins) == 8  # of 15; without those that have no samples
    assert bins[:, 0].min() > 0
    accuracy, threshold = (line.get_xydata() for line in selective.lines)
    assert accuracy[-1].tolist() == [1, pytest.approx(correct.mean())]
    assert threshold[-1].tolist() == [1, run.confidence.min() / 2]

    [axes] = plots.mistakes(run, run.images()).axes
    assert f"24 most confident of {(~correct).sum()} mistakes" in axes.get_title()
    shown = [float(text.get_text().split()[-2]) for text in axes.texts]
    expected = sorted(100 * run.confidence[~correct], reverse=True)[:24]
    assert shown == [round(value, 1) for value in expected]


def test_file_names_that_are_not_utf8_are_read_as_they_are(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    files = [os.fsdecode(b"%d\xff.png" % i) for i in range(500)]
    content = predicted(splits(HOSTILE, num_test=500).test).csv(files)
    (path / "predictions.csv").write_bytes(content)
    assert read_run(path).files == files


def test_without_predictions_the_other_plots_are_drawn(hostile, tmp_path, capsys):
    ignored = shutil.ignore_patterns("plots", "predictions.csv")
    path = shutil.copytree(hostile, tmp_path / "run", ignore=ignored)
    plots.draw(path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no plots of images")
    missing = {"mistakes.png", "batch.png", "calibration.png"}
    assert {p.name for p in (path / "plots").iterdir()} == PLOTS - missing
    assert embedded(html_module.write(path))["mistakes"] == []


@pytest.mark.parametrize("damage", [{"batch": torch.zeros(1)}, {}])
def test_p7_damaged_images_are_an_error(hostile, tmp_path, damage):
    path = shutil.copytree(hostile, tmp_path / "run")
    file = path / "images.safetensors"
    save_file(load_file(file) | damage, file)
    if not damage:
        file.write_bytes(file.read_bytes()[:-1])
    for make in (plots.draw, html_module.write):
        with pytest.raises(UserError, match=r"run is damaged"):
            make(path)


def test_a_failure_to_draw_is_only_a_warning(tmp_path, capsys, monkeypatch):
    run, data = RunDir(make_run(tmp_path / "run")), splits("ab", num_test=9)
    monkeypatch.delenv("LAB_DRAW")
    monkeypatch.setattr(plots, "curves", lambda run: 1 / 0)
    monkeypatch.setattr(results.explain, "load_grad_cam", lambda *_: None)  # it has no weights
    results.draw(run, recipes.resolve({}), data, predicted(data.test), torch.device("cpu"))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the plots or the page could not be written: ")


def test_a_run_is_explained_if_captum_is_installed_and_the_model_has_a_map(finished, monkeypatch):
    run, cpu = RunDir(finished), torch.device("cpu")
    assert explain.load_grad_cam(run, cpu) is not None
    assert "heatmaps" in load_file(finished / "images.safetensors")
    monkeypatch.setattr(explain, "find_layer", lambda *_: None)
    assert explain.load_grad_cam(run, cpu) is None
    monkeypatch.setattr(explain, "find_spec", lambda name: None)
    assert explain.load_grad_cam(run, cpu) is None
