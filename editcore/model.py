"""The name or folder of a causal language model in; the model, its tokenizer and where its MLP weights are out."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True)
class Layout:
    """Where one architecture keeps the parts that editing touches (module paths; {} is the layer)."""

    block: str      # a transformer block
    mlp: str        # its MLP
    mlp_in: str     # the linear map into the MLP's hidden layer (the non-gate one), d -> m
    mlp_out: str    # the linear map out of it, m -> d: W of the closed-form editors
    attn: str       # its attention
    embed: str      # token embedding
    norm: str       # the final norm
    mlp_gate: str = ""      # the linear map of the MLP's gate, d -> m; "" where it has none


LLAMA = Layout(block="model.layers.{}", mlp="model.layers.{}.mlp", mlp_in="model.layers.{}.mlp.up_proj",
               mlp_out="model.layers.{}.mlp.down_proj", attn="model.layers.{}.self_attn",
               embed="model.embed_tokens", norm="model.norm", mlp_gate="model.layers.{}.mlp.gate_proj")

# The only table of model families; the key is config.model_type. A new family is one line here.
LAYOUTS = {
    "gpt2": Layout(block="transformer.h.{}", mlp="transformer.h.{}.mlp", mlp_in="transformer.h.{}.mlp.c_fc",
                   mlp_out="transformer.h.{}.mlp.c_proj", attn="transformer.h.{}.attn", embed="transformer.wte",
                   norm="transformer.ln_f"),
    "gptj": Layout(block="transformer.h.{}", mlp="transformer.h.{}.mlp", mlp_in="transformer.h.{}.mlp.fc_in",
                   mlp_out="transformer.h.{}.mlp.fc_out", attn="transformer.h.{}.attn", embed="transformer.wte",
                   norm="transformer.ln_f"),
    "gpt_neox": Layout(block="gpt_neox.layers.{}", mlp="gpt_neox.layers.{}.mlp",
                       mlp_in="gpt_neox.layers.{}.mlp.dense_h_to_4h", mlp_out="gpt_neox.layers.{}.mlp.dense_4h_to_h",
                       attn="gpt_neox.layers.{}.attention", embed="gpt_neox.embed_in",
                       norm="gpt_neox.final_layer_norm"),
    "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA,
}


SHORT_NAMES = {"pocket": Path(__file__).resolve().parents[1] / "data" / "pocket"}    # models of this project


def resolve(name):
    """The folder of a short name ("pocket"), else the folder or Hugging Face name itself."""
    return str(SHORT_NAMES.get(str(name), name))


def short_name(name):
    """A model's name as it appears in rows: the last part of its path."""
    return Path(name).name


def load(name, device=None, dtype=torch.float32, revision=None):
    """(model in eval mode, tokenizer) of a short name, folder or Hugging Face name, weights in `dtype`, on `device`.

    device None takes the GPU when there is one. Only safetensors are read and no remote code is run. Raises
    ValueError naming the folder or the architecture if it cannot be loaded or edited.
    """
    name = resolve(name)
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: not a model folder (no config.json)")
    try:
        tok = AutoTokenizer.from_pretrained(name, revision=revision)
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, use_safetensors=True)
    except (OSError, KeyError) as error:
        raise ValueError(f"model {name}: cannot be loaded ({str(error).splitlines()[0]})") from error
    layout(model)
    return model.to(device or default_device()).eval().requires_grad_(False), tok


def default_device():
    """"cuda" when there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def gpus():
    """A name for each GPU that this process sees, the card's own: jobs that see different cards share no name."""
    return [f"gpu-{torch.cuda.get_device_properties(index).uuid}" for index in range(torch.cuda.device_count())]


def use_gpu(index):
    """Make GPU `index` of those seen the one that "cuda" means, here and in processes started from now on."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index].strip() if seen else str(index)
    torch.cuda.set_device(index)


def batch_tokens(device):
    """Tokens worth optimising over at a time: few where caches are small (a CPU), many on a GPU."""
    return 16384 if torch.device(device).type == "cuda" else 256


def synchronize(device):
    """Wait until `device` has done its work, so that a clock read after it is right."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """Largest GPU memory held so far in bytes; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else 0


def layout(model):
    """The Layout of a loaded model; ValueError names its architecture and the known ones."""
    kind = model.config.model_type
    if kind not in LAYOUTS:
        raise ValueError(f"architecture {kind!r} is not in LAYOUTS ({', '.join(LAYOUTS)})")
    return LAYOUTS[kind]


def n_layers(model):
    """Number of transformer blocks L."""
    return model.config.num_hidden_layers


def max_length(model):
    """Longest sequence in tokens that the model takes."""
    return model.config.max_position_embeddings


def name_of(model, part, layer):
    """Full module name of a part ("block", "mlp", "mlp_in", "mlp_out", "attn") of one layer, range-checked."""
    if not 0 <= layer < n_layers(model):
        raise ValueError(f"layer {layer}: the model has layers 0 to {n_layers(model) - 1}")
    return getattr(layout(model), part).format(layer)


def module_of(model, part, layer):
    """The module that `name_of` names."""
    return model.get_submodule(name_of(model, part, layer))


def weight_of(model, part, layer):
    """(parameter name, parameter) of the linear map `part` in `layer`, in the model's own orientation."""
    name = name_of(model, part, layer) + ".weight"
    return name, model.get_parameter(name)


def is_input_first(module):
    """True if the weight is stored [inputs, outputs] (GPT-2's Conv1D), False for torch's [outputs, inputs]."""
    return not isinstance(module, torch.nn.Linear)


def content_hash(model):
    """Hex SHA-256 of names, shapes, dtypes and bytes of all weights: equal weights, equal hash, whatever the name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
