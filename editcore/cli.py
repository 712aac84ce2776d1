"""Answer the command line: python -m editcore COMMAND; --help lists the commands."""

import dataclasses
import multiprocessing
import os
import sys
import time
import tomllib
from pathlib import Path
from typing import Annotated

import typer

from editcore import commands, outputs
from editcore.commands import pairs, spread

# Commands import what they need themselves: torch takes seconds, and --help needs none of it.
RESUMED = ("study", "report", "run", "train")     # they go on where they were stopped
MANIFEST = Path(__file__).parents[1] / "data/manifest.toml"


def argument(metavar, help, kind=str):
    """Return the type of a positional argument."""
    return Annotated[kind, typer.Argument(metavar=metavar, help=help)]


def option(name, metavar, help, *more, kind=str, **limits):
    """Return the type of an option; more: its other names; limits: min, max of a number."""
    return Annotated[kind, typer.Option(name, *more, metavar=metavar, help=help, **limits)]


Model = argument("MODEL", '"pocket", "smollm2", a folder, a GGUF file, or a Hugging Face name')
Facts = argument("FACTS.json", "list of {prompt, subject, target_new}, or CounterFact's records")
Texts = option("--texts", "FILE.txt", "text for the second moments of keys, one passage per line; "
               "default: texts.txt in the model's folder, else what the model itself writes")
Moments = option("--stats", "FILE", "ready second moments, tensors C/{module}")
Contexts = option("--contexts", "FILE", "context templates; default: sampled from the model")
Settings = option("--set", "NAME=VALUE ...", "the editor's: layer=3 layers=0,1 lambda=200; or "
                  "@FILE, which `site` writes", kind=list[str])
Words = option("-p", "NAME VALUE ...", "parameters, as in -p n_edits 300 orders 0,1",
               kind=list[str])
Seed = option("--seed", "N", "of everything that is drawn", kind=int, min=0, max=2 ** 32 - 1)
Dtype = option("--dtype", "NAME", "of the weights: float32, float64, float16 or bfloat16; default: "
               "float32, or the edit's; of `apply`: that of the model's files")
Device = option("--device", "NAME", "default: a GPU where there is one")
Workers = option("--workers", "N", "processes", kind=int, min=1)
Force = option("--force", None, "even if it is done, or was made for other weights", kind=bool)
Full = option("--full", None, "with the parameters of the full study", kind=bool)
Notebooks = option("--notebooks", "DIR", "folder of the notebooks")
Output = option("-o", "FILE|DIR", "where the result goes", "--output")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  help="Edit facts in language models, and measure what the edits do.")


# ── edits ───────────────────────────────────────────────────────────────────────────────────────

class EditHelp(typer.core.TyperCommand):
    """The help of `edit`, with every editor and its settings at the end."""

    def format_epilog(self, ctx, formatter):
        """Write a line per editor, then the example."""
        lines = "".join(f"  {line}\n" for line in commands.settings_lines())
        formatter.write(f"\nEditors and their settings (?: published for some models):\n{lines}")
        super().format_epilog(ctx, formatter)


@app.command(cls=EditHelp, epilog="example: python -m editcore edit pocket facts.json --editor "
             "rome --set layer=0 lr=0.05 --sequential -o delta.safetensors")
