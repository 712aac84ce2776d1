"""editcore.tokens: lookup by offsets, targets that survive the round trip, padding and batches."""

import pytest
import torch

from editcore import tokens


@pytest.fixture(params=["gpt2", "llama"])
def tok(request):
    return request.getfixturevalue(request.param)[1]


def test_the_lookup_is_the_last_piece_of_the_subject(tok, facts):
    for fact in facts:
        ids, last = tokens.with_subject(tok, fact.prompt, fact.subject)
        assert ids == tok(fact.text)["input_ids"]
        start = fact.prompt.index("{}")
        first, again = tokens.subject_span(tok, fact.prompt, fact.subject)
        assert again == last and first <= last
        assert tok.decode(ids[first:last + 1]).strip() == fact.subject
        head = tok.decode(ids[:last + 1], skip_special_tokens=True)
        assert head.strip() == fact.text[:start + len(fact.subject)]


def test_a_subject_that_occurs_twice_is_found_where_the_braces_are(tok):
    ids, last = tokens.with_subject(tok, "Rome and Rome or {} in", "Rome")
    assert last == len(ids) - 1 - len(tok(" in", add_special_tokens=False)["input_ids"])


def test_templates_and_subjects_that_cannot_be(tok):
    for template in ("no place", "{} and {}"):
        with pytest.raises(ValueError, match="exactly one"):
            tokens.with_subject(tok, template, "Rome")
    with pytest.raises(ValueError, match="has no token"):
        tokens.with_subject(tok, "{} is", "")


def test_targets_have_no_bos_and_no_bare_space_mark(tok, facts):
    for fact in facts:
        ids = tokens.target_ids(tok, fact.target_new)
        assert ids == tokens.target_ids(tok, " " + fact.target_new)
        assert tok.decode(ids).strip() == fact.target_new
        assert not set(ids) & set(tok.all_special_ids)
        prompt = tok(fact.text)["input_ids"]
        assert prompt + ids == tok(fact.text + " " + fact.target_new)["input_ids"]


def test_a_target_that_the_tokenizer_cannot_write_is_refused(llama):
    with pytest.raises(ValueError, match="target"):
        tokens.target_ids(llama[1], "Ω")


def test_pad_and_encode(tok):
    ids, mask = tokens.pad([[1, 2, 3], [4]], fill=9)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]] and mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == torch.long
    assert tokens.encode(tok, []) == []
    assert tokens.encode(tok, ("Rome is", "Oslo")) == [tok("Rome is")["input_ids"], tok("Oslo")["input_ids"]]
    assert tokens.pad_id(tok) == tok.eos_token_id


def test_batches_cover_everything_once_within_the_limit():
    lengths = [3, 50, 4, 4, 200, 1, 9, 9]
    groups = list(tokens.batches(lengths, max_tokens=27))
    assert sorted(i for group in groups for i in group) == list(range(8))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= 27 for g in groups)
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(lengths)
    assert list(tokens.batches([])) == []


def test_check_lengths_names_the_first_that_is_too_long():
    tokens.check_lengths([[1] * 4], ["record 1"], 4)
    with pytest.raises(ValueError, match="record 2: 5 tokens, but the model takes at most 4"):
        tokens.check_lengths([[1] * 4, [1] * 5, [1] * 6], ["record 1", "record 2", "record 3"], 4)
