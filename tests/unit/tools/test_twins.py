"""Pre-trained twins at pico size: the same tokens, equal compute, routers that learn and spread, folders that stock classes open."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import base_loop
import base_twins
import pytest
import torch
import train_base
from base_twins import Routers, Shape
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsmith.embedded import base_path
from tests.unit.tools.texts import documents, held_out

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")

KINDS = (None, "top1", "top2")
PICO = Shape(hidden=32, layers=2, heads=2, kv_heads=1, ffn=32, context=32, experts=4)
STEPS = 40


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_path())


def train(out: Path, kind: str | None, steps: int = STEPS, *more: str) -> dict:
    """The facts of one twin, trained by the script's own verb."""
    sizes = [word for name, value in asdict(PICO).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    chosen = ["--sparse", kind] if kind else []
    line = ["twin", "--out", str(out), "--steps", str(steps), "--rows-per-domain", "2", *sizes, *chosen, *more]
    threads = torch.get_num_threads()
    try:
        train_base.main(line)
    finally:
        torch.set_num_threads(threads)
    return json.loads((out / base_twins.FACTS).read_text())


def ids(seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 2048, (4, PICO.context), generator=torch.Generator().manual_seed(seed))


def test_three_twins_by_one_verb(no_files, tmp_path, tokenizer):
    facts = {kind: train(tmp_path / str(kind), kind) for kind in KINDS}

    assert len({told["stream_sha256"] for told in facts.values()}) == 1
    rows = base_loop.Rows(documents(0), tokenizer, 0, PICO.context)
    digest = ""
    for step in range(STEPS):
        digest = base_loop.digest_after(digest, rows.batch(step, 2))
    assert facts[None]["stream_sha256"] == digest
    assert {told["tokens"] for told in facts.values()} == {STEPS * 6 * PICO.context}

    for kind, told in facts.items():
        assert told["curve"][-1]["step"] == STEPS
        assert told["curve"][-1]["loss"] < told["curve"][0]["loss"], kind
        assert not (tmp_path / str(kind) / "checkpoint.pt").exists()
        assert all(0 < value < 5 for value in told["held_out_bits_per_char"].values())
    for kind in ("top1", "top2"):
        assert facts[kind]["curve"][-1]["unused"] == 0, "every expert got tokens in the last 20 steps"
        assert {"balance", "z", "busiest"} <= facts[kind]["curve"][-1].keys()
        shares = torch.tensor(facts[kind]["held_out_expert_shares"])
        assert shares.shape == (PICO.layers, PICO.experts)
        assert torch.allclose(shares.sum(dim=1), torch.ones(PICO.layers), atol=1e-3)  # written with four digits

    for kind, name in zip(KINDS, ("LlamaForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM")):
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path / str(kind), dtype="auto", output_loading_info=True)
        assert type(model).__name__ == name == facts[kind]["architecture"]
        assert model.dtype == torch.float32
        assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
        again = AutoTokenizer.from_pretrained(tmp_path / str(kind))
        assert base_loop.measure(model, again, held_out(), PICO.context) == facts[kind]["held_out_bits_per_char"]
        assert sum(p.numel() for p in model.parameters()) == facts[kind]["parameters"]["total"]


@pytest.mark.parametrize("kind", KINDS)
def test_stock_classes_give_the_same_logits(kind, tmp_path, tokenizer):
    model = base_twins.build_model(PICO, kind, tokenizer, seed=3).eval()
    tmp_path.joinpath("twin").mkdir()
    base_twins.save_model(tmp_path / "twin", model, AutoTokenizer.from_pretrained(base_path()), PICO.context)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, model(ids()).logits)
    assert [file.name for file in tmp_path.iterdir()] == ["twin"]


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_what_a_counter_sees(kind, tokenizer):
    """The counter sees nothing of grouped and fused products, so experts and attention run in their plain forms here."""
    model = base_twins.build_model(PICO, kind, tokenizer, seed=0).eval()
    model.set_attn_implementation("eager")
    if kind:
        model.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids(), use_cache=False)
    told = base_twins.flops_per_token(PICO, kind, 2048)
    assert told["total"] == sum(value for part, value in told.items() if part != "total")
    assert counter.get_total_flops() == told["total"] * ids().numel()


