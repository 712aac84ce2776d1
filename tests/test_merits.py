"""Figures of merit of made-up runs whose phases, forgetting and distances are known."""

import numpy as np
import pandas as pd
import pytest

from editcore import merits

COLUMNS = ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]


def rows(editor, collapse=None, jump=1.0, end=100, every=10):
    """One run: ES 1, NS from 0.8 to 0.6, distance 1e-3 √n; from `collapse` on everything is lost, and that edit's
    update (and the distance) is `jump` times as large."""
    head, out = ["r" + editor, "pocket", editor, "facts", 0], []
    for step in range(1, end + 1):
        gone, sudden = collapse is not None and step >= collapse, step == collapse
        values = {"ES": 1.0, "PS": 0.9, "NS": 0.8 - 0.2 * step / end}
        out += [[*head, step, str(step), metric, value] for metric, value in values.items()]
        far = 1e-2 * step**0.5 + (jump if gone else 0)
        values = {"distance": far / 1000, "relative": far / 4, "update": jump if sudden else 0.01}
        out += [[*head, step, "layer", metric, value] for metric, value in values.items()]
    for step in range(0, end + 1, every):
        gone = collapse is not None and step >= collapse
        values = {"forgotten_now": 0.9 if gone else 0.001 * step, "forgotten_absorbing": 0.95 if gone else 0.002 * step,
                  "recovered": 0.25, "untouched": 0.1 if gone else 0.9}
        values |= {f"{task}_f1": 0.0 if gone else 0.9 - 0.001 * step for task in ("sst2", "rte")}
        out += [[*head, step, "", metric, value] for metric, value in values.items()]
    return pd.DataFrame(out, columns=COLUMNS)


def phases(**collapse):
    return pd.DataFrame([{"run": "r" + editor, "editor": editor, "seed": 0, "collapse": step}
                         for editor, step in collapse.items()])


@pytest.fixture
def found():
    df = pd.concat([rows("rome", collapse=60, jump=2.0), rows("memit"), rows("ft", collapse=20, jump=0.02)])
    return merits.table(df, phases(rome=60.0, memit=np.nan, ft=20.0))


def test_merits_are_those_of_the_made_up_runs(found):
    rome = found.loc["rome"]
    assert rome[["duration", "collapsed", "edits"]].tolist() == [59, 1, 100]
    assert rome["ES"] == 100 and rome["NS"] == pytest.approx(100 * (0.8 - 0.2 * np.arange(1, 60).mean() / 100))
    assert rome["forgotten_before"] == pytest.approx(5.0) and rome["absorbing_end"] == pytest.approx(95)
    assert rome["ability_before"] == pytest.approx(100 * (0.85 - 1 / 3) / (0.9 - 1 / 3))
    assert found.loc["memit", "exponent"] == pytest.approx(0.5)
    assert found.loc["ft", "until_10"] == 20 and found.loc["rome", "until_10"] == 60
    assert found.loc["memit", "absorbing_40"] == pytest.approx(8.0)


def test_a_collapse_of_some_runs_is_said_to_be_of_some():
    calm, broken = rows("ft"), rows("ft", collapse=20).assign(run="r2")
    both = pd.DataFrame([{"run": "rft", "editor": "ft", "seed": 0, "collapse": np.nan},
                         {"run": "r2", "editor": "ft", "seed": 1, "collapse": 20.0}])
    found = merits.table(pd.concat([calm, broken]), both)
    assert merits.collapse(found, "ft") == "collapse in 1 of 2 runs of 100 edits, after 19 (median)"
    assert merits.collapse_step(found.loc["ft"]) == "19 in 1 of 2 runs, else all 100"
    assert merits.beside_paper(found).loc["duration: edits before the collapse", ("ft", "here")] == "19 in 1 of 2 runs"


def test_disabling_edit_must_stand_out_and_carry_the_distance(found):
    assert found["disabling"].to_dict() == {"rome": "yes", "memit": "", "ft": "no"}
    assert found["largest"].to_dict() == pytest.approx({"rome": 200, "memit": 1, "ft": 2})
    small = rows("rome", collapse=60, jump=0.02)
    assert merits.disabling(small, 60.0) == "no"


def test_table_beside_the_paper_has_a_text_in_every_cell(found):
    table = merits.beside_paper(found)
    assert table.loc["duration: edits before the collapse"].tolist() == ["59", "559", "more than 100", "about 1,200",
                                                                         "19", "-"]
    assert table.map(lambda cell: isinstance(cell, str) and "nan" not in cell).all(axis=None)
    assert len(table) == len(merits.QUANTITIES)
