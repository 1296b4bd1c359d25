"""quire tour: what its panels say is what the store, the formula and the evaluation say, in every kind of output."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lossy import Lossy
from quire.cli import tour
from quire.cli.tour import memory, techniques
from quire.cli.tour.page import Page, bar, columns
from quire.cli.tour.stage import Pace
from quire.codecs import recipe
from quire.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")

PACE = Pace(
    steps=4,
    same_tokens=6,
    points=3,
    longest_tokens=48,
    point_tokens=3,
    sequences=3,
    common_tokens=21,
    room_tokens=240,
    window_tokens=96,
    speed_tokens=20,
    speed_steps=3,
)


REGISTRY = recipe.available
PLAIN = ("bf16", "fp16", "fp32", "fp64")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small panels, and of the registry the plain codecs, so that what lands in it later changes no test here."""
    monkeypatch.setattr(tour, "PACE", PACE)
    monkeypatch.setattr(recipe, "available", lambda: PLAIN)


@pytest.fixture
def shown(quire, tiny: Path) -> Callable[..., Any]:
    """The tour through the tiny model; a small arena, because a large one has many of its small blocks to count."""

    def show(*arguments: object) -> Any:
        return quire("tour", *arguments, "--model", tiny, "--memory", "32MiB")

    return show


@pytest.fixture
def document(shown) -> Callable[..., Any]:
    def make(*arguments: object) -> Any:
        done = shown(*arguments, "--json")
        assert (done.code, done.err) == (0, "")
        return done.json

    return make


@dataclass(frozen=True)
class Several(Lossy):
    """A codec with recipes of its own choice."""

    name: ClassVar[str] = "several"
    shown: ClassVar[tuple[str, ...]] = ("several", "several:residual_tokens=32")


@dataclass(frozen=True)
class Refusing(Lossy):
    """A codec that serves heads of 64 channels only."""

    name: ClassVar[str] = "refusing"

    def stored(self, site: Any) -> Any:
        raise ConfigError(f"refusing: serves 64 channels, not {site.width}; try int8")


def add(monkeypatch: pytest.MonkeyPatch, **made: type) -> None:
    """As a file in the folder, or an entry point, would."""
    known, names = recipe.codec_class, tuple(sorted((*recipe.available(), *made)))
    monkeypatch.setattr(recipe, "available", lambda: names)
    monkeypatch.setattr(recipe, "codec_class", lambda n: made.get(n) or known(n))


# -- what the panels say -----------------------------------------------------------------------------------------


def test_the_step_table_is_that_of_run(document, quire, tiny: Path) -> None:
    found = document(1)["panels"]["steps"]
    theirs = quire(
        *("run", found["prompt"], "--model", tiny, "--max-tokens", 4, "--ignore-eos"),
        *("--trace", "--json"),
    ).json
    assert found["token_ids"] == theirs["requests"][0]["token_ids"]
    assert found["rows"] == [
        row | {"seconds": mine["seconds"]}
        for row, mine in zip(theirs["trace"], found["rows"], strict=True)
    ]
    n = found["prompt_tokens"]
    assert found["computed"] == n + 3
    assert found["computed_without_cache"] == n + (n + 1) + (n + 2) + (n + 3)
    assert found["kv_bytes"] == theirs["kv_bytes_end"] > 0


def test_tokens_are_identical_with_and_without(document, greedy) -> None:
    found = document(2)["panels"]["growth"]
    assert found["identical"] is True
    assert found["token_ids"] == found["without_token_ids"] == greedy("A cache is a log.", 6)
    assert found["identical_points"] == 3
    assert [p["context"] for p in found["points"]] == [16, 32, 48]
    assert all(p["with_s"] > 0 and p["without_s"] > 0 for p in found["points"])
    assert found["left_out"] == []


