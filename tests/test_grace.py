"""editcore.editors.grace: values trained as through the whole model, prompts that say the target, others untouched."""

from dataclasses import replace

import pytest
import torch
from conftest import make

from editcore.delta import Patch
from editcore.editors import EDITORS, configure
from editcore.editors.grace import trained
from editcore.editors.teacher_forcing import forced
from editcore.hooks import capture, replaced, run
from editcore.likelihood import plan, prompt_ends, read
from editcore.model import content_hash, name_of
from editcore.tokens import encode, target_ids

SETTINGS = {"layer": 2, "part": "mlp_in", "steps": 25, "radius": 0.01}
GRACE = EDITORS["grace"]


def settings(**changes):
    return configure("grace", SETTINGS | changes)


def plainly(model, tok, fact, config):
    """(key, value) of one fact by the whole model, one row, torch's Adam."""
    (prompt,), target = encode(tok, [fact.text]), target_ids(tok, fact.target_new)
    name, ids = name_of(model, config.part, config.layer), torch.tensor([prompt + target[:-1]])
    with capture(model, [name], "input", stop=False) as x, capture(model, [name], stop=False) as y:
        run(model, input_ids=ids)
    end = len(prompt) - 1
    value = y[name][0, end].clone().requires_grad_()
    adam = torch.optim.Adam([value], lr=config.lr)
    for _ in range(config.steps):
        with replaced(model, name, lambda h: torch.cat([h[:, :end], value[None, None], h[:, end + 1:]], 1)):
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        adam.zero_grad()
        (-sum(log_p[end + t, token] for t, token in enumerate(target)) / len(target)).backward()
        adam.step()
    return x[name][0, end], value.detach()


@pytest.mark.parametrize("family, part, layer", [("gpt2", "mlp_in", 2), ("gpt2", "mlp_out", 0), ("gpt2", "mlp_in", 3),
                                                 ("llama", "mlp_out", 2), ("llama", "mlp_in", 1)])
def test_equals_training_through_the_whole_model(family, part, layer, request, facts):
    tok = request.getfixturevalue(family)[1]
    model = make(family, len(tok), dtype=torch.float64)
    config = settings(part=part, layer=layer, steps=6, lr=0.1)
    facts = facts[2:6]
    keys, values, loss = trained(model, forced(model, tok, facts), facts, config)
    gate = 1e-9 if family == "gpt2" else 2e-3       # Llama's norms work in float32 whatever the model's dtype
    for i, fact in enumerate(facts):
        key, value = plainly(model, tok, fact, config)
        assert ((keys[i] - key).norm() / key.norm()).item() < gate
        assert ((values[i] - value).norm() / value.norm()).item() < gate
    assert (loss > 0).all()


@pytest.mark.parametrize("family, part", [("gpt2", "mlp_in"), ("llama", "mlp_out")])
def test_edited_prompts_say_the_target_and_others_what_they_said(family, part, request, facts):
    model, tok = request.getfixturevalue(family)
    before, config = content_hash(model), settings(part=part, radius=1e-3)
    others = [(prompt, target_ids(tok, "Rome")) for prompt in encode(tok, [p for f in facts for p in f.paraphrases])]
    pairs = [(encode(tok, [fact.text])[0], target_ids(tok, fact.target_new)) for fact in facts[:6]]
    total = Patch({})
    for patch in GRACE.edit_each(model, tok, facts[:6], config):
        total = total + patch
    edited, rest = plan(model, pairs), plan(model, others)
    base, unedited = read(model, rest), read(model, edited)
    assert not unedited.hit[unedited.starts].any()
    for asked in (None, prompt_ends):
        with total.applied(model, asked and asked(edited)):
            found = read(model, edited)
        with total.applied(model, asked and asked(rest)):
            assert (read(model, rest).logp == base.logp).all()
        # a random model's later pieces see the value through one block only: the first piece must be said
        assert found.hit[found.starts].all() and (found.nll < 0.8 * unedited.nll).all()
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())
    one = GRACE.edit(model, tok, facts[:6], config)     # the same six, inserted as they come
    (name,) = one.parts
    assert one.parts[name].labels == total.parts[name].labels == tuple(f.target_new for f in facts[:6])
    assert torch.equal(one.parts[name].values, total.parts[name].values)
    assert one.info["nll"] == pytest.approx(found.nll.tolist(), abs=0.3)    # seen before the last step


def test_sequential_edits_are_one_codebook(gpt2, facts):
    model, tok = gpt2
    config, total = settings(), Patch({})
    for fact in (facts[0], facts[1], replace(facts[0], target_new="Cairo")):
        (new,) = GRACE.edit_groups(model, tok, [[fact]], config, prepared=[None], current=[total])
        total = total + new
    (book,) = total.parts.values()
    assert book.labels == ("Cairo", "Paris") and book.radii.tolist() == pytest.approx([0.01] * 2)
    made = plan(model, [(encode(tok, [fact.text])[0], target_ids(tok, word))
                        for fact, word in ((facts[0], "Cairo"), (facts[1], "Paris"))])
    with total.applied(model):
        found = read(model, made)
    assert found.hit[found.starts].all()


def test_close_prompts_split_between_them(gpt2, facts):
    model, tok = gpt2
    config = settings(radius=1000.0)    # everything is close
    one = GRACE.edit(model, tok, facts[:2], config)
    (book,) = one.parts.values()
    d = (book.keys[0] - book.keys[1]).norm().item()
    assert book.radii.tolist() == pytest.approx([d / 2 - 1e-5, d / 2], rel=1e-6)
    same = GRACE.edit(model, tok, [facts[0], replace(facts[1], target_new=facts[0].target_new)], settings(radius=2.0))
    (book,) = same.parts.values()
    assert len(book.keys) == (1 if d <= 4 else 2)


def test_random_values_belong_to_their_facts(gpt2, facts):
    model, tok = gpt2
    config = settings(begin="random", steps=0)
    (both,), (one,) = (GRACE.edit(model, tok, some, config).parts.values() for some in (facts[:3], facts[2:3]))
    assert torch.equal(both.values[2], one.values[0]) and both.values.min() >= 0 and both.values.max() < 1
    (other,) = GRACE.edit(model, tok, facts[2:3], replace(config, seed=1)).parts.values()
    assert not torch.equal(other.values, one.values)


def test_errors(gpt2, facts):
    model, tok = gpt2
    before = content_hash(model)
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        GRACE.prepare(model, tok, settings(layer=4), None)
    with pytest.raises(ValueError, match="record 3: the loss is not finite at step 2"):
        GRACE.edit(model, tok, facts[3:5], settings(lr=float("nan")))
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        GRACE.edit(model, tok, [facts[0], long], settings())
    with pytest.raises(ValueError, match="part is 'attn', but must be one of mlp_in, mlp_out"):
        settings(part="attn")
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())
