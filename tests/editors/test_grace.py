"""GRACE: the codebook's rules, values trained as through the whole model, prompts that answer."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import drawn, make
from oracle import apart

from editcore.delta import Patch
from editcore.editors import EDITORS, configure
from editcore.editors.grace import Codebook, train_values
from editcore.editors.teacher_forcing import encode_batch
from editcore.hooks import capture, replaced, run
from editcore.likelihood import plan, read
from editcore.model import name_of
from editcore.tokens import encode, target_ids

GRACE = EDITORS["grace"]
C_FC = "transformer.h.2.mlp.c_fc"       # 32 -> 128


def settings(**changes):
    small = {"layer": 2, "part": "mlp_in", "steps": 25, "radius": 0.01}
    return configure("grace", small | changes)


def entry(key, value, label="a", radius=1.0):
    key = torch.as_tensor(key)
    return Codebook(key[None], torch.as_tensor(value)[None], key.new_tensor([radius]), (label,))


def by_rule(entries, radius):
    """The codebook by its rules: [[key, value, radius, label], ...] of (key, value, label)s."""
    book = []
    for key, value, label in entries:
        near = min(book, key=lambda row: math.dist(key, row[0]), default=None)
        d = math.dist(key, near[0]) if near else math.inf
        if not near or d > radius + near[2]:
            book.append([key, value, radius, label])
        elif near[3] == label:
            near[2] = max(near[2], d)
        else:
            near[2] = d / 2 - 1e-5
            book.append([key, value, d / 2, label])
    return book


def test_two_hundred_insertions_equal_the_rules():
    draw = random.Random(3)
    centres = [[draw.gauss(0, 2) for _ in range(3)] for _ in range(12)]
    entries = []
    for _ in range(200):
        key = [draw.gauss(x, 0.5) for x in draw.choice(centres)]
        entries.append((key, [draw.random() for _ in range(2)], draw.choice("xyz")))
    expected = by_rule(entries, 1.0)
    keys = torch.tensor([key for key, _, _ in entries], dtype=torch.float64)
    values = torch.tensor([value for _, value, _ in entries], dtype=torch.float64)
    books = [entry(key, value, label) for key, value, (_, _, label) in zip(keys, values, entries)]
    book = sum(books[1:], books[0])
    assert 20 < len(expected) < 150 and book.labels == tuple(row[3] for row in expected)
    assert any(row[2] < 0.5 for row in expected) and any(row[2] > 1 for row in expected)
    for column, name in enumerate(("keys", "values", "radii")):
        wanted = torch.tensor([row[column] for row in expected], dtype=torch.float64)
        tolerance = 2e-4 if name == "radii" else 0
        torch.testing.assert_close(getattr(book, name), wanted, rtol=tolerance, atol=0)
    probes = keys[:50, None] + drawn(50, 1, 3, seed=5).double() / 3
    answers = book.output(probes, torch.zeros(50, 1, 2, dtype=torch.float64))
    for probe, answer in zip(probes[:, 0].tolist(), answers[:, 0].tolist()):
        near = min(expected, key=lambda row: math.dist(row[0], probe))
        assert answer == (near[1] if math.dist(near[0], probe) <= near[2] else [0, 0])
    assert 5 < (answers != 0).any(-1).sum() < 45


def test_labels_close_together_split_and_equal_ones_widen():
    far = torch.tensor([1.2, 0.0])
    book = entry(torch.zeros(2), torch.ones(3))
    value = torch.full((3,), 2.0)
    split = book.insert(far, value, "b", 1.0)
    torch.testing.assert_close(split.radii, torch.tensor([0.6 - 1e-5, 0.6]), rtol=1e-6, atol=0)
    assert split.labels == ("a", "b") and torch.equal(split.keys[1], far)
    wide = book.insert(far, value, "a", 1.0)
    assert wide.labels == ("a",) and 1.2 <= wide.radii.item() < 1.2002
    assert torch.equal(wide.values, book.values)
    assert book.insert(far * 0.5, value, "a", 1.0).radii.item() == 1    # inside already
    beyond = book.insert(far * 2, value, "a", 1.0)      # an entry, whatever it says
    assert beyond.radii.tolist() == [1, 1] and beyond.labels == ("a", "a")
    again = book.insert(torch.zeros(2), value, "b", 1.0)    # the same input says something else
    assert again.labels == ("b",) and again.radii.tolist() == [1]
    assert torch.equal(again.values[0], value) and book.radii.tolist() == [1]


def test_small_distances_survive_rounding():
    keys = drawn(40, 64) * 100
    book = Codebook(keys, drawn(40, 3, seed=1), torch.full((40,), 1e-3), ("a",) * 40)
    distance, index = book.nearest(keys.flip(0) + 1e-5)
    assert index.tolist() == list(range(39, -1, -1)) and distance.max() < 5e-4


def test_the_value_takes_the_place_of_the_output_where_an_entry_is_hit(gpt2):
    model, _ = gpt2
    ids = torch.arange(5, 13).view(2, 4)
    value = drawn(128)
    with (capture(model, [C_FC], "input", stop=False) as inputs,
          capture(model, [C_FC], stop=False) as outputs):
        plain = run(model, input_ids=ids).logits
    patch = Patch({C_FC: entry(inputs[C_FC][1, 2], value, radius=1e-3)})
    act = "transformer.h.2.mlp.act"
    with patch.applied(model), capture(model, [act], "input", stop=False) as seen:
        logits = run(model, input_ids=ids).logits
    expected = outputs[C_FC].clone()
    expected[1, 2] = value
    assert torch.equal(seen[act], expected)
    assert torch.equal(logits[0], plain[0]) and torch.equal(logits[1, :2], plain[1, :2])
    assert (logits[1, 2:] - plain[1, 2:]).abs().max() > 0.01


def through_the_whole_model(model, tok, fact, config):
    """(key, value) of one fact by the whole model, one row, torch's Adam."""
    (prompt,) = encode(tok, [fact.text])
    target = target_ids(tok, fact.target_new)
    name = name_of(model, config.part, config.layer)
    ids = torch.tensor([prompt + target[:-1]])
    end = len(prompt) - 1
    with (capture(model, [name], "input", stop=False) as inputs,
          capture(model, [name], stop=False) as outputs):
        run(model, input_ids=ids)
    value = outputs[name][0, end].clone().requires_grad_()
    adam = torch.optim.Adam([value], lr=config.lr)
    for _ in range(config.steps):
        with replaced(model, name, lambda h: torch.cat([h[:, :end], value[None, None],
                                                        h[:, end + 1:]], 1)):
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        adam.zero_grad()
        (-log_p[range(end, end + len(target)), target].mean()).backward()
        adam.step()
    return inputs[name][0, end], value.detach()


