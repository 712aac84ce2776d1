"""What is measured of weights and reports, compared with torch and hand-made numbers."""

import math
from types import SimpleNamespace

import pytest
import torch

from editcore import metrics
from editcore.delta import Delta
from editcore.facts import Fact
from editcore.study import measure


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(matrix.double())
    torch.testing.assert_close(measure.singular_values(matrix), expected, rtol=1e-9, atol=0)


def test_spectra_of_what_is_not_finite():
    values = measure.singular_values(torch.tensor([[1.0, math.inf], [0.0, 1.0]]))
    assert values.isnan().all() and math.isnan(measure.effective_rank(values))


@pytest.mark.parametrize("values, rank", [
    ([1, 1, 1, 1], 4.0), ([3, 0, 0], 1.0), ([0, 0], 0.0),
    ([3, 1], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))])
def test_effective_rank_by_hand(values, rank):
    values = torch.tensor(values, dtype=torch.float64)
    assert measure.effective_rank(values) == pytest.approx(rank)


@pytest.fixture
def context():
    """Just enough of a RunContext for what looks at weights: a linear map of ones, 2 x 3."""
    model = torch.nn.Linear(3, 2, bias=True)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    return SimpleNamespace(model=model, unedited={})


def test_weights_start_from_the_unedited_value(context):
    for size in (5.0, 2.0):
        measure.set_weights(context, Delta({"weight": torch.full((2, 3), size)}))
    assert (context.model.weight == 3).all() and (context.unedited["weight"][0] == 1).all()
    measure.set_weights(context, Delta({}))
    assert (context.model.weight == 1).all()


def test_movement_by_hand(context):
    total = Delta({"weight": torch.full((2, 3), 2.0), "bias": torch.ones(2)})
    measure.set_weights(context, total)
    rows = measure.rows_movement(context, total, Delta({"weight": torch.ones(2, 3)}))
    values = {(row["fact"], row["metric"]): row["value"] for row in rows}
    assert values["weight", "distance"] == pytest.approx(math.sqrt(24) / 6)
    assert values["weight", "relative"] == pytest.approx(2)
    assert values["weight", "update"] == pytest.approx(math.sqrt(6))
    assert values["bias", "relative"] == math.inf and values["bias", "update"] == 0


def test_spectra_of_matrices_only(context):
    total = Delta({"weight": torch.tensor([[2.0, 0, 0], [0, 0, 0]]), "bias": torch.ones(2)})
    measure.set_weights(context, total)
    rows = measure.rows_spectra(context, total)
    first, last = torch.linalg.svdvals(context.model.weight.double())
    assert {row["metric"]: row["value"] for row in rows} == {
        "spectral": pytest.approx(2), "effective_rank": pytest.approx(1),
        "condition": pytest.approx((first / last).item())}
    assert {row["fact"] for row in rows} == {"weight"}


def test_reported_numbers_but_no_clocks():
    facts = [Fact(case_id=case, subject="a", prompt="{} is", target_new="x") for case in (7, 9)]
    info = {"v_norm": [1.0, 2.0], "loss": 0.5, "seconds": [1.0, 1.0], "name": "rome", "done": True,
            "many": [1, 2, 3]}
    assert measure.rows_reported(facts, info) == [
        {"metric": "edit_loss", "value": 0.5},
        {"fact": 7, "metric": "edit_v_norm", "value": 1.0},
        {"fact": 9, "metric": "edit_v_norm", "value": 2.0}]


def test_what_is_asked_at_the_end_fits_before_the_first_edit(gpt2, facts):
    model, tok = gpt2
    run = SimpleNamespace(seed=0, final=("ES", "XS", "greedy"))
    prefixes = measure._prefixes(model, tok, facts[:1], run, ())
    assert prefixes == metrics.passages(model, tok, facts[:1], 1)
    contexts = ("{}", prefixes[0] + " {}")
    assert measure._prefixes(model, tok, facts[:1], run, contexts) == prefixes[1:]
    assert measure._prefixes(model, tok, facts, SimpleNamespace(seed=0, final=()), ()) == ()
    long = Fact(case_id="x9", subject="Orla", prompt="{} is" + " in" * 60, target_new="Rome",
                target_true="Oslo")
    with pytest.raises(ValueError, match="record x9: .* at most 64"):
        measure._prefixes(model, tok, [long], run, ())
    with pytest.raises(ValueError, match="metric 'EX': choose some of"):
        measure._prefixes(model, tok, facts, SimpleNamespace(seed=0, final=("EX",)), ())


def test_final_rows_are_of_all_facts(gpt2, facts):
    model, tok = gpt2
    run = SimpleNamespace(final=("ES", "XS", "greedy"))
    prefixes = ("The old river runs.",)
    rows = measure.rows_final(SimpleNamespace(model=model, tok=tok, facts=facts[:2], run=run,
                                              prefixes=prefixes))
    plain = metrics.measure(model, tok, facts[:2], run.final, prefixes=prefixes)
    assert rows == [row | {"metric": "final_" + row["metric"]} for row in plain]
    assert {"final_XS_greedy", "final_ES_exact"} <= {row["metric"] for row in rows}


def test_answers_are_what_the_model_writes(gpt2, facts):
    model, tok = gpt2
    context = SimpleNamespace(model=model, tok=tok, run=SimpleNamespace(answers=3))
    long = Fact(subject="Orla", prompt="{} is" + " in" * 60, target_new="Rome")
    texts = measure.answers(context, [facts[0], long, facts[1]])
    assert texts[1] == "" and measure.answers(context, []) == []
    for text, fact in ((texts[0], facts[0]), (texts[2], facts[1])):
        ids = tok(fact.text)["input_ids"]
        for _ in range(3):
            ids = [*ids, model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()]
        written = tok.decode(ids[-3:]).split(tok.eos_token)[0]
        assert text == written.strip()
