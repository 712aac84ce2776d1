"""The rows and phases of runs in; each method's figures of merit, alone and beside the paper's, out.

The paper is arXiv 2401.07453; its values are GPT-J's, read off its figures (about ±1 % of an axis), so they are targets
of shape and not of value for any other model.
"""

import numpy as np
import pandas as pd

from editcore import analysis_old as analysis

TRIGGER = 5.0   # an edit is called disabling if its update is this many times the run's median update ...
PART = 0.5      # ... and at least this share of what the distance grew by over the test interval of the collapse

QUANTITIES = {  # key in `table`: (words beside the numbers, format here)
    "early": ("new edits in the gradual phase, %: efficacy ES / paraphrases PS / locality NS", "{}"),
    "whole": ("new edits in the whole run, %: ES / PS / NS", "{}"),
    "duration": ("duration: edits before the collapse", "{:.0f}"),
    "ability_before": ("few-shot ability left at the last test before the collapse, %", "{:.0f}"),
    "ability_end": ("few-shot ability left at the end, %", "{:.0f}"),
    "until_1": ("edits until 1 % of few-shot ability is lost", "{:.0f}"),
    "until_10": ("edits until 10 % of few-shot ability is lost", "{:.0f}"),
    "forgotten_before": ("earlier edits failing at the last test before the collapse, %", "{:.1f}"),
    "forgotten_end": ("earlier edits failing at the end, %", "{:.1f}"),
    "absorbing_before": ("earlier edits that ever failed, at the last test before the collapse, %", "{:.1f}"),
    "absorbing_end": ("earlier edits that ever failed, at the end, %", "{:.1f}"),
    "recovered": ("of those that ever failed, right again at the end, %", "{:.1f}"),
    "untouched_end": ("never-edited facts right at the end, %", "{:.1f}"),
    "exponent": ("distance ∝ n^b in the gradual phase: b", "{:.2f}"),
    "largest": ("largest update, in median updates", "{:.1f}"),
    "disabling": ("a single disabling edit", "{}"),
}
PAPER = {   # GPT-J, the same keys; what the paper's figures do not show is left out
    "rome": {"early": "100 / 100 falling to 92 / 76 (20) falling to 66 (500)", "duration": "559",
             "absorbing_before": "8.0 (559)", "absorbing_end": "98.5 (900)",
             "ability_before": "SST-2 92.9 (50), 74 (500)", "ability_end": "SST-2 0 (from 835)", "disabling": "yes"},
    "memit": {"early": "100 (to about 1,260) / - / -", "duration": "about 1,200", "absorbing_before": "14 (1,100)",
              "absorbing_end": "99 (1,300)", "ability_before": "SST-2 92 to 1,215", "ability_end": "SST-2 0 (by 1,280)",
              "exponent": "0.48 to 0.52 (GPT2-XL)", "disabling": "no"},
    "ft": {"whole": "100 / about 70 / 25 to 42", "ability_end": "SST-2 lost by 60 to 200 edits",
           "absorbing_end": "46 (40), 84 (900)"},
}


def table(df, phases):
    """One row an editor, means over its runs: the keys of QUANTITIES in % or edits (`disabling`: yes, no or nothing).

    df: rows with the derived ones (`analysis.with_derived`); phases: `analysis.phases`. The gradual phase is the steps
    before the collapse, or the whole run; `duration` is the last edit before it (the run's length if there is none),
    `broke` the same, the median of the runs that collapse alone; `runs` is how many there are.
    """
    lost = {key: analysis.edits_until(df, share).set_index("run")["until"]
            for key, share in (("until_1", 0.01), ("until_10", 0.10))}
    able = analysis.ability(df)
    rows = [_merits(df[df["run"] == one.run], able[able["run"] == one.run].set_index("step")["ability"], one)
            | {key: until.get(one.run, np.nan) for key, until in lost.items()} for one in phases.itertuples()]
    every = pd.DataFrame(rows)
    words = every.groupby("editor", sort=False)["disabling"].agg(lambda several: ", ".join(sorted(set(several) - {""})))
    counts, broke = every["editor"].value_counts(), phases.groupby("editor")["collapse"].median() - 1
    means = every.drop(columns="disabling").groupby("editor", sort=False).mean()
    return means.assign(disabling=words, runs=counts, broke=broke)


