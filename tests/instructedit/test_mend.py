"""MEND: factors equal dense gradients, edits dense updates, moments torch's; checked files."""

from dataclasses import replace

import pytest
import torch
from conftest import make
from safetensors.torch import save_file

from editcore.delta import Delta
from editcore.editors import EDITORS, configure
from editcore.instructedit import mend
from editcore.instructedit.edit_gradients import fact_gradients
from editcore.instructedit.mend import MendNetwork, RunningNorm
from editcore.model import content_hash, is_input_first
from editcore.tokens import encode, target_ids

FAMILIES = ["gpt2", "llama", "gptj", "gpt_neox", "qwen3"]
SETTINGS = {"network": "untrained", "layers": (-2, -1), "rank": 24, "alpha": 0.02}
COARSE = ("llama", "qwen3")     # whose norms work in float32 whatever the model's dtype


def family(kind, gpt2, llama, dtype=torch.float64):
    """(random model, tokenizer) of an architecture."""
    tok = (llama if kind in COARSE else gpt2)[1]
    return make(kind, len(tok), dtype=dtype), tok


def random_network(model, settings=SETTINGS, dtype=torch.float64):
    """A network with every weight away from its start, which has observed random rows."""
    draw = torch.Generator().manual_seed(1)
    network = mend.prepare(model, None, configure("mend", settings))
    if dtype == torch.float64:      # the moments are that always
        network = network.double()
    with torch.no_grad():
        for weight in network.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=draw, dtype=dtype)
    network.observe({site.name: (torch.randn(9, site.inputs, generator=draw, dtype=dtype),
                                 torch.randn(9, site.outputs, generator=draw, dtype=dtype))
                                 for site in network.sites})
    return network


def gradients(model, tok, facts, network):
    return fact_gradients(model, tok, facts, [site.name for site in network.sites], 2)


def autograd(model, tok, fact, names):
    """{map: dense gradient (out, in)} of the mean-token NLL of a fact's target, by a plain pass."""
    (prompt,), target = encode(tok, [fact.text]), target_ids(tok, fact.target_new)
    weights = [model.get_parameter(name + ".weight").requires_grad_() for name in names]
    try:
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1:-1]
        log_p = logits.log_softmax(-1)
        found = torch.autograd.grad(-log_p[range(len(target)), target].mean(), weights)
    finally:
        model.requires_grad_(False)
    return {name: one.T if is_input_first(model.get_submodule(name)) else one for name,
            one in zip(names, found)}


@pytest.mark.parametrize("kind", FAMILIES)
def test_factors_multiply_to_the_dense_gradient(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    network = mend.prepare(model, tok, configure("mend", SETTINGS))
    before = content_hash(model)
    assert len(network.sites) == (6 if kind in COARSE else 4)
    for fact, pairs in zip(facts, gradients(model, tok, facts[:6], network)):
        for name, dense in autograd(model, tok, fact, list(pairs)).items():
            u, delta = pairs[name]
            gate = 1e-5 if kind in COARSE else 1e-6
            assert (delta.T @ u - dense).abs().max() < dense.abs().max() * gate
            assert (delta != 0).any(1).all()
        assert len(u) == len(target_ids(tok,
                                        fact.target_new)), "tokens that predict, in the last map"
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())


def test_the_gradient_of_an_unwanted_continuation_is_subtracted(gpt2, facts):
    model, tok = gpt2
    network = mend.prepare(model, tok, configure("mend", SETTINGS))
    both = [replace(fact, unwanted=other.target_new + " and more")
            for fact, other in zip(facts[:3], facts[1:])]
    mixed = gradients(model, tok, [both[0], facts[5], *both[1:]], network)
    for fact, pairs in zip(both, [mixed[0], *mixed[2:]]):
        wanted = autograd(model, tok, fact, list(pairs))
        unwanted = autograd(model, tok, replace(fact, target_new=fact.unwanted), list(pairs))
        for name, (u, delta) in pairs.items():
            dense = wanted[name] - unwanted[name]
            assert (delta.T @ u - dense).abs().max() < dense.abs().max() * 1e-5
    alone = gradients(model, tok, [facts[5]], network)[0]
    for name, sides in alone.items():
        for side, other in zip(sides, mixed[1][name]):
            assert torch.allclose(side, other, rtol=1e-4, atol=1e-5), "beside others as alone"


