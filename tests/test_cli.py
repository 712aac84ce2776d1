"""Command lines do what the package's functions do, and fail in one line."""

import dataclasses
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from editcore import cli, commands, delta
from editcore.delta import Delta
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.facts import read_facts
from editcore.files import sha256
from editcore.metrics import means, measure
from editcore.model import content_hash, load
from editcore.study import plans

COMMANDS = ["edit", "apply", "evaluate", "disabling", "study", "report", "run", "train",
            "data"]
MEMIT = "layers=1,2 lambda=50 steps=3"
SETTINGS = {    # of every editor, on a model for which nothing is published
    "rome": "layer=1 steps=3", "r-rome": "layer=1 steps=3", "p-rome": "layer=1 steps=3",
    "nas": "layer=1 steps=3 anchor=2", "emmet": "layers=1 lambda=50 steps=3", "memit": MEMIT,
    "memit-past": MEMIT, "encore": MEMIT, "alphaedit": MEMIT, "rect": MEMIT, "prune": MEMIT,
    "ft": "epsilon=0.1 steps=2 layer=1", "mend": "network=untrained",
    "ke": "network=untrained", "grace": "layer=1 part=mlp_in steps=2",
    "calinet": "layers=1 slots=4 steps=2",
}


@pytest.fixture
def here(place, monkeypatch, tmp_path):
    """A folder with a tiny model, five plain facts, texts and context templates."""
    (tmp_path / "model").symlink_to(place)
    records = json.loads((place / "facts.json").read_text())[:5]
    plain = [{name: record[name] for name in ("prompt", "subject", "target_new", "target_true")}
             for record in records]
    (tmp_path / "facts.json").write_text(json.dumps(plain))
    (tmp_path / "texts.txt").symlink_to(place / "texts.txt")
    (tmp_path / "contexts.json").write_text(json.dumps([["{}"], ["You said. {}", "I know. {}"]]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("editcore.progress.show_log", disable_progress_bar)
    return tmp_path


def does(words):
    """Return the exit code of a command line."""
    return cli.main(words.split())


def error_of(capsys, words):
    """Return the one line on standard error of a command that must fail with code 2."""
    assert does(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("editcore: ") and error.count("\n") == 1, error
    return error


EDIT = ("edit model facts.json --editor rome --set layer=1 steps=3 --texts texts.txt "
        "--contexts contexts.json -o d.safetensors")


def by_hand(editor, settings, groups, sequential=False):
    """Return the same edits through the package: the sum of one update per group of facts."""
    model, tok = load("model", "cpu", torch.float32)
    config = configure(editor, settings)
    facts = read_facts("facts.json")
    texts = tuple(Path("texts.txt").read_text().splitlines())
    inputs = EditorInputs(texts, None, ("{}", "You said. {}", "I know. {}"), pilot=tuple(facts))
    prepared = EDITORS[editor].prepare(model, tok, config, inputs)
    total = Delta({})
    for group in groups:
        with (total if sequential else Delta({})).applied(model):
            chosen = [facts[index] for index in group]
            total = total + EDITORS[editor].edit(model, tok, chosen, config, prepared)
    return total.dense()


def close(a, b):
    """Compare two Deltas."""
    assert set(a.changes) == set(b.changes)
    for name, change in a.changes.items():
        torch.testing.assert_close(change, b.changes[name], rtol=1e-3, atol=1e-5 * b.norm(name))


# ── edits ───────────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("editor", sorted(set(EDITORS) - {"random"}))    # that one needs norms
def test_every_editor_edits_and_its_file_is_read(here, editor, capsys):
    words = EDIT.replace("rome --set layer=1 steps=3", f"{editor} --set {SETTINGS[editor]}")
    assert does(words) == 0
    change = delta.load("d.safetensors")
    assert change.info["editor"] == editor and change.info["edits"] == 5 and change.norm() > 0
    assert "d.safetensors: 5 facts" in capsys.readouterr().out
    assert does("evaluate model facts.json --delta d.safetensors --metrics ES -o rows.parquet") == 0
    assert set(pd.read_parquet("rows.parquet")["editor"]) == {editor}


def test_edit_one_after_another(here):
    assert does(f"{EDIT} --sequential") == 0
    change = delta.load("d.safetensors")
    alone = [[index] for index in range(5)]
    close(change, by_hand("rome", {"layer": 1, "steps": 3}, alone, sequential=True))
    assert change.info["settings"]["steps"] == 3 and change.info["sequential"]
    assert change.info["model_hash"] == content_hash(load("model", "cpu", torch.float32)[0])
    assert change.info["facts_hash"] == sha256("facts.json")
    assert change.info["seconds_per_edit"] > 0


@pytest.mark.parametrize("extra, groups, sequential", [
    ("", [range(5)], False), ("--batch-size 1", [[0], [1], [2], [3], [4]], False),
    ("--batch-size 2", [[0, 1], [2, 3], [4]], False),
    ("--batch-size 2 --sequential", [[0, 1], [2, 3], [4]], True)])
def test_edit_in_batches(here, extra, groups, sequential):
    words = EDIT.replace("rome --set layer=1 steps=3", f"memit --set {MEMIT}")
    assert does(f"{words} {extra}") == 0
    settings = {"layers": (1, 2), "lambda": 50, "steps": 3}
    close(delta.load("d.safetensors"), by_hand("memit", settings, groups, sequential))


def test_sequential_edits_remember_keys_and_the_sum_is_finished(here, monkeypatch):
    monkeypatch.setattr("editcore.editors.memit.finish", lambda total, *_: total + total)
    plain = by_hand("memit", {"layers": (1, 2), "lambda": 50, "steps": 3},
                    [[index] for index in range(5)], sequential=True)
    for editor in ("memit", "memit-past"):
        words = EDIT.replace("rome --set layer=1 steps=3", f"{editor} --set {MEMIT}")
        assert does(f"{words} --sequential") == 0
        change = delta.load("d.safetensors")
        differences = [(change.changes[name] / 2 - plain.changes[name]).norm()
                       / plain.norm(name) for name in plain.changes]
        assert (max(differences) > 1e-4) == (editor == "memit-past"), "it remembers keys"


def test_apply_writes_a_model_that_transformers_loads(here, capsys):
    does(f"{EDIT} --sequential")
    assert does("apply model d.safetensors -o edited/first") == 0
    change = delta.load("d.safetensors")
    edited = AutoModelForCausalLM.from_pretrained("edited/first", dtype=torch.float32)
    model, tok = load("model", "cpu", torch.float32)
    with change.applied(model):
        pairs = zip(model.parameters(), edited.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert AutoTokenizer.from_pretrained("edited/first")("Rome").input_ids == tok("Rome").input_ids
    assert [path.name for path in Path("edited").iterdir()] == ["first"]    # nothing half-written
    assert "already there" in error_of(capsys, "apply model d.safetensors -o edited/first")
    assert "other weights" in error_of(capsys, "apply edited/first d.safetensors -o edited/next")
    assert not Path("edited/next").exists()
    assert does("apply edited/first d.safetensors --force -o edited/next") == 0


def test_apply_leaves_nothing_when_it_fails(here, monkeypatch):
    does(f"{EDIT} --sequential")

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
    assert does("apply model d.safetensors -o edited") == 2
    assert not [path for path in here.iterdir() if "edited" in path.name]


def test_evaluate_writes_rows_and_answers_with_means(here, capsys):
    does(f"{EDIT} --sequential")
    words = "evaluate model facts.json --delta d.safetensors --metrics ES PS -o out/rows.parquet"
    assert does(words) == 0
    rows = pd.read_parquet("out/rows.parquet")
    answer = capsys.readouterr().out
    model, tok = load("model", "cpu", torch.float32)
    with delta.load("d.safetensors").applied(model):
        wanted = means(measure(model, tok, read_facts("facts.json"), ("ES", "PS")))
    assert dict(rows.groupby("metric")["value"].mean()) == pytest.approx(wanted)
    assert list(rows.columns) == ["run", "model", "editor", "data", "seed", "step", "fact",
                                  "metric", "value"]
    assert set(rows["step"]) == {5} and f"{wanted['ES_prob']:.4f}" in answer
    assert does("evaluate model facts.json -o plain.csv") == 0
    assert "facts.json: no record has what PS, NS ask for" in capsys.readouterr().err
    plain = pd.read_csv("plain.csv", keep_default_na=False)
    assert list(plain.columns) == list(rows.columns)
    assert plain["value"].tolist() != rows["value"].tolist()


# ── studies and reports ─────────────────────────────────────────────────────────────────────────

def test_study_lists_makes_and_makes_nothing_twice(here, capsys):
    words = ("study orders --model model -p n_edits 1 untouched 2 items 2 downstream_every 0 "
             "editors ft -p settings {ft:{epsilon:0.1,steps:1}}".replace(":", ": ").split(" "))
    words = words[:-4] + ["{ft: {epsilon: 0.1, steps: 1}}"]

    def answer(*more):
        assert cli.main([*words, *more]) == 0
        return capsys.readouterr().out

    lines = answer("--list").splitlines()
    options = {"n_edits": 1, "untouched": 2, "items": 2, "downstream_every": 0,
               "settings": {"ft": {"epsilon": 0.1, "steps": 1}}}
    status = plans.status(plans.orders("model", ("ft",), **options))
    assert [line.split()[0] for line in lines] == list(status["run"]) and len(lines) == 2
    assert all("missing" in line and "n_edits=1" in line for line in lines)
    last = lines[1].split()[0]
    assert answer("--only", last) == "results/runs: 1 runs, 1 of them made or finished now\n"
    states = [line.split()[1] for line in answer("--list").splitlines()]
    assert states == ["missing", "finished"]
    assert answer() == "results/runs: 2 runs, 1 of them made or finished now\n"
    assert answer() == "results/runs: 2 runs, 0 of them made or finished now\n"
    assert len(answer("--list", "-p", "order", "0,3,4").splitlines()) == 3


def test_words_of_a_report_reach_their_notebooks(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("editcore.report.build", lambda *words, **more: calls.append((words, more))
                        or "out/index.html")
    assert does("report -o out --force -p 20_x.n -5 20_x.m a -p 10_y.k 7 --notebooks books") == 0
    parameters = {"20_x": {"n": "-5", "m": "a"}, "10_y": {"k": "7"}}
    assert calls == [(("books", "out", parameters), {"force": True, "workers": 2})]
    assert capsys.readouterr().out == "out/index.html\n"


def test_train_trains_a_list(place, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("editcore.instructedit.trained_editors.train_all",
                        lambda configs, out, workers: calls.append((configs, out, workers))
                        or [f"{out}/{config.style}" for config in configs])
    assert does("train main --examples 8 --seed 3 --workers 2") == 0
    configs, out, workers = calls[0]
    assert workers == 2 and {(one.examples, one.seed) for one in configs} == {(8, 3)}
    assert "results/editors/full\tInstructEdit\n" in capsys.readouterr().out


# ── real data ───────────────────────────────────────────────────────────────────────────────────

def test_data_sets_are_listed_and_described(capsys):
    assert does("data") == 0
    assert "counterfact            21919 rows  fetch" in capsys.readouterr().out
    assert does("data counterfact") == 0
    assert "rows    21919" in capsys.readouterr().out


# ── words and errors ────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("words, message", [
    ("edit model facts.json --editor rome -o d", "nothing is published for model 'model';"),
    ("edit nomodel facts.json --editor rome -o d", "model 'nomodel' .which is no folder here"),
    ("edit model facts.json --editor rome --set lyer=1 -o d", "no setting 'lyer'; it has layer"),
    ("edit model facts.json --editor rome --set layer -o d", "layer: give NAME=VALUE"),
    ("edit model facts.json --editor rome --set layer=x -o d", "layer is 'x', but must be a whole"),
    ("edit model facts.json --editor rome --set layer=9 --texts texts.txt -o d", "layer 9"),
    ("edit model facts.json --editor surgery -o d", "unknown editor 'surgery'"),
    ("edit model facts.json --editor random --set layer=1 --texts texts.txt -o d", "norms"),
    ("edit model none.json --editor ft -o d", "none.json: no such file"),
    ("edit ./none facts.json --editor ft --set epsilon=0.1 -o d", "none: no such folder"),
    ("edit gpt2-xxl facts.json --editor ft --set epsilon=0.1 -o d", "gpt2-xxl.*cannot be loaded"),
    ("edit model facts.json --editor rome --set layer=1 --texts none.txt -o d", "none.txt: no"),
    ("edit model facts.json --editor rome --texts a --stats b --set layer=1 -o d", "not both"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --dtype int8 -o d", "dtype 'int8'"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --batch-size 0 -o d", "equal to 1"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --seed -1 -o d", "equal to 0"),
    ("edit model facts.json --editor ft --seed 99999999999 -o d", "less than or"),
    ("edit model facts.json --editor ft --sed 1 -o d", "No such option"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --device hpu -o d", "device 'hpu' ca"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --device meta -o d", "device 'meta' ca"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --device cpu:x -o d", "device 'cpu:x' "),
    ("evaluate model facts.json --device tpu -o d.csv", "device 'tpu' cannot be used here"),
    ("evaluate model facts.json --metrics greedy -o d.csv", "'greedy' writes answers to the pr"),
    ("evaluate model facts.json --metrics PO -o d.csv", "no record has what PO ask for"),
    ("evaluate model facts.json --metrics PS greedy -o d.csv", "no record has what PS, greedy"),
    ("evaluate model facts.json -o d", "-o d: give a name that ends in .csv or .p"),
    ("study orders --workers 0", "greater than or equal to 1"),
    ("study orders --list -p measure XS,YS", "metric 'YS'"),
    ("study orders --list -p device hpu", "device 'hpu' cannot be used"),
    ("study orders --list -p seed -1", "seed must be not negative, found -1"),
    ("study layers --list --model model -p n_edits 1", "layer"),
    ("study orders --list -p facts pipe", "facts: pipe: no such file"),
    ("study orders --list -p texts .", "texts: .: no such file"),
    ("study orders --list -p tasks facts.json", "tasks: facts.json: no such folder"),
    ("study orders --list -p n_edits 99999", "n_edits is 99999, but"),
    ("study orders --list -p leave_out zzz", "leave_out names 'zzz'"),
    ("study orders --list -p settings 3", "settings: give {EDITOR: {NAME: VALUE}}, not '3'"),
    ("study orders --list -p settings [", "settings: '\\[' cannot be read"),
    ("study orders --list -p orders 999999999", "order must be at most 10000"),
    ("data counterfact --check pipe", "pipe: no such file"),
    ("edit model pipe --editor ft --set epsilon=0.1 -o d", "pipe: not a file"),
    ("edit model facts.json --editor ft --batch-size two -o d", "--batch-size.*valid integer"),
    ("edit model facts.json --editor ft -o facts.json", "facts.json is read as an input"),
    ("edit model facts.json --editor ft", "Missing option '-o'"),
    ("apply model none.safetensors -o d", "none.safetensors: no such file"),
    ("apply model texts.txt -o d", "texts.txt: not"),
    ("evaluate model facts.json --metrics XS -o d.csv", "metric 'XS'"),
    ("study nothing", "unknown plan 'nothing': choose one of orders"),
    ("study orders -p edits 5", "unknown parameter 'edits'"),
    ("study orders -p n_edits few", "n_edits must be int"),
    ("study orders --model gpt2-xxl", "gpt2-xxl"),
    ("study orders -p n_edits 1 --only rome-1", "--only rome-1: not among the runs"),
    ("study 00_x --full", "unknown plan '00_x': choose one of 20_forgetting"),
    ("run none.ipynb", "none.ipynb: no such notebook"),
    ("run none.ipynb -p name", "name: give NAME=VALUE, or after -p NAME VALUE"),
    ("report -p edits 5", "no notebook has this parameter; give NAME VALUE or NOTEBOOK.NAME"),
    ("train nothing", "unknown list 'nothing': choose one of main"),
    ("data nothing", "unknown data set 'nothing': choose one of counterfact"),
    ("data --check facts.json", "unknown data set '': choose one of counterfact"),
    ("operate model", "No such command 'operate'"),
    ("", "Missing command")])
def test_every_error_is_one_line(here, capsys, words, message):
    os.mkfifo(here / "pipe")
    assert re.search(message, error_of(capsys, words))
    assert not (here / "d").exists()


OUTPUTS = {     # where a file cannot go, and why
    "facts.json": "is read as an input", "./out/../facts.json": "is read as an input",
    "link.json": "is read as an input", "hard.json": "is read as an input",
    "model/d": "model is read as an input", "model/config.json": "model is read as an input",
    "out": "is a folder", "out/": "is a folder", "new/": "is a folder", ".": "is a folder",
    "": "is a folder", "pipe": "is no ordinary file", "/dev/null": "is no ordinary file",
    "loop": "cannot be followed", "loop/d": "cannot be followed", "a/" * 999 + "d": "999 folders",
    "weights": "model is read as an input",
    "contexts.json/d": "cannot be written (Not a directory", "/proc/d": "cannot be written",
    "/proc/x/d": "cannot be written", "n" * 250: "File name too long",
    "n" * 250 + "/d": "File name too long"}
COMMANDS_WITH_FILES = {
    "edit": ["edit", "model", "facts.json", "--editor", "rome", "--set", "layer=1"],
    "evaluate": ["evaluate", "model", "facts.json"]}


@pytest.fixture
def obstacles(here, monkeypatch):
    """Folders, links and pipes where results cannot go; no model may be loaded."""
    (here / "out").mkdir()
    (here / "out/mine").write_text("mine")
    (here / "link.json").symlink_to("facts.json")
    (here / "hard.json").hardlink_to("facts.json")
    (here / "loop").symlink_to("loop")
    (here / "weights").hardlink_to(here / "model/model.safetensors")
    os.mkfifo(here / "pipe")
    monkeypatch.setattr(commands, "load_model", None)
    return here


@pytest.mark.parametrize("command", COMMANDS_WITH_FILES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_file_that_cannot_be_written_is_said_before_any_work(obstacles, capsys, command, output):
    before = sorted(obstacles.rglob("*"))
    assert cli.main([*COMMANDS_WITH_FILES[command], "-o", output]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and OUTPUTS[output] in error
    assert sorted(obstacles.rglob("*")) == before


def test_a_link_stays_and_what_it_leads_to_is_written(here):
    (here / "there").mkdir()
    (here / "link").symlink_to("there/d.safetensors")
    (here / "edited").symlink_to("there/edited")
    for _ in range(2):
        assert does(EDIT.replace("d.safetensors", "link")) == 0
        assert (here / "link").is_symlink() and delta.load(here / "there/d.safetensors").info
    assert does("apply model link -o edited") == 0
    assert (here / "edited").is_symlink() and (here / "there/edited/config.json").is_file()


@pytest.mark.parametrize("text", [
    "[]", "3", "null", "{", "", "{}", '{"run": "a", "status": "odd", "parameters": {}}',
    '{"run": "a", "status": "finished", "parameters": 3}', "folder", "pipe"])
def test_a_file_of_a_run_that_is_none_is_one_line(here, capsys, text):
    words = ["study", "orders", "--model", "model", "-o", "runs", "-p", "n_edits", "1", "editors",
             "ft", "orders", "0", "settings", "{ft: {epsilon: 0.1, layer: 1, steps: 1}}"]
    assert cli.main([*words, "--list"]) == 0
    folder = here / "runs" / capsys.readouterr().out.split()[0]
    for name in ("run.json", "checkpoint/checkpoint.json"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (folder / "rows.parquet").write_bytes(b"half")
        if text == "folder":
            path.mkdir()
        elif text == "pipe":
            os.mkfifo(path)
        else:
            path.write_text(text)
        assert cli.main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and Path(name).name in error, error
        path.rmdir() if text == "folder" else path.unlink()


@pytest.mark.parametrize("words", [
    "apply model texts.txt", "study", "report", "run {root}/notebooks/10_edit.ipynb", "train"])
@pytest.mark.parametrize("output, message", [
    ("facts.json", "is a file"), ("pipe", "is a file"), ("loop", "cannot be followed"),
    ("facts.json/d", "cannot be written"), ("/proc/x", "cannot be written")])
def test_a_folder_that_cannot_be_written_is_said_before_any_work(obstacles, capsys, words, output,
                                                                 message):
    before = sorted(obstacles.rglob("*"))
    words = words.format(root=commands.__file__.rsplit("/", 2)[0])
    assert message in error_of(capsys, f"{words} -o {output}")
    assert sorted(obstacles.rglob("*")) == before


@pytest.mark.parametrize("words", [
    "report --notebooks books -o books", "run books/a.ipynb -o books",
    "apply model texts.txt -o model/new", "study --notebooks out -o out"])
def test_results_stay_out_of_the_folders_they_are_made_from(obstacles, capsys, words):
    (obstacles / "books").mkdir()
    (obstacles / "books/a.ipynb").write_text("mine")
    error = error_of(capsys, words)
    assert "read as an input" in error or "not a notebook" in error
    assert (obstacles / "books/a.ipynb").read_text() == "mine"


@pytest.mark.parametrize("change, message", [
    ({"prompt": "The capital is"}, "bad.json: record 1: the prompt needs exactly one {}"),
    ({"case_id": 0}, "bad.json: record 0: case_id occurs twice"),
    ({"prompt": "{} is located in", "subject": "Orla"}, "records 0 and 1 want 'Rome' and 'Par"),
    ({"prompt": "so " * 80 + "{} is"}, "record 1: .* at most 6")])
def test_malformed_facts_are_one_line(here, capsys, change, message):
    records = json.loads(Path("facts.json").read_text())
    records[1] |= change
    Path("bad.json").write_text(json.dumps(records))
    assert re.search(message, error_of(capsys, EDIT.replace("facts.json", "bad.json")))


def test_an_update_that_is_not_finite(here, capsys, monkeypatch):
    broken = Delta({"x": torch.tensor([float("nan")])})
    monkeypatch.setattr("editcore.editors.ft.edit", lambda *_: broken)
    words = "edit model facts.json --editor ft --set epsilon=0.1 -o d.safetensors"
    assert re.search("record 0 .*not finite", error_of(capsys, words))
    assert not Path("d.safetensors").exists()


def test_an_interrupt_is_one_line(here, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("editcore.commands.edit_all", interrupted)
    assert does(EDIT) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "editcore: interrupted; nothing was written"
    monkeypatch.setattr("editcore.study.loop.execute_all", interrupted)
    assert does("study orders") == 130
    assert "the same command goes on from here" in capsys.readouterr().err


def test_an_error_of_a_library_is_one_line_too(here, capsys, monkeypatch):
    def failing(*_, **__):
        raise KeyError("so\nmany")

    monkeypatch.setattr("editcore.commands.edit_all", failing)
    assert "KeyError: 'so\\nmany' (EDITCORE_TRACEBACK=1 shows where)" in error_of(capsys, EDIT)
    monkeypatch.setenv("EDITCORE_TRACEBACK", "1")
    with pytest.raises(KeyError):
        does(EDIT)


def test_a_full_disk_is_one_line_and_loses_nothing(here, capsys):
    """As far as a limit on the size of files is one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, words in (("d.safetensors", f"{EDIT} --sequential"),
                        ("d.parquet", "evaluate model facts.json -o d.parquet")):
        Path(name).write_text("earlier")
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            code = does(words)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        first, *_, error = capsys.readouterr().err.splitlines()
        assert first == f"-o {name}: already there; it will be replaced"
        assert code == 2 and error.startswith("editcore: ")
        assert Path(name).read_text() == "earlier"
        assert not [path for path in here.iterdir() if path.name.startswith(".d")]
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("settings, least", [
    ("rome --set layer=1 steps=1", 0), ("ft --set layer=1 epsilon=10 lr=0.1 steps=60", 1)])
def test_edit_says_whether_the_answers_became_likely(here, capsys, settings, least):
    assert does(EDIT.replace("rome --set layer=1 steps=3", settings)) == 0
    change = delta.load("d.safetensors")
    model, tok = load("model", "cpu", torch.float32)
    with change.applied(model):
        rows = measure(model, tok, read_facts("facts.json"), ("ES",))
    likely = [row["value"] == 1 for row in rows if row["metric"] == "ES_exact"]
    assert change.info["most_likely"] == likely and sum(likely) >= least and len(likely) == 5
    assert f"{sum(likely)} of 5 new answers are now the most likely" in capsys.readouterr().out
    assert not settings.startswith("rome") or len(change.info["losses"]) == 5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_apply_keeps_the_dtype_of_the_models_files(here, dtype):
    model, tok = load("model", "cpu", torch.float32)
    for part in (model.to(getattr(torch, dtype)), tok):
        part.save_pretrained("half")
    assert does(EDIT.replace("edit model", "edit half")) == 0
    assert does("apply half d.safetensors -o edited") == 0
    weights = load_file("edited/model.safetensors").values()
    assert {str(weight.dtype) for weight in weights} == {f"torch.{dtype}"}
    size = Path("edited/model.safetensors").stat().st_size
    assert size == pytest.approx(Path("half/model.safetensors").stat().st_size, rel=0.01)


def test_options_of_several_words():
    for words, repeated in {
            "edit m --set a=1 b=2 --seed -1 -o d": "edit m --set a=1 --set b=2 --seed -1 -o d",
            "run -p n 3 x -4 y=5 --force": "run -p n=3 -p x=-4 -p y=5 --force",
            "evaluate --metrics ES PS": "evaluate --metrics ES --metrics PS",
            "study --model a b": "study --model a --model b",
            "disabling --model a b": "disabling --model a b"}.items():
        assert commands.spread(words.split()) == repeated.split()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_has_an_example(name, capsys):
    assert does(f"{name} --help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"example: python -m editcore {name}" in text


def test_editors_are_listed_with_every_setting(capsys):
    assert does("edit --help") == 0
    rows = re.findall(r"^  ([\w-]+): (.+)$", capsys.readouterr().out, re.M)
    lines = {name: line for name, line in rows if name != "example"}
    assert set(lines) == set(EDITORS)
    for editor, line in lines.items():
        names = [field.name for field in dataclasses.fields(EDITORS[editor].config)
                 if field.name != "context_groups"]
        assert re.findall(r"(?:^| )(\w+)=", line) == names
    assert "convention=r-rome" in lines["r-rome"] and "layer=?" in lines["rome"]


def test_help_needs_no_torch_and_a_process_ends_with_the_code():
    code = ("import sys; from editcore.cli import main; main(['--help']); "
            "main(['study', '--help']); sys.exit('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    words = [sys.executable, "-m", "editcore", "edit"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("editcore: ")
