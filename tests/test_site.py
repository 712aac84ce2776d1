"""editcore.site: facts that are chosen, layers that are tried, points that are kept and picked."""

import json

import pandas as pd
import pytest

from editcore import cli, commands, knowledge, site
from editcore.editors import EDITORS, configure
from editcore.study.plans import METHODS


def table(rows):
    """A sweep's table of (editor, settings, S, relative)."""
    return pd.DataFrame(rows, columns=["editor", "settings", "S", "relative"])


@pytest.mark.parametrize("margins, layers", [
    ([0.3, 0.2, 0.1, 0.01], [0, 1, 2]),
    ([0.0, 0.0, 0.0, 0.0], [0]),
    ([0.1] * 30, [0, 6, 12, 17, 23, 29]),
    ([0.3, 0.1, 0.06, 0.4], [0, 1]),
])
def test_layers_up_to_the_last_whose_mlps_carry_the_answer(margins, layers):
    mlp = pd.DataFrame({"position": "mlp", "layer": range(len(margins)), "margin": margins})
    other = mlp.assign(position="subject", margin=1.0)
    assert site.candidates(pd.concat([mlp, other])) == layers


def test_the_best_score_or_the_smaller_update_is_chosen():
    points = table([("rome", {"layer": 1}, 0.90, 0.1), ("rome", {"layer": 2}, 0.905, 0.2),
                    ("rome", {"layer": 3}, 0.85, 0.01), ("ft", {"epsilon": 1.0}, 0.2, 1.0)])
    chosen = site.choose(points)
    assert chosen == {"rome": {"layer": 1}, "ft": {"epsilon": 1.0}}
    assert set(site.everywhere(chosen)) == {"rome", "r-rome", "p-rome", "nas", "ft"}
    memit = site.everywhere({"memit": {"layers": (0, 1), "lambda_": 3.0}})
    assert {"memit", "rect", "prune"} <= set(memit) and "alphaedit" not in memit
    for name, settings in memit.items():
        assert configure(name, settings).lambda_ == 3.0


@pytest.fixture
def inputs(gpt2, facts, texts, tmp_path, monkeypatch):
    """Of a tiny model of which it is said that it knows all facts."""
    monkeypatch.setattr(knowledge, "known", lambda model, tok, facts, cache: [True] * len(facts))
    return site.inputs(*gpt2, facts, held_out=texts[:9], texts=texts, number=3,
                       cache=tmp_path / "cache")


def test_facts_of_many_relations_that_do_not_open_their_prompts(inputs, gpt2, facts, monkeypatch):
    assert len({fact.relation for fact in inputs.facts}) == 3
    assert not any(fact.prompt.startswith("{}") for fact in inputs.facts)
    with pytest.raises(ValueError, match="site: 12 facts wanted .* of 12 there are 9"):
        site.inputs(*gpt2, facts, texts=["a"], number=12)
    chosen = site.inputs(*gpt2, facts, texts=["a"], number=11, leave_out=["3"],
                         cache=inputs.cache).facts
    assert "3" not in [str(fact.case_id) for fact in chosen]
    assert any(fact.prompt.startswith("{}") for fact in chosen)


def test_a_search_goes_on_where_it_was_stopped(inputs, tmp_path, monkeypatch):
    points = []
    stop = 5

    def point(inputs, editor, settings, *, counted, unedited):
        if len(points) == stop:
            raise OSError("stopped")
        points.append((editor, settings))
        score = 0.5 + 0.01 * len(points)
        return {"editor": editor, "settings": settings, "S": score, "ES": 1.0, "PS": score,
                "NS": score, "relative": 0.1, "perplexity": 1.0, "seconds": 0.0}

    with monkeypatch.context() as patch:
        patch.setattr(site, "point", point)
        with pytest.raises(OSError, match="stopped"):
            site.search(inputs, tmp_path / "out", [0, 1])
        assert len(site.read(tmp_path / "out/sweep.csv")) == 5
        points[:] = [None]
        stop = 99
        site.search(inputs, tmp_path / "out", [0, 1])
        swept = site.read(tmp_path / "out/sweep.csv", inputs.key)
        assert len(swept) == 5 + len(points) - 1 == swept["settings"].map(json.dumps).nunique()
        assert swept.groupby("editor").size().to_dict() == {"rome": 8, "memit": 6, "ft": 4}
        stop = len(points)      # nothing is left to do
        site.search(inputs, tmp_path / "out", [0, 1])
    chosen = json.loads((tmp_path / "out/settings.json").read_text())
    assert configure("rome", chosen["rome"], "x").layer in (0, 1)
    assert (tmp_path / "out/site.png").stat().st_size > 10_000


def test_every_editor_edits_as_published_for_the_pocket_model(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.model.config, "name_or_path", "pocket")
    monkeypatch.setattr(site, "point", lambda inputs, editor, settings, **_: {
        "editor": editor, "settings": settings, "S": 0.375})
    assert commands.compared(inputs, tmp_path, ["all"]).count("0.375") == len(METHODS)
    monkeypatch.setattr(site, "point", None)    # nothing is left to do
    rows = site.compare(inputs, tmp_path, METHODS)
    assert list(rows["editor"]) == list(METHODS)
    for table in (rows, site.read(tmp_path / "single.csv", inputs.key)):
        for editor, settings in zip(table["editor"], table["settings"]):
            assert configure(editor, settings, "x") == configure(editor, {}, "pocket")


@pytest.mark.parametrize("editor", ["nas", "prune"])
def test_a_point_of_an_editor_that_needs_other_facts_or_a_last_step(inputs, editor, monkeypatch):
    monkeypatch.setattr(inputs.model.config, "name_or_path", "pocket")
    monkeypatch.setattr(site, "PORTION", 2)
    row = site.point(inputs, editor, {"steps": 2}, counted=site.count(inputs, [1]), unedited=1.0)
    assert row["relative"] > 0 and row["facts"] == 3 and 0 <= row["PS_exact"] <= 1


def test_a_point_is_the_mean_of_single_edits(inputs):
    counted = site.count(inputs, [1])
    row = site.point(inputs, "rome", {"layer": 1, "lr": 0.5, "clamp": 4.0}, counted=counted,
                     unedited=1.0)
    assert {0 <= row[name] <= 1 for name in ("S", "ES", "PS", "NS")} == {True}
    assert row["relative"] > 0 and row["perplexity"] > 1 and row["seconds"] > 0
    assert row["editor"] in EDITORS


def test_the_command(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("EDITCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(site, "search", lambda inputs, folder, layers: f"{folder} {layers} "
                        f"{len(inputs.facts)}")
    monkeypatch.setattr(knowledge, "known", lambda model, tok, facts, cache: [True] * len(facts))
    words = ["site", str(place), "-o", str(tmp_path / "out"), "--layers", "0,1", "--facts", "4"]
    assert cli.main(words) == 0
    assert capsys.readouterr().out.strip().endswith("out [0, 1] 4")
    assert cli.main([*words[:-3], "one"]) == 2
    assert "--layers is 'one'" in capsys.readouterr().err
    assert cli.main([*words, "--editors", "ft"]) == 2
    assert "rome: nothing is published" in capsys.readouterr().err
