"""P1, P2 and P7 on worlds of one, two and three real processes, over gloo."""

import json
from pathlib import Path

import pytest
import torch
from checks_exactness import BATCH_SIZES, SIZES, TRAININGS
from safetensors.torch import load_file
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)
from shapes import write_shapes
from worlds import python, run, run_all, torchrun, world_by_hand


pytestmark = pytest.mark.timeout(800)  # the first test waits for three worlds
WORLDS = (1, 2, 3)
EVALUATIONS = [
    f"{size} samples, batches of {batch_size}, {kind}"
    for size in SIZES
    for batch_size in BATCH_SIZES
    for kind in ("resident", "streaming")
]
EVALUATIONS += [f"{case}, mirrored" for case in EVALUATIONS if case.startswith("101 ")]
DETERMINISTIC = [name for name in TRAININGS if not name.startswith(("dropout", "hook"))]
SHORT = ("--recipe", "smoke", "--dataset", "digits", "--threads", "1", "--quiet")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """1,000 pictures in class folders."""
    return write_shapes(tmp_path_factory.mktemp("pictures"), 1000)


class Results:
    """What a world left in its folder."""

    def __init__(self, folder: Path, num_processes: int):
        self.folder = folder
        self.processes = [
            json.loads((folder / f"process-{rank}.json").read_text())
            for rank in range(num_processes)
        ]

    def steps(self, training: str) -> list[dict]:
        return read_lines(self.folder / training / "steps.jsonl")

    def history(self, training: str) -> list[dict]:
        return read_lines(self.folder / training / "history.jsonl")

    def report(self, training: str) -> dict:
        return json.loads((self.folder / training / "report.json").read_text())


@pytest.fixture(scope="module")
def worlds(pictures, tmp_path_factory) -> dict[int, Results]:
    """The results of checks_exactness.py on worlds of one, two and three processes."""
    results = {}
    for num_processes in WORLDS:
        folder = tmp_path_factory.mktemp(f"world-{num_processes}")
        script = ("tests/helpers/checks_exactness.py", folder, pictures)
        launched = python(*script) if num_processes == 1 else torchrun(num_processes, *script)
        ended = run(launched, limit=200)
        assert ended.code == 0, ended.stderr
        assert ended.left_behind == []
        results[num_processes] = Results(folder, num_processes)
        sizes = {process["world_size"] for process in results[num_processes].processes}
        assert sizes == {num_processes}
    return results


@pytest.mark.parametrize("case", EVALUATIONS)
def test_p1_every_sample_is_counted_once_on_every_world(worlds, case):
    alone = worlds[1].processes[0]["evaluations"][case]
    size = int(case.split()[0])
    assert len(alone["true_labels"]) == size
    for world in worlds.values():
        for process in world.processes:
            found = process["evaluations"][case]
            assert found["labels"] == alone["true_labels"]
            assert sum(map(sum, found["report"]["confusion_matrix"])) == size
            assert found == alone  # the losses to the last bit


@pytest.mark.parametrize("case", EVALUATIONS)
def test_p1_the_report_equals_scikit_learns(worlds, case):
    found = worlds[3].processes[2]["evaluations"][case]
    labels, predictions, report = found["true_labels"], found["predictions"], found["report"]
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


def test_p1_a_batch_that_one_process_leaves_out_raises_on_all(worlds):
    for world in worlds.values():
        for process in world.processes:
            assert "of 101 samples, 1 were missing and 0 repeated" in process["missing"]


def test_p1_both_loaders_say_the_same(worlds):
    found = worlds[1].processes[0]["evaluations"]
    for case in EVALUATIONS:
        assert found[case] == found[case.replace("streaming", "resident")]


@pytest.mark.parametrize("num_processes", WORLDS)
def test_p1_evaluate_repeats_the_report_of_training(worlds, num_processes):
    run_folder = worlds[num_processes].folder / "plain"
    for name in ("report.json", "predictions.csv"):
        assert (run_folder / "evaluate-test" / name).read_bytes() == (
            run_folder / name
        ).read_bytes()


