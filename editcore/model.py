"""Load causal language models and know where each family keeps the parts that editing touches."""

import contextlib
import functools
import getpass
import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig
from transformers.utils import logging

from editcore import folders
from editcore.files import sha256_once, sha256_text
from editcore.gguf import WHEELS, plain_folder, wheel_file


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps its parts (module paths; {} is the layer)."""

    embed: str      # token embedding
    norm: str       # the final norm
    block: str      # a transformer block
    attn: str       # its attention
    mlp: str        # its MLP
    mlp_in: str     # the linear map into the MLP's hidden layer (the non-gate one, or both), d -> m
    mlp_out: str    # the linear map out of it, m -> d: W of the closed-form editors
    mlp_gate: str = ""      # the linear map of the MLP's gate, d -> m; "" where it has none


def _layout(embed, norm, block, *parts):
    """A Layout of paths of which `parts` are relative to the block."""
    return Layout(embed, norm, block, *(f"{block}.{part}" for part in parts))


_LLAMA = _layout("model.embed_tokens", "model.norm", "model.layers.{}",
                 "self_attn", "mlp", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")

# The only table of model families; the key is config.model_type. A new family is one line here:
# `fit.check` refuses it, when an editor prepares, if it does not work as editors suppose.
LAYOUTS = {
    "gpt2": _layout("transformer.wte", "transformer.ln_f", "transformer.h.{}",
                    "attn", "mlp", "mlp.c_fc", "mlp.c_proj"),
    "gptj": _layout("transformer.wte", "transformer.ln_f", "transformer.h.{}",
                    "attn", "mlp", "mlp.fc_in", "mlp.fc_out"),
    "gpt_neox": _layout("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "gpt_neox.layers.{}",
                        "attention", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "phi3": _layout("model.embed_tokens", "model.norm", "model.layers.{}",
                    "self_attn", "mlp", "mlp.gate_up_proj", "mlp.down_proj"),
    "starcoder2": _layout("model.embed_tokens", "model.norm", "model.layers.{}",
                          "self_attn", "mlp", "mlp.c_fc", "mlp.c_proj"),
}

SHORT_NAMES = {"pocket": Path(__file__).resolve().parents[1] / "data" / "pocket"}
# Where facts, tasks and texts lie for models that have none beside them, by the model's short name.
WORLD = Path(__file__).resolve().parents[1] / "data" / "world"
DATA = {"smollm2": WORLD, "smollm2-135m": WORLD, "smollm2-360m": WORLD, "qwen2.5-0.5b": WORLD}


def resolve(name):
    """Return the folder of a short name ("pocket", "smollm2") or GGUF file, else the name."""
    name = os.path.expanduser(name)
    if name in WHEELS:
        return str(plain_folder(wheel_file(name), name))
    if name.lower().endswith(".gguf"):
        return str(plain_folder(name))
    return str(SHORT_NAMES.get(name, name))


def short_name(name):
    """Return a model's name as it appears in rows: the last part of its path."""
    return Path(name).name


def beside(name, file):
    """The path of a file or folder beside a model, or in data/ for a model that has none."""
    path = Path(resolve(name)) / file
    return DATA[short_name(name)] / file if short_name(name) in DATA and not path.exists() else path


def load(name, device=None, dtype=torch.float32, revision=None):
    """Load (model in eval mode, tokenizer) of a short name, folder, GGUF file or Hugging Face name.

    Weights come in `dtype`, on `device` (None: the GPU when there is one). Only safetensors are
    read and no code of the model's is run. ValueError names the folder and what is wrong with it,
    before weights are loaded where that can be seen.
    """
    folder = resolve(name)
    config = load_config(folder, revision)
    tok = load_tokenizer(folder, revision)
    if Path(folder).is_dir():
        folders.check_weights(folder, LAYOUTS[config.model_type], config)
    with _loading(f"model {folder}"):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, ignore_mismatched_sizes=True,
            output_loading_info=True, **_source(folder, revision))
    folders.check_loaded(folder, info)
    _check_numbers(model, folder)
    rows = model.get_input_embeddings().weight.shape[0]
    if (ids := max(tok.get_vocab().values()) + 1) > rows:
        raise ValueError(f"{folder}: the tokenizer has {ids} ids, but the model's embedding has "
                         f"{rows} rows; one of them belongs to another model")
    model = model.to(device or default_device()).eval().requires_grad_(False)
    for parameter in model.parameters():    # products are slow where a file's header shifts weights
        parameter.data = parameter.data.clone() if parameter.data_ptr() % 64 else parameter.data
    return model, tok


def load_config(name, revision=None):
    """Return the configuration of a folder or hub name, of an architecture in LAYOUTS."""
    if Path(name) in SHORT_NAMES.values() and not Path(name).is_dir():
        raise ValueError(f"{name}: not there; this model lies in a checkout of the repository: "
                         "clone it, and type there: pip install -e .")
    folders.check_path(name, SHORT_NAMES)
    if Path(name).is_dir():
        raw = folders.read_config(name)
    else:
        with _loading(f"model {name}"):
            raw, _ = PreTrainedConfig.get_config_dict(name, **_source(name, revision))
        folders.check_config(raw, name)
    hint = " and needs code that came with it, which is never run" * ("auto_map" in raw)
    layout_of(raw["model_type"], f"{name}: architecture", hint)
    with _loading(f"{name}: config.json"):
        return AutoConfig.from_pretrained(name, **_source(name, revision))


