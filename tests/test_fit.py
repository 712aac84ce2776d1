"""editcore.fit: families that editors fit are let pass, others are refused with one line."""

import pytest
import torch
from conftest import byte_tokenizer, make

from editcore import fit, model
from editcore.editors import EDITORS
from editcore.model import LAYOUTS, Layout, _layout

LLAMA = LAYOUTS["llama"]
FALCON = _layout("transformer.word_embeddings", "transformer.ln_f", "transformer.h.{}",
                 "self_attention", "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
MISFITS = {     # families that are not in LAYOUTS, with the line that one would write for them
    "gemma2": (LLAMA, "moves the block's"), "gemma3_text": (LLAMA, "moves the block's"),
    "olmo2": (LLAMA, "moves the block's"), "granite": (LLAMA, "logits"),
    "cohere": (LLAMA, "logits"), "falcon": (FALCON, "moves the block's"),
}
SCALES = {"granite": {"residual_multiplier": 0.2, "logits_scaling": 8.0}}


@pytest.fixture(scope="module")
def tok():
    return byte_tokenizer()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_families_fit(kind, dtype, tok):
    fit.check(make(kind, len(tok), dtype=dtype), tok)


@pytest.mark.parametrize("kind", MISFITS)
def test_others_are_refused(kind, tok, monkeypatch):
    line, words = MISFITS[kind]
    other = make(kind, len(tok), **SCALES.get(kind, {}))
    with pytest.raises(ValueError, match=f"architecture '{kind}' is not in LAYOUTS"):
        model.layout(other)
    monkeypatch.setitem(LAYOUTS, kind, line)
    with pytest.raises(ValueError, match=f"architecture '{kind}' does not fit.*{words}") as error:
        EDITORS["ft"].prepare(other, tok, None)
    assert "\n" not in str(error.value)


def test_a_wrong_line_is_refused(tok, monkeypatch):
    """The output map of the attention in place of the MLP's, say."""
    wrong = Layout(**{**vars(LLAMA), "mlp_out": LLAMA.attn + ".o_proj"})
    monkeypatch.setitem(LAYOUTS, "llama", wrong)
    with pytest.raises(ValueError, match="does not fit"):
        fit.check(make("llama", len(tok)), tok)