@pytest.mark.parametrize("num_processes", WORLDS[1:])
@pytest.mark.parametrize("training", DETERMINISTIC)
def test_p2_one_curve_on_every_world(worlds, training, num_processes):
    alone, world = worlds[1], worlds[num_processes]
    steps, expected = world.steps(training), alone.steps(training)
    for key in ("step", "epoch", "learning_rate"):
        assert [s[key] for s in steps] == [s[key] for s in expected]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in expected], rel=1e-4)
    if training == "muon":  # a bit's difference grows in its bfloat16, and a hit may fall otherwise
        return
    for row, other in zip(world.history(training), alone.history(training), strict=True):
        for key in ("epoch", "train_accuracy", "val_accuracy", "val_macro_f1", "learning_rate"):
            assert row[key] == other[key]
        for key in ("train_loss", "val_loss"):
            assert row[key] == pytest.approx(other[key], rel=1e-4)
    assert world.report(training)["confusion_matrix"] == alone.report(training)["confusion_matrix"]


@pytest.mark.parametrize("num_processes", WORLDS)
@pytest.mark.parametrize(
    ("training", "same", "tolerance"),
    [
        ("grad_accum_steps", "plain", 1e-4),
        ("accumulate-empty", "empty-shards", 1e-4),
        ("streaming", "plain", 0),
        ("pictures-streaming", "pictures", 0),
        ("mixed-accumulate", "mixed", 1e-4),
        ("pictures-mixed-streaming", "pictures-mixed", 0),
    ],
)
def test_p2_neither_accumulation_nor_the_loader_changes_the_curve(
    worlds, num_processes, training, same, tolerance
):
    losses, expected = (
        [s["loss"] for s in worlds[num_processes].steps(t)] for t in (training, same)
    )
    assert losses == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize("num_processes", WORLDS)
@pytest.mark.parametrize("training", ["plain", "pictures-streaming"])
def test_p1_p2_the_pictures_kept_are_the_same_on_every_world(worlds, training, num_processes):
    """The first batch as augmented, and mistakes; on both loaders."""
    same = {"plain": "streaming"}.get(training, "pictures")
    files = ((1, training), (num_processes, training), (num_processes, same))
    first, *others = (
        load_file(worlds[number].folder / name / "images.safetensors") for number, name in files
    )
    assert len(first["batch"]) == 61
    assert len(first["mistakes"]) > 10
    for other in others:
        assert other.keys() == first.keys()
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_p2_the_curves_are_worth_comparing(worlds):
    """Sixty steps, over remainders, that lower the loss."""
    steps = worlds[1].steps("plain")
    losses = [s["loss"] for s in steps]
    assert [s["epoch"] for s in steps] == [1] * 22 + [2] * 22 + [3] * 16
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert len({s["learning_rate"] for s in steps}) == 60
    assert len(worlds[1].steps("empty-shards")) == 20


@pytest.mark.parametrize("num_processes", WORLDS)
def test_p2_all_processes_hold_the_same_weights(worlds, num_processes):
    first, *others = (process["weights"] for process in worlds[num_processes].processes)
    assert first.keys() == TRAININGS.keys()
    assert len(first["plain"]) == 3
    assert all(other == first for other in others)


@pytest.mark.parametrize(("hook", "tolerance"), [("hook-bf16", 0.02), ("hook-powersgd", 0.5)])
def test_compressed_gradients_bend_the_curve_and_still_lower_the_loss(worlds, hook, tolerance):
    losses = [s["loss"] for s in worlds[2].steps(hook)]
    expected = [s["loss"] for s in worlds[2].steps("plain")]
    assert losses != pytest.approx(expected, rel=1e-5)
    assert losses == pytest.approx(expected, rel=tolerance)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("num_processes", WORLDS)
def test_alexnet_trains_with_dropout(worlds, num_processes):
    losses = [s["loss"] for s in worlds[num_processes].steps("dropout")]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)


