"""A run and its unedited model in; instruments prepared once, and rows of what they show after each edit, out."""

import math
from dataclasses import dataclass, replace

import torch

from editcore import fewshot as downstream
from editcore import metrics
from editcore import templates as contexts
from editcore.delta import added
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.files import read_lines
from editcore.model import content_hash, default_device, load, max_length
from editcore.study import run as inputs
from editcore.study.run import Run


@dataclass(frozen=True)
class Lab:
    """A run's model and all that is measured on it."""

    run: Run
    model: torch.nn.Module      # carries the edits made so far
    tok: object
    config: object              # the editor's settings
    prepared: object            # the editor's contexts and second moments, from the unedited model
    facts: list                 # to edit, in order
    probes: metrics.Probes      # run.measure of these facts
    before: metrics.Probes      # run.before of these facts
    again: metrics.Probes       # ES of these facts, for the re-tests
    untouched: metrics.Probes   # ES of never-edited facts' true answers
    tasks: tuple                # downstream.Task of each few-shot task
    held_out: list              # texts for perplexity
    prefixes: tuple             # texts before the rewriting prompt for "XS", () unless run.final asks it
    weights_hash: str           # of the unedited model
    original: dict              # name -> (unedited value, its norm) of changed parameters; filled by `put`


def set_up(run, paths, templates, cache, shared=None):
    """The Lab of a run; all files are read and all prompts checked here, before any edit.

    paths: inputs.files(run); templates: context templates of an earlier start of the same run, () at the first;
    cache: folder for second moments; shared: a Lab of the same model, still unedited, whose model this one uses too.
    """
    facts, rest = inputs.schedule(run, paths["facts"])
    items = inputs.read_tasks(paths["tasks"], run.items) if "tasks" in paths and run.downstream_every else {}
    held_out = read_lines(paths["held_out"], run.items) if "held_out" in paths and run.downstream_every else []
    texts = tuple(read_lines(paths["texts"])) if "texts" in paths else ()
    if "contexts" in paths and not templates:
        templates = contexts.read(paths["contexts"])
    config = configure(run.editor, dict(run.settings), run.model)
    model, tok = (shared.model, shared.tok) if shared else \
        load(run.model, run.device or default_device(), inputs.dtype_of(run.dtype))
    inputs.check_prompts(max_length(model), tok, facts, templates or ("{}",))
    mirrored = [replace(one, target_new=one.target_true, target_true=one.target_new) for one in rest]
    probes = {"probes": metrics.prepare(model, tok, facts, [name for name in run.measure if name != "greedy"]),
              "before": metrics.prepare(model, tok, facts, run.before),
              "again": metrics.prepare(model, tok, facts, ("ES",)),
              "untouched": metrics.prepare(model, tok, mirrored, ("ES",))}
    tasks = downstream.prepare(model, tok, items, run.shots, run.seed)
    given = EditorInputs(texts, paths.get("stats"), tuple(templates), run.seed, str(cache), tuple(facts))
    prepared = EDITORS[run.editor].prepare(model, tok, config, given)
    prefixes = _prefixes(model, tok, facts, run, getattr(prepared, "contexts", ()))
    return Lab(run, model, tok, config, prepared, facts, **probes, tasks=tasks, held_out=held_out, prefixes=prefixes,
               weights_hash=shared.weights_hash if shared else content_hash(model),
               original=shared.original if shared else {})


def put(lab, total):
    """Give the model's parameters their unedited value plus `total`, always from the unedited value."""
    with torch.no_grad():
        for name in lab.original.keys() - total.changes.keys():
            lab.model.get_parameter(name).copy_(lab.original[name][0])
        for name, change in total.changes.items():
            weight = lab.model.get_parameter(name)
            if name not in lab.original:
                lab.original[name] = (weight.detach().clone(), weight.double().norm().item())
            weight.copy_(added(lab.original[name][0], change))


def show(lab, total):
    """`put` of what is to be measured of a sum of updates, and it: the sum, unless the editor restrains it."""
    weights = {name: lab.original[name][0] if name in lab.original else lab.model.get_parameter(name).detach()
               for name in total.changes}
    shown = EDITORS[lab.run.editor].finish(total, weights, lab.config)
    put(lab, shown)
    return shown


def before(lab, group):
    """Rows of the facts with indices `group` just before they are edited."""
    return _named("before_", metrics.evaluate(lab.model, lab.before.select(group)))


def after(lab, group):
    """Rows of the same facts right after their update."""
    facts = [lab.facts[i] for i in group] if "greedy" in lab.run.measure else []
    return metrics.evaluate(lab.model, lab.probes.select(group)) + \
        (metrics.greedy(lab.model, lab.tok, facts, ("ES",)) if facts else [])


