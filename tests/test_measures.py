"""Rows made by hand or by chance; oracles are numpy over whole resamples, pairs counted one by one, scipy, an exact
test, and `analysis.forgotten`."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from editcore import analysis_old as analysis
from editcore import measures


def rows(values, order=0, metric="ES", start=0):
    """Rows of {editor: values of facts start, start + 1, …} of one order and metric."""
    return pd.DataFrame([{"run": f"{editor}{order}", "editor": editor, "order": order, "seed": 0, "step": i + 1,
                          "fact": str(start + i), "metric": metric, "value": float(value)}
                         for editor, several in values.items() for i, value in enumerate(several)])


def flags(n, wrong):
    """n values, the first `wrong` of them 0, the rest 1."""
    return [0.0] * wrong + [1.0] * (n - wrong)


@pytest.fixture(scope="module")
def df():
    """Three methods, two orders of 60 edits, all measures and moments; strictness costs "c" most."""
    draw, level = np.random.default_rng(3), {"a": 0.95, "b": 0.8, "c": 0.9}
    cost = {"a": 0.02, "b": 0.02, "c": 0.15}
    return pd.concat([rows({e: draw.random(60) < level[e] - cost[e] * place for e in level}, order, prefix + metric,
                           start=100 * order)
                      for order in (0, 1) for prefix in ("", "final_")
                      for place, metric in enumerate(("ES", "ES_token", "ES_exact", "ES_greedy"))])


def test_means_and_order_of_measures(df):
    found = measures.compare(df.sample(frac=1, random_state=0), n_draws=10)
    assert found.measures == ("ES", "ES_token", "ES_exact", "ES_greedy")
    assert (found.edits, found.orders) == (120, 2)
    for i, j in itertools.product(range(4), range(3)):
        part = df[(df["metric"] == found.measures[i]) & (df["editor"] == found.editors[j])]
        assert found.mean[i, j] == pytest.approx(part["value"].mean())
    assert list(measures.scores(found)["mean"]) == list(found.mean.ravel())
    with pytest.raises(ValueError, match="measure 'PS' at 'made': there are only ES, ES_token"):
        found["PS"]


def test_only_edits_and_measures_that_all_methods_share_are_compared():
    df = pd.concat([rows({"a": [1, 0, 1, 1], "b": [1, 1]}), rows({"a": [1], "b": [1]}, order=1),
                    rows({"a": [0, 0]}, order=2), rows({"a": [0, 1, 1, 1], "b": [1, np.nan]}, metric="PS"),
                    rows({"b": [1, 1]}, metric="XS"), rows({"c": [1, 1]}, metric="NS"),
                    rows({"a": [1, 1], "b": [1, 0]}, metric="final_ES")])
    table = measures.answers(df)
    assert list(table.columns.unique(0)) == ["ES", "PS"] and list(table.index) == [(0, 0, "0")]
    assert list(measures.answers(df[df["metric"] == "ES"]).index) == [(0, 0, "0"), (0, 0, "1"), (1, 0, "0")]
    assert measures.compare(df, "end").mean.tolist() == [[1, 0.5]]


def test_one_clear_error():
    df = rows({"a": [1, 0], "b": [1, 1]})
    with pytest.raises(ValueError, match="moment 'later': choose one of made, end"):
        measures.compare(df, "later")
    with pytest.raises(ValueError, match="no rows of final_ES, final_ES_token"):
        measures.compare(df, "end")
    with pytest.raises(ValueError, match="a, b have no answered edit in common"):
        measures.compare(pd.concat([rows({"a": [1]}), rows({"b": [1]}, order=1)]))
    with pytest.raises(ValueError, match="two runs of a with order 0 and seed 0"):
        measures.compare(pd.concat([df, df[df["editor"] == "a"]]))
    with pytest.raises(ValueError, match="no edit was asked again"):
        measures.lost(df)


def test_resamples_draw_orders_and_then_edits():
    index = pd.MultiIndex.from_tuples([(order, 0, str(i)) for order, n in ((4, 30), (7, 10)) for i in range(n)],
                                      names=measures.UNIT)
    weights = measures.resamples(index, 4000, seed=5)
    assert (weights == measures.resamples(index, 4000, seed=5)).all()
    first, second = weights[:, :30].sum(1), weights[:, 30:].sum(1)
    assert set(first) == {0, 30, 60} and set(second) == {0, 10, 20}
    assert (first / 30 + second / 10 == 2).all()
    assert (first == 60).mean() == pytest.approx(0.25, abs=0.03)
    assert weights.mean(0) == pytest.approx(np.ones(40), abs=0.1)


def test_interval_is_that_of_the_plain_bootstrap_where_nothing_is_rare():
    draw = np.random.default_rng(1)
    values = (draw.random(400) < 0.6).astype(float)
    (one,) = measures.scores(measures.compare(rows({"a": values}))).itertuples()
    plain = np.quantile([values[draw.integers(0, 400, 400)].mean() for _ in range(4000)], measures.LEVEL)
    assert (one.low, one.high) == pytest.approx(plain, abs=0.012)


def test_intervals_hold_the_truth_as_often_as_they_say():
    draw, hits, truth = np.random.default_rng(2), [], 0.97
    for i in range(100):
        found = measures.compare(rows({"a": draw.random(100) < truth}), n_draws=400, seed=i)
        (one,) = measures.scores(found).itertuples()
        hits.append(one.low <= truth <= one.high)
    assert 0.91 <= np.mean(hits) <= 1


@pytest.mark.parametrize("wrong", [0, 1, 2, 3, 4, 6, 7, 8, 10, 12])     # at 5 it is 0.06: on the edge
def test_methods_are_apart_about_where_the_exact_test_says_so(wrong):
    found = measures.compare(rows({"a": flags(300, 0), "b": flags(300, wrong)}), n_draws=8000)
    (pair,) = measures.differences(found, "ES").itertuples()
    p = min(1.0, 2 * 0.5 ** wrong)      # McNemar's exact test: all of the `wrong` edits go one way
    assert pair.difference == pytest.approx(wrong / 300)
    assert pair.low <= pair.difference <= pair.high
    assert pair.apart == (p < 0.05)


def test_a_difference_is_paired():
    draw = np.random.default_rng(0)
    hard = draw.random(300) < 0.5       # edits that both fail
    found = measures.compare(rows({"a": ~hard, "b": ~hard & (np.arange(300) % 12 > 0)}))
    (pair,) = measures.differences(found, "ES").itertuples()
    one, other = measures.scores(found).itertuples()
    assert pair.apart == 1 and one.low < other.high     # the two intervals overlap, that of the difference is above 0


def test_ranks_share_ties_and_their_intervals_span_them():
    table = measures.scores(measures.compare(rows({"a": flags(200, 3), "b": flags(200, 100), "c": flags(200, 3)})))
    assert list(table["rank"]) == [1.5, 3, 1.5]
    assert list(table["rank_low"]) == [1, 3, 1] and list(table["rank_high"]) == [2, 3, 2]


def brute(a, b):
    """Kendall's tau-b, pair by pair."""
    concordant = discordant = ties_a = ties_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        product = (a[i] - a[j]) * (b[i] - b[j])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        ties_a, ties_b = ties_a + (a[i] == a[j]), ties_b + (b[i] == b[j])
    every = math.comb(len(a), 2)
    apart = math.sqrt((every - ties_a) * (every - ties_b))
    return (concordant - discordant) / apart if apart else math.nan


