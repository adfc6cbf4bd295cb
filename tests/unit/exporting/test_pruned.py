"""Spec 5, tests 9 to 11 of FineGates: pruned models on disk, their accounting, and strangers that open them."""

from __future__ import annotations

import copy
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import sparsmith as sm
from sparsmith import anatomy, durable
from sparsmith.crafting import accounting
from sparsmith.crafting import tensors as strict
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import CheckpointMismatch, ExportMismatch, LayoutMismatch, MethodError
from sparsmith.exporting import export, timing, verify
from sparsmith.methods.base import LoraSettings
from sparsmith.methods.finegates.config import FineGatesConfig
from tests.kit.cases import logits as probe_logits
from tests.kit.cases import probes
from tests.kit.checkpoints import edit_json, save_base
from tests.kit.gated import UNEVEN, WHOLE, gate_keys, gated, logits, tokens
from tests.kit.pico import pico_model
from tests.kit.trials.exports import READ, read_elsewhere

EIGHT = FineGatesConfig(target=0.8, settle={"unit": 16})
MISTRAL = {
    "units": (96,) * 4,
    "groups": (3,) * 4,
    "soft": False,
    "config": EIGHT,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
SHAPES = {
    "uniform": ("uniform", WHOLE),
    "mistral": ("uniform", MISTRAL),
    "per-layer": ("per-layer", UNEVEN),
    "zeros": ("zeros", UNEVEN),
    "padded": ("padded", UNEVEN),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Name -> (the gated model, the folder, the report), of every form."""
    home, found = tmp_path_factory.mktemp("pruned"), {}
    for name, (form, changes) in SHAPES.items():
        model = gated(**changes)
        found[name] = (model, home / name, export(copy.deepcopy(model), home / name, form=form, proof=False))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_a_folder_comes_back_as_the_model_that_was_cut(exported, name):
    model, folder, report = exported[name]
    form = SHAPES[name][0]
    verify(folder)
    again = sm.load(folder)
    assert again.sparsmith.form == form == report.form and (logits(again) - logits(model)).abs().max() <= 1e-4
    assert tokens(again) == tokens(model)
    names = [key for file in folder.glob("*.safetensors") for key in load_file(file)]
    assert names and not gate_keys(names)
    assert not gate_keys(json.loads((folder / "config.json").read_text())["sparsmith"])
    with pytest.raises(LayoutMismatch, match=f"settled into the form {form}"):
        sm.export(again, folder.parent / "other", form="zeros" if form != "zeros" else "uniform", proof=False)


@pytest.mark.parametrize("name", SHAPES)
def test_the_three_columns_stand_together_and_agree_with_the_files(exported, name):
    _, folder, report = exported[name]
    held = sum(math.prod(shape) for shape, _ in strict.file_rows(folder).values())
    dense = sum(p.numel() for p in pico_model(**_changes(name)).parameters())
    account = accounting.columns(folder)
    assert account == report.accounting and account["base"]["parameters"] == dense
    assert account["deletable"]["removed"] == dense - held == account["measured"]["removed"]
    assert account["measured"]["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert sum(account["deletable"]["kinds"].values()) == account["deletable"]["removed"]
    ours = account["deletable"]["removed"] - account["deletable"]["kinds"]["norms"]
    assert ours <= account["counted"]["removed"], "stock shapes cannot lose more than the gates have closed"
    text, card = str(report), (folder / "README.md").read_text()
    for words in ("removed, counted", "removed, deletable", "measured in the files", "of all parameters", f"{dense:,}"):
        assert words in text and words in card
    assert account["measured"]["flops_per_token"] <= account["measured"]["dense_flops_per_token"]
    assert "K-quants" in text and "no multiple of 256" in card
    json.dumps(report.as_dict())


def _changes(name):
    return {"num_hidden_layers": 4, **{k: v for k, v in SHAPES[name][1].items() if k.startswith("num_")}}


def test_flops_are_those_of_the_shapes_that_are_left(exported):
    """2 per multiply-add of every linear, 4 h per head and attended token, over 128 tokens."""
    _, folder, _ = exported["uniform"]
    shape = anatomy.shape_of(sm.load(folder).config)
    linear = shape.layers * sum(i * o for i, o in shape.linears.values()) + shape.vocab * shape.hidden
    scores = 4 * shape.layers * shape.heads * shape.head_dim * timing.CONTEXT
    assert accounting.columns(folder)["measured"]["flops_per_token"] == 2 * linear + scores


def test_strangers_open_every_folder(exported, tmp_path):
    """One clean process with torch and transformers alone: the same logits, padded rows too, and the same greedy tokens; the per-layer
    folder is refused without its code and needs nothing but it."""
    asked = [
        {"name": n, "folder": str(folder), "code": report.needs_code} for n, (_, folder, report) in exported.items()
    ]
    answers, found = read_elsewhere(tmp_path / "reader", asked)
    assert answers["sparsmith was imported"] is False
    for name, (model, _, report) in exported.items():
        assert "fault" not in answers[name], answers[name]
        assert report.needs_code == (name == "per-layer")
        assert not answers[name].get("opened without its code")
        assert not any(answers[name][kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        ours = probe_logits(model)
        for read in READ:
            assert (found[f"{name}/{read}"] - ours[read]).abs().max() <= 1e-4
        ids = probes()["plain"]["input_ids"]
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert torch.equal(found[f"{name}/greedy"], greedy)
    assert answers["mistral"]["class"] == "MistralForCausalLM" and answers["padded"]["class"] == "LlamaForCausalLM"
    source = (exported["per-layer"][1] / "modeling_sparsmith_slim.py").read_text().splitlines()
    assert not [line for line in source if line.strip().startswith(("import sparsmith", "from sparsmith."))]


@pytest.mark.long
@pytest.mark.parametrize("name", SHAPES)
def test_every_form_proves_itself(exported, name, tmp_path):
    form, changes = SHAPES[name]
    report = export(gated(**changes), tmp_path / "out", form=form)
    assert report.proof["passed"] and report.proof["value"] <= 1e-5


def test_a_settled_folder_is_exported_again_with_its_accounting(exported, tmp_path):
    _, folder, first = exported["per-layer"]
    report = export(folder, tmp_path / "again", dtype="bfloat16", proof=False)
    assert report.accounting["deletable"] == first.accounting["deletable"]
    assert report.accounting["measured"]["bytes"] < first.accounting["measured"]["bytes"]
    assert report.conversion["max_logit_difference"] > 0


def test_an_accounting_that_the_files_do_not_bear_out_is_no_export(tmp_path):
    settled = sm.settle(gated())
    settle_report(settled).tables["finegates"]["accounting"]["deletable"]["removed"] += 1
    with pytest.raises(ExportMismatch, match="69,633 less, as `finegates` says"):
        export(settled, tmp_path / "out", proof=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes", [{}, {"num_attention_heads": 8, "num_key_value_heads": 4}], ids=["llama", "mistral"]
)
def test_experts_around_a_cut_ffn_are_in_the_accounting(tmp_path, changes):
    experts = sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8, lora={"enabled": False})
    base = pico_model(num_hidden_layers=4, **changes)
    model = gated(base=base, config=[experts, EIGHT], heads=None, groups=(3 if changes else 1,) * 4)
    report = export(model, tmp_path / "out", proof=False)
    assert report.form == "uniform" and report.model_type == "sparsmith_pesc"
    again = sm.load(tmp_path / "out")
    assert again.config.base_config.model_type == ("mistral" if changes else "llama")
    assert (logits(again) - logits(model)).abs().max() <= 1e-4
    with pytest.raises(LayoutMismatch, match="another method's own class"):
        export(model, tmp_path / "other", form="per-layer", proof=False)


def test_the_paper_layout_has_its_columns_and_one_form(tmp_path):
    model = sm.craft(pico_model(), FineGatesConfig(layout="paper"), proof=False)
    ffn = anatomy.ffn_of(anatomy.blocks(model)[0])
    for block in anatomy.blocks(model):
        anatomy.ffn_of(block).down_proj.columns.logit.data[:32] = -3.0
    assert type(ffn.down_proj).__name__ == "PaperLinear"
    with pytest.raises(LayoutMismatch, match="the paper's layout"):
        export(model, tmp_path / "zeros", form="zeros", proof=False)
    wanted = logits(model)
    account = export(model, tmp_path / "out", proof=False).accounting
    assert account["counted"]["removed"] == 2 * 32 * 64 and account["deletable"]["removed"] == 2 * 32 * 3 * 64
    assert (logits(sm.load(tmp_path / "out")) - wanted).abs().max() <= 1e-4


def test_an_edited_form_is_seen(exported, tmp_path):
    shutil.copytree(exported["padded"][1], tmp_path / "copy")
    edit_json(tmp_path / "copy" / "sparsmith.json", lambda data: data.update(form="uniform"))
    with pytest.raises(CheckpointMismatch, match=r"form.*(uniform.*padded|padded.*uniform)"):
        sm.load(tmp_path / "copy")


def test_times_are_taken_only_where_asked_for(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "WARM_UP", 1)
    taken = timing.latency(
        sm.load(exported["uniform"][1]),
        exported["uniform"][2].accounting["dense_config"],
        new_tokens=2,
        runs=3,
        context=8,
    )
    for kind in ("prefill_ms", "decode_ms"):
        for one in ("model", "dense"):
            assert 0 < taken[kind][one]["p10"] <= taken[kind][one]["median"] <= taken[kind][one]["p90"]
    assert taken["runs"] == 3 and taken["batch"] == 1 and taken["context"] == 8 and taken["dtype"] == "float32"
    assert "latency" not in exported["uniform"][2].accounting["measured"] and timing.RUNS >= 20
    monkeypatch.setattr(timing, "latency", lambda *args, **kwargs: taken)
    report = export(exported["uniform"][1], tmp_path / "timed", measure=True, proof=False)
    assert accounting.columns(tmp_path / "timed")["measured"]["latency"]["runs"] == 3
    assert "measured decode" in str(report) and "batch 1, context 8" in str(report)


def test_what_was_not_pruned_cannot_be_measured_or_described(tmp_path):
    model = sm.craft(pico_model(), sm.PescConfig(num_experts=2, top_k=1, adapter_dim=8), proof=False)
    with pytest.raises(MethodError, match="nothing was deleted"):
        export(model, tmp_path / "out", measure=True, proof=False)
    with pytest.raises(LayoutMismatch, match="deci"):
        export(model, tmp_path / "out", deci=True, proof=False)


def test_deci_is_a_file_beside_the_weights(tmp_path):
    config = FineGatesConfig(target=0.7, gates={"attention": "none", "blocks": True}, settle={"unit": 256})
    model = gated(units=(256, 512, 512, 256), config=config, intermediate_size=512)
    export(model, tmp_path / "out", deci=True, proof=False)
    data = json.loads((tmp_path / "out" / "deci_config.json").read_text())
    assert len(data["block_configs"]) == 4
    durable.verify_folder(tmp_path / "out")


def test_a_delta_with_gates_is_strict_before_and_after_the_choice(tmp_path):
    save_base(tmp_path / "base", num_hidden_layers=4)
    base = sm.load_base(_settings(tmp_path / "base"))
    config = FineGatesConfig(target=0.7, settle={"unit": 16}, lora=LoraSettings(r=4, alpha=8))
    learned = sm.craft(base, config, proof=False)
    generator = torch.Generator().manual_seed(3)
    for parameter in learned.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    hard = sm.craft(base, config, proof=False)
    hard.load_state_dict(learned.state_dict())
    config_parts = hard.sparsmith.parts[0]
    config_parts[0].settle(hard, config_parts[1])
    for name, model in (("learned", learned), ("hard", hard)):
        sm.save(model.eval(), tmp_path / name)
        again = sm.load(tmp_path / name)
        assert torch.equal(logits(again), logits(model))
        assert {k: v.tolist() for k, v in again.state_dict().items() if k.endswith("kept")} == {
            k: v.tolist() for k, v in model.state_dict().items() if k.endswith("kept")
        }
        sm.save(again, tmp_path / f"{name}-full", full=True)
        full = sm.load(tmp_path / f"{name}-full")
        assert (logits(full) - logits(hard)).abs().max() <= 1e-4
        assert verify(tmp_path / f"{name}-full")
    with pytest.raises(CheckpointMismatch):
        sm.load(tmp_path / "learned", base=pico_model(num_hidden_layers=4, seed=9))


def _settings(folder, **options):
    from sparsmith.recipe.schema import ModelSettings

    return ModelSettings(path=str(folder), **options)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # bitsandbytes on a CPU
def test_a_4_bit_base_is_cut_on_its_dequantised_weights(tmp_path):
    pytest.importorskip("bitsandbytes")
    save_base(tmp_path / "base", num_hidden_layers=4)
    model = gated(base=sm.load_base(_settings(tmp_path / "base", quant="nf4")))
    report = export(model, tmp_path / "out", proof=False)
    assert report.settle["dequantised"] == 28 and report.settle["dequantise"]["max_logit_difference"] > 0
    assert report.accounting["deletable"]["removed"] == 69632
    again = sm.load(tmp_path / "out")
    assert again.dtype == torch.float32 and "quantization_config" not in again.config.to_dict()
    gap = report.settle["dequantise"]["max_logit_difference"]
    assert (logits(again) - logits(model)).abs().max() <= 3 * gap + 1e-3
