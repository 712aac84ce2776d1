"""Plans of tiny runs compared with what executing them leaves behind; locks held by other processes; notebooks read."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from editcore import report
from editcore.study import grid, slots
from editcore.study import loop as study
from editcore.study import planning as plan
from editcore.study import run as inputs
from editcore.study.grid import Planned

ROOT = Path(__file__).parents[1]
FULL = plan.full(ROOT / grid.FILE)


@pytest.fixture
def planned(place):
    """Two quick ROME runs of two edits."""
    words = {"model": str(place), "editor": "rome", "n_edits": 2, "downstream_every": 0, "untouched": 2,
             "settings": {"layer": 1, "steps": 2}}
    return [Planned("ROME", study.make(**words, order=order)) for order in (0, 1)]


def test_steps_are_the_folders_that_runs_are_in(planned, tmp_path):
    found = plan.steps([*planned, planned[0]], tmp_path)
    assert [one.run for one in found] == [one.run for one in planned] and {one.state for one in found} == {"missing"}
    folder = study.execute(planned[1].run, tmp_path)
    assert folder.name == found[1].id
    begun = tmp_path / found[0].id / "checkpoint"
    begun.mkdir(parents=True)
    (begun / "checkpoint.json").write_text("{}")
    assert [one.state for one in plan.steps(planned, tmp_path)] == ["begun", "done"]


def test_listing_is_a_line_a_run(planned, tmp_path, place):
    lines = plan.listing(plan.steps(planned, tmp_path)).splitlines()
    assert [line.split()[1] for line in lines] == ["missing", "missing"]
    assert lines[1].split()[0] == plan.steps(planned, tmp_path)[1].id
    for word in (f"model={place}", "n_edits=2", "order=1", "downstream_every=0", "settings=layer:1,steps:2"):
        assert word in lines[1].split(), word
    assert "items=" not in lines[1]


def test_what_is_missing_is_made_once(planned, tmp_path):
    found = plan.steps(planned, tmp_path)
    assert plan.make(found[:1], tmp_path) == 1
    first = (tmp_path / found[0].id / "run.json").stat().st_mtime_ns
    assert plan.make(plan.steps(planned, tmp_path), tmp_path) == 1
    assert plan.make(plan.steps(planned, tmp_path), tmp_path) == 0
    assert (tmp_path / found[0].id / "run.json").stat().st_mtime_ns == first
    made, df = grid.execute(planned, tmp_path)
    assert list(made["name"]) == ["ROME", "ROME"] and list(made["run"]) == [one.id for one in found]
    assert set(df["editor"]) == {"ROME"} and set(df["method"]) == {"rome"} and set(df["run"]) == set(made["run"])


HOLD = "import sys, time; from editcore import slots\n" \
       "with slots.held(sys.argv[1], [sys.argv[2]]):\n    print('held', flush=True); time.sleep(float(sys.argv[3]))"


def test_a_run_that_another_process_makes_is_waited_for(planned, tmp_path):
    (one,) = plan.steps(planned[:1], tmp_path)
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / ".locks"), one.id, "1"],
                             stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdout.readline() == "held\n"
        began = time.monotonic()
        assert plan.make([one], tmp_path) == 1
        assert time.monotonic() - began > 0.5, "it had to wait for the other"


def test_a_gpu_is_taken_where_there_is_one(planned, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(plan, "gpus", lambda: ["gpu-a", "gpu-b"])
    monkeypatch.setattr(plan, "use_gpu", used.append)
    monkeypatch.setattr(slots, "machine_folder", lambda: tmp_path / "cards")
    monkeypatch.setattr(study, "execute_all", lambda runs, *more: None)
    with slots.held(tmp_path / "cards", ["gpu-a"]):
        plan.make(plan.steps(planned, tmp_path), tmp_path)
    on_cpu = [Planned(one.name, dataclasses.replace(one.run, device="cpu")) for one in planned]
    plan.make(plan.steps(on_cpu, tmp_path), tmp_path)
    assert used == [1]


def written(path, *cells):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells]), path)
    return path


def test_runs_of_a_notebook_are_read_off_its_calls(tmp_path):
    path = written(tmp_path / "10_x.ipynb", "n: int = 3", "planned = grid.read(grid.FILE, 'orders', n_edits=n)\n"
                   "made, df = grid.execute(planned, 'nowhere')", "runs = [study.make(order=i) for i in range(n)]",
                   "more = [x for name in ('layers', 'tokens') for x in grid.read(grid.FILE, name, order=0)]",
                   "place = inputs.files(study.make(order=9))['facts']    # no run is wanted")
    found = plan.of_notebook(path, {"n": 5})
    first, second = grid.read(grid.FILE, "orders", n_edits=5), [study.make(order=i) for i in range(5)]
    assert found[:len(first)] == first and [one.run for one in found[len(first):len(first) + 5]] == second
    assert [one.run.order for one in found].count(9) == 0
    assert found[len(first) + 5:] == grid.read(grid.FILE, "layers", order=0) + grid.read(grid.FILE, "tokens", order=0)
    late = written(tmp_path / "late.ipynb", "found = grid.read(grid.FILE, 'orders', n_edits=df['step'].max())")
    with pytest.raises(ValueError, match="late.ipynb: grid.read.* cannot be planned: name 'df' is not defined"):
        plan.of_notebook(late, {})


def test_full_parameters_are_tables(tmp_path):
    (tmp_path / "study.toml").write_text("[full]\n20_x = 3\n")
    with pytest.raises(ValueError, match=r"full.20_x must be a table, \[full.20_x\]"):
        plan.full(tmp_path / "study.toml")


@pytest.mark.parametrize("stem", FULL)
def test_the_full_study_is_larger_and_can_be_planned(stem, monkeypatch):
    """Its parameters are the notebook's own, more edits than by default, and every run has its inputs."""
    monkeypatch.chdir(ROOT)
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    report.check(path, FULL[stem])
    default = {one.name: one.default for one in report.parameters(path).values()}
    small, large = plan.of_notebook(path, default), plan.of_notebook(path, default | FULL[stem])
    if "n_edits" not in default:    # it trains hypernetworks and makes no runs
        assert not large and len(FULL[stem]["seeds"]) > len(default["seeds"])
        return
    assert small and max(one.run.n_edits for one in large) > max(one.run.n_edits for one in small)
    assert len({one.id for one in plan.steps(large)}) == len({one.run for one in large})
    longest = max((one.run for one in large), key=lambda run: run.n_edits + run.untouched)
    assert len(inputs.schedule(longest, inputs.files(longest)["facts"])[1]) == longest.untouched, "enough facts"
