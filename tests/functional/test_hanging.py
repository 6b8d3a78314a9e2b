"""A stage that stops or dies: every other says where it is and whom it waits for, and the job ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lab.processes import CPU_ENVIRONMENT, ROOT
from tests.support.torchrun import MODEL, start, wait_for

STAGES = 3


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_and_ends_the_job(tmp_path: Path) -> None:
    names = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29431"}
    options = ("--pipeline-model-parallel-size", "2", "--pipeline-schedule", "paci", "--distributed-timeout-minutes", "1")
    model = [*MODEL, "--mock-data", "--num-layers", "2", "--train-iters", "2"]
    command = [sys.executable, "-m", "pretrain_gpt_paci", *model, *options]
    environment = {**os.environ, **CPU_ENVIRONMENT, "PYTHONPATH": str(ROOT), **names}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    missing = "1 of 2 ranks have come to MASTER_ADDR 127.0.0.1, MASTER_PORT 29431, rank 1 not"
    assert done.returncode == 2, done.stderr
    assert f"s: {missing}. Start what is missing" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"paci-megatron: error: {missing} after 1 min ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow  # tests/unit/test_watchdog.py has what is said
@pytest.mark.parametrize("sent", [signal.SIGSTOP, signal.SIGKILL])
def test_the_others_say_whom_they_wait_for(tmp_path: Path, sent: signal.Signals) -> None:
    script = tmp_path / "script.py"
    # Each rank leaves its process id, and its training never ends.
    script.write_text(
        f"import os\nopen('{tmp_path}/' + os.environ['RANK'], 'w').write(str(os.getpid()))\n"
        + (ROOT / "tests/functional/any_script.py").read_text()
    )
    command = [
        *("-m", "paci_megatron", str(script), *MODEL, "--num-layers", "3", "--train-iters", "1000000"),
        *("--pipeline-model-parallel-size", str(STAGES), "--pipeline-schedule", "paci", "--paci-transfer-timeout", "10"),
    ]
    job = start(*command, processes=STAGES)
    last = 0
    try:
        printed = wait_for(job, 30)
        last = int((tmp_path / str(STAGES - 1)).read_text())
        if sent == signal.SIGSTOP:
            asked = int((tmp_path / "0").read_text())
            os.kill(asked, signal.SIGUSR1)
            time.sleep(0.5)
        os.kill(last, sent)
        reader = threading.Thread(target=lambda: printed.extend(job.stdout or ()), daemon=True)
        reader.start()
        if sent == signal.SIGSTOP:
            time.sleep(20)
            os.kill(last, signal.SIGKILL)  # torchrun itself waits for the stopped process
        reader.join(timeout=60)
        assert job.wait(timeout=60) != 0
    finally:
        job.kill()
        if last:
            os.kill(last, signal.SIGKILL) if Path(f"/proc/{last}").exists() else None
    output = "".join(printed)
    if sent == signal.SIGSTOP:
        assert re.search(r"rank 0, stage 0.*asked by SIGUSR1", output)
        for rank in (0, 1):
            waiting = re.search(rf"rank {rank}, (stage {rank}, .*nothing has happened for 10 s.*)", output)
            assert waiting is not None, output[-3000:]
        assert re.search(
            r"stage 1, update of iteration \d+, last finished \w+\d+, at \w+\d+ for \d+ s, which needs stage 2 \(rank 2\)",
            output,
        )
        assert re.search(r"^stage 2: .*F\d+ .*U\d+", output, re.M), "rank 0 shows the plan"
    else:
        assert re.search(r"paci-megatron: stage 1, update of iteration \d+, .* which needs stage 2 \(rank 2\)", output), (
            output[-3000:]
        )
