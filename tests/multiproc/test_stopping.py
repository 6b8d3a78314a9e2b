"""Stopping at will, falling back to flush and starting with it: all stages at the same iteration, and nothing lost."""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from paci_megatron.telemetry.metrics_file import read_metrics
from tests.support.helpers import PACI, GetPool, OneProcess, arguments, assert_same_bits, assert_same_weights, emulated, slow
from tests.support.interruptions import Injection, Terminated
from tests.support.pool import Pool

ITERS = 20


def stopped_and_resumed(
    pool: Pool, corpus: str, folder: Path, num_stages: int, a: int, stop: Terminated, dp: int = 1, schedule: list[str] = PACI
) -> None:
    """A run that is terminated and resumed is one that was not, but drained where the other was stopped."""
    keeping = ["--save", str(folder), "--save-interval", "1000", "--override-opt-param-scheduler"]
    argv = arguments(corpus, num_stages, a, *schedule, "--clip-grad", "0.5", "--exit-signal-handler", iters=ITERS, dp=dp)
    argv.remove("--untie-embeddings-and-output-weights")
    stopped = pool.run("train", argv=[*argv, *keeping], within=stop)
    assert {result.exit_code for result in stopped} == {0}
    (iteration,) = {result.last_iteration for result in stopped}
    assert stop.iteration < iteration < ITERS, "it stopped neither before the signal nor at the end"
    assert iteration > ITERS / 2, "the run to compare with would drain twice"
    resumed = pool.run("train", argv=[*argv, *keeping, "--load", str(folder)])
    whole = pool.run("train", argv=[*argv, "--paci-drain-interval", str(iteration)])
    assert stopped[-1].losses + resumed[-1].losses == whole[-1].losses
    for result, other in zip(resumed, whole, strict=True):
        result.losses = other.losses
    assert_same_bits(resumed, whole)


@pytest.mark.parametrize(
    ("num_stages", "a", "dp", "stop"),
    [
        (2, 1, 1, Terminated(iteration=11, ranks=(1,), times=2)),
        (4, 1, 1, Terminated(iteration=9, ranks=(2,))),
        (2, 2, 2, Terminated(iteration=10, ranks=(2,))),
        *slow(
            (2, 2, 1, Terminated(iteration=10, ranks=(0,))),
            (4, 3, 1, Terminated(iteration=9, ranks=(0, 1, 2, 3), after_s=0.01)),
        ),
    ],
)
def test_sigterm_saves_and_resumes_bit_for_bit(
    pool: GetPool, corpus: str, tmp_path: Path, num_stages: int, a: int, dp: int, stop: Terminated
) -> None:
    stopped_and_resumed(pool(num_stages * dp), corpus, tmp_path, num_stages, a, stop, dp)


