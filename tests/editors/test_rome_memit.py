"""ROME's conventions and clamp, MEMIT's keys and updates, the random control."""

import itertools
from dataclasses import replace

import pytest
import torch
from editor_cases import CONTEXTS, prepared_case, ridged_moments
from oracle import apart

from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure, memit
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.model import module_of, name_of
from editcore.moments import Moments
from editcore.templates import TemplateGroup

SITE = EditSite(1, "mlp_out", 1)
NAME = "transformer.h.1.mlp.c_proj"
SETTINGS = {"layer": 1, "steps": 8, "lr": 0.3, "clamp": 2, "weight_decay": 0.05}


@pytest.fixture(scope="module")
def rome(gpt2):
    """(model, tok, config, prepared)."""
    config = configure("rome", SETTINGS)
    inputs = EditorInputs(moments=ridged_moments(*gpt2, [1]), contexts=CONTEXTS)
    return *gpt2, config, EDITORS["rome"].prepare(*gpt2, config, inputs)


def values_of(model, tok, facts, config):
    return optimise(model, encode_facts(model, tok, [facts], [CONTEXTS], config), SITE, config)


def test_a_batch_of_rome_is_solved_one_after_the_other(rome, facts):
    model, tok, config, prepared = rome
    edit = EDITORS["rome"].edit
    batch = edit(model, tok, facts[:3], config, prepared)
    total = edit(model, tok, facts[:1], config, prepared)
    for fact in facts[1:3]:
        with total.applied(model):
            update = edit(model, tok, [fact], config, prepared)
        total = total + update
    name = NAME + ".weight"
    assert apart(dense(batch.changes[name]), dense(total.changes[name])) < 1e-6
    assert len(batch.info["losses"]) == 3


@pytest.mark.parametrize("convention", ["p-rome", "r-rome", "rome"])
def test_an_edit_puts_the_value_at_the_key(rome, facts, convention):
    """p-rome: (W + ΔW) k₀ = W k₀ + δ; r-rome: (W + ΔW) k̄ = h₀ + δ; rome: ‖ΔW‖ = ‖δ‖ / |uᵀk₀|."""
    model, tok, config, prepared = rome
    values = values_of(model, tok, facts[:3], config)
    config = replace(config, convention=convention)
    for row, delta in enumerate(EDITORS["rome"].edit_each(model, tok, facts[:3], config, prepared)):
        change = dense(delta.changes[NAME + ".weight"])     # (m, d) in GPT-2's orientation
        plain = values.keys[row, 0]
        mean = values.keys[row].mean(0)
        if convention == "p-rome":
            torch.testing.assert_close(plain @ change, values.delta[row], rtol=1e-4, atol=1e-5)
        elif convention == "r-rome":
            with delta.applied(model):
                output = module_of(model, "mlp_out", 1)(mean)
            torch.testing.assert_close(output, values.v_star[row], rtol=1e-4, atol=1e-4)
        else:
            u = prepared.moments.solve(NAME, mean)
            expected = values.delta[row].norm() / (u / u.norm() @ plain.double()).abs()
            assert delta.norm() == pytest.approx(expected.item(), rel=1e-5)


def test_the_clamp_holds(rome, facts):
    model, tok, config, _ = rome
    values = values_of(model, tok, facts, replace(config, clamp=0.3, weight_decay=0.0))
    norms = values.delta.norm(dim=1) / values.h0.norm(dim=1)
    assert norms.max() < 0.3 + 1e-5 and norms.min() > 0.29


def test_contexts_are_sampled_as_configured(rome):
    model, tok, _, prepared = rome
    config = configure("rome", {"layer": 1})
    assert config.context_groups == (TemplateGroup(5, 10), TemplateGroup(10, 10))
    inputs = [EditorInputs(moments=prepared.moments, seed=seed) for seed in (1, 1, 2)]
    contexts = [EDITORS["rome"].prepare(model, tok, config, each).contexts for each in inputs]
    assert len(contexts[0]) == 21 and contexts[0] == contexts[1] != contexts[2]


