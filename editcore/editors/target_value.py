"""Optimise the target value v* of facts: what one layer must put out for the new target to follow.

v* = h0 + δ, where h0 is the value before. ROME adds δ to the output of an MLP (arXiv:2202.05262 eq.
4), MEMIT to that of a block (arXiv:2210.07229 eq. 16), at the last token of the subject. Adam works
on the δ (n, d) of all facts at once; a fact that is done is frozen and leaves the passes.
"""

from dataclasses import dataclass
from itertools import chain

import torch

from editcore.editors.rowwise import each_row
from editcore.hooks import capture
from editcore.model import batch_tokens, max_length, name_of
from editcore.suffix import fused, head, resume, start
from editcore.tokens import batches, check_lengths, pad, target_ids, with_subject


@dataclass(frozen=True)
class EditSite:
    """Where δ enters, and which keys to note on the way."""

    layer: int          # δ is added in this layer ...
    part: str           # ... to the output of its "block" or its "mlp_out"
    key_layer: int      # keys are inputs of this layer's MLP output projection


@dataclass(frozen=True)
class EncodedFact:
    """A fact as token rows, one per context template and one for the KL term."""

    rows: tuple         # ids of prompt and target (without its last token); at the end the KL row
    lookups: tuple      # last subject token of each row
    target: tuple       # target ids
    starts: tuple       # for each context row the position that predicts target[0]
    kl_position: int    # position at which the KL row is read
    case_id: object = ""    # for errors
    group: int = 0      # which group of facts, and so which version of the model, it belongs to

    @property
    def width(self):
        """Tokens from the lookup position to the last position that is read, at most."""
        ends = [start + len(self.target) - 1 for start in self.starts]
        ends.append(self.kl_position)
        return max(end - lookup for end, lookup in zip(ends, self.lookups, strict=True)) + 1


@dataclass(frozen=True)
class TargetValues:
    """The values of n facts."""

    delta: torch.Tensor     # (n, d) δ
    h0: torch.Tensor        # (n, d) value before, plain prompt
    mean_h0: torch.Tensor   # (n, d) value before, mean over the contexts
    keys: torch.Tensor      # (n, c, m) key at the lookup position; context 0 is the plain prompt
    losses: tuple           # for each fact the loss at each evaluation
    facts: tuple            # the n EncodedFacts

    @property
    def v_star(self):
        """(n, d) h0 + δ."""
        return self.h0 + self.delta


@dataclass(frozen=True)
class LossPositions:
    """Where the loss of n facts reads: M predictions of target tokens, then n KL rows."""

    rows: torch.Tensor      # (M + n,) row
    columns: torch.Tensor   # (M + n,) which of the row's wanted offsets
    facts: torch.Tensor     # (M,) fact that the prediction belongs to
    tokens: torch.Tensor    # (M,) target token
    weights: torch.Tensor   # (M,) 1 / (contexts * target tokens)


def encode_facts(model, tok, groups, contexts, config):
    """EncodedFacts of all facts of all groups; contexts: as many templates for each group.

    config has kl_prompt and kl_position. ValueError names a record that is too long for the model.
    """
    encoded = []
    for number, (group, templates) in enumerate(zip(groups, contexts, strict=True)):
        encoded += [encode_fact(tok, fact, templates, config, number) for fact in group]
    for fact in encoded:
        check_lengths(fact.rows, [f"record {fact.case_id}"] * len(fact.rows), max_length(model))
    return encoded


def encode_fact(tok, fact, contexts, config, group=0):
    """The EncodedFact of a fact under context templates."""
    target = target_ids(tok, fact.target_new)
    prompts = [with_subject(tok, context.replace("{}", fact.prompt), fact.subject)
               for context in contexts]
    kl_ids, kl_lookup = with_subject(tok, config.kl_prompt, fact.subject)
    return EncodedFact(
        rows=(*(ids + target[:-1] for ids, _ in prompts), kl_ids),
        lookups=(*(lookup for _, lookup in prompts), kl_lookup),
        target=tuple(target),
        starts=tuple(len(ids) - 1 for ids, _ in prompts),
        kl_position=kl_lookup if config.kl_position == "subject" else len(kl_ids) - 1,
        case_id=fact.case_id,
        group=group,
    )


