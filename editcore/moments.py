"""A model and texts in; the second moment C = E[k kᵀ] of the keys of each wanted layer out, cached by content."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from editcore.files import atomic, sha256_text
from editcore.hooks import capture, run
from editcore.model import content_hash, max_length, name_of
from editcore.progress import bar
from editcore.tokens import batches, encode, pad, pad_id


@dataclass(frozen=True)
class Moments:
    """Second moments of keys, with what solving needs kept from one edit to the next."""

    moments: dict           # module name -> C (m, m), float32 or float64
    count: int              # tokens that were counted; 0 if the file did not say
    factors: dict = field(default_factory=dict, repr=False, compare=False)  # module name -> Cholesky factor, when used

    def factor(self, name):
        """Lower Cholesky factor (m, m) of C in float64, computed once.

        ValueError if there is no C of this module, or if C is not positive definite (too few or too uniform texts).
        """
        if name not in self.factors:
            if name not in self.moments:
                raise ValueError(f"no second moment of {name}; there is one of {', '.join(self.moments) or 'nothing'}")
            moment = self.moments[name].double()
            lower, failed = torch.linalg.cholesky_ex(moment)
            if failed or not torch.isfinite(lower).all():
                raise ValueError(f"the second moment of {name} is not positive definite: {self.count} tokens for "
                                 f"{len(moment)} dimensions; take more texts")
            self.factors[name] = lower
        return self.factors[name]

    def solve(self, name, keys):
        """C⁻¹ keys, (m,) or (m, n), in float64 on the device of `keys`."""
        columns = keys.double() if keys.ndim == 2 else keys.double()[:, None]
        lower = self.factor(name)
        if lower.device != keys.device:
            lower = self.factors[name] = lower.to(keys.device)
        solved = torch.cholesky_solve(columns, lower)
        return solved if keys.ndim == 2 else solved[:, 0]

    def save(self, path):
        """Write a safetensors file with a tensor C/{module} each and the token count in the metadata."""
        tensors = {f"C/{name}": moment.cpu().contiguous() for name, moment in self.moments.items()}
        with atomic(path) as tmp:
            save_file(tensors, tmp, metadata={"format": "editcore-stats-1", "count": str(self.count)})


def load(path):
    """The Moments of a safetensors file (other tensors than C/… are left alone); errors name the file."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("C/")]  # noqa: SIM118 (no plain iteration)
            count = int((file.metadata() or {}).get("count", 0))
            moments = {name[2:]: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a statistics file, or damaged ({error})") from error
    if not moments:
        raise ValueError(f"{path}: no tensor C/… in it")
    return Moments(moments, count)


@dataclass(frozen=True)
class CountSettings:
    """What is counted."""

    tokens: int = 0             # so many tokens of the texts, in order; 0: all of them
    length: int = 512           # longest sequence (at most the model's own); rows are packed to it
    pack: bool = True           # join the texts into rows of `length`; False: each text alone, cut at `length`
    part: str = "mlp_out"       # the linear map whose inputs are the keys


def second_moments(model, tok, texts, layers, how=CountSettings()):  # noqa: B008 (frozen)
    """Moments of the keys in `layers`: Σ k kᵀ / count over all non-pad tokens, in a pass that stops at the last layer.

    The forward pass runs in the model's dtype, a batch's product in float32 or better, the sum in float64.
    """
    names = [name_of(model, how.part, layer) for layer in layers]
    rows = token_rows(model, tok, texts, how)
    sums = {}
    count = sum(map(len, rows))
    device = next(model.parameters()).device
    groups = list(batches([len(row) for row in rows], max_tokens=4096))
    for group in bar(groups, "second moments"):
        ids, mask = pad([rows[i] for i in group], pad_id(tok), device)
        with capture(model, names, "input") as keys:
            run(model, input_ids=ids, attention_mask=mask)
        for name in names:
            sums[name] = sums.get(name, 0) + _product(keys[name][mask.bool()])
    return Moments({name: total.cpu() / count for name, total in sums.items()}, count)


def token_rows(model, tok, texts, how):
    """The id lists that are counted: packed or cut to `how.length`, `how.tokens` in all. ValueError without any."""
    length = min(how.length, max_length(model))
    rows = encode(tok, texts)
    if how.pack:
        joined = [token for row in rows for token in row]
        rows = [joined[i:i + length] for i in range(0, len(joined), length)]
    rows = [row[:length] for row in rows if row]
    if how.tokens:
        total, kept = 0, []
        for row in rows:
            kept.append(row[:how.tokens - total])
            total += len(kept[-1])
            if total == how.tokens:
                break
        if total < how.tokens:
            raise ValueError(f"second moment: {how.tokens} tokens wanted, but the texts have {total}")
        rows = kept
    if not rows:
        raise ValueError("second moment: the texts have no tokens")
    return rows


def cached(model, tok, texts, layers, folder, how=CountSettings()):  # noqa: B008 (frozen)
    """`second_moments`, read from `folder` where it holds them; what is missing is computed in one pass and kept there.

    A file's name hashes the model's weights, the tokenizer, the texts, the layer and how it was counted, so that
    changed weights under an old name are never met by old statistics.
    """
    base = sha256_text(content_hash(model), tok.backend_tokenizer.to_str(), sha256_text(*texts), how)
    names = {layer: name_of(model, how.part, layer) for layer in layers}
    paths = {layer: Path(folder) / f"C-{sha256_text(base, name)[:24]}.safetensors" for layer, name in names.items()}
    missing = [layer for layer in layers if not paths[layer].is_file()]
    if missing:
        made = second_moments(model, tok, texts, missing, how)
        for layer in missing:
            Moments({names[layer]: made.moments[names[layer]]}, made.count).save(paths[layer])
    parts = [load(paths[layer]) for layer in layers]
    return Moments({name: moment for part in parts for name, moment in part.moments.items()}, parts[0].count)


def _product(keys):
    """Σ k kᵀ (m, m) in float64 of keys (tokens, m); the product itself in float32 or better."""
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    return (keys.T @ keys).double()