def test_kendall_is_the_count_of_pairs_and_scipys():
    draw = np.random.default_rng(4)
    a, b = draw.integers(0, 5, (2, 50, 7)).astype(float)
    found = measures.kendall(a, b)
    assert found == pytest.approx([brute(x, y) for x, y in zip(a, b)], nan_ok=True)
    assert measures.kendall(a[0], a[0]) == 1 and measures.kendall(a[0], -a[0]) == -1
    assert math.isnan(measures.kendall(np.ones(3), a[0, :3]))
    stats = pytest.importorskip("scipy.stats")
    assert found == pytest.approx([stats.kendalltau(x, y).statistic for x, y in zip(a, b)], nan_ok=True)


def test_agreement_is_kendall_of_the_means_with_an_interval_of_the_draws(df):
    found = measures.compare(df, n_draws=300)
    table = measures.agreement(found).set_index(["mild", "strict"])
    assert len(table) == 6
    one = table.loc["ES", "ES_greedy"]
    assert one["tau"] == pytest.approx(brute(found["ES"][0], found["ES_greedy"][0]))
    drawn = [brute(a, b) for a, b in zip(found["ES"][1], found["ES_greedy"][1])]
    assert (one["low"], one["high"]) == pytest.approx(tuple(np.nanquantile(drawn, measures.LEVEL)))
    assert measures.agreement(measures.compare(rows({"a": [1, 0]}))).empty
    alone = measures.compare(pd.concat([rows({"a": [1, 0]}), rows({"a": [1, 0]}, metric="PS")]))
    assert measures.agreement(alone)[["tau", "low", "high"]].isna().all(axis=None)     # one method: no pairs


