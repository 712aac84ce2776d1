"""editcore.tokens: lookup by offsets, targets that survive the round trip, padding and batches."""

import pytest
import torch
from conftest import byte_tokenizer, chat_tokenizer, piece_tokenizer

from editcore import tokens


@pytest.fixture(params=["gpt2", "llama"])
def tok(request):
    return request.getfixturevalue(request.param)[1]


def test_the_lookup_is_the_last_piece_of_the_subject(tok, facts):
    for fact in facts:
        ids, last = tokens.with_subject(tok, fact.prompt, fact.subject)
        again_ids, first, again = tokens.subject_span(tok, fact.prompt, fact.subject)
        assert ids == again_ids == tok(fact.text)["input_ids"] and again == last and first <= last
        assert tok.decode(ids[first:last + 1]).strip() == fact.subject
        until = fact.prompt.index("{}") + len(fact.subject)
        head = tok.decode(ids[:last + 1], skip_special_tokens=True)
        assert head.strip() == fact.text[:until]


def test_a_subject_that_occurs_twice_is_found_where_the_braces_are(tok):
    ids, last = tokens.with_subject(tok, "Rome and Rome or {} in", "Rome")
    assert last == len(ids) - 1 - len(tok(" in", add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("template, subject, words", [
    ("no place", "Rome", "exactly one"), ("{} and {}", "Rome", "exactly one"),
    ("{} is", "", "has no token")])
def test_templates_and_subjects_that_cannot_be(tok, template, subject, words):
    for function in (tokens.with_subject, tokens.subject_span):
        with pytest.raises(ValueError, match=words):
            function(tok, template, subject)


def test_targets_have_no_bos_and_no_bare_space_mark(tok, facts):
    for fact in facts:
        ids = tokens.target_ids(tok, fact.target_new)
        assert ids == tokens.target_ids(tok, " " + fact.target_new)
        assert tok.decode(ids).strip() == fact.target_new
        assert not set(ids) & set(tok.all_special_ids)
        whole = f"{fact.text} {fact.target_new}"
        assert tok(fact.text)["input_ids"] + ids == tok(whole)["input_ids"]


def test_a_target_that_the_tokenizer_cannot_write_is_refused(llama):
    with pytest.raises(ValueError, match="target"):
        tokens.target_ids(llama[1], "Ω")


def test_encode_and_the_start_of_a_text(tok):
    assert tokens.encode(tok, []) == []
    texts = ("Rome is", "Oslo")
    assert tokens.encode(tok, texts) == [tok(text)["input_ids"] for text in texts]
    assert len(tok(tokens.text_start(tok))["input_ids"]) == 1


@pytest.mark.parametrize("maker, words, start", [
    (byte_tokenizer, {}, "<|endoftext|>"),
    (chat_tokenizer, {}, "<|endoftext|>"),
    (chat_tokenizer, {"unk_token": None}, "<|endoftext|>"),     # in the vocabulary all the same
    (byte_tokenizer, {"bos_token": "<bos>", "eos_token": "<stop>"}, "<|endoftext|>"),
    (piece_tokenizer, {}, ""),
])
def test_a_text_begins_after_the_separator_of_documents(maker, words, start):
    tok = maker()
    for name, value in words.items():
        setattr(tok, name, value)
    assert tokens.text_start(tok) == start


def test_without_such_a_token_the_bos_or_eos_begins_a_text():
    tok = byte_tokenizer(special=("<s>", "</s>"))
    assert tokens.text_start(tok) == "<s>"
    tok.bos_token = None
    assert tokens.text_start(tok) == "</s>"


def test_pad(tok):
    ids, mask = tokens.pad([[1, 2, 3], [4]], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.long
    assert tokens.pad_id(tok) == tok.eos_token_id


def test_batches_cover_everything_once_within_the_limit():
    lengths = [3, 50, 4, 4, 200, 1, 9, 9]
    groups = list(tokens.batches(lengths, max_tokens=27))
    flat = [index for group in groups for index in group]
    assert sorted(flat) == list(range(8)) and [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 27 for g in groups)
    assert list(tokens.batches([])) == []


@pytest.mark.parametrize("rows, limit, number", [
    ([[1, 2, 3, 4], [1, 2, 3, 5]], 3, 3), ([[1, 2, 3, 4], [1, 2, 3, 5]], 2, 2),
    ([[1, 2], [2, 2]], 1, 0), ([[1, 2]], 1, 0), ([[1, 2, 3], [1, 2, 3], [1, 9, 3]], 2, 0)])
def test_common(rows, limit, number):
    assert tokens.common(rows, limit, least=2) == number


def test_check_lengths_names_the_first_that_is_too_long():
    tokens.check_lengths([[1] * 4], ["record 1"], 4)
    with pytest.raises(ValueError, match="record 2: 5 tokens, but the model takes at most 4"):
        tokens.check_lengths([[1] * 4, [1] * 5, [1] * 6], ["record 1", "record 2", "record 3"], 4)
