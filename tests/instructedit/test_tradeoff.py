"""Sizes of edits: hand-made curves of reliability against locality with known answers."""

import numpy as np
import pandas as pd
import pytest

from editcore.instructedit import tradeoff


def rows(curve, editor="a", seed=0, task="recent"):
    """Rows of two records at each size of {size: ((Rel, Rel), (Loc, Loc))}."""
    entries = [(editor, seed, float(size), task, case_id, metric, value)
               for size, metrics in curve.items()
               for metric, values in zip(("Rel", "Loc"), metrics)
               for case_id, value in enumerate(values)]
    return pd.DataFrame(entries, columns=["editor", "seed", "size", "task", "case_id", "metric",
                                          "value"])


FALLING = {0.5: ((0.0, 0.4), (1.0, 1.0)), 1: ((0.5, 0.7), (1.0, 0.6)), 2: ((1.0, 0.8), (0.5, 0.3))}


def test_curves_are_means_over_records():
    table = tradeoff.curves(rows(FALLING))
    assert list(table.columns) == ["editor", "seed", "task", "size", "Rel", "Loc"]
    np.testing.assert_allclose(table[["size", "Rel", "Loc"]],
                               [[0.5, 0.2, 1.0], [1, 0.6, 0.8], [2, 0.9, 0.4]])


@pytest.mark.parametrize("level, size, values", [
    (0.8, 1.0, [0.5, 0.7]),             # a size that was tried
    (0.6, 1.5, [0.75, 0.75]),           # half-way between two
    (0.9, 0.75, [0.25, 0.55]),
    (0.1, 2.0, [1.0, 0.8]),             # all are above: the most reliable
])
def test_reliability_at_a_locality(level, size, values):
    table = tradeoff.at_locality(rows(FALLING), level)
    assert list(table["case_id"]) == [0, 1] and table["size"].unique() == pytest.approx([size])
    assert list(table["value"]) == pytest.approx(values)


def test_a_curve_that_bends_back_is_read_at_its_best_point():
    bent = {0.5: ((0.8, 0.8), (0.9, 0.9)), 1: ((0.4, 0.4), (0.5, 0.5)), 2: ((0.6, 0.6), (0.9, 0.9))}
    assert tradeoff.at_locality(rows(bent), 0.7)["value"].unique() == pytest.approx([0.8])
    both = pd.concat([rows(bent), rows(FALLING, "b", 3), rows(FALLING, task="zsre")])
    found = tradeoff.at_locality(both, 0.95).set_index(["editor", "seed", "task"])["size"]
    assert found.to_dict() == pytest.approx({("b", 3, "recent"): 0.625, ("a", 0, "zsre"): 0.625})
    assert tradeoff.at_locality(rows(bent), 0.95).empty


def test_the_best_size_is_that_of_the_harmonic_mean():
    other = {0.5: ((1.0, 1.0), (1.0, 1.0)), 1: ((0.5, 0.5), (1.0, 1.0)), 2: ((0, 0), (0, 0))}
    both = pd.concat([rows(FALLING), rows(other, task="zsre"), rows(FALLING, "b")])
    one = tradeoff.best_sizes(both).set_index("editor")
    assert one["size"].to_dict() == {"a": 1.0, "b": 1.0}
    mean = (2 * 0.6 * 0.8 / 1.4 + 2 * 0.5 / 1.5) / 2
    assert one["harmonic"].to_dict() == pytest.approx({"a": mean, "b": 2 * 0.6 * 0.8 / 1.4})
    each = tradeoff.best_sizes(both, ["editor", "seed", "task"]).set_index(["editor", "task"])
    assert each["size"].to_dict() == {("a", "recent"): 1.0, ("a", "zsre"): 0.5,
                                      ("b", "recent"): 1.0}