def optimise(model, facts, site, config, versions=None):
    """TargetValues of EncodedFacts, each fact on its own but many in a batch.

    config: steps, lr, stop_loss, early_stop, kl_factor, weight_decay, clamp. versions: what
    `rowwise.edited_maps` gives for the groups, None for the model as it is; only maps up to the
    site's layer may differ in them. Nothing of the model changes. ValueError names the record whose
    loss is not finite, and the step.
    """
    def solve(chunk):
        return _optimise(model, chunk, site, config, versions)
    return _in_chunks(model, facts, solve)


def unedited_values(model, facts, site):
    """TargetValues with δ = 0 and no losses: h0 and keys alone, from one pass."""
    def look(chunk):
        _, h0, mean_h0, keys = _start(model, chunk, site, None)
        return TargetValues(torch.zeros_like(h0), h0, mean_h0, keys, ((),) * len(chunk), chunk)
    return _in_chunks(model, facts, look)


def _in_chunks(model, facts, solve):
    """TargetValues of all facts in their order, solved as many at a time as suit the device."""
    lengths = [len(fact.rows) * fact.width for fact in facts]
    chunks = list(batches(lengths, batch_tokens(next(model.parameters()).device)))
    with fused(model):
        parts = [solve(tuple(facts[i] for i in chunk)) for chunk in chunks]
    order = torch.tensor(list(chain(*chunks))).argsort().tolist()
    losses = list(chain(*(part.losses for part in parts)))
    tensors = (torch.cat([getattr(part, name) for part in parts])[order]
               for name in ("delta", "h0", "mean_h0", "keys"))
    return TargetValues(*tensors, tuple(losses[i] for i in order), tuple(facts))


def _optimise(model, facts, site, config, versions):
    """TargetValues of a chunk of facts."""
    state, h0, mean_h0, keys = _start(model, facts, site, versions)
    positions = _loss_positions(facts, h0.device)
    delta = torch.zeros_like(h0)
    moments = (torch.zeros_like(h0), torch.zeros_like(h0))
    limit = config.clamp * h0.norm(dim=1)
    losses = [[] for _ in facts]
    hits = torch.zeros(len(facts), dtype=torch.long)    # evaluations in a row with the argmax right
    active = torch.arange(len(facts))
    reference = None
    for step in range(config.steps):
        last = step == config.steps - 1     # it evaluates and does not step
        live = delta[active].requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, log_p, hit = _loss(model, state, positions, live, h0=h0[active],
                                     reference=reference, config=config)
        reference = log_p.detach() if reference is None else reference
        going = _note(loss, losses, active, facts) >= config.stop_loss
        if config.early_stop:
            hits[active] = (hits[active] + 1) * hit.cpu()
            going &= hits[active] < config.early_stop
        if last or not going.any():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), live)
        if not going.all():
            active = active[going]
            gradient = gradient[going]
            reference = reference[going]
            state = state.rows(going.to(h0.device).repeat_interleave(len(facts[0].rows)))
            positions = _loss_positions([facts[i] for i in active], h0.device)
        adam(delta, moments, gradient, step=step + 1, lr=config.lr, active=active)
        delta[active] *= (limit[active] / delta[active].norm(dim=1)).clamp(max=1)[:, None]
    return TargetValues(delta, h0, mean_h0, keys, tuple(map(tuple, losses)), facts)


def _start(model, facts, site, versions):
    """(State, h0, mean_h0, keys) of a chunk: the one pass of the whole model."""
    device = next(model.parameters()).device
    n_rows = len(facts[0].rows)
    ids, mask = pad(list(chain(*(fact.rows for fact in facts))), device=device)
    begin = torch.tensor([fact.lookups for fact in facts], device=device).flatten()
    wanted = torch.tensor([_wanted(fact, facts) for fact in facts], device=device).flatten(0, 1)
    source = name_of(model, "mlp_out", site.key_layer)
    target = name_of(model, site.part, site.layer)
    groups = list(chain(*([fact.group] * n_rows for fact in facts)))
    with (each_row(model, versions, groups),
          capture(model, [source], "input", stop=False) as inputs,
          capture(model, [target], stop=False) as outputs):
        state = start(model, ids, mask, begin=begin, layer=site.layer, wanted=wanted)
    keys = inputs[source][:, 0].unflatten(0, (len(facts), n_rows))[:, :-1]
    values = outputs[target][:, 0].unflatten(0, (len(facts), n_rows))[:, :-1]
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    return state, values[:, 0], values.mean(1), keys