def test_dropout_is_a_function_of_seed_step_and_process(worlds):
    [alone], of_two, of_three = (
        [process["masks"] for process in worlds[n].processes] for n in WORLDS
    )
    assert len(alone["dropout"]) == 3
    masks = [
        tuple(mask)
        for process in of_three
        for name in ("dropout", "dropout-seed")
        for mask in process[name]
    ]
    assert len(set(masks)) == len(masks) == 3 * (3 + 1)
    assert of_two[0] == of_three[0] == alone
    assert of_two[1] == of_three[1]


@pytest.mark.parametrize("num_processes", WORLDS)
def test_p2_accumulation_changes_batch_norms_statistics(worlds, num_processes):
    """Synchronised or not, they are those of a part: that curve is another one."""
    losses, expected = (
        [s["loss"] for s in worlds[num_processes].steps(name)]
        for name in ("batch-norm-accumulate", "batch-norm")
    )
    assert losses[1:] != pytest.approx(expected[1:], rel=1e-3)
    assert losses == pytest.approx(expected, rel=0.3)


def test_p7_one_process_s_mistake_is_told_once_and_ends_all(pictures, tmp_path):
    options = [*SHORT, "--dataset", "folder", "--data-dir", pictures, "--output-dir", tmp_path]
    command = python("tests/helpers/checks_failures.py", "missing-data", *options)
    ends = run_all([command] * 2, limit=60, envs=world_by_hand(2))
    assert [ended.code for ended in ends] == [2, 2]
    errors = [line for ended in ends for line in ended.errors]
    assert len(errors) == 1, errors
    assert "no-such-folder" in errors[0]
    assert all("Traceback" not in ended.stderr for ended in ends)
    assert all(ended.left_behind == [] for ended in ends)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["crash", "killed"])
def test_p7_a_lost_process_ends_the_world(tmp_path, fault):
    script = ("tests/helpers/checks_failures.py", fault, *SHORT, "--output-dir", tmp_path)
    ended = run(torchrun(2, *script), limit=100)
    assert ended.code not in (0, None)
    assert ended.left_behind == []
    [line] = [line for line in ended.stdout.splitlines() if line.startswith("fault at ")]
    assert ended.end - float(line.split()[-1]) < 15
    # One traceback of the project's, that of the process at fault, which names the reason.
    assert ended.stderr.count("in run_script") == (fault == "crash")
    assert ("RuntimeError: a fault on process 1" in ended.stderr) == (fault == "crash")


def test_p7_sync_bn_without_gpus_is_one_error_and_touches_nothing(tmp_path):
    options = [*SHORT, "--sync-bn", "--output-dir", tmp_path, "--name", "precious", "--overwrite"]
    config = '{"versions": {"lab": "0"}}'  # of a run that may be replaced, but not for nothing
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").write_text(config)
    ended = run(torchrun(2, "train.py", *options), limit=60)
    assert ended.code != 0
    [error] = ended.errors
    assert "--sync-bn needs GPUs" in error
    # The launcher's own report, which comes last, names the error, too.
    assert f"traceback : {error.removeprefix('error: ')}" in ended.stderr
    assert "To enable traceback" not in ended.stderr
    assert "in run_script" not in ended.stderr
    assert (tmp_path / "precious" / "config.json").read_text() == config


@pytest.mark.slow
def test_p7_a_damaged_picture_met_by_one_process_is_named(tmp_path):
    """By a worker of its loader, in the evaluation after the first epoch."""
    root, broken = tmp_path / "pictures", tmp_path / "pictures/val/class-9/0109.png"
    write_shapes(root / "train", 30)
    write_shapes(root / "val", 110)  # a batch of 100 for process 0, one of 10 for process 1
    assert max((root / "val").glob("*/*")) == broken
    broken.write_bytes(b"no picture")
    options = ["--dataset", "folder", "--data-dir", root, "--output-dir", tmp_path / "runs"]
    options += ["--loader", "streaming", "--workers", "1", "--max-eval-samples", "0"]
    ended = run(torchrun(2, "train.py", *SHORT, *options), limit=100)
    assert ended.code != 0
    [error] = ended.errors
    assert str(broken) in error
    assert "in run_script" not in ended.stderr
    assert ended.left_behind == []
