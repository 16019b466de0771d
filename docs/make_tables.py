"""Write the tables of the documentation from the logs in results/ and benchmarks/logs.

  python docs/make_tables.py

A table stands between `<!-- table NAME: docs/make_tables.py -->` and `<!-- end -->`; NAME is a key
of TABLES. `tests/unit/test_results.py` fails if a page differs from what this script writes.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "benchmarks" / "logs"
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # lab, installed or not; benchmarks

import choices  # noqa: E402
import saving  # noqa: E402
from common import ratios, spread  # noqa: E402

from lab.report.run_reader import RunResult, read_run  # noqa: E402

PAGES = ("README.md", "docs/architectures.md", "docs/training.md", "benchmarks/RESULTS.md")
BLOCK = r"(<!-- table (\w+): docs/make_tables\.py -->\n).*?(<!-- end -->)"


@cache
def run(name: str) -> RunResult:
    """Return the finished run in results/NAME."""
    return read_run(ROOT / "results" / name)


def runs(pattern: str) -> list[RunResult]:
    """Return the runs in results/ whose names match, sorted by test accuracy, best first."""
    names = sorted(path.name for path in (ROOT / "results").glob(pattern) if path.is_dir())
    return sorted(map(run, names), key=lambda result: -result.report["accuracy"])


@cache
def log(name: str) -> dict[str, Any]:
    """Return the content of benchmarks/logs/NAME.json."""
    return json.loads((LOGS / f"{name}.json").read_text())


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(c)} |" for c in (heads, ["---"] * len(heads), *rows))


# docs/training.md


def finetune() -> str:
    """Return the table of training methods on small folders, means over the seeds.

    The runs of one line may be in several logs.
    """
    titles = {"scratch": "random weights, 96 pixels", "head": "`--freeze backbone --epochs 1`",
              "finetune": "the default"}  # fmt: skip
    found: dict[tuple[int, str], list[dict]] = {}
    for path in sorted(LOGS.glob("finetune_*.json")):
        content = json.loads(path.read_text())
        for row in content["rows"]:
            found.setdefault((content["per_class"], row["method"]), []).append(row)
    lines = []
    for per_class, method in sorted(found, key=lambda key: (key[0], [*titles].index(key[1]))):
        rows = found[per_class, method]
        images = f"CIFAR-10, {per_class} of each class" if per_class else "378 photographs"
        cells = [images, titles[method], str(len(rows))]
        for metric in ("accuracy", "macro_f1"):
            mean = statistics.mean(row[metric] for row in rows)
            low, high = (
                statistics.mean(row[f"{metric}_interval"][i] for row in rows) for i in (0, 1)
            )
            cells.append(f"{mean:.3f} ({low:.3f} to {high:.3f})")
        lines.append(cells)
    return markdown(("images", "training", "seeds", "accuracy", "macro-F1"), lines)


# README


def results() -> str:
    """Return README's table: a row of one run, or the mean of several seeds."""
    lines: list[tuple[str, str]] = [
        ("LeNet-5, MNIST", "lenet5-mnist-notebook"),
        ("LeNet-5, MNIST, mean of seeds 0 to 4", "lenet5-mnist-default-seed*"),
        ("AlexNet, CIFAR-10 as JPEG files", "alexnet-photographs-notebook-8"),
        ("the same", "alexnet-photographs-notebook"),
        ("AlexNet, CIFAR-10 as JPEG files", "alexnet-photographs-default-8"),
        ("AlexNet, CIFAR-10 as JPEG files", "alexnet-photographs-notebook-20"),
        (
            "AlexNet, CIFAR-10 as JPEG files, mean of seeds 42, 0, 1",
            "alexnet-photographs-default-20*",
        ),
    ]
    rows = [result(*line) for line in lines]
    # The notebooks are not part of this repository: no log of theirs is here.
    own = ["the notebook itself", "5", "test", "0.9856", "-", "-", "-"]
    rows.insert(0, ["LeNet-5, MNIST", *own])
    own = ["the notebook itself", "20", "test", "0.8287", "-", "-", "-"]
    rows.insert(3, ["AlexNet, CIFAR-10", *own])
    heads = ("row", "recipe", "epochs", "selected on", "test accuracy", "macro-F1", "hardware")
    return markdown((*heads, "in `results/`"), rows)


