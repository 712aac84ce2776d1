"""KE: against a dense restatement of the equations; the old answer, the start, other models."""

from dataclasses import replace

import pytest
import torch
from conftest import make
from test_mend import autograd

from editcore.delta import dense
from editcore.editors import EDITORS, configure
from editcore.hooks import run
from editcore.instructedit import ke, mend
from editcore.instructedit.edit_gradients import fact_gradients
from editcore.model import is_input_first
from editcore.tokens import encode, target_ids

SETTINGS = {"layers": (2, 3), "network": "untrained", "hidden": 6, "width": 10, "inner": 5,
            "scale": 0.7}
CONFIG = configure("ke", SETTINGS)


def restated(network, embedded, gradients):
    """{matrix: dW (out, in)} of dense gradients (out, in), by the module's equations."""
    states = network.lstm(embedded[:, None])[0][:, 0]
    hidden = states.shape[1] // 2
    c = network.condition(torch.cat([states[-1, :hidden], states[0, hidden:]]))
    changes = {}
    for (name, gradient), own in zip(gradients.items(), network.maps):
        out = own["second"](torch.tanh(own["first"](c)))
        rows, columns = gradient.shape
        r_a, r_b = out[:rows], out[rows:2 * rows]
        c_a, c_b = out[2 * rows:2 * rows + columns], out[2 * rows + columns:-1]
        a = r_a.exp()[:, None] / r_a.exp().sum() * c_a[None]
        b = r_b.exp()[:, None] / r_b.exp().sum() * c_b[None]
        changes[name] = 0.7 / (1 + (-out[-1]).exp()) * (a * gradient + b)
    return changes


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_an_edit_equals_a_dense_restatement(family, request, facts):
    tok = request.getfixturevalue(family)[1]
    model, fact = make(family, len(tok), dtype=torch.float64), facts[3]
    network = ke.prepare(model, tok, CONFIG).double()
    with torch.no_grad():
        for seed, weight in enumerate(network.parameters()):
            draw = torch.Generator().manual_seed(seed)
            weight.copy_(0.5 * torch.randn(weight.shape, generator=draw, dtype=torch.float64))
    dense_ones = autograd(model, tok, fact, [site.name for site in network.sites])
    text = f"{fact.target_true} >> {fact.target_new} || {fact.text}"
    embedded = model.get_input_embeddings().weight[tok(text)["input_ids"]].detach()
    wanted = restated(network, embedded, dense_ones)
    delta = EDITORS["ke"].edit(model, tok, [fact], CONFIG, network)
    for name, one in wanted.items():
        stored = one.T if is_input_first(model.get_submodule(name)) else one
        torch.testing.assert_close(dense(delta.changes[name + ".weight"]), stored.detach(),
                                   rtol=1e-6 if family == "gpt2" else 1e-3, atol=1e-9)
    loss = sum((one * (1 + one)).sum() for one in wanted.values())
    mine = network(fact_gradients(model, tok, [fact], list(wanted), 2)[0], embedded)
    other = sum((one * (1 + one)).sum() for one in (-delta.T @ u for u, delta in mine.values()))
    parameters = list(network.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(other, parameters)):
        assert (a - b).norm() <= 1e-4 * a.norm() and a.norm() > 0


def test_first_weights_are_torchs_draws_and_change_nearly_nothing(gpt2, facts):
    model, tok = gpt2
    state = torch.get_rng_state()
    network = ke.prepare(model, tok, CONFIG)
    assert torch.equal(torch.get_rng_state(), state), "drawn from the seed alone"
    for name, weight in network.named_parameters():
        bound = (6 if name.startswith("lstm") else weight.shape[-1]) ** -0.5
        assert 0.3 * bound < weight.abs().max() <= bound, name
    delta = EDITORS["ke"].edit(model, tok, facts[:3], CONFIG, network)
    assert len(delta.changes) == 4
    for name in delta.changes:
        assert 0 < delta.norm(name) < 1e-3 * model.get_parameter(name).norm()


def test_an_unknown_old_answer_is_what_the_model_says(gpt2, facts):
    model, tok = gpt2
    network, fact = ke.prepare(model, tok, CONFIG), replace(facts[0], target_true="")
    (ids,) = encode(tok, [fact.text])
    for _ in (count := target_ids(tok, fact.target_new)):
        ids = ids + [run(model, input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    old = tok.decode(ids[-len(count):]).strip()
    known = replace(fact, target_true=old)
    one, other, third = network.conditions(model, tok, [fact, known, facts[1]])
    assert one == other == encode(tok, [f"{old} >> {fact.target_new} || {fact.text}"])[0] != third


def test_files_of_another_model_are_named(gpt2, tmp_path):
    model, tok = gpt2
    path = tmp_path / "ke.safetensors"
    network = ke.prepare(model, tok, CONFIG)
    mend.save(network, path)
    config = replace(CONFIG, network=str(path), hidden=1, width=1,
                     inner=1)     # sizes are the file's
    again = ke.prepare(model, tok, config)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters()))
    with pytest.raises(ValueError,
                       match=r"ke.safetensors: trained with layers = \[2, 3\], not \[1, 2\]"):
        ke.prepare(model, tok, replace(config, layers=(1, 2)))
    with pytest.raises(ValueError, match="trained with embedded = 32, not 16"):
        ke.prepare(make("gpt2", 50, width=16), tok, config)
    with pytest.raises(ValueError, match="network names no file"):
        ke.prepare(model, tok, replace(config, network=""))
