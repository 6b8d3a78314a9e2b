"""Before the interpreter ends, gloo's threads must be done."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from paci_megatron.plugin.exits import wait_for_gloo_threads
from tests.support.interpreter import run


def _thread(tasks: Path, number: int, name: str, state: str) -> None:
    (tasks / str(number)).mkdir(exist_ok=True)
    (tasks / str(number) / "stat").write_text(f"{number} ({name}) {state} 1 1 1")


def test_it_waits_while_a_gloo_thread_is_running_and_no_longer_than_the_limit(tmp_path: Path) -> None:
    _thread(tmp_path, 1, "python", "R")
    _thread(tmp_path, 2, "pt_gloo_runloop", "S")
    _thread(tmp_path, 3, "pt_gloo_runloop", "R")
    began = time.monotonic()
    wait_for_gloo_threads(tmp_path, limit_s=0.2)
    assert time.monotonic() - began >= 0.2
    threading.Timer(0.1, _thread, (tmp_path, 3, "pt_gloo_runloop", "S")).start()
    began = time.monotonic()
    wait_for_gloo_threads(tmp_path, limit_s=60)
    assert 0.1 <= time.monotonic() - began < 30


def test_gloo_names_its_threads_so_and_the_plugin_waits_at_exit() -> None:
    run(
        """
import atexit, glob, time, torch.distributed as dist, paci_megatron
from paci_megatron.plugin import exits
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deadline_s = time.monotonic() + 60
while not any("(pt_gloo_runloop) S" in open(name).read() for name in glob.glob("/proc/self/task/*/stat")):
    assert time.monotonic() < deadline_s
    time.sleep(0.01)
asked = []
exits._are_running = lambda tasks: bool(asked.append(tasks))
paci_megatron.install()
atexit._run_exitfuncs()
assert len(asked) == 1
"""
    )
