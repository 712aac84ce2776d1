"""editcore.editors.mend and hypernet: factors equal dense gradients and dense updates; moments equal torch's."""

from dataclasses import replace

import pytest
import torch
from conftest import make
from safetensors.torch import save_file

from editcore.delta import Delta
from editcore.editors import EDITORS, configure
from editcore.instructedit import hypernet, mend
from editcore.model import content_hash, is_input_first
from editcore.tokens import encode, target_ids

FAMILIES = ["gpt2", "llama", "gptj", "gpt_neox", "qwen3"]
SETTINGS = {"network": "untrained", "layers": (-2, -1), "rank": 24, "alpha": 0.02}


def family(kind, gpt2, llama, dtype=torch.float64):
    """(random model, tokenizer) of an architecture."""
    tok = (llama if kind in ("llama", "qwen3") else gpt2)[1]
    return make(kind, len(tok), dtype=dtype), tok


def random_network(model, config, facts=None, dtype=torch.float64):
    """A Network with every weight away from its start and moments of random rows."""
    draw = torch.Generator().manual_seed(1)
    network = mend.start(model, config, dtype)
    weights = {name: weight + 0.1 * torch.randn(weight.shape, generator=draw, dtype=dtype)
               for name, weight in network.weights.items()}
    rows = {site.name: (torch.randn(9, site.inputs, generator=draw, dtype=dtype),
                        torch.randn(9, site.outputs, generator=draw, dtype=dtype)) for site in network.sites}
    return hypernet.watch(replace(network, weights=weights), rows)


def ids_of(tok, fact):
    return encode(tok, [fact.text])[0], target_ids(tok, fact.target_new)


def autograd(model, tok, fact, names):
    """The dense gradient of each weight for the mean-token NLL of a fact's target, by a plain pass."""
    prompt, target = ids_of(tok, fact)
    weights = [model.get_parameter(name + ".weight").requires_grad_() for name in names]
    try:
        log_p = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1:-1].log_softmax(-1)
        loss = -log_p[range(len(target)), target].mean()
        return dict(zip(names, torch.autograd.grad(loss, weights)))
    finally:
        model.requires_grad_(False)


