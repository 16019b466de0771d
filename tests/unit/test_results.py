"""results/make.py trains each row once, in pieces; every page says what its logs say."""

import importlib.util
import itertools
import json
import re
import statistics
from pathlib import Path

import pytest

from lab.config import recipes
from lab.config.cli import parse_arguments
from lab.config.schema import TrainConfig, is_own_dataset

ROOT = Path(__file__).resolve().parents[2]


def script(path: str):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, tables = script("results/make.py"), script("docs/make_tables.py")
lesson, networks = script("results/lesson.py"), script("results/networks.py")


@pytest.mark.parametrize("photographs", ["", "data/my pictures"])
@pytest.mark.parametrize(("short", "epochs"), [(False, 0), (False, 3), (True, 0)])
def test_rows_are_settings_of_train(photographs, short, epochs):
    for name, options in make.rows(photographs, "data", short, epochs).items():
        config = recipes.resolve(parse_arguments(TrainConfig, options, prog="", description=""))
        assert name.removeprefix("short-").startswith(config.model)
        if short:
            assert (config.epochs, config.max_train_samples) == (3, 5000)
        if epochs:
            assert (config.epochs, config.max_train_samples) == (epochs, 0)
        if is_own_dataset(config.dataset):
            assert config.dataset == photographs


def test_a_row_of_the_lesson_is_trained():
    options = "--dataset digits --epochs 2 --warmup-epochs 0.2 --augment none --lr 3e-3"
    row, model = lesson.train_row(networks.Network, options, seed=0)
    again, _ = lesson.train_row(networks.Network, options, 0, initial_model=model)
    assert row["steps"] == 2 * 21
    assert row["parameters"] == 61706  # LeNet-5's
    assert again["val_accuracy"] > row["val_accuracy"] > 0.3


RUNS = sorted(path.parent for path in ROOT.glob("results/*/report.json"))


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def log(name: str) -> dict:
    return read(ROOT / "benchmarks" / "logs" / f"{name}.json")


def text_of(page: str) -> str:
    """A page on one line, so that a sentence is found wherever its lines break."""
    return " ".join((ROOT / page).read_text().split())


def tables_of(page: str, heads: str) -> list[list[list[str]]]:
    """The cells of each table of a page that has these heads, without heads and rule."""
    body = rf"^{re.escape(heads)}\n\|[-:| ]+\n((?:\|.*\n)+)"
    found = re.findall(body, (ROOT / page).read_text(), re.MULTILINE)
    lines = [text.splitlines() for text in found]
    return [
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table] for table in lines
    ]


# Tables that a script writes from the logs.


def test_the_tables_of_pages_are_what_the_script_makes_of_the_logs():
    shown = []
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert text == tables.rewrite(text), "run: python docs/make_tables.py"
        shown += re.findall(r"<!-- table (\w+)", text)
    assert sorted(shown) == sorted(tables.TABLES)


# Runs: their rows, settings and comparisons.


def recipe_settings(run: Path) -> tuple[dict, dict]:
    """(the settings of a run that a recipe sets, those of today's recipe)."""
    config, log = read(run / "config.json"), (run / "log.txt").read_text()
    names = {name for recipe in recipes.RECIPES.values() for v in recipe.values() for name in v}
    given = {name: config[name] for name in ("model", "dataset", "data_dir", "recipe", "epochs")}
    if config["dataset"] == "digits":
        del given["data_dir"]
    if is_own_dataset(config["dataset"]):
        given["monitor"] = "accuracy"  # results/README.md: then the default
    if config["init"] == "kaiming":
        given["init"] = "kaiming"  # results/README.md: then the default of AlexNet
    command = next(line for line in [*log.splitlines(), ""] if "train.py" in line or not line)
    for name in names & config.keys():
        if f"--{name.replace('_', '-')} " in command:
            given[name] = config[name]
    today = vars(recipes.resolve(given))
    known = names & config.keys() & today.keys()
    return {name: config[name] for name in known}, {name: today[name] for name in known}


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_a_run_has_the_settings_of_todays_recipe(run):
    then, today = recipe_settings(run)
    assert len(then) > 10
    assert then == today, "train it again, or say in results/README.md that its recipe is another"


def test_each_run_is_named_with_its_command():
    patterns = []
    [table] = tables_of("results/README.md", "| directory | command |")
    for names, _ in table:
        for name in re.findall(r"`([^`]+)`", names.replace("`...", "`alexnet-photographs")):
            parts = re.split(r"\{([^}]*)\}", name)
            choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
            patterns += ["".join(words) for words in itertools.product(*choices)]
    for run in RUNS:
        assert any(run.match(pattern) for pattern in patterns), run.name
    for pattern in patterns:
        assert any(run.match(pattern) for run in RUNS), pattern


