"""The rows of runs in; how many edits each method makes before an ability is lost, at what cost, and ranks, out.

Every function is pure. A method is one value of the column `editor`, a run one order of the facts; a table of rows has
the column `order` beside the usual ones (`study.table` puts it there), so that methods are compared on equal facts.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from editcore import analysis_old as analysis

ABILITIES = {       # of which a share can be lost: in words
    "tasks": "few-shot tasks, margin above chance",
    "facts": "never-edited facts answered right",
    "facts_prob": "probability of the never-edited facts",
    "perplexity": "perplexity on held-out text",
}
GONE = 1e6          # loss where nothing finite is left to measure


@dataclass(frozen=True)
class Rule:
    """When a share of an ability counts as lost, and which methods are ranked; `str(rule)` states it in words."""

    shares: tuple = (0.01, 0.10)    # of the unedited model's ability
    confirm: int = 1                # later tests at which the loss must still stand (fewer at the end of a run)
    tail: float = 0.5               # part of a run, at its end, whose tests give the loss per 100 edits
    ahead: float = 10.0             # run lengths beyond which nothing is extrapolated
    kept: float = 0.80              # share of all its edits that a method must have right at the end to be ranked
    same: tuple = (0.02, 0.10)      # shares this close count as equal; edits and work, if within this part
    resamples: int = 2000           # of the orders, for intervals
    seed: int = 0                   # of that resampling

    def __str__(self):
        shares = " or ".join(f"{100 * share:g} %" for share in self.shares)
        return (f"An ability is lost by {shares} once that much of the unedited model's is gone at a test and at the "
                f"next {self.confirm} (interpolated from the one before); perplexity loses as much as it rises. "
                f"“>”: a run ends before. “≈”: an extrapolation by a line through the last {100 * self.tail:.0f} % of "
                f"its tests, at most to {self.ahead:g} run lengths, and no measurement. “≥”: a mean over orders that "
                f"counts such runs with their length (restricted mean). Methods are ranked within each order, equal "
                f"ones by the loss at the end; with under {100 * self.kept:.0f} % of all edits right at the end one "
                f"is not ranked, since what does not edit loses nothing. A method beats another if it is worse in none "
                f"of edits until the loss, work (evaluations of the loss × prompts in each; both within "
                f"{100 * self.same[1]:.0f} %), edits right at the end and score of new edits (both within "
                f"{100 * self.same[0]:.0f} points), and better in one. Intervals: percentiles of {self.resamples} "
                f"resamplings of the orders, the same for all methods; under five orders little but their range.")


def lost(df):
    """Share lost of each of ABILITIES at each test: run, editor, order, step, ability, lost; negative is a gain.

    tasks and facts: 1 - `analysis.ability` and 1 - `analysis.untouched`; facts_prob: fall of the mean of
    P(true) - P(other) on never-edited facts; perplexity: its rise; all as shares of the unedited model's.
    """
    value = {"tasks": 1 - analysis.ability(df).set_index(["run", "step"])["ability"].astype(float),
             "facts": 1 - analysis.untouched(df).set_index(["run", "step"])["value"].astype(float)}
    for ability, metric, sign in (("facts_prob", "untouched_ES_prob", -1), ("perplexity", "perplexity", 1)):
        rows = df[df["metric"] == metric]
        mean = rows.fillna({"value": np.inf * sign}).groupby(["run", "step"])["value"].mean()
        first = mean[mean.index.get_level_values("step") == 0].droplevel("step")
        value[ability] = sign * (mean / first.reindex(mean.index.get_level_values("run")).to_numpy() - 1)
    table = pd.concat(value, names=["ability"]).rename("lost").clip(-GONE, GONE).reset_index()
    heads = df.drop_duplicates("run").set_index("run")[["editor", "order"]]
    return table.join(heads, on="run")[["run", "editor", "order", "step", "ability", "lost"]]


def lives(df, rule=None, stopped=()):
    """One row a run, ability and share of rule.shares: until, edits, end, rate, life, stopped.

    until: edits until that share is lost (NaN: more than `edits`, the run's length); end: loss at the last test; rate:
    loss per 100 edits over the tail; life: until, else extrapolated with rate (infinite: not in sight).
    Runs in `stopped` ended because an edit failed: all is lost there.
    """
    rule, out, stopped = rule or Rule(), [], set(stopped)
    for (run, ability), part in lost(df).groupby(["run", "ability"], sort=False):
        series, edits = part.set_index("step")["lost"].sort_index(), int(df.loc[df["run"] == run, "step"].max())
        level, rate = line(series, rule.tail)
        for share in rule.shares:
            until = crossing(series, share, rule.confirm)
            until = edits if np.isnan(until) and run in stopped else until
            ahead = edits + max(0.0, share - level) / rate if rate > 0 else np.inf
            ahead = ahead if ahead <= rule.ahead * edits else np.inf
            out.append({"run": run, "editor": part["editor"].iloc[0], "order": part["order"].iloc[0],
                        "ability": ability, "share": share, "until": until, "edits": edits, "end": series.iloc[-1],
                        "rate": 100 * rate, "life": ahead if np.isnan(until) else until, "stopped": run in stopped})
    return pd.DataFrame(out, columns=["run", "editor", "order", "ability", "share", "until", "edits", "end", "rate",
                                      "life", "stopped"])


def crossing(series, share, confirm=1):
    """Edits (interpolated) at which `series` (index: step) reaches `share` and stays there for `confirm` tests more;
    NaN if it never does."""
    steps, values = series.index.to_numpy(dtype=float), series.to_numpy()
    gone = values >= share - 1e-9
    for i in range(1, len(steps)):
        if gone[i:i + 1 + confirm].all():
            before = min(values[i - 1], share)      # an unconfirmed loss may stand before
            part = (share - before) / (values[i] - before) if before < values[i] < GONE else 1.0
            return steps[i - 1] + min(1.0, part) * (steps[i] - steps[i - 1])
    return np.nan


def line(series, tail):
    """(value at the last step, slope per step) of the least-squares line through the last `tail` of a series."""
    steps, end = series.index.to_numpy(dtype=float), series.index[-1]
    near = steps >= (1 - tail) * end
    near[-2:] = True                    # a line needs two points
    if len(steps) < 2:
        return series.iloc[-1], np.nan
    return tuple(np.polyfit(steps[near] - end, series.to_numpy()[near], 1)[::-1])


def summary(lives, rule=None):
    """`lives` by editor, ability and share: runs, events (runs that lost it), edits (τ, the shortest run's of those
    that no failed edit ended), mean, low, high (restricted mean of `until` up to τ and its interval), life (median),
    end and rate (means)."""
    rule, out, whole = rule or Rule(), [], lives.loc[~lives["stopped"].astype(bool), "edits"]
    horizon = lives["edits"].max() if whole.empty else whole.min()
    for (editor, ability, share), part in lives.groupby(["editor", "ability", "share"], sort=False):
        until = part["until"].fillna(np.inf).clip(upper=horizon)
        low, high = interval(until, rule)
        out.append({"editor": editor, "ability": ability, "share": share, "runs": len(part), "edits": horizon,
                    "events": int((part["until"] <= horizon).sum()), "mean": until.mean(), "low": low, "high": high,
                    "life": part["life"].median(), "end": part["end"].mean(), "rate": part["rate"].mean()})
    return pd.DataFrame(out)


def interval(values, rule):
    """(low, high): 95 % percentile interval of the mean over resampled values; both the value itself if alone."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(rule.seed).integers(len(values), size=(rule.resamples, len(values)))
    return tuple(np.percentile(values[draws].mean(axis=1), [2.5, 97.5]))


def ranks(lives, ability, share, editors, rule=None):
    """Mean rank of each of `editors` by `life`, then the loss at the end (1 lasts longest), and its interval over the
    orders that all of them have: editor (index), rank, low, high, orders. Empty if they have none in common."""
    rule = rule or Rule()
    part = lives[(lives["ability"] == ability) & (lives["share"] == share) & lives["editor"].isin(editors)]
    part = part.sort_values(["life", "end"], ascending=[False, True])
    part = part.assign(place=part.groupby(["life", "end"], sort=False).ngroup())    # one number for what is equal
    found = part.pivot_table(index="order", columns="editor", values="place").dropna().rank(axis=1)
    if found.empty:
        return pd.DataFrame(columns=["rank", "low", "high", "orders"])
    bounds = {editor: interval(found[editor], rule) for editor in found}     # one seed: the same orders for all
    return pd.DataFrame({"rank": found.mean(), "low": {name: low for name, (low, _) in bounds.items()},
                         "high": {name: high for name, (_, high) in bounds.items()},
                         "orders": len(found)}).sort_values("rank")


def quality(df):
    """By editor, in shares: ES, PS, NS of new edits over the whole run, score (their harmonic mean), kept (all edits
    that are right at the end, exact match) and reworded (paraphrases right at the end; NaN where not asked)."""
    asked = ["ES", "PS", "NS"]
    means = df[df["metric"].isin(asked)].pivot_table("value", "editor", "metric").reindex(columns=asked)
    ended = pd.DataFrame([{"editor": part["editor"].iloc[0], "kept": _at_end(part, "ES_exact"),
                           "reworded": _at_end(part, "PS")} for _, part in df.groupby("run", sort=False)])
    scores = 3 / (1 / means.replace(0, 1e-9)).sum(axis=1, min_count=3)
    return means.assign(score=scores).join(ended.groupby("editor").mean(), how="outer")


def _at_end(part, metric):
    """Mean of a metric over all edited facts of one run, as last asked: after the run, at a re-test, or when made."""
    asked = {"final_" + metric: 2, "retest_" + metric: 1, metric: 0}
    rows = part[part["metric"].isin(asked)]
    if metric != "ES_exact":        # only edits are re-tested: what was asked long ago does not stand for the end
        rows = rows[rows["metric"] == "final_" + metric]
    rows = rows.assign(late=rows["metric"].map(asked)).sort_values(["step", "late"])
    return rows.groupby("fact")["value"].last().mean()


def costs(df, made):
    """By editor: seconds per edit, peak memory in MB, evaluations of the loss per edit, prompts in each, and work,
    their product: what does not depend on how busy the machine is (NaN where no evaluations are reported).

    made: `study.runs` of the same runs. Prompts: the rewriting prompt plain and in contexts, and that of the KL term.
    """
    own = df.drop_duplicates("run").set_index("run")["editor"]
    table = made.assign(editor=made["run"].map(own), memory=made["peak_memory"] / 1e6,
                        prompts=made["config"].map(_prompts))
    table = table.groupby("editor").agg(seconds=("seconds_per_edit", "median"), memory=("memory", "max"),
                                        prompts=("prompts", "mean"))
    counted = df[df["metric"] == "edit_evaluations"].groupby("editor")["value"].mean().reindex(table.index)
    return table.assign(evaluations=counted, work=counted * table["prompts"])


def _prompts(config):
    groups = config.get("context_groups", [])
    return 1 + sum(group["number"] * len(group["starts"]) for group in groups) + bool(groups)


def table(df, made, rule=None, ability="facts_prob", share=0.10):
    """One row a method: `quality`, `costs`, `summary` at `share` of `ability`, `ranked` (keeps enough of its edits),
    rank with its interval, and `beaten_by`; the ranked ones first. ValueError for an ability that was not measured."""
    rule = rule or Rule()
    every = lives(df, rule, stopped_in(made))
    if ability not in set(every["ability"]) or share not in rule.shares:
        raise ValueError(f"ability {ability!r}, share {share}: these runs measured "
                         f"{', '.join(every['ability'].unique()) or 'none'}, at {', '.join(map(str, rule.shares))}")
    own = summary(every, rule).query("ability == @ability and share == @share").set_index("editor")
    out = quality(df).join(costs(df, made)).join(own.drop(columns="ability"))
    out["ranked"] = out["kept"] >= rule.kept
    order = ranks(every, ability, share, list(out.index[out["ranked"]]), rule)
    out = out.join(order.rename(columns={"low": "rank_low", "high": "rank_high"}))
    return out.assign(beaten_by=beaten_by(out, rule.same)).sort_values(
        ["rank", "life", "end"], ascending=[True, False, True])


def stopped_in(made):
    """The runs of `study.runs` that ended because an edit failed."""
    return set(made.loc[made["status"] == "stopped", "run"]) if "status" in made else set()


def beaten_by(table, same=(0.02, 0.10)):
    """For each row of a table with life, work, kept, score and ranked: names of the ranked rows worse in none of the
    four and better in one. Differences within `same` (see `Rule`) and what is NaN in one of two rows do not count."""
    costs = np.log(table[["work"]]).to_numpy(), -np.log(table[["life"]].clip(1, GONE)).to_numpy()
    bad = np.hstack([*costs, -table[["kept", "score"]].to_numpy(dtype=float)])      # (methods, 4), less is better
    slack = np.array([np.log1p(same[1])] * 2 + [same[0]] * 2)
    out = []
    for mine in bad:
        worse, better = (bad > mine + slack).any(axis=1), (bad < mine - slack).any(axis=1)      # NaN: neither
        out.append(tuple(table.index[~worse & better & table["ranked"].to_numpy(bool)]))
    return pd.Series(out, index=table.index, dtype=object)


def value_of(made, names):
    """{run: value} of a parameter of study.Run or a setting of the editor; the first of `names` that a run has. A list
    of one is that one: ROME has a layer, MEMIT has layers."""
    found = {one["run"]: next((place[name] for name in names for place in (one, one["config"]) if name in place), None)
             for one in made.to_dict("records")}
    return {run: (each[0] if len(each) == 1 else tuple(each)) if isinstance(each, list) else each
            for run, each in found.items()}


def sweep(df, made, names, words=None, ability="facts_prob"):
    """What one parameter does: a row a true method (column method) and value, with place (0, 1, … by size), end, low,
    high (loss of `ability` after all edits, its interval over orders) and the columns of `quality` and `costs`.

    names: as in `value_of`; words: {value: its word}, e.g. {0: "all"}; such values come last.
    """
    words, values, rule = words or {}, value_of(made, names), Rule()
    methods = dict(zip(made["run"], made.get("method", made["editor"])))
    cases = {run: (methods[run], value) for run, value in values.items() if value is not None}
    if not cases:
        raise ValueError(f"sweep: no run has {' or '.join(names)}")
    known = list(dict.fromkeys(cases.values()))     # by number, as a layer and several layers have no order
    own = df[df["run"].isin(cases)].assign(editor=lambda rows: [known.index(cases[run]) for run in rows["run"]])
    table = quality(own).join(costs(own, made))
    ends = lives(own, rule, stopped_in(made)).query("ability == @ability and share == @rule.shares[0]")
    for number, part in ends.groupby("editor"):
        low, high = interval(part["end"], rule)
        table.loc[[number], ["end", "low", "high"]] = [[part["end"].mean(), low, high]]
    method, value = zip(*(known[number] for number in table.index))
    places = sorted(set(value), key=lambda one: (one in words, np.size(one), *np.ravel(one)))
    return table.assign(method=method, value=[words.get(one, _word(one)) for one in value],
                        place=[places.index(one) for one in value]).sort_values(["method", "place"], ignore_index=True)


def _word(value):
    """A value on an axis: '0, 1' of a tuple, '20k' of 20000."""
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"


def lasted(one):
    """'84 (70-98)', '≥ 97 (≈ 130)' or '> 120 (≈ 640)' of one row of `summary`: see `Rule`."""
    if one["events"] == one["runs"]:
        mean = f"{one['mean']:.0f}" if one["mean"] >= 1 else "< 1"
        return f"{mean} ({one['low']:.0f}-{one['high']:.0f})" if one["runs"] > 1 else mean
    ahead = "not in sight" if np.isinf(one["life"]) else f"≈ {one['life']:.0f}"
    return f"{'≥' if one['events'] else '>'} {one['mean']:.0f} ({ahead})"


def advice(found, own, labels):
    """The table to choose a method by, texts: found is `table`, own `summary` of the same runs, labels {editor: name}.

    One row a method, ranked ones first; the last column says which methods are better, or why it is not ranked.
    """
    rows = {}
    for editor, one in found.iterrows():
        row = {}
        for ability in ("tasks", "facts_prob", "perplexity"):
            part = own[(own["editor"] == editor) & (own["ability"] == ability)].sort_values("share")
            shares = " / ".join(f"{100 * share:g} %" for share in part["share"])
            row[f"edits until {shares} lost: {ABILITIES[ability].split(',')[0]}"] = " / ".join(
                lasted(each) for _, each in part.iterrows())
        scores = " / ".join(f"{100 * one[name]:.0f}" for name in ("ES", "PS", "NS"))
        work = f"{one['evaluations']:.0f} × {one['prompts']:.0f}" if one["work"] > 0 else "-"
        row |= {"new edits, %: ES / PS / NS": scores, "edits right at the end, %": f"{100 * one['kept']:.0f}",
                "seconds an edit": f"{one['seconds']:.2f}", "work: loss evaluations × prompts": work,
                "peak MB": f"{one['memory']:.0f}", "rank": "not ranked: keeps too few edits", "beaten by": "-"}
        if not np.isnan(one["rank"]):
            row["rank"] = f"{one['rank']:.1f} ({one['rank_low']:.1f}-{one['rank_high']:.1f})"
            row["beaten by"] = ", ".join(labels[name] for name in one["beaten_by"]) or "none"
        rows[labels[editor]] = row
    return pd.DataFrame(rows).T.rename_axis("method")