def test_an_untrained_step_descends_along_normalised_factors(gpt2, facts):
    model, tok = gpt2
    network = mend.prepare(model, tok, configure("mend", SETTINGS | {"alpha": 1.0}))
    config = configure("mend", SETTINGS)
    plain = EDITORS["mend"].edit(model, tok, facts[:1], config,
                                 network)    # nothing observed: factors as they are
    for name, dense in autograd(model, tok, facts[0],
                                [site.name for site in network.sites]).items():
        change = plain.changes[name + ".weight"].dense().T      # GPT-2's orientation
        assert torch.allclose(change, -dense, atol=1e-5)
    found = gradients(model, tok, facts, network)
    for one in found:
        network.observe(one)
    made = network(found[0])
    for site in network.sites:
        alike = [other.name for other in network.sites if other.shape == site.shape]
        seen = torch.cat([torch.cat(one[name], 1) for name in alike for one in found]).double()
        expected = (torch.cat(found[0][site.name], 1) - seen.mean(0)) / (
            torch.where(seen.std(0) > 0, seen.std(0), 1) + 1e-7)
        assert torch.allclose(torch.cat(made[site.name], 1).double(), expected, rtol=1e-4,
                              atol=1e-4)


def test_running_moments_are_torchs():
    draw = torch.Generator().manual_seed(0)
    rows = 1e3 + torch.randn(50, 7, generator=draw, dtype=torch.float64) * torch.arange(7)
    norm = RunningNorm(7)
    for part in rows.split([1, 20, 5, 0, 24]):
        norm.observe(part)
    expected = (rows - rows.mean(0)) / (torch.where(rows.std(0) > 0, rows.std(0), 1) + 1e-7)
    assert norm.count == 50 and torch.allclose(norm(rows), expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(norm(rows)[:, 0],
                       torch.zeros(50, dtype=torch.float64)), "never varied: only centred"


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_network_is_the_equation(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    network = random_network(model)
    found = gradients(model, tok, facts[:1], network)[0]
    made = network(found)
    for site, own in zip(network.sites, network.maps):
        norm, layers = network.norms[site.shape], network.layers[site.shape]
        for row in range(len(found[site.name][0])):
            h = norm(torch.cat([side[row] for side in found[site.name]])[None])[0]
            for layer, scale, shift in zip(layers, own.scale, own.shift):
                h = h + torch.relu((layer.U @ (layer.V @ h) + layer.b) * scale + shift)
            assert torch.allclose(torch.cat([side[row] for side in made[site.name]]), h, rtol=1e-9,
                                  atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_an_edit_equals_the_dense_update_and_nothing_stays(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    network, ids = random_network(model), torch.tensor([encode(tok, [facts[0].text])[0]])
    before, plain = content_hash(model), model(input_ids=ids).logits
    factors = network(gradients(model, tok, facts[:1], network)[0])
    with torch.no_grad(), mend.edited_forward(model, network, factors):
        stepped = model(input_ids=ids).logits
    dense = {}
    for name, (u, delta) in factors.items():
        whole = (-network.steps()[name] * delta.T @ u).detach()
        dense[name + ".weight"] = whole.T if is_input_first(model.get_submodule(name)) else whole
    with Delta(dense).applied(model):
        expected = model(input_ids=ids).logits
    for name, change in mend.low_rank(model, network, factors).changes.items():
        assert torch.allclose(change.dense(), dense[name], rtol=1e-9, atol=1e-12)
    assert torch.allclose(stepped, expected, atol=1e-4 if kind in COARSE else 1e-6)
    assert (stepped - plain).abs().max() > 0.01
    assert content_hash(model) == before and torch.equal(model(input_ids=ids).logits, plain)


@pytest.mark.parametrize("editor", ["mend", "ke"])
def test_facts_add_up_and_groups_see_the_model_they_carry(editor, gpt2, facts):
    model, tok = gpt2
    editor, config = EDITORS[editor], configure(editor,
                                                {"network": "untrained", "layers": (-2, -1)})
    network = editor.prepare(model, tok, config)
    alone = editor.edit_each(model, tok, facts[:4], config, network)
    for name, change in editor.edit(model, tok, facts[:4], config, network).changes.items():
        expected = sum(one.changes[name].dense() for one in alone)
        assert torch.allclose(change.dense(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    groups = editor.edit_groups(model, tok, [[facts[2]]] * 2, config, prepared=[network] * 2,
                                current=alone[:2])
    for carried, one in zip(alone, groups):
        with carried.applied(model):
            expected = editor.edit(model, tok, [facts[2]], config, network)
        assert (one + expected * -1).norm() <= 1e-3 * expected.norm()


def test_saved_and_loaded_alike(gpt2, facts, tmp_path):
    model, tok = gpt2
    config = configure("mend", SETTINGS | {"network": str(tmp_path / "net.safetensors")})
    network = random_network(model, dtype=torch.float32)
    mend.save(network, config.network, task="recent")
    again = mend.prepare(model, tok, config)
    assert again.settings == network.settings and again.sites == network.sites
    assert again.info == {"task": "recent"}
    one, two = (EDITORS["mend"].edit(model, tok, facts[:2], config, net)
                for net in (network, again))
    assert all(torch.equal(change.dense(), two.changes[name].dense()) for name,
               change in one.changes.items())


def test_bad_files_and_settings_are_named(gpt2, llama, facts, tmp_path):
    model, tok = gpt2
    path = tmp_path / "net.safetensors"
    config = configure("mend", SETTINGS | {"network": str(path)})

    def refused(words, *place, error=ValueError, **changes):
        with pytest.raises(error, match=words):
            mend.prepare(*(place or gpt2), replace(config, **changes))

    refused("net.safetensors", error=FileNotFoundError)
    path.write_bytes(b"no tensors")
    refused("net.safetensors: not a safetensors file, or damaged")
    save_file({"a": torch.zeros(1)}, path)
    refused("net.safetensors: no hypernetwork of format editcore-mend-2, but None")
    network = mend.prepare(model, tok, configure("mend", SETTINGS))
    mend.save(network, path)
    refused("net.safetensors: trained with rank = 24, not 8", rank=8)
    refused(r"trained with layers = \[2, 3\], not \[1, 3\]", layers=(1, 3))
    refused("trained for Site.*transformer.h.2.mlp.c_fc.*, the model has Site.*model.layers.2",
            *llama)
    refused("trained for Site.*size=.*, the model has Site.*size=", make("gpt2", len(tok), seed=5),
            tok)
    with pytest.raises(ValueError,
                       match="no hypernetwork of format editcore-ke-2, but editcore-mend-2"):
        EDITORS["ke"].prepare(model, tok, configure("ke",
                                                    {"network": str(path), "layers": (-2, -1)}))
    tensors = network.state_dict()
    network.load_state_dict(tensors | {"maps.0.alpha": torch.tensor(float("nan"))})
    mend.save(network, path)
    refused("net.safetensors: maps.0.alpha is not finite")
    network.maps = network.maps[1:]
    mend.save(network, path)
    refused("not a whole hypernetwork: .*")
    refused("network names no file", network="")
    refused("layer -1: the model has layers 0 to 3", layers=(-5,))
    refused("must name at least one block, each once", layers=(3, -1))
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        EDITORS["mend"].edit(model, tok, [facts[0], long], config,
                             MendNetwork(network.sites, network.settings))
