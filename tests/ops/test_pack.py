"""Packed codes lie where the layout says, code by code, and come back."""

from __future__ import annotations

import pytest
import torch

from quire.ops.pack import pack_keys, pack_values, unpack_keys, unpack_values


def codes(bits: int, tokens: int, width: int, lead: tuple[int, ...] = ()) -> torch.Tensor:
    g = torch.Generator().manual_seed(bits * tokens + width)
    return torch.randint(0, 1 << bits, (*lead, tokens, width), generator=g)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("tokens", "width"), [(16, 64), (32, 80), (48, 96), (128, 16)])
def test_every_code_lies_where_the_layout_says(bits: int, tokens: int, width: int) -> None:
    per, x = 8 // bits, codes(bits, tokens, width)
    keys, values = pack_keys(x, bits), pack_values(x, bits)
    assert keys.shape == (tokens // 16, width // (4 * per), 16, 4)
    assert values.shape == (tokens // (4 * per), width, 4)
    assert keys.is_contiguous()
    assert values.is_contiguous()
    for t in range(tokens):
        for d in range(width):
            e, j = divmod(d % (4 * per), 4)
            byte = int(keys[t // 16, d // (4 * per), t % 16, j])
            assert byte >> bits * e & (1 << bits) - 1 == x[t, d]
            e, j = divmod(t % (4 * per), 4)
            byte = int(values[t // (4 * per), d, j])
            assert byte >> bits * e & (1 << bits) - 1 == x[t, d]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("lead", [(), (3,), (2, 1, 3)])
def test_unpacking_is_the_inverse_both_ways(bits: int, lead: tuple[int, ...]) -> None:
    x = codes(bits, 32, 48, lead)
    for pack, unpack in ((pack_keys, unpack_keys), (pack_values, unpack_values)):
        packed = pack(x, bits)
        assert torch.equal(unpack(packed, bits), x.to(torch.uint8))
        noise = torch.randint(0, 256, packed.shape, dtype=torch.uint8)
        assert torch.equal(pack(unpack(noise, bits), bits), noise)
