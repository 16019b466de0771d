"""Train the rows of docs/architectures.md that change one thing at a time.

  python results/lesson.py ablations  --photographs data/cifar10-jpg    LeNet-5 and AlexNet
  python results/lesson.py digits                                       training images of MNIST
  python results/lesson.py images     --photographs data/cifar10-jpg    CNN, ViT and hybrid
  python results/lesson.py models     --photographs data/cifar10-jpg    lab's models, few images
  python results/lesson.py transfer   --photographs data/cifar10-jpg    other classes
  python results/lesson.py unbalanced                                   the metrics
  python results/lesson.py layers     --photographs data/cifar10-jpg    activations, gradients
  python results/lesson.py attention                                    where a ViT looks

Each part writes results/lesson/PART.json: the rows, the environment and the commit. An interrupted
part continues where it stopped. --full trains networks of AlexNet's own size for longer, on a GPU,
and writes PART-full.json. All runs use AdamW with a linear schedule whose warmup is a tenth of it,
and batches of 64. Except in the last three parts, each row is trained with both of LEARNING_RATES,
and then with a second seed and the one with the better validation accuracy: the tuning is the same
for all.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "benchmarks")]  # lab, installed or not; benchmarks

from lab import own_code  # noqa: E402

LEARNING_RATES = (1e-3, 3e-3)
SEEDS = (0, 1)
MAX_TRAIN_EVAL = 6000  # training images that are evaluated, a stratified sample
ALEXNET_WIDTH = 4  # of 16: small enough for a CPU
# The models of the part `models` and their image sizes. --full adds EfficientNets, with the
# paper's image sizes divided by 7; on a CPU they would take hours.
MODELS = {"lenet5": 32, "alexnet": 32, "mobilenet_v2": 32, "densenet": 32}
EFFICIENTNETS = {f"efficientnet_b{i}": size for i, size in enumerate((32, 34, 37, 43))}
# What distinguishes AlexNet from LeNet-5: arguments of `Network`, and whether images are augmented.
FACTORS = ("relu", "max_pool", "width", "deep", "dropout", "augment")
OPTIONS = (
    "--recipe default --optimizer adamw --weight-decay 0.05 --schedule linear "
    "--label-smoothing 0 --batch-size 64 --image-size 32 --monitor accuracy --quiet"
)


def main() -> None:
    """Train one part of the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--photographs", default="cifar10", metavar="DIR")
    parser.add_argument("--data-dir", default="data", metavar="DIR", help="directory of MNIST")
    parser.add_argument("--full", action="store_true", help="AlexNet itself, for a GPU")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "lesson", metavar="DIR")
    args = parser.parse_args()
    if args.part in ("transfer", "layers") and not Path(args.photographs, "train").is_dir():
        parser.error("give --photographs a directory with train/CLASS and test/CLASS")
    args.output.mkdir(parents=True, exist_ok=True)
    PARTS[args.part](args)


