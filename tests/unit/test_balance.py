"""The partition is the best there is, and Megatron reads the layout as it was meant."""

from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from paci_megatron.simulate.balance import Model, Part, layout, partition


def brute_force(times: list[int], besides: list[int]) -> tuple[int, int]:
    """The least possible slowest stage, and the least sum of squares with it, over all partitions."""
    stages = range(len(besides))
    found = []
    for cuts in combinations(range(1, len(times)), len(besides) - 1):
        ends = [0, *cuts, len(times)]
        sums = [sum(times[ends[s] : ends[s + 1]]) + besides[s] for s in stages]
        found.append((max(sums), sum(x * x for x in sums)))
    return min(found)


@pytest.mark.parametrize("seed", range(60))
def test_partition_is_the_best_of_all(seed: int) -> None:
    generator = random.Random(seed)
    num_parts = generator.randint(1, 11)
    num_stages = generator.randint(1, num_parts)
    times = [generator.choice([0, 1, 2, 3, 10, 40]) for _ in range(num_parts)]
    besides = [generator.choice([0, 0, 1, 5]) for _ in range(num_stages)]
    counts = partition(times, besides)
    assert min(counts) >= 1 and sum(counts) == num_parts and len(counts) == num_stages
    ends = [sum(counts[:s]) for s in range(num_stages + 1)]
    sums = [sum(times[begin:end]) + extra for (begin, end), extra in zip(pairwise(ends), besides, strict=True)]
    assert (max(sums), sum(x * x for x in sums)) == brute_force(times, besides)


def test_more_stages_than_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 parts for 4 stages: each needs one; use at most 3 stages"):
        partition([1, 1, 1], [0] * 4)


def test_embedding_and_loss_count() -> None:
    layer, slow = Part(1, 2), Part(4, 8)
    model = Model(embedding=Part(0.5, 0.5), layers=(layer,) * 12, loss=slow)
    counts = model.balance(4)
    assert layout(counts) == "Et*4|t*4|t*4|L"
    costs = model.stage_costs(counts, update_s=7)
    assert [(stage.forward_s, stage.backward_s, stage.update_s) for stage in costs] == [
        (4.5, 8.5, 7),
        (4, 8, 7),
        (4, 8, 7),
        (4, 8, 7),
    ]


def test_what_a_stage_does_besides_counts() -> None:
    model = Model(Part(1, 1), (Part(1, 1),) * 4, Part(1, 1), after_receiving=Part(1, 2), before_sending=Part(2, 4))
    assert [(stage.forward_s, stage.backward_s) for stage in model.stage_costs([2, 2, 2])] == [(4, 6), (5, 8), (3, 4)]
    assert model.balance(3) == [2, 1, 3], "the last stage sends nothing on"


@pytest.mark.parametrize("counts", [[2, 1, 3], [1, 5, 1], [13, 12], [9], [2, 2, 2, 2, 1]])
def test_megatron_reads_the_layout(counts: list[int]) -> None:
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    read = PipelineParallelLayerLayout(layout(counts), len(counts))
    read.validate_layer_layout(num_layers=sum(counts) - 2, mtp_num_layers=0)
    assert [len(stage) for (stage,) in read.layout] == counts
    kinds = [kind for (stage,) in read.layout for kind in stage]
    assert kinds == [LayerType.embedding, *[LayerType.decoder] * (sum(counts) - 2), LayerType.loss]
