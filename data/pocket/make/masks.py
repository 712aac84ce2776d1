"""Decide what each token may see of a name in training, and compute the loss under those masks."""

import torch
from torch.nn import functional as F

from packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE


def visible(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (B, 1, T, T) bool of rows (B, 6, T): may query i see key j early, and later?

    i sees j <= i of its own document, but for the pieces of an entity that ends before i (unless
    the document is plain): its inner pieces never; its last piece only in the later blocks; of a
    decoy name beside it the last piece only in the early blocks. A decoy and the name beside it do
    not see each other. So the only way from a name to what follows is the state of its last piece
    after the early blocks, while the scene looks as it does without masks. This is what makes a
    small model keep its facts where large ones do.
    """
    part = rows[:, ROLE]
    last = rows[:, LAST]
    document = rows[:, DOCUMENT]
    index = torch.arange(rows.shape[2], device=rows.device)
    seen = (index[:, None] >= index) & (document[:, :, None] == document[:, None])
    beyond = index[None, :, None] > last[:, None]               # the query stands behind the entity
    decoy = (part == PART["decoy inner"]) | (part == PART["decoy last"])
    inner = part == PART["inner"]
    seen &= ~(inner[:, None] & beyond)
    seen &= ~(decoy[:, None] & ~beyond & ~decoy[:, :, None])
    seen &= ~(decoy[:, :, None] & inner[:, None] & (last[:, :, None] == last[:, None]))
    early = seen & ~((part == PART["last"])[:, None] & beyond)
    later = seen & ~((part == PART["decoy last"])[:, None] & beyond)
    return early[:, None], later[:, None]


def final_states(model, rows: torch.Tensor, dtype: torch.dtype, *, early: int) -> torch.Tensor:
    """Normed residual stream (B, T, d) under the masks; the first `early` blocks are early."""
    body = model.transformer
    state = body.wte(rows[:, ID]) + body.wpe(rows[:, POSITION])
    biases = []
    for seen in visible(rows):
        bias = torch.zeros(seen.shape, dtype=dtype, device=rows.device)
        biases.append(bias.masked_fill_(~seen, -1e4))
    with torch.autocast(rows.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        for number, block in enumerate(body.h):
            out = block(state, attention_mask=biases[number >= early])
            state = out[0] if isinstance(out, tuple) else out
        return body.ln_f(state)


def loss_of(model, rows: torch.Tensor, dtype: torch.dtype, *, early: int) -> torch.Tensor:
    """Weighted mean negative log-likelihood (nats) of rows (B, 6, T); products in `dtype`."""
    weight = rows[:, LOSS, 1:].float()
    learned = weight > 0
    hidden = final_states(model, rows, dtype, early=early)[:, :-1][learned].to(dtype)    # (N, d)
    logits = (hidden @ model.transformer.wte.weight.to(dtype).T).float()                # (N, V)
    nll = F.cross_entropy(logits, rows[:, ID, 1:][learned], reduction="none")
    return (nll * weight[learned]).sum() / weight[learned].sum()
