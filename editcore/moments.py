"""Count second moments C = E[k kᵀ] of a layer's keys k on texts, and solve with them."""

from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import torch

from editcore.files import load_tensors, save_tensors, sha256_text
from editcore.hooks import capture, run
from editcore.model import content_hash, max_length, name_of
from editcore.progress import bar
from editcore.tokens import batches, encode, pad, pad_id


@dataclass
class Moments:
    """Second moments of keys, and their Cholesky factors once these were needed."""

    moments: dict           # module name -> C (m, m), float32 or float64
    count: int              # tokens that were counted; 0 if the file did not say
    source: dict = field(default_factory=dict)      # `source` of what they were counted on, or {}
    factors: dict = field(default_factory=dict, repr=False, compare=False)  # cache of `factor`

    def factor(self, name):
        """Return the lower Cholesky factor (m, m) of C in float64, computed once."""
        if name in self.factors:
            return self.factors[name]
        if name not in self.moments:
            known = ", ".join(self.moments) or "nothing"
            raise ValueError(f"no second moment of {name}; there is one of {known}")
        moment = self.moments[name].double()
        lower, failed = torch.linalg.cholesky_ex(moment)
        if failed or not torch.isfinite(lower).all():
            raise ValueError(f"the second moment of {name} is not positive definite: {self.count} "
                             f"tokens for {len(moment)} dimensions; take more texts")
        self.factors[name] = lower
        return lower

    def solve(self, name, keys):
        """Return C⁻¹ keys, (m,) or (m, n), in float64 on the device of `keys`."""
        lower = self.factors[name] = self.factor(name).to(keys.device)
        columns = keys.double().reshape(len(keys), -1)
        return torch.cholesky_solve(columns, lower).reshape(keys.shape)

    def save(self, path):
        """Write a safetensors file: a tensor C/{module} each, count and source in the metadata."""
        tensors = {f"C/{name}": moment for name, moment in self.moments.items()}
        about = {"format": "editcore-stats-1", "count": self.count}
        save_tensors(path, tensors, about | self.source)

    def check(self, model, tok, label):
        """Return self; ValueError if it was counted on another model, dtype or tokenizer."""
        here = source(model, tok) if self.source else {}
        for key, value in self.source.items():
            if here[key] != value:
                raise ValueError(f"{label}: second moments of another model or tokenizer ({key} "
                                 f"{value[:16]}, here {here[key][:16]}); count them for this "
                                 "one: python -m editcore moments MODEL -o FILE")
        return self


def source(model, tok):
    """Return what moments depend on beside texts: {"model_hash", "tokenizer_hash"}."""
    return {"model_hash": content_hash(model),
            "tokenizer_hash": sha256_text(tok.backend_tokenizer.to_str())}


def load(path):
    """Read the Moments of a safetensors file (tensors other than C/… are left out)."""
    tensors, metadata = load_tensors(path)
    moments = {name[2:]: value for name, value in tensors.items() if name.startswith("C/")}
    count = metadata.get("count", 0)
    if not moments or not isinstance(count, int):
        raise ValueError(f"{path}: not a file of second moments, or damaged: no tensor C/…, or "
                         f"count {count!r}")
    for name, moment in moments.items():
        square = moment.ndim == 2 and len(moment) == moment.shape[1]
        if not (square and moment.is_floating_point() and moment.isfinite().all()):
            raise ValueError(f"{path}: C/{name} must be a square matrix of finite floats, found "
                             f"{tuple(moment.shape)}, {moment.dtype}")
    known = {key: str(metadata[key]) for key in ("model_hash", "tokenizer_hash") if key in metadata}
    return Moments(moments, count, known)


@dataclass(frozen=True)
class CountSettings:
    """What is counted."""

    tokens: int = 0             # so many tokens of the texts, in order; 0: all of them
    length: int = 512           # longest sequence (at most the model's own)
    pack: bool = True           # join the texts into rows of `length`, or cut each text at it
    part: str = "mlp_out"       # the linear map whose inputs are the keys


def second_moments(model, tok, texts, layers, settings=None):
    """Count Σ k kᵀ / tokens over all tokens of texts, in one pass that stops at the last layer."""
    settings = settings or CountSettings()
    names = [name_of(model, settings.part, layer) for layer in layers]
    rows = token_rows(model, tok, texts, settings)
    count = sum(map(len, rows))
    device = next(model.parameters()).device
    sums = dict.fromkeys(names, 0)
    groups = list(batches([len(row) for row in rows], max_tokens=4096))
    for group in bar(groups, "second moments"):
        ids, mask = pad([rows[i] for i in group], pad_id(tok), device)
        with capture(model, names, "input") as keys:
            run(model, input_ids=ids, attention_mask=mask)
        for name in names:
            rows_of_keys = keys[name][mask.bool()]
            wide = rows_of_keys.to(torch.promote_types(rows_of_keys.dtype, torch.float32))
            sums[name] = sums[name] + (wide.T @ wide).double()
    return Moments({name: total.cpu() / count for name, total in sums.items()}, count)


def token_rows(model, tok, texts, settings):
    """Return the id lists that are counted, packed or cut, `settings.tokens` in all."""
    length = min(settings.length, max_length(model))
    rows = encode(tok, texts)
    if settings.pack:
        joined = [token for row in rows for token in row]
        rows = [joined[i:i + length] for i in range(0, len(joined), length)]
    rows = [row[:length] for row in rows if row]
    if not rows:
        raise ValueError("second moment: the texts have no tokens")
    *starts, total = accumulate(map(len, rows), initial=0)
    if settings.tokens > total:
        raise ValueError(f"second moment: {settings.tokens} tokens wanted, but the texts have "
                         f"{total}")
    end = settings.tokens or total
    return [row[:end - start] for row, start in zip(rows, starts) if start < end]


def cached(model, tok, texts, layers, folder, settings=None):
    """Keep `second_moments` in `folder` by weights, tokenizer, texts, layer and settings."""
    settings = settings or CountSettings()
    counted = "Count" + str(settings).removeprefix("CountSettings")     # as in the first files
    origin = source(model, tok)
    base = sha256_text(origin["model_hash"], tok.backend_tokenizer.to_str(), sha256_text(*texts),
                       counted)
    names = {layer: name_of(model, settings.part, layer) for layer in layers}
    paths = {layer: Path(folder) / f"C-{sha256_text(base, name)[:24]}.safetensors"
             for layer, name in names.items()}
    missing = [layer for layer in layers if not paths[layer].is_file()]
    if missing:
        new = second_moments(model, tok, texts, missing, settings)
        for layer in missing:
            part = {names[layer]: new.moments[names[layer]]}
            Moments(part, new.count, origin).save(paths[layer])
    files = [load(paths[layer]) for layer in layers]
    moments = {name: moment for file in files for name, moment in file.moments.items()}
    return Moments(moments, files[0].count, files[0].source)
