"""P7: worker processes that are killed, hang or run out of shared memory end in one error line."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import _utils, get_worker_info
from worlds import python, run

from lab.data import workers
from lab.data.workers import BatchReader
from lab.errors import UserError

NUM_BATCHES, BATCH_SIZE, NUM_VALUES = 12, 3, 100


class Images:
    """Images that hold their own index; `on_read` is called in a worker that reads index `at`."""

    def __init__(self, on_read=None, at=20):
        self.on_read, self.at = on_read, at

    def __getitem__(self, indices):
        if self.on_read and self.at in indices and get_worker_info() is not None:
            self.on_read()
        return indices.to(torch.uint8)[:, None].repeat(1, NUM_VALUES)


def send(*names):
    """Return a function that sends signals to the process that calls it."""

    def send_signals():
        for name in names:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(0.2)  # a fatal signal is delivered by then

    return send_signals


def raise_user_error():
    raise UserError("cannot read", "Delete it")


def make_reader(on_read=None, num_workers=2, **settings):
    batches = torch.arange(NUM_BATCHES * BATCH_SIZE).split(BATCH_SIZE)
    settings = {"batch_nbytes": BATCH_SIZE * NUM_VALUES} | settings
    return BatchReader(Images(on_read), batches, num_workers, **settings)


def first_indices(batches):
    return [batch[0, 0].item() for batch in batches]


IN_ORDER = list(range(0, NUM_BATCHES * BATCH_SIZE, BATCH_SIZE))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_batches_come_in_the_order_of_the_sampler(num_workers):
    with make_reader(num_workers=num_workers) as reader:
        assert first_indices(reader) == first_indices(reader) == IN_ORDER


def test_workers_ignore_ctrl_c_and_sigusr1():
    with make_reader(send("SIGINT", "SIGUSR1")) as reader:
        assert first_indices(reader) == IN_ORDER


def test_p3_workers_that_get_the_sigterm_of_a_run_lose_no_batch():
    """The run takes more steps until all processes agree on the last one."""
    with make_reader(send("SIGTERM"), persistent_workers=True) as reader:
        assert first_indices(reader) == IN_ORDER
        reader.dataset.dataset.on_read = None
        assert first_indices(reader) == IN_ORDER  # by new workers
        assert len(multiprocessing.active_children()) == 2
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGTERM)
        assert first_indices(reader) == IN_ORDER


def test_p7_a_killed_worker_is_one_error():
    with pytest.raises(UserError, match=r"worker process .* died \(SIGKILL\)") as caught:
        list(make_reader(send("SIGKILL")))
    assert caught.value.rank_local
    assert multiprocessing.active_children() == []  # although `caught` holds the frames


def test_no_step_is_interrupted_by_the_death_of_a_worker():
    """DataLoader's handler of SIGCHLD would raise in the main process at any time."""
    before = signal.getsignal(signal.SIGCHLD)
    with make_reader(persistent_workers=True) as reader:
        assert first_indices(reader) == IN_ORDER
        assert signal.getsignal(signal.SIGCHLD) is before
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(0.2)


def test_a_user_error_takes_the_place_of_its_batch():
    with make_reader(raise_user_error) as reader:
        batches = list(reader)
    assert len(batches) == NUM_BATCHES
    assert [str(b) for b in batches if isinstance(b, UserError)] == ["cannot read. Delete it."]


