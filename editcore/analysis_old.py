"""The rows of runs in; forgetting rates, phases, edits until loss, survival and retention out, as tables.

Every function is pure. A run is one value of the column `run`; step counts edited facts, 0 is the unedited model;
values of the rows are shares from 0 to 1, and so are the results here.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

RUN = ["run", "editor", "seed"]     # what identifies a run in every result
CONSTANT = 1 / 3    # weighted F1 of one answer to every item of two equally frequent labels: the chance line


@dataclass(frozen=True)
class Rule:
    """When a run's catastrophic phase begins; `str(rule)` states it in a sentence."""

    forgotten: float = 0.20     # rise of the share of earlier edits that fail
    ability: float = 0.50       # fall of the few-shot mean, as a share of the unedited model's margin above chance
    within: int = 50            # edits within which the rise or the fall happens (or one test interval, if longer)
    growth: float = 3.0         # times the usual growth per edit of ‖ΔW‖/‖W‖: the median over the tests before
    confirm: int = 1            # later tests at which the loss must still stand (fewer at the end of a run)

    def __str__(self):
        later = f", and this still stands at the next {self.confirm} test(s)" if self.confirm else ""
        return (f"The catastrophic phase begins at the first test at which, within {self.within} edits, the share of "
                f"earlier edits that fail has risen by at least {100 * self.forgotten:.0f} points or the few-shot mean "
                f"has lost at least {100 * self.ability:.0f} % of the unedited model's margin above chance, while "
                f"‖ΔW‖/‖W‖ grew more than {self.growth:g} times as fast as usual in the run{later}. Before it, "
                f"forgetting is gradual.")


def forgotten(df, metric="ES_exact"):
    """Of the earlier edits that succeeded when made, the shares lost at each re-test; one row a run and re-test.

    absorbing: seen to fail at this or an earlier re-test (arXiv 2401.07453, "facts forgotten"; never falls except by
    dilution); non_absorbing: fail now; recovered: of those seen to fail before, the share that succeeds now (NaN if
    none); edits: how many succeeded when made. `metric` is success of the edit just made; "retest_" + metric, later.
    """
    tables = [_forgotten(part, metric).assign(**_head(part)) for _, part in df.groupby("run", sort=False)]
    return _stack(tables, ["step", "edits", "absorbing", "non_absorbing", "recovered"])


def _forgotten(part, metric):
    made = part[part["metric"] == metric].set_index("fact")["value"]
    good = made.index[made >= 1]
    again = part[(part["metric"] == f"retest_{metric}") & part["fact"].isin(good)]
    grid = again.pivot_table(index="step", columns="fact", values="value", aggfunc="last")   # NaN: not made yet
    fails, known = grid < 1, grid.notna()
    seen = fails.cummax()                                       # failed at this or an earlier re-test
    before = seen.shift(fill_value=False) & known
    edits = known.sum(axis=1)
    back = (before & ~fails).sum(axis=1) / before.sum(axis=1).replace(0, np.nan)
    table = {"edits": edits, "absorbing": (seen & known).sum(axis=1) / edits,
             "non_absorbing": fails.sum(axis=1) / edits, "recovered": back}
    return pd.DataFrame(table, index=grid.index).reset_index()


def downstream(df, kind="f1"):
    """Few-shot ability by run, step and task: value, its chance line, and ability = margin above chance as a share of
    the unedited model's margin (1 at step 0, 0 at chance; a task that was not above chance there is left out)."""
    suffix = f"_{kind}"
    rows = df[(df["fact"] == "") & df["metric"].str.endswith(suffix)]
    if kind == "f1":
        rows = rows[~rows["metric"].str.endswith("_prob_f1")]
    rows = rows.assign(task=rows["metric"].str.removesuffix(suffix))[[*RUN, "step", "task", "value"]]
    base = rows[rows["step"] == 0].set_index(["run", "task"])["value"] - CONSTANT
    margin = pd.MultiIndex.from_frame(rows[["run", "task"]]).map(base).astype(float) if len(rows) else []
    rows = rows.assign(chance=CONSTANT, ability=(rows["value"] - CONSTANT) / margin)
    return rows[np.asarray(margin) > 0].reset_index(drop=True)


