"""Concordances against scikit-learn, within runs and blocks only, and beside scores that know nothing."""

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from editcore import foresight


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
