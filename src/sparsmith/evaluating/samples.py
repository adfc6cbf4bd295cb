"""Answers side by side: the same prompts put to the base and to the tuned model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from sparsmith import anatomy
from sparsmith.evaluating.classify import sample_classes
from sparsmith.evaluating.exact_match import write_answers
from sparsmith.evaluating.rows import sets_of
from sparsmith.seeds import numpy_generator

if TYPE_CHECKING:
    from sparsmith.evaluating.rows import EvalSets


def sample_answers(
    model: nn.Module, tokenizer: Any, eval_sets: EvalSets, *, per_set: int = 2, seed: int = 42
) -> list[dict[str, str]]:
    """`[{domain, set, prompt, reference, answer}]`: greedy answers to the same seeded choice of rows for every model. Of a classifier the
    answer is the likeliest class, and `probability` says how likely, as text."""
    found = []
    for eval_set in sets_of(eval_sets):
        stream = numpy_generator(seed, f"samples.{eval_set.name}")
        count = min(per_set, len(eval_set.rows))
        chosen = sorted(int(i) for i in stream.choice(len(eval_set.rows), size=count, replace=False))
        for index, answer in zip(chosen, _answers(model, tokenizer, eval_set, chosen)):
            row = eval_set.rows[index]
            found.append(
                {
                    "domain": eval_set.domain,
                    "set": eval_set.name,
                    "prompt": row.prompt,
                    "reference": row.completion.strip(),
                    **answer,
                }
            )
    return found


def _answers(model: nn.Module, tokenizer: Any, eval_set: Any, chosen: list[int]) -> list[dict[str, str]]:
    if anatomy.task_of(model) == anatomy.SEQ_CLS:
        found = sample_classes(model, eval_set, chosen)
        return [{"answer": name, "probability": f"{probability:.3f}"} for name, probability in found]
    return [{"answer": text.strip()} for text in write_answers(model, tokenizer, eval_set, rows=chosen).texts]


def side_by_side(base: list[dict[str, str]], tuned: list[dict[str, str]]) -> list[dict[str, str]]:
    """`samples.json`: the two models' answers to the same prompts as `base` and `tuned`, their probabilities as `base_probability` and
    `tuned_probability`."""
    assert [s["prompt"] for s in base] == [s["prompt"] for s in tuned]
    rest = [{k: v for k, v in sample.items() if k not in ("answer", "probability")} for sample in base]
    return [{**r, **_of("base", b), **_of("tuned", t)} for r, b, t in zip(rest, base, tuned)]


def _of(name: str, sample: dict[str, str]) -> dict[str, str]:
    sure = {f"{name}_probability": sample["probability"]} if "probability" in sample else {}
    return {name: sample["answer"], **sure}
