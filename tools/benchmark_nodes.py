"""Measure schedules on nodes with slow links between them: see --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.nodes.main import main

if __name__ == "__main__":
    sys.exit(main())
