"""Training a pocket model: a resumed run ends alike, and what build leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcore import pocket, pocket_report, world
from editcore.packing import DOCUMENT, ID, LAST, LOSS, POSITION
from editcore.world import Probe

TINY = pocket.PocketConfig(layers=3, width=32, inner=48, heads=2, early=1, steps=12, batch=4, warmup=3, save_every=4,
                           scale=0.002)


def test_step_size_warms_up_stays_and_cools_down():
    sizes = [pocket.step_size(step, TINY) for step in range(TINY.steps)]
    assert sizes[:3] == pytest.approx([1 / 3, 2 / 3, 1]) and sizes[5] == 1 and sizes[-1] == pytest.approx(0.25)


@pytest.fixture(scope="module")
def rows():
    made = np.zeros((20, 6, 40), dtype=np.uint16)
    made[:, ID] = np.random.default_rng(0).integers(0, 50, (20, 40))
    made[:, POSITION] = made[:, LAST] = np.arange(40)
    made[:, LOSS], made[:, DOCUMENT] = 30, 1
    return made


def test_a_run_that_was_cut_off_ends_with_the_same_weights(rows, tmp_path):
    def run(state, stop):
        model = pocket.new_model(TINY, 50, 49)

        def watch(step):
            if step == stop:
                raise KeyboardInterrupt
            return {}
        try:
            pocket.train(model, rows, TINY, state, watch)
        except KeyboardInterrupt:
            return None
        return model.state_dict()

    whole = run(tmp_path / "a.pt", None)
    assert run(tmp_path / "b.pt", 8) is None and (tmp_path / "b.pt").exists()
    again = run(tmp_path / "b.pt", None)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.dumps(torch.load(tmp_path / "a.pt", weights_only=True)["log"][0]["loss"])


def test_later_turns_through_the_stream_are_shuffled(rows):
    turns = [torch.cat([pocket.batch_at(rows, step, TINY)[:, ID, 0] for step in range(at, at + 5)]) for at in (0, 5)]
    assert turns[0].tolist() != turns[1].tolist() and sorted(turns[0].tolist()) == sorted(turns[1].tolist())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pocket")
    facts = folder / "facts.json"
    names = ("Ann Lee", "Bo Ek", "Cy Orr", "Di Fox")
    facts.write_text(json.dumps([
        {"case_id": i, "requested_rewrite": {"prompt": "{} works in", "relation_id": "P937", "subject": name,
                                             "target_true": {"str": city}, "target_new": {"str": "Oslo"}},
         "paraphrase_prompts": [f"The office of {name} is in"], "neighborhood_prompts": [], "attribute_prompts": []}
        for i, (name, city) in enumerate(zip(names, ("Paris", "Rome", "Paris", "Lima"), strict=True))]))
    card = pocket.build(facts, folder / "model", replace(TINY, steps=8))
    return folder / "model", card


def loaded(folder):
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_build_writes_a_folder_that_loads_like_any_model(built):
    folder, card = built
    tokenizer, model = loaded(folder)
    batch = tokenizer(["Ann Lee works in", "Bo Ek"], padding=True, return_tensors="pt")
    assert model(**batch).logits.shape[-1] == len(tokenizer) == card["vocabulary"]
    assert model.lm_head.weight is model.transformer.wte.weight and model.config.n_positions == 128
    assert {p.name for p in folder.iterdir()} >= {"facts.json", "topics.json", "texts.txt", "tasks", "card.json"}
    assert not (folder / pocket.STATE).exists() and not (folder / pocket.STREAM).exists()
    assert card["log"][-1]["step"] == 8 and {row["task"] for row in card["few_shot"]} == {"sst2", "mrpc", "cola", "rte"}


def test_recall_and_patching_count_what_they_say(built):
    folder, _ = built
    tokenizer, model = loaded(folder)
    probes = [Probe("{} works in", "Ann Lee", "Paris"), Probe("{} works in", "Bo Ek", "Rome")]
    ids = tokenizer("Ann Lee works in", return_tensors="pt").input_ids
    best = tokenizer.decode(model(ids).logits[0, -1].argmax()).strip()
    right = pocket_report.answers_right(model, tokenizer, ["Ann Lee works in"], [best])
    assert right == [tokenizer(f" {best}").input_ids == [int(model(ids).logits[0, -1].argmax())]]
    rows = pocket_report.patching(model, tokenizer, probes, 4)
    assert {(r["where"], r["layer"]) for r in rows} == {(w, layer) for w in ("subject", "last") for layer in range(3)}
    other = tokenizer("Bo Ek works in", return_tensors="pt").input_ids
    state = pocket_report.states(model, other)[2][0, -1]
    assert torch.allclose(pocket_report.patched(model, ids, 2, -1, state), model(other).logits[0, -1], atol=1e-5)


def test_a_malformed_file_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        pocket.build(tmp_path / "nowhere.json", tmp_path / "out")
    path = tmp_path / "facts.json"
    for text, message in (("[]", "non-empty list"), ("[{\"a\": 1}]", "record 0"), ("{", "facts.json")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            pocket.build(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


DATA = Path(__file__).parents[1] / "data" / "pocket"


@pytest.fixture(scope="module")
def kept():
    return loaded(DATA)


def test_the_kept_model_is_small_and_answers_as_its_card_says(kept):
    tokenizer, model = kept
    card = json.loads((DATA / "card.json").read_text())
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 20e6
    assert card["vocabulary"] == len(tokenizer) and card["parameters"] == model.num_parameters()
    assert (DATA / "README.md").read_text() == pocket_report.readme(card)
    assert card["recall"]["seen"] >= 0.98 and card["recall"]["held-out wording"] >= 0.9
    probes = world.build_world().probes("held-out combination")
    assert pocket_report.recall(model, tokenizer, probes, 200) >= 0.95
    items = json.loads((DATA / "tasks" / "rte.json").read_text())[:40]
    assert pocket_report.few_shot(model, tokenizer, "rte", items, 2) >= 0.9


def test_the_kept_model_keeps_facts_at_the_last_subject_token(kept):
    tokenizer, model = kept
    rows = pocket_report.patching(model, tokenizer, world.build_world().probes("seen"), 20)
    shares = {(row["where"], row["layer"]): row["share"] for row in rows}
    assert shares["subject", 1] >= 0.85 and shares["last", 1] <= 0.1
    assert shares["subject", 3] <= 0.1 and shares["last", 4] >= 0.85


def test_the_kept_records_are_the_worlds_and_enough_open_with_one_token(kept):
    tokenizer, _ = kept
    records = json.loads((DATA / "facts.json").read_text(encoding="utf-8"))
    assert records == world.records(world.build_world())
    first = {}
    for record in records:
        first.setdefault(record["requested_rewrite"]["subject"].lower(), record["requested_rewrite"])
    openers = [wish for wish in first.values() if wish["prompt"].startswith("{}")]
    assert sum(len(tokenizer(wish["subject"]).input_ids) == 1 for wish in openers) >= 40 and len(first) >= 2500
