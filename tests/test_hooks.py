"""editcore.hooks: what goes in and out of modules, seen and changed, and nothing left behind."""

import pytest
import torch

from editcore.hooks import capture, hooked, replaced, run

IDS = torch.tensor([[5, 6, 7, 8]])
BLOCK = "transformer.h.1"


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_hooks_before_and_after_see_their_module_and_go(gpt2):
    model, _ = gpt2
    calls = []
    after = hooked(model, {BLOCK: lambda module, args, output: calls.append(module)})
    before = hooked(model, {BLOCK: lambda module, args, kwargs: calls.append(kwargs)},
                    before=True, with_kwargs=True)
    with after, before:
        assert hooks(model) == 2
        run(model, input_ids=IDS)
    assert "use_cache" in calls[0] and calls[1] is model.get_submodule(BLOCK)
    assert hooks(model) == 0


def test_inputs_and_outputs_fit_together(gpt2):
    model, _ = gpt2
    name = "transformer.h.2.mlp.c_proj"
    with capture(model, [name], "input", stop=False) as inputs, \
            capture(model, [name], stop=False) as outputs:
        assert run(model, input_ids=IDS).logits.shape[:2] == IDS.shape
    assert torch.equal(model.get_submodule(name)(inputs[name]), outputs[name])
    assert hooks(model) == 0


def test_a_pass_stops_after_the_last_watched_module(gpt2):
    model, _ = gpt2
    with capture(model, ["transformer.h.3"], stop=False) as late, \
            capture(model, ["transformer.h.0", BLOCK]) as outputs:
        assert run(model, input_ids=IDS) is None
    assert set(outputs) == {"transformer.h.0", BLOCK} and not late


@pytest.mark.parametrize("family, block", [("gpt2", BLOCK), ("llama", "model.layers.1")])
def test_replaced_changes_the_result_and_is_undone(family, block, request):
    model, _ = request.getfixturevalue(family)
    before = run(model, input_ids=IDS).logits
    with replaced(model, block, lambda h: h + 1.5):
        inside = run(model, input_ids=IDS).logits
    assert not torch.allclose(before, inside)
    assert torch.equal(before, run(model, input_ids=IDS).logits) and hooks(model) == 0


def test_a_tuple_keeps_its_other_items():
    model = torch.nn.Sequential(torch.nn.Identity())
    with replaced(model, "0", lambda h: h + 1):
        assert model((torch.zeros(2), "other"))[1] == "other"
        assert model((torch.zeros(2), "other"))[0].tolist() == [1, 1]


def test_hooks_go_when_the_block_fails(gpt2):
    model, _ = gpt2
    with pytest.raises(RuntimeError), capture(model, ["transformer.h.0"]), \
            replaced(model, "lm_head", lambda h: h):
        raise RuntimeError
    with pytest.raises(AttributeError), capture(model, ["transformer.h.0", "no.module"]):
        pass
    assert hooks(model) == 0
