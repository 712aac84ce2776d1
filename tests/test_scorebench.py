"""editcore.scorebench: scores of one pass equal those in turn, and both are timed."""

import pytest

from editcore import bench, scorebench


def test_records_scored_in_one_pass_score_as_in_turn():
    small = bench.random_gpt2(layers=3, width=32, heads=4, vocabulary=700)
    (row,) = scorebench.scoring(*small, [scorebench._record(fact) for fact in bench.invented(5)]).to_dict("records")
    assert (row["records"], row["questions"], row["task"]) == (5, 20, "recent") and row["difference"] < 1e-5
    assert row["gain"] == pytest.approx(row["one by one"] / row["together"]) and row["together"] > 0
    assert "gain" in scorebench.table(*small, 2)
