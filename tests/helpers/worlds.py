"""Start real processes for the tests, single or as a world, and leave none behind.

    ended = run(torchrun(2, "train.py", "--dataset", "digits"), limit=200)
    first, second = run_world(2, "train.py", "--dataset", "digits", limit=200)
    both = run_all([python("train.py"), python("train.py")], limit=200)  # at the same time
    with start(python("train.py")) as world:
        ...  # meanwhile
        ended = world.wait(60)

A limit in seconds only protects against hanging; it does not assert a speed.

Importing PyTorch takes most of a short process's time. So a script is not started by a new
interpreter, but in a fork of a server that has imported the libraries, and nothing of lab. A
launcher starts new interpreters: its world takes several times as long.
"""

import contextlib
import multiprocessing
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "LAB_TEST_WORLD"  # environment variable of all processes of a world
LIBRARIES = (  # that the scripts and the tests of test_mutants.py import
    "torch._dynamo", "torch.utils.data", "torchvision.transforms.v2", "accelerate", "filelock",
    "psutil", "rich.live", "rich.progress", "safetensors.torch", "PIL.Image", "sklearn.metrics",
    "pytest", "_pytest.monkeypatch", "pytest_timeout",
)  # fmt: skip
LAUNCHER_PREFIXES = ("ACCELERATE_", "GROUP_", "LOCAL_", "MASTER_", "OMP_", "ROLE_", "TORCHELASTIC_")


@dataclass(frozen=True)
class Ended:
    """Hold the exit code and the output of a launched command."""

    code: int
    stdout: str
    stderr: str
    end: float  # time.time()
    left_behind: list[str]  # command lines of processes that outlived it by 30 s, now killed

    @property
    def errors(self) -> list[str]:
        """Return the lines that report user errors."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def python(*arguments: object) -> list[str]:
    """Return the command that runs a script in one process."""
    return [sys.executable, *map(str, arguments)]


def torchrun(num_processes: int, *arguments: object, max_restarts: int = 0) -> list[str]:
    """Return the command that runs a script on `num_processes` processes, on any free port."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", num_processes)
    return python(*launcher, "--max-restarts", max_restarts, *arguments)


def accelerate(config: str, *arguments: object) -> list[str]:
    """Return the command that launches a script with accelerate_configs/`config`.yaml."""
    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    return python("-m", "accelerate.commands.launch", "--config_file", file, *arguments)


def world_by_hand(num_processes: int) -> list[dict[str, str]]:
    """Return the environment of each process of a world without a launcher.

    So the exit code of each process is available, and no launcher kills the others.
    """
    if num_processes == 1:
        return [{}]
    port = free_port()
    return [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        for rank in range(num_processes)
    ]


def free_port() -> int:
    """Return a free TCP port, of those that no outgoing connection gets before it is used."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", port))
            return port


def run(command: Sequence[str], limit: float, env: Mapping[str, str] | None = None) -> Ended:
    """Run a command. Raise `AssertionError` with its output if it exceeds `limit`."""
    return run_all([command], limit, [env or {}])[0]


def run_all(
    commands: Sequence[Sequence[str]], limit: float, envs: Sequence[Mapping[str, str]] | None = None
) -> list[Ended]:
    """Run several commands at the same time, each as `run` does."""
    deadline = time.monotonic() + limit
    with contextlib.ExitStack() as stack:
        worlds = [
            stack.enter_context(start(command, env))
            for command, env in zip(commands, envs or [{}] * len(commands), strict=True)
        ]
        return [world.wait(deadline - time.monotonic()) for world in worlds]


def run_world(num_processes: int, *arguments: object, limit: float) -> list[Ended]:
    """Run a script on several processes, without a launcher."""
    return run_all([python(*arguments)] * num_processes, limit, world_by_hand(num_processes))


def start(command: Sequence[str], env: Mapping[str, str] | None = None) -> "World":
    """Start a command that is killed at the end of the `with` block."""
    return World(command, env or {})


class Fork:
    """A script in a process that is forked from the server; as `subprocess.Popen`."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(list(LIBRARIES))

    def __init__(self, words: Sequence[str], env: dict[str, str], stdout: Path, stderr: Path):
        self.process = self.server.Process(target=_run_script, args=(words, env, stdout, stderr))
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout or 0)
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _run_script(words: Sequence[str], env: dict[str, str], *files: Path) -> None:
    """Run a script in this process, as a new interpreter does."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(env)
    # The environment may be a directory of the project.
    libraries = [p for p in sys.path if p.startswith(sys.prefix) or not p.startswith(str(ROOT))]
    sys.path = [os.path.dirname(words[0]), *env["PYTHONPATH"].split(os.pathsep), *libraries]
    del sys.modules[__name__]
    for stream, path in zip((sys.stdout, sys.stderr), files, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), stream.fileno())
        stream.reconfigure(line_buffering=True)
    sys.argv = list(words)
    runpy.run_path(words[0], run_name="__main__")


class World:
    """A running command, and all processes that it started."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self.mark, self.command = uuid.uuid4().hex, command
        env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(LAUNCHER_PREFIXES) and name not in ("RANK", "WORLD_SIZE")
        } | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": "1",  # see conftest.py
            "CUDA_VISIBLE_DEVICES": "",  # also on a machine with GPUs
            MARK: self.mark,
            **env,
        }
        # Files instead of pipes, which would have to be read while the world runs.
        self.folder = tempfile.TemporaryDirectory()
        self.stdout, self.stderr = (Path(self.folder.name) / name for name in ("out", "err"))
        if command[0] == sys.executable and command[1].endswith(".py"):
            self.stdout.touch()
            self.stderr.touch()
            self.process = Fork(command[1:], env, self.stdout, self.stderr)
            return
        with open(self.stdout, "wb") as stdout, open(self.stderr, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C interrupts pytest, which then ends the world
            )

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        for _ in range(10):  # a launcher may have started another one in the meantime
            for process in self._members():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        self.process.wait()
        self.folder.cleanup()

    def wait(self, limit: float) -> Ended:
        try:
            code = self.process.wait(max(0.1, limit))
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"not ended in time: {self.command}\n{self.stdout.read_text()}\n"
                f"{self.stderr.read_text()}"
            ) from None
        end = time.time()
        # A loader's workers check every five seconds whether their parent still exists.
        _, left = psutil.wait_procs(self._members(), timeout=30)
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
        return Ended(code, self.stdout.read_text(), self.stderr.read_text(), end, lines)

    def until(self, ready: Callable[[], bool], limit: float) -> None:
        """Wait until `ready()`. Raise `AssertionError` if the command ends or `limit` passes."""
        deadline = time.monotonic() + limit
        while not ready():
            assert self.process.poll() is None, f"ended too early\n{self.stderr.read_text()}"
            assert time.monotonic() < deadline, f"too late\n{self.stderr.read_text()}"
            time.sleep(0.02)

    def _members(self) -> list[psutil.Process]:
        """Return the processes with the mark, as torchrun's workers have their own sessions.

        A fork does not have it, but has a session with its workers soon after it started.
        """
        members = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                own = self.process.pid in (process.pid, os.getsid(process.pid))
                if own or process.environ().get(MARK) == self.mark:
                    members.append(process)
        return members
