"""Every press that kvpress exports, tried as a policy on the packaged model: driven, or refused with the reason.

pip install --no-deps kvpress            its pin on transformers excludes ours, so it stands beside
python tools/drive_presses.py --write docs/kvpress.md
"""

from __future__ import annotations

import argparse
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from quire.engine import Engine, SamplingParams  # noqa: E402
from quire.errors import ConfigError  # noqa: E402
from quire.models import keeper  # noqa: E402
from quire.models.open import open_runner  # noqa: E402
from quire.models.probe import one_line  # noqa: E402
from quire.retention import Keep, outside  # noqa: E402
from quire.retention.press import check_press  # noqa: E402
from quire.store.compact import families  # noqa: E402

SHARE = 0.25
NOT_PRESSES = ("BasePress", "ScorerPress")
"""Classes that others are made from."""
HEAD = """# Scores from outside: kvpress, press by press

What `quire.retention.outside(press)` and `--keep press:kvpress.NAME` say to each class that kvpress {kvpress} exports,
with transformers {transformers}. Made by `tools/drive_presses.py` on the packaged model: a prompt of {tokens} tokens, a
quarter kept and nothing protected.

*Looks at*: what the scores depend on; where it is more than keys and values, hidden states are kept until the prompt is
over and no prefix is looked for. *Held*: what the pool holds afterwards, of the whole prompt's bytes; blocks of 32
tokens round it up. *Same positions*: against those that kvpress's own hooks leave on the same model. Its hooks need
`cache_position`, which this transformers no longer hands to attention, so the comparison hands it in. Presses that draw
random numbers (`RandomPress`, and those with a random sketch) draw others there.

"""


@dataclass
class Row:
    """One press: what became of it."""

    name: str
    outcome: str
    why: str = ""
    looks: str = ""
    held: float = 0.0
    same: str = ""


def made(module: Any, cls: type[Any]) -> Any:
    """One of a class, with a press of the plainest kind in it where it wants one."""
    need = [
        p.name
        for p in inspect.signature(cls).parameters.values()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    return cls(**{name: module.SnapKVPress() for name in need})


@contextmanager
def kept_positions() -> Iterator[dict[tuple[int, int], list[int]]]:
    """Layer and head to the positions that stay, of a sequence that is compacted meanwhile."""
    found: dict[tuple[int, int], list[int]] = {}
    plain: Callable[..., None] = keeper.compact

    def noting(table: Any, wanted: Any, move: Any) -> None:
        for name, chains in families(table).items():
            group = chains[0].group
            every = chains[0].true_positions(table.length)
            for part in wanted[name]:
                for coord, slots in zip(part.coords, part.slots, strict=True):
                    found[coord] = every[group.coords.index(coord)][slots].tolist()
        plain(table, wanted, move)

    keeper.compact = noting
    try:
        yield found
    finally:
        keeper.compact = plain


def theirs(press: Any, model: Any, prompt: Sequence[int]) -> dict[tuple[int, int], list[int]]:
    """The same by the press's own hooks on transformers' own cache."""
    from transformers import DynamicCache

    def hand_in(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "cache_position": torch.arange(n)}

    hooks = [
        layer.self_attn.register_forward_pre_hook(hand_in, with_kwargs=True)
        for layer in model.model.layers
    ]
    full, some = DynamicCache(), DynamicCache()
    press.compression_ratio = 1 - SHARE
    ids = torch.tensor([list(prompt)])
    try:
        with torch.no_grad():
            model(ids, past_key_values=full)
            with press(model):
                model(ids, past_key_values=some)
    finally:
        for h in hooks:
            h.remove()
    out = {}
    for n, (a, b) in enumerate(zip(some.layers, full.layers, strict=True)):
        for h in range(a.keys.shape[1]):
            far = torch.cdist(a.keys[0, h].double(), b.keys[0, h].double())
            out[n, h] = far.argmin(1).tolist()
    return out


def drive(module: Any, name: str, model: Any, prompt: Sequence[int]) -> Row:
    """One press, as a policy of an engine."""
    cls = getattr(module, name)
    try:
        check_press(cls, name)
        keep: Keep = outside(made(module, cls), SHARE, sinks=0, window=0)
        runner: Any = open_runner(model, keep=keep, memory="64MiB")
    except ConfigError as e:
        text = str(e).removeprefix(f"press: {name} ").removeprefix("press: ")
        return Row(name, "refused", text.partition(": ")[2] if text.startswith("keep=") else text)
    engine = Engine(runner)
    try:
        rules = runner.rules(runner.keep)
        engine.add_request(list(prompt), SamplingParams(max_tokens=3, ignore_eos=True))
        held = 0
        with kept_positions() as ours:
            while engine.has_work:
                engine.step()
                held = runner.usage().held_bytes or held
    finally:
        engine.close()
        runner.close()
    looks = "hidden states" if rules.records else "keys, values"
    return Row(
        name,
        "driven",
        "",
        looks,
        held / (len(prompt) * rules.bytes_per_token),
        _same(ours, made(module, cls), model, prompt),
    )


def _same(ours: dict[Any, list[int]], press: Any, model: Any, prompt: Sequence[int]) -> str:
    try:
        want = theirs(press, model, prompt)
    except Exception as e:  # noqa: BLE001 - whatever its hooks do on a newer transformers
        return f"its own hooks fail ({one_line(e, 60)})"
    same = sum(len(set(ours[c]) & set(want[c])) for c in ours)
    return f"{same} of {sum(map(len, ours.values()))}"


def names(module: Any) -> list[str]:
    """The presses that a module exports."""
    found = [n for n in module.__all__ if n.endswith("Press") and n not in NOT_PRESSES]
    return sorted(found)


def page(rows: Sequence[Row], tokens: int) -> str:
    """The table as Markdown."""
    out = [
        HEAD.format(
            kvpress=version("kvpress"), transformers=version("transformers"), tokens=tokens
        ).rstrip(),
        "",
        "| Driven | Looks at | Held | Same positions |",
        "| --- | --- | --- | --- |",
    ]
    driven = [r for r in rows if r.outcome == "driven"]
    out += [f"| `{r.name}` | {r.looks} | {r.held:.1%} | {r.same} |" for r in driven]
    out += ["", "| Refused | Because |", "| --- | --- |"]
    out += [f"| `{r.name}` | {r.why} |" for r in rows if r.outcome == "refused"]
    return "\n".join(out) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--write", type=Path, help="the page; default: print it")
    parser.add_argument("--tokens", type=int, default=600, help="of the prompt")
    args = parser.parse_args()
    try:
        import kvpress
    except ImportError as e:
        raise SystemExit(f"{e}; pip install --no-deps kvpress, and what it imports") from e
    from transformers import AutoModelForCausalLM

    import quire.packaged

    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(quire.packaged.path(), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, 2048, (args.tokens,), generator=generator).tolist()
    text = page([drive(kvpress, n, model, prompt) for n in names(kvpress)], args.tokens)
    if args.write:
        args.write.write_text(text, encoding="utf-8")
    else:
        print(text)


if __name__ == "__main__":
    main()
