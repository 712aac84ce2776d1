"""Keep a notebook's tables, and lay those published for SmolLM2 beside them.

    answers = published.beside(answers, "words", model, "results")

Trainings of a real model take minutes each and its scores hours, so they are published as tables:
what a notebook wrote to results/tables when it was run with model = "smollm2".
"""

from pathlib import Path

import pandas as pd

from editcore.files import atomic
from editcore.model import short_name

FOLDER = Path("data/trained/smollm2")
TITLES = {"smollm2": "SmolLM2", "smollm2-135m": "SmolLM2"}


def beside(rows, name, model, results="results", folder=FOLDER):
    """Return the rows with a column `model`, behind those published under the same name.

    The rows themselves are written to results/tables/<name>.parquet. Nothing is put before those
    of SmolLM2, nor where nothing is published.
    """
    title = TITLES.get(short_name(model), short_name(model))
    own = rows.assign(model=title).reset_index(drop=True)
    path = Path(results) / "tables" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as tmp:
        own.to_parquet(tmp, index=False)
    published = Path(folder) / f"{name}.parquet"
    if title in TITLES.values() or not published.is_file():
        return own
    return pd.concat([pd.read_parquet(published), own], ignore_index=True)
