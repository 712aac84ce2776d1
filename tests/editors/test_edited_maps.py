"""rowwise: each row of a batch on a version of its own equals that version's model run alone."""

import pytest
import torch

from editcore.delta import Delta, oriented
from editcore.editors.rowwise import each_row, each_row_added, edited_maps
from editcore.hooks import run
from editcore.model import module_of, name_of


def deltas_of(model):
    """Deltas of two layers' MLP output projections, the first without a change."""
    generator = torch.Generator().manual_seed(1)
    deltas = [Delta({})]
    for _ in range(2):
        changes = {}
        for layer in (0, 2):
            name = name_of(model, "mlp_out", layer)
            for kind, value in module_of(model, "mlp_out", layer).named_parameters():
                changes[f"{name}.{kind}"] = 0.1 * torch.randn(value.shape, generator=generator)
        deltas.append(Delta(changes))
    return deltas


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_sees_its_version(family, request):
    model, tok = request.getfixturevalue(family)
    deltas = deltas_of(model)
    owners = [2, 0, 1, 2, 0]
    ids = torch.randint(1, len(tok), (5, 7), generator=torch.Generator().manual_seed(0))
    with each_row(model, edited_maps(model, deltas), owners):
        found = run(model, input_ids=ids).logits
    for row, owner in enumerate(owners):
        with deltas[owner].applied(model):
            alone = run(model, input_ids=ids[row:row + 1]).logits[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)
    with each_row(model, None, owners):
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [1, 2, "dense"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_sees_its_added_change(family, rank, request):
    model, tok = request.getfixturevalue(family)
    name = name_of(model, "mlp_out", 1)
    module = module_of(model, "mlp_out", 1)
    generator = torch.Generator().manual_seed(2)
    r = 2 if rank == "dense" else rank
    changes = []
    for _ in range(2):
        left = torch.randn(model.config.hidden_size, r, generator=generator)
        right = torch.randn(r, max(module.weight.shape), generator=generator) / 9
        change = oriented(left, right, module)
        changes.append(change.dense() if rank == "dense" else change)
    ids = torch.randint(1, len(tok), (4, 6), generator=generator)
    owners = [1, 0, 0, 1]
    with each_row_added(model, name, changes, owners):
        found = run(model, input_ids=ids).logits
    for row, owner in enumerate(owners):
        with Delta({name + ".weight": changes[owner]}).applied(model):
            alone = run(model, input_ids=ids[row:row + 1]).logits[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)


def test_hooks_go_on_errors(gpt2):
    model, _ = gpt2
    with pytest.raises(KeyError), each_row(model, edited_maps(model, deltas_of(model)), [0]):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_no_linear_map_is_named(gpt2):
    model, _ = gpt2
    with pytest.raises(ValueError, match="transformer.ln_f is not a linear map"):
        edited_maps(model, [Delta({"transformer.ln_f.weight": torch.ones(32)})])
    with pytest.raises(ValueError, match="no parameter nothing.weight"):
        edited_maps(model, [Delta({"nothing.weight": torch.ones(32)})])
