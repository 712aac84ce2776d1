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
MARGIN = 0.1        # F1 above chance that the unedited model must have for its loss to be measured
LIMIT = 1e6         # share lost where nothing finite is left to measure


@dataclass(frozen=True)
class Rule:
    """Which of three shapes a run has, by what it loses and never by how far the weights move.

    abrupt: after a gradual phase much is lost within few edits, and still is at the next test.
    eroded: half is lost at the end without such a jump. gradual: neither, in a run that is long
    enough to see it. Else one cannot tell.
    """

    jump: float = 0.25          # share lost from one test to another ...
    tasks: float = 0.50         # ... of the few-shot ability, which few items measure
    within: int = 20            # edits between the two (or one test interval, if longer)
    faster: float = 3.0         # times as fast, per edit, as the run lost until then
    calm: int = 2               # tests up to the jump: with fewer there was no gradual phase
    confirm: int = 1            # later tests at which the loss must still stand
    half: float = 0.50          # share lost at the last test of a run that is eroded; a run that
                                # has lost it of anything before a jump was not gradual until then
    tests: int = 3              # with fewer tests, or ...
    edits: int = 100            # ... with fewer edits and no loss, one cannot tell


def panels(runs):
    """Return the panel of a figure that each run belongs to, by run: its model and its schedule.

    runs: a table as `editcore.runs` returns it. A run may put predicted disabling edits in at
    stated places (`insert`), or leave them out (`leave_out`); else facts come as they do.
    """
    schedules = {"insert": ", predicted edits put in", "leave_out": ", predicted edits left out"}
    chosen = [runs[name].str.len() > 0 for name in schedules]
    names = runs["model"].map(lambda model: model.rsplit("/", 1)[-1])
    return (names + np.select(chosen, list(schedules.values()), "")).set_axis(runs["run"])


def _successes(rows, metric):
    """Return the edits that succeeded when made: run, fact, made (the step)."""
    new = rows[(rows["metric"] == metric) & (rows["value"] >= 1)]
    return new.groupby(["run", "fact"])["step"].first().rename("made").reset_index()


def retests(rows, metric="ES_exact"):
    """Return each re-test of edits that succeeded when made: RUN, fact, made, step, age, right.

    made: step of the edit; age: edits made since; right: 1 if the edit still succeeds, else 0.
    """
    again = rows[rows["metric"] == f"retest_{metric}"]
    again = again.merge(_successes(rows, metric), on=["run", "fact"])
    again = again.assign(age=again["step"] - again["made"], right=(again["value"] >= 1) * 1.0)
    return again[[*RUN, "fact", "made", "step", "age", "right"]]


def forgotten(rows, metric="ES_exact"):
    """Return the share of earlier edits lost: RUN, step, edits, ever, now, recovered.

    One row per re-test. edits: those that succeeded when made, the newest among them (it is not
    asked again, and not lost). ever: share that failed at this or an earlier re-test, "facts
    forgotten" of arXiv 2401.07453. now: share that fails. recovered: of those that failed before,
    the share that succeeds again (NaN if none had).
    """
    tests = retests(rows, metric)
    dates = tests[[*RUN, "step"]].drop_duplicates()
    newest = dates.merge(_successes(rows, metric).assign(step=lambda made: made["made"], right=1.0))
    tests = pd.concat([tests, newest]).sort_values("step", kind="stable", ignore_index=True)
    fails = tests["right"] < 1
    seen = fails.groupby([tests["run"], tests["fact"]]).cummax()
    before = seen.groupby([tests["run"], tests["fact"]]).shift(fill_value=False).astype(bool)
    tests = tests.assign(ever=seen, now=fails, recovered=(~fails).where(before).astype(float))
    groups = tests.groupby([*RUN, "step"], sort=False)
    return groups.agg(edits=("fact", "size"), ever=("ever", "mean"), now=("now", "mean"),
                      recovered=("recovered", "mean")).reset_index()


def few_shot(rows):
    """Return the few-shot scores at each test: RUN, step, task, f1 (weighted, 0 to 1)."""
    tasks = rows["metric"].str.extract(r"^(.+?)(?<!_prob)(?<!_calibrated)_f1$", expand=False)
    tests = rows.assign(task=tasks).dropna(subset="task")
    return tests.rename(columns={"value": "f1"})[[*RUN, "step", "task", "f1"]]


