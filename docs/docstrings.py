"""Griffe extension for the API pages: `Shapes:`, `Units:`, `Errors:` and the like begin a line of their own in a docstring."""

import re
from typing import Any

import griffe

HEADINGS = re.compile(
    r"(?:^|(?<=[.;)\]])|(?<=\s\s))\s*\b(Shapes|Units|Errors|Letters|Cost|Memory|Source):\s+", re.MULTILINE
)


class Headings(griffe.Extension):
    """Turns the headings into paragraphs, which Markdown would otherwise join."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that has one."""
        if obj.docstring:
            obj.docstring.value = HEADINGS.sub(r"\n\n**\1:** ", obj.docstring.value)
