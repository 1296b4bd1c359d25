"""Memory: arena, pools, tables and the store that joins them. Reading any of it never imports torch."""

from quire.store.arena import Arena, fit_slab_bytes
from quire.store.chain import Chain, Extent
from quire.store.pool import BlockPool
from quire.store.store import BlockStore
from quire.store.table import BlockTable

__all__ = ["Arena", "BlockPool", "BlockStore", "BlockTable", "Chain", "Extent", "fit_slab_bytes"]