def result(title: str, pattern: str) -> list[str]:
    """Return a row of README's table."""
    seeds = runs(pattern)
    first = seeds[0]
    accuracies = [r.report["accuracy"] for r in seeds]
    accuracy = f"{statistics.mean(accuracies):.4f}"
    if len(seeds) > 1:
        accuracy += f" (standard deviation {statistics.stdev(accuracies):.4f})"
    macro_f1 = f"{statistics.mean(r.report['macro_f1'] for r in seeds):.4f}"
    selected = first.report["selection_split"]
    epochs = str(len(first.history))
    recipe = first.config["recipe"]
    if first.config["init"] == "kaiming":  # the recipe of AlexNet was changed after these runs
        recipe += ", `--init kaiming`"
    row = [title, recipe, epochs, selected, accuracy, macro_f1, hardware(first)]
    return [*row, f"`{pattern}`"]


def hardware(run: RunResult) -> str:
    """Return the hardware of a run: a GPU's short name, or the number of CPU cores."""
    if run.config["device"] == "cuda":
        return run.config["device_name"].split()[1]
    threads = run.config["threads"]
    return "one CPU core" if threads == 1 else f"{threads} CPU cores"


# docs/architectures.md


def models() -> str:
    """Return the table of all models after three epochs."""
    costs = log("models")["results"]
    page = (ROOT / "results" / "comparison-photographs-3.md").read_text()
    rows = []
    for result in runs("*-photographs-3"):
        model, config, report = result.config["model"], result.config, result.report
        median = {
            key: statistics.median(row[key] for row in costs[model])
            for key in ("latency_ms", "memory_mb")
        }
        speed = statistics.median(ratios(costs, model, "alexnet", "train_images_per_second"))
        difference = re.search(rf"^\| {result.path.name} .*?(-|-\S+ \[.*?\]) \| val", page, re.M)
        assert difference
        numbers = [f"{float(n):.3f}" for n in re.findall(r"-?\d\.\d+", difference[1])]
        against = "{} [{}, {}]".format(*numbers) if numbers else "-"
        rows.append(
            [
                f"`{model}`",
                f"{report['accuracy']:.4f}",
                f"{report['macro_f1']:.4f}",
                against,
                str(config["batch_size"]),
                f"{config['parameters'] / 1e6:.2f} M",
                f"{config['macs'] / 1e6:.1f} M",
                f"{median['latency_ms']:.1f}",
                f"{speed:.0f}" if speed > 10 else f"{speed:.2f}",
                f"{median['memory_mb']:,.0f}",
                f"`{result.path.name}`",
            ]
        )
    heads = ("model", "accuracy", "macro-F1", "vs. best", "batch", "parameters")
    heads += ("MACs", "latency, ms", "training speed", "memory, MB", "in `results/`")
    return markdown(heads, rows)


def fewer_images() -> str:
    """Return the table of the short runs, and the gain from training on all images."""
    rows = []
    for short in runs("short-*-photographs"):
        name = short.path.name
        more = ROOT / "results" / f"{name.removeprefix('short-')}-3"
        accuracy = short.report["accuracy"]
        gain = f"+{run(more.name).report['accuracy'] - accuracy:.3f}" if more.exists() else "-"
        row = [f"`{short.config['model']}`", f"{accuracy:.4f}", f"{short.report['macro_f1']:.4f}"]
        rows.append([*row, gain, f"`{name}`"])
    return markdown(("model", "accuracy", "macro-F1", "gain", "in `results/`"), rows)


