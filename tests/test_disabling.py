"""Predicted disabling edits: openers against the tokenizer's own words, denominators against plain passes and edits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import corpus, make

from editcore import disabling
from editcore.cli import main
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.facts import Fact, one_per_subject, order, read_facts
from editcore.hooks import capture, run
from editcore.model import module_of, name_of
from editcore.moments import CountSettings, second_moments
from editcore.study import run as inputs
from editcore.study.grid import Planned
from editcore.tokens import with_subject

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
FULL = Path(os.environ.get("EDITCORE_COUNTERFACT", ROOT / "results" / "data" / "counterfact.json"))
CONTEXTS = ("{}", "The first. {}", "Because I know you, we read. {}", "The first. {}")
SETTINGS = {"layer": 1, "steps": 6, "lr": 0.3, "clamp": 2}


def prepared(model, tok, config):
    moments = second_moments(model, tok, corpus() * 4, [config.layer], CountSettings(length=32))
    ridge = {name: moment + 0.01 * torch.eye(len(moment)) for name, moment in moments.moments.items()}
    return EDITORS["rome"].prepare(model, tok, config, EditorInputs(moments=replace(moments, moments=ridge),
                                                               contexts=CONTEXTS))


@pytest.fixture
def more(facts):
    """The shared facts, and a word that the tokenizers know as one token, opening its prompt and inside one."""
    return [*facts, Fact(case_id="word", subject="The", prompt="{} lies in",
                         target_new="Rome"), Fact(case_id="inside", subject=" river",
                         prompt="Here the{} runs to", target_new="Rome")]


def test_openers_are_the_facts_whose_first_token_is_their_subject(gpt2, more):
    tok = gpt2[1]
    found = disabling.openers(tok, more)
    assert [one.case_id for one in found] == [one.case_id for one in more if one.prompt.startswith("{}")
                                              and tok.decode(tok(one.text)["input_ids"][0]) == one.subject]
    assert "word" in [one.case_id for one in found] and disabling.opening(tok) == 0


def test_after_a_bos_the_first_token_of_the_text_opens_it(llama, more):
    tok = llama[1]
    assert disabling.opening(tok) == 1 and disabling.openers(tok, more, first=0) == []
    for one in disabling.openers(tok, more):
        ids, last = with_subject(tok, one.prompt, one.subject)
        assert last == 1 and ids[0] == tok.bos_token_id
    assert {one.case_id for one in disabling.openers(tok, more)} >= {"word"}


@pytest.mark.skipif(not DATA.is_dir(), reason="no samples of the real data sets here")
def test_openers_of_a_sample_of_counterfact():
    facts, tok = read_facts(DATA / "counterfact_sample.json"), disabling.tokenizer(DATA / "gpt2_tokenizer")
    found = {one.case_id for one in disabling.openers(tok, facts)}
    words = {one.case_id for one in facts if tok.convert_ids_to_tokens(tok(one.text)["input_ids"])[0] == one.subject}
    assert len(facts) == 299 and found == words
    assert len(found) <= 5      # 80 of 21,919 are 1.1 of 299
    single = {one.case_id for one in facts if len(tok(" " + one.subject)["input_ids"]) == 1}
    assert found != single      # one token alone is not enough: it must open the prompt


@pytest.mark.skipif(not (FULL.is_file() and DATA.is_dir()), reason="no CounterFact file (EDITCORE_COUNTERFACT) here")
def test_eighty_of_counterfact_and_where_the_published_order_puts_them():
    bad = []
    facts, tok = read_facts(FULL, bad), disabling.tokenizer(DATA / "gpt2_tokenizer")
    found = {one.case_id for one in disabling.openers(tok, facts)}
    assert len(facts) + len(bad) == 21919 and len(found) == 80 and len(one_per_subject(facts)) == 20391
    places = [n for n, one in enumerate(order(facts, 3), 1) if one.case_id in found]
    assert places[:3] == [552, 899, 1134]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_denominators_are_those_of_plain_passes(family, request, more, monkeypatch):
    tok, config = request.getfixturevalue(family)[1], configure("rome", SETTINGS)
    model = make(family, len(tok), dtype=torch.float64)
    given, name = prepared(model, tok, config), name_of(model, "mlp_out", config.layer)
    monkeypatch.setattr(disabling, "PORTION", 5)
    table = disabling.denominators(model, tok, more, config, given)
    for row, one in zip(table.to_dict("records"), more, strict=True):
        seen = []
        for context in CONTEXTS:
            ids, lookup = with_subject(tok, context.replace("{}", one.prompt), one.subject)
            with capture(model, [name], "input") as kept:
                run(model, input_ids=torch.tensor([ids]))
            seen.append(kept[name][0, lookup].double())
        plain, mean = seen[0], torch.stack(seen).mean(0)
        u = torch.linalg.solve(given.moments.moments[name].double(), torch.stack([mean, plain], 1))
        u = u / u.norm(dim=0)
        expected = {"denominator": u[:, 0] @ plain, "denominator_r": u[:, 0] @ mean, "denominator_p": u[:, 1] @ plain,
                    "relative": (u[:, 0] @ plain) / (u[:, 0] @ mean), "plain_norm": plain.norm(),
                    "mean_norm": mean.norm(), "cosine": plain @ mean / plain.norm() / mean.norm()}
        tolerance = 1e-9 if family == "gpt2" else 1e-5      # Llama's norms work in float32 whatever the dtype
        for column, value in expected.items():
            assert row[column] == pytest.approx(value.item(), rel=tolerance, abs=tolerance), column
        assert row["position"] == with_subject(tok, one.prompt, one.subject)[1]
    assert list(table["opener"]) == [one in disabling.openers(tok, more) for one in more]
    assert table["expected"].median() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("editor", ["rome", "p-rome", "r-rome"])
def test_an_update_is_as_long_as_its_denominator_says(editor, gpt2, facts):
    model, tok = make("gpt2", len(gpt2[1]), dtype=torch.float64), gpt2[1]
    config = configure(editor, SETTINGS)
    given = prepared(model, tok, config)
    table = disabling.denominators(model, tok, facts, config, given)
    made = encode_facts(model, tok, [facts], [given.contexts], config)
    values = optimise(model, made, EditSite(1, "mlp_out", 1), config)
    written = values.delta if editor != "r-rome" else values.delta + values.h0 - values.mean_h0
    by = {one.case_id: norm for one, norm in zip(values.facts, written.norm(dim=1).tolist())}
    for one, delta, denominator in zip(facts, EDITORS[editor].edit_each(model, tok, facts, config, given),
                                       table[disabling.OWN[editor]], strict=True):
        (change,) = delta.changes.values()
        assert dense(change).norm().item() == pytest.approx(by[one.case_id] / abs(denominator), rel=1e-9)


def test_edits_of_the_layer_leave_every_later_denominator_as_it_was(gpt2, facts):
    model, tok = gpt2
    config = configure("rome", SETTINGS)
    given = prepared(model, tok, config)
    before = disabling.denominators(model, tok, facts, config, given)
    with EDITORS["rome"].edit(model, tok, facts[:3], config, given).applied(model):
        after = disabling.denominators(model, tok, facts, config, given)
    assert before.equals(after)
    other = module_of(model, "mlp_out", 0).weight
    kept = other.detach().clone()
    other.mul_(1.5)             # below the layer: the keys are others
    assert not before.equals(disabling.denominators(model, tok, facts, config, given))
    other.copy_(kept)


@pytest.fixture
def place(tmp_path, gpt2, more, texts):
    for part in gpt2:
        part.save_pretrained(tmp_path / "model")
    records = [{"prompt": one.prompt, "subject": one.subject, "target_new": one.target_new, "case_id": one.case_id}
               for one in more]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    (tmp_path / "texts.txt").write_text("\n".join(texts * 3))
    return tmp_path


def test_a_run_is_tabulated_in_its_order_before_anything_is_edited(place):
    (place / "contexts.json").write_text(json.dumps(CONTEXTS))
    words = {"model": str(place / "model"), "facts": str(place / "facts.json"), "texts": str(place / "texts.txt"),
             "contexts": str(place / "contexts.json"), "settings": {"layer": 1}, "order": 2, "device": "cpu"}
    table = disabling.before(inputs.make(editor="rome", **words), place / "runs")
    every = read_facts(place / "facts.json")
    assert list(table["case_id"]) == [str(one.case_id) for one in order(every, 2)]
    assert list((place / "runs" / "moments").glob("C-*.safetensors"))
    few = disabling.before(inputs.make(editor="p-rome", **words), place / "runs", limit=4)
    assert few["denominator"].tolist() == pytest.approx(table["denominator"][:4].tolist())
    with pytest.raises(ValueError, match="ft divides by no denominator"):
        disabling.before(inputs.make(editor="ft", **words | {"settings": {"epsilon": 0.1}}))


def test_interleaved_puts_a_chosen_record_at_every_place(place):
    facts = read_facts(place / "facts.json")
    chosen = [one.case_id for one in facts[:3]]
    path = disabling.interleaved(place / "facts.json", chosen, place / "mixed.json", every=4)
    made = [one.case_id for one in read_facts(path)]
    assert [place for place, one in enumerate(made, 1) if one in chosen] == [4, 8, 12]
    assert sorted(map(str, made)) == sorted(str(one.case_id) for one in facts)
    assert [one for one in made if one in chosen] == [one.case_id for one in order(facts, 0) if one.case_id in chosen]
    first = path.read_bytes()
    assert disabling.interleaved(place / "facts.json", chosen, path).read_bytes() == first
    crowded = [one.case_id for one in facts[:9]]
    mixed = read_facts(disabling.interleaved(place / "facts.json", crowded, path, every=2))
    assert len(mixed) == len(facts) and all((one.case_id in crowded) == (n % 2 == 0) for n, one in
                                            enumerate(mixed[:2 * (len(facts) - 9)], 1))
    with pytest.raises(ValueError, match="none of the 1 chosen"):
        disabling.interleaved(place / "facts.json", ["nobody"], path)


def test_runs_without_openers_and_enriched_ones_beside_a_grid():
    planned = [Planned(name, inputs.make(editor=name.lower(), order=order))
               for name, orders in (("ROME", (0, 1, 2)), ("r-ROME", (0, 1)), ("p-ROME", (0,))) for order in orders]
    found = disabling.besides(planned, ["4", "7"], Path("mixed.json"), 5)
    assert [(one.name, one.run.order) for one in found] == [
        ("ROME without openers", 0), ("ROME, enriched", -1), ("r-ROME, enriched", -1), ("p-ROME, enriched", -1)]
    assert found[0].run.leave_out == ("4", "7") and {one.run.n_edits for one in found[1:]} == {5}
    assert {one.run.facts for one in found[1:]} == {"mixed.json"} and found[2].run.editor == "r-rome"
    assert len(disabling.besides(planned[:3], [], "mixed.json", 5)) == 2


@pytest.mark.parametrize("kept", [("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",),
                                  ("vocab.json", "merges.txt")], ids=["saved", "bare", "published"])
def test_a_tokenizer_is_read_from_whatever_files_it_has(kept, gpt2, tmp_path, more):
    gpt2[1].save_pretrained(tmp_path / "all")
    gpt2[1].backend_tokenizer.model.save(str(tmp_path / "all"))
    for name in kept:
        (tmp_path / name).write_bytes((tmp_path / "all" / name).read_bytes())
    tok = disabling.tokenizer(tmp_path)
    assert disabling.positions(tok, more) == disabling.positions(gpt2[1], more)


def test_command_lists_predicted_edits_with_and_without_a_model(place, capsys, more, gpt2):
    facts, model = str(place / "facts.json"), str(place / "model")
    assert main(["disabling", facts, "--tokenizer", model]) == 0
    found = disabling.openers(gpt2[1], more)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines[:-1]] == [[str(one.case_id), one.subject, one.text] for one in found]
    assert lines[-1].startswith(f"{len(found)} of {len(more)} facts")
    words = ["--model", model, "--texts", str(place / "texts.txt"), "--set", "layer=1"]
    assert main(["disabling", facts, *words]) == 0
    out = capsys.readouterr().out
    assert out.count("denominator ") == len(found) + 1 and "median denominator of these" in out


@pytest.mark.parametrize("words,said", [
    ((), "give --tokenizer"), (("--tokenizer", "nowhere/at/all"), "nowhere/at/all"),
    (("--model", "{model}", "--set", "layer=1"), "needs second moments"),
    (("--model", "{model}", "--set", "depth=1"), "no setting 'depth'")])
def test_command_refuses_in_one_line(words, said, place, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word.replace("{model}", str(place / "model")) for word in words]
    assert main(["disabling", str(place / "facts.json"), *words]) == 2
    assert said in capsys.readouterr().err