@pytest.mark.parametrize("direction", ["v", "both"])
def test_the_control_has_the_given_norm_and_its_own_direction(rome, facts, direction):
    model, tok, _, prepared = rome
    norms = tuple((fact.case_id, 0.5 + fact.case_id) for fact in facts)
    config = configure("random", {"layer": 1, "norms": norms, "direction": direction})
    deltas = EDITORS["random"].edit_each(model, tok, facts[:3], config, prepared)
    assert [delta.norm() for delta in deltas] == pytest.approx([0.5, 1.5, 2.5])
    both = EDITORS["random"].edit(model, tok, facts[:3], config, prepared)
    total = sum(dense(delta.changes[NAME + ".weight"]) for delta in deltas)
    assert apart(dense(both.changes[NAME + ".weight"]), total) < 1e-6
    u = dense(deltas[1].changes[NAME + ".weight"]).T[0]
    keys = values_of(model, tok, facts[1:2], configure("rome", SETTINGS)).keys
    cosine = torch.cosine_similarity(u.double(), prepared.moments.solve(NAME, keys[0].mean(0)), 0)
    assert (cosine.abs() > 0.999) == (direction == "v")
    with pytest.raises(ValueError, match="record 1: norms has no entry for it"):
        EDITORS["random"].edit(model, tok, facts[:2], replace(config, norms=norms[:1]), prepared)


def test_one_fact_of_memit_is_the_rank_one_formula(gpt2, facts):
    model, tok = gpt2
    config, prepared = prepared_case("memit", model, tok, facts, layers=(0,))
    encoded = encode_facts(model, tok, [facts[:1]], [CONTEXTS], config)
    values = optimise(model, encoded, EditSite(0, "block", 0), config)
    key = memit.fact_keys(values.keys)[0]
    solved = prepared.moments.solve(name_of(model, "mlp_out", 0), key)
    expected = torch.outer(solved, values.delta[0].double()) / (config.lambda_ + key @ solved)
    (change,) = EDITORS["memit"].edit(model, tok, facts[:1], config, prepared).changes.values()
    assert apart(dense(change), expected) < 1e-6


def test_keys_of_memit_are_half_plain_half_mean_of_the_others():
    keys = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    expected = (keys[:, 0] / 2 + keys[:, 1:].sum(1) / 6).double()
    torch.testing.assert_close(memit.fact_keys(keys), expected)
    assert torch.equal(memit.fact_keys(keys[:, :1]), keys[:, 0].double())


def test_many_facts_give_a_matrix_few_a_product(gpt2, facts):
    model, tok = gpt2
    config, prepared = prepared_case("memit", model, tok, facts, steps=2)
    few = EDITORS["memit"].edit(model, tok, facts[:2], config, prepared)
    more = [replace(fact, target_new=other.target_new)
            for fact, other in itertools.product(facts, facts[1:4])]
    many = EDITORS["memit"].edit(model, tok, more, config, prepared)
    assert not any(isinstance(change, torch.Tensor) for change in few.changes.values())
    assert all(isinstance(change, torch.Tensor) for change in many.changes.values())


def test_memory_needs_a_weight(gpt2, facts):
    with pytest.raises(ValueError, match="memory needs lambda above 0"):
        prepared_case("memit-past", *gpt2, facts, **{"lambda": 0})


def test_a_missing_second_moment_is_named(gpt2, facts):
    config, prepared = prepared_case("memit", *gpt2, facts)
    first = {name: c for name, c in prepared.moments.moments.items() if ".0." in name}
    inputs = EditorInputs(moments=Moments(first, 9), contexts=CONTEXTS)
    with pytest.raises(ValueError, match="no second moment of transformer.h.2.mlp.c_proj"):
        EDITORS["memit"].prepare(*gpt2, config, inputs)
