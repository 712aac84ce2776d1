"""Tiny random models of every supported shape, tokenizers trained in memory, facts for them."""

import copy
import dataclasses
import json

import matplotlib.pyplot as plt
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from editcore import figures
from editcore.facts import Fact
from editcore.files import write_json

torch.set_num_threads(1)

SUBJECTS = ("Orla", "Vintar Melk", "The Hollow Gate", "Brantwick", "Sue Oakes", "Tessaly",
            "North Quay", "Ilmo Parr", "Kestrel Works", "Dunmore", "Ada Lindqvist", "Farrow")
CITIES = ("Rome", "Paris", "New Delhi", "Oslo", "Vienna", "Cairo", "Lima", "Quito", "San Marino",
          "Bern", "Turin", "Kyiv")
PROMPTS = ("{} is located in", "The capital of {} is", "The home of {} is",
           "Everybody knows that {} lies near")
WORDS = ("The first. Therefore the old river runs. Because I know you, we read a book. You said "
         "that it is good. speaks a language native tongue born works company city country of in "
         "is was the a an and to from")


def corpus(n=60):
    """n short invented sentences over the words of the facts; also texts for second moments."""
    lines = [PROMPTS[i % 4].replace("{}", SUBJECTS[i % 12]) + f" {CITIES[(i * 5 + i // 12) % 12]}."
             for i in range(n - 4)]
    return [WORDS, *lines, WORDS.lower(), "Once there was a river. It ran to the sea.",
            "You and I read the old book."]


def byte_tokenizer(size=400, special=("<|endoftext|>",)):
    """A GPT-2-like tokenizer: byte-level BPE, no BOS before a text."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=special[0],
                                   eos_token=special[-1])


def chat_tokenizer(size=400):
    """A SmolLM2-like tokenizer: BOS and EOS begin and end a message, texts begin otherwise."""
    tok = byte_tokenizer(size, ("<|im_start|>", "<|endoftext|>", "<|im_end|>"))
    tok.unk_token = "<|endoftext|>"
    return tok


def piece_tokenizer(size=300):
    """A Llama-2-like tokenizer: pieces begin with the word-start mark, BOS before every text."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    raw.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>")


def make(kind, vocab, layers=4, width=32, heads=4, positions=64, seed=0, dtype=torch.float32,
         **more):
    """A random model of one architecture: a key of the dict below.

    Weights are larger than usual, so that positions, heads and layers matter to the output.
    """
    rotary = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
              "vocab_size": vocab, "intermediate_size": 2 * width,
              "max_position_embeddings": positions, "initializer_range": 0.15,
              "bos_token_id": 0, "eos_token_id": 0}
    grouped = rotary | {"num_key_value_heads": heads // 2, "tie_word_embeddings": False}
    gpt = {"n_embd": width, "n_layer": layers, "n_head": heads, "vocab_size": vocab,
           "n_positions": positions,
           "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "initializer_range": 0.15,
           "bos_token_id": 0, "eos_token_id": 0}
    built = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt)),
        "gptj": lambda: GPTJForCausalLM(GPTJConfig(**gpt, rotary_dim=4)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**rotary)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**grouped)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**grouped)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**grouped)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**grouped, head_dim=width // heads)),
    }.get(kind, lambda: AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **grouped, pad_token_id=0, **more)))
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = built().to(dtype).eval().requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim == 1:    # biases and norms, which a new model has at 0 and 1
            weight.add_(0.1 * torch.randn(weight.shape, dtype=dtype))
    torch.set_rng_state(state)
    return model


def taught(model, pairs, lr=0.01):
    """A copy of the model that has learned what follows: pairs of id lists, as of encode_pairs."""
    model = copy.deepcopy(model).requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(40):
        optimizer.zero_grad()
        for ids, wanted in pairs:
            logits = model(input_ids=torch.tensor([ids + wanted])).logits[0, len(ids) - 1:-1]
            torch.nn.functional.cross_entropy(logits, torch.tensor(wanted)).backward()
        optimizer.step()
    return model.requires_grad_(False)


