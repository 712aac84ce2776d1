"""editcore.separation: every score on groups whose answer is known, no learning from what is asked, maps that fit."""

import numpy as np
import pytest
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedKFold

from editcore import separation

GROUPS = np.repeat(["a", "b", "c"], 20)


def directions(noise, seed=0, size=1.0):
    """(60, 12) unit vectors around three orthogonal ones."""
    draw = np.random.default_rng(seed)
    vectors = size * np.repeat(np.eye(3, 12), 20, axis=0) + noise * draw.standard_normal((60, 12))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cosines(vectors):
    return vectors @ vectors.T


def test_groups_apart_groups_mixed_and_groups_by_hand():
    apart = separation.summary(separation.scored(cosines(directions(1e-3)), GROUPS))["mean"]
    assert apart["silhouette"] > 0.99 and apart["ratio"] < 1e-3 and apart["probe"] == 1 == apart["knn"]
    noise = cosines(directions(1.0, size=0.0))
    mixed = separation.summary(separation.scored(noise, GROUPS))
    assert abs(mixed["mean"]["silhouette"]) < 0.1 and abs(mixed["mean"]["ratio"] - 1) < 0.05
    assert mixed["low"]["probe"] < 1 / 3 + 0.1 and mixed["mean"]["probe"] < 0.6 and mixed["mean"]["knn"] < 0.6
    pairs = np.repeat([[1.0, 0], [0, 1.0]], 5, axis=0)      # every distance is 0 within and 1 between
    rows = separation.scored(cosines(pairs), np.repeat(["x", "y"], 5))
    assert (rows["silhouette"] == 1).all() and (rows["within"] == 0).all() and (rows["between"] == 1).all()


def test_scores_are_scikit_learns_and_the_formulas():
    C = cosines(directions(0.4))
    rows = separation.scored(C, GROUPS)
    assert rows["silhouette"].mean() == pytest.approx(silhouette_score(directions(0.4), GROUPS, metric="cosine"))
    others = [k for k in range(20) if k != 3]
    assert rows["within"][3] == pytest.approx(np.mean([1 - C[3, k] for k in others]))
    assert rows["between"][3] == pytest.approx(np.mean([1 - C[3, k] for k in range(20, 60)]))
    found = separation.summary(rows)
    assert found.loc["ratio", "mean"] == pytest.approx(rows["within"].sum() / rows["between"].sum())
    assert ((found["low"] <= found["mean"]) & (found["mean"] <= found["high"])).all()
    assert found.loc["silhouette", "low"] < found.loc["silhouette", "high"]


def test_shuffled_groups_are_not_told():
    C = cosines(directions(1e-2))
    told = [separation.shuffled(C, GROUPS, seed)[["probe", "knn"]].mean() for seed in range(5)]
    assert all(np.mean([one[name] for one in told]) < 0.45 for name in ("probe", "knn"))
    low, high = separation.chance(C, GROUPS, 5)["probe"]
    assert low == min(one["probe"] for one in told) < high


def test_flat_silhouettes_are_of_each_half():
    apart, mixed = np.repeat(np.eye(3)[:, :2], 20, axis=0), np.random.default_rng(0).standard_normal((60, 2))
    first, second = separation.flat(np.concatenate([apart, mixed]), GROUPS)
    assert first == pytest.approx(1) and abs(second) < 0.2


def test_a_seed_is_one_row_of_the_pictures_silhouettes():
    C = cosines(np.concatenate([directions(0.1), directions(3.0)]))
    found = separation.flattened(C, GROUPS, 20, (0, 3))
    assert found.shape == (2, 2) and (found[:, 0] > found[:, 1] + 0.3).all()
    assert tuple(found[1]) == separation.flat(separation.tsne(C, 20, 3), GROUPS)


def test_scores_of_an_edit_are_means_over_drawn_folds():
    C = cosines(directions(1.2))
    rows = separation.scored(C, GROUPS, 1)
    told = [separation.folded(C, GROUPS, seed) for seed in range(5, 10)]
    for name in ("knn", "probe"):
        np.testing.assert_allclose(rows[name], np.mean([one[name] == GROUPS for one in told], axis=0))
        assert set(rows[name]) - {0.0, 1.0}, "some edits are told in some drawings only"


def test_nothing_is_learned_from_what_is_asked():
    C = np.eye(60)      # an edit is like itself only: who had seen it, or another version of it, would know its group
    rows, again = separation.scored(C, GROUPS), separation.folded(C, GROUPS, asked=0.99 * C)     # other versions
    assert rows["probe"].mean() < 0.5 and rows["knn"].mean() < 0.5
    assert all((again[name] == GROUPS).mean() < 0.5 for name in again)
    C = cosines(directions(0.5))
    _, test = next(StratifiedKFold(5, shuffle=True, random_state=0).split(C, GROUPS))
    changed = C.copy()
    one, rest = test[0], test[1:]
    changed[np.ix_(rest, rest)] = 0.9
    # its answer does not change with the directions of the other edits of its fold
    before, after = (separation.folded(each, GROUPS)["probe"][one] for each in (C, changed))
    assert before == after


def test_differences_are_paired():
    near, far = (separation.scored(cosines(directions(noise)), GROUPS) for noise in (0.2, 0.4))
    found, same = separation.difference(near, far), separation.difference(near, near)
    assert found.loc["silhouette", "low"] > 0 > found.loc["ratio", "high"] and (same == 0).all(axis=None)
    with pytest.raises(ValueError, match="not of the same edits"):
        separation.difference(near, far[::-1])


def test_a_swapped_instruction_shows_what_is_followed():
    C, said = cosines(directions(0.05)), np.repeat(["b", "c", "a"], 20)
    vectors = directions(0.05)
    followed = np.roll(vectors, -20, axis=0) @ vectors.T        # looks like the group that is named
    rows = separation.swapped_reading(C, followed, GROUPS, said)
    assert rows["probe_as_told"].mean() == 1 == rows["knn_as_told"].mean() and rows["probe_as_is"].mean() == 0
    rows = separation.swapped_reading(C, C, GROUPS, said)
    assert rows["probe_as_told"].mean() == 0 and rows["probe_as_is"].mean() == 1


def test_components_are_those_of_the_directions():
    vectors = directions(0.3)
    found, shares = separation.components(cosines(vectors), 3)
    u, s, _ = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    assert np.allclose(np.abs(found), np.abs(u[:, :3] * s[:3]), atol=1e-8)
    assert np.allclose(shares, s[:3] ** 2 / (s ** 2).sum()) and (found[np.abs(found).argmax(0), range(3)] > 0).all()


def test_tsne_keeps_groups_together_and_follows_its_seed():
    C = cosines(directions(0.1))
    first, again, other = (separation.tsne(C, 10, seed) for seed in (0, 0, 1))
    assert first.shape == (60, 2) and np.array_equal(first, again) and not np.allclose(first, other)
    assert silhouette_score(first, GROUPS) > 0.5
    with pytest.raises(ValueError, match="below a third of 60 edits"):
        separation.tsne(C, 30)


@pytest.mark.parametrize("groups", [["a"] * 60, ["a"] * 57 + ["b"] * 3])
def test_too_few_edits_are_refused(groups):
    with pytest.raises(ValueError, match="needs two groups of 5 edits"):
        separation.scored(np.eye(60), groups)
