"""Tables of denominators and of what happened in runs (`disabling`, `jumps`) in, figures of disabling edits out.

What was predicted beforehand is drawn in one colour everywhere (TOLD), with a hollow ring around it where it stands
among other points.
"""

from textwrap import fill

import matplotlib.pyplot as plt
import numpy as np

from editcore.figures_old import plain_log
from editcore.jumps import MILDER, RELATIVE
from editcore.look import WIDTH, curves, draw, legend, mean_interval, methods_in, note, share_interval, style
from editcore.merits import TRIGGER

TOLD = "#d55e00"        # edits predicted to be disabling
OTHER = "#8c8c8c"       # all others
EVENTS = {"jump_3": f"update ≥ {MILDER:g} × median", "jump_5": f"update ≥ {TRIGGER:g} × median",
          "disabling": "disabling edit"}
MARKS = {"jump_3": ("o", "#0173b2"), "jump_5": ("s", "#882255"), "disabling": ("D", "#111111")}
CLASSES = (0, 2, MILDER, TRIGGER, np.inf)     # of the largest update of a test interval, in medians


def denominators(table, limit=RELATIVE, named=24):
    """What ROME will divide by, before the first edit: how |relative denominator| is distributed, and the smallest."""
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.2), width_ratios=(1.25, 1))
    size, opener = table["relative"].abs().clip(lower=1e-6), table["opener"]
    bins = np.geomspace(0.98 * size.min(), 1.02 * size.max(), 42)
    for chosen, color, name in ((~opener, OTHER, "all others"), (opener, TOLD, "subject is the first token")):
        if chosen.any():
            axes[0].hist(size[chosen], bins, color=color, alpha=0.85, label=f"{name} ({chosen.sum():,})")
    axes[0].axvline(limit, color="#444444", linewidth=1, linestyle=(0, (2, 2)), label=f"threshold {limit:g}")
    axes[0].set(xscale="log", yscale="log", ylim=(0.7, None), xlabel="|uᵀk₀| / uᵀk̄", ylabel="facts",
                title="All facts")
    axes[0].legend(loc="upper left")
    plain_log(axes[0].xaxis)
    plain_log(axes[0].yaxis)
    least = table.loc[size.nsmallest(named).index[::-1]]
    color = [TOLD if one else OTHER for one in least["opener"]]
    axes[1].hlines(range(len(least)), 1e-6, least["relative"].abs(), color=color, linewidth=1)
    axes[1].scatter(least["relative"].abs(), range(len(least)), color=color, s=18, zorder=3)
    axes[1].set(yticks=range(len(least)), ylim=(-0.8, len(least) - 0.2), xlabel="|uᵀk₀| / uᵀk̄",
                title=f"The {len(least)} smallest")
    axes[1].set_yticklabels([name if len(name) < 22 else name[:20] + "…" for name in least["subject"]], fontsize=7.5)
    axes[1].grid(axis="y", visible=False)
    if (~opener).any():
        axes[1].axvline(size[~opener].median(), color=OTHER, linewidth=1.2, linestyle=(0, (5, 2)))
    axes[1].set_xlim(left=0)
    note(fig, "uᵀk₀: what the published code divides by; uᵀk̄: the same for the mean key. 1: both keys agree. Unedited "
              "model. Dashed, right: median of the others.")
    return fig


