"""Few-shot answers equal those of items asked alone, token by token."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, make, taught
from sklearn.metrics import f1_score

from data.world.make import tasks
from editcore import fewshot
from editcore.fewshot import INVALID
from editcore.tokens import encode_pairs, target_ids

PAIRS = ("mrpc", "rte")


@pytest.fixture(scope="module")
def small():
    """(model, tokenizer) with room for few-shot prompts."""
    tok = byte_tokenizer()
    return make("gpt2", len(tok), positions=512), tok


def items(name, n=12):
    words = ("good", "bad", "the old river", "a book", "city of Rome")
    if name in PAIRS:
        return [{"sentence1": f"It is {words[i % 5]}.",
                 "sentence2": f"I know {words[i % 4]}.", "label": i % 2} for i in range(n)]
    return [{"sentence": f"You read {words[i % 5]} {i}.", "label": i % 2} for i in range(n)]


def learned(model, tok, texts):
    """A copy of the model trained to say a word after each text: [(prompt, word), ...]."""
    return taught(model, encode_pairs(tok, texts), lr=0.005)


def greedy_ids(model, ids, n):
    for _ in range(n):
        ids = [*ids, int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())]
    return ids[-n:]


def oracle(model, tok, prompts, words):
    """(greedy, likely) labels of prompts, serially."""
    labels, greedy, likely = [target_ids(tok, word) for word in words], [], []
    for prompt in prompts:
        ids = tok(prompt)["input_ids"]
        said = greedy_ids(model, ids, max(3, *map(len, labels)))
        begun = [i for i, label in enumerate(labels) if said[: len(label)] == label]
        greedy.append(begun[0] if begun else fewshot.parsed(tok.decode(said[:3]), words))
        logp = []
        for label in labels:
            logits = model(input_ids=torch.tensor([ids + label])).logits[0, len(ids) - 1 : -1]
            logp.append(sum(row.log_softmax(-1)[token].item() for row, token in zip(logits, label)))
        likely.append(int(np.argmax(logp)))
    return np.array(greedy), np.array(likely)


@pytest.mark.parametrize("name", sorted(fewshot.TASKS))
def test_answers_are_the_serial_ones(name, small):
    model, tok = small
    words = fewshot.TASKS[name].labels
    asked = fewshot.prepare(model, tok, {name: items(name)}, shots=3, seed=0)[0].prompts
    model = learned(model, tok, [(asked[0], words[0]), (asked[1], words[1]),
                                (asked[2], f"so {words[1]}"), (asked[3], "the river")])
    one = fewshot.prepare(model, tok, {name: items(name)}, shots=3, seed=0)[0]
    greedy, likely, _ = fewshot.answers(model, tok, one)
    expected = oracle(model, tok, one.prompts, words)
    assert greedy.tolist() == expected[0].tolist() and likely.tolist() == expected[1].tolist()
    assert len(set(greedy.tolist())) > 1


def test_rows_and_their_values(small):
    model, tok = small
    model = learned(model, tok, [("Sentiment:", "positive"), ("meaning:", "no")])
    given = {name: items(name) for name in ("sst2", "mrpc")}
    rows = fewshot.few_shot(model, tok, given, shots=2, seed=1)
    assert [row["metric"] for row in rows] == ["sst2_f1", "sst2_prob_f1", "sst2_calibrated_f1",
                                               "sst2_invalid", "mrpc_f1", "mrpc_prob_f1",
                                               "mrpc_calibrated_f1", "mrpc_invalid", "invalid"]
    values, unread = {row["metric"]: row["value"] for row in rows}, []
    for one in fewshot.prepare(model, tok, given, shots=2, seed=1):
        greedy, likely, calibrated = fewshot.answers(model, tok, one)
        how = {"labels": [0, 1], "average": "weighted", "zero_division": 0}
        assert values[f"{one.name}_f1"] == pytest.approx(f1_score(one.gold, greedy, **how))
        assert values[f"{one.name}_prob_f1"] == pytest.approx(f1_score(one.gold, likely, **how))
        f1 = f1_score(one.gold, calibrated, **how)
        assert values[f"{one.name}_calibrated_f1"] == pytest.approx(f1)
        assert values[f"{one.name}_invalid"] == np.mean(greedy == INVALID)
        unread += (greedy == INVALID).tolist()
    assert values["invalid"] == np.mean(unread)
    assert fewshot.few_shot(model, tok, {}, shots=2, seed=1) == []


def test_a_broken_model_scores_nothing(small):
    model, tok = copy.deepcopy(small[0]), small[1]
    model.get_output_embeddings().weight.fill_(float("nan"))
    rows = {row["metric"]: row["value"]
            for row in fewshot.few_shot(model, tok, {"sst2": items("sst2")}, shots=2)}
    assert rows["sst2_f1"] == 0 and rows["sst2_invalid"] == 1
    assert rows["sst2_prob_f1"] == pytest.approx(1 / 3)


def test_weighted_f1_by_hand_and_the_chance_lines():
    gold = np.array([0, 0, 1, 1])
    # label 0: precision 1, recall 1/2, F1 2/3; label 1: precision 1/2 (invalid is neither)
    answered = np.array([0, 1, 1, INVALID])
    assert fewshot.weighted_f1(gold, answered) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert fewshot.weighted_f1(gold, gold) == 1
    one, none = fewshot.CHANCE.values()
    for label in (0, 1):
        assert fewshot.weighted_f1(gold, np.full(4, label)) == one
    assert fewshot.weighted_f1(gold, np.full(4, INVALID)) == none


def test_parsed():
    words = ("no", "yes")
    texts = (" yes", "Well, No.", " no yes", " yes, no", " none", "", " know")
    expected = [1, 0, 0, 1, INVALID, INVALID, INVALID]
    assert [fewshot.parsed(text, words) for text in texts] == expected
    assert fewshot.parsed(" not entailment", ("not", "not entailment")) == 1


def test_shots_are_balanced_seeded_and_not_asked(small):
    model, tok = small
    given = items("sst2", 20)
    first, again, other = (fewshot.prepare(model, tok, {"sst2": given}, shots=4, seed=seed)[0]
                           for seed in (0, 0, 1))
    assert first.prompts == again.prompts != other.prompts
    shown = first.prompts[0].split(fewshot.SEPARATOR)[:-1]
    assert len(shown) == 4 and sum(text.endswith(" positive") for text in shown) == 2
    assert len(first.prompts) == 16 and first.gold.mean() == 0.5
    asked = [prompt.split(fewshot.SEPARATOR)[-1] for prompt in first.prompts]
    every = {fewshot.question("sst2", item) for item in given}
    assert {*asked, *(text.rsplit(" ", 1)[0] for text in shown)} == every
    begin = first.plan.prefix.shape[1]  # the solved examples are run once
    assert begin >= len(tok(fewshot.SEPARATOR.join(shown))["input_ids"])


def test_one_error_names_task_and_item(small):
    model, tok = small
    good = items("sst2")
    for spoilt, message in (
            ({"sentence": "a" * 3000, "label": 0}, "sst2 item 12: .* the model takes at most 512"),
            ({"sentence": "a", "label": 2}, "sst2 item 12: label 2 is not 0 to 1"),
            ({"label": 0}, "sst2 item has no field 'sentence'")):
        with pytest.raises(ValueError, match=message):
            fewshot.prepare(model, tok, {"sst2": [*good, spoilt]}, shots=0)
    with pytest.raises(ValueError, match="too few for 6 solved examples"):
        fewshot.prepare(model, tok, {"sst2": good}, shots=12)
    with pytest.raises(ValueError, match="unknown task 'qnli'"):
        fewshot.prepare(model, tok, {"qnli": good}, shots=2)


def test_read_items(tmp_path):
    path = tmp_path / "mrpc.json"
    path.write_text(json.dumps(items("mrpc")))
    assert fewshot.read_items(path, "mrpc") == items("mrpc")
    some, again = (fewshot.balanced(items("mrpc"), 6, seed=2) for _ in range(2))
    assert sum(item["label"] for item in some) == 3 and some == again
    with pytest.raises(ValueError, match="14 balanced items asked for"):
        fewshot.balanced(items("mrpc"), 14)
    for damaged, message in (
            ([*items("mrpc"), {"sentence1": "a", "label": 1}], "mrpc.json: item 12: .*sentence2"),
            ([{"sentence1": "a", "sentence2": "b", "label": "x"}], "mrpc.json: item 0"),
            ({}, "mrpc.json: expected a non-empty list")):
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match=message):
            fewshot.read_items(path, "mrpc")
    with pytest.raises(FileNotFoundError, match="none.json"):
        fewshot.read_items(tmp_path / "none.json", "mrpc")


def test_calibration_takes_a_word_that_is_always_preferred_off(small, monkeypatch):
    (task,) = fewshot.prepare(*small, {"sst2": items("sst2")}, shots=2)
    n = len(task.gold)
    logp = np.array([[-1.0, -5.0 + 3 * label] for label in task.gold])
    scores = SimpleNamespace(nll=-logp.ravel(), sizes=np.ones(2 * n), exact=np.ones(2 * n))
    monkeypatch.setattr(fewshot, "read", lambda *_: scores)
    _, likely, calibrated = fewshot.answers(*small, task)
    assert not likely.any() and calibrated.tolist() == task.gold.tolist()


@pytest.mark.parametrize("name", sorted(fewshot.TASKS))
def test_items_of_the_world(name):
    every = tasks.tasks()[name]
    assert fewshot.read_items(tasks.OUT / f"{name}.json", name) == every
    labels = [item["label"] for item in every]
    assert len(every) >= 60 and labels.count(0) == labels.count(1) == len(every) / 2
    asked = [fewshot.question(name, item) for item in every]
    assert len(set(asked)) == len(asked)
    lines = (tasks.TABLES / "sentences.txt").read_text("utf-8").splitlines()
    if name == "cola":
        assert all((item["sentence"] in lines) == item["label"] for item in every)
