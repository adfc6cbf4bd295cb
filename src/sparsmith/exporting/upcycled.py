"""A dense checkpoint on disk becomes a mixture of experts on disk, without a model in memory.

Every tensor goes from its file to its places in the new one as soon as it is read: one donor tensor is in memory, and one file of the
donor is mapped, however large the model is. Which tensors come out, and from which random streams, is said by `methods.upcycle.convert`,
as for `sparsmith.craft`: the folder holds, bit for bit, what crafting, settling and saving with the same seed would have written.
Price: one read of the donor, one write of the mixture, one read of it for its hashes.

Papers: sparse upcycling (arXiv 2212.05055) for the conversion, FLAN-MoE (2305.14705) for what is tuned afterwards. The pair is an
extension of this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsmith import anatomy, durable
from sparsmith.crafting import full
from sparsmith.crafting.base_model import load_base
from sparsmith.crafting.compose import check_base, check_composition
from sparsmith.crafting.plan import Plan, config_of, plan
from sparsmith.crafting.plan_text import size as size_words
from sparsmith.crafting.record import BaseRecord, CraftRecord, attach
from sparsmith.crafting.settle import mark_settled
from sparsmith.errors import ExportMismatch, MethodError
from sparsmith.exporting.donor import Donor, copy_tokenizer, folder_of, open_donor, read
from sparsmith.exporting.folder import CARD, PROOF
from sparsmith.exporting.model_card import count_parameters, model_card
from sparsmith.exporting.prove import prove
from sparsmith.exporting.report import ExportReport
from sparsmith.exporting.streamed import DTYPES, Coming, StreamWriter, bytes_of, grouped, header
from sparsmith.methods import registry
from sparsmith.methods.upcycle.build import build_sparse
from sparsmith.methods.upcycle.choosing import STOCK
from sparsmith.methods.upcycle.config import UpcycleConfig
from sparsmith.methods.upcycle.convert import expert_copy, expert_name, fillers, place_of, router_name, router_weight
from sparsmith.methods.upcycle.targets import sparse_config
from sparsmith.recipe.schema import ModelSettings

PROVEN = "a clean process with plain transformers opens the folder and its logits, in float32, are the dense model's"
SHIFTED = (
    "a clean process with plain transformers opens the folder; its logits move from the dense model's, as asked for by "
)
PROOF_BYTES = 32 << 30
"""Memory of the two models in float32 above which the proof is left out, however much the machine has."""
UNTUNED = (
    "Not tuned yet: the experts of a block are copies of one FFN and the routers are random numbers. Tune it before you judge it: "
    "`sparsmith tune` with `{method: upcycle, donor: sparse}`.",
    "Upcycled from a dense model (sparse upcycling, arXiv 2212.05055), to be tuned under the protocol of FLAN-MoE (arXiv 2305.14705), "
    "whose own models were pre-trained sparse: the pair is an extension of this project, not the paper's method.",
)


@dataclass(frozen=True)
class Sizes:
    """What will be written, told before a byte is."""

    plan: Plan
    model_type: str
    dtype: str
    bytes: int
    files: int

    def __str__(self) -> str:
        p = self.plan
        return (
            f"{p.base_params:,} parameters become {p.total_params:,} in total, {p.active_params:,} of them active per token "
            f"({self.model_type}, {self.dtype}): {size_words(self.bytes)} in {self.files} "
            + ("file" if self.files == 1 else "files")
        )


def convert(
    base: str | Path,
    out: str | Path,
    config: UpcycleConfig,
    *,
    seed: int = 42,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    max_shard_size: int | str = "5GB",
    proof: bool = True,
    revision: str | None = None,
    on_plan: Callable[[Sizes], None] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> ExportReport:
    """Write the mixture of experts of a dense checkpoint, streaming: no model is built, no tuning is done.

    Args:
        base: the dense checkpoint: a folder, a hub id or `embedded`. out: the folder to make; whole or not there. config: what is
            converted and how; its settings of tuning change nothing here. seed: of the routers and of the noise on the copies; the
            streams are those of `sparsmith.craft`. dtype: number type of the files (default: the donor's). max_shard_size: bytes of a
            file, or text such as `5GB`. proof: open the folder in a clean process and compare its float32 logits with the dense
            model's; left out, with the reason in the report, where the two models need more memory than there is. revision: of a hub
            id. on_plan: called with the sizes before anything is written. facts: of the run, for the card: `recipe` (text).

    Returns:
        An `ExportReport`.

    Raises:
        RefusedDonor: no stock mixture holds this model, or these settings of it. MethodError: a config that converts nothing.
        CheckpointError, CheckpointMismatch: files that are not what config.json asks for, or hold numbers that are not finite.
        EnvironmentFault: too little space. ProofError: the folder computes something else; it is not kept.
    """
    if not isinstance(config, UpcycleConfig) or not config.converts:
        found = "`donor: sparse`" if isinstance(config, UpcycleConfig) and config.sparse else "no conversion"
        raise MethodError("convert", found, "an upcycle config that makes a mixture of a dense model", "Use `tune`.")
    if config.choosing:
        expected = "a router by which tokens choose: the experts' thresholds are fitted while tuning"
        raise MethodError("convert: moe.router", STOCK, expected, "Take top1, top2 or topk, or tune it first.")
    limit = bytes_of(max_shard_size)
    folder = folder_of(str(base), revision)
    refuse(folder, config)
    donor = open_donor(folder, str(base), revision)
    made = mixture_of(donor, str(base), config, seed, getattr(torch, dtype) if dtype else donor.model.dtype)
    pieces = Pieces(donor, made, config, seed)
    sizes = _sizes(donor, made, config, pieces, limit)
    if on_plan is not None:
        on_plan(sizes)
    target = Path(out)
    if target.absolute().parent.is_dir():
        durable.clean_leftovers(target.absolute().parent)
    with durable.durable_folder(target, needed=sizes.bytes) as place:
        with StreamWriter(place, pieces.coming, made.dtype, limit) as writer:
            for name, tensor in pieces.tensors():
                writer.write(name, tensor)
            writer.finish()
        report = _finish(donor, made, place, target, proof, sizes)
        (place / CARD).write_text(model_card(made, report, dict(facts or {})), encoding="utf-8")
    return report


def refuse(folder: Path, config: UpcycleConfig) -> None:
    """Everything that the donor's config alone tells, before a weight file is looked at.

    Raises:
        RefusedDonor, UnsupportedAnatomy, MethodError.
    """
    dense = config_of(folder, None, None)[1]
    check_composition((config,), anatomy.task_of(dense))
    check_base([(registry.of(config), config)], dense)
    sparse_config(dense, config)


def mixture_of(donor: Donor, shown: str, config: UpcycleConfig, seed: int, dtype: torch.dtype) -> Any:
    """The settled mixture on the meta device, with the record of its making: all of it but the numbers.

    Args:
        shown: the donor, as the user named it.
    """
    if dtype not in DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise MethodError("convert: dtype", f"a donor in {dtype}", f"one of {known}", "Name the `dtype` of the files.")
    donor.model.to(dtype)
    donor.model.config.dtype = dtype
    made = registry.of(config).settle(build_sparse(donor.model, config, seed), config)
    base = BaseRecord(shown, donor.folder, donor.revision, dtype=str(dtype).removeprefix("torch."))
    attach(made, CraftRecord(configs=(config,), base=base, seed=seed))
    mark_settled(made)
    return made


class Pieces:
    """Every tensor of the mixture's files, in the order in which the donor's are read; routers and what has no effect come last."""

    def __init__(self, donor: Donor, made: Any, config: UpcycleConfig, seed: int) -> None:
        self.donor, self.made, self.config, self.seed = donor, made, config, seed
        dense = donor.model.config
        self.chosen = config.block_indices(dense.num_hidden_layers)
        self.places = {name: place_of(name, dense, self.chosen) for name in donor.shapes}
        self.fillers = fillers(made.config, donor.shapes.keys(), self.chosen)
        self.coming = [Coming(name, shape) for source, shape in donor.shapes.items() for name in self._names(source)]
        hidden = (config.experts, made.config.hidden_size)
        self.coming += [Coming(router_name(made.config, block), hidden) for block in self.chosen]
        self.coming += [Coming(name, tuple(tensor.shape)) for name, tensor in self.fillers.items()]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) as announced in `coming`; one tensor of the donor at a time."""
        dtype, config, seed = self.made.dtype, self.config, self.seed
        for source, tensor in read(self.donor):
            tensor, place = tensor.to(dtype), self.places[source]
            for expert, name in enumerate(self._names(source)):
                yield name, tensor if place is None else expert_copy(tensor, place, expert, config, seed)
        for block in self.chosen:
            weight = router_weight(block, self.made.config.hidden_size, config, seed)
            yield router_name(self.made.config, block), weight.to(dtype)
        for name, tensor in self.fillers.items():
            yield name, tensor.to(dtype)

    def _names(self, source: str) -> list[str]:
        place = self.places[source]
        if place is None:
            return [source]
        return [expert_name(self.made.config, place, expert) for expert in range(self.config.experts)]


def _sizes(donor: Donor, made: Any, config: UpcycleConfig, pieces: Pieces, limit: int) -> Sizes:
    planned = plan(donor.model.config, config)
    groups = grouped(pieces.coming, made.dtype, limit)
    numbers = sum(one.numbers for one in pieces.coming)
    if numbers != planned.total_params:
        raise ExportMismatch(
            "convert",
            f"{numbers:,} numbers to write",
            f"{planned.total_params:,}, as the plan counts",
            "This is a fault of the conversion; please report it.",
        )
    size = sum(len(header(group, made.dtype)) for group in groups) + numbers * made.dtype.itemsize
    dtype = str(made.dtype).removeprefix("torch.")
    return Sizes(planned, made.config.model_type, dtype, size, len(groups))


def _finish(donor: Donor, made: Any, folder: Path, target: Path, proof: bool, sizes: Sizes) -> ExportReport:
    """All but weights and card, and the proof."""
    made.config.save_pretrained(folder)
    made.generation_config.save_pretrained(folder)
    tokenizer = copy_tokenizer(donor.folder, folder)
    full.describe(made, folder)
    skipped = _skip_reason(sizes, proof)
    proven = None if skipped else _prove(donor, made, folder, tokenizer)
    if proven is not None:
        (folder / PROOF).write_text(durable.json_text(proven), encoding="utf-8")
    shifts = _shifts(made)
    return ExportReport(
        path=target,
        model_type=made.config.model_type,
        needs_code=False,
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        parameters=count_parameters(made),
        proof=proven,
        proof_skipped=skipped,
        settle=None,
        cautions=(*UNTUNED, *([f"Not the donor's function, as asked for by {shifts}."] if shifts else [])),
        tuned=False,
    )


def _skip_reason(sizes: Sizes, wanted: bool) -> str:
    """Why the proof is left out; empty where it is not."""
    if not wanted:
        return "not asked for"
    needed, free = 4 * (sizes.plan.base_params + sizes.plan.total_params), _free_memory()
    room = min(PROOF_BYTES, free) if free else PROOF_BYTES
    if needed <= room:
        return ""
    return f"the two models in float32 need {size_words(needed)} of memory, and {size_words(room)} may be taken"


def _free_memory() -> int:
    """Bytes of this machine's memory that are free, 0 where it does not tell."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as lines:
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), 0)
    except OSError:
        return 0


def _prove(donor: Donor, made: Any, folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Against the donor's weights, rounded as those in the files are, and both models in float32."""
    dtype: Any = str(made.dtype).removeprefix("torch.")
    dense: Any = load_base(ModelSettings(path=str(donor.folder), dtype=dtype)).float()
    shifts, seed = _shifts(made), made.sparsmith.seed
    check = SHIFTED + shifts if shifts else PROVEN
    return prove(
        dense, folder, needs_code=False, tokenizer=tokenizer, seed=seed, dtype="float32", check=check, judged=not shifts
    )


def _shifts(made: Any) -> str:
    """Why the mixture is not the donor's function; empty where it is."""
    return " and ".join(filter(None, (method.shifts(config) for method, config in made.sparsmith.parts)))
