"""Rows of runs in; what each measure says of the methods, how far the measures agree, and which pairs swap, out.

The same edits are asked in ways from mild to strict (`WAYS`) on three kinds of prompts (`PROMPTS`), right after the
edit and once more at the end of the run (`MOMENTS`). Methods are compared on the edits that all of them made, in the
same orders, so every difference is a paired one. Shares lie between 0 and 1. Every function is pure.

    found = compare(df, "end")      # all methods, all measures, 2,000 resamples of orders and edits
    scores(found), agreement(found), swaps(found), gap(found, "ES", "ES_greedy")
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

WAYS = {"": "likelier than the old", "_token": "tokens right, given the ones before",
        "_exact": "all tokens right, given the ones before", "_greedy": "written, then stops"}
PROMPTS = {"ES": "the edited prompt", "XS": "the same behind unrelated text", "PS": "other wordings"}
MEASURES = {prompt + way: f"{asked}: {said}" for prompt, asked in PROMPTS.items() for way, said in WAYS.items()}
MOMENTS = {"made": "", "end": "final_"}     # moment: what its metrics begin with
UNIT = ["order", "seed", "fact"]            # one edit, the same for all methods
LEVEL = (0.025, 0.975)                      # quantiles of a 95 % interval
VERDICTS = ("swapped", "may swap", "same order", "only mild", "only strict", "neither")


@dataclass(frozen=True)
class Compared:
    """Methods under measures at one moment; M measures, mild to strict within a kind of prompt, and K methods."""

    moment: str         # a key of MOMENTS
    measures: tuple     # those that every method was asked, in the order of MEASURES
    editors: tuple
    mean: np.ndarray    # (M, K) over the edits
    drawn: np.ndarray   # (n, M, K) the same over n resamples of orders and edits
    edits: int          # that all methods made and all measures answer, in all orders together
    orders: int

    def __getitem__(self, measure):
        """(K,) means and (n, K) resampled means of one measure; ValueError if it was not asked."""
        if measure not in self.measures:
            raise ValueError(f"measure {measure!r} at {self.moment!r}: there are only {', '.join(self.measures)}")
        at = self.measures.index(measure)
        return self.mean[at], self.drawn[:, at]


def compare(df, moment="made", n_draws=2000, seed=0):
    """The Compared of the rows of at least one method. The bootstrap draws orders, then edits within each order; with
    one order it is over the edits of that order. ValueError if there is nothing to compare or a run occurs twice."""
    table = answers(df, moment)
    measures, editors = (tuple(level) for level in (table.columns.unique(0), table.columns.unique(1)))
    shape = len(measures), len(editors)
    mean, drawn = shares(table, n_draws, seed)
    return Compared(moment, measures, editors, mean.reshape(shape), drawn.reshape(-1, *shape), len(table),
                    table.index.get_level_values("order").nunique())


def answers(df, moment="made"):
    """A row an edit, a column (measure, editor): what the edits that all methods have in common scored.

    A measure that some method was not asked is left out, and so is a method without any row at this moment.
    """
    if moment not in MOMENTS:
        raise ValueError(f"moment {moment!r}: choose one of {', '.join(MOMENTS)}")
    named = {MOMENTS[moment] + name: name for name in MEASURES}
    rows = df[df["metric"].isin(named)]
    if rows.empty:
        raise ValueError(f"measures: no rows of {', '.join(list(named)[:3])}, …")
    table = _wide(rows.assign(metric=rows["metric"].map(named)))
    editors = list(dict.fromkeys(rows["editor"]))
    asked = [name for name in MEASURES if all((name, one) in table for one in editors)]
    table = table.reindex(columns=pd.MultiIndex.from_product([asked, editors])).dropna()
    if table.empty:
        raise ValueError(f"measures: {', '.join(editors)} have no answered edit in common")
    return table


def _wide(rows):
    """Rows as a table of edits × (metric, editor); ValueError if a method made an edit twice."""
    twice = rows.duplicated([*UNIT, "metric", "editor"])
    if twice.any():
        one = rows[twice].iloc[0]
        raise ValueError(f"measures: two runs of {one['editor']} with order {one['order']} and seed {one['seed']}")
    return rows.pivot(index=UNIT, columns=["metric", "editor"], values="value")


def shares(table, n_draws=2000, seed=0):
    """(mean (C,), resampled means (n_draws, C)) of a table's columns over its edits; NaN is an edit that is not there.

    Every resampled mean has one success and one failure more (Agresti and Caffo 2000), drawn like edits: without them
    a method that never failed would have an interval of no width, and four failures against none would tell two apart.
    """
    values, known = table.fillna(0.0).to_numpy(dtype=float), table.notna().to_numpy(dtype=float)
    weights = resamples(table.index, n_draws, seed)
    right, wrong = np.random.default_rng([seed, 1]).poisson(1.0, (2, n_draws, values.shape[1]))
    with np.errstate(invalid="ignore"):     # no edit in a resample, or in all
        # rounded: equal shares must be equal numbers, or ties would be broken by the order of a sum
        return ((values.sum(0) / known.sum(0)).round(12),
                ((weights @ values + right) / (weights @ known + right + wrong)).round(12))


def resamples(index, n_draws, seed):
    """(n_draws, edits) how often each edit is drawn: orders first, then as many edits of each as it has."""
    draw, orders = np.random.default_rng(seed), index.get_level_values("order")
    groups = [np.flatnonzero(orders == one) for one in orders.unique()]
    times = draw.multinomial(len(groups), [1 / len(groups)] * len(groups), size=n_draws)     # (n_draws, orders)
    weights = np.zeros((n_draws, len(index)))
    for group, count in zip(groups, times.T):
        weights[:, group] = draw.multinomial(count * len(group), [1 / len(group)] * len(group))
    return weights


def scores(found):
    """A row a measure and editor: mean with its 95 % interval, rank (1 is best, ties share the middle one), and the
    ranks from rank_low to rank_high that 95 % of the resamples give it (a tie counts as either)."""
    low, high = _interval(found.drawn)
    above, below = _beaten(found.drawn)
    over, under = _beaten(found.mean)
    best, worst = np.quantile(1 + above, LEVEL[0], 0), np.quantile(len(found.editors) - below, LEVEL[1], 0)
    columns = {"mean": found.mean, "low": low, "high": high, "rank": (1 + over + len(found.editors) - under) / 2,
               "rank_low": np.floor(best), "rank_high": np.ceil(worst)}
    index = pd.MultiIndex.from_product([found.measures, found.editors], names=["measure", "editor"])
    return pd.DataFrame({name: value.ravel() for name, value in columns.items()}, index=index).reset_index()


def _beaten(means):
    """(…, K) how many methods are better than each, and how many worse."""
    return ((means[..., None, :] > means[..., :, None]).sum(-1), (means[..., None, :] < means[..., :, None]).sum(-1))


def _interval(drawn):
    """(low, high) of the 95 % percentile interval over the first axis, NaNs left out; NaN where all are."""
    known = ~np.isnan(drawn).all(0)
    out = np.full((2, *drawn.shape[1:]), np.nan)
    out[:, known] = np.nanquantile(drawn[:, known], LEVEL, axis=0)
    return out


def kendall(a, b):
    """Kendall's tau-b (1945) of two rankings along the last axis: pairs in the same order less pairs in opposite order,
    over the geometric mean of the pairs that each tells apart; NaN where one of them tells none apart."""
    upper = np.triu_indices(np.shape(a)[-1], 1)
    a, b = (np.sign(np.asarray(x)[..., upper[0]] - np.asarray(x)[..., upper[1]]) for x in (a, b))
    apart = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return np.divide((a * b).sum(-1), apart, out=np.full(np.shape(apart), np.nan), where=apart > 0)


def agreement(found):
    """Kendall's tau between the rankings of the methods, a row a pair of measures: tau, low, high (methods that a
    measure does not tell apart are ordered by chance in each resample, so the interval may lie below tau)."""
    rows = []
    for i, mild in enumerate(found.measures):
        for j, strict in enumerate(found.measures[i + 1:], i + 1):
            low, high = _interval(kendall(found.drawn[:, i], found.drawn[:, j])[:, None])[:, 0]
            tau = kendall(found.mean[i], found.mean[j])
            rows.append({"mild": mild, "strict": strict, "tau": float(tau), "low": low, "high": high})
    return pd.DataFrame(rows, columns=["mild", "strict", "tau", "low", "high"])


def differences(found, measure):
    """A row a pair of methods: editor_a, editor_b, difference (a - b, paired), low, high, and apart: 1 or -1 if the
    interval is above or below 0, else 0."""
    mean, drawn = found[measure]
    a, b = np.triu_indices(len(found.editors), 1)
    low, high = _interval(drawn[:, a] - drawn[:, b])
    return pd.DataFrame({"editor_a": np.array(found.editors)[a], "editor_b": np.array(found.editors)[b],
                         "difference": mean[a] - mean[b], "low": low, "high": high,
                         "apart": (low > 0).astype(int) - (high < 0).astype(int)})


def swaps(found, pairs=None):
    """What becomes of every pair of methods from one measure to another; a row a pair of measures and of methods.

    Differences (a - b) under the mild and the strict measure with their intervals, and the verdict: "swapped" if they
    have opposite signs and both intervals exclude 0 (a resolved swap), "may swap" if opposite signs are all there is;
    else "same order" if both measures tell the methods apart, "only mild" or "only strict" if one does, or "neither".
    pairs: of measures, all by default. Not corrected for the number of pairs.
    """
    pairs = pairs or [(a, b) for i, a in enumerate(found.measures) for b in found.measures[i + 1:]]
    key, tables = ["editor_a", "editor_b"], []
    for mild, strict in pairs:
        both = differences(found, mild).merge(differences(found, strict), on=key, suffixes=("_mild", "_strict"))
        tables.append(both.assign(mild=mild, strict=strict, verdict=_verdicts(both)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["mild", "strict", *key, "verdict"])


def _verdicts(both):
    opposite = both["difference_mild"] * both["difference_strict"] < 0
    mild, strict = both["apart_mild"] != 0, both["apart_strict"] != 0
    return np.select([opposite & mild & strict, opposite, mild & strict, mild, strict], VERDICTS[:-1], VERDICTS[-1])


def gap(found, mild, strict):
    """A row an editor: what the mild measure shows more than the strict one, paired, with its 95 % interval."""
    (mean, drawn), (base, base_drawn) = found[mild], found[strict]
    low, high = _interval(drawn - base_drawn)
    return pd.DataFrame({"measure": mild, "base": strict, "editor": found.editors, "gap": mean - base, "low": low,
                         "high": high})


def inflation(found):
    """`gap` of every measure over what the model writes by itself on the same prompts, where that was asked."""
    pairs = [(name, f"{name[:2]}_greedy") for name in found.measures]
    tables = [gap(found, name, base) for name, base in pairs if base in found.measures and name != base]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(
        columns=["measure", "base", "editor", "gap", "low", "high"])


def lost(df, n_draws=2000, seed=0):
    """Of the edits that succeeded when made, the share lost, by measure and way of counting; a row each and editor.

    counted "ever": seen to fail at some re-test, which no recovery takes back (absorbing, arXiv 2401.07453); "now":
    fails at the last re-test, for ES_greedy at the end of the run. With the 95 % interval over orders and edits.
    """
    table = _flags(df)
    (mean, drawn), editors = shares(table, n_draws, seed), table.columns.unique(2)
    low, high = _interval(drawn)
    out = table.columns.to_frame(index=False).assign(share=mean, low=low, high=high, edits=table.count().to_numpy())
    order = {name: place for place, name in enumerate([*MEASURES, "ever", "now", *editors])}
    return out.sort_values(["measure", "counted", "editor"], key=lambda one: one.map(order)).reset_index(drop=True)


def _flags(df):
    """A row an edit, a column (measure, counted, editor): 1 if lost, 0 if kept, NaN if it was not there to lose."""
    parts = []
    for name in ("ES", "ES_exact", "ES_greedy"):
        made = df[(df["metric"] == name) & (df["value"] >= 1)]
        good = pd.MultiIndex.from_frame(made[[*UNIT, "editor"]])
        for metric, ways in ((f"retest_{name}", {"ever": "min", "now": "last"}), (f"final_{name}", {"now": "last"})):
            again = df[df["metric"] == metric].sort_values("step", kind="stable")
            again = again[pd.MultiIndex.from_frame(again[[*UNIT, "editor"]]).isin(good)]
            if again.empty or metric.startswith("final_") and parts and parts[-1]["measure"].iloc[0] == name:
                continue    # the last re-test has said it
            for counted, how in ways.items():
                flags = 1.0 - (again.groupby([*UNIT, "editor"])["value"].agg(how) >= 1)
                parts.append(flags.reset_index().assign(measure=name, counted=counted))
    if not parts:
        raise ValueError("measures: no edit was asked again")
    return pd.concat(parts).pivot(index=UNIT, columns=["measure", "counted", "editor"], values="value")


def fell(found, mild, strict):
    """One clause: the methods' mean under both measures, and the method that falls most."""
    one = gap(found, mild, strict)["gap"]
    (before, _), (after, _), at = found[mild], found[strict], int(np.argmax(one))
    most = f", {found.editors[at]}'s from {100 * before[at]:.0f} to {100 * after[at]:.0f} %" if one[at] > 0 else ""
    return (f"from {mild} to {strict} the methods' mean goes from {100 * before.mean():.0f} to "
            f"{100 * after.mean():.0f} %{most}")


