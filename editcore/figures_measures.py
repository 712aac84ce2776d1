"""The tables of `measures` in, the figures of "which number is right" out: scores, ranks, swaps, ways of counting.

`parts` is {panel's title: table}, one panel each, such as right after the edit and at the end of the run. A method
looks as it does in every figure (`look.STYLES`); shares are drawn in percent.
"""

import matplotlib.pyplot as plt
import numpy as np

from editcore.look import WIDTH, legend, methods_in, note, style
from editcore.measures import MEASURES, PROMPTS, VERDICTS

__all__ = ["counting", "ranks", "slopes", "verdicts"]
SHORT = {"": "likelier", "_token": "tokens", "_exact": "all tokens", "_greedy": "written"}     # on an axis
MEANT = ("Likelier: than the old answer. Tokens, all tokens: the likeliest ones, given the right ones before. Written: "
         "by the model\nalone, and then it stops. ")
CHAIN = ("ES", "ES_exact", "ES_greedy", "XS_greedy", "PS_exact", "PS_greedy")  # from mild to strict, for the ranks
LOOKS = {   # of a pair of methods: face, sign, what the legend says
    "swapped": ("#d55e00", "×", "swapped"),
    "may swap": ("#f3cdb0", "(×)", "may swap"),
    "same order": ("#0173b2", "=", "same order"),
    "only mild": ("#b9d7ea", "m", "told apart by the mild one only"),
    "only strict": ("#a6dccb", "s", "told apart by the strict one only"),
    "neither": ("#ececec", "·", "told apart by neither"),
}
COUNTED = {"ever": ("has failed since (absorbing)", "white"), "now": ("fails now", None)}     # words, marker's face


def slopes(parts, caption=""):
    """Scores of the methods under the measures, from mild to strict on each kind of prompt, with 95 % intervals."""
    asked = set().union(*(table["measure"] for table in parts.values()))
    kinds = [prompt for prompt in PROMPTS if any(name[:2] == prompt for name in asked)]
    shown = [name for name in MEASURES if name in asked]
    places = {name: i + 0.7 * kinds.index(name[:2]) for i, name in enumerate(shown)}
    fig, axes = _panels(parts, 2.9, {place: SHORT[name[2:]] for name, place in places.items()})
    low = min(table["low"].min() for table in parts.values())
    for ax, table in zip(axes, parts.values()):
        for shift, method, part in _methods(table):
            look = style(method, methods_in(table))
            for prompt in kinds:
                own = part[part.index.str.startswith(prompt)]
                _line(ax, 100 * own[["mean", "low", "high"]], places, shift, look)
        _headings(ax, table, places, kinds)
        ax.set(ylabel="success, %", ylim=(min(95, 10 * np.floor(10 * low)) - 1, 101.5))
    _legend(fig, axes)
    note(fig, f"{MEANT}Bars: 95 % interval over orders and edits. {caption}".strip())
    return fig


def ranks(parts, caption=""):
    """Rank of every method (1 is best) under the measures of CHAIN, with the ranks that 95 % of the resamples give."""
    count = max(table["editor"].nunique() for table in parts.values())
    asked = set().union(*(table["measure"] for table in parts.values()))
    places = {name: i for i, name in enumerate(name for name in CHAIN if name in asked)}
    fig, axes = _panels(parts, 1.2 + 0.19 * count, {i: f"{name[:2]}\n{SHORT[name[2:]]}" for name, i in places.items()})
    for ax, table in zip(axes, parts.values()):
        for shift, method, part in _methods(table):
            _line(ax, part[["rank", "rank_low", "rank_high"]], places, shift, style(method, methods_in(table)))
        ax.set(ylabel="rank", ylim=(count + 0.6, 0.4), yticks=range(1, count + 1))
    _legend(fig, axes)
    note(fig, f"{MEANT}Bars: the ranks of 95 % of the resamples of orders and edits; ties share the middle one. "
              f"{caption}".strip())
    return fig


def _panels(parts, height, ticks):
    """(figure, axes one below the other) with a panel a part and ticks {place: words} under all of them."""
    fig, axes = plt.subplots(len(parts), 1, figsize=(WIDTH, height * len(parts) + 1.0), sharex=True, squeeze=False)
    for ax, title in zip(axes[:, 0], parts):
        ax.set(title=title, xticks=list(ticks), xticklabels=list(ticks.values()))
        ax.tick_params(axis="x", labelsize=8.5)
        ax.grid(axis="x", visible=False)
    return fig, axes[:, 0]


def _headings(ax, table, places, kinds):
    """Over each block of measures what is asked in it."""
    ax.set_title(ax.get_title(loc="left"), pad=18)
    for prompt in kinds:
        known = table["measure"].str.startswith(prompt).any()
        ax.text(np.mean([place for name, place in places.items() if name[:2] == prompt]), 1.02,
                f"{prompt}: {PROMPTS[prompt]}" + ("" if known else " (not asked)"), fontsize=8.5, ha="center",
                color="#333333" if known else "#888888", transform=ax.get_xaxis_transform())


def _legend(fig, axes):
    """`look.legend` for up to six methods; more stand in four columns, row by row."""
    found = dict(zip(*reversed(axes[0].get_legend_handles_labels())))
    if len(found) <= 6:
        legend(fig, axes)
        return
    order = [name for column in range(4) for name in list(found)[column::4]]    # legends are filled column by column
    fig.legend([found[name] for name in order], order, loc="outside upper center", ncols=4, handlelength=3.2)


