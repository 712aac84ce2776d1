"""Say in one line what is wrong with a model's folder, before its weights are loaded."""

import difflib
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from editcore.files import read_json

ADAPTER = ("it holds an adapter (LoRA) and no model; merge the adapter into its model, with peft's "
           "merge_and_unload, and save that")
PICKLES = ("its weights are pickle files, which can run code and are not read; where you trust "
           "them, AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW) writes "
           "safetensors")
OTHERS = "its weights are those of another framework; convert them to model.safetensors"
GGUF = "its weights are a GGUF file; give the file itself: {file}"
# What is found where a file is missing, the first that matches, and what to do about it.
NO_CONFIG = {
    "adapter_config.json": ADAPTER,
    "*.gguf": GGUF,
    "params.json": OTHERS,
    "*.pth": PICKLES,
    "config.json": "config.json is no file",
    "*/config.json": "no config.json in it, but one below; give {file.parent}",
    "snapshots/*/config.json": "no config.json in it, but one below; give {file.parent}",
    "*.safetensors": "no config.json beside the weights",
    "*": "not a model folder (no config.json)",
    ".": "an empty folder",
}
NO_WEIGHTS = {
    "pytorch_model*.bin*": PICKLES,
    "*.pt*": PICKLES,
    "*.bin": PICKLES,
    "*.gguf": GGUF,
    "*.h5": OTHERS,
    "*.msgpack": OTHERS,
    "**/*.onnx": OTHERS,
    "*.safetensors": "no model.safetensors in it, and no model.safetensors.index.json that names "
                     "{file.name}",
    ".": "no weights in it (model.safetensors)",
}
BUFFERS = r"(masked_bias|attn\.bias|attention\.bias|inv_freq)$"         # no weights
DTYPES = ("F64", "F32", "F16", "BF16")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "*.tiktoken", "tekken.json")
BEGINNINGS = {      # of files that are not what their name says
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; type: git lfs pull",
    b"<!DOCTYPE": "a web page, not the file that it should be; download it again",
    b"<!doctype": "a web page, not the file that it should be; download it again",
    b"<html": "a web page, not the file that it should be; download it again",
    b"PK\3\4": "a pickle or zip archive under another name",
    b"GGUF": "a GGUF file under another name",
}


def check_path(name, known=()):
    """ValueError if a name means a folder that is not there; known: other names of models."""
    path = Path(name)
    if path.exists():
        if not path.is_dir():
            raise ValueError(f"{name}: a file; give the folder of the model, or a .gguf file")
        return
    parts = path.parts
    if re.match(r"[./~\\]|[A-Za-z]:", name) or "\\" in name or len(parts) != name.count("/") + 1 \
            or len(parts) > 2 or (len(parts) == 2 and Path(parts[0]).is_dir()):
        beside = path.parent.iterdir() if path.parent.is_dir() else ()
        near = difflib.get_close_matches(path.name, [other.name for other in beside], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"{name}: no such folder{hint}")
    if near := difflib.get_close_matches(name, known, 1):
        raise ValueError(f"{name}: no such model; did you mean {near[0]!r}?")


def check_config(config, name):
    """ValueError if a configuration (what config.json says) is not of a model that is editable."""
    where = f"{name}: config.json"
    if not isinstance(config, dict):
        raise ValueError(f"{where} is not an object, but {type(config).__name__}")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{where}: model_type is {config.get('model_type')!r}, but must name an "
                         "architecture")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ValueError(f"{where}: quantised weights ({method}) cannot be edited; take the model "
                         "as it was before it was quantised")


def read_config(folder):
    """Return what a folder's config.json says; ValueError if it cannot be read."""
    folder = Path(folder)
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file() or not path.is_file():
        raise ValueError(f"{folder}: {_first(folder, NO_CONFIG)}")
    check_beginning(path)
    config = read_json(path)
    check_config(config, folder)
    return config


def check_weights(folder, layout, config):
    """ValueError if a folder's weights, by their headers, are damaged or do not fit `config`."""
    folder = Path(folder)
    shapes = {}
    for path in weight_files(folder):
        check_beginning(path)
        try:
            with safe_open(path, "pt") as file:
                slices = {name: file.get_slice(name) for name in file.keys()}   # noqa: SIM118
                shapes |= {name: part.get_shape() for name, part in slices.items()}
                dtypes = {name: part.get_dtype() for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: damaged or cut short ({error})") from error
        for name, dtype in dtypes.items():
            if dtype not in DTYPES and not re.search(BUFFERS, name):
                raise ValueError(f"{path}: {name} is of {dtype}: quantised weights cannot be "
                                 "edited")
    stem = layout.block.split(".")[-2]
    numbers = [match.group(1) for name in shapes
               if (match := re.search(rf"(?:^|\.){stem}\.(\d+)\.", name))]
    layers = max(map(int, numbers), default=-1) + 1
    if layers != config.num_hidden_layers:
        raise ValueError(f"{folder}: config.json asks for {config.num_hidden_layers} layers, but "
                         f"the weights hold {layers}")
    embed = layout.embed.rpartition(".")[2] + ".weight"
    wanted = [config.vocab_size, config.hidden_size]
    for name, shape in shapes.items():
        if name.endswith(embed) and shape != wanted:
            raise ValueError(f"{folder}: {name} is {shape}, but by config.json {wanted} "
                             "(vocab_size, hidden_size)")


def weight_files(folder):
    """Return the paths of a folder's safetensors files; an index may name files of it only."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder}: {_first(folder, NO_WEIGHTS)}")
    check_beginning(index)
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{index}: no weight_map in it")
    paths = []
    for name in dict.fromkeys(map(str, names.values())):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise ValueError(f"{index}: names {name!r}, which lies outside the folder")
        if not (folder / name).is_file():
            raise ValueError(f"{index}: names {name!r}, which is not there")
        paths.append(folder / name)
    return paths


def check_tokenizer(folder):
    """ValueError if a folder has no tokenizer, or only a pointer to it."""
    files = [path for pattern in TOKENIZERS for path in sorted(Path(folder).glob(pattern))]
    if not files:
        raise ValueError(f"{folder}: no tokenizer in it (tokenizer.json)")
    for path in files:
        check_beginning(path)


def check_loaded(name, info):
    """ValueError unless the file holds all weights and no others; info: transformers'."""
    if info["mismatched_keys"]:
        key, *shapes = sorted(info["mismatched_keys"], key=str)[0]
        raise ValueError(f"{name}: {key} is {tuple(shapes[0])} in the file, but by config.json "
                         f"{tuple(shapes[-1])}")
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{name}: the weights lack {len(missing)} tensors that config.json asks "
                         f"for, such as {missing[0]}")
    if other := sorted(key for key in info["unexpected_keys"] if not re.search(BUFFERS, key)):
        raise ValueError(f"{name}: the weights hold {len(other)} tensors that config.json does not "
                         f"ask for, such as {other[0]}")


def check_beginning(path):
    """ValueError if a file is empty, a pointer, or of another kind than its name says."""
    with open(path, "rb") as file:
        begin = file.read(64)
    if not begin:
        raise ValueError(f"{path}: empty")
    for mark, words in BEGINNINGS.items():
        if begin.startswith(mark):
            raise ValueError(f"{path}: {words}")


def _first(folder, table):
    for pattern, words in table.items():
        paths = [folder] if pattern == "." else sorted(folder.glob(pattern))
        if paths:
            return words.format(file=paths[0])
    raise AssertionError("the last pattern always matches")