def both_tasks() -> str:
    """Return the short runs of LeNet-5 and AlexNet on digits and on photographs."""
    rows = []
    for model in ("lenet5", "alexnet"):
        cells = []
        for data in ("mnist", "photographs"):
            name = f"short-{model}-{data}"
            report = run(name).report
            cells.append(f"{report['accuracy']:.4f}, {report['macro_f1']:.4f} (`{name}`)")
        rows.append([f"`{model}`", *cells])
    return markdown(("test accuracy, macro-F1", "digits (MNIST)", "photographs"), rows)


def confusions() -> str:
    """Return the most frequent confusions of the models after three epochs."""
    reports = [result.report for result in runs("*-photographs-3")]
    names = reports[0]["class_names"]
    matrices = [report["confusion_matrix"] for report in reports]
    cells = []
    for i, true in enumerate(names):
        for j, predicted in enumerate(names):
            if i != j:
                cells.append((true, predicted, [matrix[i][j] for matrix in matrices]))
    cells.sort(key=lambda cell: -sum(cell[2]))
    rows = [
        [true, predicted, f"{statistics.mean(n):.0f}", f"{min(n)} - {max(n)}"]
        for true, predicted, n in cells[:8]
    ]
    return markdown(("class", "predicted as", "mean of the models", "min - max"), rows)


@cache
def lesson(part: str) -> list[dict[str, Any]]:
    """Return the rows of results/lesson/PART.json."""
    return json.loads((ROOT / "results" / "lesson" / f"{part}.json").read_text())["rows"]


def seeds_of(part: str, **values: Any) -> list[dict[str, Any]]:
    """Return the rows with these values: one of each seed, at the selected learning rate."""
    rows = [row for row in lesson(part) if row.items() >= values.items()]
    if any("lr" in row for row in rows):
        selected = max((r for r in rows if r["seed"] == 0), key=lambda row: row["val_accuracy"])
        rows = [row for row in rows if row["lr"] == selected["lr"]]
    return sorted(rows, key=lambda row: row.get("seed", 0))


def mean_of(part: str, key: str, **values: Any) -> float:
    """Return the mean over the seeds of the rows with these values."""
    return statistics.mean(row[key] for row in seeds_of(part, **values))


SHORT_TITLES = {  # of the arguments of `Network` in results/networks.py
    "relu": "ReLU",
    "max_pool": "max pooling",
    "width": "4 x the channels",
    "deep": "more layers",
    "dropout": "dropout",
    "augment": "augmentation",
}
TITLES = SHORT_TITLES | {
    "relu": "ReLU instead of tanh",
    "max_pool": "max pooling instead of average pooling",
    "width": "four times the channels",
    "deep": "five 3x3 convolutions instead of three 5x5",
}


def gains(data: str, base: str, factor: str) -> list[float]:
    """Return what AlexNet's choice adds to the accuracy, for each seed."""
    changed, before = (
        [row["accuracy"] for row in seeds_of("ablations", data=data, base=base, factor=f)]
        for f in (factor, None)
    )
    sign = 1 if base == "LeNet-5" else -1
    return [sign * (a - b) for a, b in zip(changed, before, strict=True)]


def ablations() -> str:
    """Return what each difference between LeNet-5 and AlexNet changes, on both datasets."""
    columns = [(b, d) for b in ("LeNet-5", "AlexNet") for d in ("digits", "photographs")]
    means = [
        mean_of("ablations", "accuracy", data=data, base=base, factor=None)
        for base, data in columns
    ]
    rows = [["accuracy", *(f"{mean:.3f}" for mean in means)]]
    for factor, title in TITLES.items():
        cells = [title]
        for base, data in columns:
            found = gains(data, base, factor)
            each = ", ".join(f"{gain:+.3f}" for gain in found)
            cells.append(f"{statistics.mean(found):+.3f} ({each})")
        rows.append(cells)
    return markdown(("", *(f"in {base}, {data}" for base, data in columns)), rows)


