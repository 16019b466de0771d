"""What a user can get wrong, and how a script ends when they did (promise P7)."""

import os
import re
import sys
import time
import traceback
from collections.abc import Callable

from lab import console

# Seconds in which a launcher stops the peers of a process that failed, and in which the main
# process speaks first of what all may have met.
PATIENCE, TURN = 10, 2


class UserError(ValueError):
    """A mistake that the user can mend: `what` happened, and a `hint` that says how.

    `lone`: one process met it alone, which then has to say so itself.
    """

    def __init__(self, what: str, hint: str, lone: bool = False):
        super().__init__(what, hint, lone)  # what unpickling calls it with
        self.what, self.hint, self.lone = what.rstrip("."), hint.rstrip("."), lone

    def __str__(self) -> str:
        return f"{self.what}. {self.hint}" + ("" if self.hint.endswith("?") else ".")


def run_script(main: Callable[[], int | None]) -> int:
    """The exit code of `main()`; after a `UserError`, 2 and one `error: WHAT. HINT.` line.

    With `--debug` the traceback is printed as well. Another exception keeps its traceback and ends
    in 1. Where peers of a distributed run died first, theirs is the message worth reading: this
    process waits a moment for the launcher to stop it before it speaks.
    """
    code = 0
    try:
        code = main() or 0
    except KeyboardInterrupt:
        console.error("interrupted")
        code = 130
    except Exception as error:
        mistake = error if isinstance(error, UserError) else _out_of_memory(error)
        if mistake and mistake.lone and os.environ.get("RANK", "0") != "0":
            time.sleep(TURN)
        elif mistake is None and _lost_a_peer(error):
            time.sleep(PATIENCE)
        if mistake is None or "--debug" in sys.argv:
            traceback.print_exc()
        if mistake:
            if mistake.lone:
                console.configure(main_process=True)
            console.error(str(mistake))
        code = 2 if mistake else 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # No destructors: after an error they would wait for peers that are inside a collective,
        # and gloo's threads, torn down at exit, now and then abort a run that went well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _out_of_memory(error: Exception) -> UserError | None:
    """The mistake of asking for more than fits, where that is what `error` tells of."""
    # PyTorch's two, of an accelerator and of a CPU; by name, as this module imports no PyTorch.
    torchs = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    if not torchs and not isinstance(error, MemoryError):
        return None
    asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
    return UserError(
        "out of memory" + (f" ({asked[1]} more were asked for)" if asked else ""),
        "Lower --batch-size or --image-size, or raise --accumulate",
        lone=True,
    )


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text
