"""A character tokenizer, and evaluation sets made on the spot through the real reader."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from sparsmith.data.chat import make_encoder
from sparsmith.data.evalsets import EvalSet, load_eval
from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource

ALPHABET = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?+-*/=#'\"()\n_"
PAD, BOS, EOS = 0, 1, 2


def char_tokenizer(merges: list[tuple[str, str]] | None = None) -> Any:
    """One token per character (after `merges`), ids below 128; pad 0, bos 1, eos 2; adds no special token by itself."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = ["<pad>", "<s>", "</s>", "<unk>", *ALPHABET, *(a + b for a, b in merges or [])]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges or [], unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def eval_set(tokenizer: Any, rows: list[tuple], name: str = "sums", domain: str = "maths", **source: Any) -> EvalSet:
    """A set of (prompt, completion[, options]) rows, the template being the prompt alone."""
    keys = ("prompt", "completion", "options")
    lines = [json.dumps(dict(zip(keys, row))) for row in rows]
    settings = DataSettings(train=(TrainSource(name="t", domain=domain, path="t"),), template="{prompt}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        made = EvalSource(name=name, domain=domain, path="rows.jsonl", **source)
        return load_eval(made, 0, settings, make_encoder(tokenizer, settings.template, settings.loss_on), Path(folder))
