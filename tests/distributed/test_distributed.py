"""P1, P2 and P7 on worlds of one, two and three real processes, over gloo."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from checks_exactness import BATCH_SIZES, QUICK, SIZES, SLOW, SUITES, TRAININGS
from safetensors.torch import load_file
from shapes import write_shapes
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from worlds import Ended, python, run, run_all, torchrun, world_by_hand

pytestmark = pytest.mark.timeout(800)  # the first test waits for a launch of each world size
WORLD_SIZES = (1, 2, 3)
EVALUATIONS = [
    f"{size} samples, batches of {batch_size}, {kind}"
    for size in SIZES
    for batch_size in BATCH_SIZES
    for kind in ("resident", "streaming")
]
EVALUATIONS += [f"{case}, flipped" for case in EVALUATIONS if case.startswith("101 ")]
SHORT = ("--recipe", "smoke", "--dataset", "digits", "--threads", "1", "--quiet")


def worlds_of(names, smallest=1):
    """Return a parameter (training, world size) for each world; the slow suite runs on two."""
    return [
        pytest.param(name, size, marks=[] if name in QUICK else pytest.mark.slow)
        for name in names
        for size in (WORLD_SIZES if name in QUICK else (1, 2))
        if size >= smallest
    ]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A directory of 400 images in class directories."""
    return write_shapes(tmp_path_factory.mktemp("images"), 400)


class Results:
    """The files that a launch of checks_exactness.py wrote."""

    def __init__(self, folder: Path, world_size: int):
        self.folder = folder
        self.processes = [
            json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(world_size)
        ]
        assert {process["world_size"] for process in self.processes} == {world_size}

    def losses(self, training: str) -> list[float]:
        return [row["loss"] for row in self.steps(training)]

    def steps(self, training: str) -> list[dict]:
        return read_lines(self.folder / training / "steps.jsonl")

    def history(self, training: str) -> list[dict]:
        return read_lines(self.folder / training / "history.jsonl")

    def report(self, training: str) -> dict:
        return json.loads((self.folder / training / "report.json").read_text())


@pytest.fixture(scope="module")
def results(images, tmp_path_factory):
    """A function that returns the results of a world for a training, launching its suite once."""

    @cache
    def launch(suite: str, world_size: int) -> tuple[Ended, Path]:
        folder = tmp_path_factory.mktemp(f"{suite}-{world_size}")
        script = ("tests/helpers/checks_exactness.py", suite, folder, images)
        command = python(*script) if world_size == 1 else torchrun(world_size, *script)
        return run(command, limit=300), folder

    def results(world_size: int, training: str = "plain") -> Results:
        ended, folder = launch("quick" if training in QUICK else "slow", world_size)
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
        return Results(folder, world_size)

    return results


@pytest.mark.parametrize("case", EVALUATIONS)
def test_p1_every_sample_is_counted_once_for_any_world_size(results, case):
    expected = results(1).processes[0]["evaluations"][case]
    size = int(case.split()[0])
    assert len(expected["true_labels"]) == size
    for world_size in WORLD_SIZES:
        for process in results(world_size).processes:
            actual = process["evaluations"][case]
            assert actual["labels"] == expected["true_labels"]
            assert sum(map(sum, actual["report"]["confusion_matrix"])) == size
            assert actual == expected  # the losses to the last bit


