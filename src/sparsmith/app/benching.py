"""`bench`: speed, memory and quality by depth and by way of writing, beside the base; thresholds and profile for `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsmith import durable
from sparsmith.app.bench_table import bench_table
from sparsmith.app.recipes import measured_recipe
from sparsmith.errors import UsageError
from sparsmith.runs import RunFolder, is_run, last_stage

if TYPE_CHECKING:
    from sparsmith.evaluating.latency import Way, WaySpeed
    from sparsmith.inference import Calibration

FORMAT_VERSION = 1
UNIFORM = (0.9, 0.7)
"""Thresholds that are measured beside the calibrated ones."""
DRAFTS = (2, 4)
"""Draft lengths that are measured at the two shallowest depths."""
TIMED = 8
"""Prompts that every way of writing is timed over; calibration takes all."""
SHOWN = 3
"""Prompts whose tokens are kept with the depth that they left at."""


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how long."""

    batch: int = 8
    """Rows that run together, beside 1."""
    context: int = 64
    """Tokens of the prompts that speed is measured behind."""
    new_tokens: int = 32
    repeats: int = 5
    prompts: int = 64
    """Held-out prompts for calibration; the first few time the ways of writing."""
    rows: int = 100
    """Held-out rows of each set for the losses."""
    calibrate: float | None = None
    """Agreement that thresholds are chosen for; None = keep those that are there."""
    seed: int = 42


@dataclass
class Bench:
    """Everything that was measured."""

    facts: dict[str, Any]
    speed: list[dict[str, Any]] = field(default_factory=list)
    ways: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] | None = None
    written: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    def table(self) -> Any:
        return bench_table(self.as_dict())


def bench(
    target: str | Path,
    recipe: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    **settings: Any,
) -> Bench:
    """Measure a run or a model; files go into the run's folder, or into `out`.

    Raises:
        UsageError: calibration without held-out prompts, of a model of one depth, or without a place for the file; a context that the
            model does not have.
    """
    session = _Bench(target, recipe, overrides, out, BenchSettings(**settings))
    session.measure_speed()
    session.measure_quality()
    session.calibrate()
    session.measure_ways()
    session.write()
    return session.result


