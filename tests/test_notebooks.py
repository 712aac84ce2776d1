"""Every notebook, run by papermill with tiny parameters: it ends, its page reads offline."""

from pathlib import Path

import nbformat
import pytest

from editcore import pages, report

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(path.stem for path in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
FEW = {"items": 8, "untouched": 5}      # of study.Run
SMALL = FEW | {"retest_every": 2, "downstream_every": 2}
STORED = ("ft", "calinet", "grace")
TRAINED = {"n_test_records": 2, "examples": 4, "draws": 20, "workers": 1, "training": {"warmup": 2}}
TINY = {        # parameters that keep a notebook to seconds
    "01_pocket_model": {"n_recall": 20, "n_trace": 3, "n_single": 3, "n_swept": 2, "items": 8,
                        "swept_layers": [0]},
    "10_edit": {"n_edits": 6, "retest_every": 3, "run_options": FEW},
    "20_forgetting": {"n_edits": 6, "orders": [0], "workers": 1, "mend": 4,
                      "run_options": FEW | {"retest_every": 2, "downstream_every": 3, "final": []}},
    "22_depth": {"n_edits": 6, "orders": [0], "workers": 1,
                 "run_options": FEW | {"retest_every": 2, "downstream_every": 3, "final": []}},
    "21_disabling": {"n_edits": 6, "n_enriched": 6, "orders": [0], "n_table": 200, "workers": 1,
                     "run_options": FEW | {"retest_every": 2, "downstream_every": 3}},
    "23_delay": {"n_edits": 4, "editors": ["rome", "memit", "ft"], "workers": 1, "sweep_edits": 4,
                 "sweeps": {"batch_size": [2, 4], "lambda_": [1, 10]}, "run_options": SMALL},
    "24_which_number": {"n_edits": 4, "editors": ["rome", "memit", "ft"], "draws": 50, "workers": 1,
                        "run_options": SMALL},
    "90_report": {"n_edits": 4, "editors": ["rome", "memit", "ft"], "workers": 1,
                  "run_options": SMALL},
    "30_multitask": TRAINED | {"settings": {name: {"steps": 2} for name in STORED}},
    "31_directions": TRAINED | {"n_test_records": 5},
    "32_instructions": TRAINED,
    "33_tasks_and_balance": TRAINED,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One folder for all notebooks, so that runs which several ask for are made once."""
    return tmp_path_factory.mktemp("results")


def test_tiny_parameters_name_notebooks_that_exist():
    assert set(TINY) <= set(NOTEBOOKS)


@pytest.mark.parametrize("stem", NOTEBOOKS)
def test_notebook_runs_to_its_end(stem, results):
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    values = dict(TINY.get(stem, {}))
    if "results" in report.parameters(path):
        values.setdefault("results", str(results))
    page = report.run_notebook(path, values, results / "reports")
    executed = page.with_suffix(".ipynb")
    assert report.is_done(executed)
    notebook = nbformat.read(executed, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pages.shown_figures(notebook)) == len(pictures), "figures are shown by figures.show"
    text = page.read_text("utf-8")
    assert text.count("<figcaption>") == len(pictures) and str(ROOT) not in text
