"""What cannot work ends a training command with one line, before anything is built."""

from __future__ import annotations

import argparse

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.data import DataError
from paci_megatron.platform.without_te import check_installed, has_transformer_engine
from paci_megatron.plugin.inputs import MegatronError, exit_on_config_error, megatrons_refusals


@pytest.mark.parametrize("kind", [ConfigError, DataError, MegatronError])
@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_error_becomes_one_line_on_the_first_rank_and_status_2_on_all(
    kind: type[Exception], rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught, exit_on_config_error():
        raise kind("--flag 3: too many. Give 2.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "paci-megatron: error: --flag 3: too many. Give 2.\n" * lines


def test_under_torchrun_the_others_leave_the_line_to_the_first_and_speak_if_it_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for rank, local_rank, line in ((0, 0, "no"), (8, 0, "rank 8: no"), (9, 1, "rank 9: no")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        with pytest.raises(SystemExit), exit_on_config_error():
            raise ConfigError("no")
        assert capsys.readouterr().err == f"paci-megatron: error: {line}\n"
    of_the_first_of_a_machine, of_the_others = waited
    assert 0 < of_the_first_of_a_machine < of_the_others


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (AssertionError("no\n such thing"), "refused by Megatron: no such thing"),
        (TypeError("int and None"), "refused by Megatron: int and None"),
        (AssertionError("hidden_size argument is None"), "--hidden-size is missing. Megatron needs it."),
    ],
)
def test_what_megatron_refuses_is_one_line(raised: Exception, said: str) -> None:
    with pytest.raises(ConfigError) as caught, megatrons_refusals():
        raise raised
    assert str(caught.value) == said


def test_a_condition_without_words_is_quoted() -> None:
    with pytest.raises(ConfigError, match=r"^refused by Megatron: raise AssertionError$"), megatrons_refusals():
        raise AssertionError


@pytest.mark.skipif(has_transformer_engine(), reason="then it is possible")
def test_context_parallelism_needs_transformer_engine() -> None:
    check_installed(argparse.Namespace(context_parallel_size=1))
    with pytest.raises(ConfigError, match=r"--context-parallel-size 2 needs Transformer Engine.*--sequence-parallel"):
        check_installed(argparse.Namespace(context_parallel_size=2))
