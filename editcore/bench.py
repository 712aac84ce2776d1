"""A model in; seconds per edit of each editor beside a plain way of the same, and how far the results differ, out.

The plain way is the serial full-forward version for one model, and separate runs for many runs in one pass.
"""

import contextlib
import itertools
import random
import time
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from editcore import serial
from editcore.delta import Delta, dense
from editcore.editors import EDITORS, Prepared, configure
from editcore.facts import Fact, read_facts
from editcore.model import n_layers, synchronize
from editcore.moments import CountSettings, Moments, second_moments

SYLLABLES = "bel dar fen gol hul jan kor lim mas nor pel quin ras sten tor vul wex yor zan"
PROMPTS = ("The mother tongue of {} is", "{} is located in the country of", "The seat of {} is in", "{} plays the")
WORDS = "the old river runs by a small town and people there speak of their work in many tongues every day"
CONTEXTS = ("The old river runs by. {}", "People there speak of the. {}", "A small town and. {}",
            "Their work in many. {}", "Every day the river runs by a small old town. {}",
            "The people of the town speak in many old tongues. {}", "A small river runs by the people there. {}",
            "There people speak of many small towns every day. {}")


def bench(model, tok, facts, configs, threads=1, repeats=2):
    """DataFrame with a row a way of editing: seconds an edit here and serially, their ratio, largest difference.

    configs {editor: its configuration}; facts the batch. "one by one" calls `edit` for each fact alone, "together" is
    one call (MEMIT: one update of all facts; others: independent edits). Ways take turns, `repeats` times, and each
    one's least time counts.
    difference: largest ‖ΔW − ΔW_serial‖ / ‖ΔW_serial‖ over facts and weights.
    """
    rows = []
    with with_threads(threads):
        for name, config in configs.items():
            rows += _editor(name, (model, tok, facts, config), repeats)
    return pd.DataFrame(rows).assign(threads=threads)


def covariance(model, tok, texts, layers, threads=1):
    """DataFrame row: seconds for the second moments of `layers` in one pass, and in one whole pass a layer."""
    how = CountSettings(length=128, pack=False)
    with with_threads(threads):
        seconds, stats = timed(lambda: second_moments(model, tok, texts, layers, how), model)
        each, _ = timed(lambda: [second_moments(model, tok, texts, [layer], how) for layer in layers], model)
    return pd.DataFrame([{"layers": len(layers), "tokens": stats.count, "seconds": seconds, "one pass a layer": each,
                          "ratio": each / seconds, "threads": threads}])


def table(model, tok, editors, n, name, runs=0):
    """The bench of a model as text, or with `runs` that of so many runs in one pass; facts are those beside its folder,
    else invented ones."""
    beside = Path(name) / "facts.json"
    facts = read_facts(beside)[:n] if beside.is_file() else invented(n)
    configs = {editor: settings(editor, model, name) for editor in editors}
    made = shared(model, tok, facts, configs, runs) if runs else bench(model, tok, facts, configs)
    return made.to_string(index=False, float_format="{:.3g}".format)


def settings(editor, model, name=""):
    """The published configuration for `name`, else that of gpt2-xl at the same relative depth."""
    try:
        return configure(editor, {}, name)
    except ValueError:
        at = round(17 / 48 * n_layers(model))
        layers = tuple(range(max(0, at - 4), at + 1))
        return configure(editor, {"rome": {"layer": at}, "memit": {"layers": layers}}.get(editor, {}), "gpt2-xl")


def invented(n, seed=0):
    """n Facts of invented names of two to four syllables."""
    draw = random.Random(seed)
    def name():
        return " ".join("".join(draw.sample(SYLLABLES.split(), draw.choice((1, 2)))).title() for _ in range(2))
    return [Fact(case_id=i, subject=name(), prompt=PROMPTS[i % len(PROMPTS)],
                 target_new=name().split()[0]) for i in range(n)]


