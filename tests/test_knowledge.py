"""Which facts a model knows: against decoding, at word ends, and kept by content."""

import dataclasses

import pytest

from editcore import generate
from editcore.facts import Fact
from editcore.knowledge import _ends_word, known
from editcore.tokens import target_ids
from tests.conftest import byte_tokenizer, make


def as_written(model, tok, facts, n_new):
    """Return the facts with what the model writes in n_new tokens as their true answer.

    What holds control characters or tokens is no answer.
    """
    texts = generate.texts(model, tok, [fact.text for fact in facts], n_new)
    return [dataclasses.replace(fact, target_true=text.strip())
            for fact, text in zip(facts, texts) if text.isprintable() and "<" not in text]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("n_new", [1, 3])
def test_agrees_with_greedy_decoding(request, facts, tmp_path, kind, n_new):
    model, tok = request.getfixturevalue(kind)
    facts = facts + as_written(model, tok, facts, n_new)
    written = generate.continuations(model, tok, [fact.text for fact in facts], 16).tolist()
    expected = []
    for fact, ids in zip(facts, written):
        answer = target_ids(tok, fact.target_true)
        after = tok.decode(ids[:len(answer) + 1])[len(tok.decode(answer)):]
        expected.append(ids[:len(answer)] == answer and not after[:1].isalnum())
    assert any(expected) and not all(expected)
    assert known(model, tok, facts, tmp_path) == expected


@pytest.mark.parametrize(("text", "ends"), [(" Paris.", True), (" Paris is", True),
                                            (" Parisian", False), (" Paris2", False)])
def test_a_word_must_end_after_the_answer(text, ends):
    tok = byte_tokenizer()
    answer = tok(" Paris")["input_ids"]
    after = tok(text.removeprefix(" Paris"))["input_ids"][:1]
    assert _ends_word(tok, answer + after) == ends


def test_what_cannot_be_asked_is_not_known(gpt2, facts, tmp_path):
    model, tok = gpt2
    cases = [dataclasses.replace(facts[0], target_true=""),
             dataclasses.replace(facts[0], prompt="so " * 80 + "{} is"),
             facts[0]]
    answers = known(model, tok, cases, tmp_path)
    assert answers[:2] == [False, False]
    assert known(model, tok, [], tmp_path) == []


def test_is_asked_once_per_weights_and_facts(gpt2, facts, tmp_path, monkeypatch):
    model, tok = gpt2
    first = known(model, tok, facts, tmp_path)
    monkeypatch.setattr("editcore.knowledge._written", lambda *_: 1 / 0)
    assert known(model, tok, facts, tmp_path) == first
    assert known(model, tok, facts[4:1:-1], tmp_path) == first[4:1:-1]
    with pytest.raises(ZeroDivisionError):
        known(model, tok, [*facts, Fact(subject="a", prompt="{} is", target_new="b")], tmp_path)
    with pytest.raises(ZeroDivisionError):
        known(make("gpt2", len(tok), seed=1), tok, facts, tmp_path)
