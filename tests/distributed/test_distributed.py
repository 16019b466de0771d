"""P1, P2 and P7 on worlds of one, two and three real processes, over gloo."""

import json
from pathlib import Path

import pytest
import torch
from checks_exactness import BATCH_SIZES, SIZES, TRAININGS
from safetensors.torch import load_file
from shapes import write_shapes
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from worlds import python, run_all, run_world, world_by_hand

WORLD_SIZES = (1, 2, 3)
EVALUATIONS = [
    f"{size} samples, batches of {batch_size}, {kind}"
    for size in SIZES
    for batch_size in BATCH_SIZES
    for kind in ("resident", "streaming")
]
EVALUATIONS += [
    f"{case}, flipped" for case in EVALUATIONS if case.startswith("101 samples, batches of 7")
]
SHORT = ("--recipe", "smoke", "--dataset", "digits", "--threads", "1", "--quiet")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A directory of 200 images in class directories."""
    return write_shapes(tmp_path_factory.mktemp("images"), 200)


class Results:
    """The files that a world of checks_exactness.py wrote."""

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
def results(images, tmp_path_factory) -> dict[int, Results]:
    """The results of each world size; the worlds run at the same time."""
    folders = {size: tmp_path_factory.mktemp(f"world-{size}") for size in WORLD_SIZES}
    worlds = [(folder, env) for size, folder in folders.items() for env in world_by_hand(size)]
    script = "tests/helpers/checks_exactness.py"
    commands = [python(script, folder, images) for folder, _ in worlds]
    for ended in run_all(commands, limit=500, envs=[env for _, env in worlds]):
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
    return {size: Results(folder, size) for size, folder in folders.items()}


def test_p1_every_sample_is_counted_once_for_any_world_size(results):
    for case in EVALUATIONS:
        expected = results[1].processes[0]["evaluations"][case]
        assert len(expected["true_labels"]) == int(case.split()[0])
        assert (
            expected
            == results[1].processes[0]["evaluations"][case.replace("streaming", "resident")]
        )
        for world_size in WORLD_SIZES:
            for process in results[world_size].processes:
                actual = process["evaluations"][case]
                assert actual["labels"] == expected["true_labels"]
                matrix = actual["report"]["confusion_matrix"]
                assert sum(map(sum, matrix)) == len(expected["true_labels"])
                assert actual == expected  # the losses to the last bit


def test_p1_the_report_equals_scikit_learns(results):
    for actual in results[3].processes[2]["evaluations"].values():
        labels, predictions = actual["true_labels"], actual["predictions"]
        report, classes = actual["report"], range(10)
        expected = confusion_matrix(labels, predictions, labels=classes)
        assert report["confusion_matrix"] == expected.tolist()
        assert report["num_samples"] == len(labels)
        assert report["accuracy"] == pytest.approx(accuracy_score(labels, predictions), abs=1e-9)
        columns = precision_recall_fscore_support(
            labels, predictions, labels=classes, zero_division=0
        )
        for name, column in zip(("precision", "recall", "f1", "support"), columns, strict=True):
            assert [row[name] for row in report["per_class"]] == pytest.approx(column, abs=1e-9)
        macro = f1_score(labels, predictions, average="macro", zero_division=0)
        assert report["macro_f1"] == pytest.approx(macro, abs=1e-9)


def test_p1_a_batch_that_one_process_skips_raises_on_all(results):
    for world_size in WORLD_SIZES:
        for process in results[world_size].processes:
            assert "of 101 samples, 1 were missing and 0 repeated" in process["missing"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_p1_evaluate_repeats_the_report_of_training(results, world_size):
    """Also the file name of each image."""
    for training in ("plain", "folder-mixed"):
        path = results[world_size].folder / training
        for name in ("report.json", "predictions.csv"):
            assert (path / "evaluate-test" / name).read_bytes() == (path / name).read_bytes()
    columns = (path / "predictions.csv").read_text().splitlines()[0]
    assert columns == "index,label,prediction,confidence,label_name,prediction_name,file"


def test_p7_the_timeout_is_the_configured_one(results):
    """Also ten minutes, which Accelerate takes for "not set", so that PyTorch waits for thirty."""
    assert {process["timeout"] for process in results[2].processes} == {"0:10:00"}


@pytest.mark.parametrize("world_size", WORLD_SIZES[1:])
@pytest.mark.parametrize("training", [n for n in TRAININGS if not n.startswith("dropout")])
def test_p2_the_loss_curve_is_the_same_for_any_world_size(results, training, world_size):
    single, world = results[1], results[world_size]
    steps, expected = world.steps(training), single.steps(training)
    for key in ("step", "epoch", "learning_rate"):
        assert [s[key] for s in steps] == [s[key] for s in expected]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-4)
    for row, other in zip(world.history(training), single.history(training), strict=True):
        for key in ("epoch", "train_accuracy", "val_accuracy", "val_macro_f1", "learning_rate"):
            assert row[key] == other[key]
        for key in ("train_loss", "val_loss"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
    assert world.report(training)["confusion_matrix"] == single.report(training)["confusion_matrix"]


@pytest.mark.parametrize(
    ("training", "same", "tolerance"),
    [
        ("accumulate-empty", "empty-shards", 1e-4),
        ("mixed-accumulate", "mixed-empty", 1e-4),
        ("folder-mixed-streaming", "folder-mixed", 0),
    ],
)
def test_p2_neither_accumulation_nor_the_loader_changes_the_curve(
    results, training, same, tolerance
):
    for world in results.values():
        expected = pytest.approx(world.losses(same), rel=tolerance, abs=0)
        assert world.losses(training) == expected


def test_p1_p2_the_saved_images_are_the_same_for_any_world_size(results):
    """The augmented first batch and the mistakes, with both loaders."""
    first, *others = (
        load_file(world.folder / training / "images.safetensors")
        for world in results.values()
        for training in ("folder-mixed", "folder-mixed-streaming")
    )
    assert len(first["batch"]) == 61
    assert len(first["mistakes"]) > 10
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_p2_the_compared_curves_cover_remainders_and_lower_the_loss(results):
    steps = results[1].steps("plain")
    losses = [s["loss"] for s in steps]
    assert [s["epoch"] for s in steps] == [1] * 6 + [2] * 6 + [3] * 4
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert len({s["learning_rate"] for s in steps}) == 16
    assert len(results[1].steps("empty-shards")) == 6


def test_p2_all_processes_have_the_same_weights(results):
    for world_size in WORLD_SIZES:
        first, *others = (process["weights"] for process in results[world_size].processes)
        assert first.keys() >= TRAININGS.keys()
        assert len(first["plain"]) == 3
        assert all(other == first for other in others)


def test_dropout_is_a_function_of_seed_step_and_rank(results):
    [single], of_two, of_three = (
        [
            {name: process["masks"][name] for name in ("dropout", "dropout-seed")}
            for process in world.processes
        ]
        for world in results.values()
    )
    assert len(single["dropout"]) == 3
    masks = [
        tuple(mask) for process in of_three for mask in process["dropout"] + process["dropout-seed"]
    ]
    assert len(set(masks)) == len(masks) == 3 * (3 + 1)
    assert of_two[0] == of_three[0] == single
    assert of_two[1] == of_three[1]


def test_p7_a_mistake_on_one_process_is_printed_once_and_ends_all(images, tmp_path):
    options = [*SHORT, "--dataset", images, "--output-dir", tmp_path]
    ends = run_world(2, "tests/helpers/checks_failures.py", "missing-data", *options, limit=200)
    assert [ended.code for ended in ends] == [2, 2]
    errors = [line for ended in ends for line in ended.errors]
    assert len(errors) == 1, errors
    assert "no-such-folder" in errors[0]
    assert all("Traceback" not in ended.stderr for ended in ends)
    assert all(ended.left_behind == [] for ended in ends)
    assert list(tmp_path.iterdir()) == []
