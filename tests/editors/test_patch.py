"""Patches of any parts: where they are looked up, what does not fit."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make

from editcore.delta import Patch, part_hook
from editcore.editors.calinet import Slots
from editcore.editors.grace import Codebook
from editcore.hooks import capture, run

C_FC = "transformer.h.2.mlp.c_fc"       # 32 -> 128
MLP = "transformer.h.2.mlp"             # 32 -> 32


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entry(key, value, radius=1e-3):
    return Codebook(key[None], value[None], key.new_tensor([radius]), ("a",))


def test_positions_that_are_looked_up(gpt2):
    model, _ = gpt2
    ids = torch.arange(5, 17).view(2, 6)
    with capture(model, [C_FC], "input", stop=False) as inputs:
        plain = run(model, input_ids=ids).logits
    keys = inputs[C_FC]
    book = entry(keys[0, 1], drawn(128)) + entry(keys[0, 3], drawn(128, seed=1))
    outputs = model.get_submodule(C_FC)(keys)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(book.output(keys, outputs, mask), outputs)       # nowhere
    mask[:, 3] = True
    changed = book.output(keys, outputs, mask) != outputs
    assert changed.any(-1).nonzero().tolist() == [[0, 3]]
    with Patch({C_FC: book}).applied(model):
        logits = run(model, input_ids=ids).logits
    assert torch.equal(logits[1], plain[1]) and torch.equal(logits[0, :1], plain[0, :1])
    assert (logits[0, 1:] != plain[0, 1:]).any(-1).all()


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
