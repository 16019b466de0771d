"""The pictures and the page of a finished run, from its files alone."""

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
from lab.report import mistakes, plots
from lab.report.run_reader import read_run

PLOTS = {"curves.png", "confusion_matrix.png", "per_class.png", "mistakes.png", "batch.png"}
LIMIT = 3_000_000  # bytes of a page


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A drawn run whose classes have hostile names."""
    path = make_run(tmp_path_factory.mktemp("made") / "hostile", augment="crop,cutout")
    plots.draw(path)
    html_module.write(path)
    return path


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """A drawn run of 100 classes with 2,000 mistakes of noise, which nothing compresses."""
    names = [f"class number {k}" for k in range(100)]
    path = make_run(tmp_path_factory.mktemp("made") / "hundred", names, num_test=5000, size=40)
    plots.draw(path)
    html_module.write(path)
    return path


def embedded(path):
    """The JSON that a page holds."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>',
                        path.read_text(), re.DOTALL)  # fmt: skip
    return json.loads(text)


def test_a_training_leaves_its_pictures_and_its_page(finished):
    assert {p.name for p in (finished / "plots").iterdir()} == PLOTS
    assert "<h1>lenet5 on digits</h1>" in (finished / "report.html").read_text()
    assert len(load_file(finished / "images.safetensors")["batch"]) == 32


def test_what_was_deleted_is_drawn_again(hostile, tmp_path, capsys):
    path = shutil.copytree(hostile, tmp_path / "run")
    shutil.rmtree(path / "plots")
    (path / "report.html").unlink()
    (path / "README.md").write_text("edited")
    compare.main([str(path)])
    assert capsys.readouterr().out == f"written: {path}/plots\nwritten: {path}/report.html\n"
    assert (path / "README.md").read_text() == "edited"
    for name in PLOTS:
        assert (path / "plots" / name).read_bytes() == (hostile / "plots" / name).read_bytes()
    drawn = (path / "report.html").read_text().replace(str(path), str(hostile))
    assert drawn == (hostile / "report.html").read_text()


@pytest.mark.parametrize("run", ["hostile", "hundred"])
def test_every_picture_shows_something_on_an_opaque_white_card(run, request):
    for name in PLOTS:
        with Image.open(request.getfixturevalue(run) / "plots" / name) as picture:
            assert picture.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
            assert max(picture.size) < 4000
            assert len(picture.convert("RGB").reduce(4).getcolors(10**6)) > 20


@pytest.mark.parametrize("run", ["hostile", "hundred"])
def test_a_page_is_small_and_needs_nothing_else(run, request):
    page = request.getfixturevalue(run) / "report.html"
    assert page.stat().st_size < LIMIT
    text = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {link.partition(":")[0] for link in links} == {"data"} | {f"plots/{n}" for n in PLOTS}
    assert "default-src 'none'" in text


def test_p4_hostile_names_stay_text(hostile):
    text = (hostile / "report.html").read_text()
    assert text.count("<script") == text.count("</script>") == 2  # the page's own
    assert "<img src=x" not in text
    assert "<b>" not in text
    assert "{{" in html.unescape(text)  # a name, which no template has filled in
    names = [name.replace("\udcff", "?") or "(no name)" for name in HOSTILE]
    assert [name.replace("\udcff", "?") for name in embedded(hostile / "report.html")["names"]] == (
        names
    )


@pytest.mark.parametrize("run", ["hostile", "hundred"])
def test_the_page_has_the_run_s_numbers(run, request):
    path = request.getfixturevalue(run)
    found, text = read_run(path), (path / "report.html").read_text()
    numbers = found.report
    for key in ("accuracy", "macro_f1", "loss"):
        assert f"<dd>{numbers[key]:.4f}</dd>" in text
    cells = re.findall(r'<button data-cell="(\d+),(\d+)">([\d,]+)</button>', text)
    matrix = numbers["confusion_matrix"]
    expected = {(i, j): n for i, row in enumerate(matrix) for j, n in enumerate(row) if n}
    expected = {cell: n for cell, n in expected.items() if cell[0] != cell[1]}
    assert {(int(i), int(j)): int(n.replace(",", "")) for i, j, n in cells} == expected
    shown = embedded(path / "report.html")["pictures"]
    assert len(shown) > 100
    for label, prediction, name, confidence, _ in shown:
        index = int(name.removeprefix("#"))
        assert (found.labels[index], found.predictions[index]) == (label, prediction)
        assert found.confidence[index] == pytest.approx(confidence, abs=1e-4)


