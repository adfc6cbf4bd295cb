"""The one call that turns the recipe's `data` into data sets."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparsmith import durable
from sparsmith.data import cache, mixture
from sparsmith.data.chat import make_encoder
from sparsmith.data.collate import Collator, pad_id_of
from sparsmith.data.collate_classes import ClassCollator
from sparsmith.data.evalsets import EvalSet, load_eval
from sparsmith.data.prepare import TokenSet, prepare
from sparsmith.data.rows import Reject, RowFault
from sparsmith.data.selection import cut_selection
from sparsmith.errors import DataError, RecipeError
from sparsmith.recipe.schema import DataSettings, SelectSettings


class TrainRows(torch.utils.data.Dataset):
    """The training stream, map-style: row i is a function of i alone, so a resume starts at any index.

    An item holds input_ids, labels (-100 = not trained), position_ids and domain (int64 tensors of one length) and `sample_ids`, the
    number of the row among all kept training rows (`LoadedData.place` gives its file and line). Of a classifier `labels` is the class.
    """

    def __init__(self, sets: Sequence[TokenSet], domains: Sequence[int], source: np.ndarray, row: np.ndarray) -> None:
        self.sets, self.domains, self.source, self.row_of = list(sets), list(domains), source, row
        self.starts = np.concatenate([[0], np.cumsum([len(one) for one in sets])]).astype(np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, row = int(self.source[index]), int(self.row_of[index])
        ids, trained = self.sets[number].row(row)
        input_ids = torch.from_numpy(ids.astype(np.int64))
        classifies = self.sets[number].labels is not None
        return {
            "input_ids": input_ids,
            "labels": self.sets[number].label(row)
            if classifies
            else torch.where(torch.from_numpy(trained.copy()), input_ids, -100),
            "position_ids": torch.arange(len(input_ids)),
            "domain": torch.full_like(input_ids, self.domains[number]),
            "sample_ids": int(self.starts[number]) + row,
        }

    def sample_id(self, index: int) -> int:
        """The sample id at a place of the stream, without its tokens."""
        return int(self.starts[self.source[index]] + self.row_of[index])

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and trained tokens of each row of the stream, (rows,) int64 both."""
        per_row = [one.sizes() for one in self.sets]
        tokens, trained = (np.concatenate([pair[side] for pair in per_row]) for side in (0, 1))
        index = self.starts[self.source] + self.row_of
        return tokens[index], trained[index]

    def place(self, sample_id: int) -> str:
        """`file:line` of a row."""
        number = int(np.searchsorted(self.starts, sample_id, side="right")) - 1
        return self.sets[number].place(sample_id - int(self.starts[number]))


@dataclass
class LoadedData:
    """Everything that a run needs of its data."""

    train: TrainRows
    eval: dict[str, EvalSet]
    domains: list[str]
    """In the order of their first naming: training sources, then eval sources."""
    counts: dict[str, dict[str, dict[str, Any]]]
    """`train` and `eval` -> source -> read, rejected, filtered, limited, over_long, truncated, all_masked, kept,
    tokens, trained_tokens, format, domain, and for training sources `share` of the mixture, and `selection` where rows were cut for it;
    for a mixture's task also `variants` (rows shown in each way), `shots` (worked examples) and `shots_pruned`.

    read = rejected + filtered + limited + over_long + all_masked + selection + kept."""
    fingerprints: dict[str, str]
    """File -> sha256."""
    rejects: dict[str, list[Reject]]
    """Bad rows by source; those of an eval source under `eval.<name>`."""
    encoder: Any
    settings: DataSettings
    selection: dict[str, EvalSet] = field(default_factory=dict)
    """Rows cut from the training sources, by source, by which the best point of the run is chosen."""

    def collator(self, packing: bool | None = None, attention: str = "positions") -> Collator | ClassCollator:
        """The collator that the recipe asks for.

        Raises:
            DataError: rows for an encoder-decoder, whose config says with which token an answer starts.
        """
        if self.encoder.pairs:
            mend = "Write PairCollator.of(model.config)."
            raise DataError("collator", "rows for an encoder-decoder", "its config", mend)
        if self.encoder.classes is not None:
            return ClassCollator(pad_id_of(self.encoder.tokenizer), self.settings.max_length)
        packing = self.settings.packing if packing is None else packing
        return Collator(pad_id_of(self.encoder.tokenizer), packing, self.settings.max_length, attention)

    def place(self, sample_id: int) -> str:
        """`file:line` of a training row."""
        return self.train.place(sample_id)


def render_prompt(
    prompt: str, tokenizer: Any, template: str | None = None, *, system: str = "", raw: bool = False
) -> list[int]:
    """The ids from which `generate` answers a prompt: the template around it, one bos at the head.

    Args:
        template: as `data.template` of the recipe.
        raw: encode the prompt alone, without a template.
    """
    encoder = make_encoder(tokenizer, "{prompt}" if raw else template, "response")
    head = [{"role": "system", "content": system}] if system else []
    try:
        return encoder.prompt_ids([*head, {"role": "user", "content": prompt}])
    except RowFault as fault:
        raise fault.at("prompt", 1) from None