def edit(model: Model, facts: Facts, output: Output,
         editor: option("--editor", "NAME", "one of those below"),
         set: Settings = (), contexts: Contexts = "", texts: Texts = "", stats: Moments = "",
         sequential: option("--sequential", None, "every update edits the model as those before "
                            "left it; default: the unedited model", kind=bool) = False,
         batch_size: option("--batch-size", "N", "facts per update; default: all, or 1 with "
                            "--sequential", kind=int, min=1) = None,
         seed: Seed = 0, dtype: Dtype = "float32", device: Device = ""):
    """Edit facts into a model and write the change of its weights."""
    from editcore import model as models
    from editcore import templates
    from editcore.editors import configure, prepare
    from editcore.facts import check_agreement, read_facts
    from editcore.files import read_lines, sha256
    from editcore.study.run import check_prompts

    path = outputs.check_file(output, models.resolve(model), facts, texts, stats, contexts)
    if texts and stats:
        raise ValueError("give --texts or --stats, not both")
    records = read_facts(facts)
    if not sequential:
        check_agreement(records)
    chosen = commands.settings(set, editor)
    config = configure(editor, chosen, model)   # a wrong word is found before the model is loaded
    seed = config.seed if chosen.pop("seed", None) is not None else seed
    size = batch_size if batch_size is not None else 1 if sequential else len(records)
    inputs = {"texts": read_lines(texts) if texts else None, "moments": stats or None,
              "contexts": templates.read(contexts) if contexts else None}
    net, tok = commands.load_model(model, device, dtype)
    check_prompts(tok, records, models.max_length(net))
    config, prepared = prepare(net, tok, editor, **inputs, seed=seed, pilot=records, **chosen)
    templates_used = tuple(getattr(prepared, "contexts", ()))
    check_prompts(tok, records, models.max_length(net), templates=templates_used or ("{}",))
    began = time.monotonic()
    total, reported = commands.edit_all(net, tok, records, editor, config, prepared=prepared,
                                        size=size, sequential=sequential)
    models.synchronize(next(net.parameters()).device)
    seconds = time.monotonic() - began
    likely = commands.most_likely(net, tok, records, total)
    total = dataclasses.replace(total, info=reported | {
        "editor": editor, "settings": dataclasses.asdict(config), "model": model,
        "model_hash": models.content_hash(net), "dtype": dtype, "facts": Path(facts).name,
        "facts_hash": sha256(facts), "edits": len(records), "batch_size": size,
        "sequential": sequential, "seed": seed, "contexts": list(templates_used),
        "seconds": seconds, "seconds_per_edit": seconds / len(records), "most_likely": likely})
    total.save(path)
    say(f"{output}: {len(records)} facts, {seconds / len(records):.3f} s per edit")
    say(f"  {sum(likely)} of {len(records)} new answers are now the most likely ones")
    for name in sorted(getattr(total, "changes", None) or total.parts):
        say(f"  {name}  norm {total.norm(name):.4f}")


@app.command(epilog="example: python -m editcore apply pocket delta.safetensors -o edited")
def apply(model: Model, delta: argument("DELTA.safetensors", "what `edit` wrote"), output: Output,
          dtype: Dtype = "", device: Device = "", force: Force = False):
    """Write a model with an edit in its weights, which transformers loads."""
    from editcore.delta import load
    from editcore.files import atomic_folder
    from editcore.model import resolve

    folder = outputs.check_folder(output, resolve(model), delta, new=True)
    change = load(delta)
    if not hasattr(change, "changes"):
        raise ValueError(f"{delta}: works beside the weights and cannot be written into them")
    net, tok = commands.load_model(model, device, dtype or commands.stored_dtype(model), change,
                                   force=force)
    with atomic_folder(folder) as beside:
        with change.applied(net):
            net.save_pretrained(beside)
        tok.save_pretrained(beside)
    say(output)


@app.command(epilog="example: python -m editcore evaluate pocket facts.json --delta "
             "delta.safetensors -o rows.csv")
