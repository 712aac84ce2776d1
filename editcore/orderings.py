"""Rows of tried editors in; means with intervals, and what becomes of each ordering that the paper reports, out.

    table = summary(rows)                           # `taskscores` rows with columns `system` and `seed`
    found = verdicts(rows, claims(...))             # held, failed or undecided, by paired bootstrap

Intervals are over what could have come out otherwise: the records of the test and, where several were tried, the seeds
of the training.

The paper is InstructEdit (arXiv:2402.16123). Shares lie between 0 and 1, its numbers are percent. Functions are pure.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import norm, t

from editcore.instructedit.contenders import UNSEEDED

METRICS = ("Rel", "Gen", "Loc", "Port", "Fluency")
BY_TOKEN = ("Loc", "Port")   # metrics that the paper counts by token; whole targets elsewhere
LEVEL = (0.025, 0.975)      # quantiles of a 95 % interval
ALIKE = 0.02                # a difference within it counts as none
DRAWS = 2000
SEEDED = 99     # of the resampling of training seeds
TASKS = {"recent": "Recent", "counterfact": "CounterFact", "convsent": "ConvSent", "zsre": "ZsRE"}
MODELS = {"gpt2_xl": "GPT2-XL", "llama_2": "Llama-2"}   # of the paper, as columns of `headline`
# The paper's table 3, %: (model, task, metric) -> what each of COLUMNS scores.
COLUMNS = ("Base model", "FT-L", "CaliNet", "KE", "MEND, multi-task", "GRACE", "InstructEdit")
TABLE = {
    ("GPT2-XL", "counterfact", "Rel"): (0.00, 0.40, 0.24, 33.97, 74.26, 96.31, 80.81),
    ("GPT2-XL", "counterfact", "Gen"): (0.00, 0.32, 0.12, 8.70, 46.48, 0.00, 53.16),
    ("GPT2-XL", "counterfact", "Loc"): (100.0, 43.73, 82.81, 90.94, 58.68, 99.99, 67.83),
    ("GPT2-XL", "counterfact", "Port"): (11.00, 0.87, 3.64, 27.41, 41.88, 11.00, 50.83),
    ("GPT2-XL", "recent", "Rel"): (2.61, 6.48, 11.53, 49.37, 85.62, 99.68, 85.70),
    ("GPT2-XL", "recent", "Gen"): (1.58, 2.21, 5.37, 10.98, 52.76, 1.58, 51.66),
    ("GPT2-XL", "recent", "Loc"): (100.0, 26.58, 83.87, 87.12, 57.94, 100.0, 64.61),
    ("GPT2-XL", "recent", "Port"): (17.19, 16.78, 10.31, 30.41, 42.26, 17.73, 47.36),
    ("GPT2-XL", "convsent", "Rel"): (40.74, 7.48, 37.47, 53.07, 54.67, 40.74, 65.43),
    ("GPT2-XL", "convsent", "Loc"): (100.0, 42.86, 87.47, 94.58, 96.58, 100.0, 94.27),
    ("GPT2-XL", "convsent", "Fluency"): (613.13, 548.55, 396.43, 615.61, 601.93, 414.03, 617.65),
    ("GPT2-XL", "zsre", "Rel"): (0.00, 0.11, 0.00, 13.50, 40.79, 0.00, 82.83),
    ("GPT2-XL", "zsre", "Gen"): (0.00, 0.08, 0.10, 10.13, 31.15, 0.00, 78.40),
    ("GPT2-XL", "zsre", "Loc"): (100.0, 74.06, 95.66, 82.59, 94.79, 100.0, 94.57),
    ("GPT2-XL", "zsre", "Port"): (47.07, 0.96, 0.39, 43.90, 45.08, 47.07, 40.84),
    ("Llama-2", "counterfact", "Rel"): (0.00, 0.00, 0.00, 2.98, 84.15, 54.35, 84.39),
    ("Llama-2", "recent", "Rel"): (9.87, 6.16, 9.79, 15.88, 82.31, 83.72, 83.73),
    ("Llama-2", "zsre", "Rel"): (0.00, 2.23, 0.00, 2.70, 76.95, 0.00, 76.57),
}
PAPER = {(*cell, system): value for cell, values in TABLE.items() for system, value in zip(COLUMNS, values)}
# Its table 1, %, GPT2-XL: (trained on, tested on) -> Rel, Gen, Port.
TRANSFER = {("counterfact", "counterfact"): (84.62, 46.01, 42.46), ("recent", "counterfact"): (59.12, 24.67, 35.13),
            ("zsre", "counterfact"): (59.36, 27.65, 37.67), ("zsre", "zsre"): (96.62, 94.60, 48.85),
            ("recent", "zsre"): (10.22, 3.27, 48.25), ("counterfact", "zsre"): (40.31, 29.70, 47.50)}


@dataclass(frozen=True)
class Claim:
    """An ordering: what `more` scores, times `share`, is above what `less` scores; or, if alike, the same."""

    text: str           # in words
    family: str         # what figures group it under
    task: str           # of the test
    metric: str
    more: str           # a system
    less: str           # another
    share: float = 1.0
    alike: bool = False
    paper: float = np.nan   # the paper's difference in points; NaN: it prints none


def per_record(rows, value="shown"):
    """A record's mean over its questions: DataFrame indexed by system, task, metric, case_id, a column a training seed.

    value: "exact", "token", or "shown": whole targets, but tokens for the metrics BY_TOKEN, as the paper counts. A
    record without questions of a metric has no entry. What is UNSEEDED is the same at every seed; what was tried with
    some seeds only is NaN at the others. Rows without a column `seed` have none.
    """
    values = rows[f"value_{value if value != 'shown' else 'exact'}"]
    if value == "shown":
        values = values.where(~rows["metric"].isin(BY_TOKEN), rows["value_token"])
    keys = ["system", "task", "metric", "case_id"]
    kept = rows[keys].assign(value=values, seed=rows.get("seed", UNSEEDED))
    wide = kept.groupby([*keys, "seed"], observed=True)["value"].mean().unstack("seed")
    seeds = [seed for seed in wide if seed != UNSEEDED]
    if not seeds or UNSEEDED not in wide:
        return wide
    return wide[seeds].apply(lambda one: one.fillna(wide[UNSEEDED]))


def drawn(count, n_draws=DRAWS, seed=0):
    """(n_draws, count) how often each record is drawn in each resample; the same for the same count and seed."""
    return np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=n_draws)


def resampled(values, n_draws=DRAWS, seed=0):
    """(n_draws,) means of values (records, training seeds), both drawn anew; seeds alike for all that have as many.

    Quantiles of a few drawn seeds lie too close together: what the seeds' means deviate from their mean is widened by
    sqrt(S / (S - 1)), for the estimated mean, and t / z of S - 1 degrees, for the estimated spread.
    """
    values, count = np.asarray(values, dtype=float), np.shape(values)[1]
    if count > 1:
        wider = np.sqrt(count / (count - 1)) * t.ppf(LEVEL[1], count - 1) / norm.ppf(LEVEL[1])
        values = values + (wider - 1) * (values.mean(0) - values.mean())
    records, seeds = drawn(len(values), n_draws, seed), drawn(count, n_draws, SEEDED)
    return np.round(((records @ values) * seeds).sum(1) / values.size, 12)      # what cancels is 0, not 1e-17


def summary(rows, n_draws=DRAWS, seed=0):
    """A row a system, task, metric and value ("shown", "exact", "token"): mean over records with interval, records."""
    made = []
    for value in ("shown", "exact", "token"):
        for (system, task, metric), part in per_record(rows, value).groupby(level=[0, 1, 2], sort=False):
            part = part.dropna(axis=1, how="all")
            low, high = np.quantile(resampled(part, n_draws, seed), LEVEL)
            if metric != "Fluency":     # a share, which a widened interval must not leave
                low, high = max(low, 0.0), min(high, 1.0)
            made.append({"system": system, "task": task, "metric": metric, "value": value,
                         "mean": part.to_numpy().mean(), "low": low, "high": high, "records": len(part)})
    return pd.DataFrame(made)


def numbers(table):
    """A `summary` to read: a row a task and metric, a column a contender, "exact / token" in %, fluency as it is."""
    rows = table[table["metric"].isin(METRICS)]
    shown = (rows["mean"] * np.where(rows["metric"] == "Fluency", 1, 100)).map("{:.0f}".format)
    wide = rows.assign(shown=shown).pivot(index=["task", "metric", "records"], columns=["value", "system"],
                                          values="shown")
    known = [f"{one}{end}" for one in COLUMNS for end in ("", ", instructed", ", fair")
             if f"{one}{end}" in set(rows["system"])]
    made = wide["exact"] + " / " + wide["token"]
    alone = made.index.get_level_values("metric") == "Fluency"
    made[alone] = wide["exact"][alone]
    made = made[known].fillna("")
    made = made.reset_index().rename_axis(columns=None)
    places = {cell: place for place, cell in enumerate((task, metric) for task in TASKS for metric in METRICS)}
    made = made.iloc[np.argsort([places[cell] for cell in zip(made["task"], made["metric"])])]
    return made.assign(task=made["task"].map(TASKS)).set_index(["task", "metric"])


def difference(scores, cell, more, less, share=1.0):
    """(records, training seeds) share · more − less of two systems where both were asked; cell = (task, metric).

    scores: what `per_record` gives. ValueError if they have none in common.
    """
    known = scores.index.droplevel("case_id")
    if missing := [name for name in (more, less) if (name, *cell) not in known]:
        raise ValueError(f"orderings: {missing[0]} has no {cell[1]} on {cell[0]}")
    one, other = (scores.loc[(name, *cell)] for name in (more, less))
    found = (share * one - other).dropna(axis=1, how="all").dropna()
    if found.empty:
        raise ValueError(f"orderings: {more} and {less} were asked no common {cell[1]} on {cell[0]}")
    return found.to_numpy()


def verdicts(rows, asked, value="shown", n_draws=DRAWS, seed=0):
    """A row a Claim: both scores, mean difference, paired 95 % interval, verdict; what was not tried is left out.

    An ordering held if the interval lies above 0, failed if below, and is undecided if it contains 0. What should be
    alike held if the interval lies within ± ALIKE, failed if it lies outside, and is undecided else.
    """
    scores, made = per_record(rows, value), []
    known = set(scores.index.droplevel("case_id"))
    for one in asked:
        cell = one.task, one.metric
        if {(one.more, *cell), (one.less, *cell)} <= known:
            apart = difference(scores, cell, one.more, one.less, one.share)
            low, high = np.quantile(resampled(apart, n_draws, seed), LEVEL)
            own, rival = (np.nanmean(scores.loc[(name, *cell)]) for name in (one.more, one.less))
            made.append(vars(one) | {"score": own, "rival": rival, "mean": apart.mean(), "low": low, "high": high,
                                     "records": len(apart), "verdict": verdict(low, high, one.alike)})
    return pd.DataFrame(made)


def verdict(low, high, alike=False):
    """"held", "failed" or "undecided" of a 95 % interval."""
    if alike:
        return "held" if low >= -ALIKE and high <= ALIKE else "failed" if low > ALIKE or high < -ALIKE else "undecided"
    return "held" if low > 0 else "failed" if high < 0 else "undecided"


def claims():
    """The paper's orderings among the contenders of the main table, and those of its table of transfer."""
    made = []
    for (learned, task), values in TRANSFER.items():
        if learned != task:
            own = TRANSFER[task, task]
            made += [Claim(f"{TASKS[task]}: trained on it > on {TASKS[learned]}, {metric}", "In-task beats transfer",
                           task, metric, task, learned, paper=own[i] - values[i])
                     for i, metric in enumerate(("Rel", "Gen"))]
    made += [Claim(f"Recent → ZsRE keeps less than half of in-task {metric}", "Transfer collapses", "zsre", metric,
                   "zsre", "recent", 0.5, paper=0.5 * TRANSFER["zsre", "zsre"][i] - TRANSFER["recent", "zsre"][i])
             for i, metric in enumerate(("Rel", "Gen"))]
    own, rival = COLUMNS[-1], COLUMNS[4]
    for task, metric in (("recent", "Rel"), ("recent", "Gen"), ("counterfact", "Rel"), ("counterfact", "Gen"),
                         ("convsent", "Rel"), ("zsre", "Rel"), ("zsre", "Gen")):
        family = "Hold-out: instructions help" if task == "zsre" else "Instructions help"
        made.append(Claim(f"{TASKS[task]}: InstructEdit > multi-task MEND, {metric}", family, task, metric, own, rival,
                          paper=paper_gap(task, metric, own, rival)))
    made += [Claim(f"{TASKS[task]}: {more} > {less}, Loc".replace("MEND, multi-task", "multi-task MEND"),
                   "Locality with instructions", task, "Loc", more, less, paper=paper_gap(task, "Loc", more, less))
             for task, more, less in (("recent", own, rival), ("counterfact", own, rival), ("convsent", rival, own))]
    made += [Claim(f"{TASKS[task]}: {name} = base model, Gen", "GRACE does not generalise", task, "Gen", name,
                   "Base model", alike=True, paper=paper_gap(task, "Gen", name, "Base model"))
             for task, name in (("recent", "GRACE"), ("counterfact", "GRACE"), ("zsre", "GRACE, fair"))]
    return made


