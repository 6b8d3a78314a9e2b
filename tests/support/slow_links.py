"""Links that seem slow to what measures them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

from paci_megatron.runtime.groups import ProcessTransport
from paci_megatron.runtime.link_times import LinkTimes


@contextlib.contextmanager
def slow_links() -> Iterator[None]:
    """Each link is measured, and then taken for one of a second each way."""
    measured = ProcessTransport.link_times

    def link_times(self: ProcessTransport) -> dict[int, LinkTimes]:
        found = measured(self)
        assert all(times.latency_s > 0 and times.message_s >= 0 for times in found.values())
        return dict.fromkeys(found, LinkTimes(1.0, 0.0))

    with mock.patch.object(ProcessTransport, "link_times", link_times):
        yield
