"""Tidy rows of runs (and the tables that the analysis makes of them) in, the study's matplotlib figures out.

Columns of the rows: run, model, editor, data, seed, step, fact, metric, value; step 0 is the unedited model. `phases`
has one row a run: editor, seed, collapse (first step of the catastrophic phase, NaN where there is none).
"""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullLocator

from editcore.look import (
    TASKS,
    WIDTH,
    curves,
    draw,
    legend,
    mean_interval,
    methods_in,
    note,
    panel,
    runs_in,
    span,
    style,
    theme,
)

__all__ = ["theme", "proficiency", "forgetting", "downstream", "distance", "agreement"]
CHANCE = {100 / 3: "same answer to all (33.3)", 0.0: "no readable answer (0)"}  # weighted F1 of two balanced labels


def proficiency(df, window=25):
    """Does the n-th edit still work? ES, PS and NS of the edit just made against n, one panel each."""
    window = span(df, window)
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.4), sharey=True)
    names = {"ES": "Efficacy, ES", "PS": "Paraphrases, PS", "NS": "Neighbours kept, NS"}
    for ax, (metric, title) in zip(axes, names.items()):
        panel(ax, df, metric, window)
        ax.set(title=title, xlabel="edits made, n", ylim=(-3, 103), xlim=(0, df["step"].max()))
    axes[0].set_ylabel("success of the n-th edit, %")
    legend(fig, axes)
    note(fig, f"Line: mean of the last {window} edits. Band: 95 % interval of that mean (of two runs: none). "
              f"{runs_in(df)}.")
    return fig


def phase_strip(ax, phases, methods, end):
    """A bar a run, a row a method: pale up to the first step of the catastrophic phase, full colour from there on."""
    for row, method in enumerate(methods):
        starts = phases.loc[phases["editor"] == method, "collapse"].sort_values(ignore_index=True)
        color, high = style(method, methods)["color"], 0.72 / max(1, len(starts))
        for i, start in enumerate(starts.fillna(end)):
            place = row + (i - (len(starts) - 1) / 2) * high
            ax.barh(place, start, color=color, alpha=0.22, height=high)
            ax.barh(place, end - start, left=start, color=color, height=high)
        gone, split = starts.notna().sum(), starts.median()
        some = f" in {gone} of {len(starts)} runs" if gone < len(starts) else ""
        words = f"catastrophic from {split:.0f}{some}" if gone else "gradual"
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
        ax.text(0.008 * end, row, words, va="center", fontsize=8.5, fontweight="bold" if gone else "normal", bbox=box)
    ax.set(yticks=range(len(methods)), yticklabels=[style(m, methods)["label"] for m in methods],
           title="Phases, by edits made", xlim=(0, end), ylim=(len(methods) - 0.4, -0.6))
    ax.grid(False)


def mark_collapse(axes, phases, methods):
    """A thin vertical line in the method's colour where the catastrophic phase of a run begins, on every panel."""
    for one in phases.dropna(subset="collapse").itertuples():
        for ax in np.ravel(axes):
            ax.axvline(one.collapse, color=style(one.editor, methods)["color"], linewidth=1, alpha=0.7, zorder=1)


def forgetting(df, phases, window=25):
    """The study in one figure: phases, earlier edits forgotten (three ways), and what the model still can do.

    Metrics read (0 to 1, per step): forgotten_absorbing, forgotten_now, recovered; NS (of the edit just made),
    untouched, f1 (mean weighted F1 of the few-shot tasks).
    """
    methods, end, window = methods_in(df), df["step"].max(), span(df, window)
    fig = plt.figure(figsize=(WIDTH, 7.2))
    grid = fig.add_gridspec(3, 3, height_ratios=(0.32 + 0.14 * len(methods), 2, 2))
    strip = fig.add_subplot(grid[0, :])
    axes = np.array([[fig.add_subplot(grid[row, column]) for column in range(3)] for row in (1, 2)])
    panels = (("forgotten_absorbing", "Forgotten: has failed since", 1), ("forgotten_now", "Forgotten: fails now", 1),
              ("recovered", "Recovered, of the failed", 1), ("NS", "New edits: neighbours kept", window),
              ("untouched", "Facts never edited: right", 1), ("f1", "Few-shot tasks, F1 × 100", 1))
    for ax, (metric, title, steps) in zip(axes.ravel(), panels):
        panel(ax, df, metric, steps)
        ax.set(title=title, xlim=(0, end), ylim=(-3, 103))
    chance_lines(axes[1, 2])
    phase_strip(strip, phases, methods, end)
    mark_collapse(axes, phases, methods)
    for ax in axes[1]:
        ax.set_xlabel("edits made, n")
    axes[0, 0].set_ylabel("earlier edits, %")
    axes[1, 0].set_ylabel("%")
    legend(fig, axes[0, 0])
    note(fig, f"Vertical lines: start of a run's catastrophic phase. Neighbours: mean of the last {window} edits with "
              f"its 95 % interval. {runs_in(df)}.")
    return fig


