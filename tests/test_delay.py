"""Hand-made rows with losses that are known at every edit; lifetimes, means, ranks and tables worked out by hand."""

import itertools

import numpy as np
import pandas as pd
import pytest

from editcore import delay

COLUMNS = ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value", "order", "batch_size"]


def rows(speeds, orders=(0, 1), end=100, every=20, kept=1.0, perplexity=True):
    """Runs whose never-edited facts lose `speed` of their probability an edit (10 % more in each later order)."""
    out = []
    for editor, speed in speeds.items():
        for order in orders:
            head = [f"{editor}{order}", "m", editor, "d", 0]
            for step in range(0, end + 1, every):
                gone = step * speed * (1 + 0.1 * order)
                own = {"perplexity": 10 * (1 + gone / 2), "sst2_f1": 1.0} if perplexity else {}
                own = [("", *one) for one in own.items()] + [(str(i), "untouched_ES_prob", 0.9 * (1 - gone))
                                                            for i in range(4)]
                own += [(str(i), "untouched_ES_exact", float(i >= 10 * gone)) for i in range(4)]
                out += [[*head, step, *one, order, 1] for one in own]
            for step in range(1, end + 1):
                own = {"ES": 1.0, "PS": 0.5, "NS": 1.0, "ES_exact": 1.0, "edit_evaluations": 10.0}
                out += [[*head, step, str(step), *one, order, 1] for one in own.items()]
                out.append([*head, end, str(step), "final_ES_exact", float(step <= kept * end), order, 1])
    return pd.DataFrame(out, columns=COLUMNS)


def runs(df, **seconds):
    """What `study.runs` says of these runs."""
    own = df.drop_duplicates("run")
    return pd.DataFrame({"run": own["run"], "editor": own["editor"], "status": "finished", "peak_memory": 5e8,
                         "seconds_per_edit": [seconds.get(name, 1.0) for name in own["editor"]], "batch_size": 1,
                         "config": [{"context_groups": [{"number": 1, "starts": ["So"]}]}] * len(own)})


def test_crossing_is_interpolated_and_must_stand():
    series = pd.Series({0: 0.0, 20: 0.005, 40: 0.015, 60: 0.02})
    assert delay.crossing(series, 0.01) == pytest.approx(30)
    assert delay.crossing(series, 0.02) == pytest.approx(60)        # the last test has nothing after it
    assert np.isnan(delay.crossing(series, 0.03))
    once = pd.Series({0: 0.0, 20: 0.05, 40: 0.0, 60: 0.02, 80: 0.03})
    assert delay.crossing(once, 0.01) == pytest.approx(50)
    assert delay.crossing(once, 0.01, confirm=0) == pytest.approx(4)
    assert delay.crossing(pd.Series({0: 0.0, 10: np.inf}), 0.5) == 10


def test_lost_is_a_share_of_the_unedited_models():
    table = delay.lost(rows({"rome": 0.001})).query("order == 0 and step == 100").set_index("ability")["lost"]
    assert table.to_dict() == pytest.approx({"tasks": 0, "facts": 1 / 4, "facts_prob": 0.1, "perplexity": 0.05})


def test_what_is_no_number_is_lost():
    df = rows({"rome": 0.001}, orders=(0,))
    df.loc[(df["step"] == 100) & df["metric"].isin(["perplexity", "untouched_ES_prob"]), "value"] = np.nan
    end = delay.lives(df).query("share == 0.1").set_index("ability")
    assert end["end"][["perplexity", "facts_prob"]].tolist() == [delay.GONE, delay.GONE]
    assert (end["until"][["perplexity", "facts_prob"]] <= 100).all()


def test_lives_of_a_straight_line_are_its_own():
    table = delay.lives(rows({"rome": 0.0005, "memit": 0.0})).set_index(["editor", "order", "ability", "share"])
    seen, ahead = table.loc[("rome", 0, "facts_prob", 0.01)], table.loc[("rome", 0, "facts_prob", 0.10)]
    assert seen[["until", "life", "edits"]].tolist() == pytest.approx([20, 20, 100])
    assert np.isnan(ahead["until"]) and ahead["life"] == pytest.approx(200) and ahead["rate"] == pytest.approx(0.05)
    assert table.loc[("rome", 1, "facts_prob", 0.10), "life"] == pytest.approx(200 / 1.1)
    assert np.isinf(table.loc[("memit", 0, "facts_prob", 0.10), "life"])
    short = delay.Rule(ahead=1.5)
    assert np.isinf(delay.lives(rows({"rome": 0.0005}), short).query("share == 0.1 and order == 0")["life"]).any()


