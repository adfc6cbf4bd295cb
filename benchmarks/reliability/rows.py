"""The promises with their trials at full size. A later method joins by adding cases to a trial, a later promise by adding a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.kit.tally import Tally
from tests.kit.trials import (
    all_or_nothing,
    bad_recipes,
    bad_rows,
    damage,
    data_order,
    exports,
    full_disk,
    fuzz,
    golden,
    guard,
    hostile_names,
    kills,
    neutral,
    no_code,
    ranks,
    same_bits,
    settling,
    signals,
    strict_loading,
    what_trains,
)


@dataclass(frozen=True)
class Row:
    """One promise."""

    number: int
    promise: str
    target: str
    field: str
    """What the plain stack did under the same trial, where that was measured."""
    run: Callable[[Path], Tally]
    """The trial at full size, in an empty folder."""


def rows() -> list[Row]:
    """All rows, in order."""
    return [
        Row(
            1,
            "Kill-proof: kill -9 at 60 random moments and before 60 writes, then the same command again",
            "all resume; weights and every step's loss equal the uncut run's, bit for bit",
            "7 of 24 could not resume at all (the half-written folder was chosen)",
            lambda folder: kills.whole_trial()[0],
        ),
        Row(
            2,
            "Only whole checkpoints count: what is listed after each kill, what is left after the next start",
            "0 partial folders listed, 0 leftovers",
            "7/24 chosen",
            lambda folder: kills.whole_trial()[1],
        ),
        Row(
            3,
            "Every bit is watched: 1,000 bit flips and 300 truncations over all checkpoint files",
            "1,300 refused, the file named, the older good one offered",
            "payload flips load silently, 300/300",
            damage.run,
        ),
        Row(
            4,
            "A full disk does not ruin a run: room for 0.5, 1.5, 2.5 checkpoints, from the start and filled after a save",
            "0 partial folders; bytes needed and free are said, before step 1 where foreseeable; resumes after freeing",
            "partial folder, later resume fails, error silent about space",
            full_disk.run,
        ),
        Row(
            5,
            "No NaN is ever saved: NaN and infinity planted in loss, gradient, router and adapter at 50 steps each",
            "200 stopped before the optimizer moves; step, sample ids and first bad module named; 0 such numbers on disk",
            "exit 0, loss logged as 0.0, 39/39 tensors NaN",
            guard.run,
        ),
        Row(
            6,
            "Same seed, same bits: 5 processes, and 4 kinds of evaluation, logging and saving beside",
            "one hash",
            "5/5 plain",
            same_bits.run,
        ),
        Row(
            7,
            "Data order survives a resume: 1,000 drawn sizes, batches, epochs, cuts, packings, mixtures",
            "equal streams of sample ids",
            "not measured",
            data_order.run,
        ),
        Row(
            8,
            "Bad rows are named: 500 generated files",
            "500 with `file:line` and reason, or set aside and written down; no good row changed",
            "names the file 0/12, silent 7/12",
            bad_rows.run,
        ),
        Row(
            9,
            "Bad recipes are named, all faults at once: 300 mutants",
            "300 with `file:line: key` of each fault; nothing loaded or written before",
            "not measured",
            bad_recipes.run,
        ),
        Row(
            10,
            "Craft is neutral: every method on every family, logits before and after, float32 and bfloat16",
            "bitwise",
            "not measured",
            neutral.run,
        ),
        Row(
            11,
            "Craft is all or nothing: fail at each place of crafting, then look at every tensor, tie, flag, hook and setting",
            "the model as before, and crafting it again gives the same",
            "not measured",
            all_or_nothing.run,
        ),
        Row(
            12,
            "What trains is what was said: every method on every family tuned for 50 steps",
            "count = plan; every trained tensor has a gradient within 20 steps; every frozen one keeps its sha256",
            "silent in most tools",
            what_trains.run,
        ),
        Row(
            13,
            "Settle tells the truth: every method on every family, settled against soft, counts against a recount",
            "logits within 1e-5; counts exact",
            "not measured",
            settling.run,
        ),
        Row(
            14,
            "Exports open elsewhere: a fresh process with plain transformers and no sparsmith",
            "logits within 1e-5 of ours, the same text, 0 missing and 0 unexpected keys",
            "not measured",
            exports.run,
        ),
        Row(
            15,
            "Strict loading: drop, rename, reshape and recast each tensor of checkpoints and bases",
            "all refused, the nearest name given",
            "warning only; missing weight becomes random",
            strict_loading.run,
        ),
        Row(
            16,
            "No code from files: pickles in every slot, code by config, YAML tags, the source itself",
            "0 executed, 0 found",
            "not measured",
            no_code.run,
        ),
        Row(
            17,
            "No path leaves the folder: 52 hostile names in manifests, indexes and recipes, and links",
            "all refused",
            "`../` in a weight index is followed",
            hostile_names.run,
        ),
        Row(
            18,
            "Polite stop: 42 signals in the first batch, a step, an evaluation, a save, before and after, and second ones",
            "exit 143 or 130 with a whole checkpoint of the step; resumed to the uncut run's bits",
            "25 steps lost",
            signals.run,
        ),
        Row(
            19,
            "Old work opens: golden folders of every format version, and versions of the future",
            "opens with equal logits, or a message with what to do",
            "not measured",
            golden.run,
        ),
        Row(
            20,
            "Fuzz finds no traceback: 10,000 spoilt manifests, headers, configs, tokenizers, rows, recipes, command lines",
            "0 tracebacks, 0 hangs over 5 s, none opens as another function",
            "14/300 header flips load wrong names",
            fuzz.run,
        ),
        Row(
            21,
            "Many processes give one run: 2 ranks by DDP and FSDP2 against one, by torchrun and accelerate, taken up by 1, 2 and back",
            "every step's loss, gradient norm, router health and the weights <= 1e-5 of one process; 2 then 2 bit for bit; one writer",
            "not measured",
            ranks.whole_trial,
        ),
    ]
