"""editcore.systems: named grids, records mixed as told, networks trained once, killed, resumed, awaited; bad input."""

import json
import multiprocessing
import random
from dataclasses import replace

import pytest
import torch
from conftest import make
from safetensors.torch import load_file

from editcore.editors import EDITORS
from editcore.files import write_json
from editcore.instructedit import examples, instructions, ke, mend
from editcore.instructedit import trained_editors as systems
from editcore.instructedit import training as hyper
from editcore.instructedit.hyperloss import edit
from editcore.study.slots import held

PLACES = (("Dunmore", "Rome"), ("Brantwick", "Lima"), ("Tessaly", "Oslo"), ("Orla", "Bern"), ("Farrow", "Turin"))


@pytest.fixture(scope="module")
def place(gpt2, tmp_path_factory):
    """A folder with a tiny model and records of three tasks."""
    folder, tok = tmp_path_factory.mktemp("tiny"), gpt2[1]
    make("gpt2", len(tok), positions=200).save_pretrained(folder)
    tok.save_pretrained(folder)
    for task, text in (("recent", "The capital of {} is"), ("counterfact", "The home of {} is")):
        write_json(folder / "editing" / f"{task}_train.json", [
            {"subject": name, "prompt": text.replace("{}", name), "target_new": city, "rephrase": f"{name} lies near",
             "locality": {"Forgetfulness": [{"prompt": "The home of Sue is", "ground_truth": [["Oslo"]]}]}}
            for name, city in PLACES])
    talk = [{"ent": topic, "pos": ["It is good.", "I read it.", "It runs."], "neg": ["It is old.", "You said it."]}
            for topic in ("a book", "a river", "the sea")]
    write_json(folder / "editing" / "convsent_train.json", talk)
    write_json(folder / "editing" / "recent_test.json", json.loads(
        (folder / "editing" / "recent_train.json").read_text())[:2])
    return folder


SMALL = {"mend": {"layers": (1, 2), "rank": 4, "every": 2, "warmup": 2},
         "ke": {"layers": (1, 2), "hidden": 3, "width": 4, "inner": 2, "every": 2}}


def small(place, kind="mend", **words):
    settings = SMALL[kind] | words.pop("settings", {})
    return systems.make(**{"model": str(place), "examples": 6, "kind": kind, "settings": settings} | words)


def plainly(system, tmp_path):
    """The weights that a plain use of the trainer gives, from the same records, shuffled here."""
    model, tok = systems.load(system.model, "cpu")
    records = []
    for task in system.tasks:
        found = systems.load_records(system.model, split="train", seed=system.seed)[task]
        found = random.Random(f"{system.seed} records {task}").sample(found, len(found))
        records += found[:dict(system.counts).get(task, 99)]
    made = []
    for one in records:
        number = instructions.drawn(one, system.seed, system.seen)
        put = instructions.prefix(one, number, system.style)
        made.append(examples.of(tok, one, put, system.after, system.replies, system.seed))
        if system.kind == "ke":
            (ids,) = ke.conditions(model, tok, [examples.asked(one, put, system.seed)])
            made[-1] = replace(made[-1], condition=tuple(ids))
    config, training = systems.configured(system)
    start = {"mend": mend.start, "ke": ke.start}[system.kind]
    return hyper.train(model, start(model, config), made, training, tmp_path / "plain")


@pytest.mark.parametrize("words", [{"style": "none"}, {"seed": 3, "after": "rephrase", "counts": {"convsent": 1}},
                                   {"kind": "ke", "style": "none", "tasks": ("recent", "convsent")}], ids=str)
