"""The tokenizer: GPT-2's conventions, and the same pieces wherever a word stands."""

import random
from collections import Counter

import pytest

from editcore import corpus, wordpieces, world


@pytest.fixture(scope="module")
def source():
    return corpus.from_world(world.build_world(), 0.01)


@pytest.fixture(scope="module")
def tokenizer(source):
    texts = [line.text for lines in [*source.facts, *source.docs.values()] for line in lines]
    return wordpieces.train_tokenizer(source.words, texts, wordpieces.Pieces(), 128)


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