def test_the_table_of_unbalanced_classes():
    log = (ROOT / "benchmarks/logs/class_balance.txt").read_text()
    rows = re.findall(r"^([\w-]+) +[01] +([\d.]+) +([\d.]+) +\d+ +(.*)$", log, re.MULTILINE)
    measured = [
        [f"{float(x):.2f}" for x in (a, f1, *recalls.split())] for _, a, f1, recalls in rows
    ]
    table = (ROOT / "docs/training.md").read_text().partition("| option | accuracy | macro-F1")[2]
    shown = [re.findall(r"(\d\.\d\d) and (\d\.\d\d)", line) for line in table.splitlines()[2:5]]
    assert shown == [list(zip(*measured[i : i + 2], strict=True)) for i in (0, 2, 4)]


# What README and other pages claim in sentences.


def test_the_calibration_in_metrics_md_is_that_of_the_log():
    log = (ROOT / "benchmarks/logs/calibration.txt").read_text()
    trained, _, calibrated = (
        re.search(r"loss: ([\d.]+)\ncalibration error: ([\d.]+)", run).groups()
        for run in log.split("$ python")[1:]
    )
    (loss, error), (lower_loss, lower_error) = trained, calibrated
    temperature = re.search(r"temperature: ([\d.]+)", log)[1]
    expected = f"(temperature {float(temperature):.2f}): on the test split, the calibration error "
    expected += f"falls from {float(error):.3f} to {float(lower_error):.3f} and the loss from "
    expected += f"{float(loss):.3f} to {float(lower_loss):.3f}"
    assert expected in " ".join((ROOT / "docs/metrics.md").read_text().split())


def test_readmes_claims_are_those_of_the_logs():
    text = text_of("README.md")
    report = read(ROOT / "results/lenet5-digits-demo/report.json")
    accuracy, size = report["accuracy"], report["num_samples"]
    assert f"reaches an accuracy of {accuracy:.3f} on {size} test digits" in text
    lenet, alexnet = (log("gpu")["epochs"][n] for n in ("lenet5, epochs", "alexnet, 20 epochs"))
    first, *later = lenet["train_seconds"]
    assert f"has in {statistics.median(later):.2f} s (the first epoch" in text
    assert f"takes {first:.2f} s) and is" in text
    assert f"evaluated in {statistics.median(lenet['eval_seconds'][1:]):.3f} s" in text
    assert f"CIFAR-10 has take {alexnet['seconds']:.1f} s, evaluations included" in text


def test_the_log_of_every_pair():
    lines = (ROOT / "benchmarks/logs/every_pair.txt").read_text().splitlines()
    rows = [line.split() for line in lines if re.search(r"(bfloat16|float32), \d+$", line)]
    falls = {(r[0], r[1]): (float(r[5]), float(r[6])) for r in rows}
    num_models, num_datasets = (len({pair[i] for pair in falls}) for i in (0, 1))
    assert all(last < first for first, last in falls.values())
    assert (num_models, num_datasets, len(falls)) == (18, 3, 54)
    text = text_of("benchmarks/RESULTS.md")
    assert f"{num_models} models and three datasets for 200 steps" in text


def test_the_soak_log():
    text = (ROOT / "benchmarks/logs/soak.txt").read_text()
    kills, half = re.search(r"(\d+) kills, .*; (\d+) found a state half", text).groups()
    lost = [int(m) for m in re.findall(r"(\d+) identical$", text, re.MULTILINE)]
    assert len(lost) == int(kills)
    [row] = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines()
             if "soak.txt" in line]  # fmt: skip
    assert f"| {kills} kills, {half} of them while a checkpoint was written or removed |" in row
    assert f"at most {max(lost)} steps of LeNet-5 and 4 of AlexNet were repeated" in row


def test_results_md_states_what_the_logs_have():
    text = text_of("benchmarks/RESULTS.md")
    alexnet = log("choices")["results"]["alexnet"]
    slow, fast = (
        statistics.median(row["images_per_second"] for row in alexnet[name])
        for name in ("float32, 2 threads", "bfloat16, channels_last, 2 threads, (auto)")
    )
    assert f"reach {slow / fast:.2f} of the speed" in text
    assert f"a factor of {fast / slow:.1f} of the 3.57" in text
    steps = log("gpu")["steps"]
    used = [
        steps[f"alexnet bfloat16, {name}"]["utilization"]
        for name in ("channels_last", "batch 2048", "batch 8192")
    ]
    batch_128, batch_2048, batch_8192 = (f"{100 * share:.1f} %" for share in used)
    assert f"reach {batch_128} of" in text
    assert f"{batch_2048} in batches of 2,048 and {batch_8192} in batches of 8,192" in text
