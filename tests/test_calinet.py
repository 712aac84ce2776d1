"""editcore.editors.calinet: nothing at the start, gradients in the slots alone, facts learned, the model as it was."""

from dataclasses import replace

import pytest
import torch
from conftest import make

from editcore.delta import Patch
from editcore.editors import EDITORS, configure
from editcore.editors.calinet import begin, fresh, losses, wordings
from editcore.editors.teacher_forcing import forced
from editcore.likelihood import plan, read
from editcore.model import content_hash
from editcore.patch import Beside
from editcore.tokens import encode, target_ids

SETTINGS = {"layers": (3,), "slots": 16, "steps": 40, "lr": 0.02, "rows": 8}
CALINET = EDITORS["calinet"]


def settings(**changes):
    return configure("calinet", SETTINGS | changes)


def noisy(patch):
    """The patch with values that are not zero, all tensors wanting gradients."""
    draw = torch.Generator().manual_seed(3)
    return Patch({name: Beside(part.keys.clone().requires_grad_(), (part.values + 0.3 * torch.randn(
        part.values.shape, generator=draw, dtype=part.values.dtype)).requires_grad_())
        for name, part in patch.parts.items()})


def asked(tok, facts):
    return [(encode(tok, [fact.text])[0], target_ids(tok, fact.target_new)) for fact in facts]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gpt_neox"])
def test_changes_nothing_at_the_start(family):
    model, ids = make(family, 50), torch.arange(5, 17).view(2, 6)
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with fresh(model, settings(layers=(1, 3)), torch.Generator()).applied(model):
            assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("family, layers", [("gpt2", (3,)), ("gpt2", (1, 3)), ("gpt2", (0,)), ("llama", (2, 3))])
def test_loss_and_gradient_equal_those_of_the_whole_model(family, layers, request, facts):
    tok = request.getfixturevalue(family)[1]
    model, config = make(family, len(tok), dtype=torch.float64), settings(layers=layers)
    some = wordings(facts[2:5], 1)
    rows, patch = forced(model, tok, some), noisy(fresh(model, config, torch.Generator().manual_seed(0)))
    assert len(some) == 6 and all(part.keys.dtype == torch.float64 for part in patch.parts.values())
    loss = losses(model, begin(model, rows, config), rows, patch)
    expected = []
    with patch.applied(model):
        for prompt, target in asked(tok, some):
            log_p = model(input_ids=torch.tensor([prompt + target[:-1]])).logits[0].log_softmax(-1)
            expected.append(-log_p[range(len(prompt) - 1, len(prompt) + len(target) - 1), target].mean())
    expected = torch.stack(expected)
    gate = 1e-9 if family == "gpt2" else 1e-5       # Llama's norms work in float32 whatever the model's dtype
    torch.testing.assert_close(loss, expected, rtol=gate, atol=0)
    tensors = [one for part in patch.parts.values() for one in vars(part).values()]
    for a, b in zip(*(torch.autograd.grad(which.sum(), tensors) for which in (loss, expected)), strict=True):
        assert b.norm() > 0 and ((a - b).norm() / b.norm()).item() < gate
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())


@pytest.mark.parametrize("family, layers", [("gpt2", (3,)), ("llama", (2, 3))])
def test_all_facts_are_learned_by_one_patch_and_the_model_stays(family, layers, request, facts):
    model, tok = request.getfixturevalue(family)
    before, config, made = content_hash(model), settings(layers=layers), plan(model, asked(tok, facts))
    unedited = read(model, made)
    patch = CALINET.edit(model, tok, facts, config)
    assert len(patch.parts) == len(layers) and patch.info["wordings"] == 36 and patch.is_finite() and patch.norm() > 0
    with patch.applied(model):
        edited = read(model, made)
    assert edited.nll.mean() < 0.7 * unedited.nll.mean() and (edited.nll < unedited.nll).all()
    assert patch.info["nll"] == pytest.approx(edited.nll.mean(), rel=0.5)
    assert content_hash(model) == before and (read(model, made).logp == unedited.logp).all()
    assert not any(m._forward_hooks for m in model.modules())
    again = CALINET.edit(model, tok, facts, config)
    assert all(torch.equal(again.parts[name].values, part.values) for name, part in patch.parts.items())


def test_a_further_edit_starts_from_the_patched_model_and_adds_its_slots(gpt2, facts):
    model, tok = gpt2
    config = settings(steps=10)
    first = CALINET.edit(model, tok, facts[:2], config)
    (second,) = CALINET.edit_groups(model, tok, [facts[2:4]], config, prepared=[None], current=[first])
    (alone,) = CALINET.edit_each(model, tok, facts[2:3], config)
    assert second.info["nll"] != alone.info["nll"]
    (part,) = (first + second).parts.values()
    assert part.keys.shape == (32, 32)
    with first.applied(model), second.applied(model), torch.no_grad():
        nested = model(input_ids=torch.arange(4, 9)[None]).logits
    with (first + second).applied(model), torch.no_grad():
        torch.testing.assert_close(model(input_ids=torch.arange(4, 9)[None]).logits, nested, rtol=1e-5, atol=1e-5)


def test_training_ends_when_the_loss_is_low(gpt2, facts):
    model, tok = gpt2
    patch = CALINET.edit(model, tok, facts[:1], settings(stop_loss=50.0, rows=0))
    assert patch.norm() == 0 and patch.info["nll"] < 50
    last = CALINET.edit(model, tok, facts[:1], settings(layers=(-1,), steps=1))
    assert list(last.parts) == ["transformer.h.3.mlp"]


def test_wordings(facts):
    made = wordings(facts[:2], 1)
    assert [one.text for one in made] == ["Orla is located in", "Where is Orla? It is in",
                                          "The capital of Vintar Melk is", "Where is Vintar Melk? It is in"]
    assert [one.target_new for one in made] == ["Rome", "Rome", "Paris", "Paris"]


def test_errors(gpt2, facts):
    model, tok = gpt2
    before = content_hash(model)
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        CALINET.prepare(model, tok, settings(layers=(1, 4)), None)
    with pytest.raises(ValueError, match="layers: at least one is needed"):
        CALINET.prepare(model, tok, settings(layers=()), None)
    with pytest.raises(ValueError, match="record [34]: the loss is not finite at step 2"):
        CALINET.edit(model, tok, facts[3:5], settings(lr=float("nan")))
    long = replace(facts[1], case_id=77, paraphrases=("The river " * 40,))
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        CALINET.edit(model, tok, [facts[0], long], settings())
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())
