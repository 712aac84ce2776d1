"""The rows of runs in; signals that every edit gives without a test, scored as warnings of what is lost soon, out.

A signal's value at edit n is known once n is made. It should foretell a loss within the next `Rule.ahead` edits: the
collapse, or some points of the never-edited facts. Scored by concordance within a run (`foresight.auc`, its null rolled
around in time), by lead time, and by false alarms at limits that are fixed here.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from editcore import analysis_old as analysis
from editcore.depth import moved
from editcore.foresight import auc


@dataclass(frozen=True)
class Signal:
    """Something known at every edit without a test."""

    says: str       # what it is, in words
    limit: float    # alarm at or above it


SIGNALS = {
    "update": Signal("update, in medians of those before", 3.0),
    "drift": Signal("growth of ‖ΔW‖², in random walks", 1.5),
    "exponent": Signal("local exponent of ‖ΔW‖ ∝ n^b", 0.75),
    "spectral": Signal("‖ΔW‖₂ / ‖ΔW‖_F, in its first value", 1.5),
    "loss": Signal("loss left, in medians of those before", 2.0),
    "steps": Signal("optimiser steps, in medians of those before", 2.0),
    "value": Signal("‖v*‖, in medians of those before", 2.0),
    "before": Signal("P(true) lost on facts not yet edited", 0.10),
    "edits": Signal("edits made so far, no warning but time", np.inf),
}
REPORTED = {"loss": "edit_losses", "steps": "edit_evaluations", "value": "edit_value_norm"}    # rows behind a signal
EVENTS = {"collapse": "the collapse", "untouched": "loss of never-edited facts", "fastest": "fastest loss of margin"}
FEW = 5     # events under which a score says little


@dataclass(frozen=True)
class Rule:
    """What is to be foretold, and how far back a signal looks; `str(rule)` states it."""

    ahead: int = 20         # edits within which it is to happen
    loss: float = 0.05      # fall of the share of never-edited facts answered right
    part: float = 0.2       # of a run's edits, those before the fastest losses of the never-edited facts' margin
    window: int = 10        # edits that the local exponent, the growth and the facts not yet edited are taken over
    least: int = 5          # edits before a median of "those before" is taken

    def __str__(self):
        return (f"To be foretold, within {self.ahead} edits: the collapse; a fall of at least {100 * self.loss:g} "
                f"points of the never-edited facts that are answered right; and, since a run may have neither, the "
                f"fastest {self.part:.0%} of its own losses of these facts' margin, P(true) - P(other). Edits for "
                f"which the run ends before that can be told are left out, and those after a collapse. Signals look "
                f"back over {self.window} edits, or take all edits before as the measure, and give the alarm at fixed "
                f"limits: "
                + "; ".join(f"{one.says}: {one.limit:g}" for one in SIGNALS.values() if np.isfinite(one.limit))
                + f". Under {FEW} events a score says little.")


def signals(part, rule=None):
    """Table with index step and those columns of SIGNALS that the rows of one run have, the worst matrix in each."""
    rule, found = rule or Rule(), {}
    for name, table in moved(part).items():
        steps, log = pd.Series(np.log(table.index), table.index), np.log(table["total"])
        grown = (table["total"] ** 2).diff(rule.window)
        found.setdefault("update", []).append(_relative(table["update"], rule))
        found.setdefault("drift", []).append(grown / (table["update"] ** 2).rolling(rule.window).sum())
        found.setdefault("exponent", []).append(
            log.rolling(rule.window).cov(steps) / steps.rolling(rule.window).var())
        wide = part[(part["metric"] == "spectral") & (part["fact"] == name)].set_index("step")["value"]
        ratio = (wide / table["total"]).dropna()
        if len(ratio):
            found.setdefault("spectral", []).append((ratio / ratio.iloc[0]).reindex(table.index).ffill())
    for name, metric in REPORTED.items():
        rows = part[part["metric"] == metric]
        found[name] = [_relative(rows.groupby("step")["value"].max(), rule)] if len(rows) else []
    margin = part[part["metric"] == "before_ES_prob"].groupby("step")["value"].mean().rolling(rule.window).mean()
    found["before"] = [margin - margin.dropna().iloc[0]] if margin.notna().any() else []
    columns = {name: pd.concat(found[name], axis=1).max(axis=1) for name in SIGNALS if found.get(name)}
    columns["edits"] = pd.Series(np.arange(1.0, part["step"].max() + 1), np.arange(1, part["step"].max() + 1))
    return pd.DataFrame(columns).rename_axis("step").replace([np.inf, -np.inf], np.nan)


def _relative(series, rule):
    """Each value in medians of those before it; NaN for the first `rule.least`."""
    return series / series.expanding(rule.least).median().shift(1)


def ahead(part, collapse=np.nan, rule=None):
    """Table with index step (every edit of one run) and columns of EVENTS: 1 if it happens within the next rule.ahead
    edits (fastest: if these lose more margin than all but rule.part of the run's), 0 if not, NaN where the run does not
    tell, which is also from the collapse on."""
    rule = rule or Rule()
    steps = np.arange(1, int(part["step"].max()) + 1)
    to_come = collapse - steps
    first = np.select([to_come <= 0, to_come <= rule.ahead], [np.nan, 1.0], 0.0)
    if np.isnan(collapse):
        first = np.where(steps + rule.ahead <= steps[-1], 0.0, np.nan)
    known = analysis.untouched(part).set_index("step")["value"].sort_index()
    margin = part[part["metric"] == "untouched_ES_prob"].groupby("step")["value"].mean()
    fell, told = _falls(known, steps, rule)
    second = np.where(fell >= rule.loss - 1e-9, 1.0, np.where(told, 0.0, np.nan))
    slipped, told = _falls(margin, steps, rule)
    gone = steps >= np.nan_to_num(collapse, nan=np.inf)
    second[gone], slipped[gone | ~told] = np.nan, np.nan
    limit = np.nanquantile(slipped, 1 - rule.part) if (~np.isnan(slipped)).any() else np.nan
    third = np.where(np.isnan(slipped), np.nan, (slipped > limit).astype(float))
    return pd.DataFrame(dict(zip(EVENTS, (first, second, third))), index=pd.Index(steps, name="step"))


def _falls(series, steps, rule):
    """(how far a tested series is at its lowest within rule.ahead edits below its last test, by edit, NaN untested;
    whether the tests reach that far ahead)."""
    falls, told = np.full(len(steps), np.nan), np.zeros(len(steps), dtype=bool)
    for i, step in enumerate(steps):
        before, after = series[series.index <= step], series[series.index > step]
        within = after[after.index <= step + rule.ahead]
        if len(before) and len(within):
            falls[i], told[i] = before.iloc[-1] - within.min(), series.index[-1] >= step + rule.ahead
    return falls, told


def onsets(soon):
    """Steps at which an event happens: where a stretch of edits that see it within reach ends. soon: column of
    `ahead`. (The stretch's last edit is the one before the test that shows the loss.)"""
    seen = soon == 1
    return [int(step) + 1 for step in soon.index[seen & ~seen.shift(-1, fill_value=False)]]


def watch(df, phases, rule=None):
    """One row an edit of each run: run, editor, step, the columns of `signals`, and those of `ahead`."""
    rule, starts, parts = rule or Rule(), phases.set_index("run")["collapse"], []
    for run, part in df.groupby("run", sort=False):
        table = ahead(part, starts.get(run, np.nan), rule).join(signals(part, rule))
        parts.append(table.reset_index().assign(run=run, editor=part["editor"].iloc[0]))
    return pd.concat(parts, ignore_index=True)


def scores(table, rule=None):
    """Each signal as a warning of each event, by editor: editor, event, signal, runs, onsets (events that happened),
    caught (with an alarm within reach before), lead (median edits from the first such alarm), false (alarms per 100
    edits that no event follows), few (too few onsets to tell), and the columns of `foresight.auc`. table: `watch`."""
    rule, out = rule or Rule(), []
    for editor, part in table.groupby("editor", sort=False):
        for event in EVENTS:
            for name in (name for name in SIGNALS if name in part and part[name].notna().any()):
                quiet = part[(part[event] == 0) & part[name].notna()]
                leads = [lead for _, one in part.groupby("run")
                         for lead in _leads(one.set_index("step"), name, event, rule)]
                known = [lead for lead in leads if lead == lead]
                out.append({"editor": editor, "event": event, "signal": name, "runs": part["run"].nunique(),
                            "onsets": len(leads), "caught": len(known),
                            "lead": np.median(known) if known else np.nan,
                            "false": 100 * (quiet[name] >= SIGNALS[name].limit).mean() if len(quiet) else np.nan,
                            "few": len(leads) < FEW} | auc(part, name, event, null="shift"))
    return pd.DataFrame(out)


def _leads(one, name, event, rule):
    """Edits from the first alarm within reach to each onset of one run; NaN where there was none."""
    alarms = one.index[one[name] >= SIGNALS[name].limit]
    inside = [alarms[(alarms >= at - rule.ahead) & (alarms < at)] for at in onsets(one[event])]
    return [at - found[0] if len(found) else np.nan for at, found in zip(onsets(one[event]), inside)]


def said(scores):
    """'ROME: no collapse; 1 loss of never-edited facts, too few to score; …' from `scores`: signals that stand out."""
    words = []
    for editor, part in scores.groupby("editor", sort=False):
        found = []
        for event, name in EVENTS.items():
            own = part[part["event"] == event]
            count = int(own["onsets"].max())
            time = own.set_index("signal")["auc"].get("edits", np.nan)
            clear = own[(own["p"] * len(own) < 0.05) & (own["signal"] != "edits")]      # Bonferroni over the signals
            told = ", ".join(f"{one.signal} AUC {one.auc:.2f}" for one in clear.itertuples()) or "none stands out"
            told += f" (the number of edits alone: {time:.2f})" if len(clear) and time == time else ""
            few = f", fewer than {FEW}: no verdict" if count < FEW else f", signals of it: {told}"
            found.append(f"{count} × {name}{few if count else ''}")
        words.append(f"{editor}: " + ", ".join(found))
    return "; ".join(words)


def table(scores):
    """`scores` as texts to read, events that happened only: one row an event, method and signal."""
    seen = scores[scores["onsets"] > 0]
    share = [f"{one.auc:.2f}" if one.auc == one.auc else "-" for one in seen.itertuples()]
    over = [f"{one.low:.2f} to {one.high:.2f}" if one.low == one.low else "-" for one in seen.itertuples()]
    null = [f"{one.null_low:.2f} to {one.null_high:.2f}" if one.auc == one.auc else "-" for one in seen.itertuples()]
    return pd.DataFrame({
        "before": [EVENTS[event] for event in seen["event"]], "method": seen["editor"].to_numpy(),
        "signal": [SIGNALS[name].says for name in seen["signal"]],
        "alarm at": [f"{SIGNALS[name].limit:g}".replace("inf", "-") for name in seen["signal"]],
        "AUC": share, "over runs": over, "knowing nothing": null,
        "caught": [f"{one.caught} of {one.onsets}" for one in seen.itertuples()],
        "edits ahead": [f"{lead:.0f}" if lead == lead else "-" for lead in seen["lead"]],
        "false alarms per 100 edits": [f"{false:.1f}" if false == false else "-" for false in seen["false"]]})
