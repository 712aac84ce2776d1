"""Time edits: seconds per edit beside the plain way of `oracle`, and of several runs in one pass.

    python tests/benchmarks.py --model pocket --editors rome memit ft
    python tests/benchmarks.py --random 12x768 --facts 4        # a random GPT-2 of this shape
    python tests/benchmarks.py --model pocket --runs 4
    python tests/benchmarks.py --limit              # target values at SmolLM2-135M's shape

Ways take turns, the least time of each counts, on one thread. difference: the largest
‖ΔW − ΔW_plain‖ / ‖ΔW_plain‖ over edits and weights. --limit: seconds per fact beside the floating
point operations that they need, and the share of what this core does in large products.
"""

import argparse
import contextlib
import dataclasses
import random
import time

import oracle
import pandas as pd
import torch
from conftest import byte_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from editcore.delta import Delta, dense
from editcore.editors import EDITORS, EditorInputs, configure
from editcore.editors.target_value import EditSite, encode_facts, optimise
from editcore.facts import Fact
from editcore.model import load, n_layers
from editcore.moments import CountSettings, Moments, second_moments
from editcore.suffix import quick

SYLLABLES = "bel dar fen gol hul jan kor lim mas nor pel quin ras sten tor vul wex yor zan"
PROMPTS = ("The mother tongue of {} is", "{} is located in the country of", "{} plays the")
WORDS = "the old river runs by a small town and people there speak of work in many tongues"


def random_gpt2(layers, width, vocabulary=50257):
    """(model, tokenizer): GPT-2 of this size with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=max(1, width // 64),
                        vocab_size=vocabulary, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval().requires_grad_(False), byte_tokenizer()


def smollm2():
    """(model, tokenizer): SmolLM2-135M, or random weights of its shape where it is missing."""
    with contextlib.suppress(ValueError):
        return load("smollm2", "cpu")
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, vocab_size=49152,
                         tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    return LlamaForCausalLM(config).eval().requires_grad_(False), byte_tokenizer()


def invented_facts(count):
    """Facts of invented names of two to four syllables."""
    draw = random.Random(0)

    def word():
        return "".join(draw.sample(SYLLABLES.split(), draw.choice((1, 2)))).title()

    return [Fact(case_id=i, subject=f"{word()} {word()}", prompt=PROMPTS[i % len(PROMPTS)],
                 target_new=word()) for i in range(count)]


def prepared_for(editor, model, tok):
    """(config, prepared): settings as published, else gpt2-xl's at the same depth."""
    last = 17 * n_layers(model) // 48
    depth = {"layer": last, "layers": tuple(range(max(0, last - 4), last + 1))}
    known = {field.name for field in dataclasses.fields(EDITORS[editor].config)}
    try:
        config = configure(editor, {}, model.config.name_or_path)
    except ValueError:
        depth = {name: value for name, value in depth.items() if name in known}
        config = configure(editor, depth, "gpt2-xl")
    if not EDITORS[editor].needs_moments:
        return config, None
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS.split(), k=40)) for _ in range(50)]
    layers = getattr(config, "layers", None) or (config.layer,)
    moments = second_moments(model, tok, texts, layers, CountSettings(length=128)).moments
    ridged = {name: c + 0.1 * c.diagonal().mean() * torch.eye(len(c))
              for name, c in moments.items()}
    prepared = EDITORS[editor].prepare(model, tok, config, EditorInputs(moments=Moments(ridged, 1)))
    return config, prepared


def least_seconds(ways, repeats):
    """({way: least seconds}, {way: result}) of calls that take turns."""
    seconds = dict.fromkeys(ways, float("inf"))
    results = {}
    for _ in range(repeats):
        for way, call in ways.items():
            began = time.process_time()
            results[way] = call()
            seconds[way] = min(seconds[way], time.process_time() - began)
    return seconds, results


def difference(deltas, expected):
    """Largest relative difference of lists of {parameter: change}."""
    return max(max(oracle.apart(dense(delta[name]), dense(changes[name])) for name in changes)
               for delta, changes in zip(deltas, expected))


def edits(editor, model, tok, facts, repeats):
    """A row: one call of the fast editor for all facts, beside the plain way."""
    config, prepared = prepared_for(editor, model, tok)
    function = EDITORS[editor].edit_each if editor != "memit" else \
        lambda *args: [EDITORS[editor].edit(*args)]
    args = (model, tok, facts, config, prepared)
    ways = {"seconds": lambda: [delta.changes for delta in function(*args)],
            "plain": lambda: oracle.EDITS[editor](*args)}
    seconds, results = least_seconds(ways, repeats)
    return {"editor": editor, "facts": len(facts)} | {
        way: spent / len(facts) for way, spent in seconds.items()} | {
        "ratio": seconds["plain"] / seconds["seconds"],
        "difference": difference(results["seconds"], results["plain"])}


