"""What a run is put together of, by its recipe: the base, the collator, the choice of the best point."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sparsmith import ranks

if TYPE_CHECKING:
    from sparsmith.data import EvalSet
    from sparsmith.recipe.schema import Recipe
    from sparsmith.runs import RunFolder


def load_base(recipe: Recipe) -> Any:
    """The base; of a classifier with the names of its classes, and a class head from the run's seed where it has none."""
    from sparsmith.crafting.base_model import load_base as load

    named = (source.label_names for source in recipe.data.sources)
    labels = next((names for names in named if names), ())
    return load(recipe.model, labels=labels, seed=recipe.train.seed)


def collator(recipe: Recipe, tokenizer: Any, model: Any) -> Any:
    """What makes batches of the recipe's rows for the model."""
    from sparsmith.data import ClassCollator, Collator, PairCollator

    if recipe.model.task == "seq2seq":
        return PairCollator.of(model.config)
    if recipe.model.num_labels is not None:
        return ClassCollator(model.config.pad_token_id, recipe.data.max_length)
    return Collator.of(recipe.data, tokenizer, model.config)


def selection(recipe: Recipe, run: RunFolder, model: Any, sets: dict[str, EvalSet], stop: Any) -> Any:
    """What chooses the best point of the run; None where the recipe does not ask for it."""
    from sparsmith.evaluating.classify import pooled_scores
    from sparsmith.training.callbacks.selection import Selection

    if recipe.train.select is None:
        return None
    # with several ranks none leaves alone
    check = (lambda batch: stop.check()) if ranks.world() == 1 else None

    def measure() -> dict[str, float]:
        return pooled_scores(model, sets.values(), on_batch=check)

    return Selection(model, measure, recipe.train.select.every, run.selection, run.checkpoints)
