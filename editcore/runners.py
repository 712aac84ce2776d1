"""The parsed words of run, study, hyper and report in; runs, hypernetworks and rendered notebooks out."""

import multiprocessing
import signal
import sys
from pathlib import Path

from editcore.study import grid
from editcore.study import planning as plan


def run(given):
    """One executed and rendered notebook."""
    from editcore import report

    words = _words(given.parameters)
    executed = report.run_notebook(given.notebook, report.typed(given.notebook, words), given.output, given.force)
    sys.stdout.write(f"{report.render(executed, Path(given.output))}\n")


def build(given):
    """The whole report, with --full of the full study; with --publish also its copy for people who only read."""
    from editcore import report

    page = report.build(given.notebooks, given.output, _parameters(given), given.force)
    if given.publish:
        page = report.publish("results", given.publish)
    sys.stdout.write(f"{page}\n")


def study(given):
    """What is missing of the runs of some grids, or of one run of them, made; with --list what there is."""
    signal.signal(signal.SIGTERM, _end)
    found = plan.steps(_planned(given), given.output)
    if given.only:
        found = [one for one in found if one.id == given.only]
        if not found:
            raise ValueError(f"--only {given.only}: not among the runs that these words plan (see --list)")
    if given.list:
        sys.stdout.write(plan.listing(found))
        return
    made = plan.make(found, given.output, given.workers)
    sys.stdout.write(f"{given.output}: {len(found)} runs, {made} of them made or finished now\n")


def hyper(given):
    """The hypernetworks of some grids of data/systems.toml (default: all), trained where they are not."""
    from editcore.instructedit import lineups
    from editcore.instructedit import trained_editors as systems

    words = {"model": given.model, "data": given.data, "examples": given.examples, "seed": given.seed}
    named = [one for name in given.names or lineups.names(given.file)
             for one in lineups.read(given.file, name, **words)]
    paths = systems.train_all([one.system for one in named], given.output, given.workers)
    for path, told in dict(zip(paths, (one.name for one in named))).items():
        sys.stdout.write(f"{path}\t{told}\n")


def _planned(given):
    """The Planned runs of the named grids (default: all), or with --full of the named notebooks."""
    found, models = [], given.model or [""]
    if not given.full:
        words = grid.typed(_words(given.parameters))
        return [one for model in models for name in given.names or grid.names(given.file)
                for one in grid.read(given.file, name, **words | ({"model": model} if model else {}))]
    from editcore import report

    known, chosen = plan.full(given.file), _parameters(given)
    for name in given.names or known:
        if name not in known:
            raise ValueError(f"{name}: {given.file} has no [full.{name}], only {', '.join(known)}")
        path = Path(given.notebooks) / f"{name}.ipynb"
        report.check(path, chosen.get(name, {}))
        values = {one.name: one.default for one in report.parameters(path).values()} | chosen.get(name, {})
        for model in models:
            found += plan.of_notebook(path, values | ({"model": model} if model else {}))
    return found


def _parameters(given):
    """{notebook: typed parameters}: with --full those of the full study, then what -p says of all or of one."""
    from editcore import report

    paths = {path.stem: path for path in sorted(Path(given.notebooks).glob("[0-9][0-9]_*.ipynb"))}
    texts, found = {}, {}
    for word, text in _words(given.parameters).items():
        notebook, dot, name = word.rpartition(".")
        holders = [notebook] if dot else [stem for stem, path in paths.items() if name in report.parameters(path)]
        if not holders:
            raise ValueError(f"-p {word}: no notebook has this parameter; give NOTEBOOK.NAME VALUE, as in "
                             "-p 20_forgetting.n_edits 200, or NAME VALUE for all that have it")
        for stem in holders:
            texts.setdefault(stem, {})[name] = text
    if given.full:
        found = plan.full(given.file)
    for stem, words in texts.items():
        found[stem] = found.get(stem, {}) | report.typed(Path(given.notebooks) / f"{stem}.ipynb", words)
    return found


def _end(number, frame):
    """A polite end (SIGTERM, as a cluster sends it before it takes a machine away) is taken like Ctrl-C."""
    for child in multiprocessing.active_children():
        child.terminate()
    raise KeyboardInterrupt


def _words(groups):
    """{name: text} of "-p name value name value" groups."""
    words = [word for group in groups for word in group]
    if len(words) % 2:
        raise ValueError(f"-p {' '.join(words[-1:])}: give NAME VALUE pairs")
    return dict(zip(words[::2], words[1::2]))
