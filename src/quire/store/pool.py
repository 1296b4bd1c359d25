"""Blocks of one size: take, hold, release, evict. Knows bytes, not meaning.

A block is free, held (by one or more references) or cached: idle but worth keeping, because an index has named it.

    take ──> held(1) ──hold──> held(n) ──release──> ... ──release──> free      unnamed
               ^                                           └────────> cached    named: joins the end of an idle queue
               └───────────── hold ── cached ── evict (from the front of one) ──> free

Taking and freeing are O(1) and allocate nothing: every list is threaded through arrays made once. A block keeps its id
for as long as it lives; where its bytes lie (`location`) may change when a slab is cleared for another pool. Which idle
block goes first is the policy's to say (`store/evict.py`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

from quire.errors import CapacityError, InvariantError
from quire.store.arena import Arena
from quire.store.evict import LRU, Eviction

_NONE = -1


class BlockPool:
    """All blocks of `block_bytes` bytes in an arena.

    Args:
        arena: where slabs come from; the pool registers itself there.
        block_bytes: the size of one block, at most a slab.
        on_evict: called with the id of a cached block that is given up, before it is reused.
        policy: which idle block is given up first; LRU when None.
    """

    def __init__(
        self,
        arena: Arena,
        block_bytes: int,
        on_evict: Callable[[int], None] | None = None,
        policy: Eviction | None = None,
    ) -> None:
        if not 0 < block_bytes <= arena.slab_bytes:
            raise InvariantError(f"blocks of {block_bytes} bytes in slabs of {arena.slab_bytes}")
        self.arena = arena
        self.block_bytes = block_bytes
        self.per_slab = arena.slab_bytes // block_bytes
        self.capacity = arena.slabs * self.per_slab
        self.on_evict = on_evict
        self.policy = policy or LRU()
        self.held = self.cached = self.slabs = 0
        n = self.capacity
        self._refs = array("i", [0]) * n
        self._named = bytearray(n)
        self._next = array("i", [_NONE]) * n  # free list of a slab, or an idle queue
        self._prev = array("i", [_NONE]) * n  # idle queues only
        self._queue = bytearray(n)  # which of them
        self.uses = array("H", [0]) * n
        """id -> how often it was made or found since it was taken."""
        self.since = array("q", [0]) * n
        """id -> the arena's clock when it last became idle."""
        self._where = array("i", range(n))  # id -> location; a permutation
        self._at = array("i", range(n))  # location -> id
        self.first = array("i", [_NONE]) * self.policy.queues
        """Queue -> the idle block that has been in it the longest, or -1."""
        self._last = array("i", [_NONE]) * self.policy.queues
        s = arena.slabs
        self._owned = bytearray(s)
        self._used = array("i", [0]) * s  # held + cached blocks
        self._slab_held = array("i", [0]) * s
        self._fresh = (
            array("i", [0]) * s
        )  # locations below this were handed out since the slab came
        self._freed = array("i", [_NONE]) * s  # head of the slab's list of freed ids
        self._stamp = array("q", [0]) * s  # when a block of the slab last became idle
        self._slab_uses = array("q", [0]) * s  # of its idle blocks together
        self._open_next = array("i", [_NONE]) * s  # slabs with a free block
        self._open_prev = array("i", [_NONE]) * s
        self._open = _NONE
        self._evictions = 0  # since other pools were last looked at
        self._clearing = _NONE  # the slab that is being emptied
        arena.pools.append(self)

    # -- the four verbs ------------------------------------------------------------------------------------------

    def take(self) -> int:
        """A block with one reference: a free one, else of a new slab, else the idle block that is worth least.

        Raises:
            CapacityError: every block is held, and the arena has nothing to give.
        """
        if self._open == _NONE:
            if not self.arena.free_slabs and self.cached and not self._others_are_worth_less():
                self.evict(self.victim())  # where a slab is one block, this gives the slab back
            if self._open == _NONE:
                self._grow()
        slab = self._open
        block = self._pop_free(slab)
        self._refs[block] = self.uses[block] = 1
        self.held += 1
        self._slab_held[slab] += 1
        return block

    def hold(self, block: int) -> None:
        """One more reference; a cached block leaves its idle queue."""
        if self._refs[block] == 0:
            if not self._named[block]:
                raise InvariantError(f"block {block} is free and cannot be held")
            self._unlink_idle(block)
            self.cached -= 1
            self.held += 1
            slab = self._slab(block)
            self._slab_held[slab] += 1
            self._slab_uses[slab] -= self.uses[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less; the last makes the block cached when it is named, free otherwise."""
        refs = self._refs[block] - 1
        if refs < 0:
            raise InvariantError(f"block {block} was released more often than held")
        self._refs[block] = refs
        if refs:
            return
        self.held -= 1
        slab = self._slab(block)
        self._slab_held[slab] -= 1
        if self._named[block]:
            self.cached += 1
            self.arena.clock += 1
            self.since[block] = self._stamp[slab] = self.arena.clock
            self._slab_uses[slab] += self.uses[block]
            self._link_idle(block, self.policy.queue(self, block))
        else:
            self._push_free(block, slab)

    def evict(self, block: int) -> None:
        """Gives up a cached block: forgets its name and frees it."""
        if self._refs[block] or not self._named[block]:
            raise InvariantError(f"block {block} is not cached")
        self._forget(block)
        slab = self._slab(block)
        if slab == self._clearing:
            self._used[slab] -= 1  # nothing may be taken from it
        else:
            self._push_free(block, slab)

    def found(self, block: int) -> None:
        """Somebody looked for the block and holds it now: it is worth more."""
        if self.uses[block] < 0xFFFF:
            self.uses[block] += 1

    def victim(self) -> int:
        """The idle block to give up first. At least one must be cached."""
        return self.policy.victim(self)

    def adopt(self, policy: Eviction) -> None:
        """Another policy from now on. Nothing may be idle."""
        if self.cached:
            raise InvariantError(f"{self.cached} blocks are idle under another policy")
        self.policy = policy
        self.first = array("i", [_NONE]) * policy.queues
        self._last = array("i", [_NONE]) * policy.queues

    # -- names, references, places -------------------------------------------------------------------------------

    def name(self, block: int) -> None:
        """Marks a held block as worth keeping when its last reference goes."""
        if not self._refs[block]:
            raise InvariantError(f"block {block} is not held and cannot be named")
        self._named[block] = 1

    def unname(self, block: int) -> None:
        """Forgets a name; an idle block becomes free."""
        if self._named[block]:
            if self._refs[block]:
                self._named[block] = 0
                self.policy.forget(block)
            else:
                self.evict(block)

    def refs(self, block: int) -> int:
        """How many references hold the block; 0 where it is cached or free."""
        return self._refs[block]

    def named(self, block: int) -> bool:
        """Whether the block stays cached when its last reference goes."""
        return bool(self._named[block])

    def location(self, block: int) -> tuple[int, int]:
        """(slab, index within the slab) of the block's bytes."""
        return divmod(self._where[block], self.per_slab)

    @property
    def locations(self) -> array[int]:
        """id -> slab * per_slab + index, for all ids; a live view."""
        return self._where

    def byte_offset(self, block: int) -> int:
        """Where the block's bytes start in the arena's buffer."""
        slab, i = self.location(block)
        return slab * self.arena.slab_bytes + i * self.block_bytes

    def idle(self) -> Iterator[int]:
        """Cached blocks, queue by queue; each in the order in which it would be evicted."""
        for head in self.first:
            block = head
            while block != _NONE:
                yield block
                block = self._next[block]

    def idle_in(self, block: int, queue: int) -> bool:
        """Whether the block is idle, in that queue."""
        return bool(self._named[block]) and not self._refs[block] and self._queue[block] == queue

    def moved(self, block: int, queue: int) -> None:
        """Puts an idle block at the end of another queue, as of now."""
        self._unlink_idle(block)
        self.since[block] = self.arena.clock
        self._link_idle(block, queue)

    def copies(self) -> tuple[array[int], bytes, array[int], bytes]:
        """For a census: (references, names and locations by id; by slab whether it is the pool's), as they are now."""
        return self._refs[:], bytes(self._named), self._where[:], bytes(self._owned)

    @property
    def free(self) -> int:
        """Blocks that can be taken without clearing another pool's slab or evicting."""
        own = self.slabs * self.per_slab - self.held - self.cached
        return own + self.arena.free_slabs * self.per_slab

    # -- giving slabs to others ----------------------------------------------------------------------------------

    def clearable(self) -> Iterator[int]:
        """Slabs that could be given up: all or none, for held blocks can be moved and cached ones evicted."""
        if self.held <= (self.slabs - 1) * self.per_slab:
            for slab in range(self.arena.slabs):
                if self._owned[slab]:
                    yield slab

    def worth(self, slab: int) -> tuple[int, float]:
        """What clearing would cost: blocks to move first, then what the policy says of its idle blocks together."""
        if self._used[slab] == self._slab_held[slab]:
            return self._slab_held[slab], -1.0
        return self._slab_held[slab], self.policy.slab_worth(
            self, self._slab_uses[slab], self._stamp[slab]
        )

    def _others_are_worth_less(self) -> bool:
        """Whether a slab of idle blocks elsewhere is worth less than as many bytes here; asked once a slab."""
        self._evictions += 1
        if self._evictions < self.per_slab or len(self.arena.pools) == 1:
            return False
        self._evictions = 0
        own = self.policy.block_worth(self, self.victim()) * self.per_slab
        return self.arena.cheaper(self, own)

    def clear(self, slab: int) -> None:
        """Evicts the slab's cached blocks, moves its held ones, and gives it back to the arena."""
        if self._used[slab] < self.per_slab:
            self._close(slab)  # nothing may be taken from it while it is being emptied
        self._clearing = slab
        base = slab * self.per_slab
        places = range(base, base + self._fresh[slab])
        for at in places:
            block = self._at[at]
            if self._named[block] and not self._refs[block]:
                self.evict(block)  # whoever is told may give up more of them
        for at in places:
            block = self._at[at]
            if self._refs[block]:
                if self._open == _NONE:
                    self.evict(self.victim())
                self._move(block, slab)
        self._clearing = _NONE
        self._return(slab)

    def _move(self, block: int, slab: int) -> None:
        """Swaps places with a free block of another slab; the id stays, the bytes are copied."""
        other = self._open
        spare = self._pop_free(other)
        src, dst = self._where[block], self._where[spare]
        size, per, width = self.block_bytes, self.per_slab, self.arena.slab_bytes
        self.arena.copy(
            src // per * width + src % per * size, dst // per * width + dst % per * size, size
        )
        self._where[block], self._where[spare] = dst, src
        self._at[dst], self._at[src] = block, spare
        self._slab_held[other] += 1
        self._slab_held[slab] -= 1
        self._used[slab] -= 1

    # -- lists ---------------------------------------------------------------------------------------------------

    def _grow(self) -> None:
        """One more slab. Raises CapacityError."""
        slab = self.arena.take(self)
        if slab == _NONE:
            raise CapacityError(
                f"no block of {self.block_bytes:,} bytes left: {self.held} held, arena "
                f"{self.arena.total_bytes:,} bytes",
                needed_bytes=self.block_bytes,
                free_bytes=0,
            )
        self._adopt(slab)

    def _forget(self, block: int) -> None:
        """A cached block loses its name and its place in a queue."""
        if self.on_evict is not None:
            self.on_evict(block)
        self._named[block] = 0
        self.policy.forget(block)
        self._unlink_idle(block)
        self.cached -= 1
        self._slab_uses[self._slab(block)] -= self.uses[block]

    def _slab(self, block: int) -> int:
        return self._where[block] // self.per_slab

    def _adopt(self, slab: int) -> None:
        self._owned[slab] = 1
        self.slabs += 1
        self._used[slab] = self._slab_held[slab] = self._fresh[slab] = 0
        self._freed[slab] = _NONE
        self._stamp[slab] = self._slab_uses[slab] = 0
        self._reopen(slab)

    def _return(self, slab: int) -> None:
        self._owned[slab] = 0
        self.slabs -= 1
        self.arena.give(slab)

    def _reopen(self, slab: int) -> None:
        self._open_prev[slab] = _NONE
        self._open_next[slab] = self._open
        if self._open != _NONE:
            self._open_prev[self._open] = slab
        self._open = slab

    def _close(self, slab: int) -> None:
        before, after = self._open_prev[slab], self._open_next[slab]
        if before == _NONE:
            self._open = after
        else:
            self._open_next[before] = after
        if after != _NONE:
            self._open_prev[after] = before

    def _pop_free(self, slab: int) -> int:
        block = self._freed[slab]
        if block != _NONE:
            self._freed[slab] = self._next[block]
        else:
            block = self._at[slab * self.per_slab + self._fresh[slab]]
            self._fresh[slab] += 1
        self._used[slab] += 1
        if self._used[slab] == self.per_slab:
            self._close(slab)
        return block

    def _push_free(self, block: int, slab: int) -> None:
        was_full = self._used[slab] == self.per_slab
        self._used[slab] -= 1
        if not self._used[slab]:
            if not was_full:
                self._close(slab)
            self._return(slab)
            return
        self._next[block] = self._freed[slab]
        self._freed[slab] = block
        if was_full:
            self._reopen(slab)

    def _link_idle(self, block: int, queue: int) -> None:
        last = self._last[queue]
        self._next[block], self._prev[block], self._queue[block] = _NONE, last, queue
        if last == _NONE:
            self.first[queue] = block
        else:
            self._next[last] = block
        self._last[queue] = block

    def _unlink_idle(self, block: int) -> None:
        before, after, queue = self._prev[block], self._next[block], self._queue[block]
        if before == _NONE:
            self.first[queue] = after
        else:
            self._next[before] = after
        if after == _NONE:
            self._last[queue] = before
        else:
            self._prev[after] = before