def ability(df, kind="f1"):
    """Mean ability over the tasks by run and step: (mean of the tasks - chance) / (unedited mean - chance)."""
    table = downstream(df, kind).groupby([*RUN, "step"], sort=False)["value"].mean().reset_index()
    base = table[table["step"] == 0].set_index("run")["value"] - CONSTANT
    return table.assign(ability=(table["value"] - CONSTANT) / table["run"].map(base)) if len(table) else \
        table.assign(ability=[])


def distance(df):
    """The rows distance, relative and update as columns: one row a run, step and edited parameter."""
    rows = df[df["metric"].isin(["distance", "relative", "update"])]
    wide = rows.pivot_table(index=[*RUN, "step", "fact"], columns="metric", values="value").reset_index()
    return wide.rename(columns={"fact": "parameter"}).rename_axis(columns=None)


def with_derived(df, metric="ES_exact"):
    """The rows and, in the same columns (fact ""), what is computed from several of them: forgotten_absorbing,
    forgotten_now and recovered (see `forgotten`), f1 (mean over the few-shot tasks), untouched (share of never-edited
    facts still right, of those right at step 0)."""
    heads = df.drop_duplicates("run").set_index("run").drop(columns=["step", "fact", "metric", "value"])
    lost = forgotten(df, metric).rename(columns={"absorbing": "forgotten_absorbing", "non_absorbing": "forgotten_now"})
    tables = [lost.melt(["run", "step"], ["forgotten_absorbing", "forgotten_now", "recovered"], "metric").dropna()]
    tables.append(_mean_f1(df))
    tables.append(untouched(df).assign(metric="untouched")[["run", "step", "metric", "value"]])
    new = pd.concat(tables).assign(fact="")
    return pd.concat([df, new.join(heads, on="run")[list(df.columns)]], ignore_index=True)


def _mean_f1(df):
    rows = df[(df["fact"] == "") & df["metric"].str.endswith("_f1") & ~df["metric"].str.endswith("_prob_f1")]
    return rows.groupby(["run", "step"], sort=False)["value"].mean().reset_index().assign(metric="f1")


def untouched(df, metric="untouched_ES_exact"):
    """Share still right of the never-edited facts that the unedited model answered right: run, step, value."""
    rows = df[df["metric"] == metric]
    known = rows[(rows["step"] == 0) & (rows["value"] >= 1)].set_index(["run", "fact"]).index
    rows = rows[rows.set_index(["run", "fact"]).index.isin(known)]
    return rows.groupby([*RUN, "step"], sort=False)["value"].mean().reset_index()


def phases(df, rule=None, metric="ES_exact"):
    """One row a run: collapse (first step of the catastrophic phase by `rule`, NaN if there is none), edits (made in
    all), forgotten_before and forgotten_after (share of earlier edits failing at the test before and at it), reason."""
    rule = rule or Rule()
    return pd.DataFrame([_phase(part, rule, metric) for _, part in df.groupby("run", sort=False)],
                        columns=[*RUN, "collapse", "edits", "forgotten_before", "forgotten_after", "reason"])


def _phase(part, rule, metric):
    lost = forgotten(part, metric).set_index("step")["non_absorbing"]
    able = ability(part).set_index("step")["ability"]
    moved = part[part["metric"] == "relative"].groupby("step")["value"].mean()
    found = [(step, reason) for series, sign, limit, reason in
             ((lost, 1, rule.forgotten, "earlier edits"), (able, -1, rule.ability, "few-shot tasks"))
             for step in [_first_jump(sign * series, limit, moved, rule)] if step is not None]
    step, reason = min(found, default=(np.nan, ""))
    before = lost[lost.index < step]
    return _head(part) | {"collapse": step, "edits": part["step"].max(), "reason": reason,
                          "forgotten_before": before.iloc[-1] if len(before) else np.nan,
                          "forgotten_after": lost.get(step, np.nan)}


