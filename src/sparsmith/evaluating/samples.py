"""Answers side by side: the same prompts put to the base and to the tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sparsmith.evaluating.exact_match import write_answers
from sparsmith.evaluating.rows import sets_of
from sparsmith.seeds import numpy_generator

if TYPE_CHECKING:
    from sparsmith.evaluating.rows import EvalSets


def sample_answers(
    model: nn.Module, tokenizer: Any, eval_sets: EvalSets, *, per_set: int = 2, seed: int = 42
) -> list[dict[str, str]]:
    """`[{domain, set, prompt, reference, answer}]`: greedy answers to the same seeded choice of rows for every model."""
    found = []
    for eval_set in sets_of(eval_sets):
        stream = numpy_generator(seed, f"samples.{eval_set.name}")
        count = min(per_set, len(eval_set.rows))
        chosen = sorted(int(i) for i in stream.choice(len(eval_set.rows), size=count, replace=False))
        texts = write_answers(model, tokenizer, eval_set, rows=chosen).texts
        for index, text in zip(chosen, texts):
            row = eval_set.rows[index]
            found.append(
                {
                    "domain": eval_set.domain,
                    "set": eval_set.name,
                    "prompt": row.prompt,
                    "reference": row.completion.strip(),
                    "answer": text.strip(),
                }
            )
    return found


def side_by_side(base: list[dict[str, str]], tuned: list[dict[str, str]]) -> list[dict[str, str]]:
    """`samples.json`: the two models' answers to the same prompts as `base` and `tuned`."""
    assert [s["prompt"] for s in base] == [s["prompt"] for s in tuned]
    rest = [{k: v for k, v in sample.items() if k != "answer"} for sample in base]
    return [{**r, "base": b["answer"], "tuned": t["answer"]} for r, b, t in zip(rest, base, tuned)]