def test_a_system_is_the_trainer_on_its_records(words, place, tmp_path):
    system = small(place, **words)
    path = systems.train(system, tmp_path / "editors")
    plain = plainly(system, tmp_path)
    kind = {"mend": mend, "ke": ke}[system.kind]
    config = replace(systems.configured(system)[0], network=str(path))
    model, tok = systems.load(str(place), "cpu")
    prepared = kind.prepare(model, tok, config, None)
    found = prepared if system.kind == "ke" else prepared.weights
    assert found.keys() == plain.weights.keys()
    assert all(torch.equal(found[name], weight) for name, weight in plain.weights.items())
    about = json.loads((path.parent / "train.json").read_text())
    assert about["examples"] == 6 and about["seconds"] > 0 and about["peak_mb"] > 50
    assert about["records"] == sum(min(dict(system.counts).get(task, 9), 3 if task == "convsent" else 5)
                                   for task in system.tasks)
    assert about["parameters"] == sum(weight.numel() for weight in plain.weights.values())


@pytest.mark.parametrize("kind", ["mend", "ke"])
def test_training_lowers_the_loss_and_the_file_edits_as_the_trainer_does(kind, place, tmp_path):
    system = small(place, kind, tasks=("recent",), style="none", examples=60,
                   settings={"every": 60, "lr": 1e-2, "edit_weight": 1.0, "keep": True})
    path = systems.train(system, tmp_path)
    rows = [json.loads(line) for line in (path.parent / hyper.LOG).read_text().splitlines()]
    first, last = (sum(row["loss"] for row in part) for part in (rows[:10], rows[-10:]))
    assert last < 0.8 * first
    model, tok = systems.load(str(place), "cpu")
    (record, *_), config = systems.chosen(system), replace(systems.configured(system)[0], network=str(path))
    editor = EDITORS[kind]
    network = mend.prepare(model, tok, config, None) if kind == "mend" else replace(
        ke.start(model, config), weights=ke.prepare(model, tok, config, None))
    delta = editor.edit(model, tok, [examples.asked(record)], config, editor.prepare(model, tok, config, None))
    same = edit(model, network, systems.examples_of(system, model, tok, [record])[0])
    for name, change in same.changes.items():
        wanted = change.dense()
        torch.testing.assert_close(delta.changes[name].dense(), wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max())


