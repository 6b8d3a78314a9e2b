"""Measure schedules side by side on real processes: see --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.benchmark.main import main

if __name__ == "__main__":
    sys.exit(main())
