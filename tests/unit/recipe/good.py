"""A whole recipe that holds, as text and as a file beside its data, for the tests to spoil."""

from __future__ import annotations

from pathlib import Path

GOOD = """\
model: {path: embedded}
methods:
  - method: pesc
    num_experts: 4
    top_k: 2
    adapter_dim: 16
    lora: {r: 8, targets: [q_proj, v_proj]}
data:
  train:
    - name: sums
      domain: maths
      path: sums.jsonl
      columns: {prompt: question, completion: answer}
      rate: 1.5
    - {name: shell, domain: code, path: shell.jsonl, heldout: 0.1, part: train}
  eval:
    - {name: shell, domain: code, path: shell.jsonl, heldout: 0.1, part: heldout, limit: 20}
    - {name: facts, domain: general, path: facts.jsonl, metrics: [loss, rank], options: ["yes", "no"]}
  max_length: 64
  mixing: balanced
train:
  steps: 10
  batch_size: 8
  micro_batch_size: 4
  learning_rate: 3e-3
  eval_every: 5
  save_every: 5
output: runs/test
proof: {moved_after: 5}
"""


def write(folder: Path, text: str = GOOD) -> Path:
    """The recipe and its (empty) data files in a folder."""
    for name in ("sums", "shell", "facts"):
        (folder / f"{name}.jsonl").write_text("")
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file