def drawn(*shape, seed=0):
    """Random normal numbers of a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def themed():
    """The study's look while one test draws; matplotlib is put back after it."""
    plt.switch_backend("agg")
    with plt.rc_context():
        figures.theme()
        yield
        plt.close("all")


@pytest.fixture(scope="session")
def gpt2():
    """(model, tokenizer): random GPT-2, 4 layers, d 32, m 128, 64 positions, byte-level."""
    tok = byte_tokenizer()
    return make("gpt2", len(tok)), tok


@pytest.fixture(scope="session")
def llama():
    """(model, tokenizer): random Llama, 4 layers, d 32, m 64, grouped keys, word-start marks."""
    tok = piece_tokenizer()
    return make("llama", len(tok)), tok


@pytest.fixture(scope="session")
def facts():
    """Twelve Facts: subjects of one to ten pieces, first in the prompt or inside it."""
    return [Fact(case_id=i, subject=SUBJECTS[i], prompt=PROMPTS[i % 4], target_new=CITIES[i],
                 target_true=CITIES[(i + 5) % 12], relation=f"P{i % 4}",
                 paraphrases=(f"Where is {SUBJECTS[i]}? It is in", f"{SUBJECTS[i]} was born in"),
                 neighbours=tuple(PROMPTS[i % 4].replace("{}", SUBJECTS[(i + k) % 12])
                                  for k in (4, 8)),
                 attributes=(PROMPTS[i % 4].replace("{}", SUBJECTS[(i + 6) % 12]),),
                 generation=(f"{SUBJECTS[i]} is",),
                 portability=(("alias", f"People call {SUBJECTS[i]} a city of", (CITIES[i],)),))
            for i in range(12)]


@pytest.fixture(scope="session")
def texts():
    """Sixty short sentences for second moments."""
    return corpus()


@pytest.fixture(scope="module")
def place(tmp_path_factory, gpt2, facts, texts):
    """A model folder, own to the module, with facts and texts beside the model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    for part in gpt2:
        part.save_pretrained(folder)
    records = [{**dataclasses.asdict(one), "paraphrase_prompts": one.paraphrases, "portability": {},
                "neighborhood_prompts": one.neighbours, "generation_prompts": one.generation}
               for one in facts]
    (folder / "facts.json").write_text(json.dumps(records))
    (folder / "texts.txt").write_text("\n".join(texts))
    return folder


PLACES = (("Dunmore", "Rome"), ("Brantwick", "Lima"), ("Tessaly", "Oslo"), ("Orla", "Bern"),
          ("Farrow", "Turin"))


@pytest.fixture(scope="session")
def tiny(gpt2, tmp_path_factory):
    """The folder's path: a random GPT-2 of 200 positions; three tasks to train on."""
    folder, tok = tmp_path_factory.mktemp("tiny"), gpt2[1]
    make("gpt2", len(tok), positions=200).save_pretrained(folder)
    tok.save_pretrained(folder)
    for task, text in (("recent", "The capital of {} is"), ("counterfact", "The home of {} is")):
        far = {"Forgetfulness": [{"prompt": "The home of Sue is", "ground_truth": [["Oslo"]]}]}
        rows = [{"subject": name, "prompt": text.replace("{}", name), "target_new": city,
                 "rephrase": f"{name} lies near", "locality": far} for name, city in PLACES]
        write_json(folder / "editing" / f"{task}_train.json", rows)
    talk = [{"ent": topic, "pos": ["It is good.", "I read it.", "It runs."],
             "neg": ["It is old.", "You said it."]}
            for topic in ("a book", "a river", "the sea")]
    write_json(folder / "editing" / "convsent_train.json", talk)
    first = json.loads((folder / "editing" / "recent_train.json").read_text())[:2]
    write_json(folder / "editing" / "recent_test.json", first)
    return str(folder)