def _first_jump(series, limit, moved, rule):
    """First step at which `series` has risen by `limit` within rule.within edits while `moved` grew unusually."""
    steps = list(series.index)
    growths = [_growth(moved, a, b) for a, b in zip(steps, steps[1:])]
    for i in range(1, len(steps)):
        near = [j for j in range(i) if j == i - 1 or steps[i] - steps[j] <= rule.within]
        low = min(near, key=lambda j: series.iloc[j])
        stands = (series.iloc[i:i + 1 + rule.confirm] - series.iloc[low] >= limit - 1e-9).all()
        usual = np.median(growths[:low] if low >= 3 else growths)   # too few tests before: those of the whole run
        if stands and max(growths[low:i]) > rule.growth * usual:
            return steps[i]
    return None


def _growth(moved, start, end):
    """Growth of the relative distance per edit from step `start` to `end`; it is 0 before the first edit."""
    before, after = moved[moved.index <= start], moved[moved.index <= end]
    return ((after.iloc[-1] if len(after) else 0.0) - (before.iloc[-1] if len(before) else 0.0)) / (end - start)


def edits_until(df, loss=0.01, kind="f1", confirm=1):
    """One row a run: until = first step at which at least `loss` of the few-shot ability is gone, and still is at the
    next `confirm` tests (fewer at the end); NaN if that never happens; edits = made in all (the censoring point)."""
    table, out = ability(df, kind), []
    for run, part in df.groupby("run", sort=False):
        able = table[table["run"] == run].sort_values("step")
        gone = (able["ability"] <= 1 - loss + 1e-9).to_numpy()
        hits = [step for i, step in enumerate(able["step"]) if step > 0 and gone[i:i + 1 + confirm].all()]
        out.append(_head(part) | {"run": run, "until": hits[0] if hits else np.nan, "edits": part["step"].max()})
    return pd.DataFrame(out, columns=[*RUN, "until", "edits"])


def survival(table, event="collapse"):
    """Share of an editor's runs without the event by n edits, runs that end without it censored (Kaplan and Meier
    1958): editor, step, surviving, at_risk. `table` is that of `phases` or `edits_until`."""
    out = []
    for editor, part in table.groupby("editor", sort=False):
        ends, alive = part[event].fillna(part["edits"]), 1.0
        out.append({"editor": editor, "step": 0, "surviving": 1.0, "at_risk": len(part)})
        for step in sorted(ends.unique()):
            at_risk, events = int((ends >= step).sum()), int((part[event] == step).sum())
            alive *= 1 - events / at_risk
            out.append({"editor": editor, "step": step, "surviving": alive, "at_risk": at_risk})
    return pd.DataFrame(out, columns=["editor", "step", "surviving", "at_risk"])


def retention(df, metric="ES_exact", width=50):
    """Share of edits that succeeded when made and still do, by age (edits made since, in classes of `width`; age is the
    class's middle): run, age, retained, n."""
    made = df[(df["metric"] == metric) & (df["value"] >= 1)].set_index(["run", "fact"])["step"]
    again = df[df["metric"] == f"retest_{metric}"]
    born = pd.Series(pd.MultiIndex.from_frame(again[["run", "fact"]]).map(made), index=again.index, dtype=float)
    again = again[born.notna()].assign(age=((again["step"] - born) // width + 0.5) * width)
    groups = again.groupby([*RUN, "age"], sort=False)["value"]
    return groups.agg(retained=lambda value: (value >= 1).mean(), n="size").reset_index().sort_values(["run", "age"])


def half_life(table):
    """{run: age at which retention first falls to one half, between classes interpolated; infinite if never}."""
    out = {}
    for run, part in table.groupby("run", sort=False):
        ages, kept = [0.0, *part["age"]], [1.0, *part["retained"]]
        i = next((i for i, value in enumerate(kept) if value <= 0.5), None)
        out[run] = np.inf if i is None else float(
            ages[i] if kept[i] == 0.5 else np.interp(0.5, [kept[i], kept[i - 1]], [ages[i], ages[i - 1]]))
    return out


def _head(part):
    return {name: part[name].iloc[0] for name in RUN}


def _stack(tables, columns):
    tables = [table for table in tables if len(table)]
    return pd.concat(tables, ignore_index=True)[[*RUN, *columns]] if tables else pd.DataFrame(columns=[*RUN, *columns])
