"""What a request under a policy leaves in the prefix cache: its prompt's whole blocks, never what it compacted."""

from __future__ import annotations

import pytest

import zoo
from retention.kept import prompts, run, small

BLOCK = 8
N = 100
"""Generated tokens: in the end more is kept than the prompt had blocks, so that names go on if nobody stops them."""


@pytest.mark.parametrize("policy", ["random", "snapkv", "h2o", "ada(keydiff)"])
def test_others_find_the_prompt_and_nothing_that_was_compacted(policy: str) -> None:
    model = zoo.build("llama")
    prompt, other = prompts((43, 29), 90)
    want = run(model, [(prompt, "full")], n_tokens=N).tokens[0]
    keep = small(policy)
    first = run(model, [(prompt, keep)], n_tokens=N).tokens[0]
    longer = prompt + first  # as a next turn would send it
    after = run(model, [(longer, "full")], n_tokens=4).tokens[0]
    requests = [(prompt, keep), (prompt, "full"), (longer, "full"), (other, "full")]
    found = run(model, requests, n_tokens=N, one_by_one=True, share="prefix")
    assert found.tokens[0] == first
    assert found.tokens[1] == want
    assert found.tokens[2][:4] == after
    whole = len(prompt) // BLOCK * BLOCK
    assert found.cached[0] == 0
    assert found.cached[1] == whole, "the prompt's blocks from before tokens went"
    assert whole <= found.cached[2] < len(prompt) + N, "what full left behind, or the prompt"
    assert found.cached[3] == 0
    compacted = found.seen.of(len(prompt))
    assert any(n > len(prompt) for n in compacted), "tokens went while text was generated, too"