def test_what_differs_from_the_recipe_is_marked(hostile):
    rows = html_module.settings(read_run(hostile).config)
    marked = {name: (own, usual) for name, own, usual, differs in rows if differs}
    assert marked == {"augment": ("crop,cutout", "flip")}
    # Of no recipe, and so none to differ from, whatever they are.
    assert {usual for name, _, usual, _ in rows if name in ("image_size", "threads")} == {None}
    assert "name" not in {name for name, *_ in rows}


def test_long_names_are_cut_where_they_do_not_differ():
    names = [f"class number {k:03}" for k in range(100)]
    for width in (9, 11, 12, 15):
        assert len({plots.short(name, width) for name in names}) == 100
        assert {len(plots.short(name, width)) for name in names} == {width}
    assert plots.short("class number 007", 12) == "class …r 007"
    assert [plots.short("cat", width) for width in (3, 2, 1)] == ["cat", "c…", "…"]


@pytest.mark.parametrize("num_epochs", [1, 2])
def test_epochs_are_whole_numbers(hostile, num_epochs):
    run = read_run(hostile)
    figure = plots.curves(dataclasses.replace(run, history=run.history[:num_epochs]))
    for axes in figure.axes[:2]:
        low, high = axes.get_xlim()
        at = [x for x in axes.get_xticks() if low <= x <= high]
        assert at == {1: [1], 2: [1, 2]}[num_epochs]


def test_p6_a_page_says_what_the_epoch_was_chosen_on(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    numbers = json.loads((path / "report.json").read_text()) | {"selection_split": "test"}
    (path / "report.json").write_text(json.dumps(numbers))
    assert "an optimistic number" in html_module.write(path).read_text()
    assert "an optimistic number" not in (hostile / "report.html").read_text()


def test_a_thousand_classes_are_listed_instead(tmp_path):
    path = make_run(tmp_path / "run", [str(k) for k in range(1000)], num_test=2000)
    text = html_module.write(path).read_text()
    assert len(text) < LIMIT
    assert 'id="matrix"' not in text
    assert text.count("data-cell=") == html_module.CONFUSIONS


def test_p2_the_batch_is_what_the_network_sees():
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
def test_p2_a_mixed_batch_is_the_loaders(mixes):
    words = {"dataset": "digits", "augment": mixes, "batch_size": 70}
    config, data = recipes.resolve(words), splits("ab", num_test=2)
    plain = BatchTransform(data.mean, data.std, config.augmentations, "cpu", config.mixup_alpha)
    plan = ShardedBatchSampler(len(data.train.labels), 70, config.seed, rank=0, world_size=1)
    loader = ResidentLoader(data.train, plan, plain, torch.device("cpu"))
    batch = next(iter(loader.batches(1)))
    assert batch.partners is not None
    images, index = mistakes.first_batch(config, data)
    assert torch.equal(index, batch.indices[:64])
    seen = ((batch.images[:64] - plain.shift) / plain.scale).round()
    assert torch.equal(images.float(), seen)


def test_the_mistakes_kept_are_the_most_confident_and_of_every_cell():
    found = predicted(splits([str(k) for k in range(30)], num_test=6000, size=1).test)
    wrong = (found.labels != found.predictions).nonzero().flatten().tolist()
    kept = mistakes.chosen(found, 1200).tolist()
    assert len(set(kept)) == len(kept) == 1200
    assert set(kept) <= set(wrong)
    by_confidence = sorted(wrong, key=lambda i: -found.confidence[i])
    assert kept[:24] == by_confidence[:24]

    pairs = list(zip(found.labels.tolist(), found.predictions.tolist(), strict=True))
    of_cell = {pairs[i]: [] for i in wrong}
    for i in by_confidence:
        of_cell[pairs[i]].append(i)
    for members in of_cell.values():
        mine = sorted(set(members) & set(kept), key=members.index)
        assert mine
        assert mine == members[: len(mine)]


def test_large_pictures_are_kept_small_and_a_run_without_mistakes_is_drawn(tmp_path):
    path = make_run(tmp_path / "run", "ab", num_test=60, size=100)
    assert load_file(path / "images.safetensors")["batch"].shape == (64, 3, 64, 64)
    data, run = splits("ab", num_test=60, size=100), RunDir(path)
    config = recipes.resolve({"dataset": "digits"})
    perfect = predicted(data.test, right=1.1)
    run.write_report(
        {"split": "test", **perfect.report(), "best_epoch": 3, "selection_split": "test"}
    )
    run.write_predictions(perfect.csv())
    mistakes.keep(run, config, data, perfect)
    plots.draw(path)
    assert "There are pictures of 0 of the 0 mistakes" in html_module.write(path).read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is no run's folder: it has no config.json. Name one of train.py's."),
        ("report.json", "is not finished. Finish it: train.py --resume "),
        ("history.jsonl", "is damaged: history.jsonl (No such file or directory). Copy it back"),
    ],
)
def test_p7_a_missing_file_is_one_line(hostile, tmp_path, capsys, name, message):
    path = shutil.copytree(hostile, tmp_path / "run")
    (path / name).unlink()
    assert run_script(lambda: compare.main([str(path)])) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize(("num_logged", "label"), [(0, "epoch"), (1, "epoch"), (3, "step")])