def _wanted(fact, facts):
    """Offsets from the lookup position that are read in each row, as many in every row."""
    longest = max(len(other.target) for other in facts)
    steps = [min(t, len(fact.target) - 1) for t in range(longest)]
    offsets = [[start - lookup + t for t in steps]
               for start, lookup in zip(fact.starts, fact.lookups)]
    return [*offsets, [fact.kl_position - fact.lookups[-1]] * longest]


def _loss_positions(facts, device):
    n_rows = len(facts[0].rows)
    entries = []
    for index, fact in enumerate(facts):
        weight = 1 / (len(fact.starts) * len(fact.target))
        for row in range(len(fact.starts)):
            entries += [(index * n_rows + row, column, index, token, weight)
                        for column, token in enumerate(fact.target)]
    rows, columns, numbers, tokens, weights = zip(*entries)
    rows += tuple((index + 1) * n_rows - 1 for index in range(len(facts)))
    columns += (0,) * len(facts)
    integers = (torch.tensor(values, device=device) for values in (rows, columns, numbers, tokens))
    return LossPositions(*integers, torch.tensor(weights, dtype=torch.float64, device=device))


def _loss(model, state, positions, delta, *, h0, reference, config):
    """The loss with `delta` (n, d) added at the lookup positions.

    Returns (loss (n,), log-probabilities (n, V) at the KL rows, (n,) int64 that is 1 where all
    target tokens are the argmax). reference: the log-probabilities before, None at first.
    """
    n_rows = len(state.hidden) // len(delta)
    first = state.hidden[:, 0] + delta.to(state.hidden.dtype).repeat_interleave(n_rows, 0)
    final = resume(model, state, torch.cat([first[:, None], state.hidden[:, 1:]], 1))
    logits = head(model, final[positions.rows, positions.columns])
    wanted = logits[:len(positions.tokens)]
    each = torch.nn.functional.cross_entropy(wanted, positions.tokens, reduction="none")
    nll = torch.zeros(len(delta), dtype=each.dtype, device=each.device)
    nll = nll.index_add(0, positions.facts, each * positions.weights.to(logits.dtype))
    log_p = logits[len(positions.tokens):].log_softmax(-1)
    before = log_p.detach() if reference is None else reference
    kl = (log_p.exp() * (log_p - before)).sum(-1)
    decay = config.weight_decay * delta.norm(dim=1) / h0.norm(dim=1) ** 2
    missed = (wanted.argmax(-1) != positions.tokens).long()
    misses = torch.zeros(len(delta), dtype=torch.long, device=missed.device)
    hit = misses.index_add(0, positions.facts, missed) == 0
    return nll + config.kl_factor * kl + decay, log_p, hit.long()


def _note(loss, losses, active, facts):
    """Write down the loss of each active fact; returns it (n,) on the CPU."""
    loss = loss.detach().cpu()
    for index, value in zip(active.tolist(), loss.tolist()):
        losses[index].append(value)
        if value != value or abs(value) == float("inf"):
            step = len(losses[index])
            raise ValueError(f"record {facts[index].case_id}: the loss is {value} at step {step}; "
                             "the model's weights may be broken, or lr too large")
    return loss


def adam(value, moments, gradient, *, step, lr, active=slice(None)):
    """Take one step of Adam on the active rows of `value`, in place.

    arXiv:1412.6980, algorithm 1, with betas 0.9 and 0.999 and eps 1e-8; torch's own cannot leave
    rows alone. moments: the pair of running means, zeros at first; gradient: of the active rows.
    """
    mean, square = moments
    mean[active] = mean[active].lerp(gradient, 0.1)
    square[active] = square[active] * 0.999 + 0.001 * gradient * gradient
    spread = square[active].sqrt() / (1 - 0.999 ** step) ** 0.5 + 1e-8
    value[active] -= lr / (1 - 0.9 ** step) * mean[active] / spread
