"""editcore.orderings: the paper's numbers re-derived, intervals against plain ones, verdicts by their rule."""

import numpy as np
import pandas as pd
import pytest

from editcore.orderings import (
    ALIKE,
    COLUMNS,
    PAPER,
    SEEDED,
    UNSEEDED,
    Claim,
    claims,
    difference,
    drawn,
    headline,
    numbers,
    paper_gain,
    per_record,
    resampled,
    summary,
    verdict,
    verdicts,
)

OWN, RIVAL = COLUMNS[-1], COLUMNS[4]


def rows(number=40):
    """Scores of two systems on four tasks: both right on easy records, the first one on middling ones too."""
    draw, made = np.random.default_rng(0), []
    for task in ("recent", "counterfact", "convsent", "zsre"):
        for case, ease in enumerate(draw.random(number)):
            for system, limit in ((RIVAL, 0.3), (OWN, 0.9 if task == "zsre" else 0.4)):
                for question in range(2):
                    right = float(ease < limit)
                    made.append({"system": system, "task": task, "case_id": case, "metric": "Rel", "kind": "",
                                 "value_exact": right, "value_token": (right + question) / 2})
    return pd.DataFrame(made)


def test_the_headline_is_the_mean_of_four_rows_of_which_one_is_held_out():
    tasks = ("recent", "counterfact", "convsent", "zsre")
    assert paper_gain(tasks, "GPT2-XL") == pytest.approx(14.8575) and paper_gain(("zsre",), "GPT2-XL") == pytest.approx(
        42.04)
    assert paper_gain(tasks[:3], "GPT2-XL") == pytest.approx(5.7967, abs=1e-3)
    assert paper_gain(tasks, "Llama-2") == pytest.approx(0.4267, abs=1e-3) and np.isnan(paper_gain(("convsent",),
                                                                                               "Llama-2"))
    assert len(PAPER) == 18 * 7
    table = headline(rows()).set_index("rows")
    gains = table["gain"]
    assert gains["Mean of all"] == pytest.approx(gains[["Recent", "CounterFact", "ConvSent", "ZsRE"]].mean())
    assert gains["Without the hold-out"] == pytest.approx(gains[["Recent", "CounterFact", "ConvSent"]].mean())
    assert (table["low"] <= table["gain"]).all() and (table["gain"] <= table["high"]).all()
    assert table.loc["Mean of all", "gpt2_xl"] == pytest.approx(14.8575)


def test_means_are_over_records_and_intervals_those_of_their_resamples():
    table = summary(rows(), n_draws=500).set_index(["system", "task", "metric", "value"])
    scores = per_record(rows())
    one = scores.loc[(OWN, "zsre", "Rel")][UNSEEDED]
    found = table.loc[(OWN, "zsre", "Rel", "exact")]
    assert found["mean"] == one.mean() and found["records"] == 40
    plain = [one.to_numpy()[np.repeat(np.arange(40), times)].mean() for times in drawn(40, 500)]
    np.testing.assert_allclose([found["low"], found["high"]], np.quantile(plain, (0.025, 0.975)))
    assert table.loc[(OWN, "zsre", "Rel", "token"), "mean"] == pytest.approx(0.5 * one.mean() + 0.25)


def test_locality_and_portability_count_by_token_unless_told():
    asked = pd.concat([rows(10), rows(10).assign(metric="Loc")])
    shown, exact, token = (per_record(asked, value) for value in ("shown", "exact", "token"))
    whole = shown.index.get_level_values("metric") == "Rel"
    assert shown[whole].equals(exact[whole]) and shown[~whole].equals(token[~whole])
    assert not exact.equals(token) and per_record(asked).equals(shown)


def test_numbers_are_exact_and_token_side_by_side():
    table = summary(rows(), n_draws=20)
    shown = numbers(table)
    assert list(shown.index) == [(task, "Rel") for task in ("Recent", "CounterFact", "ConvSent", "ZsRE")]
    one = table.query("system == @OWN and task == 'zsre'").set_index("value")["mean"]
    assert shown.loc[("ZsRE", "Rel"), OWN] == f"{100 * one['exact']:.0f} / {100 * one['token']:.0f}"
    text = table.query("task == 'convsent'").assign(metric="Fluency", mean=500.0)
    assert numbers(pd.concat([table, text])).loc[("ConvSent", "Fluency"), OWN] == "500"
    fair = table.query("task == 'zsre' and system == @OWN").assign(system="GRACE, fair")
    assert numbers(pd.concat([table, fair]))["GRACE, fair"].tolist()[:3] == ["", "", ""]


def test_differences_are_paired_and_their_intervals_narrower_than_unpaired_ones():
    scores = per_record(rows())
    apart = difference(scores, ("zsre", "Rel"), OWN, RIVAL)
    assert apart.shape == (40, 1) and set(apart.ravel()) == {0.0, 1.0}, "whatever the rival gets right, the other does"
    alone = [difference(scores, ("zsre", "Rel"), OWN, RIVAL, share=0.0), scores.loc[(RIVAL, "zsre", "Rel")]]
    np.testing.assert_array_equal(alone[0], -alone[1].to_numpy())
    shuffled = rows().iloc[::-1]
    np.testing.assert_array_equal(difference(per_record(shuffled), ("zsre", "Rel"), OWN, RIVAL), apart)
    with pytest.raises(ValueError, match="GRACE has no Rel on zsre"):
        difference(scores, ("zsre", "Rel"), "GRACE", RIVAL)