def unbalanced() -> str:
    """Return the metrics of classifiers on a balanced and on an unbalanced test set."""
    keys = ("accuracy", "balanced_accuracy", "macro_f1")
    rows = []
    for test in ("unbalanced", "balanced"):
        for training in dict.fromkeys(r["training"] for r in lesson("unbalanced")):
            if not seeds_of("unbalanced", test=test, training=training):
                continue
            numbers = [
                f"{mean_of('unbalanced', key, test=test, training=training):.3f}" for key in keys
            ]
            title = f"`{training}`" if training.startswith("--") else training or "plain"
            rows.append([test, title, *numbers])
    return markdown(("test images", "training", "accuracy", "balanced accuracy", "macro-F1"), rows)


def digits() -> str:
    """Return the accuracies of AlexNet on training and test images, for numbers of digits."""
    rows = []
    for values in dict.fromkeys((row["images"], row["dropout"]) for row in lesson("digits")):
        named = dict(zip(("images", "dropout"), values, strict=True))
        train, test = (mean_of("digits", key, **named) for key in ("train_accuracy", "accuracy"))
        each = ", ".join(f"{row['accuracy']:.4f}" for row in seeds_of("digits", **named))
        cells = (f"{values[0]:,}", values[1] or "none", f"{train:.4f}", f"{test:.4f} ({each})")
        rows.append([*map(str, cells), f"{train - test:.4f}"])
    return markdown(("images", "dropout", "training images", "test images", "difference"), rows)


def with_seeds(rows: Sequence[dict[str, Any]]) -> str:
    """Return the mean test accuracy of rows, and each of them in parentheses."""
    each = [row["accuracy"] for row in rows]
    return f"{statistics.mean(each):.3f} ({', '.join(f'{value:.3f}' for value in each)})"


def images() -> str:
    """Return the test accuracies of a CNN, a ViT and a hybrid, for numbers of training images."""
    numbers, networks = (
        list(dict.fromkeys(row[key] for row in lesson("images"))) for key in ("images", "network")
    )
    rows = [
        [f"{number:,}"]
        + [with_seeds(seeds_of("images", images=number, network=name)) for name in networks]
        for number in numbers
    ]
    return markdown(("training images", *networks), rows)


def equally_tuned() -> str:
    """Return the accuracies of lab's models on 2,000 photographs."""
    rows = []
    for model in dict.fromkeys(row["model"] for row in lesson("models")):
        found = seeds_of("models", model=model)
        train, test = (
            mean_of("models", key, model=model) for key in ("train_accuracy", "accuracy")
        )
        size = f"{found[0]['parameters'] / 1e6:.2f} M"
        cells = (f"`{model}`", size, f"{found[0]['lr']:g}", f"{train:.3f}", with_seeds(found))
        rows.append([*cells, f"{train - test:.3f}"])
    heads = ("model", "parameters", "learning rate", "training images", "test images")
    return markdown((*heads, "difference"), rows)


def transfer() -> str:
    """Return the test accuracies after training with and without pretraining."""
    rows = []
    for network in dict.fromkeys(row["network"] for row in lesson("transfer")):
        found = [
            seeds_of("transfer", network=network, start=start) for start in ("random", "pretrained")
        ]
        before, after = (statistics.mean(row["accuracy"] for row in each) for each in found)
        rows.append([network, *map(with_seeds, found), f"{after - before:+.3f}"])
    return markdown(("network", "random weights", "pretrained on other classes", "gain"), rows)


def layers() -> str:
    """Return the statistics of the first and the last hidden layer."""
    rows = []
    for row in lesson("layers"):
        first, *_, last = row["layers"][:-1]
        cells = [f"{row['network']}, {row['state']}", f"{row['loss']:.2f}"]
        for key, form in (("std", ".2g"), ("saturated", ".2f"), ("gradient", ".1e")):
            cells.append(f"{first[key]:{form}}, {last[key]:{form}}")
        rows.append(cells)
    heads = ("network", "loss", "standard deviation", "saturated or zero", "gradient")
    return markdown(heads, rows)


# benchmarks/RESULTS.md


