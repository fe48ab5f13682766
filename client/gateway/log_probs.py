"""Log-probabilities in OpenAI's two styles, out of the places that the ensemble sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Place = dict[str, Any]  # {"id", "bytes", "log_prob", "rank", "top": [the same without top]}


def chat_entries(places: Sequence[Place], num_top: int) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat choice: an entry a token, with `num_top` alternatives."""
    return [_entry(place) | {"top_logprobs": [_entry(other) for other in place["top"][:num_top]]} for place in places]


def _entry(place: Place) -> dict[str, Any]:
    return {
        "token": bytes(place["bytes"]).decode("utf-8", errors="replace"),
        "logprob": place["log_prob"],
        "bytes": place["bytes"],
    }


class CompletionLogProbs:
    """`logprobs` of a completion choice: four lists side by side, and where each token begins in the text.

    The first token of an echoed prompt has no log-probability. A token that is not whole characters is written
    `bytes:\\xe2\\x82`, as OpenAI does, so that alternatives stay apart; its offset is that of the character it belongs to.
    """

    def __init__(self, num_top: int) -> None:
        self._num_top = num_top
        self._text = bytearray()

    def add(self, places: Sequence[Place | None], first_text: str = "") -> dict[str, Any]:
        """The lists of the next tokens; `first_text` is the token whose place is None."""
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for place in places:
            token = first_text.encode() if place is None else bytes(place["bytes"])
            made["tokens"].append(token_text(token))
            made["token_logprobs"].append(place and place["log_prob"])
            made["top_logprobs"].append(place and self._alternatives(place))
            made["text_offset"].append(len(self._text.decode("utf-8", errors="ignore")))
            self._text += token
        return made

    def _alternatives(self, place: Place) -> dict[str, float]:
        top = {
            token_text(bytes(other["bytes"])): other["log_prob"] for other in reversed(place["top"][: self._num_top])
        }
        return dict(reversed(top.items())) | {token_text(bytes(place["bytes"])): place["log_prob"]}


def token_text(token: bytes) -> str:
    r"""A token as text, or its bytes in hexadecimal.

    >>> token_text("€".encode()), token_text("€".encode()[:2])
    ('€', 'bytes:\\xe2\\x82')
    """
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
