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
from editcore.progress import bar
from editcore.suffix import head, quick, resume, start
from editcore.tokens import batches, check_lengths, encode_pairs, pad, with_subject

# Settings of ROME and MEMIT by model.
POCKET = {"lr": 1.0, "steps": 40, "clamp": 4.0}
SMOLLM2 = {"lr": 1.0, "stop_loss": 0.15}    # as good as 0.5 and 0.05, in 11 evaluations for 20


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

    def offsets(self, count):
        """Return `count` offsets from the lookup, to be read in each row, the last repeated."""
        steps = [min(step, len(self.target) - 1) for step in range(count)]
        rows = [[start - lookup + step for step in steps]
                for start, lookup in zip(self.starts, self.lookups)]
        return [*rows, [self.kl_position - self.lookups[-1]] * count]


@dataclass(frozen=True)
class TargetValues:
    """The values of n facts."""

    delta: torch.Tensor     # (n, d) δ
    h0: torch.Tensor        # (n, d) value before, plain prompt
    mean_h0: torch.Tensor   # (n, d) value before, mean over the contexts
    keys: torch.Tensor      # (n, c, m) key at the lookup position; context 0 is the plain prompt
    losses: tuple           # for each fact the loss at each evaluation
    facts: tuple            # the n EncodedFacts
    mlp: torch.Tensor       # (n, d) the MLP's output at the site's layer before, plain prompt
    hits: torch.Tensor      # (n,) at the last evaluation the target was the argmax in all contexts

    @property
    def v_star(self):
        """(n, d) h0 + δ."""
        return self.h0 + self.delta


def encode_facts(model, tok, groups, contexts, config):
    """Return EncodedFacts of all facts of all groups; contexts: as many templates for each."""
    encoded = []
    for number, (group, templates) in enumerate(zip(groups, contexts, strict=True)):
        encoded += [encode_fact(tok, fact, templates, config, number) for fact in group]
    for fact in encoded:
        check_lengths(fact.rows, [f"record {fact.case_id}"] * len(fact.rows), max_length(model))
    return encoded


def encode_fact(tok, fact, contexts, config, group=0):
    """Return the EncodedFact of a fact under context templates."""
    templates = [context.replace("{}", fact.prompt) for context in contexts]
    pairs = encode_pairs(tok, [(template.replace("{}", fact.subject), fact.target_new)
                               for template in templates],
                         [f"record {fact.case_id}"] * len(templates))
    target = pairs[0][1]
    lookups = [with_subject(tok, template, fact.subject)[1] for template in templates]
    kl_ids, kl_lookup = with_subject(tok, config.kl_prompt, fact.subject)
    kl_position = kl_lookup if config.kl_position == "subject" else len(kl_ids) - 1
    return EncodedFact((*(ids + target[:-1] for ids, _ in pairs), kl_ids), (*lookups, kl_lookup),
                       tuple(target), tuple(len(ids) - 1 for ids, _ in pairs), kl_position,
                       fact.case_id, group)


def optimise(model, facts, site, config, versions=None):
    """Return TargetValues of EncodedFacts, each fact on its own but many in a batch.

    config: steps, lr, stop_loss, early_stop, kl_factor, weight_decay, clamp. versions: what
    `rowwise.edited_maps` gives for the groups; only maps up to the site's layer may differ in them.
    ValueError names the record whose loss is not finite, and the step.
    """
    device = next(model.parameters()).device
    lengths = [len(fact.rows) * (max(chain(*fact.offsets(len(fact.target)))) + 1) for fact in facts]
    chunks = list(batches(lengths, batch_tokens(device)))
    with quick(model):
        parts = [_optimise(model, [facts[i] for i in chunk], site, config, versions)
                 for chunk in bar(chunks, "target values", delay=10)]
    order = torch.tensor(list(chain(*chunks))).argsort().tolist()
    losses = list(chain(*(part.losses for part in parts)))
    tensors = {name: torch.cat([getattr(part, name) for part in parts])[order]
               for name in ("delta", "h0", "mean_h0", "keys", "mlp", "hits")}
    return TargetValues(**tensors, losses=tuple(tuple(losses[i]) for i in order),
                        facts=tuple(facts))


def _optimise(model, facts, site, config, versions):
    """TargetValues of a chunk of facts."""
    state, h0, mean_h0, keys, mlp = _start(model, facts, site, versions)
    targets, present = pad([list(fact.target) for fact in facts], device=h0.device)     # (n, s)
    delta = torch.zeros_like(h0)
    moments = (torch.zeros_like(h0), torch.zeros_like(h0))
    limit = config.clamp * h0.norm(dim=1)
    losses = [[] for _ in facts]
    hits = torch.zeros(len(facts), dtype=torch.bool)
    counts = torch.zeros(len(facts), dtype=torch.long)      # evaluations that were hits
    active = torch.arange(len(facts))
    places = _places(present, len(facts[0].starts))
    reference = None
    for step in bar(range(config.steps), "steps of target values", delay=10):
        last = step == config.steps - 1     # it evaluates and does not step
        live = delta[active].requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            loss, log_p, hit = _loss(model, state, live, targets=targets[active], places=places,
                                     h0=h0[active], reference=reference, config=config)
        reference = log_p.detach() if reference is None else reference
        numbers = torch.stack([loss.detach(), hit]).cpu()   # the step's only copy to the host
        going = _note(numbers[0], losses, active, facts) >= config.stop_loss
        hits[active] = numbers[1].bool()
        counts[active] += hits[active]
        if config.early_stop:
            going &= counts[active] < config.early_stop
        if last or not going.any():
            break
        (gradient,) = torch.autograd.grad(loss.sum(), live)
        if not going.all():
            active = active[going]
            gradient = gradient[going]
            reference = reference[going]
            places = _places(present[active], len(facts[0].starts))
            state = state.rows(going.to(h0.device).repeat_interleave(len(facts[0].rows)))
        adam(delta, moments, gradient, step=step + 1, lr=config.lr, active=active)
        delta[active] *= (limit[active] / delta[active].norm(dim=1)).clamp(max=1)[:, None]
    return TargetValues(delta, h0, mean_h0, keys, losses, facts, mlp, hits)


