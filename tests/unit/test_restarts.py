"""When a restarted job needs a store of its own, and when only the user can help."""

from __future__ import annotations

import pytest
from torch.distributed import TCPStore

from paci_megatron.plugin.restarts import is_restarted, of_this_attempt, restart_warning


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """torchrun's on one node, in the first attempt of three."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    return monkeypatch


def test_each_restart_sees_only_its_own(environment: pytest.MonkeyPatch) -> None:
    server = TCPStore("localhost", 0, is_master=True)
    assert of_this_attempt(server) is server and restart_warning() is None
    server.set("address", "of the first attempt")
    for attempt in ("1", "2"):
        environment.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store, other = of_this_attempt(server), of_this_attempt(server)
        assert not store.check(["address"])
        store.set("address", attempt)
        assert other.get("address") == attempt.encode()


def test_several_nodes_are_told_what_to_set(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("GROUP_WORLD_SIZE", "4")
    warning = restart_warning()
    assert warning is not None and "--max-restarts 2 on 4 nodes" in warning
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in warning
    environment.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not is_restarted()
    environment.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    assert restart_warning() is None
