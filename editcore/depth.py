"""The rows of runs in; how long what was edited lasts, how the weights wander, and controls, with intervals, out.

Shares are from 0 to 1. A run is one order of the facts, and runs are what intervals are taken over: the edits of a run
share its weights and do not fail independently. `t_interval` is used for means over runs, `survival` for times.
"""

import dataclasses

import numpy as np
import pandas as pd
from scipy import optimize, stats

from editcore import analysis_old as analysis
from editcore import merits
from editcore.analysis_old import RUN
from editcore.editors import EDITORS

LEVEL = 0.95                                # of every interval here
RANDOM = {"v": "random values, same keys", "both": "random keys and values"}  # controls, as figures name them

END = {     # what is compared with the controls: (words, scale)
    "untouched": ("never-edited facts right, %", 100), "untouched_ES_prob": ("their margin", 1),
    "perplexity": ("perplexity", 1),
}


def t_interval(values):
    """(mean, low, high) of the values of several runs, Student's t; NaN bounds of one run; NaNs are left out."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return (values[0] if len(values) else np.nan), np.nan, np.nan
    mean = values.mean()
    half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return mean, mean - half, mean + half


def retests(df, metric="ES_exact"):
    """Every re-test of an edit that succeeded when made: run, editor, seed, fact, made, step, kept (0 or 1)."""
    good = df[(df["metric"] == metric) & (df["value"] >= 1)].set_index(["run", "fact"])["step"]
    again = df[df["metric"] == f"retest_{metric}"]
    made = good.reindex(pd.MultiIndex.from_frame(again[["run", "fact"]])).to_numpy()
    again = again.assign(made=made, kept=(again["value"] >= 1).astype(float)).dropna(subset="made")
    return again[[*RUN, "fact", "made", "step", "kept"]].reset_index(drop=True)


def matrix(df, width=50, metric="ES_exact"):
    """Forgetting by when an edit was made and when it was asked again: editor, made, tested, retained, runs, n.

    Edits 1 to `width` are the class made = 0, and so on; tested is the last edit of a class of re-tests. retained is
    the share still right, mean over the runs of an editor; n counts answers.
    """
    table = retests(df, metric)
    table = table.assign(made=(table["made"] - 1) // width * width,
                         tested=np.minimum(-(-table["step"] // width) * width, table["step"].max()))
    one = table.groupby([*RUN, "made", "tested"], sort=True)["kept"].agg(["mean", "size"]).reset_index()
    found = one.groupby(["editor", "made", "tested"], sort=False)
    return found.agg(retained=("mean", "mean"), runs=("run", "nunique"), n=("size", "sum")).reset_index()


def by_age(df, width=50, metric="ES_exact"):
    """Retention by age, mean over runs: editor, age, retained, low, high (t interval within 0 and 1), runs, n."""
    table = analysis.retention(df.reset_index(drop=True), metric, width)
    out = []
    for (editor, age), part in table.groupby(["editor", "age"], sort=False):
        mean, low, high = t_interval(part["retained"])
        out.append({"editor": editor, "age": age, "retained": mean, "low": np.maximum(low, 0),
                    "high": np.minimum(high, 1), "runs": len(part), "n": part["n"].sum()})
    return pd.DataFrame(out, columns=["editor", "age", "retained", "low", "high", "runs", "n"])


def fading(ages, kept):
    """Rate λ of exponential forgetting, the likeliest for answers `kept` (0 or 1) at `ages`: P(kept) = exp(-λ age).

    The root of Σ_lost a / (exp(λa) - 1) = Σ_kept a; 0 if nothing was lost, infinite if nothing was kept, NaN without
    answers.
    """
    ages, kept = np.asarray(ages, dtype=float), np.asarray(kept, dtype=bool)
    if not len(ages) or kept.all() or not kept.any():
        return np.nan if not len(ages) else 0.0 if kept.all() else np.inf
    lost, still = ages[~kept], ages[kept].sum()
    return optimize.brentq(lambda rate: (lost / np.expm1(np.minimum(rate * lost, 700))).sum() - still, 1e-12, 1e3)


def half_lives(df, width=50, metric="ES_exact"):
    """One row an editor: how soon half of its edits are lost, seen and extrapolated, over `runs` runs.

    reached: runs in which retention by age (classes of `width`) falls to one half; observed: median over the runs of
    the age where it does (infinite where most never do: censored at `oldest`, the greatest age that was tested).
    rate, rate_low, rate_high: λ of `fading`, mean over runs and its t interval; half, half_low, half_high: ln 2 / λ,
    which beyond `oldest` is an extrapolation. misfit: retention of the oldest class less what λ says: negative where
    forgetting speeds up, so that the extrapolation is too long.
    """
    table = retests(df, metric)
    table = table.assign(age=table["step"] - table["made"])
    seen = analysis.half_life(analysis.retention(df.reset_index(drop=True), metric, width))
    out = []
    for editor, part in table.groupby("editor", sort=False):
        rates = [fading(one["age"], one["kept"]) for _, one in part.groupby("run")]
        rate, low, high = t_interval(rates)
        oldest = part["age"].max()
        last = part[part["age"] > oldest - width]
        halves = [seen.get(run, np.inf) for run in part["run"].unique()]
        out.append({"editor": editor, "runs": len(rates), "reached": int(np.isfinite(halves).sum()),
                    "observed": float(np.median(halves)), "oldest": oldest, "rate": rate, "rate_low": max(low, 0.0),
                    "rate_high": high, "half": half_of(rate), "half_low": half_of(high),
                    "half_high": half_of(max(low, 0.0)),
                    "misfit": last["kept"].mean() - np.exp(-rate * last["age"]).mean()})
    return pd.DataFrame(out)


def half_of(rate):
    """ln 2 / rate; infinite at rate 0."""
    return np.log(2) / rate if rate > 0 else np.nan if np.isnan(rate) else np.inf


def said(halves):
    """'ROME: half lost at age 84 …; MEMIT: half not lost by age 119 …' from `half_lives`, extrapolations named so."""
    words = []
    for one in halves.itertuples():
        over = f" ({_whole(one.half_low)} to {_whole(one.half_high)} over {one.runs} runs)" if one.runs > 1 else ""
        ahead = f"{_whole(one.half)} edits{over} if exponential"
        if np.isfinite(one.observed):
            words.append(f"{one.editor}: half lost at age {one.observed:.0f}, {ahead}")
        elif one.rate == 0:
            words.append(f"{one.editor}: nothing lost by age {one.oldest:.0f}")
        else:
            words.append(f"{one.editor}: half not lost by age {one.oldest:.0f}; extrapolated, {ahead}, the oldest "
                         f"edits being {100 * one.misfit:+.0f} points off that")
    return "; ".join(words)


def _whole(value):
    return "-" if np.isnan(value) else "never" if np.isinf(value) else f"{value:,.0f}"


def lifetimes(df, metric="ES_exact"):
    """One row an edit that succeeded when made: run, editor, seed, fact, failed, edits.

    failed: age at the first re-test at which it fails (so up to one test interval late), NaN if it never does; edits:
    age at its last re-test, where it is censored if it has not failed.
    """
    table = retests(df, metric)
    table = table.assign(age=table["step"] - table["made"])
    first = table[table["kept"] < 1].groupby(["run", "fact"])["age"].min().rename("failed")
    ends = table.groupby([*RUN, "fact"], sort=False)["age"].max().rename("edits").reset_index()
    return ends.join(first, on=["run", "fact"])[[*RUN, "fact", "failed", "edits"]]


def survival(table, event):
    """`analysis.survival` with bounds: editor, step, surviving, at_risk, low, high.

    95 % interval on the log(-log) scale from Greenwood's variance Σ d / (r (r - d)) (Kalbfleisch and Prentice 1980);
    before the first event low is 0.025^(1/r), what r survivors of r still allow, and after the last one of all high is
    1 - 0.025^(1/n).
    """
    parts = []
    for _, part in analysis.survival(table, event).groupby("editor", sort=False):
        alive, at_risk = part["surviving"].to_numpy(), part["at_risk"].to_numpy(dtype=float)
        died = np.append(0.0, at_risk[1:] * (1 - alive[1:] / np.where(alive[:-1] > 0, alive[:-1], 1.0)))
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.sqrt(np.cumsum(died / (at_risk * (at_risk - died)))) / np.abs(np.log(alive))
            low, high = (alive ** np.exp(sign * stats.norm.ppf((1 + LEVEL) / 2) * spread) for sign in (1, -1))
        edge = (1 - LEVEL) / 2
        low = np.select([alive == 1, alive == 0], [edge ** (1 / at_risk), 0.0], low)
        high = np.select([alive == 1, alive == 0], [1.0, 1 - edge ** (1 / at_risk[0])], high)
        parts.append(part.assign(low=low, high=high))
    return pd.concat(parts, ignore_index=True) if parts else analysis.survival(table, event).assign(low=[], high=[])


def edit_survival(table, ages=None):
    """Share of edits that have not failed by an age, with the interval over runs: editor, step, surviving, low, high.

    table: `lifetimes`. With several runs the mean of their curves and its t interval (edits of one run fail together);
    with one run `survival`, whose interval takes edits as independent. ages: where the curves are read, by default the
    multiples of a 40th of the longest.
    """
    longest, parts = table["edits"].max(), []
    ages = np.unique(np.linspace(0, longest, 41).round()) if ages is None else np.asarray(ages)
    for editor, part in table.groupby("editor", sort=False):
        curves = [analysis.survival(one, "failed") for _, one in part.groupby("run")]
        read = [one["surviving"].to_numpy()[np.searchsorted(one["step"], ages, "right") - 1] for one in curves]
        if len(curves) > 1:
            means = [t_interval(values) for values in np.transpose(read)]
            found = pd.DataFrame(means, columns=["surviving", "low", "high"]).assign(step=ages)
        else:
            one = survival(part, "failed")
            found = one.iloc[np.searchsorted(one["step"], ages, "right") - 1].assign(step=ages)
        parts.append(found.assign(editor=editor, runs=len(curves), low=found["low"].clip(lower=0),
                                  high=found["high"].clip(upper=1)))
    return pd.concat(parts, ignore_index=True)[["editor", "step", "surviving", "low", "high", "runs"]]


def moved(part):
    """{matrix: table with index step and columns update, total} of the rows of one run: ‖·‖_F of each edit's change of
    that matrix, and of all of them together."""
    out = {}
    for name, rows in analysis.distance(part).groupby("parameter"):
        if not name.endswith(".bias") and {"update", "relative"} <= set(rows):
            rows = rows.sort_values("step").set_index("step")
            weight = rows["update"].iloc[0] / rows["relative"].iloc[0]      # ‖W‖: the first total is the first update
            out[name] = pd.DataFrame({"update": rows["update"], "total": weight * rows["relative"]})
    return out


def walk(df, phases=None):
    """Is the distance a random walk? One row a run and matrix: exponent, drift, path, edits.

    exponent: b of ‖ΔW‖ ∝ n^b in the gradual phase (`merits.exponent`: 1/2 for a random walk); drift: ‖ΔW‖ / √Σ‖Δⱼ‖²
    at its end, 1 where the updates are orthogonal, √n where they all point one way; path: √Σ‖Δⱼ‖².
    """
    starts = {} if phases is None else phases.set_index("run")["collapse"].dropna().to_dict()
    out = []
    for run, part in df.groupby("run", sort=False):
        early = part[part["step"] < starts.get(run, np.inf)]
        for name, table in moved(early).items():
            rows = early[(early["fact"] == name) & (early["metric"] == "relative")]
            path = np.sqrt((table["update"] ** 2).sum())
            out.append({name: part[name].iloc[0] for name in RUN}
                       | {"matrix": name, "exponent": merits.exponent(rows), "drift": table["total"].iloc[-1] / path,
                          "path": path, "edits": len(table)})
    return pd.DataFrame(out, columns=[*RUN, "matrix", "exponent", "drift", "path", "edits"])


def over_runs(walks):
    """`walk` by editor, matrices averaged in each run first: editor, runs, and of exponent and drift the mean over runs
    (their name), and the t interval (_low, _high)."""
    each, out = walks.groupby(RUN, sort=False)[["exponent", "drift"]].mean().reset_index(), []
    for editor, part in each.groupby("editor", sort=False):
        found = {name: t_interval(part[name]) for name in ("exponent", "drift")}
        out.append({"editor": editor, "runs": len(part)} | {
            name + end: value for name, three in found.items() for end, value in zip(("", "_low", "_high"), three)})
    return pd.DataFrame(out)


def controls(run, df, direction):
    """The study.Run of random rank-one updates that are as long as those of the finished `run`, edit by edit.

    df: the rows of that run only. direction "v": its keys u with random values; "both": random keys and values.
    Nothing is inserted, so nothing is asked about the edits; settings that the control does not have are left out.
    ValueError if the run changed several matrices, several facts an update, or ended before its last edit.
    """
    updates = df[df["metric"] == "update"].sort_values("step")
    facts = df[df["metric"] == "edit_losses"].drop_duplicates(["step", "fact"]).set_index("step")["fact"]
    if updates["fact"].nunique() != 1 or facts.index.has_duplicates or run.batch_size != 1:
        raise ValueError("controls: they repeat runs that change one matrix by one fact an update")
    if run.n_edits and len(updates) < run.n_edits:
        raise ValueError(f"controls: the run has {len(updates)} of its {run.n_edits} edits")
    norms = tuple((facts[step], float(value)) for step, value in zip(updates["step"], updates["value"]))
    known = {field.name for field in dataclasses.fields(EDITORS["random"].config)}
    kept = tuple(pair for pair in run.settings if pair[0] in known)
    return dataclasses.replace(run, editor="random", measure=(), before=(), final=(), retest_every=0,
                               settings=(*kept, ("direction", direction), ("norms", norms)))


def beside(df, random, controlled):
    """Rows, with the derived ones, of the runs of one method and of their controls, whose planned names may end in
    ", order 3" (each repeats its own run's norms). Orders without controls are left out."""
    random = random.assign(editor=random["editor"].str.replace(r", order -?\d+$", "", regex=True))
    own = df[(df["editor"] == controlled) & df["order"].isin(random["order"])]
    return analysis.with_derived(pd.concat([own, random], ignore_index=True))


def at_end(df):
    """What is left at each run's last test: editor, order, run and the columns of END. df: `beside`."""
    rows = df[df["metric"].isin(END)].groupby(["editor", "order", "run", "metric", "step"])["value"].mean()
    last = rows.groupby(level=["editor", "order", "run", "metric"]).last().unstack("metric")
    return last.rename_axis(columns=None).reset_index()


def differences(table, controlled):
    """Controls less the controlled method at the end, order by order: editor, metric, method and control (means),
    mean, low, high (t interval of the difference), orders. table: `at_end`."""
    wide, out = table.set_index(["order", "editor"])[[name for name in END if name in table]].unstack("editor"), []
    for editor in (name for name in RANDOM.values() if name in set(table["editor"])):
        for metric in (name for name in END if name in table):
            mean, low, high = t_interval(wide[metric, editor] - wide[metric, controlled])
            out.append({"editor": editor, "metric": metric, "method": wide[metric, controlled].mean(),
                        "control": wide[metric, editor].mean(), "mean": mean, "low": low, "high": high,
                        "orders": len(wide)})
    return pd.DataFrame(out)


def compared(table, controlled):
    """'never-edited facts right, %: ROME 97.2, random … 98.1 (+0.9, 0.2 to 1.6)' from `differences`."""
    words = []
    for metric, part in table.groupby("metric", sort=False):
        name, scale = END[metric]
        digits = 1 if scale == 100 else 3 if metric == "untouched_ES_prob" else 2
        each = [f"{one.editor} {scale * one.control:.{digits}f} ({scale * one.mean:+.{digits}f}" +
                (f", {scale * one.low:+.{digits}f} to {scale * one.high:+.{digits}f})" if one.low == one.low else ")")
                for one in part.itertuples()]
        words.append(f"{name}: {controlled} {scale * part['method'].iloc[0]:.{digits}f}, {', '.join(each)}")
    return "; ".join(words)
