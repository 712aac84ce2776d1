"""editcore.atlas: sources are edited by their own editors behind their own prefixes; what is kept is found again."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make

from editcore import atlas, parting
from editcore.atlas import RAW
from editcore.instructedit import directions, hypernet, mend
from editcore.instructedit import trained_editors as systems
from editcore.instructedit.directions import Asked
from editcore.instructedit.lineups import Named

SMALL = (("every", 2), ("layers", (-2, -1)), ("rank", 8), ("warmup", 2))


def row(task, number, place="Rome"):
    """A record as its file has it."""
    if task == "convsent":
        return {"ent": f"thing {number}", "pos": ["It is good.", "I know it."], "neg": ["It is old.", "Because."]}
    if task == "zsre":
        return {"subject": f"Orla {number}", "src": f"Where is Orla {number}? It is in", "pred": "Bern", "alt": place,
                "rephrase": f"Where does Orla {number} lie? In", "loc": "The capital of Farrow is", "loc_ans": "Lima"}
    return {"subject": f"Orla {number}", "prompt": f"The home of Orla {number} is", "target_new": place,
            "rephrase": [f"Orla {number} lies in"], "locality": {}, "portability": {}}


@pytest.fixture(scope="module")
def world(gpt2, tmp_path_factory):
    """(folder with a model that has room for instructions and with records, folder of editors)."""
    place = tmp_path_factory.mktemp("atlas")
    model, tok = make("gpt2", len(gpt2[1]), positions=160), gpt2[1]
    model.save_pretrained(place / "model")
    tok.save_pretrained(place / "model")
    (place / "model" / "editing").mkdir()
    for task in ("recent", "counterfact", "convsent", "zsre"):
        for split, count in (("train", 4), ("test", 7)):
            rows = [row(task, k, ("Rome", "Oslo", "New Delhi")[k % 3]) for k in range(count)]
            (place / "model" / "editing" / f"{task}_{split}.json").write_text(json.dumps(rows))
    return str(place / "model"), place / "editors"


def system(world, **words):
    return systems.make_config(model=world[0], examples=2, settings=SMALL, **words)


@pytest.fixture(scope="module")
def lab(world):
    return atlas.opened(world[0], records=6)


@pytest.fixture(scope="module")
def whose(world):
    cases = {"InstructEdit": {}, "MEND, multi-task": {"style": "none"},
             **{f"on {task}": {"style": "none", "tasks": [task]} for task in atlas.TASKS}}
    return atlas.sources([Named(name, system(world, **words)) for name, words in cases.items()])


def test_a_lab_has_equally_many_records_a_task(world, lab):
    assert lab.groups == ("recent",) * 6 + ("counterfact",) * 6 + ("zsre",) * 6
    assert atlas.opened(world[0], records=6).records == lab.records != atlas.opened(world[0], records=6, seed=1).records
    assert len(atlas.opened(world[0], records=99).records) == 21
    with pytest.raises(ValueError, match="3 records a task, but 5 are needed"):
        atlas.opened(world[0], records=3)
    with pytest.raises(FileNotFoundError, match="other_test.json"):
        atlas.opened(world[0], tasks=("recent", "other"))


def test_every_task_is_edited_by_its_own_editor(world, lab, whose):
    assert list(whose)[-1] == atlas.SINGLE and len(whose) == 6
    found, alone = atlas.edits(lab, whose[atlas.SINGLE], world[1]), {}
    raw = directions.gradients(lab.model, lab.tok, lab.records, mend.Mend(layers=(-2, -1)), Asked("none"))
    for task in atlas.TASKS:
        network = hypernet.load(systems.train(whose[f"on {task}"].systems[0][1], world[1]))
        alone[task] = directions.edits(network, raw)
    for i, task in enumerate(lab.groups):
        for name, (u, delta) in found[i].items():
            assert torch.equal(u, alone[task][i][name][0]) and torch.equal(delta, alone[task][i][name][1])


def test_raw_and_neutral_are_what_they_say(world, lab, whose):
    full = whose["InstructEdit"]
    found = directions.gradients(lab.model, lab.tok, lab.records, mend.Mend(layers=(-2, -1)), Asked("full"))
    raw = atlas.edits(lab, replace(full, made=RAW), world[1])
    neutral = atlas.edits(lab, replace(full, made=atlas.NEUTRAL), world[1], next(iter(atlas.maps(lab, full))))
    network = hypernet.load(systems.train(full.systems[0][1], world[1]))
    site, (u, delta) = network.sites[0], found[0][network.sites[0].name]
    assert torch.equal(raw[0][site.name][0], u) and list(neutral[0]) == [site.name]
    expected = hypernet.normalised(network.norm_of(site), torch.cat([u, delta], 1))
    expected = expected.split([site.inputs, site.outputs], 1)
    assert torch.allclose(neutral[0][site.name][0], network.settings["alpha"] * expected[0])
    assert torch.allclose(neutral[0][site.name][1], expected[1])


def test_tables_are_kept_by_what_they_depend_on(world, lab, whose, tmp_path, monkeypatch):
    some = {name: whose[name] for name in ("InstructEdit", "MEND, multi-task")}
    rows = atlas.table(lab, some, tmp_path, world[1])
    sites = atlas.maps(lab, some["InstructEdit"])
    assert list(sites.values()) == ["block 2, in", "block 2, out", "block 3, in", "block 3, out"]
    assert len(rows) == 2 * 18 * (3 * len(sites) + 1) and set(rows["reading"]) == {"u~", "delta~", "G~"}
    assert list(dict.fromkeys(rows["source"])) == list(some)
    monkeypatch.setattr(atlas, "edits", None)       # nothing is computed again
    again = atlas.table(lab, {"A": some["MEND, multi-task"]}, tmp_path, world[1])
    assert again.drop(columns="source").equals(rows[rows["source"] == "MEND, multi-task"].drop(columns="source")
                                               .reset_index(drop=True))
    ids = {atlas.identifier(lab, replace(whose["InstructEdit"], style=style, made=made))
           for style in ("full", "none") for made in (atlas.EDITOR, atlas.NEUTRAL, RAW)}
    assert len(ids) == 6
    other = replace(lab, records=lab.records[::-1])
    assert atlas.identifier(other, some["InstructEdit"]) != atlas.identifier(lab, some["InstructEdit"])


def test_panels_are_cosines_of_both_editors(world, lab, whose):
    first, second = whose["InstructEdit"], whose["MEND, multi-task"]
    site = list(atlas.maps(lab, first))[1]
    C = atlas.panel(lab, first, second, site, world[1])
    dense = torch.stack([(one[site][0].double().T @ one[site][1].double()).flatten() for source in (first, second)
                         for one in atlas.edits(lab, source, world[1])])
    unit = torch.nn.functional.normalize(dense)
    assert np.allclose(C, (unit @ unit.T).numpy(), atol=1e-10)
    mean = np.stack([one[site][0].double().mean(0) for source in (first, second)
                     for one in atlas.edits(lab, source, world[1])])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert np.allclose(atlas.panel(lab, first, second, site, world[1], "u"), mean @ mean.T, atol=1e-10)
    assert atlas.paired(np.kron([[1, 0.5], [0.5, 1]], np.eye(3))) == 1 and atlas.paired(np.kron(
        np.eye(2), [[1, 0.5], [0.5, 1]])) == 0
    assert np.allclose(atlas.cosines(lab, second, site, world[1]), C[18:, 18:], atol=1e-12)
    rows = atlas.swaps(lab, first, site, world[1])
    assert set(rows["group"]) == {"recent", "zsre"} and set(rows["said"]) == {"counterfact", "recent"}
    assert len(rows) == 12


def test_numbers_and_differences_of_a_table(world, lab, whose, tmp_path):
    some = {name: whose[name] for name in ("InstructEdit", "MEND, multi-task")}
    rows, site = atlas.table(lab, some, tmp_path, world[1]), directions.TOGETHER
    found = atlas.numbers(rows).set_index(["source", "reading", "map", "score"])["mean"]
    means = rows[(rows["map"] == site)].groupby("source")["silhouette"].mean()
    assert found["InstructEdit", "G~", site, "silhouette"] == pytest.approx(means["InstructEdit"])
    apart = parting.apart(rows, *some, "G", site)
    assert apart.loc["silhouette", "mean"] == pytest.approx(means["InstructEdit"] - means["MEND, multi-task"])


def test_controls_name_what_is_compared(whose):
    made = atlas.controls(whose["InstructEdit"], whose["MEND, multi-task"])
    assert len(made) == 2 * len(atlas.SAID) + 2 and made["gradient, random words"].made == RAW
    assert made["InstructEdit, instruction"] == whose["InstructEdit"]
    assert made["InstructEdit, another task's"].style == "swapped"
