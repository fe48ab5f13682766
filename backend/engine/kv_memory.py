"""Who has which KV pages: sharing of prefixes, growth, and swapping to host memory when the device's pages run out.

A sequence is admitted when the pages of its whole generation fit into device and host memory together, besides those promised
to the others. So a page can always be found: if not free, then by moving one of a sequence that ranks lower to the host. A
sequence whose pages are partly on the host rests until they are back. The one that ranks first can always go on, so all end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Ids

from backend.engine.page_pool import PagePool
from backend.engine.page_table import PageTable
from backend.engine.plan import PAGE_TOKENS, PageCopy
from backend.engine.prefix_cache import Key, PrefixCache, next_key, root_key


class Holder:
    """What KvMemory keeps of one sequence: its table, its promise, and how far its pages are named in the prefix cache."""

    def __init__(self, salt: str, num_pages_promised: int, *, may_read_cache: bool, may_write_cache: bool) -> None:
        self.table = PageTable()
        self.num_pages_promised = num_pages_promised
        self.may_read_cache = may_read_cache
        self.may_write_cache = may_write_cache
        self.last_key: Key = root_key(salt)
        self.num_named_pages = 0

    @property
    def num_named_tokens(self) -> int:
        """Positions that lie in the pages that have names."""
        return self.num_named_pages * PAGE_TOKENS


class KvMemory:
    """Owns the device pages, the host pages and the prefix cache; the Scheduler alone calls it."""

    def __init__(self, num_pages: int, num_host_pages: int) -> None:
        self.prefixes = PrefixCache()
        self.pool = PagePool(num_pages, self.prefixes.forget)
        self._free_host = list(range(num_host_pages - 1, -1, -1))
        self._num_host_pages = num_host_pages
        self._num_promised = 0
        self._copies: list[PageCopy] = []
        self.num_swapped_out_pages = 0

    @property
    def has_swapped(self) -> bool:
        """Whether any page lies on the host."""
        return len(self._free_host) < self._num_host_pages

    def can_promise(self, num_pages: int) -> bool:
        """Whether a sequence that may grow to `num_pages` fits besides all others, on device and host together."""
        return self._num_promised + num_pages <= self.pool.num_pages + self._num_host_pages

    def admit(self, holder: Holder, prompt: Ids[int]) -> int:
        """Promise a sequence its pages and share what the cache has of its prompt; returns the tokens found.

        The last token of a prompt is never taken from the cache: its logits are needed.
        """
        self._num_promised += holder.num_pages_promised
        if not holder.may_read_cache:
            return 0
        keys, key = [], holder.last_key
        for end in range(PAGE_TOKENS, len(prompt), PAGE_TOKENS):
            key = next_key(key, prompt[end - PAGE_TOKENS : end])
            keys.append(key)
        found = self.prefixes.find(keys)
        if found:
            self.pool.share(found)
            holder.table.extend(found)
            holder.num_named_pages = len(found)
            holder.last_key = keys[len(found) - 1]
        return len(found) * PAGE_TOKENS

    def prepare(self, holder: Holder, num_tokens: int, lower: Ids[Holder]) -> bool:
        """Bring positions 0 to `num_tokens - 1` of a sequence onto the device; False (and nothing changed) if that cannot be.

        `lower` are the sequences that may be moved out for it, the first to go last.
        """
        num_missing = holder.table.num_missing(num_tokens)
        if num_missing == 0:
            return True
        if num_missing > self.pool.num_available and not self._make_room(num_missing, lower):
            return False
        if holder.table.num_swapped == 0:
            holder.table.extend(self.pool.allocate(num_missing))
            return True
        for index in holder.table.swapped_entries():
            page_id = self.pool.allocate(1)[0]
            host_page = holder.table.swap_in(index, page_id)
            self._copies.append(PageCopy(host_page, page_id, is_to_host=False))
            self._free_host.append(host_page)
        holder.table.extend(self.pool.allocate(holder.table.num_missing(num_tokens)))
        return True

    def name_full_pages(self, holder: Holder, token_ids: Ids[int]) -> None:
        """Tell the prefix cache of pages that became full.

        `token_ids` are those behind the pages that have names already (`Holder.num_named_tokens`) whose KV is known to be there.
        """
        first = holder.num_named_pages
        for number in range(len(token_ids) // PAGE_TOKENS):
            page_id = holder.table.page_at(first + number)
            holder.last_key = next_key(holder.last_key, token_ids[number * PAGE_TOKENS : (number + 1) * PAGE_TOKENS])
            holder.num_named_pages += 1
            if page_id is not None and self.prefixes.add(holder.last_key, page_id):
                self.pool.keep(page_id)

    def release(self, holder: Holder) -> None:
        """Give back everything a sequence has."""
        self.pool.release(holder.table.device_pages)
        self._free_host += holder.table.host_pages
        self._num_promised -= holder.num_pages_promised
        holder.table.clear()

    def take_copies(self) -> tuple[PageCopy, ...]:
        """Copies that the next step must make before anything else, in order."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def check_integrity(self, holders: Ids[Holder]) -> None:
        """Assert that device pages, host pages and promises add up."""
        self.pool.check_integrity(page_id for holder in holders for page_id in holder.table.device_pages)
        assert all(len(holder.table) <= holder.num_pages_promised for holder in holders), "more pages than promised"
        host = [page for holder in holders for page in holder.table.host_pages] + self._free_host
        assert sorted(host) == list(range(self._num_host_pages)), "a host page was lost or is held twice"
        assert self._num_promised == sum(holder.num_pages_promised for holder in holders), "promises do not add up"

    def _make_room(self, num_pages: int, lower: Ids[Holder]) -> bool:
        """Move pages of `lower` to the host until `num_pages` are available: of the last sequence first, from its end.

        A page that several of them share goes when it is the turn of the first of them, and each gets a copy; one that a sequence
        outside of `lower` shares stays. So whoever loses pages is followed only by sequences that have none left to give, and
        their promises leave room on the host for everything that lies there or may have to go there.
        """
        num_found = self.pool.num_available
        if num_pages > num_found + sum(holder.table.num_on_device for holder in lower):
            return False
        references: defaultdict[int, list[tuple[Holder, int]]] = defaultdict(list)
        movable: list[int] = []
        for holder in reversed(lower):
            for index, page_id in reversed(holder.table.device_entries()):
                references[page_id].append((holder, index))
                if len(references[page_id]) == self.pool.num_references(page_id):
                    movable.append(page_id)
                    if num_found + len(movable) == num_pages:
                        for movable_id in movable:
                            for victim, entry in references[movable_id]:
                                self._move_out(victim, entry)
                        return True
        return False

    def _move_out(self, victim: Holder, index: int) -> None:
        host_page = self._free_host.pop()
        page_id = victim.table.swap_out(index, host_page)
        self._copies.append(PageCopy(page_id, host_page, is_to_host=True))
        self.pool.release([page_id])
        self.num_swapped_out_pages += 1
