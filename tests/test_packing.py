"""Packed rows: whole documents in the wanted shares, decoys of the same shape, spans that cut no word."""

import numpy as np
import pytest

from editcore import corpus, packing, wordpieces, world
from editcore.packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE


@pytest.fixture(scope="module")
def source():
    return corpus.from_world(world.build_world(), 0.01)


@pytest.fixture(scope="module")
def tokenizer(source):
    texts = [line.text for lines in [*source.facts, *source.docs.values()] for line in lines]
    return wordpieces.train_tokenizer(source.words, texts, wordpieces.Pieces(), 128)


def test_an_entity_that_cuts_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="no whole tokens"):
        packing.encode_lines(tokenizer.backend_tokenizer, [corpus.Line("Zephra sells tea", ((0, 3),))])


def test_decoys_are_another_name_of_the_same_shape(tokenizer):
    backend = tokenizer.backend_tokenizer
    lines = [corpus.fill("The job of {} is", name, "chef") for name in ("Ada Talvesk", "Bela Korlund")]
    rows = packing.encode_lines(backend, lines)
    spaced = np.array([backend.id_to_token(i).startswith("Ġ") for i in range(len(tokenizer))])
    names = packing.names_by_length(rows, spaced)
    row, plain = packing.with_decoys(rows[0], names, spaced, np.random.default_rng(3)), rows[0]
    kept = row[ROLE] < PART["decoy inner"]
    kept |= row[ROLE] == PART["last"]
    assert row[ID, kept].tolist() == plain[ID].tolist() and row[POSITION, kept].tolist() == plain[POSITION].tolist()
    decoy = row[:, ~kept]
    assert tuple(decoy[ID]) in {tuple(name) for shape in names.values() for name in shape} and not decoy[LOSS].any()
    end = int(np.flatnonzero(row[ROLE] == PART["last"])[0])
    assert (row[LAST, row[ROLE] != PART["word"]] == end).all() and row[LOSS, end] == 0


def test_packed_rows_hold_whole_documents_in_the_wanted_shares(source, tokenizer):
    mix = packing.Mix(begin=0.0, end=1.0, decoy=0.0, plain=0.0)
    made = packing.pack(packing.documents(source, tokenizer.backend_tokenizer, mix, 0), mix, tokenizer.eos_token_id)
    rows = [next(made) for _ in range(200)]
    for row in rows[:20]:
        for number in set(row[DOCUMENT].tolist()):
            places = np.flatnonzero(row[DOCUMENT] == number)
            assert row[POSITION, places].tolist() == list(range(len(places))) and row[LOSS, places[0]] == 0
    text = "".join(tokenizer.decode(row[ID].tolist()) for row in rows)
    assert text.count("Sentiment:") > 20 and text.count("Task: ") > 20 and text.count("Where was") > 5
    assert np.mean([(row[LOSS] > 0).mean() for row in rows]) > 0.8


def test_decks_deal_every_item_before_any_comes_twice():
    deck = packing.Deck(7, np.random.default_rng(0))
    assert sorted(deck.draw() for _ in range(7)) == sorted(deck.draw() for _ in range(7)) == list(range(7))
