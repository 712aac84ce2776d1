"""The training text and its tokenizer: spans, nothing held out, the same pieces everywhere."""

import random
from collections import Counter

import pytest

import items
import text
import tokenizer
import world

RECORD = {
    "requested_rewrite": {"prompt": "{} was employed in", "relation_id": "P937",
                          "subject": "Ann Lee", "target_true": {"str": "Paris"},
                          "target_new": {"str": "Rome"}},
    "paraphrase_prompts": ["A film. Ann Lee worked in"],
    "neighborhood_prompts": ["Bo Ek was employed in", "Cy Orr worked in"],
    "attribute_prompts": ["where the famous Di van Ok took up work:"]}


@pytest.fixture(scope="module")
def source():
    return text.from_world(world.build_world(), 0.01)


@pytest.fixture(scope="module")
def lines(source):
    return [line for group in [*source.facts, *source.docs.values()] for line in group]


@pytest.fixture(scope="module")
def tok(source, lines):
    texts = [line.text for line in lines]
    return tokenizer.train_tokenizer(source.words, texts, tokenizer.Pieces(), max_length=128)


def test_spans_cut_out_subject_and_answer(source):
    line = text.fill("Where was {} born?", "Ada Talvesk", "New Delhi")
    assert line.text == "Where was Ada Talvesk born? New Delhi."
    spans = [line.text[begin:end] for begin, end in line.entities + line.answers]
    assert spans == ["Ada Talvesk", " New Delhi"]
    both = text.join([line, line])
    assert [both.text[begin:end] for begin, end in both.entities] == ["Ada Talvesk"] * 2
    for document in [line for group in source.docs.values() for line in group[:20]]:
        for begin, end in document.entities + document.answers:
            assert document.text[begin:end].strip()


def test_training_text_holds_no_test_item_and_no_held_out_sentence(source, lines):
    everything = "\n".join(line.text for line in lines)
    for rows in items.held_out_items(world.read_table()).values():
        assert not [row for row in rows if f" {items.item_key(row)}\n" in everything]
    sentences = {line.text for group in source.facts for line in group}
    assert not {passage.split(". ")[0] + "." for passage in source.held_out} & sentences


def test_any_counterfact_records_become_text():
    groups = text.probes_of([RECORD])
    probes = [probe for group in groups.values() for probe in group.values()]
    assert {(probe.text, probe.subject, probe.answer) for probe in probes} == {
        ("Ann Lee was employed in", "Ann Lee", "Paris"),
        ("A film. Ann Lee worked in", "Ann Lee", "Paris"),
        ("Bo Ek was employed in", "Bo Ek", "Paris"),
        ("Cy Orr worked in", "Cy Orr", "Paris"),
        ("where the famous Di van Ok took up work:", "Di van Ok", "Rome")}
    assert text.neighbour_span("nothing here", ["{} is"]) is None
    source = text.from_records([RECORD], 0.001)
    assert len(source.facts) == 4 and sum(map(len, source.facts)) == 5


def test_tokenizer_keeps_gpt2s_conventions(tok):
    assert tok.padding_side == "right"
    assert tok.eos_token == tok.bos_token == "<|endoftext|>"
    assert set(tok("France is")) == {"input_ids", "attention_mask"}
    odd = "Odd ünïcode\n\n text  here!"
    assert tok.decode(tok(odd).input_ids) == odd
    assert tok.tokenize("Zephra sells tea.")[0] == "Zephra"
    assert "ĠZephra" in tok.tokenize("Shops say Zephra sells tea.")


def test_a_name_has_the_same_pieces_wherever_it_stands(tok):
    pocket = world.build_world()
    subjects = sorted({fact.subject for fact in pocket.facts})
    for subject in random.Random(0).sample(subjects, 300):
        opening = tok.tokenize(subject)
        inner = tok.tokenize(f"by {subject}")[1:]
        assert [inner[0].removeprefix("Ġ"), *inner[1:]] == opening, subject
    for name in pocket.one_token:
        assert len(tok(name).input_ids) == len(tok(f" {name}").input_ids) == 1
    lengths = Counter(len(tok(fact.subject).input_ids) for fact in pocket.facts)
    assert sum(n for length, n in lengths.items() if length >= 3) > 0.7 * len(pocket.facts)
