"""Command lines in; files, standard output, exit codes and one-line errors compared with what the package computes."""

import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from editcore import commands, delta
from editcore import moments as stats
from editcore.__main__ import main, parser
from editcore.delta import Delta
from editcore.editors import EDITORS, EditorInputs, configure, ft
from editcore.facts import read_facts
from editcore.metrics import means, measure
from editcore.model import content_hash, load

SHARED = Path(__file__).parents[2] / "shared"
COMMANDS = ["edit", "apply", "evaluate", "run", "study", "hyper", "report", "disabling", "data"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, gpt2, facts, texts):
    """A folder with a tiny model, facts.json (5 plain records), texts.txt and contexts.json (nested groups)."""
    folder = tmp_path_factory.mktemp("cli")
    for part in gpt2:
        part.save_pretrained(folder / "model")
    records = [{"prompt": one.prompt, "subject": one.subject, "target_new": {"str": one.target_new},
                "target_true": one.target_true} for one in facts[:5]]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "texts.txt").write_text("\n".join(texts))
    (folder / "contexts.json").write_text(json.dumps([["{}"], ["You said. {}", "I know. {}"]]))
    return folder


@pytest.fixture
def at(place, monkeypatch, tmp_path):
    """The working folder of a test: inputs by their short names, outputs beside them."""
    for name in ("model", "facts.json", "texts.txt", "contexts.json"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """Standard error carries the errors only."""
    monkeypatch.setattr("editcore.progress.to_stderr", disable_progress_bar)


def does(words):
    """The exit code of a command line."""
    return main(words.split())


def error_of(capsys, words):
    """The one line on standard error of a command that must fail with exit code 2."""
    assert does(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("editcore: ") and err.count("\n") == 1, err
    return err


EDIT = ("edit model facts.json --editor rome --set layer=1 steps=3 --texts texts.txt --contexts contexts.json "
        "-o d.safetensors")


def by_hand(editor, settings, groups, sequential=False):
    """The same edits through the package: the sum of one update a group of facts."""
    model, tok = load("model", "cpu", torch.float32)
    config, facts, total = configure(editor, settings), read_facts("facts.json"), Delta({})
    texts = Path("texts.txt").read_text().splitlines()
    sources = EditorInputs(tuple(texts), None, ("{}", "You said. {}", "I know. {}"))
    prepared = EDITORS[editor].prepare(model, tok, config, sources)
    for group in groups:
        with (total if sequential else Delta({})).applied(model):
            total = total + EDITORS[editor].edit(model, tok, [facts[i] for i in group], config, prepared)
    return total.dense()


def close(a, b):
    assert set(a.changes) == set(b.changes)
    for name in a.changes:
        torch.testing.assert_close(a.changes[name], b.changes[name], rtol=1e-3, atol=1e-5 * b.norm(name))


def test_edit_sequentially(at, capsys):
    assert does(f"{EDIT} --sequential") == 0
    found = delta.load("d.safetensors")
    close(found, by_hand("rome", {"layer": 1, "steps": 3}, [[i] for i in range(5)], sequential=True))
    assert found.info["settings"]["steps"] == 3 and found.info["edits"] == 5 and found.info["sequential"]
    assert found.info["model_hash"] == content_hash(load("model", "cpu", torch.float32)[0])
    assert found.info["seconds_per_edit"] > 0
    assert "d.safetensors: 5 facts" in capsys.readouterr().out
    (name,) = found.changes
    assert found.changes[name].shape == load("model", "cpu", torch.float32)[0].get_parameter(name).shape


def test_edit_each_alone_and_in_batches(at):
    words = EDIT.replace("rome --set layer=1", "memit --set layers=1,2 lambda=50")
    settings = {"layers": (1, 2), "lambda": 50, "steps": 3}
    for extra, groups, sequential in (("", [range(5)], False), ("--batch-size 1", [[i] for i in range(5)], False),
                                      ("--batch-size 2", [[0, 1], [2, 3], [4]], False),
                                      ("--batch-size 2 --sequential", [[0, 1], [2, 3], [4]], True)):
        assert does(f"{words} {extra}") == 0
        close(delta.load("d.safetensors"), by_hand("memit", settings, groups, sequential))


def test_edit_with_ready_moments(at, texts):
    model, tok = load("model", "cpu", torch.float32)
    stats.second_moments(model, tok, texts, [1]).save("stats.safetensors")
    assert does(EDIT.replace("--texts texts.txt", "--stats stats.safetensors")) == 0
    ready = delta.load("d.safetensors")
    assert does(EDIT) == 0
    close(ready, delta.load("d.safetensors"))


def test_apply_writes_a_model_that_transformers_loads(at, capsys):
    does(f"{EDIT} --sequential")
    assert does("apply model d.safetensors -o edited/one") == 0
    change = delta.load("d.safetensors")
    found = AutoModelForCausalLM.from_pretrained("edited/one", dtype=torch.float32)
    model, tok = load("model", "cpu", torch.float32)
    with change.applied(model):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), found.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained("edited/one")("Rome")["input_ids"] == tok("Rome")["input_ids"]
    assert [path.name for path in Path("edited").iterdir()] == ["one"]      # nothing half-written beside it
    assert "already there" in error_of(capsys, "apply model d.safetensors -o edited/one")
    assert "other weights" in error_of(capsys, "apply edited/one d.safetensors -o edited/two")
    assert not Path("edited/two").exists()
    assert does("apply edited/one d.safetensors --force -o edited/two") == 0


def test_apply_leaves_nothing_when_it_fails(at, monkeypatch):
    does(f"{EDIT} --sequential")

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
    assert does("apply model d.safetensors -o edited") == 2
    assert not [path for path in at.iterdir() if "edited" in path.name]


def test_evaluate_writes_rows_and_prints_means(at, capsys):
    does(f"{EDIT} --sequential")
    assert does("evaluate model facts.json --delta d.safetensors --metrics ES PS -o out/rows.parquet") == 0
    df, printed = pd.read_parquet("out/rows.parquet"), capsys.readouterr().out
    model, tok = load("model", "cpu", torch.float32)
    with delta.load("d.safetensors").applied(model):
        wanted = means(measure(model, tok, read_facts("facts.json"), ("ES", "PS")))
    assert dict(df.groupby("metric")["value"].mean()) == pytest.approx(wanted)
    assert list(df.columns) == ["run", "model", "editor", "data", "seed", "step", "fact", "metric", "value"]
    assert set(df["editor"]) == {"rome"} and set(df["step"]) == {5}
    assert f"{wanted['ES_prob']:.4f}" in printed
    assert does("evaluate model facts.json -o plain.parquet") == 0
    assert pd.read_parquet("plain.parquet")["value"].tolist() != df["value"].tolist()


@pytest.mark.parametrize("words, message", [
    ("edit model facts.json --editor rome --set layer=1 -o d", "rome needs second moments .* --texts .* --stats"),
    ("edit model facts.json --editor rome -o d", "nothing is published for model 'model'.*give layer"),
    ("edit model facts.json --editor rome --set lyer=1 -o d", "no setting 'lyer'; it has layer, steps, lr"),
    ("edit model facts.json --editor rome --set layer -o d", "--set layer: give NAME=VALUE"),
    ("edit model facts.json --editor rome --set layer=x -o d", "layer is 'x', but must be int"),
    ("edit model facts.json --editor rome --set layer=9 --texts texts.txt -o d", "layer 9: the model has layers 0"),
    ("edit model facts.json --editor surgery -o d", "unknown editor 'surgery'"),
    ("edit model none.json --editor ft -o d", "none.json: no such file"),
    ("edit ./none facts.json --editor ft --set epsilon=0.1 -o d", "none.*cannot be loaded"),
    ("edit model facts.json --editor rome --set layer=1 --texts none.txt -o d", "none.txt: no such file"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --dtype int8 -o d", "dtype 'int8'"),
    ("edit model facts.json --editor ft --set epsilon=0.1 --batch-size 0 -o d", "--batch-size must be at least 1"),
    ("edit model facts.json --editor ft --batch-size two -o d", "invalid int value: 'two'"),
    ("apply model none.safetensors -o d", "none.safetensors: no such file"),
    ("apply model texts.txt -o d", "texts.txt: not a safetensors file"),
    ("evaluate model facts.json --metrics XS -o d", "metric 'XS'"),
    ("run none.ipynb", "none.ipynb"),
    ("run none.ipynb -p name", "-p name: give NAME VALUE pairs"),
    ("report -p edits 5", "no notebook has this parameter; give NOTEBOOK.NAME VALUE"),
    ("data nothing", "unknown data set 'nothing'.*counterfact"),
    ("data --check facts.json", "name the data set"),
    ("operate model", "invalid choice: 'operate'"),
    ("", "required: COMMAND")])
def test_every_error_is_one_line(at, capsys, words, message):
    assert re.search(message, error_of(capsys, words))
    assert not (at / "d").exists()


@pytest.mark.parametrize("change, message", [
    ({"prompt": "The capital is"}, "bad.json: record 1: the prompt needs exactly one {}"),
    ({"subject": ""}, "bad.json: record 1: the subject is empty"),
    ({"target_new": ""}, "bad.json: record 1: target_new is empty"),
    ({"case_id": 0}, "bad.json: record 0: case_id occurs twice"),
    ({"prompt": "so " * 80 + "{} is"}, "record 1: .* at most 64")])
def test_malformed_facts_are_one_line(at, capsys, change, message):
    records = json.loads(Path("facts.json").read_text())
    records[1] |= change
    Path("bad.json").write_text(json.dumps(records))
    assert re.search(message, error_of(capsys, EDIT.replace("facts.json", "bad.json")))


def test_an_update_that_is_not_finite(at, capsys, monkeypatch):
    monkeypatch.setattr(ft, "edit", lambda *_: Delta({"x": torch.tensor([float("nan")])}))
    err = error_of(capsys, "edit model facts.json --editor ft --set epsilon=0.1 -o d.safetensors")
    assert "record 0" in err and "not finite" in err and not Path("d.safetensors").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_has_an_example(name, capsys):
    with contextlib.suppress(SystemExit):
        parser().parse_args([name, "--help"])
    assert f"example: python -m editcore {name} " in capsys.readouterr().out


def test_commands_and_parser_agree():
    assert list(commands.COMMANDS) == COMMANDS


def test_help_needs_no_torch_and_a_process_ends_with_the_code():
    code = "import sys; from editcore.__main__ import main; sys.exit(main(['nonsense']) != 2 or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    done = subprocess.run([sys.executable, "-m", "editcore", "edit"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("editcore: ")


def test_words_of_a_report_reach_their_notebooks(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr("editcore.report.typed", lambda path, words: {"typed": words, "path": path.as_posix()})
    monkeypatch.setattr("editcore.report.build", lambda *given: calls.append(given) or "out/index.html")
    assert does("report -o out --force -p 20_x.n 5 20_x.m a -p 10_y.k 7 --notebooks books") == 0
    assert calls == [("books", "out", {"20_x": {"typed": {"n": "5", "m": "a"}, "path": "books/20_x.ipynb"},
                                       "10_y": {"typed": {"k": "7"}, "path": "books/10_y.ipynb"}}, True)]
    assert capsys.readouterr().out == "out/index.html\n"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the reference results are not beside this checkout")
@pytest.mark.parametrize("editor, first, words", [
    ("memit_batch16", 16, "--editor memit --set layers=0,1,2 lambda=200 clamp=2 --contexts {}/contexts_memit.json"),
    ("rome_single5", 1, "--editor rome --set layer=1 --contexts {}/contexts_rome.json")])
def test_reference_results(tmp_path, editor, first, words):
    """What the public code computes, through the command line: 2e-5 for MEMIT, 1e-5 for ROME."""
    golden = SHARED / "golden"
    (tmp_path / "facts.json").write_text(json.dumps(json.loads((golden / "requests.json").read_text())[:first]))
    assert main(["edit", str(golden / "model"), str(tmp_path / "facts.json"), *words.format(golden).split(), "--stats",
                 str(golden / f"{editor}.safetensors"), "-o", str(tmp_path / "d.safetensors")]) == 0
    with safe_open(golden / f"{editor}.safetensors", "pt") as file:
        for name, change in delta.load(tmp_path / "d.safetensors").changes.items():
            if first == 1:
                wanted, limit = torch.outer(file.get_tensor("edit0/u"), file.get_tensor("edit0/v")), 1e-5
            else:
                wanted, limit = file.get_tensor(f"total_delta/{name}"), 2e-5
            assert (change - wanted).norm() / wanted.norm() < limit
