"""WikiText's conventions: undoing its tokenisation, counting its words, joining its rows."""

from __future__ import annotations

import re
from collections.abc import Callable

DETOKENIZERS = ("none", "wikitext")
WORD_RULES = ("whitespace", "spaces")
ROW_RULES = ("as-is", "blank-line")


def _inside(left: str, right: str) -> tuple[re.Pattern[str], str]:
    """Removes the spaces just inside a pair of brackets or quotation marks that holds no ``right`` in between."""
    inner = re.compile(rf"{re.escape(left)}\s*([^{re.escape(right)}]*?)\s*{re.escape(right)}")
    return inner, rf"{left}\g<1>{right}"


# In this order. The same text as with Megatron's and other harnesses' detokenizers, or perplexities would not compare; that
# is why the single letter N, a number in another corpus, becomes 1.
_WIKITEXT_RULES: tuple[tuple[str | re.Pattern[str], str], ...] = (
    ("s '", "s'"),
    *((f" @{mark}@ ", mark) for mark in "-,."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
    *(_inside(left, right) for left, right in ("()", "[]", "{}", '""', "''")),
    *((" ".join("=" * level), "=" * level) for level in (4, 3, 2)),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def detokenize_wikitext(text: str) -> str:
    """WikiText as it was written: ``a guest @-@ starring role , in 2000`` becomes ``a guest-starring role, in 2000``."""
    for pattern, replacement in _WIKITEXT_RULES:
        text = text.replace(pattern, replacement) if isinstance(pattern, str) else pattern.sub(replacement, text)
    return text


def detokenizer(name: str) -> Callable[[str], str]:
    """The function that one of DETOKENIZERS stands for."""
    return detokenize_wikitext if name == "wikitext" else str


def count_words(text: str, rule: str) -> int:
    """Words by one of WORD_RULES: runs of anything but whitespace, or what single spaces separate.

    The latter is Megatron's count of WikiText, which takes each line end as a word: 245,566 in the test set.
    """
    return len(text.split()) if rule == "whitespace" else len(text.strip().split(" "))


def arrange_rows(text: str, rule: str) -> str:
    """A text by one of ROW_RULES: as it is, or its lines as rows of a data set, joined with a blank line.

    The latter is the usual protocol with Hugging Face's copy of WikiText: a row keeps its line end, a blank row has none.
    """
    if rule == "as-is":
        return text
    rows = re.findall(r"[^\n]*\n|[^\n]+", text)
    return "\n\n".join(row if row.strip() else "" for row in rows)
