"""The Snakefile's runs, failed, killed and resumed, compared with those of the plain runner.

Snakemake is not part of the environment (it is the extra "scale"), so that these tests are skipped without it. They
take a few minutes: SNAKEMAKE=/path/to/its/bin/snakemake python -m pytest tests/test_snakefile.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from editcore.study import grid
from editcore.study import loop as study
from editcore.study import planning as plan

ROOT = Path(__file__).parents[1]
SNAKEMAKE = os.environ.get("SNAKEMAKE") or shutil.which("snakemake")
needs_snakemake = pytest.mark.skipif(not SNAKEMAKE, reason="snakemake is not here: pip install -e .[scale]")

QUICK = 10
SLOW = 250      # optimiser steps of an edit, so that there is time to kill it
GRIDS = """
[slow]
model = "{model}"
n_edits = 5
retest_every = 2
downstream_every = 0
checkpoint_every = 1
settings = {{ layer = 1, steps = {steps}, lr = 0.02, stop_loss = 0.0 }}
[slow.axes]
untouched = [2, 3, 4]
[[slow.cases]]
name = "ROME, {{untouched}} followed"
editor = "rome"
"""
# A queue of jobs in two scripts, as a cluster has them: one takes a job and says its number, one says how it went.
SUBMIT = """
import os, subprocess, sys
folder, script = sys.argv[1:]
run = f"sh {script}; echo $? > {folder}/$$.code"
child = subprocess.Popen(["sh", "-c", run], start_new_session=True, stdin=subprocess.DEVNULL,
                         stdout=open(f"{folder}/log", "a"), stderr=subprocess.STDOUT)
print(child.pid)
"""
STATUS = """
import pathlib, sys
folder, job = sys.argv[1:]
code, process = pathlib.Path(folder, f"{job}.code"), pathlib.Path("/proc", job, "stat")
if code.exists() and code.read_text():
    print("success" if code.read_text().strip() == "0" else "failed")
else:
    print("running" if process.exists() and process.read_text().split()[2] != "Z" else "failed")
"""


@pytest.fixture
def planned(place, tmp_path):
    """Write the grid with edits of so many optimiser steps: (its file, the steps of its plan)."""
    def write(steps=QUICK):
        path = tmp_path / "study.toml"
        path.write_text(GRIDS.format(model=place, steps=steps))
        return path, plan.steps(grid.read(path, "slow"), tmp_path / "runs")
    return write


@pytest.fixture(scope="module")
def expected(place, tmp_path_factory):
    """{id: rows} of the grid's runs with edits of so many steps, each made by itself in this process, once."""
    folder, found = tmp_path_factory.mktemp("plain"), {}

    def rows(steps):
        if steps not in found:
            (folder / "study.toml").write_text(GRIDS.format(model=place, steps=steps))
            for one in grid.read(folder / "study.toml", "slow"):
                study.execute(one.run, folder / str(steps))
            found[steps] = rows_in(folder / str(steps))
        return found[steps]
    return rows


@pytest.fixture
def start(tmp_path):
    """Start snakemake on the grid in tmp_path; what still lives at the end is killed."""
    made = []

    def begin(*words, target="runs", config=()):
        command = [SNAKEMAKE, target, "--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path),
                   *words, "--config", f"python={sys.executable}", f"file={tmp_path / 'study.toml'}", "out=runs",
                   *config]
        made.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                     start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        return made[-1]
    yield begin
    for child in made:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def ended(child):
    """(exit code, what it wrote)."""
    text, _ = child.communicate(timeout=900)     # a busy machine
    return child.returncode, text


def rows_in(out):
    return {path.parent.name: pd.read_parquet(path) for path in sorted(Path(out).glob("*/rows.parquet"))}


def assert_same(found, expected):
    """Equal runs, equal rows."""
    assert list(found) == list(expected) and len(found) == 3
    for name, rows in expected.items():
        pd.testing.assert_frame_equal(found[name], rows, check_exact=True)


def progress(out, steps):
    """Edits kept in the checkpoints under `out`, by run; 0 where there is none."""
    return {one.id: head["step"] if (head := checkpoint(out, one.id)) else 0 for one in steps}


