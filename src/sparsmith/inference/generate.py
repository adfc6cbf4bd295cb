"""Text from a model, whole or streamed; of a depth-elastic model, at a depth, within a budget, with early exits, or drafting for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sparsmith import anatomy
from sparsmith.errors import UsageError
from sparsmith.inference.budget import depth_for
from sparsmith.inference.by_depth import DepthStats, one_each, run_depths
from sparsmith.inference.early_exit import MAX_WAITING, ExitStats, agreement_of, exit_early
from sparsmith.inference.faults import ModeConflict, require_text
from sparsmith.inference.hf_engine import speculate_hf
from sparsmith.inference.profile import Profile
from sparsmith.inference.quiet import quiet
from sparsmith.inference.request import Request, make_request, refuse_leftovers
from sparsmith.inference.sampling import Sampling
from sparsmith.inference.speculative import SelfSpeculation, SpeculationStats, speculate
from sparsmith.inference.thresholds import thresholds_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Stats = DepthStats | ExitStats | SpeculationStats


@dataclass(frozen=True)
class Generated:
    """What `generate(..., return_stats=True)` gives."""

    ids: Tensor
    """(B, S + new), prompts included; padded on the right behind end tokens."""
    stats: Stats | None
    """What it took; None for a plain generate and for `engine="hf"`."""


@dataclass(frozen=True)
class _Ways:
    """The ways of generating and their settings, as given."""

    depth: Any = None
    budget: Any = None
    exit_threshold: Any = None
    self_speculative: Any = None
    profile: Profile | str | Path | None = None
    visit: Sequence[int] | None = None
    max_waiting: int | None = None
    agreement: bool = False
    engine: str | None = None

    @property
    def chosen(self) -> str | None:
        """The one way that is asked for; None = plain.

        Raises:
            ModeConflict: several, or a setting of another way.
        """
        ways = ("depth", "budget", "exit_threshold", "self_speculative")
        asked = [name for name in ways if getattr(self, name) is not None]
        if len(asked) > 1:
            raise ModeConflict("generate", " and ".join(asked), "one of " + ", ".join(ways), "Choose one.")
        chosen = asked[0] if asked else None
        owners = {
            "profile": "budget",
            "visit": "exit_threshold",
            "max_waiting": "exit_threshold",
            "agreement": "exit_threshold",
            "engine": "self_speculative",
        }
        for name, owner in owners.items():
            if getattr(self, name) not in (None, False) and owner != chosen:
                raise ModeConflict(name, f"set, without `{owner}`", f"`{owner}` beside it", f"Add it or drop `{name}`.")
        return chosen


def generate(
    model: PreTrainedModel,
    inputs: Tensor | dict[str, Tensor],
    *,
    max_new_tokens: int = 64,
    depth: int | list[int] | None = None,
    budget: float | str | list[float | str] | None = None,
    exit_threshold: Any = None,
    self_speculative: SelfSpeculation | dict[str, Any] | int | None = None,
    profile: Profile | str | Path | None = None,
    visit: Sequence[int] | None = None,
    max_waiting: int | None = None,
    agreement: bool = False,
    engine: Literal["sparsmith", "hf"] | None = None,
    return_stats: bool = False,
    streamer: Any = None,
    **options: Any,
) -> Any:
    """Token ids (B, S + new), prompts included, as transformers' generate returns them. Greedy unless `do_sample=True`.

    At most one of `depth`, `budget`, `exit_threshold` and `self_speculative`; without any, transformers' generate of the full model.

    Args:
        model: a base, a crafted or a loaded model; put into evaluation mode for the call.
        inputs: (B, S) int64, or a tokenizer's output; pad on the left and give `attention_mask` where rows differ in length.
        depth: blocks to run, or one number per request; one of `depths_of(model)`.
        budget: share of the full model's FLOPs per token in (0, 1], or "12ms" per token; or one per request.
        exit_threshold: probability from which an exit's token is taken: a number, {depth: number}, a calibrated file; or one per request.
        self_speculative: {exit, draft_len: 4, stop_confidence: 0.4, bonus: auto}, or the exit alone. Lossless.
        profile: of a budget in milliseconds: where the measurement is.
        visit: of exit_threshold: depths to look at; default at most three below the full one.
        max_waiting: of exit_threshold: tokens that may wait before a pass goes to full depth; 64.
        agreement: of exit_threshold: measure the share of tokens that the full model would have chosen, by one more pass.
        engine: of self_speculative: `hf` = transformers' own, for comparison.
        return_stats: return `Generated(ids, stats)`.
        streamer: as transformers'; one prompt only.
        options: attention_mask, eos_token_id, pad_token_id, do_sample, temperature, top_k, top_p, seed; plain and by depth also
            whatever transformers' generate takes.

    Raises:
        ModeConflict: several ways at once. MethodError: a depth that is no exit. BudgetTooSmall, ProfileMissing: of a budget.
        UsageError: a value that cannot be meant.
    """
    require_text(model)
    ways = _Ways(depth, budget, exit_threshold, self_speculative, profile, visit, max_waiting, agreement, engine)
    chosen = ways.chosen
    with quiet(model):
        if chosen is None:
            found: tuple[Tensor, Stats | None] = (_plain(model, inputs, max_new_tokens, streamer, options), None)
        else:
            sampling = Sampling.of(model, options)
            request = make_request(
                model, inputs, max_new_tokens=max_new_tokens, sampling=sampling, streamer=streamer, options=options
            )
            found = _run(model, request, ways, chosen, options)
    return Generated(*found) if return_stats else found[0]


def _plain(model: Any, inputs: Any, max_new_tokens: int, streamer: Any, options: dict[str, Any]) -> Tensor:
    if not isinstance(inputs, Tensor):
        options = {**inputs, **options}
        inputs = options.pop("input_ids")
    options.setdefault("attention_mask", torch.ones_like(inputs))
    options.setdefault("do_sample", False)
    if (seed := options.pop("seed", None)) is not None:
        torch.manual_seed(seed)
    return model.generate(input_ids=inputs, max_new_tokens=max_new_tokens, streamer=streamer, **options)


def _run(
    model: Any, request: Request, ways: _Ways, chosen: str, options: dict[str, Any]
) -> tuple[Tensor, Stats | None]:
    if chosen == "depth":
        return run_depths(model, request, one_each("depth", ways.depth, request.rows), options)
    if chosen == "budget":
        asked = one_each("budget", ways.budget, request.rows)
        known = {
            one: depth_for(model, one, context=request.room, batch=request.rows, profile=ways.profile)
            for one in dict.fromkeys(asked)
        }
        return run_depths(model, request, [known[one] for one in asked], options)
    refuse_leftovers(model, chosen, options)
    if chosen == "exit_threshold":
        thresholds = thresholds_of(model, ways.exit_threshold, ways.visit, request.rows)
        waiting = MAX_WAITING if ways.max_waiting is None else ways.max_waiting
        ids, stats = exit_early(model, request, thresholds, max_waiting=waiting)
        if ways.agreement:
            stats = stats.with_agreement(agreement_of(model, request, ids, stats.depths))
        return ids, stats
    settings = SelfSpeculation.of(ways.self_speculative, len(anatomy.blocks(model)))
    if ways.engine == "hf":
        return speculate_hf(model, request, settings), None
    if ways.engine not in (None, "sparsmith"):
        raise UsageError("engine", f"`{ways.engine}`", "sparsmith or hf", "Leave `engine` out.")
    return speculate(model, request, settings)


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[int],
    *,
    max_new_tokens: int,
    on_done: Callable[[Generated], None] | None = None,
    **options: Any,
) -> Iterator[str]:
    """Pieces of the answer as they come; `options` as of `generate`. `on_done` is called with ids and statistics at the end.

    Raises:
        UsageError: the prompt leaves no room in the model's context.
    """
    from transformers import TextIteratorStreamer

    room = getattr(model.config, "max_position_embeddings", None)
    if room is not None and len(prompt_ids) + max_new_tokens > room:
        raise UsageError(
            "prompt",
            f"{len(prompt_ids)} tokens and {max_new_tokens} new ones",
            f"at most {room} together",
            "Shorten the prompt or lower --max-new-tokens.",
        )
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.tensor([prompt_ids], device=model.device)
    fault: list[BaseException] = []
    whole: list[Generated] = []

    def work() -> None:
        try:
            done: Generated = generate(
                model,
                ids,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id,
                return_stats=True,
                **options,
            )
            whole.append(done)
        except BaseException as error:  # handed to the caller's thread below
            fault.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from (piece for piece in streamer if piece)
    thread.join()
    if fault:
        raise fault[0]
    if on_done is not None:
        on_done(whole[0])
