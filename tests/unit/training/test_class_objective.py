"""The loss of a classifier: mean over the rows of the accumulated batch, and by domain."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

import sparsmith as sm
from sparsmith.methods import registry
from sparsmith.training.objective import Objective
from tests.kit.classifying import FEW, HEAD, HeadConfig, classifier_config
from tests.kit.pico import pico_ids


@pytest.fixture(autouse=True)
def registered():
    registry.register(HEAD)
    yield
    registry.unregister("head")


def batch_of(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    ids, mask = pico_ids(rows, 12, seed=seed), torch.ones(rows, 12, dtype=torch.int64)
    for row in range(rows):
        stop = 12 - row % 5
        ids[row, stop:], mask[row, stop:] = 0, 0
    domain = torch.where(mask.bool(), (torch.arange(rows) % 2)[:, None], -1)
    labels = torch.arange(rows) % 3
    return {"input_ids": ids, "attention_mask": mask, "token_mask": mask.bool(), "domain": domain, "labels": labels}


@pytest.mark.parametrize("family", FEW)
def test_the_loss_is_the_mean_over_rows_whatever_the_accumulation(family):
    model = AutoModelForSequenceClassification.from_config(classifier_config(family)).eval()
    objective = Objective(sm.craft(model, HeadConfig(), inplace=True).eval(), domains=2)
    whole = batch_of(8)
    with torch.no_grad():
        logits = model(input_ids=whole["input_ids"], attention_mask=whole["attention_mask"]).logits
    each = F.cross_entropy(logits, whole["labels"], reduction="none")
    found = objective(**whole)
    assert torch.allclose(found["loss"], each.mean(), atol=1e-6)
    assert torch.allclose(found["domain_sum"], torch.stack([each[0::2].sum(), each[1::2].sum()]), atol=1e-5)
    assert found["domain_count"].tolist() == [4, 4] and found["tokens"] == whole["attention_mask"].sum()
    halves = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 3), slice(3, 8))]
    parts = [objective(**half, num_items_in_batch=torch.tensor(8))["loss"] for half in halves]
    assert torch.allclose(sum(parts), each.mean(), atol=1e-6)


def test_the_trainer_counts_rows_and_shifts_nothing():
    model = AutoModelForSequenceClassification.from_config(classifier_config("llama"))
    objective = Objective(sm.craft(model, HeadConfig(), inplace=True))
    assert objective.loss_type == "ForSequenceClassification"
    whole = batch_of(4)
    whole["labels"][0] = -100  # a row that has no class counts for nothing
    left = {name: tensor[1:] for name, tensor in whole.items()}
    assert torch.allclose(objective.eval()(**whole)["loss"], objective(**left)["loss"], atol=1e-6)
