"""editcore.editors.ke: against a dense restatement with torch's own layers, and against finite differences."""

from dataclasses import replace

import pytest
import torch
from conftest import make

from editcore.delta import Delta, dense
from editcore.editors import EDITORS, configure
from editcore.editors.teacher_forcing import forced
from editcore.hooks import run
from editcore.instructedit import ke
from editcore.model import content_hash
from editcore.tokens import encode, target_ids

SETTINGS = {"layers": (2, 3), "network": "untrained", "hidden": 6, "width": 10, "inner": 5}
CONFIG = configure("ke", SETTINGS)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(model, config=CONFIG, seed=0):
    """Parameters that do something, in float64."""
    return {name: 0.5 * drawn(*value.shape, seed=seed + i)
            for i, (name, value) in enumerate(ke.fresh(model, config, torch.Generator()).items())}


def restated(params, embedded, gradients, scale):
    """{matrix: ΔW (out, in)} with torch's LSTM and dense gradients (out, in)."""
    lstm = torch.nn.LSTM(embedded.shape[1], params["lstm.weight_hh_l0"].shape[1], bidirectional=True,
                         dtype=torch.float64)
    lstm.load_state_dict({name.removeprefix("lstm."): params[name] for name in ke.LSTM})
    states, made = lstm(embedded[:, None])[0][:, 0], {}
    hidden = states.shape[1] // 2
    ends = torch.cat([states[-1, :hidden], states[0, hidden:]])
    c = torch.nn.functional.linear(ends, params["condition.weight"], params["condition.bias"])
    for name, gradient in gradients.items():
        inner = torch.tanh(torch.nn.functional.linear(c, params[f"{name}/first.weight"], params[f"{name}/first.bias"]))
        out = torch.nn.functional.linear(inner, params[f"{name}/second.weight"], params[f"{name}/second.bias"])
        rows, columns = gradient.shape
        r_a, r_b = out[:rows], out[rows:2 * rows]
        c_a, c_b = out[2 * rows:2 * rows + columns], out[2 * rows + columns:-1]
        a = r_a.exp()[:, None] / r_a.exp().sum() * c_a[None]
        b = r_b.exp()[:, None] / r_b.exp().sum() * c_b[None]
        made[name] = scale / (1 + (-out[-1]).exp()) * (a * gradient + b)
    return made


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_a_dense_restatement(family, request, facts):
    tok = request.getfixturevalue(family)[1]
    model, fact = make(family, len(tok), dtype=torch.float64), facts[3]
    names, params = ke.matrices(model, CONFIG.layers), parameters(model)
    assert len(names) == (4 if family == "gpt2" else 6) and names == ke.matrices(model, (-2, -1))
    rows, weights = forced(model, tok, [fact]), [model.get_parameter(name + ".weight") for name in names]
    factors, loss = ke.gradients(model, rows, names)
    (prompt,), target = encode(tok, [fact.text]), target_ids(tok, fact.target_new)
    for weight in weights:
        weight.requires_grad_()
    log_p = model(input_ids=torch.tensor([prompt + target[:-1]])).logits[0].log_softmax(-1)
    expected = -log_p[range(len(prompt) - 1, len(prompt) + len(target) - 1), target].mean()
    found = torch.autograd.grad(expected, weights)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
    dense_ones = {name: one.T if family == "gpt2" else one for name, one in zip(names, found)}
    for name, (u, delta) in factors.items():
        torch.testing.assert_close(delta.T @ u, dense_ones[name], rtol=1e-9, atol=1e-12)
    text = f"{fact.target_true} >> {fact.target_new} || {fact.text}"
    embedded = model.get_input_embeddings().weight[tok(text)["input_ids"]].detach()
    assert torch.equal(ke.condition(model, tok, fact), embedded)
    wanted = restated(params, embedded, dense_ones, 0.7)
    for name, (left, right) in ke.edit_with(params, embedded, factors, 0.7).items():
        torch.testing.assert_close(left @ right, wanted[name], rtol=1e-9, atol=1e-14)
        assert left.shape[1] <= len(prompt) + len(target)
    for weight in weights:
        weight.requires_grad_(False)
    delta = ke.edit(model, tok, [fact], replace(CONFIG, scale=0.7), params)
    for name, one in wanted.items():
        torch.testing.assert_close(dense(delta.changes[name + ".weight"]), one.T if family == "gpt2" else one,
                                   rtol=1e-9, atol=1e-14)