def random_gpt2(layers=12, width=768, heads=12, vocabulary=50257, seed=0):
    """(model, tokenizer): GPT-2 of this size with random weights, and pieces that fit the invented facts."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    lines = [fact.text + " " + fact.target_new for fact in invented(200)] + list(CONTEXTS) + [WORDS]
    tok.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocabulary, resid_pdrop=0.0,
                        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    with torch.random.fork_rng(devices=[]):     # building draws weights; those that count are drawn here
        model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(0.02 * torch.randn(weight.shape, generator=draw))
    return model, PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def prepared(model, tok, name, config):
    """Context templates (21 for ROME, 6 for MEMIT) and second moments of a few words, made definite by a ridge; None
    for an editor that needs neither."""
    if not EDITORS[name].needs_moments:
        return None
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS.split(), k=40)) for _ in range(50)]
    layers = getattr(config, "layers", None) or (config.layer,)
    found = second_moments(model, tok, texts, layers, CountSettings(length=128))
    ridge = {key: c + 0.1 * c.diagonal().mean() * torch.eye(len(c)) for key, c in found.moments.items()}
    templates = ["{}"]
    for group in config.context_groups:     # as many as the settings ask for, of about their length
        alike = itertools.cycle(CONTEXTS[:4] if group.tokens <= 5 else CONTEXTS[4:])
        templates += itertools.islice(alike, group.number * len(group.starts))
    return Prepared(tuple(templates), Moments(ridge, found.count))


def _editor(name, given, repeats):
    """Rows of one editor."""
    model, tok, facts, config = given
    editor, needed, joint = EDITORS[name], prepared(model, tok, name, config), hasattr(config, "layers")
    for module in needed.moments.moments if needed else ():
        needed.moments.factor(module)     # once a run, not a part of an edit
    ways = {"together": lambda: [editor.edit(model, tok, facts, config, needed)] if joint
            else editor.edit_each(model, tok, facts, config, needed)}
    if not joint:
        ways["one by one"] = lambda: [editor.edit(model, tok, [fact], config, needed) for fact in facts]
    if name not in serial.WAYS:
        raise ValueError(f"bench: there is no serial version of {name!r}, only of {', '.join(serial.WAYS)}")
    ways["serial"] = lambda: serial.WAYS[name](model, tok, facts, config, needed)
    seconds, results = least(ways, repeats, model)
    plain = seconds.pop("serial")
    return [{"editor": name, "way": way, "facts": len(facts), "seconds": spent / len(facts),
             "serial": plain / len(facts), "ratio": plain / spent,
             "difference": _difference(results[way], results["serial"])} for way, spent in seconds.items()]


def shared(model, tok, facts, configs, runs=5, repeats=2):
    """DataFrame with a row an editor: seconds an edit of `runs` runs apart and in one pass, and the gain.

    Each run makes one-fact updates, one after another, of its own part of the facts: apart, on a model that carries its
    edits; together, all runs' facts of an update in one pass (`Editor.edit_groups`). What is measured besides is not
    timed. Both take turns, `repeats` times on one thread, and the least time of each counts. difference:
    largest ‖total − total apart‖ / ‖total apart‖ over runs and weights.
    """
    rows, size = [], len(facts) // runs
    if not size:
        raise ValueError(f"bench: {runs} runs need at least as many facts, found {len(facts)}")
    orders = [facts[run * size:(run + 1) * size] for run in range(runs)]
    with with_threads(1):
        for name, config in configs.items():
            given = (model, tok, config, EDITORS[name], [prepared(model, tok, name, config)] * runs)
            _together(given, [order[:1] for order in orders])       # what is computed once a run is computed here
            ways = {"apart": lambda given=given: [_apart(given, order) for order in orders],
                    "together": lambda given=given: _together(given, orders)}
            seconds, results = least(ways, repeats, model)
            edits, plain = runs * size, [dict(one.changes) for one in results["apart"]]
            rows.append({"editor": name, "runs": runs, "edits": edits, "apart": seconds["apart"] / edits,
                         "together": seconds["together"] / edits, "gain": seconds["apart"] / seconds["together"],
                         "difference": _difference(results["together"], plain)})
    return pd.DataFrame(rows).assign(threads=1)


def _together(given, orders):
    """The sums of the updates of all runs, each turn's in one pass."""
    model, tok, config, editor, needed = given
    totals = [Delta({}) for _ in orders]
    for group in zip(*orders):
        new = editor.edit_groups(model, tok, [[fact] for fact in group], config, prepared=needed, current=totals)
        totals = [(total + one).dense() for total, one in zip(totals, new)]
    return totals


def _apart(given, order):
    """The sum of one run's updates."""
    model, tok, config, editor, needed = given
    total = Delta({})
    for fact in order:
        with total.applied(model):
            total = (total + editor.edit(model, tok, [fact], config, needed[0])).dense()
    return total


def _difference(deltas, plain):
    """Largest relative Frobenius difference."""
    return max(((dense(delta.changes[key]).double() - change.double()).norm() / change.double().norm()).item()
               for delta, changes in zip(deltas, plain, strict=True) for key, change in changes.items())


def least(ways, repeats, model):
    """({way: least seconds}, {way: result}) of calls that take turns, `repeats` times."""
    seconds, results = {way: float("inf") for way in ways}, {}
    for _ in range(repeats):
        for way, call in ways.items():
            spent, results[way] = timed(call, model)
            seconds[way] = min(seconds[way], spent)
    return seconds, results


def timed(call, model=None):
    """(seconds, result) of a call: with one CPU thread the process's own time (other work does not count)."""
    device = torch.device("cpu") if model is None else next(model.parameters()).device
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    synchronize(device)
    began = clock()
    result = call()
    synchronize(device)
    return clock() - began, result


@contextlib.contextmanager
def with_threads(count):
    """In the block torch uses `count` CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
