"""Prompts in, their greedy or sampled continuations out, batched, from a generator of random numbers."""

import torch

from editcore.tokens import batches, encode, pad_id


def continuations(model, tok, prompts, n_new, top_k=0, generator=None, max_tokens=8192):
    """The n_new token ids that follow each prompt: (len(prompts), n_new) int64 on the CPU.

    top_k 0 is greedy; else tokens are drawn from the top_k most likely with `generator` (on the CPU, so that a seed
    means the same on every device). Prompts of any lengths go together, left-padded and masked; ValueError if prompt
    and continuation are longer than the model.
    """
    rows = encode(tok, prompts)
    limit = model.config.max_position_embeddings
    for text, row in zip(prompts, rows, strict=True):
        if len(row) + n_new > limit:
            raise ValueError(f"prompt {text[:60]!r}: {len(row)} + {n_new} new tokens exceed the model's {limit}")
    out = torch.empty(len(rows), n_new, dtype=torch.long)
    for batch in batches([len(row) + n_new for row in rows], max_tokens):
        out[batch] = _continue([rows[i] for i in batch], model, pad_id(tok), n_new, (top_k, generator))
    return out


def texts(model, tok, prompts, n_new, top_k=0, generator=None):
    """The continuations as texts (without their prompts)."""
    return tok.batch_decode(continuations(model, tok, prompts, n_new, top_k, generator))


@torch.no_grad()
def _continue(rows, model, fill, n_new, draw):
    """(B, n_new) ids after each row; left padding keeps the newest token in the last column of every row."""
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor([[fill] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    cache, made = None, []
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
    best = logits.float().topk(min(top_k, logits.shape[-1]))
    column = torch.multinomial(best.values.softmax(-1).cpu(), 1, generator=generator).to(logits.device)
    return best.indices.gather(1, column)
