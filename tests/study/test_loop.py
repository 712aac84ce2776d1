"""Rows of runs equal those of a plain loop, also after kills, beside failures, and together."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import corpus
from editor_cases import CASES as SMALL
from filelock import FileLock

from editcore import metrics
from editcore.commands import edit_all
from editcore.delta import Delta
from editcore.editors import EDITORS, Editor, EditorInputs, configure, memit
from editcore.facts import read_facts
from editcore.model import content_hash, load, module_of, name_of
from editcore.study import loop, measure, results
from editcore.study.loop import execute, execute_all, groups
from editcore.study.run import input_files, make_run, schedule

ROME = {"layer": 1, "steps": 4}
MEMIT = {"layers": [0, 2], "lambda": 5.0, "steps": 4}
CASES = {"rome": ROME, "nas": ROME | {"anchor": 2}, "memit": MEMIT, "memit-past": MEMIT,
         "emmet": MEMIT | {"layers": [1]}, "encore": MEMIT | {"ridge": 0.1, "early_stop": 1},
         "alphaedit": MEMIT | {"null_space": 0.3, "lambda": 1.0}, "rect": MEMIT, "prune": MEMIT}
ALONE = {"ft": {"epsilon": 1e-2, "layer": 1, "steps": 2},
         "random": {"layer": 1, "norms": [[case, 1.0] for case in range(12)]}}


@dataclass(frozen=True)
class Settings:
    """Of "noise", an editor that draws from torch's generator: a resume must restore its state."""

    layer: int = 1          # edited layer
    size: float = 0.05      # of each entry
    fail_at: int = -1       # case id at which the change is not a number


@dataclass(frozen=True)
class Templates:
    """What "noise" prepares: templates that differ at every start unless they are handed over."""

    contexts: tuple


def noise(model, tok, facts, config, prepared):
    name = name_of(model, "mlp_out", config.layer) + ".weight"
    weight = model.get_parameter(name)
    change = config.size * torch.randn(weight.shape)
    if config.fail_at in [fact.case_id for fact in facts]:
        change[0, 0] = float("nan")
    info = {"v_norm": [change.norm().item()] * len(facts), "seconds": time.time()}
    return Delta({name: change}, info)


def prepare(model, tok, config, inputs):
    return Templates(inputs.contexts or ("{}", f"{time.time_ns()}. {{}}"))


@pytest.fixture(autouse=True)
def noise_editor(monkeypatch):
    monkeypatch.setitem(EDITORS, "noise", Editor(__name__, names={"edit": "noise"}))


@pytest.fixture(scope="module")
def place(place, texts):
    """A model folder with all that a run finds beside a model."""
    (place / "texts.txt").write_text("\n".join(corpus() * 4))
    (place / "held_out.txt").write_text("\n".join(texts[:5]))
    (place / "tasks").mkdir()
    words = ("You", "I", "It", "She", "We", "He")
    items = [{"sentence": f"{word} is good", "label": i % 2} for i, word in enumerate(words)]
    (place / "tasks" / "sst2.json").write_text(json.dumps(items))
    return place


@pytest.fixture
def run(place):
    """A run of 8 of the 12 facts that measures everything."""
    return make_run(model=str(place), editor="noise", n_edits=8, retest_every=3, downstream_every=4,
                    untouched=3, shots=1, generation=1, checkpoint_every=2, answers=2)


def runs_of(place, editor, **words):
    """Three runs: two orders, and another seed, which has its own context templates."""
    words = {"model": str(place), "n_edits": 5, "retest_every": 2, "downstream_every": 2,
             "untouched": 3, "checkpoint_every": 1, "shots": 1, "answers": 2} | words
    return [make_run(editor=editor, settings=CASES[editor], order=order, seed=seed, **words)
            for order, seed in ((0, 0), (1, 0), (0, 3))]


def rows_of(folder):
    return pd.read_parquet(folder / "rows.parquet")


def cases_of(folder):
    return pd.read_parquet(folder / "cases.parquet")


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def assert_equal(a, b):
    """Both runs have the same rows and cases, bit for bit."""
    assert a.name == b.name
    pd.testing.assert_frame_equal(rows_of(a), rows_of(b), check_exact=True)
    pd.testing.assert_frame_equal(cases_of(a), cases_of(b), check_exact=True)


