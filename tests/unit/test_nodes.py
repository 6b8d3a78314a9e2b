"""Nodes with slow links between them: the link itself, and what a training on them is told and compared with."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from pathlib import Path

from lab.benchmark.jobs import RankResult
from lab.nodes.figure import write_figure
from lab.nodes.link import Network
from lab.nodes.main import _parser, costs_over, row, settings_of, table
from lab.nodes.namespaces import Node
from lab.nodes.training import torchrun

DELAYS_S, BYTES_PER_S = (0.05, 0.02), 1e5


def packet(node: int, size: int) -> bytes:
    """IPv4 as far as the link looks at it: to 10.83.0.(node + 1)."""
    return bytes([0x45]) + bytes(15) + bytes([10, 83, 0, node + 1]) + bytes(size - 20)


def test_packets_take_the_delay_of_each_link_and_their_time_on_the_wire() -> None:
    ours, theirs = zip(*(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM) for _ in range(3)), strict=True)
    for each in theirs:
        each.setblocking(False)
    until, closing = os.pipe()
    network = Network([each.fileno() for each in theirs], DELAYS_S, BYTES_PER_S)
    thread = threading.Thread(target=network.run, args=(until,))
    thread.start()
    try:
        for to, size, least_s in ((1, 100, 0.05), (2, 100, 0.07), (1, 2000, 0.05 + 0.02)):
            began_s = time.monotonic()
            ours[0].send(packet(to, size))
            assert ours[to].recv(1 << 16) == packet(to, size)
            assert least_s <= time.monotonic() - began_s
        began_s = time.monotonic()
        for _ in range(10):
            ours[1].send(packet(0, 1000))
        for _ in range(10):
            ours[0].recv(1 << 16)
        assert time.monotonic() - began_s >= 0.05 + 10 * 1000 / BYTES_PER_S, "one after the other on the wire"
    finally:
        os.close(closing)
        thread.join()


def options(*words: str) -> tuple[str, ...]:
    return (*words, "--output", "rows.json")


def test_links_between_nodes_are_slow_and_those_within_are_not() -> None:
    parsed = _parser().parse_args(options("--nodes", "2", "--stages-per-node", "2"))
    rounded = settings_of(parsed, ["--paci-transfer-dtype", "bf16"])
    costs = costs_over(rounded, 2, delay_s=0.02, bits_per_s=8e6)
    assert costs.latencies_s == (0, 0.02, 0) and costs.handshakes
    assert costs.bandwidth_bytes_per_s == (math.inf, 1e6, math.inf)
    assert costs.message_bytes == 32 * 1 * 32 * 2, "a sequence of 32 and hidden size 32 in bf16"


def test_a_row_stands_beside_its_prediction_with_what_auto_chose() -> None:
    settings = settings_of(_parser().parse_args(options("--schedules", "1f1b", "paci:auto", "--iterations", "2")), [])
    ((flush, auto),), _ = settings.groups()
    costs = costs_over(settings, 1, delay_s=0.02, bits_per_s=1e10)
    network = {"delay_ms": 20.0, "gbit_per_s": 10.0}
    rows = []
    for case, ms, slack in ((flush, 900, ()), (auto, 360, (1,))):
        ends_s = [ms / 1000 * iteration for iteration in range(settings.train_iters(case))]
        ranks = [RankResult(rank, ends_s, update_s=0.0, actions=8, slack=slack) for rank in range(2)]
        rows.append(row(settings, case, costs, ranks, network))
    assert [round(each["ms_per_iteration"]) for each in rows] == [900, 360]
    assert abs(rows[1]["error"]) < 1e-3, "with the slack it chose the delay is hidden"
    assert "paci:auto" in table(rows) and "2.50x" in table(rows)
    slower, slowest = (rows[1] | {"ms_per_iteration": ms} for ms in (450.0, 999.0))
    assert "2.00x" in table([*rows, slowest, slower]), "of three the one in the middle"


def test_the_figure_has_a_line_for_each_schedule(tmp_path: Path) -> None:
    one = {"ms_per_iteration": 360.0, "predicted_ms": 350.0}
    rows = [{**one, "schedule": name, "delay_ms": delay} for name in ("1f1b", "paci") for delay in (20.0, 0.0)]
    write_figure(rows, tmp_path / "nodes.png")
    assert (tmp_path / "nodes.png").read_bytes().startswith(b"\x89PNG")


def test_torchrun_is_told_the_addresses_of_the_nodes_and_which_one_serves_the_rendezvous() -> None:
    nodes = [Node("one", "10.83.0.1", "paci0"), Node("two", "10.83.0.2", "paci1")]
    for index, is_host in enumerate("10"):
        command = " ".join(torchrun(nodes, index, stages_per_node=3))
        for wanted in (f"--rdzv-conf is_host={is_host}", f"--local-addr 10.83.0.{index + 1}", "--nproc-per-node 3"):
            assert wanted in command
        assert "--rdzv-endpoint 10.83.0.1:29400" in command
    assert nodes[1].command("true") == ["ip", "netns", "exec", "two", "true"]
