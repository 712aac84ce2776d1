"""Words of a command line in; the command done, or one line that says what is wrong, out (python -m editcore)."""

import argparse
import sys


def main(words=None):
    """Run one command; 0, or 2 after one line "editcore: …" on standard error, or 130 after Ctrl-C."""
    try:
        given = parser().parse_args(words)
        from editcore import commands

        commands.progress.to_stderr()
        commands.COMMANDS[given.command](given)
        return 0
    except (ValueError, OSError, RuntimeError) as error:
        sys.stderr.write(f"editcore: {' '.join(str(error).split())}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("editcore: interrupted; the same command takes up what was kept\n")
        return 130


def parser():
    """The parser of all commands; a wrong word raises ValueError."""
    top = argparse.ArgumentParser(prog="editcore", description="Edit facts in language models, measure what it does.")
    made = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, about, example):
        return made.add_parser(name, help=about, description=about, epilog=f"example: python -m editcore {example}",
                               formatter_class=argparse.RawDescriptionHelpFormatter)

    for add in (_add_edit, _add_apply, _add_evaluate, _add_notebooks, _add_study, _add_hyper, _add_disabling,
                _add_data):
        add(command)
    for one in (top, *made.choices.values()):
        one.error = _refuse
    return top


def _refuse(message):
    raise ValueError(f"{message} (python -m editcore COMMAND --help)")


def _add_edit(command):
    edit = command("edit", "edit facts into a model and write the change of its weights",
                   "edit pocket facts.json --editor rome --set layer=0 lr=0.05 --sequential -o delta.safetensors")
    _add_model(edit)
    edit.add_argument("facts", metavar="FACTS.json",
                      help='list of {"prompt", "subject", "target_new"}, or CounterFact records')
    edit.add_argument("--editor", required=True, metavar="NAME", help="rome, memit or ft")
    edit.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings of the "
                      "editor: layer=3 layers=0,1,2 lambda=200 …; an unknown name lists them all")
    edit.add_argument("--contexts", metavar="FILE.json", help="context templates (default: sampled from the model)")
    source = edit.add_mutually_exclusive_group()
    source.add_argument("--texts", metavar="FILE.txt", help="text for the second moments of keys, one passage a line "
                        "(default: texts.txt in the model's folder)")
    source.add_argument("--stats", metavar="FILE.safetensors", help="ready second moments, tensors C/{module}")
    edit.add_argument("--sequential", action="store_true", help="every update edits the model as those before left it "
                      "(default: the unedited model)")
    edit.add_argument("--batch-size", type=int, metavar="N", help="facts an update (default: all; 1 with --sequential)")
    edit.add_argument("--seed", type=int, default=0, help="of sampled context templates (default: 0)")
    _add_output(edit, "DELTA.safetensors")


def _add_apply(command):
    apply = command("apply", "write a model with a delta in its weights, loadable by transformers",
                    "apply pocket delta.safetensors -o edited")
    _add_model(apply, dtype=None)
    apply.add_argument("delta", metavar="DELTA.safetensors")
    apply.add_argument("--force", action="store_true", help="though the delta was made for other weights")
    _add_output(apply, "DIR")


def _add_evaluate(command):
    evaluate = command("evaluate", "ask a model, or a model with a delta, about facts",
                       "evaluate pocket facts.json --delta delta.safetensors -o rows.parquet")
    _add_model(evaluate)
    evaluate.add_argument("facts", metavar="FACTS.json")
    evaluate.add_argument("--delta", metavar="DELTA.safetensors", help="in the model's weights while it is asked")
    evaluate.add_argument("--metrics", nargs="+", default=["ES", "PS", "NS"], metavar="NAME",
                          help="some of ES PS NS PO greedy (default: ES PS NS)")
    evaluate.add_argument("--force", action="store_true", help="though the delta was made for other weights")
    _add_output(evaluate, "ROWS.parquet")


def _add_notebooks(command):
    run = command("run", "execute one notebook with parameters and render it",
                  "run notebooks/10_edit.ipynb -p editor memit -p n_edits 100")
    run.add_argument("notebook", metavar="NOTEBOOK")
    run.add_argument("-p", nargs="+", action="append", default=[], metavar="NAME VALUE", dest="parameters")
    report = command("report", "execute all notebooks and write the HTML report with its index page",
                     "report -p 20_forgetting.n_edits 200")
    report.add_argument("-p", nargs="+", action="append", default=[], metavar="[NOTEBOOK.]NAME VALUE",
                        dest="parameters", help="of one notebook, or of all that have it")
    _add_full(report)
    report.add_argument("--publish", metavar="DIR", help="copy the report there, and its findings into README.md")
    for one in (run, report):
        one.add_argument("-o", "--output", default="results/reports", metavar="DIR")
        one.add_argument("--force", action="store_true", help="also what is done already")