def seeded(luck, number=40):
    """Rows of several training seeds, of which each has its own luck with the first system; GRACE knows no seed."""
    part = rows(number)
    made = [part.assign(seed=seed, value_exact=part["value_exact"] + gain * (part["system"] == OWN))
            for seed, gain in enumerate(luck)]
    return pd.concat([*made, part[part["system"] == OWN].assign(seed=UNSEEDED, system="GRACE")])


def test_intervals_are_over_records_and_training_seeds():
    scores, cell = per_record(seeded((0.0, 0.3, -0.3))), ("recent", "Rel")
    assert list(scores.columns) == [0, 1, 2]
    assert (scores.loc["GRACE"].nunique(axis=1) == 1).all(), "the same at every seed"
    apart = difference(scores, cell, OWN, "GRACE")
    np.testing.assert_allclose(apart, np.broadcast_to((0.0, 0.3, -0.3), (40, 3)), atol=1e-12)
    values = difference(scores, cell, OWN, RIVAL)
    found, (records, seeds) = resampled(values, 400, 5), (drawn(40, 400, 5), drawn(3, 400, SEEDED))
    wider = values + (4.302653 / 1.959964 * np.sqrt(3 / 2) - 1) * (values.mean(0) - values.mean())
    plain = [np.repeat(np.repeat(wider, a, 0), b, 1).mean() for a, b in zip(records, seeds)]
    np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-11)
    np.testing.assert_allclose(resampled(values[:, :1], 400, 5), [
        np.repeat(values[:, 0], a).mean() for a in records], atol=1e-11, err_msg="one seed")


@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_interval_over_few_seeds_covers_what_it_says(count):
    """Trainings whose true mean is 0 and that differ by seed alone: 95 of 100 intervals should contain it."""
    luck = np.random.default_rng(count).standard_normal((600, count))
    inside = [low <= 0 <= high for low, high in (
        np.quantile(resampled(np.broadcast_to(one, (4, count)), 400), (0.025, 0.975)) for one in luck)]
    assert 0.91 <= np.mean(inside) <= 0.985


def test_what_was_not_tried_is_no_seed():
    """Trained at seeds 1 and 2, beside what has no seed and what was tried with one of them only."""
    part = seeded((0.0, 0.3))
    later = part.assign(seed=part["seed"] + (part["seed"] >= 0))
    alone, beside = headline(part), headline(pd.concat([later, rows().assign(system="base", seed=UNSEEDED)]))
    pd.testing.assert_frame_equal(alone, beside)
    once = later[(later["system"] != RIVAL) | (later["seed"] == 1)]
    apart = difference(per_record(once), ("recent", "Rel"), OWN, RIVAL)
    assert apart.shape == (40, 1), "of the two, the seed that both have"
    ends = summary(seeded((0.6, -0.6)))
    assert ends["low"].min() == 0 and ends["high"].max() == 1, "shares stay shares"
    found = verdicts(once, [Claim("x", "y", "recent", "Rel", OWN, RIVAL)]).loc[0]
    assert found["score"] == pytest.approx(found["rival"] + apart.mean() + 0.15)


def test_one_lucky_seed_does_not_hold_an_ordering_nor_the_headline():
    claim = [Claim("x", "y", "recent", "Rel", OWN, "GRACE")]
    said = [verdicts(seeded(luck), claim).loc[0, "verdict"] for luck in ((0.2, 0.2, 0.2), (0.5, -0.1, 0.2))]
    assert said == ["held", "undecided"]
    table = headline(seeded((0.0, 0.3, -0.3))).set_index("rows")
    plain = headline(rows()).set_index("rows")
    np.testing.assert_allclose(table["gain"], plain["gain"], atol=1e-9)
    np.testing.assert_allclose(table["most"] - plain["gain"], 30, atol=1e-9)
    np.testing.assert_allclose(table["least"] - plain["gain"], -30, atol=1e-9)
    assert (table["high"] - table["low"] > plain["high"] - plain["low"]).all()


def test_verdicts_follow_the_interval():
    assert [verdict(*pair) for pair in ((0.1, 0.2), (-0.2, -0.1), (-0.1, 0.1), (0, 0.2))] == [
        "held", "failed", "undecided", "undecided"]
    assert [verdict(*pair, alike=True) for pair in ((0, 0), (ALIKE + 0.01, 0.2), (-0.01, 0.2))] == [
        "held", "failed", "undecided"]
    found = verdicts(rows(), [*claims(), Claim("x", "y", "zsre", "Rel", RIVAL, OWN)]).set_index("text")
    assert found.loc["ZsRE: InstructEdit > multi-task MEND, Rel", "verdict"] == "held"
    assert found.loc["x", "verdict"] == "failed" and found.loc["x", "high"] < 0
    assert found.loc["ZsRE: InstructEdit > multi-task MEND, Rel", "paper"] == pytest.approx(42.04)
    assert not any("GRACE" in text or "trained on it" in text for text in found.index), "these were not tried"


def test_the_papers_orderings_are_all_there():
    found = claims()
    assert len({one.text for one in found}) == len(found) == 8 + 2 + 7 + 3 + 3
    assert next(one for one in found if one.text == "ZsRE: trained on it > on Recent, Rel").paper == pytest.approx(86.4)
    assert next(one for one in found if one.text.startswith("Recent → ZsRE")).paper == pytest.approx(38.09)
    assert all(one.paper > 0 for one in found if one.metric == "Loc")
    recent = next(one for one in found if one.text == "Recent: InstructEdit > multi-task MEND, Gen")
    assert recent.paper == pytest.approx(-1.10), "the paper's own table does not hold here"