def evaluate(model: Model, facts: Facts, output: Output,
             delta: option("--delta", "FILE", "edit that is in the model while it is asked") = "",
             metrics: option("--metrics", "NAME ...", "some of ES PS NS XS PO greedy",
                             kind=list[str]) = ("ES", "PS", "NS"),
             dtype: Dtype = "float32", device: Device = "", force: Force = False):
    """Ask a model, or a model with an edit, about facts; write rows to a .csv or .parquet file."""
    import pandas as pd

    from editcore import progress
    from editcore.delta import Delta, load
    from editcore.facts import read_facts
    from editcore.files import atomic
    from editcore.metrics import check_names, lacking, measure, score
    from editcore.model import resolve, short_name
    from editcore.study.results import COLUMNS
    from editcore.study.run import data_name

    path = outputs.check_file(output, resolve(model), facts, delta)
    kind = Path(output).suffix
    if kind not in (".csv", ".parquet"):
        raise ValueError(f"-o {output}: give a name that ends in .csv or .parquet")
    check_names(metrics)
    records = read_facts(facts)
    change = load(delta) if delta else Delta({})
    net, tok = commands.load_model(model, device, dtype, change, force=force)
    with change.applied(net):
        rows = measure(net, tok, records, tuple(metrics))
    if missing := lacking(rows, metrics):
        message = (f"{facts}: no record has what {', '.join(missing)} ask for: ES and PS a "
                   "target_true, PS, NS and PO their prompts")
        if not rows:
            raise ValueError(message)
        progress.say(message)
    rows = pd.DataFrame(rows)
    rows = rows.assign(run="", model=short_name(model), editor=change.info.get("editor", ""),
                       data=data_name(Path(facts)), seed=0, step=change.info.get("edits", 0),
                       fact=rows["fact"].astype(str))
    with atomic(path) as file:
        write = rows[COLUMNS].to_csv if kind == ".csv" else rows[COLUMNS].to_parquet
        write(file, index=False)
    table = rows.groupby("metric", sort=False)["value"].agg(mean="mean", facts="size")
    if {"ES", "PS", "NS"} <= set(table.index):
        table.loc["S"] = [score(rows.to_dict("records")), len(records)]
    say(table.astype({"facts": int}).to_string(float_format="%.4f"))


@app.command(epilog="example: python -m editcore disabling counterfact.json --tokenizer gpt2")
def disabling(facts: Facts,
              tokenizer: option("--tokenizer", "NAME|FOLDER", "default: the model's") = "",
              model: option("--model", "MODEL", "also give what ROME would divide by") = "",
              set: Settings = (), texts: Texts = "", stats: Moments = "", contexts: Contexts = "",
              seed: Seed = 0, dtype: Dtype = "float32", device: Device = ""):
    """List the edits that ROME's published code is predicted to make far too large."""
    from editcore import disabling as prediction
    from editcore.facts import read_facts
    from editcore.study.measure import denominators
    from editcore.study.run import make_run

    unreadable = []
    records = read_facts(facts, unreadable)
    if not tokenizer and not model:
        raise ValueError("give --tokenizer NAME or FOLDER, or --model")
    tok = prediction.tokenizer(tokenizer or model)
    table = None
    if model:
        run = make_run(model=model, facts=facts, editor="rome",
                       settings=commands.settings(set, "rome"), texts=texts,
                       stats=stats, contexts=contexts, seed=seed, dtype=dtype, device=device)
        table = denominators(run, records)
    say(prediction.listing(tok, records, table, len(unreadable)))


@app.command(epilog="example: python -m editcore moments gpt2-xl --layers 13,14,15,16,17 "
             "-o gpt2-xl.safetensors")
def moments(model: Model, output: Output, texts: Texts = "",
            layers: option("--layers", "N,N|all", "whose keys") = "all",
            tokens: option("--tokens", "N", "of the texts; default: all", kind=int, min=0) = 0,
            seed: Seed = 0, dtype: Dtype = "float32", device: Device = ""):
    """Count the second moments of keys that ROME's and MEMIT's families need, into a file."""
    from editcore.model import resolve

    path = outputs.check_file(output, resolve(model), texts)
    counted = commands.count_moments(model, texts, layers, tokens=tokens, seed=seed, dtype=dtype,
                                     device=device)
    counted.save(path)
    say(f"{output}: {len(counted.moments)} layers, {counted.count} tokens")