def load_tokenizer(name, revision=None):
    """Return the tokenizer of a folder or Hugging Face name; ValueError if there is none."""
    folders.check_path(name)
    if Path(name).is_dir():
        folders.check_tokenizer(name)
    with _loading(f"tokenizer {name}"):
        tok = AutoTokenizer.from_pretrained(name, **_source(name, revision))
    if not tok.is_fast:
        raise ValueError(f"tokenizer {name}: it knows no offsets; a tokenizer.json is needed")
    return tok


@functools.lru_cache
def _source(name, revision):
    """Words of every `from_pretrained`: no code is run, and a hub that is silent is asked once."""
    silent = False
    try:
        if not Path(name).is_dir():
            get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=10)
    except Exception as error:      # if the hub answers, what is wrong is said later
        silent = not isinstance(error, HfHubHTTPError)
    return {"revision": revision, "trust_remote_code": False, "local_files_only": silent}


@contextlib.contextmanager
def _loading(label):
    """In the block transformers is silent, and whatever it raises is one ValueError."""
    bar = logging.is_progress_bar_enabled()     # of weight files
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except Exception as error:      # of damaged files: any
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[:2])[:300]
        raise ValueError(f"{label}: cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _check_numbers(model, name):
    """ValueError if a weight is NaN or infinite; sums tell, and are quick."""
    for key, weight in model.named_parameters():
        total = weight.sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        if not total.isfinite() and not weight.isfinite().all():
            raise ValueError(f"{name}: {key} has entries that are NaN or infinite")


def default_device():
    """Return "cuda" when there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(name):
    """ValueError unless tensors can lie on a device here; "" is the default one."""
    try:
        torch.ones(1, device=name or default_device()).item()
    except Exception as error:      # torch raises a different kind for each of its backends
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); give another, or "
                         "none") from error


@contextlib.contextmanager
def free_gpu():
    """In the block "cuda" means a GPU that no other process has taken this way, if there is one."""
    user = os.getuid() if hasattr(os, "getuid") else getpass.getuser()
    folder = Path(tempfile.gettempdir()) / f"editcore-gpus-{user}"
    with contextlib.ExitStack() as stack:
        for index in range(torch.cuda.device_count()):
            folder.mkdir(exist_ok=True)
            uuid = torch.cuda.get_device_properties(index).uuid
            with contextlib.suppress(Timeout):
                stack.enter_context(FileLock(folder / f"{uuid}.lock").acquire(timeout=0))
                stack.enter_context(torch.cuda.device(index))
                break
        yield


def batch_tokens(device):
    """Return how many tokens to optimise over at a time: few where caches are small (a CPU)."""
    return 16384 if torch.device(device).type == "cuda" else 256


def synchronize(device):
    """Wait until `device` has done its work, so that a clock read after it is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Return the largest GPU memory held so far in bytes; 0 on a CPU."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.max_memory_allocated(device) if on_gpu else 0


def layout(model):
    """Return the Layout of a loaded model; ValueError names its architecture and the known ones."""
    return layout_of(model.config.model_type, "architecture")


def layout_of(kind, label, hint=""):
    """Return the Layout of an architecture; ValueError begins with `label`."""
    if kind not in LAYOUTS:
        raise ValueError(f"{label} {kind!r} is not in LAYOUTS ({', '.join(LAYOUTS)}){hint}")
    return LAYOUTS[kind]


def n_layers(model):
    """Return the number of transformer blocks L."""
    return model.config.num_hidden_layers


def max_length(model):
    """Return the longest sequence in tokens that the model takes."""
    return model.config.max_position_embeddings


def name_of(model, part, layer):
    """Return the full module name of a part ("block", "mlp_in", …: Layout's) of one layer."""
    if not 0 <= layer < n_layers(model):
        raise ValueError(f"layer {layer}: the model has layers 0 to {n_layers(model) - 1}")
    return getattr(layout(model), part).format(layer)


def module_of(model, part, layer):
    """Return the module that `name_of` names."""
    return model.get_submodule(name_of(model, part, layer))


def is_input_first(module):
    """Say whether a linear map stores its weight [inputs, outputs] (GPT-2's Conv1D)."""
    return not isinstance(module, torch.nn.Linear)


def in_out(module):
    """Return (inputs, outputs) of a linear map, however it stores its weight."""
    shape = tuple(module.weight.shape)
    return shape if is_input_first(module) else shape[::-1]


def content_hash(model):
    """Return the SHA-256 of names, shapes, dtypes and bytes of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        raw = tensor.cpu().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())
    return digest.hexdigest()


def files_hash(name):
    """Return the SHA-256 over a local model's files, or of a hub name; nothing is loaded."""
    parts = []
    for pattern in ("config.json", "tokenizer*", "vocab.json", "merges.txt", "*.safetensors"):
        for path in sorted(Path(resolve(name)).glob(pattern)):
            parts += [path.name, sha256_once(path)]
    return sha256_text(*parts or [name])
