"""Make the same edits the plain way of public code: the yardstick of results and of speed.

One fact at a time, whole sequences through the whole model at every step, logits at every position,
m × m solves. Nothing is shared with the fast editors but tokens, second moments and settings.
"""

import torch
from torch.nn.functional import kl_div, log_softmax

from editcore.hooks import capture, replaced, run
from editcore.model import is_input_first, module_of, name_of
from editcore.tokens import encode, pad, target_ids, with_subject


def apart(a, b):
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def target_value(model, tok, fact, contexts, place, config):
    """(δ (d,), h0 (d,), losses) of one fact; place: (part, layer) to whose output δ is added."""
    target = target_ids(tok, fact.target_new)
    prompts = [with_subject(tok, context.replace("{}", fact.prompt), fact.subject)
               for context in contexts]
    kl_ids, kl_lookup = with_subject(tok, config.kl_prompt, fact.subject)
    kl_at = kl_lookup if config.kl_position == "subject" else len(kl_ids) - 1
    rows = [ids + target[:-1] for ids, _ in prompts] + [kl_ids]
    lookups = torch.tensor([lookup for _, lookup in prompts] + [kl_lookup])
    every = torch.arange(len(rows))
    device = next(model.parameters()).device
    ids, mask = pad(rows, device=device)
    delta = torch.zeros(model.config.hidden_size, dtype=model.dtype, device=device,
                        requires_grad=True)
    adam = torch.optim.Adam([delta], lr=config.lr)
    before = []
    losses = []
    hits = 0

    def change(h):
        before.append(h[0, lookups[0]].detach().clone())
        h = h.clone()
        h[every, lookups] = h[every, lookups] + delta
        return h

    for step in range(config.steps):
        with replaced(model, name_of(model, *place), change):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_p = log_softmax(logits, -1)
        if not step:
            reference = log_p[-1, kl_at].detach()
        nll = 0
        hit = True
        for row, (prompt, _) in enumerate(prompts):
            ends = range(len(prompt) - 1, len(prompt) - 1 + len(target))
            nll = nll - log_p[row, ends, target].mean() / len(prompts)
            hit &= log_p[row, ends].argmax(-1).tolist() == target
        hits += hit
        kl = kl_div(reference, log_p[-1, kl_at], log_target=True, reduction="sum")
        decay = config.weight_decay * delta.norm() / before[0].norm() ** 2
        loss = nll + config.kl_factor * kl + decay
        losses.append(loss.item())
        if loss < config.stop_loss or step == config.steps - 1:
            break
        if config.early_stop and hits == config.early_stop:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, (config.clamp * before[0].norm() / delta.norm()).item())
    return delta.detach(), before[0], losses


def read(model, tok, fact, contexts, place, what):
    """(c, ·) "input" or "output" of place (part, layer) at the subject's last token."""
    prompts = [with_subject(tok, context.replace("{}", fact.prompt), fact.subject)
               for context in contexts]
    ids, mask = pad([ids for ids, _ in prompts], device=next(model.parameters()).device)
    name = name_of(model, *place)
    with capture(model, [name], what, stop=False) as seen:
        run(model, input_ids=ids, attention_mask=mask)
    return seen[name][torch.arange(len(prompts)), [lookup for _, lookup in prompts]]


def rome(model, tok, fact, config, prepared):
    """{weight name: ΔW} of one ROME edit (the published convention) in the stored orientation."""
    place = ("mlp_out", config.layer)
    name = name_of(model, *place)
    keys = read(model, tok, fact, prepared.contexts, place, "input")
    right = prepared.moments.solve(name, keys.mean(0))
    right = right / right.norm()
    delta, h0, _ = target_value(model, tok, fact, prepared.contexts, place, config)
    if config.anchor:
        delta = anchored(h0, delta, prepared.anchor, 5) - h0
    plain = read(model, tok, fact, ("{}",), place, "input")[0]
    matrix = torch.outer(delta.double() / (plain.double() @ right), right)
    return {name + ".weight": _stored(model, config.layer, matrix)}


