"""Cosines between edits' directions and the group of each in; how far apart the groups are, and maps to look at, out.

All numbers are made of cosines alone and are kept for every edit, so that intervals are over the edits and two systems
that made the same edits are compared edit by edit. The maps (t-SNE, principal components) are for the eye only.

    rows = scored(C, groups)                    # a row an edit
    summary(rows)                               # silhouette, ratio, probe, neighbours: mean, low, high
    difference(rows, others)                    # of two systems, paired
"""

import numpy as np
import pandas as pd
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_samples, silhouette_score
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import KernelCenterer
from sklearn.svm import SVC

SCORES = {"silhouette": "silhouette", "ratio": "within / between", "probe": "linear probe", "knn": "nearest neighbours"}
LEVEL = (0.025, 0.975)      # quantiles of a 95 % interval
FOLDS = 5
REPEATS = 5                 # times that the folds are drawn
NEIGHBOURS = 5
COST = 10.0                 # of a margin's violation in the linear probe, directions scaled to a spread of 1


def scored(C, groups, seed=0):
    """DataFrame with a row an edit, columns group, silhouette, within, between, knn, probe.

    C (n, n) cosines, groups (n,) names. silhouette of the cosine distance 1 - C, from -1 to 1; within and between: mean
    distance to the other edits of the group and to those of other groups; knn and probe: the share of REPEATS drawings
    of FOLDS folds, from the seed, in which the group is told by NEIGHBOURS neighbours, or by a linear classifier of the
    directions, that learned from the other folds. ValueError for a group of less than FOLDS edits, or one group.
    """
    C, groups = np.asarray(C, dtype=float), np.asarray(groups)
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < 2 or sizes.min() < FOLDS:
        raise ValueError(f"separation: needs two groups of {FOLDS} edits or more, found "
                         f"{', '.join(f'{size} of {name}' for name, size in zip(names, sizes))}")
    distance, same = (1 - C).clip(0), groups[:, None] == groups[None, :]
    own, others = distance * same * (1 - np.eye(len(C))), distance * ~same
    told = [folded(C, groups, REPEATS * seed + again) for again in range(REPEATS)]
    return pd.DataFrame({
        "group": groups, "silhouette": silhouettes(C, groups),
        "within": own.sum(1) / (same.sum(1) - 1), "between": others.sum(1) / (~same).sum(1),
        **{name: np.mean([one[name] == groups for one in told], axis=0) for name in told[0]}})


def silhouettes(C, groups):
    """(n,) silhouettes (Rousseeuw 1987) of the cosine distance 1 - C."""
    distance = (1 - np.asarray(C)).clip(0)
    np.fill_diagonal(distance, 0)
    return silhouette_samples(distance, np.asarray(groups), metric="precomputed")


def flattened(C, groups, perplexity, seeds):
    """(seeds, 2) silhouettes of the two halves of a joint t-SNE picture, a row a seed: it is one of many."""
    return np.array([flat(tsne(C, perplexity, seed), groups) for seed in seeds])


def flat(points, groups):
    """Mean silhouettes, by Euclidean distance, of the two halves of a picture's points (2n, 2) with groups (n,)."""
    return tuple(float(silhouette_score(half, list(groups))) for half in np.split(np.asarray(points), 2))


def folded(C, groups, seed=0, asked=None):
    """{"knn", "probe": (n,) the group that each edit is taken for}, learned from the edits of the other folds.

    asked (n, n): cosines of other versions of the same edits (rows) with the edits (columns), which are told instead:
    no version of an edit is learned from where another is asked.
    """
    asked, groups = C if asked is None else asked, np.asarray(groups)
    told = {"knn": groups.copy(), "probe": groups.copy()}
    for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(C, groups):
        known, new = C[np.ix_(train, train)], asked[np.ix_(test, train)]
        told["knn"][test] = _neighbours(known, groups[train], new)
        told["probe"][test] = _probe(known, groups[train], new)
    return told


def _neighbours(known, groups, new):
    near = KNeighborsClassifier(NEIGHBOURS, metric="precomputed").fit((1 - known).clip(0), groups)
    return near.predict((1 - new).clip(0))


def _probe(known, groups, new):
    """A linear support vector machine on the directions: their inner products are all that it needs.

    Centre and scale, of the learned edits alone, are its only preparation.
    """
    centre = KernelCenterer().fit(known)
    scale = np.trace(centre.transform(known)) / len(known) or 1.0
    machine = SVC(C=COST, kernel="precomputed").fit(centre.transform(known) / scale, groups)
    return machine.predict(centre.transform(new) / scale)