def ability(rows):
    """Return the few-shot ability at each test: RUN, step, f1, ability.

    f1: mean over the tasks at which the unedited model is above chance by MARGIN or more.
    ability: (f1 - chance) / (f1 of the unedited model - chance), so 1 before the first edit and 0
    for a model that gives one answer to everything. Runs without such a task are left out.
    """
    tests = few_shot(rows)
    start = tests[(tests["step"] == 0) & (tests["f1"] >= CHANCE + MARGIN)]
    start = start[["run", "task", "f1"]].rename(columns={"f1": "start"})
    tests = tests.merge(start, on=["run", "task"])
    means = tests.groupby([*RUN, "step"], sort=False)[["f1", "start"]].mean().reset_index()
    share = (means["f1"] - CHANCE) / (means["start"] - CHANCE)
    return means.drop(columns="start").assign(ability=share)


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


def losses(rows, metric="ES_exact"):
    """Return the share lost at each test, 0 to 1, long: RUN, step, what, lost.

    what: "earlier edits" that fail now, "known facts" (never edited), "few-shot tasks" (see
    `ability`), "perplexity": 1 - unedited / now, so that half is lost where it has doubled.
    """
    table = lost(rows).query("ability != 'facts_prob'")
    rise = table["ability"] == "perplexity"
    share = table["lost"].where(~rise, 1 - 1 / (1 + table["lost"]))
    names = {"tasks": "few-shot tasks", "facts": "known facts"}
    table = table.assign(lost=share, what=table["ability"].replace(names))
    gone = forgotten(rows, metric).rename(columns={"now": "lost"}).assign(what="earlier edits")
    columns = [*RUN, "step", "what", "lost"]
    parts = [part[columns] for part in (gone, table) if len(part)]
    return pd.concat(parts or [pd.DataFrame(columns=columns)], ignore_index=True)


def phases(rows, rule=None, metric="ES_exact"):
    """Return how each run ends, by a Rule: RUN, edits, kind, worst, end, half, and of the jump
    collapse, cause, before, at, moved, leap, longest (NaN or "" unless the run is abrupt).

    kind: "abrupt", "eroded", "gradual" or "cannot tell". worst, end: what is lost most at the last
    test, and the share. half: the first step from which half of something is lost to the end.
    collapse: step of the test at which the jump is seen; cause: what is lost; before, at: the share
    at the test before and at that test. Not part of the rule: moved, times that the mean ‖ΔW‖/‖W‖
    grew between these tests; longest, the fact of the longest update between them, and leap, its
    length in the run's median updates.
    """
    rule = rule or Rule()
    gone = losses(rows, metric)
    parts = [dict(zip(RUN, head)) | {"edits": part["step"].max()}
             | _shape(gone[gone["run"] == head[0]], part["step"].max(), rule, part)
             for head, part in rows.groupby(RUN, sort=False)]
    columns = [*RUN, "edits", "kind", "worst", "end", "half", "collapse", "cause", "before", "at",
               "moved", "leap", "longest"]
    return pd.DataFrame(parts, columns=columns)


def _shape(gone, edits, rule, rows):
    """Return the columns of `phases` for one run. gone: its `losses`."""
    series = {what: part.set_index("step")["lost"].sort_index()
              for what, part in gone.groupby("what")}
    tests = max([(part.index > 0).sum() for part in series.values()], default=0)
    ends = pd.Series({what: part.iloc[-1] for what, part in series.items()}, dtype=float)
    half = pd.Series({what: _stays(part, rule.half) for what, part in series.items()}, dtype=float)
    last = {"worst": ends.idxmax() if len(ends) else "", "end": ends.max(), "half": half.min()}
    jumps = {what: _jump(part, rule.tasks if what == "few-shot tasks" else rule.jump, rule,
                         until=half.min()) for what, part in series.items()}
    stand = {what: jump for what, jump in jumps.items() if jump and jump[2]}
    if stand:
        cause = min(stand, key=lambda what: stand[what][1])
        before, at, _ = stand[cause]
        values = series[cause]
        return last | {"kind": "abrupt", "collapse": at, "cause": cause, "before": values[before],
                       "at": values[at]} | _movement(rows, before, at)
    unclear = tests < rule.tests or any(jumps.values())
    worn = not unclear and ends.max() >= rule.half
    kind = "eroded" if worn else "cannot tell" if unclear or edits < rule.edits else "gradual"
    return last | {"kind": kind, "cause": ""}


