"""Training a pocket model: resuming, what is left behind, and the model that is kept."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import train
import world
from editcore import causal, fewshot
from editcore.facts import read_facts
from editcore.model import load
from packing import DOCUMENT, ID, LAST, LOSS, POSITION

DATA = Path(__file__).parents[2] / "data" / "pocket"
TINY = train.PocketConfig(layers=3, width=32, inner=48, heads=2, early=1, steps=12, batch=4,
                          warmup=3, save_every=4, scale=0.002)


def test_step_size_warms_up_stays_and_cools_down():
    sizes = [train.step_size(step, TINY) for step in range(TINY.steps)]
    assert sizes[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert sizes[5] == 1 and sizes[-1] == pytest.approx(0.25)


def test_settings_are_typed():
    config = train.with_settings(TINY, ["steps=7", "muon=0.5"])
    assert (config.steps, config.muon, config.layers) == (7, 0.5, TINY.layers)
    for word, message in (("size=7", "give NAME=VALUE"), ("steps", "give NAME=VALUE"),
                          ("mix=1", "give NAME=VALUE"), ("steps=long", "'long' is not of type")):
        with pytest.raises(ValueError, match=message):
            train.with_settings(TINY, [word])


@pytest.mark.parametrize("word", [
    "heads=0", "heads=-1", "heads=5", "batch=0", "save_every=0", "steps=0", "steps=-3", "layers=0",
    "layers=1000000", "width=0", "inner=-1", "muon=nan", "muon=0", "adam=inf", "adam=-1", "decay=2",
    "warmup=-1", "cooldown=1.5", "scale=0", "scale=1e9", "seed=-1", "turn=nan", "early=99",
    "width=1000000", "batch=10000000"])
def test_values_that_make_no_sense_are_refused(word):
    with pytest.raises(ValueError, match=word.partition("=")[0]):
        train.with_settings(TINY, [word])


@pytest.fixture(scope="module")
def rows():
    stream = np.zeros((20, 6, 40), dtype=np.uint16)
    stream[:, ID] = np.random.default_rng(0).integers(0, 50, (20, 40))
    stream[:, POSITION] = stream[:, LAST] = np.arange(40)
    stream[:, LOSS] = 30
    stream[:, DOCUMENT] = 1
    return stream


def test_a_run_that_was_cut_off_ends_with_the_same_weights(rows, tmp_path):
    def run(state, stop):
        model = train.new_model(TINY, vocabulary=50, end=49)

        def watch(step):
            if step == stop:
                raise KeyboardInterrupt
            return {}
        train.train(model, rows, TINY, state=state, watch=watch)
        return model.state_dict()

    whole = run(tmp_path / "a.pt", None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b.pt", 8)
    again = run(tmp_path / "b.pt", None)
    assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


def test_blocks_move_by_the_step_that_is_asked_for(rows):
    """An entry of a block's matrix moves by about `muon`: torch's Muon scaled as it should be."""
    model = train.new_model(TINY, vocabulary=50, end=49)
    weight = model.transformer.h[0].mlp.c_fc.weight
    before = weight.detach().clone()
    train.loss_of(model, train.batch_at(rows, 0, TINY), torch.float32, early=1).backward()
    train.optimisers(model, TINY)[0].step()
    moved = (weight - before).square().mean().sqrt().item()
    assert 0.5 * TINY.muon < moved < 1.5 * TINY.muon


def test_later_turns_through_the_stream_are_shuffled(rows):
    drawn = [train.batch_at(rows, step, TINY)[:, ID, 0].tolist() for step in range(10)]
    first = sum(drawn[:5], [])
    second = sum(drawn[5:], [])
    assert first != second and sorted(first) == sorted(second)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(folder, card) of a tiny model trained for a few steps on four facts."""
    folder = tmp_path_factory.mktemp("pocket")
    people = {"Ann Lee": "Paris", "Bo Ek": "Rome", "Cy Orr": "Paris", "Di Fox": "Lima"}
    records = []
    for number, (name, city) in enumerate(people.items()):
        rewrite = {"prompt": "{} works in", "relation_id": "P937", "subject": name,
                   "target_true": {"str": city}, "target_new": {"str": "Oslo"}}
        records.append({"case_id": number, "requested_rewrite": rewrite,
                        "paraphrase_prompts": [f"The office of {name} is in"],
                        "neighborhood_prompts": [], "attribute_prompts": []})
    (folder / "facts.json").write_text(json.dumps(records))
    card = train.build(folder / "facts.json", folder / "model", replace(TINY, steps=8))
    return folder / "model", card


