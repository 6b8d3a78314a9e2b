"""Checks of a plan before it runs: in-flight cap, drift bound, matched transfers, no deadlock."""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Action, Kind, format_actions
from .records import record_lag
from .schedules import max_drift, max_in_flight, sends_in_flight


class PlanError(ValueError):
    """A plan breaks a rule; the message names stage, action and rule and shows the plans."""


def validate(
    plans: Sequence[Sequence[Action]],
    microbatches_per_update: int,
    slack: Sequence[int] = (),
    drains: Sequence[int] = (),
    resident_transfers: bool = True,
) -> None:
    """Check ``plans`` (one finite list of actions per stage, with transfers); ``PlanError`` says what is wrong.

    Checked at every stage: micro-batches in order and each backward after its forward, in flight at most
    ``max_in_flight``, drift at most ``max_drift``, an update after every a-th backward, with the totals known that it may
    use, nothing in flight and nothing posted at the updates in ``drains``; and over all stages, that they run to their ends
    even if everything that is computed needs the whole device. Transfers are rendezvous: each stays on both devices until
    its send and its receive are posted. A forward, backward, report or update waits until all that its stage has posted is
    complete, and a stage waits for its oldest send once ``sends_in_flight`` are not complete. Fewer waits never stop a stage
    sooner, so a plan that runs under these runs whichever of its actions need the whole device. Without
    ``resident_transfers`` a forward or backward waits for its own transfer only.
    """
    for stage_index, plan in enumerate(plans):
        _check_stage(plans, stage_index, plan, microbatches_per_update, slack, frozenset(drains))
    _check_transfers(plans, slack, resident_transfers)


def _fail(plans: Sequence[Sequence[Action]], message: str) -> PlanError:
    rows = (f"stage {stage}: {format_actions(plan)}" for stage, plan in enumerate(plans))
    return PlanError("\n".join([message, *rows]))


def _check_stage(
    plans: Sequence[Sequence[Action]],
    stage: int,
    plan: Sequence[Action],
    a: int,
    slack: Sequence[int],
    drains: frozenset[int],
) -> None:
    num_stages = len(plans)
    cap, bound = max_in_flight(stage, num_stages, slack), max_drift(stage, num_stages, a, slack)
    done = dict.fromkeys(Kind, 0)
    forward_version: dict[int, int] = {}
    has_records = any(action.kind is Kind.REPORT for action in plan)
    lag = record_lag(num_stages, a, slack)

    def check(condition: bool, action: Action, rule: str) -> None:
        if not condition:
            raise _fail(plans, f"stage {stage}, action {action}: {rule}")

    for action in plan:
        kind, updates = action.kind, done[Kind.UPDATE]
        expected = done[kind] + (1 if kind in (Kind.UPDATE, Kind.REPORT, Kind.TOTAL) else 0)
        check(action.index == expected, action, f"out of order, {kind}{expected} is next")
        if kind is Kind.FORWARD:
            forward_version[action.index] = updates
            in_flight = done[Kind.FORWARD] + 1 - done[Kind.BACKWARD]
            check(in_flight <= cap, action, f"{in_flight} micro-batches in flight, at most {cap}")
            check(stage == 0 or done[Kind.RECV_FORWARD] > action.index, action, "its activation was never received")
        elif kind is Kind.BACKWARD:
            check(action.index in forward_version, action, "backward before its forward")
            drift = updates - forward_version.pop(action.index)
            check(drift <= bound, action, f"drift {drift}, at most {bound}")
            last = stage == num_stages - 1
            check(last or done[Kind.RECV_BACKWARD] > action.index, action, "its gradient was never received")
        elif kind is Kind.UPDATE:
            check(done[Kind.BACKWARD] == action.index * a, action, f"after {done[Kind.BACKWARD]} backwards")
            if has_records:
                known = action.index - (0 if action.index in drains else lag)
                check(done[Kind.REPORT] == action.index, action, "not reported")
                check(done[Kind.TOTAL] >= known, action, f"total {known} is not known")
            if action.index in drains:
                reached = {done[k] for k in (Kind.FORWARD, Kind.BACKWARD)}
                if stage > 0:
                    reached |= {done[Kind.RECV_FORWARD], done[Kind.SEND_BACKWARD]}
                if stage < num_stages - 1:
                    reached |= {done[Kind.RECV_BACKWARD], done[Kind.SEND_FORWARD]}
                check(reached == {action.index * a}, action, f"not drained, micro-batches reached: {sorted(reached)}")
        elif kind in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD):
            made = Kind.FORWARD if kind is Kind.SEND_FORWARD else Kind.BACKWARD
            check(done[made] > action.index, action, "sent before it was computed")
        done[kind] += 1


