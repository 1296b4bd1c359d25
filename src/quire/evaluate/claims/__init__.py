"""The field's headline statements about KV caches, run or worked out here, each with a verdict.

arithmetic.py   what follows from shapes: sizes, ratios, what fits; no torch
measured.py     what is run on the packaged model, on this machine
dropped.py      tokens that are dropped: how many are enough, and which a stream needs
memory.py       rooms and blocks, blocks of which size, windows
rates.py        what a step waits for: bytes or operations
later.py        what needs a part that Quire does not have yet, or a machine that this is not
slips.py        wrong numbers in circulation, with the right ones
page.py         docs/claims.md
"""

from quire.evaluate.claims.claim import VERDICTS, Claim, Outcome, run_claims

__all__ = ["VERDICTS", "Claim", "Outcome", "run_claims"]