def summary(rows, draws=2000, seed=0):
    """DataFrame indexed by SCORES, columns mean, low, high: 95 % bootstrap intervals over the edits of each group.

    A resample reweighs the edits; what each is compared with stays. The ratio is that of the mean distances.
    """
    weights = resampled(rows["group"], draws, seed)
    return pd.DataFrame({name: _interval(_mean(rows, name, np.ones(len(rows))), _mean(rows, name, weights))
                         for name in SCORES}, index=["mean", "low", "high"]).T


def difference(rows, others, draws=2000, seed=0):
    """As `summary`, of rows less others: the same edits in the same order, resampled together."""
    if list(rows["group"]) != list(others["group"]):
        raise ValueError("separation: the two tables are not of the same edits")
    weights, one = resampled(rows["group"], draws, seed), np.ones(len(rows))
    return pd.DataFrame({name: _interval(_mean(rows, name, one) - _mean(others, name, one),
                                         _mean(rows, name, weights) - _mean(others, name, weights))
                         for name in SCORES}, index=["mean", "low", "high"]).T


def resampled(groups, draws=2000, seed=0):
    """(draws, n) how often each edit is drawn, each group with as many edits as it has."""
    draw, groups = np.random.default_rng(seed), np.asarray(groups)
    weights = np.zeros((draws, len(groups)))
    for name in np.unique(groups):
        own = np.flatnonzero(groups == name)
        weights[:, own] = draw.multinomial(len(own), np.full(len(own), 1 / len(own)), size=draws)
    return weights


def _mean(rows, name, weights):
    if name == "ratio":
        return weights @ rows["within"].to_numpy() / (weights @ rows["between"].to_numpy())
    return weights @ rows[name].to_numpy() / weights.sum(-1)


def _interval(value, drawn):
    return [float(value), *np.quantile(drawn, LEVEL)]


def shuffled(C, groups, seed=0):
    """`scored` with the groups dealt out at random: what every score says of nothing."""
    return scored(C, np.random.default_rng(seed).permutation(np.asarray(groups)), seed)


def chance(C, groups, times=20):
    """{score: (low, high)} over so many shuffles of the groups."""
    found = [summary(shuffled(C, groups, seed), draws=2)["mean"] for seed in range(times)]
    return {name: (min(one[name] for one in found), max(one[name] for one in found)) for name in SCORES}


def components(C, count=2):
    """((n, count) coordinates, (count,) shares of the spread): principal components of unit directions from their

    cosines (classical scaling: eigenvectors of the centred Gram matrix), each with its largest entry positive.
    """
    centred = C - C.mean(0) - C.mean(1)[:, None] + C.mean()
    values, vectors = np.linalg.eigh((centred + centred.T) / 2)
    values, vectors = values[::-1][:count].clip(0), vectors[:, ::-1][:, :count]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), range(count)])
    return vectors * np.sqrt(values), values / np.trace(centred)


def tsne(C, perplexity=30, seed=0):
    """(n, 2) t-SNE (van der Maaten and Hinton 2008) of the distances sqrt(2 - 2 C) between unit directions.

    It starts at the two principal components with a tenth of their spread of noise from the seed. ValueError for a
    perplexity that is not below a third of n.
    """
    if not 1 < perplexity < len(C) / 3:
        raise ValueError(f"t-SNE: perplexity is {perplexity}, but must be above 1 and below a third of {len(C)} edits")
    start = components(C)[0]
    noise = np.random.default_rng(seed).standard_normal(start.shape)
    start = (start + 0.1 * start.std(0) * noise) / start[:, 0].std() * 1e-4
    distance = np.sqrt((2 - 2 * np.asarray(C, dtype=float)).clip(0))
    np.fill_diagonal(distance, 0)
    return TSNE(perplexity=perplexity, metric="precomputed", init=start.astype(np.float32), random_state=seed,
                max_iter=1000).fit_transform(distance)


def swapped_reading(C, across, groups, said, seed=0):
    """Which way edits with another task's instruction look: DataFrame with a row an edit, columns group, said and, for

    knn and probe, as_told and as_is: the shares of REPEATS drawings of folds in which it is taken for that task.
    C (n, n): cosines of the edits with their own instructions; across (n, n): of the edits with swapped instructions
    (rows) with those. said (n,): the task that the swapped one names.
    """
    told = [folded(np.asarray(C), groups, REPEATS * seed + again, np.asarray(across)) for again in range(REPEATS)]
    shares = {f"{name}_{how}": np.mean([one[name] == np.asarray(task) for one in told], axis=0)
              for name in told[0] for how, task in (("as_told", said), ("as_is", groups))}
    return pd.DataFrame({"group": groups, "said": said, **shares})
