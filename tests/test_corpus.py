"""Lines and packed rows: spans sit where they should, decoys are another's, a word has the same pieces everywhere."""

import random
from collections import Counter

import numpy as np
import pytest

from editcore import corpus, packing, wordpieces, world, worldtext
from editcore.packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE


@pytest.fixture(scope="module")
def source():
    return corpus.from_world(world.build_world(), 0.01)


@pytest.fixture(scope="module")
def tokenizer(source):
    texts = [line.text for lines in [*source.facts, *source.docs.values()] for line in lines]
    return wordpieces.train_tokenizer(source.words, texts, wordpieces.Pieces(), 128)


def test_spans_cut_out_subject_and_answer(source):
    line = corpus.fill("Where was {} born?", "Ada Talvesk", "New Delhi")
    assert line.text == "Where was Ada Talvesk born? New Delhi."
    assert [line.text[a:b] for a, b in line.entities + line.answers] == ["Ada Talvesk", " New Delhi"]
    both = corpus.joined([line, line])
    assert [both.text[a:b] for a, b in both.entities] == ["Ada Talvesk"] * 2
    for lines in source.docs.values():
        for one in lines[:20]:
            assert all(one.text[a:b].strip() for a, b in one.entities + one.answers)


def test_training_text_holds_no_test_item_and_no_held_out_sentence(source):
    everything = "\n".join(line.text for lines in [*source.facts, *source.docs.values()] for line in lines)
    table = world.read_table()
    tests = [worldtext.item_key(item) for rows in worldtext.test_items(table).values() for item in rows]
    assert not [text for text in tests if f" {text}\n" in everything]
    sentences = {line.text for lines in source.facts for line in lines}
    assert not [text for text in source.held_out if text.split(". ")[0] + "." in sentences]


def test_tokenizer_keeps_gpt2s_conventions(source, tokenizer):
    assert tokenizer.padding_side == "right" and tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert set(tokenizer("France is")) == {"input_ids", "attention_mask"}
    assert tokenizer.decode(tokenizer("Odd ünïcode\n\n text  here!").input_ids) == "Odd ünïcode\n\n text  here!"
    opening, inner = tokenizer.tokenize("Zephra sells tea."), tokenizer.tokenize("Shops say Zephra sells tea.")
    assert opening[0] == "Zephra" and "ĠZephra" in inner


def test_a_name_has_the_same_pieces_wherever_it_stands(tokenizer):
    made = world.build_world()
    for subject in random.Random(0).sample(sorted({f.subject for f in made.facts}), 300):
        opening, inner = tokenizer.tokenize(subject), tokenizer.tokenize(f"by {subject}")[1:]
        assert [opening[0], *inner[1:]] == [inner[0].removeprefix("Ġ"), *opening[1:]], subject
    assert all(len(tokenizer(name).input_ids) == len(tokenizer(f" {name}").input_ids) == 1 for name in made.one_token)
    lengths = Counter(len(tokenizer(f.subject).input_ids) for f in made.facts)
    assert sum(number for length, number in lengths.items() if length >= 3) > 0.7 * len(made.facts)


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


RECORD = {"requested_rewrite": {"prompt": "{} was employed in", "relation_id": "P937", "subject": "Ann Lee",
                                "target_true": {"str": "Paris"}, "target_new": {"str": "Rome"}},
          "paraphrase_prompts": ["A film. Ann Lee worked in"],
          "neighborhood_prompts": ["Bo Ek was employed in", "Cy Orr worked in"],
          "attribute_prompts": ["where the famous Di van Ok took up work:"]}


def test_any_counterfact_records_become_text():
    found = corpus.probes_of([RECORD])
    texts = {(p.text, p.subject, p.answer) for group in found.values() for p in group.values()}
    assert texts == {("Ann Lee was employed in", "Ann Lee", "Paris"), ("A film. Ann Lee worked in", "Ann Lee", "Paris"),
                     ("Bo Ek was employed in", "Bo Ek", "Paris"), ("Cy Orr worked in", "Cy Orr", "Paris"),
                     ("where the famous Di van Ok took up work:", "Di van Ok", "Rome")}
    assert corpus.neighbour_span("nothing here", ["{} is"]) is None
    made = corpus.from_records([RECORD], 0.001)
    assert len(made.facts) == 4 and sum(map(len, made.facts)) == 5
