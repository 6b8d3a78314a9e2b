"""Fixtures shared by all tests."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.support.pool import Pool

MAX_WORKERS = 7  # a pool each of 1, 2 and 4


@pytest.fixture(scope="session")
def _pools() -> Iterator[dict[int, Pool]]:
    pools: dict[int, Pool] = {}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def pool(_pools: dict[int, Pool]) -> Callable[[int], Pool]:
    """``pool(world_size)``: the session's worker processes for that many ranks, started on first use."""

    def get(world_size: int) -> Pool:
        for size, other in list(_pools.items()):
            # Idle workers hold some memory each.
            if other.is_closed or (size != world_size and sum({*_pools, world_size}) > MAX_WORKERS):
                other.close()
                del _pools[size]
        if world_size not in _pools:
            _pools[world_size] = Pool(world_size)
        return _pools[world_size]

    return get


@pytest.fixture(scope="session")
def one_process() -> Iterator[Callable[..., Any]]:
    """``one_process(argv, job="train")``: the result of a worker beside the pool. Each run is made once."""
    worker: Pool | None = None
    done: dict[str, Any] = {}

    def run(argv: list[str], job: str = "train", **named: Any) -> Any:
        nonlocal worker
        key = " ".join([job, *argv, repr(named)])
        if key not in done:
            if worker is None or worker.is_closed:
                worker = Pool(1)
            (done[key],) = worker.run(job, argv=argv, **named)
        return done[key]

    yield run
    if worker is not None:
        worker.close()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a small indexed dataset of random tokens below 64."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = str(tmp_path_factory.mktemp("corpus") / "random")
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    generator = np.random.default_rng(1)
    for _ in range(400):
        builder.add_document(torch.from_numpy(generator.integers(0, 63, size=100, dtype=np.int32)), [100])
    builder.finalize(f"{prefix}.idx")
    return prefix


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run tests on processes last and by world size, so that each pool is started once."""

    def world_size(item: pytest.Item) -> int:
        if "pool" not in getattr(item, "fixturenames", ()):
            return 0
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return math.prod(int(parameters.get(name, default)) for name, default in (("num_stages", 2), ("tp", 1), ("dp", 1)))

    items.sort(key=world_size)


@dataclass
class MegatronDefaults:
    """The installed Megatron's command line: every flag there is, and the values when none is given."""

    flags: set[str]
    values: argparse.Namespace


@pytest.fixture(scope="session")
def megatron_defaults() -> MegatronDefaults:
    """Megatron's options and their defaults."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    return MegatronDefaults({flag for action in parser._actions for flag in action.option_strings}, parser.parse_args([]))
