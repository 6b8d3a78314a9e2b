"""What cannot work ends a training command with one line, before anything is built."""

from __future__ import annotations

import argparse

import pytest

from paci_megatron.config import ConfigError
from paci_megatron.data import DataError
from paci_megatron.platform.without_te import check_installed, has_transformer_engine
from paci_megatron.plugin.inputs import exit_on_config_error


@pytest.mark.parametrize("kind", [ConfigError, DataError])
@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_error_becomes_one_line_on_the_first_rank_and_status_2_on_all(
    kind: type[Exception], rank: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught, exit_on_config_error():
        raise kind("--flag 3: too many. Give 2.")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "paci-megatron: error: --flag 3: too many. Give 2.\n" * lines


@pytest.mark.skipif(has_transformer_engine(), reason="then it is possible")
def test_context_parallelism_needs_transformer_engine() -> None:
    check_installed(argparse.Namespace(context_parallel_size=1))
    with pytest.raises(ConfigError, match=r"--context-parallel-size 2 needs Transformer Engine.*--sequence-parallel"):
        check_installed(argparse.Namespace(context_parallel_size=2))
