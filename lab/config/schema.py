"""Every setting of a run: its unit, default, bounds and command-line flag."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lab.errors import UserError


def option(default: Any, group: str, text: str, **metadata: Any) -> Any:
    """A dataclass field that is also a command-line flag: its `--help` group and text, its bounds.

    `metadata`: `choices`, `each_of` (choices of a list with commas), `low` and `high` (inclusive
    bounds), `above` (exclusive lower bound), `from_recipe` (the recipe sets it), `filled` (not
    given as an empty text), `metavar`.
    """
    return field(default=default, metadata={"group": group, "text": text, **metadata})


def listed(text: str) -> tuple[str, ...]:
    """The names in a list with commas, in order; none in "none"."""
    return tuple(name for name in text.replace(" ", "").split(",") if name not in ("", "none"))


def flag(name: str) -> str:
    """The command-line flag of a field: `--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Nothing; raises `UserError` for the first field outside its choices or bounds."""
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
        if value is None:
            continue
        if "choices" in m and value not in m["choices"]:
            raise UserError(
                f"{flag(f.name)} has no {value}", f"Choose from {', '.join(m['choices'])}"
            )
        names = listed(value) if "each_of" in m else ()
        if unknown := sorted(set(names) - set(m.get("each_of", ()))):
            raise UserError(
                f"{flag(f.name)} has no {', '.join(unknown)}",
                f"Choose from {', '.join(m['each_of'])}, or none",
            )
        if len(set(names)) < len(names):
            raise UserError(f"{flag(f.name)} {value} repeats a name", "Name each once")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(f.name)} is {value}", "Give a finite number")
        if "low" in m and value < m["low"]:
            raise UserError(f"{flag(f.name)} {value} is too low", f"Give at least {m['low']}")
        if "above" in m and value <= m["above"]:
            raise UserError(f"{flag(f.name)} {value} is too low", f"Give more than {m['above']:g}")
        if "high" in m and value > m["high"]:
            raise UserError(f"{flag(f.name)} {value} is too high", f"Give at most {m['high']}")


SCHEDULES = ("constant", "step", "cosine", "linear")
OPTIMIZERS = ("sgd", "nesterov", "adamw", "muon")
AUGMENTATIONS = ("crop", "flip", "cutout", "mixup", "cutmix")
TTA = ("none", "flip")
TRACKERS = ("tensorboard", "wandb")  # each an extra of pyproject.toml, too
EVAL_BATCH_SIZE = 100
TIMEOUT_SECONDS, MONTH = 600, 30 * 24 * 3600


TASK, TRAINING, MACHINE, OUTPUT = "what to train", "how to train", "where to run", "what to keep"


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one training run. Construction checks each and raises `UserError`."""

    # fmt: off
    model: str = option("lenet5", TASK,
        "network, a name in lab/models/__init__.py")
    dataset: str = option("", TASK,
        "data set, a name in lab/data/__init__.py; the model's own if not given")
    data_dir: str = option("data", TASK,
        "where data sets lie or are downloaded to; for `folder`, the pictures", metavar="DIR")
    recipe: str = option("default", TASK,
        "named settings to start from: modern, notebook, smoke")
    image_size: int = option(0, TASK,
        "pixels a side that pictures are resized to; 0: the model's own", low=0, high=4096)
    val_fraction: float = option(0.1, TASK,
        "share of the training split held out to choose the best epoch on, where the data ship no "
        "validation split; 0: choose on the test split",
        low=0.0, high=0.9, from_recipe=True)
    test_fraction: float = option(0.2, TASK,
        "share cut for testing from data that comes in one piece", low=0.01, high=0.9)
    split_seed: int = option(0, TASK,
        "seed of those cuts and of procedural data; the same for every --seed",
        low=0, high=2**31 - 1)
    num_samples: int = option(10_000, TASK,
        "training pictures made by the `shapes` data set; a fifth as many again for its test",
        low=20, high=10_000_000)
    max_train_samples: int = option(0, TASK,
        "train on this many samples of the split; 0: all", low=0, metavar="N", from_recipe=True)
    max_eval_samples: int = option(0, TASK,
        "validate and test on this many samples each; 0: all", low=0, metavar="N", from_recipe=True)
    skip_unreadable: bool = option(False, TASK,
        "leave out the images of a folder that cannot be decoded, and list them")

    epochs: int = option(5, TRAINING,
        "passes over the training split", low=1, from_recipe=True)
    max_steps: int = option(0, TRAINING,
        "stop after this many optimizer steps, wherever the schedule is; 0: no limit",
        low=0, metavar="N", from_recipe=True)
    batch_size: int = option(128, TRAINING,
        "samples a step over all processes together", low=1, from_recipe=True)
    grad_accum_steps: int = option(1, TRAINING,
        "parts that each batch is cut into, to save memory; the batch stays the same",
        low=1)
    optimizer: str = option("nesterov", TRAINING,
        "update rule", choices=OPTIMIZERS, from_recipe=True)
    lr: float = option(0.05, TRAINING,
        "peak learning rate", above=0.0, from_recipe=True)
    momentum: float = option(0.9, TRAINING,
        "momentum of sgd and nesterov; first beta of adamw, which muon holds",
        low=0.0, high=0.9999, from_recipe=True)
    weight_decay: float = option(5e-4, TRAINING,
        "weight decay; decoupled for adamw and muon", low=0.0, from_recipe=True)
    decay_biases: bool = option(False, TRAINING,
        "decay biases and normalisation layers too", from_recipe=True)
    label_smoothing: float = option(0.0, TRAINING,
        "mass moved from the true class to all classes", low=0.0, high=0.99, from_recipe=True)
    dropout: float = option(-1.0, TRAINING,
        "share of activations that dropout layers drop; -1: the network's own",
        low=-1.0, high=0.99, from_recipe=True)
    schedule: str = option("linear", TRAINING,
        "course of the learning rate", choices=SCHEDULES, from_recipe=True)
    warmup_epochs: float = option(0.0, TRAINING,
        "epochs of linear rise to --lr", low=0.0, from_recipe=True)
    lr_step_epochs: int = option(10, TRAINING,
        "epochs between drops of the `step` schedule, counted from the start",
        low=1, from_recipe=True)
    lr_gamma: float = option(0.5, TRAINING,
        "factor of each drop of the `step` schedule", above=0.0, high=1.0, from_recipe=True)
    max_grad_norm: float = option(0.0, TRAINING,
        "largest gradient norm; 0: no clipping", low=0.0, from_recipe=True)
    ema_decay: float = option(0.0, TRAINING,
        "decay a step of an average of the weights, which is then evaluated and kept; 0: off",
        low=0.0, high=0.999999, from_recipe=True)
    augment: str = option("none", TRAINING,
        "`none`, or a list with commas of crop, flip, cutout, mixup, cutmix",
        each_of=AUGMENTATIONS, from_recipe=True, filled=True)
    mixup_alpha: float = option(1.0, TRAINING,
        "mixup and cutmix, of which a batch takes one: its share is drawn from Beta(A, A)",
        above=0.0, high=100.0, metavar="A", from_recipe=True)
    init: str = option("default", TRAINING,
        "initial weights: PyTorch's default, or Kaiming normal",
        choices=("default", "kaiming"), from_recipe=True)
    pretrained: bool = option(False, TRAINING,
        "begin with torchvision's ImageNet weights, downloaded once; the head stays new")
    init_checkpoint: str = option("", TRAINING,
        "begin with these weights of the same network; a head for other classes stays new",
        metavar="FILE")
    freeze: str = option("none", TRAINING,
        "what is not trained: backbone is all but the head", choices=("none", "backbone"))
    monitor: str = option("accuracy", TRAINING,
        "what the best epoch is chosen by",
        choices=("accuracy", "macro_f1", "loss"), from_recipe=True)
    patience: int = option(0, TRAINING,
        "stop after this many epochs without a better one; 0: never", low=0, metavar="N")
    on_nonfinite: str = option("stop", TRAINING,
        "at a loss or gradient that is not finite: stop, or skip that step on all processes",
        choices=("stop", "skip"))
    seed: int = option(42, TRAINING,
        "seed of weights, sample order, augmentation and dropout", low=0, high=2**31 - 1)

    mixed_precision: str = option("auto", MACHINE,
        "arithmetic of the network; auto: by device and model",
        choices=("auto", "no", "bf16", "fp16"))
    loader: str = option("auto", MACHINE,
        "resident: all data on the device; streaming: read by workers; auto: resident if it fits",
        choices=("auto", "resident", "streaming"))
    workers: int = option(-1, MACHINE,
        "processes that read data, for each training process; -1: by cores", low=-1, high=256)
    threads: int = option(0, MACHINE,
        "CPU threads a process; 0: cores / processes on this host", low=0, high=1024)
    timeout_seconds: int = option(TIMEOUT_SECONDS, MACHINE,
        "how long a process waits for the others before it takes them for lost",
        low=1, high=MONTH, metavar="N")
    sync_bn: bool = option(False, MACHINE,
        "BatchNorm statistics over all processes (GPUs)")
    comm_hook: str = option("none", MACHINE,
        "compression of the gradients that processes exchange; none keeps the loss curve",
        choices=("none", "fp16", "bf16", "powersgd"))
    deterministic: bool = option(False, MACHINE,
        "deterministic kernels only, also where they are slower")
    compile: bool = option(False, MACHINE,
        "torch.compile the network")
    cuda_graphs: str = option("auto", MACHINE,
        "send a step to the GPU as one graph, not kernel by kernel; auto: on one GPU, where a step "
        "needs no look at its numbers",
        choices=("auto", "never"))

    max_hours: float = option(0.0, MACHINE,
        "save and stop cleanly after this many hours, before a job's time limit; 0: no limit",
        low=0.0, metavar="H")

    resume: str = option("", OUTPUT,
        "go on with the run in this folder; auto: with that of --name, if there is one",
        metavar="RUN")
    checkpoint_every: int = option(0, OUTPUT,
        "steps between states to resume from; 0: at the end of each epoch only",
        low=0, metavar="N")
    keep_checkpoints: int = option(2, OUTPUT,
        "states kept, the newest", low=1, metavar="K")
    final_checkpoints: int = option(1, OUTPUT,
        "checkpoints that a finished run keeps, to be trained further; 0: none",
        low=0, metavar="K")
    output_dir: str = option("runs", OUTPUT,
        "folder of run folders", metavar="DIR")
    name: str = option("", OUTPUT,
        "the run's folder in it; if not given MODEL-DATASET, then -2, -3 ...", filled=True)
    overwrite: bool = option(False, OUTPUT,
        "replace an existing run of that --name")
    log_every: int = option(10, OUTPUT,
        "steps between lines of steps.jsonl", low=1, metavar="N")
    tracker: str = option("", OUTPUT,
        f"log to these, too, a list with commas of {', '.join(TRACKERS)}",
        each_of=TRACKERS, metavar="LIST")
    push_to_hub: str = option("", OUTPUT,
        "upload the finished run to this repository of Hugging Face, made private where it is new",
        metavar="NAME")
    hub_images: bool = option(False, OUTPUT,
        "upload the plots that show images of the dataset, too")
    hub_public: bool = option(False, OUTPUT,
        "allow an upload to an existing repository that is public")
    quiet: bool = option(False, OUTPUT,
        "print the result only")
    debug: bool = option(False, OUTPUT,
        "show the traceback of an error")
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if self.warmup_epochs >= self.epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} fills all of --epochs {self.epochs}",
                "Give fewer: the learning rate would never reach --lr",
            )
        if (self.hub_images or self.hub_public) and not self.push_to_hub:
            overrides = "--hub-images" if self.hub_images else "--hub-public"
            raise UserError(f"{overrides} needs --push-to-hub", "Give the repository's name, too")
        if self.pretrained and self.init_checkpoint:
            raise UserError(
                "--pretrained and --init-checkpoint both give weights", "Give one of them"
            )
        if self.freeze != "none" and not (self.pretrained or self.init_checkpoint):
            raise UserError(
                "--freeze keeps random weights", "Give --pretrained or --init-checkpoint"
            )
        if self.resume == "auto" and not self.name:
            raise UserError("--resume auto goes on with the run of a --name", "Give --name too")
        if self.resume not in ("", "auto") and self.name:
            raise UserError("a run that --resume names has its --name", "Leave --name out")
        if self.resume and self.overwrite:
            raise UserError("--overwrite deletes what --resume goes on from", "Give one of them")
        if self.overwrite and not self.name:
            raise UserError("--overwrite replaces the run of a --name", "Give --name too")
        if "/" in self.name or self.name in {".", ".."}:
            raise UserError(f"--name {self.name} is a path", "Give the folder with --output-dir")

    @property
    def augmentations(self) -> tuple[str, ...]:
        """The names in `augment`, in order."""
        return listed(self.augment)


WEIGHTS, REPORT = "weights and data", "what to write"


@dataclass(frozen=True)
class EvalConfig:
    """The settings of one evaluation. What is not given is taken from the weights' metadata."""

    # fmt: off
    weights: str = option("", WEIGHTS,
        "a run's folder or a .safetensors file that train.py wrote", positional=True)
    split: str = option("test", WEIGHTS,
        "which split; all: every sample of the data, whatever splits they come in",
        choices=("test", "val", "train", "all"))
    dataset: str | None = option(None, WEIGHTS,
        "data set; if not given, the one trained on")
    data_dir: str | None = option(None, WEIGHTS,
        "where it lies or is downloaded to; if not given, where it lay in training, without a "
        "download", metavar="DIR")
    max_eval_samples: int | None = option(None, WEIGHTS,
        "evaluate this many samples; 0: all; if not given, as in training", low=0, metavar="N")
    skip_unreadable: bool = option(False, WEIGHTS,
        "leave out the images of a folder that cannot be decoded, and list them; on the data of "
        "the training, as in training")
    tta: str = option("none", WEIGHTS,
        "flip: also with each picture's mirror image, reported apart", choices=TTA)
    batch_size: int = option(0, MACHINE,
        "samples a forward pass, changes no count; 0: as in training", low=0)
    mixed_precision: str = option("auto", MACHINE,
        "arithmetic of the network; auto: as in training", choices=("auto", "no", "bf16", "fp16"))
    loader: str = option("auto", MACHINE,
        "resident, streaming or auto, as for train.py", choices=("auto", "resident", "streaming"))
    workers: int = option(-1, MACHINE,
        "processes that read data; -1: by cores", low=-1, high=256)
    threads: int = option(0, MACHINE,
        "CPU threads a process; 0: cores / processes on this host", low=0, high=1024)
    timeout_seconds: int = option(TIMEOUT_SECONDS, MACHINE,
        "how long a process waits for the others before it takes them for lost",
        low=1, high=MONTH, metavar="N")
    output: str = option("", REPORT,
        "folder for report.json and predictions.csv; else evaluate-SPLIT beside the weights, or "
        "evaluate-SPLIT-N with --max-eval-samples N",
        metavar="DIR")
    quiet: bool = option(False, REPORT,
        "print the result only")
    debug: bool = option(False, REPORT,
        "show the traceback of an error")
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)

    def part(self, trained: Mapping[str, Any]) -> str:
        """What is evaluated, as a name: the split, and how many of it where that was asked for.

        `trained` holds the settings of the training's data, which took `limit_eval` of its own.
        """
        usual = trained["max_train_samples" if self.split == "train" else "max_eval_samples"]
        if self.max_eval_samples in (None, 0 if self.split == "all" else usual):
            return self.split
        return f"{self.split}-{self.max_eval_samples or 'all'}"

    def data_overrides(self) -> dict[str, Any]:
        """The settings of the data that were given, and so replace those of the training."""
        whole = 0 if self.split == "all" else None  # every sample, unless told otherwise
        limit = whole if self.max_eval_samples is None else self.max_eval_samples
        other_data = self.dataset is not None or self.data_dir is not None
        overrides = {
            "dataset": self.dataset,
            "data_dir": self.data_dir,
            "max_train_samples" if self.split == "train" else "max_eval_samples": limit,
            "skip_unreadable": self.skip_unreadable or (False if other_data else None),
        }
        return {name: value for name, value in overrides.items() if value is not None}
