"""``paci-megatron plan`` in a checkout that is not installed; with --study the laboratory's study of many stages."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    if "--study" in sys.argv:
        from lab.study.many_stages import main

        sys.exit(main())
    from paci_megatron.cli.main import run

    sys.exit(run("plan", prog="plan_schedule.py"))
