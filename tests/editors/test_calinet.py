"""CaliNet: nothing at the start, gradients in the slots alone, all facts learned by one patch."""

from itertools import chain

import pytest
import torch
from conftest import make
from oracle import apart

from editcore.delta import Patch
from editcore.editors import EDITORS, configure
from editcore.editors.calinet import Slots, below_slots, empty_slots, losses, worded
from editcore.editors.teacher_forcing import encode_batch
from editcore.hooks import capture, run
from editcore.likelihood import plan, read
from editcore.tokens import encode, target_ids

CALINET = EDITORS["calinet"]


def settings(**changes):
    small = {"layers": (3,), "slots": 16, "steps": 40, "lr": 0.02, "rows": 8}
    return configure("calinet", small | changes)


def questions(tok, facts):
    return [(encode(tok, [fact.text])[0], target_ids(tok, fact.target_new)) for fact in facts]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gptj", "gpt_neox"])
def test_changes_nothing_at_the_start(family):
    model = make(family, 50)
    ids = torch.arange(5, 17).view(2, 6)
    before = run(model, input_ids=ids).logits
    with empty_slots(model, settings(layers=(1, 3)), torch.Generator()).applied(model):
        assert torch.equal(run(model, input_ids=ids).logits, before)


def test_slots_add_their_answer(gpt2):
    model, _ = gpt2
    name = "transformer.h.2.mlp"
    ids = torch.arange(5, 13).view(2, 4)
    slots = Slots(*torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)))
    with (capture(model, [name], "input", stop=False) as inputs,
          capture(model, [name], stop=False) as outputs):
        run(model, input_ids=ids)
    with Patch({name: slots}).applied(model), capture(model, [name], stop=False) as seen:
        run(model, input_ids=ids)
    x = inputs[name]
    hidden = x.double() @ slots.keys.double().T
    answer = hidden * 0.5 * (1 + torch.erf(hidden / 2 ** 0.5)) @ slots.values.double()
    expected = outputs[name] + answer
    torch.testing.assert_close(seen[name].double(), expected, rtol=1e-5, atol=1e-5)
    other = Slots(slots.keys[:2], slots.values[:2] * 2)
    both = (slots + other).output(x, outputs[name])
    torch.testing.assert_close(both, other.output(x, seen[name]))


@pytest.mark.parametrize("family, layers", [("gpt2", (3,)), ("gpt2", (1, 3)), ("gpt2", (0,)),
                                            ("llama", (2, 3))])
def test_loss_and_gradient_equal_those_of_the_whole_model(family, layers, request, facts):
    tok = request.getfixturevalue(family)[1]
    model = make(family, len(tok), dtype=torch.float64)
    config = settings(layers=layers)
    facts = worded(facts[2:5], 1)
    batch = encode_batch(model, tok, facts)
    generator = torch.Generator().manual_seed(0)
    patch = empty_slots(model, config, generator)
    for part in patch.parts.values():
        part.values.add_(0.3 * torch.randn(part.values.shape, generator=generator))
    tensors = list(chain(*((part.keys, part.values) for part in patch.parts.values())))
    for tensor in tensors:
        tensor.requires_grad_()
    loss = losses(model, below_slots(model, batch, config), batch, patch)
    expected = []
    with patch.applied(model):
        for prompt, target in questions(tok, facts):
            log_p = model(input_ids=torch.tensor([prompt + target[:-1]])).logits[0].log_softmax(-1)
            positions = range(len(prompt) - 1, len(prompt) + len(target) - 1)
            expected.append(-log_p[positions, target].mean())
    expected = torch.stack(expected)
    gate = 1e-9 if family == "gpt2" else 1e-5   # Llama's norms work in float32 whatever the dtype
    torch.testing.assert_close(loss, expected, rtol=gate, atol=0)
    gradients = (torch.autograd.grad(each.sum(), tensors) for each in (loss, expected))
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.norm() > 0 and apart(found, wanted) < gate
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("family, layers", [("gpt2", (3,)), ("llama", (2, 3))])
def test_all_facts_are_learned_by_one_patch(family, layers, request, facts):
    model, tok = request.getfixturevalue(family)
    config = settings(layers=layers)
    scoring = plan(model, questions(tok, facts))
    before = read(model, scoring)
    patch = CALINET.edit(model, tok, facts, config)
    assert len(patch.parts) == len(layers) and patch.info["wordings"] == 36
    with patch.applied(model):
        after = read(model, scoring)
    assert after.nll.mean() < 0.7 * before.nll.mean() and (after.nll < before.nll).all()
    assert patch.info["nll"] == pytest.approx(after.nll.mean(), rel=0.5)
    again = CALINET.edit(model, tok, facts, config)
    for name, part in patch.parts.items():
        assert torch.equal(again.parts[name].values, part.values)


def test_a_further_edit_adds_its_slots(gpt2, facts):
    model, tok = gpt2
    ids = torch.arange(4, 9)[None]
    first = CALINET.edit(model, tok, facts[:2], settings(steps=10))
    with first.applied(model):
        second = CALINET.edit(model, tok, facts[2:4], settings(steps=10))
    with first.applied(model), second.applied(model):
        nested = run(model, input_ids=ids).logits
    both = first + second
    with both.applied(model):
        found = run(model, input_ids=ids).logits
    torch.testing.assert_close(found, nested, rtol=1e-5, atol=1e-5)
    assert both.parts["transformer.h.3.mlp"].keys.shape == (32, 32)


def test_training_ends_when_the_loss_is_low(gpt2, facts):
    patch = CALINET.edit(*gpt2, facts[:1], settings(stop_loss=50.0, rows=0))
    assert patch.norm() == 0 and patch.info["nll"] < 50
    last = CALINET.edit(*gpt2, facts[:1], settings(layers=(-1,), steps=1))
    assert list(last.parts) == ["transformer.h.3.mlp"]


def test_wordings(facts):
    found = worded(facts[:2], 1)
    assert [fact.text for fact in found] == ["Orla is located in", "Where is Orla? It is in",
                                             "The capital of Vintar Melk is",
                                             "Where is Vintar Melk? It is in"]
    assert [fact.target_new for fact in found] == ["Rome", "Rome", "Paris", "Paris"]
