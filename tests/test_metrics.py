"""Metrics equal those of a whole forward pass for every prompt and target."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make, taught

from editcore import generate, metrics
from editcore.delta import Delta
from editcore.facts import Fact
from editcore.model import LAYOUTS, name_of
from editcore.tokens import encode_pairs, target_ids

ALL = ("ES", "PS", "NS", "PO")
ORLA = Fact(case_id=1, subject="Orla", prompt="{} is in", target_new="New Delhi",
            target_true="Rome")
PREFIXES = ("The old river runs.", "You and I read the book. Because I know")


def one_by_one(model, tok, prompt, target):
    """(mean nll, share of argmax hits, all hit) of a target after a prompt, from full logits."""
    ids, wanted = tok(prompt)["input_ids"], target_ids(tok, target)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1].double()
    nll = torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).item()
    hits = [int(row.argmax()) == token for row, token in zip(logits, wanted)]
    return nll, sum(hits) / len(hits), float(all(hits))


def oracle(model, tok, facts, prefixes=()):
    """{(case_id, metric): value} by the definitions, serially."""
    found = {}
    for fact in facts:
        new, true = fact.target_new, fact.target_true
        longer = [f"{text} {fact.text}" for text in prefixes]
        for kind, prompts, right, rival in (
                ("ES", [fact.text], new, true), ("PS", fact.paraphrases, new, true),
                ("XS", longer, new, true), ("NS", fact.neighbours, true, new)):
            if not prompts:
                continue
            scores = [(one_by_one(model, tok, p, right), one_by_one(model, tok, p, rival))
                      for p in prompts]
            values = {"": [a[0] < b[0] for a, b in scores],
                      "_prob": [math.exp(-a[0]) - math.exp(-b[0]) for a, b in scores],
                      "_token": [a[1] for a, _ in scores], "_exact": [a[2] for a, _ in scores]}
            found |= {(fact.case_id, kind + name): float(np.mean(several))
                      for name, several in values.items()}
        for name, column in (("_token", 1), ("_exact", 2)):
            best = [max(one_by_one(model, tok, p, a)[column] for a in answers)
                    for _, p, answers in fact.portability]
            found[fact.case_id, "PO" + name] = float(np.mean(best))
    return found


def table(rows):
    assert len({(row["fact"], row["metric"]) for row in rows}) == len(rows)
    return {(row["fact"], row["metric"]): row["value"] for row in rows}


def knowing(model, tok, fact):
    """A copy of the model trained on a few answers of a fact, so that accuracies are not all 0."""
    _, question, answers = fact.portability[0]
    return taught(model, encode_pairs(tok, [(fact.text, fact.target_new), (question, answers[-1]),
                                            (fact.neighbours[0], fact.target_true)]))


def writing(model, tok, fact):
    """A copy of the model that writes a fact's answer and a full stop."""
    ((ids, answer),) = encode_pairs(tok, [(fact.text, fact.target_new)])
    return taught(model, [(ids, answer + [tok.convert_tokens_to_ids(".")])])


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
@pytest.mark.parametrize("max_tokens", [40, 8192])
def test_measure_is_the_serial_full_forward_version(shape, max_tokens, facts, request):
    model, tok = request.getfixturevalue(shape)
    facts = [*facts[:5],
             Fact(case_id="six", subject="Farrow", prompt="{} lies in",
                  target_new="New Delhi", target_true="Rome", neighbours=("Sue Oakes lies in",),
                  portability=(("x", "Farrow is a city of", ("Oslo", "San Marino")),))]
    model = knowing(model, tok, facts[5])
    probes = metrics.prepare(model, tok, facts, ALL, max_tokens=max_tokens)
    found = table(metrics.evaluate(model, probes))
    expected = oracle(copy.deepcopy(model).double(), tok, facts)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert found["six", "ES_exact"] == found["six", "NS_exact"] == found["six", "PO_exact"] == 1
    assert {0.0, 1.0} <= {value for (_, name), value in found.items() if name in ("ES", "NS")}


