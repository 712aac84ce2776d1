"""Small runs in; their rows compared with a plain loop and with those of interrupted, killed or harmed runs."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from editcore import metrics
from editcore.delta import Delta
from editcore.editors import EDITORS, Editor, EditorInputs, configure
from editcore.facts import read_facts
from editcore.model import content_hash, load, weight_of
from editcore.study import loop as study
from editcore.study import measure as lab
from editcore.study import run as inputs


@dataclass(frozen=True)
class Noise:
    """An editor for tests: it draws its change from torch's own generator, which a resumed run must restore."""

    layer: int = 1          # edited layer
    size: float = 0.05      # of each entry
    fail_at: int = -1       # case id at which the change is not a number


def noise(model, tok, facts, config, prepared):
    name, weight = weight_of(model, "mlp_out", config.layer)
    change = config.size * torch.randn(weight.shape)
    if config.fail_at in [one.case_id for one in facts]:
        change[0, 0] = float("nan")
    return Delta({name: change}, {"v_norm": [change.norm().item()] * len(facts), "seconds": time.time()})


@dataclass(frozen=True)
class Kept:
    """What the editor for tests prepares."""

    contexts: tuple


def prepare(model, tok, config, inputs):
    return Kept(inputs.contexts or ("{}", f"{time.time_ns()}. {{}}"))


@pytest.fixture(autouse=True)
def noise_editor(monkeypatch):
    """The table of editors with "noise" in it; its templates differ at every start unless they are handed over."""
    monkeypatch.setitem(EDITORS, "noise", Editor(__name__, names={"Settings": "Noise", "edit": "noise"}))


@pytest.fixture(scope="module")
def place(place, texts):
    """A model folder with all that a run finds beside a model: facts, texts, held-out text, few-shot items."""
    folder = place
    (folder / "held_out.txt").write_text("\n".join(texts[:5]))
    (folder / "tasks").mkdir()
    words = ("You", "I", "It", "She", "We", "He")
    items = [{"sentence": f"{word} is good", "label": i % 2} for i, word in enumerate(words)]
    (folder / "tasks" / "sst2.json").write_text(json.dumps(items))
    return folder


@pytest.fixture
def run(place):
    """A run of 8 of the 12 facts that measures everything."""
    return study.make(model=str(place), editor="noise", n_edits=8, retest_every=3, downstream_every=4, untouched=3,
                      shots=1, generation=1, checkpoint_every=2)


def rows_of(folder):
    return pd.read_parquet(folder / "rows.parquet")


def interrupted(monkeypatch, run, out, at):
    """Start a run and break it off in edit number `at` (from 1), as Ctrl-C would."""
    calls, real = [], lab.update

    def update(*given):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(lab, "update", update)
        with pytest.raises(KeyboardInterrupt):
            study.execute(run, out)


def test_rows_are_those_of_a_plain_loop(place, run, tmp_path, texts):
    """ROME, one fact an update: the values of edits applied by hand, each on a model with the sum of those before."""
    run = dataclasses.replace(run, editor="rome", settings=(("layer", 1), ("steps", 3)), n_edits=4, retest_every=2)
    df = rows_of(study.execute(run, tmp_path)).set_index(["step", "fact", "metric"])["value"]
    model, tok = load(place, "cpu", torch.float32)
    config = configure("rome", dict(run.settings))
    prepared = EDITORS["rome"].prepare(model, tok, config, EditorInputs(texts=tuple(texts), seed=run.seed))
    edited, _ = inputs.schedule(run, place / "facts.json")
    name, weight = weight_of(model, "mlp_out", 1)
    unedited, total = weight.clone(), Delta({})
    for n, one in enumerate(edited, 1):
        with total.applied(model):
            update = EDITORS["rome"].edit(model, tok, [one], config, prepared)
        total = total + update
        with total.applied(model):
            for row in metrics.measure(model, tok, [one]):
                assert df[n, str(one.case_id), row["metric"]] == pytest.approx(row["value"], abs=1e-5)
            earlier = metrics.measure(model, tok, edited[:n - 1], ("ES",)) if n in (2, 4) else []
        for row in earlier:
            assert df[n, str(row["fact"]), "retest_" + row["metric"]] == pytest.approx(row["value"], abs=1e-5)
        assert df[n, name, "relative"] == pytest.approx(total.norm() / unedited.norm().item(), rel=1e-4)
        assert df[n, name, "distance"] == pytest.approx(total.norm() / unedited.numel(), rel=1e-4)
        assert df[n, name, "update"] == pytest.approx(update.norm(), rel=1e-4)
    assert not [key for key in df.index if key[2].startswith("retest_") and key[0] not in (2, 4)]


