"""Directions: cosines equal those of dense gradients; edits are what the editor does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from editcore.instructedit import directions, mend, trained_editors
from editcore.instructedit.instructions import add_instruction, draw
from editcore.instructedit.records import load_records, record_as_fact
from editcore.model import load


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """(model, tok, records, config, folder of networks)."""
    settings = {"layers": (1, 2), "rank": 4, "warmup": 4}
    config = trained_editors.make_config(model=tiny, examples=6, settings=settings)
    tasks = load_records(tiny)
    records = tasks["recent"][:3] + tasks["convsent"][:2]
    return *load(tiny, "cpu"), records, config, tmp_path_factory.mktemp("editors")


def dense(edits, name):
    """(n, d_in d_out) whole gradients."""
    return torch.stack([(u.double().T @ delta.double()).flatten() for u, delta in
                        (factors[name] for factors in edits.factors)])


def unit(vectors):
    return torch.nn.functional.normalize(vectors)


def test_cosines_equal_those_of_dense_gradients(world, monkeypatch):
    model, tok, records, config, folder = world
    edits = directions.gradients(model, tok, records, config, editor="a", folder=folder)
    edits += directions.gradients(model, tok, records[:2], config, editor="b", stage="raw")
    assert len(edits) == 7 and list(edits.editor) == ["a"] * 5 + ["b"] * 2
    assert list(edits.task[2:5]) == ["recent", "convsent", "convsent"]
    whole = {name: dense(edits, name) for name in edits.maps}
    for name, vectors in whole.items():
        monkeypatch.setattr(directions, "ROOM", 7 * vectors.shape[1] // 3)      # three slices
        torch.testing.assert_close(directions.gram(edits, name), vectors @ vectors.T)
        np.testing.assert_allclose(directions.cosines(edits, name), unit(vectors) @ unit(vectors).T,
                                   atol=1e-12)
        for part, side in (("u", 0), ("delta", 1)):
            means = torch.stack([factors[name][side].double().mean(0) for factors in edits.factors])
            np.testing.assert_allclose(directions.cosines(edits, name, part),
                                       unit(means) @ unit(means).T, atol=1e-12)
    together = unit(torch.cat(list(whole.values()), 1))
    np.testing.assert_allclose(directions.cosines(edits), together @ together.T, atol=1e-12)


def test_edits_are_what_the_trained_editor_adds_but_for_the_sign(world):
    model, tok, records, config, folder = world
    edits = directions.gradients(model, tok, records, config, folder=folder)
    settings, _ = trained_editors.configured(config)
    network = mend.prepare(model, tok, replace(settings,
                                               network=str(trained_editors.train(config, folder))))
    for record, factors in zip(records, edits.factors):
        number = draw(record, config.seed, config.n_descriptions)
        fact = record_as_fact(add_instruction(record, number), config.seed, config.opposite)
        delta = mend.edit(model, tok, [fact], settings, network)
        for name, (u, slope) in factors.items():
            torch.testing.assert_close(-delta.changes[name + ".weight"].dense(), u.T @ slope,
                                       rtol=1e-4, atol=1e-7)
    raw = directions.gradients(model, tok, records, config, stage="raw", folder=folder)
    untrained = directions.gradients(model, tok, records, config, stage="untrained", folder=folder)
    for (_, u), (name, own) in zip(raw.factors[0].items(), untrained.factors[0].items()):
        site = next(site for site in network.sites if site.name == name)
        wanted = network.norms[site.shape](torch.cat(u, 1)).split([site.inputs, site.outputs], 1)
        torch.testing.assert_close(own[1], wanted[1])
        torch.testing.assert_close(own[0], 1e-4 * wanted[0])
    other = directions.gradients(model, tok, records, config, stage="raw", style="swapped",
                                 folder=folder)
    assert directions.cosines(raw + other)[0, 5] < 0.999, "another instruction, another direction"


def test_compared_edits_have_the_sizes_and_cosine_of_dense_ones(world):
    model, tok, records, config, folder = world
    first = directions.gradients(model, tok, records, config, folder=folder)
    second = directions.gradients(model, tok, records, config, stage="untrained", style="none",
                                  folder=folder)
    table = directions.compare(first, second).set_index(["task", "case_id", "map"])
    assert len(table) == len(records) * (1 + len(first.maps))
    for name in ("", *first.maps):
        pair = [torch.cat([dense(edits, part) for part in ([name] if name else edits.maps)], 1)
                for edits in (first, second)]
        found = table.xs(name, level="map")
        norms = [whole.norm(dim=1).numpy() for whole in pair]
        np.testing.assert_allclose(found["norm"], norms[0])
        np.testing.assert_allclose(found["ratio"], norms[0] / norms[1])
        cosine = (unit(pair[0]) * unit(pair[1])).sum(1)
        np.testing.assert_allclose(found["cosine"], cosine, atol=1e-9)
    with pytest.raises(ValueError, match="different records"):
        directions.compare(first, directions.gradients(model, tok, records[1:], config,
                                                       stage="raw"))


def test_bad_edits_are_named(world):
    model, tok, records, config, _ = world
    with pytest.raises(ValueError, match="stage is 'cooked'"):
        directions.gradients(model, tok, records, config, stage="cooked")
    long = replace(records[1], prompt="a river " * 150)
    with pytest.raises(ValueError,
                       match="record recent 1: .* tokens, but the model takes at most 200"):
        directions.gradients(model, tok, [long], config, stage="raw")
    edits = directions.gradients(model, tok, records, config, stage="raw")
    name = edits.maps[0]
    edits.factors[2][name] = tuple(0 * part for part in edits.factors[2][name])
    with pytest.raises(ValueError, match="record recent 2: its gradient is zero"):
        directions.cosines(edits, name)