def assert_close(a, b, tolerance=2e-4):
    """Both runs have the same rows, with values that agree but for the order of sums."""
    keys = ["step", "fact", "metric"]
    a, b = (rows_of(folder).sort_values(keys).reset_index(drop=True) for folder in (a, b))
    pd.testing.assert_frame_equal(a[["run", *keys]], b[["run", *keys]])
    exact = a["metric"].str.contains("evaluations")
    assert (a["value"][exact] == b["value"][exact]).all()
    pd.testing.assert_series_equal(a["value"], b["value"], rtol=tolerance, atol=tolerance)


def interrupt(monkeypatch, runs, out, at):
    """Start runs and break them off in update number `at` (from 1), as Ctrl-C would."""
    calls = []
    update = loop._updates

    def interrupted(*words):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return update(*words)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_updates", interrupted)
        with pytest.raises(KeyboardInterrupt):
            execute_all(runs, out)


# ── one run ─────────────────────────────────────────────────────────────────────────────────────

def test_rows_are_those_of_a_plain_loop(place, tmp_path, run):
    """ROME: each edit applied by hand to a model with the sum of those before."""
    run = dataclasses.replace(run, editor="rome", settings=(("layer", 1), ("steps", 3)), n_edits=4,
                              retest_every=2)
    values = rows_of(execute(run, tmp_path)).set_index(["step", "fact", "metric"])["value"]
    model, tok = load(place, "cpu", torch.float32)
    config = configure("rome", dict(run.settings))
    inputs = EditorInputs(texts=tuple(corpus() * 4), seed=run.seed)
    prepared = EDITORS["rome"].prepare(model, tok, config, inputs)
    facts, _ = schedule(run, place / "facts.json")
    name = name_of(model, "mlp_out", 1) + ".weight"
    weight = model.get_parameter(name)
    unedited = weight.clone()
    total = Delta({})
    for n, fact in enumerate(facts, 1):
        with total.applied(model):
            update = EDITORS["rome"].edit(model, tok, [fact], config, prepared)
        total = total + update
        with total.applied(model):
            expected = {(n, str(fact.case_id), row["metric"]): row["value"]
                        for row in metrics.measure(model, tok, [fact])}
            earlier = metrics.measure(model, tok, facts[:n - 1], ("ES",)) if n in (2, 4) else []
        expected |= {(n, str(row["fact"]), "retest_" + row["metric"]): row["value"]
                     for row in earlier}
        expected |= {(n, name, "relative"): total.norm() / unedited.norm().item(),
                     (n, name, "distance"): total.norm() / unedited.numel(),
                     (n, name, "update"): update.norm()}
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert {key[0] for key in values.index if key[2].startswith("retest_")} == {2, 4}


def test_schedule_of_measurements(run, tmp_path):
    df = rows_of(execute(run, tmp_path))
    steps = {metric: sorted(set(part["step"])) for metric, part in df.groupby("metric")}
    for metric in ("ES", "before_ES", "distance", "edit_v_norm"):
        assert steps[metric] == list(range(1, 9))
    assert steps["retest_ES_exact"] == [3, 6, 8]
    for metric in ("sst2_f1", "perplexity", "untouched_ES_exact", "GE"):
        assert steps[metric] == [0, 4, 8]
    assert steps["spectral"] == steps["effective_rank"] == steps["condition"] == [4, 8]
    assert list(df.columns) == results.COLUMNS and "edit_seconds" not in steps
    retested = df[df["metric"] == "retest_ES"].groupby("step")["fact"].nunique()
    assert dict(retested) == {3: 2, 6: 5, 8: 7}     # all edits before the update, none after it
    assert df.loc[df["metric"] == "untouched_ES", "fact"].nunique() == 3


