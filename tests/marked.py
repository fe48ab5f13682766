"""Tables in READMEs that are written by programs, between two marks: `<!-- name: begin ... -->` and `<!-- name: end -->`."""

from __future__ import annotations

import re


def with_table(text: str, name: str, table: str) -> str:
    """The text with `table` between the marks of `name`, an empty line before and behind it; ValueError without them.

    >>> with_table("a\\n<!-- t: begin (by hand) -->\\nold\\n<!-- t: end -->", "t", "new")
    'a\\n<!-- t: begin (by hand) -->\\n\\nnew\\n\\n<!-- t: end -->'
    """
    pattern = rf"(<!-- {name}: begin(?: \([^)]*\))? -->).*?(<!-- {name}: end -->)"
    made, count = re.subn(pattern, lambda marks: f"{marks[1]}\n\n{table}\n\n{marks[2]}", text, count=1, flags=re.DOTALL)
    if not count:
        raise ValueError(f"no marks for the table {name}")
    return made
