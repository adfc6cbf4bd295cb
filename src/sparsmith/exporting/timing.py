"""The third column of the accounting that has to be run for: FLOPs per token, and latency beside the dense model.

FLOPs are counted by torch's flop counter on tensors without storage, so they cost no time and no memory. Latency is wall time of runs that
alternate between the two models, so that a machine that slows down slows both; the dense model is built from its config with random
weights, which take the same time as others.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsmith import anatomy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONTEXT, RUNS, WARM_UP, NEW_TOKENS = 128, 20, 3, 16


def flops_per_token(model: PreTrainedModel, dense_config: Mapping[str, Any], context: int = CONTEXT) -> dict[str, Any]:
    """Forward FLOPs per token of one row of `context` tokens, head included; the model's, the dense model's and their share."""
    with torch.device("meta"):
        built = type(model)._from_config(copy.deepcopy(model.config))
    dense = _count(dense_model(dense_config, "meta", torch.float32), context)
    try:
        cut = _count(built, context)
    except RuntimeError:  # a router looks at values: one real forward
        cut = _count(model, context)
    return {
        "flops_per_token": cut,
        "dense_flops_per_token": dense,
        "flops_share": cut / dense,
        "flops_context": context,
    }


def latency(
    model: PreTrainedModel,
    dense_config: Mapping[str, Any],
    *,
    batch: int = 1,
    context: int = CONTEXT,
    new_tokens: int = NEW_TOKENS,
    runs: int = RUNS,
) -> dict[str, Any]:
    """Prefill (one forward of `batch` rows of `context` tokens) and decode (one further token, with the cache), milliseconds.

    Returns:
        {prefill_ms, decode_ms: {model, dense: {median, p10, p90}}, runs, device, dtype, batch, context}; of a classifier no decode_ms.
    """
    dense = dense_model(dense_config, model.device, model.dtype)
    models = {"model": model, "dense": dense}
    taken: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in models} for kind in ("prefill", "decode")}
    ids = torch.randint(3, model.config.vocab_size, (batch, context), generator=torch.Generator().manual_seed(0))
    for run in range(WARM_UP + runs):
        for name, one in models.items():
            prefill, decode = _seconds(one, ids.to(one.device), new_tokens)
            if run >= WARM_UP:
                taken["prefill"][name].append(1e3 * prefill)
                taken["decode"][name].append(1e3 * decode / new_tokens)
    return {
        **{
            f"{kind}_ms": {name: _spread(times) for name, times in by.items()}
            for kind, by in taken.items()
            if kind == "prefill" or _writes(model)
        },
        "runs": runs,
        "device": _device_name(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch": batch,
        "context": context,
        "new_tokens": new_tokens,
    }


def dense_model(config: Mapping[str, Any], device: Any, dtype: torch.dtype) -> Any:
    """A model of the config with random weights, in evaluation mode."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    values = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    built = AutoConfig.for_model(config["model_type"], **values)
    opener: Any = AutoModelForCausalLM
    if anatomy.task_of(built) == anatomy.SEQ_CLS:
        opener = AutoModelForSequenceClassification
    with torch.device(device), torch.random.fork_rng():
        return opener.from_config(built, dtype=dtype).eval()


@torch.no_grad()
def _count(model: nn.Module, context: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    device, was_training = next(model.parameters()).device, model.training
    ids = torch.zeros((1, context), dtype=torch.long, device=device)
    # a mask of its own: the library would look at the values of the one that it makes, and here are none
    mask: torch.Tensor | None = torch.zeros((1, 1, context, context), device=device) if device.type == "meta" else None
    with FlopCounterMode(display=False) as counter:
        model.eval()(input_ids=ids, attention_mask=mask, **({"use_cache": False} if _writes(model) else {}))
    model.train(was_training)
    return round(counter.get_total_flops() / context)


def _writes(model: nn.Module) -> bool:
    """False for a classifier, which keeps no cache and writes no token."""
    return anatomy.task_of(anatomy.base_of(model)) == anatomy.CAUSAL_LM


@torch.inference_mode()
def _seconds(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """(of the prompt, of `new_tokens` greedy tokens after it; 0 for a classifier)."""
    was_training = model.training
    model.eval()
    started = _now(ids.device)
    if not _writes(model):
        model(input_ids=ids)
        model.train(was_training)
        return _now(ids.device) - started, 0.0
    out = model(input_ids=ids, use_cache=True)
    filled = _now(ids.device)
    for _ in range(new_tokens):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    done = _now(ids.device)
    model.train(was_training)
    return filled - started, done - filled


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _spread(times: Sequence[float]) -> dict[str, float]:
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p10": tenths[0], "p90": tenths[-1]}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