@app.command(epilog="example: python -m editcore site smollm2 -o site-smollm2")
def site(model: Model, facts: argument("FACTS.json", "facts that the model may know; default: "
                                       "beside it") = "",
         texts: Texts = "", stats: Moments = "",
         held_out: option("--held-out", "FILE.txt", "passages for perplexity") = "",
         layers: option("--layers", "N,N", "to try; default: where MLPs carry the answer") = "",
         number: option("--facts", "N", "facts edited at every point", kind=int, min=1) = 8,
         editors: option("--editors", "NAME ...", 'or "all": only compared', kind=list[str]) = (),
         seed: Seed = 0, device: Device = "", output: Output = "site"):
    """Find layer and settings for single edits: patching, a sweep; or compare as published."""
    from editcore import site as search
    from editcore.model import resolve

    outputs.check_folder(output, resolve(model), facts, texts, stats)
    place = commands.site_inputs(model, facts, texts, stats=stats, held_out=held_out, seed=seed,
                                 number=number, device=device, ordinary=bool(editors))
    say(commands.compared(place, output, editors) if editors
        else search.search(place, output, commands.numbers(layers, "--layers")))


# ── studies and reports ─────────────────────────────────────────────────────────────────────────

@app.command(epilog="example: python -m editcore study conventions orders -p n_edits 300")
def study(names: argument("[PLAN ...]", "orders methods conventions batches lambdas layers tokens "
                          "(default: these), real; with --full notebooks", kind=list[str]) = (),
          p: Words = (), model: option("--model", "MODEL ...", "models", kind=list[str]) = (),
          workers: Workers = 1,
          list_: option("--list", None, "a line per run: id, state, parameters", kind=bool) = False,
          only: option("--only", "ID", "one of these runs") = "", full: Full = False,
          notebooks: Notebooks = "notebooks", output: Output = "results/runs"):
    """Make the runs of the study that are missing, or go on with those that were stopped."""
    from editcore.model import resolve
    from editcore.study import plans
    from editcore.study.loop import execute_all

    if not list_:
        outputs.check_folder(output, *map(resolve, model), notebooks)
    runs = commands.planned(names, pairs(p), model or ["pocket"], full=full, notebooks=notebooks)
    commands.check_facts(runs)
    status = plans.status(runs, output)
    if only:
        chosen = status["run"] == only
        if not chosen.any():
            raise ValueError(f"--only {only}: not among the runs that these words plan; see --list")
        runs = [runs[chosen.argmax()]]
        status = status[chosen]
    if list_:
        for run, line in zip(runs, status.to_dict("records"), strict=True):
            say(commands.run_line(run, line))
        return
    execute_all(runs, output, workers)
    missing = status["status"].isin(["missing", "begun"]).sum()
    say(f"{output}: {len(runs)} runs, {missing} of them made or finished now")


@app.command(epilog="example: python -m editcore report -p 20_forgetting.n_edits 200")
def report(p: Words = (), full: Full = False, force: Force = False, workers: Workers = 2,
           notebooks: Notebooks = "notebooks",
           publish: option("--publish", "DIR", "also copy the report there") = "",
           output: Output = "results/reports"):
    """Make the runs, execute all notebooks, and write the HTML report with its index page."""
    from editcore import pages, report

    outputs.check_folder(output, notebooks)
    if publish:
        pages.check_publish(output, publish)
    parameters = report.chosen_parameters(notebooks, pairs(p), full=full)
    page = report.build(notebooks, output, parameters, force=force, workers=workers)
    say(pages.publish(output, publish) if publish else page)


@app.command(epilog="example: python -m editcore run notebooks/10_edit.ipynb -p editor memit")
def run(notebook: argument("NOTEBOOK", "path of the notebook"), p: Words = (), force: Force = False,
        output: Output = "results/reports"):
    """Execute one notebook with parameters and render it."""
    from editcore import report

    outputs.check_folder(output, notebook)
    say(report.run_notebook(notebook, pairs(p), output, force=force))


