"""editcore.editors.memit: equal to the plain serial way, the n × n solve, single edits together, its errors."""

from dataclasses import replace

import pytest
import torch
from conftest import corpus, make

from editcore import serial
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure, memit
from editcore.editors import closed_form as solve
from editcore.editors.target_value import encode_facts, optimise
from editcore.model import content_hash, name_of
from editcore.moments import CountSettings, Moments, second_moments

CONTEXTS = ("{}", "The first. {}", "Because I know you, we read. {}")
SETTINGS = {"layers": (0, 2), "lambda": 5, "steps": 6, "lr": 0.3, "clamp": 2, "weight_decay": 0.05}
# Llama's norms work in float32 whatever the model's dtype
GATES = {("gpt2", torch.float32): 1e-5, ("gpt2", torch.float64): 1e-9, ("llama", torch.float32): 1e-5,
         ("llama", torch.float64): 1e-5}


def apart(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def prepared(model, tok, config):
    moments = second_moments(model, tok, corpus() * 4, config.layers, CountSettings(length=32))
    ridge = {name: moment + 0.01 * torch.eye(len(moment)) for name, moment in moments.moments.items()}
    given = EditorInputs(moments=replace(moments, moments=ridge), contexts=CONTEXTS)
    return EDITORS["memit"].prepare(model, tok, config, given)


@pytest.fixture(scope="module")
def setup(gpt2):
    config = configure("memit", SETTINGS)
    return (*gpt2, config, prepared(*gpt2, config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_equals_the_serial_way(family, dtype, request, facts):
    tok, config = request.getfixturevalue(family)[1], configure("memit", SETTINGS)
    model = make(family, len(tok), dtype=dtype)
    given = prepared(model, tok, config)
    delta = EDITORS["memit"].edit(model, tok, facts, config, given)
    expected = serial.memit(model, tok, facts, config, given)
    assert set(delta.changes) == set(expected)
    for name, matrix in expected.items():
        assert apart(dense(delta.changes[name]), matrix) < GATES[family, dtype]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_single_edits_together_equal_edits_of_one(family, request, facts):
    model, tok = request.getfixturevalue(family)
    config = configure("memit", SETTINGS)
    given = prepared(model, tok, config)
    together = EDITORS["memit"].edit_each(model, tok, facts, config, given)
    for fact, delta in zip(facts, together, strict=True):
        alone = EDITORS["memit"].edit(model, tok, [fact], config, given)
        assert set(delta.changes) == set(alone.changes)
        for name in alone.changes:
            assert apart(dense(delta.changes[name]), dense(alone.changes[name])) < 1e-5


def test_update_is_the_bracket_of_the_paper():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(20, 20, dtype=torch.float64, generator=draw)
    moment = root @ root.T + torch.eye(20)
    for count in (1, 4, 30):
        keys, residual = torch.randn(count, 20, generator=draw), torch.randn(count, 7, generator=draw)
        solved = solve.bracket(Moments({"a": moment}, 9), "a").solve(keys)
        left, right = solve.update(keys, solved, residual, 3.0)
        bracket = 3.0 * moment + keys.double().T @ keys.double()
        expected = residual.double().T @ keys.double() @ torch.linalg.inv(bracket)
        torch.testing.assert_close(left.T @ right, expected, rtol=1e-9, atol=1e-12)


def test_one_fact_is_the_rank_one_formula(setup, facts):
    model, tok, config, given = setup
    config = replace(config, layers=(0,))
    values = optimise(model, encode_facts(model, tok, [facts[:1]], [CONTEXTS], config), memit._site(config), config)
    key = memit.mixed(values.keys)[0]
    solved = given.moments.solve(name_of(model, "mlp_out", 0), key)
    expected = torch.outer(solved, values.delta[0].double()) / (config.lambda_ + key @ solved)
    (change,) = EDITORS["memit"].edit(model, tok, facts[:1], config, given).changes.values()
    assert apart(dense(change), expected) < 1e-6


def test_keys_are_half_plain_half_mean_of_the_rest():
    keys = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(memit.mixed(keys), (keys[:, 0] / 2 + keys[:, 1:].sum(1) / 6).double())
    assert torch.equal(memit.mixed(keys[:, :1]), keys[:, 0].double())


def test_many_facts_give_a_matrix_few_a_product(setup, facts):
    model, tok, config, given = setup
    few = EDITORS["memit"].edit(model, tok, facts[:2], config, given)
    more = [replace(fact, target_new=facts[copy].target_new) for fact in facts for copy in (1, 2, 3)]
    many = EDITORS["memit"].edit(model, tok, more, replace(config, steps=2), given)
    assert all(not isinstance(change, torch.Tensor) for change in few.changes.values())
    assert all(isinstance(change, torch.Tensor) for change in many.changes.values())


def test_errors_name_what_is_wrong_and_leave_the_model(setup, facts):
    model, tok, config, given = setup
    before = content_hash(model)
    with pytest.raises(ValueError, match="record 2: the loss is nan at step 2"):
        EDITORS["memit"].edit(model, tok, [facts[2]], replace(config, lr=float("nan")), given)
    long = replace(facts[1], case_id=77, prompt="The river " * 40 + "{} is")
    with pytest.raises(ValueError, match="record 77: .* tokens, but the model takes at most 64"):
        EDITORS["memit"].edit(model, tok, [facts[0], long], config, given)
    for layers in ((), (2, 0), (1, 1)):
        with pytest.raises(ValueError, match="must ascend"):
            EDITORS["memit"].prepare(model, tok, replace(config, layers=layers), EditorInputs(texts=tuple(corpus())))
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        EDITORS["memit"].prepare(model, tok, replace(config, layers=(0, 4)), EditorInputs(texts=tuple(corpus())))
    only = Moments({name: c for name, c in given.moments.moments.items() if ".0." in name}, 9)
    with pytest.raises(ValueError, match="no second moment of transformer.h.2.mlp.c_proj"):
        EDITORS["memit"].prepare(model, tok, config, EditorInputs(moments=only, contexts=CONTEXTS))
    assert content_hash(model) == before