def _prefixes(model, tok, facts, run, templates):
    """The prefixes of run.final's "XS" on the unedited model, no editor's template among them; ValueError before any
    edit if run.final cannot be asked."""
    made = metrics.passages(model, tok, facts, run.seed + 1) if "XS" in run.final else ()
    made = tuple(text for text in made if text + " {}" not in templates)
    metrics.prepare(model, tok, facts if run.final else [], run.final, prefixes=made)
    return made


def final(lab):
    """Rows "final_*" of run.final for all edited facts, asked once the run is over."""
    asked = lab.model, lab.tok, lab.facts, lab.run.final
    rows = metrics.evaluate(lab.model, metrics.prepare(*asked, prefixes=lab.prefixes))
    if "greedy" in lab.run.final:
        rows += metrics.greedy(*asked, prefixes=lab.prefixes)
    return _named("final_", rows)


def retest(lab, n):
    """Rows of the first n edited facts, asked again."""
    return _named("retest_", metrics.evaluate(lab.model, lab.again.select(range(n))))


def ability(lab, n):
    """Rows of what the model can do beside the edits: few-shot tasks, perplexity, untouched facts, sampled text.

    n facts have been edited; the text is sampled after the newest of them (before the first edit: after the first).
    """
    run, rows = lab.run, _named("untouched_", metrics.evaluate(lab.model, lab.untouched))
    if lab.tasks:
        rows += downstream.evaluate(lab.model, lab.tok, lab.tasks)
    if lab.held_out:
        rows.append({"metric": "perplexity", "value": metrics.perplexity(lab.model, lab.tok, lab.held_out)})
    if run.generation:
        newest = lab.facts[max(0, n - run.generation):max(n, run.generation)]
        rows += metrics.generation(lab.model, lab.tok, newest, run.seed)
    return rows


def movement(lab, total, new):
    """Rows for every edited parameter: distance (‖ΔW‖_F / number of entries, arXiv 2401.07453), relative
    (‖ΔW‖_F / ‖W‖_F) and update (‖·‖_F of the newest update)."""
    rows = []
    for name in sorted(total.changes):
        moved, (weight, norm) = total.norm(name), lab.original[name]
        values = {"distance": moved / weight.numel(), "relative": moved / norm if norm else math.inf,
                  "update": new.norm(name) if name in new.changes else 0.0}
        rows += [{"fact": name, "metric": metric, "value": value} for metric, value in values.items()]
    return rows


def spectra(lab, total):
    """Rows for every edited matrix: spectral norm and effective rank of its total change, its condition number."""
    rows = []
    for name in sorted(name for name, change in total.changes.items() if change.ndim == 2):
        change = singular_values(total.changes[name])
        weight = singular_values(lab.model.get_parameter(name))
        values = {"spectral": change[0].item(), "effective_rank": effective_rank(change),
                  "condition": (weight[0] / weight[-1]).item()}
        rows += [{"fact": name, "metric": metric, "value": value} for metric, value in values.items()]
    return rows


def singular_values(matrix):
    """(min(rows, columns),) float64 singular values, largest first, from the smaller Gram matrix.

    Values under 1e-8 of the largest are rounding. All are NaN if the matrix is not finite.
    """
    wide = matrix.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    if not torch.isfinite(gram).all():      # a model far gone is measured, not refused
        return torch.full_like(gram[0], math.nan)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(values):
    """exp of the entropy of singular values scaled to sum 1 (Roy and Vetterli 2007); 0 for a zero matrix."""
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total != 0 else 0.0


def reported(facts, info):
    """Rows "edit_<name>" of the numbers that an editor reports: one a fact where its list is as long as `facts`."""
    rows = []
    for name, value in sorted(info.items()):
        if isinstance(value, (list, tuple)) and len(value) == len(facts):
            rows += [{"fact": one.case_id, "metric": f"edit_{name}", "value": item}
                     for one, item in zip(facts, value) if _is_number(item)]
        elif _is_number(value):
            rows.append({"metric": f"edit_{name}", "value": value})
    return [row for row in rows if "seconds" not in row["metric"]]     # rows are the same at every repetition


def update(lab, facts):
    """The dense Delta of one update of the present model; ValueError if it is not finite."""
    return checked(EDITORS[lab.run.editor].edit(lab.model, lab.tok, facts, lab.config, lab.prepared))


def update_together(labs, groups, totals):
    """One update of each of several runs that share a model, which is unedited now: a Delta each, in the same passes.

    groups: the facts of each run's update; totals: the sum of each run's updates so far.
    """
    one, prepared = labs[0], [each.prepared for each in labs]
    editor = EDITORS[one.run.editor]
    return editor.edit_groups(one.model, one.tok, groups, one.config, prepared=prepared, current=totals)


def checked(new):
    """The Delta, dense and in the order of names; ValueError if it is not finite."""
    new = new.dense()
    if not new.is_finite():
        raise ValueError("the update is not finite")
    return replace(new, changes={name: new.changes[name] for name in sorted(new.changes)})


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _named(prefix, rows):
    return [row | {"metric": prefix + row["metric"]} for row in rows]
