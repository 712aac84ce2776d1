"""Find where and with which settings to edit a model: patching names layers, a sweep the rest.

    inputs = site.inputs(model, tok, facts, held_out=passages)
    where = site.patching(inputs)                       # DataFrame position, layer, margin
    points = site.sweep(inputs, site.candidates(where)) # DataFrame of ES, PS, NS ... by setting
    site.choose(points)                                 # {editor: {field: value}}
    site.compare(inputs, folder, ["rome", "memit"])     # the same scores as published

At every point each of a few facts that the model knows is edited alone into the unedited model.
"""

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.ticker import MaxNLocator

from editcore import causal, figures, generate, knowledge, metrics, moments, templates
from editcore.editors import EDITORS, configure, prepare, published
from editcore.facts import order
from editcore.files import atomic, cache_folder, sha256_text, write_json
from editcore.model import content_hash, in_out, module_of, n_layers, name_of
from editcore.progress import bar
from editcore.tokens import encode

ASKED = 400             # facts of which it is asked whether the model knows them
PATCHED = 24            # pairs of facts in the patching
LAYERS = 6              # layers that are tried
READ = 3                # edits after which perplexity is taken, or a fifth of more ...
TOKENS = 400            # ... of so many tokens
PORTION = 20            # facts that are edited together
LEAST = 0.1             # share of the margin that MLPs carry at layers worth trying
TIE = 0.01              # scores S as close as this are equal: the smaller update is taken
SWEPT = {"rome": ("layer", "lr", "clamp"), "memit": ("layers", "lambda_", "clamp")}
CONTEXTS = (templates.TemplateGroup(10, 1, templates.STARTS),)      # MEMIT's, for all editors


@dataclass(frozen=True)
class Inputs:
    """A model, what it is asked and where its moments come from."""

    model: object
    tok: object
    known: list             # facts that the model knows, for the patching
    facts: list             # those of them that are edited
    held_out: str           # text for perplexity
    texts: tuple            # texts for second moments ...
    stats: str              # ... or the file of them; "": counted
    contexts: tuple         # context templates
    seed: int
    cache: str              # folder of what is kept by content

    @property
    def key(self):
        """Return a hash of all that the results depend on."""
        parts = [self.known, self.facts, self.held_out, self.texts, self.contexts, self.seed]
        return sha256_text(content_hash(self.model), *parts)[:16]


def inputs(model, tok, facts, *, held_out=(), texts=(), stats="", number=8, leave_out=None, seed=0,
           cache=None):
    """Choose `number` facts that the model knows, of as many relations, and take its templates.

    leave_out: case ids; default: of all facts that open their prompt. texts: default as
    `generate.default_texts`; held_out: default is the model's own text. ValueError if the model
    knows too few.
    """
    cache = str(cache or cache_folder())
    asked = order(facts, seed)[:ASKED]
    known = [fact for fact, hit in zip(asked, knowledge.known(model, tok, asked, cache)) if hit]
    if leave_out is None:
        leave_out = [str(fact.case_id) for fact in known if fact.prompt.startswith("{}")]
    usable = [fact for fact in known if fact.paraphrases and fact.neighbours
              and str(fact.case_id) not in leave_out]
    first = {}
    for fact in usable:
        first.setdefault(fact.relation or fact.prompt, fact)
    chosen = list(dict.fromkeys([*first.values(), *usable]))[:number]
    if len(chosen) < number:
        raise ValueError(f"site: {number} facts wanted that the model knows, with paraphrases and "
                         f"neighbours, but of {len(asked)} there are {len(chosen)}")
    if not texts and not stats:
        texts = generate.default_texts(model, tok, seed=seed, folder=cache)
    passages = list(held_out) or generate.own_texts(model, tok, 2 * TOKENS, seed + 1, cache)
    (ids,) = encode(tok, [" ".join(passages[:100])])
    text = tok.decode(ids[:TOKENS], skip_special_tokens=True)
    contexts = templates.cached(model, tok, CONTEXTS, seed, cache)
    return Inputs(model, tok, known, chosen, text, tuple(texts), str(stats), contexts, seed, cache)


