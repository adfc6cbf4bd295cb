"""Tiny rows for the Trainer: random tokens, labels on the second half."""

from __future__ import annotations

import torch

from tests.kit.pico import pico_ids


class RowDataset(torch.utils.data.Dataset):
    """`count` rows of `length` tokens in a fixed order; the answer repeats the prompt, so that there is something to learn."""

    ordered = True

    def __init__(self, count: int, length: int = 12, seed: int = 0) -> None:
        half = pico_ids(count, length // 2, seed=seed)
        self.ids = torch.cat([half, half], dim=1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict:
        ids = self.ids[index]
        labels = ids.clone()
        labels[: len(ids) // 2] = -100
        return {"input_ids": ids, "labels": labels, "domain": index % 2}


def pad_rows(rows: list[dict]) -> dict:
    """Rows of one length as a batch."""
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = torch.stack([row["labels"] for row in rows])
    domain = torch.tensor([row["domain"] for row in rows])[:, None].expand_as(ids).contiguous()
    mask = torch.ones_like(ids)
    return {
        "input_ids": ids,
        "labels": labels,
        "attention_mask": mask,
        "token_mask": mask.bool(),
        "domain": domain,
    }
