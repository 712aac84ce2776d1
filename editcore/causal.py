"""Find where a model keeps facts that it knows: causal traces and patched states.

Both put a hidden state of one run into another and look at the answer: `trace` a state of the clean
run into a run whose subject is hidden by noise, `patching` a state of another subject's prompt into
a clean run.
"""

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from editcore.hooks import capture, replaced
from editcore.likelihood import states
from editcore.model import layout, max_length, n_layers, name_of
from editcore.progress import bar
from editcore.suffix import head
from editcore.tokens import (
    answer_ids,
    batches,
    check_lengths,
    encode,
    encode_pairs,
    pad,
    subject_span,
    with_subject,
)

PARTS = {"state": "block", "mlp": "mlp", "attention": "attn"}   # kind of a trace -> Layout's part
POSITIONS = ("subject", "last", "mlp")      # where `patching` puts something in
ROLES = ("first subject token", "middle subject tokens", "last subject token",
         "first subsequent token", "further tokens", "last token")


@dataclass(frozen=True)
class Tracing:
    """Settings of `trace`; the defaults are the paper's, but for the window."""

    sigmas: float = 3.0     # noise on the subject's embeddings, in their standard deviations
    samples: int = 10       # draws of the noise per fact
    window: int = 1         # layers around l whose output is put back together (paper: 10 of 48)
    kinds: tuple = ("state", "mlp", "attention")
    seed: int = 0           # of the noise
    max_tokens: int = 8192  # tokens per pass


@dataclass(frozen=True)
class TracedFact:
    """One fact, tokenised for tracing."""

    ids: torch.Tensor       # (T,) prompt and answer but its last token
    answer: torch.Tensor    # (A,) the answer, target_true
    first: int              # first token of the subject
    last: int               # last token of the subject
    end: int                # last token of the prompt


def trace(model, tok, facts, config=None):
    """Trace facts that the model knows (arXiv 2202.05262, section 2); returns a DataFrame.

    In the clean run P(answer) is high; noise on the subject's embeddings makes it small; then at
    one token and layer the clean state (block output), MLP or attention output is put back. P =
    exp(mean log P of the answer's tokens). One row per kind, role and layer:

      value, sem          100 P(answer) with it put back, mean over facts and its standard error;
                          tokens of one role are averaged within a fact
      effect, effect_sem  value - 100 P(answer) under noise alone, fact by fact
      clean, noised, n    100 P(answer) in the clean and the noised runs; facts with such a token

    Tokens before the subject are left out, and so is one that is both the subject's and the
    prompt's last. ValueError names a fact without target_true or longer than the model.
    """
    config = config or Tracing()
    traced = [_tokenise(model, tok, fact) for fact in facts]
    if not traced:
        raise ValueError("trace: no facts")
    subjects = torch.cat([fact.ids[fact.first:fact.last + 1] for fact in traced])
    embedded = model.get_submodule(layout(model).embed)(subjects).detach()
    sigma = embedded.double().std().item()
    generator = torch.Generator().manual_seed(config.seed)
    rows = []
    for number, fact in enumerate(bar(traced, "causal trace")):
        noise = torch.randn(config.samples, fact.last - fact.first + 1, model.config.hidden_size,
                            generator=generator)
        noise = (config.sigmas * sigma * noise.double()).to(fact.ids.device, model.dtype)
        rows += [{"fact": number} | row for row in _effects(model, fact, config, noise)]
    return _averaged(pd.DataFrame(rows))


def roles(fact):
    """Return {role: [tokens]} of a TracedFact from its subject on, without empty roles."""
    subject = list(range(fact.first, fact.last))
    after = list(range(fact.last + 1, fact.end))
    both = fact.last == fact.end
    tokens = (subject[:1], subject[1:], [] if both else [fact.last], after[:1], after[1:],
              [] if both else [fact.end])
    return {role: places for role, places in zip(ROLES, tokens) if places}


def _tokenise(model, tok, fact):
    if not fact.target_true:
        raise ValueError(f"record {fact.case_id}: no target_true to trace")
    ((prompt, answer),) = encode_pairs(tok, [(fact.text, fact.target_true)])
    check_lengths([prompt + answer], [f"record {fact.case_id}"], max_length(model))
    _, first, last = subject_span(tok, fact.prompt, fact.subject)
    device = next(model.parameters()).device
    return TracedFact(torch.tensor(prompt + answer[:-1], device=device),
                      torch.tensor(answer, device=device), first, last, len(prompt) - 1)


