"""Edit with KE: a network reads the text of an edit and masks its gradient (arXiv:2104.08164).

A bidirectional LSTM reads "old >> new || prompt" into c; for each edited matrix W (out, in) two
linear layers turn c into r_A, r_B (out), c_A, c_B (in) and a gate g; with eta = scale sigmoid(g)

    dW = eta (softmax(r_A) c_A^T * grad_W L + softmax(r_B) c_B^T).

Over b tokens grad_W L is a sum of b outer products, so dW has rank b + 1 and stays two factors.
"""

from dataclasses import dataclass

import torch
from torch import nn

from editcore.editors.settings import ascending, positive, whole
from editcore.generate import continuations
from editcore.instructedit import mend
from editcore.instructedit.mend import edit, edit_groups
from editcore.tokens import answer_ids, encode

__all__ = ["PAPER", "KeNetwork", "Settings", "edit", "edit_groups", "prepare"]

START = 1e-3                # size of c_A and c_B before training, beside that of all other outputs


@dataclass(frozen=True)
class Settings:
    """Settings of KE; network is needed to edit, what follows scale to begin a training."""

    network: str = ""               # file of the trained network, or "untrained"
    layers: ascending(-999) = (-3, -2, -1)    # edited blocks; negative ones count from the last
    scale: positive() = 1.0         # largest eta
    hidden: whole(1) = 512          # state of the LSTM, per direction
    width: whole(1) = 768           # of c
    inner: whole(1) = 128           # hidden layer of each matrix's network
    seed: whole() = 0               # of the first parameters


PAPER = {   # layers as published for the editors compared; what learns fast on the pocket model
    "gpt2-xl": {"layers": (45, 46, 47)},
    "llama-2-7b": {"layers": (29, 30, 31)},
    "pocket": {"layers": (-2, -1), "scale": 30.0, "hidden": 64, "width": 64, "inner": 32},
    "smollm2": {"layers": (-3, -2, -1), "scale": 300.0, "hidden": 128, "width": 128, "inner": 64},
}


class KeNetwork(nn.Module):
    """KE's network: one LSTM, and two linear layers per edited matrix."""

    format = "editcore-ke-2"
    fixed = ("layers", "embedded")      # settings that an edit shares with it

    def __init__(self, sites, settings):
        super().__init__()
        self.sites = tuple(sites)
        self.settings = dict(settings)
        hidden, width, inner = (settings[name] for name in ("hidden", "width", "inner"))
        with torch.device("meta"):      # all weights are drawn below, from the seed
            self.lstm = nn.LSTM(settings["embedded"], hidden, bidirectional=True)
            self.condition = nn.Linear(2 * hidden, width)
            self.maps = nn.ModuleList(nn.ModuleDict({
                "first": nn.Linear(width, inner),
                "second": nn.Linear(inner, 2 * (site.inputs + site.outputs) + 1),
            }) for site in self.sites)
        self.to_empty(device="cpu")
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draw weights as torch's layers do, but c_A and c_B (and with them dW) nearly 0."""
        generator = torch.Generator().manual_seed(self.settings["seed"])
        for name, weight in self.named_parameters():
            size = self.settings["hidden"] if name.startswith("lstm") else weight.shape[-1]
            weight.copy_((torch.rand(weight.shape, generator=generator) * 2 - 1) * size ** -0.5)
        for site, own in zip(self.sites, self.maps):
            for weight in own["second"].parameters():
                weight[2 * site.outputs:-1] *= START

    def forward(self, gradients, condition):
        """{map: (u~ (b + 1, in), delta~ (b + 1, out))} with dW = -delta~^T u~.

        gradients: {map: (u (b, in), delta (b, out))}; condition (T, d): the text's embeddings.
        """
        _, (last, _) = self.lstm(condition.to(self.condition.weight.dtype)[:, None])
        c = self.condition(last[:, 0].flatten())
        factors = {}
        for site, own in zip(self.sites, self.maps):
            u, delta = gradients[site.name]
            outputs = own["second"](torch.tanh(own["first"](c)))
            r_a, r_b, c_a, c_b, gate = outputs.split(
                [site.outputs, site.outputs, site.inputs, site.inputs, 1])
            left = torch.cat([delta * r_a.softmax(0), r_b.softmax(0)[None]])
            eta = self.settings["scale"] * gate.sigmoid()
            factors[site.name] = (torch.cat([u * c_a, c_b[None]]), -eta * left)
        return factors

    def observe(self, gradients):
        """Nothing: KE normalises no gradients."""

    def steps(self):
        """{map: 1}: the gate is in the factors."""
        return {site.name: 1.0 for site in self.sites}

    def conditions(self, model, tok, facts):
        """Token ids of "old >> new || prompt" per fact; an unknown old answer is the model's."""
        old = [fact.target_true for fact in facts]
        unknown = {}
        for index, fact in enumerate(facts):
            if not old[index]:
                count = len(answer_ids(tok, fact.text, fact.target_new))
                unknown.setdefault(count, []).append(index)
        for count, group in unknown.items():
            answers = continuations(model, tok, [facts[index].text for index in group], count)
            for index, ids in zip(group, answers):
                old[index] = tok.decode(ids).strip()
        return encode(tok, [f"{answer} >> {fact.target_new} || {fact.text}"
                            for answer, fact in zip(old, facts)])


def prepare(model, tok, config, inputs=None):
    """The KeNetwork of config.network, checked against the model."""
    return mend.prepared(KeNetwork, model, config, {"embedded": model.config.hidden_size})