def test_schedule_of_measurements(run, tmp_path):
    df = rows_of(study.execute(run, tmp_path))
    steps = {metric: sorted(set(part["step"])) for metric, part in df.groupby("metric")}
    assert steps["ES"] == steps["before_ES"] == steps["distance"] == steps["edit_v_norm"] == list(range(1, 9))
    assert steps["retest_ES_exact"] == [3, 6, 8]
    assert steps["sst2_f1"] == steps["perplexity"] == steps["untouched_ES_exact"] == steps["GE"] == [0, 4, 8]
    assert steps["spectral"] == steps["effective_rank"] == steps["condition"] == [4, 8]
    assert list(df.columns) == study.COLUMNS and "edit_seconds" not in steps
    again = df[df["metric"] == "retest_ES"].groupby("step")["fact"].nunique()
    assert dict(again) == {3: 2, 6: 5, 8: 7}        # all edits before the update, none after it
    assert df.loc[df["metric"] == "untouched_ES", "fact"].nunique() == 3


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_an_interrupted_run_ends_with_the_same_rows(monkeypatch, run, tmp_path, size, at):
    """With an editor that draws random numbers, so that rows agree only if the random state is taken up as well."""
    run = dataclasses.replace(run, batch_size=size, contexts="")
    whole = study.execute(run, tmp_path / "whole")
    interrupted(monkeypatch, run, tmp_path / "broken", at)
    broken = study.execute(run, tmp_path / "broken")
    pd.testing.assert_frame_equal(rows_of(whole), rows_of(broken), check_exact=True)
    assert whole.name == broken.name and not (broken / "checkpoint").exists()


def test_contexts_are_never_sampled_again(monkeypatch, run, tmp_path):
    interrupted(monkeypatch, run, tmp_path, 4)
    (head,) = tmp_path.glob("*/checkpoint/checkpoint.json")
    first = json.loads(head.read_text())["contexts"]
    assert json.loads((study.execute(run, tmp_path) / "run.json").read_text())["contexts"] == first


CHILD = """
import sys, torch
torch.set_num_threads(1)
from editcore import study
study.execute(study.make(**eval(sys.argv[1])), sys.argv[2])
"""


def test_killed_at_several_points_it_ends_with_the_same_rows(place, tmp_path):
    """A process of its own gets SIGKILL three times, at moments it cannot know, and the run is then finished."""
    words = {"model": str(place), "editor": "rome", "settings": {"layer": 1, "steps": 20}, "n_edits": 10, "shots": 1,
             "retest_every": 2, "downstream_every": 2, "untouched": 2, "checkpoint_every": 1}
    whole = rows_of(study.execute(study.make(**words), tmp_path / "whole"))
    out, steps = tmp_path / "killed", []
    for wait in (0, 3, 6):
        child = subprocess.Popen([sys.executable, "-c", CHILD, repr(words), str(out)],
                                 env={**os.environ, "OMP_NUM_THREADS": "1"})
        while child.poll() is None and progress_of(out) < wait:
            time.sleep(0.001)
        time.sleep(0.005 * wait)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, "it was to be killed before its end"
        steps.append(progress_of(out))
    assert 0 <= steps[0] < 10 and steps == sorted(steps) and steps[-1] >= 6
    pd.testing.assert_frame_equal(whole, rows_of(study.execute(study.make(**words), out)), check_exact=True)


def progress_of(out):
    """Step of the only checkpoint under `out`, -1 if there is none yet."""
    found = list(out.glob("*/checkpoint/checkpoint.json"))
    return json.loads(found[0].read_text())["step"] if found else -1


