"""The loop that trains the embedded base and the pre-trained twins: rows, pace, optimisers, measure, checkpoints.

Rows are a pure function of (seed, step), so two models trained by this loop with the same seed, rows and steps read the
same tokens in the same order. A digest of the batches as they were fed stands in the state where the caller asks for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import base_data
import numpy as np
import torch
import torch.nn.functional as F
from base_optim import Muon
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

CONTEXT = 512


class Rows:
    """Packed training rows, equal shares of every domain, a pure function of (seed, step): resuming needs no state."""

    def __init__(
        self, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, seed: int, context: int = CONTEXT
    ) -> None:
        self.seed, self.context = seed, context
        self.encoded = {}
        for domain, texts in documents.items():
            ids = tokenizer(texts)["input_ids"]
            self.encoded[domain] = [np.array([*row, tokenizer.eos_token_id], dtype=np.int16) for row in ids]
        self.streams: dict[str, tuple[int, np.ndarray]] = {}

    def counts(self) -> dict[str, int]:
        return {domain: sum(map(len, rows)) for domain, rows in self.encoded.items()}

    def _row(self, domain: str, number: int) -> np.ndarray:
        documents = self.encoded[domain]
        per_epoch = sum(map(len, documents)) // self.context
        epoch, place = divmod(number, per_epoch)
        if self.streams.get(domain, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, base_data.DOMAINS.index(domain), epoch]).permutation(
                len(documents)
            )
            self.streams[domain] = (epoch, np.concatenate([documents[i] for i in order]))
        return self.streams[domain][1][place * self.context : (place + 1) * self.context]

    def batch(self, step: int, per_domain: int) -> torch.Tensor:
        """(3 * per_domain, context) token ids."""
        rows = [self._row(d, step * per_domain + i) for d in self.encoded for i in range(per_domain)]
        return torch.from_numpy(np.stack(rows)).long()


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How far training has come, in [0, 1], by steps where they are given, else by minutes spent."""

    steps: int | None
    minutes: float

    def progress(self, step: int, seconds: float) -> float:
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate(self, step: int, seconds: float, warmup_steps: int = 60) -> float:
        """Factor on the peak learning rate: linear warm-up, then linear decay to zero."""
        return min((step + 1) / warmup_steps, 1.0) * max(0.0, 1.0 - self.progress(step, seconds))


