"""Measurements of one model or one edit in, figures out: where facts sit, which layers can be edited.

The study's figures of many edits are in figures.py; the look of both is in look.py.
"""

import matplotlib.pyplot as plt
import seaborn as sns

from editcore.look import (
    TASKS,
    WIDTH,
    legend,
    mean_interval,
    methods_in,
    note,
    panel,
    runs_in,
    share_interval,
    span,
    style,
)

KINDS = {"state": "State restored", "mlp": "MLP output restored", "attention": "Attention output restored"}
PLACES = {"subject": ("last subject token", 0, "o", "-"), "last": ("last prompt token", 1, "s", "--")}
PROMPTS = {"ES": "The edited prompt", "PS": "Paraphrases", "NS": "Neighbours"}


def causal_trace(df, n):
    """Heat maps of P(answer) when one state (MLP output, attention output) of the noised run is put back.

    df: columns kind (state, mlp, attention), role (of the token), layer, value (P x 100, mean over n prompts); roles
    are drawn in the order of their first row.
    """
    kinds = [kind for kind in KINDS if kind in set(df["kind"])]
    fig, axes = plt.subplots(1, len(kinds), figsize=(WIDTH, 3.3), sharey=True, squeeze=False)
    small = df["layer"].nunique() <= 10
    for index, (ax, kind) in enumerate(zip(axes[0], kinds)):
        table = df[df["kind"] == kind].pivot(index="role", columns="layer", values="value").reindex(df["role"].unique())
        sns.heatmap(table, ax=ax, vmin=0, vmax=100, cmap="viridis", annot=small, fmt=".0f", annot_kws={"size": 8.5},
                    linewidths=0.5 if small else 0, cbar=index == len(kinds) - 1, cbar_kws={"label": "P(answer), %"})
        ax.set(title=KINDS[kind], xlabel="layer put back", ylabel="")
        ax.tick_params(axis="y", rotation=0)
    note(fig, f"Mean over {n} facts that the model knows.")
    return fig


def patching(df, n):
    """Share of prompts that give another subject's answer once its state is put in after a block, by place and layer.

    df: columns position (subject, last), layer, value (0 to 1, mean over n prompts).
    """
    fig, ax = plt.subplots(figsize=(WIDTH * 0.62, 3.2))
    for position, (label, color, marker, line) in PLACES.items():
        part = df[df["position"] == position].sort_values("layer")
        ax.errorbar(part["layer"], 100 * part["value"], yerr=100 * share_interval(part["value"], n), capsize=3,
                    label=label, linestyle=line, marker=marker, color=sns.color_palette("colorblind")[color])
    ax.set(xlabel="state put in after block", ylabel="answer becomes\nthe other subject's, %", ylim=(-4, 104),
           xticks=sorted(df["layer"].unique()), title="Where the answer is carried")
    legend(fig, ax)
    note(fig, f"Bars: 95 % Wilson interval of a share of {n} prompts.")
    return fig


def layers(df, chosen=()):
    """Single-edit scores by edited layer: ES, PS and NS of each editor, with the 95 % interval of the mean over facts.

    df: columns editor, layer, fact, metric (ES, PS, NS), value (0 to 1); `chosen` marks layers with a grey line.
    """
    methods = methods_in(df)
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.3), sharey=True)
    for ax, (metric, title) in zip(axes, {"ES": "Efficacy, ES", "PS": "Paraphrases, PS",
                                          "NS": "Neighbours kept, NS"}.items()):
        for shift, method in enumerate(methods):
            part = df[(df["editor"] == method) & (df["metric"] == metric)].groupby("layer")["value"]
            table = part.agg(["mean", "sem"])
            ax.errorbar(table.index + 0.08 * (shift - (len(methods) - 1) / 2), 100 * table["mean"],
                        yerr=100 * mean_interval(table["mean"], table["sem"]), capsize=3, **style(method, methods))
        for layer in chosen:
            ax.axvline(layer, color="#999999", linewidth=6, alpha=0.25, zorder=0)
        ax.set(title=title, xlabel="edited layer", ylim=(-4, 104), xticks=sorted(df["layer"].unique()))
    axes[0].set_ylabel("single edits, %")
    legend(fig, axes)
    sizes = df.groupby(["editor", "layer"])["fact"].nunique()
    facts = sizes.max() if sizes.min() == sizes.max() else f"{sizes.min()} to {sizes.max()}"
    note(fig, f"Bars: 95 % interval of the mean over {facts} facts, each edited alone. Grey: the layers that the study "
              "edits.")
    return fig


