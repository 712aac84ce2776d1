"""Foretold losses against scikit-learn, against loops over pairs of edits, and against what the editors write."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from editcore import foresight
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.memit import fact_keys
from editcore.editors.target_value import EditSite, encode_facts, unedited_values
from editcore.facts import Fact
from editcore.files import read_lines
from editcore.study import loop as study
from editcore.study import run as inputs


def table(seed=0, runs=3, n=60, strength=1.0):
    """Rows run, block, score, event; the event depends on the score by `strength`."""
    draw = np.random.default_rng(seed)
    score = draw.normal(size=runs * n).round(1)     # with ties
    event = (strength * score + draw.normal(size=runs * n) > 0.8).astype(float)
    return pd.DataFrame({"run": np.repeat([f"r{i}" for i in range(runs)], n), "score": score, "event": event,
                         "block": np.tile(np.arange(n) // 20, runs)})


def test_auc_of_one_run_is_scikit_learns():
    one = table(runs=1)
    found = foresight.auc(one, "score", "event")
    assert found["auc"] == pytest.approx(roc_auc_score(one["event"], one["score"]))
    assert found["null_low"] < 0.5 < found["null_high"] < found["auc"] and found["p"] < 0.01
    assert found["events"] == one["event"].sum() and np.isnan(found["low"])


def test_auc_compares_within_run_and_block_only():
    every = table()
    every.loc[3, "score"] = np.nan
    wins = pairs = 0.0
    for _, part in every.dropna().groupby(["run", "block"]):
        high, low = (part.loc[part["event"] == value, "score"].to_numpy() for value in (1, 0))
        wins += sum((a > b) + 0.5 * (a == b) for a in high for b in low)
        pairs += len(high) * len(low)
    found = foresight.auc(every, "score", "event", within=("block",))
    assert found["auc"] == pytest.approx(wins / pairs) and found["pairs"] == pairs
    assert found["low"] < found["auc"] < found["high"]


def test_a_score_that_knows_nothing_is_not_told_from_its_null():
    p = np.array([foresight.auc(table(seed, runs=2, n=40, strength=0.0), "score", "event")["p"] for seed in range(60)])
    assert (p < 0.05).sum() <= 8 and 0.35 < p.mean() < 0.65     # p is uniform: 3 of 60 are expected


def test_a_slow_series_needs_the_null_that_is_rolled_around():
    steps = np.arange(200)
    slow = pd.DataFrame({"run": "r", "score": np.sin(steps / 30), "event": np.cos(steps / 30 - 1) > 0.8})
    permuted, rolled = (foresight.auc(slow, "score", "event", null=null) for null in ("permute", "shift"))
    assert permuted["auc"] == rolled["auc"]
    assert rolled["null_high"] > permuted["null_high"] + 0.1


def test_nothing_to_compare_is_nan():
    found = foresight.auc(table().assign(event=0.0), "score", "event")
    assert np.isnan(found["auc"]) and found["events"] == 0 and found["pairs"] == 0


def test_overlaps_and_disturbance_by_loops():
    draw = np.random.default_rng(1)
    writes, reads, norms = draw.normal(size=(5, 7)), draw.normal(size=(5, 7)), draw.random(5)
    found = foresight.overlaps(writes, reads)
    moved = foresight.disturbance(found, norms)
    for i in range(5):
        total = 0.0
        for j in range(5):
            unit = writes[j] / np.linalg.norm(writes[j])
            assert found[j, i] == pytest.approx(abs(unit @ reads[i]))
            value = draw.normal(size=3)
            delta = norms[j] * np.outer(value / np.linalg.norm(value), unit)      # a change of this norm along u
            total += np.linalg.norm(delta @ reads[i]) ** 2 if j > i else 0.0
        assert moved[i] == pytest.approx(np.sqrt(total))


@pytest.fixture
def history():
    """Rows of four edits (of relations P, Q, P, P), re-tested at 2 and 4, and the facts."""
    made = [(i + 1, str(i), metric, value) for i, (exact, prob) in enumerate([(1, .9), (1, .8), (0, .3), (1, .9)])
            for metric, value in (("ES_exact", exact), ("ES_prob", prob))]
    again = [(2, "0", 1, .9), (4, "0", 0, .2), (4, "1", 1, .75), (4, "2", 0, .1)]
    entries = made + [(step, fact, f"retest_{name}", value) for step, fact, exact, prob in again
                      for name, value in (("ES_exact", exact), ("ES_prob", prob))]
    entries += [(i + 1, "W", "update", norm) for i, norm in enumerate([1.0, 2.0, 3.0, 4.0])]
    facts = [Fact(case_id=i, subject=f"s{i}", prompt="{} is", target_new="x",
                  relation=relation) for i, relation in enumerate("PQPP")]
    rows = pd.DataFrame(entries, columns=["step", "fact", "metric", "value"])
    return rows.assign(run="r", editor="rome", seed=0), facts


def test_fates_by_hand(history):
    df, facts = history
    overlap = np.arange(16.0).reshape(4, 4)
    found = foresight.fates(df, facts, overlap, np.array([1.0, -2.0, 4.0, 0.5]), block=2)
    assert list(found["made"]) == [1, 2, 3, 4] and list(found["block"]) == [0, 0, 1, 1]
    assert list(found["later"]) == [3, 2, 1, 0] and list(found["same"]) == [2, 0, 1, 0]
    assert found["foretold"][1] == pytest.approx(np.hypot(9 / 4, 13 / 0.5))
    assert found["measured"][1] == pytest.approx(np.hypot(9 * 3, 13 * 4)) and found["measured"][3] == 0
    np.testing.assert_array_equal(found["forgotten"], [1, 0, np.nan, np.nan])   # 2 failed at once, 3 was not asked
    np.testing.assert_array_equal(found["weakened"], [1, 0, np.nan, np.nan])


def test_fates_of_a_run_without_retests_are_empty(history):
    df, facts = history
    assert foresight.fates(df[~df["metric"].str.startswith("retest")], facts, np.ones((4, 4)), np.ones(4)).empty


def test_deciles_count_and_expect():
    draw = np.random.default_rng(2)
    fates = pd.DataFrame({"run": "r", "editor": "rome", "block": np.arange(100) // 20, "weakened": 0.0,
                          "foretold": draw.permutation(100)})
    fates.loc[fates["foretold"] >= 90, "weakened"] = 1.0
    fates.loc[fates["foretold"] == 0, "weakened"] = np.nan
    found = foresight.deciles(fates).set_index("group")
    assert list(found.index) == list(range(1, 11)) and found["n"].sum() == 99
    top = found.loc[10]
    assert top["share"] == pytest.approx(1.0) and found.loc[1, "share"] == 0
    assert (found["by_age"] * found["n"]).sum() == pytest.approx(fates["weakened"].sum())
    bounds = binomtest(int(top["n"]), int(top["n"])).proportion_ci(method="wilson")
    assert (top["low"], top["high"]) == pytest.approx((bounds.low, bounds.high))


@pytest.fixture(scope="module")
def place(tmp_path_factory, gpt2, facts, texts):
    """A model folder with facts and texts."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in gpt2:
        part.save_pretrained(folder)
    records = [dataclasses.asdict(one) | {"portability": {}} for one in facts]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "texts.txt").write_text("\n".join(texts))
    return folder


