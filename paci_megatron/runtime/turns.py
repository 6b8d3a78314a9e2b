"""Several stages in one process take turns, until each has done its next update."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from paci_megatron.schedule import Action
from paci_megatron.schedule.actions import shared_action

from .executor import Executor
from .state import UpdateResult


class RunningStage(Protocol):
    """What :func:`run_to_update` needs of a stage."""

    executor: Executor

    def at_work(self) -> AbstractContextManager[None]:
        """Everything the stage does happens inside: its random numbers, its place in the pipeline."""


def run_to_update(stages: Sequence[RunningStage]) -> list[UpdateResult]:
    """Give each stage turns, in order, until every one has done its next update; the results by stage.

    The plan fixes what each stage does in which order, so the order of turns changes no result. With one stage, whose link
    waits by itself, this is one call.
    """
    results: list[UpdateResult | None] = [None] * len(stages)
    while None in results:
        for index, stage in enumerate(stages):
            if results[index] is None and stage.executor.has_input():
                with stage.at_work():
                    results[index] = stage.executor.run_to_update()
    return [result for result in results if result is not None]


class Turns:
    """The two stages of a process of a V, in the order of its plan, by which no process waits longer than it must.

    An iteration ends with chunk 0's update. Chunk 1 may by then have done later ones: their results wait.
    """

    def __init__(self, order: Iterator[Action], stages: Sequence[RunningStage]) -> None:
        """``order`` is the process's plan, ``stages`` those of its two chunks."""
        self._order = order
        self._stages = stages
        self._results: tuple[deque[UpdateResult], deque[UpdateResult]] = (deque(), deque())

    def run_to_update(self) -> list[UpdateResult]:
        """Perform the plan up to and including the next update of chunk 0; the results of that update by chunk."""
        action = next(self._order)
        while True:
            chunk, stage = action.chunk, self._stages[action.chunk]
            with stage.at_work():
                while action.chunk == chunk:
                    result = stage.executor.perform(shared_action(action.kind, action.index))
                    if result is not None:
                        self._results[chunk].append(result)
                        if chunk == 0:
                            return [results.popleft() for results in self._results]
                    action = next(self._order)