def load_data(
    settings: DataSettings,
    tokenizer: Any,
    *,
    seed: int,
    base_dir: Path | str = ".",
    rows_needed: int | None = None,
    epochs: float | None = None,
    rejects: Path | str | None = None,
    classes: int | None = None,
    pairs: bool = False,
    select: SelectSettings | None = None,
) -> LoadedData:
    """Read, encode and order the recipe's data.

    Args:
        seed: of the mixture, the order inside each source and the choice of `limit`. The stream of rows depends on it, the
            sources' names, sizes and rates, and on nothing else.
        base_dir: what relative paths start from (the recipe's folder).
        rows_needed: length of the training stream; absent = `epochs` epochs (default 1). 0 leaves the training sources
            unread, for evaluation alone.
        rejects: the folder where `on_bad_row: skip` writes `<source>.jsonl`; absent = they are only in the result.
        classes: of a classifier how many there are; absent = rows for a language model.
        pairs: rows for an encoder-decoder.
        select: of a classifier how many training rows are cut off to select by.

    Raises:
        DataError: a file or row that cannot be used. RecipeError: two sources with one name.
    """
    base_dir = Path(base_dir)
    _refuse_twins(settings)
    encoder = make_encoder(tokenizer, settings.template, settings.loss_on, classes, pairs)
    cache_dir = base_dir / Path(settings.cache).expanduser() if settings.cache else cache.default_dir()
    domains = list(dict.fromkeys(source.domain for source in (*settings.sources, *settings.eval)))
    sources = settings.sources if rows_needed != 0 else ()
    sets = [prepare(source, source.domain, settings, encoder, base_dir, seed, cache_dir) for source in sources]
    held_out = {s.name: load_eval(s, domains.index(s.domain), settings, encoder, base_dir) for s in settings.eval}

    for source, record in [(s, one.counts) for s, one in zip(sources, sets)] + [
        (one.source, one.counts) for one in held_out.values()
    ]:
        record |= {key: value for key in ("family", "licence") if (value := getattr(source, key)) is not None}
    selection = cut_selection(sets, select, seed, domains) if select is not None and sets else {}
    train = _stream(settings, sets, domains, seed, rows_needed, epochs)
    bad = {one.name: one.rejects for one in sets if one.rejects}
    bad |= {f"eval.{one.name}": one.rejects for one in held_out.values() if one.rejects}
    if rejects is not None:
        write_rejects(Path(rejects), bad)
    return LoadedData(
        train=train,
        eval=held_out,
        domains=domains,
        counts={"train": {s.name: s.counts for s in sets}, "eval": {s.name: s.counts for s in held_out.values()}},
        fingerprints=_merged([one.fingerprints for one in sets] + [one.fingerprints for one in held_out.values()]),
        rejects=bad,
        encoder=encoder,
        settings=settings,
        selection=selection,
    )


def _stream(
    settings: DataSettings,
    sets: Sequence[TokenSet],
    domains: list[str],
    seed: int,
    rows_needed: int | None,
    epochs: float | None,
) -> TrainRows:
    if not sets:
        return TrainRows([], [], np.zeros(0, np.int64), np.zeros(0, np.int64))
    rows = [len(one) for one in sets]
    if settings.mixture is not None:
        parts, mixing = mixture.parts_of_tasks(settings.mixture, rows), "rates"
    else:
        parts, mixing = mixture.parts_of(settings.train, rows), settings.mixing
    for one, share in zip(sets, mixture.shares(parts, mixing)):
        one.counts["share"] = float(share)
    length = rows_needed if rows_needed is not None else max(1, round((epochs or 1.0) * mixture.epoch_rows(parts)))
    source, row = mixture.stream(parts, mixing, seed, length)
    return TrainRows(sets, [domains.index(one.domain) for one in settings.sources], source, row)


def _merged(maps: Sequence[dict[str, str]]) -> dict[str, str]:
    return {key: value for one in maps for key, value in one.items()}


def _refuse_twins(settings: DataSettings) -> None:
    for group, sources in (("train", settings.sources), ("eval", settings.eval)):
        names = [source.name for source in sources]
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(
                    f"data.{group}", f"the source name `{name}` twice", "distinct names", "Rename one of them."
                )


def write_rejects(folder: Path, rejects: dict[str, list[Reject]]) -> None:
    """One jsonl file per source with bad rows: file, line, reason, raw."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in rejects.items():
        lines = "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in rows)
        durable.write_text(folder / (re.sub(r"[^\w.\-]", "_", name) + ".jsonl"), lines)
