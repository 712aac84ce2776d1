"""Score continuations of prompts: log P of every continuation token, from few forward passes.

    scoring = plan(model, [(prompt_ids, target_ids), ...])      # once
    scores = read(model, scoring)                               # as often as the weights change
    scores.nll, scores.token, scores.exact                      # one number per continuation
"""

import copy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import DynamicCache

from editcore.hooks import bound_arguments, hooked
from editcore.model import layout, module_of, n_layers, name_of
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
    hidden: torch.Tensor    # (B, C + T, d) states that enter block `layer`
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
    another input is not run: the longer row has the same hidden states there. So two one-token
    continuations of a prompt, a question that several facts ask, and a short answer that begins a
    long one cost one row. What all rows begin with (solved examples before a few-shot question)
    costs one row too.
    """
    inputs = [tuple(prompt) + tuple(target[:-1]) for prompt, target in pairs]
    rows, row_of = shared(inputs)
    pairs_of = [[] for _ in rows]
    for index, row in enumerate(row_of):
        pairs_of[row].append(index)
    sizes = np.array([len(target) for _, target in pairs], dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    skip = common(rows, min((len(prompt) - 1 for prompt, _ in pairs), default=0))
    device = next(model.parameters()).device
    passes = []
    order = []
    for group in batches([len(row) - skip for row in rows], max_tokens):
        wanted = []
        for b, row in enumerate(group):
            for index in pairs_of[row]:
                prompt, target = pairs[index]
                first = len(prompt) - skip - 1
                wanted += [(b, first + k, target[k], starts[index] + k) for k in range(len(target))]
        wanted.sort()
        ids, _ = pad([list(rows[row][skip:]) for row in group], int(model.config.pad_token_id == 0))
        chunks = tuple(_chunks(wanted, ids.shape[1], LOGITS // model.config.vocab_size, device))
        passes.append(Batch(ids.to(device), chunks))
        order += [place for *_, place in wanted]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    prefix = torch.tensor([rows[0][:skip] if rows else ()], dtype=torch.long, device=device)
    return ScoringPlan(prefix, tuple(passes), back, starts, sizes)


def shared(inputs):
    """(rows, row_of): the tuples that begin no other, and for each input the row it begins."""
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
    """Score the continuations of a ScoringPlan: one pass of the base model per batch.

    Log-probabilities are float32 or better; the whole measurement is copied to the host at once.
    """
    head = model.get_output_embeddings()
    values = [torch.empty(2, 0, device=head.weight.device)]
    prefix = None
    if scoring.prefix.numel():
        prefix = DynamicCache()
        states(model, scoring.prefix, prefix)
    for batch in scoring.batches:
        past = copy.deepcopy(prefix)
        if past is not None:
            past.batch_repeat_interleave(len(batch.ids))
        hidden = states(model, batch.ids, past).flatten(0, 1)
        values += [_read(head(hidden[chunk.place]), chunk) for chunk in batch.chunks]
    values = torch.cat(values, 1).double().cpu().numpy()[:, scoring.back]
    return Scores(values[0], values[1] > 0, scoring.starts, scoring.sizes)


def states(model, ids, cache=None, **words):
    """(B, T, d) states after the final norm of ids (B, T); a cache is read and filled.

    The embeddings are looked up here: given ids without a mask, some models search them for padding
    and warn.
    """
    embedded = model.get_input_embeddings()(ids)
    inputs = {"inputs_embeds": embedded, "use_cache": cache is not None} | words
    return model.base_model(**inputs, past_key_values=cache).last_hidden_state


@torch.no_grad()
def enter(model, prefix, ids, layer, **words):
    """The BlockInputs of one batch at block `layer`: what its blocks are seen to be called with.

    words: more of the model's arguments, such as position_ids and a mask (B, 1, T, T) for rows that
    branch.
    """
    calls = []
    hooks = {name_of(model, "block", index): partial(bound_arguments, calls)
             for index in range(layer, n_layers(model))}
    with hooked(model, hooks, before=True, with_kwargs=True):
        states(model, torch.cat([prefix.expand(len(ids), -1), ids], 1), **words)
    hidden = next(iter(calls[0].values()))
    return BlockInputs(layer, hidden, tuple(dict(list(call.items())[1:]) for call in calls))


def above(model, inputs):
    """(B, C + T, d) states after the final norm, from BlockInputs."""
    hidden = inputs.hidden
    for layer, words in enumerate(inputs.calls, inputs.layer):
        output = module_of(model, "block", layer)(hidden, **words)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.get_submodule(layout(model).norm)(hidden)


def prompt_ends(scoring):
    """For each pass of `read`, a (B, T) bool mask of the last tokens of the prompts.

    That is where published GRACE looks its codebook up (`delta.Patch.applied`). A row that scores
    continuations of a prompt and of a longer one that it begins is marked at both ends.
    """
    masks = [torch.zeros(batch.ids.shape, dtype=torch.bool) for batch in scoring.batches]
    ends = set(scoring.back[scoring.starts].tolist())
    entry = 0
    for mask, batch in zip(masks, scoring.batches):
        places = [place for chunk in batch.chunks for place in chunk.place[chunk.entry].tolist()]
        for place in places:
            if entry in ends:
                mask.view(-1)[place] = True
            entry += 1
    prefix = torch.zeros(scoring.prefix.shape, dtype=torch.bool)
    return [prefix, *masks] if prefix.numel() else masks


def _read(logits, chunk):
    """(2, E): log P of the wanted tokens and whether each is the most likely, of logits (P, V)."""
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    hits = logits.argmax(-1)[chunk.entry] == chunk.token
    return torch.stack([logp[chunk.entry, chunk.token], hits.to(logp.dtype)])


def _chunks(wanted, width, limit, device):
    """HeadChunks of at most `limit` places of a batch's sorted (row, position, token, output)."""
    places, entries = np.unique([b * width + t for b, t, *_ in wanted], return_inverse=True)
    tokens = np.array([token for _, _, token, _ in wanted])
    limit = max(1, limit)
    for first in range(0, len(places), limit):
        inside = (entries >= first) & (entries < first + limit)
        arrays = (places[first:first + limit], entries[inside] - first, tokens[inside])
        yield HeadChunk(*(torch.tensor(array, dtype=torch.long, device=device) for array in arrays))