@pytest.mark.parametrize("case", EVALUATIONS)
def test_p1_the_report_equals_scikit_learns(results, case):
    actual = results(3).processes[2]["evaluations"][case]
    labels, predictions, report = actual["true_labels"], actual["predictions"], actual["report"]
    classes = range(10)
    expected = confusion_matrix(labels, predictions, labels=classes)
    assert report["confusion_matrix"] == expected.tolist()
    assert report["num_samples"] == len(labels)
    assert report["accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-9)
    columns = precision_recall_fscore_support(labels, predictions, labels=classes, zero_division=0)
    for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
        assert [row[name] for row in report["per_class"]] == pytest.approx(column, abs=1e-9)
    macro = f1_score(labels, predictions, average="macro", zero_division=0)
    assert report["macro_f1"] == pytest.approx(macro, abs=1e-9)


def test_p1_a_batch_that_one_process_skips_raises_on_all(results):
    for world_size in WORLD_SIZES:
        for process in results(world_size).processes:
            assert "of 101 samples, 1 were missing and 0 repeated" in process["missing"]


def test_p1_both_loaders_give_the_same_predictions(results):
    evaluations = results(1).processes[0]["evaluations"]
    for case in EVALUATIONS:
        assert evaluations[case] == evaluations[case.replace("streaming", "resident")]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_p1_evaluate_repeats_the_report_of_training(results, world_size):
    """Also the file name of each image."""
    for training in ("plain", "folder-mixed"):
        path = results(world_size).folder / training
        for name in ("report.json", "predictions.csv"):
            assert (path / "evaluate-test" / name).read_bytes() == (path / name).read_bytes()
    columns = (path / "predictions.csv").read_text().splitlines()[0]
    assert columns == "index,label,prediction,confidence,label_name,prediction_name,file"


def test_p7_the_timeout_is_the_configured_one(results):
    """Also ten minutes, which Accelerate takes for "not set", so that PyTorch waits for thirty."""
    assert {process["timeout"] for process in results(2).processes} == {"0:10:00"}


@pytest.mark.parametrize(
    ("training", "world_size"),
    worlds_of((n for n in TRAININGS if not n.startswith("dropout")), smallest=2),
)
def test_p2_the_loss_curve_is_the_same_for_any_world_size(results, training, world_size):
    single, world = results(1, training), results(world_size, training)
    steps, expected = world.steps(training), single.steps(training)
    for key in ("step", "epoch", "learning_rate"):
        assert [s[key] for s in steps] == [s[key] for s in expected]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-4)
    if training == "muon":  # its bfloat16 iterations magnify differences in the last bit
        return
    for row, other in zip(world.history(training), single.history(training), strict=True):
        for key in ("epoch", "train_accuracy", "val_accuracy", "val_macro_f1", "learning_rate"):
            assert row[key] == other[key]
        for key in ("train_loss", "val_loss"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
    assert world.report(training)["confusion_matrix"] == single.report(training)["confusion_matrix"]


SAME = {
    "accumulate-empty": ("empty-shards", 1e-4),
    "streaming": ("plain", 0),
    "folder-mixed-streaming": ("folder-mixed", 0),
    "grad_accum_steps": ("plain", 1e-4),
    "mixed-accumulate": ("mixed", 1e-4),
}


@pytest.mark.parametrize(("training", "world_size"), worlds_of(SAME))
def test_p2_neither_accumulation_nor_the_loader_changes_the_curve(results, training, world_size):
    same, tolerance = SAME[training]
    losses, expected = (results(world_size, name).losses(name) for name in (training, same))
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("training", "same"), [("plain", "streaming")])
def test_p1_p2_the_saved_images_are_the_same_for_any_world_size(
    results, training, same, world_size
):
    """The augmented first batch and the mistakes, with both loaders."""
    first, *others = (
        load_file(results(size, name).folder / name / "images.safetensors")
        for size, name in ((1, training), (world_size, training), (world_size, same))
    )
    assert len(first["batch"]) == 61
    assert len(first["mistakes"]) > 10
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_p2_the_compared_curves_cover_remainders_and_lower_the_loss(results):
    steps = results(1).steps("plain")
    losses = [s["loss"] for s in steps]
    assert [s["epoch"] for s in steps] == [1] * 22 + [2] * 22 + [3] * 16
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert len({s["learning_rate"] for s in steps}) == 60
    assert len(results(1).steps("empty-shards")) == 20


@pytest.mark.parametrize(("training", "world_size"), worlds_of(["plain", next(iter(SLOW))]))
def test_p2_all_processes_have_the_same_weights(results, training, world_size):
    world = results(world_size, training)
    first, *others = (process["weights"] for process in world.processes)
    assert first.keys() in [suite.keys() for suite in SUITES.values()]
    assert len(first[training]) == 3
    assert all(other == first for other in others)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_alexnet_trains_with_dropout(results, world_size):
    losses = results(world_size).losses("dropout")
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)


def test_dropout_is_a_function_of_seed_step_and_rank(results):
    [single], of_two, of_three = (
        [process["masks"] for process in results(size).processes] for size in WORLD_SIZES
    )
    assert len(single["dropout"]) == 3
    masks = [
        tuple(mask)
        for process in of_three
        for name in ("dropout", "dropout-seed")
        for mask in process[name]
    ]
    assert len(set(masks)) == len(masks) == 3 * (3 + 1)
    assert of_two[0] == of_three[0] == single
    assert of_two[1] == of_three[1]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_p2_accumulation_changes_batch_norms_statistics(results, world_size):
    """Statistics are those of a part of the batch, synchronized or not, so the curve differs."""
    losses, expected = (
        results(world_size, name).losses(name) for name in ("batch-norm-accumulate", "batch-norm")
    )
    assert losses[1:] != pytest.approx(expected[1:], rel=1e-3)
    assert losses == pytest.approx(expected, rel=0.3)


def test_p7_a_mistake_on_one_process_is_printed_once_and_ends_all(images, tmp_path):
    options = [*SHORT, "--dataset", images, "--output-dir", tmp_path]
    command = python("tests/helpers/checks_failures.py", "missing-data", *options)
    ends = run_all([command] * 2, limit=200, envs=world_by_hand(2))
    assert [ended.code for ended in ends] == [2, 2]
    errors = [line for ended in ends for line in ended.errors]
    assert len(errors) == 1, errors
    assert "no-such-folder" in errors[0]
    assert all("Traceback" not in ended.stderr for ended in ends)
    assert all(ended.left_behind == [] for ended in ends)
    assert list(tmp_path.iterdir()) == []


def test_p7_a_crashed_process_ends_the_world(tmp_path):
    script = ("tests/helpers/checks_failures.py", "crash", *SHORT, "--output-dir", tmp_path)
    ended = run(torchrun(2, *script), limit=200)
    assert ended.code not in (0, None)
    assert ended.left_behind == []
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("fault at ")]
    assert ended.end - float(line.split()[-1]) < 60  # a collective waits for 600
    # Only the process at fault prints a traceback of lab, with the reason.
    assert ended.stderr.count("in run_script") == 1
    assert "RuntimeError: a fault on rank 1" in ended.stderr
