"""Patches of any parts: what does not fit, what hooks leave."""

from types import SimpleNamespace

import pytest
import torch
from conftest import drawn, make

from editcore.delta import Patch, part_hook
from editcore.editors.calinet import Slots
from editcore.editors.grace import Codebook

C_FC = "transformer.h.2.mlp.c_fc"       # 32 -> 128


def entry(key, value, radius=1e-3):
    return Codebook(key[None], value[None], key.new_tensor([radius]), ("a",))


def test_positions_that_are_looked_up(gpt2):
    keys = drawn(2, 6, 32)
    book = entry(keys[0, 1], drawn(128)) + entry(keys[0, 3], drawn(128, seed=1))
    outputs = gpt2[0].get_submodule(C_FC)(keys)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(book.output(keys, outputs, mask), outputs)       # nowhere
    mask[:, 3] = True
    for places, hits in ((mask, [[0, 3]]), (None, [[0, 1], [0, 3]])):
        changed = book.output(keys, outputs, places) != outputs
        assert changed.any(-1).nonzero().tolist() == hits


@pytest.mark.parametrize("family, name", [
    ("gpt2", C_FC), ("gpt2", "transformer.h.1.mlp.c_proj"),
    ("llama", "model.layers.1.mlp.down_proj"), ("llama", "model.layers.1.mlp.up_proj")])
def test_what_does_not_fit_is_named_and_hooks_go(family, name):
    model = make(family, 50)
    weight = model.get_parameter(name + ".weight")
    inputs, outputs = weight.shape if family == "gpt2" else weight.shape[::-1]
    with pytest.raises(RuntimeError), \
            Patch({name: entry(drawn(inputs), drawn(outputs))}).applied(model):
        assert len(model.get_submodule(name)._forward_hooks) == 1
        raise RuntimeError
    for part in (entry(drawn(outputs + 1), drawn(inputs)), Slots(drawn(2, 7), drawn(2, 7))):
        with pytest.raises(ValueError, match="other widths than"), Patch({name: part}).applied(
                model):
            raise AssertionError
    assert not model.get_submodule(name)._forward_hooks


def test_tuple_outputs_keep_their_other_items():
    hook = part_hook(SimpleNamespace(output=lambda x, y: y + 1))
    assert hook(None, (drawn(1, 2, 3),), (torch.zeros(1), "rest")) == (torch.ones(1), "rest")
