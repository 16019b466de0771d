"""Models that are code of the user's: `--model FILE.py:FUNCTION` and `train.main(model=...)`."""

import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from worlds import run_world

import evaluate
import export
import lab
import predict
import train
from lab.config.schema import TrainConfig
from lab.errors import UserError
from lab.models import build_model, classifier_param_names, own
from lab.report.results import evaluate_command

CODE = """
from pathlib import Path

from parts_of_own_net import hidden
from torch import nn

Path(__file__).with_suffix(".imported").touch()

def net(num_classes, in_chans, image_size):
    return nn.Sequential(nn.Flatten(), hidden(in_chans * image_size**2), nn.Linear(8, num_classes))

def wrong(num_classes, in_chans, image_size):
    return nn.Flatten()

def fails(num_classes, in_chans, image_size):
    return {}["depth"]

def nothing(num_classes, in_chans, image_size):
    pass

def fixed(num_classes, in_chans, image_size):
    return nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(num_classes))

class Other(nn.Linear):
    def forward(self, images):
        logits = super().forward(images.flatten(1))
        return self.other(logits) if self.training else logits

def other(num_classes, in_chans, image_size):
    model = Other(in_chans * image_size**2, num_classes)
    model.other = lambda logits: (logits, logits)
    return model

def dictionary(num_classes, in_chans, image_size):
    model = Other(in_chans * image_size**2, num_classes)
    model.other = lambda logits: {"logits": logits}
    return model
"""
PARTS = """
from torch import nn

def hidden(num_inputs):
    return nn.Sequential(nn.Linear(num_inputs, 8), nn.ReLU())
"""
SMALL = ["--dataset", "digits", "--recipe", "smoke", "--threads", "1", "--quiet"]