def patching(inputs):
    """Return the DataFrame of `causal.patching` over the known facts."""
    return causal.patching(inputs.model, inputs.tok, inputs.known, count=PATCHED, seed=inputs.seed)


def candidates(where, number=LAYERS):
    """Return up to `number` layers from 0 on, before MLPs first carry less than LEAST."""
    margins = where[where["position"] == "mlp"].sort_values("layer")["margin"].to_numpy()
    small = np.flatnonzero(margins < LEAST)
    last = max(0, small[0] - 1) if len(small) else len(margins) - 1
    return sorted(set(np.linspace(0, last, number).round().astype(int).tolist()))


def count(inputs, layers):
    """Return the second moments of all layers that a sweep over `layers` may edit."""
    if inputs.stats:
        return moments.load(inputs.stats).check(inputs.model, inputs.tok, inputs.stats)
    wanted = [*layers, *_published(inputs, "memit").get("layers", ()), max(layers) + 1]
    wanted.append(_published(inputs, "rome").get("layer", 0))
    last = min(max(wanted), n_layers(inputs.model) - 1)
    return moments.cached(inputs.model, inputs.tok, inputs.texts, range(last + 1), inputs.cache)


def sweep(inputs, layers, measure=None):
    """Return a DataFrame editor, settings, S, ES, ... of ROME by layer, then its clamp and lr;
    MEMIT around ROME's best layer, then its λ and clamp; what is published; FT-L's ε.

    measure(editor, settings) -> row; default: `point`, which edits.
    """
    measure = measure or _measuring(inputs, layers)
    rows = [measure("rome", {"layer": layer, "lr": 0.5, "clamp": 4.0}) for layer in layers]
    best = sorted(rows, key=lambda row: -row["S"])[:2]
    rows += [measure("rome", row["settings"] | {"clamp": clamp})
             for row in best for clamp in (1.0, 2.0)]
    if settings := _published(inputs, "rome"):
        rows.append(measure("rome", settings))
    best = choose(pd.DataFrame(rows))["rome"]
    rows += [measure("rome", best | {"lr": lr}) for lr in (0.1, 1.0)]
    layer = best["layer"]
    wide, _ = in_out(module_of(inputs.model, "mlp_out", 0))
    last = min(layer + 1, n_layers(inputs.model) - 1)
    windows = [tuple(range(max(0, last - size), last + 1)) for size in (1, 2, 3)]
    memit = [measure("memit", {"layers": window, "lambda_": _round(2 * wide), "clamp": 0.75})
             for window in dict.fromkeys(windows)]
    for changes in ([{"lambda_": _round(wide / 5)}, {"lambda_": _round(10 * wide)}],
                    [{"clamp": 0.5}, {"clamp": 1.5}]):
        best = choose(pd.DataFrame(memit))["memit"]
        memit += [measure("memit", best | change) for change in changes]
    if settings := _published(inputs, "memit"):
        memit.append(measure("memit", settings))
    rows += memit
    rows += [measure("ft", {"epsilon": epsilon}) for epsilon in (1e-3, 2e-3, 5e-3, 1e-2)]
    return pd.DataFrame(rows)


def compare(inputs, folder, editors):
    """Return a DataFrame with one `point` per editor, with what is published for the model.

    Kept in `folder`/single.csv editor by editor. ValueError if nothing is published.
    """
    name = inputs.model.config.name_or_path
    measure = _measuring(inputs, [0], Path(folder) / "single.csv")
    for editor in editors:
        configure(editor, {}, name)     # its error, before anything is edited
    rows = []
    for editor in editors:
        paper = EDITORS[editor].paper
        settings = dict(paper[published(name, paper)])
        settings.pop("context_groups", None)    # all editors have those of `inputs`
        rows.append(measure(editor, settings))
    return pd.DataFrame(rows)


