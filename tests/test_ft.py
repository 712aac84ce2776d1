"""editcore.editors.ft: equal to training the weights in place, within the clamp, alone and together."""

from dataclasses import replace

import pytest
import torch
from conftest import make

from editcore import serial
from editcore.editors import EDITORS, configure
from editcore.model import content_hash

SETTINGS = {"epsilon": 0.02, "layer": 1, "lr": 5e-3, "steps": 8}
# Adam starts with lr · sign(gradient): in float32 a gradient at rounding level may flip single weights.
# Llama's norms work in float32 whatever the model's dtype.
GATES = {("gpt2", torch.float32): 2e-3, ("gpt2", torch.float64): 1e-9, ("llama", torch.float32): 2e-3,
         ("llama", torch.float64): 2e-3}


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_training_in_place(family, dtype, last, request, facts):
    tok, config = request.getfixturevalue(family)[1], configure("ft", SETTINGS | {"last_position": last})
    model = make(family, len(tok), dtype=dtype)
    before = content_hash(model)
    deltas = EDITORS["ft"].edit_each(model, tok, facts[:6], config, None)
    for fact, delta in zip(facts, deltas):
        expected = serial.ft(model, tok, fact, config)
        assert set(delta.changes) == set(expected) and len(expected) == (2 if family == "gpt2" else 1)
        for name, change in expected.items():
            assert apart(delta.changes[name], change) < GATES[family, dtype]
    assert content_hash(model) == before


def test_some_stop_earlier_and_nothing_leaves_the_clamp(gpt2, facts):
    model, tok = gpt2
    config = configure("ft", SETTINGS | {"stop_loss": 5.0, "steps": 12})
    deltas = EDITORS["ft"].edit_each(model, tok, facts, config, None)
    sizes = set()
    for fact, delta in zip(facts, deltas, strict=True):
        for name, change in serial.ft(model, tok, fact, config).items():
            assert apart(delta.changes[name], change) < 2e-3
        largest = max(change.abs().max().item() for change in delta.changes.values())
        assert largest <= 0.02 * (1 + 1e-6)
        sizes.add(round(largest / 5e-3))
    assert len(sizes) > 1


def test_a_batch_lowers_the_mean_loss(gpt2, facts):
    model, tok = gpt2
    config = configure("ft", SETTINGS | {"steps": 20})
    delta = EDITORS["ft"].edit(model, tok, facts[:4], config, None)

    def loss():
        total = 0
        for fact in facts[:4]:
            prompt, whole = tok([fact.text, fact.text + " " + fact.target_new])["input_ids"]
            log_p = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            total += -log_p[range(len(prompt) - 1, len(whole) - 1), whole[len(prompt):]].mean()
        return total / 4

    before = loss()
    with delta.applied(model):
        assert loss() < before - 0.5
    one = EDITORS["ft"].edit(model, tok, facts[:1], config, None)
    (same,) = EDITORS["ft"].edit_each(model, tok, facts[:1], config, None)
    assert all(torch.equal(one.changes[name], same.changes[name]) for name in one.changes)


def test_errors(gpt2, facts):
    model, tok = gpt2
    config = configure("ft", SETTINGS)
    before = content_hash(model)
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        EDITORS["ft"].prepare(model, tok, replace(config, layer=4), None)
    with pytest.raises(ValueError, match="record 3: the loss is not finite at step 2"):
        EDITORS["ft"].edit_each(model, tok, facts[3:5], replace(config, lr=float("nan")), None)
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        EDITORS["ft"].edit_each(model, tok, [facts[0], long], config, None)
    assert content_hash(model) == before
