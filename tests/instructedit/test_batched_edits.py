"""Batched edits: rows that see their own edit give what the same edits give one after another."""

import pytest
import torch
from conftest import make

from editcore.delta import Delta, LowRank, Patch, oriented
from editcore.editors.calinet import Slots
from editcore.editors.grace import Codebook
from editcore.hooks import hooked
from editcore.instructedit.batched_edits import each_row
from editcore.model import name_of

IDS = torch.tensor([[5, 9, 2, 7], [3, 1, 4, 4], [8, 8, 6, 1], [5, 9, 2, 7], [2, 2, 3, 9]])


def low(model, rank, seed, layer=1, part="mlp_out"):
    """A Delta of one LowRank change in the model's own orientation."""
    draw, module = torch.Generator().manual_seed(seed), model.get_submodule(name_of(model, part,
                                                                                    layer))
    rows, columns = module.weight.shape
    if not isinstance(module, torch.nn.Linear):
        rows, columns = columns, rows
    change = oriented(torch.randn(rows, rank, generator=draw) / 8,
                      torch.randn(rank, columns, generator=draw), module)
    return Delta({name_of(model, part, layer) + ".weight": change})


def edits(model):
    """No edit; LowRank ones of several ranks and maps; a dense one; codebook and slots."""
    name, d = name_of(model, "mlp_out", 2), model.config.hidden_size
    module, draw = model.get_submodule(name), torch.Generator().manual_seed(1)
    dense = {name + ".weight": torch.randn(module.weight.shape, generator=draw) / 8}
    if getattr(module, "bias", None) is not None:
        dense[name + ".bias"] = torch.randn(d, generator=draw)
    width = module.weight.numel() // d
    book = Codebook(torch.randn(2, width, generator=draw), torch.randn(2, d, generator=draw),
                    torch.tensor([50.0, 0.1]), ("a", "b"))
    slots = Slots(torch.randn(3, d, generator=draw), torch.randn(3, d, generator=draw))
    return [None, low(model, 2, 0), low(model, 1, 1) + low(model, 4, 2, 2, "mlp_in"), Delta(dense),
            Patch({name: book, name_of(model, "mlp", 1): slots})]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_row_sees_its_own_edit(kind):
    model = make(kind, 12)
    several, owner = edits(model), [3, 1, 4, 2, 0]
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    with each_row(model, several, owner):
        together = model(input_ids=IDS).logits
    plain = model(input_ids=IDS).logits
    for row, one in enumerate(owner):
        if several[one] is None:
            alone = plain[row]
        else:
            with several[one].applied(model):
                alone = model(input_ids=IDS[row:row + 1]).logits[0]
            assert (alone - plain[row]).abs().max() > 1e-2, "the edit does something"
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_codebooks_are_looked_up_at_the_ends_of_prompts(gpt2):
    model, _ = gpt2
    patch, asked = edits(model)[-1], torch.zeros(5, 4, dtype=torch.bool)
    asked[:, 2] = True
    with each_row(model, [patch], [0] * 5, asked):
        together = model(input_ids=IDS).logits
    hooks = {name: lambda _, args, y, part=part: part.output(args[0], y, asked)
             for name, part in patch.parts.items()}
    with hooked(model, hooks):
        torch.testing.assert_close(together, model(input_ids=IDS).logits)
    with patch.applied(model):
        assert (together - model(input_ids=IDS).logits).abs().max() > 1e-3


def test_edits_that_do_not_fit_are_refused(gpt2):
    model, _ = gpt2
    with pytest.raises(ValueError, match="is not a linear map"), each_row(
            model, [Delta({"transformer.ln_f.weight": torch.zeros(32)})], [0]):
        pass
    wrong = LowRank(torch.zeros(3, 1), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="the model's is"), each_row(
            model, [Delta({"transformer.h.1.mlp.c_proj.weight": wrong})], [0]):
        pass
    assert not any(module._forward_hooks for module in model.modules())