def best(found, measure):
    """'ROME (98 %)', or 'MEMIT, ROME (100 %)' of several that share the first place, or 'all level (100 %)'."""
    mean = found[measure][0]
    first = [editor for editor, value in zip(found.editors, mean) if value == mean.max()]
    if 1 < len(first) == len(mean):
        return f"all level ({100 * mean.max():.0f} %)"
    more = f" and {len(first) - 3} more" if len(first) > 4 else ""
    return f"{', '.join(first[:3] if more else first)}{more} ({100 * mean.max():.0f} %)"


def agreed(table, mild, strict):
    """One clause on one row of `agreement`."""
    one = table[(table["mild"] == mild) & (table["strict"] == strict)].iloc[0]
    if np.isnan(one["tau"]):
        return f"{mild} and {strict} have no τ, as one of them puts all methods level"
    return f"τ between {mild} and {strict} is {one['tau']:.2f} ({one['low']:.2f} to {one['high']:.2f})"


def tally(table):
    """'66 pairs of methods: 2 swapped, 5 may be swapped, …' of a table of `swaps`, without what does not occur."""
    words = {"swapped": "swapped", "may swap": "may be swapped", "same order": "in the same order",
             "only mild": "told apart only by the mild measure", "only strict": "told apart only by the strict one",
             "neither": "told apart by neither"}
    found = table["verdict"].value_counts()
    return f"{len(table)} pairs of methods: " + ", ".join(f"{found[name]} {words[name]}" for name in VERDICTS
                                                          if name in found)


def spread(table):
    """One clause on a table of `lost`: the method whose share forgotten depends most on the counting, and the rest."""
    said = {"ever": "has failed since", "now": "fails now"}
    share = table.groupby("editor", sort=False)["share"]
    points = 100 * (share.max() - share.min())
    if points.max() == 0:
        return "every way of counting gives the same"
    part, rest = table[table["editor"] == points.idxmax()], points.drop(points.idxmax())
    low, high = (part.loc[part["share"].agg(which)] for which in ("idxmin", "idxmax"))
    return (f"{points.idxmax()} {100 * low['share']:.0f} % ({low['measure']}, {said[low['counted']]}) to "
            f"{100 * high['share']:.0f} % ({high['measure']}, {said[high['counted']]})"
            + (f"; the others move by {rest.min():.0f} to {rest.max():.0f} points" if len(rest) else ""))
