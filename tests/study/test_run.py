"""Runs are checked, found again by their id, and given the files that lie beside their model."""

import dataclasses
import json
from pathlib import Path

import pytest

from editcore.facts import order
from editcore.model import files_hash
from editcore.study.run import (
    Run,
    check_prompts,
    data_name,
    input_files,
    input_hashes,
    make_run,
    read_inputs,
    run_id,
    schedule,
)


@pytest.fixture
def folder(tmp_path):
    """A model folder's neighbours, without the model."""
    (tmp_path / "tasks").mkdir()
    items = [{"sentence": f"s{i}", "label": int(i % 3 == 0)} for i in range(12)]
    (tmp_path / "tasks" / "sst2.json").write_text(json.dumps(items))
    (tmp_path / "facts.json").write_text("[]")
    (tmp_path / "texts.txt").write_text("one line\n\n  two\\nlines \nthree\n")
    return tmp_path


def test_lists_and_dicts_become_tuples():
    run = make_run(settings={"layers": [0, 1], "lr": 0.1}, measure=["ES"], leave_out=[3])
    assert run.settings == (("layers", (0, 1)), ("lr", 0.1)) and run.measure == ("ES",)
    twin = make_run(settings=[["layers", [0, 1]], ["lr", 0.1]], measure=("ES",), leave_out=(3,))
    assert hash(run) == hash(twin)


@pytest.mark.parametrize("words, message", [
    ({"edits": 5}, "unknown parameter 'edits'; known are model, facts"),
    ({"n_edits": "5"}, "n_edits must be int, found '5'"),
    ({"n_edits": True}, "n_edits must be int"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"order": -2}, "order must be at least -1"),
    ({"retest_every": -1}, "retest_every must be not negative"),
    ({"dtype": "float8"}, "dtype 'float8': choose one of"),
    ({"settings": ["lr"]}, "settings must be"),
    ({"known": 1}, "known must be bool, found 1"),
    ({"insert": [3]}, r"insert must be \(place, case id\) pairs"),
    ({"insert": [["3", 1]]}, "insert must be"),
    ({"insert": [[0, 1]]}, "insert must name different places from 1 on"),
    ({"insert": [[1, 7], [1, 8]]}, "different places"),
    ({"insert": [[1, 7], [2, "7"]]}, "different facts")])
def test_unknown_and_mistyped_parameters(words, message):
    with pytest.raises(ValueError, match=message):
        make_run(**words)


def test_files_beside_the_model_and_named_files(folder):
    other = folder / "other.txt"
    other.write_text("x")
    run = make_run(model=str(folder), held_out=str(other), editor="ft", settings={"epsilon": 0.1,
                                                                               "layer": 0})
    assert input_files(run) == {"facts": folder / "facts.json", "texts": folder / "texts.txt",
                                "tasks": folder / "tasks", "held_out": other}
    with pytest.raises(FileNotFoundError, match="stats: nowhere: no such file"):
        input_files(dataclasses.replace(run, stats="nowhere"))
    with pytest.raises(FileNotFoundError, match="facts: .* beside model 'gpt2-xxl'"):
        input_files(dataclasses.replace(run, model="gpt2-xxl"))
    with pytest.raises(ValueError, match="grace edits beside the weights"):
        input_files(Run(editor="grace"))


def test_ids_depend_on_parameters_and_contents_only():
    run = Run(editor="ft")
    same = [run, dataclasses.replace(run, checkpoint_every=7), make_run(**dataclasses.asdict(run))]
    assert len({run_id(each, {"facts": "a"}) for each in same}) == 1
    others = [run, dataclasses.replace(run, seed=1),
              dataclasses.replace(run, settings=(("size", 0.1),))]
    assert len({run_id(each, {"facts": "a"}) for each in others} | {run_id(run, {"f": "b"})}) == 4


def test_ids_of_published_runs_stay():
    final = ("ES", "PS", "XS", "greedy")
    run = make_run(n_edits=6, items=8, untouched=5, retest_every=2, downstream_every=3, final=final)
    assert run_id(run, {}).startswith("rome-33500721-")


def test_hashes_tell_contents_not_names(folder):
    run = Run(model=str(folder))
    twin = folder / "twin.json"
    twin.write_text("[]")
    paths = {"facts": folder / "facts.json", "tasks": folder / "tasks"}
    first = input_hashes(run, paths)
    assert first["facts"] == input_hashes(run, {"facts": twin})["facts"]
    (folder / "tasks" / "rte.json").write_text("[]")
    assert first["tasks"] != input_hashes(run, paths)["tasks"]
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"1")
    local = files_hash(str(folder))
    (folder / "facts.json").write_text("[1]")       # not part of the model
    assert local == files_hash(str(folder))
    (folder / "model.safetensors").write_bytes(b"2")
    assert local != files_hash(str(folder)) and files_hash("gpt2-xl") != files_hash("gpt2-large")