def write_code(folder, code=CODE):
    (folder / "parts_of_own_net.py").write_text(PARTS)
    (folder / "own_net.py").write_text(code)
    return str(folder / "own_net.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the file of a model and the run that trained it, without its registration."""
    folder = tmp_path_factory.mktemp("own")
    file = write_code(folder)
    run = train.main([*SMALL, "--model", f"{file}:net", "--output-dir", str(folder / "runs")])
    forget(folder)
    return folder, f"{file}:net", str(run.path)


def forget(folder):
    """Undo the imports of this process, so that it is like a new one."""
    own.REGISTERED.clear()
    (folder / "own_net.imported").unlink(missing_ok=True)


def test_own_model_is_trained_evaluated_and_exported(trained, tmp_path):
    folder, name, run = trained
    assert run.endswith("own_net-net-digits")
    evaluate.main([run, "--model", name, "--quiet", "--output", str(tmp_path / "evaluated")])
    reports = [json.loads((folder / path / "report.json").read_text())
               for path in (run, tmp_path / "evaluated")]  # fmt: skip
    assert reports[0]["confusion_matrix"] == reports[1]["confusion_matrix"]
    export.main([run, "--model", name, "--format", "torch-export", "--output", str(tmp_path / "x")])
    model, metadata = lab.load_model(run, "cpu", model=name)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    assert metadata["model_sha256"] == own.sha256(name)
    train.main(["--resume", run, "--model", name, "--epochs", "3", "--max-steps", "0", "--quiet"])
    forget(folder)


def test_p4_no_script_imports_code_that_a_file_names(trained, tmp_path, capsys):
    """Weights, a run or a settings file of a stranger would run the stranger's code."""
    folder, _, run = trained
    scripts = (
        (evaluate, [run]),
        (predict, [run, "docs/report.png"]),
        (export, [run]),
        (train, ["--resume", run, "--epochs", "9"]),
        (train, ["--config", f"{run}/config.json", "--output-dir", str(tmp_path)]),
        (train, ["--init-checkpoint", run, "--dataset", "digits", "--output-dir", str(tmp_path)]),
    )
    for script, argv in scripts:
        with pytest.raises(UserError, match=r"own_net\.py:net") as caught:
            script.main(argv)
        assert "model" in caught.value.hint
    with pytest.raises(UserError, match="runs only if you name it"):
        lab.load_model(run)
    assert not (folder / "own_net.imported").exists()


def test_p3_a_linear_probe_without_effect_is_resumed_by_the_same_command(tmp_path, capsys):
    """The classifier is a convolution."""
    code = "from torch import nn\n\n\ndef net(num_classes, in_chans, image_size):\n"
    code += "    pool = nn.AdaptiveAvgPool2d(1)\n"
    code += "    return nn.Sequential(nn.Conv2d(in_chans, num_classes, 3), pool, nn.Flatten())\n"
    (tmp_path / "convolution.py").write_text(code)
    words = [*SMALL[:-1], "--model", f"{tmp_path}/convolution.py:net", "--max-steps", "2"]
    words += ["--output-dir", str(tmp_path / "runs"), "--name"]
    first = train.main([*words, "first"])
    words += ["second", "--init-checkpoint", str(first.best), "--linear-probe", "--resume", "auto"]
    train.main(words)
    assert "--linear-probe has no effect" in capsys.readouterr().out
    train.main(words)
    assert "is finished; to train it further, raise --max-steps" in capsys.readouterr().out


@pytest.mark.parametrize(("head", "expected"), [
    ("nn.Linear(4, num_classes, bias=False)", "--linear-probe has no effect"),
    ("Tokens(4, num_classes)", "--linear-probe needs one vector of features per image, not [3, 4]"),
])  # fmt: skip
def test_a_linear_probe_of_other_classifiers(tmp_path, capsys, head, expected):
    code = "import torch\nfrom torch import nn\n\n\nclass Tokens(nn.Linear):\n"
    code += "    def forward(self, x):\n"
    code += "        return super().forward(x)\n\n\n"
    code += "class Mean(nn.Module):\n    def forward(self, x):\n"
    code += "        return x.mean(1) if x.ndim == 3 else x\n\n\n"
    code += "class Repeat(nn.Module):\n    def forward(self, x):\n"
    code += f"        return x[:, None].repeat(1, 3, 1) if {'Tokens' in head} else x\n\n\n"
    code += "def net(num_classes, in_chans, image_size):\n"
    code += "    body = [nn.Flatten(), nn.Linear(in_chans * image_size**2, 4), Repeat()]\n"
    code += f"    return nn.Sequential(*body, {head}, Mean())\n"
    (tmp_path / "heads.py").write_text(code)
    words = [*SMALL[:-1], "--model", f"{tmp_path}/heads.py:net", "--max-steps", "2"]
    words += ["--output-dir", str(tmp_path / "runs"), "--name"]
    first = train.main([*words, "first"])
    words += ["second", "--init-checkpoint", str(first.best), "--linear-probe"]
    if head.startswith("Tokens"):
        with pytest.raises(UserError, match=re.escape(expected)):
            train.main(words)
    else:
        train.main(words)
        assert expected in capsys.readouterr().out


@pytest.mark.slow
def test_p7_unused_parameters_on_two_processes_are_one_line(tmp_path):
    code = "from torch import nn\n\n\ndef net(num_classes, in_chans, image_size):\n"
    code += "    model = nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, 10))\n"
    code += "    model[1].unused = nn.Linear(2, 2)\n    return model\n"
    (tmp_path / "unused.py").write_text(code)
    words = (*SMALL, "--model", f"{tmp_path}/unused.py:net", "--output-dir", tmp_path)
    ended = run_world(2, "train.py", *words, limit=300)
    assert [world.code for world in ended] == [2, 2], ended[0].stderr
    assert "error: on several processes, every parameter of the model must" in ended[0].stderr
    assert "Traceback" not in ended[0].stderr


def test_code_that_has_changed_is_refused(trained, tmp_path):
    _, _, run = trained
    file = write_code(tmp_path, CODE + "\n# another version\n")
    for script, argv in ((evaluate, [run]), (train, ["--resume", run, "--epochs", "9"])):
        with pytest.raises(UserError, match="has changed since the training"):
            script.main([*argv, "--model", f"{file}:net"])
    with pytest.raises(UserError, match="Give the function that it was trained with"):
        evaluate.main([run, "--model", f"{file}:wrong"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("net2", "own_net.py has no function net2. Check its name."),
        ("wrong", "own_net.py:wrong returned [2, 1024] for images [2, 1, 32, 32], not logits "
         "[2, 10]. Its arguments are num_classes, in_chans and image_size."),
        ("fails", "own_net.py:fails raised KeyError: 'depth'. Correct it; --debug shows the "
         "traceback."),
        ("fixed", "own_net.py:fixed has no parameters to train. Return a model that has some."),
        ("other", "own_net.py:other returned a tuple in training mode, and has no "
         "auxiliary_weight. Give it this attribute, the weight of the losses of auxiliary "
         "classifiers."),
        ("dictionary", "own_net.py:dictionary returned dict for images [2, 1, 32, 32] in training "
         "mode, not logits [2, 10]. Its arguments are num_classes, in_chans and image_size."),
        ("nothing", "own_net.py:nothing returned NoneType, not a torch.nn.Module. Return a model."),
    ],
)  # fmt: skip
def test_p7_errors_of_own_code(fails, tmp_path_factory, function, message):
    file = write_code(tmp_path_factory.mktemp("code"))
    assert fails(train, *SMALL, "--model", f"{file}:{function}").endswith(message)


def test_a_check_initializes_lazy_modules_and_keeps_statistics(monkeypatch):
    def net(num_classes, in_chans, image_size):
        layers = nn.BatchNorm2d(in_chans), nn.Flatten(), nn.Dropout(), nn.LazyLinear(num_classes)
        return nn.Sequential(*layers).train()

    monkeypatch.setitem(own.REGISTERED, "lazy", SimpleNamespace(function=net))
    torch.manual_seed(0)
    model = own.own_model(10, 1, 8, "lazy")
    assert model[-1].weight.shape == (10, 64)
    assert all(module.training for module in model.modules())
    assert model[0].num_batches_tracked == 0
    random = torch.rand(1)
    torch.manual_seed(0)
    nn.Linear(64, 10)
    assert random == torch.rand(1)  # the check draws no random numbers


def test_p7_files_that_cannot_be_imported(fails, tmp_path, tmp_path_factory):
    missing = tmp_path / "missing.py"
    message = f"cannot read {missing} (No such file or directory). Check the path."
    assert fails(train, *SMALL, "--model", f"{missing}:net") == message
    file = write_code(tmp_path_factory.mktemp("code"), "import no_such_module\n")
    message = f"{file} raised ModuleNotFoundError: No module named 'no_such_module'. Correct it; "
    assert fails(train, *SMALL, "--model", f"{file}:net").startswith(message)


def test_model_of_a_notebook(tmp_path):
    def tiny(num_classes, in_chans, image_size):
        return nn.Sequential(nn.Flatten(), nn.Linear(in_chans * image_size**2, num_classes))

    argv = [*SMALL, "--output-dir", str(tmp_path)]
    run = train.main(argv, model=tiny)
    of_module = train.main(argv, model=tiny(10, 1, 32))
    assert [run.path.name, of_module.path.name] == [
        "python-tiny-digits",
        "python-Sequential-digits",
    ]
    again = [*argv, "--init-checkpoint", str(of_module.path)]
    assert train.main(again, model=tiny(10, 1, 32)).is_finished
    with pytest.raises(UserError, match="of a model passed as a module"):
        train.main([*again, "--freeze", "backbone"], model=tiny(10, 1, 32))
    model, _ = lab.load_model(run.path, "cpu", model=tiny)
    assert model(torch.zeros(1, 1, 32, 32)).shape == (1, 10)
    own.REGISTERED.clear()
    with pytest.raises(UserError, match="runs only if you name it"):
        build_model("python.py:tiny", num_classes=10, in_chans=1, image_size=32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "python evaluate.py runs/a"),
        ({"model": "a.py:net"}, "python evaluate.py runs/a --model a.py:net"),
        ({"dataset": "b.py:data"}, "python evaluate.py runs/a --dataset b.py:data"),
        ({"model": "python.py:net"}, None),
        ({"dataset": "python.py:datasets"}, None),
    ],
)
def test_the_command_that_reproduces_a_report_names_code(settings, expected):
    run = SimpleNamespace(path=Path("runs/a"))
    assert evaluate_command(run, TrainConfig(**settings)) == expected


