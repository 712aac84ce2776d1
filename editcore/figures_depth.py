"""Tables of forgetting in depth (depth, foresight, alarms) in, matplotlib figures out."""

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from matplotlib.ticker import LogLocator
from scipy import stats

from editcore.alarms import EVENTS, SIGNALS
from editcore.depth import LEVEL, RANDOM, survival
from editcore.figures_old import plain_log
from editcore.foresight import PREDICTORS
from editcore.look import WIDTH, curves, draw, legend, methods_in, note, style

GREY = "#9a9a9a"
ABILITIES = {"tasks": "few-shot tasks", "facts": "never-edited facts", "facts_prob": "their probability",
             "perplexity": "perplexity"}    # short names of delay.ABILITIES
EDGE = {"capsize": 2.5, "linestyle": "none", "markersize": 5}


def matrix(table):
    """Of the edits made in a class (rows), the share still right when asked in a later one (columns): a heat map a
    method. table: `depth.matrix`."""
    methods = methods_in(table)
    fig, axes = plt.subplots(1, len(methods), figsize=(WIDTH, 0.9 + WIDTH / max(3, len(methods)) * 0.82),
                             sharey=True, squeeze=False)
    for ax, method in zip(axes[0], methods):
        part = table[table["editor"] == method]
        wide = 100 * part.pivot(index="made", columns="tested", values="retained")
        wide.index = [f"{made + 1:.0f}-" for made in wide.index]
        wide.columns = [f"{tested:.0f}" for tested in wide.columns]
        sns.heatmap(wide, ax=ax, vmin=0, vmax=100, cmap="viridis", annot=wide.size <= 49, fmt=".0f",
                    annot_kws={"size": 8.5}, linewidths=0.5, cbar=method == methods[-1],
                    cbar_kws={"label": "still right, %"})
        ax.set(title=style(method, methods)["label"], xlabel="asked after so many edits", ylabel="")
        ax.tick_params(axis="both", rotation=0)
        ax.grid(False)
    axes[0, 0].set_ylabel("made as edit number")
    note(fig, f"Edits that succeeded when made; mean over {_runs(table['runs'])}. Exact match of every token.")
    return fig


def lasting(ages, halves, alive):
    """Retention by age with its exponential fit, and the share of edits that have never failed by an age.

    ages: `depth.by_age`; halves: `depth.half_lives`; alive: `depth.edit_survival`.
    """
    methods = methods_in(ages)
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.9), sharey=True)
    for method in methods:
        look = style(method, methods)
        part = ages[ages["editor"] == method].sort_values("age")
        error = np.nan_to_num(np.array([part["retained"] - part["low"], part["high"] - part["retained"]])).clip(min=0)
        axes[0].errorbar(part["age"], 100 * part["retained"], yerr=100 * error, capsize=3, **look)
        one = halves[halves["editor"] == method].iloc[0]
        if np.isfinite(one["rate"]):
            line = np.linspace(0, one["oldest"], 60)
            axes[0].plot(line, 100 * np.exp(-one["rate"] * line), color=look["color"], linewidth=0.9, linestyle=":")
        own = alive[alive["editor"] == method]
        own = 100 * own.set_index("step")[["surviving", "low", "high"]].rename(columns={"surviving": "mean"})
        draw(axes[1], own, method, methods)
    axes[0].axhline(50, color=GREY, linewidth=1, zorder=1)
    axes[0].set(title="Right at this age", xlabel="age: edits made since", ylabel="edits, %", ylim=(-3, 103))
    axes[1].set(title="Never failed by this age", xlabel="age: edits made since")
    legend(fig, axes[0])
    bands = "95 % interval over runs" if ages["runs"].max() > 1 else "Greenwood's 95 % interval, edits as independent"
    note(fig, f"Dotted: exponential forgetting fitted to all re-tests. Grey: half. Band: {bands}. "
              f"{_runs(halves['runs']).capitalize()} a method.")
    return fig


def events(phases, lives):
    """{title: `depth.survival`}: the collapse (`analysis.phases`), then each share of each ability (`delay.lives`)."""
    return {"collapse": survival(phases, "collapse")} | {
        f"{100 * share:g} % of {ABILITIES.get(name, name)}": survival(part, "until")
        for (name, share), part in lives.groupby(["ability", "share"], sort=False)}


