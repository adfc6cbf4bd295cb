"""Rows packed into one sequence give each token the loss that it has alone, for every family: <= 1e-5 in float32."""

from __future__ import annotations

import pytest
import torch

from sparsmith.data import load_data
from sparsmith.data.collate import Collator
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import FAMILIES, pico_model
from tests.kit.tasks import mixture, task_settings, write_tasks

LENGTHS = [11, 3, 24, 7, 1, 16, 9, 5]
LIMIT = 1e-5


def rows_of_tasks(folder) -> list[dict]:
    """Rows of an instruction mixture, worked examples included, through the real reader."""
    write_tasks(folder)
    settings = task_settings(folder, mixture(variants={"zs_opt": 1, "fs_opt": 1}, fewshot_max=2))
    data = load_data(settings, char_tokenizer(), seed=1, base_dir=folder, rows_needed=8)
    return [data.train[index] | {"sample_ids": index} for index in range(8)]


def rows() -> list[dict]:
    draw = torch.Generator().manual_seed(0)
    result = []
    for index, length in enumerate(LENGTHS):
        ids = torch.randint(3, 128, (length,), generator=draw)
        labels = torch.where(torch.arange(length) < length // 3, -100, ids)
        result.append({"input_ids": ids, "labels": labels, "domain": torch.zeros_like(ids), "sample_ids": index})
    return result


def losses(model, batch, known: list[dict] | None = None) -> dict[tuple[int, int], float]:
    """Token loss by (row, position in the row)."""
    names = ("input_ids", "position_ids", "attention_mask")
    with torch.no_grad():
        logits = model(**{name: batch[name] for name in names if name in batch}, use_cache=False).logits
    target = batch["labels"][:, 1:]
    each = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), target, reduction="none")
    result = {}
    row_by_ids = {tuple(row["input_ids"].tolist()): row["sample_ids"] for row in known or rows()}
    starts = [(b, s) for b, s in (batch["position_ids"] == 0).nonzero().tolist() if batch["token_mask"][b, s]]
    for b, s in starts:
        stop = s + 1
        while stop < target.shape[1] + 1 and batch["position_ids"][b, stop] != 0 and batch["token_mask"][b, stop]:
            stop += 1
        row = row_by_ids[tuple(batch["input_ids"][b, s:stop].tolist())]
        for place in range(s + 1, stop):
            if batch["labels"][b, place] >= 0:
                result[row, place - s] = float(each[b, place - 1])
    return result


def implementations(family: str) -> list[str]:
    return ["eager"] if family == "gemma2" else ["eager", "sdpa"]  # transformers offers gemma2 no sdpa


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in FAMILIES for kind in implementations(family)]
)
def test_packed_rows_have_the_loss_they_have_alone(family, kind, written):
    attention = {"eager": "additive", "sdpa": "blocks"}[kind] if written else "positions"
    model = pico_model(family).eval()
    model.set_attn_implementation(kind)
    alone: dict = {}
    for row in rows():
        alone |= losses(model, Collator(0, packing=False)([row]))
    packed_batch = Collator(0, True, 32, attention)(rows())
    assert packed_batch["input_ids"].shape[0] < len(LENGTHS) and ("attention_mask" in packed_batch) == written
    packed, padded = losses(model, packed_batch), losses(model, Collator(0, packing=False)(rows()))
    assert alone.keys() == packed.keys() == padded.keys() and len(alone) > 40
    assert max(abs(alone[key] - packed[key]) for key in alone) <= LIMIT
    assert max(abs(alone[key] - padded[key]) for key in alone) <= LIMIT


def test_a_cache_switches_the_detection_off():
    """Why `use_cache=False` must be passed with packed rows: were this to change in transformers, the note could go."""
    model = pico_model("llama").eval()
    batch = Collator(0, True, 32)(rows())
    with torch.no_grad():
        right, wrong = (
            model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=cache).logits
            for cache in (False, True)
        )
    assert float((right - wrong).abs().max()) > 1e-2


def test_packed_rows_of_a_mixture_have_the_loss_they_have_alone(tmp_path):
    known, model = rows_of_tasks(tmp_path), pico_model("llama").eval()
    alone: dict = {}
    for row in known:
        alone |= losses(model, Collator(0, packing=False)([row]), known)
    batch = Collator(0, True, 512)(known)
    assert batch["input_ids"].shape[0] < len(known)
    packed = losses(model, batch, known)
    assert alone.keys() == packed.keys() and len({row for row, _ in alone}) == len(known)
    assert max(abs(alone[key] - packed[key]) for key in alone) <= LIMIT
