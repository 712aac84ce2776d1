"""Prompts and continuations as token ids in; the log-probability of every continuation token out, from few passes.

    made = plan(model, [(prompt_ids, target_ids), ...])     # once
    found = read(model, made)                               # as often as the weights change
    found.nll, found.token, found.exact                     # one number a continuation
"""

import copy
import inspect
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from editcore.model import layout, module_of, n_layers
from editcore.tokens import batches, common, pad

LOGITS = 2 ** 25    # entries of one block of logits (128 MB in float32): the head runs over so many at a time


@dataclass(frozen=True)
class HeadChunk:
    """Positions that the vocabulary head reads together."""

    place: torch.Tensor     # (P,) position b * T + t in the batch's ids
    entry: torch.Tensor     # (E,) which of the P places predicts the wanted token
    token: torch.Tensor     # (E,) the wanted token


@dataclass(frozen=True)
class BlockInputs:
    """What `read` goes on from at one block of one batch, so that the blocks below need not run again."""

    layer: int
    hidden: torch.Tensor    # (B, C + T, d) states that enter block `layer`
    calls: tuple            # what that block and each above is called with beside the states, by name


@dataclass(frozen=True)
class Batch:
    """One forward pass."""

    ids: torch.Tensor       # (B, T) after the prefix, right-padded; no mask: a causal model never looks to the right
    parts: tuple            # of HeadChunk


@dataclass(frozen=True)
class ScoringPlan:
    """The passes that answer some (prompt, continuation) pairs, on the model's device."""

    prefix: torch.Tensor    # (1, C) what every row begins with, run once; C = 0 if it is not worth it
    batches: tuple          # of Batch
    back: np.ndarray        # (E,) entry of the concatenated output that holds each continuation token, in pair order
    starts: np.ndarray      # (n,) first token of each continuation in that order
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
    """The ScoringPlan for pairs of id lists (prompt, continuation), both non-empty.

    The input of a pair is prompt + continuation without its last token. An input that begins another input is not
    run: the longer row has the same hidden states there. So two one-token continuations of a prompt, a question that
    several facts ask, and a short answer that begins a long one cost one row. A beginning that all rows have in common
    (solved examples before a few-shot question) costs one row too.
    """
    inputs = [tuple(prompt) + tuple(target[:-1]) for prompt, target in pairs]
    rows, row_of = shared(inputs)
    members = [[] for _ in rows]
    for pair, row in enumerate(row_of):
        members[row].append(pair)
    sizes = np.array([len(target) for _, target in pairs], dtype=np.int64)
    starts = np.concatenate([[0], sizes.cumsum()[:-1]]).astype(np.int64)
    skip = common(rows, min((len(prompt) - 1 for prompt, _ in pairs), default=0))
    limit = max(1, LOGITS // model.config.vocab_size)
    device = next(model.parameters()).device
    made, order = [], []
    for group in batches([len(row) - skip for row in rows], max_tokens):
        wanted = sorted((b, len(pairs[i][0]) - skip - 1 + k, pairs[i][1][k], starts[i] + k)
                        for b, row in enumerate(group) for i in members[row] for k in range(sizes[i]))
        ids, _ = pad([list(rows[row][skip:]) for row in group], int(model.config.pad_token_id == 0))
        made.append(Batch(ids.to(device), tuple(_parts(wanted, ids.shape[1], limit, device))))
        order += [place for *_, place in wanted]
    back = np.empty(len(order), dtype=np.int64)
    back[order] = np.arange(len(order))
    prefix = torch.tensor([rows[0][:skip] if rows else ()], dtype=torch.long, device=device)
    return ScoringPlan(prefix, tuple(made), back, starts, sizes)


def shared(inputs):
    """(rows, row_of): the input tuples that begin no other input, and for every input the row that begins with it."""
    rows, row_of, last = [], [0] * len(inputs), ()
    for index in sorted(range(len(inputs)), key=inputs.__getitem__, reverse=True):
        one = inputs[index]    # in sorted order a tuple is followed by those that begin with it
        if not rows or last[:len(one)] != one:
            rows.append(one)
            last = one
        row_of[index] = len(rows) - 1
    return rows, row_of


@torch.no_grad()
def enter(model, prefix, ids, layer, **words):
    """The BlockInputs of one batch: the states and arguments that its blocks are seen to be called with.

    words: more of the model's arguments, such as position_ids and a mask (B, 1, T, T) for rows that branch.
    """
    entered, handles = [], []

    def watch(block, args, words):
        arguments = inspect.signature(block.forward).bind(*args, **words).arguments
        states, *others = {**arguments, **arguments.pop("kwargs", {})}.items()
        entered.append((states[1], dict(others)))

    for index in range(layer, n_layers(model)):
        handles.append(module_of(model, "block", index).register_forward_pre_hook(watch, with_kwargs=True))
    try:
        states(model, torch.cat([prefix.expand(len(ids), -1), ids], 1), **words)
    finally:
        for handle in handles:
            handle.remove()
    return BlockInputs(layer, entered[0][0], tuple(others for _, others in entered))


@torch.no_grad()
def read(model, made):
    """The Scores of a ScoringPlan: one pass of the base model a batch, head and log-softmax at the planned places.

    The whole measurement is copied to the host at once.
    """
    head = model.get_output_embeddings()
    found = [torch.empty(2, 0, device=head.weight.device)]
    prefix = None
    if made.prefix.numel():
        prefix = DynamicCache()
        states(model, made.prefix, prefix)
    for batch in made.batches:
        hidden = _hidden(model, batch, prefix).flatten(0, 1)
        found += [_read(head(hidden[part.place]), part) for part in batch.parts]
    values = torch.cat(found, 1).double().cpu().numpy()[:, made.back]
    return Scores(values[0], values[1] > 0, made.starts, made.sizes)


def _hidden(model, batch, prefix):
    """(B, T, d) states after the final norm; prefix: a cache of one row, or None."""
    if prefix is not None:
        prefix = copy.deepcopy(prefix)
        prefix.batch_repeat_interleave(len(batch.ids))
    return states(model, batch.ids, prefix)


def states(model, ids, cache=None, **words):
    """(B, T, d) states after the final norm of ids (B, T), right-padded or not; a cache is read and filled.

    The embeddings are looked up here: given ids without a mask, some models search them for padding and warn.
    """
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "use_cache": cache is not None} | words
    return model.base_model(**inputs, past_key_values=cache).last_hidden_state


def above(model, kept):
    """(B, C + T, d) states after the final norm, from those that enter block kept.layer."""
    hidden = kept.hidden
    for index, words in enumerate(kept.calls, kept.layer):
        output = module_of(model, "block", index)(hidden, **words)
        hidden = output[0] if isinstance(output, tuple) else output
    return model.get_submodule(layout(model).norm)(hidden)


def _read(logits, part):
    """(2, E): log P of the wanted tokens and whether they are the most likely, of logits (P, V)."""
    logp = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return torch.stack([logp[part.entry, part.token], (logits.argmax(-1)[part.entry] == part.token).to(logp.dtype)])


def _parts(wanted, width, limit, device):
    """HeadChunks of at most `limit` places of the sorted (row, position, token, output place) of one batch."""
    places, entries = np.unique([b * width + t for b, t, *_ in wanted], return_inverse=True)
    tokens = np.array([token for _, _, token, _ in wanted])
    for first in range(0, len(places), limit):
        inside = (entries >= first) & (entries < first + limit)
        numbers = places[first:first + limit], entries[inside] - first, tokens[inside]
        yield HeadChunk(*(torch.from_numpy(np.ascontiguousarray(number)).to(device) for number in numbers))