def chance_lines(ax, labels=False):
    """The two scores of a model that knows nothing: one answer to everything, and no readable answer."""
    for (value, text), dots in zip(CHANCE.items(), ((0, (1, 1.5)), (0, (4, 3)))):
        ax.axhline(value, color="#444444", linewidth=1, linestyle=dots, zorder=1, label=text if labels else None)


def downstream(df):
    """Is general ability kept? Weighted F1 of the four few-shot tasks (greedy: filled, by label probability: hollow),
    the share of unreadable greedy answers, and perplexity on held-out text (log scale)."""
    methods, end = methods_in(df), df["step"].max()
    fig, axes = plt.subplots(2, 3, figsize=(WIDTH, 5.4))
    for ax, (task, title) in zip(axes.ravel(), TASKS.items()):
        panel(ax, df, f"{task}_f1")
        for method, table in curves(df, f"{task}_prob_f1").items():
            draw(ax, table, method, methods, band=False, linewidth=0.9, markerfacecolor="white", label=None)
        chance_lines(ax, labels=True)
        ax.set(title=title, ylim=(-4, 104), ylabel="weighted F1 × 100")
    panel(axes[1, 1], df, "invalid")
    axes[1, 1].set(title="Greedy answers not readable", ylim=(-4, 104), ylabel="% of items, four tasks")
    panel(axes[1, 2], df, "perplexity", scale=1.0)
    axes[1, 2].set(title="Perplexity, held-out text", yscale="log", ylabel="perplexity")
    plain_log(axes[1, 2].yaxis)
    for ax in axes.ravel():
        ax.set(xlim=(0, end), xlabel="edits made, n" if ax in axes[1] else "")
    legend(fig, axes)
    note(fig, "Filled markers: greedy answer. Hollow, thin: label of higher probability. Bands: 95 % interval "
              f"over several runs. {runs_in(df)}.")
    return fig


def root_n(ax, curve):
    """A grey guide ∝ √n a little below one curve, over the curve's whole range."""
    known = curve[(curve.index > 0) & (curve["mean"] > 0)]["mean"]
    if len(known):
        at = known.index[len(known) // 2]
        steps = np.array([known.index.min(), known.index.max()], dtype=float)
        ax.plot(steps, 0.6 * known[at] * np.sqrt(steps / at), color="#777777", linewidth=1.2,
                linestyle=(0, (2, 2)), zorder=1, label="∝ √n")


def plain_log(axis):
    """Ticks of a logarithmic axis at 1, 2, 5 · 10^k, written out, also where it spans less than a decade."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def distance(df, phases):
    """How far have the weights moved? Published distance and ‖ΔW‖/‖W‖ against n, log-log, beside √n."""
    methods, df = methods_in(df), df[~df["fact"].astype(str).str.endswith(".bias")]
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 4.0))
    panels = (("distance", "As published", "‖ΔW‖ / (rows · columns)"), ("relative", "Relative", "‖ΔW‖ / ‖W‖"))
    for ax, (metric, title, label) in zip(axes, panels):
        tables = {name: table[(table.index > 0) & (table["mean"] > 0)]
                  for name, table in curves(df, metric, scale=1.0).items()}
        for method, table in tables.items():
            draw(ax, table, method, methods, band=False, markevery=0.12)
        for table in list(tables.values())[:1]:
            root_n(ax, table)
        ax.set(title=title, ylabel=label, xlabel="edits made, n", xscale="log", yscale="log")
        plain_log(ax.xaxis)
        plain_log(ax.yaxis)
    mark_collapse(axes, phases, methods)
    legend(fig, axes)
    note(fig, "Mean over the edited matrices. Vertical lines: start of the catastrophic phase. "
              f"Dotted: a random walk, ∝ √n. {runs_in(df)}.")
    return fig


def agreement(df, share=0.25):
    """The same edits by four measures: mean and 95 % interval over the first and the last `share` of each run."""
    methods, end = methods_in(df), df["step"].max()
    measures = {"ES": "P(new) >\nP(true)", "ES_token": "token\naccuracy", "ES_exact": "all tokens,\ngiven the text",
                "ES_greedy": "written,\nthen stops"}
    fig, axes = plt.subplots(1, 2, figsize=(WIDTH, 3.8), sharey=True)
    shown = [name for name in measures if name in set(df["metric"])]
    parts = {f"First {share:.0%} of the edits": df["step"] <= share * end,
             f"Last {share:.0%} of the edits": df["step"] > (1 - share) * end}
    for ax, (title, chosen) in zip(axes, parts.items()):
        for shift, method in enumerate(methods):
            part = df[chosen & (df["editor"] == method)]
            values = part.groupby("metric")["value"].agg(["mean", "sem"]).reindex(shown)
            ax.errorbar(np.arange(len(shown)) + 0.12 * (shift - (len(methods) - 1) / 2), 100 * values["mean"],
                        yerr=100 * mean_interval(values["mean"], values["sem"]), capsize=3, **style(method, methods))
        ax.set(title=title, xticks=range(len(shown)), xticklabels=[measures[name] for name in shown], ylim=(-3, 103),
               xlim=(-0.5, len(shown) - 0.5))
    axes[0].set_ylabel("rewrite prompts, %")
    legend(fig, axes)
    note(fig, f"Bars: 95 % interval of the mean over the edits. {runs_in(df)}.")
    return fig
