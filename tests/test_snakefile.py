"""The Snakefile makes the runs of a plan, killed and resumed, with the rows of the plain command.

Snakemake is not part of the environment (it is the extra "scale"): without it these are skipped.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from editcore.study import plans
from editcore.study.loop import execute

ROOT = Path(__file__).parents[1]
SNAKEMAKE = os.environ.get("SNAKEMAKE") or shutil.which("snakemake")
WORDS = {"n_edits": 5, "retest_every": 2, "downstream_every": 0, "checkpoint_every": 1,
         "untouched": 2}


def test_profiles_are_read_and_agree_on_what_keeps_results():
    profiles = {path.parent.name: yaml.safe_load(path.read_text())
                for path in ROOT.glob("profiles/*/config.yaml")}
    assert set(profiles) == {"default", "slurm"} and profiles["slurm"]["executor"] == "slurm"
    assert profiles["default"].items() <= profiles["slurm"].items()


@pytest.mark.skipif(not SNAKEMAKE, reason="snakemake is not here: pip install -e .[scale]")
def test_killed_it_goes_on_and_ends_with_the_rows_of_the_plain_way(tmp_path):
    (tmp_path / "profiles").symlink_to(ROOT / "profiles")
    words = [word for name, value in WORDS.items() for word in (name, str(value))]
    command = [SNAKEMAKE, "runs", "--snakefile", str(ROOT / "Snakefile"), "--directory", tmp_path,
               "--cores", "2", "--config", f"python={sys.executable}", "plans=conventions",
               f"words={' '.join(words)}", "out=my runs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "my runs"
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    while not list(out.glob("*/run.json")):
        assert child.poll() is None
        time.sleep(0.1)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    first = {path: path.read_text() for path in out.glob("*/run.json")}
    subprocess.run(command, env=environment, check=True)
    assert all(path.read_text() == text for path, text in first.items()), "made once"
    for run in plans.conventions(**WORDS):
        folder = execute(run, tmp_path / "plain")
        rows = pd.read_parquet(out / folder.name / "rows.parquet")
        pd.testing.assert_frame_equal(rows, pd.read_parquet(folder / "rows.parquet"),
                                      check_exact=True)
