"""`python -m client.gateway.tables`: writes the README's tables of request fields and settings from the code."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from client.gateway.chat_request import ChatRequest
from client.gateway.completion_request import CompletionRequest
from client.gateway.settings import settings_table

README = Path(__file__).with_name("README.md")


def fields_table() -> str:
    """Every field of the two requests, which of them has it, and what it means."""
    kinds: dict[str, type[BaseModel]] = {"chat": ChatRequest, "completions": CompletionRequest}
    names = dict.fromkeys(name for kind in kinds.values() for name in kind.model_fields)
    lines = ["| field | chat | completions | meaning |", "|---|---|---|---|"]
    for name in sorted(names):
        has = ["yes" if name in kind.model_fields else "" for kind in kinds.values()]
        meaning = next(kind.model_fields[name].description for kind in kinds.values() if name in kind.model_fields)
        lines.append(f"| `{name}` | {' | '.join(has)} | {meaning} |")
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """The README with both tables between their markers."""
    for name, table in (("fields", fields_table()), ("settings", settings_table())):
        before, begin, rest = text.partition(f"<!-- {name}: begin (written by python -m client.gateway.tables) -->")
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        assert begin, f"{README} lacks the markers of {name}"
        assert end, f"{README} lacks the end marker of {name}"
        text = f"{before}{begin}\n\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
