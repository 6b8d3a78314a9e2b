"""One rank of a measured training on nodes, started by torchrun: the job from a file, the result into another."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import lab.preload  # noqa: F401 - first, since it must import Megatron
from lab.benchmark.worker import run_rank


def main(folder: Path) -> None:
    """Do what ``job.pickle`` in ``folder`` says, and write what was measured beside it."""
    rank = int(os.environ["RANK"])
    result = run_rank(rank, pickle.loads((folder / "job.pickle").read_bytes()))
    (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