def _add_study(command):
    study = command("study", "make the runs of the study that are missing, or go on with those that were stopped",
                    "study conventions orders -p n_edits 300 --workers 2")
    study.add_argument("names", nargs="*", metavar="GRID", help="grids of the file, with --full notebooks "
                       "(default: all)")
    study.add_argument("-p", nargs="+", action="append", default=[], metavar="NAME VALUE", dest="parameters",
                       help="parameters of all runs, with --full of the notebooks: -p n_edits 300 order 0,1")
    study.add_argument("--model", nargs="+", default=[], metavar="MODEL", help="models (default: the file's)")
    study.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    study.add_argument("--list", action="store_true", help="a line a run: id, done or begun or missing, parameters")
    study.add_argument("--only", metavar="ID", help="one of these runs, by its id")
    study.add_argument("-o", "--output", default="results/runs", metavar="DIR")
    _add_full(study)


def _add_hyper(command):
    one = command("hyper", "train the hypernetworks (MEND, InstructEdit, KE) of some grids that are not trained yet",
                  "hyper main subsets --workers 2")
    one.add_argument("names", nargs="*", metavar="GRID", help="grids of the file (default: all)")
    one.add_argument("--model", default="", metavar="MODEL", help="(default: the file's)")
    one.add_argument("--data", default="", metavar="DIR", help="of TASK_train.json … (default: beside the model)")
    one.add_argument("--examples", type=int, default=0, metavar="N", help="edits learned from (default: published)")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--workers", type=int, default=1, metavar="N", help="processes (default: 1)")
    one.add_argument("--file", default="data/systems.toml", metavar="FILE", help="(default: data/systems.toml)")
    _add_output(one, "DIR", "results/editors")


def _add_full(one):
    one.add_argument("--full", action="store_true", help="with the parameters of the full study ([full.NOTEBOOK])")
    one.add_argument("--file", default="data/study.toml", metavar="FILE", help="of grids (default: data/study.toml)")
    one.add_argument("--notebooks", default="notebooks", metavar="DIR")


def _add_disabling(command):
    one = command("disabling", "list the edits that ROME's published code is predicted to make far too large",
                  "disabling counterfact.json --tokenizer gpt2")
    one.add_argument("facts", metavar="FACTS.json")
    one.add_argument("--tokenizer", metavar="NAME|FOLDER", help="Hugging Face name, or a folder (default: the model's)")
    one.add_argument("--model", metavar="MODEL", help="also tabulate what ROME would divide by in this model")
    one.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="ROME's settings")
    for name, what in (("texts", "text for the second moments"), ("stats", "ready second moments"),
                       ("contexts", "context templates (default: sampled)")):
        one.add_argument(f"--{name}", metavar="FILE", help=what)
    one.add_argument("--seed", type=int, default=0, help="of sampled context templates (default: 0)")
    one.add_argument("--dtype", default="float32", metavar="NAME")
    one.add_argument("--device", default="", help="default: a GPU when there is one")


def _add_data(command):
    data = command("data", "list the real data sets, fetch one, or check a file against the list",
                   "data counterfact -o results/data/counterfact.json")
    data.add_argument("name", nargs="?", metavar="NAME", help="data set (default: list them)")
    data.add_argument("-o", "--output", metavar="FILE", help="fetch it to this file")
    data.add_argument("--check", metavar="FILE", help="compare this file with what is known of it")


def _add_model(one, default=None, dtype="float32"):
    words = {} if default is None else {"nargs": "?", "default": default}
    one.add_argument("model", metavar="MODEL", help='"pocket", a model folder, or a Hugging Face name', **words)
    one.add_argument("--dtype", default=dtype, metavar="NAME",
                     help=f"of the weights (default: {dtype or 'that of the edit'})")
    one.add_argument("--device", default="", help="default: a GPU when there is one")


def _add_output(one, what, default=None):
    one.add_argument("-o", "--output", required=default is None, default=default, metavar=what)


if __name__ == "__main__":
    sys.exit(main())
