"""Single records: answers in words agree with the scores, and are cached by case."""

import contextlib

import numpy as np
import pandas as pd
import pytest
import torch
from test_scores import case, mend_config, some_records

from editcore.instructedit import scores, single_records
from editcore.instructedit.questions import kinds_of, questions_of
from editcore.instructedit.scores import evaluate
from editcore.model import load
from editcore.tokens import encode

METRICS = {"edit": "Rel", "rephrase": "Gen", "locality": "Loc", "portability": "Port"}


@pytest.fixture
def cases(tiny):
    """FT-L and a trained editor with instructions, on three facts and on two topics."""
    facts = tuple(some_records()[:3])
    talk = tuple(some_records()[3:])
    trained = scores.cases([("Mine", mend_config(tiny))], {"recent": facts, "convsent": talk})
    return [case(), case(records=talk), *trained]


def test_right_agrees_with_the_scores(tiny, cases, tmp_path):
    folders = {"out_dir": tmp_path / "a", "editors": tmp_path}
    rows = single_records.table(cases, tiny, **folders)
    rows["metric"] = rows["kind"].str.split(":").str[0].map(METRICS)
    key = ["editor", "task", "case_id", "metric"]
    want = evaluate(cases, tiny, out_dir=tmp_path / "b", editors=tmp_path)
    want = want[want["metric"].isin(METRICS.values())].set_index(key)["value"].sort_index()
    pd.testing.assert_series_equal(rows.groupby(key)["right"].mean(), want, check_names=False,
                                   atol=1e-6)
    assert rows[rows["editor"] == "FT-L"].groupby("metric")["right"].mean()["Rel"] > 0.5


def test_answers_are_what_the_model_says(tiny, cases, tmp_path):
    model, tok = load(tiny)
    rows = single_records.table(cases[:1], tiny, 2, out_dir=tmp_path)
    records = some_records()[:2]
    assert rows["prompt"].tolist() == [ask[1] for one in records for ask in questions_of(one)]
    edits = scores.edits_of(model, tok, cases[0], records, tiny)
    for case_id, record in enumerate(records):
        first = rows[rows["case_id"] == case_id].iloc[0]
        assert (first["kind"], first["wanted"]) == ("edit", record.target)
        (ids,) = encode(tok, [f"{record.prompt} {record.target}"])
        start = len(encode(tok, [record.prompt])[0])
        for column, edit in (("before", None), ("after", edits[case_id])):
            best = answer(model, ids, edit)[start - 1:-1]
            assert first[column] == tok.decode(best).strip()
    edited = rows[rows["kind"] == "edit"]
    assert (edited["right"] == (edited["after"] == edited["wanted"])).all()


def answer(model, ids, edit):
    """The most likely token behind each of the ids, under an edit or none."""
    with edit.applied(model) if edit else contextlib.nullcontext():
        return model(input_ids=torch.tensor([ids])).logits[0].argmax(-1)


def test_sentiments_lean_and_instructions_are_left_out(tiny, cases, tmp_path):
    rows = single_records.table(cases[1:], tiny, out_dir=tmp_path, editors=tmp_path)
    assert not rows["prompt"].str.contains("Task:").any()
    talk = rows[rows["task"] == "convsent"]
    edits = talk[talk["kind"] == "edit"]
    assert edits["wanted"].tolist() == ["positive"] * 2 + ["negative"] * 2
    assert edits["after"].str.fullmatch(r"\d+ % (positive|negative)").all()
    lean = edits["after"].str.split().str[0].astype(int) / 100
    assert (edits["right"] <= lean + 0.01).all() and np.isfinite(edits["right"]).all()
    assert set(talk["kind"]) == {"edit", "locality: other topic"}
    for record in some_records():
        assert len(kinds_of(record)) == len(questions_of(record))


def test_cases_are_cached_each_by_itself(tiny, cases, tmp_path, monkeypatch):
    folders = {"out_dir": tmp_path, "editors": tmp_path / "editors"}
    rows = single_records.table(cases, tiny, 1, **folders)
    assert len(list(tmp_path.glob("*.parquet"))) == len(cases)
    monkeypatch.setattr(single_records, "read", None)
    pd.testing.assert_frame_equal(rows, single_records.table(cases, tiny, 1, **folders))
    assert set(rows["case_id"]) == {0} and set(rows["seed"]) == {-1, 5}
    order = rows.groupby(["task", "kind"], sort=False)["editor"].agg(list)
    assert order["recent", "edit"] == ["FT-L", "Mine"], "editors stand below each other"
