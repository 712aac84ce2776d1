"""editcore.lineups: the study's grids, cases times axes, what has no records, and files that are wrong, by name."""

import pytest

from editcore.instructedit import lineups
from editcore.instructedit import trained_editors as systems


def test_the_grids_of_the_study_are_sound():
    for name in lineups.names():
        named = lineups.read(lineups.FILE, name)
        assert named and all(systems.configured(one.system)[0] for one in named)
        assert lineups.read(lineups.FILE, name, examples=12)[0].system.examples == 12
    full = lineups.read(lineups.FILE, "main", seed=[0, 1])
    assert [one.system.seed for one in full] == [0, 1] * (len(full) // 2)


def test_grids(tmp_path):
    path = tmp_path / "systems.toml"
    path.write_text('[common]\nexamples = 50\n[one]\nsettings = {lr = 0.1}\n[[one.cases]]\nname = "{style} {seed}"\n'
                    'axes = {style = ["full", "none"], seed = [0, 1]}\nsettings = {lr = 0.2}\n[two]\n[[two.cases]]\n'
                    'name = "a"\n[full.30_x]\nseeds = [1]\n')
    named = lineups.read(path, "one", examples=70, settings={"rank": 8})
    assert lineups.names(path) == ["one", "two"]
    assert [one.name for one in named] == ["full 0", "full 1", "none 0", "none 1"]
    assert named[3].system == systems.make(style="none", seed=1, examples=70, settings={"lr": 0.2, "rank": 8})
    for text, words in (("[one]\n", "cases must be given"), ('[one]\n[[one.cases]]\nname="a"\nstile="x"', "'stile'"),
                        ('[one]\n[[one.cases]]\nname="a"\n[[one.cases]]\nname="b"', "'a' and 'b' are the same system"),
                        ('[one]\n[[one.cases]]\nname="a"\n[[one.cases]]\nname="a"\nseen=3', "differ in more than"),
                        ('[one]\n[[one.cases]]\nname="a"\ntasks=["recnt"]', "tasks is"),
                        ('[one]\n[[one.cases]]\nname="a"\ntasks="recent"', "tasks must be tuple"),
                        ('[one]\n[[one.cases]]\nname="a"\ncounts={convsnt=3}', "records of 'convsnt'"),
                        ('[one]\n[[one.cases]]\nname="{x}"', "its name asks for 'x'")):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            lineups.read(path, "one")
    with pytest.raises(ValueError, match="no grid 'three'"):
        lineups.read(path, "three")


def test_what_has_no_records_is_left_out_and_said_so(tmp_path, caplog):
    data = tmp_path / "data"
    data.mkdir()
    for task in ("recent", "counterfact"):
        (data / f"{task}_train.json").write_text("[]")
    words = {"model": str(tmp_path), "data": str(data), "examples": 6}
    assert lineups.present(str(tmp_path), str(data)) == ("recent", "counterfact")
    with caplog.at_level("INFO", "editcore"):
        named = lineups.read(lineups.FILE, "directions", **words)
    assert [one.name for one in named] == ["InstructEdit", "MEND, multi-task", "MEND on Recent", "MEND on CounterFact",
                                           "on Recent", "random words"], "of two that became the same, the first"
    assert named[0].system.tasks == ("recent", "counterfact")
    assert "MEND on ZsRE is left out: no training records of zsre" in caplog.text
    assert "on Recent, 25 × ConvSent is left out" in caplog.text
    assert "on Recent, CounterFact is left out: on the tasks that have records it is 'InstructEdit'" in caplog.text
    assert [one.name for one in lineups.read(lineups.FILE, "balance", **words)] == ["ConvSent × 0"]
    path = tmp_path / "systems.toml"
    path.write_text(f'[one]\nmodel = "{tmp_path}"\ndata = "{data}"\nexamples = 6\n[[one.cases]]\nname = "{{tasks}}"\n'
                    'axes.tasks = [["recent"], ["zsre"]]\n')
    assert [one.system.tasks for one in lineups.read(path, "one")] == [("recent",)], "the file's own folder and axes"
    (data / "recent_train.json").unlink()
    with pytest.raises(ValueError, match="grid 'one': there are training records for none of its cases"):
        lineups.read(path, "one")
