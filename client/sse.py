"""Server-sent events, read from a stream that is cut anywhere.

The rules are those of the HTML standard, "9.2.6 Interpreting an event stream", for the one field used here: `data`.
"""

from __future__ import annotations

import re

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventParser:
    """Collects bytes and gives the data of each event once its blank line is there.

    >>> parser = EventParser()
    >>> parser.feed(b"data: on")
    []
    >>> parser.feed(b"e\\n\\ndata: two\\n")
    ['one']
    """

    def __init__(self) -> None:
        self._rest = b""  # the line that has not ended yet
        self._after_cr = False  # the last byte was a CR: a LF that follows belongs to it
        self._data: list[bytes] = []  # the `data` lines of the event that has not ended yet
        self._at_start = True

    def feed(self, chunk: bytes) -> list[str]:
        """The data of the events that `chunk` completes; raises UnicodeDecodeError for what is not UTF-8."""
        if not chunk:
            return []
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
            self._after_cr = False
        self._after_cr = chunk.endswith(b"\r") if chunk else False
        *lines, self._rest = _LINE_END.split(self._rest + chunk)
        events: list[str] = []
        for line in lines:
            if self._at_start:
                line = line.removeprefix(_BYTE_ORDER_MARK)
                self._at_start = False
            if line:
                field, _, value = line.partition(b":")
                if field == b"data":
                    self._data.append(value.removeprefix(b" "))
            elif self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events
