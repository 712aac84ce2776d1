"""Model, facts and settings in; the same edits by the plain way of public code out: the yardstick of speed and results.

One fact at a time, whole sequences through the whole model at every step, logits at every position, m × m solves.
Nothing here is shared with the fast editors but tokens, second moments and settings.
"""

import torch
from torch.nn.functional import kl_div, log_softmax

from editcore.hooks import capture, replaced, run
from editcore.model import is_input_first, module_of, name_of
from editcore.tokens import encode, pad, target_ids, with_subject


def value(model, tok, fact, contexts, place, config):
    """(δ (d,), h0 (d,), losses) of one fact; place = (part, layer) whose output δ is added to."""
    target = target_ids(tok, fact.target_new)
    coded = [with_subject(tok, one.replace("{}", fact.prompt), fact.subject) for one in (*contexts, "{}")]
    coded[-1] = with_subject(tok, config.kl_prompt, fact.subject)
    rows = [ids + target[:-1] for ids, _ in coded[:-1]] + [coded[-1][0]]
    device = next(model.parameters()).device
    ids, mask = pad(rows, device=device)
    every, lookups = torch.arange(len(rows)), torch.tensor([lookup for _, lookup in coded])
    delta, seen = torch.zeros(model.config.hidden_size, dtype=model.dtype, device=device, requires_grad=True), []
    adam, losses, reference = torch.optim.Adam([delta], lr=config.lr), [], None

    def change(h):
        seen.append(h[0, lookups[0]].detach().clone())
        h = h.clone()
        h[every, lookups] = h[every, lookups] + delta
        return h

    for step in range(config.steps):
        with replaced(model, name_of(model, *place), change):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        log_p = log_softmax(logits, -1)
        at = lookups[-1] if config.kl_position == "subject" else -1
        now = log_p[-1, at] if at != -1 else log_p[-1, len(rows[-1]) - 1]
        reference = now.detach() if reference is None else reference
        nll = 0
        for row, (prompt, _) in enumerate(coded[:-1]):
            for t, token in enumerate(target):
                nll = nll - log_p[row, len(prompt) - 1 + t, token] / len(target) / (len(rows) - 1)
        kl = kl_div(reference, now, log_target=True, reduction="sum")
        loss = nll + config.kl_factor * kl + config.weight_decay * delta.norm() / seen[0].norm() ** 2
        losses.append(loss.item())
        if loss < config.stop_loss or step == config.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta *= min(1.0, (config.clamp * seen[0].norm() / delta.norm()).item())
    return delta.detach(), seen[0], losses


def look(model, tok, fact, contexts, place, what):
    """(c, ·) "input" or "output" of place (part, layer) at the subject's last token in each context."""
    coded = [with_subject(tok, one.replace("{}", fact.prompt), fact.subject) for one in contexts]
    ids, mask = pad([ids for ids, _ in coded], device=next(model.parameters()).device)
    name = name_of(model, *place)
    with capture(model, [name], what, stop=False) as kept:
        run(model, input_ids=ids, attention_mask=mask)
    return kept[name][torch.arange(len(coded)), [lookup for _, lookup in coded]]


def rome(model, tok, fact, config, prepared):
    """{weight name: ΔW} of one ROME edit (the published convention) in the stored orientation."""
    name = name_of(model, "mlp_out", config.layer)
    keys = look(model, tok, fact, prepared.contexts, ("mlp_out", config.layer), "input")
    right = prepared.moments.solve(name, keys.mean(0))
    delta, _, _ = value(model, tok, fact, prepared.contexts, ("mlp_out", config.layer), config)
    plain = look(model, tok, fact, ("{}",), ("mlp_out", config.layer), "input")[0]
    right = right / right.norm()
    matrix = torch.outer(delta.double() / (plain.double() @ right), right)
    return {name + ".weight": _stored(model, config.layer, matrix)}


def memit(model, tok, facts, config, prepared):
    """{weight name: ΔW} of one MEMIT edit of all facts; weights are changed in place layer by layer and put back."""
    last = config.layers[-1]
    z = []
    for fact in facts:
        delta, h0, _ = value(model, tok, fact, prepared.contexts, ("block", last), config)
        z.append(h0 + delta)
    kept, changes = {}, {}
    for index, layer in enumerate(config.layers):
        name = name_of(model, "mlp_out", layer)
        keys = [look(model, tok, fact, prepared.contexts, ("mlp_out", layer), "input").double() for fact in facts]
        keys = torch.stack([(one[0] + one[1:].mean(0)) / 2 for one in keys], 1)
        now = torch.stack([look(model, tok, fact, ("{}",), ("block", last), "output")[0] for fact in facts], 1)
        residual = (torch.stack(z, 1) - now).double() / (len(config.layers) - index)
        moment = config.lambda_ * prepared.moments.moments[name].double().to(keys.device)
        matrix = residual @ torch.linalg.solve(moment + keys @ keys.T, keys).T
        weight = model.get_parameter(name + ".weight")
        kept[name], changes[name + ".weight"] = weight.clone(), _stored(model, layer, matrix)
        with torch.no_grad():
            weight += changes[name + ".weight"]
    with torch.no_grad():
        for name, weight in kept.items():
            model.get_parameter(name + ".weight").copy_(weight)
    return changes


def ft(model, tok, fact, config):
    """{parameter name: change} of one FT-L edit; the weights are trained in place and put back."""
    name = name_of(model, "mlp_out", config.layer)
    names = [one for one, _ in model.named_parameters() if one.startswith(name + ".")]
    weights = [model.get_parameter(one) for one in names]
    kept = [weight.detach().clone() for weight in weights]
    (prompt,), target = encode(tok, [fact.text]), target_ids(tok, fact.target_new)
    ids, mask = pad([prompt if config.last_position else prompt + target[:-1]], device=weights[0].device)
    adam = torch.optim.Adam([weight.requires_grad_() for weight in weights], lr=config.lr)
    for _ in range(config.steps):
        log_p = log_softmax(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0], -1)
        places = [len(prompt) - 1 + (0 if config.last_position else t) for t in range(len(target))]
        loss = -log_p[places, target].mean()
        if loss < config.stop_loss:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for weight, start in zip(weights, kept):
                weight.clamp_(start - config.epsilon, start + config.epsilon)
    changes = {one: weight.detach() - start for one, weight, start in zip(names, weights, kept)}
    with torch.no_grad():
        for weight, start in zip(weights, kept):
            weight.requires_grad_(False).copy_(start)
            weight.grad = None
    return changes


def _stored(model, layer, matrix):
    module = module_of(model, "mlp_out", layer)
    return (matrix.T if is_input_first(module) else matrix).to(module.weight.dtype)


# editor -> (model, tok, facts, config, prepared) -> [{parameter name: change}], one a fact or one of all
WAYS = {
    "rome": lambda model, tok, facts, *rest: [rome(model, tok, fact, *rest) for fact in facts],
    "memit": lambda *given: [memit(*given)],
    "ft": lambda model, tok, facts, config, _: [ft(model, tok, fact, config) for fact in facts],
}
