"""What must be over before the interpreter ends."""

from __future__ import annotations

import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
_LIMIT_S = 5.0


def wait_for_gloo_threads(tasks: Path = _TASKS, limit_s: float = _LIMIT_S) -> None:
    """Wait until no thread of gloo is running, at most ``limit_s``; ``tasks`` is Linux's list of this process's threads.

    A collective is over for the training before gloo's thread has let go of its tensor, for which it needs the interpreter.
    On a busy machine that may be after the interpreter's end, which aborts a process (SIGABRT) whose training is finished.
    """
    deadline_s = time.monotonic() + limit_s
    time.sleep(0.01)  # whoever waits for the interpreter has it now
    while _are_running(tasks) and time.monotonic() < deadline_s:
        time.sleep(0.01)


def _are_running(tasks: Path) -> bool:
    for status in tasks.glob("*/stat"):
        try:
            _, _, rest = status.read_text(encoding="ascii", errors="replace").partition("(pt_gloo_runloop) ")
        except OSError:  # the thread has ended
            continue
        if rest.startswith("R"):
            return True
    return False
