"""The argument parser of every command."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn


class CommandParser(argparse.ArgumentParser):
    """Keeps the help's line breaks, takes no abbreviations, and refuses a command line in one line on standard error."""

    def __init__(self, prog: str, description: str, epilog: str = "", usage: str | None = None) -> None:
        """In ``epilog``, ``%(prog)s`` is the name of the command."""
        super().__init__(
            prog=prog,
            description=description,
            epilog=re.sub(r"%(?!\(prog\)s)", "%%", epilog),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            usage=usage,
        )

    def error(self, message: str) -> NoReturn:
        """Print ``message`` as one line and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")