def lives(panels, count):
    """Survival of runs: share that have not met an event by n edits, a panel an event, with 95 % bands.

    panels: `events`; count: runs a method, in words.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(WIDTH, 0.8 + 1.95 * rows), sharex=True, sharey=True, squeeze=False)
    for ax, (title, table) in zip(axes.ravel(), panels.items()):
        methods = methods_in(table)
        for method in methods:
            part, look = table[table["editor"] == method], style(method, methods)
            ax.step(part["step"], 100 * part["surviving"], where="post", **look)
            ax.fill_between(part["step"], 100 * part["low"], 100 * part["high"], step="post", alpha=0.12, linewidth=0,
                            color=look["color"])
        ax.set(title=title, ylim=(-4, 104))
    for ax in axes.ravel()[len(panels):]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("edits made, n")
    for ax in axes[:, 0]:
        ax.set_ylabel("runs, %")
    legend(fig, axes)
    note(fig, "Kaplan and Meier's estimate, runs without the event censored at their end; bands: log(-log) 95 % "
              f"intervals.\n{count[0].upper()}{count[1:]}.")
    return fig


def overlap(shares, scores, outcome="weakened"):
    """Edits lost by class of what key overlap foretold, and how well each predictor orders them.

    shares: `foresight.deciles`; scores: `foresight.overlap_scores`; outcome: a column of `foresight.fates`.
    """
    methods = methods_in(shares)
    fig, axes = plt.subplots(1, len(methods) + 1, figsize=(WIDTH, 3.9), squeeze=False,
                             width_ratios=[1] * len(methods) + [1.1])
    for ax, method in zip(axes[0], methods):
        part, look = shares[shares["editor"] == method], style(method, methods)
        error = 100 * np.array([part["share"] - part["low"], part["high"] - part["share"]]).clip(min=0)
        ax.errorbar(part["group"], 100 * part["share"], yerr=error, capsize=2.5, **look | {"linestyle": "-"})
        ax.plot(part["group"], 100 * part["by_age"], color="#444444", linewidth=1.1, linestyle=":",
                label="expected from their ages")
        ax.set(title=look["label"], xlabel="class of foretold disturbance", ylim=(0, None),
               xticks=[1, int(part["group"].max())])
    axes[0, 0].set_ylabel(f"edits {outcome}, %")
    _foretold(axes[0, -1], scores[scores["outcome"] == outcome], methods)
    legend(fig, axes[0, :-1])
    note(fig, "Bars: left, Wilson's 95 % interval; right, 95 % interval over runs. Filled: among all edits of a run; "
              "hollow: among those of equal age.\nGrey: 95 % of scores that know nothing. "
              f"{_runs(scores['runs']).capitalize()} a method.")
    return fig


def _foretold(ax, scores, methods):
    """AUC of each predictor: a dot a method, filled among all edits, hollow at equal age, over the null's range."""
    names = [name for name in PREDICTORS if name in set(scores["predictor"])]
    kinds = [(method, among) for method in methods for among in ("all edits", "equal age")]
    for shift, (method, among) in enumerate(kinds):
        part = scores[(scores["editor"] == method) & (scores["among"] == among)].set_index("predictor").reindex(names)
        place = np.arange(len(names)) + 0.7 / len(kinds) * (shift - (len(kinds) - 1) / 2)
        _dots(ax, part, place, style(method, methods), among == "equal age")
    _areas(ax, "Was the lost one foretold?", [PREDICTORS[name] for name in names])


def _dots(ax, part, place, look, hollow, half=False):
    """Horizontal dots (filled, hollow or half) with intervals at heights `place`, and grey bars for the null."""
    ax.hlines(place, part["null_low"], part["null_high"], color="#d9d9d9", linewidth=4, zorder=1)
    error = np.nan_to_num(np.array([part["auc"] - part["low"], part["high"] - part["auc"]])).clip(min=0)
    ax.errorbar(part["auc"], place, xerr=error, **EDGE, color=look["color"], marker=look["marker"], zorder=3,
                markerfacecolor="white" if hollow else look["color"], markerfacecoloralt="white",
                fillstyle="left" if half else "full")


def _areas(ax, title, names):
    """An axis of AUCs from 0 to 1, a row a name, chance at one half."""
    ax.axvline(0.5, color="#555555", linewidth=1)
    ax.set(title=title, xlabel="AUC", xlim=(0, 1.02), yticks=range(len(names)), ylim=(len(names) - 0.45, -0.55),
           yticklabels=[name.replace(", ", ",\n") for name in names])
    ax.tick_params(axis="y", labelsize=8)


