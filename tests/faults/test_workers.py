"""P7: worker processes that are killed or hang end in one error line."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from contextlib import suppress

import psutil
import pytest
import torch
from worlds import python, run

from lab.data import workers
from lab.data.workers import BatchReader
from lab.errors import UserError

NUM_BATCHES, BATCH_SIZE, NUM_VALUES = 12, 3, 100


class Images:
    """Images that hold their own index; `on_read` is called in a worker that reads index `at`."""

    def __init__(self, on_read=None, at=20):
        self.on_read, self.at = on_read, at

    def __call__(self, indices):
        if self.on_read and self.at in indices and multiprocessing.parent_process() is not None:
            self.on_read()
        return indices.to(torch.uint8)[:, None].repeat(1, NUM_VALUES)


def send(*names):
    """Return a function that sends signals to the process that calls it."""

    def send_signals():
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.2)  # a fatal signal is delivered by then

    return send_signals


def make_reader(on_read=None, num_workers=2):
    return BatchReader(Images(on_read), num_workers)


def batches(reader):
    return reader.read(torch.arange(NUM_BATCHES * BATCH_SIZE).split(BATCH_SIZE))


def first_indices(reader):
    return [batch[0, 0].item() for batch in batches(reader)]


class Positions:
    """A dataset's labels, whose positions are also what batches are views of."""

    def __init__(self):
        self.positions = torch.arange(300)

    def __call__(self, indices):
        return self.positions[indices] % 2


def test_spawned_workers_get_the_indices_that_were_asked_for(monkeypatch):
    """macOS spawns workers: the tensors of the function are moved to shared memory."""
    monkeypatch.setattr(workers, "CONTEXT", multiprocessing.get_context("spawn"))
    function = Positions()
    with BatchReader(function, 1) as reader:
        labels = torch.cat([*reader.read(function.positions.split(1))])
    assert labels.tolist() == [0, 1] * 150
    with BatchReader(lambda indices: indices, 1) as reader:
        message = r"cannot be sent to worker processes \(.*or give --workers 0"
        with pytest.raises(UserError, match=message):
            list(batches(reader))


IN_ORDER = list(range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_order(num_workers):
    with make_reader(num_workers=num_workers) as reader:
        assert first_indices(reader) == first_indices(reader) == IN_ORDER


def num_threads(indices):
    return torch.full_like(indices, torch.get_num_threads())


def test_a_worker_has_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with BatchReader(num_threads, 1) as reader:
            assert [batch.tolist() for batch in reader.read([torch.arange(1)])] == [[1]]
    finally:
        torch.set_num_threads(before)


def test_workers_read_ahead():
    taken = []

    def take():
        for indices in torch.arange(NUM_BATCHES).split(1):
            taken.append(indices)
            yield indices

    with make_reader() as reader:
        next(reader.read(take()))
    assert len(taken) == workers.BATCHES_PER_WORKER * 2


def test_p3_workers_that_get_the_signals_of_a_run_lose_no_batch():
    """The run takes more steps until all processes agree on the last one."""
    with make_reader(send("SIGINT", "SIGUSR1", "SIGTERM")) as reader:
        assert first_indices(reader) == IN_ORDER


def test_p7_a_killed_worker_is_one_error():
    with pytest.raises(UserError, match=r"worker process .* died \(SIGKILL\)") as caught:
        list(batches(make_reader(send("SIGKILL"))))
    assert caught.value.rank_local
    assert multiprocessing.active_children() == []  # although `caught` holds the frames


CUT_OFF = """
import os, torch
from multiprocessing.connection import Connection
from lab.data.workers import BatchReader

def send_half(connection, content):
    os.write(connection.fileno(), content[: len(content) // 2])
    os.kill(os.getpid(), 9)

def read(indices):
    Connection._send = send_half
    return indices

list(BatchReader(read, 1).read(torch.arange(9).split(3)))
"""


def test_p7_a_worker_that_is_killed_while_it_sends_a_batch_hangs_nothing():
    ended = run(python("-c", CUT_OFF), limit=60)
    assert ended.code == 1
    assert "a worker process that reads images died (SIGKILL)" in ended.stderr


def test_no_step_is_interrupted_by_the_death_of_a_worker():
    """DataLoader's handler of SIGCHLD would raise in the main process at any time."""
    before = signal.getsignal(signal.SIGCHLD)
    with make_reader() as reader:
        assert first_indices(reader) == IN_ORDER
        assert signal.getsignal(signal.SIGCHLD) is before
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match="died"):  # noqa: PT012
            for _ in range(1000):  # the pool notices it after a moment
                first_indices(reader)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_user_error_of_a_batch_is_raised(num_workers):
    def fail(indices):
        raise UserError("cannot read", "Delete it")

    with (
        BatchReader(fail, num_workers) as reader,
        pytest.raises(UserError, match=r"^cannot read. Delete it.$") as caught,
    ):
        list(batches(reader))
    assert caught.value.rank_local


def test_p7_a_worker_that_hangs_is_an_error_and_is_ended(monkeypatch):
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"no batch was read in 0\.3 s"):
        list(batches(make_reader(lambda: time.sleep(100))))
    assert multiprocessing.active_children() == []


def test_close_ends_workers_that_do_not_answer(monkeypatch):
    monkeypatch.setattr(workers, "EXIT_SECONDS", 0.1)
    reader = make_reader()
    assert first_indices(reader) == IN_ORDER
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGSTOP)
    reader.close()
    assert multiprocessing.active_children() == []


def test_workers_live_from_epoch_to_epoch_and_end_when_one_is_left_midway():
    reader = make_reader()
    assert first_indices(reader) == IN_ORDER
    pids = {worker.pid for worker in multiprocessing.active_children()}
    assert len(pids) == 2
    epoch = batches(reader)
    assert next(epoch)[0, 0] == 0
    assert {worker.pid for worker in multiprocessing.active_children()} == pids
    epoch.close()
    assert multiprocessing.active_children() == []
    left = batches(reader)  # suspended, as by a traceback that is kept
    next(left)
    reader.close()
    assert multiprocessing.active_children() == []
    again = batches(reader)
    next(again)
    left.close()  # it does not end the workers of another epoch
    assert len(list(again)) == NUM_BATCHES - 1
    reader.close()


SMALL_SHARED_MEMORY = """
import torch
from lab.data.workers import BatchReader

def read(indices):
    return torch.zeros(len(indices), 2**20, dtype=torch.uint8)

with BatchReader(read, 2) as reader:
    print(sum(map(len, reader.read(torch.arange(40).split(10)))))
"""


def test_p7_batches_need_no_shared_memory():
    """Docker gives a container 64 MB of it; here 8 MB are mounted in a mount namespace."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], check=False).returncode:
        pytest.skip("needs user namespaces")
    command = python("-c", SMALL_SHARED_MEMORY)
    ended = run([*unshare, f'{mount} && exec "$@"', "sh", *command], limit=200)
    assert (ended.code, ended.stdout) == (0, "40\n"), ended.stderr


ORPHANS = """
import os, signal, torch
from lab.data.workers import BatchReader

batches = BatchReader(lambda indices: os.getpid(), 2).read(torch.arange(9).split(1))
print(*{next(batches) for _ in range(8)})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_when_the_main_process_is_killed():
    ended = run(python("-c", ORPHANS), limit=60)
    assert ended.code == -signal.SIGKILL
    deadline = time.monotonic() + 30
    for pid in map(int, ended.stdout.split()):
        with suppress(psutil.NoSuchProcess):
            while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                assert time.monotonic() < deadline
                time.sleep(0.1)
