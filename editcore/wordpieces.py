"""Weighted words and texts come in; a byte-level BPE tokenizer with GPT-2's leading-space convention comes out."""

import json
from collections import Counter
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SPACE = "\u0120"  # how byte-level BPE writes a space


@dataclass(frozen=True)
class Pieces:
    """What the merges may become."""

    most: int = 3000  # upper bound on pieces before the space-led copies
    rarest: int = 15  # a merge must occur this often in the weighted words: keeps names in pieces


def train_tokenizer(words: Counter, texts: list[str], limits: Pieces, longest: int) -> PreTrainedTokenizerFast:
    """A tokenizer trained on `words` (word → weight).

    The merges are learned on words without their spaces; every piece that opens a word in `texts` gets a space-led copy
    as the last merges. So a word falls into the same pieces wherever it stands. `longest`: the model's positions.
    """
    start = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = start
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base.train_from_iterator(expanded(words), trainers.BpeTrainer(
        vocab_size=limits.most, initial_alphabet=alphabet, min_frequency=limits.rarest, show_progress=False))
    known, merges = parts_of(base)
    for piece in opening_pieces(base, texts):
        if SPACE + piece not in known:
            known[SPACE + piece] = len(known)
            merges.append((SPACE, piece))
    known[END] = len(known)
    backend = Tokenizer(models.BPE(vocab=known, merges=merges))
    backend.pre_tokenizer = start
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END, padding_side="right",
        model_max_length=longest, model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False)


def expanded(words: Counter):
    """Each word as often as it weighs, in a fixed order."""
    for word, weight in sorted(words.items()):
        for _ in range(weight):
            yield word


def parts_of(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges) of a BPE tokenizer, ids in the order of learning."""
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return dict(sorted(model["vocab"].items(), key=lambda item: item[1])), merges


def opening_pieces(base: Tokenizer, texts: list[str]) -> list[str]:
    """First pieces of all words that follow a space in `texts`, most frequent first."""
    counts: Counter = Counter()
    for word, number in Counter(word for text in texts for word in text.split(" ")[1:] if word).items():
        if tokens := base.encode(word).tokens:
            counts[tokens[0]] += number
    return [piece for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
