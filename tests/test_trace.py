"""editcore.trace: what goes in and out of modules, seen and changed, and nothing left behind."""

import pytest
import torch

from editcore.hooks import capture, replaced, run

IDS = torch.tensor([[5, 6, 7, 8]])


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_inputs_and_outputs_fit_together(gpt2):
    model, _ = gpt2
    name = "transformer.h.2.mlp.c_proj"
    with capture(model, [name], "input", stop=False) as inputs, capture(model, [name], stop=False) as outputs:
        assert run(model, input_ids=IDS).logits.shape[:2] == IDS.shape
    module = model.get_submodule(name)
    assert torch.equal(module(inputs[name]), outputs[name])
    assert hooks(model) == 0


def test_a_pass_stops_after_the_last_watched_module(gpt2):
    model, _ = gpt2
    with (capture(model, ["transformer.h.3"], stop=False) as late,
          capture(model, ["transformer.h.0", "transformer.h.1"]) as kept):
        assert run(model, input_ids=IDS) is None
    assert set(kept) == {"transformer.h.0", "transformer.h.1"} and not late


def test_replaced_changes_the_result_and_is_undone(gpt2, llama):
    for model, block in ((gpt2[0], "transformer.h.1"), (llama[0], "model.layers.1")):
        before = run(model, input_ids=IDS).logits
        with replaced(model, block, lambda h: h + 1.5):
            with capture(model, [block], stop=False) as kept:
                inside = run(model, input_ids=IDS).logits
            assert kept
        assert not torch.allclose(before, inside)
        assert torch.equal(before, run(model, input_ids=IDS).logits)
        assert hooks(model) == 0


def test_hooks_go_when_the_block_fails(gpt2):
    model, _ = gpt2
    with pytest.raises(RuntimeError), capture(model, ["transformer.h.0"]), replaced(model, "lm_head", lambda h: h):
        raise RuntimeError
    assert hooks(model) == 0