class Rows:
    """The rows of a part, which are saved after each run."""

    def __init__(self, args: argparse.Namespace):
        name = f"{args.part}-full" if args.full else args.part
        self.args, self.path = args, args.output / f"{name}.json"
        self.rows = json.loads(self.path.read_text())["rows"] if self.path.exists() else []

    def get(self, name: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row whose values are those of `name`; run it first if it is missing."""
        for row in self.rows:
            if row.items() >= name.items():
                return row
        self.rows.append({**name, **run()})
        print(json.dumps(self.rows[-1]), flush=True)
        self.save()
        return self.rows[-1]

    def save(self) -> None:
        """Write the rows, one on each line."""
        from common import environment

        lines = ",\n  ".join(json.dumps(row) for row in self.rows)
        head = json.dumps(environment(), indent=1)
        self.path.write_text(f'{{"environment": {head},\n "rows": [\n  {lines}\n ]}}\n')


def train_row(
    network: Callable[[int, int], Any],
    options: str,
    seed: int,
    initial_model: Any = None,
) -> tuple[dict[str, Any], Any]:
    """Train `network(num_classes, in_chans)`. Return its metrics and costs, and the model.

    Accuracies are those of the last epoch; that on the training images is without augmentation and
    dropout. The weights start from those of `initial_model`, except the last layer.
    """
    import torch

    from lab.checkpoint.train_state import TrainState
    from lab.data import DataConfig
    from lab.data.loaders import LoaderOptions, build_loader, build_loaders
    from lab.data.stratification import subsample
    from lab.data.transforms import BatchTransform
    from lab.distributed import build_accelerator
    from lab.engine.evaluation import predict_all
    from lab.engine.optimizer import build_optimizer
    from lab.engine.training import TrainStep, train_one_epoch

    config = read_config(f"{options} --seed {seed}")
    accelerator = build_accelerator(mixed_precision="no", quiet=True)
    splits = read_splits(DataConfig.of(config))
    loader_options = LoaderOptions.create(accelerator, "resident", 0)
    train_loader, val_loader, test_loader = build_loaders(splits, config, loader_options)
    normalize = BatchTransform(splits.mean, splits.std, (), accelerator.device)
    trained = subsample(splits.train, MAX_TRAIN_EVAL, seed)
    trained_loader = build_loader(trained, normalize, loader_options, batch_size=1000, seed=None)

    torch.manual_seed(seed)
    model = network(len(splits.train.class_names), splits.train.images.shape[1])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if initial_model is not None:
        weights = list(initial_model.state_dict().items())
        model.load_state_dict(dict(weights[:-2]), strict=False)  # the last layer has other classes
    model = model.to(accelerator.device)
    optimizer = build_optimizer(model, config, accelerator)
    train_step = TrainStep(accelerator, config, model, accelerator.prepare(model), optimizer)
    state, logged = TrainState(), []
    while state.epoch <= config.epochs:
        train_one_epoch(train_step, train_loader, state, lambda *_: None, logged.append)
        state = state.next_epoch()
    test = predict_all(accelerator, model, test_loader).report()
    return {
        "val_accuracy": predict_all(accelerator, model, val_loader).scores()["accuracy"],
        "accuracy": test["accuracy"],
        "macro_f1": round(test["macro_f1"], 4),
        "balanced_accuracy": round(test["balanced_accuracy"], 4),
        "train_accuracy": predict_all(accelerator, model, trained_loader).scores()["accuracy"],
        "loss_after_10_steps": round(logged[0]["loss"], 3),
        "steps": state.step,
        "parameters": parameters,
        "options": options,
    }, model


def read_config(options: str) -> Any:
    """Return the settings of a row whose options of train.py are `OPTIONS` and these."""
    from lab.config.cli import parse_arguments
    from lab.config.recipes import resolve
    from lab.config.schema import TrainConfig

    words = shlex.split(f"{OPTIONS} {options}")
    overrides = parse_arguments(TrainConfig, words, prog="lesson.py", description="")
    return replace(resolve(overrides), interpolation="bilinear", crop_pct=1.0)


@cache
def read_splits(config: Any) -> Any:
    """Return the splits of a `DataConfig`, which all runs share."""
    from lab.data.splits import load_splits

    return load_splits(config, math.inf, num_workers=1)


def tuned(
    rows: Rows, name: dict[str, Any], network: Callable, options: str, initial_model: Any = None
) -> None:
    """Train a row with each learning rate, and with all seeds at the better one."""

    def run(lr: float, seed: int) -> dict[str, Any]:
        full = f"{options} --lr {lr:g}"
        return rows.get(
            {**name, "lr": lr, "seed": seed},
            lambda: train_row(network, full, seed, initial_model)[0],
        )

    first = [run(lr, SEEDS[0]) for lr in LEARNING_RATES]
    best = max(first, key=lambda row: row["val_accuracy"])
    for seed in SEEDS[1:]:
        run(best["lr"], seed)


def dataset_options(data: str, args: argparse.Namespace) -> str:
    """Return the options of train.py for "digits" or "photographs"."""
    if data == "digits":
        return f"--dataset mnist --data-dir {shlex.quote(args.data_dir)}"
    return f"--dataset {shlex.quote(args.photographs)}"


def small_alexnet(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Return the arguments of the deep `Network`, in AlexNet's size with --full."""
    width = 16 if args.full else ALEXNET_WIDTH
    alexnet = dict(relu=True, max_pool=True, deep=True, width=width, dropout=0.25)
    return {**alexnet, **changes}


def ablations(args: argparse.Namespace) -> None:
    """Add each factor to LeNet-5, and remove each from AlexNet."""
    from networks import Network

    rows = Rows(args)
    alexnet = small_alexnet(args, augment=True)
    off = dict(relu=False, max_pool=False, deep=False, dropout=0.0, augment=False)
    size = "--epochs 6 --warmup-epochs 0.6 --max-train-samples 5000"
    if args.full:
        size = "--epochs 20 --warmup-epochs 2"
    for data in ("digits", "photographs"):
        for factor in (None, *FACTORS):
            lenet = {**off, "width": 1}
            if factor:
                lenet[factor] = 4 if factor == "width" else alexnet[factor]
            less = dict(alexnet)
            if factor:
                less[factor] = alexnet["width"] // 4 if factor == "width" else off[factor]
            for base, arguments in (("LeNet-5", lenet), ("AlexNet", less)):
                crop = "crop" if data == "digits" else "crop,flip"
                augment = crop if arguments.pop("augment") else "none"
                options = f"{dataset_options(data, args)} {size} --augment {augment}"
                name = {"data": data, "base": base, "factor": factor}
                tuned(rows, name, partial(Network, **arguments), options)


def digits(args: argparse.Namespace) -> None:
    """Train AlexNet on 600, 6,000 and 54,000 digits with equal steps, with and without dropout."""
    from networks import Network

    rows = Rows(args)
    times = 5 if args.full else 1  # 840 to 846 steps each
    for num_images, epochs in ((600, 84), (6000, 9), (54000, 1)):
        for dropout in (0.0, 0.5):
            options = f"{dataset_options('digits', args)} --max-train-samples {num_images} "
            options += f"--epochs {epochs * times} --warmup-epochs {epochs * times / 10:g} "
            options += "--augment none"
            network = partial(Network, **small_alexnet(args, dropout=dropout))
            tuned(rows, {"images": num_images, "dropout": dropout}, network, options)


def images(args: argparse.Namespace) -> None:
    """Train a CNN, a ViT and a hybrid on 1,000 to 45,000 photographs with equal steps."""
    from networks import HybridViT, Network, SmallViT

    rows = Rows(args)
    networks: dict[str, Callable] = {
        "CNN": partial(Network, **small_alexnet(args, width=ALEXNET_WIDTH, dropout=0.0)),
        "ViT": lambda num_classes, in_chans: SmallViT(num_classes),
        "hybrid": HybridViT,
    }
    times = 20 if args.full else 1  # 704 to 711 steps each
    for num_images, epochs in ((1000, 44), (5000, 9), (15000, 3), (45000, 1)):
        for name, network in networks.items():
            options = f"{dataset_options('photographs', args)} --max-train-samples {num_images} "
            options += f"--epochs {epochs * times} --warmup-epochs {epochs * times / 10:g} "
            options += "--augment crop,flip"
            tuned(rows, {"images": num_images, "network": name}, network, options)


def models(args: argparse.Namespace) -> None:
    """Train lab's models on 2,000 photographs with equal steps; see `EFFICIENTNETS`."""
    rows = Rows(args)
    times = 10 if args.full else 1  # 256 steps each
    options = f"{dataset_options('photographs', args)} --max-train-samples 2000 "
    options += f"--epochs {8 * times} --warmup-epochs {0.8 * times:g} --augment crop,flip "
    options += "--max-eval-samples 5000"
    for name, size in (MODELS | EFFICIENTNETS if args.full else MODELS).items():
        network = partial(lab_model, name, size)
        tuned(rows, {"model": name}, network, f"{options} --image-size {size}")


def lab_model(name: str, image_size: int, num_classes: int, in_chans: int) -> Any:
    """Return one of lab's models, AlexNet with the dropout and initialization of its recipe."""
    from torch import nn

    from lab.models import build_model

    init = "kaiming_zero" if name == "alexnet" else "default"
    shape = dict(num_classes=num_classes, in_chans=in_chans, image_size=image_size)
    model = build_model(name, **shape, init=init)
    if name == "alexnet":
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.25
    return model


def read_images(directory: Path) -> tuple[Any, Any]:
    """Return the images uint8 [N, 32, 32, 3] and labels [N] of a directory of classes."""
    import numpy as np
    from torchvision.datasets import ImageFolder

    folder = ImageFolder(str(directory))
    return np.stack([np.asarray(image) for image, _ in folder]), np.array(folder.targets)


def transfer(args: argparse.Namespace) -> None:
    """Train on five classes of photographs, and fine-tune on 1,000 images of the other five."""
    from networks import Network, SmallViT

    rows = Rows(args)
    splits = {name: read_images(Path(args.photographs) / name) for name in ("train", "test")}
    class_names = sorted(path.name for path in Path(args.photographs, "train").iterdir())
    for half, low in (("first", 0), ("second", 5)):
        datasets: dict[str, Any] = {"class_names": class_names[low : low + 5]}
        for name, (pixels, labels) in splits.items():
            chosen = (labels >= low) & (labels < low + 5)
            datasets[name] = (pixels[chosen], labels[chosen] - low)
        own_code.register(f"python.py:{half}", datasets)
    networks: dict[str, Callable] = {
        "CNN": partial(Network, **small_alexnet(args, width=ALEXNET_WIDTH, dropout=0.0)),
        "ViT": lambda num_classes, in_chans: SmallViT(num_classes),
    }
    pretraining = "--dataset python.py:first --augment crop,flip --lr 1e-3 "
    pretraining += f"--epochs {60 if args.full else 3} --warmup-epochs {6 if args.full else 0.3}"
    later = "--dataset python.py:second --augment crop,flip --epochs 10 --warmup-epochs 1 "
    later += "--max-train-samples 1000"
    for name, network in networks.items():
        tuned(rows, {"network": name, "start": "random"}, network, later)
        finished = [r for r in rows.rows if (r["network"], r["start"]) == (name, "pretrained")]
        if len(finished) == len(LEARNING_RATES) + len(SEEDS) - 1:
            continue
        row, pretrained = train_row(network, pretraining, SEEDS[0])
        rows.get({"network": name, "start": "pretraining"}, lambda row=row: row)
        tuned(rows, {"network": name, "start": "pretrained"}, network, later, pretrained)


def unbalanced(args: argparse.Namespace) -> None:
    """Train LeNet-5 on digits of which 5 to 9 are rare, and measure it on such a test set.

    The test sets are MNIST's own and one with as few of these digits. "One class" predicts the
    most frequent digit of the training images for every image.
    """
    import numpy as np
    from networks import Network
    from torchvision.datasets import MNIST

    rows = Rows(args)
    options = "--epochs 5 --warmup-epochs 0.5 --augment none --lr 3e-3"
    mnist = {name: MNIST(args.data_dir, train=name == "train") for name in ("train", "test")}
    splits = {name: (d.data.numpy(), d.targets.numpy()) for name, d in mnist.items()}
    rare = {name: rare_digits(*split) for name, split in splits.items()}
    tests = {"balanced": splits["test"], "unbalanced": rare["test"]}
    for test, (_, labels) in tests.items():
        counts = np.bincount(labels, minlength=10)
        scores = constant_scores(counts, int(np.bincount(rare["train"][1]).argmax()))
        rows.get({"test": test, "training": "one class"}, lambda s=scores: s)
        own_code.register(f"python.py:{test}", {"train": rare["train"], "test": tests[test]})
        for method in ("", "--class-weights balanced", "--balanced-sampling"):
            for seed in SEEDS:
                rows.get(
                    {"test": test, "training": method, "seed": seed},
                    lambda o=f"--dataset python.py:{test} {options} {method}", s=seed: train_row(
                        Network, o, s
                    )[0],
                )


def rare_digits(images: Any, labels: Any) -> tuple[Any, Any]:
    """Return all images of the digits 0 to 4 and the first hundredth of those of 5 to 9."""
    import numpy as np

    keep = labels < 5
    for digit in range(5, 10):
        found = np.flatnonzero(labels == digit)
        keep[found[: len(found) // 100]] = True
    return images[keep], labels[keep]


def constant_scores(counts: Any, predicted: int) -> dict[str, Any]:
    """Return the metrics of predicting one class, for the number of test images of each class."""
    accuracy = counts[predicted] / counts.sum()
    return {
        "accuracy": float(accuracy),
        "macro_f1": float(2 * accuracy / (1 + accuracy) / len(counts)),
        "balanced_accuracy": 1 / len(counts),
    }


def layers(args: argparse.Namespace) -> None:
    """Measure activations and gradients of each layer, before and after training."""
    import torch
    from networks import Network
    from torch import nn

    from lab.models import build_model

    rows = Rows(args)
    pixels, labels = read_images(Path(args.photographs) / "test")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:1000]
    inputs = torch.tensor(pixels)[chosen].permute(0, 3, 1, 2).float().div(255)
    inputs = (inputs - inputs.mean((0, 2, 3), keepdim=True)) / inputs.std((0, 2, 3), keepdim=True)
    targets = torch.tensor(labels)[chosen]
    options = f"{dataset_options('photographs', args)} --epochs 6 --max-train-samples 5000 "
    options += "--max-eval-samples 2000 --warmup-epochs 0.6 --augment none --lr 1e-3"
    for name, arguments in {
        "LeNet-5": {},
        "LeNet-5 with ReLU": {"relu": True},
        "AlexNet with tanh": small_alexnet(args, relu=False, dropout=0.0),
        "AlexNet": small_alexnet(args, dropout=0.0),
    }.items():
        network = partial(Network, **arguments)  # type: ignore[arg-type]
        torch.manual_seed(SEEDS[0])
        before = layer_statistics(network(10, 3), inputs, targets)
        after = layer_statistics(train_row(network, options, SEEDS[0])[1], inputs, targets)
        for state, measured in (("before training", before), ("after training", after)):
            rows.get({"network": name, "state": state}, lambda m=measured: m)
    for init in ("default", "kaiming", "kaiming_zero"):
        torch.manual_seed(SEEDS[0])
        model = build_model("alexnet", num_classes=10, in_chans=3, image_size=32, init=init)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        measured = layer_statistics(model, inputs, targets)
        rows.get({"network": "lab's AlexNet", "state": f"--init {init}"}, lambda m=measured: m)


def layer_statistics(model: Any, images: Any, labels: Any) -> dict[str, Any]:
    """Return statistics of each layer with weights, for 1,000 images.

    "std" is the standard deviation of its outputs before the activation function, "saturated" the
    fraction of outputs of the activation function with a derivative below 0.05, and "gradient" the
    root mean square of the gradient of its weights.
    """
    from torch import nn
    from torch.nn.functional import cross_entropy

    outputs: list[tuple[Any, Any]] = []
    handles = [
        module.register_forward_hook(lambda m, _, output: outputs.append((m, output)))
        for module in model.modules()
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Tanh, nn.ReLU))
    ]
    model.eval().zero_grad()
    loss = cross_entropy(model(images), labels)
    loss.backward()
    for handle in handles:
        handle.remove()
    measured = []
    for module, output in outputs:
        if isinstance(module, nn.Tanh):
            measured[-1]["saturated"] = round((output**2 > 0.95).float().mean().item(), 4)
        elif isinstance(module, nn.ReLU):
            measured[-1]["saturated"] = round((output == 0).float().mean().item(), 4)
        else:
            gradient = module.weight.grad.square().mean().sqrt().item()
            measured.append(
                {"std": round(output.std().item(), 4), "gradient": float(f"{gradient:.3g}")}
            )
    return {"loss": round(loss.item(), 4), "layers": measured}