LIGHT = {"measure": ["ES"], "n_edits": 6, "retest_every": 3, "downstream_every": 0, "untouched": 0}
SETTINGS = {"rome": {"layer": 1, "steps": 3}, "r-rome": {"layer": 1, "steps": 3}, "p-rome": {"layer": 1, "steps": 3},
            "memit": {"layers": [1, 2], "lambda_": 5.0, "steps": 3},
            "encore": {"layers": [1, 2], "lambda_": 5.0, "ridge": 1.0, "steps": 3},
            "emmet": {"layers": [1], "lambda_": 0.1, "steps": 3}}


@pytest.mark.parametrize("editor", SETTINGS)
def test_directions_are_those_that_the_editor_writes_along(editor, place, gpt2, facts, tmp_path):
    model, tok = gpt2
    run = study.make(model=str(place), editor=editor, settings=SETTINGS[editor], **LIGHT)
    writes, reads, denominators = foresight.directions(run, facts[:4], tmp_path)
    config = configure(editor, SETTINGS[editor])
    given = inputs_of(place, run, tmp_path)
    prepared = EDITORS[editor].prepare(model, tok, config, given)
    made = encode_facts(model, tok, [facts[:4]], [prepared.contexts], config)
    values = unedited_values(model, made, EditSite(1, "mlp_out", 1))
    np.testing.assert_allclose(reads, values.keys[:, 0].double(), rtol=1e-4, atol=1e-5)
    deltas = EDITORS[editor].edit_each(model, tok, facts[:4], config, prepared)
    moment = prepared.moments.moments["transformer.h.1.mlp.c_proj"].double().numpy()
    for row, delta in enumerate(deltas):
        change = dense(delta.changes["transformer.h.1.mlp.c_proj.weight"]).double().numpy().T      # (d, m)
        size = np.linalg.norm(change)
        for read in reads:
            assert np.linalg.norm(change @ read) == pytest.approx(size * abs(writes[row] @ read), rel=1e-3, abs=1e-6)
        if editor in ("memit", "encore"):       # Δ (λC + k kᵀ) = r kᵀ, so ‖r‖ is known from Δ alone
            key = fact_keys(values.keys)[row].numpy()
            moved = change @ (5 * moment + getattr(config, "ridge", 0.0) * np.eye(len(key)) + np.outer(key, key))
            residual = np.linalg.norm(moved) / np.linalg.norm(key)
        else:                                   # the value is reached: Δ k = r for the key that is divided by
            key = values.keys[row, 0] if editor in ("rome", "p-rome") else values.keys[row].mean(0)
            residual = np.linalg.norm(change @ key.double().numpy())
        assert residual / size == pytest.approx(abs(denominators[row]), rel=1e-3)


def inputs_of(place, run, tmp_path):
    """What the run gives its editor to prepare from."""
    return EditorInputs(tuple(read_lines(place / "texts.txt")), None, (), run.seed, str(tmp_path / "moments"))


def test_foretell_joins_runs_of_several_orders(place, tmp_path):
    runs = [study.make(model=str(place), editor="rome", settings=SETTINGS["rome"], order=order, **LIGHT)
            for order in (0, 1)]
    names = [folder.name for folder in study.execute_all(runs, tmp_path)]
    df = study.table(tmp_path)
    found = foresight.foretell(dict(zip(names, runs)), df, tmp_path)
    assert set(found["run"]) == set(names) and len(found) == 12
    alone = foresight.foretell({names[1]: runs[1]}, df, tmp_path)
    pd.testing.assert_frame_equal(found[found["run"] == names[1]].reset_index(drop=True), alone)
    facts = inputs.schedule(runs[1], place / "facts.json")[0]
    assert list(alone["fact"]) == [str(one.case_id) for one in facts]
    scores = foresight.overlap_scores(found)
    assert set(scores["predictor"]) == set(foresight.PREDICTORS)


def test_foretell_needs_an_editor_with_keys(place, tmp_path):
    run = study.make(model=str(place), editor="ft", settings={"epsilon": 1e-3}, **LIGHT)
    with pytest.raises(ValueError, match="none of these runs"):
        foresight.foretell({"x": run}, pd.DataFrame({"run": []}), tmp_path)
