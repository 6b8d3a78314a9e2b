"""The profile of the host: whose time is whose."""

from __future__ import annotations

import pytest

from lab.probes.host_profile import PACKAGE, Profile, figures

EXECUTOR = (f"{PACKAGE}/runtime/executor.py", 1, "run_to_update")
UPDATE = (f"{PACKAGE}/runtime/update.py", 1, "apply")
MEGATRON = ("/site-packages/megatron/core/optimizer/optimizer.py", 1, "step")
ISEND = ("/site-packages/torch/distributed/distributed_c10d.py", 1, "isend")
WAIT = (f"{PACKAGE}/runtime/links.py", 1, "receive")
APPEND = ("~", 0, "<method 'append' of 'list' objects>")


def test_time_is_counted_to_who_spends_it() -> None:
    profile: Profile = {
        EXECUTOR: (1, 1, 0.2, 9.0, {}),
        UPDATE: (1, 1, 0.03, 9.0, {EXECUTOR: (1, 1, 0.03, 9.0)}),
        MEGATRON: (1, 1, 4.0, 4.0, {UPDATE: (1, 1, 4.0, 4.0)}),
        ISEND: (1, 1, 0.4, 0.4, {EXECUTOR: (1, 1, 0.4, 0.4)}),
        WAIT: (1, 1, 5.0, 5.0, {EXECUTOR: (1, 1, 5.0, 5.0)}),
        # A function that is not Python's own counts to each caller by its share.
        APPEND: (3, 3, 0.6, 0.6, {EXECUTOR: (1, 1, 0.2, 0.2), UPDATE: (1, 1, 0.03, 0.03), MEGATRON: (1, 1, 0.37, 0.37)}),
    }
    assert figures(profile, actions=100, updates=10) == pytest.approx(
        {
            "actions": 100,
            "updates": 10,
            "own_ms_per_action": 4.0,
            "own_ms_per_update": 6.0,
            "transfer_ms_per_action": 4.0,
            "megatron_ms_per_update": 437.0,
            "waiting_ms_per_update": 500.0,
        }
    )
