"""TOML written here in; the runs that a grid plans compared with those spelled out, and one error for each mistake."""

import dataclasses
import re

import pytest

from editcore.editors import configure
from editcore.study import grid
from editcore.study import loop as study

SMALL = """
[common]
n_edits = 4
measure = ["ES"]
[first]
retest_every = 2
[first.axes]
order = [0, 1]
[[first.cases]]
name = "ROME"
editor = "rome"
[[first.cases]]
name = "MEMIT, batch {batch_size}"
editor = "memit"
n_edits = 6
axes = { order = [3], batch_size = [2, 3] }
[second]
[[second.cases]]
name = "MEMIT, λ × {lambda_:g}"
editor = "memit"
axes = { times = { lambda_ = [0.5, 1] } }
[[second.cases]]
name = "ROME, layer {layer}"
editor = "rome"
[second.cases.axes]
settings.layer = [1, 2]
measure = [["ES"]]
"""


@pytest.fixture
def written(tmp_path):
    """A file of grids, rewritten by calling it with other text."""
    def write(text=SMALL):
        (tmp_path / "study.toml").write_text(text, encoding="utf-8")
        return tmp_path / "study.toml"
    write()
    return write


def runs(planned):
    return [(one.name, one.run) for one in planned]


def test_cases_are_combined_with_their_axes(written):
    common = {"n_edits": 4, "measure": ["ES"], "retest_every": 2}
    assert runs(grid.read(written(), "first")) == [
        ("ROME", study.make(**common, editor="rome", order=0)),
        ("ROME", study.make(**common, editor="rome", order=1)),
        *((f"MEMIT, batch {size}", study.make(**common | {"n_edits": 6}, editor="memit", order=3, batch_size=size))
          for size in (2, 3))]
    assert grid.names(written()) == ["first", "second"]


def test_settings_are_values_or_factors_on_what_is_published(written):
    base = configure("memit", {}, "pocket").lambda_
    found = dict(runs(grid.read(written(), "second")))
    assert found["MEMIT, λ × 0.5"].settings == (("lambda_", base / 2),)
    assert found["MEMIT, λ × 1"].settings == (), "the published run itself, with its id"
    assert found["ROME, layer 2"].settings == (("layer", 2),) and found["ROME, layer 2"].measure == ("ES",)
    elsewhere = dict(runs(grid.read(written(), "second", model="gpt2-xl")))
    assert elsewhere["MEMIT, λ × 0.5"].settings == (("lambda_", 10000.0),)
    published = configure("rome", {}, "pocket").layer
    assert [one.run.settings for one in grid.read(written(), "second", settings={"rome": {"layer": published}},
                                                  cases=["ROME, layer {layer}"])] == [()]


def test_keywords_replace_parameters_and_axes(written):
    planned = grid.read(written(), "first", model="gpt2-xl", facts="", n_edits=9, order=[7], measure=["ES", "PS"])
    assert {one.run.model for one in planned} == {"gpt2-xl"} and {one.run.facts for one in planned} == {""}
    assert {(one.run.n_edits, one.run.order) for one in planned} == {(9, 7)}
    assert {one.run.measure for one in planned} == {("ES", "PS")}
    assert runs(grid.read(written(), "first", model="", order=[], measure=None)) == runs(grid.read(written(), "first"))
    assert grid.read(written(), "first", n_edits=0)[0].run.n_edits == 0, "0 means all facts, not nothing given"
    chosen = grid.read(written(), "first", cases=["ROME"], seed=[0, 1], order=5)
    assert [(one.name, one.run.seed, one.run.order) for one in chosen] == [("ROME", 0, 5), ("ROME", 1, 5)]


def test_settings_by_case_or_editor(written):
    words = {"memit": {"layers": [1, 2], "steps": 3}, "ROME, layer {layer}": {"layer": [3], "steps": 2}}
    found = dict(runs(grid.read(written(), "second", settings=words, model="tiny", cases=["ROME, layer {layer}"])))
    assert found == {"ROME, layer 3": study.make(model="tiny", editor="rome", n_edits=4, measure=["ES"],
                                                 settings={"layer": 3, "steps": 2})}
    text = SMALL.replace("batch {batch_size}", "{batch_size}, layers {layers}")
    words = {"memit": {"layers": [[0], [0, 1]]}}
    several = grid.read(written(text), "first", settings=words, order=0, batch_size=2)
    assert {one.name for one in several} == {"ROME", "MEMIT, 2, layers [0]", "MEMIT, 2, layers [0, 1]"}


