"""Scores of editors trained on mixtures in, the figures of which mixture to learn out: subsets, orderings, balance.

Tables are those of `orderings.summary` (as the paper counts, shares from 0 to 1), drawn in percent, with 95 %
intervals over test records and training seeds.
"""

import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D

from editcore.figures_instructions import LOOKS, cells, known, legend, panels
from editcore.figures_tasks import HOLLOW, VERDICTS
from editcore.look import WIDTH, note
from editcore.mixtures import SUBSETS, TASKS, paper, words_of
from editcore.orderings import TASKS as TITLES

STYLES = {"full": ("with instruction", "#0173b2", "o"), "none": ("without", "#d55e00", "s")}


def subsets(table, metric="Rel"):
    """A panel a test task, a row a subset of training tasks (shaded: the task is in it), a point a style."""
    tasks, found = known(table), cells(table)
    shown = [subset for subset in SUBSETS if any(name.startswith(f"{subset},") for name in set(table["system"]))]
    fig, axes = panels(len(tasks), len(shown), 0.34)
    for ax, task in zip(axes, tasks):
        for row, subset in enumerate(shown):
            if task in [TASKS[letter] for letter in subset]:
                ax.axhspan(row - 0.45, row + 0.45, color="#ededed", zorder=0)
            for shift, (style, (_, color, marker)) in zip((-0.15, 0.15), STYLES.items()):
                if (one := found.get((f"{subset}, {style}", task, metric))) is not None:
                    ax.plot(one[1:], [row + shift] * 2, color=color, linewidth=1.3)
                    ax.plot(one[0], row + shift, marker=marker, color=color)
            if (value := paper(subset, task, metric)) is not None:
                ax.plot(value, row - 0.15, **HOLLOW)
        ax.set(title=TITLES[task] + (", held out" if task == "zsre" else ""), xlabel="%",
               ylim=(len(shown) - 0.5, -0.5))
    axes[0].set_yticks(range(len(shown)), [words_of(subset) for subset in shown], fontsize=8.5)
    handles = [Line2D([], [], color=color, marker=marker, label=label) for label, color, marker in STYLES.values()]
    fig.legend(handles=[*handles, Line2D([], [], **HOLLOW, label="paper, GPT2-XL")], loc="outside upper center",
               ncols=3)
    note(fig, "An editor a row and colour. Shaded: the task was trained on. Exact match; ConvSent: z_sent · z_topic.")
    return fig


def gains(found):
    """The claims on mixtures: a strip a family, a point a claim, coloured by its verdict; hollow: the paper's."""
    families = list(dict.fromkeys(found["family"]))
    counts = [len(found[found["family"] == family]) for family in families]
    fig, axes = plt.subplots(1, len(families), figsize=(WIDTH, 1.4 + 0.2 * max(counts)), sharex=True, squeeze=False)
    for ax, family in zip(axes[0], families):
        part = found[found["family"] == family].reset_index(drop=True)
        for row, one in part.iterrows():
            color = VERDICTS[one["verdict"]]
            ax.plot([100 * one["low"], 100 * one["high"]], [row, row], color=color, linewidth=1.3)
            ax.plot(100 * one["mean"], row, "o", color=color, markersize=4.5)
            if np.isfinite(one["paper"]):
                ax.plot(one["paper"], row, **HOLLOW)
        ax.axvline(0, color="#777777", linewidth=0.9, zorder=1)
        ax.set_yticks(range(len(part)), part["text"], fontsize=7.5)
        ax.set(ylim=(max(counts) - 0.4, -0.6), xlabel="points")
        ax.set_title(textwrap.fill(family, 22), fontsize=9)
    handles = [Line2D([], [], color=color, marker="o", label=name) for name, color in VERDICTS.items()]
    fig.legend(handles=[*handles, Line2D([], [], **HOLLOW, label="paper, GPT2-XL")], loc="outside upper center",
               ncols=4)
    return fig


def balance(table, counts, metrics=("Rel", "Gen", "Loc", "z_sent")):
    """Scores against the number of ConvSent records in the mixture; counts: {system: records}."""
    tasks, found = known(table), cells(table)
    fig, axes = plt.subplots(1, len(tasks), figsize=(WIDTH, 3.2), sharey=True, squeeze=False)
    for ax, task in zip(axes[0], tasks):
        for metric in metrics:
            line = [(place, found[system, task, metric]) for place, system in enumerate(counts)
                    if (system, task, metric) in found]
            if line:
                color, marker = LOOKS[metric]
                at = np.array([place for place, _ in line])
                mean, low, high = np.array([one for _, one in line]).T
                ax.plot(at, mean, color=color, marker=marker)
                ax.fill_between(at, low, high, color=color, alpha=0.13, linewidth=0)
        ax.set_xticks(range(len(counts)), [str(count) for count in counts.values()])
        ax.set(title=TITLES[task] + (", held out" if task == "zsre" else ""), xlabel="ConvSent records", ylim=(-4, 104))
    axes[0, 0].set_ylabel("%")
    legend(fig, metrics)
    note(fig, "An editor a point, with instructions; all learn from as many edits. Exact match; ConvSent's\n"
              "reliability is z_sent · z_topic. Band: 95 % over records and training seeds.")
    return fig
