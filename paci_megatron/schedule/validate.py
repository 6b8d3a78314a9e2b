"""Checks of a plan before it runs: in-flight cap, drift bound, matched transfers, no deadlock."""

from __future__ import annotations

from collections.abc import Sequence

from .actions import Action, Kind, format_actions, shared_action
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

    Where actions have chunks, a plan is that of a process of a V, which holds two stages: chunk 1 of process r of N is stage
    2N-1-r.

    Checked at every stage: micro-batches in order and each backward after its forward, in flight at most
    ``max_in_flight``, drift at most ``max_drift``, an update after every a-th backward, with the totals known that it may
    use, nothing in flight and nothing posted at the updates in ``drains``; and over all stages, that they run to their ends
    even if everything that is computed needs the whole device. Transfers are rendezvous: each stays on both devices until
    its send and its receive are posted. A forward, backward, report or update waits until all that its stage has posted is
    complete, and a stage waits for its oldest send once ``sends_in_flight`` are not complete. Fewer waits never stop a stage
    sooner, so a plan that runs under these runs whichever of its actions need the whole device. Without
    ``resident_transfers`` a forward or backward waits for its own transfer only.
    """
    places = [(process, 0) for process in range(len(plans))]  # of each stage: process and chunk
    if any(action.chunk for plan in plans for action in plan):
        places += [(process, 1) for process in reversed(range(len(plans)))]
    for stage_index, (process, chunk) in enumerate(places):
        own = [shared_action(action.kind, action.index) for action in plans[process] if action.chunk == chunk]
        _check_stage(plans, len(places), stage_index, own, microbatches_per_update, slack, frozenset(drains))
    _check_transfers(plans, places, slack, resident_transfers)


def _fail(plans: Sequence[Sequence[Action]], message: str) -> PlanError:
    rows = (f"stage {stage}: {format_actions(plan)}" for stage, plan in enumerate(plans))
    return PlanError("\n".join([message, *rows]))


def _check_stage(
    plans: Sequence[Sequence[Action]],
    num_stages: int,
    stage: int,
    plan: Sequence[Action],
    a: int,
    slack: Sequence[int],
    drains: frozenset[int],
) -> None:
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


def _is_free(posted: Sequence[dict[Kind, int]], places: Sequence[tuple[int, int]], stage: int) -> bool:
    """Whether every transfer that the stage has posted, to or from another process, is complete."""
    own, free = posted[stage], True
    if stage > 0 and places[stage - 1][0] != places[stage][0]:
        before = posted[stage - 1]
        free = own[Kind.RECV_FORWARD] <= before[Kind.SEND_FORWARD] and own[Kind.SEND_BACKWARD] <= before[Kind.RECV_BACKWARD]
    if stage < len(places) - 1 and places[stage + 1][0] != places[stage][0]:
        after = posted[stage + 1]
        free &= own[Kind.SEND_FORWARD] <= after[Kind.RECV_FORWARD] and own[Kind.RECV_BACKWARD] <= after[Kind.SEND_BACKWARD]
    return free


def _check_transfers(
    plans: Sequence[Sequence[Action]], places: Sequence[tuple[int, int]], slack: Sequence[int], resident: bool
) -> None:
    """Run all plans together, each action waiting for all that it might have to, and see that everyone reaches the end.

    ``places`` has each stage's process and chunk.
    """
    num_stages = len(places)
    stage_at = {place: stage for stage, place in enumerate(places)}
    stages_of = [[stage for stage, (its, _) in enumerate(places) if its == process] for process in range(len(plans))]
    held_sends = [sends_in_flight(link, slack) for link in range(num_stages - 1)]
    position = [0] * len(plans)
    posted: list[dict[Kind, int]] = [dict.fromkeys(Kind, 0) for _ in places]

    def device_is_free(process: int) -> bool:
        """Whether no transfer that was posted so far holds the process's device."""
        return not resident or all(_is_free(posted, places, stage) for stage in stages_of[process])

    def may_run(process: int, action: Action) -> bool:
        m, stage = action.index, stage_at[process, action.chunk]
        match action.kind:
            case Kind.FORWARD:
                return device_is_free(process) and (stage == 0 or posted[stage - 1][Kind.SEND_FORWARD] > m)
            case Kind.BACKWARD:
                return device_is_free(process) and (stage == num_stages - 1 or posted[stage + 1][Kind.SEND_BACKWARD] > m)
            case Kind.UPDATE:
                return device_is_free(process)
            case Kind.REPORT:
                return device_is_free(process) and (stage == num_stages - 1 or posted[stage + 1][Kind.REPORT] >= m)
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
        for process, plan in enumerate(plans):
            while position[process] < len(plan) and may_run(process, action := plan[position[process]]):
                posted[stage_at[process, action.chunk]][action.kind] += 1
                position[process] += 1
                progress = True
    stuck = [f"stage {p} at {plans[p][at]}" for p, at in enumerate(position) if at < len(plans[p])]
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
