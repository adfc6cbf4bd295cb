"""Spec 4.7 and test 7: a depth cut out is an ordinary checkpoint that computes what the parent's exit does, to the bit."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import sparsmith as sm
from sparsmith import anatomy, durable
from sparsmith.cli import main
from sparsmith.crafting.slices import at_depth, depths_of
from sparsmith.crafting.tensors import content_hash, file_rows
from sparsmith.errors import CheckpointMismatch, MethodError, UsageError
from sparsmith.exporting import verify
from sparsmith.methods.base import LoraSettings
from tests.kit.checkpoints import edit_json
from tests.kit.depths import FAMILIES, LAYERS, deep_model, exits_for
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import pico_ids

LORA = LoraSettings(r=4, alpha=8)


def soft_model(family="llama", base=None, **settings):
    """As after tuning: what trains has moved a little."""
    exits = settings.pop("exits", exits_for(family))
    model = sm.craft(base or deep_model(family), sm.SoftConfig(exits=exits, **settings), proof=False).eval()
    stream = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=stream) * 0.02)
    return model


def logits(model):
    with torch.no_grad():
        return model(pico_ids(3, 20, seed=8), use_cache=False).logits


def stock(folder):
    """As a stranger opens it, strictly, with the attention that the pico models have."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_depth_of_every_family(family, tmp_path):
    model = soft_model(family)
    report = sm.export(model, tmp_path / "out", depths="all", proof=False)
    depths = exits_for(family)
    assert [one.slice["depth"] for one in report] == list(depths)
    for depth, one in zip(depths, report):
        folder = tmp_path / "out" / f"depth-{depth}"
        opened, ours = stock(folder), at_depth(model, depth)
        assert (logits(opened) - logits(ours)).abs().max() == 0.0
        config = json.loads((folder / "config.json").read_text())
        assert config.get("num_hidden_layers", config.get("n_layer")) == depth
        assert not config.get("layer_types") or len(config["layer_types"]) == depth
        shape = anatomy.shape_of(opened.config)
        held = sum(torch.Size(shape_).numel() for shape_, _ in file_rows(folder).values())
        assert shape.total_params == held == sum(p.numel() for p in opened.parameters()) == one.parameters["total"]
        greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(opened.generate(pico_ids(), **greedy), ours.generate(pico_ids(), **greedy))
        again = sm.load(folder)
        assert depths_of(again) == tuple(n for n in depths if n <= depth)
        assert torch.equal(logits(again), logits(ours))
        for inner in depths_of(again):
            assert torch.equal(logits(at_depth(again, inner)), logits(at_depth(model, inner)))
    assert len(anatomy.blocks(model)) == LAYERS and model.config.num_hidden_layers == LAYERS


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_merged_lora_is_in_the_slice(family, tmp_path):
    model = soft_model(family, tune="lora", lora=LORA)
    report = sm.export(model, tmp_path / "out", depth=2, proof=False)
    settled = sm.settle(copy.deepcopy(model))
    assert torch.equal(logits(stock(tmp_path / "out")), logits(at_depth(settled, 2)))
    assert report.settle["merged"] and report.slice["parent"] == content_hash(settled.state_dict().items())
    assert any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_slice_of_a_frozen_trunk_has_the_exits_own_block(family, tmp_path):
    base = deep_model(family)
    model = soft_model(family, base, trunk="frozen")
    for depth, one in zip(exits_for(family), sm.export(model, tmp_path / "out", depths="all", proof=False)):
        folder = tmp_path / "out" / f"depth-{depth}"
        opened = stock(folder)
        assert torch.equal(logits(opened), logits(at_depth(model, depth)))
        blocks = depth if depth == LAYERS else depth + 1
        assert len(anatomy.blocks(opened)) == opened.config.num_hidden_layers == one.slice["blocks"] == blocks
        again = sm.load(folder)
        assert again.sparsmith.configs == () and again.sparsmith.slice.depth == depth
        assert again.sparsmith.slice.configs[0]["trunk"] == "frozen" and depths_of(again) == (blocks,)
        assert torch.equal(logits(again), logits(opened))
        verify(folder)
        sm.save(again, tmp_path / f"saved-{depth}", full=True)
        assert torch.equal(logits(sm.load(tmp_path / f"saved-{depth}")), logits(opened))


def test_the_full_depth_of_a_frozen_trunk_is_the_base_to_the_bit(tmp_path):
    base = deep_model()
    report = sm.export(soft_model(base=base, trunk="frozen"), tmp_path / "out", proof=False)
    assert "what other exits own is left out" in str(report) and not report.elsewhere()
    found = stock(tmp_path / "out").state_dict()
    assert found.keys() == base.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_slice_with_a_head_of_its_own(family, tmp_path):
    model = soft_model(family, arm="ict")
    sm.export(model, tmp_path / "out", depth=2, proof=False)
    opened = stock(tmp_path / "out")
    assert torch.equal(logits(opened), logits(at_depth(model, 2)))
    assert not torch.equal(opened.get_output_embeddings().weight, model.get_output_embeddings().weight)


