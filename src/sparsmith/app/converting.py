"""A recipe that makes a mixture of a dense model, written to disk before anything is tuned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith.app.recipes import single_recipe
from sparsmith.errors import UsageError

if TYPE_CHECKING:
    from sparsmith.recipe.schema import Recipe


def convert(
    path: str | Path,
    out: str | Path,
    overrides: Sequence[str] = (),
    *,
    dtype: Any = None,
    max_shard_size: int | str | None = None,
    proof: bool = True,
    on_plan: Callable[[Any], None] | None = None,
) -> Any:
    """The mixture that tuning the recipe would start from, streamed from the dense checkpoint to `out`.

    Args:
        path: the recipe; of it `model`, `methods` and `train.seed` count. dtype: of the files; absent = the recipe's `model.dtype` where it
            is written there, else the donor's. max_shard_size, proof, on_plan: as `exporting.convert` takes them.

    Raises:
        UsageError: a recipe that does something else first.
    """
    from transformers.utils import logging

    from sparsmith import recipe as recipes
    from sparsmith.exporting import convert as write

    recipe = single_recipe(path, overrides, check_paths=False, what="a conversion makes one mixture")
    _refuse_other(path, recipe)
    logging.disable_progress_bar()
    named = recipe.model.dtype if "dtype" in recipe.model.model_fields_set else "auto"
    shard = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    return write(
        recipe.model.path,
        out,
        recipe.methods[0],  # type: ignore[arg-type]
        seed=recipe.train.seed,
        dtype=dtype or (None if named == "auto" else named),
        proof=proof,
        revision=recipe.model.revision,
        on_plan=on_plan,
        facts={"recipe": recipes.dump(recipe)},
        **shard,
    )


def _refuse_other(path: str | Path, recipe: Recipe) -> None:
    """A recipe of one conversion, of plain weights, alone."""
    from sparsmith.methods.upcycle.config import UpcycleConfig

    names = ", ".join(f"`{getattr(one, 'method', '?')}`" for one in recipe.methods)
    one = recipe.methods[0]
    mend = "Tune it with `sparsmith tune`, then export its run."
    if len(recipe.methods) > 1 or not isinstance(one, UpcycleConfig):
        raise UsageError(f"{path}: methods", names, "one `upcycle` entry alone, which can be written untuned", mend)
    if not one.converts:
        key, found = ("control", one.control) if not one.sparse else ("donor", one.donor)
        raise UsageError(f"{path}: methods.0.{key}", f"`{found}`, which converts nothing", "a dense donor", mend)
    if recipe.model.quant != "none":
        raise UsageError(f"{path}: model.quant", f"`{recipe.model.quant}`", "none: copies are of plain weights", mend)
