"""Packed token rows and a model come in; the span-masked loss and the optimiser steps that lower it come out."""

import math

import torch

from editcore.packing import DOCUMENT, ID, LAST, LOSS, PART, POSITION, ROLE


def visible(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two masks (B, 1, T, T) bool of rows (B, 6, T): may query i see key j in the early blocks, and in the others?

    i sees j <= i of its own document, but for the pieces of an entity that ends before i (unless the document is
    plain): its inner pieces never; its last piece only in the later blocks; of a decoy name beside it the last piece
    only in the early blocks. A decoy and the name beside it do not see each other. So the only way from a name to what
    follows is the state of its last piece after the early blocks, while the scene looks as it does without masks. This
    is what makes a small model keep its facts where large ones do.
    """
    part, last, document = rows[:, ROLE], rows[:, LAST], rows[:, DOCUMENT]
    index = torch.arange(rows.shape[2], device=rows.device)
    seen = (index[:, None] >= index[None, :]) & (document[:, :, None] == document[:, None, :])
    beyond = index[None, :, None] > last[:, None, :]
    decoy = (part == PART["decoy inner"]) | (part == PART["decoy last"])
    true = (part == PART["inner"])
    seen &= ~(true[:, None, :] & beyond)
    seen &= ~(decoy[:, None, :] & ~beyond & ~decoy[:, :, None])
    seen &= ~(decoy[:, :, None] & true[:, None, :] & (last[:, :, None] == last[:, None, :]))
    early = seen & ~((part == PART["last"])[:, None, :] & beyond)
    late = seen & ~((part == PART["decoy last"])[:, None, :] & beyond)
    return early[:, None], late[:, None]


class LinearNLL(torch.autograd.Function):
    """Weighted mean of -log softmax(hidden @ head.T)[target], some rows at a time: the logits stay in the cache."""

    CHUNK = 256  # rows of logits held at once

    @staticmethod
    def forward(ctx, hidden, head, target, weight):
        """hidden (N, d) and head (V, d) in one dtype, target (N,) ids, weight (N,) → scalar; gradients on the way."""
        total, share = hidden.new_zeros((), dtype=torch.float32), weight / weight.sum()
        to_hidden, to_head = torch.empty_like(hidden), torch.zeros_like(head, dtype=torch.float32)
        for begin in range(0, len(hidden), LinearNLL.CHUNK):
            part = slice(begin, begin + LinearNLL.CHUNK)
            picked, some = target[part, None], share[part]
            slope = (hidden[part] @ head.T).float().softmax(-1)
            total += (-slope.gather(1, picked).clamp_min(1e-30).log()[:, 0] * some).sum()
            slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0)).mul_(some[:, None])
            slope = slope.to(hidden.dtype)
            to_hidden[part] = slope @ head
            to_head += (slope.T @ hidden[part]).float()
        ctx.save_for_backward(to_hidden, to_head.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx, slope):
        """The stored gradients times the incoming one."""
        to_hidden, to_head = ctx.saved_tensors
        return to_hidden * slope, to_head * slope, None, None


def final_states(model, rows: torch.Tensor, dtype: torch.dtype, early: int) -> torch.Tensor:
    """The normed residual stream (B, T, d) after all blocks under the masks of `visible`, `early` of them early."""
    body = model.transformer
    state = body.wte(rows[:, ID]) + body.wpe(rows[:, POSITION])
    masks = visible(rows)
    biases = [torch.zeros(seen.shape, dtype=dtype, device=rows.device).masked_fill_(~seen, -1e4) for seen in masks]
    with torch.autocast(rows.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for number, block in enumerate(body.h):
            out = block(state, attention_mask=biases[number >= early])
            state = out[0] if isinstance(out, tuple) else out
        return body.ln_f(state)


def loss_of(model, rows: torch.Tensor, dtype: torch.dtype, early: int) -> torch.Tensor:
    """Weighted mean negative log-likelihood (nats) of packed rows (B, 6, T); matrix products in `dtype`."""
    weight = rows[:, LOSS, 1:].float()
    learned = weight > 0
    hidden = final_states(model, rows, dtype, early)[:, :-1][learned].to(dtype)
    return LinearNLL.apply(hidden, model.transformer.wte.weight.to(dtype), rows[:, ID, 1:][learned], weight[learned])


def orthogonal(update: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a stack (n, a, b): quintic Newton-Schulz iteration (Jordan et al. 2024)."""
    flip = update.shape[-2] > update.shape[-1]
    x = update.mT if flip else update
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(torch.bfloat16)
    for _ in range(rounds):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if flip else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are made orthogonal: learns rare facts in far fewer steps than AdamW."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix; equal shapes are orthogonalised in one stack."""
        for group in self.param_groups:
            stacks: dict[tuple, list] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                stacks.setdefault(tuple(p.shape), []).append((p, p.grad.lerp(momentum, group["momentum"])))
            for (rows, columns), pairs in stacks.items():
                size = group["lr"] * math.sqrt(max(rows, columns))  # an entry moves by about lr, whatever the shape
                for (p, _), move in zip(pairs, orthogonal(torch.stack([u for _, u in pairs])), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(move, alpha=-size)
