"""CaliNet: a small MLP beside the model's own, trained on all facts at once (arXiv:2210.03329)."""

from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch

from editcore.delta import Patch
from editcore.editors.settings import ascending, positive, real, whole
from editcore.editors.target_value import adam
from editcore.editors.teacher_forcing import check_finite, encode_batch, nll
from editcore.model import n_layers, name_of
from editcore.suffix import head, quick, resume, start


@dataclass(frozen=True)
class Settings:
    """Settings of CaliNet. Published are the last layers and 64 to a few hundred slots."""

    layers: ascending(-999) = (-1,)     # whose MLP gets slots; negative ones count from the end
    slots: whole(1) = 64        # of each of these layers
    wordings: whole() = 8       # paraphrases of each fact used beside its prompt, at most
    lr: positive(1000) = 1e-3   # of Adam
    steps: whole(1, 10**6) = 500    # most steps
    rows: whole() = 32          # wordings per step, drawn evenly; 0: all of them
    stop_loss: real() = 0.01    # done once the mean loss of the last (all / rows) steps is below
    seed: whole() = 0           # of the slots' keys and the draws


PAPER = {   # settings by model; the defaults where a model is not named
    "gpt2-xl": {"layers": (47,)},
    "llama-2-7b": {"layers": (31,)},
    "pocket": {"lr": 3e-3},
    "smollm2": {"layers": (29,), "lr": 3e-3},
}


@dataclass(frozen=True)
class Slots:
    """A part of a Patch: y + GELU(x Kᵀ) V at the output y of an MLP with input x."""

    keys: torch.Tensor      # (s, d) K
    values: torch.Tensor    # (s, d) V
    kind: ClassVar = "slots"

    def output(self, x, y, positions=None):
        """Return y (B, T, d) with the slots' answer to x (B, T, d) added, at every position."""
        keys = self.keys.to(x.device)
        values = self.values.to(x.device)
        answer = torch.nn.functional.gelu(x.to(keys.dtype) @ keys.T) @ values
        return y + answer.to(y.dtype)

    def __add__(self, other):
        """Join the slots of both, which is the sum of their answers."""
        return Slots(torch.cat([self.keys, other.keys]), torch.cat([self.values, other.values]))

    def fits(self, module, width):
        """Say whether keys and values have the model's width."""
        return self.keys.shape == self.values.shape == (len(self.keys), width)


def edit(model, tok, facts, config, prepared=None):
    """Return a Patch: one set of slots for all facts, trained on prompts and paraphrases."""
    facts = worded(facts, config.wordings)
    batch = encode_batch(model, tok, facts)
    generator = torch.Generator().manual_seed(config.seed)
    patch = empty_slots(model, config, generator)
    with quick(model):
        loss = _descend(model, batch, patch, generator, facts=facts, config=config)
    return replace(patch, info={"editor": "calinet", "nll": loss, "wordings": len(facts)})


def layer_numbers(model, layers):
    """Return the layers counted from 0."""
    return [layer + n_layers(model) if layer < 0 else layer for layer in layers]


def worded(facts, most):
    """Return the facts, each followed by itself in up to `most` of its paraphrases."""
    wordings = []
    for fact in facts:
        prompts = [text.replace("{}", fact.subject) for text in fact.paraphrases[:most]]
        wordings += [fact, *(replace(fact, prompt=prompt) for prompt in prompts)]
    return wordings


def empty_slots(model, config, generator):
    """Return a Patch that changes nothing yet: keys drawn with variance 1 / d, values 0."""
    d = model.config.hidden_size
    weight = next(model.parameters())
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts = {}
    for layer in layer_numbers(model, config.layers):
        keys = torch.randn(config.slots, d, generator=generator).div(d ** 0.5)
        keys = keys.to(weight.device, wide)
        parts[name_of(model, "mlp", layer)] = Slots(keys, torch.zeros_like(keys))
    return Patch(parts)


def below_slots(model, batch, config):
    """Return the State below the first layer with slots, which move every position of a row."""
    below = min(layer_numbers(model, config.layers)) - 1
    begin = torch.zeros_like(batch.begin)
    return start(model, batch.ids, batch.mask, begin=begin, layer=below,
                 wanted=batch.begin[:, None] + batch.offsets)


def losses(model, state, batch, patch):
    """Return (n,) mean-token NLL of a Batch with the patch in place; its tensors have gradients."""
    with patch.applied(model):
        return nll(head(model, resume(model, state, state.hidden)), batch)


def _descend(model, batch, patch, generator, *, facts, config):
    """Run Adam on the tensors of `patch`, in place; returns the mean loss of the last steps."""
    state = below_slots(model, batch, config)
    tensors = list(chain(*((part.keys, part.values) for part in patch.parts.values())))
    moments = [(torch.zeros_like(tensor), torch.zeros_like(tensor)) for tensor in tensors]
    size = min(config.rows or len(facts), len(facts))
    passes = (len(facts) + size - 1) // size    # in which every wording comes up once on average
    recent = []
    for step in range(config.steps):
        index = torch.randperm(len(facts), generator=generator)[:size].to(batch.ids.device)
        for tensor in tensors:
            tensor.requires_grad_()
        loss = losses(model, state.rows(index), batch.rows(index), patch)
        gradients = torch.autograd.grad(loss.mean(), tensors)
        for tensor in tensors:
            tensor.requires_grad_(False)
        check_finite(loss, [facts[i] for i in index.tolist()], step + 1)
        recent = [*recent, loss.mean().item()][-passes:]
        if sum(recent) / len(recent) < config.stop_loss:
            break
        for tensor, pair, gradient in zip(tensors, moments, gradients, strict=True):
            adam(tensor, pair, gradient, step=step + 1, lr=config.lr)
    return sum(recent) / max(1, len(recent))
