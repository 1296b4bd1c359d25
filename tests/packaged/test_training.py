"""Training on a micro model: resuming, the schedule, the text, the fast attention, export."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_packaged_model
from training import attention, corpus
from training.batches import Sampler
from training.corpus import Text
from training.export import export
from training.loop import PADDING, Plan, Run, losses, new_model, weighted_positions
from training.tasks import Words

PROSE = "The cat sat on the mat, and 12 dogs = 34 cats ; then they slept. " * 60


@pytest.fixture(scope="module")
def tokenizer() -> corpus.Tokenizer:
    return corpus.train_tokenizer([PROSE, " ".join(f"word{n} {n}" for n in range(400))], 400)


def micro(tokenizer: corpus.Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )


def micro_run(
    tokenizer: corpus.Tokenizer, tokens: int = 12 * 1024, seed: int = 3, extension: int = 0
) -> Run:
    ids = np.array(tokenizer.encode(PROSE).ids)
    sampler = Sampler(seed, Words(tokenizer), Text({"books": ids}, {"books": 1.0}))
    plan = Plan(
        tokens,
        seed,
        1024,
        opening=(2048, 128),
        phases=((0.5, 256), (1.0, 512)),
        extension_tokens=extension,
    )
    return Run(plan, new_model(micro(tokenizer), seed), sampler, "text")


def same_bits(a: Run, b: Run) -> bool:
    ours, theirs = a.model.state_dict(), b.model.state_dict()
    return all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("killed_after", [1, 5, 9])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tokenizer: corpus.Tokenizer, tmp_path: Path, killed_after: int
) -> None:
    whole = micro_run(tokenizer)
    history = [loss for loss, _ in losses(whole)]
    assert whole.finished
    assert len(history) == 12

    first = micro_run(tokenizer)
    before = [first.train_step() for _ in range(killed_after)]
    first.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    second = micro_run(tokenizer)
    second.load(tmp_path / "checkpoint.pt")
    assert not same_bits(second, whole)
    after = [loss for loss, _ in losses(second)]
    assert before + after == history
    assert same_bits(second, whole)


def test_a_checkpoint_half_written_leaves_the_one_before(
    tokenizer: corpus.Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "checkpoint.pt"
    run = micro_run(tokenizer)
    run.train_step()
    run.save(path)
    kept = path.read_bytes()

    def killed(state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save(path)
    assert path.read_bytes() == kept


def test_the_budget_may_change_until_the_rate_falls(
    tokenizer: corpus.Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    early = micro_run(tokenizer)
    for _ in range(4):
        early.train_step()
    early.save(path)
    longer = micro_run(tokenizer, tokens=16 * 1024)
    longer.load(path)
    assert longer.budgets == [(0, 12 * 1024), (4 * 1024, 16 * 1024)]
    # Nothing before 42 % of either depends on the budget: it is the run that began with it.
    began = micro_run(tokenizer, tokens=16 * 1024)
    for _ in losses(began):
        pass
    for _ in losses(longer):
        pass
    assert same_bits(began, longer)

    shorter = micro_run(tokenizer, tokens=6 * 1024)
    with pytest.raises(ValueError, match="already falling"):
        shorter.load(path)
    late = micro_run(tokenizer)
    for _ in range(8):
        late.train_step()
    late.save(path)
    with pytest.raises(ValueError, match="already falling"):
        micro_run(tokenizer, tokens=16 * 1024).load(path)


def test_an_extension_follows_a_finished_run_and_resumes(
    tokenizer: corpus.Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "checkpoint.pt"
    whole = micro_run(tokenizer, extension=4 * 1024)
    assert len(list(losses(whole))) == 16
    plain = micro_run(tokenizer)
    list(losses(plain))
    plain.save(path)
    longer = micro_run(tokenizer, extension=4 * 1024)
    longer.load(path)
    assert not longer.finished
    for _ in range(2):
        longer.train_step()
    longer.save(path)
    with pytest.raises(ValueError, match="has begun"):
        micro_run(tokenizer, extension=5 * 1024).load(path)
    resumed = micro_run(tokenizer, extension=4 * 1024)
    resumed.load(path)
    assert len(list(losses(resumed))) == 2
    assert same_bits(resumed, whole)


def test_another_seed_or_text_is_refused(tokenizer: corpus.Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    micro_run(tokenizer).save(path)
    with pytest.raises(ValueError, match="another seed"):
        micro_run(tokenizer, seed=4).load(path)
    other = micro_run(tokenizer)
    other.fingerprint = "other"
    with pytest.raises(ValueError, match="another seed"):
        other.load(path)


def test_the_schedule_by_hand() -> None:
    plan = Plan(10_000_000)
    million = 1_000_000
    at = [0, 1.49, 1.5, 4.19, 4.2, 6.19, 6.2, 8.19, 8.2, 9.99, 10]
    lengths = [128, 128, 256, 256, 512, 512, 1024, 1024, 2048, 2048, 2048]
    assert [plan.length_tokens(round(m * million)) for m in at] == lengths
    assert plan.rate(0, 0) == pytest.approx(0.01)
    assert plan.rate(49, 200_000) == pytest.approx(0.5)
    assert plan.rate(1000, 5_999_999) == 1.0
    assert plan.rate(1000, 8 * million) == pytest.approx(0.5)
    assert plan.rate(9, 8 * million) == pytest.approx(0.05)
    assert plan.rate(1000, 10 * million) == pytest.approx(0.02)
    extended = Plan(10_000_000, extension_tokens=2 * million)
    assert extended.rate(1000, 8 * million) == pytest.approx(0.5)
    assert extended.rate(1000, 10 * million) == pytest.approx(0.3)
    assert extended.rate(1000, 11 * million) == pytest.approx(0.15)
    assert extended.rate(1000, 12 * million) == pytest.approx(0.02)
    assert extended.length_tokens(11 * million) == 2048
    with pytest.raises(ValueError, match="multiple of 2048"):
        Plan(10_000_000, batch_tokens=3000)


def test_weighted_positions_by_hand() -> None:
    at, weight = weighted_positions(torch.tensor([[3.0, 2.0, 0.0], [1.0, 0.0, 5.0]]))
    assert len(at) == len(weight) == PADDING
    assert at[:5].tolist() == [0, 1, 3, 5, 0]
    assert weight[:5].tolist() == [3.0, 2.0, 1.0, 5.0, 0.0]
    assert not at[4:].any()
    assert not weight[4:].any()


@pytest.mark.parametrize("tokens", [7, 256, 300])
def test_blocked_attention_is_attention(tokenizer: corpus.Tokenizer, tokens: int) -> None:
    model = new_model(micro(tokenizer), 0)
    assert model.config._attn_implementation == attention.NAME
    ids = torch.randint(
        0, tokenizer.get_vocab_size(), (2, tokens), generator=torch.Generator().manual_seed(1)
    )
    ours = model(ids, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    assert torch.allclose(ours, model(ids, use_cache=False).logits, atol=1e-5)


def test_blocked_attention_refuses_masks() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match="unmasked"):
        attention.blocked_causal(torch.nn.Identity(), q, q, q, torch.zeros(4, 4), 1.0)


def test_digits_are_tokens_of_their_own(tokenizer: corpus.Tokenizer) -> None:
    words = Words(tokenizer)
    whole = tokenizer.encode(" abc = 12399 ;", add_special_tokens=False).ids
    assert whole == [*words(" abc ="), *words.number("12399"), *words(" ;")]
    assert len(words.number("12399")) == 6
    assert tokenizer.encode("x").ids[0] == words.bos == 0


def test_the_library_text_leaves_out_tests_and_marks_what_is_held_out(tmp_path: Path) -> None:
    for name in ("a.py", "pkg/b.py", "pkg/test/c.py", "site-packages/d.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n")
    assert [d.name for d in corpus.library_modules(tmp_path)] == ["a.py", "pkg/b.py"]
    (tmp_path / "emma.txt").write_text("x" * 100)
    parts = list(corpus.book(tmp_path / "emma.txt"))
    assert [(len(p.text), p.held_out) for p in parts] == [(96, False), (4, True)]


def test_an_export_loads_and_carries_its_digest(
    tokenizer: corpus.Tokenizer, tmp_path: Path
) -> None:
    run = micro_run(tokenizer)
    digest = export(run.model, tokenizer, tmp_path, {"trained_tokens": 0})
    assert json.loads((tmp_path / "digest.json").read_text())["sha256"] == digest
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    kept = run.model.state_dict()
    assert all(torch.equal(v, kept[k].to(v.dtype)) for k, v in loaded.state_dict().items())
    spoken = AutoTokenizer.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == spoken.chat_template
    turns = [{"role": "user", "content": "a = 12 ;"}, {"role": "user", "content": " a ?"}]
    assert spoken.apply_chat_template(turns, tokenize=False) == "<s>a = 12 ;\n a ?"
    asked = spoken.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == "<s>a = 12 ;\n a ?\n"


def test_a_run_needs_a_budget_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_packaged_model.main(["--work", str(tmp_path / "new")]) == 2
    assert "--tokens 16M" in capsys.readouterr().err
    assert [train_packaged_model.tokens(t) for t in ("16M", "500k", "2.5M", "4096")] == [
        16_000_000,
        500_000,
        2_500_000,
        4096,
    ]