def test_the_learning_rate_has_a_point_for_each_epoch_at_least(
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


def test_the_epochs_of_a_page_have_every_number(hostile, tmp_path):
    path = shutil.copytree(hostile, tmp_path / "run")
    rows = [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        row["val_macro_f1"] = 0.4321 + k
    del rows[2]["val_macro_f1"]  # of an older version
    (path / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = html_module.write(path).read_text()
    table = text[text.index(">Epochs</caption>") :].partition("</table>")[0]
    heads = [head.strip() for head in re.findall(r"<th[^>]*>([^<]*)</th>", table)]
    column = heads.index("validation macro-F1") - 1  # the epoch itself is a head of its row
    cells = [re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table.split("<tr")[2:]]
    assert [row[column] for row in cells] == ["0.4321", "1.4321", "-"]


def test_class_names_are_whole_where_there_is_room(tmp_path):
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
def test_without_pictures_the_rest_is_drawn(hostile, tmp_path, capsys, name):
    path = shutil.copytree(hostile, tmp_path / "run", ignore=shutil.ignore_patterns("plots", name))
    plots.draw(path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: no mistakes and no batch")
    assert {p.name for p in (path / "plots").iterdir()} == PLOTS - {"mistakes.png", "batch.png"}
    assert embedded(html_module.write(path))["pictures"] == []


@pytest.mark.parametrize(
    "damage", [{"batch": torch.zeros(1)}, {"mistakes_labels": torch.full((175,), 10)}, {}]
)
def test_p7_damaged_pictures_are_named(hostile, tmp_path, damage):
    path = shutil.copytree(hostile, tmp_path / "run")
    file = path / "images.safetensors"
    save_file(load_file(file) | damage, file)
    if not damage:
        file.write_bytes(file.read_bytes()[:-1])
    for make in (plots.draw, html_module.write):
        with pytest.raises(UserError, match=r"run is damaged"):
            make(path)


def test_a_run_that_cannot_be_drawn_is_finished_with_a_warning(tmp_path, capsys, monkeypatch):
    run, data = RunDir(make_run(tmp_path / "run")), splits("ab", num_test=9)
    monkeypatch.delenv("LAB_DRAW")
    monkeypatch.setattr(plots, "curves", lambda run: 1 / 0)
    html_module.finish(run, recipes.resolve({}), data, predicted(data.test))
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the run has no pictures or no page: ")