def test_build_writes_a_folder_that_loads_like_any_model(built):
    folder, card = built
    model, tok = load(folder)
    batch = tok(["Ann Lee works in", "Bo Ek"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape[-1] == len(tok) == card["vocabulary"]
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.n_positions == 128
    names = {path.name for path in folder.iterdir()}
    assert names >= {"facts.json", "topics.json", "texts.txt", "tasks", "card.json", "README.md"}
    assert not names & {train.STATE, train.STREAM}
    assert card["log"][-1]["step"] == 8 and set(card["recall"]) == {"seen"}
    assert {"sst2_f1", "mrpc_f1", "cola_f1", "rte_f1"} <= set(card["few_shot"])
    assert "5 blocks" not in (folder / "README.md").read_text()


def test_recall_counts_exact_answers(built):
    model, tok = load(built[0])
    ids = tok("Ann Lee works in", return_tensors="pt").input_ids
    best = tok.decode(model(ids).logits[0, -1].argmax()).strip()
    probes = [world.Probe("{} works in", "Ann Lee", answer) for answer in (best, "q")]
    assert train.recall(model, tok, probes[:1]) == 1.0 and train.recall(model, tok, probes) == 0.5


@pytest.mark.parametrize("text, message", [
    ("[]", "non-empty list"), ('[{"a": 1}]', "record 0"), ("{", "facts.json"),
    ('[{"prompt": "{} is", "subject": "A", "target_new": "b"}]', "record 0")])
def test_a_malformed_file_is_one_clear_error(tmp_path, text, message):
    path = tmp_path / "facts.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        train.build(path, tmp_path / "out", TINY)
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        train.build(tmp_path / "nowhere.json", tmp_path / "out", TINY)
    assert not (tmp_path / "out").exists()


def test_a_training_goes_on_as_itself_only(built, tmp_path, monkeypatch):
    facts = json.loads((built[0].parent / "facts.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps(facts))
    (tmp_path / "b.json").write_text(json.dumps(facts[:3]))
    folder = tmp_path / "model"
    config = replace(TINY, steps=8)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        train.build(tmp_path / "a.json", folder, config)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for words, message in ((("b.json", config), "the facts changed"),
                           (("a.json", replace(config, steps=9)), "the settings changed")):
        with pytest.raises(ValueError, match=message):
            train.build(tmp_path / words[0], folder, words[1])
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    train.build(tmp_path / "a.json", folder, replace(config, save_every=5))
    assert not (folder / train.BEGUN).exists()
    for place in (folder, tmp_path, tmp_path / "a.json"):
        with pytest.raises(ValueError, match="holds other files, or a model that is done"):
            train.build(tmp_path / "a.json", place, config)


def test_a_damaged_state_is_one_line_that_names_it(tmp_path):
    for content in (b"", b"half", b"PK" + b"0" * 99):
        (tmp_path / train.STATE).write_bytes(content)
        model = train.new_model(TINY, vocabulary=50, end=49)
        with pytest.raises(ValueError, match="training.pt: damaged") as error:
            train.resume(model, train.optimisers(model, TINY), tmp_path / train.STATE)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pocket():
    return load("pocket")


def test_the_kept_model_is_small_and_answers_as_its_card_says(pocket):
    model, tok = pocket
    card = json.loads((DATA / "card.json").read_text())
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 20e6
    assert card["vocabulary"] == len(tok) and card["parameters"] == model.num_parameters()
    assert card["recall"]["seen"] >= 0.98 and card["recall"]["held-out wording"] >= 0.9
    probes = world.build_world().probes("held-out combination")
    assert train.recall(model, tok, probes, 200) >= 0.95
    items = json.loads((DATA / "tasks" / "rte.json").read_text())[:40]
    scores = fewshot.few_shot(model, tok, {"rte": items}, shots=2)
    assert next(row["value"] for row in scores if row["metric"] == "rte_f1") >= 0.9


def test_the_kept_model_keeps_facts_at_the_last_subject_token(pocket):
    model, tok = pocket
    facts = read_facts(DATA / "facts.json")[:200]
    moved = causal.patching(model, tok, facts, count=20).set_index(["position", "layer"])["value"]
    assert moved["subject", 1] >= 0.85 and moved["last", 1] <= 0.1
    assert moved["subject", 3] <= 0.1 and moved["last", 4] >= 0.85


def test_enough_kept_records_open_with_one_token(pocket):
    _, tok = pocket
    first = {}
    for fact in read_facts(DATA / "facts.json"):
        first.setdefault(fact.subject.lower(), fact)
    openers = [fact for fact in first.values()
               if fact.prompt.startswith("{}") and len(tok(fact.subject).input_ids) == 1]
    assert len(openers) >= 40