def build_optimisers(model: PreTrainedModel, lr: float, adamw_only: bool = False) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding, the norms and the routers.

    A stack of experts (E, m, n) is E matrices to Muon, and the fused gate and up projection of an expert is two, so that an
    expert is updated as the FFN of a dense model is. A router is a list of expert directions rather than a map between
    spaces: an orthogonal update would move the experts that got no signal as far as those that did.
    """
    trained = {name: p for name, p in model.model.named_parameters() if p.requires_grad and p.numel()}
    routers = [p for name, p in trained.items() if name.endswith("mlp.gate.weight")]
    fused = [p for name, p in trained.items() if name.endswith("experts.gate_up_proj")]
    apart = {id(p) for p in [*routers, *fused]}
    blocks = [p for p in model.model.layers.parameters() if p.requires_grad and p.numel() and p.ndim > 1]
    blocks = [p for p in blocks if id(p) not in apart]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": 0.01},
        {"params": [p for p in trained.values() if p.ndim == 1] + routers, "weight_decay": 0.0},
    ]
    if adamw_only:
        groups.append({"params": blocks + fused, "weight_decay": 0.1})
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]
    matrices = [{"params": blocks, "parts": 1}, *([{"params": fused, "parts": 2}] if fused else [])]
    return [Muon(matrices, lr=lr, weight_decay=0.1), torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]


def bits_per_char(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], context: int = CONTEXT
) -> float:
    """Bits to write the texts and their ends, per character; a long text is cut into windows with no shared context."""
    bits = 0.0
    with torch.inference_mode():
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for start in range(0, len(ids), context - 1):
                window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + context - 1]]])
                logits = model(input_ids=window[:, :-1], use_cache=False).logits[0]
                bits += F.cross_entropy(logits, window[0, 1:], reduction="sum").item() / math.log(2)
    return bits / sum(map(len, texts))


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, probe: dict[str, list[str]], context: int = CONTEXT
) -> dict[str, float]:
    """Bits per character of each domain."""
    return {domain: round(bits_per_char(model, tokenizer, texts, context), 4) for domain, texts in probe.items()}


def save(folder: Path, model: PreTrainedModel, optimisers: list, state: dict) -> None:
    """Checkpoint, whole or not at all."""
    temporary = folder / "checkpoint.tmp"
    payload = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "state": state}
    torch.save(payload, temporary)
    temporary.replace(folder / "checkpoint.pt")


def resume(folder: Path, model: PreTrainedModel, optimisers: list) -> dict | None:
    """The state of the folder's checkpoint, its weights put into the model and the optimisers; None where there is none."""
    if not (folder / "checkpoint.pt").exists():
        return None
    payload = torch.load(folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict(payload["model"])
    for optimiser, saved in zip(optimisers, payload["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return payload["state"]


def tidy(folder: Path) -> None:
    """A saved tokenizer without words about this machine, under the name that older readers know; files that all may read."""
    settings = folder / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k not in ("is_local", "local_files_only")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


class RouterTerms(Protocol):
    """What the loop asks of a sparse model's routers after each forward."""

    def penalty(self) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of the router losses of the last forward, and each of them alone."""

    def load(self) -> dict[str, float]:
        """How evenly the experts were used since the last call."""


def digest_after(digest: str, ids: Tensor) -> str:
    """The chain of batches, one longer: sha256 of the digest so far (hex) and the ids as little-endian int64."""
    return hashlib.sha256(digest.encode() + ids.numpy().astype("<i8").tobytes()).hexdigest()


def _say(line: dict) -> None:
    print(json.dumps(line), flush=True)


def _set_rate(optimisers: list[torch.optim.Optimizer], lr: float) -> None:
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = lr


def _step(forward, ids: Tensor, model, optimisers, routers: RouterTerms | None) -> tuple[float, dict[str, float]]:
    """One update; the language loss alone, and the router losses where there are routers."""
    logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))
    penalty, terms = routers.penalty() if routers else (0.0, {})
    (loss + penalty).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return loss.item(), terms


def loop(
    arguments,
    model: PreTrainedModel,
    optimisers: list[torch.optim.Optimizer],
    pace: Pace,
    rows: Rows,
    state: dict,
    held_out_now: Callable[[], dict[str, float]],
    *,
    routers: RouterTerms | None = None,
    tell: Callable[[dict], None] = _say,
) -> None:
    """Steps until the pace is done; logs, measures and saves on the way. `state` with a `stream_sha256` has it kept."""
    forward = torch.compile(model) if arguments.compile else model
    began = time.monotonic() - state["seconds"]
    saved = time.monotonic()
    while pace.progress(state["step"], state["seconds"]) < 1.0:
        rate = arguments.lr * pace.rate(state["step"], state["seconds"])
        _set_rate(optimisers, rate)
        ids = rows.batch(state["step"], arguments.rows_per_domain)
        loss, terms = _step(forward, ids, model, optimisers, routers)
        state["running_loss"] = 0.95 * state["running_loss"] + 0.05 * loss if "running_loss" in state else loss
        state["step"] += 1
        state["tokens"] += ids.numel()
        state["seconds"] = time.monotonic() - began
        if "stream_sha256" in state:
            state["stream_sha256"] = digest_after(state["stream_sha256"], ids)
        if state["step"] % 20 == 0:
            line = {k: state[k] for k in ("step", "tokens")} | {"seconds": round(state["seconds"])}
            line |= {"loss": round(state["running_loss"], 4), "lr": round(rate, 6)}
            tell(line | terms | (routers.load() if routers else {}))
        if time.monotonic() - saved > 60 * arguments.save_minutes:
            save(arguments.out, model, optimisers, state)
            _say({"step": state["step"], "held_out_bits_per_char": held_out_now()})
            saved = time.monotonic()
