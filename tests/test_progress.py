"""editcore.progress: every item once, a log line per tenth away from a terminal."""

import logging

from editcore import progress


def test_items_pass_through_and_tenths_are_logged(caplog):
    with caplog.at_level(logging.INFO, logger="editcore"):
        assert list(progress.bar(range(40), "work")) == list(range(40))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 10
    assert lines[0].startswith("work: 4 of 40 (10 %)")
    assert lines[-1].startswith("work: 40 of 40 (100 %)")


def test_a_resumed_loop_counts_from_its_start(caplog):
    with caplog.at_level(logging.INFO, logger="editcore"):
        assert list(progress.bar(range(8, 10), "work", total=10, start=8)) == [8, 9]
    assert [record.getMessage().split(",")[0] for record in caplog.records] == ["work: 9 of 10 (90 %)",
                                                                                "work: 10 of 10 (100 %)"]


def test_an_iterator_with_a_total_and_an_empty_one(caplog):
    assert list(progress.bar(iter("ab"), "work", total=2)) == ["a", "b"]
    assert list(progress.bar([], "work")) == []
