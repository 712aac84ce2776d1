"""editcore itself: the README's five lines, and a face that is complete and quick to import."""

import subprocess
import sys

import pytest

import editcore as ec


def test_five_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path))
    model, tok = ec.load("pocket")
    fact = ec.Fact(prompt="The capital of {} is", subject="France", target_new="Rome")
    before = ec.content_hash(model)
    delta = ec.edit(model, tok, [fact], "rome")
    with delta.applied(model):
        rows = ec.measure(model, tok, [fact])
        assert ec.write(model, tok, [fact.text], 2)[0].strip().startswith("Rome")
    assert ec.content_hash(model) == before and {row["fact"] for row in rows} == {0}
    cached = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = ec.edit(model, tok, [fact], "rome")
    assert again.norm() == delta.norm() > 0
    assert cached == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_without_a_corpus_the_model_writes_one(gpt2, facts, tmp_path):
    model, tok = gpt2
    delta = ec.edit(model, tok, facts[:2], "memit", cache=tmp_path, layers=(1, 2),
                    lambda_=100, steps=2)
    assert delta.norm() > 0 and list(tmp_path.glob("texts-*.json"))


@pytest.mark.parametrize("name", ec.__all__)
def test_every_name_is_there(name):
    assert getattr(ec, name) is not None and name in dir(ec)


def test_importing_it_imports_no_torch():
    code = "import sys, editcore; sys.exit('torch' in sys.modules or not editcore.__all__)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        ec.other  # noqa: B018
