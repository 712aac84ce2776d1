"""Measure a run's model: probes prepared once, and the rows of what they show after each update."""

import json
import math
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

import pandas as pd
import torch

from editcore import disabling, fewshot, generate, metrics, templates
from editcore.delta import Delta, added
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.facts import read_facts
from editcore.files import atomic, read_lines, sha256_text
from editcore.knowledge import known
from editcore.model import content_hash, default_device, load, max_length
from editcore.progress import say
from editcore.study.run import (
    Run,
    check_prompts,
    dtype_of,
    input_files,
    input_hashes,
    read_inputs,
    schedule,
)
from editcore.tokens import encode

DISABLING = 10.0    # median updates from which on an edit is predicted to disable the model


@dataclass(frozen=True)
class RunContext:
    """A run's model and all that is measured on it."""

    run: Run
    model: torch.nn.Module      # carries the edits so far; runs of a group share it
    tok: object
    config: object              # the editor's settings
    prepared: object            # what the editor takes from the unedited model
    facts: list                 # to edit, in order
    before: metrics.Probes      # run.before of these facts
    after: metrics.Probes       # run.measure of these facts
    retest: metrics.Probes      # ES of these facts
    untouched: metrics.Probes   # ES of never-edited facts' true answers
    tasks: tuple                # of fewshot.Task
    held_out: list              # passages for perplexity
    prefixes: tuple             # texts before the rewriting prompt for "XS" in run.final
    n_known: int | None         # facts of the file that the unedited model knows; None: not asked
    weights_hash: str           # of the unedited model
    unedited: dict              # name -> (unedited value, its norm) of parameters set so far


def set_up(run, paths, *, contexts=(), cache=None, shared=None):
    """Read a run's files, check all prompts, prepare its editor and probes; nothing is edited.

    paths: `input_files` of the run. contexts: templates of an earlier start of the run. cache:
    folder of second moments. shared: a RunContext whose model, still unedited, is used again.
    """
    inputs = read_inputs(replace(run, known=False), paths)      # errors before the model is loaded
    model, tok = (shared.model, shared.tok) if shared else load_model(run)
    if run.known:
        inputs = read_inputs(run, paths, knows(run, paths, model, tok, cache=cache))
    facts = inputs.facts
    if not shared:
        _say_what_lacks(run, paths)
    if "contexts" in paths and not contexts:
        contexts = templates.read(paths["contexts"])
    check_prompts(tok, facts, max_length(model), templates=contexts or ("{}",))
    mirrored = [replace(fact, target_new=fact.target_true, target_true=fact.target_new)
                for fact in inputs.untouched]
    teacher_forced = [name for name in run.measure if name != "greedy"]
    before = metrics.prepare(model, tok, facts, run.before)
    after = metrics.prepare(model, tok, facts, teacher_forced)
    tasks = fewshot.prepare(model, tok, inputs.tasks, shots=run.shots, seed=run.seed)
    config, prepared = prepare_editor(run, paths, model, tok, pilot=inputs.untouched,
                                      contexts=contexts, cache=cache)
    return RunContext(
        run, model, tok, config, prepared, facts, before, after,
        retest=metrics.prepare(model, tok, facts, ("ES",)),
        untouched=metrics.prepare(model, tok, mirrored, ("ES",)),
        tasks=tasks, held_out=inputs.held_out,
        prefixes=_prefixes(model, tok, facts, run, getattr(prepared, "contexts", ())),
        n_known=inputs.n_known,
        weights_hash=shared.weights_hash if shared else content_hash(model),
        unedited=shared.unedited if shared else {})


def knows(run, paths, model, tok, *, cache=None):
    """Return whether the unedited model knows each fact of a run's file; None if it need not."""
    return known(model, tok, read_facts(paths["facts"]), cache) if run.known else None


def _say_what_lacks(run, paths):
    """Say which tests of what else the model can do are left out, for want of a file."""
    lacking = [name for name in ("tasks", "held_out") if name not in paths]
    if run.downstream_every and lacking:
        say(f"run: no {' and no '.join(lacking)} for model {run.model!r}: not measured; give "
            f"{' and '.join(f'{name}=' for name in lacking)}")


def load_model(run):
    """Return (model, tokenizer) of a run."""
    return load(run.model, run.device or default_device(), dtype_of(run.dtype))


def prepare_editor(run, paths, model, tok, *, pilot=(), contexts=(), cache=None):
    """Return (settings, what the run's editor takes from the unedited model).

    Second moments come from the run's file of them, from its texts, or from texts that the model
    writes itself. pilot: facts, never edited, that set the norm of an editor with an anchor.
    """
    editor = EDITORS[run.editor]
    config = configure(run.editor, dict(run.settings), run.model)
    texts = ()
    if "texts" in paths:
        texts = read_lines(paths["texts"])
    elif editor.needs_moments and "stats" not in paths:
        texts = generate.own_texts(model, tok, config.n_tokens, folder=cache)
    inputs = EditorInputs(tuple(texts), paths.get("stats"), tuple(contexts), run.seed,
                          cache=cache and str(cache), pilot=tuple(pilot))
    return config, editor.prepare(model, tok, config, inputs)