def test_a_run_that_stopped_has_lost_all():
    table = delay.lives(rows({"rome": 0.0}), stopped={"rome0"}).query("share == 0.1")
    assert table[table["order"] == 0]["until"].eq(100).all() and table[table["order"] == 1]["until"].isna().all()
    early = pd.concat([rows({"rome": 0.0}), rows({"memit": 0.0}, end=10)])
    own = delay.summary(delay.lives(early, stopped={"memit0", "memit1"})).query("share == 0.1").set_index("editor")
    assert (own.loc["rome", "mean"] == 100).all() and (own.loc["memit", "mean"] == 10).all()    # nobody else is cut


def test_mean_over_orders_counts_what_lasts_longer_with_the_runs_length():
    own = delay.summary(delay.lives(rows({"rome": 0.00105}, orders=(0, 1)))).set_index(["ability", "share"])
    some = own.loc[("facts_prob", 0.10)]        # 1 / 0.0105 = 95.2 edits, 95.2 / 1.1 = 86.6
    assert some["events"] == 2 and some["mean"] == pytest.approx((95.238 + 86.580) / 2, abs=0.01)
    assert (some["low"], some["high"]) == pytest.approx((86.580, 95.238), abs=0.01)
    part = delay.summary(delay.lives(rows({"rome": 0.00095}))).set_index(["ability", "share"]).loc[("facts_prob", 0.10)]
    assert part["events"] == 1 and part["mean"] == pytest.approx((100 + 95.694) / 2, abs=0.01)
    assert delay.lasted(part).startswith("≥ 98 (≈ ")


@pytest.mark.parametrize("one, text", [
    ({"runs": 2, "events": 2, "mean": 84, "low": 70, "high": 98, "life": 84}, "84 (70-98)"),
    ({"runs": 1, "events": 1, "mean": 0.4, "low": 0.4, "high": 0.4, "life": 0.4}, "< 1"),
    ({"runs": 2, "events": 0, "mean": 120, "low": 120, "high": 120, "life": 640.2}, "> 120 (≈ 640)"),
    ({"runs": 2, "events": 0, "mean": 120, "low": 120, "high": 120, "life": np.inf}, "> 120 (not in sight)")])
def test_a_lifetime_in_words(one, text):
    assert delay.lasted(one) == text


def test_interval_is_that_of_all_resamplings():
    values, rule = [1.0, 2.0, 4.0, 8.0], delay.Rule(resamples=200_000)
    means = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    assert delay.interval(values, rule) == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.26)
    assert delay.interval([3.0], rule) == (3.0, 3.0)


def test_ranks_are_taken_within_orders():
    one = rows({"a": 0.001, "b": 0.002, "c": 0.0}, orders=(0,))
    two = rows({"a": 0.003, "b": 0.002, "c": 0.0}, orders=(1,))
    table = delay.lives(pd.concat([one, two, rows({"c": 0.1}, orders=(2,))]))       # order 2 is not everybody's
    found = delay.ranks(table, "facts_prob", 0.10, ["a", "b", "c"])
    assert found["rank"].to_dict() == {"c": 1, "a": 2.5, "b": 2.5} and (found["orders"] == 2).all()
    assert found.loc["a", ["low", "high"]].tolist() == [2, 3] and found.loc["c", ["low", "high"]].tolist() == [1, 1]
    assert delay.ranks(table, "facts_prob", 0.10, ["a", "b"])["rank"].to_dict() == {"a": 1.5, "b": 1.5}
    assert delay.ranks(table, "facts_prob", 0.10, []).empty


def test_what_is_not_in_sight_is_ranked_by_the_loss_at_the_end():
    found = delay.ranks(delay.lives(rows({"a": 0.0, "b": -0.001, "c": 0.0})), "facts_prob", 0.10, ["a", "b", "c"])
    assert found["rank"].to_dict() == {"b": 1, "a": 2.5, "c": 2.5}


def test_edits_at_the_end_are_those_last_asked():
    df = rows({"rome": 0.0}, orders=(0,), end=10, every=5)
    assert delay.quality(df).loc["rome", "kept"] == 1
    lost = df.assign(value=df["value"].where(~(df["metric"].eq("final_ES_exact") & (df["step"] == 10)
                                               & df["fact"].isin(["1", "2", "3"])), 0.0))
    table = delay.quality(lost).loc["rome"]
    assert table["kept"] == pytest.approx(0.7) and np.isnan(table["reworded"])
    assert table["score"] == pytest.approx(3 / (1 + 2 + 1))
    again = lost.replace({"metric": {"final_ES_exact": "retest_ES_exact"}})         # a run without a final question
    again = again[(again["metric"] != "retest_ES_exact") | again["fact"].isin(["1", "2"])]
    assert delay.quality(again).loc["rome", "kept"] == pytest.approx(0.8)           # the rest: as when made


