"""Concordance of a score with an event within runs, beside scores that know nothing (notebook 31)."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

DRAWS = 1000        # of resampled runs, and of scores that know nothing


def auc(table, score, event, within=("run",), null="permute"):
    """How often `score` is higher where `event` is true than where it is false, of pairs that share `within`.

    table: columns run, score, event, within. Returns auc; low, high: percentiles over resampled runs (NaN with one
    run that has pairs); null_low, null_high, p: 95 % of, and the share as far from the middle as auc of, DRAWS scores
    that know nothing: permuted in each group, or ("shift") rolled around in it, which keeps a series' own memory.
    events and pairs are counted; ties count one half.
    """
    random, table = np.random.default_rng(0), table.dropna(subset=[score, event])
    groups = []
    for _, part in table.groupby(list(dict.fromkeys(("run", *within))), sort=False):
        hit = part[event].to_numpy(dtype=bool)
        if 0 < hit.sum() < len(hit):
            groups.append((part["run"].iloc[0], rankdata(part[score]), hit))
    out = dict.fromkeys(("auc", "low", "high", "null_low", "null_high", "p"), np.nan)
    out |= {"events": int(table[event].sum()), "pairs": sum(int(hit.sum() * (~hit).sum()) for *_, hit in groups)}
    if not groups:
        return out
    wins = pd.DataFrame([(run, _wins(ranks, hit), hit.sum() * (~hit).sum()) for run, ranks, hit in groups],
                        columns=["run", "wins", "pairs"]).groupby("run").sum()
    blind = sum(_blind(ranks, hit, random, null) for _, ranks, hit in groups) / wins["pairs"].sum()
    out |= {"auc": wins["wins"].sum() / wins["pairs"].sum()}
    out |= dict(zip(("null_low", "null_high"), np.percentile(blind, [2.5, 97.5])))
    far = np.abs(blind - np.median(blind)) >= np.abs(out["auc"] - np.median(blind)) - 1e-12
    out["p"] = (1 + far.sum()) / (1 + DRAWS)
    if len(wins) > 1:
        weights = random.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=DRAWS)
        drawn = weights @ wins["wins"].to_numpy() / (weights @ wins["pairs"].to_numpy(dtype=float))
        out |= dict(zip(("low", "high"), np.percentile(drawn, [2.5, 97.5])))
    return out


def _wins(ranks, hit):
    """Pairs (true, false) that the ranks put in order (Mann and Whitney 1947)."""
    return ranks[hit].sum() - hit.sum() * (hit.sum() + 1) / 2


def _blind(ranks, hit, random, null):
    """(DRAWS,) wins of scores that know nothing."""
    if null == "shift":
        every = np.array([_wins(np.roll(ranks, k), hit) for k in range(len(ranks))])
        return every[random.integers(len(ranks), size=DRAWS)]
    drawn = random.permuted(np.tile(ranks, (DRAWS, 1)), axis=1)[:, :hit.sum()]
    return drawn.sum(axis=1) - hit.sum() * (hit.sum() + 1) / 2
