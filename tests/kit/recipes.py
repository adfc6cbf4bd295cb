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


SPOILT: list[tuple[str, str, str, str]] = [
    ("steps: 10", "stpes: 10", "train.stpes", "`steps`"),
    ("model: {path", "model: {pth", "model.pth", "`path`"),
    ("model: {path", "model: {pth", "model.path", "nothing"),
    ("method: pesc", "method: pesk", "methods.0.method", "`pesc`"),
    ("- method: pesc\n    num_experts", "- num_experts", "methods.0.method", "nothing"),
    ("num_experts: 4", "num_expert: 4", "methods.0.num_expert", "`num_experts`"),
    ("num_experts: 4", "num_experts: four", "methods.0.num_experts", "a whole number"),
    ("num_experts: 4", "num_experts: 1", "methods.0.num_experts", "at least 2"),
    ("num_experts: 4", "num_experts: 4.0", "methods.0.num_experts", "a whole number"),
    ("num_experts: 4", "num_experts: '4'", "methods.0.num_experts", "a whole number"),
    ("num_experts: 4", "num_experts:", "methods.0.num_experts", "nothing"),
    ("top_k: 2", "top_k: 5", "methods.0.top_k", "at most num_experts"),
    ("adapter_dim: 16", "adapter_dim: 20", "methods.0.adapter_dim", "multiple of 8"),
    ("adapter_dim: 16", "adapter_dim: atuo", "methods.0.adapter_dim", "'auto'"),
    ("targets: [q_proj, v_proj]", "targets: [q_proj, 3]", "methods.0.lora.targets.1", "text"),
    ("{r: 8,", "{rank: 8,", "methods.0.lora.rank", "a key of methods.0.lora"),
    ("{r: 8,", "{enabled: false, r: 8,", "methods.0.lora.r", "no effect"),
    ("top_k: 2", "top_k: 2\n    top1_gate: none", "methods.0.top1_gate", "no effect"),
    ("name: sums", "name: ../sums", "data.train.0.name", "letters"),
    ("prompt: question", "promt: question", "data.train.0.columns.promt", "`prompt`"),
    ("rate: 1.5", "rate: -1", "data.train.0.rate", "at least 0"),
    ("rate: 1.5", "rate: .inf", "data.train.0.rate", "finite"),
    ("rate: 1.5", "rate: yes", "data.train.0.rate", "a number"),
    ("part: train}", "part: train, heldout: 0.2}", "data.train.1.heldout", "a second time"),
    ("heldout: 0.1, part: train", "heldout: 0.2, part: train", "data.eval.0.heldout", "one share"),
    ("part: train", "limit: 5", "data.train.1.part", "`train` or `heldout`"),
    ("heldout: 0.1, part: train", "part: train", "data.train.1.heldout", "the share"),
    ("name: facts", "name: shell", "data.eval.1.name", "a second time"),
    ('options: ["yes", "no"]', "limit: 3", "data.eval.1.options", "to rank"),
    ("limit: 20", "options: [a, b]", "data.eval.0.options", "no effect"),
    ("limit: 20", "marker: x", "data.eval.0.marker", "no effect"),
    ("limit: 20", "metrics: [exact_match], marker: x", "data.eval.0.marker", "after_marker"),
    ("metrics: [loss, rank]", "metrics: [loss, rnak]", "data.eval.1.metrics.1", "`rank`"),
    ("max_length: 64", "max_length: 7", "data.max_length", "at least 8"),
    ("mixing: balanced", "mixing: ballanced", "data.mixing", "`balanced`"),
    ("mixing: balanced", "template: no field", "data.template", "{prompt}"),
    ("mixing: balanced", "template: '{prompt} {x}'", "data.template", "{x}"),
    ("mixing: balanced", "template: '{prompt'", "data.template", "cannot be read"),
    ("mixing: balanced", "packing: 'true'", "data.packing", "true or false"),
    ("steps: 10", "steps: 10\n  epochs: 1", "train.epochs", "both"),
    ("steps: 10", "log_every: 10", "train.steps", "neither"),
    ("micro_batch_size: 4", "micro_batch_size: 3", "train.micro_batch_size", "divisor"),
    ("save_every: 5", "keep: 3", "train.keep", "no effect"),
    ("save_every: 5", "schedule: constant\n  warmup: 0.1", "train.warmup", "no effect"),
    ("save_every: 5", "betas: [0.9]", "train.betas.1", "nothing"),
    ("save_every: 5", "betas: [0.9, 1.0]", "train.betas.1", "less than 1"),
    ("learning_rate: 3e-3", "learning_rate: 3e-3x", "train.learning_rate", "a number"),
    ("moved_after: 5", "moved_after: 5, enabled: false", "proof.moved_after", "no effect"),
    ("moved_after: 5", "moved_after: 20, enabled: false", "proof.moved_after", "no effect"),
    ("output: runs/test", "output: ''", "output", "at least 1"),
    ("output: runs/test", "outptu: runs/test", "outptu", "`output`"),
    ("output: runs/test", "output: !!python/object:os.system ls", "output", "tag"),
    ("output: runs/test", "<<: {a: 1}", "(top)", "`<<`"),
    ("output: runs/test", "3: runs/test", "(top)", "`3`"),
    ("output: runs/test", 'output: "a\\0b"', "output", "no text holds"),
    ("output: runs/test", 'output: "a\\uD800b"', "output", "no text holds"),
    ("train:\n  steps", "train: 3\nextra:\n  steps", "train", "a group"),
    ("model: {path: embedded}", "model: [embedded]", "model", "a group"),
    ("model: {path: embedded}", "model: {path: embedded, task: seq_cls}", "model.num_labels", "number of classes"),
    ("model: {path: embedded}", "model: {path: embedded, num_labels: 2}", "model.num_labels", "no effect"),
    ("steps: 10", "steps: 10\n  steps: 11", "train.steps", "a second time"),
    ("mixing: balanced", "mixing: !!python/name:os.system x", "data.mixing", "tag"),
    ("num_experts: 4", "num_experts: !!int 4x", "methods.0.num_experts", "plain value"),
]
"""(what to replace, by what, the key that must be named, words that the message must hold)"""


def write(folder: Path, text: str = GOOD) -> Path:
    """The recipe and its (empty) data files in a folder."""
    for name in ("sums", "shell", "facts"):
        (folder / f"{name}.jsonl").write_text("")
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file
