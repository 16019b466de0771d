"""The plots, images and page of a finished run."""

import dataclasses
import html
import json
import re
import shutil

import pytest
import torch
from handmade import HOSTILE, make_run, predicted, splits
from PIL import Image
from safetensors.torch import load_file, save_file

import compare
from lab.checkpoint.run_dir import RunDir
from lab.config import recipes
from lab.data.loaders import ResidentLoader
from lab.data.sampler import ShardedBatchSampler, random_bits
from lab.data.transforms import AUGMENTATIONS, BatchTransform
from lab.errors import UserError, run_script
from lab.report import html as html_module
from lab.report import mistakes, plots, results
from lab.report.run_reader import read_run

PLOTS = {"curves.png", "confusion_matrix.png", "per_class.png", "calibration.png", "mistakes.png",
         "batch.png"}  # fmt: skip
MAX_PAGE_BYTES = 3_000_000


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Return a run with plots and page, whose classes have hostile names."""
    path = make_run(tmp_path_factory.mktemp("made") / "hostile", augment="crop,cutout")
    plots.draw(path)
    html_module.write(path)
    return path


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """Return a run of 100 classes with 2,000 mistakes, whose images of noise do not compress."""
    names = [f"class number {k}" for k in range(100)]
    path = make_run(tmp_path_factory.mktemp("made") / "hundred", names, num_test=5000, size=40)
    plots.draw(path)
    html_module.write(path)
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


def test_compare_of_one_run_restores_plots_and_page(hostile, tmp_path, capsys):
    path = shutil.copytree(hostile, tmp_path / "run")
    shutil.rmtree(path / "plots")
    (path / "report.html").unlink()
    (path / "README.md").write_text("edited")
    compare.main([str(path)])
    assert capsys.readouterr().out == f"written: {path}/plots\nwritten: {path}/report.html\n"
    assert (path / "README.md").read_text() == "edited"
    for name in PLOTS:
        assert (path / "plots" / name).read_bytes() == (hostile / "plots" / name).read_bytes()
    page = (path / "report.html").read_text().replace(str(path), str(hostile))
    assert page == (hostile / "report.html").read_text()


@pytest.mark.parametrize("run", ["hostile", pytest.param("hundred", marks=pytest.mark.slow)])
def test_no_plot_is_blank_and_all_are_opaque(run, request):
    for name in PLOTS:
        with Image.open(request.getfixturevalue(run) / "plots" / name) as plot:
            assert plot.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert max(plot.size) < 4000
            assert len(plot.convert("RGB").reduce(4).getcolors(10**6)) > 20


@pytest.mark.parametrize("run", ["hostile", pytest.param("hundred", marks=pytest.mark.slow)])
def test_a_page_is_small_and_self_contained(run, request):
    page = request.getfixturevalue(run) / "report.html"
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


@pytest.mark.parametrize("run", ["hostile", pytest.param("hundred", marks=pytest.mark.slow)])
def test_the_page_has_the_metrics_of_the_run(run, request):
    path = request.getfixturevalue(run)
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
    for label, prediction, name, confidence, _ in shown:
        index = int(name.removeprefix("#"))
        assert (run.labels[index], run.predictions[index]) == (label, prediction)
        assert run.confidence[index] == pytest.approx(confidence, abs=1e-4)


def test_settings_that_differ_from_the_recipe_are_highlighted(hostile):
    rows = html_module.settings(read_run(hostile).config)
    highlighted = {name: (value, default) for name, value, default, differs in rows if differs}
    assert highlighted == {"augment": ("crop,cutout", "crop")}
    # Recipes do not set these.
    assert {default for name, _, default, _ in rows if name in ("image_size", "threads")} == {None}
    assert "name" not in {name for name, *_ in rows}


def test_long_names_are_shortened_in_the_middle():
    names = [f"class number {k:03}" for k in range(100)]
    for width in (9, 11, 12, 15):
        assert len({plots.short(name, width) for name in names}) == 100
        assert {len(plots.short(name, width)) for name in names} == {width}
    assert plots.short("class number 007", 12) == "class …r 007"
    assert [plots.short("cat", width) for width in (3, 2, 1)] == ["cat", "c…", "…"]


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_the_ticks_of_epochs_are_integers(hostile, num_epochs):
    run = read_run(hostile)
    figure = plots.curves(dataclasses.replace(run, history=run.history[:num_epochs]))
    for axes in figure.axes[:2]:
        low, high = axes.get_xlim()
        ticks = [x for x in axes.get_xticks() if low <= x <= high]
        assert ticks == {1: [1], 2: [1, 2]}[num_epochs]


def test_p6_the_page_says_on_which_split_the_epoch_was_selected(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    report = json.loads((path / "report.json").read_text()) | {"selection_split": "test"}
    (path / "report.json").write_text(json.dumps(report))
    assert "<strong>Note:</strong>" in html_module.write(path).read_text()
    assert "<strong>Note:</strong>" not in (hostile / "report.html").read_text()


def test_a_page_of_a_thousand_classes_lists_confusions_instead_of_the_matrix(tmp_path):
    path = make_run(tmp_path / "run", [str(k) for k in range(1000)], num_test=2000)
    text = html_module.write(path).read_text()
    assert len(text) < MAX_PAGE_BYTES
    assert 'id="matrix"' not in text
    assert text.count("data-cell=") == html_module.NUM_CONFUSIONS


def test_p2_the_saved_batch_is_what_the_model_sees():
    config = recipes.resolve({"dataset": "digits", "augment": "crop,flip,cutout", "batch_size": 50})
    data = splits("ab", num_test=2)
    images, index = mistakes.first_batch(config, data)
    assert len(index) == 50
    bits = random_bits(config.seed, 1, 80, "cpu")[index]
    expected = data.train.images[index]
    for name in ("crop", "flip", "cutout"):
        expected = AUGMENTATIONS[name](expected, bits)
    assert torch.equal(images, expected)


@pytest.mark.parametrize("mixes", ["flip,mixup", "cutmix"])
def test_p2_a_mixed_batch_equals_that_of_the_loader(mixes):
    settings = {"dataset": "digits", "augment": mixes, "batch_size": 70}
    config, data = recipes.resolve(settings), splits("ab", num_test=2)
    transform = BatchTransform(data.mean, data.std, config.augmentations, "cpu", config.mixup_alpha)
    sampler = ShardedBatchSampler(len(data.train.labels), 70, config.seed, rank=0, world_size=1)
    loader = ResidentLoader(data.train, sampler, transform, torch.device("cpu"))
    batch = next(iter(loader.batches(1)))
    assert batch.targets is not None
    images, index = mistakes.first_batch(config, data)
    assert torch.equal(index, batch.indices[:64])
    expected = ((batch.images[:64] - transform.shift) / transform.scale).round()
    assert torch.equal(images.float(), expected)


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


def test_large_images_are_resized_and_a_run_may_have_no_mistakes(tmp_path):
    path = make_run(tmp_path / "run", "ab", num_test=60, size=100)
    assert load_file(path / "images.safetensors")["batch"].shape == (64, 3, 64, 64)
    data, run = splits("ab", num_test=60, size=100), RunDir(path)
    config = recipes.resolve({"dataset": "digits"})
    perfect = predicted(data.test, right=1.1)
    run.write_report(
        {"split": "test", **perfect.report(), "best_epoch": 3, "selection_split": "test"}
    )
    run.write_predictions(perfect.csv(), perfect.safetensors())
    mistakes.save_images(run, config, data, perfect)
    plots.draw(path)
    assert "Images of 0 of the 0 mistakes are included" in html_module.write(path).read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is not the directory of a run: it has no config.json. Give a directory"),
        ("report.json", "is not finished. Finish it: train.py --resume "),
        ("history.jsonl", "is damaged: history.jsonl (No such file or directory). Restore it"),
    ],
)
def test_p7_a_missing_file_is_an_error_of_one_line(hostile, tmp_path, capsys, name, message):
    path = shutil.copytree(hostile, tmp_path / "run")
    (path / name).unlink()
    assert run_script(lambda: compare.main([str(path)])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(("num_logged", "label"), [(0, "epoch"), (1, "epoch"), (3, "step")])
def test_the_learning_rate_is_plotted_by_epoch_if_few_steps_were_logged(
    hostile, tmp_path, num_logged, label
):
    path = shutil.copytree(hostile, tmp_path / "run")
    lines = (path / "steps.jsonl").read_text().splitlines(keepends=True)
    (path / "steps.jsonl").write_text("".join(lines[:num_logged]))
    axes = plots.curves(read_run(path)).axes[2]
    [line] = axes.get_lines()
    assert axes.get_xlabel() == label
    assert list(line.get_ydata()) == pytest.approx([0.1, 0.05, 0.1 / 3])
    assert line.get_marker() == "o"


def test_the_page_has_the_metrics_of_each_epoch(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        row["val_macro_f1"] = 0.4321 + k
    del rows[2]["val_macro_f1"]  # may be missing
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = html_module.write(path).read_text()
    table = text[text.index(">Epochs</caption>") :].partition("</table>")[0]
    headings = [heading.strip() for heading in re.findall(r"<th[^>]*>([^<]*)</th>", table)]
    column = headings.index("validation macro-F1") - 1  # the epoch is the heading of its row
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr")[2:]]
    assert [row[column] for row in cells] == ["0.4321", "1.4321", "-"]


def test_class_names_are_not_shortened_if_there_is_room(tmp_path):
    names = ["cat", "Tomato Yellow Leaf Curl Virus", "n01494475 hammerhead shark",
             "thirty-six characters of a long name"]  # fmt: skip
    run = read_run(make_run(tmp_path / "run", names))
    for draw in (plots.confusion_matrix, plots.per_class):
        figure = draw(run)
        figure.draw_without_rendering()
        labels = figure.axes[0].get_yticklabels()
        shown = [re.sub(r" \(\d+\)$", "", label.get_text()) for label in labels]
        assert sorted(shown) == sorted(names)
        assert min(label.get_window_extent().x0 for label in labels) >= 0
    page = html_module.write(run.path).read_text()
    for name in names:
        assert f"<span>{name}</span></th>" in page


@pytest.mark.parametrize("name", ["images.safetensors", "predictions.csv"])
def test_without_images_the_other_plots_are_drawn(hostile, tmp_path, capsys, name):
    path = shutil.copytree(hostile, tmp_path / "run", ignore=shutil.ignore_patterns("plots", name))
    plots.draw(path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no plots of images")
    missing = {"mistakes.png", "batch.png"}
    missing |= {"calibration.png"} if name == "predictions.csv" else set()
    assert {p.name for p in (path / "plots").iterdir()} == PLOTS - missing
    assert embedded(html_module.write(path))["mistakes"] == []


@pytest.mark.parametrize(
    "damage", [{"batch": torch.zeros(1)}, {"mistakes_labels": torch.full((175,), 10)}, {}]
)
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
    results.draw(run, recipes.resolve({}), data, predicted(data.test))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the plots or the page could not be written: ")
