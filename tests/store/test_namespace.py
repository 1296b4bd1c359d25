"""Tenants: whose salt, what a declared prefix opens, and two of them under random requests."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import ConfigError, RequestError
from quire.store.namespace import Namespace, Tenants
from store.test_sharing import leave, made

SYSTEM = (1, 0, 0, 1, 1, 0, 1, 0, 1, 1)

prompts = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.one_of(
            st.lists(st.integers(0, 1), min_size=1, max_size=24),
            st.lists(st.integers(0, 1), min_size=1, max_size=14).map(lambda x: [*SYSTEM, *x]),
        ),
    ),
    min_size=2,
    max_size=12,
)


def agree(a: list[int], b: list[int]) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


@given(asked=prompts, declared=st.booleans())
def test_two_tenants_never_find_each_other(
    asked: list[tuple[str, list[int]]], declared: bool
) -> None:
    """A hit is what the tenant itself left, or lies within whole chunks of the declared prefix."""
    sharing = made()
    tenants = Tenants()
    if declared:
        tenants.declare("all", SYSTEM)
    left: dict[str, list[list[int]]] = {"a": [], "b": []}
    for who, ids in asked:
        found = leave(sharing, ids, tenants.of(who, group="all"))
        own = max((agree(ids[:-1], before) for before in left[who]), default=0)
        public = 8 if declared and tuple(ids[: len(SYSTEM)]) == SYSTEM else 0
        others = [x for part in left.values() for x in part]
        met = any(tuple(x[: len(SYSTEM)]) == SYSTEM for x in others)
        assert found <= max(own, public if met else 0)
        left[who].append(ids)


@given(asked=prompts)
def test_a_tenant_finds_all_that_it_left(asked: list[tuple[str, list[int]]]) -> None:
    """With room for everything, and as few siblings as here, nothing of its own is missed."""
    sharing, tenants = made(slabs=256), Tenants()
    left: dict[str, list[list[int]]] = {"a": [], "b": []}
    for who, ids in asked:
        found = leave(sharing, list(ids), tenants.of(who))
        assert found == max((agree(ids[:-1], before) for before in left[who]), default=0)
        left[who].append(ids)


def test_a_salt_follows_from_the_principal_and_the_secret() -> None:
    one, other = Tenants(b"0123456789abcdef"), Tenants(b"fedcba9876543210")
    assert one.of("key") == one.of("key")
    salts = {
        one.of("key").salt,
        one.of("key2").salt,
        other.of("key").salt,
        one.of("key", narrow="x").salt,
        one.of("key", narrow="y").salt,
        Tenants().of("key").salt,
        Tenants().of("key").salt,
        Namespace().salt,
    }
    assert len(salts) == 8
    assert b"key" not in one.of("key").salt


def test_narrowing_never_leads_to_another_tenant() -> None:
    sharing, tenants = made(), Tenants()
    ids = list(range(30))
    leave(sharing, ids, tenants.of("a", narrow="s"))
    assert leave(sharing, ids, tenants.of("b", narrow="s")) == 0
    assert leave(sharing, ids, tenants.of("a")) == 0
    assert leave(sharing, ids, tenants.of("a", narrow="s")) == 29


def test_only_members_share_what_their_group_declared() -> None:
    sharing, tenants = made(), Tenants()
    ids = list(range(30))
    tenants.declare("g", ids[:10])
    tenants.declare("g", ids[:10])
    leave(sharing, ids, tenants.of("a", group="g"))
    assert leave(sharing, ids, tenants.of("b", group="g")) == 8
    assert leave(sharing, ids, tenants.of("c")) == 0
    assert leave(sharing, ids, tenants.of("d", group="h")) == 0


def test_what_a_tenant_cannot_be() -> None:
    with pytest.raises(ConfigError, match="at least 16"):
        Tenants(b"short")
    with pytest.raises(RequestError, match="authenticated"):
        Tenants().of("")
