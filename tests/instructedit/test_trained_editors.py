"""Trained editors: lists of configs, records mixed as told, networks trained once, bad input."""

import json
import threading
import time
from dataclasses import replace

import pytest
from filelock import FileLock

from editcore.editors import EDITORS
from editcore.instructedit import trained_editors as te
from editcore.instructedit.instructions import descriptions
from editcore.instructedit.records import load_records, record_as_fact
from editcore.model import load

SMALL = {"mend": {"layers": (1, 2), "rank": 4, "every": 2, "warmup": 2},
         "ke": {"layers": (1, 2), "hidden": 3, "width": 4, "inner": 2, "every": 2}}


def small(tiny, editor="mend", **words):
    settings = SMALL[editor] | words.pop("settings", {})
    return te.make_config(**{"model": tiny, "examples": 6, "editor": editor,
                             "settings": settings} | words)


@pytest.mark.parametrize("editor", ["mend", "ke"])
def test_training_lowers_the_loss_and_the_file_edits(editor, tiny, tmp_path):
    config = small(tiny, editor, tasks=("recent",), style="none", examples=60,
                   settings={"every": 60, "lr": 1e-2, "edit_weight": 1.0, "keep": True})
    path = te.train(config, tmp_path)
    rows = [json.loads(line) for line in (path.parent / "losses.jsonl").read_text().splitlines()]
    first, last = (sum(row["loss"] for row in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first
    model, tok = load(tiny, "cpu")
    settings = replace(te.configured(config)[0], network=str(path))
    network = EDITORS[editor].prepare(model, tok, settings)
    facts = [record_as_fact(record) for record in te.training_records(config)]
    deltas = EDITORS[editor].edit_each(model, tok, facts, settings, network)
    assert all(delta.norm() > 0 for delta in deltas)
    about = te.table([("Mine", config)], tmp_path).iloc[0]
    assert (about["editor"], about["tasks"], about["records"], about["examples"]) == ("Mine",
                                                                                      "Recent", 5,
                                                                                      60)
    assert about["parameters"] == sum(weight.numel() for weight in network.parameters())
    assert about["network"] == path.parent.name == te.identifier(config)


def test_a_trained_editor_is_found_and_another_process_is_waited_for(tiny, tmp_path, monkeypatch):
    config = small(tiny, style="none")
    folder = tmp_path / te.identifier(config)
    folder.mkdir()
    held = threading.Event()

    def hold():
        with FileLock(folder / ".lock"):
            held.set()
            time.sleep(0.5)
    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    path = te.train(config, tmp_path)
    assert path.is_file() and not other.is_alive()
    monkeypatch.setattr(te, "_train", None)
    assert te.train(config, tmp_path) == path


def test_an_id_tells_all_that_a_network_depends_on(tiny, tmp_path):
    base = small(tiny)
    texts = [f"Say what is so, version {i}." for i in range(10)]
    others = [small(tiny, style="none"), small(tiny, seed=1), small(tiny, "ke"),
              small(tiny, counts={"recent": 2}),
              small(tiny, shares={"recent": 2}), small(tiny, descriptions={"recent": texts}),
              small(tiny, examples=8),
              small(tiny, settings={"lr": 0.5}), replace(base, tasks=("recent",))]
    assert len({te.identifier(one) for one in [base, *others]}) == len(others) + 1
    copy = tmp_path / "records"
    copy.mkdir()
    for path in te.records_folder(tiny).glob("*.json"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert te.identifier(replace(base, data=str(copy))) == te.identifier(base)
    path = copy / "recent_train.json"
    path.write_text(path.read_text().replace("Lima", "Cairo"))
    assert te.identifier(replace(base, data=str(copy))) != te.identifier(base)


def test_records_are_mixed_as_told(tiny):
    assert list(load_records(tiny, split="test")) == ["recent"]
    records = te.training_records(small(tiny, counts={"recent": 2, "convsent": 1}))
    tasks = [record.task for record in records]
    assert tasks == ["recent"] * 2 + ["counterfact"] * 5 + ["convsent"]
    assert te.training_records(small(tiny, counts={"recent": 2, "convsent": 1},
                                     seed=5))[:2] != records[:2]
    records = te.training_records(small(tiny, tasks=("recent", "convsent"),
                                        shares={"recent": 1.2, "convsent": 1}))
    assert [record.task for record in records] == ["recent"] * 4 + ["convsent"] * 3
    texts = tuple(f"Say what is so, version {i}." for i in range(10))
    config = small(tiny, descriptions={"recent": texts}, n_descriptions=1)
    assert te.descriptions_of(config) == descriptions() | {"recent": texts}
    with pytest.raises(FileNotFoundError,
                       match="no records of an editing task for the split 'val'"):
        load_records(tiny, split="val")


def test_lists_name_each_editor_once_per_seed():
    for name, editors in te.LISTS.items():
        found = editors("pocket", seeds=(0, 1), examples=40, settings={"lr": 0.1})
        assert len(set(found)) == len(found), name
        assert {config.seed for _, config in found} == {0, 1}
        kinds = {(editor, replace(config, seed=0)) for editor, config in found}
        assert 2 * len(kinds) == len(found) == 2 * len(dict(kinds))
        assert not any("," in editor for editor, _ in found)
        assert {config.examples for _, config in found} == {40}
    assert len(te.subsets()) == 14 and {config.style for _, config in te.subsets()} == {"full",
                                                                                        "none"}
    assert [name for name, _ in te.transfer()] == ["MEND on Recent", "MEND on CounterFact",
                                                   "MEND on ZsRE"]
    assert [dict(config.counts).get("convsent") for _, config in te.balance()] == [None, 25, 50,
                                                                                   100, None]


def test_tasks_without_records_are_left_out(tiny, tmp_path):
    assert [name for name, _ in te.transfer(tiny, examples=4)] == ["MEND on Recent",
                                                                   "MEND on CounterFact"]
    recent = te.records_folder(tiny) / "recent_train.json"
    (tmp_path / recent.name).write_bytes(recent.read_bytes())
    few = te.main_editors(tiny, examples=4, data=str(tmp_path))
    assert [config.tasks for _, config in few] == [("recent",)] * 3
    assert [name for name, _ in te.subsets(tiny, examples=4,
                                           data=str(tmp_path))] == ["Recent (full)",
                                                                    "Recent (none)"]
    with pytest.raises(ValueError,
                       match="there are training records for none of MEND on CounterFact"):
        te.single_task(tiny, ("counterfact",), examples=4, data=str(tmp_path))
    with pytest.raises(ValueError, match="nothing: there are no training records"):
        te.main_editors(tiny, examples=4, data=str(tmp_path / "nothing"))


@pytest.mark.parametrize("words, message", [
    ({"tasks": ("recent", "sky")}, "tasks.1\n"), ({"tasks": ()}, "tasks\n"),
    ({"style": "loud"}, "style\n"),
    ({"tasks": ("recent", "recent")}, "each once"), ({"editor": "rome"}, "editor\n"),
    ({"loss_on": "never"}, "loss_on\n"), ({"n_descriptions": 10}, "n_descriptions\n"),
    ({"counts": {"zsre": 3}}, "zsre: each once, and only tasks trained on"),
    ({"shares": {"recent": 0}}, "shares.0.1\n"),
    ({"shares": {"recent": 1}, "counts": {"recent": 1}}, "recent, recent: each once"),
    ({"colour": "red"}, "colour\n"),
    ({"seed": "one"}, "seed\n"), ({"examples": -2}, "examples\n"),
    ({"settings": {"speed": 3}}, "mend has no setting 'speed'"),
    ({"settings": {"seed": 3}}, "are parameters of the"),
    ({"model": "unheard-of"}, "give examples"),
    ({"descriptions": {"recent": ["a b c"]}}, "different descriptions, needed are 10")], ids=str)
def test_bad_configs_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        te.make_config(**words)


def test_missing_records_are_named_before_any_work(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match="zsre_train.json: no such file"):
        te.train(small(tiny, tasks=("recent", "zsre")), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="must be multiples of accumulate, 2; 7 is not"):
        te.train(small(tiny, examples=7), tmp_path)
