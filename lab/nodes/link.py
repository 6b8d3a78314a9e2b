"""A network between nodes on one machine, in user space: every packet arrives as late as the link is told to make it.

A program of its own: a TUN device for each node, and a loop that reads packets from one and writes them to another after the
time on the wire and the delay. It needs no kernel module such as sch_netem.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import select
import struct
import sys
import time
from collections.abc import Sequence

TUNSETIFF = 0x400454CA
IFF_TUN_NO_PI = 0x0001 | 0x1000
ADDRESS = "10.83.0.{}"
READY = "ready"


def open_device(name: str) -> int:
    """A new TUN device of that name, in this process's network namespace; its packets by a file descriptor."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN_NO_PI))
    return device


class Network:
    """Nodes in a row. ``delays_s`` has the delay each way of the link after each node but the last; between others they add
    up. Each direction between two nodes carries ``bytes_per_s``, one packet after the other.
    """

    def __init__(self, devices: Sequence[int], delays_s: Sequence[float], bytes_per_s: float) -> None:
        self._devices = list(devices)
        self._delays_s = delays_s
        self._bytes_per_s = bytes_per_s
        self._free_s: dict[tuple[int, int], float] = {}  # when the wire is free again
        self._due: list[tuple[float, int, int, bytes]] = []  # when, in which order, to which node
        self._count = 0

    def run(self, until_closed: int) -> None:
        """Carry packets until the file ``until_closed`` ends."""
        while True:
            wait_s = max(self._due[0][0] - time.monotonic(), 0) if self._due else None
            ready, _, _ = select.select([until_closed, *self._devices], [], [], wait_s)
            if until_closed in ready and not os.read(until_closed, 1):
                return
            for node, device in enumerate(self._devices):
                if device in ready:
                    self._take_all(node, device)
            self._deliver()

    def _take_all(self, node: int, device: int) -> None:
        while True:
            try:
                packet = os.read(device, 1 << 16)
            except BlockingIOError:
                return
            if packet[0] >> 4 != 4:  # the kernel's own chatter of IPv6
                continue
            to = packet[19] - 1
            if not 0 <= to < len(self._devices):
                continue
            now = time.monotonic()
            sent_s = max(now, self._free_s.get((node, to), now)) + len(packet) / self._bytes_per_s
            self._free_s[node, to] = sent_s
            delay_s = sum(self._delays_s[min(node, to) : max(node, to)])
            self._count += 1
            heapq.heappush(self._due, (sent_s + delay_s, self._count, to, packet))

    def _deliver(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, _, to, packet = heapq.heappop(self._due)
            os.write(self._devices[to], packet)


def main(argv: Sequence[str]) -> None:
    """``BYTES_PER_S DELAY_S,... DEVICE...``: make the devices, say so, and carry packets until standard input ends."""
    bytes_per_s, delays_s, *names = argv
    devices = [open_device(name) for name in names]
    print(READY, flush=True)
    Network(devices, [float(delay) for delay in delays_s.split(",")], float(bytes_per_s)).run(sys.stdin.fileno())


if __name__ == "__main__":
    main(sys.argv[1:])
