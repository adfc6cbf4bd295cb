"""Spec 5, tests 8, 10 and 11 of FineGates: what is exported computes what the gated model computes, in every form, on every family."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.settle import settle_report
from sparsmith.methods.finegates.gates import sites
from tests.kit.gated import UNEVEN, WHOLE, gate_keys, gated, logits, tokens
from tests.kit.pico import FAMILIES

GEMMA = ("gemma2", "gemma3_text")  # their norms compute in float32 whatever the model's type
CASES = {"even": {}, "a block closed": WHOLE, "uneven": UNEVEN}
FORMS = {
    "even": ("uniform", "per-layer", "padded", "zeros"),
    "a block closed": ("uniform", "zeros"),
    "uneven": ("per-layer", "padded", "zeros"),
}
LIMITS = {torch.float32: 1e-4, torch.float64: 1e-10}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", LIMITS)
def test_every_form_computes_what_the_gates_compute(family, dtype):
    limit = 1e-6 if family in GEMMA and dtype == torch.float64 else LIMITS[dtype]
    for case, changes in CASES.items():
        model = gated(family, dtype=dtype, **changes)
        wanted = logits(model)
        for form in FORMS[case]:
            settled = sm.settle(copy.deepcopy(model), form=form)
            assert settled.sparsmith.form == form
            assert (logits(settled) - wanted).abs().max() <= limit, (case, form)
            assert not gate_keys(settled.state_dict())
            report = settle_report(settled)
            assert report.removed == report.tables["finegates"]["accounting"]["deletable"]["removed"], (case, form)
            assert report.prune.max_logit_difference <= limit


@pytest.mark.parametrize("family", GEMMA)
def test_gemma_in_float64_without_scales_in_its_norms(family):
    model = gated(family, dtype=torch.float64, soft_blocks=False)
    assert (logits(sm.settle(copy.deepcopy(model))) - logits(model)).abs().max() <= 1e-10


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tied_embeddings_stay_tied(family):
    model = gated(family, tie_word_embeddings=True)
    settled = sm.settle(copy.deepcopy(model), form="per-layer")
    assert settled.get_output_embeddings().weight is settled.get_input_embeddings().weight
    assert (logits(settled) - logits(model)).abs().max() <= 1e-4


def test_biases_of_queries_and_keys_are_cut_with_their_rows():
    model = gated("qwen2", base=None)
    for block in anatomy.blocks(model):
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(anatomy.attention_of(block), name).bias.data.normal_()
    wanted = logits(model)
    for form in ("uniform", "zeros", "padded"):
        assert (logits(sm.settle(copy.deepcopy(model), form=form)) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_what_uneven_blocks_write_with_the_cache(family):
    """Block 0 has no attention: lengths, masks and positions are read off its cache all the same."""
    model = gated(family, **UNEVEN)
    slim = sm.settle(copy.deepcopy(model))
    assert slim.config.model_type == "sparsmith_slim" and len(anatomy.blocks(slim)) == 3
    assert tokens(slim) == tokens(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_histograms_sum_to_what_is_kept(family):
    model = gated(family, soft=False)
    kept = {
        kind: sum(int(site.gate(kind).kept.sum()) for site in sites(model) if site.gate(kind))
        for kind in ("units", "groups")
    }
    tables = settle_report(sm.settle(model)).tables["finegates"]["scales"]
    for kind, table in tables.items():
        assert sum(table["counts"]) == table["kept"] and len(table["counts"]) == len(table["edges"])
        if not kind.endswith("block"):
            assert table["counts"][-1] == table["kept"], "all scales are exactly 1"
        if kind in kept:
            assert table["kept"] == kept[kind]