def _methods(table):
    """(sideways shift, method, its rows) of every method of a table."""
    methods = methods_in(table)
    step = min(0.12, 0.62 / len(methods))
    for i, method in enumerate(methods):
        yield step * (i - (len(methods) - 1) / 2), method, table[table["editor"] == method].set_index("measure")


def _line(ax, part, places, shift, look):
    """A method's line. part: columns value, low and high by measure."""
    part = part.loc[[name for name in places if name in part.index]]
    value, low, high = part.to_numpy().T
    at = [places[name] + shift for name in part.index]
    ax.vlines(at, np.minimum(low, value), np.maximum(high, value), color=look["color"], alpha=0.45, linewidth=0.9)
    ax.plot(at, value, **look)


def _bars(value, low, high):
    """(2, …) lengths below and above, 0 where the value lies outside the interval."""
    return np.maximum([np.subtract(value, low), np.subtract(high, value)], 0.0)


def verdicts(parts, mild, strict):
    """What becomes of every pair of methods from one measure to another: a triangle of cells, one panel a part.

    parts: {title: table of `measures.swaps`}, of which the pairs (mild, strict) are drawn.
    """
    tables = {title: table[(table["mild"] == mild) & (table["strict"] == strict)] for title, table in parts.items()}
    methods = methods_in({"editor": [name for one in tables.values() for key in ("editor_a", "editor_b")
                                     for name in one[key]]})
    fig, axes = plt.subplots(1, len(tables), figsize=(WIDTH, 2.2 + 0.24 * len(methods)), sharey=True, squeeze=False)
    names = [style(method, methods)["label"] for method in methods]
    for ax, (title, table) in zip(axes[0], tables.items()):
        cells = np.full((len(methods), len(methods), 3), 1.0)
        for a, b, verdict in table[["editor_a", "editor_b", "verdict"]].itertuples(index=False):
            column, row = sorted((methods.index(a), methods.index(b)))
            face, sign, _ = LOOKS[verdict]
            cells[row, column] = plt.matplotlib.colors.to_rgb(face)
            ax.text(column, row, sign, ha="center", va="center", fontsize=9, fontweight="bold",
                    color="white" if verdict in ("swapped", "same order") else "#333333")
        ax.imshow(cells, aspect="auto")
        for edge in range(1, len(methods)):     # white lines between the cells
            ax.axhline(edge - 0.5, color="white", linewidth=1)
            ax.axvline(edge - 0.5, color="white", linewidth=1)
        ax.set_xticks(range(len(methods) - 1), names[:-1], rotation=40, ha="right", fontsize=8)
        ax.set_yticks(range(1, len(methods)), names[1:], fontsize=8)
        ax.set(title=title, xlim=(-0.5, len(methods) - 1.5), ylim=(len(methods) - 0.5, 0.5))
        ax.grid(False)
    found = [verdict for verdict in VERDICTS if any((one["verdict"] == verdict).any() for one in tables.values())]
    keys = [plt.Rectangle((0, 0), 1, 1, color=LOOKS[verdict][0]) for verdict in found]
    fig.legend(keys, [f"{LOOKS[verdict][1]}  {LOOKS[verdict][2]}" for verdict in found], loc="outside upper center",
               ncols=3)
    note(fig, f"Mild: {mild} ({MEASURES[mild]}). Strict: {strict} ({MEASURES[strict]}).\n“Told apart”: the "
              "95 % interval of the paired difference excludes 0. “May swap”: opposite signs, but not both told apart.")
    return fig


def counting(table, caption=""):
    """Share of the edits that is forgotten, by measure (a panel each) and way of counting; a row a method."""
    methods, asked = methods_in(table), list(table["measure"].unique())
    fig, axes = plt.subplots(1, len(asked), figsize=(WIDTH, 1.5 + 0.3 * len(methods)), sharey=True, sharex=True,
                             squeeze=False)
    for ax, measure in zip(axes[0], asked):
        for row, method in enumerate(methods):
            look = style(method, methods) | {"linestyle": "none"}
            for (counted, (_, face)), shift in zip(COUNTED.items(), (-0.14, 0.14)):
                part = table[(table[["measure", "editor", "counted"]] == [measure, method, counted]).all(axis=1)]
                bars = 100 * _bars(part["share"], part["low"], part["high"])
                ax.errorbar(100 * part["share"], [row + shift] * len(part), xerr=bars, elinewidth=1,
                            **look | {"label": None, "markerfacecolor": face or look["color"]})
        ax.set(title=f"{measure[:2]}, {SHORT[measure[2:]]}", ylim=(len(methods) - 0.5, -0.5), xlabel="forgotten, %")
        ax.set_yticks(range(len(methods)), [style(method, methods)["label"] for method in methods])
    for words, face in COUNTED.values():
        axes[0, 0].plot([], [], "o", color="#444444", markerfacecolor=face or "#444444", label=words)
    legend(fig, axes)
    note(fig, f"Of the edits that succeeded when made, by the same measure. Bars: 95 % interval over orders and edits. "
              f"{caption}".strip())
    return fig
