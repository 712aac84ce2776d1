"""editcore.versions: rows of a batch on versions of their own equal each version's model run alone."""

import pytest
import torch
from conftest import make

from editcore.delta import Delta, LowRank, oriented
from editcore.editors.rowwise import added_rows, rows, versions
from editcore.hooks import run
from editcore.model import content_hash, module_of, name_of


def totals(model, count=3, scale=0.1):
    """Deltas of two layers' MLP output projections, the first without a change."""
    draw = torch.Generator().manual_seed(1)
    out = [Delta({})]
    for _ in range(count - 1):
        parts = {}
        for layer in (0, 2):
            for kind, value in module_of(model, "mlp_out", layer).named_parameters():
                parts[f"{name_of(model, 'mlp_out', layer)}.{kind}"] = scale * torch.randn(value.shape, generator=draw)
        out.append(Delta(parts))
    return out


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_each_row_sees_its_version(family, request):
    model, tok = request.getfixturevalue(family)
    before, several, owner = content_hash(model), totals(model), [2, 0, 1, 2, 0]
    ids = torch.randint(1, len(tok), (5, 7), generator=torch.Generator().manual_seed(0))
    with rows(model, versions(model, several), owner):
        found = run(model, input_ids=ids).logits
    for row, version in enumerate(owner):
        with several[version].applied(model):
            alone = run(model, input_ids=ids[row:row + 1]).logits[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-5, atol=1e-5)
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("rank", [1, 2, "dense"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_added_rows(family, rank, request):
    model, tok = request.getfixturevalue(family)
    module, name, draw = module_of(model, "mlp_out", 1), name_of(model, "mlp_out", 1), torch.Generator().manual_seed(2)
    d, m = model.config.hidden_size, max(module.weight.shape)
    changes = [oriented(torch.randn(d, 2 if rank == "dense" else rank, generator=draw),
                        torch.randn(2 if rank == "dense" else rank, m, generator=draw) / 9, module) for _ in range(2)]
    changes = [change.dense() if rank == "dense" else change for change in changes]
    ids = torch.randint(1, len(tok), (4, 6), generator=draw)
    with added_rows(model, name, changes, [1, 0, 0, 1]):
        found = run(model, input_ids=ids).logits
    for row, owner in enumerate([1, 0, 0, 1]):
        with Delta({name + ".weight": changes[owner]}).applied(model):
            alone = run(model, input_ids=ids[row:row + 1]).logits[0]
        torch.testing.assert_close(found[row], alone, rtol=1e-4, atol=1e-4)


def test_a_version_may_have_no_change_and_hooks_go_on_errors(gpt2):
    model, _ = gpt2
    name, ids = name_of(model, "mlp_out", 1), torch.ones(2, 3, dtype=torch.long)
    change = LowRank(torch.ones(max(module_of(model, "mlp_out", 1).weight.shape), 1), torch.arange(32.0)[None] / 32)
    with added_rows(model, name, [None, change], [0, 1]):
        found = run(model, input_ids=ids).logits
    torch.testing.assert_close(found[0], run(model, input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)
    assert (found[0] - found[1]).abs().max() > 0.1
    with pytest.raises(KeyError), rows(model, versions(model, totals(model)), [0]):
        raise KeyError
    assert not any(m._forward_hooks for m in model.modules())


def test_what_is_not_a_linear_map_is_named(gpt2):
    model = make("gpt2", len(gpt2[1]))
    with pytest.raises(ValueError, match="transformer.ln_f is not a linear map"):
        versions(model, [Delta({"transformer.ln_f.weight": torch.ones(32)})])
    with pytest.raises(ValueError, match="no parameter nothing.weight"):
        versions(model, [Delta({"nothing.weight": torch.ones(32)})])
