"""Make the golden folders of the formats that are written today. Run once for each new format version, by hand:

    python -m tests.golden.make BUILD VERSION [KIND ...]

They are built in BUILD, whose path the delta and the run write down, and copied to tests/golden/VERSION: `base`, `delta`, `export` (a
full checkpoint with its tokenizer, card and proof), `run`, and `logits.json` with what each of them must compute. A folder that is there
is never made again: what counts is that today's code opens what yesterday's code wrote.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparsmith as sm
from sparsmith.exporting import export
from tests.kit.checkpoints import LORA, crafted, save_base
from tests.kit.evalsets import char_tokenizer

GOLDEN = Path(__file__).parent
LOGITS = "logits.json"
TINY = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
IDS = [[5, 17, 42, 63, 8, 29]]
RECIPE = """\
model: {{path: {build}/base}}
methods:
  - {{method: pesc, num_experts: 4, top_k: 2, adapter_dim: 8, lora: {{r: 2}}}}
data:
  train: [{{name: sums, domain: maths, path: {build}/sums.jsonl}}]
  eval: [{{name: sums, domain: maths, path: {build}/sums.jsonl, limit: 4}}]
  template: "{{prompt}}"
  max_length: 16
  workers: 1
  cache: {build}/cache
train: {{steps: 4, batch_size: 2, learning_rate: 3.0e-2, save_every: 2, keep: 1, log_every: 1, threads: 1}}
output: {build}/run
proof: {{moved_after: 2}}
"""


def logits_of(model: Any) -> torch.Tensor:
    """(1, length, vocabulary) for the fixed ids."""
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits


def make_run(build: Path) -> None:
    """A finished run, without its report (it is drawn anew from the figures) and its table of tokens."""
    from sparsmith.app import tune

    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(4) for b in range(4)]
    (build / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (build / "recipe.yaml").write_text(RECIPE.format(build=build))
    tune(build / "recipe.yaml")
    (build / "run" / "report.html").unlink()


def main(build: Path, version: str, kinds: list[str]) -> None:
    """Make the folders that are asked for (default: all) and are not there yet."""
    torch.set_num_threads(1)
    target = GOLDEN / version
    target.mkdir(exist_ok=True)
    build.mkdir(parents=True, exist_ok=True)
    tokenizer = char_tokenizer()
    base = build / "base"
    if not base.is_dir():
        if (target / "base").is_dir():
            shutil.copytree(target / "base", base)
        else:
            save_base(base, **TINY)
            tokenizer.save_pretrained(base)
            shutil.copytree(base, target / "base")
    model = crafted(base, adapter_dim=8, lora=LORA.model_copy(update={"r": 2, "alpha": 4}))
    makers: dict[str, Callable[[], Any]] = {
        "delta": lambda: sm.save(model, build / "delta"),
        "export": lambda: export(model, build / "export", tokenizer=tokenizer),
        "run": lambda: make_run(build),
    }
    known = json.loads((target / LOGITS).read_text()) if (target / LOGITS).is_file() else {"ids": IDS}
    for kind in kinds or list(makers):
        if (target / kind).exists():
            print(f"{kind} is there")
            continue
        makers[kind]()
        known[kind] = [float(f"{number:.9g}") for number in logits_of(sm.load(build / kind)).flatten().tolist()]
        shutil.copytree(build / kind, target / kind)
    (target / LOGITS).write_text(json.dumps(known) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2], sys.argv[3:])
