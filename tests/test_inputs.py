"""Parameters and small files in; what a run is given compared with what was written."""

import json
from pathlib import Path

import pytest

from editcore.editors import EDITORS
from editcore.facts import order
from editcore.files import read_lines
from editcore.model import resolve, short_name
from editcore.study import run as inputs


def test_lists_and_dicts_become_tuples():
    run = inputs.make(settings={"layers": [0, 1], "lr": 0.1}, measure=["ES"], leave_out=[3])
    assert run.settings == (("layers", (0, 1)), ("lr", 0.1)) and run.measure == ("ES",) and run.leave_out == (3,)
    assert hash(run) == hash(inputs.make(settings=[["layers", [0, 1]], ["lr", 0.1]], measure=("ES",), leave_out=(3,)))


@pytest.fixture
def folder(tmp_path):
    """A model folder's neighbours, without the model."""
    (tmp_path / "tasks").mkdir()
    items = [{"sentence": f"s{i}", "label": int(i % 3 == 0)} for i in range(12)]
    (tmp_path / "tasks" / "sst2.json").write_text(json.dumps(items))
    (tmp_path / "facts.json").write_text("[]")
    (tmp_path / "texts.txt").write_text("one line\n\n  two\\nlines \nthree\n")
    return tmp_path


def test_files_beside_the_model_and_files_given(folder, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x")
    found = inputs.files(inputs.make(model=str(folder), held_out=str(other)))
    assert found == {"facts": folder / "facts.json", "texts": folder / "texts.txt", "tasks": folder / "tasks",
                     "held_out": other}
    with pytest.raises(FileNotFoundError, match="stats: nowhere: no such file"):
        inputs.files(inputs.make(model=str(folder), stats="nowhere"))
    with pytest.raises(FileNotFoundError, match="facts: .*no such file"):
        inputs.files(inputs.make(model="gpt2-xl"))


def test_the_pocket_model_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve("pocket")) == Path(__file__).parents[1] / "data" / "pocket"
    assert resolve("gpt2-xl") == "gpt2-xl" and short_name("models/gpt2-xl") == "gpt2-xl"


def test_second_moments_must_come_from_somewhere(folder):
    run, rome = inputs.make(model="m"), EDITORS["rome"]
    with pytest.raises(ValueError, match="rome needs second moments of the keys of m: give texts .* or stats"):
        inputs.check_editor(run, rome, {"facts": folder})
    inputs.check_editor(run, rome, {"stats": folder})
    inputs.check_editor(run, EDITORS["ft"], {})    # it needs none
    with pytest.raises(ValueError, match="rome edits beside the weights"):
        inputs.check_editor(run, EDITORS["grace"], {})


def test_lines_of_a_text(folder, tmp_path):
    assert read_lines(folder / "texts.txt") == ["one line", "two\nlines", "three"]
    assert read_lines(folder / "texts.txt", 2) == ["one line", "two\nlines"]
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty.txt: no text in it"):
        read_lines(tmp_path / "empty.txt")


def test_task_items_are_balanced_when_cut(folder):
    assert len(inputs.read_tasks(folder / "tasks")["sst2"]) == 12
    assert len(inputs.read_tasks(folder / "tasks", 99)["sst2"]) == 12
    cut = inputs.read_tasks(folder / "tasks", 6)["sst2"]
    assert sorted(item["label"] for item in cut) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="none of sst2.json, mrpc.json, cola.json, rte.json is in it"):
        inputs.read_tasks(folder)


def test_hashes_tell_contents_not_names(folder, tmp_path):
    twin = tmp_path / "twin.json"
    twin.write_text("[]")
    first = inputs.hashes({"facts": folder / "facts.json", "tasks": folder / "tasks"})
    assert first["facts"] == inputs.hashes({"facts": twin})["facts"]
    (folder / "tasks" / "rte.json").write_text("[]")
    assert first["tasks"] != inputs.hashes({"tasks": folder / "tasks"})["tasks"]


def test_a_local_model_is_hashed_by_its_files(folder):
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    first = inputs.model_files_hash(str(folder))
    (folder / "facts.json").write_text("[1]")       # not part of the model
    assert first == inputs.model_files_hash(str(folder))
    (folder / "model.safetensors").write_bytes(b"2")
    assert first != inputs.model_files_hash(str(folder))
    assert inputs.model_files_hash("gpt2-xl") != inputs.model_files_hash("gpt2-large")


def test_schedule_follows_the_published_order(facts, tmp_path):
    twin = {"prompt": "{} is", "subject": facts[0].subject.upper(), "target_new": "x", "case_id": 99}
    records = [{"prompt": one.prompt, "subject": one.subject, "target_new": one.target_new, "case_id": one.case_id,
                "target_true": one.target_true} for one in facts]
    (tmp_path / "f.json").write_text(json.dumps([*records, twin]))
    edited, rest = inputs.schedule(inputs.make(n_edits=7, order=3, untouched=2), tmp_path / "f.json")
    assert [one.case_id for one in edited] == [one.case_id for one in order(facts, 3)[:7]]
    assert len(rest) == 2 and not {one.case_id for one in rest} & {one.case_id for one in edited}
    everything, none = inputs.schedule(inputs.make(n_edits=0), tmp_path / "f.json")
    assert len(everything) == 12 and none == []         # a subject counts once, whatever its capitals
    assert inputs.schedule(inputs.make(n_edits=7, order=3, untouched=2), tmp_path / "f.json") == (edited, rest)


def test_prompts_too_long_with_their_context(gpt2, facts):
    _, tok = gpt2
    inputs.check_prompts(64, tok, facts)
    with pytest.raises(ValueError, match="record 0: prompt 'so so so"):
        inputs.check_prompts(64, tok, facts, ("{}", "so " * 60 + "{}"))


@pytest.mark.parametrize("path, name", [("a/pocket/facts.json", "pocket"), ("data/counterfact.json", "counterfact")])
def test_data_are_named_by_file_or_folder(path, name):
    assert inputs.data_name(Path(path)) == name
