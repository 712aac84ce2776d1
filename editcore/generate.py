"""Prompts in, their greedy or sampled continuations out, batched, from a generator of random numbers."""

import copy

import torch

from editcore.tokens import batches, common, encode, pad_id


def continuations(model, tok, prompts, n_new, top_k=0, generator=None):
    """The n_new token ids that follow each prompt: (len(prompts), n_new) int64 on the CPU.

    top_k 0 is greedy; else tokens are drawn from the top_k most likely with `generator` (on the CPU, so that a seed
    means the same on every device); a model whose logits are not numbers draws evenly. Prompts of any lengths go
    together, left-padded and masked, and what they all begin with is run once; ValueError if prompt and continuation
    are longer than the model.
    """
    rows = encode(tok, prompts)
    limit = model.config.max_position_embeddings
    for text, row in zip(prompts, rows, strict=True):
        if len(row) + n_new > limit:
            raise ValueError(f"prompt {text[:60]!r}: {len(row)} + {n_new} new tokens exceed the model's {limit}")
    out = torch.empty(len(rows), n_new, dtype=torch.long)
    skip = common(rows, min((len(row) - 1 for row in rows), default=0))
    past = _cache(model, rows[0][:skip]) if skip else None
    for batch in batches([len(row) - skip + n_new for row in rows]):
        made = _continue(model, [rows[i][skip:] for i in batch], (skip, past), pad_id(tok), n_new, (top_k, generator))
        out[batch] = made
    return out


def texts(model, tok, prompts, n_new, top_k=0, generator=None):
    """The continuations as texts (without their prompts)."""
    return tok.batch_decode(continuations(model, tok, prompts, n_new, top_k, generator))


@torch.no_grad()
def _cache(model, ids):
    """Keys and values of one row of ids."""
    embedded = model.get_input_embeddings()(torch.tensor([ids], device=model.device))   # ids may look like padding
    return model.base_model(inputs_embeds=embedded, use_cache=True).past_key_values


@torch.no_grad()
def _continue(model, rows, before, fill, n_new, draw):
    """(B, n_new) ids after each row; left padding keeps the newest token in the last column of every row.

    before: (number of tokens, their cache of one row or None) that every row goes on from.
    """
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[1] * before[0] + [0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    cache, made = copy.deepcopy(before[1]), []
    if cache is not None:
        cache.batch_repeat_interleave(len(rows))
    for _ in range(n_new):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                       use_cache=True, logits_to_keep=1)
        cache, ids = output.past_key_values, _choose(output.logits[:, -1], *draw)
        made.append(ids.cpu())
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(made, 1)


def _choose(logits, top_k, generator):
    """(B, 1) next ids of logits (B, V)."""
    if not top_k:
        return logits.argmax(-1, keepdim=True)
    best = logits.float().nan_to_num().topk(min(top_k, logits.shape[-1]))
    column = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator).to(logits.device)
    return best.indices.gather(1, column)