@pytest.mark.parametrize("kind", FAMILIES)
def test_factors_multiply_to_the_dense_gradient(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    config = configure("mend", SETTINGS)
    names = [site.name for site in mend.sites(model, config)]
    assert len(names) == (6 if kind in ("llama", "qwen3") else 4)
    before = content_hash(model)
    found = mend.captured(model, tok, [facts[:3], facts[3:6]], config, (names, None))
    assert [(owner, fact) for (owner, fact), _ in found] == [(i // 3, fact) for i, fact in enumerate(facts[:6])]
    for (_, fact), pairs in found:
        expected = autograd(model, tok, fact, names)
        for name, (u, delta) in pairs.items():
            module = model.get_submodule(name)
            dense = u.T @ delta if is_input_first(module) else delta.T @ u
            scale = expected[name].abs().max()
            # norms of Llama's kind work in float32 whatever the model's dtype
            assert (dense - expected[name]).abs().max() < scale * (1e-5 if kind in ("llama", "qwen3") else 1e-6)
            assert len(u) <= sum(map(len, ids_of(tok, fact))) - 1 and (delta != 0).any(1).all()
    last = names[-1]
    assert all(len(pairs[last][0]) == len(ids_of(tok, fact)[1]) for (_, fact), pairs in found)
    assert content_hash(model) == before and not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("norm", ["shape", "map", "none"])
def test_starts_as_the_normaliser_alone(norm, gpt2, facts):
    model, tok = gpt2
    config = configure("mend", SETTINGS | {"norm": norm})
    network = mend.start(model, config)
    names = [site.name for site in network.sites]
    pairs = [found for _, found in mend.captured(model, tok, [facts], config, (names, None))]
    for one in pairs:
        network = hypernet.watch(network, one)
    made = mend.factors(network, pairs[0])
    for site in network.sites:
        u, delta = pairs[0][site.name]
        pool = [other.name for other in network.sites if norm == "shape" and other.shape == site.shape] or [site.name]
        seen = torch.cat([torch.cat(one[name], 1) for name in pool for one in pairs]).double()
        spread = seen.std(0) if norm != "none" else torch.ones(seen.shape[1])
        mean = seen.mean(0) if norm != "none" else torch.zeros(seen.shape[1])
        expected = (torch.cat([u, delta], 1) - mean) / (torch.where(spread > 0, spread, 1) + 1e-7 * (norm != "none"))
        assert torch.allclose(torch.cat(made[site.name], 1).double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_an_untrained_step_descends(gpt2, facts):
    model, tok = gpt2
    config = configure("mend", SETTINGS | {"alpha": 1.0, "norm": "none"})
    network = EDITORS["mend"].prepare(model, tok, config, None)
    for fact in facts[:4]:
        delta = EDITORS["mend"].edit(model, tok, [fact], config, network)
        for name, dense in autograd(model, tok, fact, [site.name for site in network.sites]).items():
            assert torch.allclose(delta.changes[name + ".weight"].dense(), -dense, atol=1e-5)
    backwards = EDITORS["mend"].edit(model, tok, [fact], replace(config, alpha=-1.0),
                                     mend.start(model, replace(config, alpha=-1.0)))
    assert (delta + backwards).norm() == 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_transform_is_the_equation(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    config = configure("mend", SETTINGS)
    network = random_network(model, config)
    found = mend.captured(model, tok, [facts[:1]], config, ([site.name for site in network.sites], None))[0][1]
    assert len({site.shape for site in network.sites}) == 2 == len(network.norms)
    for site in network.sites:
        w, norm = network.weights, network.norms[site.shape]
        u, delta = mend.factors(network, found)[site.name]
        for row in range(len(u)):
            h = torch.cat([side[row] for side in found[site.name]])
            h = (h - norm.mean) / (hypernet.spread(norm) + 1e-7)
            for k in (0, 1):
                z = w[f"{site.shape}/U{k}"] @ (w[f"{site.shape}/V{k}"] @ h) + w[f"{site.shape}/b{k}"]
                h = h + torch.relu(z * w[f"{site.name}/s{k}"] + w[f"{site.name}/t{k}"])
            assert torch.allclose(torch.cat([u[row], delta[row]]), h, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", FAMILIES)
def test_stepping_equals_the_dense_update_and_nothing_stays(kind, gpt2, llama, facts):
    model, tok = family(kind, gpt2, llama)
    config = configure("mend", SETTINGS)
    network = random_network(model, config)
    names, ids = [site.name for site in network.sites], torch.tensor([encode(tok, [facts[0].text])[0]])
    found = mend.captured(model, tok, [facts[:1]], config, (names, None))[0][1]
    made, before = mend.factors(network, found), content_hash(model)
    plain = model(input_ids=ids).logits
    with mend.stepped(model, network, made):
        stepped = model(input_ids=ids).logits
    dense = {}
    for name in names:
        whole = -network.alpha(name) * sum(torch.outer(delta, u) for u, delta in zip(*made[name]))
        dense[name + ".weight"] = whole.T if is_input_first(model.get_submodule(name)) else whole
    with Delta(dense).applied(model):
        expected = model(input_ids=ids).logits
    change = mend.change(model, network, made)
    for name, one in change.changes.items():
        assert torch.allclose(one.dense(), dense[name], rtol=1e-9, atol=1e-12)
    assert torch.allclose(stepped, expected, atol=1e-4 if kind in ("llama", "qwen3") else 1e-6)
    assert (stepped - plain).abs().max() > 0.01
    assert content_hash(model) == before and torch.equal(model(input_ids=ids).logits, plain)


def test_facts_of_a_group_add_up_and_groups_see_their_own_model(gpt2, facts):
    model, tok = gpt2[0], gpt2[1]
    config = configure("mend", SETTINGS)
    network = random_network(model, config, dtype=torch.float32)
    alone = EDITORS["mend"].edit_each(model, tok, facts, config, network)
    together = EDITORS["mend"].edit(model, tok, facts, config, network)
    for name, change in together.changes.items():
        expected = sum(one.changes[name].dense() for one in alone)
        assert torch.allclose(change.dense(), expected, rtol=1e-3, atol=1e-5)
    carried = [alone[0], alone[1]]
    several = EDITORS["mend"].edit_groups(model, tok, [[facts[2]], [facts[2]]], config, prepared=[network] * 2,
                                          current=carried)
    for total, one in zip(carried, several):
        with total.applied(model):
            expected = EDITORS["mend"].edit(model, tok, [facts[2]], config, network)
        for name, change in one.changes.items():
            assert torch.allclose(change.dense(), expected.changes[name].dense(), rtol=1e-3, atol=1e-5)
    assert (several[0].norm() - several[1].norm()) != 0


def test_running_moments_are_torchs():
    draw = torch.Generator().manual_seed(0)
    rows = 1e3 + torch.randn(50, 7, generator=draw, dtype=torch.float64) * torch.arange(7)
    norm = hypernet.empty(7)
    for part in rows.split([1, 20, 5, 0, 24]):
        norm = hypernet.seen(norm, part)
    assert norm.count == 50 and torch.allclose(norm.mean, rows.mean(0), rtol=1e-14)
    assert torch.allclose(hypernet.spread(norm)[1:], rows.std(0)[1:], rtol=1e-12)
    assert hypernet.spread(norm)[0] == 1        # never varied: not divided by nearly nothing
    assert torch.equal(hypernet.spread(hypernet.empty(3)), torch.ones(3, dtype=torch.float64))


def test_every_layer_learns_from_the_start(gpt2, facts):
    model, tok = gpt2
    config = configure("mend", SETTINGS)
    network = mend.start(model, config)
    weights = {name: weight.requires_grad_() for name, weight in network.weights.items()}
    found = mend.captured(model, tok, [facts[:1]], config, ([site.name for site in network.sites], None))[0][1]
    made = mend.factors(network, found)
    sum((part ** 3).sum() for pair in made.values() for part in pair).backward()
    assert all(weight.grad.abs().max() > 0 for name, weight in weights.items() if "/U" in name or "/b" in name)


def test_saved_and_loaded_alike(gpt2, facts, tmp_path):
    model, tok = gpt2
    config = configure("mend", SETTINGS | {"network": str(tmp_path / "net.safetensors")})
    network = replace(random_network(model, config, dtype=torch.float32), info={"task": "recent"})
    hypernet.save(network, config.network)
    again = EDITORS["mend"].prepare(model, tok, config, None)
    assert again.settings == network.settings and again.sites == network.sites and again.info == {"task": "recent"}
    hypernet.save(again, tmp_path / "again.safetensors")
    hypernet.save(replace(again, info={"task": "zsre"}), tmp_path / "other.safetensors")
    said = [hypernet.digest(tmp_path / f"{name}.safetensors") for name in ("net", "again", "other")]
    assert said[0] == said[1] != said[2]
    (tmp_path / "bad.safetensors").write_bytes(b"?")
    with pytest.raises(ValueError, match="bad.safetensors: not a hypernetwork file"):
        hypernet.digest(tmp_path / "bad.safetensors")
    one, two = (EDITORS["mend"].edit(model, tok, facts[:2], config, net) for net in (network, again))
    assert all(torch.equal(one.changes[name].left, change.left) and torch.equal(one.changes[name].right, change.right)
               for name, change in two.changes.items())


def test_published_settings():
    assert configure("mend", {}, "openai-community/gpt2-xl").layers == (45, 46, 47)
    assert configure("mend", {}, "meta-llama/Llama-2-7b-hf").layers == (29, 30, 31)
    assert (configure("mend", {}, "pocket").layers, configure("mend").rank) == ((-2, -1), 1920)
    assert configure("mend", {}, "gpt2-xl").alpha == 1e-4


def test_bad_files_and_settings_are_named(gpt2, llama, facts, tmp_path):
    model, tok = gpt2
    path = tmp_path / "net.safetensors"
    config = configure("mend", SETTINGS | {"network": str(path)})
    prepare = EDITORS["mend"].prepare
    with pytest.raises(FileNotFoundError, match="net.safetensors"):
        prepare(model, tok, config, None)
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="net.safetensors: not a hypernetwork file, or damaged"):
        prepare(model, tok, config, None)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="net.safetensors: not a hypernetwork file: its format is None"):
        prepare(model, tok, config, None)
    network = mend.start(model, config)
    hypernet.save(network, path)
    with pytest.raises(ValueError, match="net.safetensors: trained with rank = 24, not 8"):
        prepare(model, tok, replace(config, rank=8), None)
    with pytest.raises(ValueError, match=r"trained with layers = \[2, 3\], not \[1, 3\]"):
        prepare(model, tok, replace(config, layers=(1, 3)), None)
    with pytest.raises(ValueError, match="made for transformer.h.2.mlp.c_fc 32x128, the model has model.layers.2"):
        prepare(*llama, config, None)
    with pytest.raises(ValueError, match="trained on another model: the norm of transformer.h"):
        prepare(make("gpt2", len(tok), seed=5), tok, config, None)
    name = "transformer.h.2.mlp.c_fc/alpha"
    hypernet.save(replace(network, weights=network.weights | {name: torch.tensor(float("nan"))}), path)
    with pytest.raises(ValueError, match="net.safetensors: not a whole hypernetwork: .*c_fc/alpha is not finite"):
        prepare(model, tok, config, None)
    hypernet.save(replace(network, weights={key: one for key, one in network.weights.items() if key != name}), path)
    with pytest.raises(ValueError, match="c_fc/alpha is missing"):
        prepare(model, tok, config, None)
    with pytest.raises(ValueError, match="network names no file"):
        prepare(model, tok, replace(config, network=""), None)
    with pytest.raises(ValueError, match="layer -1: the model has layers 0 to 3"):
        prepare(model, tok, replace(config, layers=(-5,)), None)
    with pytest.raises(ValueError, match="must name at least one block, each once"):
        prepare(model, tok, replace(config, layers=(3, -1)), None)
    with pytest.raises(ValueError, match="norm is 'batch', but must be one of shape, map, none"):
        configure("mend", {"norm": "batch"})
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        EDITORS["mend"].edit(model, tok, [facts[0], long], config, network)
