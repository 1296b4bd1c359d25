"""Several models and adapters behind one address: each by its name, none with another's words or blocks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from browser import browsing
from lora import make_adapter, merged
from quire.cli.commands import app
from quire.engine import Engine, SchedulerConfig
from quire.errors import ConfigError
from quire.models.adapters import check_adapter_folder, load_adapters
from quire.models.load import check_source, load_model
from quire.models.open import open_runner
from quire.serve.admission import Gate
from quire.serve.config import ServeConfig
from quire.serve.house import House
from quire.serve.keys import Caller, Keys, Limits
from quire.serve.service import Service
from served import Served, serving_house, wait_for
from tiny_model import CHAT_TEMPLATE, make_model

NAMES = ["first", "ada", "bob", "second"]
KEYS = {who: f"{who}s-long-secret-0123456789" for who in ("ann", "ben", "root", "slow")}
WORDS = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    first = make_model(root / "first", template=CHAT_TEMPLATE, context=1024)
    second = make_model(root / "second", seed=5, template=CHAT_TEMPLATE, context=512)
    ada = make_adapter(first, root / "ada", seed=1)
    bob = make_adapter(first, root / "bob", seed=2)
    return {"first": first, "second": second, "ada": ada, "bob": bob}


@pytest.fixture(scope="module")
def house(folders: dict[str, Path]) -> Iterator[Served]:
    callers = [
        (KEYS["ann"], Caller("ann")),
        (KEYS["ben"], Caller("ben")),
        (KEYS["root"], Caller("root", operator=True)),
        (KEYS["slow"], Caller("slow", limits=Limits(requests_per_minute=2))),
    ]
    config = ServeConfig(port=0, keys=Keys.of(callers), drain_s=5)
    gate, services = Gate(config), []
    for name, adapters in (("first", ("ada", "bob")), ("second", ())):
        loaded = load_model(check_source(str(folders[name]), dtype="float32"))
        model = loaded.model
        if adapters:
            model = load_adapters(model, {a: folders[a] for a in adapters})
        runner = open_runner(
            model, kv="fp32", share="prefix:explain=on", memory="16MiB", block_tokens=16
        )
        engine = Engine(runner, loaded.tokenizer, config=SchedulerConfig(step_tokens=256))
        services.append(Service(engine, config, name, kv="fp32", gate=gate))
    with serving_house(House(services), keys=KEYS) as served:
        yield served
        served.wait_idle()
    for service in services:
        service.engine.runner.close()


def say(served: Served, model: str, prompt: list[int], who: str = "ann") -> tuple[str, int]:
    found = served.client(who).completions.create(
        model=model, prompt=prompt, max_tokens=WORDS, temperature=0, extra_body={"ignore_eos": True}
    )
    assert found.model == model
    assert found.usage is not None
    details = found.usage.prompt_tokens_details
    return found.choices[0].text, (details.cached_tokens or 0) if details else 0


def alone(folders: dict[str, Path], name: str, prompt: list[int]) -> str:
    """What transformers says with that model, or that adapter merged into it."""
    base = folders["second" if name == "second" else "first"]
    model = merged(base, folders[name] if name in ("ada", "bob") else None)
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=WORDS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokenizer = load_model(check_source(str(base))).tokenizer
    return str(tokenizer.decode(out[0, len(prompt) :]))


def test_each_name_speaks_as_that_model_alone(house: Served, folders: dict[str, Path]) -> None:
    prompt = [3 + (7 * i) % 90 for i in range(40)]
    found = {name: say(house, name, prompt)[0] for name in NAMES}
    assert len(set(found.values())) == 4
    assert found == {name: alone(folders, name, prompt) for name in NAMES}


def test_the_list_has_all_of_them(house: Served) -> None:
    listed = {m.id: m.model_dump() for m in house.client("ann").models.list()}
    assert list(listed) == NAMES
    assert [m["parent"] for m in listed.values()] == [None, "first", "first", None]
    assert [m["max_model_len"] for m in listed.values()] == [1024, 1024, 1024, 512]
    assert house.client("ann").models.retrieve("bob").id == "bob"
    with house.http("ann") as http:
        forms = http.get("/openapi.json").json()["components"]["schemas"]
    assert forms["ChatForm"]["properties"]["model"]["enum"] == NAMES


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 2}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [5]}),
    ],
)
def test_every_endpoint_goes_by_the_name(house: Served, path: str, body: dict[str, Any]) -> None:
    with house.http("ann") as http:
        unknown = http.post(path, json={**body, "model": "third"})
        assert unknown.status_code == 404
        assert "'first', 'ada', 'bob', 'second'" in unknown.text
        for name in NAMES:
            answer = http.post(path, json={**body, "model": name})
            assert answer.status_code == 200, answer.text
            assert answer.json().get("model", name) == name
        for other in ("/v1/models/third", "/v1/kv/stats?model=third"):
            assert http.get(other).status_code == 404


def test_embeddings_are_not_offered_and_it_says_why(house: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="were not trained to compare them"):
        house.client("ann").embeddings.create(model="first", input="a text")


def test_the_page_shows_and_talks_to_the_one_that_is_chosen(house: Served) -> None:
    with browsing() as browser:

        def shown(name: str) -> str:
            return str(
                browser.execute_script(
                    "return document.getElementById(arguments[0]).innerText", name
                )
            )

        browser.get(f"{house.url}/")
        browser.execute_script("sessionStorage.setItem('quire.key', arguments[0])", KEYS["ann"])
        browser.get(f"{house.url}/")
        wait_for(lambda: shown("status") == "live")
        assert shown("served").split() == NAMES
        assert "first" in shown("model")
        script = "s = document.getElementById('served'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))"
        before = house.service.meters.by_tenant["ann"]["done"]
        for name, model in (("second", "second"), ("ada", "first")):
            browser.execute_script(script, name)
            wait_for(lambda model=model: shown("model").startswith(model))
            wait_for(lambda name=name: browser.title == f"Quire · {name}")
            browser.find_element("id", "text").send_keys("Say something.")
            browser.find_element("id", "send").click()
            wait_for(lambda: "prompt tokens found" in shown("talk"))
            browser.find_element("id", "clear").click()
        assert house.service.meters.by_tenant["ann"]["done"] == before + 1


def test_the_context_is_that_of_the_model(house: Served) -> None:
    long = [5] * 700
    assert say(house, "first", long)[0]
    with pytest.raises(openai.BadRequestError, match="the model's context 512"):
        say(house, "second", long)


def test_prefixes_are_never_shared_across_names_or_keys(house: Served) -> None:
    """A random order of asking: who asks a prompt of a name the first time finds nothing."""
    draw = random.Random(4)
    prompts = [[draw.randrange(3, 90) for _ in range(70)] for _ in range(2)]
    turns = [(n, p, who) for n in NAMES for p in range(2) for who in ("ann", "ben")] * 2
    draw.shuffle(turns)
    seen: dict[tuple[str, int, str], str] = {}
    texts: dict[tuple[str, int], str] = {}
    for turn in turns:
        name, p, who = turn
        text, cached = say(house, name, prompts[p], who)
        assert (cached >= 64) == (turn in seen), turn
        assert cached == 0 or turn in seen
        seen[turn] = text
        assert texts.setdefault((name, p), text) == text
    assert len(set(texts.values())) == len(texts)


def test_streams_of_all_at_once(house: Served) -> None:
    prompt = [9 + i % 50 for i in range(30)]
    want = {name: say(house, name, prompt)[0] for name in NAMES}
    client = house.client("ben")
    streams = {
        name: client.completions.create(
            model=name, prompt=prompt, max_tokens=WORDS, temperature=0, stream=True,
            extra_body={"ignore_eos": True},
        )
        for name in NAMES
    }  # fmt: skip
    for name, stream in streams.items():
        assert "".join(c.text for chunk in stream for c in chunk.choices) == want[name]


def test_limits_are_of_all_models_together(house: Served) -> None:
    say(house, "first", [5, 6], "slow")
    say(house, "second", [5, 6], "slow")
    with pytest.raises(openai.RateLimitError):
        say(house, "ada", [5, 6], "slow")


def test_metrics_and_figures_are_told_apart_by_model(house: Served) -> None:
    say(house, "second", [5, 6, 7])
    with house.http("root") as http:
        text = http.get("/metrics").text
        shown = {n: http.get("/v1/kv/stats", params={"model": n}).json() for n in NAMES}
        assert http.get("/v1/kv/stats").json()["model"] == "first"
        assert http.get("/health").status_code == 200
    assert {n: s["model"] for n, s in shown.items()} == {
        "first": "first",
        "ada": "first",
        "bob": "first",
        "second": "second",
    }
    assert shown["second"]["served"] == NAMES
    assert shown["first"]["models"] == ["first", "ada", "bob"]
    assert text.count("# TYPE quire_steps_total ") == 1
    steps = {
        s.labels["model_name"]: s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
        if s.name == "quire_steps_total"
    }
    assert set(steps) == {"first", "second"}
    assert min(steps.values()) > 0
    assert "first" in text


def test_a_terminal_shows_the_one_that_is_named(house: Served) -> None:
    runner = CliRunner()
    words = ["inspect", house.url, "--key", KEYS["root"], "--json"]
    for more, name in (
        ([], "first"),
        (["--model", "second"], "second"),
        (["--model", "bob"], "first"),
    ):
        done = runner.invoke(app, [*words, *more])
        assert done.exit_code == 0
        assert json.loads(done.stdout)["model"] == name
    failed = runner.invoke(app, [*words, "--model", "third"])
    assert "there is no model 'third' here" in str(failed.exception)


def test_names_are_unique(folders: dict[str, Path]) -> None:
    class Twin:
        config, gate = ServeConfig(), None
        models = {"one": None}  # noqa: RUF012 - a stand-in
        name, served = "one", ()

    with pytest.raises(ConfigError, match="two models or adapters are called 'one'"):
        House([Twin(), Twin()])  # type: ignore[list-item]


def test_adapters_that_cannot_be_served(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="letters, digits"):
        check_adapter_folder("a.b", folders["ada"])
    with pytest.raises(ConfigError, match=r"no readable adapter_config\.json"):
        check_adapter_folder("a", folders["first"])
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PREFIX_TUNING"}')
    with pytest.raises(ConfigError, match="LoRA adapters are served"):
        check_adapter_folder("a", tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ConfigError, match="may hold code"):
        check_adapter_folder("a", tmp_path)

    def fits(base: Path, adapter: Path) -> Any:
        return load_adapters(load_model(check_source(str(base))).model, {"one": adapter})

    few = make_adapter(folders["first"], tmp_path / "few", seed=1, targets=("q_proj",))
    text = (few / "adapter_config.json").read_text()
    (few / "adapter_config.json").write_text(text.replace("q_proj", "down_proj"))
    with pytest.raises(ConfigError, match="does not fit this model"):
        fits(folders["first"], few)  # tensors for one layer, a config for another
    (few / "adapter_config.json").write_text(text.replace("q_proj", "qkv"))
    with pytest.raises(ConfigError, match="does not fit this model"):
        fits(folders["first"], few)
