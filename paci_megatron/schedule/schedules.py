"""The schedules: a stage's actions as a generator, decided by counting, never by timing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from .actions import Action, Kind, shared_action

IsDrain = Callable[[int], bool]
"""Whether the pipeline runs empty at this update (from 1)."""


def never(update: int) -> bool:
    """No drain, ever."""
    return False


def paci(
    stage_index: int,
    num_stages: int,
    microbatches_per_update: int,
    is_drain: IsDrain = never,
    slack: Sequence[int] = (),
) -> Iterator[Action]:
    """PACI's actions at one stage, without end (paper, section 3).

    The stage forwards while fewer than :func:`max_in_flight` micro-batches are in flight and the next one does not lie
    beyond a drain; otherwise it does a backward, and an update after every
    ``microbatches_per_update`` of them. ``is_drain`` is asked only when the plan reaches the micro-batch in question.
    """
    a = microbatches_per_update
    in_flight_cap = max_in_flight(stage_index, num_stages, slack)
    forwards = backwards = 0
    while True:
        # Only the first micro-batch of a window can lie beyond a drain that those in flight have not passed.
        at_boundary = forwards % a == 0 and forwards > backwards
        if forwards - backwards < in_flight_cap and not (at_boundary and is_drain(forwards // a)):
            yield shared_action(Kind.FORWARD, forwards)
            forwards += 1
        else:
            yield shared_action(Kind.BACKWARD, backwards)
            backwards += 1
            if backwards % a == 0:
                yield shared_action(Kind.UPDATE, backwards // a)


def one_f_one_b_flush(stage_index: int, num_stages: int, microbatches_per_update: int) -> Iterator[Action]:
    """1F1B with a flush before every update, without end: warmup, one forward one backward, cooldown.

    The order of Megatron's ``forward_backward_pipelining_without_interleaving``.
    """
    a = microbatches_per_update
    warmup = min(num_stages - stage_index - 1, a)
    update = 0
    while True:
        first = update * a
        for i in range(warmup):
            yield shared_action(Kind.FORWARD, first + i)
        for i in range(a - warmup):
            yield shared_action(Kind.FORWARD, first + warmup + i)
            yield shared_action(Kind.BACKWARD, first + i)
        for i in range(a - warmup, a):
            yield shared_action(Kind.BACKWARD, first + i)
        update += 1
        yield shared_action(Kind.UPDATE, update)


def with_transfers(
    actions: Iterable[Action],
    stage_index: int,
    num_stages: int,
    microbatches_per_update: int,
    is_drain: IsDrain = never,
    slack: Sequence[int] = (),
    gradients_ahead: bool = False,
) -> Iterator[Action]:
    """``actions`` with the transfers between neighbours.

    A receive action posts the receive; the forward or backward of that micro-batch waits for it. Receives of activations
    stand as many micro-batches ahead as the previous stage may be (:func:`lead_of_previous`), so that none waits for its
    receiver, except across a drain, where nothing may be pending. A gradient's stands right before its backward: on a GPU a
    posted receive is a kernel that stays until its data comes, and what needs the whole device waits for it. Were both
    posted ahead, two neighbours could each wait for what the other sends later (docs/how-it-works.md, Transfers). Where a
    pending receive holds only memory, ``gradients_ahead`` hides the gradients' transfers too.
    """
    a = microbatches_per_update
    first, last = stage_index == 0, stage_index == num_stages - 1
    forward_lead = lead_of_previous(stage_index, slack)
    backward_lead = lead_of_previous(stage_index + 1, slack) if gradients_ahead and not last else 0
    posted = {Kind.RECV_FORWARD: 0, Kind.RECV_BACKWARD: 0}

    def receives(kind: Kind, microbatch: int, lead: int) -> Iterator[Action]:
        while posted[kind] <= microbatch + lead:
            ahead = posted[kind]
            if ahead > microbatch and ahead % a == 0 and is_drain(ahead // a):
                break
            yield Action(kind, ahead)
            posted[kind] += 1

    for action in actions:
        if action.kind is Kind.FORWARD and not first:
            yield from receives(Kind.RECV_FORWARD, action.index, forward_lead)
        elif action.kind is Kind.BACKWARD and not last:
            yield from receives(Kind.RECV_BACKWARD, action.index, backward_lead)
        yield action
        if action.kind is Kind.FORWARD and not last:
            yield Action(Kind.SEND_FORWARD, action.index)
        elif action.kind is Kind.BACKWARD and not first:
            yield Action(Kind.SEND_BACKWARD, action.index)


def even_slack(num_stages: int, extra_in_flight: int) -> tuple[int, ...]:
    """By link, how ``extra_in_flight`` more micro-batches of the first stage fall evenly from stage to stage, to 0 on the
    last.
    """
    links = num_stages - 1

    def share(stage: int) -> int:  # rounded half up
        return (2 * extra_in_flight * (links - stage) + links) // (2 * links)

    return tuple(share(link) - share(link + 1) for link in range(links))


def parse_slack(text: str, num_stages: int) -> tuple[int, ...]:
    """By link, from ``K`` more micro-batches for the first stage (:func:`even_slack`), or from a number for each link, like
    ``0,4,0``; ``ValueError`` if it is neither.
    """
    numbers = text.split(",")
    if not all(number.strip().isdecimal() for number in numbers):
        raise ValueError(f"{text}: must be 0 or a number of micro-batches, or one for each link between stages, like 0,4,0")
    slack = tuple(map(int, numbers))
    if len(slack) == 1:
        return even_slack(num_stages, *slack)
    if len(slack) != num_stages - 1:
        raise ValueError(f"{text}: {num_stages} stages have {num_stages - 1} links; give as many numbers, or one for all")
    return slack


def max_in_flight(stage_index: int, num_stages: int, slack: Sequence[int] = ()) -> int:
    """The most micro-batches forwarded and not yet backwarded at a stage: N-s (paper, section 3), and the slack of the links
    that follow.

    ``slack`` has a number for each link, from the first stage's on: by how much more than 1 what its two stages have in
    flight differs; () is 0 everywhere. In a fixed order a stage waits for its neighbour by that difference: the same
    extra on every stage would change no difference and gain nothing.
    """
    return num_stages - stage_index + sum(slack[stage_index:])


def max_drift(stage_index: int, num_stages: int, microbatches_per_update: int, slack: Sequence[int] = ()) -> int:
    """The bound on backward_version - forward_version at a stage, in updates: ceil((in flight - 1) / a)."""
    return -(-(max_in_flight(stage_index, num_stages, slack) - 1) // microbatches_per_update)


def lead_of_previous(stage_index: int, slack: Sequence[int] = ()) -> int:
    """How many micro-batches the previous stage may be ahead of this one's receive: the difference of what the two have in
    flight, 1 without slack; 0 on the first stage, which has none before it.

    One more than that would be posted before the previous stage can send it.
    """
    if stage_index == 0:
        return 0
    return 1 + (slack[stage_index - 1] if slack else 0)


def sends_in_flight(link: int, slack: Sequence[int] = ()) -> int:
    """How many sends stages ``link`` and ``link + 1`` each keep to the other before they wait for the oldest, which has then
    been delivered.

    Before stage s sends activation m it has finished the backward of m-c, where c is what it may have in flight. That
    gradient left stage s+1 after the forward of m-c+c'-1, where c' is what s+1 may: so m-1-(c-c') has been received.
    Likewise for gradients: when stage s sends gradient m, s-1 has done the backward of m-1-(c'-c), where c' is now what s-1
    may. So the wait is there to free memory and never stops a stage.
    """
    return 1 + lead_of_previous(link + 1, slack)


def speedup_limit(num_stages: int, microbatches_per_update: int) -> float:
    """The most PACI can gain over 1F1B-flush with the same micro-batch count: (a+N-1)/a."""
    return (microbatches_per_update + num_stages - 1) / microbatches_per_update


def flush_bubble_fraction(num_stages: int, microbatches_per_update: int) -> float:
    """The share of the time a stage idles under 1F1B-flush, in [0, 1]: (N-1)/(a+N-1)."""
    return (num_stages - 1) / (microbatches_per_update + num_stages - 1)