def _prefixes(model, tok, facts, run, contexts):
    """Sample prefixes for "XS", none of them a context template; ValueError for a bad final."""
    texts = metrics.passages(model, tok, facts, run.seed + 1) if "XS" in run.final else ()
    prefixes = tuple(text for text in texts if text + " {}" not in contexts)
    metrics.prepare(model, tok, facts if run.final else [], run.final, prefixes=prefixes)
    return prefixes


def set_weights(context, total):
    """Give the model's parameters their unedited value plus the Delta `total`."""
    unedited = context.unedited
    with torch.no_grad():
        for name in unedited.keys() - total.changes.keys():
            context.model.get_parameter(name).copy_(unedited[name][0])
        for name, change in total.changes.items():
            weight = context.model.get_parameter(name)
            if name not in unedited:
                unedited[name] = (weight.detach().clone(), weight.double().norm().item())
            weight.copy_(added(unedited[name][0], change))


def set_measured_weights(context, total):
    """Set the weights to be measured (PRUNE clips the total first); returns their change."""
    weights = {}
    for name in total.changes:
        known = context.unedited.get(name)
        weights[name] = known[0] if known else context.model.get_parameter(name).detach()
    measured = EDITORS[context.run.editor].finish(total, weights, context.config)
    set_weights(context, measured)
    return measured


def rows_before(context, group):
    """Measure the facts with indices `group` just before they are edited."""
    return _named("before_", metrics.evaluate(context.model, context.before.select(group)))


def rows_after(context, group):
    """Measure the same facts right after their update."""
    rows = metrics.evaluate(context.model, context.after.select(group))
    if "greedy" in context.run.measure:
        facts = [context.facts[i] for i in group]
        rows += metrics.greedy(context.model, context.tok, facts, ("ES",))
    return rows


def rows_retested(context, n):
    """Measure the first n edited facts again."""
    return _named("retest_", metrics.evaluate(context.model, context.retest.select(range(n))))


def rows_final(context):
    """Measure run.final of all edited facts, once the run is over."""
    model, tok, facts, names = context.model, context.tok, context.facts, context.run.final
    probes = metrics.prepare(model, tok, facts, names, prefixes=context.prefixes)
    rows = metrics.evaluate(model, probes)
    if "greedy" in names:
        rows += metrics.greedy(model, tok, facts, names, prefixes=context.prefixes)
    return _named("final_", rows)


def rows_ability(context, n):
    """Measure what the model can do beside the n edits so far.

    These are never-edited facts, few-shot tasks, perplexity, and text sampled after the newest
    edits (before the first edit: after the first).
    """
    run, model, tok = context.run, context.model, context.tok
    rows = _named("untouched_", metrics.evaluate(model, context.untouched))
    if context.tasks:
        rows += fewshot.evaluate(model, tok, context.tasks)
    if context.held_out:
        value = metrics.perplexity(model, tok, context.held_out)
        rows.append({"metric": "perplexity", "value": value})
    if run.generation:
        newest = context.facts[max(0, n - run.generation):max(n, run.generation)]
        rows += metrics.generation(model, tok, newest, run.seed)
    return rows


def rows_movement(context, total, update):
    """Say how far each edited parameter has moved.

    distance ‖ΔW‖_F / number of entries (arXiv 2401.07453), relative ‖ΔW‖_F / ‖W‖_F, and update,
    the Frobenius norm of the newest update.
    """
    rows = []
    for name in sorted(total.changes):
        moved = total.norm(name)
        weight, norm = context.unedited[name]
        values = {"distance": moved / weight.numel(),
                  "relative": moved / norm if norm else math.inf,
                  "update": update.norm(name) if name in update.changes else 0.0}
        rows += [{"fact": name, "metric": key, "value": value} for key, value in values.items()]
    return rows


def rows_spectra(context, total):
    """Say of every edited matrix how its change and its value are spread over directions.

    spectral and effective_rank are of the total change, condition of the edited matrix.
    """
    rows = []
    for name in sorted(name for name, change in total.changes.items() if change.ndim == 2):
        change = singular_values(total.changes[name])
        weight = singular_values(context.model.get_parameter(name))
        values = {"spectral": change[0].item(), "effective_rank": effective_rank(change),
                  "condition": (weight[0] / weight[-1]).item()}
        rows += [{"fact": name, "metric": key, "value": value} for key, value in values.items()]
    return rows


