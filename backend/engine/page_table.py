"""Where the KV of one sequence lies, page by page."""

from __future__ import annotations

from backend.engine.plan import PAGE_TOKENS


class PageTable:
    """Pages of one sequence in the order of positions; an entry lies on the device or, swapped out, on the host.

    `page_ids`: device pages of all positions, as a plan carries them, and `num_ready_tokens`: positions from 0 on that can be
    used at once; none while anything is swapped out. Both are kept up to date, since every step asks for every sequence.
    """

    __slots__ = ("_device", "_host", "num_ready_tokens", "page_ids")

    def __init__(self) -> None:
        self._device: list[int | None] = []
        self._host: dict[int, int] = {}
        self.page_ids: tuple[int, ...] = ()
        self.num_ready_tokens = 0

    def __len__(self) -> int:
        return len(self._device)

    @property
    def num_swapped(self) -> int:
        """Entries that lie on the host."""
        return len(self._host)

    @property
    def num_on_device(self) -> int:
        """Entries that lie on the device."""
        return len(self._device) - len(self._host)

    @property
    def device_pages(self) -> list[int]:
        """Device pages this sequence refers to."""
        return [page_id for page_id in self._device if page_id is not None]

    @property
    def host_pages(self) -> list[int]:
        """Host pages this sequence holds."""
        return list(self._host.values())

    def num_missing(self, num_tokens: int) -> int:
        """Device pages to find before positions 0 to `num_tokens - 1` can be used: swapped ones and new ones."""
        return len(self._host) + max(0, -(-num_tokens // PAGE_TOKENS) - len(self._device))

    def page_at(self, index: int) -> int | None:
        """The device page of entry `index`, None while it is swapped out."""
        return self._device[index]

    def device_entries(self) -> list[tuple[int, int]]:
        """Entries that lie on the device with their pages, in order."""
        return [(index, page_id) for index, page_id in enumerate(self._device) if page_id is not None]

    def extend(self, page_ids: list[int]) -> None:
        """Add entries behind the last one."""
        self._device += page_ids
        if self._host:
            self._note_change()
        else:  # the common way, and a table may have thousands of entries
            self.page_ids += tuple(page_ids)
            self.num_ready_tokens = len(self.page_ids) * PAGE_TOKENS

    def swap_out(self, index: int, host_page: int) -> int:
        """Entry `index` lies on the host from now on; returns the device page it had."""
        page_id = self._device[index]
        assert page_id is not None, f"entry {index} is swapped out already"
        self._device[index] = None
        self._host[index] = host_page
        self._note_change()
        return page_id

    def swap_in(self, index: int, page_id: int) -> int:
        """Entry `index` lies in device page `page_id` from now on; returns the host page it had."""
        self._device[index] = page_id
        host_page = self._host.pop(index)
        self._note_change()
        return host_page

    def swapped_entries(self) -> list[int]:
        """Entries that lie on the host, in order."""
        return sorted(self._host)

    def clear(self) -> None:
        """Forget everything."""
        self._device, self._host = [], {}
        self._note_change()

    def _note_change(self) -> None:
        self.page_ids = () if self._host else tuple(self.device_pages)
        self.num_ready_tokens = len(self.page_ids) * PAGE_TOKENS