def timeline(made, df):
    """Each run's updates in their order, a panel an editor, predicted ones marked; below, what was lost meanwhile.

    made: `jumps.happened` of one order; df: its rows with the derived ones.
    """
    methods, end = methods_in(made), df["step"].max()
    fig = plt.figure(figsize=(WIDTH, 1.4 * len(methods) + 2.9))
    grid = fig.add_gridspec(len(methods) + 1, 2, height_ratios=(*[1] * len(methods), 1.75))
    top = None
    for row, method in enumerate(methods):
        ax = top = fig.add_subplot(grid[row, :], sharex=top, sharey=top)
        _updates(ax, made[made["editor"] == method], style(method, methods), end)
        ax.tick_params(labelbottom=row == len(methods) - 1)
    top.set(yscale="log", xlim=(0, end + 1), ylim=(0.4 * made["ratio"].quantile(0.02), 2.2 * made["ratio"].max()))
    plain_log(top.yaxis)
    lower = [fig.add_subplot(grid[-1, column]) for column in (0, 1)]
    for ax, metric, title in zip(lower, ("forgotten_now", "untouched"), ("Earlier edits that fail",
                                                                        "Facts never edited, still right")):
        for method, table in curves(df, metric).items():
            draw(ax, table, method, methods, band=False)
        ax.set(title=title, xlim=(0, end + 1), xlabel="edits made, n", ylabel="%")
        bottom, highest = ax.get_ylim()
        ax.set_ylim(*((-0.3, max(2, highest)) if metric == "forgotten_now" else (min(98, bottom), 100.3)))
    legend(fig, lower)
    note(fig, f"Ring: predicted before the first edit (ROME's denominator under {RELATIVE:g} of the mean key's), with "
              f"the ratio predicted for ROME. Dotted: {MILDER:g} and {TRIGGER:g} medians.")
    return fig


