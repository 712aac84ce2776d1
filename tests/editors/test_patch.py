"""Patches of any parts: where they are looked up, sums, files, what does not fit."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import make
from safetensors.torch import save_file

from editcore.delta import Patch, load, part_hook
from editcore.editors.calinet import Slots
from editcore.editors.grace import Codebook
from editcore.hooks import capture, run
from editcore.likelihood import plan, prompt_ends, read

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
    keys = inputs[C_FC][0]
    patch = Patch({C_FC: entry(keys[1], drawn(128)) + entry(keys[3], drawn(128, seed=1))})
    masks = [torch.zeros(2, 6, dtype=torch.bool), torch.tensor([[True, False, False]] * 2)]
    with patch.applied(model, masks):
        assert torch.equal(run(model, input_ids=ids).logits, plain)     # nowhere
        logits = run(model, input_ids=ids).logits       # at position 3, counted from the right
        with pytest.raises(ValueError, match="run more often than `positions` has masks"):
            run(model, input_ids=ids)
    assert torch.equal(logits[0, :3], plain[0, :3]) and not torch.equal(logits[0, 3], plain[0, 3])
    assert not model.get_submodule(C_FC)._forward_hooks


@pytest.mark.parametrize("lead", [[], list(range(30, 50))], ids=["apart", "prefix"])
def test_ends_of_prompts_in_a_plan(lead, gpt2):
    model, _ = gpt2
    pairs = [(lead + [5, 6, 7], [8, 9]), (lead + [5, 6, 7], [10]), (lead + [11, 12], [13]),
             (lead + [14] * 6, [5, 6])]
    scoring = plan(model, pairs, max_tokens=8)
    assert len(scoring.batches) > 1 and bool(scoring.prefix.numel()) == bool(lead)
    keys = []
    for prompt, _ in pairs:
        with capture(model, [C_FC], "input") as inputs:
            run(model, input_ids=torch.tensor([prompt]))
        keys.append(inputs[C_FC][0])
    inside = Patch({C_FC: entry(keys[3][-3], drawn(128))})      # not at a prompt's end
    at_end = Patch({C_FC: entry(keys[0][-1], drawn(128))})
    base = read(model, scoring).logp
    with inside.applied(model, prompt_ends(scoring)):
        assert (read(model, scoring).logp == base).all()
    with inside.applied(model):
        assert abs(read(model, scoring).logp - base)[4:].max() > 1e-3
    with at_end.applied(model):
        everywhere = read(model, scoring).logp
    with at_end.applied(model, prompt_ends(scoring)):
        assert (read(model, scoring).logp == everywhere).all()
    assert (everywhere[3:] == base[3:]).all() and (everywhere[:3] != base[:3]).all()


def test_sums_norms_and_kinds():
    a = Patch({C_FC: entry(drawn(32), drawn(128, seed=1))}, {"editor": "x"})
    b = Patch({MLP: Slots(drawn(2, 32), drawn(2, 32))})
    both = a + b
    assert set(both.parts) == {C_FC, MLP} and both.info == {"editor": "x"} == (Patch({}) + a).info
    values = torch.cat([drawn(128, seed=1), drawn(2, 32).flatten()])
    assert both.norm() == pytest.approx(values.double().norm().item()) and Patch({}).norm() == 0
    assert both.norm(MLP) == pytest.approx(drawn(2, 32).norm().item())
    assert not Patch({MLP: Slots(drawn(2, 32) / 0, drawn(2, 32))}).is_finite()
    with pytest.raises(ValueError, match="c_fc has a part of another kind already"):
        a + Patch({C_FC: Slots(drawn(2, 32), drawn(2, 32))})


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "text.safetensors").write_text("no")
    metadata = {"format": "editcore-patch-1", "info": "{}",
                "parts": json.dumps({"m": {"kind": "slots"}})}
    save_file({"a": drawn(2)}, tmp_path / "few.safetensors", metadata)
    save_file({"a": drawn(2)}, tmp_path / "other.safetensors", {"format": "x"})
    for name in ("text", "few", "other"):
        with pytest.raises(ValueError, match=f"{name}.safetensors: not a .*, or damaged"):
            load(tmp_path / f"{name}.safetensors")


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
    with pytest.raises(ValueError, match="the model has no module m"), \
            Patch({"m": entry(drawn(2), drawn(2))}).applied(model):
        raise AssertionError
    assert not model.get_submodule(name)._forward_hooks


def test_tuple_outputs_keep_their_other_items():
    hook = part_hook(SimpleNamespace(output=lambda x, y, positions: y + 1))
    assert hook(None, (drawn(1, 2, 3),), (torch.zeros(1), "rest")) == (torch.ones(1), "rest")
