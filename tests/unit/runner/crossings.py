"""Sees everything that PyTorch moves between the host and a device whose tensors are of torch's device meta."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.bench.gpu.host_only_device import HostOnlyDevice


@dataclass(frozen=True)
class Crossing:
    """Something that went from the host or back. On a GPU the host goes on at once if it `is_asynchronous`, else it waits."""

    op: str
    is_to_device: bool
    is_asynchronous: bool
    num_bytes: int


class Crossings(TorchDispatchMode):
    """Inside `with`, `seen` grows; a copy to the host gives ones.

    A copy is asynchronous if it is asked for as non_blocking and its end on the host lies in the device's pinned memory
    (PyTorch's notes on CUDA semantics, "Use pinned memory buffers"). Any other operation that takes tensors of both places
    stages what lies on the host through pageable memory. Numbers, tensors without dimensions among them, are parameters of a
    launch.
    """

    def __init__(self, device: HostOnlyDevice) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Crossing] = []
        self._device = device
        self._numbers = _Numbers(self)

    def __enter__(self) -> Crossings:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._numbers.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        self._numbers.__exit__(*raised)  # type: ignore[no-untyped-call]
        super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "copy_":
            target, source = args[:2]
            if target.device != source.device:
                self._note(name, source, target, args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
                return target if target.is_meta else target.fill_(1)
        elif name in ("_to_copy", "to"):
            source = args[0]
            place = torch.device(kwargs.get("device") or source.device)
            if place.type != source.device.type:
                self._note(name, source, torch.empty(0, device=place), kwargs.get("non_blocking", False))
        else:
            tensors = list(_tensors((args, kwargs)))
            on_host = [tensor for tensor in tensors if not tensor.is_meta and tensor.dim()]
            if any(tensor.is_meta for tensor in tensors) and on_host:
                self._note(name, on_host[0], torch.empty(0, device="meta"), is_non_blocking=False)
        return func(*args, **kwargs)

    def _note(self, op: str, source: torch.Tensor, target: torch.Tensor, is_non_blocking: bool) -> None:
        on_host = target if source.is_meta else source
        pinned = {memory.untyped_storage().data_ptr() for memory in self._device.pinned_memory}
        is_pinned = on_host.untyped_storage().data_ptr() in pinned
        num_bytes = source.numel() * source.element_size()
        self.seen.append(Crossing(op, target.is_meta, bool(is_non_blocking) and is_pinned, num_bytes))


class _Numbers(TorchFunctionMode):
    """Tensors that are made of Python's numbers on the device: the copy is hidden from dispatch."""

    def __init__(self, crossings: Crossings) -> None:
        super().__init__()
        self._crossings = crossings

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.__name__ in ("tensor", "as_tensor", "asarray", "new_tensor") and made.is_meta:
            num_bytes = made.numel() * made.element_size()
            self._crossings.seen.append(Crossing(func.__name__, True, False, num_bytes))
        return made


def is_noticed(crossings: Crossings, call: Callable[[], object]) -> bool:
    """Whether something in `call` makes the host wait, by itself or by what is seen of it."""
    before = len(crossings.seen)
    try:
        with crossings:
            call()
    except (RuntimeError, NotImplementedError, TypeError, ValueError):
        return True  # there is nothing to read on the device
    return not all(crossing.is_asynchronous for crossing in crossings.seen[before:])


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
