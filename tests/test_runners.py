"""Command lines of study and report in; what they plan, make and print compared with the package's own functions."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
from transformers.utils.logging import disable_progress_bar

from editcore.__main__ import main
from editcore.study import grid
from editcore.study import loop as study
from editcore.study import planning as plan

ROOT = Path(__file__).parents[1]
GRIDS = """
[quick]
model = "{model}"
n_edits = 2
downstream_every = 0
untouched = 2
settings = {{ layer = 1, steps = 2 }}
[quick.axes]
order = [0, 1]
[[quick.cases]]
name = "ROME"
editor = "rome"
[slow]
model = "{model}"
n_edits = 8
downstream_every = 0
checkpoint_every = 1
settings = {{ layer = 1, steps = 400, lr = 0.02, stop_loss = 0.0 }}
[[slow.cases]]
name = "ROME"
editor = "rome"
[full.20_x]
n = 3
"""


@pytest.fixture(scope="module")
def place(place):
    """A model folder with facts and texts beside the model, and a file of grids for it."""
    folder = place
    (folder / "study.toml").write_text(GRIDS.format(model=folder))
    return folder


@pytest.fixture
def says(place, tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder: (exit code, standard output, standard error)."""
    monkeypatch.setattr("editcore.progress.to_stderr", disable_progress_bar)
    monkeypatch.setattr(signal, "signal", lambda *given: None)      # pytest's own stays
    monkeypatch.chdir(tmp_path)

    def run(words):
        code = main([*words.split(), *(["--file", str(place / "study.toml")] if "--file" not in words else [])])
        return code, *capsys.readouterr()
    return run


def test_study_lists_makes_and_makes_nothing_twice(says, place, tmp_path):
    _, out, _ = says("study quick --list")
    ids = [line.split()[0] for line in out.splitlines()]
    assert ids == [one.id for one in plan.steps(grid.read(place / "study.toml", "quick"), "results/runs")]
    assert says(f"study quick --only {ids[1]}")[:2] == (0, "results/runs: 1 runs, 1 of them made or finished now\n")
    assert [line.split()[1] for line in says("study quick --list")[1].splitlines()] == ["missing", "done"]
    assert says("study quick")[1] == "results/runs: 2 runs, 1 of them made or finished now\n"
    assert says("study quick")[1] == "results/runs: 2 runs, 0 of them made or finished now\n"
    assert set(study.runs(tmp_path / "results" / "runs")["run"]) == set(ids)
    lines = says("study quick --list -p n_edits 1 order 0,3 -p seed 4")[1].splitlines()
    assert len(lines) == 2 and "n_edits=1 order=3 seed=4" in lines[1]
    assert len(says("study quick slow --list --model " + f"{place} {place}")[1].splitlines()) == 3, "each run once"


@pytest.mark.parametrize("words, message", [
    ("study nothing", "no grid 'nothing'; it has quick, slow"),
    ("study quick --only rome-1", "--only rome-1: not among the runs that these words plan"),
    ("study quick -p edits 5", "-p edits: unknown parameter; known are model"),
    ("study quick -p n_edits few", "-p n_edits few: must be int"),
    ("study quick --model nowhere", "nowhere/facts.json: no such file"),
    ("study --file none.toml", "none.toml: no such file"),
    ("study 21_x --full", "21_x: .*study.toml has no [full.21_x], only 20_x"),
    ("study --full", "20_x.ipynb: no such notebook")])
def test_mistakes_are_one_line(says, words, message):
    code, out, error = says(words)
    assert (code, out) == (2, "") and len(error.splitlines()) == 1
    assert all(part in error for part in message.split(".*"))


def test_full_study_and_full_report_are_given_the_same_parameters(says, tmp_path, monkeypatch, place):
    cell = nbformat.v4.new_code_cell("n: int = 1  # edits\norders: list[int] = [0]  # orders",
                                     metadata={"tags": ["parameters"]})
    call = nbformat.v4.new_code_cell(f"planned = grid.read({str(place / 'study.toml')!r}, 'quick', n_edits=n, "
                                     "order=orders)")
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    (tmp_path / "books").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=[cell, call], metadata=kernel), tmp_path / "books" / "20_x.ipynb")
    built = []
    monkeypatch.setattr("editcore.report.build", lambda *given: built.append(given) or "page")
    for words, wanted in (("", {"n": 3}), ("-p orders 0,1", {"n": 3, "orders": [0, 1]}),
                          ("-p 20_x.n 2 -p orders 1", {"n": 2, "orders": [1]})):
        assert says(f"report --full --notebooks books {words}")[0] == 0
        assert built.pop()[2] == {"20_x": wanted}
        _, out, _ = says(f"study --full --list --notebooks books {words}")
        expected = grid.read(place / "study.toml", "quick", n_edits=wanted["n"], order=wanted.get("orders", [0]))
        assert [line.split()[0] for line in out.splitlines()] == [one.id for one in plan.steps(expected)]


def test_ended_politely_and_taken_up_again(place, tmp_path):
    """SIGTERM, as a cluster sends it before it takes a machine away."""
    command = [sys.executable, "-m", "editcore", "study", "slow", "--file", str(place / "study.toml"), "-o",
               str(tmp_path / "runs")]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    heads, end = [], time.monotonic() + 120
    while not heads or json.loads(heads[0].read_text())["step"] < 2:
        assert time.monotonic() < end and child.poll() is None
        time.sleep(0.01)
        heads = list(tmp_path.glob("runs/*/checkpoint/checkpoint.json"))
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate()
    assert child.returncode == 130 and error.splitlines()[-1].endswith("the same command takes up what was kept")
    kept = json.loads(heads[0].read_text())["seconds"]
    assert 2 <= len(kept) < 8
    subprocess.run(command, check=True, capture_output=True)
    (made,) = tmp_path.glob("runs/*/run.json")
    assert json.loads(made.read_text())["update_seconds"][:len(kept)] == [round(one, 4) for one in kept]


def test_hyper_trains_what_is_missing(says, place, tmp_path, monkeypatch):
    (place / "systems.toml").write_text('[one]\nsettings = {lr = 0.1}\n[[one.cases]]\nname = "a"\n[[one.cases]]\n'
                                        'name = "b"\nstyle = "none"\n')
    asked = []
    monkeypatch.setattr("editcore.instructedit.trained_editors.train_all", lambda several, out, workers: asked.append(
        (several, out, workers)) or [f"{out}/{one.style}" for one in several])
    code, out, _ = says(f"hyper one --examples 8 --seed 3 --workers 2 --file {place / 'systems.toml'}")
    assert code == 0 and out == "results/editors/full\ta\nresults/editors/none\tb\n"
    ((several, _, workers),) = asked
    assert workers == 2 and [(one.style, one.examples, one.seed) for one in several] == [("full", 8, 3), ("none", 8, 3)]
    code, _, said = says(f"hyper two --file {place / 'systems.toml'}")
    assert code == 2 and "no grid 'two'; it has one" in said
