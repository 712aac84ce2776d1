"""Facts and a place in the model in; the change δ of the state there that makes the model say each new target out.

The optimisation that ROME (δ on the MLP output, arXiv:2202.05262 eq. 4) and MEMIT (δ on a block's output,
arXiv:2210.07229 eq. 16) share: Adam on δ (n, d) for all facts at once, converged facts frozen and dropped.
"""

from dataclasses import dataclass, replace

import torch

from editcore.editors.rowwise import rows as versioned
from editcore.hooks import capture
from editcore.model import batch_tokens, max_length, name_of
from editcore.suffix import fused, head, resume, start
from editcore.tokens import check_lengths, pad, target_ids, with_subject


@dataclass(frozen=True)
class EditSite:
    """Where δ enters and which keys to note on the way."""

    layer: int          # δ is added to this block's output, at the last subject token
    part: str           # "block" or "mlp_out": the module whose output is h0, the start value
    key_layer: int      # keys are inputs of this layer's MLP output projection


@dataclass(frozen=True)
class EncodedFact:
    """One fact as token rows: one a context, and a last one for the KL term."""

    rows: tuple         # id lists, prompt and all target tokens but the last
    lookups: tuple      # last subject token of each row
    target: tuple       # target ids
    first: tuple        # for each context row the position that predicts target[0]
    kl_at: int          # position at which the last row is read
    name: object = ""   # the record, for errors
    owner: int = 0      # which version of the model the fact is edited into


@dataclass(frozen=True)
class TargetValues:
    """Results for n facts."""

    delta: torch.Tensor     # (n, d) optimised change
    h0: torch.Tensor        # (n, d) value before, plain prompt
    mean: torch.Tensor      # (n, d) the same, mean over the contexts
    keys: torch.Tensor      # (n, c, m) key at the lookup position in each context; context 0 is the plain prompt
    losses: tuple           # for each fact the loss at each evaluation
    facts: tuple         # the facts as token rows


@dataclass(frozen=True)
class LossPositions:
    """Flat lists of the positions whose predictions the loss reads, for the facts still active."""

    rows: torch.Tensor      # (M + n,) row; the last n are the KL rows
    columns: torch.Tensor   # (M + n,) which of the row's wanted positions
    facts: torch.Tensor     # (M,) which fact the prediction belongs to
    ids: torch.Tensor       # (M,) target token
    weights: torch.Tensor   # (M,) its weight: 1 / (contexts * target tokens)


def encode_fact(tok, fact, contexts, config):
    """The EncodedFact of a Fact under context templates; `config` has kl_prompt and kl_position."""
    target = target_ids(tok, fact.target_new)
    coded = [with_subject(tok, context.replace("{}", fact.prompt), fact.subject) for context in contexts]
    kl_ids, kl_lookup = with_subject(tok, config.kl_prompt, fact.subject)
    kl_at = {"subject": kl_lookup, "last": len(kl_ids) - 1}[config.kl_position]
    return EncodedFact(rows=(*(ids + target[:-1] for ids, _ in coded), kl_ids),
                   lookups=(*(lookup for _, lookup in coded), kl_lookup), target=tuple(target),
                   first=tuple(len(ids) - 1 for ids, _ in coded), kl_at=kl_at)


def encode_facts(model, tok, groups, contexts, config):
    """The EncodedFacts of all facts of all groups; contexts: templates of each group, equally many; owner = its index.

    ValueError names the first record that is too long for the model.
    """
    made = [replace(encode_fact(tok, fact, templates, config), name=fact.case_id, owner=owner)
            for owner, (group, templates) in enumerate(zip(groups, contexts, strict=True)) for fact in group]
    for one in made:
        check_lengths(one.rows, [f"record {one.name}"] * len(one.rows), max_length(model))
    return made


def width(one):
    """Tokens of a EncodedFact's suffix: from the lookup position to the last position that is read."""
    ends = [first + len(one.target) - 1 for first in one.first] + [one.kl_at]
    return max(end - lookup for end, lookup in zip(ends, one.lookups, strict=True)) + 1