def runs_in_one_pass(editor, model, tok, facts, repeats, runs):
    """A row: one-fact updates one after another of several runs, in one pass or apart."""
    config, prepared = prepared_for(editor, model, tok)
    size = len(facts) // runs
    orders = [facts[run * size:(run + 1) * size] for run in range(runs)]

    def made_together():
        totals = [Delta({}) for _ in orders]
        for groups in zip(*orders):
            updates = EDITORS[editor].edit_groups(model, tok, [[fact] for fact in groups], config,
                                                  prepared=[prepared] * runs, current=totals)
            totals = [(total + update).dense() for total, update in zip(totals, updates)]
        return [total.changes for total in totals]

    def made_apart():
        totals = []
        for order in orders:
            total = Delta({})
            for fact in order:
                with total.applied(model):
                    update = EDITORS[editor].edit(model, tok, [fact], config, prepared)
                total = (total + update).dense()
            totals.append(total.changes)
        return totals

    seconds, results = least_seconds({"together": made_together, "apart": made_apart}, repeats)
    edits_made = runs * size
    return {"editor": editor, "runs": runs, "edits": edits_made} | {
        way: spent / edits_made for way, spent in seconds.items()} | {
        "gain": seconds["apart"] / seconds["together"],
        "difference": difference(results["together"], results["apart"])}


def core_speed(width=2048, rows=512):
    """GFLOP/s of one large product in float32."""
    layer = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
    x = torch.randn(rows, width)
    with quick(torch.nn.Sequential(layer)):
        seconds, _ = least_seconds({"product": lambda: layer(x)}, 10)
    return 2e-9 * rows * width ** 2 / seconds["product"]


def limits(model, tok, facts, repeats, layer=3):
    """Rows: target values of facts, one at a time and together, in 6 and 21 contexts."""
    config = configure("rome", {"layer": layer, "stop_loss": 0.0}, "")
    peak = core_speed()
    blocks = [block for name, block in model.named_modules() if name.endswith(f".{layer + 1}")]
    size = sum(weight.numel() for weight in blocks[0].parameters() if weight.ndim == 2)
    above = size * (n_layers(model) - layer - 1)
    vocabulary = model.get_output_embeddings().weight.numel()
    rows = []
    for contexts, count in ((6, 1), (6, len(facts)), (21, 1)):
        templates = ("{}", *(f"{word} of the town. {{}}" for word in SYLLABLES.split()))
        templates = (templates * 2)[:contexts]
        encoded = encode_facts(model, tok, [facts[:count]], [templates], config)
        tokens = sum(max(offsets) + 1 for fact in encoded
                     for offsets in fact.offsets(len(fact.target)))
        read = sum(contexts * len(fact.target) + 1 for fact in encoded)
        seconds, _ = least_seconds({"seconds": lambda encoded=encoded: optimise(
            model, encoded, EditSite(layer, "mlp_out", layer), config)}, repeats)
        work = 4e-9 * config.steps * (above * tokens + vocabulary * read) / count
        spent = seconds["seconds"] / count
        rows.append({"contexts": contexts, "facts": count, "tokens": tokens / count,
                     "seconds": spent, "GFLOP": work, "GFLOP/s": work / spent, "core": peak,
                     "share": work / spent / peak})
    return rows


def main(words=None):
    """Print the table that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="pocket", help="short name, folder or hub name")
    parser.add_argument("--random", metavar="LAYERSxWIDTH", help="a random GPT-2 instead")
    parser.add_argument("--editors", nargs="+", default=["rome", "memit", "ft"])
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--runs", type=int, default=0, help="time so many runs in one pass instead")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--limit", action="store_true", help="target values against the limit")
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.random:
        model, tok = random_gpt2(*map(int, args.random.split("x")))
    elif args.limit:
        model, tok = smollm2()
    else:
        model, tok = load(args.model, "cpu")
    facts = invented_facts(args.facts)
    if args.limit:
        timed = limits(model, tok, facts, args.repeats)
    elif args.runs:
        timed = [runs_in_one_pass(editor, model, tok, facts, args.repeats, args.runs)
                 for editor in args.editors]
    else:
        timed = [edits(editor, model, tok, facts, args.repeats) for editor in args.editors]
    print(pd.DataFrame(timed).to_string(index=False, float_format="{:.3g}".format))


if __name__ == "__main__":
    main()