def test_inputs_are_cut_to_the_wanted_items(folder, place, facts):
    run = Run(model=str(place), n_edits=7, order=3, untouched=2, items=2)
    paths = {"facts": place / "facts.json", "held_out": folder / "texts.txt",
             "tasks": folder / "tasks"}
    inputs = read_inputs(run, paths)
    assert [fact.case_id for fact in inputs.facts] == [fact.case_id for fact in order(facts, 3)[:7]]
    assert len(inputs.untouched) == 2 and not set(inputs.untouched) & set(inputs.facts)
    assert inputs.held_out == ["one line", "two\nlines"]
    fewer = read_inputs(dataclasses.replace(run, passages=1), paths)
    assert fewer.held_out == ["one line"] and fewer.tasks == inputs.tasks
    assert sorted(item["label"] for item in inputs.tasks["sst2"]) == [0, 1]
    alone = read_inputs(dataclasses.replace(run, downstream_every=0), paths)
    assert alone.tasks == {} and alone.held_out == []


def test_schedule_counts_a_subject_once(facts, tmp_path):
    records = [{"prompt": fact.prompt, "subject": fact.subject, "target_new": fact.target_new,
                "case_id": fact.case_id, "target_true": fact.target_true} for fact in facts]
    twin = records[0] | {"subject": facts[0].subject.upper(), "case_id": 99}
    path = tmp_path / "f.json"
    path.write_text(json.dumps([*records, twin]))
    edited, untouched = schedule(Run(n_edits=0), path)
    assert len(edited) == 12 and untouched == []
    left_out = schedule(Run(n_edits=7, leave_out=(edited[1].case_id,)), path)[0]
    assert left_out == [edited[0], *edited[2:8]]
    assert schedule(Run(n_edits=8, order=-1), path)[0] == sorted(edited, key=facts_order)[:8]
    with pytest.raises(ValueError, match=r"n_edits is 13, but .*f.json has 12 facts"):
        schedule(Run(n_edits=13), path)
    with pytest.raises(ValueError, match="leave_out names '98'"):
        schedule(Run(leave_out=("98",)), path)


def test_facts_are_inserted_at_their_places(place):
    path = place / "facts.json"
    plain = Run(n_edits=6, untouched=3, order=1)
    edited, untouched = schedule(plain, path)
    late = edited[4].case_id
    unused = schedule(Run(n_edits=0, order=1), path)[0][-1].case_id
    insert = make_run(**dataclasses.asdict(plain) | {"insert": [[2, late]], "leave_out": [late]})
    others = edited[:4] + edited[5:]
    placed, _ = schedule(insert, path)
    assert [fact.case_id for fact in placed[1:2]] == [late] and len(placed) == 6
    assert [placed[0], *placed[2:5]] == others[:4]
    without, never = schedule(dataclasses.replace(plain, leave_out=(unused, late)), path)
    with_both = dataclasses.replace(insert, insert=((1, unused), (6, late)),
                                    leave_out=(unused, late))
    placed, same = schedule(with_both, path)
    assert [fact.case_id for fact in (placed[0], placed[-1])] == [unused, late]
    assert placed[1:5] == without[:4] and same == never
    for words, message in (({"insert": ((7, late),)}, "insert has place 7, but n_edits is 6"),
                           ({"insert": ((1, 98),)}, "insert names '98', which is not in")):
        with pytest.raises(ValueError, match=message):
            schedule(dataclasses.replace(plain, **words), path)


def test_only_known_facts_are_edited_and_followed(place, facts):
    path = place / "facts.json"
    knows = [fact.case_id % 3 != 0 for fact in facts]
    run = make_run(known=True, n_edits=5, untouched=9, order=2)
    edited, untouched = schedule(run, path, knows)
    assert {fact.case_id for fact in edited + untouched} == {1, 2, 4, 5, 7, 8, 10, 11}
    in_order = schedule(dataclasses.replace(run, order=-1), path, knows)[0]
    assert [fact.case_id for fact in in_order] == [1, 2, 4, 5, 7]
    left_out = schedule(dataclasses.replace(run, order=-1, leave_out=(2,)), path, knows)[0]
    assert [fact.case_id for fact in left_out] == [1, 4, 5, 7, 8]
    assert read_inputs(run, {"facts": path}, knows).n_known == 8
    for words, given, message in (
            ({"n_edits": 9}, knows, "8 facts with different subjects that the model knows"),
            ({"insert": ((1, 3),)}, knows, "insert names '3', which the model does not know"),
            ({}, None, "the model must be asked what it knows")):
        with pytest.raises(ValueError, match=message):
            schedule(dataclasses.replace(run, **words), path, given)


def test_files_of_the_world_serve_models_without_their_own(folder, monkeypatch):
    monkeypatch.setattr("editcore.model.DATA", {"smol": folder})
    model = folder / "cache" / "smol"
    model.mkdir(parents=True)
    run = Run(model=str(model), editor="ft", settings=(("layer", 0), ("epsilon", 0.1)))
    assert input_files(run)["facts"] == folder / "facts.json"
    (model / "facts.json").write_text("[]")
    assert input_files(run) == {"facts": model / "facts.json", "texts": folder / "texts.txt",
                                "tasks": folder / "tasks"}


def facts_order(fact):
    return fact.case_id


def test_prompts_too_long_with_their_context(gpt2, facts):
    _, tok = gpt2
    check_prompts(tok, facts, 64)
    with pytest.raises(ValueError, match="record 0: prompt 'so so so"):
        check_prompts(tok, facts, 64, templates=("{}", "so " * 60 + "{}"))


def test_data_are_named_by_file_or_folder():
    assert data_name(Path("a/pocket/facts.json")) == "pocket"
    assert data_name(Path("data/counterfact.json")) == "counterfact"