def _start(model, facts, site, versions):
    """(State, h0, mean_h0, keys, mlp) of a chunk: the one pass of the whole model."""
    device = next(model.parameters()).device
    n_rows = len(facts[0].rows)
    ids, mask = pad(list(chain(*(fact.rows for fact in facts))), device=device)
    begin = torch.tensor([fact.lookups for fact in facts], device=device).flatten()
    longest = max(len(fact.target) for fact in facts)
    wanted = torch.tensor([fact.offsets(longest) for fact in facts], device=device).flatten(0, 1)
    source = name_of(model, "mlp_out", site.key_layer)
    target = name_of(model, site.part, site.layer)
    mlp = name_of(model, "mlp_out", site.layer)
    groups = list(chain(*([fact.group] * n_rows for fact in facts)))
    with (each_row(model, versions, groups),
          capture(model, [source], "input", stop=False) as inputs,
          capture(model, list({target, mlp}), stop=False) as outputs):
        state = start(model, ids, mask, begin=begin, layer=site.layer, wanted=wanted)
    keys, values, mlp = (part[:, 0].unflatten(0, (len(facts), n_rows))[:, :-1]
                         for part in (inputs[source], outputs[target], outputs[mlp]))
    wide = torch.promote_types(values.dtype, torch.float32)
    values = values.to(wide)
    return state, values[:, 0], values.mean(1), keys, mlp[:, 0].to(wide)


def _places(present, contexts):
    """(facts, contexts, steps, weights that sum to 1 per fact) of targets; present (n, s)."""
    facts, context, steps = present[:, None].expand(-1, contexts, -1).nonzero(as_tuple=True)
    return facts, context, steps, 1 / (contexts * present.sum(1).double())[facts]


def _loss(model, state, delta, *, targets, places, h0, reference, config):
    """The loss with `delta` (n, d) added at the lookup positions.

    targets (n, s): target tokens; places: what `_places` gives. reference: the log-probabilities
    before, None at first. Returns (loss (n,), log-probabilities (n, V) at the KL rows, (n,) 1.0
    where all target tokens are the argmax).
    """
    n_rows = len(state.hidden) // len(delta)
    first = state.hidden[:, 0] + delta.to(state.hidden.dtype).repeat_interleave(n_rows, 0)
    final = resume(model, state, torch.cat([first[:, None], state.hidden[:, 1:]], 1))
    final = final.unflatten(0, (len(delta), n_rows))                    # (n, contexts + 1, s, d)
    facts, contexts, steps, weights = places
    logits = head(model, torch.cat([final[facts, contexts, steps], final[:, -1, 0]]))
    wanted = logits[:len(facts)]
    tokens = targets[facts, steps]
    each = torch.nn.functional.cross_entropy(wanted, tokens, reduction="none")
    nll = torch.zeros(len(delta), dtype=each.dtype, device=each.device)
    nll = nll.index_add(0, facts, each * weights.to(logits.dtype))
    log_p = logits[len(facts):].log_softmax(-1)
    before = log_p.detach() if reference is None else reference
    kl = (log_p.exp() * (log_p - before)).sum(-1)
    decay = config.weight_decay * delta.norm(dim=1) / h0.norm(dim=1) ** 2
    missed = (wanted.argmax(-1) != tokens).long()
    hit = torch.zeros_like(targets[:, 0]).index_add(0, facts, missed) == 0
    loss = nll + config.kl_factor * kl + decay
    return loss, log_p, hit.to(loss.dtype)


def _note(loss, losses, active, facts):
    """Write down the loss (n,) of each active fact, which is returned."""
    for index, value in zip(active.tolist(), loss.tolist()):
        losses[index].append(value)
        if value != value or abs(value) == float("inf"):
            step = len(losses[index])
            raise ValueError(f"record {facts[index].case_id}: the loss is {value} at step {step}; "
                             "the model's weights may be broken, or lr too large")
    return loss


def adam(value, moments, gradient, *, step, lr, active=slice(None)):
    """Take one step of Adam (arXiv:1412.6980) on the active rows of `value`, in place.

    torch's own cannot leave rows alone. moments: the pair of running means, zeros at first.
    """
    mean, square = moments
    mean[active] = mean[active].lerp(gradient, 0.1)
    square[active] = square[active] * 0.999 + 0.001 * gradient * gradient
    spread = square[active].sqrt() / (1 - 0.999 ** step) ** 0.5 + 1e-8
    value[active] -= lr / (1 - 0.9 ** step) * mean[active] / spread