def _check_transfers(plans: Sequence[Sequence[Action]], slack: Sequence[int], resident: bool) -> None:
    """Run all plans together, each action waiting for all that it might have to, and see that everyone reaches the end."""
    num_stages = len(plans)
    held_sends = [sends_in_flight(link, slack) for link in range(num_stages - 1)]
    position = [0] * num_stages
    posted: list[dict[Kind, int]] = [dict.fromkeys(Kind, 0) for _ in plans]

    def device_is_free(stage: int) -> bool:
        """Whether every transfer posted so far is complete on this stage's device, or none holds it."""
        if not resident:
            return True
        own = posted[stage]
        before = posted[stage - 1] if stage > 0 else own
        after = posted[stage + 1] if stage < num_stages - 1 else own
        return (
            own[Kind.RECV_FORWARD] <= before[Kind.SEND_FORWARD]
            and own[Kind.SEND_FORWARD] <= after[Kind.RECV_FORWARD]
            and own[Kind.RECV_BACKWARD] <= after[Kind.SEND_BACKWARD]
            and own[Kind.SEND_BACKWARD] <= before[Kind.RECV_BACKWARD]
        )

    def may_run(stage: int, action: Action) -> bool:
        m = action.index
        match action.kind:
            case Kind.FORWARD:
                return device_is_free(stage) and (stage == 0 or posted[stage - 1][Kind.SEND_FORWARD] > m)
            case Kind.BACKWARD:
                return device_is_free(stage) and (stage == num_stages - 1 or posted[stage + 1][Kind.SEND_BACKWARD] > m)
            case Kind.UPDATE:
                return device_is_free(stage)
            case Kind.REPORT:
                return device_is_free(stage) and (stage == num_stages - 1 or posted[stage + 1][Kind.REPORT] >= m)
            case Kind.TOTAL:
                return posted[stage - 1][Kind.TOTAL] >= m if stage > 0 else posted[0][Kind.REPORT] >= m
            case Kind.SEND_FORWARD:
                return posted[stage + 1][Kind.RECV_FORWARD] > m - held_sends[stage]
            case Kind.SEND_BACKWARD:
                return posted[stage - 1][Kind.RECV_BACKWARD] > m - held_sends[stage - 1]
            case _:
                return True

    progress = True
    while progress:
        progress = False
        for stage, plan in enumerate(plans):
            while position[stage] < len(plan) and may_run(stage, plan[position[stage]]):
                posted[stage][plan[position[stage]].kind] += 1
                position[stage] += 1
                progress = True
    stuck = [f"stage {s} at {plans[s][p]}" for s, p in enumerate(position) if p < len(plans[s])]
    if stuck:
        raise _fail(plans, f"deadlock: {', '.join(stuck)} wait for ever")
    for stage in range(num_stages - 1):
        for send, receive, sender, receiver in (
            (Kind.SEND_FORWARD, Kind.RECV_FORWARD, stage, stage + 1),
            (Kind.SEND_BACKWARD, Kind.RECV_BACKWARD, stage + 1, stage),
        ):
            sent, received = posted[sender][send], posted[receiver][receive]
            if sent < received:
                raise _fail(plans, f"stage {receiver} posts {received} x {receive}, stage {sender} sends {sent}")
