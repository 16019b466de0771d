"""User errors, and the exit of a script after an exception (promise P7)."""

import difflib
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence

from lab import console

# Seconds to wait before printing an error that other processes may print too: a launcher stops the
# peers of a failed process within the first, and local rank 0 prints within the second.
LOST_PEER_DELAY, LOCAL_RANK_DELAY = 10, 2
LOST_PEER = "closed|reset by peer|broken pipe|failed to recv|remote process exited|aborted"
RESUME = "train.py --resume auto continues from the last checkpoint"


class UserError(ValueError):
    """An error that the user can fix: `what` is wrong, and a `hint` how to fix it.

    Set `rank_local` if the error may occur on a single process, which then prints it itself.
    """

    def __init__(self, what: str, hint: str, rank_local: bool = False):
        super().__init__(what, hint, rank_local)  # the arguments that unpickling passes
        self.what, self.hint, self.rank_local = what.rstrip("."), hint.rstrip("."), rank_local

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}" + ("" if self.hint.endswith("?") else ".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown name: the `known` names similar to it, or up to 30 of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 3)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {name_some(known, 30)}"


def install_hint(extra: str) -> str:
    """Return the hint for a package that is missing, which is in this extra of pyproject.toml."""
    return f"Run pip install -e '.[{extra}]' in lab's checkout"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its period, or the type without one."""
    lines = str(error).strip().splitlines()
    return (lines[0].rstrip(".") if lines else "") or type(error).__name__


def name_some(names: Sequence[str], count: int = 5) -> str:
    """Return the first `count` names as one line, and the number of the remaining ones."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def run_script(main: Callable[[], int | None]) -> int:
    """Call `main` and return the exit code.

    After a `UserError` the code is 2, and the one line `error: WHAT. HINT.` is printed; with
    `--debug` the traceback, too. After any other exception the code is 1, and its traceback is
    printed. If another process of the run ended first, its message is the useful one: this process
    gives the launcher time to stop it before it prints its own.
    """
    code = 0
    try:
        code = main() or 0
    except KeyboardInterrupt:
        console.error("interrupted")
        code = 130
    except Exception as error:
        mistake, lost_peer = as_user_error(error), _lost_peer(error)
        if mistake and mistake.rank_local:
            # The launcher's SIGTERM must end the wait, even if the script handles that signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            is_local_main = os.environ.get("LOCAL_RANK", "0") == "0"
            delay = LOST_PEER_DELAY if lost_peer else 0
            time.sleep(delay + (0 if is_local_main else LOCAL_RANK_DELAY))
        if mistake is None or "--debug" in sys.argv:
            traceback.print_exc()
        if mistake:
            if mistake.rank_local:
                console.configure(main_process=True)
            console.error(str(mistake))
        code = 2 if mistake else 1
        # Release the frames: a loader in them would keep its worker processes, and so this one.
        error.__traceback__ = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Skip destructors: after an error they would wait for peers inside a collective, and the
        # teardown of gloo's threads sometimes aborts a run that succeeded.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def as_user_error(error: Exception) -> UserError | None:
    """Return the `UserError` that an exception stands for, or None if the user cannot fix it."""
    if isinstance(error, UserError):
        return error
    return (
        _lost_peer(error)
        or _timed_out(error)
        or _out_of_memory(error)
        or _batch_norm_error(error)
        or _unused_parameters(error)
        or _shared_gpu(error)
    )


def _out_of_memory(error: Exception) -> UserError | None:
    # PyTorch's errors of an accelerator and of a CPU; by name, as this module imports no PyTorch.
    from_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if not from_torch and not isinstance(error, MemoryError):
        return None
    requested = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return UserError(
        "out of memory" + (f" (tried to allocate {requested[1]})" if requested else ""),
        "Lower --batch-size or --image-size, or raise --grad-accum-steps",
        rank_local=True,
    )


def _batch_norm_error(error: Exception) -> UserError | None:
    if "Expected more than 1 value per channel" not in str(error):
        return None
    return UserError(
        "BatchNorm cannot train on a batch of one image whose feature map has one pixel",
        "Give a larger --image-size, or a --batch-size whose last batch has more images",
        rank_local=True,
    )


def _unused_parameters(error: Exception) -> UserError | None:
    if "Expected to have finished reduction in the prior iteration" not in str(error):
        return None  # DistributedDataParallel's
    return UserError(
        "on several processes, every parameter of the model must have a gradient in each step",
        "Remove parameters that do not influence the logits, or set their requires_grad to False",
        rank_local=True,
    )


def _shared_gpu(error: Exception) -> UserError | None:
    if "Duplicate GPU detected" not in str(error):  # NCCL's
        return None
    return UserError(
        "two processes were given the same GPU",
        "Launch with --num_processes (accelerate) or --nproc-per-node (torchrun) set to the number "
        "of GPUs",
        rank_local=True,
    )


def _timed_out(error: Exception) -> UserError | None:
    text = str(error)
    if not _is_collective_error(error) or not re.search("timed? ?out", text, re.IGNORECASE):
        return None
    wait = re.search(r"(\d+) ?(m?)s", text)  # gloo and NCCL report milliseconds, the store seconds
    seconds = f" after {int(wait[1]) // (1000 if wait[2] else 1)} s" if wait else ""
    return UserError(
        f"process {_rank()} timed out{seconds} waiting for the other processes",
        "One of them hangs, cannot be reached (see GLOO_SOCKET_IFNAME), or needs longer than "
        f"--timeout-seconds; {RESUME}",
        rank_local=True,
    )


def _lost_peer(error: Exception) -> UserError | None:
    if not _is_collective_error(error) or not re.search(LOST_PEER, str(error), re.IGNORECASE):
        return None
    address = re.search(r"\[([\w.:]+)\]:\d", str(error))
    at = f" (at {address[1]})" if address else ""
    return UserError(
        f"process {_rank()} lost the connection to another process{at}",
        f"See the error message of that process; {RESUME}",
        rank_local=True,
    )


def _is_collective_error(error: Exception) -> bool:
    """Return whether communication between processes raised `error`."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text


def _rank() -> str:
    return os.environ.get("RANK", "0")
