"""Rows of runs and the denominators known before them in; which updates jumped, at what cost, and how well that was
foretold, out.

A *jump* is an update of TRIGGER or more times the run's median update. It is *disabling* if it is the largest update of
its test interval and the model breaks there (the phase rule) or loses at least LOSS of what it knew just before.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from editcore import analysis_old as analysis
from editcore.analysis_old import RUN
from editcore.disabling import OWN
from editcore.foresight import wilson
from editcore.merits import TRIGGER

RELATIVE = 0.5  # a denominator under this share of the mean key's is taken for a coming jump
MILDER = 3.0    # median updates: a second, weaker threshold, as jumps of TRIGGER are few
LOSS = 0.10     # of the earlier edits, or of the never-edited facts, right at the last test and wrong at the next ...
LEAST = 40      # ... where so many were asked at least: a share of fewer says little
KNOWN = {"earlier edits": ("ES_exact", "retest_ES_exact"), "never edited": ("untouched_ES_exact",)}  # kind: its answers


@dataclass(frozen=True)
class Rule:
    """A prediction made before the first edit: the edit will jump if `column` is at least `limit`."""

    says: str       # the rule, in words
    column: str     # of `updates`
    limit: float


def rules(relative=RELATIVE, trigger=MILDER):
    """The Rules: the tokenizer's alone, one on the relative denominator, one on the expected update."""
    return (Rule("opens its prompt", "opener", 1.0),
            Rule(f"denominator under {relative:g} of the mean key's", "shrink", 1 / relative),
            Rule(f"expected update {trigger:g} × the median or more", "expected", trigger))


def updates(df, table, relative=RELATIVE):
    """One row an edit with what was foretold: RUN, method, step, fact, update ‖ΔW‖_F, ratio (to its run's median).

    table: `disabling.denominators` of (at least) the edited facts; its columns stand beside, `own` is the denominator
    that the run's editor divides by, shrink = 1 / |own / mean key's|, expected = median |own| / |own| over the table;
    told and foretold: ROME's relative denominator is under `relative`, and its expected update, whatever the editor.
    ValueError for updates of several facts, an editor without denominator, or a fact that is not in the table.
    """
    method = "method" if "method" in df else "editor"
    rows = df[(df["metric"] == "update") & ~df["fact"].astype(str).str.endswith(".bias")]
    size = rows.groupby([*dict.fromkeys([*RUN, method]), "step"], sort=False)["value"].agg(
        lambda value: float(np.sqrt((value**2).sum()))).rename("update").reset_index()
    edited = df[df["metric"] == "edit_losses"][["run", "step", "fact"]]
    if edited.duplicated(["run", "step"]).any():
        raise ValueError("disabling edits are told apart in runs of one fact an update; these have several")
    made = size.rename(columns={method: "method"}).merge(edited, on=["run", "step"])
    if "editor" not in made:
        made["editor"] = made["method"]
    if strange := sorted(set(made["method"]) - set(OWN)):
        raise ValueError(f"{strange[0]} divides by no denominator; {', '.join(OWN)} do")
    known = table.set_index("case_id")
    if strange := [fact for fact in made["fact"] if fact not in known.index]:
        raise ValueError(f"record {strange[0]} was edited, but its denominator was not tabulated")
    made = made.join(known.rename(columns={"expected": "foretold"}), on="fact")
    middle = {name: table[column].abs().median() for name, column in OWN.items()}
    own = np.array([one[OWN[one["method"]]] for one in made.to_dict("records")], dtype=float)
    return made.assign(own=own, opener=made["opener"].astype(float), told=made["relative"].abs() < relative,
                       shrink=made["denominator_r"].abs() / np.abs(own),
                       expected=made["method"].map(middle) / np.abs(own),
                       ratio=made["update"] / made.groupby("run")["update"].transform("median"))


def lost(df):
    """What each test interval cost: RUN, kind (of KNOWN), start, step, lost, n; a row a kind and test.

    lost: of the n facts of that kind that were right when last asked (an edit made in between: when made), the share
    that is wrong at test `step`; start is the test before (0 at first).
    """
    out = []
    for kind, metrics in KNOWN.items():
        rows = df[df["metric"].isin(metrics)].sort_values("step", kind="stable")
        rows = rows.assign(before=rows.groupby(["run", "fact"], sort=False)["value"].shift())
        tests = rows[(rows["metric"] == metrics[-1]) & (rows["step"] > 0)]
        start = {run: dict(zip(steps, [0, *steps])) for run, steps in
                 tests.groupby("run")["step"].agg(lambda step: sorted(set(step))).items()}
        right = tests[tests["before"] >= 1]
        found = right.groupby([*RUN, "step"], sort=False)["value"].agg(lost=lambda value: (value < 1).mean(), n="size")
        out.append(found.reset_index().assign(kind=kind))
        out[-1]["start"] = [start[run][step] for run, step in zip(out[-1]["run"], out[-1]["step"])]
    return pd.concat(out, ignore_index=True)[[*RUN, "kind", "start", "step", "lost", "n"]]