def optimise(model, made, site, config, versions=None):
    """Values of all EncodedFacts, each optimised on its own (batched, as many as suit the device).

    config: steps, lr, stop_loss, early_stop, kl_factor, weight_decay, clamp. versions: what `versions.versions` gives;
    a fact is then solved on its owner's version of the model, of which only maps up to the site's layer may differ.
    Nothing of the model changes. ValueError names the record whose loss is not finite, and the step.
    """
    return _batched(made, model, lambda part: _optimise(part, model, site, config, versions))


def unedited_values(model, made, site, versions=None):
    """TargetValues with δ = 0 and no losses: h0 and keys alone, from one pass."""
    def look(part):
        _, h0, mean, keys = _begin(part, model, site, versions)
        return TargetValues(torch.zeros_like(h0), h0, mean, keys, ((),) * len(part), tuple(part))
    return _batched(made, model, look)


def _batched(made, model, solve):
    """The Values of all EncodedFacts in their order, solved in chunks."""
    parts, order = [], []
    with fused(model):
        for batch in _chunks(made, batch_tokens(next(model.parameters()).device)):
            parts.append(solve([made[i] for i in batch]))
            order += batch
    back = torch.tensor(order).argsort().tolist()
    losses = [loss for part in parts for loss in part.losses]
    tensors = (torch.cat([getattr(part, name) for part in parts])[back] for name in ("delta", "h0", "mean", "keys"))
    return TargetValues(*tensors, tuple(losses[i] for i in back), tuple(made))


def _chunks(made, max_tokens):
    """Index lists of EncodedFacts, at most max_tokens suffix tokens each; beyond 64 tokens, with little padding."""
    chunk, widths = [], [width(one) for one in made]
    for index in sorted(range(len(made)), key=lambda i: (widths[i], i)):
        per = len(made[index].rows)
        full = (len(chunk) + 1) * per * widths[index] > max_tokens
        wasteful = chunk and widths[index] > 1.25 * widths[chunk[0]] and len(chunk) * per * widths[chunk[-1]] > 64
        if chunk and (full or wasteful):
            yield chunk
            chunk = []
        chunk.append(index)
    if chunk:
        yield chunk


def _optimise(made, model, site, config, versions):
    """Values of a chunk of EncodedFacts."""
    state, h0, mean_value, keys = _begin(made, model, site, versions)
    aim, reference = _aim(made, state.hidden.device), None
    delta, mean, square = (torch.zeros_like(h0) for _ in range(3))
    limit, losses, active = config.clamp * h0.norm(dim=1), [[] for _ in made], torch.arange(len(made))
    said = torch.zeros(len(made), dtype=torch.long)     # evaluations in a row at which the target was the argmax
    for step in range(config.steps):
        last = step == config.steps - 1
        live = delta[active].requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            now, log_p, hit = _loss(model, state, aim, live, h0[active], (reference, config))
        reference = log_p.detach() if reference is None else reference
        going = _note(now, active, losses, made, config.stop_loss)
        if config.early_stop:
            said[active] = (said[active] + 1) * hit.cpu()
            going &= said[active] < config.early_stop
        if last or not going.any():
            break
        (gradient,) = torch.autograd.grad(now.sum(), live)
        if not going.all():
            active, gradient, reference = active[going], gradient[going], reference[going]
            state, aim = _rows_of(state, going), _aim([made[i] for i in active], state.hidden.device)
        adam(delta, mean, square, active, (gradient, step + 1, config.lr))
        norm = delta[active].norm(dim=1)
        delta[active] *= (limit[active] / norm).clamp(max=1)[:, None]
    return TargetValues(delta, h0, mean_value, keys, tuple(map(tuple, losses)), tuple(made))


def _begin(made, model, site, versions):
    """(State, h0 (n, d), its mean over contexts (n, d), keys (n, c, m)) of a chunk: the one pass of the whole model."""
    device, per = next(model.parameters()).device, len(made[0].rows)
    ids, mask = pad([row for one in made for row in one.rows], device=device)
    begin = torch.tensor([lookup for one in made for lookup in one.lookups], device=device)
    source, target = name_of(model, "mlp_out", site.key_layer), name_of(model, site.part, site.layer)
    with (versioned(model, versions, [one.owner for one in made for _ in one.rows]),
          capture(model, [source], "input", stop=False) as inputs, capture(model, [target], stop=False) as outputs):
        state = start(model, ids, mask, begin, site.layer, torch.tensor(_wanted(made), device=device))
    keys = inputs[source][:, 0].unflatten(0, (len(made), per))[:, :-1]
    values = outputs[target][:, 0].unflatten(0, (len(made), per))[:, :-1]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return state, values[:, 0], values.mean(1), keys


