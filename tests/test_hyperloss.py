"""editcore.hyperloss: losses and their gradients equal a plain version with dense weights and one pass a prompt."""

from dataclasses import replace

import pytest
import torch
from conftest import CITIES
from test_mend import SETTINGS, family, random_network
from torch.func import functional_call

from editcore.editors import EDITORS, configure
from editcore.instructedit import hyperloss, hypernet, mend
from editcore.model import content_hash, is_input_first


def example_of(tok, fact, other="The river"):
    """An Example with every part: the edit, two rephrases, three prompts to leave alone and a reply to avoid."""
    def ask(*texts):
        return hyperloss.pairs(tok, texts)
    return hyperloss.Example(
        fact.case_id, ask((fact.text, fact.target_new)),
        after=ask(*((prompt, fact.target_new) for prompt in fact.paraphrases)),
        locality=ask(*((prompt, CITIES[i]) for i, prompt in enumerate((*fact.neighbours, other)))),
        against=ask((fact.text, fact.target_true)))


def said(model, weights, pair):
    """(tokens, V) log-probabilities at the target's positions of one pair with some weights replaced."""
    prompt, target = map(list, pair)
    ids = torch.tensor([prompt + target])
    return functional_call(model, weights, kwargs={"input_ids": ids}).logits[0, len(prompt) - 1:-1].log_softmax(-1)


def plain(model, network, example):
    """The three losses with dense edited weights."""
    kept, handles = {}, []
    for site in network.sites:
        def hook(module, args, output, name=site.name):
            output.requires_grad_()
            output.retain_grad()
            kept[name] = args[0], output
        handles.append(model.get_submodule(site.name).register_forward_hook(hook))
    (prompt, target), = example.edit
    log_p = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
    (-log_p[range(len(target)), target].mean()).backward()
    for handle in handles:
        handle.remove()
    weights = {}
    for site in network.sites:
        u, delta = kept[site.name][0][0].detach(), kept[site.name][1].grad[0]
        some = (delta != 0).any(1)      # inputs are never all zero in these models
        u, delta = hypernet.transform(network, site, u[some], delta[some])
        weight = model.get_parameter(site.name + ".weight").detach()
        step = network.alpha(site.name) * torch.einsum("bo,bi->oi", delta, u)
        weights[site.name + ".weight"] = weight - (step.T if is_input_first(model.get_submodule(site.name)) else step)
    picked = {part: [said(model, weights, pair)[range(len(pair[1])), pair[1]] for pair in getattr(example, part)]
              for part in ("after", "against")}
    kl = []
    for pair in example.locality:
        with torch.no_grad():
            before = said(model, {}, pair)
        kl.append((before.exp() * (before - said(model, weights, pair))).sum(-1).mean())
    return {"edit": torch.stack([-one.mean() for one in picked["after"]]).mean(),
            "against": torch.stack([-(1 - one.exp()).log().mean() for one in picked["against"]]).mean(),
            "locality": torch.stack(kl).mean()}


@pytest.mark.parametrize("kind, dtype", [("gpt2", torch.float64), ("llama", torch.float64)])
def test_losses_and_gradients_equal_the_dense_ones(kind, dtype, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama, dtype)
    gate = 1e-9 if kind == "gpt2" else 1e-4     # Llama's norms work in float32 whatever the model's dtype
    network = random_network(model, configure("mend", SETTINGS | {"alpha": 0.1}))
    network = replace(network, weights={name: weight.requires_grad_() for name, weight in network.weights.items()})
    names, leaves = list(network.weights), list(network.weights.values())
    before = content_hash(model)
    for fact in facts[1:4]:
        example = example_of(tok, fact)
        found = hyperloss.losses(model, network, hyperloss.lay(model, network, example))
        expected = plain(model, network, example)
        for name in ("edit", "against", "locality"):
            assert found[name].item() == pytest.approx(expected[name].item(), rel=gate)
            assert found[name].item() > 1e-4
        mine, theirs = (torch.autograd.grad(0.1 * (one["edit"] + one["against"]) + one["locality"], leaves)
                        for one in (found, expected))
        for name, a, b in zip(names, mine, theirs):
            assert (a - b).norm() <= 10 * gate * b.norm(), name
        assert sum(part.abs().max() > 0 for part in mine) == len(leaves)
    assert content_hash(model) == before
    assert all(weight.grad is None for weight in model.parameters())


def test_no_step_no_divergence(gpt2, facts):
    model, tok = gpt2
    example = example_of(tok, facts[0])
    for alpha, small in ((0.0, True), (0.5, False)):
        network = mend.start(model, configure("mend", SETTINGS | {"alpha": alpha}))
        found = hyperloss.losses(model, network, hyperloss.lay(model, network, example))
        assert (found["locality"] == 0) == small


def test_missing_parts_count_nothing_and_one_is_finite(gpt2, facts):
    model, tok = gpt2
    network = mend.start(model, configure("mend", SETTINGS))
    example = replace(example_of(tok, facts[0]), locality=(), against=())
    found = hyperloss.losses(model, network, hyperloss.lay(model, network, example))
    assert found["locality"] == 0 == found["against"] and found["edit"] > 0
    sure = torch.tensor([0.0, -1e-9, -20.0])
    assert torch.isfinite(hyperloss.doubt(sure)).all()
    assert hyperloss.doubt(sure)[2].item() == pytest.approx(2.061e-9, rel=1e-3)


def test_an_example_is_edited_as_its_fact(gpt2, facts):
    model, tok = gpt2
    config = configure("mend", SETTINGS)
    network = random_network(model, config, dtype=torch.float32)
    one = EDITORS["mend"].edit(model, tok, facts[:1], config, network)
    same = hyperloss.edit(model, network, example_of(tok, facts[0]))
    for name, change in ((name, change.dense()) for name, change in same.changes.items()):
        assert torch.allclose(one.changes[name].dense(), change, rtol=1e-4, atol=1e-6 * change.abs().max())
    held = [example_of(tok, fact) for fact in facts[:3]]
    means = hyperloss.evaluate(model, network, held)
    each = [hyperloss.losses(model, network, hyperloss.lay(model, network, one)) for one in held]
    assert means["edit"] == pytest.approx(sum(one["edit"].item() for one in each) / 3, rel=1e-4)


def test_bad_examples_are_named(gpt2, facts):
    model, tok = gpt2
    network, example = mend.start(model, configure("mend", SETTINGS)), example_of(tok, facts[0])
    for change, words in (({"after": ()}, "record 0: after is empty"), ({"edit": ()}, "record 0: edit is empty"),
                          ({"locality": (((3,), ()),)}, "record 0: the target has no tokens"),
                          ({"edit": (((), (3,)),)}, "record 0: the prompt has no tokens"),
                          ({"after": (((3,) * 70, (4,)),)}, "record 0: 70 tokens, but the model takes at most 64")):
        with pytest.raises(ValueError, match=words):
            hyperloss.lay(model, network, replace(example, **change))
