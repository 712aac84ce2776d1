"""editcore.editors.rome (and value): equal to the plain serial way, its three conventions, its errors."""

from dataclasses import replace

import pytest
import torch
from conftest import corpus, make

from editcore import serial
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.model import content_hash, module_of, name_of
from editcore.moments import CountSettings, second_moments
from editcore.templates import TemplateGroup

CONTEXTS = ("{}", "The first. {}", "Because I know you, we read. {}")
# Largest relative difference to the serial way; Llama's norms work in float32 whatever the model's dtype
GATES = {("gpt2", torch.float32): 1e-5, ("gpt2", torch.float64): 1e-9, ("llama", torch.float32): 1e-5,
         ("llama", torch.float64): 1e-5}
SETTINGS = {"layer": 1, "steps": 8, "lr": 0.3, "clamp": 2, "weight_decay": 0.05}


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def prepared(model, tok, config):
    moments = second_moments(model, tok, corpus() * 4, [config.layer], CountSettings(length=32))
    ridge = {name: moment + 0.01 * torch.eye(len(moment)) for name, moment in moments.moments.items()}
    given = EditorInputs(moments=replace(moments, moments=ridge), contexts=CONTEXTS)
    return EDITORS["rome"].prepare(model, tok, config, given)


@pytest.fixture(scope="module")
def setup(gpt2):
    config = configure("rome", SETTINGS)
    return (*gpt2, config, prepared(*gpt2, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_the_serial_way(family, dtype, request, facts):
    tok, config = request.getfixturevalue(family)[1], configure("rome", SETTINGS)
    model = make(family, len(tok), dtype=dtype)
    given = prepared(model, tok, config)
    deltas = EDITORS["rome"].edit_each(model, tok, facts, config, given)
    for fact, delta in zip(facts, deltas, strict=True):
        expected = serial.rome(model, tok, fact, config, given)
        assert set(delta.changes) == set(expected)
        for name, matrix in expected.items():
            assert apart(dense(delta.changes[name]), matrix) < GATES[family, dtype]


@pytest.mark.parametrize("place", ["subject", "last"])
def test_values_and_losses_equal_the_serial_way(gpt2, facts, place):
    model, tok = make("gpt2", len(gpt2[1]), dtype=torch.float64), gpt2[1]
    config = configure("rome", SETTINGS | {"kl_position": place, "kl_factor": 2.0})
    made = encode_facts(model, tok, [facts], [CONTEXTS], config)
    ends = sorted(losses[-1] for losses in optimise(model, made, EditSite(1, "mlp_out", 1), config).losses)
    config = replace(config, stop_loss=ends[6] + 1e-6)      # so that some stop earlier than others
    found = optimise(model, made, EditSite(1, "mlp_out", 1), config)
    counts = set()
    for row, fact in enumerate(facts):
        delta, h0, losses = serial.value(model, tok, fact, CONTEXTS, ("mlp_out", 1), config)
        torch.testing.assert_close(found.delta[row], delta, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.h0[row], h0, rtol=1e-12, atol=1e-13)
        assert found.losses[row] == pytest.approx(losses, abs=1e-9)
        counts.add(len(losses))
    assert len(counts) > 1


def test_many_at_once_equal_one_at_a_time(setup, facts):
    model, tok, config, given = setup
    together = EDITORS["rome"].edit_each(model, tok, facts, config, given)
    for fact, delta in zip(facts, together, strict=True):
        (alone,) = EDITORS["rome"].edit_each(model, tok, [fact], config, given)
        for name in alone.changes:
            assert apart(dense(delta.changes[name]), dense(alone.changes[name])) < 1e-5


def test_a_batch_is_solved_one_after_the_other(setup, facts):
    model, tok, config, given = setup
    edit = EDITORS["rome"].edit
    whole = edit(model, tok, facts[:3], config, given)
    total = edit(model, tok, facts[:1], config, given)
    for fact in facts[1:3]:
        with total.applied(model):
            one = edit(model, tok, [fact], config, given)
        total = total + one
    name = name_of(model, "mlp_out", 1) + ".weight"
    assert apart(dense(whole.changes[name]), dense(total.changes[name])) < 1e-6
    assert len(whole.info["losses"]) == 3


def test_an_edit_puts_the_value_at_the_key(setup, facts):
    """p-rome: (W + ΔW) k₀ = W k₀ + δ exactly; r-rome: (W + ΔW) k̄ = h₀ + δ − b; rome: ‖ΔW‖ = ‖δ‖ / |uᵀk₀|."""
    model, tok, config, given = setup
    module, name = module_of(model, "mlp_out", 1), name_of(model, "mlp_out", 1)
    made = encode_facts(model, tok, [facts[:3]], [CONTEXTS], config)
    found = optimise(model, made, EditSite(1, "mlp_out", 1), config)
    for convention in ("p-rome", "r-rome", "rome"):
        deltas = EDITORS["rome"].edit_each(model, tok, facts[:3], replace(config, convention=convention), given)
        for row, delta in enumerate(deltas):
            change = dense(delta.changes[name + ".weight"])     # (m, d) in GPT-2's orientation
            plain, mean = found.keys[row, 0], found.keys[row].mean(0)
            if convention == "p-rome":
                torch.testing.assert_close(plain @ change, found.delta[row], rtol=1e-4, atol=1e-5)
            elif convention == "r-rome":
                with delta.applied(model):
                    torch.testing.assert_close(module(mean), found.h0[row] + found.delta[row], rtol=1e-4, atol=1e-4)
            else:
                u = given.moments.solve(name, mean)
                u = u / u.norm()
                expected = found.delta[row].norm() / (u @ plain.double()).abs()
                assert delta.norm() == pytest.approx(expected.item(), rel=1e-5)


def test_the_fact_becomes_likelier(setup, facts):
    model, tok, _, given = setup
    config = configure("rome", SETTINGS | {"steps": 20, "clamp": 20, "weight_decay": 0, "convention": "p-rome"})
    for fact, delta in zip(facts[:3], EDITORS["rome"].edit_each(model, tok, facts[:3], config, given), strict=True):
        before = serial.value(model, tok, fact, ("{}",), ("mlp_out", 1), replace(config, steps=1))[2][0]
        with delta.applied(model):
            after = serial.value(model, tok, fact, ("{}",), ("mlp_out", 1), replace(config, steps=1))[2][0]
        assert after < before - 0.3


def test_the_clamp_holds(setup, facts):
    model, tok, config, _ = setup
    config = replace(config, clamp=0.3, weight_decay=0.0)
    found = optimise(model, encode_facts(model, tok, [facts], [CONTEXTS], config), EditSite(1, "mlp_out", 1), config)
    norms = found.delta.norm(dim=1) / found.h0.norm(dim=1)
    assert norms.max() < 0.3 + 1e-5 and norms.min() > 0.29


def test_errors_name_the_record_and_leave_the_model(setup, facts):
    model, tok, config, given = setup
    before = content_hash(model)
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        EDITORS["rome"].edit_each(model, tok, [facts[0], long], config, given)
    with pytest.raises(ValueError, match="record 1: the loss is nan at step 2"):
        EDITORS["rome"].edit_each(model, tok, [facts[1]], replace(config, lr=float("nan")), given)
    with pytest.raises(ValueError, match="layer 9: the model has layers 0 to 3"):
        EDITORS["rome"].prepare(model, tok, replace(config, layer=9), EditorInputs(texts=tuple(corpus())))
    assert content_hash(model) == before


def test_contexts_are_sampled_as_configured(gpt2):
    model, tok = gpt2
    config = configure("rome", {"layer": 0})
    assert config.context_groups == (TemplateGroup(5, 10), TemplateGroup(10, 10))
    moments = prepared(model, tok, config).moments
    prepare = EDITORS["rome"].prepare
    made = [prepare(model, tok, config, EditorInputs(moments=moments, seed=seed)).contexts for seed in (1, 1, 2)]
    assert len(made[0]) == 21 and made[0] == made[1] != made[2]