def saving_shares() -> list[float]:
    """Return the time of saving as shares of an epoch, in percent."""
    plain, with_saving = log("saving")["plain"], log("saving")["saving"]
    epoch = statistics.median(plain) / saving.STEPS * saving.STEPS_PER_EPOCH
    return [100 * (b - a) / epoch for a, b in zip(plain, with_saving, strict=True)]


def speed() -> str:
    """Return the table of the measurements on CPUs."""
    epyc_alexnet = log("alexnet-avx2")["cases"]["AlexNet, photographs"]
    lenet = log("lenet5")["cases"]["LeNet-5, MNIST"]
    resnet = log("resnet18-224")["cases"]["ResNet-18, 224 pixels"]
    alexnet, alexnet_floor = (
        log(n)["cases"]["AlexNet, photographs"] for n in ("alexnet", "alexnet-floor")
    )
    epyc, xeon = log("worlds")["results"], log("worlds-amx")["results"]

    def against(results: dict, name: str, key: str = "both_seconds") -> str:
        return spread(ratios(results, name, "lab", key))

    def of_floor(results: dict) -> str:
        return spread(ratios(results, "lab", "floor", "images_per_second"))

    def of_one(results: dict, name: str) -> str:
        return spread(ratios(results, name, "1 process", "images_per_second"))

    def of_loader(name: str) -> str:
        results = log("folder-training")["results"]
        key = "images_per_second"
        return spread(ratios(results, "training: lab", f"training: {name}", key))

    def of_reading(name: str) -> str:
        return spread(ratios(log("folder-reading")["results"], "ImageFolder", name, "seconds"))

    def median(results: list[dict], key: str) -> float:
        return statistics.median(row[key] for row in results)

    first_run = (
        "`train_speed.py --mnist data --contenders notebook,accelerate,timm,resident-float32,"
        "resident,lab,floor`"
    )
    bound = "; without all-reduce "
    rows = [
        ("LeNet-5, MNIST, epoch with evaluation, against the notebook's loop †", first_run,
         "3.5", against(lenet, "notebook")),
        ("against the Accelerate loop †", "the same", "3.5", against(lenet, "accelerate")),
        ("against timm's loader †", "the same", "faster",
         f"{against(lenet, 'timm')}; training {against(lenet, 'timm', 'train_seconds')}, "
         f"evaluation {against(lenet, 'timm', 'eval_seconds')}"),
        ("training against the plain resident loop †", "the same", "1",
         f"{against(lenet, 'resident', 'train_seconds')}; without channels_last "
         + against(lenet, "resident-float32", "train_seconds")),
        ("training against the floor †", "the same", "0.93", of_floor(lenet)),
        ("evaluation against the notebook's †", "the same", "5",
         against(lenet, "notebook", "eval_seconds")),
        ("memory above the imports †", "the same", "250 MB",
         f"{median(lenet['lab'], 'memory_mb'):.0f} MB"),
        ("first step after the imports †", "the same", "1 s",
         f"{median(lenet['lab'], 'first_step_seconds'):.1f} s"),
        ("AlexNet, photographs, training, against the notebook's loop",
         "`train_speed.py --photographs data/cifar10-jpg --rounds 2`", "2.4",
         against(alexnet, "notebook", "train_seconds")),
        ("against the Accelerate loop", "the same", "faster",
         against(alexnet, "accelerate", "train_seconds")),
        ("against the floor", "the same with `--contenders lab,floor --rounds 5`", "0.97",
         f"{of_floor(alexnet_floor)}; in the run above {of_floor(alexnet)}: the floor is as noisy "
         "as that"),
        ("evaluation against the notebook's", "the same as the first", "5",
         against(alexnet, "notebook", "eval_seconds")),
        ("training against the plain resident loop †",
         "the same with `--contenders notebook,resident-float32,lab --alexnet-steps 12`", "1",
         f"{against(epyc_alexnet, 'resident-float32', 'train_seconds')}; against the notebook's "
         + against(epyc_alexnet, "notebook", "train_seconds")),
        ("ResNet-18 at 224 pixels, training against the plain resident loop †",
         "`train_speed.py --large --contenders resident-float32,resident,lab`", "1",
         f"{against(resnet, 'resident', 'train_seconds')}; without channels_last "
         + against(resnet, "resident-float32", "train_seconds")),
        ("one checkpoint and best.safetensors, share of an epoch (AlexNet, AdamW, 178 and 59 MB)",
         "`saving.py --rounds 8`", "2 %", f"{spread(saving_shares())} %"),
        ("2 processes over gloo against 1, AlexNet †", "`worlds.py --rounds 3`", "0.85",
         of_one(epyc, "2 processes") + bound
         + of_one(epyc, "2 processes, no all-reduce")),
        ("the same in bfloat16, on the first machine", "`worlds.py --rounds 3`", "0.85",
         of_one(xeon, "2 processes") + bound
         + of_one(xeon, "2 processes, no all-reduce")),
        ("training batches of 224 pixels from JPEG files of 500, against ImageFolder †",
         "`folder.py data/photos --training --rounds 2`", "1", of_loader("ImageFolder")),
        ("against timm's loader †", "the same", "1", of_loader("timm")),
        ("against Hugging Face datasets †", "the same", "1", of_loader("datasets")),
        ("against reading and decoding alone †", "the same", "", of_loader("decoding")),
        ("reading 50,000 JPEG files of 32 pixels into memory, against ImageFolder †",
         "`folder.py data/cifar10-jpg/train --rounds 2`", "1", of_reading("lab, first start")),
        ("the same from the cache, at the next start †", "the same", "",
         of_reading("lab, second start")),
    ]  # fmt: skip
    rows = [(*row, target, _judged(target, measured)) for *row, target, measured in rows]
    return markdown(("what", "command", "target", "measured"), rows)


