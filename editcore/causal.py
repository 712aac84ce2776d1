"""A model and facts that it knows in; tidy tables of where it keeps them out: causal traces and patched states.

Both put a hidden state of one run into another and look at the answer: `trace` a state of the clean run into a run
whose subject is hidden by noise, `patching` a state of another subject into a clean run.
"""

import contextlib
import random
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from editcore.hooks import capture, replaced, run
from editcore.likelihood import plan, read, states
from editcore.model import layout, max_length, n_layers, name_of
from editcore.progress import bar
from editcore.tokens import batches, check_lengths, encode, pad, subject_span, target_ids

PARTS = {"state": "block", "mlp": "mlp", "attention": "attn"}     # kind of a trace -> part of the layout
ROLES = ("first subject token", "middle subject tokens", "last subject token", "first subsequent token",
         "further tokens", "last token")


@dataclass(frozen=True)
class Tracing:
    """Settings of `trace`; the defaults are the paper's, but for the window."""

    sigmas: float = 3.0         # noise on the subject's embeddings, in standard deviations of such embeddings
    samples: int = 10           # draws of the noise a fact
    window: int = 1             # layers around l whose MLP or attention output is put back together (paper: 10 of 48)
    kinds: tuple = ("state", "mlp", "attention")
    seed: int = 0               # of the noise
    max_tokens: int = 8192      # tokens a pass


@dataclass(frozen=True)
class Case:
    """One fact, tokenised for tracing."""

    ids: torch.Tensor       # (T,) prompt and answer but its last token
    answer: torch.Tensor    # (A,) the answer, target_true
    first: int              # first token of the subject
    last: int               # last token of the subject
    end: int                # last token of the prompt


def known(model, tok, facts):
    """The facts whose target_true the model completes the prompt with: every token the most likely, teacher-forced."""
    asked = [fact for fact in facts if fact.target_true]
    pairs = [(ids, target_ids(tok, fact.target_true)) for ids, fact in zip(encode(tok, [f.text for f in asked]), asked)]
    check_lengths([prompt + target for prompt, target in pairs], [f"record {f.case_id}" for f in asked],
                  max_length(model))
    right = read(model, plan(model, pairs)).exact if pairs else []
    return [fact for fact, exact in zip(asked, right) if exact]


def trace(model, tok, facts, config=None):
    """Causal traces of facts that the model knows (arXiv 2202.05262, section 2): a DataFrame.

    In the clean run P(answer) is high; noise on the subject's embeddings makes it small; then at one token and layer
    the clean state (block output), MLP or attention output is put back. P = exp(mean log P of the answer's tokens).
      kind, role, layer   one row each: what was put back and where; tokens of one role are averaged within a fact
      value, sem          100 P(answer) with it put back: mean over facts and its standard error
      effect, effect_sem  the indirect effect: value - 100 P(answer) under noise alone, fact by fact
      clean, noised, n    100 P(answer) in the clean and in the noised runs; facts that have such a token
    Tokens before the subject are left out (nothing there has changed), and so is a token that is both the subject's
    and the prompt's last. ValueError names a fact without target_true or longer than the model.
    """
    config = config or Tracing()
    cases = [_case(model, tok, fact) for fact in facts]
    if not cases:
        raise ValueError("trace: no facts")
    sigma = _spread(model, cases)
    generator = torch.Generator().manual_seed(config.seed)
    rows = []
    for number, case in enumerate(bar(cases, "causal trace")):
        rows += [{"fact": number} | row for row in _effects(model, case, config, sigma, generator)]
    return _averaged(pd.DataFrame(rows))


def roles(case):
    """{role: [tokens]} of a case's prompt from the subject on; a role without tokens is absent."""
    subject, after = list(range(case.first, case.last)), list(range(case.last + 1, case.end))
    whole = {ROLES[0]: subject[:1], ROLES[1]: subject[1:], ROLES[2]: [case.last], ROLES[3]: after[:1],
             ROLES[4]: after[1:], ROLES[5]: [case.end]}
    if case.last == case.end:
        whole[ROLES[2]] = whole[ROLES[5]] = []
    return {role: tokens for role, tokens in whole.items() if tokens}