def test_table_ranks_only_what_keeps_its_edits():
    df = pd.concat([rows({"slow": 0.001, "fast": 0.0001, "same": 0.0001}), rows({"idle": 0.0}, kept=0.1)])
    more = (df["editor"] == "same") & (df["metric"] == "edit_evaluations")
    df["value"] = df["value"].where(~more, 12.0)        # a fifth more work: no longer the same as fast's
    found = delay.table(df, runs(df, slow=1.0, fast=1.05, same=2.0, idle=0.1))
    assert list(found.index)[:2] == ["fast", "same"] or list(found.index)[:2] == ["same", "fast"]
    assert found["ranked"].to_dict() == {"slow": True, "fast": True, "same": True, "idle": False}
    assert np.isnan(found.loc["idle", "rank"]) and found.loc["slow", "rank"] == 3
    assert found["beaten_by"].to_dict() == {"fast": (), "same": ("fast",), "slow": ("fast",), "idle": ()}
    assert found.loc["fast", ["evaluations", "prompts", "work", "memory", "seconds"]].tolist() == [10, 3, 30, 500, 1.05]
    with pytest.raises(ValueError, match="these runs measured"):
        delay.table(df, runs(df), ability="poetry")


def test_advice_has_a_text_in_every_cell():
    df = pd.concat([rows({"slow": 0.001, "fast": 0.0001}), rows({"idle": 0.0}, kept=0.1)])
    df = df[(df["metric"] != "edit_evaluations") | (df["editor"] != "idle")]
    found = delay.table(df, runs(df))
    table = delay.advice(found, delay.summary(delay.lives(df)), {name: name.upper() for name in found.index})
    assert list(table.index) == ["FAST", "SLOW", "IDLE"]
    assert table.map(lambda cell: isinstance(cell, str) and "nan" not in cell).all(axis=None)
    column = next(name for name in table if "never-edited" in name)
    assert table.loc["SLOW", column] == "10 (9-10) / 95 (91-100)" and table.loc["SLOW", "beaten by"] == "FAST"
    assert table.loc["IDLE", "rank"].startswith("not ranked")


def test_sweep_orders_values_and_names_them():
    df = rows({"memit 10": 0.001, "memit 100": 0.0005, "memit 1": 0.002}, end=100)
    sizes = {name: int(name.split()[1]) for name in df["editor"].unique()}
    made = runs(df).assign(batch_size=lambda table: table["editor"].map(sizes), editor="memit")
    found = delay.sweep(df, made, ["batch_size"], {100: "all"})
    assert found["value"].tolist() == ["1", "10", "all"] and found["place"].tolist() == [0, 1, 2]
    assert found["end"].tolist() == pytest.approx([0.21, 0.105, 0.0525])
    assert found["low"].tolist() == pytest.approx([0.20, 0.10, 0.05]) and (found["method"] == "memit").all()
    with pytest.raises(ValueError, match="no run has λ"):
        delay.sweep(df, made, ["λ"])


def test_sweep_reads_settings_of_the_editor():
    df = rows({"a": 0.001, "b": 0.002, "c": 0.003})
    made = runs(df).assign(config=lambda table: table["editor"].map(
        {"a": {"layers": [0, 1]}, "b": {"layers": [2]}, "c": {"layer": 1}}))
    plain = delay.sweep(df, made, ["layers", "layer"]).set_index("method")     # one layer or several, both are sizes
    assert plain["value"].to_dict() == {"a": "0, 1", "b": "2", "c": "1"}
    assert plain["place"].to_dict() == {"c": 0, "b": 1, "a": 2}
    found = delay.sweep(df, made, ["layers", "layer"], {1: "one"}).set_index("method")
    assert found["value"].to_dict() == {"a": "0, 1", "b": "2", "c": "one"}
    assert found["place"].to_dict() == {"b": 0, "a": 1, "c": 2}
    same = delay.sweep(df, made.assign(method="memit"), ["layers", "layer"])
    assert same["value"].tolist() == ["1", "2", "0, 1"], "of one method too"
    assert same["end"].tolist() == pytest.approx(plain.loc[["c", "b", "a"], "end"].tolist())


def test_the_rule_says_its_numbers():
    text = str(delay.Rule(confirm=2, kept=0.7))
    assert "next 2" in text and "under 70 %" in text and "1 % or 10 %" in text
