"""Read and write files, whole or not at all: JSON, tensors, hashes, the folder of caches."""

import codecs
import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path


@contextlib.contextmanager
def atomic(path):
    """Give a file to write beside `path`, which takes its place once the block has succeeded."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.stem}-{uuid.uuid4().hex}{path.suffix}")
    try:
        yield tmp
        tmp.chmod(0o644)    # some libraries write files that only their owner can read
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """Give a folder beside `path`, which is not there or empty; at the end it takes its place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield beside
        for item in (beside, *beside.iterdir()):
            item.chmod(0o755 if item.is_dir() else 0o644)
        beside.replace(path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_json(path, value):
    """Write `value` as JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=True)
    with atomic(path) as tmp:
        tmp.write_text(text + "\n", encoding="utf-8")


def read_json(path):
    """Read a JSON value, or the list of those in JSON Lines; errors name the file."""
    text = read_text(path)
    try:
        if Path(path).suffix == ".jsonl":
            return _json_lines(text)
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):     # a second value behind the first
            with contextlib.suppress(ValueError):
                return _json_lines(text)
        raise ValueError(f"{path}: not valid JSON ({error})") from error


def read_text(path):
    """Read a text file in UTF-8, or in UTF-16 or UTF-32 with a byte order mark; errors name it."""
    raw = _existing(path).read_bytes()
    marks = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
             codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    coding = next((name for mark, name in marks.items() if raw.startswith(mark)), "utf-8-sig")
    try:
        text = raw.decode(coding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}); "
                         "save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{path}: not a text in UTF-8 (null bytes); save it as UTF-8")
    return text


def read_lines(path, limit=0):
    """Return the (first `limit`) non-empty lines of a text file; "\\n" in them is a line break."""
    lines = [line.strip().replace("\\n", "\n") for line in read_text(path).splitlines()
             if line.strip()]
    if not lines:
        raise ValueError(f"{path}: no text in it")
    return lines[:limit or None]


def save_tensors(path, tensors, metadata):
    """Write a safetensors file; metadata values that are no strings are written as JSON."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file  # torch takes seconds to import

    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    texts = {name: value if isinstance(value, str) else json.dumps(value)
             for name, value in metadata.items()}
    with atomic(path) as tmp:
        try:
            save_file(tensors, tmp, metadata=texts)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written ({error})") from error


def load_tensors(path, device="cpu"):
    """Read (tensors, metadata) of a safetensors file; what `save_tensors` wrote as JSON is read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(_existing(path), "pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}     # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or damaged ({error})") from error
    return tensors, {name: _decoded(text) for name, text in metadata.items()}


def flat(value):
    """Return the items of a list of lists, however deep, as one list."""
    return [item for part in value for item in flat(part)] if isinstance(value, list) else [value]


def sha256(path):
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_once(path):
    """Hex SHA-256 of a large file, read once in a process as long as size and time stay."""
    state = os.stat(path)
    return _sha256(os.path.abspath(path), state.st_ino, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1000)
def _sha256(path, *_):
    return sha256(path)


def sha256_text(*parts):
    """Hex SHA-256 of texts, each ended by a zero byte: ("ab", "c") and ("a", "bc") differ."""
    return hashlib.sha256(b"".join(str(part).encode() + b"\0" for part in parts)).hexdigest()


def cache_folder():
    """Return where caches lie: $EDITCORE_CACHE, else editcore in $XDG_CACHE_HOME or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if home.startswith("~"):    # a user without a home
        home = f"{tempfile.gettempdir()}/cache-{os.getuid()}"
    return Path(os.environ.get("EDITCORE_CACHE") or Path(home) / "editcore")


def _existing(path):
    if not Path(path).is_file():
        kind = "not a file" if Path(path).exists() else "no such file"
        raise FileNotFoundError(f"{path}: {kind}")
    return Path(path)


def _json_lines(text):
    lines = [line for line in text.split("\n") if line.strip()]
    return [json.loads(line, object_pairs_hook=_once) for line in lines]


def _once(pairs):
    """The dict of a JSON object; ValueError if a name stands in it twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return values


def _decoded(text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