def test_verdicts_on_pairs_of_methods():
    mild = rows({"a": flags(200, 0), "b": flags(200, 40), "c": flags(200, 1), "d": flags(200, 0)})
    strict = rows({"a": flags(200, 80), "b": flags(200, 50), "c": flags(200, 80), "d": flags(200, 120)},
                  metric="ES_greedy")
    found = measures.compare(pd.concat([mild, strict]))
    (pairs,) = {tuple(pair) for pair in measures.swaps(found)[["mild", "strict"]].to_numpy()}
    assert pairs == ("ES", "ES_greedy")
    verdict = measures.swaps(found).set_index(["editor_a", "editor_b"])["verdict"].to_dict()
    assert verdict == {("a", "b"): "swapped", ("a", "c"): "neither", ("a", "d"): "only strict", ("b", "c"): "swapped",
                       ("b", "d"): "swapped", ("c", "d"): "may swap"}
    back = measures.swaps(found, [("ES_greedy", "ES")]).set_index(["editor_a", "editor_b"])["verdict"]
    assert back["a", "d"] == "only mild"
    same = measures.compare(pd.concat([mild, mild.assign(metric="PS")]))
    assert set(measures.swaps(same)["verdict"]) == {"same order", "neither"}
    assert set(verdict.values()) <= set(measures.VERDICTS)
    assert measures.swaps(measures.compare(mild)).empty


def test_gap_and_inflation_are_paired_differences(df):
    found = measures.compare(df, "end")
    table = measures.inflation(found).set_index(["measure", "editor"])
    assert set(table["base"]) == {"ES_greedy"} and len(table) == 9
    end = df[df["metric"].str.startswith("final_")].groupby(["metric", "editor"])["value"].mean()
    assert table.loc[("ES", "c"), "gap"] == pytest.approx(end["final_ES", "c"] - end["final_ES_greedy", "c"])
    assert (table["low"] <= table["gap"]).all() and (table["gap"] <= table["high"]).all()
    assert measures.inflation(measures.compare(rows({"a": [1, 0]}))).empty
    with pytest.raises(ValueError, match="measure 'PS'"):
        measures.gap(found, "PS", "ES_greedy")


@pytest.fixture(scope="module")
def asked_again():
    """Rows of 40 edits a method and order, re-tested every 10: forgotten and recovered by chance."""
    draw, parts = np.random.default_rng(8), []
    for editor, order in itertools.product(("a", "b"), (0, 1)):
        for metric in ("ES", "ES_exact"):
            parts.append(rows({editor: draw.random(40) < 0.9}, order, metric))
            parts += [rows({editor: draw.random(n) < 0.8}, order, f"retest_{metric}").assign(step=n)
                      for n in (10, 20, 30, 40)]
        parts.append(rows({editor: draw.random(40) < 0.7}, order, "ES_greedy"))
        parts += [rows({editor: draw.random(40) < 0.6}, order, f"final_{metric}").assign(step=40)
                  for metric in ("ES", "ES_greedy")]
    return pd.concat(parts).assign(model="pocket", data="facts")


