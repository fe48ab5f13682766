"""Free KV pages and who holds the others."""

from __future__ import annotations


class PagePool:
    """Hands out page ids 0 to `num_pages - 1`; each is free or held by exactly one sequence.

    Pages that were freed last are handed out first: their memory is the warmest.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_held = bytearray(num_pages)

    @property
    def num_free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Pages held by sequences."""
        return self.num_pages - len(self._free)

    def allocate(self, num_pages: int) -> tuple[int, ...]:
        """Take `num_pages` pages; the caller has checked `num_free`."""
        assert 0 <= num_pages <= len(self._free), f"{num_pages} pages wanted, {len(self._free)} free"
        taken = tuple(self._free.pop() for _ in range(num_pages))
        for page_id in taken:
            self._is_held[page_id] = 1
        return taken

    def free(self, page_ids: tuple[int, ...]) -> None:
        """Give pages back; giving one back twice is a bug and stops the engine."""
        for page_id in reversed(page_ids):
            assert self._is_held[page_id], f"page {page_id} was freed twice"
            self._is_held[page_id] = 0
            self._free.append(page_id)

    def check_integrity(self, num_held: int) -> None:
        """Assert that free + held == all pages, without repeats, and that sequences hold `num_held`."""
        assert len(set(self._free)) == len(self._free), "a free page is listed twice"
        assert not any(self._is_held[page_id] for page_id in self._free), "a free page is marked as held"
        assert self.num_held == num_held == sum(self._is_held), (
            f"{self.num_held} pages are not free, sequences hold {num_held}, {sum(self._is_held)} are marked"
        )