def intervals(made, df):
    """`lost` with the updates of the interval: largest (ratio), fact of that update, jumps (ratio ≥ TRIGGER)."""
    out = []
    for row in lost(df).to_dict("records"):
        inside = made[(made["run"] == row["run"]) & (made["step"] > row["start"]) & (made["step"] <= row["step"])]
        if len(inside):
            top = inside.loc[inside["ratio"].idxmax()]
            out.append(row | {"largest": top["ratio"], "fact": top["fact"],
                              "jumps": int((inside["ratio"] >= TRIGGER).sum())})
    return pd.DataFrame(out, columns=[*RUN, "kind", "start", "step", "lost", "n", "largest", "fact", "jumps"])


def happened(made, df, phases=None, loss=LOSS):
    """`updates` with what happened: jump_3 (≥ MILDER), jump_5 (≥ TRIGGER), leads (largest of its test interval), lost
    (largest share of a kind lost in it, NaN after the last test), broke (a catastrophic phase begins at that test),
    disabling (jump_5 that leads, and broke or lost ≥ loss). phases: those of `analysis.phases`."""
    phases = analysis.phases(df) if phases is None else phases
    start = phases.set_index("run")["collapse"]
    table = intervals(made, df)
    found = {}
    for row in table.to_dict("records"):
        one = found.setdefault((row["run"], row["fact"]), {"lost": 0.0, "broke": False})
        one["lost"] = max(one["lost"], row["lost"] if row["n"] >= LEAST else 0.0)
        one["broke"] |= start.get(row["run"], np.nan) == row["step"]
    places = list(zip(made["run"], made["fact"]))
    leads = np.array([place in found for place in places])
    cost = np.array([found[place]["lost"] if place in found else np.nan for place in places])
    broke = np.array([place in found and found[place]["broke"] for place in places])
    made = made.assign(jump_3=made["ratio"] >= MILDER, jump_5=made["ratio"] >= TRIGGER, leads=leads, lost=cost,
                       broke=broke)
    return made.assign(disabling=made["jump_5"] & leads & (broke | (cost >= loss)))


def score(made, rules, event):
    """How well each Rule foretold the edits with `event` (a column of bool): a row a rule and run, and one pooled over
    runs (run ""): rule, run, edits, predicted, happened, hits, precision = hits / predicted, recall = hits / happened,
    each with its 95 % Wilson interval (…_low, …_high; NaN where there is nothing to divide by).
    """
    out = []
    for rule in rules:
        for run, part in (("", made), *made.groupby("run", sort=False)):
            told, true = part[rule.column] >= rule.limit - 1e-12, part[event].astype(bool)
            hits = int((told & true).sum())
            row = {"rule": rule.says, "run": run, "edits": len(part), "predicted": int(told.sum()),
                   "happened": int(true.sum()), "hits": hits}
            for name, n in (("precision", row["predicted"]), ("recall", row["happened"])):
                low, high = wilson(hits, n) if n else (np.nan, np.nan)
                row |= {name: hits / n if n else np.nan, f"{name}_low": low, f"{name}_high": high}
            out.append(row)
    return pd.DataFrame(out)


def ranking(values, hits):
    """(AUC, average precision) of `values` as a ranker of `hits` (bool): the chance that a hit outranks a miss, ties
    one half, and the mean of the precision at each hit, equal values taken together; NaN without hits or misses."""
    values, hits = np.asarray(values, dtype=float), np.asarray(hits, dtype=bool)
    if not 0 < hits.sum() < len(hits):
        return np.nan, np.nan
    levels, place = np.unique(-values, return_inverse=True)     # highest value first
    good, every = np.bincount(place, hits, len(levels)), np.bincount(place, minlength=len(levels))
    above = np.cumsum(good) - good / 2                          # hits ranked higher, half of those at the same value
    area = ((every - good) * above).sum() / (hits.sum() * (~hits).sum())
    return float(area), float((good * np.cumsum(good) / np.cumsum(every)).sum() / hits.sum())