def paper_gap(task, metric, more, less, model="GPT2-XL"):
    """The paper's difference of two systems in points; NaN where it prints none."""
    return PAPER.get((model, task, metric, more), np.nan) - PAPER.get((model, task, metric, less), np.nan)


def headline(rows, trained=("recent", "counterfact", "convsent"), n_draws=DRAWS, seed=0):
    """Where a mean gain in reliability comes from: a row a task, then the mean of all and that of the trained ones.

    Columns: gain in points of InstructEdit over multi-task MEND, its 95 % interval (records resampled within tasks,
    training seeds together), the least and the most of a single training seed, and the paper's gains on its two models
    (NaN where it has none; its means are over the rows it has).
    """
    own, rival, scores, gains = COLUMNS[-1], COLUMNS[4], per_record(rows, "exact"), {}
    tasks = [task for task in TASKS if task in rows["task"].unique()]
    for index, task in enumerate(tasks):
        apart = 100 * difference(scores, (task, "Rel"), own, rival)
        gains[task] = apart.mean(0), resampled(apart, n_draws, seed + index)
    means = {"Mean of all": tasks, "Without the hold-out": [task for task in tasks if task in trained]}
    groups = {TASKS[task]: [task] for task in tasks} | means
    made = []
    for name, part in groups.items():
        low, high = np.quantile(np.mean([gains[task][1] for task in part], 0), LEVEL)
        single = np.mean([gains[task][0] for task in part], 0)
        made.append({"rows": name, "gain": single.mean(), "low": low, "high": high, "least": single.min(),
                     "most": single.max(), **{column: paper_gain(part, model) for column, model in MODELS.items()}})
    return pd.DataFrame(made)


def paper_gain(tasks, model):
    """The paper's gain in reliability of InstructEdit over multi-task MEND, points, mean over the tasks it has."""
    gaps = [paper_gap(task, "Rel", COLUMNS[-1], COLUMNS[4], model) for task in tasks]
    gaps = [gap for gap in gaps if not np.isnan(gap)]
    return float(np.mean(gaps)) if gaps else np.nan