def rows_reported(facts, info):
    """Turn the numbers that an editor reports into rows "edit_<name>".

    A list as long as `facts` gives a row per fact. Times are left out: rows are the same at every
    repetition.
    """
    rows = []
    for name, value in sorted(info.items()):
        if "seconds" in name:
            continue
        values = [({}, value)]
        if isinstance(value, (list, tuple)) and len(value) == len(facts):
            values = [({"fact": fact.case_id}, item) for fact, item in zip(facts, value)]
        rows += [fact | {"metric": f"edit_{name}", "value": item} for fact, item in values
                 if isinstance(item, (int, float)) and not isinstance(item, bool)]
    return rows


def answers(context, facts):
    """Let the model write run.answers tokens after each fact's prompt, greedily; a list of texts.

    "" stands for prompts that leave the model no room.
    """
    n_new = context.run.answers
    limit = max_length(context.model) - n_new
    prompts = [fact.text for fact in facts]
    fits = [len(row) <= limit for row in encode(context.tok, prompts)]
    texts = iter(generate.answers(context.model, context.tok, [*compress(prompts, fits)], n_new))
    return [next(texts) if fit else "" for fit in fits]


def cases(context, state):
    """Return a DataFrame of the edited facts and what the model wrote about each, when.

    answer_before is by the unedited model, answer_after right after the edit, answer_end after the
    last; forgotten_at is the first re-test step at which the exact answer failed, NaN if none.
    """
    facts = context.facts[:state.step]
    columns = ("case_id", "subject", "text", "target_new", "target_true", "relation")
    table = pd.DataFrame([[getattr(fact, name) for name in columns] for fact in facts],
                         columns=["fact", "subject", "prompt", *columns[3:]])
    size = context.run.batch_size
    steps = [min((index // size + 1) * size, len(context.facts)) for index in range(len(facts))]
    set_weights(context, Delta({}))
    unedited = answers(context, facts)
    set_measured_weights(context, state.total)
    failed = {}
    for step, fact, metric, value in state.rows:
        if metric == "retest_ES_exact" and value < 1:
            failed.setdefault(fact, step)
    table["fact"] = table["fact"].astype(str)
    return table.assign(step=steps, answer_before=unedited, answer_after=state.answers,
                        answer_end=answers(context, facts),
                        forgotten_at=table["fact"].map(failed).astype(float))


def denominators(run, facts=None, *, limit=0, out_dir="results/runs"):
    """Tabulate `disabling.denominators` with a run's own contexts and second moments.

    facts: default are those of the run's file, one per subject, in its order; limit: the first so
    many, 0 all. Nothing is edited. ValueError if the run's editor is none of ROME's family.
    """
    if run.editor not in disabling.DENOMINATOR_OF:
        raise ValueError(f"{run.editor} divides by no denominator; choose one of "
                         f"{', '.join(disabling.DENOMINATOR_OF)}")
    paths = input_files(run)
    model, tok = load_model(run)
    cache = Path(out_dir) / "moments"
    if facts is None:
        every = replace(run, n_edits=0, leave_out=(), insert=())
        facts, _ = schedule(every, paths["facts"], knows(run, paths, model, tok, cache=cache))
    contexts = templates.read(paths["contexts"]) if "contexts" in paths else ()
    config, prepared = prepare_editor(run, paths, model, tok, contexts=contexts, cache=cache)
    return disabling.denominators(model, tok, facts[:limit or None], config, prepared)


def predicted(run, *, least=DISABLING, out_dir="results/runs"):
    """Return the case ids of a run's facts whose updates will be `least` median ones or more.

    The table of `denominators` is kept in out_dir/moments by all that it is made from.
    """
    paths = input_files(run)
    made_from = [input_hashes(run, paths), run.known, run.seed, run.dtype, run.editor, run.settings]
    key = sha256_text(json.dumps(made_from, sort_keys=True))
    path = Path(out_dir) / "moments" / f"denominators-{key[:24]}.parquet"
    if not path.is_file():
        table = denominators(run, out_dir=out_dir)
        with atomic(path) as tmp:
            table.to_parquet(tmp, index=False)
    table = pd.read_parquet(path)
    return table.loc[table["expected"] >= least, "case_id"].tolist()


def singular_values(matrix):
    """Return (min(rows, columns),) float64 singular values, largest first.

    They are from the smaller Gram matrix: values under 1e-8 of the largest are rounding. All are
    NaN if the matrix is not finite: a model far gone is measured, not refused.
    """
    wide = matrix.detach().double()
    gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
    if not torch.isfinite(gram).all():
        return torch.full_like(gram[0], math.nan)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(values):
    """exp of the entropy of singular values scaled to sum 1 (Roy and Vetterli 2007), or 0."""
    total = values.sum()
    return torch.special.entr(values / total).sum().exp().item() if total != 0 else 0.0


def _named(prefix, rows):
    return [row | {"metric": prefix + row["metric"]} for row in rows]
