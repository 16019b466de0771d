"""What a user can get wrong, and how a script ends when they did (promise P7)."""

import difflib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress

from lab import console

# Seconds in which a launcher stops the peers of a process that failed, and in which a host's first
# process speaks of what all may have met.
PATIENCE, TURN = 10, 2
GONE = "closed|reset by peer|broken pipe|failed to recv|remote process exited|aborted"  # peers
RESUME = "train.py --resume auto goes on from the last saved state"


class UserError(ValueError):
    """A mistake that the user can mend: `what` happened, and a `hint` that says how.

    `lone`: one process met it alone, which then has to say so itself.
    """

    def __init__(self, what: str, hint: str, rank_local: bool = False):
        super().__init__(what, hint, rank_local)  # what unpickling calls it with
        self.what, self.hint, self.rank_local = what.rstrip("."), hint.rstrip("."), rank_local

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}" + ("" if self.hint.endswith("?") else ".")


def suggestion(word: str, known: Iterable[str]) -> str:
    """A hint for a name that is none of the `known`: those that are like it, or all."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 3)
    return f"Did you mean {' or '.join(close)}?" if close else f"Known: {', '.join(known)}"


def name_some(names: Sequence[str], count: int = 5) -> str:
    """Return the first `count` names in one line, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def run_script(main: Callable[[], int | None]) -> int:
    """The exit code of `main()`; after a `UserError`, 2 and one `error: WHAT. HINT.` line.

    With `--debug` the traceback is printed as well. Another exception keeps its traceback and ends
    in 1. Where another process of the run is gone, its message is the one worth reading: this
    process waits a moment for the launcher to stop it before it speaks.
    """
    code = 0
    try:
        code = main() or 0
    except KeyboardInterrupt:
        console.error("interrupted")
        code = 130
        _report_to_launcher("interrupted")
    except Exception as error:
        mistake, lost = as_user_error(error), _lost_a_process(error)
        if mistake and mistake.rank_local:
            # The launcher's SIGTERM ends the wait, whatever the script has made of that signal.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            first = os.environ.get("LOCAL_RANK", "0") == "0"
            time.sleep((PATIENCE if lost else 0) + (0 if first else TURN))
        if mistake is None or "--debug" in sys.argv:
            traceback.print_exc()
        if mistake:
            if mistake.rank_local:
                console.configure(main_process=True)
            console.error(str(mistake))
        _report_to_launcher(str(mistake) if mistake else f"{type(error).__name__}: {error}")
        code = 2 if mistake else 1
        # Let go of the frames: a loader that they hold keeps worker processes, and they this one.
        error.__traceback__ = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # No destructors: after an error they would wait for peers that are inside a collective,
        # and gloo's threads, torn down at exit, now and then abort a run that went well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _report_to_launcher(message: str) -> None:
    """Write the reason of a failure where torchrun's own report looks for it.

    `accelerate launch` of several processes uses torchrun. Its report says "To enable traceback
    see ..." of a process that left no reason.
    """
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
            json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def as_user_error(error: Exception) -> UserError | None:
    """What of `error` a user can mend; None where that is not known."""
    if isinstance(error, UserError):
        return error
    return (
        _lost_a_process(error)
        or _waited_in_vain(error)
        or _out_of_memory(error)
        or _one_value(error)
    )


def _out_of_memory(error: Exception) -> UserError | None:
    """The mistake of asking for more than fits, where that is what `error` tells of."""
    # PyTorch's two, of an accelerator and of a CPU; by name, as this module imports no PyTorch.
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if not torchs and not isinstance(error, MemoryError):
        return None
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return UserError(
        "out of memory" + (f" ({asked[1]} more were asked for)" if asked else ""),
        "Lower --batch-size or --image-size, or raise --grad-accum-steps",
        rank_local=True,
    )


def _one_value(error: Exception) -> UserError | None:
    """That BatchNorm met one image of one pixel, where that is what `error` tells of."""
    if "Expected more than 1 value per channel" not in str(error):
        return None
    return UserError(
        "BatchNorm cannot train on one image of which one pixel is left",
        "Give a larger --image-size, or a --batch-size whose last batch holds more images",
        rank_local=True,
    )


def _waited_in_vain(error: Exception) -> UserError | None:
    """That the other processes did not answer, where that is what `error` tells of."""
    text = str(error)
    if not _collective(error) or not re.search("timed? ?out", text, re.IGNORECASE):
        return None
    if "connectFullMesh" in text:  # gloo met them, and had an address of theirs that leads nowhere
        return UserError(
            f"process {_rank()} cannot reach the others",
            "Name the network interface that joins the machines in GLOO_SOCKET_IFNAME",
            rank_local=True,
        )
    wait = re.search(r"(\d+) ?(m?)s", text)  # gloo and NCCL say milliseconds, the store seconds
    seconds = f" {int(wait[1]) // (1000 if wait[2] else 1)} s" if wait else ""
    return UserError(
        f"process {_rank()} waited{seconds} for the others in vain",
        "One hangs, cannot be reached, or needs longer than --timeout-seconds; " + RESUME,
        rank_local=True,
    )


def _lost_a_process(error: Exception) -> UserError | None:
    """That another process ended, where that is what `error` tells of."""
    if not _collective(error) or not re.search(GONE, str(error), re.IGNORECASE):
        return None
    address = re.search(r"\[([\w.:]+)\]:\d", str(error))
    return UserError(
        f"process {_rank()} lost another one" + (f" (at {address[1]})" if address else ""),
        "See why that one ended; " + RESUME,
        rank_local=True,
    )


def _collective(error: Exception) -> bool:
    """Whether an exchange between processes raised `error`."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text


def _rank() -> str:
    return os.environ.get("RANK", "0")
