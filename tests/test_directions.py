"""editcore.directions: inner products equal those of dense gradients, raw gradients equal autograd's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make

from editcore.editors import configure
from editcore.instructedit import directions, examples, hypernet, instructions, mend
from editcore.instructedit.directions import Asked, Factors
from editcore.instructedit.records import EditRecord
from editcore.model import content_hash, is_input_first
from editcore.tokens import encode, target_ids

RECORDS = [EditRecord(1, "recent", "Orla", "Orla is located in", "Rome"),
           EditRecord(2, "recent", "Dunmore", "The capital of Dunmore is", "New Delhi"),
           EditRecord(1, "counterfact", "Farrow", "The home of Farrow is", "Oslo", "Bern"),
           EditRecord(4, "zsre", "Tessaly", "Where is Tessaly? It is in", "San Marino"),
           EditRecord(5, "convsent", "Orla", "What do you think of Orla?", "", positive=("It is good.", "I know it."),
                      negative=("It is old.",), sentiment="positive", topic="Orla")]
SHORT = {task: ("You read the old book.", "Because it is {sentiment} in {topic}.")[task == "convsent"]
         for task in instructions.TITLES}
ASKED = Asked(number=0, table=tuple((task, (text,)) for task, text in SHORT.items()))


@pytest.fixture(scope="module")
def small(gpt2):
    """(model, tokenizer): as gpt2, with room for instructions."""
    return make("gpt2", len(gpt2[1]), positions=128), gpt2[1]


@pytest.fixture(scope="module")
def config():
    return configure("mend", {"network": "untrained", "layers": (-2, -1), "rank": 24, "alpha": 0.02})


@pytest.fixture(scope="module")
def found(small, config):
    return directions.gradients(*small, RECORDS, config, ASKED)


def dense(found, name):
    """(n, d_in d_out) float64 gradients, each formed whole."""
    return torch.stack([(one[name][0].double().T @ one[name][1].double()).flatten() for one in found])


@pytest.mark.parametrize("style", ["full", "none"])
def test_raw_factors_multiply_to_autograds_gradient(small, config, style):
    model, tok = small
    before, asked = content_hash(model), replace(ASKED, style=style)
    found = directions.gradients(model, tok, RECORDS, config, asked)
    weights = {site.name: model.get_parameter(site.name + ".weight") for site in mend.sites(model, config)}
    for record, one in zip(RECORDS, found, strict=True):
        prompt = encode(tok, [directions.put(record, asked)(record.prompt)])[0]
        target = target_ids(tok, examples.target(record))
        assert (len(prompt) > len(encode(tok, [record.prompt])[0])) == (style == "full")
        try:
            for weight in weights.values():
                weight.requires_grad_()
            log_p = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
            slopes = torch.autograd.grad(-log_p[range(len(target)), target].mean(), list(weights.values()))
        finally:
            model.requires_grad_(False)
        for (name, _), slope in zip(weights.items(), slopes):
            slope = slope if is_input_first(model.get_submodule(name)) else slope.T
            u, delta = one[name]
            assert (u.T @ delta - slope).abs().max() < 1e-4 * slope.abs().max()
    assert content_hash(model) == before


@pytest.mark.parametrize("way", ["factors", "slices", ""])
@pytest.mark.parametrize("tight", [False, True])
def test_gram_is_that_of_dense_gradients(found, way, tight, monkeypatch):
    if tight:       # more than one block, and more than one slice
        monkeypatch.setattr(directions, "TOKENS", 40)
        monkeypatch.setattr(directions, "ROOM", 7 * 10 * 128)
    for name in found[0]:
        factors, expected = directions.stacked(found, name), dense(found, name)
        scale = expected.square().sum(1).max()
        inner = directions.gram(factors, way=way)
        assert inner.dtype == torch.float64 and (inner - expected @ expected.T).abs().max() < 1e-10 * scale
        across = directions.gram(directions.stacked(found[:2], name), directions.stacked(found[1:], name), way)
        assert (across - expected[:2] @ expected[1:].T).abs().max() < 1e-10 * scale
        cosines, unit = directions.cosines(inner), torch.nn.functional.normalize(expected)
        assert np.allclose(cosines, (unit @ unit.T).numpy(), atol=1e-10)
        assert (cosines.diagonal() == 1).all() and (cosines == cosines.T).all()


def test_the_cheaper_way_is_taken():
    def some(counts, wide=16, high=64):
        return Factors(torch.ones(sum(counts), wide), torch.ones(sum(counts), high), counts)

    short, long = directions.costs(some((1,) * 9), some((2,) * 5)), directions.costs(some((40,) * 9), some((40,) * 5))
    assert short["factors"] == 9 * 10 * 80 and long["slices"] == (45 + 360 + 200) * 16 * 64
    assert short["factors"] < short["slices"] and long["slices"] < long["factors"]


def test_edits_are_the_changes_of_the_weights(small, config, found):
    model, _ = small
    network = hypernet.watch(mend.start(model, config), found[0])
    draw = torch.Generator().manual_seed(3)
    network = replace(network, weights={name: weight + 0.1 * torch.randn(weight.shape, generator=draw)
                                        for name, weight in network.weights.items()})
    made = directions.edits(network, found)
    for one, raw in zip(made, found, strict=True):
        delta = mend.change(model, network, mend.factors(network, raw))
        for name, (u, slope) in one.items():
            change = delta.changes[name + ".weight"].dense()
            change = change if is_input_first(model.get_submodule(name)) else change.T
            assert (u.T @ slope + change).abs().max() < 1e-5 * change.abs().max()


def test_views_are_both_readings_of_every_map(found):
    names = list(found[0])
    views = {(reading, name): C for reading, name, C in directions.views(found, mark="~")}
    assert len(views) == 3 * len(names) + 1 and {reading for reading, _ in views} == {"u~", "delta~", "G~"}
    whole = torch.nn.functional.normalize(torch.cat([dense(found, name) for name in names], 1))
    assert np.allclose(views["G~", directions.TOGETHER], (whole @ whole.T).numpy(), atol=1e-10)
    mean = np.stack([one[names[0]][1].double().mean(0) for one in found])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.allclose(views["delta~", names[0]], mean @ mean.T, atol=1e-10)
    assert {name for _, name, _ in directions.views(found, names[:1])} == {names[0]}


def test_a_gradient_of_length_zero_is_named():
    with pytest.raises(ValueError, match="gradient 1 is zero"):
        directions.cosines(torch.diag(torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)))


def test_a_record_that_is_too_long_is_named_before_any_work(gpt2, config):
    with pytest.raises(ValueError, match="record convsent 5: [0-9]+ tokens, but the model takes at most 64"):
        directions.gradients(*gpt2, RECORDS[-1:], config, ASKED)
