"""Demands by hand, recall and single edits against the measures that they are made of."""

import numpy as np
import pandas as pd
import pytest

from editcore import causal, checkup, metrics
from editcore.editors import EDITORS, EditorInputs, configure


def test_verdicts_keep_the_bounds():
    table = checkup.verdicts({"seen": 98.0, "rome ES": 98.9, "megabytes": 20.1, "facts": 5000}).set_index("asked")
    met = {asked.split(" ≥")[0].split(" ≤")[0]: row.met for asked, row in table.iterrows()}
    assert met["recall, wordings seen with the fact"] == "yes" and met["facts known"] == "yes"
    assert met["ROME, single edits: efficacy"] == "no" and met["size of the weights, MB"] == "no"
    assert list(table["met"]).count("-") == len(checkup.DEMANDS) - 4
    assert table.loc["facts known ≥ 5,000", "measured"] == "5,000"
    with pytest.raises(ValueError, match="nothing asks for 'colour'"):
        checkup.verdicts({"colour": 1.0})


def test_recall_is_exact_match(gpt2, facts):
    model, tok = gpt2
    pairs = [(fact.text, fact.target_true) for fact in facts if fact.target_true]
    table = checkup.recall(model, tok, {"asked": pairs, "first": pairs[:1]}).set_index("kind")
    assert table["prompts"].to_dict() == {"asked": len(pairs), "first": 1}
    right = [fact.text for fact in causal.known(model, tok, facts)]
    assert table.loc["asked", "recall"] == pytest.approx(100 * len(right) / len(pairs))


def test_single_edits_measure_each_delta_alone(gpt2, facts):
    model, tok = gpt2
    config, sources = configure("ft", {"layer": 0, "epsilon": 0.05, "steps": 3}), EditorInputs()
    rows = checkup.single_edits(model, tok, facts[:2], [("ft", config)], sources)
    method = EDITORS["ft"]
    delta = method.edit(model, tok, facts[1:2], config, method.prepare(model, tok, config, sources))
    with delta.applied(model):
        wanted = {row["metric"]: row["value"] for row in metrics.measure(model, tok, facts[1:2])}
    found = rows[rows["fact"] == facts[1].case_id].set_index("metric")["value"].to_dict()
    assert found == pytest.approx(wanted)
    assert rows[["number", "editor", "layer"]].drop_duplicates().values.tolist() == [[0, "ft", 0]]


def test_pieces_counts_tokens(gpt2, facts):
    _, tok = gpt2
    found = checkup.pieces(tok, facts)
    sizes = [len(tok("a " + fact.subject)["input_ids"]) - len(tok("a")["input_ids"]) for fact in facts]
    assert found["pieces"] == pytest.approx(100 * np.mean([size > 1 for size in sizes]))
    assert found["one token"] + found["more tokens"] == pytest.approx(100)


def test_location_takes_the_early_layers(tmp_path):
    values = {"state": [40, 90, 95, 99], "mlp": [30, 10, 0, 0], "attention": [5, 5, 5, 5]}
    trace = pd.DataFrame([{"kind": kind, "role": "last subject token", "layer": layer, "value": value, "clean": 100.0,
                           "noised": 20.0} for kind, line in values.items() for layer, value in enumerate(line)])
    wanted = {"state": 87.5, "mlp": 12.5, "attention": -18.75}
    assert checkup.location(trace) == (pytest.approx(wanted), 1)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2_000_000)
    assert checkup.megabytes(tmp_path) == 2.0 and np.isnan(checkup.megabytes(tmp_path / "none"))
