"""Spec 5, test 13: a published layout becomes ours and computes the published formula."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import sparsmith as sm
from sparsmith.errors import CheckpointError, CheckpointMismatch, SparsmithError, UsageError
from sparsmith.exporting.camelidae import import_camelidae
from tests.kit.pico import pico_ids, pico_model


def published(folder, *, experts=8, k=2, scale=0.25, dim=8, form="sharded", drop=(), **config):
    """A folder as `hywu/Camelidae-*`: Llama weights and adapters in shards, model_type "llama"."""
    base = pico_model("llama", seed=5)
    hidden = base.config.hidden_size
    generator = torch.Generator().manual_seed(11)
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for layer in range(base.config.num_hidden_layers):
        home = f"model.layers.{layer}.mlp.moe_adapter"
        state[f"{home}.router.weight"] = torch.randn(experts, hidden, generator=generator)
        for i in range(experts):
            state[f"{home}.experts.expert_{i}.adapter_down.weight"] = (
                torch.randn(dim, hidden, generator=generator) * 0.5
            )
            state[f"{home}.experts.expert_{i}.adapter_up.weight"] = torch.randn(hidden, dim, generator=generator) * 0.5
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    data = json.loads(base.config.to_json_string(use_diff=False))
    data.pop("rope_parameters")
    data |= {"moe_dtype": "bfloat16", "moe_scaling": scale, "num_experts": experts, "topk": k, "adapter_dim": dim}
    data |= {
        "output_router_logits": False,
        "auto_map": {"AutoConfig": "configuration_camelidae.CamelidaeConfig"},
        **config,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if key not in drop}))
    write(folder, state, form)
    return base, state


def write(folder, state, form):
    names = sorted(state)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    suffix = "bin" if form == "bin" else "safetensors"
    stem = "pytorch_model" if form == "bin" else "model"
    files = [f"{stem}-{i + 1:05d}-of-00002.{suffix}" for i in range(2)]
    for file, part in zip(files, halves, strict=True):
        tensors = {name: state[name] for name in part}
        torch.save(tensors, folder / file) if form == "bin" else save_file(tensors, folder / file)
    weight_map = {name: file for file, part in zip(files, halves, strict=True) for name in part}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def reference_logits(base, state, k, scale):
    """The published formula, token by token: h = FFN(x); y = h + s * sum over the top k of softmax(z_I)_i U_i gelu(D_i h)."""
    for layer, block in enumerate(base.model.layers):
        home = f"model.layers.{layer}.mlp.moe_adapter"

        def forward(x, ffn=block.mlp.forward, home=home):
            h = ffn(x)
            y = h.clone()
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    z = state[f"{home}.router.weight"] @ x[b, t]
                    chosen = z.topk(k).indices
                    gates = z[chosen].softmax(0)
                    for gate, i in zip(gates, chosen.tolist(), strict=True):
                        down = state[f"{home}.experts.expert_{i}.adapter_down.weight"]
                        up = state[f"{home}.experts.expert_{i}.adapter_up.weight"]
                        y[b, t] += scale * gate * (up @ F.gelu(down @ h[b, t]))
            return y

        block.mlp.forward = forward
    with torch.no_grad():
        return base(pico_ids()).logits


@pytest.mark.parametrize(
    "experts, k, scale, form",
    [(8, 2, 0.25, "sharded"), (16, 4, 1.0, "sharded"), (8, 2, 1.0, "bin"), (16, 4, 0.25, "bin")],
)
def test_the_formula_of_the_publication(tmp_path, experts, k, scale, form):
    base, state = published(tmp_path / "in", experts=experts, k=k, scale=scale, form=form)
    import_camelidae(tmp_path / "in", tmp_path / "out")
    model = sm.load(tmp_path / "out")
    expected = reference_logits(base, state, k, scale)
    assert (expected - pico_model("llama", seed=5)(pico_ids()).logits).abs().max() > 0.02
    assert (model(pico_ids()).logits - expected).abs().max() <= 1e-5
    config = model.sparsmith.configs[0]
    assert (config.num_experts, config.top_k, config.adapter_scale, config.adapter_dim) == (experts, k, scale, 8)
    assert model.config.base_config.rope_parameters["rope_theta"] == 10000.0


def test_figures_that_no_tensor_tells_must_be_given(tmp_path):
    published(tmp_path / "in", drop=("moe_scaling", "topk", "adapter_dim"))
    with pytest.raises(UsageError, match="adapter_scale"):
        import_camelidae(tmp_path / "in", tmp_path / "out", top_k=2)
    with pytest.raises(UsageError, match="top_k"):
        import_camelidae(tmp_path / "in", tmp_path / "out", adapter_scale=1.0)
    import_camelidae(tmp_path / "in", tmp_path / "out", adapter_scale=1.0, top_k=2, adapter_dim=8, rope_theta=5e6)
    model = sm.load(tmp_path / "out")
    assert model.config.base_config.rope_parameters["rope_theta"] == 5e6
    assert model.sparsmith.configs[0].adapter_scale == 1.0


def test_figures_that_contradict_are_refused(tmp_path):
    published(tmp_path / "in", rope_theta=1e6)
    out = tmp_path / "out"
    for wrong, kind in (
        ({"adapter_scale": 1.0}, UsageError),
        ({"top_k": 1}, UsageError),
        ({"rope_theta": 1e4}, UsageError),
        ({"adapter_dim": 16}, CheckpointMismatch),
    ):
        with pytest.raises(kind, match=next(iter(wrong)) if kind is UsageError else "as the tensors have it"):
            import_camelidae(tmp_path / "in", out, **wrong)
    assert not out.exists()


def test_a_base_known_for_another_rotary_base_needs_it_said(tmp_path):
    from sparsmith.exporting.camelidae import _rope

    yi = {"hidden_size": 7168, "num_hidden_layers": 60, "num_key_value_heads": 8}
    with pytest.raises(UsageError, match="Yi-34B"):
        _rope(tmp_path, yi, None)
    assert _rope(tmp_path, yi, 5e6) == 5e6 and _rope(tmp_path, {**yi, "rope_theta": 5e6}, None) == 5e6
    assert _rope(tmp_path, {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}, None) == 10000.0


def edit(folder, change, form="sharded"):
    import shutil

    _, state = published(folder)
    shutil.rmtree(folder / "x", ignore_errors=True)
    change(state)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    write(folder, state, form)


HOME = "model.layers.1.mlp.moe_adapter"
EDITS = {
    "a lost expert half": lambda s: s.pop(f"{HOME}.experts.expert_3.adapter_up.weight"),
    "a lost router": lambda s: s.pop(f"{HOME}.router.weight"),
    "an unknown part": lambda s: s.update({f"{HOME}.shared.weight": torch.ones(1)}),
    "an unknown tensor": lambda s: s.update({"model.extra.weight": torch.ones(1)}),
    "a lost base tensor": lambda s: s.pop("model.layers.0.mlp.up_proj.weight"),
    "a wider expert": lambda s: s.update({f"{HOME}.experts.expert_1.adapter_down.weight": torch.ones(16, 64)}),
    "a reshaped base tensor": lambda s: s.update({"model.norm.weight": torch.ones(65)}),
    "no experts": lambda s: [s.pop(name) for name in list(s) if "moe_adapter" in name],
    "a NaN": lambda s: s[f"{HOME}.router.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("name", EDITS)
def test_damage_is_told(tmp_path, name):
    edit(tmp_path / "in", EDITS[name])
    with pytest.raises(SparsmithError):
        import_camelidae(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.system, (f"touch {self.target}",))


def test_a_pickle_that_wants_to_run_is_refused(tmp_path):
    published(tmp_path / "in", form="bin")
    file = next((tmp_path / "in").glob("*.bin"))
    torch.save({"model.norm.weight": Bomb(tmp_path / "ran")}, file)
    with pytest.raises(CheckpointError, match="could run code"):
        import_camelidae(tmp_path / "in", tmp_path / "out")
    file.write_bytes(pickle.dumps({"model.norm.weight": Bomb(tmp_path / "ran")}))
    with pytest.raises(CheckpointError, match="could run code"):
        import_camelidae(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../stolen.safetensors", "/etc/hosts", "a/../../b.safetensors", 7])
def test_an_index_that_leads_out_is_refused(tmp_path, name):
    published(tmp_path / "in")
    index = tmp_path / "in" / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"]["model.norm.weight"] = name
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError):
        import_camelidae(tmp_path / "in", tmp_path / "out")


def test_experts_alone_need_their_base(tmp_path):
    base, state = published(tmp_path / "in")
    for old in (tmp_path / "in").glob("model*"):
        old.unlink()
    write(tmp_path / "in", {name: t for name, t in state.items() if "moe_adapter" in name}, "sharded")
    with pytest.raises(UsageError, match="base"):
        import_camelidae(tmp_path / "in", tmp_path / "out")
    base.save_pretrained(tmp_path / "base")
    import_camelidae(tmp_path / "in", tmp_path / "out", base=tmp_path / "base")
    assert (sm.load(tmp_path / "out")(pico_ids()).logits - reference_logits(base, state, 2, 0.25)).abs().max() <= 1e-5
