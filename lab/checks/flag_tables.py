"""Writes the tables of Megatron's flags in docs/flags.md, from paci_megatron/flags.py:

python -m lab.checks.flag_tables
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from paci_megatron.flags import REFUSED, SWITCHED_OFF

GUIDE = Path(__file__).parents[2] / "docs/flags.md"
BEGIN, END = "<!-- {}: from paci_megatron/flags.py by python -m lab.checks.flag_tables -->\n", "<!-- end of {} -->\n"


def tables() -> dict[str, str]:
    """Each table in Markdown, by the name it has in the guide."""
    return {
        "switched off": _table(
            ("flag", "why", "what that costs"), ((rule.flag, rule.reason, rule.cost) for rule in SWITCHED_OFF)
        ),
        "refused": _table(("flag", "why", "instead"), ((rule.flag, rule.reason, rule.remedy) for rule in REFUSED)),
    }


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Neighbouring rows that say the same become one."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for said, same in groupby(rows, key=lambda row: row[1:]):
        flags = ", ".join(f"`{row[0]}`" for row in same)
        lines.append(f"| {' | '.join((flags, *said))} |")
    return "\n".join(lines) + "\n"


def with_tables(text: str) -> str:
    """The guide's text with its tables as they should be; ``ValueError`` where the comments around one are missing."""
    for name, table in tables().items():
        before, begin, rest = text.partition(BEGIN.format(name))
        _, end, after = rest.partition(END.format(name))
        if not (begin and end):
            raise ValueError(f"{GUIDE}: no comments around the table {name!r}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    GUIDE.write_text(with_tables(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")