def _updates(ax, part, look, end):
    """Updates of one editor in medians of its run, against n, those predicted by the denominators ringed."""
    told = part["told"]
    ax.vlines(part["step"], 0.01, part["ratio"], color=look["color"], linewidth=max(0.6, min(2, 240 / end)), alpha=0.6)
    ax.scatter(part.loc[told, "step"], part.loc[told, "ratio"], facecolor="none", edgecolor=TOLD, s=46, linewidth=1.6,
               zorder=4)
    for one in part[told & np.isclose(part["expected"], part["foretold"])].itertuples():   # where it is this editor's
        ax.annotate(f"{one.foretold:.1f}", (one.step, one.ratio), xytext=(5, 3), textcoords="offset points",
                    color=TOLD, fontsize=7.5)
    for limit in (MILDER, TRIGGER):
        ax.axhline(limit, color="#444444", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
    ax.set_ylabel("update /\nmedian", fontsize=8.5)
    ax.set_title(look["label"])


def against(made):
    """Is the update what the denominator said? ‖ΔW‖ against 1 / |own denominator|, log-log, a panel an editor."""
    methods = methods_in(made)
    fig, axes = plt.subplots(1, len(methods), figsize=(WIDTH, 3.9), sharex=True, sharey=True, squeeze=False)
    for ax, method in zip(axes[0], methods):
        part = made[made["editor"] == method]
        for chosen, color, marker, name in ((part["opener"] < 1, OTHER, "o", "all others"),
                                            (part["opener"] >= 1, TOLD, "D", "subject is the first token")):
            ax.scatter(1 / part.loc[chosen, "own"].abs(), part.loc[chosen, "update"], color=color, marker=marker, s=14,
                       alpha=0.7, linewidth=0, label=name)
        ends = np.array([(1 / made["own"].abs()).min(), (1 / made["own"].abs()).max()])
        middle = (part["update"] * part["own"].abs()).median()      # ‖δ‖ of ROME and p-ROME
        ax.plot(ends, middle * ends, color="#444444", linewidth=1.2, linestyle=(0, (4, 2)), label="median ‖δ‖ / |·|")
        ax.set(xscale="log", yscale="log", xlabel="1 / |denominator|", title=style(method, methods)["label"])
        for axis in (ax.xaxis, ax.yaxis):
            plain_log(axis)
    axes[0, 0].set_ylabel("norm of the update, ‖ΔW‖")
    legend(fig, axes)
    note(fig, "Each point an edit. Denominators of the unedited model: ROME uᵀk₀, r-ROME uᵀk̄, p-ROME k₀'s own.")
    return fig


def scored(tables):
    """How well it was foretold: precision and recall with 95 % Wilson intervals, a row of panels a schedule.

    tables: {schedule: {event: pooled rows of `jumps.score`, one a rule}}, event of EVENTS.
    """
    fig, axes = plt.subplots(len(tables), 2, figsize=(WIDTH, 0.9 + 2.1 * len(tables)), sharey=True, squeeze=False)
    for row, (schedule, found) in zip(axes, tables.items()):
        rules = [fill(rule, 22) for rule in next(iter(found.values()))["rule"]]
        for ax, name, count, of in zip(row, ("precision", "recall"), ("predicted", "happened"),
                                       ("of those predicted", "of those that happened")):
            for shift, (event, table) in enumerate(found.items()):
                y = np.arange(len(rules)) + 0.25 * (shift - (len(found) - 1) / 2)
                _shares(ax, table, y, (name, count), event)
            ax.set(title=f"{schedule}\n{name}, {of}", yticks=range(len(rules)), yticklabels=rules, xlim=(-3, 121),
                   xticks=range(0, 101, 20), ylim=(len(rules) - 0.5, -0.5))
    for ax in axes[-1]:
        ax.set_xlabel("%")
    legend(fig, axes)
    note(fig, "Numbers: hits of how many. Bars: 95 % Wilson interval over the edits, pooled over runs.")
    return fig


def _shares(ax, table, y, names, event):
    """Points with intervals of one event, a row a rule at heights y, hits and trials written beside."""
    known = (table[names[1]] > 0).to_numpy()
    part, (marker, color) = table[known], MARKS[event]
    error = 100 * share_interval(part[names[0]], part[names[1]].to_numpy()) if known.any() else None
    ax.errorbar(100 * part[names[0]], y[known], xerr=error, capsize=3, fmt=marker, color=color, label=EVENTS[event])
    for place, one in zip(y, table.to_dict("records")):
        ax.annotate(f"{one['hits']} / {one[names[1]]}", (104, place), fontsize=7.5, va="center", color=color)


def cost(table):
    """Does a jump cost more than other edits? Share lost in a test interval by the largest update in it.

    table: rows of `jumps.intervals` of one editor, several runs pooled.
    """
    kinds = list(dict.fromkeys(table["kind"]))
    fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 3.4), squeeze=False)
    for ax, kind in zip(axes[0], kinds):
        part = table[table["kind"] == kind]
        place = np.digitize(part["largest"], CLASSES) - 1
        random = np.random.default_rng(0)
        ax.scatter(place + random.uniform(-0.18, 0.18, len(part)), 100 * part["lost"], s=12, color=OTHER, alpha=0.5,
                   linewidth=0, label="one test interval")
        found = part.assign(place=place).groupby("place")["lost"].agg(["mean", "sem", "size"])
        ax.errorbar(found.index, 100 * found["mean"], yerr=100 * mean_interval(found["mean"], found["sem"]),
                    fmt="D", color=TOLD, capsize=4, label="mean, 95 % interval")
        ax.set(title=kind.capitalize(), xticks=range(len(CLASSES) - 1), xlim=(-0.5, len(CLASSES) - 1.5),
               xlabel="largest update of the interval, in medians",
               xticklabels=[f"{words(low, high)}\nn = {found['size'].get(i, 0)}"
                            for i, (low, high) in enumerate(zip(CLASSES, CLASSES[1:]))])
        ax.set_ylim(-0.3, max(1.0, 105 * part["lost"].max()))
    axes[0, 0].set_ylabel("newly lost, % of those right before")
    legend(fig, axes)
    note(fig, "Lost: right when last asked, wrong at this test. Runs pooled; intervals of a run share its weights.")
    return fig


def words(low, high):
    """'under 2', '2 to 3', '5 and more' of a class's bounds."""
    return f"under {high:g}" if low == 0 else f"{low:g} and more" if np.isinf(high) else f"{low:g} to {high:g}"
