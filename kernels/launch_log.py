"""The last launches in words, for the report when a kernel fails.

A failed kernel makes itself known at some later call, so the report has what was launched shortly before. Lines of text are
kept, never tensors (that would keep their memory); making them costs some ten microseconds a launch, and nothing for
launches that are replayed in a graph.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kernels.arguments import Argument, Buffer, Scalar, TensorMap
from kernels.launch import Launch

NUM_KEPT = 64


class LaunchLog:
    """A bounded list of launches and of replays of graphs."""

    def __init__(self, num_kept: int = NUM_KEPT) -> None:
        self._entries: deque[tuple[str, Sequence[str]]] = deque(maxlen=num_kept)
        self._num_added = 0

    def add(self, launch: Launch) -> None:
        """Notes one launch."""
        self._append(head_line(launch), [_argument_line(argument) for argument in launch.arguments])

    def add_replay(self, head_lines: Sequence[str]) -> None:
        """Notes that a graph was started whose launches have these `head_line`s."""
        self._append(f"replay of a graph of {len(head_lines)} launches", head_lines)

    def report(self) -> str:
        """What was launched last, newest first: a line for each launch, indented ones for its arguments."""
        lines = [f"last {len(self._entries)} of {self._num_added} launches, newest first:"]
        for number, (head, details) in zip(range(self._num_added, 0, -1), reversed(self._entries), strict=False):
            lines += [f"#{number} {head}", *(f"    {line}" for line in details)]
        return "\n".join(lines)

    def _append(self, head: str, details: Sequence[str]) -> None:
        self._num_added += 1
        self._entries.append((head, details))


def head_line(launch: Launch) -> str:
    """Kernel, program and configuration of a launch."""
    overlap = ", overlaps the one before" if launch.overlaps_previous else ""
    return (
        f"{launch.kernel} ({launch.program}): grid {launch.grid}, block {launch.block}, cluster {launch.cluster}, "
        f"{launch.shared_bytes} bytes of shared memory{overlap}"
    )


def _argument_line(argument: Argument) -> str:
    match argument:
        case Scalar():
            return f"{argument.name} = {argument.value}"
        case TensorMap():
            return (
                f"{_argument_line(argument.buffer)} by dims {argument.dims}, strides_bytes {argument.strides_bytes}, "
                f"box {argument.box}, swizzle {argument.swizzle.name}"
            )
        case Buffer():
            if (tensor := argument.tensor) is None:
                return f"{argument.name} = none"
            return f"{argument.name} = {tensor.dtype} {list(tensor.shape)} at {argument.address:#x}, {argument.access.value}"