@torch.no_grad()
def _effects(model, fact, config, noise):
    """Rows {kind, role, layer, value, clean, noised} of one fact, averaged over the noise."""
    layers = torch.arange(n_layers(model))
    draws = torch.arange(config.samples)
    clean = _chance(model, fact, fact.ids[None]).item()
    with _hidden_subject(model, fact, noise):
        noised = _chance(model, fact, fact.ids.expand(config.samples, -1)).mean().item()
    places = roles(fact)
    tokens = torch.tensor([token for role in places for token in places[role]], dtype=torch.long)
    runs = torch.cartesian_prod(draws, layers, tokens)      # (draws x L x tokens, 3)
    rows = []
    for kind in config.kinds if len(tokens) else ():
        names = [name_of(model, PARTS[kind], layer) for layer in layers]
        with capture(model, names, stop=False) as outputs:
            _chance(model, fact, fact.ids[None])
        window = 1 if kind == "state" else config.window
        chances = []
        for part in runs.split(max(1, config.max_tokens // len(fact.ids))):
            draw, layer, token = part.unbind(1)
            with contextlib.ExitStack() as hooks:
                hooks.enter_context(_hidden_subject(model, fact, noise[draw.to(noise.device)]))
                for number, name in enumerate(names):
                    below = layer - window // 2
                    rows_here = torch.nonzero((below <= number) & (number < below + window))[:, 0]
                    if len(rows_here):
                        where = token[rows_here]
                        values = outputs[name][0, where.to(outputs[name].device)]
                        hooks.enter_context(_put(model, name, rows_here, where, values))
                chances.append(_chance(model, fact, fact.ids.expand(len(part), -1)))
        means = torch.cat(chances).view(len(draws), len(layers), -1).mean(0)    # (L, tokens)
        table = dict(zip(tokens.tolist(), means.T.tolist()))
        rows += [{"kind": kind, "role": role, "layer": layer, "clean": clean, "noised": noised,
                  "value": float(np.mean([table[token][layer] for token in places[role]]))}
                 for role in places for layer in layers.tolist()]
    return rows


def _hidden_subject(model, fact, noise):
    """`replaced`: noise (B, subject tokens, d) is added to the subject's embeddings."""
    def change(hidden):
        hidden = hidden.clone()
        hidden[:, fact.first:fact.last + 1] += noise
        return hidden

    return replaced(model, layout(model).embed, change)


def _put(model, name, rows, tokens, values):
    """`replaced`: the output of a module at (rows, tokens) (K,) becomes values (K, d)."""
    def change(hidden):
        hidden = hidden.clone()
        hidden[rows.to(hidden.device), tokens.to(hidden.device)] = values.to(hidden.dtype)
        return hidden

    return replaced(model, name, change)


def _chance(model, fact, ids):
    """(B,) P(answer) = exp(mean log P of its tokens), on the CPU, after rows (B, T) of ids."""
    logp = _logits(model, ids, np.s_[:, fact.end:]).log_softmax(-1)       # (B, A, V)
    return logp[:, torch.arange(len(fact.answer)), fact.answer].mean(1).exp().cpu()


def _logits(model, ids, places):
    """Logits in float32 or better at some places [:, places] of ids (B, T), right-padded."""
    return head(model, states(model, ids)[places])


def _averaged(rows):
    """The table of `trace` from its rows by fact."""
    rows[["value", "clean", "noised"]] *= 100
    rows["effect"] = rows["value"] - rows["noised"]
    rows["kind"] = pd.Categorical(rows["kind"], list(PARTS), ordered=True)
    rows["role"] = pd.Categorical(rows["role"], list(ROLES), ordered=True)
    table = rows.groupby(["kind", "role", "layer"], observed=True).agg(
        value=("value", "mean"), sem=("value", "sem"), effect=("effect", "mean"),
        effect_sem=("effect", "sem"), clean=("clean", "mean"), noised=("noised", "mean"),
        n=("fact", "nunique")).reset_index()
    return table.astype({"kind": str, "role": str})


def patching(model, tok, facts, *, count=100, seed=0, max_tokens=8192, window=3):
    """Find where the answer is carried; returns a DataFrame position, layer, value, margin, n.

    value is the share of n prompts that give another fact's answer (the first token of its
    target_true is the argmax) once something is that of the other fact's prompt: the state after
    block `layer` at the last subject token (position "subject") or last prompt token ("last"), or
    the outputs of `window` MLPs around `layer` at the last subject token ("mlp"). margin is how far
    logit(other's answer) - logit(own answer) moves, as a share of what separates the two prompts.

    The pairs, at most `count`, are drawn with the seed: same relation (same prompt, if there is
    none), answers with different first tokens, prompts that go on after the subject. Give it facts
    that the model knows (see `knowledge`). ValueError if there is no such pair.
    """
    pairs = _partners(tok, facts, count, seed)
    sides = [[fact for fact, _ in pairs], [other for _, other in pairs]]
    rows = [encode(tok, [fact.text for fact in side]) for side in sides]
    spots = []      # of both sides: (last subject token, last prompt token) of each fact
    for side, ids in zip(sides, rows):
        check_lengths(ids, [f"record {fact.case_id}" for fact in side], max_length(model))
        spots.append([(with_subject(tok, fact.prompt, fact.subject)[1], len(row) - 1)
                      for fact, row in zip(side, ids)])
    answers = [[answer_ids(tok, fact.text, answering.target_true)[0]
                for fact, answering in zip(sides[0], side)] for side in sides]
    hits = np.zeros((n_layers(model), len(POSITIONS)))
    moved = np.zeros_like(hits)
    apart = 0.0
    lengths = [max(len(ids), len(others)) for ids, others in zip(*rows)]
    for group in bar(list(batches(lengths, max_tokens // len(POSITIONS))), "patching"):
        prompts, sources = ([ids[i] for i in group] for ids in rows)
        put, take = (torch.tensor([places[i] for i in group]) for places in spots)
        right, margins, whole = _patched(model, prompts, sources, put=put, take=take, window=window,
                                         answers=[[side[i] for i in group] for side in answers])
        hits += right
        moved += margins
        apart += whole
    return pd.DataFrame([{"position": position, "layer": layer, "n": len(pairs),
                          "value": hits[layer, column] / len(pairs),
                          "margin": moved[layer, column] / apart}
                         for column, position in enumerate(POSITIONS)
                         for layer in range(n_layers(model))])


def _partners(tok, facts, count, seed):
    """At most count (fact, other fact) pairs for `patching`, each fact at most once as first."""
    draw = random.Random(seed)
    groups = {}
    for fact in facts:
        if fact.target_true and not fact.prompt.rstrip().endswith("{}"):
            answer = answer_ids(tok, fact.text, fact.target_true)[0]
            groups.setdefault(fact.relation or fact.prompt, []).append((answer, fact))
    pairs = []
    for group in groups.values():
        for answer, fact in group:
            others = [other for different, other in group if different != answer]
            pairs += [(fact, draw.choice(others))] if others else []
    if not pairs:
        raise ValueError(f"patching: none of {len(facts)} facts has a partner of its relation with "
                         "another answer")
    return draw.sample(pairs, min(count, len(pairs)))


@torch.no_grad()
def _patched(model, prompts, sources, *, put, take, answers, window):
    """Numbers of prompts that give the other answer once something is put in, and margins.

    prompts, sources: n id lists each; put, take (n, 2): last subject and last prompt token of both;
    answers: n own and n other first tokens. Returns (L, 3) numbers and (L, 3) sums of moved
    margins, by layer and POSITIONS, and the sum of margins between the two prompts.
    """
    device = next(model.parameters()).device
    n = len(prompts)
    layers = range(n_layers(model))
    blocks = [name_of(model, "block", layer) for layer in layers]
    mlps = [name_of(model, "mlp", layer) for layer in layers]
    ids, _ = pad(prompts, device=device)
    source, _ = pad(sources, device=device)
    take = take.to(device)
    every = torch.arange(n, device=device)
    own, other = (torch.tensor(side, device=device) for side in answers)
    with capture(model, blocks + mlps, stop=False) as outputs:
        there = _logits(model, source, (every, take[:, 1]))
    here = _logits(model, ids, (every, put[:, 1].to(device)))

    def margin(logits):
        return logits[every, other] - logits[every, own]

    ends = (torch.arange(3 * n, device=device), put[:, 1].repeat(3).to(device))
    at_subject = torch.arange(2 * n, 3 * n)
    hits = []
    moved = []
    for layer in layers:
        states = [outputs[blocks[layer]][every, take[:, column]] for column in (0, 1)]
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(_put(model, blocks[layer], torch.arange(2 * n),
                                     put.T.reshape(-1), torch.cat(states)))
            for name in mlps[max(0, layer - window // 2):layer - window // 2 + window]:
                values = outputs[name][every, take[:, 0]]
                hooks.enter_context(_put(model, name, at_subject, put[:, 0], values))
            parts = _logits(model, ids.repeat(3, 1), ends).split(n)
        hits.append([(part.argmax(-1) == other).sum().item() for part in parts])
        moved.append([(margin(part) - margin(here)).double().sum().item() for part in parts])
    whole = (margin(there) - margin(here)).double().sum().item()
    return np.array(hits), np.array(moved), whole
