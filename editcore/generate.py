"""Let a model write: greedy or sampled continuations, and texts of its own to take moments from."""

import math
from itertools import groupby
from pathlib import Path

import torch

from editcore.files import cache_folder, read_json, read_lines, sha256_text, write_json
from editcore.likelihood import prefix_cache, repeated
from editcore.model import content_hash, in_out, max_length, module_of, resolve
from editcore.progress import bar
from editcore.suffix import quick
from editcore.tokens import batches, check_lengths, common, encode, pad_id, text_start


def continuations(model, tok, prompts, n_new, *, top_k=0, generator=None, end=None):
    """Return the n_new token ids that follow each prompt: (len(prompts), n_new) int64 on the CPU.

    top_k 0 is greedy; else tokens are drawn from the top_k most likely (math.inf: from all) with
    `generator` (on the CPU, so that a seed means the same on every device). Prompts of any lengths
    go together, left-padded and masked, and what they all begin with is run once. end: a token
    after which a row is done; what comes then is not to be read. ValueError if prompt and
    continuation are longer than the model.
    """
    rows = encode(tok, prompts)
    labels = [f"prompt {text[:60]!r} and {n_new} new tokens" for text in prompts]
    check_lengths([row + [0] * n_new for row in rows], labels, max_length(model))
    ids = torch.empty(len(rows), n_new, dtype=torch.long)
    skip = common(rows, min((len(row) - 1 for row in rows), default=0))
    prefix = torch.tensor([rows[0][:skip] if skip else []], dtype=torch.long, device=model.device)
    with quick(model):
        cache = prefix_cache(model, prefix)
        for batch in batches([len(row) - skip + n_new for row in rows]):
            ids[batch] = _continue(model, [rows[i][skip:] for i in batch], n_new, skip=skip,
                                   cache=cache, fill=pad_id(tok), top_k=top_k,
                                   generator=generator, end=end)
    return ids


def texts(model, tok, prompts, n_new, *, top_k=0, generator=None, whole=False):
    """Return the continuations as texts; whole: with their prompts, without special tokens."""
    ids = continuations(model, tok, prompts, n_new, top_k=top_k, generator=generator)
    if not whole:
        return tok.batch_decode(ids)
    rows = [row + new for row, new in zip(encode(tok, prompts), ids.tolist(), strict=True)]
    return tok.batch_decode(rows, skip_special_tokens=True)


def answers(model, tok, prompts, n_new):
    """Return greedy continuations as bare texts, up to the end-of-text token if there is one."""
    end = tok.eos_token_id
    ids = continuations(model, tok, prompts, n_new, end=end).tolist()
    rows = [row[:row.index(end)] if end in row else row for row in ids]
    return [text.strip() for text in tok.batch_decode(rows)]


def own_texts(model, tok, n_tokens=0, seed=0, folder=None):
    """Return texts of at least n_tokens tokens that the model writes from a text's start, sampled.

    They stand in for a corpus. n_tokens 0 takes 4 m (m: MLP width), and 20,000 at least. Kept in
    `folder` (default: `files.cache_folder()`) by weights, tokenizer, n_tokens and seed.
    """
    inputs, _ = in_out(module_of(model, "mlp_out", 0))
    n_tokens = n_tokens or max(4 * inputs, 20_000)
    key = sha256_text(content_hash(model), tok.backend_tokenizer.to_str(), text_start(tok),
                      n_tokens, seed)
    path = Path(folder or cache_folder()) / f"texts-{key[:24]}.json"
    if not path.is_file():
        write_json(path, _sampled_texts(model, tok, n_tokens, seed))
    return read_json(path)


def default_texts(model, tok, n_tokens=0, seed=0, folder=None):
    """Return the lines of texts.txt beside the model where there is one, else `own_texts`."""
    beside = Path(resolve(model.config.name_or_path)) / "texts.txt"
    return read_lines(beside) if beside.is_file() else own_texts(model, tok, n_tokens, seed, folder)


def _sampled_texts(model, tok, n_tokens, seed):
    """Texts of n_tokens tokens and more, 8,192 at a time, split at special tokens."""
    length = min(128, max_length(model) - 1)
    prompts = [text_start(tok)] * (8192 // length)
    generator = torch.Generator().manual_seed(seed)
    special = set(tok.all_special_ids)
    special |= {index for index, token in tok.added_tokens_decoder.items() if token.special}

    def rounds():
        written = 0
        while written < n_tokens:
            rows = continuations(model, tok, prompts, length, top_k=math.inf, generator=generator)
            pieces = [list(piece) for row in rows.tolist()
                      for ends, piece in groupby(row, special.__contains__) if not ends]
            documents = [text for text in tok.batch_decode(pieces) if text.strip()]
            if not documents:
                raise ValueError("the model writes no text to take second moments from")
            written += sum(map(len, encode(tok, documents)))
            yield documents

    expected = -(-n_tokens // (len(prompts) * length))
    return [text for documents in bar(rounds(), "writing texts", expected) for text in documents]


@torch.no_grad()
def _continue(model, rows, n_new, *, skip, cache, fill, top_k, generator, end):
    """(B, n_new) ids after each row, left-padded, behind `skip` tokens in a cache of one row."""
    width = max(len(row) for row in rows)
    ids = [[fill] * (width - len(row)) + row for row in rows]
    mask = [[1] * skip + [0] * (width - len(row)) + [1] * len(row) for row in rows]
    ids = torch.tensor(ids, dtype=torch.long, device=model.device)
    mask = torch.tensor(mask, dtype=torch.long, device=model.device)
    cache = repeated(cache, len(rows))
    columns = []
    for _ in range(n_new):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1]:]
        output = model(input_ids=ids, attention_mask=mask, position_ids=positions,
                       past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        ids = _choose(output.logits[:, -1], top_k, generator)
        columns.append(ids.cpu())
        if end is not None and (torch.cat(columns, 1) == end).any(1).all():
            columns += [torch.full_like(columns[0], end)] * (n_new - len(columns))
            break
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
    return torch.cat(columns, 1)


def _choose(logits, top_k, generator):
    """(B, 1) next ids of logits (B, V)."""
    if not top_k:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float().nan_to_num()
    if top_k >= logits.shape[-1]:       # all tokens: a number in [0, 1) falls into a token's share
        shares = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        places = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
        places = places.to(logits.device) * shares[:, -1:]
        return torch.searchsorted(shares, places, right=True).clamp(max=logits.shape[-1] - 1)
    best = logits.topk(top_k)
    chances = best.values.softmax(-1).cpu()
    column = torch.multinomial(chances, 1, generator=generator).to(logits.device)
    return best.indices.gather(1, column)
