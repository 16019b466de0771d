"""Settings of training and evaluation: types, defaults, bounds and help texts."""

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lab.errors import UserError


class InvalidSettingError(UserError):
    """The error of a setting with a wrong type or a value outside its choices or bounds."""

    def __init__(self, name: str, value: object, expected: str, source: str = ""):
        super().__init__(f"invalid {name} {value!r}{source}", f"expected {expected}")

    def __str__(self) -> str:
        return f"{self.what}: {self.hint}."


def option(default: Any, group: str, text: str, **metadata: Any) -> Any:
    """Return a dataclass field that is also a command-line option, with its help group and text.

    `metadata`: `choices`, `each_of` (choices of a comma-separated list), `low` and `high`
    (inclusive bounds), `above` (exclusive lower bound), `from_recipe` (recipes may set it),
    `nonempty` (the command line must not give an empty text), `positional`, `nargs`, `metavar`.
    """
    return field(default=default, metadata={"group": group, "text": text, **metadata})


def split_list(text: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list, in order; "none" is an empty list."""
    return tuple(name for name in text.replace(" ", "").split(",") if name not in ("", "none"))


def flag(name: str) -> str:
    """Return the command-line option of a field: `--batch-size` for `batch_size`."""
    return "--" + name.replace("_", "-")


def check_fields(config: Any) -> None:
    """Raise `UserError` for the first field outside its choices or bounds."""
    for f in dataclasses.fields(config):
        value, m = getattr(config, f.name), f.metadata
        if value is None:
            continue
        expected = ""
        names = split_list(value) if "each_of" in m else ()
        if "choices" in m and value not in m["choices"]:
            expected = f"one of {', '.join(m['choices'])}"
        elif set(names) - set(m.get("each_of", ())) or (names and "none" in value):
            expected = f"none or a comma-separated list of {', '.join(m['each_of'])}"
        elif len(set(names)) < len(names):
            expected = "every name once"
        elif isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif "low" in m and value < m["low"]:
            expected = f"at least {m['low']}"
        elif "above" in m and value <= m["above"]:
            expected = f"more than {m['above']:g}"
        elif "high" in m and value > m["high"]:
            expected = f"at most {m['high']}"
        if expected:
            raise InvalidSettingError(flag(f.name), value, expected)


SCHEDULES = ("constant", "step", "cosine", "linear")
OPTIMIZERS = ("sgd", "nesterov", "adamw", "muon")
BATCH_AUGMENTATIONS = ("crop", "flip", "cutout", "mixup", "cutmix")  # on the device
SAMPLE_AUGMENTATIONS = ("resized-crop", "trivialaugment", "randaugment", "erasing")  # in workers
AUGMENTATIONS = BATCH_AUGMENTATIONS + SAMPLE_AUGMENTATIONS
# Any other dataset is the user's: the path of a directory of images or of a manifest, a Hugging
# Face dataset (HUB and its name or path), or code (`is_code`).
NAMED_DATASETS = ("mnist", "fashion-mnist", "cifar10", "cifar100", "digits")
HUB = "hf:"
TORCHVISION, TIMM = "torchvision:", "timm:"  # how the names of these libraries' models begin
TRACKERS = ("tensorboard", "wandb")  # each an extra of pyproject.toml, too
EVAL_BATCH_SIZE = 100
AUTO_STEPS, MIN_AUTO_EPOCHS, MAX_AUTO_EPOCHS = 1000, 5, 10  # of --epochs 0
# Values that stand for one that is then stored in their place.
AUTOMATIC = {"epochs": 0, "image_size": 0, "crop_pct": 0.0, "interpolation": "auto"}
HUB_WEIGHTS = "hf://"  # begins the name of weights on the Hugging Face Hub
TIMEOUT_SECONDS, MONTH = 600, 30 * 24 * 3600


def is_code(name: str) -> bool:
    """Return whether a model or a dataset is `FILE.py:FUNCTION`, code of the user's."""
    return ".py:" in name


def model_title(model: str) -> str:
    """Return the name of a model to show: `FILE:FUNCTION`, without directories, if it is code."""
    if not is_code(model):
        return model
    file, _, function = model.rpartition(":")
    return f"{os.path.basename(file).removesuffix('.py')}:{function}"


def is_own_dataset(dataset: str) -> bool:
    """Return whether a dataset is the user's, for example a directory, not a named dataset."""
    return dataset not in NAMED_DATASETS


def dataset_title(dataset: str) -> str:
    """Return the name of a dataset to show: the last component of a path, without its suffix."""
    if not is_own_dataset(dataset):
        return dataset
    name = os.path.basename(os.path.abspath(dataset.removeprefix(HUB))) or "images"
    if is_code(name):
        return name.replace(".py:", ":")
    return name.removesuffix(".csv").removesuffix(".jsonl")


def is_same_dataset(given: str, trained: str) -> bool:
    """Return whether a dataset is that of a training, whose Python file may have been moved."""
    moved = is_code(given) and is_code(trained) and dataset_title(given) == dataset_title(trained)
    return given == trained or moved


def is_on_hub(weights: str) -> bool:
    """Return whether weights are in a repository of the Hugging Face Hub, `hf://USER/NAME`."""
    return weights.startswith(HUB_WEIGHTS)


def check_output(weights: str, output: str) -> None:
    """Raise `UserError` if a script would write beside weights that are in the Hub's cache."""
    if is_on_hub(weights) and not output:
        raise UserError(
            f"{weights} is on the Hub: results cannot be written beside it", "Add --output"
        )


TASK, TRAINING = "model and data", "training"  # of train.py
WEIGHTS, REPORT = "weights and data", "output"  # of the other scripts
MACHINE, OUTPUT = "devices and processes", "runs and logging"

# Options of several scripts, as functions that return a field.
TRAINED_WEIGHTS = partial(option, "", WEIGHTS, "directory of a run, its .safetensors file, or "
                          "hf://USER/NAME[@REVISION] on the Hugging Face Hub",
                          positional=True)  # fmt: skip
OWN_MODEL = partial(option, "", WEIGHTS, "the model's code, if it is a function of yours, as in "
                    "training",
                    metavar="FILE.py:FUNCTION")  # fmt: skip
IMAGE_COLUMN = partial(option, "", TASK, "column of a Hugging Face dataset that contains the "
                       "images; default: found by its type", metavar="NAME")  # fmt: skip
LABEL_COLUMN = partial(option, "", TASK, "column of a Hugging Face dataset that contains the "
                       "labels; default: found by its type or name", metavar="NAME")  # fmt: skip
TTA = partial(option, "none", WEIGHTS, "test-time augmentation; flip: average the probabilities "
              "with those of the mirror image", choices=("none", "flip"))  # fmt: skip
MIXED_PRECISION = partial(option, "auto", MACHINE, "precision of the computation; no: float32; "
                          "auto: as in training for trained weights, else bf16 if the device has "
                          "it and the model gains from it, else float32 (with TF32 on NVIDIA GPUs)",
                          choices=("auto", "no", "bf16", "fp16"))  # fmt: skip
LOADER = partial(option, "auto", MACHINE, "resident: keep the decoded dataset in device memory; "
                 "streaming: read it with workers; auto: resident if it fits and "
                 "workers do not augment the images",
                 choices=("auto", "resident", "streaming"))  # fmt: skip
WORKERS = partial(option, -1, MACHINE, "number of data-loading workers per process; -1: one per "
                  "thread, at most 8", low=-1, high=256)  # fmt: skip
THREADS = partial(option, 0, MACHINE, "number of CPU threads per process; 0: OMP_NUM_THREADS, or "
                  "CPU cores divided by local processes", low=0, high=1024)  # fmt: skip
TIMEOUT = partial(option, TIMEOUT_SECONDS, MACHINE, "seconds that a process waits for the other "
                  "processes before it stops", low=1, high=MONTH, metavar="N")  # fmt: skip
QUIET = partial(option, False, text="print warnings and the result only")
DEBUG = partial(option, False, text="print the traceback of an error")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run. Raises `UserError` for an invalid one."""

    # fmt: off
    model: str = option("lenet5", TASK,
        "model architecture: a name that README.md lists, torchvision:NAME, timm:NAME, or "
        "FILE.py:FUNCTION, a function of yours (docs/extending.md); for images of your own, the "
        "default is torchvision:efficientnet_b0")
    dataset: str = option("", TASK,
        f"dataset: {', '.join(NAMED_DATASETS)}, a directory of images, a manifest (.csv or "
        ".jsonl), hf:NAME or hf:PATH, a Hugging Face dataset, or FILE.py:FUNCTION, a function of "
        "yours (docs/extending.md); default: the one that belongs to the model",
        metavar="NAME|PATH")
    image_column: str = IMAGE_COLUMN()
    label_column: str = LABEL_COLUMN()
    revision: str = option("", TASK,
        "commit, tag or branch of a dataset on the Hugging Face Hub; the run records the commit",
        metavar="NAME")
    data_dir: str = option("data", TASK,
        "directory of named datasets, which downloads go to", metavar="DIR")
    recipe: str = option("default", TASK,
        "named set of hyperparameters to start from: default, finetune, notebook or smoke; for "
        "images of your own and pretrained weights, the default is finetune")
    image_size: int = option(0, TASK,
        "image height and width in pixels; 0: the model's default", low=0, high=4096)
    fit: str = option("crop", TASK,
        "how images become square in evaluation; crop: cut off the longer sides, pad: add black "
        "borders, squash: change the aspect ratio", choices=("crop", "pad", "squash"),
        from_recipe=True)
    crop_pct: float = option(1.0, TASK,
        "fraction of the shorter side that --fit crop keeps (not in training with resized-crop); "
        "0: as for the model's pretrained weights", low=0.0, high=1.0, from_recipe=True)
    interpolation: str = option("bilinear", TASK,
        "filter that resizes images; auto, the default of torchvision:NAME, timm:NAME and "
        "--pretrained on images of your own: as for the model's pretrained weights",
        choices=("auto", "bilinear", "bicubic"))
    val_fraction: float = option(0.1, TASK,
        "fraction of the training split held out to select the best epoch, if the dataset has "
        "no validation split; 0: select on the test split",
        low=0.0, high=0.9, from_recipe=True)
    test_fraction: float = option(0.2, TASK,
        "fraction held out for testing, if the dataset has no test split", low=0.01, high=0.9)
    split_seed: int = option(0, TASK,
        "seed of the held-out fractions; independent of --seed",
        low=0, high=2**31 - 1)
    folds: int = option(0, TASK,
        "number of parts of the training images for cross-validation, of which each is the test "
        "split of one run (see cross_validate.py); 0: no cross-validation", low=0, metavar="K")
    fold: int = option(0, TASK,
        "number of the part, from 1 to K, that is the test split of this run", low=0, metavar="I")
    max_train_samples: int = option(0, TASK,
        "maximum number of training samples; 0: all", low=0, metavar="N", from_recipe=True)
    max_eval_samples: int = option(0, TASK,
        "maximum number of validation and of test samples; 0: all",
        low=0, metavar="N", from_recipe=True)
    skip_unreadable: bool = option(False, TASK,
        "leave out images that cannot be decoded, and list them")

    epochs: int = option(5, TRAINING,
        "number of passes over the training split; 0: as many as give about "
        f"{AUTO_STEPS:,} steps, but {MIN_AUTO_EPOCHS} to {MAX_AUTO_EPOCHS}",
        low=0, from_recipe=True)
    max_steps: int = option(0, TRAINING,
        "stop after this number of optimizer steps, without changing the schedule; 0: no "
        "limit",
        low=0, metavar="N", from_recipe=True)
    batch_size: int = option(128, TRAINING,
        "global batch size: samples per optimizer step over all processes", low=1, from_recipe=True)
    grad_accum_steps: int = option(1, TRAINING,
        "number of parts to split each batch into to save memory; the global batch size does "
        "not change",
        low=1)
    grad_checkpointing: bool = option(False, TRAINING,
        "recompute the activations of the model's blocks in the backward pass, to save memory")
    optimizer: str = option("nesterov", TRAINING,
        "optimizer; nesterov: SGD with Nesterov momentum; muon: Muon for the weights of hidden "
        "layers, AdamW for the other parameters", choices=OPTIMIZERS, from_recipe=True)
    lr: float = option(0.05, TRAINING,
        "peak learning rate", above=0.0, from_recipe=True)
    momentum: float = option(0.9, TRAINING,
        "momentum of sgd and nesterov; first beta of adamw and of the AdamW part of muon (Muon's "
        "own momentum is 0.95)",
        low=0.0, high=0.9999, from_recipe=True)
    weight_decay: float = option(5e-4, TRAINING,
        "weight decay; decoupled for adamw and muon", low=0.0, from_recipe=True)
    decay_biases: bool = option(False, TRAINING,
        "apply weight decay to biases and normalization layers as well", from_recipe=True)
    label_smoothing: float = option(0.0, TRAINING,
        "label smoothing: the part of each target that is spread evenly over all classes",
        low=0.0, high=0.99, from_recipe=True)
    class_weights: str = option("none", TRAINING,
        "weights of the classes in the training loss; balanced: inversely proportional to their "
        "numbers of training images",
        choices=("none", "balanced"))
    balanced_sampling: bool = option(False, TRAINING,
        "draw images of all classes equally often in training, repeating those of small classes")
    dropout: float = option(-1.0, TRAINING,
        "dropout probability; -1: the model's default",
        low=-1.0, high=0.99, from_recipe=True)
    schedule: str = option("linear", TRAINING,
        "learning-rate schedule after the warmup; linear and cosine fall to 0 at the end of "
        "--epochs, step multiplies by --lr-gamma every --lr-step-epochs",
        choices=SCHEDULES, from_recipe=True)
    warmup_epochs: float = option(0.0, TRAINING,
        "number of epochs of linear warmup from 0 to --lr", low=0.0, from_recipe=True)
    lr_step_epochs: int = option(10, TRAINING,
        "number of epochs between the decays of the step schedule",
        low=1, from_recipe=True)
    lr_gamma: float = option(0.5, TRAINING,
        "factor of each decay of the step schedule", above=0.0, high=1.0, from_recipe=True)
    layer_decay: float = option(1.0, TRAINING,
        "factor of the learning rate from each block of the model to the block before it, so that "
        "the first layers of pretrained weights change least; 1: none", above=0.0, high=1.0,
        from_recipe=True)
    max_grad_norm: float = option(0.0, TRAINING,
        "maximum gradient norm for clipping; 0: no clipping", low=0.0, from_recipe=True)
    ema_decay: float = option(0.0, TRAINING,
        "decay per step of an exponential moving average of the weights, which is then "
        "evaluated and saved; 0: off",
        low=0.0, high=0.999999, from_recipe=True)
    augment: str = option("none", TRAINING,
        f"none, or a comma-separated list of {', '.join(AUGMENTATIONS)} (docs/training.md)",
        each_of=AUGMENTATIONS, from_recipe=True, nonempty=True)
    mixup_alpha: float = option(1.0, TRAINING,
        "mixing coefficients of mixup and cutmix are drawn from Beta(A, A); with both, each "
        "batch uses one of them",
        above=0.0, high=100.0, metavar="A", from_recipe=True)
    init: str = option("default", TRAINING,
        "initial weights: PyTorch's default, Kaiming normal, or kaiming_zero, Kaiming normal with "
        "zeros in the last layer",
        choices=("default", "kaiming", "kaiming_zero"), from_recipe=True)
    pretrained: bool = option(False, TRAINING,
        "start from the weights that torchvision or timm publishes, which are downloaded once, "
        "with a new classifier", from_recipe=True)
    init_checkpoint: str = option("", TRAINING,
        "start from these weights of the same model, a file, the directory of a run or "
        "hf://USER/NAME[@REVISION]; a classifier of other classes is new",
        metavar="FILE")
    linear_probe: bool = option(False, TRAINING,
        "first fit the new classifier of pretrained weights by logistic regression on their "
        "features", from_recipe=True)
    freeze: str = option("none", TRAINING,
        "what training does not change; backbone: the parameters of all layers but the "
        "classifier, and the statistics of BatchNorm layers; batchnorm: these statistics, which a "
        "few small batches would change too much",
        choices=("none", "backbone", "batchnorm"), from_recipe=True)
    monitor: str = option("accuracy", TRAINING,
        "metric that selects the best epoch",
        choices=("accuracy", "macro_f1", "loss"), from_recipe=True)
    patience: int = option(0, TRAINING,
        "stop after this number of epochs without improvement; 0: never", low=0, metavar="N")
    on_nonfinite: str = option("stop", TRAINING,
        "stop if the loss is not finite, or skip steps with a gradient that is not finite, on all "
        "processes",
        choices=("stop", "skip"))
    seed: int = option(42, TRAINING,
        "random seed of the weights, the sample order, augmentation and dropout",
        low=0, high=2**31 - 1)

    mixed_precision: str = MIXED_PRECISION()
    loader: str = LOADER()
    workers: int = WORKERS()
    threads: int = THREADS()
    timeout_seconds: int = TIMEOUT()
    sync_bn: bool = option(False, MACHINE,
        "synchronize BatchNorm statistics across processes (GPUs only)")
    deterministic: bool = option(False, MACHINE,
        "use deterministic algorithms only, even if they are slower")
    compile: bool = option(False, MACHINE,
        "compile the model with torch.compile")
    cuda_graphs: str = option("auto", MACHINE,
        "run training steps as CUDA graphs; auto: on one GPU if the step allows it",
        choices=("auto", "never"))

    max_hours: float = option(0.0, MACHINE,
        "save a checkpoint and stop after this number of hours, before a job's time limit; 0: "
        "no limit",
        low=0.0, metavar="H")

    resume: str = option("", OUTPUT,
        "resume the run in this directory; auto: resume the run --name if it exists, else "
        "start it",
        metavar="RUN", nonempty=True)
    checkpoint_every: int = option(0, OUTPUT,
        "number of steps between checkpoints; 0: only at the end of each epoch",
        low=0, metavar="N")
    keep_checkpoints: int = option(2, OUTPUT,
        "number of checkpoints to keep", low=1, metavar="K")
    output_dir: str = option("runs", OUTPUT,
        "parent directory of the runs", metavar="DIR")
    name: str = option("", OUTPUT,
        "name of the run's directory; default: MODEL-DATASET, then MODEL-DATASET-2, ...",
        nonempty=True)
    overwrite: bool = option(False, OUTPUT,
        "replace the existing run --name")
    log_every: int = option(10, OUTPUT,
        "number of steps between lines of steps.jsonl", low=1, metavar="N")
    tracker: str = option("", OUTPUT,
        f"comma-separated list of experiment trackers to log to: {', '.join(TRACKERS)}",
        each_of=TRACKERS, metavar="LIST")
    push_to_hub: str = option("", OUTPUT,
        "upload the finished run to this Hugging Face repository, which is created as private "
        "if it does not exist",
        metavar="NAME")
    quiet: bool = QUIET(group=OUTPUT)
    debug: bool = DEBUG(group=OUTPUT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if 0 < self.epochs <= self.warmup_epochs:
            raise UserError(
                f"--warmup-epochs {self.warmup_epochs:g} is not less than --epochs {self.epochs}",
                "Give fewer warmup epochs, or the learning rate never reaches --lr",
            )
        if self.folds == 1 or not min(self.folds, 1) <= self.fold <= self.folds:
            raise UserError(
                f"--folds {self.folds} and --fold {self.fold} do not select a fold",
                "Give at least 2 folds and the number of one of them, or train all of them with "
                "cross_validate.py",
            )
        if self.class_weights != "none" and self.balanced_sampling:
            raise UserError(
                "--class-weights and --balanced-sampling both compensate for unbalanced classes, "
                "and together would favor the small ones",
                "Give only one of them",
            )
        if self.pretrained and self.init_checkpoint:
            raise UserError(
                "--pretrained and --init-checkpoint both set the initial weights",
                "Give only one of them",
            )
        if not (self.pretrained or self.init_checkpoint):
            hint = "Add --pretrained or --init-checkpoint"
            if self.freeze != "none":
                raise UserError("--freeze would freeze random weights", hint)
            if self.linear_probe:
                raise UserError("--linear-probe needs pretrained weights", hint)
        if self.grad_checkpointing and self.compile:
            raise UserError(
                "--grad-checkpointing cannot be combined with --compile", "Give only one of them"
            )
        if self.loader == "resident" and self.sample_augmentations:
            raise UserError(
                f"--augment {self.sample_augmentations[0]} needs worker processes",
                "Leave out --loader resident",
            )
        if self.resume == "auto" and not self.name:
            raise UserError("--resume auto needs the --name of a run", "Add --name")
        if self.resume not in ("", "auto") and self.name:
            raise UserError("--resume and --name both name a run", "Leave out --name")
        if self.resume and self.overwrite:
            raise UserError(
                "--overwrite would delete the run that --resume continues", "Give only one of them"
            )
        if self.overwrite and not self.name:
            raise UserError("--overwrite needs the --name of a run", "Add --name")
        if "/" in self.name or self.name in {".", ".."}:
            raise UserError(
                f"--name {self.name} is a path", "Give the parent directory with --output-dir"
            )

    @property
    def model_title(self) -> str:
        """Return the name of the model to show."""
        return model_title(self.model)

    @property
    def dataset_title(self) -> str:
        """Return the name of the dataset to show."""
        return dataset_title(self.dataset)

    @property
    def augmentations(self) -> tuple[str, ...]:
        """Return the names in `augment` of the augmentations on the device, in order."""
        return tuple(n for n in split_list(self.augment) if n in BATCH_AUGMENTATIONS)

    @property
    def sample_augmentations(self) -> tuple[str, ...]:
        """Return the names in `augment` of the augmentations in worker processes."""
        return tuple(n for n in split_list(self.augment) if n in SAMPLE_AUGMENTATIONS)


@dataclass(frozen=True)
class EvalConfig:
    """The settings of an evaluation. None: as in training, see the weights' metadata."""

    # fmt: off
    weights: tuple[str, ...] = option((), WEIGHTS,
        "directory of a run, its .safetensors file, or hf://USER/NAME[@REVISION] on the Hugging "
        "Face Hub; of several runs, the mean of their probabilities is evaluated",
        positional=True, nargs="+")
    split: str = option("test", WEIGHTS,
        "split to evaluate; all: every sample of the dataset",
        choices=("test", "val", "train", "all"))
    model: str = OWN_MODEL()
    dataset: str | None = option(None, WEIGHTS,
        "dataset, as for train.py; default: the training dataset", metavar="NAME|PATH")
    image_column: str | None = option(None, WEIGHTS,
        "as for train.py; default: as in training", metavar="NAME")
    label_column: str | None = option(None, WEIGHTS,
        "as for train.py; default: as in training", metavar="NAME")
    revision: str | None = option(None, WEIGHTS,
        "as for train.py; default: as in training", metavar="NAME")
    data_dir: str | None = option(None, WEIGHTS,
        "directory of named datasets, which downloads go to; default: as in training, without a "
        "download", metavar="DIR")
    max_eval_samples: int | None = option(None, WEIGHTS,
        "maximum number of samples; 0: all; default: as in training", low=0, metavar="N")
    skip_unreadable: bool = option(False, WEIGHTS,
        "leave out images that cannot be decoded, and list them; default on the training "
        "dataset: as in training")
    tta: str = TTA()
    calibrate: bool = option(False, WEIGHTS,
        "fit a temperature for the confidence on the validation split, store it in the weights, "
        "and evaluate that split")
    batch_size: int = option(0, MACHINE,
        "samples per forward pass, which does not change the results; 0: 100, or more on a GPU",
        low=0)
    mixed_precision: str = MIXED_PRECISION()
    loader: str = LOADER()
    workers: int = WORKERS()
    threads: int = THREADS()
    timeout_seconds: int = TIMEOUT()
    output: str = option("", REPORT,
        "directory of report.json and the predictions; default: evaluate-SPLIT beside the "
        "weights, or evaluate-SPLIT-N with --max-eval-samples N; for several runs: ensemble-SPLIT "
        "in the working directory; the results of --tta flip are in a directory of the same name "
        "with -tta-flip appended",
        metavar="DIR")
    quiet: bool = QUIET(group=REPORT)
    debug: bool = DEBUG(group=REPORT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        for weights in self.weights:
            check_output(weights, self.output or ("ensemble" if len(self.weights) > 1 else ""))
            if self.calibrate and is_on_hub(weights):
                raise UserError(
                    f"--calibrate changes the weights, and {weights} is on the Hub",
                    "Give the run's directory, and upload it again",
                )
        if self.calibrate and len(self.weights) > 1:
            raise UserError("--calibrate fits the temperature of one run", "Give a single run")
        if self.calibrate and self.split in ("train", "all"):
            raise UserError(
                f"--calibrate fits on the validation split, not on --split {self.split}",
                "Leave out --split",
            )
        if self.calibrate:
            object.__setattr__(self, "split", "val")

    def part(self, trained: Mapping[str, Any]) -> str:
        """Return a name for what is evaluated: the split, and the number of samples if changed.

        `trained` holds the data settings of the training run.
        """
        limit = trained["max_train_samples" if self.split == "train" else "max_eval_samples"]
        if self.max_eval_samples in (None, 0 if self.split == "all" else limit):
            return self.split
        return f"{self.split}-{self.max_eval_samples or 'all'}"

    def data_overrides(self, trained: Mapping[str, Any]) -> dict[str, Any]:
        """Return the data settings that replace those of the training run, which are `trained`."""
        default = 0 if self.split == "all" else None
        limit = default if self.max_eval_samples is None else self.max_eval_samples
        same = self.dataset is None or is_same_dataset(self.dataset, trained["dataset"])
        names = ("image_column", "label_column", "revision")
        of_hub = {name: getattr(self, name) for name in names}
        if not same:
            of_hub = {name: value or "" for name, value in of_hub.items()}
        overrides = of_hub | {
            "dataset": self.dataset,
            "data_dir": self.data_dir,
            "max_train_samples" if self.split == "train" else "max_eval_samples": limit,
            "skip_unreadable": self.skip_unreadable or (None if same else False),
        }
        return {name: value for name, value in overrides.items() if value is not None}


@dataclass(frozen=True)
class CheckConfig:
    """The settings of a check of image files."""

    # fmt: off
    dataset: str = option("", TASK,
        "directory of images, a manifest (.csv or .jsonl), hf:NAME or hf:PATH", positional=True)
    image_column: str = IMAGE_COLUMN()
    label_column: str = LABEL_COLUMN()
    image_size: int = option(224, TASK,
        "warn about images smaller than this number of pixels; 0: never", low=0, high=4096)
    threads: int = THREADS()
    output: str = option("check_data.html", OUTPUT,
        "HTML file to write", metavar="FILE")
    debug: bool = DEBUG(group=OUTPUT)
    # fmt: on

    def __post_init__(self) -> None:
        check_fields(self)
        if not is_own_dataset(self.dataset):
            raise UserError(
                f"{self.dataset} has no image files", "Give a directory of images, or a manifest"
            )