def slope(made):
    """(b, r) of ‖ΔW‖ ∝ (1 / |own denominator|)^b, least squares on log-log points, and their correlation."""
    x, y = -np.log(made["own"].abs()), np.log(made["update"])
    return float(np.polyfit(x, y, 1)[0]), float(np.corrcoef(x, y)[0, 1])


def counts(made):
    """One row an editor: runs, edits, openers, jumps at both thresholds and how many of those open their prompt, the
    largest ratio, and the disabling edits."""
    opens = made["opener"] >= 1
    made = made.assign(three=made["jump_3"] & opens, five=made["jump_5"] & opens)
    found = made.groupby("editor", sort=False)
    return found.agg(runs=("run", "nunique"), edits=("step", "size"), openers=("opener", "sum"),
                     jumps_3=("jump_3", "sum"), openers_3=("three", "sum"), jumps_5=("jump_5", "sum"),
                     openers_5=("five", "sum"), largest=("ratio", "max"), disabling=("disabling", "sum")).astype(
                         {"openers": int})


def success(made, df, metrics=("ES_exact", "PS", "NS")):
    """How well new edits took, in %, one row an editor: columns (metric, "openers" or "others")."""
    kind = made.set_index(["run", "fact"])["opener"].ge(1).map({True: "openers", False: "others"})
    rows = df[df["metric"].isin(metrics)]
    rows = rows.assign(kind=kind.reindex(pd.MultiIndex.from_frame(rows[["run", "fact"]])).to_numpy()).dropna(
        subset="kind")
    found = 100 * rows.pivot_table("value", "editor", ["metric", "kind"], aggfunc="mean", sort=False)
    return found[[column for metric in metrics for column in found if column[0] == metric]]


def leap(made, df):
    """The largest update: editor, run, step, subject, ratio, and the relative distance ‖ΔW‖/‖W‖ before and after it."""
    top = made.loc[made["ratio"].idxmax()]
    moved = df[(df["run"] == top["run"]) & (df["metric"] == "relative")].groupby("step")["value"].mean()
    earlier = moved[moved.index < top["step"]]
    return {name: top[name] for name in ("editor", "run", "step", "subject", "ratio")} | {
        "before": earlier.iloc[-1] if len(earlier) else 0.0, "after": moved[top["step"]]}


def said(counts):
    """'ROME: 10 of 600 updates, 9 of them openers, the largest 10.6; r-ROME: none of 240, the largest 2.7' of `counts`,
    at MILDER medians."""
    words = []
    for editor, one in counts.to_dict("index").items():
        found = (f"{one['jumps_3']} of {one['edits']:,} updates, {one['openers_3']} of them openers" if one["jumps_3"]
                 else f"none of {one['edits']:,}")
        words.append(f"{editor}: {found}, the largest {one['largest']:.1f}")
    return "; ".join(words)


def price(made, df):
    """'Openers right just after their edit (every token): ROME 100 %; r-ROME 0 %', by editor, from the rows."""
    found = success(made, df, ("ES_exact",)).get(("ES_exact", "openers"), pd.Series(dtype=float)).dropna()
    words = "; ".join(f"{editor} {value:.0f} %" for editor, value in found.items())
    return f"Openers right just after their edit (every token): {words or 'none edited'}"


def summary(table, made, pooled, model):
    """Three Markdown lines: what was predicted, how well, what it did. made: ROME's edits; pooled: {event: rows of
    `score` over all runs}, with jump_3 in it."""
    opens, best = table["opener"], pooled["jump_3"].iloc[0]
    return "\n".join([
        f"- Predicted on {model} before the first edit: {opens.sum()} of {len(table):,} facts open their prompt with a "
        f"one-token subject; median denominator {table.loc[opens, 'relative'].abs().median():.2f} of the mean key's, "
        f"of the others {table.loc[~opens, 'relative'].abs().median():.2f}.",
        f"- Of the edits so predicted {best['hits']} of {best['predicted']} were {MILDER:g} median updates or longer, "
        f"of such updates {best['hits']} of {best['happened']} were predicted. The largest: {made['ratio'].max():.1f} "
        f"medians.", f"- {verdict(made)}"])


def verdict(made):
    """'No edit of 600 in 5 runs disables the model by itself: …', with the rule."""
    count, runs = int(made["disabling"].sum()), made["run"].nunique()
    return (f"{count or 'No'} edit{'s' if count > 1 else ''} of {len(made):,} in {runs} run{'s' if runs > 1 else ''} "
            f"disable{'' if count > 1 else 's'} the model: jumps of {TRIGGER:g} medians at which it breaks, or after "
            f"which {100 * LOSS:.0f} % of what it knew is wrong at the next test.")
