"""Train the pocket model's tokenizer: byte-level BPE with GPT-2's leading-space convention."""

import json
from collections import Counter
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
SPACE = "\u0120"    # how byte-level BPE writes a space


@dataclass(frozen=True)
class Pieces:
    """What the merges may become."""

    most: int = 3000    # upper bound on pieces before the space-led copies
    rarest: int = 15    # a merge must occur this often in the weighted words: keeps names in pieces


def train_tokenizer(
    words: Counter, texts: list[str], limits: Pieces, *, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on `words` (word -> weight) for a model of `max_length` positions.

    The merges are learned on words without their spaces; every piece that opens a word in `texts`
    gets a space-led copy as the last merges. So a word has the same pieces wherever it stands.
    """
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=limits.most, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=limits.rarest, show_progress=False)
    base.train_from_iterator(Counter(dict(sorted(words.items()))).elements(), trainer)
    vocabulary, merges = vocabulary_and_merges(base)
    for piece in opening_pieces(base, texts):
        if SPACE + piece not in vocabulary:
            vocabulary[SPACE + piece] = len(vocabulary)
            merges.append((SPACE, piece))
    vocabulary[END] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = split
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=END,
        padding_side="right", model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"], clean_up_tokenization_spaces=False)


def vocabulary_and_merges(backend: Tokenizer) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(piece -> id, merges) of a BPE tokenizer, in the order of learning."""
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    return dict(sorted(model["vocab"].items(), key=lambda item: item[1])), merges


def opening_pieces(base: Tokenizer, texts: list[str]) -> list[str]:
    """First pieces of all words that follow a space in `texts`, most frequent first."""
    words = Counter()
    for text in texts:
        words.update(word for word in text.split(" ")[1:] if word)
    counts: Counter = Counter()
    for word, number in words.items():
        if tokens := base.encode(word).tokens:
            counts[tokens[0]] += number
    return sorted(counts, key=lambda piece: (-counts[piece], piece))
