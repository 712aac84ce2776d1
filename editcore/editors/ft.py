"""FT-L: fine-tune one layer's MLP output projection within a small box (arXiv:2012.00363)."""

from dataclasses import dataclass, replace

import torch

from editcore.delta import Delta
from editcore.editors.settings import positive, real, whole
from editcore.editors.target_value import adam
from editcore.editors.teacher_forcing import check_finite, encode_batch, nll
from editcore.hooks import capture
from editcore.model import is_input_first, module_of, name_of
from editcore.progress import bar
from editcore.suffix import head, quick, resume, start


@dataclass(frozen=True)
class Settings:
    """Settings of FT-L; epsilon has no default, the rest is as published."""

    epsilon: positive()             # every weight stays within ± epsilon of where the edit began
    layer: whole(0, 999) = 0        # the edited layer: its MLP output projection, weight and bias
    lr: positive(1000) = 5e-4       # of Adam
    steps: whole(1, 10**5) = 25     # most steps
    stop_loss: real() = 0.01        # done once the mean loss of the facts is below
    last_position: bool = False     # read all target tokens at the prompt's end (published code)


PAPER = {   # published settings by model
    "gpt2-medium": {"epsilon": 2e-3},
    "gpt2-large": {"epsilon": 1e-3},
    "gpt2-xl": {"epsilon": 5e-4},
    "gpt-j-6b": {"epsilon": 5e-5},
    "pocket": {"epsilon": 0.02, "lr": 5e-3},
    "smollm2": {"epsilon": 5e-3},       # swept: at 1e-3 a third of the edits do not take
}


def edit(model, tok, facts, config, prepared=None):
    """Return the Delta that lowers the mean loss of the facts.

    The layer's output is its state plus k D + e, with k its keys, D = ΔW and e = Δb, so that only
    the blocks above it run at each step. ValueError names a record too long or with a broken loss.
    """
    name = name_of(model, "mlp_out", config.layer)
    module = module_of(model, "mlp_out", config.layer)
    batch = _batch(model, tok, facts, config.last_position)
    begin = torch.zeros_like(batch.begin)
    wanted = batch.begin[:, None] + batch.offsets
    with capture(model, [name], "input", stop=False) as inputs:
        state = start(model, batch.ids, batch.mask, begin=begin, layer=config.layer, wanted=wanted)
    keys = inputs[name]                                         # (n, T, m)
    d = state.hidden.shape[-1]
    shapes = [(keys.shape[-1], d)] + [(d,)] * (module.bias is not None)
    dtype = torch.promote_types(module.weight.dtype, torch.float32)
    change = [torch.zeros(shape, dtype=dtype, device=keys.device) for shape in shapes]
    with quick(model):
        losses, hits = _descend(model, state, keys.to(dtype), batch, change, facts=facts,
                                config=config)
    if not is_input_first(module):
        change[0] = change[0].T.contiguous()
    names = [name + ".weight", name + ".bias"]
    info = {"editor": "ft", "losses": (losses * len(facts)).tolist(), "hits": hits.tolist()}
    return Delta(dict(zip(names, change)), info)


def _batch(model, tok, facts, last_position):
    """The facts' Batch, its weights such that losses sum to the mean over facts."""
    batch = encode_batch(model, tok, facts)
    batch = replace(batch, weights=batch.weights / len(facts))
    if not last_position:
        return batch
    width = int(batch.begin.max()) + 1
    return replace(batch, ids=batch.ids[:, :width], mask=batch.mask[:, :width],
                   offsets=torch.zeros_like(batch.offsets[:, :1]))


def _descend(model, state, keys, batch, change, *, facts, config):
    """Run Adam on `change` ([D (m, d), e (d,) if there is one]) in place; (losses, hits) (n,)."""
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in change]
    for step in bar(range(config.steps), "steps of fine-tuning", delay=10):
        live = [part.clone().requires_grad_() for part in change]
        moved = keys @ live[0]
        for bias in live[1:]:
            moved = moved + bias
        final = resume(model, state, state.hidden + moved.to(state.hidden.dtype))
        logits = head(model, final).expand(-1, batch.targets.shape[1], -1)      # (n, s, V)
        losses = nll(logits, batch)
        check_finite(losses, facts, step + 1)
        loss = losses.sum()
        hits = (logits.argmax(-1) == batch.targets).all(1)
        if loss < config.stop_loss:
            break
        for part, pair, gradient in zip(change, moments, torch.autograd.grad(loss, live)):
            adam(part, pair, gradient, step=step + 1, lr=config.lr)
            part.clamp_(-config.epsilon, config.epsilon)
    return losses.detach(), hits