def _published(inputs, editor):
    """{field: value} of what is swept, as published for the model; {} if nothing is."""
    name = inputs.model.config.name_or_path
    if not published(name, EDITORS[editor].paper):
        return {}
    config = configure(editor, {}, name)
    return {field: getattr(config, field) for field in SWEPT[editor]}


def point(inputs, editor, settings, *, counted, unedited):
    """Return one row of `sweep`: scores of each fact edited alone, means over the facts.

    relative: ‖ΔW‖ / ‖W‖, mean over edited matrices; perplexity: times that of the unedited model;
    seconds: CPU time per edit.
    """
    model, tok, facts = inputs.model, inputs.tok, inputs.facts
    method = EDITORS[editor]
    pilot = [fact for fact in inputs.known if fact not in facts]
    config, prepared = prepare(model, tok, editor, moments=counted, contexts=inputs.contexts,
                               seed=inputs.seed, cache=inputs.cache, pilot=pilot, **settings)
    seconds = 0
    rows = []
    relative = []
    perplexity = []
    for begin in bar(range(0, len(facts), PORTION), editor):
        portion = facts[begin:begin + PORTION]
        began = time.process_time()
        deltas = method.edit_each(model, tok, portion, config, prepared)
        seconds += (time.process_time() - began) / len(facts)
        for number, (fact, delta) in enumerate(zip(portion, deltas), begin):
            weights = {name: model.get_parameter(name) for name in delta.changes}
            delta = method.finish(delta, weights, config)
            relative += [delta.norm(name) / weight.double().norm().item()
                         for name, weight in weights.items() if name.endswith(".weight")]
            with delta.applied(model):
                rows += metrics.measure(model, tok, [fact])
                if number < max(READ, len(facts) // 5):
                    perplexity.append(_perplexity(inputs) / unedited)
    mean = metrics.means(rows)
    scores = {name + way: mean[name + way] for way in ("", "_exact") for name in metrics.DEFAULT}
    return {"editor": editor, "settings": settings, "S": metrics.score(rows), **scores,
            "relative": np.mean(relative), "perplexity": np.mean(perplexity), "seconds": seconds,
            "facts": len(facts)}


def choose(points):
    """Return {editor: settings} of the highest S; of those within TIE the smallest ‖ΔW‖ / ‖W‖."""
    chosen = {}
    for editor, rows in points.groupby("editor", sort=False):
        best = rows[rows["S"] >= rows["S"].max() - TIE]
        chosen[editor] = best.loc[best["relative"].idxmin(), "settings"]
    return chosen


def everywhere(chosen):
    """Return `choose`'s settings also for editors with the same published settings."""
    return {name: chosen[base] for base in chosen for name, editor in EDITORS.items()
            if editor.config is EDITORS[base].config and editor.paper is EDITORS[base].paper}


def search(inputs, folder, layers=()):
    """Patch and sweep, kept in `folder` point by point; returns a text with the tables.

    Writes patching.csv, sweep.csv, site.png and settings.json. What the folder holds of the same
    model and facts is not done again.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    key = inputs.key
    where = read(folder / "patching.csv", key)
    if where.empty:
        where = patching(inputs)
        _write(where.assign(key=key), folder / "patching.csv")
    layers = list(layers) or candidates(where)
    for layer in layers:
        name_of(inputs.model, "mlp_out", layer)
    points = sweep(inputs, layers, _measuring(inputs, layers, folder / "sweep.csv"))
    chosen = choose(points)
    write_json(folder / "settings.json", everywhere(chosen))
    fig = draw(where, points)
    with atomic(folder / "site.png") as file:
        fig.savefig(file, dpi=144)
    plt.close(fig)
    shown = where.pivot(index="layer", columns="position", values="margin")
    lines = [f"{editor}: {settings}" for editor, settings in chosen.items()]
    return "\n".join(["share of the answer's margin that is carried", shown.round(2).to_string(),
                      "", points.round(3).to_string(index=False), "", *lines,
                      f"{folder / 'settings.json'}: for `edit --set @FILE`"])


def read(path, key=""):
    """Read the DataFrame of a file that `search` wrote, of one key if there is one."""
    if not Path(path).is_file():
        return pd.DataFrame()
    table = pd.read_csv(path)
    table = table[table["key"] == key] if key else table
    if "settings" in table:
        table["settings"] = [json.loads(text) for text in table["settings"]]
    return table.drop(columns="key")


def draw(where, points):
    """Draw three panels: patching by layer, ROME by layer, all points."""
    fig, axes = plt.subplots(1, 3, figsize=(figures.WIDTH, 3.4), layout="constrained")
    names = {"subject": "state, last subject token", "last": "state, last prompt token",
             "mlp": "3 MLPs, last subject token"}
    carried = where.assign(what=where["position"].map(names))
    sns.lineplot(carried, x="layer", y="margin", hue="what", style="what", ax=axes[0])
    axes[0].set(title="What carries the answer", ylabel="share of the margin")
    rome = points[points["editor"] == "rome"]
    rome = rome.join(pd.DataFrame(list(rome["settings"]), index=rome.index))
    first = rome[(rome["lr"] == rome["lr"].iloc[0]) & (rome["clamp"] == rome["clamp"].iloc[0])]
    scores = first.melt("layer", ["ES", "PS", "NS"], "score")
    sns.lineplot(scores, x="layer", y="value", hue="score", style="score", markers=True,
                 ax=axes[1])
    axes[1].set(title=f"ROME, clamp {first['clamp'].iloc[0]:g}", ylabel="", ylim=(-0.04, 1.04))
    labelled = points.assign(editor=points["editor"].map(figures.label))
    sns.scatterplot(labelled, x="relative", y="S", hue="editor", style="editor", s=40, ax=axes[2],
                    palette=figures.PALETTE, markers=figures.MARKERS)
    chosen = choose(points)
    best = points[[row["settings"] == chosen[row["editor"]] for _, row in points.iterrows()]]
    axes[2].scatter(best["relative"], best["S"], s=140, facecolors="none", edgecolors="black")
    axes[2].set(title="All settings, best ringed", xlabel="‖ΔW‖ / ‖W‖", xscale="log",
                ylim=(-0.04, 1.04))
    for ax in axes:
        sns.move_legend(ax, "upper center", bbox_to_anchor=(0.5, -0.22), title="", frameon=False,
                        fontsize="small", ncols=1 if ax is axes[0] else 3, columnspacing=1)
    for ax in axes[:2]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return fig


def _measuring(inputs, layers, path=None):
    """`measure` of `sweep`; a row that stands in the file `path` is not taken again."""
    key = inputs.key
    rows = read(path, key).to_dict("records") if path else []
    known = {(row["editor"], json.dumps(row["settings"])): row for row in rows}
    once = functools.cache(lambda: (count(inputs, layers), _perplexity(inputs)))

    def measure(editor, settings):
        words = json.dumps(settings)
        if (editor, words) not in known:
            counted, unedited = once()
            row = point(inputs, editor, settings, counted=counted, unedited=unedited)
            known[editor, words] = row
            if path:
                old = pd.read_csv(path) if path.is_file() else pd.DataFrame()
                line = pd.DataFrame([row | {"settings": words, "key": key}])
                _write(pd.concat([old, line]), path)
        return known[editor, words] | {"settings": settings}

    return measure


def _write(table, path):
    with atomic(path) as file:
        table.to_csv(file, index=False)


def _perplexity(inputs):
    return metrics.perplexity(inputs.model, inputs.tok, [inputs.held_out])


def _round(value):
    """A number to one leading digit."""
    return float(f"{value:.0e}")
