"""Proof 3: a clean process with torch and transformers alone opens the exported folder, and its logits are the model's.

The process is started with `python -I` and a bare environment, `sparsmith` blocked, the hub offline and a cache of its
own for model code. Price: one start of Python with its imports (some seconds) and one load of the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from sparsmith import anatomy
from sparsmith.crafting.base_model import auto_class
from sparsmith.crafting.neutral import probe_batch, probe_logits
from sparsmith.errors import EnvironmentFault, ProofError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHILD = Path(__file__).with_name("clean_child.py")
CHECK = "a clean process with plain transformers opens the folder and its logits are the trained model's"
# On one machine the same kernels run and the logits are equal bit for bit; should a library choose another kernel for
# the reload, only rounding may differ, in units of the largest logit.
_LIMITS = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_PASSED_ON = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "SYSTEMROOT", "LANG")
_TEXT = "### Human:\nWhat is 3 + 4?\n### Assistant:\n7"


def prove(
    model: PreTrainedModel,
    folder: Path,
    *,
    needs_code: bool,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 42,
    timeout: float = 1800,
    dtype: str = "auto",
    check: str = CHECK,
    judged: bool = True,
) -> dict[str, Any]:
    """Hold the folder against the model.

    Args:
        model: the model whose weights the folder holds, number types included.
        folder: what was exported.
        needs_code: the folder brings its model code; then a load without that code must be refused, too.
        tokenizer: when given, the folder's tokenizer must make the same tokens of a text.
        seed: of the probe batch.
        timeout: seconds.
        dtype: number type that the folder is opened in; `auto` = its own. check: what is shown, in words. judged: False where the
            logits differ on purpose; the difference is then told, and `limit` is None.

    Returns:
        {check, value, limit, passed, bitwise, ...}; value is the largest difference of a logit.

    Raises:
        ProofError: the folder does not open, or computes something else.
        EnvironmentFault: the process ran out of time.
    """
    batch, ours = probe_batch(model, seed), probe_logits(model, seed)
    assert batch is not None and ours is not None
    with tempfile.TemporaryDirectory() as work:
        save_file({name: tensor.cpu() for name, tensor in batch.items()}, Path(work) / "probe.safetensors")
        request = {
            "folder": str(folder.absolute()),
            "work": work,
            "threads": torch.get_num_threads(),
            "needs_code": needs_code,
            "attention": getattr(model.config, "_attn_implementation", None),
            "device": str(model.device),
            "opener": auto_class(anatomy.task_of(model)).__name__,
            "text": _TEXT if tokenizer is not None else None,
            "dtype": dtype,
        }
        answer = _ask(request, Path(work), timeout)
        theirs = load_file(Path(work) / "logits.safetensors")["logits"]
    _check_answer(folder, answer, needs_code, tokenizer)
    figures = _compare(folder, model.dtype, ours.cpu(), theirs, judged)
    kept = ("torch", "transformers", "class", "refused_without_code")
    told = {key: answer[key] for key in kept if key in answer}
    return {"check": check, **figures, "tokens": batch["input_ids"].numel(), **told}


def _ask(request: dict[str, Any], work: Path, timeout: float) -> dict[str, Any]:
    (work / "request.json").write_text(json.dumps(request))
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": str(request["threads"]), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = _stranger([str(CHILD), str(work / "request.json")], environment, work, timeout)
    except subprocess.TimeoutExpired as late:
        raise EnvironmentFault(
            request["folder"],
            f"no answer after {timeout:g} s",
            "a clean process that opens the folder",
            "Try again later.",
        ) from late
    if done.returncode:
        last = " ".join((done.stderr.strip().splitlines() or ["no message"])[-3:])
        raise ProofError(
            request["folder"],
            f"a clean process that fails: {last[:400]}",
            "a folder that plain transformers opens",
            "The folder was not kept; report this with the message.",
        )
    return json.loads((work / "answer.json").read_text())


def _stranger(
    arguments: list[str], environment: dict[str, str], work: Path, timeout: float
) -> subprocess.CompletedProcess[str]:
    """A script in an isolated Python of its own, with that environment and nothing else."""
    command = [sys.executable, "-I", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=work)


def _check_answer(folder: Path, answer: dict[str, Any], needs_code: bool, tokenizer: Any) -> None:
    faults = [
        f"{kind}: {answer[kind][0]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if answer[kind]
    ]
    if needs_code and not answer["refused_without_code"]:
        faults.append("a load without the folder's code that succeeds, and so must have dropped the trained parts")
    if tokenizer is not None and answer["token_ids"] != list(tokenizer(_TEXT)["input_ids"]):
        faults.append("other tokens for the same text")
    if faults:
        raise ProofError(
            str(folder), faults[0], "the exported model and nothing else", "The folder was not kept; report this."
        )


def _compare(folder: Path, dtype: torch.dtype, ours: Any, theirs: Any, judged: bool) -> dict[str, Any]:
    bitwise = torch.equal(ours, theirs)
    same_form = ours.shape == theirs.shape and ours.dtype == theirs.dtype
    value = (ours.double() - theirs.double()).abs().max().item() if same_form else float("inf")
    limit = _LIMITS.get(dtype, 1e-5) * max(1.0, ours.double().abs().max().item())
    if not judged and same_form and torch.isfinite(theirs).all():
        return {"value": value, "limit": None, "passed": True, "bitwise": bitwise}
    if not bitwise and not value <= limit:
        raise ProofError(
            str(folder),
            f"logits that differ by {value:.3e}",
            f"equal logits (at most {limit:.1e} from rounding)",
            "The folder was not kept; keep the delta checkpoint and report this.",
        )
    result = {"value": value, "limit": 0.0 if bitwise else limit, "passed": True, "bitwise": bitwise}
    if not bitwise:
        result["reason"] = "other kernels were chosen for the reload; the difference is rounding"
    return result
