"""Promise 14: an export opens elsewhere: a fresh process with plain transformers reads it whole and computes what we do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import sparsmith as sm
from sparsmith.crafting.slices import at_depth
from tests.kit.cases import FEW_METHODS, Configs, cases, few, logits, probes, trained_like
from tests.kit.tally import Tally

LIMIT = 1e-5
READER = Path(__file__).parents[1] / "plain_reader.py"
READ = ("plain", "padded right", "padded left")


def exported(what: str, config: Configs, family: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Export a case without our own proof. Returns what the reader is asked, and what we compute."""
    model = trained_like(config, family)
    seen = at_depth(model, options["depth"]) if "depth" in options else model
    ours = logits(seen)
    with torch.no_grad():
        greedy = seen.generate(probes()["plain"]["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0)
    report = sm.export(model, folder, proof=False, **options)
    return {
        "request": {"name": what, "folder": str(folder), "code": report.needs_code},
        "ours": {name: ours[name] for name in READ},
        "greedy": greedy,
    }


def read_elsewhere(work: Path, requests: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """One fresh process for all folders: its answers and its logits."""
    work.mkdir(parents=True)
    (work / "request.json").write_text(json.dumps(requests))
    tensors = {f"{name}/{key}": t.contiguous() for name in READ for key, t in probes()[name].items()}
    save_file(tensors, work / "inputs.safetensors")
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", str(READER), str(work)], env=environment, capture_output=True, text=True, cwd=work
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((work / "answers.json").read_text()), load_file(work / "logits.safetensors")


def run(folder: Path) -> Tally:
    """At full size: every form that an export can take, on every family, and some with their scale folded in."""
    tally = trial(folder / "plain", cases(("pesc", "pesc, top 1", "pesc, hash router", *FEW_METHODS[1:], "equal LoRA")))
    tally.add(trial(folder / "folded", few(), fold_scale=True))
    elastic = ("soft", "soft LoRA", "soft, frozen trunk", "heads of their own", "pesc, soft", "pesc, soft LoRA")
    tally.add(trial(folder / "depth 2", cases(elastic), depth=2))
    return tally


def trial(folder: Path, of: Iterable[tuple[str, Configs, str]] | None = None, **options: Any) -> Tally:
    """Export every case, then open them all in one process that cannot import sparsmith.

    Args:
        options: of the export, for every case.
    """
    tally, worst = Tally(), 0.0
    made = [
        exported(*case, folder / str(number), **options)
        for number, case in enumerate(of if of is not None else cases())
    ]
    answers, theirs = read_elsewhere(folder / "reader", [one["request"] for one in made])
    tally.case(answers["sparsmith was imported"] is False, "the reader imported sparsmith")
    for one in made:
        name, code = one["request"]["name"], one["request"]["code"]
        answer = answers[name]
        if "fault" in answer:
            tally.case(False, f"{name}: {answer['fault'][:300]}")
            continue
        found = {read: theirs[f"{name}/{read}"] for read in READ}
        difference = max((one["ours"][read] - found[read]).abs().max().item() for read in READ)
        worst = max(worst, difference)
        keys = {kind: answer[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if answer[kind]}
        faults = {
            f"logits differ by {difference:.2e}": difference <= LIMIT,
            f"keys {keys}": not keys,
            f"class {answer['module']}.{answer['class']}": answer["module"].startswith("transformers.models.") != code,
            "opens without its code": not answer.get("opened without its code"),
            "another text": torch.equal(theirs[f"{name}/greedy"], one["greedy"]),
        }
        tally.case(all(faults.values()), f"{name}: {'; '.join(text for text, held in faults.items() if not held)}")
    tally.figures |= {"largest difference": worst, "stock classes": sum(not one["request"]["code"] for one in made)}
    return tally