def test_cases_say_what_the_model_wrote_and_when_it_forgot(run, place, tmp_path, gpt2):
    run = dataclasses.replace(run, batch_size=3)
    folder = execute(run, tmp_path)
    cases = cases_of(folder)
    facts, _ = schedule(run, place / "facts.json")
    assert list(cases["fact"]) == [str(fact.case_id) for fact in facts]
    assert list(cases["prompt"]) == [fact.text for fact in facts]
    assert list(cases["step"]) == [3, 3, 3, 6, 6, 6, 8, 8]
    context = measure.set_up(run, input_files(run))
    assert list(cases["answer_before"]) == measure.answers(context, facts)
    failed = rows_of(folder).query("metric == 'retest_ES_exact' and value < 1")
    expected = failed.groupby("fact")["step"].min().astype(float)
    forgotten = cases.set_index("fact")["forgotten_at"]
    assert forgotten.dropna().to_dict() == expected.to_dict() and forgotten.isna().any()
    rows = rows_of(folder).drop(columns="run")
    silent = execute(dataclasses.replace(run, answers=0), tmp_path)
    assert not (silent / "cases.parquet").exists() and silent != folder
    pd.testing.assert_frame_equal(rows, rows_of(silent).drop(columns="run"), check_exact=True)
    assert len(results.cases([folder, silent])) == 8


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_rows(monkeypatch, run, tmp_path, size, at):
    run = dataclasses.replace(run, batch_size=size)
    contexts = tmp_path / "contexts.json"
    contexts.write_text('["{}"]')
    whole = execute(run, tmp_path / "whole")
    interrupt(monkeypatch, [run], tmp_path / "broken", at)
    broken = execute(run, tmp_path / "broken")
    assert_equal(whole, broken)
    assert not (broken / "checkpoint").exists()


def test_contexts_are_never_sampled_again(monkeypatch, run, tmp_path):
    interrupt(monkeypatch, [run], tmp_path, 4)
    (head,) = tmp_path.glob("*/checkpoint/checkpoint.json")
    first = json.loads(head.read_text())["contexts"]
    assert record_of(execute(run, tmp_path))["contexts"] == first


def test_remembered_keys_are_taken_up_exactly(monkeypatch, place, tmp_path):
    run = runs_of(place, "memit-past", batch_size=2)[0]
    whole = execute(run, tmp_path / "whole")
    interrupt(monkeypatch, [run], tmp_path / "broken", 2)
    assert_equal(whole, execute(run, tmp_path / "broken"))


CHILD = """
import sys, torch
torch.set_num_threads(1)
from editcore.study.loop import execute
from editcore.study.run import make_run
execute(make_run(**eval(sys.argv[1])), sys.argv[2])
"""


