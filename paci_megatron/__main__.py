"""``torchrun ... -m paci_megatron SCRIPT ARGS``: a Megatron training script, unmodified, with the plugin installed."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import paci_megatron
from paci_megatron.plugin.early import check_early, world_size_of_environment
from paci_megatron.plugin.inputs import exit_on_config_error, refuse

_USAGE = """\
usage: torchrun <launcher options> -m paci_megatron SCRIPT [ARGS ...]

Runs SCRIPT, any training script built on megatron.training.pretrain, with --pipeline-schedule paci among its options.
"""


def main(argv: list[str]) -> int:
    """Run the script in ``argv``; returns the exit status when there is none to run."""
    if not argv or argv[0] in ("-h", "--help"):
        print(_USAGE, end="", file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    script = Path(argv[0])
    if not script.is_file():
        refuse(f"{script}: no such file. The first argument is the training script")
    with exit_on_config_error():
        check_early(argv[1:], world_size_of_environment())  # before Megatron is imported, which takes seconds
        paci_megatron.install()
    # As if the script had been started directly: its arguments, and its folder first among the places of imports.
    sys.argv = [str(script), *argv[1:]]
    sys.path.insert(0, str(script.resolve().parent))
    runpy.run_path(str(script), run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
