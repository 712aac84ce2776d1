"""editcore.bench: times of both ways, results that agree, the same threads afterwards."""

import pytest
import torch

from editcore import bench, serial
from editcore.editors import configure


@pytest.fixture(scope="module")
def small():
    return bench.random_gpt2(layers=3, width=32, heads=4, vocabulary=700)


def test_every_editor_is_timed_beside_the_serial_way(small):
    configs = {"rome": configure("rome", {"layer": 1, "steps": 3}),
               "ft": configure("ft", {"epsilon": 1e-2, "steps": 2}),
               "memit": configure("memit", {"layers": (0, 1), "lambda": 10, "steps": 3})}
    before = torch.get_num_threads()
    rows = bench.bench(*small, bench.invented(3), configs, repeats=1)
    assert torch.get_num_threads() == before
    assert list(zip(rows["editor"], rows["way"])) == [("rome", "together"), ("rome", "one by one"), ("ft", "together"),
                                                      ("ft", "one by one"), ("memit", "together")]
    assert set(rows["editor"]) == set(serial.WAYS)
    with pytest.raises(ValueError, match="no serial version of 'encore', only of rome, memit, ft"):
        config = configure("encore", {"layers": (0, 1), "steps": 2}, "gpt2-xl")
        bench.bench(*small, bench.invented(1), {"encore": config})
    assert (rows["seconds"] > 0).all() and (rows["difference"] < 1e-3).all() and (rows["facts"] == 3).all()
    assert rows["ratio"].tolist() == pytest.approx((rows["serial"] / rows["seconds"]).tolist())


def test_runs_in_one_pass_end_where_separate_runs_do(small):
    configs = {"rome": configure("rome", {"layer": 1, "steps": 3}),
               "ft": configure("ft", {"epsilon": 1e-2, "steps": 2}),
               "memit": configure("memit", {"layers": (0, 1), "lambda": 10, "steps": 3})}
    rows = bench.shared(*small, bench.invented(7), configs, runs=3)
    assert rows["edits"].tolist() == [6, 6, 6] and (rows["difference"] < 1e-3).all() and (rows["together"] > 0).all()
    assert rows["gain"].tolist() == pytest.approx((rows["apart"] / rows["together"]).tolist())
    with pytest.raises(ValueError, match="3 runs need at least as many facts, found 2"):
        bench.shared(*small, bench.invented(2), configs, runs=3)


def test_covariance_in_one_pass(small):
    (row,) = bench.covariance(*small, [bench.WORDS] * 20, [0, 1, 2]).to_dict("records")
    assert row["tokens"] == 20 * len(small[1](bench.WORDS)["input_ids"]) and row["layers"] == 3 and row["seconds"] > 0


def test_settings_for_models_without_published_ones(small):
    assert bench.settings("rome", small[0], "gpt2-xl") == configure("rome", {}, "gpt2-xl")
    assert bench.settings("rome", small[0], "elsewhere").layer == 1
    assert bench.settings("memit", small[0], "elsewhere").layers == (0, 1)
    with pytest.raises(ValueError, match="unknown editor"):
        bench.settings("roam", small[0])


def test_table_and_invented_facts(small):
    facts = bench.invented(30)
    assert facts == bench.invented(30) and len({fact.target_new for fact in facts}) > 10
    text = bench.table(*small, ["ft"], 2, "elsewhere")
    assert "difference" in text and "one by one" in text


