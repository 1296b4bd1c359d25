"""The whole: rows that are right for exact codecs, and that betray broken ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import zoo
from models.driving import runner_for
from quire.errors import ConfigError, RequestError
from quire.evaluate import Evaluation, Row, Scored, Scorer, evaluate
from quire.evaluate.decode import twin
from quire.evaluate.run import recalled
from quire.evaluate.tasks import Answer, Example
from quire.models.open import open_runner

KEYS = {"kv", "keep", "task", "metric", "value", "low", "high", "bytes_per_token", "tokens"}
PPL = {"nll", "perplexity", "dnll", "kl", "agreement"}


def run(model: Any, kv: list[str], text: Any, **options: Any) -> Evaluation:
    settings = {
        "length_tokens": 100,
        "block_tokens": 16,
        "memory": "64MiB",
        "max_tokens": 200,
        **options,
    }
    tasks = settings.pop("tasks", ["ppl"])
    tokenizer = settings.pop("tokenizer", None)
    return evaluate(model, tokenizer, [(k, "full") for k in kv], tasks, text, **settings)


def row(found: Evaluation, kv: str, metric: str, task: str = "ppl") -> Row:
    return next(
        r for r in found.rows if (r.kv, r.metric, r.task, r.depth) == (kv, metric, task, None)
    )


def recall_model(shared: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "recall-5m"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def test_exact_codecs_lose_nothing_at_all(llama: Any, text: list[int]) -> None:
    found = run(llama, ["auto", "fp32", "fp64"], text)
    for kv in ("auto", "fp32", "fp64"):
        assert {r.metric for r in found.rows if r.kv == kv} == PPL
        for metric, want in (("dnll", 0.0), ("kl", 0.0), ("agreement", 1.0)):
            r = row(found, kv, metric)
            assert (r.value, r.low, r.high) == (want, want, want)
        assert row(found, kv, "nll").decoded == 0
    assert row(found, "fp32", "nll").value == row(found, "auto", "nll").value
    # 100 tokens in 7 blocks of 16: 3 layers, 2 heads, 128 channels of k and v
    assert row(found, "fp32", "nll").bytes_per_token == 7 * 16 * 3 * 2 * 128 * 4 / 100
    assert row(found, "fp64", "nll").bytes_per_token == 7 * 16 * 3 * 2 * 128 * 8 / 100
    assert found.full_bytes_per_token == {"ppl": row(found, "fp32", "nll").bytes_per_token}
    assert found.warnings == ()


def test_figures_are_those_of_the_model_itself(llama: Any, text: list[int]) -> None:
    """Two windows by hand: transformers' own loss on each, and perplexity as its exponent."""
    found = run(llama, ["auto"], text)
    windows = torch.tensor([text[:100], text[100:200]])
    with torch.inference_mode():
        loss = float(llama(windows, labels=windows, use_cache=False).loss)
    assert row(found, "auto", "nll").value == pytest.approx(loss, abs=1e-5)
    assert row(found, "auto", "perplexity").value == pytest.approx(
        2.718281828459045**loss, rel=1e-5
    )
    assert row(found, "auto", "nll").tokens == 2 * 99


