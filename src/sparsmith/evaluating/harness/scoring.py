"""The model in memory as the harness sees it. Imports `lm_eval`, so it is itself imported only when tasks are run.

What differs from the harness's own `HFLM`: the tokens are those of training (one bos at the head where the tokenizer has one, whatever the
tokenizer would add by itself); tokenizer, weights and generation settings are left as they were (`HFLM` adds a padding token and ties
weights anew); answers are greedy whatever the checkpoint's generation settings say; a prompt that was cut is remembered.

With `scorer="rank"` the options are scored by our own rank classifier, which runs the tokens that all options share once; the harness
still builds the prompts and counts the hits. Without it the options of a batch are padded on the right and no mask is given, as the
harness does: right for models whose attention looks back alone.
"""

from __future__ import annotations

import copy
from itertools import groupby
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn

from sparsmith.data.tokens import encode_plain, one_bos
from sparsmith.evaluating.batching import BATCH_TOKENS, pad, pad_mask
from sparsmith.evaluating.generation import stop_ids
from sparsmith.evaluating.rank import Option, score_options


class Held:
    """The model without being a module, so that the harness neither ties its weights nor changes its mode."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.whole: Any = model
        self.config: Any = model.config
        self.device = next(model.parameters()).device
        self.stops = sorted(stop_ids(model, tokenizer))

    def __call__(self, input_ids: Tensor) -> Any:
        return self.whole(input_ids=input_ids, use_cache=False)

    def generate(self, **settings: Any) -> Tensor:
        """The likeliest tokens; the checkpoint's own generation settings stand aside meanwhile."""
        from transformers import GenerationConfig

        own = self.whole.generation_config
        self.whole.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id, eos_token_id=self.stops, pad_token_id=settings["pad_token_id"]
        )
        try:
            return self.whole.generate(**settings)
        finally:
            self.whole.generation_config = own


class HarnessModel(HFLM):  # type: ignore[misc,unused-ignore]
    """A loaded model for `lm_eval.evaluator.evaluate`."""

    def __init__(self, model: nn.Module, tokenizer: Any, *, batch_size: int, scorer: str) -> None:
        super().__init__(
            pretrained=Held(model, tokenizer),  # type: ignore[arg-type,unused-ignore]
            tokenizer=copy.deepcopy(tokenizer),
            backend="causal",
            batch_size=batch_size,
        )
        self.scorer = scorer
        self.cut_prompts: set[str] = set()
        """Prompts whose head did not fit into the model's context."""

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of a text; with the bos unless `add_special_tokens` is false."""
        ids = encode_plain(self.tokenizer, [string])[0]
        if add_special_tokens is False:
            return ids
        return one_bos(ids, [False] * len(ids), self.tokenizer.bos_token_id, self.tokenizer.eos_token_id).ids

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(ids, mask) of prompts, (B, S) each, padded on the left, the last `left_truncate_len` tokens of each."""
        rows = [self.tok_encode(string) for string in strings]
        room = left_truncate_len or max(map(len, rows))
        self.cut_prompts.update(string for string, row in zip(strings, rows) if len(row) > room)
        rows = [row[-room:] for row in rows]
        return pad(rows, self.tokenizer.pad_token_id, left=True), pad_mask(rows, left=True)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is it the likeliest) of each ((prompt, option), prompt ids, option ids)."""
        self.cut_prompts.update(
            texts[0] for texts, head, tail in requests if len(head) + len(tail) > self.max_length + 1
        )
        if self.scorer == "harness":
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        rows = [
            [_option(head, tail, self.max_length + 1) for _, head, tail in group]
            for _, group in groupby(requests, key=lambda request: (request[0][0], tuple(request[1])))
        ]
        scores = score_options(self.model.whole, rows, batch_tokens=max(BATCH_TOKENS, self.max_length))
        return [(score, False) for row in scores for score in row]

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with torch.no_grad():
            return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        with torch.no_grad():
            return super().generate_until(requests, disable_tqdm=True)


def _option(head: list[int], tail: list[int], room: int) -> Option:
    ids = (head + tail)[-room:]
    return Option(tuple(ids), len(ids) - len(tail))