@pytest.mark.parametrize("kind", sorted(LAYOUTS))
def test_every_layout_in_float64(kind, facts):
    tok = byte_tokenizer()
    model = make(kind, len(tok), layers=2, dtype=torch.float64)
    found = table(metrics.measure(model, tok, facts[:3], ALL))
    expected = oracle(model, tok, facts[:3])
    assert found.keys() == expected.keys()
    limit = 1e-7 if kind == "gptj" else 1e-12   # its attention is always computed in float32
    assert max(abs(found[key] - expected[key]) for key in found) < limit


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_prompts_behind_prefixes_are_the_serial_full_forward_version(shape, facts, request):
    model, tok = request.getfixturevalue(shape)
    model = knowing(model, tok, facts[1])
    found = table(metrics.measure(model, tok, facts[:4], ("ES", "XS", "PO"), prefixes=PREFIXES))
    expected = oracle(copy.deepcopy(model).double(), tok, facts[:4], PREFIXES)
    expected = {key: expected[key] for key in expected if key[1][:2] in ("ES", "XS", "PO")}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert all(found[i, "XS_prob"] != found[i, "ES_prob"] for i in range(4))
    assert {name for _, name in found} >= {"XS", "XS_prob", "XS_token", "XS_exact"}


def test_greedy_behind_a_prefix_is_greedy_on_the_longer_prompt(gpt2):
    tok = gpt2[1]
    longer = [replace(ORLA, case_id=i, prompt=f"{text} {{}} is in")
              for i, text in enumerate(PREFIXES)]
    model = writing(gpt2[0], tok, longer[1])
    alone = table(metrics.greedy(model, tok, longer, ("ES",)))
    found = table(metrics.measure(model, tok, [ORLA], ("XS", "greedy"), prefixes=PREFIXES))
    assert alone[1, "ES_greedy"] == 1
    assert found[1, "XS_greedy"] == np.mean([alone[0, "ES_greedy"], 1])


def test_passages_are_seeded_whole_and_name_no_subject_where_they_can(gpt2, llama, facts):
    for model, tok in (gpt2, llama):
        made, again, other = (metrics.passages(model, tok, facts, seed) for seed in (1, 1, 2))
        assert made == again != other
        assert len(made) == len(set(made)) == 3
        assert all(text == " ".join(text.split()) and text[-1] in ".!?" for text in made)
        assert not any(tok.eos_token in text for text in made)
        metrics.prepare(model, tok, facts[:1], ("XS", "greedy"), prefixes=made)


def test_passages_are_cut_and_ordered(gpt2, facts, monkeypatch):
    model, tok = gpt2
    said = ["Orla runs. It", "One two. And three", "no end", "", "A.<|endoftext|>B.", "a\n b!",
            "One two. Or four", "3.5 and"] * 5
    monkeypatch.setattr(generate, "texts", lambda *words, **_: said[:len(words[2])])
    expected = ("One two.", "no end.", "A.", "a b!", "3.5 and.")
    assert metrics.passages(model, tok, facts, 0, number=5) == expected
    assert metrics.passages(model, tok, facts, 0, number=6) == (*expected, "Orla runs.")
    monkeypatch.setattr(generate, "texts", lambda *words, **_: ["<|endoftext|> x"] * len(words[2]))
    with pytest.raises(ValueError, match="ends every text at once"):
        metrics.passages(model, tok, facts, 0)


