"""Matrices and what editors report in; norms, spectra and rows compared with torch and hand-made numbers."""

import math
from types import SimpleNamespace

import pytest
import torch

from editcore import metrics
from editcore.delta import Delta
from editcore.facts import Fact
from editcore.study import measure as lab


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_singular_values(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(lab.singular_values(matrix), torch.linalg.svdvals(matrix.double()), rtol=1e-9, atol=0)


def test_spectra_of_what_is_not_finite():
    values = lab.singular_values(torch.tensor([[1.0, math.inf], [0.0, 1.0]]))
    assert values.isnan().all() and math.isnan(lab.effective_rank(values))


@pytest.mark.parametrize("values, rank", [([1, 1, 1, 1], 4.0), ([3, 0, 0], 1.0), ([0, 0], 0.0),
                                          ([3, 1], math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))])
def test_effective_rank_by_hand(values, rank):
    assert lab.effective_rank(torch.tensor(values, dtype=torch.float64)) == pytest.approx(rank)


@pytest.fixture
def bench():
    """Just enough of a Lab for what looks at weights: a linear map of ones, 2 x 3."""
    model = torch.nn.Linear(3, 2, bias=True)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.zero_()
    return SimpleNamespace(model=model, original={})


def test_put_starts_from_the_unedited_value(bench):
    lab.put(bench, Delta({"weight": torch.full((2, 3), 5.0)}))
    lab.put(bench, Delta({"weight": torch.full((2, 3), 2.0)}))
    assert (bench.model.weight == 3).all() and (bench.original["weight"][0] == 1).all()


def test_movement_by_hand(bench):
    total, new = Delta({"weight": torch.full((2, 3), 2.0), "bias": torch.ones(2)}), Delta({"weight": torch.ones(2, 3)})
    lab.put(bench, total)
    rows = {(row["fact"], row["metric"]): row["value"] for row in lab.movement(bench, total, new)}
    assert rows["weight", "distance"] == pytest.approx(math.sqrt(24) / 6)
    assert rows["weight", "relative"] == pytest.approx(2) and rows["weight", "update"] == pytest.approx(math.sqrt(6))
    assert rows["bias", "relative"] == math.inf and rows["bias", "update"] == 0     # from zero; not in this update


def test_spectra_of_matrices_only(bench):
    total = Delta({"weight": torch.tensor([[2.0, 0, 0], [0, 0, 0]]), "bias": torch.ones(2)})
    lab.put(bench, total)
    rows = {(row["fact"], row["metric"]): row["value"] for row in lab.spectra(bench, total)}
    values = torch.linalg.svdvals(bench.model.weight.double())
    assert rows == {("weight", "spectral"): pytest.approx(2), ("weight", "effective_rank"): pytest.approx(1),
                    ("weight", "condition"): pytest.approx((values[0] / values[1]).item())}


def test_reported_numbers_but_no_clocks():
    facts = [Fact(case_id=7, subject="a", prompt="{} is", target_new="x"), Fact(case_id=9, subject="b",
                                                                                prompt="{} is", target_new="y")]
    info = {"v_norm": [1.0, 2.0], "loss": 0.5, "seconds": [1.0, 1.0], "name": "rome", "done": True, "many": [1, 2, 3]}
    assert lab.reported(facts, info) == [{"metric": "edit_loss", "value": 0.5},
                                         {"fact": 7, "metric": "edit_v_norm", "value": 1.0},
                                         {"fact": 9, "metric": "edit_v_norm", "value": 2.0}]


def test_what_is_asked_at_the_end_is_known_to_fit_before_the_first_edit(gpt2, facts):
    model, tok = gpt2
    run = SimpleNamespace(seed=0, final=("ES", "XS", "greedy"))
    prefixes = lab._prefixes(model, tok, facts[:1], run, ())
    assert prefixes == metrics.passages(model, tok, facts[:1], 1)
    assert lab._prefixes(model, tok, facts[:1], run, ("{}", prefixes[0] + " {}")) == prefixes[1:]
    assert lab._prefixes(model, tok, facts, SimpleNamespace(seed=0, final=()), ()) == ()
    long = Fact(case_id="x9", subject="Orla", prompt="{} is" + " in" * 60, target_new="Rome", target_true="Oslo")
    with pytest.raises(ValueError, match="record x9: .* at most 64"):
        lab._prefixes(model, tok, [long], run, ())
    with pytest.raises(ValueError, match="metric 'EX': choose some of"):
        lab._prefixes(model, tok, facts, SimpleNamespace(seed=0, final=("EX",)), ())


def test_final_asks_all_facts(gpt2, facts):
    model, tok = gpt2
    few, prefixes = facts[:2], ("The old river runs.",)
    run = SimpleNamespace(final=("ES", "XS", "greedy"))
    rows = lab.final(SimpleNamespace(model=model, tok=tok, facts=few, run=run, prefixes=prefixes))
    plain = metrics.measure(model, tok, few, run.final, prefixes=prefixes)
    assert rows == [row | {"metric": "final_" + row["metric"]} for row in plain]
    assert {"final_XS_greedy", "final_ES_exact"} <= {row["metric"] for row in rows}
