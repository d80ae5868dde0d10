"""Ratings in the words of a vision-language model: ``Score: 4``, ``Score (1-5): 4``, ``**Score:** -3``."""

from __future__ import annotations

import re

# A minus belongs to the number unless a word stands before it: "Score: -3" is negative, "Score-3" and "Score - 3" not.
_NUMBER = r"((?:(?<!\w)[-−])?\d+(?:\.\d+)?)"
# What makes two numbers of one: "3-4", "3 to 4", "3,5" and "3.5.1" say nothing that could be learned from.
_MORE = r"([\d.,]*\d|[ \t]*(?:[-−–—~]|to\b|or\b)[ \t]*\d)?"
# The scale in brackets that may follow the label, "(1-5)" or "[out of 5]"; a number alone, or "4/5", is the rating.
_SCALE = r"[(\[](?!\s*[-−]?[\d.]+\s*(?:/\s*\d+\s*)?[)\]])[^)\]\n]*[)\]]"


def last_number(text: str, label: str = "") -> float | None:
    """Return the number after the last ``label`` of ``text`` that has one, in either case of letters.

    Args:
        text: what the model wrote.
        label: a regular expression, e.g. ``score``; without one, the text must be a number and nothing else.

    Returns:
        The number, or ``None`` where there is none, or more than one as in ``Score: 3-4``.
    """
    if label:
        found = re.findall(rf"{label}(?:[^\w(\[]*{_SCALE})?\W*?{_NUMBER}{_MORE}", text, re.IGNORECASE)
    else:
        found = re.findall(rf"^\W*?{_NUMBER}{_MORE}\W*$", text.strip())
    if not found or found[-1][1]:
        return None
    return float(found[-1][0].replace("−", "-"))
