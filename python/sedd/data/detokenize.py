"""Detokenisers, by name: they restore plain text from corpora that have spaces around punctuation.

Models trained on ordinary text need them for WikiText, the Penn Treebank and One Billion Words. A perplexity on these
corpora depends on the rules; they are listed below in the order in which they are applied.
"""

from __future__ import annotations

import re
from typing import Literal

__all__ = ["DETOKENIZERS", "Detokenizer", "detokenize"]

Detokenizer = Literal["none", "wikitext", "ptb", "lm1b", "lambada"]

_PUNCTUATION = [
    (r" ([,.;:!?])(?=\s|$)", r"\1"),  # a word , another
    (r"([(\[{]) ", r"\1"),
    (r" ([)\]}])", r"\1"),
    (r'" ([^"\n]*?) "', r'"\1"'),  # quotes in pairs, within a line
]
_RULES: dict[str, list[tuple[str, str]]] = {
    "none": [],
    "wikitext": [
        (r" @([-,.])@ ", r"\1"),  # 1 @,@ 000 and part @-@ time
        *_PUNCTUATION,
        (r" '(s|re|ve|ll|d|m|t)\b", r"'\1"),
        (r" '(?=\s)", "'"),  # the boys ' school
        (r"(?<==) (?==)", ""),  # = = Heading = =
        (r" ([°%])", r"\1"),
        (r"([$£€]) (?=\d)", r"\1"),
        (r"[ ]*\n[ ]*", "\n"),
    ],
    "ptb": [
        (r" n't\b", "n't"),
        (r" '(s|re|ve|ll|d|m)\b", r"'\1"),
        *_PUNCTUATION,
        (r" '(?=\s)", "'"),
        (r"([$#]) (?=[\dN])", r"\1"),
        (r" %", "%"),
    ],
    "lm1b": [
        *_PUNCTUATION,
        (r"(\w) '(s|re|ve|ll|d|m|t)\b", r"\1'\2"),
        (r"(\w) '(?=\s|$)", r"\1'"),
        (r"([$£€]) (?=\d)", r"\1"),
        (r" %", "%"),
    ],
    "lambada": [("[“”]", '"'), ("[‘’]", "'")],
}
_COMPILED = {name: [(re.compile(pattern), by) for pattern, by in rules] for name, rules in _RULES.items()}
DETOKENIZERS = tuple(_RULES)
"""The names of all detokenisers. To add one: write its rules above and add its name to :data:`Detokenizer`."""


def detokenize(text: str, name: Detokenizer) -> str:
    """Removes the spaces of a word tokeniser from a text.

    Raises:
        KeyError: there is no detokeniser of that name.
    """
    for pattern, by in _COMPILED[name]:
        text = pattern.sub(by, text)
    return text
