"""Score continuations of prompts: log P of every continuation token, from few forward passes.

    scoring = plan(model, [(prompt_ids, target_ids), ...])      # once
    scores = read(model, scoring)                               # as often as the weights change
    scores.nll, scores.token, scores.exact                      # one number per continuation
"""

import contextlib
import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from editcore.hooks import Stop, called, capture, first
from editcore.model import layout, module_of, n_layers, name_of
from editcore.progress import bar
from editcore.suffix import head, quick
from editcore.tokens import batches, common, pad

LOGITS = 2 ** 25    # entries of logits that the head computes at a time (128 MB in float32)


@dataclass(frozen=True)
class HeadChunk:
    """Positions that the vocabulary head reads together."""

    place: torch.Tensor     # (P,) position b * T + t in the batch's ids
    entry: torch.Tensor     # (E,) which of the P places predicts the wanted token
    token: torch.Tensor     # (E,) the wanted token


@dataclass(frozen=True)
class BlockInputs:
    """What one block and those above it are called with, so that the blocks below need not run."""

    layer: int
    hidden: torch.Tensor    # (B, T, d) states that enter block `layer`
    calls: tuple            # per block from `layer` on: its other arguments by name


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    ids: torch.Tensor       # (B, T) after the prefix, right-padded; a causal model needs no mask
    chunks: tuple           # of HeadChunk


@dataclass(frozen=True)
class ScoringPlan:
    """The passes that answer some (prompt, continuation) pairs, on the model's device."""

    prefix: torch.Tensor    # (1, C) what every row begins with, run once; C = 0: not worth it
    batches: tuple          # of Batch
    back: np.ndarray        # (E,) place of each continuation token in the concatenated output
    starts: np.ndarray      # (n,) first token of each continuation, in pair order
    sizes: np.ndarray       # (n,) tokens of each continuation


@dataclass(frozen=True)
class Scores:
    """What a model says about n continuations."""

    logp: np.ndarray        # (E,) float64, log P of every continuation token, teacher-forced
    hit: np.ndarray         # (E,) bool, whether that token is the most likely one
    starts: np.ndarray      # (n,)
    sizes: np.ndarray       # (n,)

    @property
    def nll(self):
        """(n,) mean over the continuation's tokens of -log P, in nats."""
        return -np.add.reduceat(self.logp, self.starts) / self.sizes

    @property
    def token(self):
        """(n,) share of the continuation's tokens that are the most likely ones."""
        return np.add.reduceat(self.hit.astype(float), self.starts) / self.sizes

    @property
    def exact(self):
        """(n,) 1.0 where all tokens of the continuation are the most likely ones, else 0.0."""
        return np.minimum.reduceat(self.hit.astype(float), self.starts)


