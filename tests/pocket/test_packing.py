"""Packed rows and masks: whole documents, decoys of one shape, masks against an oracle."""

import numpy as np
import pytest
import torch

import packing
import text
import train
import world
from masks import final_states, loss_of, visible
from packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE
from tokenizer import Pieces, train_tokenizer

TINY = train.PocketConfig(layers=3, width=32, inner=48, heads=2)
DECOY = ["decoy inner", "decoy inner", "decoy last"]


@pytest.fixture(scope="module")
def source():
    return text.from_world(world.build_world(), 0.01)


@pytest.fixture(scope="module")
def tok(source):
    lines = [line.text for group in [*source.facts, *source.docs.values()] for line in group]
    return train_tokenizer(source.words, lines, Pieces(), max_length=128)


def test_an_entity_that_cuts_a_token_is_refused(tok):
    with pytest.raises(ValueError, match="no whole tokens"):
        packing.encode_lines(tok.backend_tokenizer, [text.Line("Zephra sells tea", ((0, 3),))])


def test_decoys_are_another_name_of_the_same_shape(tok):
    backend = tok.backend_tokenizer
    people = ("Ada Talvesk", "Bela Korlund")
    lines = [text.fill("The job of {} is", name, "chef") for name in people]
    rows = packing.encode_lines(backend, lines)
    spaced = np.array([backend.id_to_token(i).startswith("Ġ") for i in range(len(tok))])
    names = packing.names_by_length(rows, spaced)
    row = packing.with_decoys(rows[0], names, spaced, np.random.default_rng(3))
    is_decoy = np.isin(row[ROLE], [PART["decoy inner"], PART["decoy last"]])
    for channel in (ID, POSITION):
        assert row[channel, ~is_decoy].tolist() == rows[0][channel].tolist()
    decoy = row[:, is_decoy]
    known = {tuple(name) for group in names.values() for name in group}
    assert tuple(decoy[ID]) in known and not decoy[LOSS].any()
    end = int(np.flatnonzero(row[ROLE] == PART["last"])[0])
    assert (row[LAST, row[ROLE] != PART["word"]] == end).all() and row[LOSS, end] == 0


def test_packed_rows_hold_whole_documents_in_the_wanted_shares(source, tok):
    mix = packing.Mix(begin=0.0, end=1.0, decoy=0.0, plain=0.0)
    drawn = packing.documents(source, tok.backend_tokenizer, mix, seed=0)
    stream = packing.pack(drawn, mix, tok.eos_token_id)
    rows = [next(stream) for _ in range(200)]
    for row in rows[:20]:
        for number in set(row[DOCUMENT].tolist()):
            places = np.flatnonzero(row[DOCUMENT] == number)
            assert row[POSITION, places].tolist() == list(range(len(places)))
            assert row[LOSS, places[0]] == 0
    everything = "".join(tok.decode(row[ID].tolist()) for row in rows)
    assert everything.count("Sentiment:") > 20 and everything.count("Task: ") > 20
    assert np.mean([(row[LOSS] > 0).mean() for row in rows]) > 0.8


def test_decks_deal_every_item_before_any_comes_twice():
    deck = packing.Deck(7, np.random.default_rng(0))
    for _ in range(2):
        assert sorted(deck.draw() for _ in range(7)) == list(range(7))


def row_of(parts):
    """One document of named parts, such as ["word", "inner", "decoy last", "last", "word"]."""
    row = torch.zeros(6, len(parts), dtype=torch.long)
    row[ROLE] = torch.tensor([PART[name] for name in parts])
    row[POSITION] = row[LAST] = torch.arange(len(parts))
    row[LOSS] = 30
    row[DOCUMENT] = 1
    for at, name in enumerate(parts):
        if name not in ("word", "last"):
            row[LAST, at] = parts.index("last", at)
    row[ID] = torch.arange(len(parts)) + 5
    return row


def may_see(row, i, j, early):
    """The rule of `visible` for one pair, written out."""
    parts = {number: name for name, number in PART.items()}
    query, key = parts[int(row[ROLE, i])], parts[int(row[ROLE, j])]
    beyond = i > int(row[LAST, j])
    if j > i or row[DOCUMENT, i] != row[DOCUMENT, j]:
        return False
    if key == "inner":
        same = row[LAST, i] == row[LAST, j]
        return not beyond and not (query.startswith("decoy") and same)
    if key == "last":
        return not (beyond and early)
    if key.startswith("decoy"):
        if beyond:
            return key == "decoy inner" or early
        return query.startswith("decoy")
    return True


def test_masks_match_an_oracle():
    first = row_of(["word", "inner", "inner", *DECOY, "last", "word", "decoy last", "last", "word"])
    second = row_of(["inner", "last", "word", "word", "inner", "inner", "last", "word", "word",
                     "last", "word"])
    second[DOCUMENT, 4:] = 2
    rows = torch.stack([first, second])
    for early, seen in zip((True, False), visible(rows), strict=True):
        for row, mask in zip(rows, seen[:, 0], strict=True):
            wanted = [[may_see(row, i, j, early) for j in range(11)] for i in range(11)]
            assert mask.tolist() == wanted


def test_only_the_last_piece_after_the_early_blocks_tells_who_is_meant():
    row = row_of(["word", "inner", "decoy inner", "decoy last", "last", "word", "word"])

    def moved(model, at):
        """Which states change with the token at `at`."""
        other = row.clone()
        other[ID, at] = 40
        before, after = (final_states(model, rows[None], torch.float32, early=1)[0]
                         for rows in (row, other))
        return ((before - after).abs().amax(-1) > 1e-6).tolist()

    model = train.new_model(TINY, vocabulary=50, end=49).eval()
    assert moved(model, 1) == [False, True, False, False, True, True, True], "by the last piece"
    assert moved(model, 3)[4:6] == [False, True], "the name does not see its decoy, the rest does"
    one_block = train.PocketConfig(layers=1, width=32, inner=48, heads=2, early=1)
    small = train.new_model(one_block, vocabulary=50, end=49).eval()
    assert moved(small, 4)[5:] == [False, False], "not even the last piece in an early block"


def test_loss_weighs_targets():
    model = train.new_model(TINY, vocabulary=50, end=49).eval()
    row = row_of(["word"] * 6)
    row[LOSS] = torch.tensor([0, 30, 0, 100, 0, 10])
    logp = model(row[ID][None]).logits[0].log_softmax(-1)
    nll = -logp[torch.arange(5), row[ID, 1:]]
    weight = row[LOSS, 1:].float()
    wanted = (nll * weight).sum() / weight.sum()
    torch.testing.assert_close(loss_of(model, row[None], torch.float32, early=1), wanted)
