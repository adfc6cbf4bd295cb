import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sparsmith import anatomy
from sparsmith.anatomy.four_bit import hold_as_read
from sparsmith.methods.base import CraftContext
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.method import PESC
from sparsmith.methods.pesc.modeling import SparsmithPescConfig, SparsmithPescForCausalLM
from tests.kit.pico import FAMILIES, pico_ids, pico_model, randomize_adapters

SMALL = PescConfig(num_experts=4, top_k=2, adapter_dim=16)


def crafted(family="llama", config=SMALL, **changes):
    model = PESC.craft(pico_model(family, **changes), config, CraftContext())
    randomize_adapters(model)
    return model


def logits_of(model, ids=None):
    with torch.no_grad():
        return model(input_ids=pico_ids() if ids is None else ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_and_loading_keeps_every_bit(family, tmp_path):
    model = crafted(family)
    model.save_pretrained(tmp_path)
    loaded = SparsmithPescForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert loaded.settings == model.settings
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "sparsmith_pesc" and written["base_config"]["model_type"] == family
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is embedding) == model.base.config.tie_word_embeddings


def test_loading_in_bf16_keeps_float32_experts(tmp_path):
    crafted().save_pretrained(tmp_path)
    loaded = SparsmithPescForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kinds = {name: p.dtype for name, p in loaded.named_parameters()}
    assert all((kind == torch.float32) == (".pesc." in name) for name, kind in kinds.items())
    assert loaded.dtype == torch.bfloat16


def test_rope_base_is_in_the_nested_config(tmp_path):
    """F6."""
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0}
    model = crafted(rope_parameters=rope)
    model.save_pretrained(tmp_path)
    loaded = SparsmithPescForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert loaded.base.config.rope_parameters["rope_theta"] == 5_000_000.0
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_config_and_dense_weights_alone_are_neutral(family):
    """F4: the neutral start lives in the constructor, not in a training script."""
    dense = pico_model(family)
    config = PESC.craft(pico_model(family), SMALL, CraftContext()).config
    config._attn_implementation = "eager"
    built = SparsmithPescForCausalLM._from_config(config).eval()
    assert all(p.abs().max() == 0 for n, p in built.named_parameters() if n.endswith("pesc.up"))
    assert all(p.abs().max() > 0 for n, p in built.named_parameters() if n.endswith(("down", "router.weight")))
    names = {n.replace("mlp.ffn.", "mlp."): p for n, p in built.base.named_parameters() if ".pesc." not in n}
    with torch.no_grad():
        for name, weight in dense.named_parameters():
            names.pop(name).copy_(weight)
    assert not names and torch.equal(logits_of(built), logits_of(dense))


def test_missing_expert_weights_start_neutral_and_are_reported(tmp_path):
    model = crafted()
    model.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    save_file({n: w for n, w in held.items() if ".pesc." not in n}, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, info = SparsmithPescForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert len([n for n in info["missing_keys"] if ".pesc." in n]) == 6
    assert torch.equal(logits_of(loaded), logits_of(pico_model()))


def test_a_plain_dense_loader_does_not_take_it_for_dense(tmp_path):
    """F5."""
    crafted().save_pretrained(tmp_path)
    code = "from transformers import AutoModelForCausalLM as A; import sys; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "sparsmith_pesc" in done.stderr


@pytest.mark.parametrize(
    ("family", "router"),
    [
        *((f, "learned") for f in FAMILIES),
        *((f, r) for f in ("llama", "gpt2", "gemma3_text") for r in ("random", "hash")),
    ],
)
def test_generation_with_and_without_a_cache(family, router):
    model = crafted(family, PescConfig(num_experts=4, top_k=2, adapter_dim=16, router=router))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = pico_ids(2, 7)
    whole = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(model.generate(ids, **settings), whole)
    left = torch.nn.functional.pad(ids, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (3, 0))
    assert torch.equal(model.generate(left, attention_mask=mask, **settings)[:, 3:], whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_finds_the_shared_ffn_and_leaves_experts_alone(family):
    model = crafted(family)
    row = anatomy.of(model.config)
    before = logits_of(model)
    model.add_adapter(
        LoraConfig(target_modules=[*row.attention_linears, *row.ffn_linears], r=4, fan_in_fan_out=row.conv1d)
    )
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n and ".pesc." not in n for n in names)
    assert len([n for n in names if f".{row.ffn}.ffn." in n]) == 2 * 2 * len(row.ffn_linears)
    assert torch.equal(logits_of(model), before) and isinstance(model, SparsmithPescForCausalLM)


def test_all_linear_of_peft_does_not_touch_the_router():
    model = crafted()
    model.add_adapter(LoraConfig(target_modules="all-linear", r=4))
    assert not [n for n, _ in model.named_parameters() if ".pesc." in n and "lora" in n]


def test_the_outer_config_speaks_for_the_base():
    model = crafted()
    config = model.config
    assert isinstance(config, SparsmithPescConfig)
    assert config.get_text_config() is model.base.config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (128, 64, 2)
    assert model.get_input_embeddings() is model.base.get_input_embeddings()
    assert model.get_decoder() is model.base.model
    copied = SparsmithPescConfig(**json.loads(config.to_json_string()))
    assert copied.base_config.to_dict() == config.base_config.to_dict() and copied.pesc == config.pesc


def test_resizing_embeddings_reaches_the_base():
    model = crafted()
    model.resize_token_embeddings(130)
    assert model.base.get_input_embeddings().weight.shape[0] == 130
    assert model.get_output_embeddings().weight.shape[0] == 130


def test_nf4_base_is_neutral_and_trains(tmp_path):
    """Spec test 1 for a 4-bit base; F8's ground: the base stays what it was while the experts train."""
    pytest.importorskip("bitsandbytes")
    pico_model().save_pretrained(tmp_path)
    quant = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quant, dtype=torch.bfloat16).eval()
    hold_as_read(base)
    ids = pico_ids()
    expected = logits_of(base, ids)
    model = PESC.craft(base, SMALL, CraftContext())
    assert type(model.base.model.layers[0].mlp.ffn.gate_proj).__name__ == "Linear4bit"
    assert torch.equal(logits_of(model, ids), expected)
    model.requires_grad_(False)
    for tensors in PESC.roles(model, SMALL).values():
        for _, parameter in tensors:
            assert parameter.dtype == torch.float32
            parameter.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if n.endswith("pesc.up"))