def plan(model, pairs, max_tokens=2048):
    """Plan the passes for pairs of id lists (prompt, continuation), both non-empty.

    The input of a pair is prompt + continuation without its last token. An input that begins
    another is not run: the longer row has the same hidden states there. What all rows begin with
    (solved examples before a few-shot question) costs one row.
    """
    inputs = [tuple(prompt) + tuple(target[:-1]) for prompt, target in pairs]
    rows, row_of = shared(inputs)
    pairs_of = [[] for _ in rows]
    for index, row in enumerate(row_of):
        pairs_of[row].append(index)
    sizes = np.array([len(target) for _, target in pairs], dtype=np.int64)
    starts = sizes.cumsum() - sizes
    skip = common(rows, min((len(prompt) - 1 for prompt, _ in pairs), default=0))
    device = next(model.parameters()).device
    passes = []
    order = []
    for group in batches([len(row) - skip for row in rows], max_tokens):
        wanted = []
        for b, row in enumerate(group):
            for index in pairs_of[row]:
                prompt, target = pairs[index]
                for k, token in enumerate(target):
                    wanted.append((b, len(prompt) - skip - 1 + k, token, starts[index] + k))
        wanted.sort()
        ids, _ = pad([list(rows[row][skip:]) for row in group], int(model.config.pad_token_id == 0))
        chunks = tuple(_chunks(wanted, ids.shape[1], LOGITS // model.config.vocab_size, device))
        passes.append(Batch(ids.to(device), chunks))
        order += [place for *_, place in wanted]
    prefix = torch.tensor([rows[0][:skip] if rows else ()], dtype=torch.long, device=device)
    return ScoringPlan(prefix, tuple(passes), np.argsort(order), starts, sizes)


def shared(inputs):
    """Return (rows, row_of): the tuples that begin no other, and for each input its row."""
    rows = []
    row_of = [0] * len(inputs)
    # In reverse sorted order a tuple follows those that begin with it.
    for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        ids = inputs[index]
        if not rows or rows[-1][:len(ids)] != ids:
            rows.append(ids)
        row_of[index] = len(rows) - 1
    return rows, row_of


@torch.no_grad()
def read(model, scoring):
    """Score the continuations of a ScoringPlan: one pass of the base model per batch."""
    values = [torch.empty(2, 0, device=model.get_output_embeddings().weight.device)]
    with quick(model):
        cache = prefix_cache(model, scoring.prefix)
        for batch in bar(scoring.batches, "answers", delay=10):
            hidden = states(model, batch.ids, repeated(cache, len(batch.ids))).flatten(0, 1)
            values += [_read(head(model, hidden[chunk.place]), chunk) for chunk in batch.chunks]
    values = torch.cat(values, 1).double().cpu().numpy()[:, scoring.back]
    return Scores(values[0], values[1] > 0, scoring.starts, scoring.sizes)


def states(model, ids, cache=None, **words):
    """Return (B, T, d) states after the final norm of ids (B, T); a cache is read and filled."""
    embedded = model.get_input_embeddings()(ids)    # in ids some models search for padding
    inputs = {"inputs_embeds": embedded, "use_cache": cache is not None} | words
    return model.base_model(**inputs, past_key_values=cache).last_hidden_state


@torch.no_grad()
def prefix_cache(model, ids):
    """Return keys and values of ids (1, C), to go on from; None if C is 0."""
    if not ids.numel():
        return None
    cache = DynamicCache()
    states(model, ids, cache)
    return cache


def repeated(cache, rows):
    """Return a copy of a cache of one row for so many rows; None of None."""
    cache = copy.deepcopy(cache)
    if cache is not None:
        cache.batch_repeat_interleave(rows)
    return cache


@torch.no_grad()
def enter(model, ids, layer, hidden=None, **words):
    """Return the BlockInputs of ids (B, T) at block `layer`; the blocks above are called as it is.

    hidden: the states that enter it, if known: then no block runs; words: of the model, as a mask.
    """
    name = name_of(model, "block", layer if hidden is None else 0)
    with (called(model, [name]) as calls, capture(model, [name], "input"),
          contextlib.suppress(Stop)):
        states(model, ids, **words)
    call = calls[0]
    entering = call.pop(next(iter(call)))
    return BlockInputs(layer, entering if hidden is None else hidden,
                       (call,) * (n_layers(model) - layer))


def above(model, inputs):
    """Return (B, T, d) states after the final norm, from BlockInputs."""
    hidden = inputs.hidden
    for layer, words in enumerate(inputs.calls, inputs.layer):
        hidden = first(module_of(model, "block", layer)(hidden, **words))
    return model.get_submodule(layout(model).norm)(hidden)


def _read(logits, chunk):
    """(2, E): log P of the wanted tokens and whether each is the most likely, of logits (P, V)."""
    logp = logits.log_softmax(-1)
    hits = logits.argmax(-1)[chunk.entry] == chunk.token
    return torch.stack([logp[chunk.entry, chunk.token], hits.to(logp.dtype)])


def _chunks(wanted, width, limit, device):
    """HeadChunks of at most `limit` places of a batch's sorted (row, position, token, output)."""
    places, entries = np.unique([b * width + t for b, t, *_ in wanted], return_inverse=True)
    tokens = np.array([token for _, _, token, _ in wanted])
    for begin in range(0, len(places), max(1, limit)):
        end = begin + max(1, limit)
        inside = (entries >= begin) & (entries < end)
        arrays = (places[begin:end], entries[inside] - begin, tokens[inside])
        yield HeadChunk(*(torch.tensor(array, dtype=torch.long, device=device) for array in arrays))
