"""The price of SoFT while tuning: a step with four exits against a step of plain fine-tuning, and the memory of its losses.

    python -m benchmarks.soft_tuning [--recipe recipes/soft-stories3m.yaml] [--repeats 7] [--steps 6]

Both models are built once and take turns over the same batches (forward, backward, clipping, AdamW); the figure is the median of the
ratios, repeat by repeat. Bound: 1.5. Memory: the most bytes that the losses of one micro-batch hold at once beside the trunk, counted by
watching every tensor that is made between the trunk's states and the gradients of the losses, against the bound of methods/soft:
2 E P D of states and gradients + 2 C V of logits (twice that with KL) + V D of the head's gradient, in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import logging

from benchmarks.stepping import Stepper, batches_of, interleaved
from sparsmith.app import facts
from sparsmith.app.recipes import load_recipe
from sparsmith.methods.soft.config import SoftConfig
from sparsmith.ops.depth_loss import Distillation, Exit, depth_losses

BOUND = 1.5


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made while it is on, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.most, self._known = 0, 0, set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given | self._known:
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.most = max(self.most, self.live)

        def gone() -> None:
            self.live -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def arms(methods: tuple[Any, ...]) -> dict[str, SoftConfig]:
    """Plain fine-tuning, the recipe's exits, and the same with KL."""
    soft: SoftConfig = next(one for one in methods if isinstance(one, SoftConfig))
    plain = {"exits": soft.exits, "tune": soft.tune}
    return {
        "sft": SoftConfig(arm="sft", **plain),
        "soft": SoftConfig(**plain),
        "soft, checkpointed losses": SoftConfig(ce={"impl": "checkpoint"}, **plain),  # type: ignore[arg-type]
        "soft, library losses": SoftConfig(ce={"impl": "torch"}, **plain),  # type: ignore[arg-type]
        "soft with KL": SoftConfig(kl={}, **plain),  # type: ignore[arg-type]
    }


def loss_memory(exits: int, positions: int, hidden: int, vocab: int, chunk: int, kl: bool) -> dict[str, int]:
    """Bytes: measured, and the bound."""
    head = torch.nn.Linear(hidden, vocab, bias=False)
    states = [torch.randn(positions, hidden, requires_grad=True) for _ in range(exits)]
    labels = torch.randint(0, vocab, (positions,))
    rows = [Exit(n, 1 / exits, h, head, (head.weight,), (head.weight,)) for n, h in enumerate(states)]
    distil = Distillation(0.5) if kl else None
    with LiveBytes() as watch:
        value, _ = depth_losses(rows, labels, impl="fused", chunk=chunk, kl=distil, full=rows[-1] if kl else None)
        value.backward()
    own = exits * positions * hidden * 4  # the states themselves are the caller's
    bound = own + exits * positions * hidden * 4 + 2 * chunk * vocab * 4 * (2 if kl else 1) + vocab * hidden * 4
    return {"measured": watch.most + own, "bound": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/soft-stories3m.yaml")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default="benchmarks/results/soft_tuning.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable_progress_bar()
    recipe = load_recipe(arguments.recipe)
    batches = batches_of(recipe, arguments.steps)
    steppers = {name: Stepper(recipe, [config]) for name, config in arms(recipe.methods).items()}
    seconds = interleaved(steppers, batches, arguments.repeats)
    ratios = {name: [own / plain for own, plain in zip(values, seconds["sft"])] for name, values in seconds.items()}
    medians = {name: statistics.median(values) for name, values in ratios.items()}
    labels = sum(int(batch["labels"][:, 1:].ne(-100).sum()) for batch in batches)
    tokens = sum(int(batch["token_mask"].sum()) for batch in batches)
    memory = {
        f"{exits} exits{', KL' if kl else ''}": loss_memory(exits, 2048, 192, 4096, 1024, kl)
        for exits in (2, 4, 8)
        for kl in (False, True)
    }
    record = {
        "command": facts.command(),
        "machine": facts.machine(),
        "versions": facts.versions(),
        "target": {"soft step over sft step": BOUND, "reached": medians["soft"] <= BOUND},
        "labelled_share": labels / tokens,
        "step_over_sft": medians,
        "ratios": ratios,
        "seconds": seconds,
        "loss_memory_bytes (2,048 labels, d 192, V 4,096, chunk 1,024)": memory,
    }
    for name, ratio in medians.items():
        print(f"{name:>26}: {ratio:.3f} of the SFT step ({min(ratios[name]):.3f} to {max(ratios[name]):.3f})")
    for name, row in memory.items():
        print(f"{name:>26}: {row['measured']:,} bytes of {row['bound']:,}")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