@pytest.mark.slow
def test_sigterm_under_paci_v(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    stop = Terminated(iteration=10, ranks=(0,))
    stopped_and_resumed(
        pool(2), corpus, tmp_path, 2, 2, stop, schedule=["--pipeline-schedule", "paci-v", "--num-layers", "4"]
    )


@pytest.mark.slow
def test_sigterm_at_twenty_random_moments(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    draw = random.Random(5)
    for moment in range(20):
        ranks = tuple(draw.sample(range(4), draw.randint(1, 4)))
        stop = Terminated(draw.randint(9, 11), ranks, after_s=draw.uniform(0, 0.1), times=draw.randint(1, 2))
        stopped_and_resumed(pool(4), corpus, tmp_path / str(moment), 4, draw.choice([2, 3]), stop)


def test_emulated_replicas_stop_together(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    argv = emulated(arguments(corpus, 2, 2, *PACI, "--exit-signal-handler", iters=ITERS, dp=2))
    keeping = ["--save", str(tmp_path), "--save-interval", "1000"]
    stopped = pool(2).run("train", argv=[*argv, *keeping], within=Terminated(iteration=9, ranks=(1,)))
    assert {result.exit_code for result in stopped} == {0}
    (iteration,) = {result.last_iteration for result in stopped}
    assert 9 < iteration < ITERS


def test_exit_after_a_duration(pool: GetPool, corpus: str, tmp_path: Path) -> None:
    argv = arguments(corpus, 2, 2, *PACI, "--exit-duration-in-mins", "1", iters=ITERS)
    # Megatron takes whole minutes; training began one ago.
    results = pool(2).run("train", argv=[*argv, "--save", str(tmp_path), "--save-interval", "1000"], within=_begun_long_ago)
    assert {result.exit_code for result in results} == {0}
    assert {result.last_iteration for result in results} == {3}, "asked for in window 1, known after 1, drained after 1 more"
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


@contextlib.contextmanager
def _begun_long_ago() -> Iterator[None]:
    import megatron.training.training as training

    original = training.train

    def train(*args: Any, **kwargs: Any) -> Any:
        training._TRAIN_START_TIME -= 61
        return original(*args, **kwargs)

    training.train = train
    yield
    training.train = original


def test_starting_with_flush(pool: GetPool, corpus: str) -> None:
    argv = arguments(corpus, 2, 2, iters=8)
    flush = pool(2).run("train", argv=argv)
    # One window alone is what flush does.
    assert_same_bits(flush, pool(2).run("train", argv=[*argv, *PACI, "--paci-start-iteration", "7"]))
    later = pool(2).run("train", argv=[*argv, *PACI, "--paci-start-iteration", "4"])
    # The first window of PACI still sees the weights of flush.
    assert later[-1].losses[:5] == flush[-1].losses[:5]
    assert later[-1].losses[5:] != flush[-1].losses[5:]


@pytest.mark.parametrize("factor", [1e4, math.nan], ids=["spike", "nan"])
def test_fallback_is_flush_for_a_while(
    pool: GetPool, one_process: OneProcess, corpus: str, tmp_path: Path, factor: float
) -> None:
    """Drained after every iteration from the one at which all stages know, the run is that of a drain interval of 1."""
    flags = ["--no-check-for-nan-in-loss-and-grad", "--clip-grad", "0.5", "--paci-metrics-file", str(tmp_path / "metrics")]
    spike = Injection(stage=1, microbatch=2 * 24, factor=factor)  # the loss, in window 25
    argv = arguments(corpus, 2, 2, *PACI, *flags, "--paci-fallback", "5", iters=36)
    processes = pool(2).run("train", argv=argv, within=spike)
    drains = re.findall(r'"event": "drain".*?"iteration": (\d+)', (tmp_path / "metrics").read_text())
    # Known to all after one more update, drained after the next, and then five times more.
    assert [int(n) for n in drains] == [27, 28, 29, 30, 31, 32, 36]
    (fell,) = [event for event in read_metrics(tmp_path / "metrics") if event["event"] == "fallback"]
    assert fell["iteration"] == 25 and "flushing as 1f1b from iteration 28, for 5 iterations" in fell["reason"]
    one = one_process(emulated(argv), within=spike)
    assert repr(processes[-1].losses) == repr(one.losses)


@pytest.mark.parametrize("stop", [22, 30], ids=["before the spike", "while flushing"])
def test_fallback_goes_on_after_a_resume(pool: GetPool, corpus: str, tmp_path: Path, stop: int) -> None:
    flags = ["--clip-grad", "0.5", "--paci-fallback", "5", "--paci-drain-interval", str(stop)]
    argv = arguments(corpus, 2, 2, *PACI, *flags, iters=36)
    spike = Injection(stage=1, microbatch=2 * 24, factor=1e4)  # the loss, in window 25
    whole = pool(2).run("train", argv=argv, within=spike)
    unharmed = pool(2).run("train", argv=argv)
    assert whole[-1].losses[:24] == unharmed[-1].losses[:24] and whole[-1].losses[24] > 100 * unharmed[-1].losses[24]

    keeping = ["--save", str(tmp_path), "--save-interval", "1000", "--override-opt-param-scheduler"]
    pool(2).run("train", argv=[*argv, *keeping, "--exit-interval", str(stop)], within=spike)
    metrics = tmp_path / "metrics"
    after = Injection(stage=1, microbatch=2 * (24 - stop), factor=1e4)  # never, if that is past
    keeping += ["--load", str(tmp_path), "--paci-metrics-file", str(metrics)]
    resumed = pool(2).run("train", argv=[*argv, *keeping], within=after)
    drains = [int(n) for n in re.findall(r'"event": "drain".*?"iteration": (\d+)', metrics.read_text())]
    assert drains == [n for n in (27, 28, 29, 30, 31, 32, 36) if n > stop]
    assert resumed[-1].losses == whole[-1].losses[stop:]
    assert_same_weights([result.weights for result in resumed], [result.weights for result in whole])


def test_fallback_remembers_each_loss_once(one_process: OneProcess, corpus: str, tmp_path: Path) -> None:
    """The first stage knows totals up to four updates before the last, which tells them again."""
    from megatron.core.dist_checkpointing import load_common_state_dict

    argv = emulated(arguments(corpus, 4, 1, *PACI, "--paci-fallback", "5", iters=12))
    run = one_process([*argv, "--save", str(tmp_path), "--save-interval", "12"])
    saved = load_common_state_dict(tmp_path / "iter_0000012")["args"]
    assert saved.paci_state["losses"] == pytest.approx(run.losses, rel=1e-6) and len(run.losses) == 12