def test_a_cache_that_lies_is_not_called_identical(document, shown, monkeypatch) -> None:
    from quire.models.runner import NoCacheRunner

    honest = NoCacheRunner.forward

    def forward(self, items, adapter=None):
        logits = honest(self, items, adapter)
        if items[0].stop >= 20:
            logits[:, 11] += 1e3
        return logits

    monkeypatch.setattr(NoCacheRunner, "forward", forward)
    found = document(2)["panels"]["growth"]
    assert found["identical"] is False
    assert found["identical_points"] < 3
    said = " ".join(shown(2).out.split())
    assert f"is the same for {found['same_tokens']} of 6 tokens" in said
    assert "are identical" not in said


def test_a_slow_machine_leaves_points_out_and_says_so(shown, monkeypatch) -> None:
    monkeypatch.setattr(tour, "PACE", replace(PACE, curve_s=0.0, techniques_s=0.0))
    found = shown(2, 5, "--json").json["panels"]
    assert found["growth"]["points"] == []
    assert found["growth"]["left_out"] == [16, 32, 48]
    assert [r["technique"] for r in found["techniques"]["rows"]] == ["auto"]
    assert found["techniques"]["left_out"] == ["bf16", "fp16"]
    said = shown(2, 5).out
    assert "Left out to save time: 16, 32, 48 tokens." in said
    assert "Left out to save time: bf16, fp16." in said


def test_when_all_of_it_takes_long_lossy_codecs_come_first(shown, monkeypatch) -> None:
    add(monkeypatch, lossy=Lossy)
    monkeypatch.setattr(tour, "PACE", replace(PACE, total_s=0.0))
    found = shown(2, 5, "--json").json["panels"]
    assert found["growth"]["left_out"] == [16, 32, 48]
    assert [r["technique"] for r in found["techniques"]["rows"]] == ["auto"]
    assert found["techniques"]["left_out"] == ["lossy", "bf16", "fp16"]