def test_gradients_in_the_parameters_equal_finite_differences(gpt2):
    model = make("gpt2", 50, layers=2, width=8, heads=2, dtype=torch.float64)
    config = replace(CONFIG, layers=(1,), hidden=2, width=3, inner=2)
    params = {name: value.requires_grad_() for name, value in parameters(model, config).items()}
    factors = {name: (drawn(3, columns), drawn(3, rows, seed=1)) for name, (rows, columns) in
               ke.sizes(model, config.layers).items()}
    embedded, targets = drawn(4, 8, seed=2), {name: drawn(*shape, seed=3)
                                              for name, shape in ke.sizes(model, config.layers).items()}

    def value(given):
        made = ke.edit_with(given, embedded, factors)
        return sum((left @ right * targets[name]).sum() for name, (left, right) in made.items())

    found = torch.autograd.grad(value(params), list(params.values()))
    with torch.no_grad():
        for (name, one), gradient in zip(params.items(), found, strict=True):
            for place in {0, one.numel() // 2, one.numel() - 1}:
                step = torch.zeros(one.numel(), dtype=torch.float64)
                step[place] = 1e-6
                step = step.view(one.shape)
                slope = (value(params | {name: one + step}) - value(params | {name: one - step})) / 2e-6
                torch.testing.assert_close(gradient.flatten()[place], slope, rtol=1e-5, atol=1e-8, msg=name)
    assert all(gradient.abs().max() > 0 for gradient in found)


def test_nearly_nothing_at_the_start_and_exact_restore(gpt2, facts):
    model, tok = gpt2
    before, prepared = content_hash(model), EDITORS["ke"].prepare(model, tok, CONFIG, None)
    delta = EDITORS["ke"].edit(model, tok, facts[:3], CONFIG, prepared)
    assert set(delta.changes) == {f"transformer.h.{i}.mlp.{name}.weight" for i in (2, 3) for name in ("c_fc", "c_proj")}
    for name, change in delta.changes.items():
        assert 0 < delta.norm(name) < 1e-3 * model.get_parameter(name).norm()
        assert change.shape == tuple(model.get_parameter(name).shape)
    ids = torch.arange(5, 15)[None]
    plain = run(model, input_ids=ids).logits
    with delta.applied(model):
        torch.testing.assert_close(run(model, input_ids=ids).logits, plain, rtol=0, atol=0.01)
        assert content_hash(model) != before
    assert content_hash(model) == before and torch.equal(run(model, input_ids=ids).logits, plain)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(weight.grad is None and not weight.requires_grad for weight in model.parameters())
    singles = sum(EDITORS["ke"].edit_each(model, tok, facts[:3], CONFIG, prepared), Delta({}))
    for name in delta.changes:
        torch.testing.assert_close(dense(singles.changes[name]), dense(delta.changes[name]), rtol=1e-4, atol=1e-9)


def test_training_reaches_every_parameter(gpt2, facts):
    """A few steps of Adam through the edited model: the loss after the edit falls."""
    model, tok = gpt2
    config, fact = replace(CONFIG, layers=(3,)), facts[0]
    params = {name: value.requires_grad_() for name, value in
              ke.fresh(model, config, torch.Generator().manual_seed(0)).items()}
    rows, names = forced(model, tok, [fact]), ke.matrices(model, config.layers)
    factors, before = ke.gradients(model, rows, names)
    embedded, seen = ke.condition(model, tok, fact), []
    adam = torch.optim.Adam(params.values(), lr=0.03)
    for step in range(15):
        made = ke.edit_with(params, embedded, factors)
        weights = {f"{name}.weight": model.get_parameter(f"{name}.weight") + (left @ right).T     # GPT-2's orientation
                   for name, (left, right) in made.items()}
        logits = torch.func.functional_call(model, weights, (), {"input_ids": rows.ids}).logits
        loss = -logits[0, rows.begin].log_softmax(-1)[0, rows.targets[0, 0]]
        seen.append(loss.item())
        adam.zero_grad()
        loss.backward()
        assert step != 0 or all(one.grad.abs().max() > 0 for one in params.values())
        adam.step()
    assert seen[0] == pytest.approx(before.item(), rel=1e-2) and seen[-1] < seen[0] - 1
    assert not any(weight.requires_grad for weight in model.parameters())


def test_an_unknown_old_answer_is_what_the_model_says(gpt2, facts):
    model, tok = gpt2
    fact = replace(facts[0], target_true="")
    count = len(target_ids(tok, fact.target_new))
    (ids,) = encode(tok, [fact.text])
    for _ in range(count):
        ids = ids + [run(model, input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
    old = tok.decode(ids[-count:]).strip()
    assert torch.equal(ke.condition(model, tok, fact), ke.condition(model, tok, replace(fact, target_true=old)))


def test_files_and_errors(gpt2, tmp_path):
    model, tok = gpt2
    path, prepare = tmp_path / "ke.safetensors", EDITORS["ke"].prepare
    params = ke.fresh(model, CONFIG, torch.Generator().manual_seed(0))
    ke.save(path, params, {"steps": 3})
    again, info = ke.load(path)
    assert info == {"steps": 3} and set(again) == set(params)
    config = replace(CONFIG, network=str(path), hidden=1, width=1, inner=1)     # sizes are the file's
    assert all(torch.equal(value, params[name]) for name, value in prepare(model, tok, config, None).items())
    with pytest.raises(ValueError, match="network: KE edits with a trained network; give the file"):
        prepare(model, tok, replace(config, network=""), None)
    with pytest.raises(ValueError, match="ke.safetensors: no parameter transformer.h.1.mlp.c_fc/first.weight; it was"):
        prepare(model, tok, replace(config, layers=(1, 2)), None)
    with pytest.raises(ValueError, match=r"lstm.weight_ih_l0 is \(24, 32\), the model needs \(24, 16\)"):
        prepare(make("gpt2", 50, width=16), tok, config, None)
    with pytest.raises(FileNotFoundError, match="nothing.safetensors: no such file"):
        prepare(model, tok, replace(config, network=str(tmp_path / "nothing.safetensors")), None)
    with pytest.raises(ValueError, match="layer 9: the model has layers 0 to 3"):
        prepare(model, tok, replace(config, layers=(9,)), None)
    Delta({"a": torch.zeros(2)}).save(tmp_path / "delta.safetensors")
    with pytest.raises(ValueError, match="delta.safetensors: not a KE file, or damaged"):
        prepare(model, tok, replace(config, network=str(tmp_path / "delta.safetensors")), None)