def _jump(series, limit, rule, *, until):
    """Return (step before, step, does it stand?) of the first jump that begins before `until`;
    None if there is none."""
    tested = series[series.index > 0].clip(lower=0)
    steps = tested.index
    for i in range(rule.calm, len(steps)):
        for j in range(i - 1, rule.calm - 2, -1):
            length = steps[i] - steps[j]
            usual = tested.iloc[j] / steps[j]
            rise = tested.iloc[i:i + 1 + rule.confirm] - tested.iloc[j]
            near = (j == i - 1 or length <= rule.within) and not steps[j] >= until
            large = rise >= max(limit, rule.faster * usual * length) - 1e-9
            if near and large.all():
                return steps[j], steps[i], len(large) > rule.confirm
    return None


def _stays(series, share):
    """Return the first step from which at least `share` is lost at every test, NaN if none."""
    above = series[::-1].ge(share).cummin()[::-1]
    return above.idxmax() if above.any() else np.nan


def _movement(rows, before, at):
    """Return how the weights moved between two tests: moved, leap, longest (see `phases`)."""
    matrices = rows[~rows["fact"].astype(str).str.endswith(".bias")]
    far = matrices[matrices["metric"] == "relative"].groupby("step")["value"].mean()
    updates = matrices[matrices["metric"] == "update"]
    sizes = updates["value"] / updates.groupby("fact")["value"].transform("median")
    sizes = sizes.groupby(updates["step"]).max()
    sizes = sizes[(sizes.index > before) & (sizes.index <= at)]
    newest = rows[rows["metric"] == "ES"].groupby("step")["fact"].first()
    step = sizes.idxmax() if len(sizes) else np.nan
    return {"moved": far.get(at, np.nan) / far.get(before, np.nan), "leap": sizes.max(),
            "longest": newest.get(step, "")}


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


def paired(table, value, by, *, more, less, unit, training="", draws=1000, seed=0):
    """Return the paired difference of two groups' means, more - less: mean, low, high, p, units.

    Only units that both groups have count. low, high: 95 % percentile bootstrap over units; p:
    two-sided permutation test that swaps the groups within units. With `training`, a column, units
    are compared within a training of both groups, and trainings are drawn anew as units are; then
    there is no p, but trainings, their number, and of a single one no interval (NaN).
    """
    index = [training, unit] if training else unit
    wide = table.pivot_table(index=index, columns=by, values=value)[[more, less]].dropna()
    gaps = (wide[more] - wide[less]).rename("gap")
    if training:
        return _over_trainings(gaps.unstack(unit), draws, seed)
    gaps = gaps.reset_index().assign(pair="pair")
    row = bootstrap(gaps, "gap", "pair", unit=unit, draws=draws, seed=seed).iloc[0]
    test = stats.permutation_test(
        (wide[more].to_numpy(), wide[less].to_numpy()), lambda a, b, axis: (a - b).mean(axis),
        permutation_type="samples", n_resamples=draws, vectorized=True, rng=seed)
    return pd.Series({"mean": row["mean"], "low": row["low"], "high": row["high"],
                      "p": test.pvalue, "units": len(wide)})


def _over_trainings(gaps, draws, seed):
    """Return what `paired` does of differences (trainings, units), NaN where there is none."""
    trainings, units = gaps.shape
    random = np.random.default_rng(seed)
    weights = random.multinomial(trainings, [1 / trainings] * trainings, size=draws)
    drawn = random.multinomial(units, [1 / units] * units, size=draws)
    known = gaps.notna().to_numpy(dtype=float)
    means = ((weights @ gaps.fillna(0).to_numpy() * drawn).sum(1)
             / (weights @ known * drawn).sum(1))
    low, high = np.quantile(means, [0.025, 0.975]) if trainings > 1 else (np.nan, np.nan)
    return pd.Series({"mean": np.nanmean(gaps), "low": low, "high": high, "units": units,
                      "trainings": trainings})
