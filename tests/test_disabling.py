"""Openers against the tokenizer's own words, denominators against plain passes and edits."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make
from editor_cases import ridged_moments

from editcore import disabling
from editcore.cli import main
from editcore.delta import dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.facts import Fact, one_per_subject, order, read_facts
from editcore.hooks import capture, run
from editcore.model import module_of, name_of
from editcore.study.measure import denominators
from editcore.study.run import make_run
from editcore.tokens import with_subject

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
COUNTERFACT = Path(os.environ.get("EDITCORE_COUNTERFACT",
                                  ROOT / "results" / "data" / "counterfact.json"))
CONTEXTS = ("{}", "The first. {}", "Because I know you, we read. {}", "The first. {}")
SETTINGS = {"layer": 1, "steps": 6, "lr": 0.3, "clamp": 2}


def prepare(model, tok, config):
    """What ROME takes from the model, its second moments made definite."""
    moments = ridged_moments(model, tok, [config.layer])
    inputs = EditorInputs(moments=moments, contexts=CONTEXTS)
    return EDITORS["rome"].prepare(model, tok, config, inputs)


@pytest.fixture
def more(facts):
    """The shared facts, and a word of one token, opening its prompt and inside one."""
    return [*facts,
            Fact(case_id="word", subject="The", prompt="{} lies in", target_new="Rome"),
            Fact(case_id="inside", subject=" river", prompt="Here the{} runs to",
                 target_new="Rome")]


def test_openers_are_the_facts_whose_first_token_is_their_subject(gpt2, more):
    tok = gpt2[1]
    openers = disabling.openers(tok, more)
    assert openers == [fact for fact in more if fact.prompt.startswith("{}")
                       and tok.decode(tok(fact.text)["input_ids"][0]) == fact.subject]
    assert "word" in [fact.case_id for fact in openers] and disabling.opening(tok) == 0


def test_after_a_bos_the_first_token_of_the_text_opens_it(llama, more):
    tok = llama[1]
    assert disabling.opening(tok) == 1 and disabling.openers(tok, more, first=0) == []
    openers = disabling.openers(tok, more)
    for fact in openers:
        ids, last = with_subject(tok, fact.prompt, fact.subject)
        assert last == 1 and ids[0] == tok.bos_token_id
    assert "word" in [fact.case_id for fact in openers]


@pytest.mark.skipif(not DATA.is_dir(), reason="no samples of the real data sets here")
def test_openers_of_a_sample_of_counterfact():
    facts = read_facts(DATA / "counterfact_sample.json")
    tok = disabling.tokenizer(DATA / "gpt2_tokenizer")
    openers = {fact.case_id for fact in disabling.openers(tok, facts)}
    first = [tok.convert_ids_to_tokens(tok(fact.text)["input_ids"])[0] for fact in facts]
    assert openers == {fact.case_id for fact, word in zip(facts, first) if word == fact.subject}
    assert len(facts) == 299 and len(openers) <= 5      # 80 of 21,919 are 1.1 of 299
    single = {fact.case_id for fact in facts if len(tok(" " + fact.subject)["input_ids"]) == 1}
    assert openers != single    # one token alone is not enough: it must open the prompt


@pytest.mark.skipif(not (COUNTERFACT.is_file() and DATA.is_dir()), reason="no CounterFact here")
def test_eighty_of_counterfact_and_where_the_published_order_puts_them():
    bad = []
    facts = read_facts(COUNTERFACT, bad)
    tok = disabling.tokenizer(DATA / "gpt2_tokenizer")
    openers = {fact.case_id for fact in disabling.openers(tok, facts)}
    assert len(facts) + len(bad) == 21919 and len(openers) == 80
    assert len(one_per_subject(facts)) == 20391
    places = [n for n, fact in enumerate(order(facts, 3), 1) if fact.case_id in openers]
    assert places[:3] == [552, 899, 1134]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_denominators_are_those_of_plain_passes(family, request, more, monkeypatch):
    tok = request.getfixturevalue(family)[1]
    config = configure("rome", SETTINGS)
    model = make(family, len(tok), dtype=torch.float64)
    prepared = prepare(model, tok, config)
    name = name_of(model, "mlp_out", config.layer)
    moment = prepared.moments.moments[name].double()
    monkeypatch.setattr(disabling, "PORTION", 5)
    table = disabling.denominators(model, tok, more, config, prepared)
    # Llama's norms work in float32 whatever the dtype.
    tolerance = 1e-9 if family == "gpt2" else 1e-5
    for row, fact in zip(table.to_dict("records"), more, strict=True):
        keys = []
        for context in CONTEXTS:
            prompt = context.replace("{}", fact.prompt)
            ids, lookup = with_subject(tok, prompt, fact.subject)
            with capture(model, [name], "input") as inputs:
                run(model, input_ids=torch.tensor([ids]))
            keys.append(inputs[name][0, lookup].double())
        plain = keys[0]
        mean = torch.stack(keys).mean(0)
        u = torch.linalg.solve(moment, torch.stack([mean, plain], 1))
        u = u / u.norm(dim=0)
        expected = {"denominator": u[:, 0] @ plain, "denominator_r": u[:, 0] @ mean,
                    "denominator_p": u[:, 1] @ plain,
                    "relative": (u[:, 0] @ plain) / (u[:, 0] @ mean), "plain_norm": plain.norm(),
                    "mean_norm": mean.norm(),
                    "cosine": plain @ mean / plain.norm() / mean.norm()}
        for column, value in expected.items():
            assert row[column] == pytest.approx(value.item(), rel=tolerance, abs=tolerance), column
        assert row["position"] == with_subject(tok, fact.prompt, fact.subject)[1]
    assert list(table["opener"]) == [fact in disabling.openers(tok, more) for fact in more]
    assert table["expected"].median() == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("editor", disabling.DENOMINATOR_OF)
def test_an_update_is_as_long_as_its_denominator_says(editor, gpt2, facts):
    tok = gpt2[1]
    model = make("gpt2", len(tok), dtype=torch.float64)
    config = configure(editor, SETTINGS)
    prepared = prepare(model, tok, config)
    table = disabling.denominators(model, tok, facts, config, prepared)
    encoded = encode_facts(model, tok, [facts], [prepared.contexts], config)
    values = optimise(model, encoded, EditSite(1, "mlp_out", 1), config)
    written = values.delta
    if editor == "r-rome":
        written = values.delta + values.h0 - values.mean_h0
    norms = {fact.case_id: norm for fact, norm in zip(values.facts, written.norm(dim=1).tolist())}
    deltas = EDITORS[editor].edit_each(model, tok, facts, config, prepared)
    denominators = table[disabling.DENOMINATOR_OF[editor]]
    for fact, delta, denominator in zip(facts, deltas, denominators, strict=True):
        (change,) = delta.changes.values()
        length = norms[fact.case_id] / abs(denominator)
        assert dense(change).norm().item() == pytest.approx(length, rel=1e-9)


def test_edits_of_the_layer_leave_every_later_denominator_as_it_was(gpt2, facts):
    model, tok = gpt2
    config = configure("rome", SETTINGS)
    prepared = prepare(model, tok, config)
    before = disabling.denominators(model, tok, facts, config, prepared)
    with EDITORS["rome"].edit(model, tok, facts[:3], config, prepared).applied(model):
        assert before.equals(disabling.denominators(model, tok, facts, config, prepared))
    below = module_of(model, "mlp_out", 0).weight
    weight = below.detach().clone()
    below.mul_(1.5)             # the keys are others
    assert not before.equals(disabling.denominators(model, tok, facts, config, prepared))
    below.copy_(weight)


@pytest.fixture
def folder(tmp_path, gpt2, more, texts):
    """A model, facts, texts and contexts, each a file of its own."""
    for part in gpt2:
        part.save_pretrained(tmp_path / "model")
    names = ("prompt", "subject", "target_new", "case_id")
    records = [{name: getattr(fact, name) for name in names} for fact in more]
    (tmp_path / "facts.json").write_text(json.dumps(records))
    (tmp_path / "texts.txt").write_text("\n".join(texts * 3))
    (tmp_path / "contexts.json").write_text(json.dumps(CONTEXTS))
    return tmp_path


def test_a_run_is_tabulated_in_its_order_before_anything_is_edited(folder):
    run = make_run(model=str(folder / "model"), facts=str(folder / "facts.json"),
                   texts=str(folder / "texts.txt"), contexts=str(folder / "contexts.json"),
                   settings={"layer": 1}, order=2, device="cpu")
    table = denominators(run, out_dir=folder / "runs")
    facts = read_facts(folder / "facts.json")
    assert list(table["case_id"]) == [str(fact.case_id) for fact in order(facts, 2)]
    assert list((folder / "runs" / "moments").glob("C-*.safetensors"))
    few = denominators(replace(run, editor="p-rome"), limit=4, out_dir=folder / "runs")
    assert list(few["denominator"]) == pytest.approx(table["denominator"][:4].tolist())
    with pytest.raises(ValueError, match="ft divides by no denominator"):
        denominators(replace(run, editor="ft"))


def test_interleaved_puts_a_chosen_record_at_every_place(folder):
    facts = read_facts(folder / "facts.json")
    source = folder / "facts.json"
    chosen = [fact.case_id for fact in facts[:3]]
    path = disabling.interleaved(source, chosen, folder / "mixed.json", every=4)
    cases = [fact.case_id for fact in read_facts(path)]
    assert [place for place, case in enumerate(cases, 1) if case in chosen] == [4, 8, 12]
    assert sorted(map(str, cases)) == sorted(str(fact.case_id) for fact in facts)
    published = [fact.case_id for fact in order(facts, 0)]
    for group in (chosen, [fact.case_id for fact in facts[3:]]):
        assert [case for case in cases if case in group] == [c for c in published if c in group]
    first = path.read_bytes()
    assert disabling.interleaved(source, chosen, path).read_bytes() == first
    crowded = [fact.case_id for fact in facts[:9]]
    cases = [fact.case_id for fact in read_facts(disabling.interleaved(source, crowded, path,
                                                                     every=2))]
    mixed = cases[:2 * (len(facts) - 9)]
    assert [case in crowded for case in mixed] == [False, True] * (len(mixed) // 2)
    assert len(cases) == len(facts)
    with pytest.raises(ValueError, match="none of the 1 chosen"):
        disabling.interleaved(source, ["nobody"], path)


@pytest.mark.parametrize("files", [("tokenizer.json", "tokenizer_config.json"),
                                   ("tokenizer.json",), ("vocab.json", "merges.txt")],
                         ids=["saved", "bare", "published"])
def test_a_tokenizer_is_read_from_whatever_files_it_has(files, gpt2, tmp_path, more):
    gpt2[1].save_pretrained(tmp_path / "all")
    gpt2[1].backend_tokenizer.model.save(str(tmp_path / "all"))
    for name in files:
        (tmp_path / name).write_bytes((tmp_path / "all" / name).read_bytes())
    tok = disabling.tokenizer(tmp_path)
    assert disabling.positions(tok, more) == disabling.positions(gpt2[1], more)


def test_command_lists_predicted_edits_with_and_without_a_model(folder, capsys, more, gpt2):
    facts = str(folder / "facts.json")
    model = str(folder / "model")
    assert main(["disabling", facts, "--tokenizer", model]) == 0
    openers = disabling.openers(gpt2[1], more)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split("\t") for line in lines] == [[str(fact.case_id), fact.subject, fact.text]
                                                    for fact in openers]
    assert last.startswith(f"{len(openers)} of {len(more)} facts")
    texts = str(folder / "texts.txt")
    assert main(["disabling", facts, "--model", model, "--texts", texts, "--set", "layer=1"]) == 0
    out = capsys.readouterr().out
    assert out.count("denominator ") == len(openers) + 1 and "median denominator of these" in out


@pytest.mark.parametrize("words, message", [
    ((), "give --tokenizer"), (("--tokenizer", "nowhere/at/all"), "nowhere/at/all"),
    (("--model", "{model}", "--set", "depth=1"), "no setting 'depth'")])
def test_command_refuses_in_one_line(words, message, folder, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [word.replace("{model}", str(folder / "model")) for word in words]
    assert main(["disabling", str(folder / "facts.json"), *words]) == 2
    assert message in capsys.readouterr().err
