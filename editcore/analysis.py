"""Turn the rows of runs into the tables that several notebooks share: forgotten, ability, phases.

Every function takes and returns DataFrames and changes nothing. A table of rows is what
`table()` returns: run, editor, order, step (edits made so far, 0 is the unedited model), fact,
metric, value. Results have the columns RUN in front. Shares go from 0 to 1.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

RUN = ["run", "editor", "order"]    # what identifies a run in every result
CHANCE = 1 / 3      # weighted F1 of one answer to every item of two equally frequent labels
LIMIT = 1e6         # share lost where nothing finite is left to measure


@dataclass(frozen=True)
class Rule:
    """When a run's catastrophic phase begins: at a test at which much is lost within few edits
    while the weights move unusually fast, and the loss still stands at the next test."""

    forgotten: float = 0.20     # rise of the share of earlier edits that fail, or ...
    ability: float = 0.50       # ... fall of the few-shot ability (see `ability`)
    within: int = 50            # edits within which it happens (or one test interval, if longer)
    growth: float = 3.0         # times the run's median growth per edit of ‖ΔW‖/‖W‖
    confirm: int = 1            # later tests at which the loss must still stand
    eroded: float = 0.50        # loss at the end that is no longer called gradual, without a jump


def retests(rows, metric="ES_exact"):
    """Return each re-test of edits that succeeded when made: RUN, fact, made, step, age, right.

    made: step of the edit; age: edits made since; right: 1 if the edit still succeeds, else 0.
    """
    new = rows[(rows["metric"] == metric) & (rows["value"] >= 1)]
    made = new.groupby(["run", "fact"])["step"].first().rename("made")
    again = rows[rows["metric"] == f"retest_{metric}"].join(made, on=["run", "fact"], how="inner")
    again = again.assign(age=again["step"] - again["made"], right=(again["value"] >= 1) * 1.0)
    return again[[*RUN, "fact", "made", "step", "age", "right"]].reset_index(drop=True)


def forgotten(rows, metric="ES_exact"):
    """Return the share of earlier edits lost: RUN, step, edits, ever, now, recovered.

    One row per re-test. edits: those that succeeded when made. ever: share that failed at this or
    an earlier re-test, "facts forgotten" of arXiv 2401.07453. now: share that fails. recovered: of
    those that failed before, the share that succeeds again (NaN if none had).
    """
    tests = retests(rows, metric).sort_values("step", kind="stable")
    fails = tests["right"] < 1
    seen = fails.groupby([tests["run"], tests["fact"]]).cummax()
    before = seen.groupby([tests["run"], tests["fact"]]).shift(fill_value=False).astype(bool)
    tests = tests.assign(ever=seen, now=fails, recovered=(~fails).where(before).astype(float))
    groups = tests.groupby([*RUN, "step"], sort=False)
    return groups.agg(edits=("fact", "size"), ever=("ever", "mean"), now=("now", "mean"),
                      recovered=("recovered", "mean")).reset_index()


def few_shot(rows):
    """Return the few-shot scores at each test: RUN, step, task, f1 (weighted, 0 to 1)."""
    tasks = rows["metric"].str.extract(r"^(.+?)(?<!_prob)_f1$", expand=False)
    tests = rows.assign(task=tasks).dropna(subset="task")
    return tests.rename(columns={"value": "f1"})[[*RUN, "step", "task", "f1"]]


def ability(rows):
    """Return the few-shot ability at each test: RUN, step, f1, ability.

    f1: mean over the tasks. ability: (f1 - chance) / (f1 of the unedited model - chance), so 1
    before the first edit and 0 for a model that gives one answer to everything.
    """
    tests = few_shot(rows).groupby([*RUN, "step"], sort=False)["f1"].mean().reset_index()
    start = tests[tests["step"] == 0].set_index("run")["f1"]
    margin = tests["run"].map(start).astype(float) - CHANCE
    return tests.assign(ability=(tests["f1"] - CHANCE) / margin.where(margin > 0))


def untouched(rows, metric="untouched_ES_exact"):
    """Return the share still right of the never-edited facts that the unedited model answered."""
    tests = rows[rows["metric"] == metric]
    known = tests[(tests["step"] == 0) & (tests["value"] >= 1)][["run", "fact"]]
    tests = tests.merge(known, on=["run", "fact"])
    return tests.groupby([*RUN, "step"], sort=False)["value"].mean().reset_index()


def trajectory(rows, metric="ES_exact"):
    """Return what a run has lost and kept at each test, long: RUN, step, metric, value.

    Metrics: forgotten_ever, forgotten_now, recovered (see `forgotten`), f1, ability (see
    `ability`), untouched (see `untouched`), untouched_prob (mean P(true) - P(other) of the
    never-edited facts), perplexity.
    """
    gone = forgotten(rows, metric).drop(columns="edits")
    gone = gone.rename(columns={"ever": "forgotten_ever", "now": "forgotten_now"})
    tables = [gone, ability(rows), untouched(rows).rename(columns={"value": "untouched"})]
    for source, name, nothing in (("untouched_ES_prob", "untouched_prob", 0.0),
                                  ("perplexity", "perplexity", np.inf)):     # nothing finite left
        tests = rows[rows["metric"] == source].fillna({"value": nothing})
        means = tests.groupby([*RUN, "step"], sort=False)["value"].mean()
        tables.append(means.rename(name).reset_index())
    long = [table.melt([*RUN, "step"], var_name="metric") for table in tables if len(table)]
    columns = [*RUN, "step", "metric", "value"]
    table = pd.concat(long or [pd.DataFrame(columns=columns)])
    return table.dropna(subset="value", ignore_index=True)


def distance(rows):
    """Return how far each matrix moved: RUN, step, matrix, distance, relative, update, total.

    distance: ‖ΔW‖ / (rows · columns), as in arXiv 2401.07453; relative: ‖ΔW‖ / ‖W‖; update: norm
    of the last edit's change; total: ‖ΔW‖ of all edits together.
    """
    moved = rows[rows["metric"].isin(["distance", "relative", "update"])]
    moved = moved[~moved["fact"].astype(str).str.endswith(".bias")]
    wide = moved.pivot_table(index=[*RUN, "fact", "step"], columns="metric", values="value",
                             sort=False).reset_index().rename(columns={"fact": "matrix"})
    wide = wide.reindex(columns=[*RUN, "step", "matrix", "distance", "relative", "update"])
    first = wide.groupby(["run", "matrix"])[["update", "relative"]].transform("first")
    norm = first["update"] / first["relative"]      # of W: the first total is the first update
    return wide.assign(total=norm * wide["relative"])


def growth(rows, start=10):
    """Return how the distance grows: RUN, exponent, drift (means over the matrices), largest.

    exponent: b of ‖ΔW‖ ∝ n^b from edit `start` on, 1/2 for a random walk (NaN under 3 edits).
    drift: ‖ΔW‖ / √Σ‖update‖², 1 where the updates are orthogonal, larger where they add up.
    largest: the longest update in units of the median one.
    """
    out = []
    for (*head, _), moved in distance(rows).groupby([*RUN, "matrix"], sort=False):
        late = moved[(moved["step"] >= start) & (moved["relative"] > 0)]
        steps, sizes = np.log(late["step"]), np.log(late["relative"])
        exponent = np.polyfit(steps, sizes, 1)[0] if len(late) > 2 else np.nan
        path = np.sqrt((moved["update"] ** 2).sum())
        out.append([*head, exponent, moved["total"].iloc[-1] / path,
                    moved["update"].max() / moved["update"].median()])
    table = pd.DataFrame(out, columns=[*RUN, "exponent", "drift", "largest"])
    means = {"exponent": "mean", "drift": "mean", "largest": "max"}
    return table.groupby(RUN, sort=False).agg(means).reset_index()


def phases(rows, rule=None, metric="ES_exact"):
    """Return how each run breaks: RUN, kind, collapse, edits, before, at, cause, leap.

    kind: "abrupt" if there is such a phase by the rule, "eroded" if there is none and yet half of
    the earlier edits or of the ability is lost at the end, else "gradual". collapse: its first
    step (NaN if none); edits: made in all; before, at: share of earlier edits that fail at the
    test before and at that step; cause: what was lost; leap: the longest update between these two
    tests, in the run's median updates (NaN if there is no such phase).
    """
    rule = rule or Rule()
    table = trajectory(rows, metric)
    parts = [_phase(head, part, table[table["run"] == head[0]], rule)
             for head, part in rows.groupby(RUN, sort=False)]
    return pd.DataFrame(parts, columns=[*RUN, "kind", "collapse", "edits", "before", "at", "cause",
                                        "leap"])


def _phase(head, rows, table, rule):
    wide = {name: part.set_index("step")["value"] for name, part in table.groupby("metric")}
    lost = wide.get("forgotten_now", pd.Series(dtype=float))
    gone = 1 - wide.get("ability", pd.Series(dtype=float))
    moved = rows[rows["metric"] == "relative"].groupby("step")["value"].mean()
    jumps = [(_first_jump(lost, rule.forgotten, moved, rule), "earlier edits"),
             (_first_jump(gone, rule.ability, moved, rule), "few-shot tasks")]
    step, cause = min((jump for jump in jumps if jump[0] is not None), default=(np.nan, ""))
    worn = any(len(series) and series.iloc[-1] >= rule.eroded for series in (lost, gone))
    kind = "abrupt" if cause else "eroded" if worn else "gradual"
    before = lost[lost.index < step]
    updates = rows[(rows["metric"] == "update") & ~rows["fact"].astype(str).str.endswith(".bias")]
    sizes = updates["value"] / updates.groupby("fact")["value"].transform("median")
    inside = updates["step"].between(before.index.max() if len(before) else 0, step, "right")
    return [*head, kind, step, rows["step"].max(), before.iloc[-1] if len(before) else np.nan,
            lost.get(step, np.nan), cause, sizes[inside].max()]


def _first_jump(series, limit, moved, rule):
    """Return the first step at which the series has risen by `limit` within `rule.within` edits
    while `moved` grew unusually; None if there is none."""
    steps = list(series.index)
    speeds = [_speed(moved, start, end) for start, end in zip(steps, steps[1:])]
    for i in range(1, len(steps)):
        near = [j for j in range(i) if j == i - 1 or steps[i] - steps[j] <= rule.within]
        low = min(near, key=lambda j: series.iloc[j])
        later = series.iloc[i:i + 1 + rule.confirm]
        usual = np.median(speeds[:low] if low >= 3 else speeds)     # too few before: of all
        risen = (later - series.iloc[low] >= limit - 1e-9).all()
        if risen and max(speeds[low:i]) > rule.growth * usual:
            return steps[i]
    return None


def _speed(moved, start, end):
    """Return the growth of the relative distance per edit between two steps; it starts at 0."""
    ends = [moved[moved.index <= step] for step in (start, end)]
    before, after = [part.iloc[-1] if len(part) else 0.0 for part in ends]
    return (after - before) / (end - start)


def lost(rows):
    """Return the share lost of each ability at each test: RUN, step, ability, lost (gains: < 0).

    tasks: of the few-shot ability; facts: of the never-edited facts that were right; facts_prob:
    of their mean P(true) - P(other); perplexity: its rise, as a share of the unedited model's.
    """
    names = {"ability": "tasks", "untouched": "facts", "untouched_prob": "facts_prob",
             "perplexity": "perplexity"}
    table = trajectory(rows).query("metric in @names")
    table = table.assign(ability=table["metric"].map(names))
    start = table[table["step"] == 0].set_index(["run", "ability"])["value"].rename("start")
    table = table.join(start, on=["run", "ability"])
    share = 1 - table["value"] / table["start"]
    share = share.where(table["ability"] != "perplexity", -share).clip(-LIMIT, LIMIT)
    return table.assign(lost=share)[[*RUN, "step", "ability", "lost"]].dropna()


def edits_until(rows, share=0.10, confirm=1):
    """Return the edits until a share of each ability is lost: RUN, ability, until, edits.

    until: interpolated between tests, NaN if it is not lost within the run's `edits`; a loss
    counts if it still stands at the next `confirm` tests.
    """
    ends = rows.groupby("run")["step"].max()
    out = []
    for (*head, name), part in lost(rows).groupby([*RUN, "ability"], sort=False):
        series = part.set_index("step")["lost"].sort_index()
        out.append([*head, name, _crossing(series, share, confirm), ends[head[0]]])
    return pd.DataFrame(out, columns=[*RUN, "ability", "until", "edits"])


def _crossing(series, share, confirm):
    steps, values = series.index.to_numpy(dtype=float), series.to_numpy()
    above = values >= share - 1e-9
    for i in range(1, len(steps)):
        if above[i:i + 1 + confirm].all():
            before = min(values[i - 1], share)
            part = (share - before) / (values[i] - before) if before < values[i] < LIMIT else 1.0
            return steps[i - 1] + min(1.0, part) * (steps[i] - steps[i - 1])
    return np.nan


def survival(table, event, *, end="edits", by="editor"):
    """Return the share of lines of `table` without the event by each step (Kaplan and Meier 1958).

    event: column with the step of the event, NaN where there was none by `end`. Columns: `by`,
    step, surviving, low, high: 95 % interval on the log(-log) scale, NaN where it is undefined.
    """
    parts = []
    for name, part in table.groupby(by, sort=False):
        happened = part[event].notna()
        data = stats.CensoredData(part.loc[happened, event], right=part.loc[~happened, end])
        curve = stats.ecdf(data).sf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)     # "undefined at some observations"
            bounds = curve.confidence_interval(method="log-log")
        parts.append(pd.DataFrame({
            by: name, "step": [0.0, *curve.quantiles], "surviving": [1.0, *curve.probabilities],
            "low": [1.0, *bounds.low.probabilities], "high": [1.0, *bounds.high.probabilities]}))
    return pd.concat(parts, ignore_index=True)


def bootstrap(table, value, by, *, unit, draws=1000, seed=0):
    """Return the mean of `value` per group `by`: mean, low, high (95 % percentiles), units.

    Whole units (runs, facts, records) are drawn anew with replacement, the same for all groups;
    a unit's values in a group are averaged first. value, by, unit: names of columns of `table`.
    """
    wide = table.pivot_table(index=unit, columns=by, values=value, sort=False)  # (units, groups)
    count = len(wide)
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=draws)
    with np.errstate(invalid="ignore"):     # a draw without any unit of a group
        means = drawn @ wide.fillna(0).to_numpy() / (drawn @ wide.notna().to_numpy(dtype=float))
    low, high = np.nanquantile(means, [0.025, 0.975], axis=0)
    return pd.DataFrame({"mean": wide.mean(), "low": low, "high": high, "units": wide.count()})


def paired(table, value, by, *, more, less, unit, draws=1000, seed=0):
    """Return the paired difference of two groups' means, more - less: mean, low, high, p, units.

    Only units that both groups have count. low, high: 95 % percentile bootstrap over units; p:
    two-sided permutation test that swaps the groups within units.
    """
    wide = table.pivot_table(index=unit, columns=by, values=value)[[more, less]].dropna()
    gaps = (wide[more] - wide[less]).rename("gap").reset_index().assign(pair="pair")
    row = bootstrap(gaps, "gap", "pair", unit=unit, draws=draws, seed=seed).iloc[0]
    test = stats.permutation_test(
        (wide[more].to_numpy(), wide[less].to_numpy()), lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples", n_resamples=draws, vectorized=True, rng=seed)
    return pd.Series({"mean": row["mean"], "low": row["low"], "high": row["high"],
                      "p": test.pvalue, "units": len(wide)})