def checkpoint(out, name):
    """The head of a run's checkpoint, None if there is none."""
    try:
        return json.loads((Path(out) / name / "checkpoint" / "checkpoint.json").read_text())
    except FileNotFoundError:
        return None


def wait_for(happened, child, seconds=240):
    """Wait until happened() is true and return what it gave; `child`, which makes it happen, must live so long."""
    end = time.monotonic() + seconds
    while not (found := happened()):
        assert child.poll() is None and time.monotonic() < end, "it never happened"
        time.sleep(0.01)
    return found


def marks(out):
    """{run: when its run.json was written}."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(out).glob("*/run.json")}


@needs_snakemake
def test_two_workers_a_failed_run_and_then_the_rest(planned, start, expected, tmp_path):
    path, steps = planned()
    spoiled = tmp_path / "runs" / steps[1].id / "checkpoint"
    spoiled.mkdir(parents=True)
    (spoiled / "checkpoint.json").write_text("{")
    code, text = ended(start("--cores", "2"))
    assert code == 1 and "2 of 4 steps" in text
    assert "damaged checkpoint" in (tmp_path / "runs" / steps[1].id / "log.txt").read_text()
    before = marks(tmp_path / "runs")
    assert set(before) == {steps[0].id, steps[2].id}
    shutil.rmtree(spoiled)
    code, text = ended(start("--cores", "2"))
    assert code == 0, text
    after = marks(tmp_path / "runs")
    assert set(after) == {one.id for one in steps} and before.items() <= after.items(), "done once, not again"
    assert_same(rows_in(tmp_path / "runs"), expected(QUICK))
    code, text = ended(start("--cores", "2"))
    assert code == 0 and "run    " not in text and marks(tmp_path / "runs") == after, text


@needs_snakemake
@pytest.mark.parametrize("everything", [True, False], ids=["machine", "snakemake"])
def test_killed_it_goes_on_from_the_checkpoints(planned, start, expected, tmp_path, everything):
    """SIGKILL to all its processes, as when a machine dies, or to snakemake alone, whose jobs then go on a while."""
    path, steps = planned(SLOW)
    child, out = start("--cores", "2"), tmp_path / "runs"
    wait_for(lambda: len([step for step in progress(out, steps).values() if step >= 2]) >= 2, child)
    os.killpg(child.pid, signal.SIGKILL) if everything else child.kill()
    child.wait()
    kept = {one.id: checkpoint(out, one.id) for one in steps}
    done = marks(out)
    code, text = ended(start("--cores", "2"))
    assert code == 0, text
    assert done.items() <= marks(out).items()
    for name, head in kept.items():
        seconds = json.loads((out / name / "run.json").read_text())["update_seconds"]
        earlier = [round(one, 4) for one in head["seconds"]] if head else []
        assert seconds[:len(earlier)] == earlier, "edits of the checkpoint are not made again"
    assert sum(len(head["seconds"]) for head in kept.values() if head) >= 4
    assert_same(rows_in(out), expected(SLOW))


@needs_snakemake
def test_it_takes_over_from_the_plain_runner_and_the_other_way_round(planned, start, expected, tmp_path):
    path, steps = planned(SLOW)
    out = tmp_path / "runs"
    plain = subprocess.Popen([sys.executable, "-m", "editcore", "study", "--file", str(path), "-o", str(out), "--only",
                              steps[0].id], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    head = wait_for(lambda: (found := checkpoint(out, steps[0].id)) and found["step"] >= 2 and found, plain)
    plain.send_signal(signal.SIGTERM)
    assert "the same command takes up what was kept" in plain.communicate()[1].decode() and plain.returncode == 130
    child = start("--cores", "1")
    wait_for(lambda: (out / steps[0].id / "run.json").exists()
             and sum(progress(out, steps).values()) >= 2, child)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    seconds = json.loads((out / steps[0].id / "run.json").read_text())["update_seconds"]
    assert seconds[:2] == [round(one, 4) for one in head["seconds"][:2]]
    kept, done = {one.id: checkpoint(out, one.id) for one in steps}, marks(out)
    subprocess.run([sys.executable, "-m", "editcore", "study", "--file", str(path), "-o", str(out)], check=True,
                   capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.items() <= marks(out).items()
    for name, head in kept.items():
        if head:
            seconds = json.loads((out / name / "run.json").read_text())["update_seconds"]
            assert seconds[:head["step"]] == [round(one, 4) for one in head["seconds"]]
    assert_same(rows_in(out), expected(SLOW))


@needs_snakemake
def test_jobs_of_a_submit_command_one_of_which_is_killed(planned, start, expected, tmp_path):
    """The job of a run dies with its machine after two edits; it is submitted again and goes on from there."""
    path, steps = planned(SLOW)
    out, queue = tmp_path / "runs", tmp_path / "queue"
    queue.mkdir()
    for name, text in (("submit", SUBMIT), ("status", STATUS)):
        (queue / f"{name}.py").write_text(text)
    child = start("--executor", "cluster-generic", "--jobs", "2", "--retries", "1", "--latency-wait", "20",
                  "--cluster-generic-submit-cmd", f"{sys.executable} {queue / 'submit.py'} {queue}",
                  "--cluster-generic-status-cmd", f"{sys.executable} {queue / 'status.py'} {queue}",
                  "--seconds-between-status-checks", "1")
    (one, *_) = wait_for(lambda: [name for name, step in progress(out, steps).items() if step >= 2], child)
    head = checkpoint(out, one)
    killed = [int(stat.parent.name) for stat in Path("/proc").glob("[0-9]*/stat")
              if one in command_of(stat.parent) and "--only" in command_of(stat.parent)]
    for group in {os.getpgid(one) for one in killed}:
        os.killpg(group, signal.SIGKILL)
    assert killed
    code, text = ended(child)
    assert code == 0 and "Trying to restart" in text, text
    seconds = json.loads((out / one / "run.json").read_text())["update_seconds"]
    assert seconds[:2] == [round(each, 4) for each in head["seconds"][:2]]
    assert_same(rows_in(out), expected(SLOW))


@needs_snakemake
def test_the_report_follows_the_runs_it_needs(planned, start, tmp_path):
    """A full study of one notebook: its runs are made as jobs, it only reads them, its page is written."""
    path, _ = planned()
    path.write_text(path.read_text() + "[full.20_x]\nn = 2\n")
    cells = [nbformat.v4.new_markdown_cell("# What is it?\n\nA test."),
             nbformat.v4.new_code_cell("n: int = 1  # edits", metadata={"tags": ["parameters"]}),
             nbformat.v4.new_code_cell("from editcore import grid\n"
                                       f"planned = grid.read({str(path)!r}, 'slow', n_edits=n)\n"
                                       f"made, df = grid.execute(planned, {str(tmp_path / 'runs')!r})")]
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    (tmp_path / "books").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "books" / "20_x.ipynb")
    more = ("full=true", f"notebooks={tmp_path / 'books'}", f"reports={tmp_path / 'reports'}")
    code, text = ended(start("--cores", "2", target="report", config=more))
    assert code == 0, text
    wanted = plan.steps(grid.read(path, "slow", n_edits=2), tmp_path / "runs")
    assert {one.state for one in wanted} == {"done"} and set(marks(tmp_path / "runs")) == {one.id for one in wanted}
    assert (tmp_path / "reports" / "20_x.html").is_file() and (tmp_path / "reports" / "index.html").is_file()
    assert all((tmp_path / "runs" / one.id / "log.txt").is_file() for one in wanted), "made by jobs"


def command_of(process):
    """A process's command line, "" once it is gone."""
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def test_profiles_are_read_and_agree_on_what_keeps_results():
    profiles = {path.parent.name: yaml.safe_load(path.read_text()) for path in ROOT.glob("profiles/*/config.yaml")}
    assert set(profiles) == {"default", "slurm"} and profiles["slurm"]["executor"] == "slurm"
    assert profiles["default"].items() <= profiles["slurm"].items()