def controls(df):
    """The real updates beside random ones of the same norms: never-edited facts, their margin, perplexity, distance.

    df: rows with the derived ones (`analysis.with_derived`).
    """
    methods, end = methods_in(df), df["step"].max()
    fig, axes = plt.subplots(1, 4, figsize=(WIDTH, 3.4))
    panels = {"untouched": ("Never-edited facts\nright, %", 100), "perplexity": ("Perplexity,\nheld-out text", 1),
              "untouched_ES_prob": ("Their margin\nP(true) - P(other)", 1), "relative": ("‖ΔW‖ / ‖W‖\n", 1)}
    for ax, (metric, (title, scale)) in zip(axes, panels.items()):
        for method, table in curves(df, metric, scale=scale).items():
            apart = {"color": "#333333", "linestyle": (0, (4, 2))} if method == RANDOM["v"] else {}
            draw(ax, table[table.index > 0] if metric == "relative" else table, method, methods, **apart)
        ax.set(title=title, xlabel="edits made, n", xlim=(0, end))
    axes[-1].set(xscale="log", yscale="log", xlim=(1, end))
    for axis in (axes[-1].xaxis, axes[-1].yaxis):
        plain_log(axis)
    axes[-1].xaxis.set_major_locator(LogLocator())      # a narrow panel: powers of ten only
    axes[-1].tick_params(axis="both", which="both", labelsize=8)
    legend(fig, axes)
    note(fig, "Every random update has the norm of the method's for the same fact. Band: 95 % interval of the mean "
              "over runs, of two runs none. "
              f"{_runs(df.groupby('editor')['run'].nunique()).capitalize()} a line.")
    return fig


def warnings(trace, walks, scores):
    """Is the distance a random walk, and does what departs from it warn of a loss?

    trace: `alarms.watch`; walks: `depth.over_runs`; scores: `alarms.scores`.
    """
    methods = methods_in(trace)
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 4.3), width_ratios=[1, 0.75, 1.05])
    for place, method in enumerate(methods):
        look, part = style(method, methods), trace[trace["editor"] == method]
        found = part.groupby("step")["drift"].agg(["mean", "sem", "count"]).dropna(subset="mean")
        error = np.nan_to_num(stats.t.ppf((1 + LEVEL) / 2, found["count"] - 1) * found["sem"])
        draw(axes[0], found.assign(low=found["mean"] - error, high=found["mean"] + error), method, methods)
        one = walks[walks["editor"] == method]
        error = [one["exponent"] - one["exponent_low"], one["exponent_high"] - one["exponent"]]
        axes[1].errorbar(one["exponent"], [place] * len(one), xerr=np.nan_to_num(np.array(error)).clip(min=0), **EDGE,
                         color=look["color"], marker=look["marker"])
    axes[0].axhline(1, color="#555555", linewidth=1)
    axes[0].set(title="Growth of ‖ΔW‖²,\nin random walks", xlabel="edits made, n", ylim=(0, None))
    axes[1].axvline(0.5, color="#555555", linewidth=1)
    axes[1].set(title="Exponent b of\n‖ΔW‖ ∝ n^b", xlabel="b", ylim=(len(methods) - 0.5, -0.5),
                yticks=range(len(methods)), yticklabels=[style(method, methods)["label"] for method in methods])
    _warned(axes[2], scores[~scores["few"]].dropna(subset=["auc"]), methods)
    legend(fig, axes[0])
    note(fig, "Left: over the edits just made; band, t interval over runs, 95 %. Middle: the same of the exponent."
              " Right: filled, before the\ncollapse; hollow, before a loss of never-edited facts; half, before "
              "the fastest losses of their margin; grey: 95 % of the signal rolled\naround in time. "
              f"{_runs(walks['runs']).capitalize()} a method.")
    return fig


def _warned(ax, scores, methods):
    """AUC of each signal as a warning of each event; where few events happened there is no dot."""
    names = [name for name in SIGNALS if name in set(scores["signal"])]
    pairs = list(scores.groupby(["editor", "event"]).groups)
    pairs = [(method, event) for method in methods for event in EVENTS if (method, event) in pairs]
    for shift, (method, event) in enumerate(pairs):
        part = scores[(scores["editor"] == method) & (scores["event"] == event)].set_index("signal").reindex(names)
        place = np.arange(len(names)) + 0.7 / len(pairs) * (shift - (len(pairs) - 1) / 2)
        _dots(ax, part, place, style(method, methods), event == "untouched", event == "fastest")
    if not pairs:
        ax.text(0.5, 0.5, "too little happened\nthat could be foretold", transform=ax.transAxes, ha="center",
                va="center", color="#777777")
    _areas(ax, "Is the signal higher\nbefore a loss?", [SIGNALS[name].says for name in names])


def _runs(counts):
    low, high = int(min(counts)), int(max(counts))
    return f"{low if low == high else f'{low} to {high}'} run{'s' if high > 1 else ''}"