def _merits(part, able, phase):
    end = part["step"].max()
    start = end + 1 if np.isnan(phase.collapse) else phase.collapse
    early, wide = part[part["step"] < start], part[part["fact"] == ""].pivot_table("value", "step", "metric")
    before = wide[wide.index < start]
    means = {name + key: 100 * rows.loc[rows["metric"] == name, "value"].mean()
             for name in ("ES", "PS", "NS") for key, rows in (("", early), ("_all", part))}
    return means | {
        "editor": phase.editor, "edits": end, "collapsed": float(start <= end), "duration": start - 1,
        "NS_fall": fall(early, "NS"), "absorbing_40": 100 * _at(wide, "forgotten_absorbing", 40),
        "absorbing_500": 100 * _at(wide, "forgotten_absorbing", 500),
        "ability_before": 100 * _last(able[able.index < start]), "ability_end": 100 * _last(able),
        "forgotten_before": 100 * _last(before.get("forgotten_now")),
        "forgotten_end": 100 * _last(wide.get("forgotten_now")),
        "absorbing_before": 100 * _last(before.get("forgotten_absorbing")),
        "absorbing_end": 100 * _last(wide.get("forgotten_absorbing")), "recovered": 100 * _last(wide.get("recovered")),
        "untouched_end": 100 * _last(wide.get("untouched")), "exponent": exponent(early),
        "largest": largest(part), "disabling": disabling(part, phase.collapse)}


def _last(series):
    series = pd.Series(dtype=float) if series is None else series.dropna()
    return series.iloc[-1] if len(series) else np.nan


def _at(wide, metric, step):
    later = wide.get(metric, pd.Series(dtype=float)).dropna()
    later = later[later.index >= step]
    return later.iloc[0] if len(later) else np.nan


def fall(early, metric, part=0.2):
    """Points (of 100) that a metric of new edits falls from the first to the last `part` of these rows' steps."""
    values = early[early["metric"] == metric].groupby("step")["value"].mean()
    count = max(1, int(part * len(values)))
    return 100 * (values.iloc[:count].mean() - values.iloc[-count:].mean()) if len(values) else np.nan


def exponent(part, first=10):
    """b of relative distance ∝ n^b, least squares on log-log points from edit `first` on; NaN with under three."""
    matrices = part[(part["metric"] == "relative") & ~part["fact"].str.endswith(".bias")]
    moved = matrices[matrices["step"] >= first].groupby("step")["value"].mean()
    moved = moved[moved > 0]
    return float(np.polyfit(np.log(moved.index), np.log(moved), 1)[0]) if len(moved) >= 3 else np.nan


def largest(part):
    """The run's largest update of a matrix, in units of that matrix's median update; NaN without updates."""
    rows = part[(part["metric"] == "update") & ~part["fact"].str.endswith(".bias")].groupby("fact")["value"]
    return (rows.max() / rows.median()).max()


def disabling(part, collapse):
    """'yes' if one update stands out in the test interval that ends at `collapse` (TRIGGER, PART; in any edited
    matrix), else 'no'; '' without a collapse or without distances. part: the rows of one run."""
    tests = part.loc[part["metric"] == "forgotten_now", "step"]
    before, found = max(tests[tests < collapse], default=0), []
    for name, moved in analysis.distance(part).groupby("parameter"):
        if name.endswith(".bias"):
            continue
        moved = moved.sort_values("step").set_index("step")
        weight = moved["update"].iloc[0] / moved["relative"].iloc[0]    # norm of W: the first total is the first update
        total = weight * moved["relative"]
        grown = _last(total[total.index <= collapse]) - np.nan_to_num(_last(total[total.index <= before]))
        inside = moved["update"][(moved.index > before) & (moved.index <= collapse)].max()
        found.append(inside >= TRIGGER * moved["update"].median() and inside >= PART * grown)
    return "" if np.isnan(collapse) or not found else "yes" if any(found) else "no"


