"""Published tables stand before a notebook's own, and its own are kept."""

import pandas as pd

from editcore.instructedit.published import beside

ROWS = pd.DataFrame({"task": ["recent", "zsre"], "value": [0.5, 1.0]}, index=[7, 9])


def test_published_rows_stand_first_and_own_ones_are_kept(tmp_path):
    published = beside(ROWS * 2, "scores", "smollm2", tmp_path / "theirs", tmp_path / "none")
    assert list(published["model"]) == ["SmolLM2", "SmolLM2"], "nothing beside, nothing published"
    folder = tmp_path / "theirs" / "tables"
    both = beside(ROWS, "scores", "models/pocket", tmp_path / "mine", folder)
    assert list(both["model"]) == ["SmolLM2", "SmolLM2", "pocket", "pocket"]
    assert list(both["value"]) == [1.0, 2.0, 0.5, 1.0] and list(both.index) == [0, 1, 2, 3]
    kept = pd.read_parquet(tmp_path / "mine" / "tables" / "scores.parquet")
    assert kept.equals(both[2:].reset_index(drop=True)), "its own rows alone"
    again = beside(ROWS, "scores", "smollm2", tmp_path / "mine", folder)
    assert list(again["value"]) == [0.5, 1.0], "SmolLM2's own rows take the place of published ones"
    assert len(beside(ROWS, "words", "pocket", tmp_path / "mine", folder)) == 2
