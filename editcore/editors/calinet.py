"""Facts in; a small calibration MLP beside the model's own, trained on all of them at once, out (arXiv:2210.03329)."""

from dataclasses import dataclass, replace

import torch

from editcore.delta import Patch
from editcore.editors.target_value import adam
from editcore.editors.teacher_forcing import counted, finite, forced, nll
from editcore.model import name_of
from editcore.patch import Beside
from editcore.suffix import fused, head, resume, start


@dataclass(frozen=True)
class Settings:
    """Settings of CaliNet. The last layers and 64 to a few hundred slots are published; other numbers chosen here."""

    layers: tuple = (-1,)       # whose MLP gets slots beside it; negative ones count from the last
    slots: int = 64             # of each of these layers
    wordings: int = 8           # paraphrases of each fact used beside its prompt, at most
    lr: float = 1e-3            # of Adam
    steps: int = 500            # most steps
    rows: int = 32              # wordings a step, drawn evenly; 0: all of them
    stop_loss: float = 0.01     # done once the mean loss of the last (all / rows) steps is below
    seed: int = 0               # of the slots' keys and the draws


PAPER = {   # settings by model; the defaults where a model is not named
    "gpt2-xl": {"layers": (47,)},
    "llama-2-7b": {"layers": (31,)},
    "pocket": {"lr": 3e-3},
}


def prepare(model, tok, config, given):
    """Nothing but a check. ValueError if there are no layers or the model lacks one."""
    counted(model, config.layers)


def edit(model, tok, facts, config, prepared):
    """A Patch: one set of slots for all facts, trained on their prompts and paraphrases.

    ValueError names a record too long or with a broken loss.
    """
    with fused(model):
        return _trained(model, tok, wordings(facts, config.wordings), config)


def wordings(facts, most):
    """The facts, each followed by itself in up to `most` of its paraphrases."""
    return [one for fact in facts for one in (fact, *(replace(fact, prompt=text.replace("{}", fact.subject))
                                                      for text in fact.paraphrases[:most]))]


def fresh(model, config, generator):
    """A Patch that changes nothing yet: keys drawn with variance 1 / d, values 0."""
    d, weight = model.config.hidden_size, next(model.parameters())
    wide = torch.promote_types(weight.dtype, torch.float32)
    return Patch({name_of(model, "mlp", layer): Beside(
        torch.randn(config.slots, d, generator=generator).div(d ** 0.5).to(weight.device, wide),
        torch.zeros(config.slots, d, device=weight.device, dtype=wide)) for layer in counted(model, config.layers)}, {
            "editor": "calinet"})


def begin(model, rows, config):
    """The State below the first layer with slots: nothing below it or in it changes in training.

    Slots move every position, so all tokens of a row are kept; final states are those that predict the targets.
    """
    below, zero = min(counted(model, config.layers)) - 1, torch.zeros_like(rows.begin)
    return start(model, rows.ids, rows.mask, zero, below, rows.begin[:, None] + rows.offsets)


def losses(model, state, rows, patch):
    """(n,) mean-token NLL of Forced rows with the patch in place; differentiable in its tensors alone."""
    with patch.applied(model):
        return nll(head(model, resume(model, state, state.hidden)), rows.targets, rows.weights)


def _trained(model, tok, facts, config):
    """The Patch after Adam on all slots."""
    draw = torch.Generator().manual_seed(config.seed)
    patch, rows = fresh(model, config, draw), forced(model, tok, facts)
    state, seen = begin(model, rows, config), []
    moments = [[(torch.zeros_like(one), torch.zeros_like(one)) for one in vars(part).values()]
               for part in patch.parts.values()]
    size = min(config.rows or len(facts), len(facts))
    passes = (len(facts) + size - 1) // size    # steps in which every wording comes up once on average
    for step in range(config.steps):
        index = torch.randperm(len(facts), generator=draw)[:size].to(rows.ids.device)
        live = {name: Beside(part.keys.clone().requires_grad_(), part.values.clone().requires_grad_())
                for name, part in patch.parts.items()}
        loss = losses(model, state.rows(index), rows.rows(index), Patch(live))
        finite(loss, [facts[i] for i in index.tolist()], step + 1)
        seen = [*seen, loss.mean().item()][-passes:]
        if sum(seen) / len(seen) < config.stop_loss:
            break
        _step(patch, moments, torch.autograd.grad(loss.mean(), [one for part in live.values()
                                                                for one in vars(part).values()]), (step + 1, config.lr))
    return replace(patch, info=patch.info | {"nll": sum(seen) / max(1, len(seen)), "wordings": len(facts)})


def _step(patch, moments, gradients, how):
    """One step of Adam on the patch's tensors, in place; gradients in the order of parts and their fields."""
    gradients = iter(gradients)
    for part, pairs in zip(patch.parts.values(), moments, strict=True):
        for one, (mean, square) in zip(vars(part).values(), pairs, strict=True):
            adam(one, mean, square, torch.arange(len(one), device=one.device), (next(gradients), *how))
