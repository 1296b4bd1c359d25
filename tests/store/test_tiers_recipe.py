"""`tiers=` as text: what is read, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quire.errors import ConfigError
from quire.store.tiers import recipe as module
from quire.store.tiers.address import RedisAddress
from quire.store.tiers.checked import Checked
from quire.store.tiers.disk import DiskTier
from quire.store.tiers.host import HostTier
from quire.store.tiers.recipe import TierRecipe, divided, open_tiers, parse_tiers


def test_what_is_read() -> None:
    found = parse_tiers(" host:8GiB, disk:1.5GB@/var/cache/a b ; deadline=0.25;sync=batch")
    assert found.tiers == (
        TierRecipe("host", 8 << 30),
        TierRecipe("disk", 1_500_000_000, "/var/cache/a b"),
    )
    assert (found.deadline_s, found.sync, found.on, found.persistent) == (0.25, "batch", True, True)
    assert not parse_tiers("").on
    assert not parse_tiers("none").on
    assert not parse_tiers("host:1MiB").persistent


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("host", "is not KIND:SIZE"),
        ("host:", "is not KIND:SIZE"),
        ("host:8GiB,", "is not KIND:SIZE"),
        ("host:x", "is not KIND:SIZE"),
        ("tape:8GiB", "unknown tier 'tape'; known: host, disk, redis"),
        ("host:8GiX", "unknown unit 'GiX'"),
        ("host:8", "did you mean 8GiB?"),
        ("host:1GiB@/x", "drop @/x"),
        ("disk:1GiB", "needs a folder, disk:1GiB@/path"),
        ("host:1GiB,host:2GiB", "one host tier"),
        ("disk:1GiB@/x,host:1GiB", "before all others"),
        ("disk:1GiB@/x,disk:1GiB@/x", "cannot share a place"),
        ("host:1GiB;deadline=0", "seconds above 0"),
        ("host:1GiB;deadline=soon", "seconds above 0"),
        ("host:1GiB;sync=batch", "there is none"),
        ("disk:1GiB@/x;sync=never", "batch or close"),
        ("host:1GiB;color=red", "known: deadline, sync"),
        (";deadline=1", "without a tier"),
        ("redis:1GiB", "needs a server, redis:1GiB@HOST:PORT"),
        ("redis:1GiB@", "is not KIND:SIZE"),
        ("redis:1GiB@host:many", "is no Redis address"),
        ("redis:1GiB@host:70000", "is no Redis address"),
        ("redis:1GiB@host/zero", "the database is a number, not 'zero'"),
        ("redis:1GiB@http://host", "unknown scheme http://"),
        ("redis:1GiB@redis://", "it names no host"),
        ("redis:1GiB@unix://host/path", "unix:///run/redis.sock"),
        ("redis:1GiB@redis://host?ca=x", "unknown option 'ca'"),
        ("redis:1GiB@rediss://host?color=red", "unknown option 'color'"),
        ("redis:1GiB@a,redis:2GiB@a:6379", "cannot share a place"),
    ],
)
def test_what_is_refused(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tiers(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("here", RedisAddress("here")),
        ("10.0.0.1:7000/3", RedisAddress("10.0.0.1", 7000, 3)),
        ("[::1]:7000", RedisAddress("::1", 7000)),
        ("redis://ann@here", RedisAddress("here", username="ann")),
        ("ann:p@here:1", RedisAddress("here", 1, username="ann", password="p")),
        (
            "redis://ann:p%40%2C%3B@here/2",
            RedisAddress("here", db=2, username="ann", password="p@,;"),
        ),
        ("rediss://:p@here", RedisAddress("here", tls=True, password="p")),
        (
            "rediss://here:1?ca=/a.pem&cert=/b&key=/c",
            RedisAddress(
                "here",
                1,
                tls=True,
                files=(("ssl_ca_certs", "/a.pem"), ("ssl_certfile", "/b"), ("ssl_keyfile", "/c")),
            ),
        ),
        ("unix:///run/redis.sock?db=4", RedisAddress("", path="/run/redis.sock", db=4)),
    ],
)
def test_addresses_of_redis(text: str, address: RedisAddress) -> None:
    (tier,) = parse_tiers(f"redis:2GiB@{text};deadline=0.5").tiers
    assert tier == TierRecipe("redis", 2 << 30, str(address), address)


def test_a_password_from_elsewhere_is_for_who_names_none() -> None:
    config = parse_tiers("redis:1GiB@a,redis:1GiB@redis://:own@b", password="given")
    assert [t.address.password for t in config.tiers if t.address] == ["given", "own"]
    assert config.persistent


@pytest.mark.parametrize(
    "text",
    [
        "redis:1GiB@redis://u:hidden@host:x",
        "redis:1GiB@u:hidden@host:x",
        "redis:1GiB@u:hid,den@host,host:1GiB",
        "redis:1@u:hidden@host",
        "redis:1GiB@redis://u:hid,den@host",
        "redis:1GiB@redis://u:hid;den@host",
        "redis:1GiB@redis://u:hid@den@host/x",
        "redis:1@redis://u:hidden@host",
        "redis:1XiB@redis://u:hidden@host",
        "redis:1GiB@redis://u:hidden@host;deadline=0",
        "host:1GiB,tape:1GiB@redis://u:hidden@host,host:2GiB",
        "host:1GiB,disk:1MiB@/x,redis:1@redis://u:hid,den@host",
    ],
)
def test_no_message_holds_a_password(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_tiers(text)
    assert "hid" not in str(caught.value)
    assert "den" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_rest_of_a_recipe_stays_readable() -> None:
    found = parse_tiers("host:1GiB,redis:1GiB@redis://u:p@h,disk:1MiB@/a b;deadline=2")
    assert found.text == "host:1GiB,redis:1GiB@redis://u:***@h,disk:1MiB@/a b;deadline=2"


def test_several_caches_divide_tiers() -> None:
    text = "host:8MiB,disk:1GiB@/var/x y,redis:2GiB@redis://u:p@h;deadline=2"
    found = divided(text, "one", 4)
    assert found == ("host:2097152,disk:268435456@/var/x y/one,redis:2GiB@redis://u:p@h;deadline=2")
    assert parse_tiers(found).deadline_s == 2
    with pytest.raises(ConfigError, match="131,072 bytes of host are too few for 4 models"):
        divided("host:128KiB", "one", 4)


def test_tiers_of_others_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, str]] = []

    def make(capacity_bytes: int, place: str) -> Any:
        made.append((capacity_bytes, place))
        return HostTier(capacity_bytes)

    entry = SimpleNamespace(name="shelf", load=lambda: make)
    monkeypatch.setattr(module, "_others", lambda: {"shelf": entry})
    (tier,) = open_tiers(parse_tiers("shelf:1MiB@there"))
    assert isinstance(tier, Checked)
    assert made == [(1 << 20, "there")]


def test_none_stays_open_where_one_cannot_be_had(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter").touch()
    with pytest.raises(ConfigError, match="not a tier's"):
        open_tiers(parse_tiers(f"disk:1MiB@{tmp_path}/a,disk:1MiB@{tmp_path}/b"))
    DiskTier(tmp_path / "a", 1 << 20).files.close()  # its lock was given back


def test_a_folder_has_one_secret(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "t", 1 << 20)
    secret = tier.secret()
    assert len(secret) == 32
    assert tier.secret() == secret
    path = tmp_path / "t" / "secret"
    assert path.stat().st_mode & 0o77 == 0
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        tier.secret()
    tier.files.close()
