"""A table over many turns: kept where it can be, computed anew where it cannot, and the same tokens either way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from quire.engine import Engine, SamplingParams
from quire.engine.conversation import Conversation
from quire.errors import CapacityError, RequestError, TierError
from quire.models.open import open_runner
from quire.store.snapshot import read_snapshot
from zoo.core import build

GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
FIRST = [5, 9, 17, 3, 44, 21, 8, 30, 2, 61, 12]
NEXT = [7, 13, 90]


@pytest.fixture
def opened(request: pytest.FixtureRequest) -> Iterator[Any]:
    runner = open_runner(build(request.param), memory=1 << 22, block_tokens=4)
    yield runner
    bridge = getattr(runner, "bridge", None)
    if bridge is not None:
        bridge.close()


def say(conversation: Conversation, tokens: list[int]) -> list[int]:
    return [t for d in conversation.stream(tokens, GREEDY) for t in d.token_ids]


def alone(runner: Any, tokens: list[int]) -> list[int]:
    with Engine(runner) as engine:
        return engine.generate([tokens], GREEDY)[0].token_ids


@pytest.mark.parametrize("opened", ["llama", "mistral", "bamba"], indirect=True)
def test_later_turns_compute_only_what_is_new(opened: Any) -> None:
    talk = Conversation(opened)
    tokens, held = list(FIRST), 0
    for _ in range(3):
        reply = say(talk, tokens)
        assert reply == alone(opened, tokens)
        assert talk.tokens == tokens + reply[:-1], "the last token is not in the cache yet"
        assert talk.reuse.kept_tokens == held
        assert talk.reuse.new_tokens == len(tokens) - held
        held = len(talk.tokens)
        tokens += reply + NEXT
    talk.close()
    assert opened.usage().held_bytes == 0


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_changed_past_goes_back_to_the_common_beginning(opened: Any) -> None:
    talk = Conversation(opened)
    say(talk, FIRST)
    other = [*FIRST[:6], 70, 71, 72]
    assert say(talk, other) == alone(opened, other)
    assert talk.reuse == type(talk.reuse)(6, 3)
    assert say(talk, FIRST[:5]) == alone(opened, FIRST[:5])
    assert talk.reuse.kept_tokens == 4, "one token is always left to compute"


@pytest.mark.parametrize("opened", ["mistral", "bamba"], indirect=True)
def test_a_cache_that_cannot_go_back_begins_anew_and_says_so(opened: Any) -> None:
    talk = Conversation(opened)
    say(talk, FIRST * 3)
    other = [*FIRST, 70, 71]
    assert say(talk, other) == alone(opened, other)
    assert talk.reuse.kept_tokens == 0
    assert talk.reuse.reason is not None
    assert "go back" in talk.reuse.reason


@pytest.mark.parametrize("opened", ["mamba"], indirect=True)
def test_a_model_of_whole_prompts_begins_anew(opened: Any) -> None:
    talk = Conversation(opened)
    tokens = FIRST + say(talk, FIRST) + NEXT
    assert say(talk, tokens) == alone(opened, tokens)
    assert talk.reuse.reason == "this model must compute a prompt as a whole"


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_turn_that_is_left_keeps_what_it_computed(opened: Any) -> None:
    talk = Conversation(opened)
    got: list[int] = []
    with closing(talk.stream(FIRST, GREEDY)) as turn:
        for delta in turn:
            got += delta.token_ids
            if len(got) == 3:
                break
    assert talk.tokens == FIRST + got[:2]
    tokens = FIRST + got + NEXT
    assert say(talk, tokens) == alone(opened, tokens)
    assert talk.reuse.kept_tokens == len(FIRST) + 2


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_step_that_breaks_leaves_what_was_final(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Conversation(opened)
    forward, steps = type(opened).forward, []

    def broken(self: Any, items: Any, adapter: Any = None) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return forward(self, items, adapter)

    monkeypatch.setattr(type(opened), "forward", broken)
    got: list[int] = []
    turn = talk.stream(FIRST, GREEDY)
    for delta in turn:
        got += delta.token_ids
        if len(got) == 3:
            break
    with pytest.raises(KeyboardInterrupt):
        next(turn)
    assert talk.tokens == FIRST + got[:2]
    assert talk.table.length == len(talk.tokens)
    tokens = FIRST + got + NEXT
    assert say(talk, tokens) == alone(opened, tokens)


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_refused_turn_changes_nothing(opened: Any) -> None:
    talk = Conversation(opened)
    reply = say(talk, FIRST)
    before = list(talk.tokens)
    with pytest.raises(RequestError, match="empty"):
        say(talk, [])
    with pytest.raises((RequestError, CapacityError)):
        say(talk, FIRST * 1000)
    assert talk.tokens == before
    assert say(talk, FIRST + reply + NEXT)
    assert talk.reuse.kept_tokens == len(before)


@pytest.mark.parametrize("opened", ["llama", "mistral", "bamba"], indirect=True)
def test_a_saved_conversation_goes_on_in_another_process_s_cache(
    opened: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    talk = Conversation(opened)
    tokens = FIRST + say(talk, FIRST) + NEXT
    talk.save(tmp_path / "s")
    want = say(talk, tokens)
    kept = talk.reuse
    name = request.node.callspec.params["opened"]
    other = open_runner(build(name), memory=1 << 22, block_tokens=4)
    again = Conversation(other)
    say(again, NEXT)  # something else is there, and goes
    again.restore(read_snapshot(tmp_path / "s"))
    assert say(again, tokens) == want
    assert again.reuse == kept
    again.close()
    assert other.usage().held_bytes == 0
    other.bridge.close()


@pytest.mark.parametrize("opened", ["llama"], indirect=True)
def test_a_file_whose_tokens_do_not_fit_its_cache(opened: Any, tmp_path: Path) -> None:
    talk = Conversation(opened)
    say(talk, FIRST)
    talk.save(tmp_path / "s", {"tokens": "[1, 2]"})
    before = opened.usage().held_bytes
    with pytest.raises(TierError, match="positions of 2 tokens"):
        talk.restore(read_snapshot(tmp_path / "s"))
    assert opened.usage().held_bytes == before


def test_without_a_cache_every_turn_computes_all() -> None:
    runner = open_runner(build("llama"), kv="none")
    talk = Conversation(runner)
    reply = say(talk, FIRST)
    tokens = FIRST + reply + NEXT
    assert say(talk, tokens) == alone(runner, tokens)
    assert talk.reuse == type(talk.reuse)(0, len(tokens))


@pytest.mark.parametrize("opened", ["phi3_longrope"], indirect=True)
def test_a_turn_past_the_original_context_is_computed_anew_and_says_so(opened: Any) -> None:
    talk = Conversation(opened)
    say(talk, FIRST[:5])
    longer = [*FIRST, *FIRST]
    assert say(talk, longer) == alone(opened, longer)
    assert talk.reuse.kept_tokens == 0
    assert "beyond 16 tokens" in (talk.reuse.reason or "")
