"""``paci-megatron report`` in a checkout that is not installed."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from paci_megatron.cli.main import run

    sys.exit(run("report", prog="run_report.py"))
