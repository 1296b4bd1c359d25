"""Retention policies, one per file: the file's name is the policy's name on the command line.

A file holds a frozen dataclass `Policy`; its fields are the parameters that `keep=` may set (`"h2o:budget=0.2"`). There
are two kinds. A *span* policy says of each head which positions a query may read at all (`quire.spec.SpanPolicy`); a
*score* policy gives every cached token a number, and at fixed lengths the best stay (`quire.spec.RetentionPolicy`).
Packages outside register the same class under the entry point group `quire.retention`. Reading parameters never imports
torch.
"""

from quire.retention.press import outside
from quire.retention.recipe import Keep, available, load_policy, parse_keep, shown

__all__ = ["Keep", "available", "load_policy", "outside", "parse_keep", "shown"]