def memit(model, tok, facts, config, prepared, past=None):
    """{weight name: ΔW} of one edit of all facts by MEMIT, ENCORE, EMMET, RECT, or MEMIT with NAS.

    Weights change and are put back. past: {weight name: Σ K_p K_pᵀ}, which grows.
    """
    last = ("block", config.layers[-1])
    z = []
    for fact in facts:
        delta, h0, _ = target_value(model, tok, fact, prepared.contexts, last, config)
        if config.anchor:
            place = ("mlp_out", config.layers[-1])
            mlp = read(model, tok, fact, ("{}",), place, "output")[0]
            delta = anchored(mlp, delta, prepared.anchor, 2) - mlp
        z.append(h0 + delta)
    weights = {}
    changes = {}
    for index, layer in enumerate(config.layers):
        name = name_of(model, "mlp_out", layer)
        keys = [read(model, tok, fact, prepared.contexts, ("mlp_out", layer), "input").double()
                for fact in facts]
        keys = torch.stack([(rows[0] + rows[1:].mean(0)) / 2 for rows in keys], 1)
        state = [read(model, tok, fact, ("{}",), last, "output")[0] for fact in facts]
        left = len(config.layers) - index
        residual = (torch.stack(z, 1) - torch.stack(state, 1)).double() / left
        moment = prepared.moments.moments[name].double().to(keys.device)
        matrix = residual @ adjusted(keys, moment, config, (past or {}).get(name, 0)).T
        if past is not None:
            past[name] = past.get(name, 0) + keys @ keys.T
        weight = model.get_parameter(name + ".weight")
        weights[weight] = weight.clone()
        changes[name + ".weight"] = _stored(model, layer, matrix)
        with torch.no_grad():
            weight += changes[name + ".weight"]
    with torch.no_grad():
        for weight, before in weights.items():
            weight.copy_(before)
    if config.keep < 1:
        changes = {name: largest(change, model.get_parameter(name), config.keep)
                   for name, change in changes.items()}
    return changes


def adjusted(keys, moment, config, past):
    """(m, n) what the residual is multiplied with; keys (m, n)."""
    eye = torch.eye(len(moment), dtype=moment.dtype)
    if not config.exact:
        bracket = config.lambda_ * moment + config.ridge * eye + past + keys @ keys.T
        return torch.linalg.solve(bracket, keys)
    inverse = torch.linalg.inv(moment)
    gram = keys.T @ inverse @ keys
    if len(gram) > 1:
        gram = gram + config.lambda_ * torch.eye(len(gram), dtype=gram.dtype)
    return (torch.linalg.inv(gram) @ keys.T @ inverse).T


def largest(change, weight, keep):
    """RECT's mask: entries of least relative change, the limit excepted, become 0."""
    size = (change / (weight + 1e-8)).abs()
    limit = size.flatten().sort().values[int(size.numel() * (1 - keep)) - 1]
    return change * (size >= limit)


def anchored(mlp, delta, norm, most):
    """NAS: the MLP's new output, rescaled to a norm, or the old one if it is far longer."""
    value = mlp + delta
    return mlp if value.norm() > most * norm else value * (norm / value.norm())


def anchor(model, tok, facts, part, layer, config):
    """NAS: the mean norm of the facts' new MLP outputs, without the longest twentieth."""
    norms = []
    for fact in facts:
        delta, _, _ = target_value(model, tok, fact, ("{}",), (part, layer), config)
        mlp = read(model, tok, fact, ("{}",), ("mlp_out", layer), "output")[0]
        norms.append((mlp + delta).norm().item())
    shorter = sorted(norms)[:len(norms) - len(norms) // 20]
    return sum(shorter) / len(shorter)


def ft(model, tok, fact, config):
    """{parameter name: change} of one FT-L edit; weights are trained in place and put back."""
    name = name_of(model, "mlp_out", config.layer)
    weights = {key: weight for key, weight in model.named_parameters()
               if key.startswith(name + ".")}
    before = {key: weight.detach().clone() for key, weight in weights.items()}
    (prompt,) = encode(tok, [fact.text])
    target = target_ids(tok, fact.target_new)
    row = prompt if config.last_position else prompt + target[:-1]
    ids, mask = pad([row], device=next(model.parameters()).device)
    steps = torch.arange(len(target)) * (not config.last_position)
    adam = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], lr=config.lr)
    for _ in range(config.steps):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        loss = -log_softmax(logits, -1)[len(prompt) - 1 + steps, target].mean()
        if loss < config.stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for key, weight in weights.items():
                weight.clamp_(before[key] - config.epsilon, before[key] + config.epsilon)
    changes = {key: weight.detach() - before[key] for key, weight in weights.items()}
    with torch.no_grad():
        for key, weight in weights.items():
            weight.requires_grad_(False).copy_(before[key])
            weight.grad = None
    return changes


def _stored(model, layer, matrix):
    module = module_of(model, "mlp_out", layer)
    return (matrix.T if is_input_first(module) else matrix).to(module.weight.dtype)


# editor -> (model, tok, facts, config, prepared) -> [{parameter name: change}], per fact or of all
EDITS = {
    "rome": lambda model, tok, facts, *more: [rome(model, tok, fact, *more) for fact in facts],
    "memit": lambda *args: [memit(*args)],
    "ft": lambda model, tok, facts, config, _: [ft(model, tok, fact, config) for fact in facts],
}