def _case(model, tok, fact):
    if not fact.target_true:
        raise ValueError(f"record {fact.case_id}: no target_true to trace")
    (prompt,), answer = encode(tok, [fact.text]), target_ids(tok, fact.target_true)
    check_lengths([prompt + answer], [f"record {fact.case_id}"], max_length(model))
    first, last = subject_span(tok, fact.prompt, fact.subject)
    device = next(model.parameters()).device
    return Case(torch.tensor(prompt + answer[:-1], device=device), torch.tensor(answer, device=device), first, last,
                len(prompt) - 1)


@torch.no_grad()
def _spread(model, cases):
    """Standard deviation over all entries of the embeddings of all subject tokens, a float."""
    embed = model.get_submodule(layout(model).embed)
    return embed(torch.cat([case.ids[case.first:case.last + 1] for case in cases])).double().std().item()


@torch.no_grad()
def _effects(model, case, config, sigma, generator):
    """Rows {kind, role, layer, value, clean, noised} of one fact: P(answer), averaged over the noise."""
    noise = torch.randn(config.samples, case.last - case.first + 1, model.config.hidden_size, generator=generator)
    noise = (config.sigmas * sigma * noise.double()).to(case.ids.device, model.dtype)
    drawn = torch.arange(config.samples)
    clean = _chance(model, case, case.ids[None]).item()
    noised = _noised(model, case, noise, (drawn, drawn * 0, drawn * 0), ()).mean().item()
    spots, rows = roles(case), []
    tokens = torch.tensor([token for several in spots.values() for token in several], dtype=torch.long)
    grid = torch.cartesian_prod(drawn, torch.arange(n_layers(model)), tokens)       # (rows, 3)
    for kind in config.kinds if len(tokens) else ():
        names = [name_of(model, PARTS[kind], layer) for layer in range(n_layers(model))]
        with capture(model, names, stop=False) as kept:
            _chance(model, case, case.ids[None])
        put = [kept[name][0] for name in names], names, 1 if kind == "state" else config.window
        chances = torch.cat([_noised(model, case, noise, part.unbind(1), put)
                             for part in grid.split(max(1, config.max_tokens // len(case.ids)))])
        table = dict(zip(tokens.tolist(), chances.view(config.samples, n_layers(model), -1).mean(0).T.tolist()))
        rows += [{"kind": kind, "role": role, "layer": layer, "clean": clean, "noised": noised,
                  "value": float(np.mean([table[token][layer] for token in several]))}
                 for role, several in spots.items() for layer in range(n_layers(model))]
    return rows


def _noised(model, case, noise, rows, put):
    """(B,) P(answer), on the CPU, of B noised runs of one prompt.

    noise (S, subject tokens, d); rows: (draw, layer, token), each (B,) on the CPU; put: () or (clean outputs (T, d) of
    every layer, their modules' names, window).
    """
    draw, layer, token = rows

    def hide(hidden):
        hidden = hidden.clone()
        hidden[:, case.first:case.last + 1] += noise[draw.to(hidden.device)]
        return hidden

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(replaced(model, layout(model).embed, hide))
        for number, (values, name) in enumerate(zip(*put[:2])):
            below = layer - put[2] // 2
            where = torch.nonzero((below <= number) & (number < below + put[2]))[:, 0]
            if len(where):
                hooks.enter_context(_put(model, name, where, token[where], values[token[where].to(values.device)]))
        return _chance(model, case, case.ids.expand(len(draw), -1))


def _put(model, name, rows, tokens, values):
    """`replaced`: the output of a module at (rows, tokens) (K,) becomes values (K, d)."""
    def change(hidden):
        hidden = hidden.clone()
        hidden[rows.to(hidden.device), tokens.to(hidden.device)] = values.to(hidden.dtype)
        return hidden

    return replaced(model, name, change)


def _chance(model, case, ids):
    """(B,) P(answer) = exp(mean log P of its tokens), on the CPU, after B rows (B, T) of the case's ids."""
    logp = _logits(model, ids, slice(case.end, None)).log_softmax(-1)               # (B, A, V)
    return logp[:, torch.arange(len(case.answer)), case.answer].mean(1).exp().cpu()


def _logits(model, ids, places):
    """Logits in float32 or better at some places [:, places] of a pass over ids (B, T), right-padded."""
    hidden = states(model, ids)
    logits = model.get_output_embeddings()(hidden[:, places] if isinstance(places, slice) else hidden[places])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _averaged(rows):
    """The table of `trace` from its rows by fact."""
    scaled = rows.assign(**{name: 100 * rows[name] for name in ("value", "clean", "noised")})
    scaled["effect"] = scaled["value"] - scaled["noised"]
    groups = scaled.groupby(["kind", "role", "layer"], sort=False)
    table = groups.agg(value=("value", "mean"), sem=("value", "sem"), effect=("effect", "mean"),
                       effect_sem=("effect", "sem"), clean=("clean", "mean"), noised=("noised", "mean"),
                       n=("fact", "nunique")).reset_index()
    order = pd.Series({role: number for number, role in enumerate(ROLES)})
    kinds = pd.Series({kind: number for number, kind in enumerate(PARTS)})
    keys = pd.DataFrame({"kind": table["kind"].map(kinds), "role": table["role"].map(order), "layer": table["layer"]})
    return table.loc[keys.sort_values(["kind", "role", "layer"]).index].reset_index(drop=True)


def patching(model, tok, facts, count=100, seed=0, max_tokens=8192):
    """Where the answer is carried: a DataFrame position, layer, value, n.

    value is the share of n prompts that give another fact's answer (the first token of its target_true is the argmax)
    once the state after block `layer` at the last subject token (position "subject") or last prompt token ("last") is
    that of the other fact's prompt. The pairs, at most `count`, are drawn with the seed: same relation (same prompt,
    if there is none), answers with different first tokens, prompts that go on after the subject. Give it facts that the
    model knows (see `known`). ValueError if there is no such pair.
    """
    pairs = _partners(tok, facts, count, seed)
    rows = [encode(tok, [fact.text for fact in side]) for side in zip(*pairs)]
    spots = [[(subject_span(tok, fact.prompt, fact.subject)[1], len(row) - 1) for fact, row in zip(side, ids)]
             for side, ids in zip(zip(*pairs), rows)]
    answers = [target_ids(tok, other.target_true)[0] for _, other in pairs]
    check_lengths([row for side in rows for row in side], [f"record {fact.case_id}" for side in zip(*pairs)
                                                           for fact in side], max_length(model))
    hits = np.zeros((n_layers(model), 2))
    for group in batches([max(len(rows[0][i]), len(rows[1][i])) for i in range(len(pairs))], max_tokens // 2):
        hits += _patched(model, [[side[i] for i in group] for side in rows],
                         torch.tensor([[side[i] for i in group] for side in spots]), [answers[i] for i in group])
    return pd.DataFrame([{"position": position, "layer": layer, "value": hits[layer, column] / len(pairs),
                          "n": len(pairs)}
                         for column, position in enumerate(("subject", "last")) for layer in range(n_layers(model))])


def _partners(tok, facts, count, seed):
    """At most count (fact, other fact) pairs for `patching`, each fact at most once as the first."""
    draw, groups = random.Random(seed), {}
    for fact in facts:
        if fact.target_true and not fact.prompt.rstrip().endswith("{}"):
            groups.setdefault(fact.relation or fact.prompt, []).append((target_ids(tok, fact.target_true)[0], fact))
    pairs = []
    for group in groups.values():
        for answer, fact in group:
            others = [other for different, other in group if different != answer]
            pairs += [(fact, draw.choice(others))] if others else []
    if not pairs:
        raise ValueError(f"patching: none of {len(facts)} facts has a partner of its relation with another answer")
    return draw.sample(pairs, min(count, len(pairs)))


@torch.no_grad()
def _patched(model, rows, spots, answers):
    """(L, 2) numbers of prompts that give `answers` (n,) once a state is put in, by layer and position.

    rows: (prompts, others' prompts), n id lists each; spots (2, n, 2): last subject and last prompt token of both.
    """
    device, n = next(model.parameters()).device, len(answers)
    names = [name_of(model, "block", layer) for layer in range(n_layers(model))]
    (ids, _), (source, _) = (pad(side, device=device) for side in rows)
    with capture(model, names) as kept:
        run(model, inputs_embeds=model.get_input_embeddings()(source))
    every, tokens, taken = torch.arange(n), spots[0].T.reshape(-1), spots[1].to(device)
    ends, wanted = spots[0][:, 1].repeat(2).to(device), torch.tensor(answers * 2, device=device)
    hits = []
    for name in names:
        values = torch.cat([kept[name][every.to(device), taken[:, column]] for column in (0, 1)])
        with _put(model, name, torch.arange(2 * n), tokens, values):
            logits = _logits(model, ids.repeat(2, 1), (torch.arange(2 * n, device=device), ends))
        hits.append((logits.argmax(-1) == wanted).view(2, n).sum(1))
    return torch.stack(hits).cpu().numpy()
