"""check_data.py and the checks at the start of a training: duplicates, files, sizes, classes."""

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from mistakes import make_picture
from PIL import Image

import check_data
from lab.data import DataConfig, checks
from lab.data.splits import load_split, load_splits

CONFIG = DataConfig("", "data", 32, 0.25, 0.25, 0, 0, 0)


def copy(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)
    return target


def make_folder(root: Path, **sizes: int) -> DataConfig:
    for name, size in sizes.items():
        for i in range(size):
            make_picture(root / name / f"{i:02}.png")
    return replace(CONFIG, dataset=str(root))


def sides(config: DataConfig) -> dict[str, str]:
    """Return the name of the split of each file."""
    splits = load_splits(config, 0, 1)
    return {f: name for name in ("train", "val", "test") for f in getattr(splits, name).files()}


# Splits


def test_a_split_never_separates_files_with_the_same_content(tmp_path):
    config = make_folder(tmp_path, a=30, b=12)
    before = sides(config)
    for i in range(30):  # a copy of every image of a: some of these are in every split
        copy(tmp_path / f"a/{i:02}.png", tmp_path / f"a/copy-{i}.png")
    (tmp_path / "b/link.png").symlink_to("00.png")
    after = sides(config)
    assert {f: after[f] for f in before} == before  # copies move no other image
    for i in range(30):
        assert after[f"a/copy-{i}.png"] == after[f"a/{i:02}.png"]
    assert after["b/link.png"] == after["b/00.png"]
    split, _ = load_split(config, "test", 0, 2)  # as evaluate.py reads it
    assert split.files() == [f for f in sorted(after) if after[f] == "test"]


def test_the_only_image_of_a_class_and_its_copies_are_trained_on(tmp_path):
    config = make_folder(tmp_path, a=1, b=8)
    for i in range(9):
        copy(tmp_path / "a/00.png", tmp_path / f"a/copy-{i}.png")
    assert {side for file, side in sides(config).items() if file < "b"} == {"train"}


def test_a_training_warns_of_duplicates_in_several_splits_or_classes(tmp_path, capsys):
    config = make_folder(tmp_path, **{"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1})
    copy(tmp_path / "train/a/00.png", tmp_path / "test/a/x.png")
    copy(tmp_path / "train/a/01.png", tmp_path / "train/b/y.png")
    copy(tmp_path / "train/a/02.png", tmp_path / "train/a/z.png")
    load_splits(config, math.inf, 1)
    assert capsys.readouterr().err.splitlines() == [
        "warning: exact duplicates in several splits: train/a/00.png = test/a/x.png",
        "warning: exact duplicates in several classes: train/a/01.png = train/b/y.png",
    ]


# check_data.py


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that checks tmp_path/x: (exit code, problems, warnings, page)."""
    monkeypatch.chdir(tmp_path)

    def check(*words: str) -> tuple[int, list[str], list[str], str]:
        code = check_data.main(["x", "--threads", "1", *words])
        out, err = capsys.readouterr()
        lines = [line.removeprefix("problem: ") for line in out.splitlines() if "problem: " in line]
        warnings = [line.removeprefix("warning: ") for line in err.splitlines()]
        return code, lines, warnings, Path("check_data.html").read_text()

    return check


def test_a_folder_without_problems_has_exit_code_0(tmp_path, run):
    make_folder(tmp_path / "x", a=12, b=10)
    copy(tmp_path / "x/a/00.png", tmp_path / "x/a/zz.png")
    code, problems, warnings, page = run("--image-size", "40")
    assert (code, problems) == (0, [])
    assert warnings == ["exact duplicates in one class (1): a/00.png = a/zz.png"]
    assert page.count("<img") == 16  # eight of each class
    assert 'src="data:image/' in page


def test_every_problem_is_named(tmp_path, run, monkeypatch):
    root = tmp_path / "x"
    make_folder(root, **{"train/a": 101, "train/b": 9, "test/a": 2, "test/b": 2})
    whole = (root / "train/a/00.png").read_bytes()
    cut = os.fsencode(root / "train/a/<b> 'cut\" ") + b"\xff.png"  # a name that is not UTF-8
    Path(os.fsdecode(cut)).write_bytes(whole[: len(whole) // 2])
    (root / "train/a/empty.jpg").write_bytes(b"")
    Image.open(root / "train/a/01.png").save(root / "train/a/saved again.bmp")  # the same pixels
    copy(root / "train/a/02.png", root / "test/a/leak.png")
    copy(root / "train/a/03.png", root / "train/b/conflict.png")
    code, problems, warnings, page = run("--image-size", "41")
    assert code == 1
    cut, empty, *duplicates = problems
    assert cut.startswith("cannot read the image x/train/a/<b> 'cut\" ")
    assert empty.startswith("cannot read the image x/train/a/empty.jpg (")
    assert duplicates == [
        "exact duplicates in several splits: train/a/02.png = test/a/leak.png",
        "exact duplicates in several classes: train/a/03.png = train/b/conflict.png",
        "the held-out split may separate files with the same pixels: "
        "train/a/01.png = train/a/saved again.bmp",
    ]
    assert warnings[0].startswith("images smaller than 41 x 41 pixels, which training enlarges")
    assert warnings[1].startswith(
        "the classes are unbalanced: a has 104 training images, b has 10 "
    )
    assert "train/a/&lt;b&gt; &#39;cut&#34; " in page
    assert "<b>" not in page
    # The second time nothing is decoded, except the samples of the page.
    monkeypatch.setattr(checks, "_inspect", lambda _: pytest.fail("decoded again"))
    assert run("--image-size", "41")[:3] == (code, problems, warnings)


def test_a_single_class_is_a_problem(tmp_path, run):
    make_folder(tmp_path / "x", a=3)
    assert run()[:2] == (1, ["there is only one class, a"])


def test_a_named_dataset_is_an_error(fails):
    assert fails(check_data, "digits") == (
        "digits has no image files. Give a directory of images, or a manifest."
    )
