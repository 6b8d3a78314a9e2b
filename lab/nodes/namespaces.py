"""Nodes as network namespaces of this machine, joined by the link of ``link.py``."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .link import ADDRESS, READY

MTU = 9000
DEVICE = "paci{}"


@dataclass(frozen=True)
class Node:
    """A network namespace, its address and its network device."""

    name: str
    address: str
    device: str

    def command(self, *words: str) -> list[str]:
        """``words`` as a command that runs on this node."""
        return ["ip", "netns", "exec", self.name, *words]


def unavailable() -> str | None:
    """Why this machine and user can have no nodes; None if they can."""
    if shutil.which("ip") is None:
        return "there is no command ip (Debian: iproute2)"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun cannot be opened; it takes root, and a kernel with TUN"
    name = f"paci-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextlib.contextmanager
def nodes(delays_s: Sequence[float], bits_per_s: float) -> Iterator[list[Node]]:
    """Nodes in a row, one more than links, each of which takes ``delays_s`` each way and carries ``bits_per_s``.

    They share this machine's files and clock. ``RuntimeError`` if they cannot be made.
    """
    made = [
        Node(f"paci-{os.getpid()}-{index}", ADDRESS.format(index + 1), DEVICE.format(index))
        for index in range(len(delays_s) + 1)
    ]
    with contextlib.ExitStack() as stack:
        for node in made:
            stack.callback(_remove, node)
            _run("ip", "netns", "add", node.name)
            # ip puts these files in the place of those in /etc. A rank finds its own machine by its name.
            files = Path("/etc/netns") / node.name
            files.mkdir(parents=True)
            (files / "hosts").write_text(f"127.0.0.1 localhost\n{node.address} {socket.gethostname()}\n")
        delays = ",".join(f"{delay:g}" for delay in delays_s)
        command = [sys.executable, str(Path(__file__).with_name("link.py")), f"{bits_per_s / 8:g}", delays]
        link = subprocess.Popen(
            [*command, *(node.device for node in made)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(_end, link)
        assert link.stdout is not None
        if link.stdout.readline().strip() != READY:
            raise RuntimeError("the link between the nodes could not be made")
        for node in made:
            _run("ip", "link", "set", node.device, "netns", node.name)
            _run(*node.command("ip", "link", "set", "lo", "up"))
            _run(*node.command("ip", "link", "set", node.device, "up", "mtu", str(MTU), "txqueuelen", "10000"))
            _run(*node.command("ip", "address", "add", f"{node.address}/24", "dev", node.device))
        yield made


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr.strip()}")


def _end(link: subprocess.Popen[str]) -> None:
    assert link.stdin is not None
    link.stdin.close()
    link.wait()


def _remove(node: Node) -> None:
    subprocess.run(["ip", "netns", "delete", node.name], capture_output=True)
    shutil.rmtree(Path("/etc/netns") / node.name, ignore_errors=True)