class Killed(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("kind", ["mend", "ke"])
def test_a_killed_training_goes_on_to_the_same_file(kind, place, tmp_path, monkeypatch):
    system = small(place, kind)
    whole, real, calls = load_file(systems.train(system, tmp_path / "whole")), hyper._learn, []

    def learn(*args):
        calls.append(1)
        if len(calls) == 5:
            raise Killed
        return real(*args)
    monkeypatch.setattr(hyper, "_learn", learn)
    with pytest.raises(Killed):
        systems.train(system, tmp_path / "cut")
    path = tmp_path / "cut" / systems.identifier(system) / hyper.RESULT
    assert not path.exists()
    assert systems.train(system, tmp_path / "cut") == path
    found = load_file(path)
    assert found.keys() == whole.keys() and all(torch.equal(found[name], tensor) for name, tensor in whole.items())
    assert len(calls) == 4 + 1 + 2      # the two examples after the last checkpoint are learned from again
    monkeypatch.setattr(systems, "_trained", None)
    assert systems.train(system, tmp_path / "cut") == path      # at once


def hold(folder, name, ready, go):
    with held(folder, [name]):
        ready.set()
        go.wait(20)


def test_two_processes_train_a_system_one_after_the_other(place, tmp_path, monkeypatch):
    system = small(place, style="none")
    name, context = systems.identifier(system), multiprocessing.get_context("fork")
    ready, go, began = context.Event(), context.Event(), []
    other = context.Process(target=hold, args=(tmp_path / ".locks", name, ready, go))
    other.start()
    assert ready.wait(20)
    monkeypatch.setattr("editcore.study.slots.time.sleep", lambda _: (began.append(1), go.set()))
    assert systems.train(system, tmp_path).is_file() and began
    other.join()


def test_many_are_trained_once_each_in_processes(place, tmp_path):
    several = [small(place, style="none"), small(place, "ke", style="none"), small(place, style="none")]
    made = systems.train_all(several, tmp_path, workers=2)
    assert made[0] == made[2] != made[1] and all(path.is_file() for path in made)
    before = [path.stat().st_mtime_ns for path in made]
    assert systems.train_all(several, tmp_path) == made
    assert [path.stat().st_mtime_ns for path in made] == before


def test_an_id_tells_all_that_a_network_depends_on(place, tmp_path):
    base = small(place)
    others = [small(place, style="none"), small(place, seed=1), small(place, "ke"), small(place, counts={"recent": 2}),
              small(place, shares={"recent": 2}),
              small(place, descriptions={"recent": [f"Say what is so, version {i}." for i in range(10)]}),
              small(place, examples=8), small(place, settings={"lr": 0.5}), replace(base, tasks=("recent",))]
    assert len({systems.identifier(one) for one in [base, *others]}) == len(others) + 1
    copy = tmp_path / "records"
    copy.mkdir()
    for path in (place / "editing").glob("*.json"):
        (copy / path.name).write_bytes(path.read_bytes())
    assert systems.identifier(replace(base, data=str(copy))) == systems.identifier(base)
    (copy / "recent_train.json").write_text((copy / "recent_train.json").read_text().replace("Lima", "Cairo"))
    assert systems.identifier(replace(base, data=str(copy))) != systems.identifier(base)


def test_records_and_tables(place):
    assert list(systems.load_records(str(place), split="test")) == ["recent"]
    assert {task: len(found) for task, found in systems.load_records(str(place)).items()} == {
        "recent": 5, "counterfact": 5, "convsent": 3}
    some = systems.chosen(small(place, counts={"recent": 2, "convsent": 1}))
    assert [one.task for one in some] == ["recent"] * 2 + ["counterfact"] * 5 + ["convsent"]
    assert systems.chosen(small(place, counts={"recent": 2, "convsent": 1}, seed=5))[:2] != some[:2]
    some = systems.chosen(small(place, tasks=("recent", "convsent"), shares={"recent": 1.2, "convsent": 1}))
    assert [one.task for one in some] == ["recent"] * 4 + ["convsent"] * 3, "three ConvSent records are all there are"
    texts = tuple(f"Say what is so, version {i}." for i in range(10))
    system = small(place, descriptions={"recent": texts})
    assert systems.table(system) == instructions.DESCRIPTIONS | {"recent": texts}
    with pytest.raises(FileNotFoundError, match="no records of an editing task for the split 'val'"):
        systems.load_records(str(place), split="val")


@pytest.mark.parametrize("words, said", [
    ({"tasks": ("recent", "sky")}, "tasks is"), ({"tasks": ()}, "tasks is"), ({"style": "loud"}, "style is 'loud'"),
    ({"kind": "rome"}, "kind is 'rome'"), ({"after": "never"}, "after is 'never'"), ({"seen": 10}, "seen is 10"),
    ({"counts": {"zsre": 3}}, "asks for 3 records of 'zsre'"),
    ({"shares": {"zsre": 3}}, "shares asks for 3 parts of 'zsre'"),
    ({"shares": {"recent": 0}}, "0 parts"), ({"shares": {"recent": 1}, "counts": {"recent": 1}}, "counts does not"),
    ({"colour": "red"}, "unknown parameter 'colour'"),
    ({"seed": "one"}, "seed must be int"), ({"examples": -2}, "examples is -2"),
    ({"settings": {"speed": 3}}, "mend has no setting 'speed'"), ({"settings": {"seed": 3}}, "are parameters of the"),
    ({"descriptions": {"recent": ["a b c"]}}, "different descriptions, needed are 10"),
    ({"model": "unheard-of"}, "give")], ids=str)
def test_bad_systems_are_named(words, said):
    with pytest.raises(ValueError, match=said):
        systems.make(**words)


def test_missing_records_are_named_before_any_work(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="zsre_train.json: no such file"):
        systems.train(small(place, tasks=("recent", "zsre")), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="examples is 7, but must be a multiple of accumulate"):
        systems.train(small(place, examples=7), tmp_path)