def test_prepared_once_follows_the_weights(gpt2, facts):
    model, tok = gpt2
    probes = metrics.prepare(model, tok, facts, ALL)
    before = metrics.evaluate(model, probes)
    name = name_of(model, "mlp_out", 1) + ".weight"
    weight = model.get_parameter(name)
    change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    with Delta({name: change}).applied(model):
        after = metrics.evaluate(model, probes)
        assert after == metrics.measure(model, tok, facts, ALL) != before
    assert metrics.evaluate(model, probes) == before
    some = metrics.evaluate(model, probes.select([7, 2]))
    alone = metrics.measure(model, tok, [facts[7], facts[2]], ALL)
    assert table(some) == pytest.approx(table(alone), abs=1e-6)
    assert [row["fact"] for row in some[::len(some) // 2]] == [7, 2]


def test_a_tie_and_a_broken_model_fail(gpt2, facts):
    model, tok = copy.deepcopy(gpt2[0]), gpt2[1]
    one_piece = [f for f in facts
                 if len(target_ids(tok, f.target_new)) == len(target_ids(tok, f.target_true)) == 1]
    model.get_output_embeddings().weight.zero_()  # all tokens equally likely
    rows = metrics.measure(model, tok, one_piece)
    assert {row["value"] for row in rows if row["metric"] in metrics.DEFAULT} == {0.0}
    assert {row["value"] for row in rows if row["metric"].endswith("_prob")} == {0.0}
    model.get_output_embeddings().weight.fill_(float("nan"))
    rows = metrics.measure(model, tok, facts)
    assert {row["value"] for row in rows if row["metric"] in metrics.DEFAULT} == {0.0}
    assert all(math.isnan(row["value"]) for row in rows if row["metric"].endswith("_prob"))


def test_a_fact_without_the_old_answer_is_not_compared(gpt2):
    model, tok = gpt2
    fact = replace(ORLA, target_true="", neighbours=("Farrow is in",))
    rows = metrics.measure(model, tok, [fact], ALL)
    assert {row["metric"] for row in rows} == {"ES_token", "ES_exact"}
    assert metrics.measure(model, tok, [fact], ("PO",)) == metrics.measure(model, tok, []) == []


def test_one_error_before_any_work(gpt2, facts):
    model, tok = gpt2
    long = replace(ORLA, case_id="x9", paraphrases=("the river " * 60,))
    broken = copy.deepcopy(model)
    broken.forward = broken.base_model.forward = None  # any work would fail otherwise
    for what in (metrics.DEFAULT, ("PS", "greedy")):
        with pytest.raises(ValueError, match="record x9: 24. tokens.*at most 64"):
            metrics.measure(broken, tok, [*facts, long], what)
    with pytest.raises(ValueError, match="metric 'EX': choose some of ES, PS, NS, XS, PO, greedy"):
        metrics.measure(broken, tok, facts, ("EX",))
    with pytest.raises(ValueError, match="metric 'XS' needs prefixes"):
        metrics.measure(broken, tok, facts, ("ES", "XS"))
    with pytest.raises(ValueError, match="record [0-3]: [67]. tokens.*at most 64"):
        metrics.measure(broken, tok, facts, ("ES", "XS"), prefixes=("the river", "the river " * 13))


def test_room_for_what_greedy_writes_is_checked_before_any_work(gpt2):
    model, tok = gpt2
    plain = len(tok("a a")["input_ids"])
    fact = replace(ORLA, subject="a", prompt="{}" + " a" * (64 - plain + 1), target_new="Rome",
                   target_true="Oslo")      # as long as the model, answers of one token
    assert (len(tok(fact.text)["input_ids"]), len(target_ids(tok, "Rome"))) == (64, 1)
    metrics.prepare(model, tok, [fact])
    with pytest.raises(ValueError, match="record 1: 67 tokens.*at most 64"):
        metrics.prepare(model, tok, [fact], ("ES", "greedy"))


def test_score_and_means_by_hand():
    rows = [{"fact": fact, "metric": name, "value": value}
            for name, several in (("ES", (1, 1)), ("PS", (1, 0)), ("NS", (0.25, 0.25)))
            for fact, value in enumerate(several)]
    assert metrics.means(rows) == {"ES": 1, "PS": 0.5, "NS": 0.25}
    assert metrics.score(rows) == pytest.approx(3 / (1 + 2 + 4))
    assert metrics.score([row | {"value": 0.0} for row in rows]) == 0
    with pytest.raises(ValueError, match="no rows of PS"):
        metrics.score([row for row in rows if row["metric"] != "PS"])


def test_entropy_by_hand():
    # bigrams of a b a b c: ab twice, ba, bc; trigrams aba, bab, abc
    h2, h3 = 0.5 * 1 + 2 * 0.25 * 2, math.log2(3)
    assert metrics.entropy(["a b a b c"]) == pytest.approx(100 * (h2 / 3 + 2 * h3 / 3))
    assert metrics.entropy(["la la la la", ""]) == 0
    assert metrics.entropy(["a, b!", "x x x"]) == pytest.approx(50 * (math.log2(3) / 3 + 2 / 3))


def test_generation_is_seeded_and_as_long_as_the_model_allows(gpt2, facts, monkeypatch):
    model, tok = gpt2
    facts = facts[:4]
    rows, again, other = (metrics.generation(model, tok, facts, seed) for seed in (3, 3, 4))
    assert rows == again != other
    assert [row["fact"] for row in rows] == [fact.case_id for fact in facts]
    lengths, original = [], generate.texts

    def spy(model, tok, prompts, n_new, **draw):
        lengths.extend(len(tok(prompt)["input_ids"]) + n_new for prompt in prompts)
        return original(model, tok, prompts, n_new, **draw)

    monkeypatch.setattr(generate, "texts", spy)
    metrics.generation(model, tok, facts, seed=3)
    assert set(lengths) == {64}
    assert metrics.generation(model, tok, [ORLA], seed=0) == []


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_greedy_needs_the_answer_and_a_stop(shape, facts, request):
    model, tok = request.getfixturevalue(shape)
    fact = replace(ORLA, paraphrases=("Orla is in", "Farrow is in"),
                   neighbours=("Sue Oakes is in",))
    model = writing(model, tok, fact)
    text = generate.texts(model, tok, [fact.text], 12)[0]
    assert text.strip().startswith("New Delhi.")
    rows = table(metrics.measure(model, tok, [fact], ("ES", "PS", "NS", "greedy")))
    assert rows[1, "ES_greedy"] == rows[1, "ES_exact"] == 1
    assert rows[1, "PS_greedy"] in (0.5, 1)
    assert rows[1, "NS_greedy"] == 0


def test_probabilities_of_every_prompt_average_to_the_magnitudes(gpt2, facts):
    model, tok = gpt2
    fact = next(one for one in facts if one.target_true and one.neighbours)
    found, one = table(metrics.measure(model, tok, [fact])), metrics.probabilities(model, tok, fact)
    for kind, sign in (("ES", 1), ("PS", 1), ("NS", -1)):
        new, true = (np.mean([row["value"] for row in one if row["kind"] == kind
                              and row["target"] == name]) for name in ("new", "true"))
        assert found[fact.case_id, f"{kind}_prob"] == pytest.approx(sign * (new - true), rel=1e-4)


@pytest.mark.parametrize("text, answer, right", [
    (" Rome. It", "Rome", True), ("Rome\n", "Rome", True), (" St. Ives, and", "St. Ives", True),
    (" Rome</s>", "Rome", True), (" Romeo.", "Rome", False), (" Rome and", "Rome", False),
    (" Rome", "Rome", False), (" in Rome.", "Rome", False), ("", "Rome", False)])
def test_natural_stops(text, answer, right):
    assert metrics.answers(text, answer, "</s>") == right


@pytest.mark.parametrize("shape", ["gpt2", "llama"])
def test_perplexity_is_that_of_each_block_alone(shape, texts, request):
    model, tok = request.getfixturevalue(shape)
    ids = [token for text in texts for token in (*tok(text)["input_ids"], tok.eos_token_id)]
    losses = []
    for block in (ids[i : i + 24] for i in range(0, len(ids), 24)):
        if len(block) > 1:
            logits = model(input_ids=torch.tensor([block])).logits[0, :-1].double()
            losses += torch.nn.functional.cross_entropy(logits, torch.tensor(block[1:]),
                                                        reduction="none").tolist()
    value = metrics.perplexity(model, tok, texts, length=24)
    assert value == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    limit = metrics.perplexity(model, tok, texts, length=64)    # that of the model
    assert metrics.perplexity(model, tok, texts) == limit
    with pytest.raises(ValueError, match="at least two"):
        metrics.perplexity(model, tok, [])
