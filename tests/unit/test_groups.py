"""The process groups between stages: NCCL's options, how they are made, and in which order they are first used."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paci_megatron.plugin import groups
from paci_megatron.plugin.groups import leave_room_for_transfers, make_group, nccl_options
from paci_megatron.runtime import groups as runtime_groups
from paci_megatron.runtime.groups import MAX_TIED_TURNS, Direction, ProcessTransport, Wanted, create_groups, use_once
from paci_megatron.schedule import Kind
from paci_megatron.schedule.schedules import even_slack, sends_in_flight
from tests.support.plans import plans_of


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's options as they are given to Megatron's function that makes them."""
    monkeypatch.setattr(groups.parallel_state, "get_nccl_options", lambda name, configured: configured[name])


def namespace(**changes: Any) -> argparse.Namespace:
    values: dict[str, Any] = {
        "distributed_backend": "nccl",
        "paci_link": "p2p",
        "pipeline_schedule": "paci",
        "paci_transfer_ctas": None,
        "nccl_communicator_config_path": None,
        "high_priority_stream_groups": [],
        "transformer_impl": "transformer_engine",
        "paci_emulate_stages": None,
    }
    return argparse.Namespace(**{**values, **changes})


def test_transfers_take_few_thread_blocks_and_have_priority(given: None) -> None:
    assert nccl_options(namespace()) == {"is_high_priority_stream": True, "min_ctas": 1, "max_ctas": 4}
    assert nccl_options(namespace(paci_transfer_ctas=2))["max_ctas"] == 2
    assert nccl_options(namespace(paci_link="host")) is None, "transfers go over gloo"
    assert nccl_options(namespace(distributed_backend="gloo")) is None


def test_what_megatrons_options_say_of_the_pipelines_group_goes_before(given: None, tmp_path: Path) -> None:
    path = tmp_path / "nccl.yaml"
    path.write_text("dp:\n  max_ctas: 9\npp:\n  max_ctas: 8\n  cga_cluster_size: 2\n  is_high_priority_stream: false\n")
    options = nccl_options(namespace(nccl_communicator_config_path=str(path)))
    assert options == {"is_high_priority_stream": False, "min_ctas": 1, "max_ctas": 8, "cga_cluster_size": 2}
    named = namespace(nccl_communicator_config_path=str(path), high_priority_stream_groups=["dp", "pp"])
    assert nccl_options(named)["is_high_priority_stream"]
    assert nccl_options(namespace(nccl_communicator_config_path=str(path), paci_transfer_ctas=2))["max_ctas"] == 2
    path.write_text("pp:\n  min_ctas: 6\n")
    assert nccl_options(namespace(nccl_communicator_config_path=str(path)))["max_ctas"] == 6, (
        "NCCL refuses less than its least"
    )
    path.write_text("pp:\n")
    assert nccl_options(namespace(nccl_communicator_config_path=str(path)))["max_ctas"] == 4
    path.write_text("dp:\n  max_ctas: 9\n")
    assert nccl_options(namespace(nccl_communicator_config_path=str(path)))["max_ctas"] == 4


