"""What a user can get wrong, and how a script ends when they did (promise P7)."""

import os
import sys
import time
import traceback
from collections.abc import Callable

from lab import console


class UserError(ValueError):
    """A mistake that the user can mend: `what` happened, and a `hint` that says how."""

    def __init__(self, what: str, hint: str):
        self.what = what.rstrip(".")
        self.hint = hint.rstrip(".")
        super().__init__(f"{self.what}. {self.hint}.")


def run_script(main: Callable[[], None]) -> int:
    """The exit code of `main()`: 2 with one `error: WHAT. HINT.` line after a `UserError`.

    With `--debug` the traceback is printed as well. Another exception keeps its traceback and ends
    in 1. Where peers of a distributed run died first, theirs is the message worth reading: this
    process waits a moment for the launcher to stop it before it speaks.
    """
    code = 0
    try:
        main()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        console.error(str(error))
        code = 2
    except KeyboardInterrupt:
        console.error("interrupted")
        code = 130
    except Exception as error:
        if _lost_a_peer(error):
            time.sleep(10)
        traceback.print_exc()
        code = 1
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # No destructors: after an error they would wait for peers that are inside a collective,
        # and gloo's threads, torn down at exit, now and then abort a run that went well.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _lost_a_peer(error: Exception) -> bool:
    """Whether a collective failed because another process is gone."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text