@app.command(epilog="example: python -m editcore train main subsets --workers 2")
def train(names: argument("[LIST ...]", "main single transfer subsets styles descriptions balance "
                          "directions; default: all", kind=list[str]) = (),
          model: option("--model", "MODEL", "that they edit") = "pocket",
          data: option("--data", "DIR", "of TASK_train.json ...; default: beside the model") = "",
          examples: option("--examples", "N", "edits learned from; default: published",
                           kind=int) = 0,
          seed: Seed = 0, workers: Workers = 1, output: Output = "results/editors"):
    """Train the hypernetworks (MEND, InstructEdit, KE) that are not trained yet."""
    from editcore.instructedit import trained_editors
    from editcore.model import resolve

    outputs.check_folder(output, resolve(model), data)
    lists = trained_editors.LISTS
    editors = []
    for name in names or lists:
        if name not in lists:
            raise ValueError(f"unknown list {name!r}: choose one of {', '.join(lists)}")
        editors += lists[name](model, data=data, examples=examples, seeds=[seed])
    paths = trained_editors.train_all([config for _, config in editors], output, workers)
    for line in dict.fromkeys(f"{path}\t{name}" for path, (name, _) in zip(paths, editors)):
        say(line)


# ── real data ───────────────────────────────────────────────────────────────────────────────────

@app.command(epilog="example: python -m editcore data counterfact -o counterfact.json")
def data(name: argument("NAME", "data set; default: list them") = "",
         output: option("-o", "FILE", "fetch it to this file", "--output") = "",
         check: option("--check", "FILE", "compare this file with what is known of it") = ""):
    """List the real data sets, fetch one, or check a file against what is known of it."""
    sources = tomllib.loads(MANIFEST.read_text("utf-8"))
    if name not in sources and (name or output or check):
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(sources)}")
    if output:
        output = outputs.check_file(output, check)
    if check or output:
        work = commands.check_data if check else commands.fetch_data
        say(work(name, sources[name], check or output))
    elif name:
        say("\n".join(f"{key:8}{value or 'not known'}" for key, value in sources[name].items()))
    else:
        for key, source in sources.items():
            how = "fetch" if source["url"] else "by hand"
            say(f"{key:22}{source['rows'] or '?':>6} rows  {how:8} {source['about']}")


# ── words ───────────────────────────────────────────────────────────────────────────────────────

def say(text):
    """Answer on standard output."""
    sys.stdout.write(f"{text}\n")


def main(words=None):
    """Run one command; return 0, or 2 after one line on standard error, or 130 after Ctrl-C."""
    words = sys.argv[1:] if words is None else list(words)
    try:
        if words and "--help" not in words:
            from editcore import progress

            progress.show_log()
        if app(spread(words), prog_name="editcore", standalone_mode=False) == 130:
            raise KeyboardInterrupt
        return 0
    except typer.TyperException as error:
        message = f"{error.format_message()} (python -m editcore COMMAND --help)"
    except KeyboardInterrupt:
        resumes = words[:1] and words[0] in RESUMED
        end = "the same command goes on from here" if resumes else "nothing was written"
        sys.stderr.write(f"editcore: interrupted; {end}\n")
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        message = str(error)
    except Exception as error:      # of a library: a reader is not helped by pages of its lines
        if os.environ.get("EDITCORE_TRACEBACK"):
            raise
        message = f"{type(error).__name__}: {error} (EDITCORE_TRACEBACK=1 shows where)"
    sys.stderr.write(f"editcore: {' '.join(message.split()) or 'failed'}\n")
    return 2


def end_politely(*_):
    """Take Ctrl-C and SIGTERM, which clusters send first: end the workers, then this process."""
    for process in multiprocessing.active_children():
        process.terminate()
    raise KeyboardInterrupt