def start(run, out):
    """Begin a run in a process of its own."""
    words = repr(dataclasses.asdict(run) | {"settings": dict(run.settings)})
    return subprocess.Popen([sys.executable, "-c", CHILD, words, str(out)],
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def edits_of(out):
    """Step of the only checkpoint under `out`, -1 if there is none yet."""
    heads = list(out.glob("*/checkpoint/checkpoint.json"))
    return json.loads(heads[0].read_text())["step"] if heads else -1


def test_killed_at_unknown_moments_it_ends_with_the_same_rows(place, tmp_path):
    """A process of its own gets SIGKILL three times; the run is then finished."""
    run = dataclasses.replace(runs_of(place, "rome")[0], n_edits=10,
                              settings=(("layer", 1), ("steps", 20)))
    whole = execute(run, tmp_path / "whole")
    out = tmp_path / "killed"
    steps = []
    for wait in (0, 3, 6):
        child = start(run, out)
        while child.poll() is None and edits_of(out) < wait:
            time.sleep(0.001)
        time.sleep(0.005 * wait)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it was to be killed before its end"
        steps.append(edits_of(out))
    assert 0 <= steps[0] < 10 and steps == sorted(steps) and steps[-1] >= 6
    assert_equal(whole, execute(run, out))


def test_a_second_start_does_nothing(monkeypatch, run, tmp_path):
    folder = execute(run, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(measure, "set_up", None)        # it would fail if the model were loaded
    assert execute(run, tmp_path) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_run_that_another_process_makes_is_waited_for(monkeypatch, run, tmp_path, capfd):
    run = dataclasses.replace(run, n_edits=1)
    folder = execute(run, tmp_path)
    head = (folder / "run.json").rename(tmp_path / "head.json")    # as if it were being made
    held = threading.Event()

    def other():
        with FileLock(tmp_path / ".locks" / f"{folder.name}.lock"):
            held.set()
            time.sleep(0.5)
            head.rename(folder / "run.json")

    thread = threading.Thread(target=other)
    thread.start()
    held.wait()
    monkeypatch.setattr(measure, "set_up", None)        # once it is made, nothing is left to do
    assert execute(run, tmp_path) == folder
    thread.join()
    assert "waiting for another process" in "".join(capfd.readouterr())


def test_run_json_says_how_it_was_made(run, tmp_path, gpt2):
    record = record_of(execute(run, tmp_path))
    assert record["status"] == "finished" and record["edits"] == len(record["update_seconds"]) == 8
    assert record["parameters"]["n_edits"] == 8
    assert record["config"] == dataclasses.asdict(Settings())
    assert record["hashes"]["the model's weights"] == content_hash(gpt2[0])
    assert record["seconds"] > 0 and record["peak_memory"] > 0 and record["device"] == "cpu"
    assert {"python", "torch", "transformers"} <= set(record["versions"]) and record["commit"]


# ── harm ────────────────────────────────────────────────────────────────────────────────────────

@pytest.fixture
def copied(place, tmp_path, run):
    """(folder, run) on a copy of the model folder that the test may change."""
    folder = tmp_path / "copy"
    for path in place.rglob("*.*"):
        target = folder / path.relative_to(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return folder, dataclasses.replace(run, model=str(folder))


def test_facts_changed_under_an_interrupted_run(monkeypatch, copied, tmp_path):
    folder, run = copied
    out = tmp_path / "out"
    interrupt(monkeypatch, [run], out, 5)
    text = (folder / "facts.json").read_text()
    (folder / "facts.json").write_text(text.replace("Oslo", "Bern"))
    with pytest.raises(ValueError, match="facts has changed since the run began"):
        execute(run, out)
    (folder / "facts.json").write_text(text)
    execute(run, out)
    (folder / "facts.json").write_text(text.replace("Vienna", "Lima"))  # finished: another run
    execute(run, out)
    assert len(results.runs(out)) == 2


def test_model_changed_under_an_interrupted_run(monkeypatch, copied, tmp_path):
    folder, run = copied
    interrupt(monkeypatch, [run], tmp_path / "out", 5)
    model, _ = load(folder, "cpu", torch.float32)
    module_of(model, "mlp_out", 0).weight.data[0, 0] += 1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="the model's files has changed"):
        execute(run, tmp_path / "out")


def test_other_weights_behind_the_same_files(monkeypatch, run, tmp_path):
    """As with a remote name, whose files are not hashed before loading."""
    interrupt(monkeypatch, [run], tmp_path, 5)
    monkeypatch.setattr(measure, "content_hash", lambda model: "another")
    with pytest.raises(ValueError, match="the model's weights has changed since the run began"):
        execute(run, tmp_path)


def test_damaged_checkpoint(monkeypatch, run, tmp_path):
    interrupt(monkeypatch, [run], tmp_path, 5)
    (weights,) = tmp_path.glob("*/checkpoint/weights-*")
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(measure, "set_up", None)        # before the model is loaded
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{weights.name}"):
        execute(run, tmp_path)


def test_an_edit_that_is_not_finite_stops_the_run(run, tmp_path):
    facts, _ = schedule(run, input_files(run)["facts"])
    bad = dataclasses.replace(run, settings=(("fail_at", facts[5].case_id),))
    folder = execute(bad, tmp_path)
    record = record_of(folder)
    assert record["status"] == "stopped" and record["edits"] == len(cases_of(folder)) == 5
    reason = f"edit 6 (record {facts[5].case_id}): the update is not finite"
    assert record["stopped"] == reason and not (folder / "checkpoint").exists()
    whole = rows_of(execute(run, tmp_path / "whole")).query("step <= 5 and metric != 'run'")
    columns = ["step", "fact", "metric", "value"]
    pd.testing.assert_frame_equal(rows_of(folder)[columns], whole[columns].reset_index(drop=True),
                                  check_exact=True)
    assert list(results.runs(tmp_path)["status"]) == ["stopped"]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("size", [1e6, 1e18, 3e37])
def test_a_run_goes_on_through_a_collapse(run, tmp_path, size):
    """Measurements of a model that answers nonsense, or nothing that is a number, are rows too."""
    folder = execute(dataclasses.replace(run, settings=(("size", size),)), tmp_path)
    df = rows_of(folder)
    record = record_of(folder)
    assert record["status"] == "finished" or "not finite" in record["stopped"]
    moved = df.loc[(df["metric"] == "relative") & (df["step"] == 1), "value"].item()
    assert moved > 1e5
    last = set(df.loc[df["step"] == 8, "metric"])
    assert last >= {"ES", "retest_ES", "untouched_ES"} or record["edits"] < 8


@pytest.mark.parametrize("change, message", [
    ({"editor": "surgery"}, "unknown editor 'surgery'"),
    ({"settings": (("leyer", 1),)}, "no setting 'leyer'"),
    ({"n_edits": 13}, "n_edits is 13, but .*facts.json has 12 facts"),
    ({"leave_out": ("99",)}, "leave_out names '99'"),
    ({"measure": ("ES", "XS")}, "metric 'XS'"),
    ({"facts": "nowhere.json"}, "facts: nowhere.json: no such file"),
    ({"tasks": "nowhere"}, "tasks: nowhere: no such folder"),
    ({"model": "nowhere/model"}, "facts: .* no such model")])
def test_bad_input_is_said_before_any_edit(monkeypatch, run, tmp_path, change, message):
    monkeypatch.setattr(loop, "_updates", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        execute(dataclasses.replace(run, **change), tmp_path)
    assert not list(tmp_path.glob("*/run.json"))


@pytest.mark.parametrize("change, message", [
    ({"prompt": "The capital is"}, "record 3: the prompt needs exactly one {}"),
    ({"subject": " "}, "record 3: the subject is empty"),
    ({"target_new": ""}, "record 3: target_new is empty"),
    ({"case_id": 5}, "record 5: case_id occurs twice"),
    ({"prompt": "the old river runs " * 30 + "{} is"}, "record 3: .* takes at most")])
def test_malformed_facts(copied, tmp_path, change, message):
    folder, run = copied
    records = json.loads((folder / "facts.json").read_text())
    records[3] |= change
    (folder / "facts.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        execute(dataclasses.replace(run, n_edits=0), tmp_path / "out")


# ── many runs ───────────────────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("editor", CASES)
def test_rows_equal_those_of_separate_runs(place, tmp_path, editor, size):
    runs = runs_of(place, editor, batch_size=size)
    together = execute_all(runs, tmp_path / "together")
    for run, folder in zip(runs, together, strict=True):
        assert_close(folder, execute(run, tmp_path / "apart"))
    assert len({rows_of(folder)["value"].sum() for folder in together}) == 3
    assert record_of(together[0])["together"] == 3


@pytest.mark.parametrize("editor", ALONE)
def test_editors_that_edit_alone(monkeypatch, place, tmp_path, editor):
    run = make_run(model=str(place), editor=editor, settings=ALONE[editor], n_edits=4, shots=1,
                   checkpoint_every=1, untouched=2)
    whole = execute(run, tmp_path / "whole")
    interrupt(monkeypatch, [run], tmp_path / "broken", 3)
    assert_equal(whole, execute(run, tmp_path / "broken"))


@pytest.mark.parametrize("editor", [name for name in EDITORS if not EDITORS[name].makes_patch])
def test_the_command_edits_one_after_another_as_a_run_does(monkeypatch, place, tmp_path, editor):
    run = make_run(model=str(place), editor=editor, settings=SMALL[editor], n_edits=5, batch_size=2,
                   retest_every=0, downstream_every=0, untouched=2, measure=[], before=[],
                   answers=0)
    ends = []
    monkeypatch.setattr(results, "write", lambda folder, context, state, **_: ends.append(
        measure.set_measured_weights(context, state.total)))
    execute(run, tmp_path)
    fresh = measure.set_up(run, input_files(run))
    total, reported = edit_all(fresh.model, fresh.tok, fresh.facts, editor, fresh.config,
                               prepared=fresh.prepared, size=2, sequential=True)
    total = total.dense()
    assert all(len(reported[name]) == 5 for name in reported.keys() & {"losses", "hits"})
    assert total.changes.keys() == ends[0].changes.keys() and total.norm() > 0
    for name, change in total.changes.items():
        torch.testing.assert_close(change, ends[0].changes[name], rtol=1e-3,
                                   atol=1e-4 * ends[0].norm(name))


@pytest.mark.parametrize("editor", ["memit-past", "rome"])
def test_killed_runs_go_on_from_where_each_was(monkeypatch, place, tmp_path, editor):
    runs = runs_of(place, editor)
    whole = execute_all(runs, tmp_path / "whole")
    interrupt(monkeypatch, runs, tmp_path / "broken", 3)
    alone = execute(runs[1], tmp_path / "broken")       # one of them ends by itself
    broken = execute_all(runs, tmp_path / "broken")
    assert broken[1] == alone
    for a, b in zip(whole, broken, strict=True):
        assert_close(a, b)


def test_a_run_that_fails_leaves_the_others(monkeypatch, place, tmp_path):
    runs = runs_of(place, "memit")
    edit_groups = memit.edit_groups
    whole = execute_all(runs, tmp_path / "whole")
    first = rows_of(whole[1]).query("metric == 'ES' and step == 3")["fact"].item()

    def failing(model, tok, groups, config, *, prepared, current=None):
        cases = [str(fact.case_id) for group in groups for fact in group]
        if first in cases and len(prepared) != 1:
            raise ValueError("made to fail together")
        return edit_groups(model, tok, groups, config, prepared=prepared, current=current)

    monkeypatch.setattr(memit, "edit_groups", failing)
    for a, b in zip(whole, execute_all(runs, tmp_path / "apart"), strict=True):
        assert_close(a, b)      # where the runs cannot be edited together, each is edited alone


def test_groups_share_what_can_be_shared(place, monkeypatch):
    rome, other = runs_of(place, "rome"), runs_of(place, "memit")
    assert groups(rome + other) == [rome, other]
    assert groups(rome + other, most=2) == [rome[:2], rome[2:], other[:2], other[2:]]
    assert groups(rome, workers=2) == [rome[:2], rome[2:]]
    shorter = dataclasses.replace(rome[0], n_edits=4)
    assert groups([rome[0], shorter]) == [[rome[0]], [shorter]]
    monkeypatch.setitem(EDITORS, "own", Editor("editcore.editors.rome"))
    own = [dataclasses.replace(run, editor="own") for run in rome]
    assert groups(own) == [[run] for run in own]        # it may draw random numbers


def test_folders_come_in_the_order_of_the_runs(place, tmp_path):
    rome = runs_of(place, "rome")
    other = runs_of(place, "memit")[0]
    folders = execute_all([*rome[:2], other, rome[2], rome[0]], tmp_path)
    editors = [record_of(folder)["parameters"]["editor"] for folder in folders]
    assert editors == ["rome", "rome", "memit", "rome", "rome"]
    assert folders[0] == folders[4] and len(set(folders)) == 4


def test_runs_in_processes_of_their_own(place, tmp_path):
    """The same rows as one after the other in this process, and the model's weights untouched."""
    runs = runs_of(place, "rome", n_edits=2)[::2]
    apart = execute_all(runs, tmp_path / "apart", workers=2)
    for a, b in zip(apart, execute_all(runs, tmp_path / "here"), strict=True):
        assert_close(a, b)


def test_left_out_facts_are_not_edited(run, place):
    first, _ = schedule(run, place / "facts.json")
    shorter = dataclasses.replace(run, leave_out=(str(first[1].case_id),))
    edited, untouched = schedule(shorter, place / "facts.json")
    assert edited[:2] == [first[0], first[2]] and first[1] not in [*edited, *untouched]
    assert not {fact.case_id for fact in edited} & {fact.case_id for fact in untouched}
    in_file_order = schedule(dataclasses.replace(run, order=-1), Path(place) / "facts.json")[0]
    assert in_file_order == read_facts(place / "facts.json")[:8]


def test_a_run_of_known_facts(place, run, tmp_path, monkeypatch):
    asked = []

    def knows_each_third(model, tok, facts, cache):
        asked.append(cache)
        return [fact.case_id % 3 == 0 for fact in facts]

    monkeypatch.setattr(measure, "known", knows_each_third)
    first = dataclasses.replace(run, known=True, n_edits=1, answers=1, order=1)
    alone, _ = execute_all([first, dataclasses.replace(first, order=2)], tmp_path)
    assert record_of(alone)["known_facts"] == 4 and asked == [tmp_path / "moments"] * 2
    edited, untouched = schedule(first, place / "facts.json", [i % 3 == 0 for i in range(12)])
    rows = rows_of(alone)
    assert set(rows.loc[rows["metric"] == "ES", "fact"]) == {str(edited[0].case_id)}
    followed = rows.loc[rows["metric"].eq("untouched_ES_exact"), "fact"]
    assert set(followed) == {str(fact.case_id) for fact in untouched} and len(untouched) == 3


def test_what_cannot_be_measured_is_said(place, run, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(measure, "say", lines.append)
    short = dataclasses.replace(run, n_edits=1)
    execute(short, tmp_path)
    assert lines == []
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                 "facts.json"):
        (folder / name).write_bytes((place / name).read_bytes())
    execute(dataclasses.replace(short, model=str(folder)), tmp_path)
    assert len(lines) == 1 and "no tasks and no held_out for model" in lines[0]
