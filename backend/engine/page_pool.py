"""KV pages: free, referenced by sequences, or cached for a prefix that may come again."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable


class PagePool:
    """Hands out page ids 0 to `num_pages - 1` and counts who refers to them.

    A page is *free*, *referenced* by one or more sequences, or *cached*: nobody refers to it, but it was marked `keep` and holds
    a prefix that a later request may share. Cached pages are taken when free ones run out, the least recently used first;
    `on_evict` is called with each.
    """

    def __init__(self, num_pages: int, on_evict: Callable[[int], None] = lambda page_id: None) -> None:
        self.num_pages = num_pages
        self._on_evict = on_evict
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_references = [0] * num_pages
        self._is_kept = bytearray(num_pages)
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody refers to and that hold a prefix."""
        return len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Pages that sequences refer to, each counted once."""
        return self.num_pages - self.num_available

    def allocate(self, num_pages: int) -> list[int]:
        """Take `num_pages` pages with one reference each; the caller has checked `num_available`."""
        assert 0 <= num_pages <= self.num_available, f"{num_pages} pages wanted, {self.num_available} available"
        taken = [self._free.pop() if self._free else self._evict() for _ in range(num_pages)]
        for page_id in taken:
            self._num_references[page_id] = 1
        return taken

    def share(self, page_ids: Iterable[int]) -> None:
        """Add a reference to pages that are referenced or cached."""
        for page_id in page_ids:
            if self._num_references[page_id] == 0:
                del self._cached[page_id]
            self._num_references[page_id] += 1

    def release(self, page_ids: Iterable[int]) -> None:
        """Drop a reference to each page. Of pages that become cached, the last given are used longest ago."""
        for page_id in reversed(list(page_ids)):
            assert self._num_references[page_id] > 0, f"page {page_id} was released too often"
            self._num_references[page_id] -= 1
            if self._num_references[page_id] == 0:
                if self._is_kept[page_id]:
                    self._cached[page_id] = None
                else:
                    self._free.append(page_id)

    def keep(self, page_id: int) -> None:
        """Keep the content of a referenced page when its last reference goes."""
        assert self._num_references[page_id] > 0, f"page {page_id} has no owner"
        self._is_kept[page_id] = 1

    def num_references(self, page_id: int) -> int:
        """How many sequences refer to a page."""
        return self._num_references[page_id]

    def check_integrity(self, references: Iterable[int]) -> None:
        """Assert that free + referenced + cached == all pages, and that `references` lists each reference there is."""
        counted = Counter(references)
        for page_id, num_references in enumerate(self._num_references):
            assert counted[page_id] == num_references, (
                f"page {page_id} counts {num_references} references, sequences have {counted[page_id]}"
            )
        idle = Counter([*self._free, *self._cached])
        assert all(count == 1 for count in idle.values()), "a page is free or cached twice"
        assert all(self._num_references[page_id] == 0 for page_id in idle), "a free or cached page has references"
        assert len(idle) + len(counted) == self.num_pages, "a page was lost"

    def _evict(self) -> int:
        page_id, _ = self._cached.popitem(last=False)
        self._is_kept[page_id] = 0
        self._on_evict(page_id)
        return page_id