def collapse(merits, editor):
    """'collapse after 559 edits, 8 % failing before', 'no collapse in 800 edits', or in how many runs."""
    one = merits.loc[editor]
    if one["collapsed"] == 0:
        return f"no collapse in {one['edits']:.0f} edits"
    if one["collapsed"] < 1:
        return f"collapse in {partly(one)} of {one['edits']:.0f} edits, after {one['broke']:.0f} (median)"
    return f"collapse after {one['duration']:.0f} edits, {one['forgotten_before']:.0f} % of the earlier failing by then"


def beside_paper(merits):
    """QUANTITIES by editor, here and in the paper (GPT-J): a table of texts; '-' where something was not measured."""
    table = {}
    for editor, one in merits.iterrows():
        one = one.to_dict() | {key: " / ".join(f"{one[name + end]:.1f}" for name in ("ES", "PS", "NS"))
                               for key, end in (("early", ""), ("whole", "_all"))}
        here = {key: form.format(one[key]) if one[key] == one[key] and one[key] != "" else "-"
                for key, (_, form) in QUANTITIES.items()}
        if one["collapsed"] < 1:
            here["duration"] = (f"{one['broke']:.0f} in {partly(one)}" if one["collapsed"] else
                                f"more than {one['edits']:.0f}")
            here["disabling"] = here["disabling"] if one["collapsed"] else "no collapse"
        never = "-" if np.isnan(one["ability_end"]) else f"more than {one['edits']:.0f}"
        here |= {key: never for key in ("until_1", "until_10") if np.isnan(one[key])}
        table[editor, "here"] = here
        table[editor, "paper"] = {key: PAPER.get(editor, {}).get(key, "-") for key in QUANTITIES}
    return pd.DataFrame(table).rename(index={key: words for key, (words, _) in QUANTITIES.items()})


def headline(merits, seconds):
    """The table of the index page, texts, one row an editor; seconds: Series of seconds an edit by editor."""
    last = [collapse_step(one) for _, one in merits.iterrows()]
    paper = [PAPER.get(editor, {}).get("duration", "-") for editor in merits.index]
    table = {"gradual phase, edits": last, "in the paper (GPT-J)": paper}
    table |= {name: [share(value) for value in merits[key]] for name, key in (
        ("ES", "ES_all"), ("NS", "NS_all"), ("forgotten", "forgotten_end"), ("untouched facts right", "untouched_end"),
        ("ability left", "ability_end"))}
    table["disabling edit"] = [word or "no collapse" for word in merits["disabling"]]
    table["seconds an edit"] = [f"{seconds[editor]:.2f}" for editor in merits.index]
    return pd.DataFrame(table, index=merits.index)


def share(value):
    """'81 %'; '-' for NaN; 'none' below 0, which is an ability below chance: answers that cannot be read."""
    return "-" if np.isnan(value) else "none" if value < 0 else f"{value:.0f} %"


def collapse_step(one):
    """'559' or 'all 800': how long the gradual phase of one row of `table` lasted."""
    if 0 < one["collapsed"] < 1:
        return f"{one['broke']:.0f} in {partly(one)}, else all {one['edits']:.0f}"
    return f"{one['duration']:.0f}" if one["collapsed"] else f"all {one['edits']:.0f}"


def partly(one):
    """'1 of 5 runs': in how many the collapse comes, of one row of `table`."""
    return f"{one['collapsed'] * one['runs']:.0f} of {one['runs']:.0f} runs"