def test_the_seed_is_that_of_numpy_and_python_too(tmp_path):
    def tiny(num_classes, in_chans, image_size):
        layer = nn.Linear(in_chans * image_size**2, num_classes)
        layer.weight.data[:] = torch.from_numpy(np.random.randn(*layer.weight.shape))
        layer.bias.data[:] = random.random()
        return nn.Sequential(nn.Flatten(), layer)

    argv = [*SMALL, "--max-steps", "1", "--output-dir", str(tmp_path)]
    first, second = (train.main(argv, model=tiny).best.read_bytes() for _ in range(2))
    assert first == second


def test_code_that_a_notebook_changes_is_used(tmp_path):
    file = write_code(tmp_path)
    first = own.register(f"{file}:net")
    assert own.register(f"{file}:net") is first
    write_code(
        tmp_path, CODE.replace("nn.Linear(8, num_classes)", "nn.Linear(8, num_classes, False)")
    )
    second = own.register(f"{file}:net")
    assert second.sha256 != first.sha256
    assert len([*second.function(3, 1, 4).parameters()]) == 3

    shape = {"num_classes": 3, "in_chans": 1, "image_size": 4}
    names = []
    for model in (
        lambda k, c, size: nn.Sequential(nn.Flatten(), nn.Linear(c * size**2, k)),
        lambda k, c, size: nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(c * size**2, k)),
    ):
        names.append(classifier_param_names(own.register_object(model), **shape))
    assert names == [{"1.weight", "1.bias"}, {"2.weight", "2.bias"}]
    own.REGISTERED.clear()