def test_p7_a_worker_that_hangs_is_an_error_and_is_ended(monkeypatch):
    monkeypatch.setattr(workers, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    with pytest.raises(UserError, match=r"no batch was read in 0\.3 s"):
        list(make_reader(lambda: time.sleep(100)))
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name", ["SIGSTOP", "SIGTERM"])
def test_close_ends_workers_that_do_not_answer(monkeypatch, name):
    monkeypatch.setattr(_utils, "MP_STATUS_CHECK_INTERVAL", 0.1)
    reader = make_reader(persistent_workers=True)
    assert first_indices(reader) == IN_ORDER
    children = multiprocessing.active_children()
    for worker in children:
        os.kill(worker.pid, getattr(signal, name))
    if name == "SIGTERM":  # what multiprocessing sends at exit, before it waits
        for worker in children:
            worker.join(20)
            assert worker.exitcode == -signal.SIGTERM
    reader.close()
    assert multiprocessing.active_children() == []


def test_workers_live_from_epoch_to_epoch_and_end_when_one_is_left_midway():
    reader = make_reader(persistent_workers=True)
    assert first_indices(reader) == IN_ORDER
    pids = {worker.pid for worker in multiprocessing.active_children()}
    assert len(pids) == 2
    for batch in reader:
        assert {worker.pid for worker in multiprocessing.active_children()} == pids
        if batch[0, 0] == IN_ORDER[2]:
            break
    assert multiprocessing.active_children() == []
    left = iter(reader)  # suspended, as by a traceback that is kept
    next(left)
    reader.close()
    assert multiprocessing.active_children() == []
    again = iter(reader)
    next(again)
    left.close()  # it does not end the workers of another epoch
    assert len(list(again)) == NUM_BATCHES - 1
    reader.close()


@pytest.mark.parametrize(
    ("free", "local_world_size", "fitting"),
    [
        (100 * 300, 1, (2, 4)),
        (10 * 300, 1, (2, 4)),  # 8 batches in the queues and two in use
        (10 * 300 - 1, 1, (2, 3)),
        (10 * 300, 2, (2, 1)),
        (4 * 300 - 1, 1, (1, 1)),
        (3 * 300, 1, (1, 1)),
        (3 * 300 - 1, 1, None),
        (6 * 300 - 1, 2, None),
    ],
)
def test_p7_queues_are_as_long_as_shared_memory_allows(
    monkeypatch, free, local_world_size, fitting
):
    monkeypatch.setattr(workers, "SHARED_MEMORY", "/")
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))
    reader = make_reader(prefetch_factor=4)
    if fitting is None:
        with pytest.raises(UserError, match=r"--shm-size .* or give --workers 0\.$"):
            list(reader)
        return
    with reader:
        assert first_indices(reader) == IN_ORDER
        assert reader._fit_shared_memory() == fitting


SMALL_SHARED_MEMORY = """
import shutil, torch
from types import SimpleNamespace
from lab.data import workers
from lab.data.workers import BatchReader
from lab.errors import UserError

class Images:
    def __getitem__(self, indices):
        return torch.zeros(len(indices), 2**20, dtype=torch.uint8)

def count(batch_size):
    batches = torch.arange(4 * batch_size).split(batch_size)
    with BatchReader(Images(), batches, 2, batch_nbytes=batch_size * 2**20) as reader:
        return sum(len(batch) for batch in reader)

print(shutil.disk_usage("/dev/shm").total >> 20, count(1), count(2))
try:
    count(3)
except UserError as error:
    print(error)
# Another program may take the memory after it was measured.
workers.shutil.disk_usage = lambda path: SimpleNamespace(free=2**30)
try:
    count(10)
except UserError as error:
    print(error)
"""


def test_p7_a_container_with_small_shared_memory_hangs_nothing():
    """Docker's default is 64 MB; here 8 MB are mounted in a mount namespace."""
    mount = "mount -t tmpfs -o size=8m tmpfs /dev/shm"
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*unshare, mount], check=False).returncode:
        pytest.skip("needs user namespaces")
    command = python("-c", SMALL_SHARED_MEMORY)
    ended = run([*unshare, f'{mount} && exec "$@"', "sh", *command], limit=200)
    assert ended.code == 0, ended.stderr
    sizes, too_small, full = ended.stdout.splitlines()
    assert sizes == "8 4 8"
    assert too_small.startswith("/dev/shm is too small for worker processes: 8.0 MiB are free")
    assert full.startswith("/dev/shm is full. Start the container with more shared memory")
    assert "Traceback" not in ended.stderr