def test_all_groups_are_made_at_once_in_one_order_and_only_those_over_nccl_have_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = [Wanted("B", (1, 2)), Wanted("A", (2, 3)), Wanted("R", (0, 1, 2, 3), "gloo")]
    gathered, made = [], []

    def all_gather_object(found: list[Any], mine: Any) -> None:
        gathered.append(mine)
        found[:] = [mine, others]

    def create_group(**named: Any) -> str:
        made.append(named)
        return f"{named['group_desc']} {named['ranks']}"

    monkeypatch.setattr(runtime_groups.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(runtime_groups.dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(groups, "nccl_options", lambda args: "few")
    # Megatron's own function, which notes the group for --distributed-timeout-seconds-after-init.
    monkeypatch.setattr(groups.parallel_state, "create_group", create_group)
    mine = [Wanted("R", (0, 1, 2, 3), "gloo"), Wanted("B", (0, 1)), Wanted("A", (0, 1))]
    made_here = create_groups(mine, make_group(namespace(distributed_timeout_minutes=7)))
    assert made_here == ["R [0, 1, 2, 3]", "B [0, 1]", "A [0, 1]"]
    assert len(gathered) == 1
    order = [(named["group_desc"], *named["ranks"][:2], named["pg_options"]) for named in made]
    few = [("A", 0, 1, "few"), ("A", 2, 3, "few"), ("B", 0, 1, "few"), ("B", 1, 2, "few")]
    assert order == [*few, ("R", 0, 1, None)]
    assert all(named["timeout"].total_seconds() == 420 for named in made)


@pytest.mark.parametrize("record_lag", [1, 2, 8, 9, 31])
def test_every_communicator_of_a_rank_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch, record_lag: int) -> None:
    """PyTorch has 32 for them. Two on one stream could wait for each other; a long lag comes of a small ``a``."""
    asked: list[Wanted] = []

    def create_groups(wanted: Sequence[Wanted], make: Any) -> list[Any]:
        asked.extend(wanted)
        return list(wanted)

    used: list[Direction] = []
    monkeypatch.setattr(runtime_groups, "create_groups", create_groups)
    monkeypatch.setattr(runtime_groups, "use_once", lambda directions, place, device: used.extend(directions))
    monkeypatch.setattr(runtime_groups.dist, "get_rank", lambda: 0)
    tied = torch.zeros(1)
    ProcessTransport([0, 1, 2], (1,), torch.float32, torch.device("cpu"), record_lag, over_nccl=True, tied=tied)
    over_nccl = [wanted for wanted in asked if wanted.backend is None]
    assert len(over_nccl) == len(used) == 2 + 2 * min(record_lag, MAX_TIED_TURNS)
    assert len(over_nccl) <= 32


@pytest.mark.parametrize("num_stages", [2, 3, 8, 9])
def test_connections_are_made_in_two_steps_however_many_stages_there_are(
    monkeypatch: pytest.MonkeyPatch, num_stages: int
) -> None:
    used: list[Direction] = []
    monkeypatch.setattr(runtime_groups, "_use_once", lambda direction, device: used.append(direction))
    ranks = [10 * stage for stage in range(num_stages)]
    queues = []
    for stage in range(num_stages):
        pairs = [pair for pair in ((stage - 1, stage), (stage, stage + 1)) if pair[0] >= 0 and pair[1] < num_stages]
        group: Any = SimpleNamespace()
        directions = [Direction("ACTIVATIONS", group, ranks[before], ranks[after]) for before, after in pairs]
        used.clear()
        use_once(directions, ranks.index, torch.device("cpu"))
        queues.append([(direction.sender // 10, direction.receiver // 10) for direction in used])
    steps = 0
    while any(queues):
        heads = [queue[0] if queue else None for queue in queues]
        ready = {pair for pair in heads if pair is not None and heads[pair[0]] == pair == heads[pair[1]]}
        assert ready, f"all wait: {heads}"
        for queue in queues:
            if queue and queue[0] in ready:
                queue.pop(0)
        steps += 1
    assert steps == min(num_stages - 1, 2)


def test_norms_leave_room_for_pending_receives_unless_the_user_has_said_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("NVTE_FWD_LAYERNORM_SM_MARGIN", "NVTE_BWD_LAYERNORM_SM_MARGIN")
    for name in names:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    assert leave_room_for_transfers(namespace(transformer_impl="local")) is None
    assert leave_room_for_transfers(namespace(distributed_backend="gloo")) is None
    assert leave_room_for_transfers(namespace(paci_emulate_stages=4)) is None
    monkeypatch.setenv(names[0], "20")
    line = leave_room_for_transfers(namespace(paci_transfer_ctas=2))
    assert line is not None and [os.environ[name] for name in names] == ["20", "6"]
    assert leave_room_for_transfers(namespace()) is None


@pytest.mark.parametrize("num_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("a", [1, 2, 4, 8])
@pytest.mark.parametrize("extra_by_stages", [0, 1, -1], ids=["none", "one", "N-1"])
def test_pending_transfers_never_hold_a_quarter_of_the_multiprocessors(
    num_stages: int, a: int, extra_by_stages: int
) -> None:
    """However late the neighbours are, of an H100's 132. NCCL's default of 32 thread blocks each could take nearly all."""
    extra = num_stages - 1 if extra_by_stages < 0 else extra_by_stages
    receives, sends = (Kind.RECV_FORWARD, Kind.RECV_BACKWARD), (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)
    needed = {Kind.FORWARD: Kind.RECV_FORWARD, Kind.BACKWARD: Kind.RECV_BACKWARD}
    worst = 0
    slack = even_slack(num_stages, extra)
    for stage, plan in enumerate(plans_of(num_stages, a, updates=6, slack=slack)):
        pending = dict.fromkeys((*receives, *sends), 0)
        for action in plan:
            if action.kind in pending:
                pending[action.kind] += 1
            elif action.kind in needed:
                # Its own data has come; and a send of which so many more have been made is done.
                pending[needed[action.kind]] = max(pending[needed[action.kind]] - 1, 0)
            for kind, link in ((Kind.SEND_FORWARD, stage), (Kind.SEND_BACKWARD, stage - 1)):
                if 0 <= link < num_stages - 1:
                    pending[kind] = min(pending[kind], sends_in_flight(link, slack))
            worst = max(worst, sum(pending.values()))
    assert 4 * worst <= 132 / 4 + 8 * extra
    assert 32 * worst > 0.9 * 132


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_processes_of_a_v_have_a_group_for_each_link_and_way_and_none_for_an_embedding_of_their_own(
    monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    asked: list[Wanted] = []

    def create_groups(wanted: Sequence[Wanted], make: Any) -> list[Any]:
        asked.extend(wanted)
        return list(wanted)

    monkeypatch.setattr(runtime_groups, "create_groups", create_groups)
    monkeypatch.setattr(runtime_groups, "use_once", lambda directions, place, device: None)
    monkeypatch.setattr(runtime_groups.dist, "get_rank", lambda: rank)
    ranks, tied = [2, 1, 0, 0, 1, 2], torch.zeros(1) if rank == 2 else None
    transport = ProcessTransport(ranks, (1,), torch.float32, torch.device("cpu"), 3, over_nccl=True, tied=tied)
    neighbours = 1 if rank in (0, 2) else 2
    assert len(asked) == len(set(asked)) == 1 + 4 * neighbours
    assert asked[0] == Wanted("PACI_RECORDS", (0, 1, 2), "gloo")
    exchanges = [transport.tied_exchange(stage, record_lag=3) for stage in range(6)]
    assert [exchange is not None for exchange in exchanges] == [rank == 2, *[False] * 4, rank == 2]