def tasks(df, n, chance=100 / 3):
    """Few-shot weighted F1 of one model: a pair of bars a task (greedy answer; label of higher probability).

    df: rows of `downstream.few_shot` (metric such as sst2_f1 or sst2_prob_f1, value 0 to 1); n items a task; `chance`
    is one answer to all.
    """
    df = df[df["metric"].str.endswith("_f1")]
    scoring = df["metric"].str.endswith("_prob_f1").map({True: "likelier label", False: "greedy answer"})
    df = df.assign(task=df["metric"].str.split("_").str[0].map(TASKS), scoring=scoring, value=100 * df["value"])
    fig, ax = plt.subplots(figsize=(WIDTH * 0.72, 3.2))
    sns.barplot(df, x="task", y="value", hue="scoring", ax=ax, palette=["#0173b2", "#a6cbe3"], edgecolor="#333333")
    for bars in ax.containers:
        ax.bar_label(bars, fmt="%.0f", fontsize=8.5, padding=1)
    ax.axhline(chance, color="#444444", linewidth=1.2, linestyle=(0, (1, 1.5)),
               label=f"same answer to all ({chance:.1f})")
    ax.set(ylim=(0, 108), xlabel="", ylabel="weighted F1 × 100", title="Few-shot tasks, unedited model")
    ax.get_legend().remove()
    legend(fig, ax)
    note(fig, f"{n} items a task, the two labels equally often; an unreadable answer counts as a third, wrong class.")
    return fig


def one_edit(df):
    """P(new target) and P(true target) before and after one edit, one panel a kind of prompt, a line a prompt.

    df: rows of `metrics.probabilities` with a column when (before, after).
    """
    fig, axes = plt.subplots(1, 3, figsize=(WIDTH, 3.2), sharey=True)
    looks = {"new": (1, "o", "-"), "true": (0, "s", "--")}
    for ax, (kind, title) in zip(axes, PROMPTS.items()):
        for (_, target), part in df[df["kind"] == kind].groupby(["prompt", "target"]):
            color, marker, line = looks[target]
            values = part.set_index("when")["value"].reindex(["before", "after"])
            ax.plot([0, 1], 100 * values, marker=marker, linestyle=line, alpha=0.85, label=f"P({target} answer)",
                    color=sns.color_palette("colorblind")[color])
        count = df[df["kind"] == kind]["prompt"].nunique()
        ax.set(title=f"{title} ({count})", xticks=[0, 1], xticklabels=["before", "after"], xlim=(-0.3, 1.3),
               ylim=(-4, 104))
    axes[0].set_ylabel("probability, %")
    legend(fig, axes)
    note(fig, "One line a prompt and target; probability of the whole answer (geometric mean over its tokens).")
    return fig


def health(df, window=25):
    """One run at a glance: success of the edit just made, earlier edits forgotten, distance, perplexity."""
    window, end = span(df, window), df["step"].max()
    fig, axes = plt.subplots(1, 4, figsize=(WIDTH, 2.9))
    panels = (("ES", "n-th edit, ES, %", window, 100), ("forgotten_now", "Forgotten now, %", 1, 100),
              ("relative", "‖ΔW‖ / ‖W‖", 1, 1), ("perplexity", "Perplexity", 1, 1))
    for ax, (metric, title, steps, scale) in zip(axes, panels):
        panel(ax, df, metric, steps, scale)
        ax.set(title=title, xlabel="edits made, n", xlim=(0, end))
        ax.set_ylim(*((-4, 104) if scale == 100 else (0, None)))
    legend(fig, axes)
    note(fig, f"ES: mean of the last {window} edits with its 95 % interval. {runs_in(df)}.")
    return fig