def attention(args: argparse.Namespace) -> None:
    """Train a ViT on the bundled digits, and measure the attention of its class token.

    For the first test image of each digit, "pixels" has the mean of each of the 8x8 patches, and
    "attention" their weights in the last block, the mean over the heads.
    """
    import torch
    from networks import SmallViT
    from torch.nn.functional import avg_pool2d

    from lab.data import DataConfig
    from lab.data.transforms import BatchTransform

    rows = Rows(args)
    options = "--dataset digits --epochs 60 --warmup-epochs 6 --augment none --lr 1e-3"
    row, model = train_row(lambda num_classes, in_chans: SmallViT(num_classes), options, SEEDS[0])
    rows.get({"digit": None}, lambda: row)
    splits = read_splits(DataConfig.of(read_config(options)))
    labels = torch.as_tensor(splits.test.labels)
    chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in range(10)])
    pixels = torch.as_tensor(splits.test.images)[chosen]
    inputs: list[Any] = []
    layer = model.encoder.layers[-1].self_attention
    layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.cpu().eval()
    with torch.no_grad():
        model(BatchTransform(splits.mean, splits.std, (), torch.device("cpu"))(pixels))
        _, weights = layer(*inputs * 3)  # query, key and value: [n, 65, 64]
    for digit in range(10):
        measured = {
            "pixels": avg_pool2d(pixels[digit].float(), 4).round().int().flatten().tolist(),
            "attention": [round(w, 4) for w in weights[digit, 0, 1:].tolist()],
        }
        rows.get({"digit": digit}, lambda m=measured: m)


PARTS = {
    function.__name__: function
    for function in (ablations, digits, images, models, transfer, unbalanced, layers, attention)
}


if __name__ == "__main__":
    main()
