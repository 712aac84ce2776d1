"""The editors against what public ROME, MEMIT and FT-L code computes (see golden/README.md)."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from oracle import apart
from safetensors.torch import load_file

from editcore import model as models
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.target_value import EditSite, encode_fact, encode_facts, optimise
from editcore.facts import read_facts
from editcore.moments import CountSettings, second_moments
from editcore.tokens import pad

GOLDEN = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"
WEIGHT = "transformer.h.{}.mlp.c_proj.weight"


@pytest.fixture(scope="module")
def model():
    return models.load(GOLDEN / "model", device="cpu")


@pytest.fixture(scope="module")
def requests():
    return read_facts(GOLDEN / "requests.json")


@pytest.fixture(scope="module")
def results():
    return load_file(GOLDEN / "results.safetensors")


@pytest.fixture(scope="module")
def contexts():
    lists = json.loads((GOLDEN / "contexts.json").read_text())
    return {"rome": tuple(lists["rome"]), "memit": tuple(itertools.chain(*lists["memit"]))}


@pytest.fixture(scope="module")
def moments(model):
    texts = (GOLDEN / "texts.txt").read_text().splitlines()
    settings = CountSettings(length=128, pack=False)
    return second_moments(*model, texts, [0, 1, 2], settings)


@pytest.fixture(scope="module")
def settings():
    return {"rome": configure("rome", {"layer": 1}),
            "memit": configure("memit", {"layers": [0, 1, 2], "lambda": 200, "clamp": 2}),
            "ft": configure("ft", {"epsilon": 5e-3, "lr": 1e-3, "last_position": True})}


@pytest.fixture(scope="module")
def values(model, requests, contexts, settings):
    """δ of the five ROME requests and the sixteen MEMIT ones."""
    def solved(name, count, site):
        made = encode_facts(*model, [requests[:count]], [contexts[name]], settings[name])
        return optimise(model[0], made, site, settings[name])

    return {"rome": solved("rome", 5, EditSite(1, "mlp_out", 1)),
            "memit": solved("memit", 16, EditSite(2, "block", 0))}


def test_second_moment(moments, results):
    upper = results["C_upper/transformer.h.1.mlp.c_proj"]
    moment = moments.moments["transformer.h.1.mlp.c_proj"]
    rows, columns = torch.triu_indices(512, 512)
    assert apart(moment[rows, columns], upper) < 1e-6 and torch.equal(moment, moment.T)


@pytest.mark.parametrize("number", range(5))
def test_rome_rows(model, requests, contexts, settings, results, number):
    encoded = encode_fact(model[1], requests[number], contexts["rome"], settings["rome"])
    ids, mask = pad(encoded.rows)
    expected = {name: results[f"rome/edit{number}/{name}"] for name in
                ("input_ids", "attention_mask", "lookup_idxs", "target_ids")}
    assert torch.equal(ids, expected["input_ids"]) and torch.equal(mask, expected["attention_mask"])
    assert list(encoded.lookups) == expected["lookup_idxs"].tolist()
    assert list(encoded.target) == expected["target_ids"].tolist()


@pytest.mark.parametrize("number", range(5))
def test_rome_values(values, results, number):
    expected = {name: results[f"rome/edit{number}/{name}"] for name in
                ("traj_loss", "v_delta", "v_star", "target_init", "k_star", "cur_input")}
    found = values["rome"]
    assert len(found.losses[number]) == len(expected["traj_loss"])
    losses = torch.tensor(found.losses[number], dtype=torch.float64)
    torch.testing.assert_close(losses, expected["traj_loss"], rtol=5e-6, atol=5e-6)
    assert apart(found.delta[number], expected["v_delta"]) < 5e-6
    assert apart(found.delta[number] + found.h0[number], expected["v_star"]) < 5e-6
    assert apart(found.h0[number], expected["target_init"]) < 1e-6
    assert apart(found.keys[number].mean(0), expected["k_star"]) < 1e-6
    assert apart(found.keys[number, 0], expected["cur_input"]) < 1e-6


def test_rome_updates(model, requests, contexts, moments, settings, results):
    inputs = EditorInputs(moments=moments, contexts=contexts["rome"])
    prepared = EDITORS["rome"].prepare(*model, settings["rome"], inputs)
    deltas = EDITORS["rome"].edit_each(*model, requests[:5], settings["rome"], prepared)
    for number, delta in enumerate(deltas):
        u, v = results[f"rome/edit{number}/u"], results[f"rome/edit{number}/v"]
        assert apart(dense(delta.changes[WEIGHT.format(1)]), torch.outer(u, v)) < 1e-5


@pytest.mark.parametrize("number", range(16))
def test_memit_values(values, results, model, requests, contexts, settings, number):
    names = ("traj_loss", "z", "lookup_idxs", "target_ids")
    expected = {name: results[f"memit/req{number}/{name}"] for name in names}
    found = values["memit"]
    assert len(found.losses[number]) == len(expected["traj_loss"])
    losses = torch.tensor(found.losses[number], dtype=torch.float64)
    torch.testing.assert_close(losses, expected["traj_loss"], rtol=5e-6, atol=5e-6)
    assert apart(found.h0[number] + found.delta[number], expected["z"]) < 5e-6
    encoded = encode_fact(model[1], requests[number], contexts["memit"], settings["memit"])
    assert list(encoded.lookups) == expected["lookup_idxs"].tolist()
    assert list(encoded.target) == expected["target_ids"].tolist()


def test_memit_updates(model, requests, contexts, moments, settings, results):
    inputs = EditorInputs(moments=moments, contexts=contexts["memit"])
    prepared = EDITORS["memit"].prepare(*model, settings["memit"], inputs)
    delta = EDITORS["memit"].edit(*model, requests[:16], settings["memit"], prepared)
    assert set(delta.changes) == {WEIGHT.format(layer) for layer in (0, 1, 2)}
    for name, change in delta.changes.items():
        expected = results[f"memit/left/{name}"] @ results[f"memit/right/{name}"]
        assert apart(dense(change), expected) < 2e-5


def test_ft_updates(model, requests, settings, results):
    deltas = EDITORS["ft"].edit_each(*model, requests[:3], settings["ft"], None)
    for number, delta in enumerate(deltas):
        for name, change in delta.changes.items():
            if f"ft/edit{number}/delta/{name}" in results:
                assert apart(change, results[f"ft/edit{number}/delta/{name}"]) < 1e-5
            else:
                assert number > 0 and name == WEIGHT.format(0)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no golden results beside the checkout")
def test_what_the_copies_leave_out(model, requests, moments, settings, values):
    whole = load_file(SHARED / "memit_batch16.safetensors")
    for name, moment in moments.moments.items():
        assert apart(moment, whole[f"C/{name}"]) < 1e-6
    whole = load_file(SHARED / "ft_single3.safetensors")
    deltas = EDITORS["ft"].edit_each(*model, requests[:3], settings["ft"])
    for number, delta in enumerate(deltas):
        for name, change in delta.changes.items():
            assert apart(change, whole[f"edit{number}/delta/{name}"]) < 1e-5
