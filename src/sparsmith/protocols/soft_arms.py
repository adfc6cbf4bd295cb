"""The arms of the SoFT protocol as recipes, and the bases that some of them start from.

Paper: Sorted LLaMA (arXiv 2309.08968) §4: SFT (loss at the full depth alone, every depth read out), SFT+ICT (its trunk frozen, a head for
each sub-model), Extracted (each sub-model cut from the *pre-trained* model and tuned alone), SoFT. Every arm sees the same rows in the
same order under the same seed. What the paper leaves open is a choice here: the steps of ICT and of Extracted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparsmith import durable
from sparsmith.errors import CheckpointMismatch, MethodError, UsageError, nearest
from sparsmith.methods.soft.config import SoftConfig
from sparsmith.methods.soft.method import SOFT
from sparsmith.recipe.schema import ModelSettings, Recipe, TrainSettings
from sparsmith.runs import RunFolder

if TYPE_CHECKING:
    from torch import nn

SFT, ICT, EXTRACTED, ELASTIC = "sft", "ict", "extracted", "soft"
ARMS = (SFT, ICT, EXTRACTED, ELASTIC)
"""`sft` always runs: it is the control of the others."""
RECORD = "made_from.json"


@dataclass(frozen=True)
class Choices:
    """What of the protocol is not in the recipe."""

    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (0, 1, 2)
    ict_share: float = 1.0
    """Steps of ICT over those of SFT, > 0; they come on top of SFT's."""
    extracted_steps: Literal["equal", "compute"] = "equal"
    """`equal`: every extracted model takes as many steps as SoFT. `compute`: all of them and the full model together take SoFT's training
    FLOPs, each the same number of steps."""

    def check(self) -> None:
        """Raises: UsageError: an unknown arm, no seed, a share that is none."""
        for name in self.arms:
            if name not in ARMS:
                raise UsageError("--arms", f"`{name}`", "an arm of the protocol", nearest(name, ARMS))
        if not self.seeds:
            raise UsageError("--seeds", "no seed", "at least one", "Write --seeds 0,1,2.")
        if not 0 < self.ict_share <= 10:
            raise UsageError(
                "--ict-share", f"`{self.ict_share}`", "a number above 0, at most 10", "Write --ict-share 1."
            )
        if self.extracted_steps not in ("equal", "compute"):
            raise UsageError(
                "--extracted-steps", f"`{self.extracted_steps}`", "`equal` or `compute`", "Write one of the two."
            )


@dataclass(frozen=True)
class Plot:
    """One run to be: a cell of the comparison before it is tuned."""

    arm: str
    seed: int
    recipe: Recipe

    @property
    def label(self) -> str:
        return f"{self.arm} seed {self.seed}"


def soft_of(recipe: Recipe) -> SoftConfig:
    """The recipe's one method.

    Raises:
        MethodError: another method or several; an arm instead of SoFT itself; no rows to compare on.
    """
    configs = recipe.methods
    if len(configs) != 1 or not isinstance(configs[0], SoftConfig):
        names = ", ".join(str(getattr(config, "method", "")) for config in configs)
        raise MethodError("methods", names, "soft alone", "Give a recipe with one `soft` entry.")
    if configs[0].arm != "soft":
        raise MethodError("soft.arm", f"`{configs[0].arm}`", "`soft`", "Leave it out: the protocol makes the arms.")
    if not any("loss" in source.metrics for source in recipe.data.eval):
        raise MethodError("data.eval", "no set with the metric loss", "at least one", "Name one under `data.eval`.")
    return configs[0]


def sft_of(config: SoftConfig) -> SoftConfig:
    """The settings of the same tuning with the loss of the full depth alone."""
    control = SOFT.control(config)
    if control is not None and isinstance(control.config, SoftConfig):
        return control.config
    return SoftConfig(
        arm="sft", exits=config.exits
    )  # of a frozen trunk, whose own settings say nothing of the tuning before


def cell_recipe(
    recipe: Recipe,
    config: SoftConfig,
    seed: int,
    output: Path,
    *,
    base: Path | None = None,
    control: Path | None = None,
    share: float = 1.0,
) -> Recipe:
    """The recipe of one cell.

    Args:
        base: folder of the base, where it is not the recipe's.
        control: run that the guard compares with, where the method has one.
        share: of the recipe's steps.
    """
    asked = SOFT.control(config)
    if control is not None and asked is not None and asked.config is not None:
        config = config.model_copy(update={"control": str(control)})
    update: dict[str, Any] = {
        "methods": (config,),
        "train": scaled(recipe.train, share).model_copy(update={"seed": seed}),
        "output": str(output),
    }
    if base is not None:
        update["model"] = recipe.model.model_copy(update={"path": str(base), "revision": None})
    return recipe.model_copy(update=update)