class _Bench:
    """One measurement, step by step."""

    def __init__(
        self,
        target: str | Path,
        recipe: str | Path | None,
        overrides: Sequence[str],
        out: str | Path | None,
        settings: BenchSettings,
    ) -> None:
        from sparsmith.app.facts import machine, versions
        from sparsmith.app.use import load_model, placed
        from sparsmith.data import load_data
        from sparsmith.evaluating import elastic_depths
        from sparsmith.inference.faults import require_text
        from sparsmith.inference.profile import device_name, dtype_of

        self.settings = settings
        self.out = Path(out) if out is not None else last_stage(target) if is_run(target) else None
        if settings.calibrate is not None and self.out is None:
            raise UsageError(
                "--calibrate", "a model that is no run", "a folder for the thresholds", "Add --out FOLDER."
            )
        chosen = measured_recipe(recipe, overrides) if recipe is not None else None
        model, self.tokenizer, own = load_model(target)
        require_text(model, str(target))
        self.model, self.recipe = placed(model), own
        self.depths = elastic_depths(self.model)
        self.data = None
        if (used := chosen or own) is not None and used.data.eval:
            self.data = load_data(used.data, self.tokenizer, seed=used.train.seed, rows_needed=0)
        self._check()
        self.result = Bench(
            {
                "target": Path(target).name or str(target),
                "device": device_name(self.model),
                "dtype": dtype_of(self.model),
                "layers": self.layers,
                "depths": list(self.depths),
                "settings": asdict(settings),
                "machine": machine(),
                "versions": versions(),
            }
        )
        self.prompts = self._prompts()
        self.timed = self.prompts[:TIMED]
        self.result.facts["prompts"] = len(self.timed)
        self.ways: list[WaySpeed] = []

    @property
    def layers(self) -> int:
        return int(self.model.config.num_hidden_layers)

    def _check(self) -> None:
        settings = self.settings
        room = getattr(self.model.config, "max_position_embeddings", None)
        if room is not None and settings.context + settings.new_tokens + 1 > room:
            found = f"{settings.context} tokens of context and {settings.new_tokens} new ones"
            raise UsageError("--context", found, f"fewer than {room} together", "Lower --context or --new-tokens.")
        if settings.calibrate is None:
            return
        if not self.depths:
            mend = "Tune it with `method: soft`, or drop --calibrate."
            raise UsageError("--calibrate", "a model of one depth", "a model with exits", mend)
        if self.data is None:
            raise UsageError(
                "--calibrate", "no held-out prompts", "a run, or a recipe with `data.eval`", "Add --recipe."
            )

    def measure_speed(self) -> None:
        """Base and every depth in turn."""
        from sparsmith.crafting.slices import at_depth
        from sparsmith.evaluating.latency import measure_speed
        from sparsmith.inference.budget import depth_fraction

        settings = self.settings
        self.base = self._base()
        models: dict[str, Any] = {} if self.base is None else {"base": self.base}
        tuned = {str(depth): at_depth(self.model, depth) for depth in self.depths} or {str(self.layers): self.model}
        models |= tuned
        batches = tuple(dict.fromkeys((1, settings.batch)))
        found = measure_speed(
            models, batches=batches, context=settings.context, new_tokens=settings.new_tokens, repeats=settings.repeats
        )
        for name, speed in found.items():
            depth = self.layers if name == "base" else int(name)
            share = depth_fraction(self.model, depth, settings.context) if name != "base" and self.depths else 1.0
            self.result.speed.append(
                {
                    "system": "base" if name == "base" else "tuned",
                    "depth": depth,
                    "predicted_share": share,
                    "weights_bytes": _bytes(models[name]),
                    "prefill_tokens_per_second": asdict(speed.prefill_tokens_per_second),
                    "ms_per_token": {str(batch): asdict(timing) for batch, timing in speed.ms_per_token.items()},
                }
            )

    def measure_quality(self) -> None:
        """Held-out loss of the base and of every depth, on the first rows of each set."""
        from sparsmith.evaluating import evaluate, evaluate_depths

        sets = self._sets()
        if not sets:
            return
        options: dict[str, Any] = {"metrics": ["loss"], "resamples": 1, "seed": self.settings.seed}
        if self.base is not None:
            self._note("base", self.layers, evaluate(self.base, self.tokenizer, sets, **options))
        if self.depths:
            for depth, one in evaluate_depths(self.model, self.tokenizer, sets, **options).depths.items():
                self._note("tuned", depth, one)
        else:
            self._note("tuned", self.layers, evaluate(self.model, self.tokenizer, sets, **options))

    def _note(self, system: str, depth: int, result: Any) -> None:
        row = next(r for r in self.result.speed if (r["system"], r["depth"]) == (system, depth))
        row["loss"] = result.overall["loss"].value
        if "agreement" in result.overall:
            row["agreement"] = result.overall["agreement"].value

    def calibrate(self) -> None:
        """Thresholds for the agreement asked for, or those that are there and fit."""
        from sparsmith.errors import CheckpointError
        from sparsmith.inference import calibrate
        from sparsmith.inference.calibrate import load

        self.calibration: Calibration | None = None
        settings = self.settings
        if settings.calibrate is not None:
            self.calibration = calibrate(
                self.model,
                self.prompts,
                agreement=settings.calibrate,
                max_new_tokens=settings.new_tokens,
                seed=settings.seed,
            )
        elif self.depths and self.out is not None and RunFolder(self.out).thresholds.is_file():
            try:
                self.calibration = load(RunFolder(self.out).thresholds, self.model)
            except CheckpointError:  # of other weights: not used, and left as it is
                self.calibration = None
        if self.calibration is not None:
            self.result.calibration = asdict(self.calibration)

    def measure_ways(self) -> None:
        """Token by token, drafting for itself, and with exits, over the same held-out prompts."""
        from sparsmith.evaluating.latency import measure_ways

        if not self.depths or not self.prompts:
            return
        settings = self.settings
        losses = self._exit_losses()
        self.ways = measure_ways(
            self.model, self.timed, self._ways(), new_tokens=settings.new_tokens, repeats=settings.repeats
        )
        losses |= self._depth_losses()
        for way in self.ways:
            # drafts write what the full depth writes
            loss = losses.get("token by token" if way.way.kind == "speculation" else way.way.name)
            self.result.ways.append({**way.as_dict(), **({"loss": loss} if loss is not None else {})})

    def _depth_losses(self) -> dict[str, float]:
        rows = [row for row in self.result.speed if row["system"] == "tuned" and "loss" in row]
        named = {
            row["depth"]: "token by token" if row["depth"] == self.layers else f"depth {row['depth']}" for row in rows
        }
        return {named[row["depth"]]: row["loss"] for row in rows}

    def _ways(self) -> list[Way]:
        from sparsmith.evaluating.latency import Way

        inner = self.depths[:-1]
        drafts = [(exit, length) for exit in inner[:2] for length in DRAFTS]
        return [
            Way("token by token", "plain", {}),
            *(Way(f"depth {n}", "depth", {"depth": n}) for n in inner),
            *(
                Way(f"drafts {n}:{k}", "speculation", {"self_speculative": {"exit": n, "draft_len": k}})
                for n, k in drafts
            ),
            *(Way(name, "exits", {"exit_threshold": policy}) for name, policy in self._policies().items()),
        ]

    def _policies(self) -> dict[str, dict[int, float]]:
        """Name -> depth -> threshold."""
        from sparsmith.inference.visits import chosen_visits

        found = {f"exits {limit:g}": dict.fromkeys(chosen_visits(self.model, None), limit) for limit in UNIFORM}
        if self.calibration is not None:
            found = {f"exits calibrated for {self.calibration.agreement:g}": self.calibration.thresholds, **found}
        return found

    def _exit_losses(self) -> dict[str, float]:
        """Held-out loss under each policy."""
        from sparsmith.bootstrap import summarise
        from sparsmith.evaluating.exit_loss import exit_losses

        sets, policies = self._sets(), self._policies()
        if not sets:
            return {}
        by_set = {one.name: exit_losses(self.model, one, policies) for one in sets}
        domain_of = {one.name: one.domain for one in sets}
        found = {}
        for name in policies:
            rows = {set_name: {"loss": losses[name]} for set_name, losses in by_set.items()}
            found[name] = summarise(rows, domain_of, seed=self.settings.seed, resamples=1).overall["loss"].value
        return found

    def write(self) -> None:
        """Figures, profile, thresholds and exits beside the model."""
        from sparsmith.inference.calibrate import save
        from sparsmith.inference.profile import write_profile

        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        run = RunFolder(self.out)
        if self.depths:
            for profile in self._profiles():
                write_profile(profile, run.profile)
            self.result.written.append(str(run.profile))
        if self.settings.calibrate is not None and self.calibration is not None:
            self.result.written.append(str(save(self.calibration, run.thresholds)))
        if (exits := self._exits()) is not None:
            durable.write_json(run.exits, exits)
            self.result.written.append(str(run.exits))
        self.result.written.append(str(run.bench))
        durable.write_json(run.bench, self.result.as_dict())
        if run.report.is_file():
            from sparsmith.app.use import rewrite_report

            rewrite_report(run.root)

    def _profiles(self) -> list[Any]:
        from sparsmith.inference import Profile

        facts, rows = self.result.facts, [row for row in self.result.speed if row["system"] == "tuned"]
        threads = facts["machine"]["threads"] if self.model.device.type == "cpu" else 0
        return [
            Profile(
                device=facts["device"],
                dtype=facts["dtype"],
                batch=int(batch),
                ms_per_token={row["depth"]: row["ms_per_token"][batch]["value"] for row in rows},
                context=self.settings.context,
                threads=threads,
                spread={
                    row["depth"]: (row["ms_per_token"][batch]["low"], row["ms_per_token"][batch]["high"])
                    for row in rows
                },
            )
            for batch in rows[0]["ms_per_token"]
        ]

    def _exits(self) -> dict[str, Any] | None:
        """Where tokens left: over all prompts of every policy, and token by token for a few."""
        found = [way for way in self.ways if way.way.kind == "exits"]
        if not found:
            return None
        shown = found[0]
        prompts = [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in self.timed[:SHOWN]]
        return {
            "format_version": FORMAT_VERSION,
            "layers": self.layers,
            "depths": list(self.depths),
            "histograms": {way.way.name: way.figures["histogram"] for way in found},
            "shown": shown.way.name,
            "thresholds": {str(depth): limit for depth, limit in self._policies()[shown.way.name].items()},
            "agreement": shown.figures["agreement"],
            "mean_depth": shown.figures["mean_depth"],
            "prompts": [
                {"prompt": prompt, "tokens": _pieces(self.tokenizer, ids, depths or ())}
                for prompt, (ids, depths) in zip(prompts, shown.answers)
            ],
        }

    def _base(self) -> Any:
        from sparsmith.app.use import placed
        from sparsmith.crafting.base_model import load_base

        return None if self.recipe is None else placed(load_base(self.recipe.model))

    def _sets(self) -> list[Any]:
        from sparsmith.evaluating.rows import sets_of

        every = sets_of(self.data.eval) if self.data is not None else []
        return [replace(one, rows=one.rows[: self.settings.rows]) for one in every if "loss" in one.source.metrics]

    def _prompts(self) -> list[list[int]]:
        """From every set in turn, those that leave room for an answer."""
        if self.data is None:
            return []
        room = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        columns = [
            [row.prompt_ids for row in one.rows if 0 < len(row.prompt_ids) <= room - self.settings.new_tokens]
            for one in self._sets()
        ]
        mixed = [
            column[place]
            for place in range(max(map(len, columns), default=0))
            for column in columns
            if place < len(column)
        ]
        return mixed[: self.settings.prompts]


def _bytes(model: Any) -> int:
    """Of the weights, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _pieces(tokenizer: Any, ids: Sequence[int], depths: Sequence[int]) -> list[list[Any]]:
    """[text, depth] per token; the texts put together are the whole answer."""
    pieces: list[list[Any]] = []
    before = ""
    for place, depth in enumerate(depths):
        whole = tokenizer.decode(list(ids[: place + 1]), skip_special_tokens=True)
        whole = whole.rstrip("\ufffd")  # a character whose bytes are not all there yet
        pieces.append([whole[len(before) :], depth])
        before = whole
    return pieces