def _aim(made, device):
    """The LossPositions of a chunk."""
    per, entries = len(made[0].rows), []
    for index, one in enumerate(made):
        for row in range(len(one.first)):
            weight = 1 / (len(one.first) * len(one.target))
            entries += [(index * per + row, t, index, token, weight) for t, token in enumerate(one.target)]
    rows, columns, facts, ids, weights = zip(*entries)
    rows += tuple((index + 1) * per - 1 for index in range(len(made)))
    columns += (0,) * len(made)
    integers = (torch.tensor(values, device=device) for values in (rows, columns, facts, ids))
    return LossPositions(*integers, torch.tensor(weights, dtype=torch.float64, device=device))


def _wanted(made):
    """Offsets from the lookup position that are read in each row of a chunk, all lists of one length."""
    count = max(len(one.target) for one in made)
    offsets = []
    for one in made:
        steps = [min(t, len(one.target) - 1) for t in range(count)]
        offsets += [[first - lookup + t for t in steps] for first, lookup in zip(one.first, one.lookups)]
        offsets.append([one.kl_at - one.lookups[-1]] * count)
    return offsets


def _loss(model, state, aim, delta, h0, rest):
    """(loss (n,), log-probabilities (n, V) at the KL rows, whether all target tokens are the argmax (n,) int64)

    with `delta` (n, d) added at the lookup positions.
    """
    reference, config = rest
    per, count = len(state.hidden) // len(delta), len(aim.facts)
    first = state.hidden[:, 0] + delta.to(state.hidden.dtype).repeat_interleave(per, 0)
    final = resume(model, state, torch.cat([first[:, None], state.hidden[:, 1:]], 1))
    logits = head(model, final[aim.rows, aim.columns])
    each = torch.nn.functional.cross_entropy(logits[:count], aim.ids, reduction="none") * aim.weights.to(logits.dtype)
    nll = torch.zeros(len(delta), dtype=each.dtype, device=each.device).index_add(0, aim.facts, each)
    log_p = logits[count:].log_softmax(-1)
    kl = (log_p.exp() * (log_p - (log_p.detach() if reference is None else reference))).sum(-1)
    decay = config.weight_decay * delta.norm(dim=1) / h0.norm(dim=1) ** 2
    missed = (logits[:count].argmax(-1) != aim.ids).long()
    hit = torch.zeros(len(delta), dtype=torch.long, device=missed.device).index_add(0, aim.facts, missed) == 0
    return nll + config.kl_factor * kl + decay, log_p, hit.long()


def _note(now, active, losses, made, stop):
    """Write down each active fact's loss; (n,) bool of those that go on. One transfer from the device."""
    values = now.detach().cpu()
    for index, loss in zip(active.tolist(), values.tolist()):
        losses[index].append(loss)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ValueError(f"record {made[index].name}: the loss is {loss} at step {len(losses[index])}; "
                             "the model's weights may be broken, or lr too large")
    return values >= stop


def _rows_of(state, going):
    """The State of the facts that go on (n,) bool."""
    per = len(state.hidden) // len(going)
    return state.rows(going.to(state.hidden.device).repeat_interleave(per))


def adam(value, mean, square, active, step):
    """One step of Adam (arXiv:1412.6980, algorithm 1; betas 0.9, 0.999, eps 1e-8) on the active rows, in place."""
    gradient, count, lr = step
    mean[active] = mean[active].lerp(gradient, 0.1)
    square[active] = square[active] * 0.999 + 0.001 * gradient * gradient
    spread = square[active].sqrt() / (1 - 0.999 ** count) ** 0.5 + 1e-8
    value[active] -= lr / (1 - 0.9 ** count) * mean[active] / spread