def _judged(target: str, measured: str) -> str:
    """Return a measured ratio with "not met" after it if it is below its target."""
    ratio = re.match(r"([\d.]+) \(.*?\)", measured)
    if not ratio or not re.fullmatch(r"[\d.]+", target) or float(ratio[1]) >= float(target):
        return measured
    return f"{ratio[0]}, not met{measured[ratio.end() :]}"


def gpu_steps() -> str:
    """Return the table of training steps on one H100."""
    steps, batches = log("gpu")["steps"], log("gpu")["pipeline"]
    lines = [
        ("LeNet-5, TF32 (**auto**)", "lenet5 TF32", "lenet5 TF32, kernel by kernel"),
        ("channels_last", "lenet5 TF32, channels_last", ""),
        ("bfloat16", "lenet5 bfloat16", ""),
        ("float32", "lenet5 float32", ""),
        ("batch 4,096", "lenet5 TF32, batch 4096", ""),
        ("AlexNet, bfloat16, channels_last (**auto**)", "alexnet bfloat16, channels_last",
         "alexnet bfloat16, channels_last, by kernels"),
        ("without channels_last", "alexnet bfloat16", ""),
        ("TF32, channels_last", "alexnet TF32, channels_last", ""),
        ("TF32", "alexnet TF32", ""),
        ("float32", "alexnet float32", ""),
        ("AdamW", "alexnet bfloat16, AdamW", ""),
        ("Muon", "alexnet bfloat16, Muon", "alexnet bfloat16, Muon, by kernels"),
        ("batch 512", "alexnet bfloat16, batch 512", ""),
        ("batch 2,048", "alexnet bfloat16, batch 2048", ""),
        ("batch 8,192", "alexnet bfloat16, batch 8192", ""),
        ("`--compile`", "alexnet bfloat16, compile", ""),
        ("load, crop and flip a batch", "alexnet, batches", "alexnet, batches, kernel by kernel"),
    ]  # fmt: skip
    rows = []
    for title, name, by_kernels in lines:
        row, plain = (steps | batches)[name], (steps | batches).get(by_kernels)
        of_rate = f"{row['utilization']:.1%}" if row.get("utilization", 0) > 0.01 else ""
        cells = [f"{row['ms']:#.3g}", f"{row['images_per_second']:,.0f}", of_rate]
        cells += [f"{plain['ms']:#.3g}", str(plain["launches"])] if plain else ["", ""]
        rows.append([title, *cells])
    heads = ("step", "ms", "images/s", "share of the matrix rate", "without graphs, ms")
    return markdown((*heads, "its launches"), rows)


