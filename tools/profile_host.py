"""Where the host's time goes in a run, by a profile: see lab/probes/host_profile.py."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab.probes.host_profile import main

if __name__ == "__main__":
    main()