def test_a_second_start_does_nothing(monkeypatch, run, tmp_path):
    folder = study.execute(run, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(lab, "set_up", None)        # it would fail if the model were loaded
    assert study.execute(run, tmp_path) == folder
    assert times == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_run_json_says_how_it_was_made(run, tmp_path, gpt2):
    folder = study.execute(run, tmp_path)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" and record["edits"] == 8 and len(record["update_seconds"]) == 8
    assert record["parameters"]["n_edits"] == 8 and record["config"] == dataclasses.asdict(Noise())
    assert record["hashes"]["the model's weights"] == content_hash(gpt2[0])
    assert record["hashes"]["facts"] == inputs.sha256(inputs.files(run)["facts"])
    assert record["seconds"] > 0 and record["peak_memory"] > 0 and record["device"] == "cpu"
    assert {"python", "torch", "transformers"} <= set(record["versions"]) and record["commit"]


def test_run_id_depends_on_parameters_and_contents_only(run):
    one = inputs.run_id(run, {"facts": "a"})
    assert one == inputs.run_id(dataclasses.replace(run, checkpoint_every=7), {"facts": "a"})
    assert one == inputs.run_id(study.make(**dataclasses.asdict(run)), {"facts": "a"})
    others = [inputs.run_id(run, {"facts": "b"}), inputs.run_id(dataclasses.replace(run, seed=1), {"facts": "a"}),
              inputs.run_id(dataclasses.replace(run, settings=(("size", 0.1),)), {"facts": "a"})]
    assert len({one, *others}) == 4


@pytest.fixture
def copied(place, tmp_path, run):
    """A run on a copy of the model folder that the test may change."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in place.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(place)).parent.mkdir(exist_ok=True)
            (folder / path.relative_to(place)).write_bytes(path.read_bytes())
    return folder, dataclasses.replace(run, model=str(folder))


def test_facts_changed_under_an_interrupted_run(monkeypatch, copied, tmp_path):
    folder, run = copied
    interrupted(monkeypatch, run, tmp_path / "out", 5)
    text = (folder / "facts.json").read_text()
    (folder / "facts.json").write_text(text.replace("Oslo", "Bern"))
    with pytest.raises(ValueError, match="facts has changed since the run began"):
        study.execute(run, tmp_path / "out")
    (folder / "facts.json").write_text(text)
    study.execute(run, tmp_path / "out")
    (folder / "facts.json").write_text(text.replace("Vienna", "Lima"))      # once it is finished: another run
    study.execute(run, tmp_path / "out")
    assert len(study.runs(tmp_path / "out")) == 2


def test_model_changed_under_an_interrupted_run(monkeypatch, copied, tmp_path):
    folder, run = copied
    interrupted(monkeypatch, run, tmp_path / "out", 5)
    model, _ = load(folder, "cpu", torch.float32)
    weight_of(model, "mlp_out", 0)[1].data[0, 0] += 1
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="the model's files has changed"):
        study.execute(run, tmp_path / "out")


def test_model_with_other_weights_behind_the_same_files(monkeypatch, run, tmp_path):
    """As with a remote name, whose files are not hashed before loading."""
    interrupted(monkeypatch, run, tmp_path, 5)
    monkeypatch.setattr(lab, "content_hash", lambda model: "another")
    with pytest.raises(ValueError, match="the model's weights has changed since the run began"):
        study.execute(run, tmp_path)


def test_damaged_checkpoint(monkeypatch, run, tmp_path):
    interrupted(monkeypatch, run, tmp_path, 5)
    (weights,) = tmp_path.glob("*/checkpoint/weights-*")
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(lab, "set_up", None)        # told before the model is loaded
    with pytest.raises(ValueError, match=f"damaged checkpoint: .*{weights.name}"):
        study.execute(run, tmp_path)


def test_an_edit_that_is_not_finite_stops_the_run(run, tmp_path):
    order = [one.case_id for one in inputs.schedule(run, inputs.files(run)["facts"])[0]]
    bad = dataclasses.replace(run, settings=(("fail_at", order[5]),))
    with pytest.raises(ValueError, match=rf"edit 6 \(record {order[5]}\): the update is not finite; the rows of the 5"):
        study.execute(bad, tmp_path)
    folder = study.execute(bad, tmp_path, keep_going=True)
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "stopped" and "edit 6" in record["stopped"] and record["edits"] == 5
    whole = rows_of(study.execute(run, tmp_path / "whole"))
    keep = ~whole["metric"].str.startswith("retest")
    expected = whole[(whole["step"] <= 5) & keep].drop(columns="run").reset_index(drop=True)
    found = rows_of(folder)
    found = found[~found["metric"].str.startswith("retest")].drop(columns="run").reset_index(drop=True)
    pd.testing.assert_frame_equal(found, expected, check_exact=True)
    assert list(study.runs(tmp_path)["status"]) == ["stopped"] and len(study.table(tmp_path))
    with pytest.raises(ValueError, match="edit 6"):     # it is tried again from its checkpoint, not from the start
        study.execute(bad, tmp_path)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("size", [1e6, 1e18, 3e37])
def test_a_run_goes_on_through_a_collapse(run, tmp_path, size):
    """The measurements of a model that answers nonsense, or nothing that is a number, are rows like others."""
    folder = study.execute(dataclasses.replace(run, settings=(("size", size),)), tmp_path, keep_going=True)
    df, record = rows_of(folder), json.loads((folder / "run.json").read_text())
    assert record["status"] == "finished" or "not finite" in record["stopped"]
    assert df.loc[(df["metric"] == "relative") & (df["step"] == 1), "value"].item() > 1e5
    assert set(df.loc[df["step"] == 8, "metric"]) >= {"ES", "retest_ES", "untouched_ES"} or record["edits"] < 8


@pytest.mark.parametrize("words, message", [
    ({"edits": 5}, "unknown parameter 'edits'; known are model, facts"),
    ({"n_edits": "5"}, "n_edits must be int, found '5'"),
    ({"n_edits": True}, "n_edits must be int"),
    ({"batch_size": 0}, "batch_size must be at least 1"),
    ({"retest_every": -1}, "retest_every must not be negative"),
    ({"dtype": "float8"}, "dtype 'float8': choose one of"),
    ({"settings": ["lr"]}, "settings must be")])
def test_unknown_and_mistyped_parameters(words, message):
    with pytest.raises(ValueError, match=message):
        study.make(**words)


@pytest.mark.parametrize("change, message", [
    ({"editor": "surgery"}, "unknown editor 'surgery'"),
    ({"settings": (("leyer", 1),)}, "no setting 'leyer'"),
    ({"n_edits": 13}, "n_edits is 13, but .*facts.json has 12 facts"),
    ({"leave_out": ("99",)}, "leave_out names '99'"),
    ({"measure": ("ES", "XS")}, "metric 'XS'"),
    ({"facts": "nowhere.json"}, "facts: nowhere.json: no such file"),
    ({"tasks": "nowhere"}, "tasks: nowhere: no such file"),
    ({"model": "nowhere/model", "facts": ""}, "facts: .*no such file")])
def test_bad_input_is_told_before_any_edit(monkeypatch, run, tmp_path, change, message):
    monkeypatch.setattr(lab, "update", None)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        study.execute(dataclasses.replace(run, **change), tmp_path)
    assert not list(tmp_path.glob("*/run.json"))


@pytest.mark.parametrize("change, message", [
    ({"prompt": "The capital is"}, "record 3: the prompt needs exactly one {}"),
    ({"subject": " "}, "record 3: the subject is empty"),
    ({"target_new": ""}, "record 3: target_new is empty"),
    ({"case_id": 5}, "record 5: case_id occurs twice"),
    ({"prompt": "The river of {} and the city " * 12 + "of {} is".replace("{}", "it")}, "record 3: "),
    ({"prompt": "the old river runs " * 30 + "{} is"}, "record 3: .* tokens, but the model takes at most")])
def test_malformed_facts(copied, tmp_path, change, message):
    folder, run = copied
    records = json.loads((folder / "facts.json").read_text())
    records[3] |= change
    (folder / "facts.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        study.execute(dataclasses.replace(run, n_edits=0), tmp_path / "out")


def test_left_out_facts_are_not_edited(run, place, tmp_path):
    first = inputs.schedule(run, place / "facts.json")[0]
    shorter = dataclasses.replace(run, leave_out=(str(first[1].case_id),))
    edited, rest = inputs.schedule(shorter, place / "facts.json")
    assert edited[:2] == [first[0], first[2]] and first[1] not in [*edited, *rest]
    assert not {one.case_id for one in edited} & {one.case_id for one in rest}
    assert inputs.schedule(dataclasses.replace(run, order=-1), place / "facts.json")[0] == \
        read_facts(place / "facts.json")[:8]


def test_table_chooses_runs(run, tmp_path):
    for seed in (0, 1):
        study.execute(dataclasses.replace(run, seed=seed, downstream_every=0, n_edits=2), tmp_path)
    study.execute(dataclasses.replace(run, order=1, downstream_every=0, n_edits=2, batch_size=2), tmp_path)
    assert study.table(tmp_path)["run"].nunique() == 3
    assert set(study.table(tmp_path, seed=1)["seed"]) == {1}
    assert study.table(tmp_path, order=[1], seed=0)["batch_size"].unique() == [2]
    assert list(study.runs(tmp_path, order=1)["batch_size"]) == [2]
    assert study.table(tmp_path, seed=9).empty and study.table(tmp_path / "none", seed=1).empty
    with pytest.raises(ValueError, match="no 'sede' to choose by"):
        study.table(tmp_path, sede=1)


def test_table_names_a_damaged_file(run, tmp_path):
    folder = study.execute(dataclasses.replace(run, n_edits=1, downstream_every=0), tmp_path)
    (folder / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=f"{folder.name}/rows.parquet: missing or damaged"):
        study.table(tmp_path)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json: not valid JSON"):
        study.table(tmp_path)


def test_several_runs_in_processes_of_their_own(place, tmp_path):
    """The same rows as one after the other in this process."""
    both = [study.make(model=str(place), editor="rome", settings={"layer": 1, "steps": 2}, n_edits=2, seed=seed,
                       downstream_every=0) for seed in (0, 1)]
    apart = study.execute_all(both, tmp_path / "apart", workers=2)
    here = study.execute_all(both, tmp_path / "here")
    for a, b in zip(apart, here, strict=True):
        assert a.name == b.name
        np.testing.assert_allclose(rows_of(a)["value"], rows_of(b)["value"], rtol=1e-4, atol=1e-5)
