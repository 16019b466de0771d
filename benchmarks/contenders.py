"""The training loops that train_speed.py times.

Each contender is a function of a `Case` that returns two callables: `train(num_steps)`, which
trains for that many steps (None: one epoch) and returns the number of images, and `evaluate()`,
which returns the test accuracy (None if the contender does not evaluate).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision import transforms as T

from lab.config.recipes import resolve
from lab.config.schema import TrainConfig

WORKERS = 2
Contender = tuple[Callable[[int | None], int], Callable[[], float | None]]


@dataclass(frozen=True)
class Case:
    """Name a model and its dataset, trained as the notebooks do."""

    model: str
    dataset: str  # "mnist", or a directory with train/CLASS and test/CLASS
    data_dir: str = "data"  # of MNIST
    image_size: int = 32  # pixels per side
    batch_size: int = 128

    @property
    def config(self) -> TrainConfig:
        """Return the notebook recipe, so that all contenders compute the same."""
        preparation = {"crop_pct": 1.0, "interpolation": "bilinear"}
        return resolve({**asdict(self), **preparation, "recipe": "notebook"})

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation of each channel that the notebooks use."""
        if self.dataset == "mnist":
            return (0.1307,), (0.3081,)
        return (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

    def sets(self) -> tuple[Any, Any]:
        """Return the training and test set with the notebooks' per-sample transforms."""
        size = self.image_size
        plain = [T.ToTensor(), T.Normalize(*self.statistics)]
        if self.dataset == "mnist":
            transform = T.Compose([T.Resize((size, size)), *plain])
            return tuple(
                datasets.MNIST(self.data_dir, train=train, transform=transform)
                for train in (True, False)
            )
        augment = [T.RandomCrop(size, padding=size // 8), T.RandomHorizontalFlip()]
        root = Path(self.dataset)
        return (
            datasets.ImageFolder(str(root / "train"), T.Compose(augment + plain)),
            datasets.ImageFolder(str(root / "test"), T.Compose(plain)),
        )

    def make_model(self) -> nn.Module:
        """Return the model with lab's initial weights."""
        from lab.models import build_model

        torch.manual_seed(42)
        in_chans = 1 if self.dataset == "mnist" else 3
        return build_model(
            self.model, num_classes=10, in_chans=in_chans, image_size=self.image_size
        )


def measure(model: nn.Module, loader: DataLoader) -> float:
    """Return the accuracy, computed as in the notebooks."""
    model.eval()
    correct, total = 0, 0
    with torch.no_grad():
        for images, labels in loader:
            outputs = model(images)
            correct += (outputs.argmax(1) == labels).sum().item()
            total += labels.size(0)
    return correct / total


def notebook(case: Case) -> Contender:
    """Return the notebooks' loop: per-sample transforms, workers, `.item()` in every step."""
    train_set, test_set = case.sets()
    model = case.make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(train_set, case.batch_size, shuffle=True, num_workers=WORKERS)
    test_loader = DataLoader(test_set, case.batch_size, num_workers=WORKERS)

    def train(num_steps: int | None) -> int:
        model.train()
        running_loss, correct, total = 0.0, 0, 0
        for images, labels in islice(loader, num_steps):
            optimizer.zero_grad()
            outputs = model(images)
            loss = F.cross_entropy(outputs, labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item() * labels.size(0)
            correct += (outputs.argmax(1) == labels).sum().item()
            total += labels.size(0)
        return total

    return train, lambda: measure(model, test_loader)


def accelerate(case: Case) -> Contender:
    """Return the usual Accelerate loop: prepared loaders, `gather_for_metrics`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    train_set, test_set = case.sets()
    built_model = case.make_model()
    optimizer = torch.optim.SGD(built_model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(train_set, case.batch_size, shuffle=True, num_workers=WORKERS)
    test_loader = DataLoader(test_set, case.batch_size, num_workers=WORKERS)
    model, optimizer, loader, test_loader = accelerator.prepare(
        built_model, optimizer, loader, test_loader
    )

    def train(num_steps: int | None) -> int:
        model.train()
        total, total_loss = 0, 0.0
        for images, labels in islice(loader, num_steps):
            loss = F.cross_entropy(model(images), labels)
            total_loss += loss.detach().float()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            total += len(labels)
        return total

    def evaluate() -> float:
        model.eval()
        correct, total = 0, 0
        for images, labels in test_loader:
            with torch.no_grad():
                predictions = model(images).argmax(1)
            predictions, labels = accelerator.gather_for_metrics((predictions, labels))
            correct += (predictions == labels).sum().item()
            total += len(labels)
        return correct / total

    return train, evaluate


def lab(case: Case) -> Contender:
    """Return lab's loader, training step and evaluation, combined as in train.py."""
    from dataclasses import replace

    from common import prepare

    from lab.checkpoint.train_state import TrainState
    from lab.data import DataConfig
    from lab.data.loaders import LoaderOptions, build_loader, eval_batch_size
    from lab.data.splits import load_splits
    from lab.data.transforms import BatchTransform
    from lab.distributed import build_accelerator
    from lab.engine.evaluation import predict_all
    from lab.engine.training import train_one_epoch
    from lab.models import find_model

    config = case.config
    accelerator = build_accelerator(benefits_from_bf16=find_model(case.model).benefits_from_bf16)
    options = LoaderOptions.create(accelerator, "auto", -1)
    splits = load_splits(DataConfig.of(config), options.memory, torch.get_num_threads())
    augment = BatchTransform(splits.mean, splits.std, config.augmentations, accelerator.device)
    plain = BatchTransform(splits.mean, splits.std, (), accelerator.device)
    loader = build_loader(splits.train, augment, options, batch_size=case.batch_size, seed=42)
    eval_size = eval_batch_size(accelerator.device, case.image_size)
    test_loader = build_loader(splits.test, plain, options, batch_size=eval_size, seed=None)
    train_step = prepare(accelerator, case.make_model(), config)

    def train(num_steps: int | None) -> int:
        train_step.config = replace(config, max_steps=num_steps or 0)
        state = TrainState()
        train_one_epoch(train_step, loader, state, lambda *_: None, lambda _: None)
        return min(state.step * case.batch_size, loader.sampler.num_samples)

    def evaluate() -> float:
        return predict_all(accelerator, train_step.eval_model, test_loader).scores()["accuracy"]

    return train, evaluate


def load_images(dataset: Any, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return a dataset's images, uint8 [N, C, size, size], and labels, int64 [N], on the device."""
    dataset.transform = T.Compose([T.Resize((size, size)), T.PILToTensor()])
    batches = DataLoader(dataset, 1000, num_workers=WORKERS)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images).to(device), torch.cat(labels).to(device)


def crop_and_flip(images: Tensor) -> Tensor:
    """Return random crops of images [n, C, H, W] padded by an eighth, half of them flipped."""
    num_images, _, height, width = images.shape
    device = images.device
    padding = height // 8
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(2 * padding + 1, (2, num_images, 1), device=device)
    rows = top + torch.arange(height, device=device)  # [n, H]
    columns = left + torch.arange(width, device=device)  # [n, W]
    flipped = torch.rand(num_images, 1, device=device) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    sample = torch.arange(num_images, device=device)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def resident(case: Case, *, plain: bool = False) -> Contender:
    """Return a plain PyTorch loop over images that are resident on the device.

    It uses bfloat16 autocast and channels_last if lab does, and never if `plain`.
    """
    from lab.distributed import choose_precision
    from lab.engine.training import to_device
    from lab.models import find_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = case.make_model().to(device)
    precision = "no"
    if not plain:
        model = to_device(model, case.model, device)
        spec = find_model(case.model)
        precision = choose_precision(
            "auto", device.type, spec.benefits_from_bf16, cpu_bf16=spec.cpu_bf16
        )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    (images, labels), (test_images, test_labels) = (
        load_images(dataset, case.image_size, device) for dataset in case.sets()
    )
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in case.statistics)

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model((batch.float() / 255 - mean) / std)

    def train(num_steps: int | None) -> int:
        model.train()
        order = torch.randperm(len(labels), device=device)
        loss_sum = torch.zeros((), device=device)
        num_correct = torch.zeros((), dtype=torch.int64, device=device)
        total = 0
        for indices in order.split(case.batch_size)[:num_steps]:
            batch = images[indices]
            if case.dataset != "mnist":
                batch = crop_and_flip(batch)
            logits = forward(batch).float()
            loss = F.cross_entropy(logits, labels[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss_sum += loss.detach() * len(indices)
            num_correct += (logits.argmax(1) == labels[indices]).sum()
            total += len(indices)
        return total

    def evaluate() -> float:
        model.eval()
        num_correct = 0
        with torch.inference_mode():
            for batch, targets in zip(
                test_images.split(case.batch_size), test_labels.split(case.batch_size), strict=True
            ):
                num_correct += (forward(batch).argmax(1) == targets).sum()
        return num_correct.item() / len(test_labels)

    return train, evaluate


def floor(case: Case) -> Contender:
    """Return the computation alone: lab's model, precision and optimizer on one prepared batch."""
    from common import prepare

    from lab.distributed import build_accelerator
    from lab.models import find_model

    accelerator = build_accelerator(benefits_from_bf16=find_model(case.model).benefits_from_bf16)
    train_step = prepare(accelerator, case.make_model(), case.config)
    in_chans = 1 if case.dataset == "mnist" else 3
    shape = (case.batch_size, in_chans, case.image_size, case.image_size)
    images = torch.randn(shape, device=accelerator.device)
    labels = torch.randint(10, (case.batch_size,), device=accelerator.device)

    def train(num_steps: int | None) -> int:
        train_step.wrapped_model.train()
        for _ in range(num_steps or 60_000 // case.batch_size):
            accelerator.backward(F.cross_entropy(train_step.wrapped_model(images), labels))
            train_step.optimizer.step()
            train_step.optimizer.zero_grad()
        return (num_steps or 60_000 // case.batch_size) * case.batch_size

    return train, lambda: None


def lightning(case: Case) -> Contender:
    """Return PyTorch Lightning's Trainer on the notebooks' datasets, as in its documentation."""
    import logging
    import warnings

    import lightning as L

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.correct, self.total = model, 0, 0

        def training_step(self, batch, index):
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def validation_step(self, batch, index):
            images, labels = batch
            self.correct += (self.model(images).argmax(1) == labels).sum().item()
            self.total += len(labels)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    module = Module(case.make_model())
    train_set, test_set = case.sets()
    loader = DataLoader(train_set, case.batch_size, shuffle=True, num_workers=WORKERS)
    test_loader = DataLoader(test_set, case.batch_size, num_workers=WORKERS)
    settings = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    def train(num_steps: int | None) -> int:
        limit = {"limit_train_batches": num_steps} if num_steps else {}
        L.Trainer(max_epochs=1, **settings, **limit).fit(module, loader)
        return min((num_steps or len(loader)) * case.batch_size, len(train_set))

    def evaluate() -> float:
        module.correct = module.total = 0
        L.Trainer(**settings).validate(module, test_loader, verbose=False)
        return module.correct / module.total

    return train, evaluate


def timm(case: Case) -> Contender:
    """Return a loop without `.item()` over timm's loader, which prefetches uint8 from workers."""
    from timm.data import create_loader

    gray = case.dataset == "mnist"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = case.make_model().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    settings = {
        "input_size": (1 if gray else 3, case.image_size, case.image_size),
        "batch_size": case.batch_size,
        "mean": case.statistics[0],
        "std": case.statistics[1],
        "num_workers": WORKERS,
        "device": device,
        "color_jitter": None,
    }
    train_set, test_set = case.sets()
    train_set.transform = test_set.transform = None  # create_loader sets its own
    loader = create_loader(train_set, is_training=True, no_aug=gray, **settings)
    test_loader = create_loader(test_set, crop_pct=1.0, **settings)

    def train(num_steps: int | None) -> int:
        model.train()
        total = 0
        for images, labels in islice(loader, num_steps):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            total += len(labels)
        return total

    return train, lambda: measure(model, test_loader)


CONTENDERS = {
    "notebook": notebook,
    "accelerate": accelerate,
    "lightning": lightning,
    "timm": timm,
    "resident-float32": partial(resident, plain=True),
    "resident": resident,
    "lab": lab,
    "floor": floor,
}