@pytest.mark.parametrize("family, part, layer", [
    ("gpt2", "mlp_in", 2), ("gpt2", "mlp_out", 0), ("gpt2", "mlp_in", 3),
    ("llama", "mlp_out", 2), ("llama", "mlp_in", 1)])
def test_values_equal_training_through_the_whole_model(family, part, layer, request, facts):
    tok = request.getfixturevalue(family)[1]
    model = make(family, len(tok), dtype=torch.float64)
    config = settings(part=part, layer=layer, steps=6, lr=0.1)
    facts = facts[2:6]
    keys, values, loss = train_values(model, encode_batch(model, tok, facts), facts, config)
    gate = 1e-9 if family == "gpt2" else 2e-3   # Llama's norms work in float32 whatever the dtype
    for i, fact in enumerate(facts):
        key, value = through_the_whole_model(model, tok, fact, config)
        assert apart(keys[i], key) < gate and apart(values[i], value) < gate
    assert (loss > 0).all()


@pytest.mark.parametrize("family, part", [("gpt2", "mlp_in"), ("llama", "mlp_out")])
def test_edited_prompts_say_the_target_and_others_what_they_said(family, part, request, facts):
    model, tok = request.getfixturevalue(family)
    config = settings(part=part, radius=1e-3)
    texts = list(itertools.chain(*(fact.paraphrases for fact in facts)))
    others = plan(model, [(ids, target_ids(tok, "Rome")) for ids in encode(tok, texts)])
    edited = plan(model, [(encode(tok, [fact.text])[0], target_ids(tok, fact.target_new))
                          for fact in facts[:6]])
    base = read(model, others)
    before = read(model, edited)
    assert not before.hit[before.starts].any()
    patches = GRACE.edit_each(model, tok, facts[:6], config)
    total = sum(patches[1:], patches[0])
    with total.applied(model):
        after = read(model, edited)
        assert (read(model, others).logp == base.logp).all()
    # a random model's later pieces see the value through one block only: the first must be said
    assert after.hit[after.starts].all() and (after.nll < 0.8 * before.nll).all()
    together = GRACE.edit(model, tok, facts[:6], config)    # the same six, inserted as they come
    (name,) = together.parts
    assert together.parts[name].labels == total.parts[name].labels
    assert torch.equal(together.parts[name].values, total.parts[name].values)
    assert together.info["nll"] == pytest.approx(after.nll.tolist(), abs=0.3)    # one step before


def test_sequential_edits_are_one_codebook(gpt2, facts):
    model, tok = gpt2
    total = Patch({})
    for fact in (facts[0], facts[1], replace(facts[0], target_new="Cairo")):
        with total.applied(model):
            new = GRACE.edit(model, tok, [fact], settings())
        total = total + new
    (book,) = total.parts.values()
    assert book.labels == ("Cairo", "Paris") and book.radii.tolist() == pytest.approx([0.01] * 2)


def test_random_values_belong_to_their_facts(gpt2, facts):
    config = replace(settings(begin="random"), steps=0)     # the values that it begins with
    (both,) = GRACE.edit(*gpt2, facts[:3], config).parts.values()
    (alone,) = GRACE.edit(*gpt2, facts[2:3], config).parts.values()
    (other,) = GRACE.edit(*gpt2, facts[2:3], replace(config, seed=1)).parts.values()
    assert torch.equal(both.values[2], alone.values[0])
    assert both.values.min() >= 0 and both.values.max() < 1
    assert not torch.equal(other.values, alone.values)