def test_the_formula_is_the_model_s_and_the_bytes_are_the_pool_s(document, tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    shape = (
        config["num_hidden_layers"],
        config["num_key_value_heads"],
        config["head_dim"],
    )
    per_token = shape[0] * shape[1] * shape[2] * 2 * 4
    found = document(3, "--block-tokens", 8)["panels"]["formula"]
    assert found["bytes_per_token"] == per_token
    assert [r["tokens"] for r in found["rows"]] == [1, 8, 9, 28, 128]
    for r in found["rows"]:
        blocks = -(-r["tokens"] // 8)
        assert r["formula_bytes"] == r["tokens"] * per_token
        assert r["blocks"] == blocks
        assert r["held_bytes"] == blocks * 8 * per_token
        assert r["empty_places"] == blocks * 8 - r["tokens"]
        assert r["open_bytes"] == r["empty_places"] * per_token
        assert r["other_bytes"] == r["left_bytes"] == 0


def test_the_formula_s_panel_asks_the_pool(document, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that hands out more than it says is found out."""
    from quire.store.store import BlockStore

    honest = BlockStore.usage

    def usage(self):
        found = honest(self)
        return replace(found, held_bytes=found.held_bytes + 64 * len(self.tables))

    monkeypatch.setattr(BlockStore, "usage", usage)
    rows = document(3)["panels"]["formula"]["rows"]
    assert {r["held_bytes"] - r["formula_bytes"] - 256 * r["empty_places"] for r in rows} == {64}


def test_rooms_blocks_and_forks_are_what_stores_held(document) -> None:
    found = document(4, "--block-tokens", 8)["panels"]["memory"]
    tokens, common, per_token = found["tokens"], found["common_tokens"], 2 * 2 * 8 * 2 * 4
    assert len(set(tokens)) == 3
    assert common == 21
    rooms, blocks, shared = found["ways"]
    whole = sum(-(-n // 8) for n in tokens)
    assert rooms["held_bytes"] == 3 * 240 * per_token
    assert blocks["held_bytes"] == whole * 8 * per_token
    assert shared["held_bytes"] == (whole - 2 * (common // 8)) * 8 * per_token
    assert rooms["used_bytes"] == blocks["used_bytes"] == sum(tokens) * per_token
    assert shared["used_bytes"] == (sum(tokens) - 2 * (common // 8) * 8) * per_token
    assert rooms["computed_tokens"] == blocks["computed_tokens"] == sum(tokens)
    assert shared["computed_tokens"] == sum(tokens) - 2 * common
    assert found["same_next_tokens"] is True
    assert found["logit_difference"] < 1e-3
    assert found["logit_spread"] > 0.1


def test_what_forks_read_is_compared(document, quire, tiny, monkeypatch) -> None:
    """Forks that share the wrong blocks are found out by their logits."""
    from quire.store.table import BlockTable

    honest = BlockTable.fork

    def fork(self):
        twin = honest(self)
        for chain in twin.chains:
            chain.ids[: chain.count] = chain.ids[: chain.count][::-1].copy()
        return twin

    monkeypatch.setattr(BlockTable, "fork", fork)
    assert document(4, "--block-tokens", 8)["panels"]["memory"]["logit_difference"] > 0.1


def test_ways_that_disagree_are_said_to(shown, monkeypatch) -> None:
    honest = memory._compute

    def compute(runner, table, tokens):
        forked = table.length > 0
        n, logits = honest(runner, table, tokens)
        return n, logits.flip(0) if forked else logits

    monkeypatch.setattr(memory, "_compute", compute)
    said = " ".join(shown(4).out.split())
    assert "Not all ways name the same next token" in said


# -- techniques --------------------------------------------------------------------------------------------------


def test_rows_are_those_of_an_evaluation(document, quire, tiny: Path, tmp_path: Path) -> None:
    from quire.cli.tour.stage import tour_text

    found = document(5)["panels"]["techniques"]
    assert [r["technique"] for r in found["rows"]] == ["auto", "bf16", "fp16"]
    assert found["wider_than_the_model"] == ["fp64"]
    exact, bf16, _ = found["rows"]
    assert (exact["codec"], exact["kl"], exact["agreement"]) == ("fp32", 0.0, 1.0)
    assert exact["bytes_per_token"] == 2 * bf16["bytes_per_token"] > 0
    assert bf16["kl"] > 0
    text = tmp_path / "text"
    text.write_text(tour_text())
    theirs = quire(
        *("eval", tiny, "--kv", "bf16", "--text", text, "--length", 96, "--max-tokens", 96),
        "--json",
    ).json["rows"]
    by_metric = {r["metric"]: r for r in theirs}
    assert bf16["kl"] == by_metric["kl"]["value"]
    assert bf16["agreement"] == by_metric["agreement"]["value"]
    assert bf16["bytes_per_token"] == by_metric["kl"]["bytes_per_token"]
    assert all(r["tokens_per_s"] > 0 for r in found["rows"])


def test_a_new_codec_gets_its_rows_by_itself(document, shown, monkeypatch) -> None:
    add(monkeypatch, lossy=Lossy, several=Several)
    found = document(5)["panels"]["techniques"]
    rows = {r["technique"]: r for r in found["rows"]}
    assert set(rows) == {
        *("auto", "bf16", "fp16", "lossy", "several", "several:residual_tokens=32"),
    }
    assert next(iter(rows)) == "auto"
    sizes = [r["bytes_per_token"] for r in found["rows"][1:]]
    assert sizes == sorted(sizes, reverse=True)
    assert rows["lossy"]["kl"] > 0
    assert rows["several"]["kl"] == rows["lossy"]["kl"]
    assert rows["several:residual_tokens=32"]["kl"] < rows["lossy"]["kl"]
    assert re.search(
        r"^several:residual_tokens=32 +[\d,]+ +[\d.]+ % ",
        shown(5).out,
        re.MULTILINE,
    )


def test_every_codec_of_the_registry_has_its_rows(document, monkeypatch) -> None:
    monkeypatch.setattr(recipe, "available", REGISTRY)
    found = document(5)["panels"]["techniques"]
    rows = {r["technique"] for r in found["rows"]} | {r["technique"] for r in found["refused"]}
    rows |= set(found["left_out"]) | set(found["wider_than_the_model"])
    asked = [getattr(recipe.codec_class(n), "shown", (n,)) for n in REGISTRY() if n != "fp32"]
    assert {"kivi:bits=2", "kivi:bits=4"} <= rows
    assert rows == {"auto", *(text for texts in asked for text in texts)}


def test_a_codec_that_cannot_serve_says_why(document, shown, monkeypatch) -> None:
    add(monkeypatch, refusing=Refusing)
    found = document(5)["panels"]["techniques"]
    assert [r["technique"] for r in found["rows"]] == ["auto", "bf16", "fp16"]
    assert found["refused"] == [
        {"technique": "refusing", "reason": "refusing: serves 64 channels, not 8; try int8"}
    ]
    said = " ".join(shown(5).out.split())
    assert "refusing: not for this model: refusing: serves 64 channels, not 8; try int8" in said


def test_a_codec_that_was_never_read_decoded_has_no_figures(document, monkeypatch) -> None:
    """Its residual window is longer than the text: zero loss would be no merit."""

    @dataclass(frozen=True)
    class Long(Lossy):
        name: ClassVar[str] = "long"
        shown: ClassVar[tuple[str, ...]] = ("long:residual_tokens=128",)

    add(monkeypatch, long=Long)
    (refused,) = document(5)["panels"]["techniques"]["refused"]
    assert refused["technique"] == "long:residual_tokens=128"
    assert "no query would read a decoded position" in refused["reason"]


def test_an_installed_package_that_does_not_import_is_one_line(document, monkeypatch) -> None:
    known = recipe.codec_class

    def codec_class(name: str) -> Any:
        if name == "broken":
            raise ImportError("No module named 'cupy'")
        return known(name)

    names = (*recipe.available(), "broken")
    monkeypatch.setattr(recipe, "available", lambda: names)
    monkeypatch.setattr(recipe, "codec_class", codec_class)
    (refused,) = document(5)["panels"]["techniques"]["refused"]
    assert refused["reason"] == "cannot be imported: No module named 'cupy'"


def test_policies_that_name_themselves_get_rows(document, monkeypatch) -> None:
    made = types.ModuleType("quire.retention")
    made.shown = lambda: ("h3o",)  # type: ignore[attr-defined]
    made.__spec__ = types.SimpleNamespace(name="quire.retention")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "quire.retention", made)
    (refused,) = document(5)["panels"]["techniques"]["refused"]
    assert refused["technique"] == "h3o"
    assert "unknown policy 'h3o'" in refused["reason"]


@pytest.mark.parametrize(
    ("dtype", "chosen", "wider"),
    [
        ("float32", ["bf16", "fp16"], ["fp64"]),
        ("bfloat16", ["fp16"], ["fp32", "fp64"]),
        ("float64", ["bf16", "fp16", "fp32"], []),
    ],
)
def test_no_row_for_the_same_numbers_in_more_bytes(
    dtype: str, chosen: list[str], wider: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = ("bf16", "fp16", "fp32", "fp64")
    monkeypatch.setattr(recipe, "available", lambda: plain)
    assert techniques.techniques(dtype) == ([(c, "full") for c in chosen], wider, [])


# -- how it looks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_a_file_gets_plain_lines_of_its_width(
    quire, tiny: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, lossy=Lossy, several=Several, refusing=Refusing)
    monkeypatch.setenv("COLUMNS", str(width))
    link = tiny.parent / "m"  # a short name: a path is never broken
    if not link.exists():
        link.symlink_to(tiny)
    monkeypatch.chdir(tiny.parent)
    done = quire("tour", "--model", "m", "--memory", "32MiB")
    assert (done.code, done.err) == (0, "")
    assert "\x1b" not in done.out
    assert "\r" not in done.out
    lines = done.out.split("\n")
    assert max(map(len, lines)) == width, "the headings reach the edge, and nothing goes beyond"
    assert all(line == line.rstrip() for line in lines)
    headings = [line for line in lines if "──" in line]
    assert [h[:2] for h in headings] == ["1 ", "2 ", "3 ", "4 ", "5 "]
    assert ("KL, 95 % interval" in done.out) is (width == 120)


def test_every_panel_ends_with_a_command_that_runs(quire, tiny: Path, document, shown) -> None:
    text = shown().out
    told = re.findall(r"^more: (.*(?:\\\n.*)*)$", text.replace("\\\n      ", ""), re.MULTILINE)
    panels = document()["panels"]
    commands = [panel["more"] for panel in panels.values()]
    assert [shlex.split(c) for c in told] == [shlex.split(c) for c in commands]
    assert len(commands) == 5
    assert len(set(commands)) == 5
    for command in commands:
        name, *arguments = shlex.split(command)
        assert name == "quire"
        assert str(tiny) in arguments
        done = quire(*arguments)
        assert done.code == 0, (command, done.err)
        assert done.out


def test_commands_of_the_page_and_the_readme_parse() -> None:
    import typer.main

    from quire.cli import app

    text = (ROOT / "docs" / "kv-cache.md").read_text() + (ROOT / "README.md").read_text()
    inline = [" ".join(c.split()) for c in re.findall(r"`(quire [^`]*)`", text)]
    blocks = [re.split(r" {3,}", c)[0] for c in re.findall(r"^(quire .*)$", text, re.MULTILINE)]
    commands = [c for c in inline + blocks if len(c.split()) > 1]
    known: Any = typer.main.get_command(app)
    assert len(commands) > 15
    for command in commands:
        name, *arguments = shlex.split(command)[1:]
        assert name in known.commands
        if arguments:  # else it only names the command
            known.commands[name].make_context(name, arguments)


def test_panels_by_number(shown) -> None:
    out = shown(4, 1).out
    assert [line[:1] for line in out.split("\n") if "──" in line] == ["1", "4"]


def test_the_document_is_all_there_is(document) -> None:
    found = document()
    assert list(found["panels"]) == ["steps", "growth", "formula", "memory", "techniques"]
    assert found["seconds"] > 0
    assert found["dtype"] == "float32"
    assert re.fullmatch(r"[0-9a-f]{64}", found["digest"])


def test_a_model_that_a_panel_cannot_show_says_so_there(shown, monkeypatch) -> None:
    monkeypatch.setattr(tour, "PACE", replace(PACE, room_tokens=12))
    done = shown(3, 4)
    assert done.code == 0
    assert "not shown here: no two pieces of the text fit" in done.out
    assert "held by the pool" in done.out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["9"], "there is no panel 9; known: 1 steps"),
        (["--dtype", "int4"], "unknown dtype 'int4'"),
        (["--memory", "1KiB"], "too small for one request"),
        (["--block-tokens", "0"], "block_tokens must be at least 1"),
        (["--kv", "bf16"], "No such option: --kv"),
    ],
)
def test_what_cannot_work_is_refused_before_weights(
    quire, tiny: Path, arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "quire.cli.prepare.load_model", lambda *_: pytest.fail("weights were about to be loaded")
    )
    done = quire("tour", *arguments, "--model", tiny)
    assert (done.code, done.out) == (2, "")
    assert says in done.err
    assert done.err.count("\n") == 1


def test_models_that_cannot_read_a_text(quire, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    import shutil

    monkeypatch.setattr(
        "quire.cli.prepare.load_model", lambda *_: pytest.fail("weights were about to be loaded")
    )
    mute = shutil.copytree(tiny, tmp_path / "mute")
    (mute / "tokenizer.json").unlink()
    assert "has no tokenizer and the tour reads texts" in quire("tour", "--model", mute).err
    foreign = shutil.copytree(tiny, tmp_path / "foreign")
    config = json.loads((tiny / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"vocab_size": 60}))
    assert "the model knows 60" in quire("tour", "--model", foreign).err
    short = shutil.copytree(tiny, tmp_path / "short")
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    assert "the context is 16" in quire("tour", "--model", short).err


# -- plots -------------------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_their_share() -> None:
    assert bar(1.0, 10) == "█" * 10
    assert bar(0.5, 10) == "█" * 5
    assert bar(0.55, 10) == "█████▌"
    assert bar(0.001, 10) == "▏", "something above zero shows"
    assert bar(0.0, 10) == ""
    assert bar(0.5, 10, plain=True) == "#####"


@pytest.mark.parametrize("plain", [False, True])
def test_two_charts_share_a_scale(plain: bool) -> None:
    rows = columns(
        [("a", [8.0, 16.0], "red"), ("b", [2.0, 4.0], "green")],
        [10, 20],
        width=80,
        rows=8,
        plain=plain,
    )
    text = [r.plain for r in rows]
    mark = "#" if plain else "█"
    runs = [re.findall(f"{mark}+", line) for line in text[1:-1]]
    assert [len(r) for r in runs] == [1, 1, 1, 1, 2, 2, 3, 4], "heights 4, 8, 1 and 2 of 8"
    assert text[1].lstrip().startswith("16 ms")
    assert text[-2].lstrip().startswith("0 ms")
    assert text[-1].split() == ["10", "20", "tokens", "10", "20", "tokens"]
    assert max(map(len, text)) <= 80


def test_without_block_elements_in_the_encoding_there_are_others() -> None:
    import io

    from rich.console import Console

    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert Page(Console(file=ascii_only)).plain
    assert not Page(Console(file=io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))).plain


# -- the real command --------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_ctrl_c_ends_it_with_one_line_that_stays() -> None:
    """stderr is a terminal, where a moving line may wipe others away. On a busy machine it is tried again."""
    for _ in range(4):
        code, shown = _interrupted()
        if code:
            break
    assert code == 130
    last = shown.rpartition("\x1b[2K")[2]  # what nothing wipes any more
    assert re.fullmatch(r"quire: interrupted( after \d+ tokens)?", ESCAPE.sub("", last).strip()), (
        last
    )


def _interrupted() -> tuple[int, str]:
    """Exit code and stderr of a tour that was interrupted in the middle, if the signal came in time."""
    import pty

    ours, theirs = pty.openpty()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QUIRE_", "COV"))}
    paths = [str(ROOT / "src"), kept.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "TERM": "xterm"}
    running = subprocess.Popen(
        [sys.executable, "-m", "quire.cli", "tour", "2"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=kept | more | {"COLUMNS": "80"},
    )
    os.close(theirs)
    shown, sent = b"", False
    try:
        while part := _read(ours):
            shown += part
            if not sent and b"with the cache and without" in shown:
                time.sleep(0.3)
                running.send_signal(signal.SIGINT)
                sent = True
        running.communicate(timeout=60)
    finally:
        running.kill()
        os.close(ours)
    return running.returncode, shown.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # nobody holds its other end any more
        return b""


@pytest.mark.parametrize(
    ("env", "colour", "escapes"),
    [
        ({"TERM": "xterm-256color"}, True, True),
        ({"TERM": "xterm-256color", "NO_COLOR": "1"}, False, True),
        ({"TERM": "dumb"}, False, False),
    ],
)
def test_a_terminal_gets_what_it_can_show(
    tiny: Path, env: dict[str, str], colour: bool, escapes: bool, monkeypatch
) -> None:
    """In this process, on a console that says it is a terminal."""
    import io

    from rich.console import Console

    for name in ("NO_COLOR", "TERM", "COLORTERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    page = Page(Console(file=file, force_terminal=True, width=80, height=25, highlight=False))
    page.heading("1  A panel")
    page.words("Some words", "yellow")
    page.table(("a", "b"), [("1", "2")])
    page.more("quire run 'a b'")
    text = file.getvalue()
    assert bool(re.search(r"\x1b\[(\d+;)*3[0-7]m", text)) is colour
    assert bool(ESCAPE.search(text)) is escapes
    assert max(len(line.rstrip()) for line in ESCAPE.sub("", text).split("\n")) == 80