def test_a_slice_proves_itself_and_says_what_it_is(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    model = soft_model()
    model.generation_config.max_length = 77
    report = sm.export(model, tmp_path / "out", depth=2, tokenizer=tokenizer)
    assert report.proof["passed"] and report.proof["bitwise"] and report.proof["value"] == 0.0
    assert report.proof["class"] == "LlamaForCausalLM" and not report.needs_code
    cut = json.loads((tmp_path / "out" / "config.json").read_text())["sparsmith"]["slice"]
    assert cut == json.loads((tmp_path / "out" / "sparsmith.json").read_text())["slice"]
    parent = content_hash(model.state_dict().items())
    assert (cut["depth"], cut["of"], cut["exits"], cut["parent"]) == (2, 4, [1, 2, 3, 4], parent)
    said, written = str(report), (tmp_path / "out" / "README.md").read_text()
    for text in (said, written):
        assert "no early exit" in text and "--speculative-config" in text and "--model-draft" in text
        assert "assistant_model=draft" in text and "Exit 2 of 4 blocks" in text
    assert parent in written and "Sorted" not in written.splitlines()[0]
    assert json.loads(json.dumps(report.as_dict()))["elsewhere"]["vLLM, alone"] == f"vllm serve {tmp_path / 'out'}"
    opened = stock(tmp_path / "out")
    assert opened.generation_config.max_length == 77
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    durable.verify_folder(tmp_path / "out")
    draft, full = opened, model
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = pico_ids(1, 6)
    assert torch.equal(full.generate(ids, assistant_model=draft, **asked), full.generate(ids, **asked))


def test_an_edited_place_of_the_cut_is_seen(tmp_path):
    sm.export(soft_model(), tmp_path / "out", depth=2, proof=False)
    edit_json(tmp_path / "out" / "sparsmith.json", lambda data: data["slice"].update(depth=3))
    with pytest.raises(CheckpointMismatch, match=r"slice\.depth"):
        sm.load(tmp_path / "out")


def test_number_types_and_every_fault_before_anything_is_written(tmp_path):
    model = soft_model(exits=(2, 4))
    report = sm.export(model, tmp_path / "half", depth=2, dtype="bfloat16", proof=False)
    kinds = {dtype for _, dtype in file_rows(tmp_path / "half").values()}
    assert kinds == {"bfloat16"} and report.conversion["max_logit_difference"] > 0
    with pytest.raises(MethodError, match="one of 2, 4"):
        sm.export(model, tmp_path / "out", depth=3)
    with pytest.raises(MethodError, match="one of 2, 4"):
        sm.export(model, tmp_path / "out", depths=[2, 3])
    with pytest.raises(UsageError, match="Drop one"):
        sm.export(model, tmp_path / "out", depth=2, depths="all")
    with pytest.raises(UsageError, match="at least one"):
        sm.export(model, tmp_path / "out", depths=[])
    plain = sm.craft(deep_model(), sm.PescConfig(num_experts=2, adapter_dim=8), proof=False)
    with pytest.raises(MethodError, match="depth-elastic"):
        sm.export(plain, tmp_path / "out", depths="all")
    assert not (tmp_path / "out").exists()


def test_the_full_depth_of_a_shared_trunk_is_exported_as_ever(tmp_path):
    model = soft_model()
    report = sm.export(model, tmp_path / "out", proof=False)
    assert report.slice is None and "slice" not in json.loads((tmp_path / "out" / "sparsmith.json").read_text())
    assert depths_of(sm.load(tmp_path / "out")) == (1, 2, 3, 4)
    named = sm.export(model, tmp_path / "named", depth=4, proof=False)
    assert named.slice["depth"] == 4 and torch.equal(logits(stock(tmp_path / "named")), logits(model))


def test_the_command_line_cuts_a_checkpoint(tmp_path, capsys):
    deep_model().save_pretrained(tmp_path / "base")
    char_tokenizer().save_pretrained(tmp_path / "base")
    from sparsmith.crafting.base_model import load_base
    from sparsmith.recipe.schema import ModelSettings

    base = load_base(ModelSettings(path=str(tmp_path / "base")))
    sm.save(soft_model(base=base), tmp_path / "delta")
    line = ["export", str(tmp_path / "delta"), str(tmp_path / "two"), "--depth", "2", "--no-proof"]
    assert main(line) == 0
    assert "vllm serve" in (said := capsys.readouterr().out) and "no early exit" in said
    assert main(["export", str(tmp_path / "delta"), str(tmp_path / "each"), "--all", "--no-proof", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [one["slice"]["depth"] for one in told["slices"]] == [1, 2, 3, 4]
    assert main(["export", str(tmp_path / "delta"), str(tmp_path / "all"), "--all", "--no-proof"]) == 0
    said = capsys.readouterr().out
    assert "depth" in said and "blocks" in said and "depth-4" in said
    assert (tmp_path / "each" / "depth-3" / "tokenizer.json").is_file()
    assert torch.equal(logits(sm.load(tmp_path / "two")), logits(sm.load(tmp_path / "each" / "depth-2")))
    assert main([*line[:2], str(tmp_path / "x"), "--depth", "9"]) != 0
    assert main([*line[:2], str(tmp_path / "x"), "--depth", "2", "--all"]) != 0
