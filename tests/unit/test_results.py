"""results/make.py trains each row once, in pieces; every page says what its logs say."""

import importlib.util
import itertools
import json
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest

from lab.config import recipes
from lab.config.cli import parse_arguments
from lab.config.schema import TrainConfig, is_path
from lab.models.stats import model_stats
from lab.report import compare, run_reader

ROOT = Path(__file__).resolve().parents[2]


def script(path: str):
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make, tables = script("results/make.py"), script("docs/make_tables.py")


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
        if is_path(config.dataset):
            assert config.dataset == photographs


@pytest.mark.slow
def test_rows_are_trained_in_pieces_and_once(tmp_path, monkeypatch, capsys):
    options = [
        "--dataset",
        "digits",
        "--epochs",
        "8",
        "--threads",
        "1",
        "--max-train-samples",
        "200",
    ]
    monkeypatch.setattr(make, "rows", lambda *_: {"first": options, "second": options})
    monkeypatch.chdir(tmp_path)
    kept, runs = tmp_path / "kept", tmp_path / "runs"
    words = ["--output", str(kept), "--runs", str(runs)]

    assert make.main([*words, "--minutes", "0"]) == 0
    assert "not finished: first, second" in capsys.readouterr().out
    assert not runs.exists()

    # A piece too short for all epochs is stopped, and another goes on with it.
    assert make.train("first", options, runs, kept, seconds=0.01) == 0
    assert not (kept / "first").exists()
    stopped = len((runs / "first" / "history.jsonl").read_text().splitlines())
    assert stopped < 8
    assert make.main([*words, "--only", "first"]) == 0
    history = (kept / "first" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in history] == list(range(1, 9))
    assert {file.name for file in (kept / "first").iterdir()} == {*make.COPIED_FILES, "log.txt"}
    assert (kept / "first" / "log.txt").read_text().count("$ python train.py ") == 2

    assert (runs / "first" / "report.html").exists()

    before = (runs / "first.log").read_text()
    monkeypatch.setattr(make, "train", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(make.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert make.main([*words, "--only", "first"]) == 0
    assert (runs / "first.log").read_text() == before
    with pytest.raises(SystemExit):
        make.main([*words, "--only", "third"])


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


HELD = {  # tables of numbers that are not written by a script, and what holds them to their sources
    "| `--model` | at 32 pixels, 3 channels, 10 classes | |": "test_the_costs_of_models",
    "| | LeNet-5 | AlexNet |": "test_the_costs_of_models",
    "| | choose it for | measured here |": "test_the_sentences_of_the_architectures_page",
    "| fault | how | how often | lost | where |": "test_the_soak_log",
    "| directory | command |": "test_each_run_is_named_with_its_command",
    "| settings | validation accuracy | training accuracy | NAME |": "test_the_trials",
    "| settings | epochs | validation accuracy | in `trials/` | |": "test_the_trials",
    "| option | accuracy | macro-F1 | recall of airplane (450) | cat (225) | deer (90) | frog (45) "
    "| truck (18) |": "test_the_table_of_unbalanced_classes",
    "| | formula | meaning |": "definitions, in docs/metrics.md",
    "| | |": "an option's values, in docs/training.md",
}


def test_every_table_of_numbers_is_held_to_something():
    assert all(name in globals() for name in HELD.values() if name.startswith("test_"))
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/*.md")]
    pages += ROOT.glob("benchmarks/*.md")
    for page in pages:
        text = re.sub(r"<!-- table.*?<!-- end -->", "", page.read_text(), flags=re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            heads = table.splitlines()[0]
            if re.search(r"\d[.,]\d", table) and not page.name.startswith("comparison"):
                assert heads in HELD, f"{page.name}: {heads}"


# Runs: their rows, settings and comparisons.


def recipe_settings(run: Path) -> tuple[dict, dict]:
    """(the settings of a run that a recipe sets, those of today's recipe)."""
    config, log = read(run / "config.json"), (run / "log.txt").read_text()
    names = {name for recipe in recipes.RECIPES.values() for v in recipe.values() for name in v}
    given = {name: config[name] for name in ("model", "dataset", "data_dir", "recipe", "epochs")}
    if config["dataset"] == "digits":
        del given["data_dir"]
    if is_path(config["dataset"]):
        given["monitor"] = "accuracy"  # results/README.md: then the default
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


@pytest.mark.parametrize("name", ["photographs-3"])
def test_a_comparison_is_that_of_its_runs(name):
    page = f"results/comparison-{name}.md"
    heads = (ROOT / page).read_text().splitlines()[2]
    [table] = tables_of(page, heads)
    found = {row[0]: row[1:] for row in table}
    runs = [run_reader.read_run(ROOT / "results" / run) for run in found]
    rows = compare.rows(runs)
    assert [Path(row["run"]).name for row in rows] == list(found)  # the most accurate first
    against = list(rows[0]).index("vs. best") - 1
    for row in rows:
        shown = found[Path(row["run"]).name]
        cells = [compare.text(name, value) for name, value in row.items()][1:]
        assert [*shown[:against], *shown[against + 1 :]] == [
            *cells[:against],
            *cells[against + 1 :],
        ]
        if row is not rows[0]:
            difference, low, high = map(float, re.findall(r"[-+]\d\.\d+", shown[against]))
            assert difference == pytest.approx(row["accuracy"] - rows[0]["accuracy"], abs=6e-5)
            assert low < difference < high
    by_name = {run.path.name: run for run in runs}
    heads = next(line for line in (ROOT / page).read_text().splitlines() if "| class |" in line)
    [table] = tables_of(page, heads)
    for label, *recalls in table:
        for run, recall in zip(heads.strip("| ").split(" | ")[1:], recalls, strict=True):
            [row] = [r for r in by_name[run].report["per_class"] if r["class"] == label]
            assert recall == f"{row['recall']:.4f}"


def test_the_trials():
    """results/LOG.md against trials/, each of which it names."""
    seen = set()
    heads = "| settings | epochs | validation accuracy | in `trials/` | |"
    [table] = tables_of("results/LOG.md", heads)
    for _, epochs, accuracies, name, _ in table:
        history = trial(name.strip("`"), seen)
        assert len(history) == int(epochs)
        assert accuracies.split() == [f"{row['val_accuracy']:.3f}" for row in history]
    heads = "| settings | validation accuracy | training accuracy | NAME |"
    alexnet, lenet5, digits = tables_of("results/LOG.md", heads)
    for settings, validation, training, name in alexnet:
        epochs = "8" if settings.startswith("8 epochs") else "20"
        history = trial(f"alexnet{epochs}-{name.split('`')[1]}", seen)
        [accuracy, *_] = re.findall(r"0\.\d+", validation)
        best = max(row["val_accuracy"] for row in history)
        assert f"{best:.{len(accuracy) - 2}f}" == accuracy, name
        assert f"{history[-1]['train_accuracy']:.3f}" == training, name
        after = re.search(r"after (\d+)", validation)
        assert len(history) == int(after[1] if after else epochs)
    for prefix, table in (("lenet5", lenet5), ("digits", digits)):
        for _, validation, training, name in table:
            seeds = 1 if "seed 0 only" in validation else 2
            ends = [trial(f"{prefix}-{name.split('`')[1]}-seed{i}", seen)[-1] for i in range(seeds)]
            found = ", ".join(f"{row['val_accuracy']:.4f}" for row in ends)
            assert validation.removesuffix(", seed 0 only") == found, name
            assert training == ", ".join(f"{row['train_accuracy']:.3f}" for row in ends), name
    assert seen == {path.stem for path in (ROOT / "results/trials").glob("*.jsonl")}


def trial(name: str, seen: set[str]) -> list[dict]:
    seen.add(name)
    lines = (ROOT / "results" / "trials" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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


def test_the_costs_of_models():
    """The tables of models in docs/architectures.md."""
    heads = "| `--model` | at 32 pixels, 3 channels, 10 classes | |"
    [rows] = tables_of("docs/architectures.md", heads)
    assert len(rows) > 8
    for names, costs, _ in rows[:-1]:
        found = {}
        for name in re.findall(r"`([\w-]+)`", names):
            name = f"efficientnet{name}" if name.startswith("_") else name
            counted = model_stats(name=name, num_classes=10, in_chans=3, image_size=32)
            found[tuple(counted.values())] = None
        millions = re.findall(r"([\d.,]+) M", costs)
        assert len(millions) == 2 * len(found)
        for stated, value in zip(millions, itertools.chain(*found), strict=True):
            decimals = len(stated.partition(".")[2])
            assert stated == f"{value / 1e6:,.{decimals}f}", names
    [table] = tables_of("docs/architectures.md", "| | LeNet-5 | AlexNet |")
    [_, lenet, alexnet] = table[-1]
    for stated, name in ((lenet, "lenet5"), (alexnet, "alexnet")):
        counted = model_stats(name=name, num_classes=10, in_chans=3, image_size=32)
        assert stated.startswith(f"{counted['parameters']:,}")
        millions, decimals = counted["macs"] / 1e6, 2 if name == "lenet5" else 0
        assert stated.endswith(f"{millions:.{decimals}f} M")


def test_the_sentences_of_the_architectures_page():
    text = text_of("docs/architectures.md")
    full = {run.config["model"]: run for run in tables.runs("*-photographs-3")}
    short = {run.config["model"]: run for run in tables.runs("short-*-photographs")}
    accuracy = {name: run.report["accuracy"] for name, run in full.items()}
    few = {name: run.report["accuracy"] for name, run in short.items()}
    digits = {m: tables.run(f"short-{m}-mnist").report["accuracy"] for m in ("lenet5", "alexnet")}
    costs = {name: run.config["macs"] for name, run in full.items()}
    weights = {name: run.config["parameters"] for name, run in full.items()}
    measured = log("models")["results"]
    memory, latency = (
        {name: statistics.median(row[key] for row in rows) for name, rows in measured.items()}
        for key in ("memory_mb", "latency_ms")
    )
    speed = {
        name: statistics.median(tables.ratios(measured, name, "alexnet", "train_images_per_second"))
        for name in measured
    }  # times AlexNet's
    steps = {name: 3 * math.ceil(45_000 / run.config["batch_size"]) for name, run in full.items()}

    gains = {name: accuracy[name] - few[name] for name in few if name in accuracy}
    assert sorted(gains, key=gains.get)[-2:] == ["googlenet", "efficientnet_b0"]
    assert min(gains, key=gains.get) == "lenet5"
    for run in full.values():
        names, matrix = run.report["class_names"], run.report["confusion_matrix"]
        for true, predicted in (("cat", "dog"), ("dog", "cat")):
            row = dict(zip(names, matrix[names.index(true)], strict=True))
            del row[true]
            assert max(row, key=row.get) == predicted

    def less(run: run_reader.RunResult) -> str:
        return f"{run.report['accuracy'] - run.report['macro_f1']:.3f}"

    def recall(run: run_reader.RunResult, label: str) -> float:
        return next(row["recall"] for row in run.report["per_class"] if row["class"] == label)

    def confused(model: str, true: str, predicted: str) -> int:
        report = full[model].report
        names = report["class_names"]
        return report["confusion_matrix"][names.index(true)][names.index(predicted)]

    lenet = full["lenet5"]
    behind = {name: accuracy["alexnet"] - value for name, value in accuracy.items()}
    assert recall(short["efficientnet_b0"], "cat") == 0
    assert memory["alexnet"] / costs["alexnet"] == min(memory[n] / costs[n] for n in full)
    assert list(few)[-3] == "efficientnet_b0"
    for sentence in (
        f"({steps['alexnet']:,} steps with a batch size of 128; LeNet-5, whose recipe has a batch "
        f"size of 64, takes {steps['lenet5']:,})",
        f"AlexNet and GoogLeNet differ by only {few['alexnet'] - few['googlenet']:.3f}",
        f"from so few images more accurately (by {digits['alexnet'] - digits['lenet5']:.2f})",
        f"is {few['alexnet'] - few['lenet5']:.2f} less accurate "
        f"({behind['lenet5']:.2f} after three",
        f"trains {speed['lenet5']:.0f} times as fast as AlexNet, {latency['lenet5']:.1f} ms per "
        f"image; on photographs {accuracy['googlenet'] - accuracy['lenet5']:.2f} less accurate",
        f"second, {-behind['googlenet']:.2f} behind GoogLeNet, and level with it on 5,000 images",
        f"at {speed['googlenet']:.2f} of its speed",
        f"third, {behind['densenet']:.2f} behind AlexNet",
        f"at a quarter of its speed and {memory['densenet'] / memory['alexnet']:.1f} times its",
        f"slower ({speed['mobilenet_v2']:.2f} of its speed), and "
        f"{behind['mobilenet_v2']:.2f} less accurate",
        f"and {few['mobilenet_v3_small'] - few['mobilenet_v2']:.2f} more accurate than V2",
        f"fourth: {costs['efficientnet_b0'] / costs['alexnet']:.2f} of AlexNet's MACs",
        f"third from last after 237, "
        f"{accuracy['efficientnet_b0'] - accuracy['mobilenet_v2']:.2f} more accurate than "
        f"MobileNetV2 after {steps['efficientnet_b0']:,}",
        f"for {costs['vit_tiny'] / costs['lenet5']:.0f} times the MACs",
        f"The stem adds {accuracy['vit_hybrid'] - accuracy['vit_tiny']:.2f}",
        f"by {less(full['googlenet'])} for `googlenet`, by {less(lenet)} for `lenet5`",
        f"recognizes {recall(lenet, 'horse'):.0%} of the".replace("%", " %"),
        f"and {recall(lenet, 'cat'):.0%} of the cats".replace("%", " %"),
        f"the difference is {less(short['efficientnet_b0'])} for `efficientnet_b0`",
        f"({confused('googlenet', 'cat', 'dog')} cats predicted as dogs against "
        f"{confused('vit_tiny', 'cat', 'dog')}, {confused('googlenet', 'airplane', 'ship')} "
        f"airplanes predicted as ships against {confused('vit_tiny', 'airplane', 'ship')})",
    ):
        assert sentence in text, sentence
    for ratio, stated in (
        (speed["densenet"], 1 / 4),
        (weights["densenet"] / weights["alexnet"], 1 / 20),
        (latency["alexnet"] / latency["mobilenet_v2"], 1 / 2),
        (latency["alexnet"] / latency["efficientnet_b0"], 1 / 2),
        (speed["efficientnet_b0"], 1 / 2),
        (speed["mobilenet_v3_small"], 2),
    ):
        assert ratio == pytest.approx(stated, rel=0.15)


def test_the_log_of_every_pair():
    lines = (ROOT / "benchmarks/logs/every_pair.txt").read_text().splitlines()
    rows = [line.split() for line in lines if re.search(r"(bfloat16|float32), \d+$", line)]
    falls = {(r[0], r[1]): (float(r[5]), float(r[6])) for r in rows}
    num_models, num_datasets = (len({pair[i] for pair in falls}) for i in (0, 1))
    assert all(last < first for first, last in falls.values())
    assert (num_models, num_datasets, len(falls)) == (18, 3, 54)
    text = text_of("docs/architectures.md")
    assert f"200 training steps of {num_models} models on three datasets" in text
    (model, dataset), (first, last) = min(
        falls.items(), key=lambda pair: round(pair[1][0] - pair[1][1], 3)
    )
    assert f"(`{model}` on {dataset}: from {first:.3f} to {last:.3f})" in text


def test_the_soak_log():
    text = (ROOT / "benchmarks/logs/soak.txt").read_text()
    kills, half = re.search(r"(\d+) kills, .*; (\d+) found a state half", text).groups()
    lost = [int(m) for m in re.findall(r"(\d+) identical$", text, re.MULTILINE)]
    assert len(lost) == int(kills)
    [row] = [line for line in (ROOT / "docs/reliability.md").read_text().splitlines()
             if "soak.txt" in line]  # fmt: skip
    assert f"| {kills} kills, {half} of them while a checkpoint was written or removed |" in row
    assert f"the steps of at most two checkpoints repeated, {max(lost)} " in row


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
        steps[f"alexnet bfloat16, {name}"]["utilisation"]
        for name in ("channels_last", "batch 2048", "batch 8192")
    ]
    batch_128, batch_2048, batch_8192 = (f"{100 * share:.1f} %" for share in used)
    assert f"reach {batch_128} of" in text
    assert f"{batch_2048} of 2,048 and {batch_8192} of 8,192" in text