def test_a_lossy_codec_shows_and_again_to_the_last_digit(llama: Any, text: list[int]) -> None:
    kv = "lossy:residual_tokens=16"
    first, again = (run(llama, [kv, "auto"], text, chunk_tokens=40) for _ in range(2))
    assert json.dumps(first.document()) == json.dumps(again.document())
    assert row(first, kv, "kl").value > 0
    assert row(first, kv, "kl").low is not None
    r = row(first, kv, "dnll")
    assert r.low is not None
    assert r.high is not None
    assert r.low < r.value < r.high
    assert r.decoded == pytest.approx(sum(i // 16 * 16 > 16 for i in range(99)) / 99)
    assert row(first, "auto", "kl").value == 0.0, "beside a lossy one the exact one is still exact"
    assert row(run(llama, [kv], text, seed=1), kv, "kl").low != row(first, kv, "kl").low


def test_weights_are_packed_while_caches_are_scored_and_given_back(
    llama: Any, text: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []

    class Packed:
        def restore(self) -> None:
            log.append("restored")

    def pack(model: Any) -> Packed:
        assert model is llama
        log.append("packed")
        return Packed()

    monkeypatch.setattr("quire.evaluate.cells.prepack", pack)
    with pytest.raises(ConfigError, match="unknown codec"):
        run(llama, ["nowhere"], text)
    assert log == ["packed", "restored"]


RIGHT = "k=grouped,v=auto"
SWAPPED = "k=grouped:along=channels,v=auto"


def test_kl_is_from_the_exact_cache_to_the_other(llama: Any, text: list[int]) -> None:
    logits = []
    for kv in ("auto", "grouped"):
        runner = runner_for(twin(llama), kv=kv, block_tokens=16)
        logits.append(torch.cat([c.logits for c in Scorer(runner).score(text[:100])]).double())
    p, q = (x.log_softmax(-1) for x in logits)
    want = float((p.exp() * (p - q)).sum(-1).mean())
    assert want != pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-3)
    found = run(llama, ["grouped"], text[:100])
    assert row(found, "grouped", "kl").value == pytest.approx(want, rel=1e-5)


def test_an_answer_counts_when_every_token_of_it_is_the_best() -> None:
    """Tokens 5 6 | 7 8 | 9: the second answer's first token is right and its second is not."""
    tokens = np.array([1, 5, 6, 7, 8, 9])
    said = torch.tensor([5, 6, 7, 0, 9])

    class Fixed:
        def cuts(self, prompt_tokens: int, n_tokens: int) -> set[int]:
            assert (prompt_tokens, n_tokens) == (0, len(tokens))
            return {3}

        def score(
            self, given: Any, *, first: int, prompt_tokens: int | None, cuts: set[int]
        ) -> Any:
            assert (first, prompt_tokens, cuts) == (0, None, {3})
            for start, stop in ((0, 3), (3, 5)):
                logits = torch.nn.functional.one_hot(said[start:stop], 10).float()
                yield Scored(start, stop, torch.tensor(given[start + 1 : stop + 1]), logits, logits)

    answers = (Answer(1, 3, 0.0), Answer(3, 5, 0.0), Answer(5, 6, 0.0))
    assert recalled(Fixed(), Example(tokens, answers)) == [True, False, True]  # type: ignore[arg-type]


def test_axes_swapped_is_caught(text: list[int]) -> None:
    """2-bit keys by token where channels differ in size: only the injected judge has such channels."""
    model = zoo.build("llama")
    plain, hard = (run(model, [RIGHT, SWAPPED], text, injected=i) for i in (False, True))
    right, swapped = (row(hard, k, "kl") for k in (RIGHT, SWAPPED))
    assert right.high is not None
    assert swapped.low is not None
    assert swapped.low > 2 * right.high, "beyond the intervals"
    assert swapped.value > 2 * row(plain, SWAPPED, "kl").value
    # a group of one channel does not see that the channel is eight times as large, or shifted
    assert right.value == pytest.approx(row(plain, RIGHT, "kl").value, rel=0.01)
    assert hard.digest == plain.digest, "the digest names the weights as they were"
    assert hard.injected


def test_axes_swapped_is_caught_on_text(shared: Path) -> None:
    """On a trained model the plain judge sees no ΔNLL in either; the injected one sees a nat and more."""
    model, tokenizer = recall_model(shared)
    words = (shared / "data" / "text" / "gutenberg-melville-moby_dick.txt").read_text()
    words = words[60_000:62_000]
    found = run(
        model, [RIGHT, SWAPPED], words, tokenizer=tokenizer, length_tokens=200, injected=True
    )
    right, swapped = (row(found, k, "dnll") for k in (RIGHT, SWAPPED))
    assert swapped.value > 20 * abs(right.value)
    assert swapped.value > 0.5


def test_two_bits_by_channel_lose_at_most_a_fifth_of_two_bits_by_token(shared: Path) -> None:
    """KIVI's point, at equal groups and with no raw window to hide in, on keys that have large channels."""
    model, tokenizer = recall_model(shared)
    words = (shared / "data" / "text" / "gutenberg-melville-moby_dick.txt").read_text()
    words = words[60_000:62_000]
    kv = ["kivi:residual=0", "int2:residual=0"]
    found = run(
        model,
        kv,
        words,
        tokenizer=tokenizer,
        length_tokens=200,
        block_tokens=32,
        injected=True,
    )
    for metric in ("dnll", "kl"):
        by_channel, by_token = (row(found, k, metric).value for k in kv)
        assert by_token > 0.3
        assert by_channel < by_token / 5


def test_one_token_sealed_at_a_time_is_caught_by_its_bytes(llama: Any, text: list[int]) -> None:
    """Groups of one value: minimum = maximum, so "2 bits" are exact, and the minimum beside them is the value."""
    kv = "grouped:group=1"
    found = run(llama, [kv, "grouped"], text)
    assert row(found, kv, "kl").value < 1e-6, "as good as exact"
    assert row(found, "grouped", "kl").value > 1e-2
    full = found.full_bytes_per_token["ppl"]
    assert row(found, kv, "kl").bytes_per_token > 1.4 * full
    assert row(found, "grouped", "kl").bytes_per_token < 0.6 * full
    (warning,) = found.warnings
    assert warning.startswith(f"{kv} holds ")
    assert warning.endswith("it saves nothing here")


def test_recall_rows(llama: Any, tokenizer: Any, text: list[int]) -> None:
    """A random model recalls nothing; the rows, their depths and their tokens are there all the same."""
    found = run(
        llama,
        ["lossy", "auto"],
        text,
        tokenizer=tokenizer,
        tasks=["passkey", "kv:count=3,asked=2"],
        length_tokens=160,
        examples=5,
    )
    for kv in ("lossy", "auto"):
        for task, answers, tokens in (("passkey", 5, 30), ("kv:count=3,asked=2", 10, 40)):
            r = row(found, kv, "recall", task)
            assert (r.value, r.tokens, r.length) == (0.0, tokens, 160)
            assert row(found, kv, "drecall", task).value == 0.0
            by_depth = [
                x for x in found.rows if (x.kv, x.task) == (kv, task) and x.depth is not None
            ]
            assert sum(x.tokens for x in by_depth) == tokens
            assert r.count == sum(x.count for x in by_depth) == answers
            assert (r.low, r.high) == (0.0, 1 - 0.025 ** (1 / 5)), "five examples prove little"
            assert r.decoded == (1.0 if kv == "lossy" else 0.0)
    assert set(json.loads(json.dumps(found.document()))["rows"][0]) >= KEYS


def test_recall_through_the_cache_on_a_model_that_recalls(shared: Path) -> None:
    model, tokenizer = recall_model(shared)
    fine, coarse = "lossy:residual_tokens=32", SWAPPED
    found = run(
        model,
        [fine, coarse],
        None,
        tokenizer=tokenizer,
        tasks=["kv:count=8,asked=4", "copy:asked=4"],
        length_tokens=256,
        examples=3,
        injected=True,
    )
    assert row(found, fine, "recall", "kv:count=8,asked=4").value >= 11 / 12
    assert row(found, fine, "recall", "copy:asked=4").value >= 11 / 12
    assert row(found, coarse, "recall", "copy:asked=4").value < 0.7, "2 bits over outliers lose it"
    assert row(found, coarse, "drecall", "copy:asked=4").value < 0


def test_several_lengths_are_those_of_each_alone(
    llama: Any, tokenizer: Any, text: list[int]
) -> None:
    tasks = ["ppl", "passkey"]
    each = [run(llama, ["lossy"], text, tokenizer=tokenizer, tasks=tasks, length_tokens=n, examples=2)
            for n in (100, 140)]  # fmt: skip
    both = run(
        llama,
        ["lossy"],
        text,
        tokenizer=tokenizer,
        tasks=tasks,
        length_tokens=[100, 140],
        examples=2,
    )
    assert both.rows == each[0].rows + each[1].rows
    assert {r.length for r in both.rows} == {100, 140}
    assert all(r.full_bytes_per_token > 0 for r in both.rows)


def test_what_is_no_number_is_null_and_said() -> None:
    line = Row(
        "lossy", "full", "ppl", "kl", math.inf, None, None, 8.0, 3, 9, full_bytes_per_token=9
    )
    found = Evaluation((line,), "d", {"ppl": 9.0})
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    assert document["rows"][0]["value"] is None
    assert document["warnings"] == ["kl of lossy on ppl is inf: the document says null"]


def test_refusals(llama: Any, tokenizer: Any, text: list[int]) -> None:
    for options, error, says in (
        ({"text": text[:99]}, RequestError, "99 tokens, fewer than one window of 100"),
        ({"text": None}, RequestError, "ppl needs a text"),
        ({"text": "words"}, RequestError, "no tokenizer"),
        ({"tasks": ["kv"]}, RequestError, "no tokenizer"),
        ({"tasks": ["niah"]}, ConfigError, "unknown task"),
        (
            {"length_tokens": 600, "text": text * 3},
            RequestError,
            "beyond the model's context of 512",
        ),
        ({"length_tokens": 1}, RequestError, "nothing to predict"),
        ({"seed": -1}, RequestError, "seed must be at least 0"),
        ({"kv": ["none"]}, ConfigError, "keeps no cache"),
        ({"kv": ["int5"]}, ConfigError, "unknown codec"),
        ({"kv": []}, ConfigError, "at least one configuration"),
        ({"kv": ["lossy:residual_tokens=96"]}, RequestError, "no query would read a decoded"),
    ):
        kv = options.pop("kv", ["auto"])
        words = options.pop("text", text)
        with pytest.raises(error, match=says) as refused:
            run(llama, kv, words, **options)
        assert "\n" not in str(refused.value)
    assert llama.config._attn_implementation == "sdpa", "the model is as it was"
    with pytest.raises(ConfigError, match="sink logits"):
        run(zoo.build("gpt_oss"), ["auto"], text, injected=True)


def test_random_tokens_cannot_be_foretold_and_their_copy_can() -> None:
    """The controls: a model that foretells noise sees what it should not, one that cannot copy does not read."""
    from quire.models.load import check_source, load_model

    loaded = load_model(check_source(None))
    vocabulary = len(loaded.tokenizer)
    rng = np.random.default_rng(5)
    noise = rng.integers(10, vocabulary, (4, 120)).tolist()
    twice = [t for some in noise for t in [*some, *some]]
    found = evaluate(
        loaded.model, None, [("int8", "full"), ("int4", "full")], text=twice,
        length_tokens=240, memory="64MiB",
    )  # fmt: skip
    for kv in ("int8", "int4"):
        loss = {p.start: p for p in found.positions if p.kv == kv}
        assert all(abs(p.dnll) < 1 for p in loss.values())
    runner = open_runner(twin(loaded.model), kv="int4", memory="64MiB", weights="plain")
    try:
        nll = np.concatenate(
            [-c.logprobs.numpy() for c in Scorer(runner).score([*noise[0], *noise[0]])]
        )
    finally:
        runner.close()
    assert nll[:119].mean() > math.log(vocabulary), "worse than knowing nothing, for it knows text"
    assert nll[135:].mean() < 0.5 * nll[:119].mean()


def test_answers_that_are_known_before_tokens_go_are_refused(shared: Path) -> None:
    """One token, given by the prompt's last query: no cache would have been read, whatever was dropped."""
    model, tokenizer = recall_model(shared)
    options: dict[str, Any] = dict(length_tokens=300, examples=1, memory="64MiB", ask="before")
    tasks = ["token-kv:count=4,asked=1"]
    with pytest.raises(RequestError, match=r"its answers are one token, .* ask after, or a task"):
        evaluate(model, tokenizer, [("auto", "random:budget=0.1")], tasks, **options)
    for keep in ("full", "window:64"):  # nothing goes, or by place and before the last query reads
        assert evaluate(model, tokenizer, [("auto", keep)], tasks, **options).rows
    longer = evaluate(
        model, tokenizer, [("auto", "random:budget=0.1")], ["kv:count=4,asked=1"], **options
    )
    assert longer.rows
