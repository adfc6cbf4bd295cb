"""Spec 5, tests 10 and 11: what is saved comes back bit for bit, and any edit is refused with both values."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import sparsmith as sm
from sparsmith import durable
from sparsmith.crafting.checkpoint import find_checkpoint
from sparsmith.errors import CheckpointError, CheckpointMismatch, MethodError
from tests.kit.checkpoints import DELTA, IDENTITY, LORA_FILE, crafted, edit_json, edit_tensors, save_base, set_path
from tests.kit.pico import pico_ids, pico_model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """base/, delta/ and full/ of one model, and its logits."""
    home = tmp_path_factory.mktemp("home")
    model = crafted(save_base(home / "base"), adapter_scale=0.3)
    sm.save(model, home / "delta")
    sm.save(model, home / "full", full=True)
    torch.save({"logits": model(pico_ids()).logits.detach()}, home / "logits.pt")
    return home


@pytest.fixture
def copy_of(home, tmp_path):
    def make(name):
        shutil.copytree(home / name, tmp_path / name)
        return tmp_path / name

    return make


def logits_of(home):
    return torch.load(home / "logits.pt", weights_only=True)["logits"]


def test_delta_comes_back_bit_for_bit(home):
    again = sm.load(home / "delta")
    assert torch.equal(again(pico_ids()).logits, logits_of(home))
    assert not again.training and again.sparsmith.configs[0].adapter_scale == 0.3
    assert any(p.requires_grad for p in again.parameters())
    files = {path.name for path in (home / "delta").iterdir()}
    assert files == {DELTA, LORA_FILE, "adapter_config.json", IDENTITY, "manifest.json"}


def test_full_comes_back_as_the_settled_model(home):
    again = sm.load(home / "full")
    settled = sm.settle(sm.load(home / "delta"))
    assert torch.equal(again(pico_ids()).logits, settled(pico_ids()).logits)
    assert (again(pico_ids()).logits - logits_of(home)).abs().max() < 1e-5
    assert not [name for name, _ in again.named_parameters() if "lora" in name]
    config = json.loads((home / "full" / "config.json").read_text())
    assert config["model_type"] == "sparsmith_pesc" and config["base_config"]["rope_parameters"]["rope_theta"]
    assert (
        config["pesc"]["num_experts"] == 4 and config["pesc"]["top_k"] == 2 and config["pesc"]["adapter_scale"] == 0.3
    )


def test_every_trained_tensor_is_in_the_delta(home):
    model = sm.load(home / "delta")
    rows = json.loads((home / "delta" / IDENTITY).read_text())["tensors"]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(rows) == len(trained)
    assert {row["role"] for row in rows.values()} == {"adapter", "router", "lora"}


def test_a_control_round_trips_and_its_full_form_is_stock(home, tmp_path):
    model = crafted(home / "base", control="dense_lora")
    sm.save(model, tmp_path / "delta")
    assert torch.equal(sm.load(tmp_path / "delta")(pico_ids()).logits, model(pico_ids()).logits)
    sm.save(model, tmp_path / "full", full=True)
    assert not list((tmp_path / "full").glob("*.py"))
    assert json.loads((tmp_path / "full" / "config.json").read_text())["model_type"] == "llama"
    assert (sm.load(tmp_path / "full")(pico_ids()).logits - model(pico_ids()).logits).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT's own
def test_peft_alone_reads_the_lora_of_a_stock_control(home, tmp_path):
    from peft import PeftModel

    model = crafted(home / "base", control="dense_lora")
    sm.save(model, tmp_path / "delta")
    theirs = PeftModel.from_pretrained(pico_model("llama"), tmp_path / "delta").eval()
    assert (theirs(pico_ids()).logits - model(pico_ids()).logits).abs().max() < 1e-6  # eager here, sdpa there


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi3"])
def test_other_families_round_trip(tmp_path, family):
    model = crafted(save_base(tmp_path / "base", family))
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta")
    assert torch.equal(again(pico_ids()).logits, model(pico_ids()).logits)
    sm.save(again, tmp_path / "full", full=True)
    settled = sm.settle(again)
    assert torch.equal(sm.load(tmp_path / "full")(pico_ids()).logits, settled(pico_ids()).logits)


def test_a_bfloat16_base_keeps_float32_experts(tmp_path):
    from sparsmith.crafting.base_model import load_base
    from sparsmith.recipe.schema import ModelSettings

    save_base(tmp_path / "base")
    base = load_base(ModelSettings(path=str(tmp_path / "base"), dtype="bfloat16"))
    model = sm.craft(base, sm.PescConfig(num_experts=2, adapter_dim=8))
    sm.save(model, tmp_path / "delta")
    sm.save(model, tmp_path / "full", full=True)
    for name in ("delta", "full"):
        again = sm.load(tmp_path / name)
        assert again.base.model.layers[0].mlp.pesc.router.weight.dtype == torch.float32
        assert again.base.lm_head.weight.dtype == torch.bfloat16
        assert torch.equal(again.eval()(pico_ids()).logits, model.eval()(pico_ids()).logits)


EDITS = {
    "configs.0.num_experts": 8,
    "configs.0.top_k": 1,
    "configs.0.adapter_dim": 24,
    "configs.0.adapter_scale": 0.25,
    "configs.0.layers": [0],
    "configs.0.adapter_activation": "silu",
    "configs.0.router": "hash",
    "configs.0.lora.r": 8,
    "configs.0.lora.alpha": 16,
    "base.fast_hash": "0" * 64,
    "base.full_hash": "0" * 64,
    "base.quant": "nf4",
    "base.dtype": "bfloat16",
    "base.config.rope_parameters": {"rope_theta": 5e6, "rope_type": "default"},
    "frozen_hash": "0" * 64,
    "seed": 7,
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("path", EDITS)
def test_an_edited_setting_is_refused_with_both_values(copy_of, path, sealed):
    delta = copy_of("delta")
    before = (delta / "manifest.json").read_bytes()
    edit_json(delta / IDENTITY, lambda data: set_path(data, path, EDITS[path]))
    if not sealed:
        (delta / "manifest.json").write_bytes(before)
    with pytest.raises(CheckpointMismatch) as fault:
        sm.load(delta)
    last = str(EDITS[path]).strip("[]{}")[:8]
    assert (
        path.split(".")[-1] in fault.value.where or "rope_theta" in fault.value.where or "layers" in fault.value.where
    )
    assert last in fault.value.found or "rope" in path
    assert fault.value.expected != fault.value.found


def test_both_copies_edited_alike_still_meet_the_tensors(copy_of):
    """A forger who edits the header too is stopped where shapes tell (E, r, layers)."""
    from safetensors.torch import load_file, save_file

    for path, value in (("num_experts", 8), ("adapter_dim", 24), ("layers", [0])):
        delta = copy_of("delta")
        data = json.loads((delta / IDENTITY).read_text())
        data["configs"][0][path] = value
        core = {key: item for key, item in data.items() if key not in ("tensors", "model_config_json")}
        save_file(
            load_file(delta / DELTA), delta / DELTA, {"format": "pt", "sparsmith": json.dumps(core, sort_keys=True)}
        )
        edit_json(delta / IDENTITY, lambda old, new=data: old.update(new))
        with pytest.raises(CheckpointMismatch):
            sm.load(delta)
        shutil.rmtree(delta)


@pytest.mark.parametrize(
    "path, value", [("pesc.top_k", 1), ("pesc.adapter_scale", 1.0), ("base_config.vocab_size", 256)]
)
def test_an_edited_config_of_a_full_checkpoint_is_refused(copy_of, path, value):
    full = copy_of("full")
    edit_json(full / "config.json", lambda data: set_path(data, path, value))
    with pytest.raises(CheckpointMismatch) as fault:
        sm.load(full)
    assert path in fault.value.where and str(value) in fault.value.found


@pytest.mark.parametrize("path, value", [("num_experts", 8), ("top_k", 1), ("adapter_scale", 1.0), ("adapter_dim", 8)])
def test_an_edited_record_of_a_full_checkpoint_is_refused(copy_of, path, value):
    full = copy_of("full")
    edit_json(full / IDENTITY, lambda data: data["configs"][0].update({path: value}))
    with pytest.raises(CheckpointMismatch, match=f"configs.0.{path}: found {value}"):
        sm.load(full)


def test_settings_that_ask_for_more_than_memory_are_refused_first(copy_of):
    """Forged in every place alike: nothing is allocated before the counts are held against the files."""
    from safetensors.torch import load_file, save_file

    delta, full = copy_of("delta"), copy_of("full")
    data = json.loads((delta / IDENTITY).read_text())
    data["configs"][0]["num_experts"] = 10**12
    core = {key: item for key, item in data.items() if key not in ("tensors", "model_config_json")}
    save_file(load_file(delta / DELTA), delta / DELTA, {"sparsmith": json.dumps(core)})
    edit_json(delta / IDENTITY, lambda old: old.update(data))
    with pytest.raises(CheckpointMismatch, match="as the files hold"):
        sm.load(delta)
    edit_json(full / "config.json", lambda data: set_path(data, "base_config.num_hidden_layers", 10**9))
    edit_json(full / IDENTITY, lambda data: set_path(data, "model_config_json.base_config.num_hidden_layers", 10**9))
    with pytest.raises(CheckpointMismatch, match="as the files hold"):
        sm.load(full)


def test_another_base_is_refused(home, tmp_path):
    other = save_base(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointMismatch, match="hash"):
        sm.load(home / "delta", base=other)
    with pytest.raises(CheckpointMismatch, match="hash"):
        sm.load(home / "delta", base=pico_model("llama", seed=1))
    wider = tmp_path / "rope"
    shutil.copytree(home / "base", wider)
    config = json.loads((wider / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 5e6
    (wider / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointMismatch, match="rope_theta"):
        sm.load(home / "delta", base=wider)
    with pytest.raises(CheckpointMismatch, match="dtype"):
        sm.load(home / "delta", base=pico_model("llama").bfloat16())


def test_a_base_that_moved_is_found_by_argument(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "moved")
    delta = tmp_path / "delta"
    model = crafted(tmp_path / "moved")
    sm.save(model, delta)
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base=FOLDER"):
        sm.load(delta)
    assert torch.equal(sm.load(delta, base=tmp_path / "elsewhere")(pico_ids()).logits, model(pico_ids()).logits)
    base = pico_model("llama")
    names = list(base.state_dict())
    eager = sm.load(delta, base=base)
    assert (eager(pico_ids()).logits - model(pico_ids()).logits).abs().max() < 1e-5
    assert list(base.state_dict()) == names


def test_a_base_in_memory_is_known_by_its_tensors(tmp_path):
    model = sm.craft(pico_model("llama"), sm.PescConfig(num_experts=2, adapter_dim=8))
    sm.save(model, tmp_path / "delta")
    with pytest.raises(CheckpointError, match="lay in no folder"):
        sm.load(tmp_path / "delta")
    assert torch.equal(
        sm.load(tmp_path / "delta", base=pico_model("llama"))(pico_ids()).logits, model.eval()(pico_ids()).logits
    )
    with pytest.raises(CheckpointMismatch, match="frozen_hash"):
        sm.load(tmp_path / "delta", base=pico_model("llama", seed=1))


def test_a_flip_late_in_a_big_base_is_seen_by_the_full_check(home, tmp_path):
    """The fast hash ends a MiB into a shard; here it is shortened to show what the full one is for."""
    shutil.copytree(home / "base", tmp_path / "base")
    file = next((tmp_path / "base").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointMismatch, match="hash"):
        sm.load(home / "delta", base=tmp_path / "base", check="full")


def test_nan_is_never_saved(home, tmp_path):
    model = crafted(home / "base")
    with torch.no_grad():
        model.base.model.layers[1].mlp.pesc.up[0, 0, 0] = float("nan")
    for full in (False, True):
        with pytest.raises(CheckpointError, match="NaN"):
            sm.save(model, tmp_path / "out", full=full)
    assert list(tmp_path.iterdir()) == []


def test_a_settled_model_is_saved_whole_only(home, tmp_path):
    model = sm.settle(crafted(home / "base"))
    with pytest.raises(MethodError, match="full=True"):
        sm.save(model, tmp_path / "out")
    with pytest.raises(MethodError, match="fold_scale"):
        sm.save(crafted(home / "base"), tmp_path / "out", fold_scale=True)


def test_fold_scale_moves_s_into_the_weights(home, tmp_path):
    model = crafted(home / "base", adapter_scale=0.3)
    sm.save(model, tmp_path / "folded", full=True, fold_scale=True)
    again = sm.load(tmp_path / "folded")
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["pesc"]["adapter_scale"] == 1.0
    assert again.sparsmith.configs[0].adapter_scale == 1.0
    assert (again(pico_ids()).logits - sm.settle(model)(pico_ids()).logits).abs().max() < 1e-6
    up = model.base.model.layers[0].mlp.pesc.up
    assert torch.equal(again.base.model.layers[0].mlp.pesc.up, up * 0.3)


def test_saving_leaves_the_model_in_training(home, tmp_path):
    model = crafted(home / "base").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    sm.save(model, tmp_path / "full", full=True)
    sm.save(model, tmp_path / "delta")
    assert model.training and {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.peft_config


def test_a_run_folder_means_its_model(home, tmp_path):
    shutil.copytree(home / "delta", tmp_path / "run" / "model")
    assert find_checkpoint(tmp_path / "run") == tmp_path / "run" / "model"
    with pytest.raises(CheckpointError, match=r"sparsmith\.json"):
        sm.load(tmp_path)
    with pytest.raises(CheckpointMismatch, match="base"):
        sm.load(home / "full", base=home / "base")


def test_only_the_first_process_writes(home, tmp_path, monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    sm.save(crafted(home / "base"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tensor_lost_from_both_lists_is_still_missed(copy_of):
    """The reference's merge ignored misnamed keys (strict=False): here the crafted model itself says what must be there."""
    delta = copy_of("delta")
    name = "base.model.layers.1.mlp.pesc.router.weight"
    edit_tensors(delta / DELTA, lambda tensors: tensors.pop(name))
    edit_json(delta / IDENTITY, lambda data: data["tensors"].pop(name))
    with pytest.raises(CheckpointMismatch, match=r"router\.weight: found no such tensor"):
        sm.load(delta)


def test_the_lora_file_is_neither_optional_nor_welcome_by_chance(copy_of, home):
    delta = copy_of("delta")
    (delta / "adapter_config.json").unlink()
    durable.seal(delta)
    with pytest.raises(CheckpointMismatch, match="no LoRA"):
        sm.load(delta)
    (delta / LORA_FILE).unlink()
    durable.seal(delta)
    with pytest.raises(CheckpointMismatch, match="no such tensor"):
        sm.load(delta)


def test_newer_formats_and_foreign_files_are_told(copy_of):
    delta = copy_of("delta")
    edit_json(delta / IDENTITY, lambda data: data.update(format_version=99))
    with pytest.raises(CheckpointError, match="newer sparsmith"):
        sm.load(delta)
    edit_json(delta / IDENTITY, lambda data: data.update(format_version=1, surprise=1))
    with pytest.raises(CheckpointMismatch, match="surprise"):
        sm.load(delta)
