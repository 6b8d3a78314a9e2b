"""What a stage's action loop costs, against Megatron's own functions in a bare loop: see --help."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.probes.action_loop import main

if __name__ == "__main__":
    main()
