"""Tiers: memory below the device's. One file adds one; `quire.store.tiers.contract` says what it must do.

Packages outside register theirs under the entry point group `quire.tiers`; its name is what the user writes in
`tiers="host:8GiB,name:SIZE@PLACE"`, its value a callable `(capacity_bytes, place) -> Tier`.
"""

from quire.store.tiers.contract import Block, Outcome, Tier, TierCaps, TierHealth

__all__ = ["Block", "Outcome", "Tier", "TierCaps", "TierHealth"]