def gpu_epochs() -> str:
    """Return the table of whole epochs on one H100."""
    rows = []
    for name, row in log("gpu")["epochs"].items():
        seconds, evaluation = row["train_seconds"], statistics.median(row["eval_seconds"][1:])
        later = spread(seconds[1:])
        counts = str(len(seconds))
        cells = [counts, f"{seconds[0]:.2f}", later, f"{evaluation:.3f}", f"{row['seconds']:.1f}"]
        rows.append([name, *cells])
    heads = ("run", "epochs", "first epoch, s", "later epochs, s", "evaluation, s")
    return markdown((*heads, "total, s"), rows)


def precisions() -> str:
    """Return the table of lab's automatic choices, with two threads."""
    rows = []
    for model, title, file in (
        ("lenet5", "LeNet-5 †", "choices-lenet5"), ("alexnet", "AlexNet", "choices")
    ):  # fmt: skip
        results = log(file)["results"]
        for part in (model, f"{model}, in processes of their own"):
            chosen = next(name for name in results[part] if "auto" in name)
            for name, timed in results[part].items():
                if "1 threads" in name:
                    continue
                label = name.replace(", 2 threads", "").replace("(auto)", "auto")
                label = label.replace("auto", "**auto**")
                if part != model:
                    label += " (own process)"
                speeds = spread([row["images_per_second"] for row in timed], ",.0f")
                against = spread(ratios(results[part], name, chosen, "images_per_second"))
                rows.append([title, label, speeds, against])
    return markdown(("model", "", "images/s", "/ auto"), rows)


def muon() -> str:
    """Return the table of Muon's iterations in both precisions."""
    results = log("muon")["results"]["muon"]
    return choices.table(results, "float32 (auto)", "updates_per_second").strip()


def scale() -> str:
    """Return the table of what millions of files cost: CPU seconds and added memory."""
    results = log("scale")["results"]
    sizes = [*results["dataset"]]
    rows = []
    for part in ("dataset", "orders", "results"):
        for name in results.get(part, {}).get(sizes[0], {}):
            steps = [results[part].get(size, {}).get(name) for size in sizes]
            if name != "bytes":
                rows.append([name, *(cost(step) for step in steps)])
    heads = [f"{int(size):,} files" for size in sizes]
    return markdown(("", *heads), rows)


def cost(step: dict[str, Any] | None) -> str:
    """Return the cost of a step of scale.py."""
    if step is None:
        return "-"
    if "worker_mb" in step:
        return f"{step['worker_mb']:,} MB"
    seconds = step["cpu_seconds"]
    return f"{seconds:{',.0f' if seconds >= 10 else '.2g'}} s, {step['peak_mb']:,} MB"


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        finetune,
        results,
        models,
        fewer_images,
        both_tasks,
        confusions,
        ablations,
        digits,
        images,
        equally_tuned,
        transfer,
        unbalanced,
        layers,
        speed,
        gpu_steps,
        gpu_epochs,
        precisions,
        muon,
        scale,
    )
}


def rewrite(page: str) -> str:
    """Return a page's text with its tables replaced by those made from the logs."""

    def block(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}"

    return re.sub(BLOCK, block, page, flags=re.DOTALL)


def main() -> None:
    """Update all pages whose tables changed."""
    for name in PAGES:
        path = ROOT / name
        before = path.read_text()
        after = rewrite(before)
        if after != before:
            path.write_text(after)
            print(f"written: {name}")


if __name__ == "__main__":
    main()