def scaled(train: TrainSettings, share: float) -> TrainSettings:
    """The same training over another number of steps."""
    if share == 1.0:
        return train
    if train.steps is not None:
        return train.model_copy(update={"steps": max(1, round(train.steps * share))})
    return train.model_copy(update={"epochs": (train.epochs or 1.0) * share})


def sft_plot(recipe: Recipe, seed: int, out: Path) -> Plot:
    return Plot(SFT, seed, cell_recipe(recipe, sft_of(soft_of(recipe)), seed, out / f"{SFT}-seed{seed}"))


def elastic_plot(name: str, recipe: Recipe, seed: int, out: Path, sft: Path) -> Plot:
    """SoFT, or a named variant of it. A frozen trunk is that of the SFT run, so that the full model is the tuned one."""
    config = soft_of(recipe)
    base = settled_base(sft, out / "bases" / f"{SFT}-seed{seed}") if config.frozen_trunk else None
    return Plot(name, seed, cell_recipe(recipe, config, seed, out / f"{name}-seed{seed}", base=base, control=sft))


def ict_plot(recipe: Recipe, seed: int, out: Path, sft: Path, share: float) -> Plot:
    config = SoftConfig(arm="ict", exits=soft_of(recipe).exits)
    base = settled_base(sft, out / "bases" / f"{SFT}-seed{seed}")
    return Plot(ICT, seed, cell_recipe(recipe, config, seed, out / f"{ICT}-seed{seed}", base=base, share=share))


def extracted_name(depth: int) -> str:
    return f"{EXTRACTED}-{depth}"


def extracted_plots(recipe: Recipe, depths: tuple[int, ...], seed: int, out: Path, steps: str) -> list[Plot]:
    """A run for every inner depth; under `compute` for the full depth too, which under `equal` is the SFT run itself."""
    config = sft_of(soft_of(recipe))
    wanted = depths if steps == "compute" else depths[:-1]
    plots = []
    for depth in wanted:
        name = extracted_name(depth)
        base = cut_base(recipe.model, depth, out / "bases" / f"depth-{depth}") if depth != depths[-1] else None
        alone = config.model_copy(update={"exits": (depth,)})
        plots.append(Plot(name, seed, cell_recipe(recipe, alone, seed, out / f"{name}-seed{seed}", base=base)))
    if steps == "compute":
        share = compute_share(recipe, [plot.recipe for plot in plots])
        plots = [
            Plot(p.arm, p.seed, p.recipe.model_copy(update={"train": scaled(p.recipe.train, share)})) for p in plots
        ]
    return plots


def compute_share(recipe: Recipe, alone: list[Recipe]) -> float:
    """Share of the recipe's steps that each model may take so that all together spend SoFT's training FLOPs."""
    from sparsmith.crafting.plan import plan_recipe

    return plan_recipe(recipe).flops.training / sum(plan_recipe(one).flops.training for one in alone)


# ------------------------------------------------------------------ bases


def cut_base(settings: ModelSettings, depth: int, folder: Path) -> Path:
    """The pre-trained model's first `depth` blocks as a base of its own, written once; the digest of its weights lies beside them.

    Raises:
        CheckpointMismatch: the folder was cut from another base.
    """
    from sparsmith.anatomy import views
    from sparsmith.crafting.base_model import load_base, load_tokenizer

    made = _made(folder)
    if made is not None:
        if made["parent"] != settings.path or made["depth"] != depth:
            raise CheckpointMismatch(
                str(folder),
                f"{made['depth']} blocks of {made['parent']}",
                f"{depth} blocks of {settings.path}",
                "Remove the folder, or change `output`.",
            )
        return folder
    base = load_base(settings)
    _write_base(views.first_blocks(base, depth), load_tokenizer(settings), folder, parent=settings.path, depth=depth)
    return folder


def settled_base(run: Path, folder: Path) -> Path:
    """The tuned model of a run as a plain base, written once."""
    from sparsmith.crafting.base_model import open_tokenizer
    from sparsmith.crafting.checkpoint import load
    from sparsmith.crafting.settle import settle

    if _made(folder) is None:
        model = RunFolder(run).model
        _write_base(settle(load(model)), open_tokenizer(model), folder, parent=str(run), depth=None)
    return folder


def weights_digest(model: nn.Module) -> str:
    """sha256 over every tensor's name and bytes, in order of name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _made(folder: Path) -> Mapping[str, Any] | None:
    """The record of a base that was written before, its files checked; None where there is none."""
    if not durable.has_manifest(folder):
        return None
    durable.verify_folder(folder)
    return durable.read_json(folder / RECORD)


def _write_base(model: Any, tokenizer: Any, folder: Path, **record: Any) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    with durable.durable_folder(folder) as temp:
        model.save_pretrained(temp)
        tokenizer.save_pretrained(temp)
        durable.write_json(temp / RECORD, {**record, "weights": weights_digest(model)})
