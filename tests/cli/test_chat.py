"""quire chat: what a turn does not recompute, and that keeping a cache changes no reply."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quire.engine.conversation import Conversation
from quire.errors import ConfigError

TURNS = ["Hello there", "and who are you", "good bye"]


def kept(err: str) -> list[tuple[int, int]]:
    """(not recomputed, new) of every turn."""
    found = re.findall(
        r"^([\d,]+) tokens not recomputed \(\d+ %\), ([\d,]+) new", err, re.MULTILINE
    )
    return [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in found]


def chat(quire, model: Path, turns: list[str], *flags: object):
    done = quire("chat", "--model", model, "--max-tokens", 9, *flags, stdin="\n".join(turns) + "\n")
    assert done.code == 0, done.err
    return done


@pytest.fixture(params=["plain", "template"])
def model(request: pytest.FixtureRequest, tiny: Path, tiny_chat: Path) -> Path:
    return tiny if request.param == "plain" else tiny_chat


def test_a_turn_computes_only_what_is_new(quire, model: Path) -> None:
    done = chat(quire, model, TURNS)
    assert len(done.out.splitlines()) == 3
    turns = kept(done.err)
    assert turns[0][0] == 0
    for before, after in pairwise(turns):
        # everything that was in the cache: the last prompt and all of the reply but its last token
        assert after[0] == sum(before) + 9 - 1
        assert after[1] < 50
    total = sum(a + b for a, b in turns)
    assert f"in all {sum(a for a, _ in turns)} of {total} prompt tokens were not" in done.err


def test_replies_are_those_of_a_cache_without_memory(quire, model: Path) -> None:
    """--kv none recomputes every turn: the same words must come out."""
    assert chat(quire, model, TURNS).out == chat(quire, model, TURNS, "--kv", "none").out
    assert kept(chat(quire, model, TURNS, "--kv", "none").err)[1][0] == 0


def test_a_session_goes_on_where_it_stopped(quire, model: Path, tmp_path: Path) -> None:
    whole = chat(quire, model, TURNS)
    file = tmp_path / "talk.quire"
    first = chat(quire, model, TURNS[:2], "--session", file)
    assert f"saved to {file}: 2 turns" in first.err
    again = quire("chat", "--model", model, "--session", file, stdin=TURNS[2] + "\n/exit\nnever\n")
    assert again.code == 0, again.err
    assert "resumed" in again.err
    assert first.out + again.out == whole.out, "max_tokens came from the file, too"
    assert kept(again.err) == kept(whole.err)[2:]


def test_a_session_without_a_model_flag_finds_its_model(quire, tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.quire"
    chat(quire, tiny, TURNS[:1], "--session", file, "--system", "be brief", "--kv", "bf16")
    done = quire("chat", "--session", file, stdin="more\n")
    assert done.code == 0, done.err
    assert kept(done.err)[0][0] > 0


def test_a_session_of_another_model_or_codec_is_refused(
    quire, tiny: Path, tiny_twin: Path, tiny_chat: Path, tmp_path: Path
) -> None:
    file = tmp_path / "talk.quire"
    chat(quire, tiny, TURNS[:1], "--session", file)
    before = file.read_bytes()
    for flags, says in [
        (("--model", tiny_twin), f"belongs to the model {tiny}, this is {tiny_twin}"),
        (("--kv", "bf16"), "--kv auto"),
        (("--block-tokens", 8), "was made with --block-tokens 32, not 8"),
        (("--system", "x"), "was made with --system None, not x"),
    ]:
        done = quire("chat", "--session", file, *flags, stdin="hi\n")
        assert (done.code, done.out) == (2, "")
        assert says in done.err
        assert done.err.count("\n") <= 2
        assert "Traceback" not in done.err
    assert file.read_bytes() == before


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "foreign"])
def test_a_damaged_session_is_refused(quire, tiny: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "talk.quire"
    chat(quire, tiny, TURNS[:1], "--session", file)
    data = bytearray(file.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[-5000] ^= 1
    elif damage == "text":
        data = bytearray(b"hello\n")
    else:
        data = bytearray((tiny / "model.safetensors").read_bytes())
    file.write_bytes(data)
    done = quire("chat", "--model", tiny, "--session", file, stdin="hi\n")
    assert (done.code, done.out) == (2, "")
    last = done.err.rstrip("\n").split("\n")[-1]
    assert last.startswith("quire: ")
    assert str(file) in last
    assert file.read_bytes() == bytes(data), "what is there is not overwritten"


class Lines(io.StringIO):
    """Stdin on which something happens before the second line is read."""

    def __init__(self, text: str, between: Callable[[], object]) -> None:
        super().__init__(text)
        self.between, self.read_before = between, False

    def readline(self, size: int | None = -1) -> str:
        if self.read_before:
            self.between()
        self.read_before = True
        return super().readline(-1 if size is None else size)


@pytest.mark.parametrize("there_before", [True, False])
def test_two_conversations_in_one_file_lose_no_turn(
    quire, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there_before: bool
) -> None:
    file, other = tmp_path / "talk.quire", tmp_path / "other.quire"
    chat(quire, tiny, ["something else"], "--session", other)
    if there_before:
        chat(quire, tiny, TURNS[:1], "--session", file)
    theirs = other.read_bytes()
    monkeypatch.setattr(sys, "stdin", Lines("more\n", lambda: shutil.copy(other, file)))
    done = quire("chat", "--model", tiny, "--session", file)
    assert done.code == 0, done.err
    assert "written by somebody else meanwhile" in done.err
    assert file.read_bytes() == theirs
    [aside] = set(tmp_path.iterdir()) - {file, other}
    assert f"saved to {aside}" in done.err.replace("\n", "")
    resumed = quire("chat", "--session", aside, stdin="and\n")
    assert f"resumed {aside}: {1 + there_before} turns" in resumed.err.replace("\n", "")


def test_a_save_that_fails_ends_no_conversation(
    quire, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, tries = tmp_path / "talk.quire", []
    save = Conversation.save

    def full_once(self: Conversation, *arguments: Any) -> None:
        tries.append(arguments)
        if len(tries) == 1:
            raise ConfigError("no space left")
        save(self, *arguments)

    monkeypatch.setattr(Conversation, "save", full_once)
    done = chat(quire, tiny, [TURNS[0], "/save", TURNS[1]], "--session", file)
    assert "not saved: no space left" in done.err
    assert "2 turns" in done.err
    assert file.exists()
    tries.clear()
    done = quire("chat", "--session", file, stdin="more\n")
    assert done.code == 2, "what was said is not in the file"


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_said(
    quire, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    done = quire("chat", "--model", tiny, "--session", tmp_path / "s", stdin="hello\n")
    assert (done.code, done.out) == (2, "")
    assert f"the folder {tmp_path} cannot be written" in done.err


def test_reset_forgets(quire, tiny: Path) -> None:
    done = chat(quire, tiny, [TURNS[0], "/reset", TURNS[0], "/help", "/nonsense", "/save"])
    first, second = done.out.splitlines()
    assert first == second
    assert [a for a, _ in kept(done.err)] == [0, 0]
    assert "unknown command /nonsense; known: /reset" in done.err
    assert "/exit    leave" in done.err
    assert "start with --session FILE" in done.err


def test_a_full_context_is_said_and_survived(quire, tiny: Path) -> None:
    done = quire(
        *("chat", "--model", tiny, "--max-tokens", 9), stdin=f"{'x' * 300}\n/reset\nhello\n"
    )
    assert done.code == 2
    assert "tokens and the context 256" in done.err
    assert "/reset begins anew" in done.err
    assert len(done.out.splitlines()) == 1


def test_ctrl_c_stops_a_reply_and_stays(quire, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = chat(quire, tiny, TURNS[:2])
    whole = done.out.splitlines()[0]
    _interrupt_step(monkeypatch, 4)
    done = chat(quire, tiny, TURNS[:2])
    first, second = done.out.splitlines()
    assert whole.startswith(first)
    assert 0 < len(first) < len(whole)
    assert "written until Ctrl-C" in done.err
    assert kept(done.err)[1][0] >= kept(done.err)[0][1], "the broken turn stays in the cache"
    assert second


def _interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """SIGINT during that forward of the conversation (the self-test's come before and do not count)."""
    from quire.engine.conversation import Conversation
    from quire.models.runner import ModelRunner

    stream, forward = Conversation.stream, ModelRunner.forward
    talking: list[bool] = []
    steps: list[int] = []

    def started(self, tokens, params=None):
        talking.append(True)
        return stream(self, tokens, params)

    def interrupted(self, items, adapter=None):
        if talking:
            steps.append(items[0].stop)
            if len(steps) == number:
                os.kill(os.getpid(), signal.SIGINT)
        return forward(self, items, adapter)

    monkeypatch.setattr(Conversation, "stream", started)
    monkeypatch.setattr(ModelRunner, "forward", interrupted)


def test_a_cache_that_cannot_go_back_is_computed_anew(
    quire, tiny_chat: Path, tmp_path: Path
) -> None:
    """A template that rewrites the past, over a window that has moved on."""
    folder = shutil.copytree(tiny_chat, tmp_path / "m")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    path.write_text(json.dumps(config | {"sliding_window": 8}))
    (folder / "chat_template.jinja").write_text(
        "begin: {% for m in messages %}{{ m['content'] | upper if loop.last else m['content'] }}|{% endfor %}"
    )
    turns = ["a question that is longer than a window", "again"]
    done = chat(quire, folder, turns, "--block-tokens", 4)
    assert "computed from the start: cannot go back to" in done.err
    assert done.out == chat(quire, folder, turns, "--kv", "none").out


def test_a_beginning_is_found_in_a_tier_after_a_restart(quire, tiny: Path, tmp_path: Path) -> None:
    """Another process, no session: what the last one computed comes from the disk, and the replies are the same."""
    flags = ["--tiers", f"disk:8MiB@{tmp_path}/tier", "--block-tokens", 16]
    plain = chat(quire, tiny, TURNS, "--block-tokens", 16)
    first = chat(quire, tiny, TURNS, *flags)
    again = chat(quire, tiny, TURNS, *flags)
    assert plain.out == first.out == again.out
    assert kept(first.err) == kept(plain.err), "within a conversation nothing is looked up"
    assert kept(first.err)[0][0] == 0 < kept(again.err)[0][0]
    assert kept(again.err)[1:] == kept(first.err)[1:]


def test_a_conversation_is_found_after_a_reset(quire, tiny: Path) -> None:
    turns = [TURNS[0], "/reset", TURNS[0]]
    flags = ["--tiers", "host:8MiB", "--block-tokens", 16]
    done = chat(quire, tiny, turns, *flags)
    one, two = done.out.splitlines()
    assert one == two
    assert kept(done.err)[1][0] > 0


@pytest.mark.parametrize(
    ("tiers", "flags", "why"),
    [
        ("host:8MiB;offload=on", [], "a conversation stays within it"),
        ("host:8MiB", ["--kv", "none"], "drop one of them"),
        ("tape:8MiB", [], "tape"),
    ],
)
def test_tiers_of_no_use_are_refused(quire, tiny: Path, tiers: str, flags: list, why: str) -> None:
    done = quire("chat", "--model", tiny, "--tiers", tiers, *flags, stdin="")
    assert done.code != 0
    assert why in done.err