@pytest.mark.parametrize("old, new, message", [
    ("[first]", "[first", "not valid TOML"),
    ("[common]", "common = 3\n[other]", "common must be a table"),
    ('name = "ROME"', "", "study.toml: grid 'first': case 1 has no name"),
    ("[[first.cases]]\nname = \"ROME\"", "[[first.cases]]\nname = 3", "case 1 has no name"),
    ("MEMIT, batch {batch_size}", "ROME", "two cases are called 'ROME'"),
    ("retest_every = 2", "retest = 2", "grid 'first': unknown parameter 'retest'; known are"),
    ("order = [0, 1]", "order = 3", "grid 'first': axis order must be a list"),
    ("order = [0, 1]", "order = []", "axis order must be a list with something in it"),
    ("order = [0, 1]", "measure = [\"ES\"]", "axis measure must be a list of lists"),
    ("n_edits = 6", 'n_edits = "6"', "case 'MEMIT, batch {batch_size}': run: n_edits must be int"),
    ("n_edits = 6", "settings = 6", "settings must be a table"),
    ("n_edits = 6", "settings.leyer = 6", "case 'MEMIT, batch {batch_size}': memit has no setting 'leyer'"),
    ('editor = "memit"\nn_edits', 'editor = "mermit"\nn_edits', "unknown editor 'mermit'"),
    ("n_edits = 6", "times.kl_prompt = 2", "times.kl_prompt must be a factor"),
    ("batch {batch_size}", "batch {size}", "its name asks for 'size'"),
    ("batch {batch_size}", "batch", "two runs are called 'MEMIT, batch' but differ in batch_size"),
    ("[second]", "[second]\ncases = []\n[third]", "cases"),
    ("axes = { order = [3], batch_size = [2, 3] }", "axes = 3", "axes must be a table of lists")])
def test_a_mistake_is_one_error_with_file_grid_and_case(written, old, new, message):
    assert old in SMALL
    path = written(SMALL.replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        for name in ("first", "second"):
            grid.read(path, name)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name, words, message", [
    ("third", {}, "no grid 'third'; it has first, second"), ("common", {}, "no grid 'common'"),
    ("first", {"edits": 3}, "replaced by keywords: unknown parameter 'edits'"),
    ("first", {"axes": {"order": [1]}}, "axes are no keyword"),
    ("first", {"cases": ["FT"]}, "no case 'FT'; it has ROME, MEMIT"),
    ("first", {"settings": {"ft": {"lr": 1.0}}}, "settings of 'ft', which is none of its cases or editors"),
    ("first", {"editor": "rome", "n_edits": 5, "batch_size": 1}, "'ROME' and 'MEMIT, batch 1' are the same run")])
def test_unknown_names(written, name, words, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        grid.read(written(), name, **{"order": 0} | words if "axes" not in words else words)


def test_no_file():
    with pytest.raises(FileNotFoundError, match="nowhere.toml: no such file"):
        grid.read("nowhere.toml", "first")


def test_words_of_a_command_line():
    assert grid.typed({"n_edits": "5", "order": "0,1", "measure": "ES, PS", "model": "gpt2-xl",
                       "settings": '{"rome": {"layer": 3}}'}) == {
        "n_edits": 5, "order": [0, 1], "measure": ["ES", "PS"], "model": "gpt2-xl", "settings": {"rome": {"layer": 3}}}
    for words, message in (({"edits": "5"}, "-p edits: unknown parameter"), ({"n_edits": "5.5"}, "must be int"),
                           ({"settings": "layer"}, "must be JSON")):
        with pytest.raises(ValueError, match=message):
            grid.typed(words)


def test_the_projects_own_grids_can_be_planned():
    planned = [one for name in grid.names() for one in grid.read(grid.FILE, name)]
    assert {"ROME", "MEMIT"} <= {one.name for one in planned}
    by_run = {}
    for one in planned:
        by_run.setdefault(one.run, set()).add(one.name)
    assert len(by_run) < len(planned), "questions share runs"
    for name in ("orders", "methods", "measures"):
        for one in grid.read(grid.FILE, name, order=0):
            assert dataclasses.replace(one.run, model="gpt2-xl") == \
                grid.read(grid.FILE, name, order=0, model="gpt2-xl", cases=[one.name])[0].run
