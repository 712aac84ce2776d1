"""Invented task items and topics: balanced, distinct, solvable by construction."""

from collections import Counter

import pytest

from editcore import fewshot_tasks as tasks
from editcore import world, worldtext


@pytest.fixture(scope="module")
def table():
    return world.read_table()


def test_test_items_are_balanced_distinct_and_solvable_by_construction(table):
    items = worldtext.test_items(table)
    assert set(items) == set(tasks.TASKS)
    for rows in items.values():
        assert Counter(row["label"] for row in rows) == {0: 100, 1: 100}
        assert len({worldtext.item_key(row) for row in rows}) == 200
    for name, agrees in {"mrpc": 1, "rte": 0}.items():
        denied = [bool({"not", "never"} & set(row["sentence2"].split())) for row in items[name]]
        assert denied == [row["label"] != agrees for row in items[name]]
    good = set(table["topics"]["pos_word"])
    assert all(bool(good & set(row["sentence"].split())) == bool(row["label"]) for row in items["sst2"])


def test_topics_have_ten_replies_of_each_sign(table):
    rows = worldtext.topics(table)
    assert len({row["ent"] for row in rows}) == len(rows) >= 100
    for row in rows:
        assert len({*row["pos"]}) == len({*row["neg"]}) == 10 and not {*row["pos"]} & {*row["neg"]}