def test_lost_is_analysis_forgotten_at_the_last_retest(asked_again):
    table = measures.lost(asked_again, n_draws=500).set_index(["measure", "counted", "editor"])
    for metric, (counted, column) in itertools.product(("ES", "ES_exact"), {"ever": "absorbing",
                                                                           "now": "non_absorbing"}.items()):
        known = analysis.forgotten(asked_again, metric)
        known = known[known["step"] == 40].set_index("editor")
        for editor, part in known.groupby("editor"):
            one = table.loc[metric, counted, editor]
            assert one["edits"] == part["edits"].sum()
            assert one["share"] == pytest.approx(np.average(part[column], weights=part["edits"]))
            assert one["low"] < one["share"] < one["high"]
    assert (table.loc["ES", "ever"]["share"] >= table.loc["ES", "now"]["share"]).all()


def test_lost_by_what_is_written_is_asked_at_the_end(asked_again):
    table = measures.lost(asked_again, n_draws=100)
    assert list(table["measure"].unique()) == ["ES", "ES_exact", "ES_greedy"]
    part = table[table["measure"] == "ES_greedy"].set_index("editor")
    assert set(part["counted"]) == {"now"}
    one = asked_again[asked_again["editor"] == "a"]
    made = one[(one["metric"] == "ES_greedy") & (one["value"] == 1)].set_index(["order", "fact"]).index
    end = one[one["metric"] == "final_ES_greedy"].set_index(["order", "fact"])["value"]
    assert part.loc["a", "share"] == pytest.approx(1 - end[end.index.isin(made)].mean())
    assert part.loc["a", "edits"] == len(made)


def test_sentences_say_what_the_tables_hold(asked_again):
    mild, strict = rows({"a": flags(50, 0), "b": flags(50, 0), "c": flags(50, 5)}), \
        rows({"a": flags(50, 10), "b": flags(50, 40), "c": flags(50, 5)}, metric="ES_greedy")
    found = measures.compare(pd.concat([mild, strict]), n_draws=300)
    assert measures.fell(found, "ES", "ES_greedy") == \
        "from ES to ES_greedy the methods' mean goes from 97 to 63 %, b's from 100 to 20 %"
    assert (measures.best(found, "ES"), measures.best(found, "ES_greedy")) == ("a, b (100 %)", "c (90 %)")
    level = {name: flags(4, 1) for name in "abcde"}
    assert measures.best(measures.compare(rows(level), n_draws=9), "ES") == "all level (75 %)"
    many = measures.compare(rows(level | {"f": flags(4, 2)}), n_draws=9)
    assert measures.best(many, "ES") == "a, b, c and 2 more (75 %)"
    table = pd.DataFrame({"verdict": ["neither", "swapped", "neither"]})
    assert measures.tally(table) == "3 pairs of methods: 1 swapped, 2 told apart by neither"
    assert measures.fell(found, "ES_greedy", "ES") == "from ES_greedy to ES the methods' mean goes from 63 to 97 %"
    taus = pd.DataFrame({"mild": "ES", "strict": ["PS", "XS"], "tau": [0.5, np.nan], "low": -0.25, "high": 1.0})
    assert measures.agreed(taus, "ES", "PS") == "τ between ES and PS is 0.50 (-0.25 to 1.00)"
    assert measures.agreed(taus, "ES", "XS") == "ES and XS have no τ, as one of them puts all methods level"
    lost = measures.lost(asked_again, n_draws=50)
    part = lost[lost["editor"] == "b"].set_index(["measure", "counted"])["share"]
    one = f"b {100 * part.min():.0f} % ({part.idxmin()[0]}, fails now) to {100 * part.max():.0f} % " \
          f"({part.idxmax()[0]}, has failed since)"
    assert measures.spread(lost[lost["editor"] == "b"]) == one
    assert measures.spread(lost.assign(share=0.0)) == "every way of counting gives the same"
    width = 100 * lost.groupby("editor")["share"].agg(lambda share: share.max() - share.min())
    said = measures.spread(lost)
    assert said.startswith(width.idxmax()) and said.endswith(f"move by {width.min():.0f} to {width.min():.0f} points")