def test_compute_matches_at_the_sizes_that_ship():
    dense, top1, top2 = (base_twins.flops_per_token(Shape(), kind, 2048) for kind in KINDS)
    for sparse in (top1, top2):
        assert all(sparse[part] == dense[part] for part in ("attention", "scores", "ffn", "head"))
        assert 1 < sparse["total"] / dense["total"] < 1.02


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_active_parameters_match_but_for_the_router(kind, tokenizer):
    dense = base_twins.parameters(base_twins.build_model(PICO, None, tokenizer, 0), None)
    sparse = base_twins.parameters(base_twins.build_model(PICO, kind, tokenizer, 0), kind)
    assert sparse["active"] == dense["active"] + PICO.layers * PICO.experts * PICO.hidden
    assert sparse["total"] > sparse["active"]


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_all_but_the_ffn_begins_equal(kind, tokenizer):
    dense = base_twins.build_model(PICO, None, tokenizer, seed=1).state_dict()
    model = base_twins.build_model(PICO, kind, tokenizer, seed=1)
    sparse = model.state_dict()
    common = [name for name in dense if ".mlp." not in name]
    assert all(torch.equal(dense[name], sparse[name]) for name in common)
    assert len(common) > 4 * PICO.layers
    routers = torch.cat([layer.mlp.gate.weight.detach().flatten() for layer in model.model.layers])
    assert 0.015 < routers.std() < 0.025
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert not torch.equal(experts[0], experts[1])


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_penalty_is_the_mean_of_each_layers_own_losses(kind, tokenizer):
    """Written out by loops: f counts tokens, and layers are never pooled."""
    model = base_twins.build_model(PICO, kind, tokenizer, seed=0)
    routers = Routers(model)
    decided = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda gate, given, out: decided.append((out[0].detach(), out[2])))
    model(ids(), use_cache=False)
    balance, z = 0.0, 0.0
    for logits, indices in decided:
        tokens = logits.shape[0]
        p = logits.softmax(dim=-1)
        for expert in range(PICO.experts):
            taken = sum(expert in row for row in indices.tolist()) / tokens
            balance += PICO.experts * taken * p[:, expert].mean().item() / PICO.layers
        z += sum(row.exp().sum().log().item() ** 2 for row in logits) / tokens / PICO.layers
    penalty, told = routers.penalty()
    assert penalty.item() == pytest.approx(0.01 * balance + 0.001 * z, rel=1e-5)  # float32 sums in another order
    assert told == {"balance": pytest.approx(balance, abs=1e-4), "z": pytest.approx(z, abs=1e-4)}
    penalty.backward()
    assert all(layer.mlp.gate.weight.grad.norm() > 1e-4 for layer in model.model.layers)
    with pytest.raises(AssertionError):
        routers.penalty()


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_the_language_loss_alone_reaches_routers_and_experts(kind, tokenizer):
    model = base_twins.build_model(PICO, kind, tokenizer, seed=0)
    logits = model(ids(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() > 1e-6  # a renormalised top-1 leaves 1e-8
        assert (layer.mlp.experts.gate_up_proj.grad.flatten(1).norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", ["top1", "top2"])
def test_every_trained_weight_moves_and_the_rest_stays(kind, no_files, tmp_path, tokenizer):
    before = base_twins.build_model(PICO, kind, tokenizer, seed=0)
    train(tmp_path / "twin", kind, 20)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "twin", dtype="auto").state_dict()
    for name, weight in before.named_parameters():
        still = torch.equal(weight.detach(), after[name])
        assert still == (not weight.requires_grad or not weight.numel()), name
    frozen = [name for name, weight in before.named_parameters() if not weight.requires_grad]
    assert all("shared_expert_gate" in name for name in frozen)
    assert len(frozen) == (PICO.layers if kind == "top1" else 0)


def test_a_cut_run_ends_with_the_uncut_runs_bits(no_files, tmp_path, monkeypatch):
    train(tmp_path / "whole", "top2", 20)

    class Cut(Exception):
        pass

    batch = base_loop.Rows.batch

    def until_ten(rows, step, per_domain):
        if step == 10:
            raise Cut
        return batch(rows, step, per_domain)

    with monkeypatch.context() as patch:
        patch.setattr(base_loop.Rows, "batch", until_ten)
        with pytest.raises(Cut):
            train(tmp_path / "cut", "top2", 20, "--save-minutes", "0")
    resumed = train(tmp_path / "cut", "top2", 20)
    whole = json.loads((tmp_path / "whole" / base_twins.FACTS).read_text())
    assert resumed["stream_sha256"] == whole["stream_sha256"]
    assert resumed["curve"][-1]["loss"] == whole["curve"][-1]["loss"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_muon_treats_each_expert_as_a_matrix_of_its_own():
    torch.manual_seed(0)
    stack, gradient = torch.randn(3, 8, 4), torch.randn(3, 8, 4)
    together = torch.nn.Parameter(stack.clone())
    together.grad = gradient.clone()
    base_loop.Muon([{"params": [together], "parts": 2}], lr=0.1).step()
    for expert in range(3):
        for half in (slice(0, 4), slice(4, 8)):
            alone = torch.nn.Parameter(stack[expert, half].clone())
            alone.grad = gradient[expert, half].clone()
            base_loop.Muon([alone], lr=0.1).step()
            assert torch.allclose(together[expert, half], alone, atol=1e-5)  # batched products round another way


def test_every_weight_has_one_optimiser(tokenizer):
    for kind in KINDS:
        model = base_twins.build_model(PICO, kind, tokenizer, seed=0)
        given = [
            p for o in base_loop.build_optimisers(model, 1e-3) for group in o.param_groups for p in group["params"]
        ]
        wanted = [p for p in model.parameters() if p.requires_grad and p.numel()]
        assert sorted(map(id, given)) == sorted(map(id, wanted))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--heads", "3"), "--hidden 32 is not a multiple of --heads 3"),
        (("--ffn", "20"), "--ffn 20 / 2"),
        (("--experts", "2"), "at least 3 --experts"),
    ],
)
def test_sizes_that_cannot_be_are_told(more, said, no_files, tmp_path):
    with pytest.raises(SystemExit, match=said):
        train(tmp_path / "twin", "top2", 1, *more)
    assert not (tmp_path / "twin").exists()


def test_a_folder_of_another_twin_is_not_taken_over(no_files, tmp_path):
    train(tmp_path / "twin", None, 1)
    with pytest.raises(SystemExit, match="finished"):
        train(tmp_path / "twin", "top1", 1)
