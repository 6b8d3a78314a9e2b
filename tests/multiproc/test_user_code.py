"""What users' scripts do around Megatron works under PACI, on processes and emulated alike."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.support import user_code
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_run, emulated

NUM_STAGES, UPDATES = 4, 6
FRAMES = 7  # from Megatron's train to the optimizer step: the way that docs/design.md shows


@pytest.mark.parametrize("num_stages", [NUM_STAGES])
def test_a_script_may_read_data_at_every_stage(pool: GetPool, corpus: str, one_process: OneProcess, num_stages: int) -> None:
    argv = [*arguments(corpus, num_stages, 2), *PACI]
    processes = pool(num_stages).run("train", argv=argv, within=user_code.data_at_every_stage)
    assert_same_run(processes, one_process(emulated(argv), within=user_code.data_at_every_stage))


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("num_stages", [NUM_STAGES])
def test_a_wrapper_around_the_optimizers_step_is_called(
    pool: GetPool, corpus: str, one_process: OneProcess, tmp_path: Path, num_stages: int, by_class: bool
) -> None:
    argv = [*arguments(corpus, num_stages, 2), *PACI]

    def counts(folder: str) -> list[dict[str, int]]:
        return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((tmp_path / folder).glob("*.json"))]

    for folder in ("processes", "emulated"):
        (tmp_path / folder).mkdir()
    wrapped = partial(user_code.wrapped_optimizer_step, by_class=by_class)
    pool(num_stages).run("train", argv=argv, within=partial(wrapped, str(tmp_path / "processes")))
    one_process(emulated(argv), within=partial(wrapped, str(tmp_path / "emulated")))
    assert counts("processes") == [{"steps": UPDATES, "changed": UPDATES, "frames": FRAMES}] * num_stages
    all_updates, frames = UPDATES * num_stages, FRAMES + by_class  # StageOptimizers.step stands before the class's
    assert counts("emulated") == [{"steps": all_updates, "changed": all_updates, "frames": frames}]
