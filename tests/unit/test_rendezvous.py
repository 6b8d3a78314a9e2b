"""Ranks that wait for each other: who is missing is said while it is, and in the end."""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import threading
import time

import pytest
from torch.distributed import TCPStore

from lab.processes import ROOT
from paci_megatron.config import ConfigError
from paci_megatron.plugin import rendezvous
from paci_megatron.plugin.rendezvous import Waiting, shared_store


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    """A free one, at which the ranks without torchrun are to meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free: int = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free))
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return free


def come(rank: int, world_size: int, timeout_s: float = 60.0, first_line_s: float = 30.0) -> TCPStore:
    waiting = Waiting(rank, world_size, timeout_s, first_line_s)
    store = waiting.connect()
    waiting.until_all_are_here(store)
    return store


def test_all_go_on_when_the_last_has_come(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    through: dict[int, TCPStore] = {}

    def arrive(rank: int) -> None:
        through[rank] = come(rank, 3)

    first = [threading.Thread(target=arrive, args=(rank,)) for rank in (1, 0)]
    for thread in first:
        thread.start()
    time.sleep(1.0)
    assert not through
    arrive(2)
    for thread in first:
        thread.join()
    assert sorted(through) == [0, 1, 2]
    assert capfd.readouterr() == ("", ""), "nothing is said where nobody is late"


def test_rank_0_names_the_missing_while_it_waits_and_at_the_end(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    other = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, multi_tenant=True)
    other.set("paci/1", "")
    with pytest.raises(ConfigError) as refusal:
        come(0, 4, timeout_s=3.0, first_line_s=1.0)
    place = f"2 of 4 ranks have come to MASTER_ADDR 127.0.0.1, MASTER_PORT {port}, ranks 2, 3 not"
    remedy = "Start all 4 processes with this address and port, or give the WORLD_SIZE that is started."
    assert str(refusal.value) == f"{place} after 0.05 min (--distributed-timeout-minutes). {remedy}"
    printed, warned = capfd.readouterr()
    assert (
        not warned
        and [line.partition(" has waited for ")[0] for line in printed.splitlines()] == ["paci-megatron: rank 0"] * 2
    ), "after 1 and 2 s"
    assert all(f"s: {place}. Start what is missing" in line for line in printed.splitlines())


def test_a_rank_without_rank_0_says_where_it_looked(port: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=f"rank 0 is not at MASTER_ADDR 127.0.0.1, MASTER_PORT {port} after "):
        come(1, 2, timeout_s=1.5, first_line_s=0.5)
    printed, warned = capfd.readouterr()
    assert "rank 1 has waited for" in printed and not warned


def test_addresses_that_are_of_no_use(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", port))
        other.listen()
        with pytest.raises(ConfigError, match=f"MASTER_PORT {port}: .*Give a port that is free on the machine of rank 0"):
            come(0, 2)
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE 2 without MASTER_PORT\. Start with torchrun, or set them\."):
        come(0, 2)


def test_a_rank_0_that_ends_is_named(port: int) -> None:
    code = (
        "import os, sys, time\nfrom paci_megatron.plugin.rendezvous import Waiting\nstore = Waiting(0, 3, 60.0).connect()\n"
    )
    keeper = subprocess.Popen([sys.executable, "-c", f"{code}time.sleep(3)\nos._exit(1)"], cwd=ROOT)
    with pytest.raises(ConfigError, match=r"rank 0 at MASTER_ADDR 127.0.0.1, .* has ended\."):
        come(1, 3)
    keeper.wait()


def test_nothing_is_waited_for_where_there_is_nobody(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    args = argparse.Namespace(rank=0, world_size=1, fake_process_group=False, distributed_timeout_minutes=10)
    assert shared_store(args) is None
    args.world_size = 2
    monkeypatch.setattr(rendezvous.dist, "is_initialized", lambda: True)
    assert shared_store(args) is None
