"""Tuning a mixture by LoRA: a pair of factors for every expert, routers trained whole (spec 4.2, F12, test 10)."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

import sparsmith as sm
from sparsmith import anatomy
from sparsmith.crafting.apply import check_roles, trained_roles
from sparsmith.crafting.settle import settle_report
from sparsmith.errors import CheckpointMismatch, MethodError
from sparsmith.methods.upcycle.layers import experts_of, sparse_blocks
from sparsmith.methods.upcycle.method import UPCYCLE
from sparsmith.training.objective import Objective
from tests.kit.depths import deep_model, labelled_batch
from tests.kit.pico import FFN, HIDDEN, KV_HEADS, pico_ids, pico_model
from tests.kit.rows import RowDataset, pad_rows

E, R = 4, 16
KV = KV_HEADS * 16
ATTENTION = 4 * HIDDEN + HIDDEN * 2 + KV * 2  # inputs and outputs of q, k, v, o
STACKED = E * ((HIDDEN + 2 * FFN) + (FFN + HIDDEN))
DENSE = 2 * (HIDDEN + FFN) + (FFN + HIDDEN)
ROWS = {
    "mixtral": ("llama", {}, 4),
    "qwen2_moe, every second": ("llama", {"layers": "every-2"}, 2),
    "qwen2_moe": ("qwen2", {}, 4),
    "qwen3_moe, a list": ("qwen3", {"layers": [0, 3, 2]}, 3),
    "qwen3_moe": ("qwen3", {}, 4),
    "flex_olmo": ("olmo2", {}, 4),
}


def lora(**settings):
    return sm.UpcycleConfig(**{"experts": E, "tune": "lora", **settings})


def crafted(family="llama", base=None, **settings):
    return sm.craft(base if base is not None else deep_model(family), lora(**settings))


def mixture(**changes):
    """A pre-trained mixture whose tokens all take a shared expert too, and whose first block is dense."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        **{
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts": E,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "num_attention_heads": 4,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": 128,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            **changes,
        },
    )
    set_seed(5)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def as_trained(model, seed=3):
    """Every factor that starts at zero is random."""
    stream = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.copy_(torch.randn(parameter.shape, generator=stream) * 0.05)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(pico_ids(2, 24), use_cache=False).logits


def stacks(model):
    """(block, name of the tensor, experts, (E r, in) A, (out, r E) B) of every adapted stack."""
    row, found = anatomy.anatomy_of(model), []
    for index, ffn in sparse_blocks(model):
        layer = getattr(ffn, row.experts)
        while hasattr(layer, "base_layer"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            found.append((index, layer.parameter_name, experts_of(ffn, row.experts), a, b))
            layer = layer.base_layer
    return found


def slice_of(a, b, expert, rank=R):
    """The factors of one expert: consecutive rows of A, every E-th column of B."""
    return a[expert * rank : (expert + 1) * rank], b[:, expert::E]


# what is adapted, and how it is counted


@pytest.mark.parametrize("name", ROWS)
def test_the_plan_is_what_is_built(name):
    family, settings, sparse = ROWS[name]
    model, plan = crafted(family, **settings), sm.plan(deep_model(family), lora(**settings))
    assert model.config.model_type == name.split(",")[0]
    wanted = R * (4 * ATTENTION + sparse * STACKED + (4 - sparse) * DENSE)
    assert check_roles(model) == plan.trained == {"router": sparse * E * HIDDEN, "lora": wanted}
    assert len(stacks(model)) == 2 * sparse
    for _, tensor, experts, a, b in stacks(model):
        outputs, inputs = getattr(experts, tensor).shape[1:]
        assert a.shape == (E * R, inputs) and b.shape == (outputs, R * E) and a.dtype == b.dtype == torch.float32
    assert sm.settle(model).config.model_type == model.config.model_type
    assert plan.total_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "targets, per_block, sparse, dense",
    [
        (("q_proj", "v_proj"), HIDDEN * 2 + HIDDEN + KV, 0, 0),
        (("gate_up_proj",), 0, E * (HIDDEN + 64), 0),
        (("mlp.experts.down_proj",), 0, E * (32 + HIDDEN), 0),
        (("mlp.gate_proj",), 0, 0, HIDDEN + FFN),
        (("shared_expert.up_proj",), 0, HIDDEN + 48, 0),
        (("down_proj",), 0, E * (32 + HIDDEN) + 48 + HIDDEN, FFN + HIDDEN),
        ("all-linear", ATTENTION, E * (2 * HIDDEN + 96) + 3 * (HIDDEN + 48), DENSE),
    ],
)
def test_targets_hit_what_they_name(targets, per_block, sparse, dense):
    """Two of three blocks are sparse, with a shared expert; `down_proj` is a linear of it, of the dense block, and a stack."""
    settings = {"donor": "sparse", "lora": {"r": 2, "alpha": 2, "dropout": 0.0, "targets": targets}}
    base, config = mixture(), sm.UpcycleConfig(tune="lora", **settings)
    model = sm.craft(base, config)
    assert (
        check_roles(model)["lora"] == 2 * (3 * per_block + 2 * sparse + dense) == sm.plan(base, config).trained["lora"]
    )
    assert model.sparsmith.neutral["bitwise"], "the factors' product is zero at the start"
    as_trained(model)
    assert not torch.equal(before := logits(model), logits(base))
    assert (logits(sm.settle(model)) - before).abs().max() <= 1e-5


def test_a_target_that_the_model_lacks_is_named():
    for base, settings, name in (
        (mixture(), {"donor": "sparse"}, "gate_up"),
        (deep_model("qwen2"), {}, "gate_proj"),  # every block is sparse: no linear of that name is left
        (deep_model("qwen2"), {}, "shared_expert.gate_proj"),  # it is there and empty
    ):
        config = sm.UpcycleConfig(tune="lora", lora={"r": 2, "dropout": 0.0, "targets": [name]}, **settings)
        with pytest.raises(MethodError, match=r"lora\.targets"):
            sm.craft(base, config)
        with pytest.raises(MethodError, match=r"lora\.targets"):
            sm.plan(base, config)


def test_dropout_is_refused():
    with pytest.raises(Exception, match="no dropout there"):
        lora(lora={"r": 2, "dropout": 0.1})


def test_one_seed_one_set_of_factors():
    config = lora()
    one, same, other = (sm.craft(pico_model(), config, seed=seed) for seed in (1, 1, 2))
    for (*_, a, _), (*_, b, _), (*_, c, _) in zip(stacks(one), stacks(same), stacks(other), strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert (a.reshape(E, R, -1)[0] != a.reshape(E, R, -1)[1]).all(), "experts have factors of their own"
    assert {type(one).__name__, one.config.model_type} == {"MixtralForCausalLM", "mixtral"}


def test_the_plan_tells_what_adapting_costs():
    base = deep_model()
    attention = {"lora": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": R, "alpha": 16, "dropout": 0.0}}
    every, some = (sm.plan(base, lora(**one), micro_batch=2, max_length=32) for one in ({}, attention))
    stack = E * 3 * HIDDEN * FFN
    assert (
        every.memory.activations["low"] - some.memory.activations["low"] == 5 * stack * 4
    )  # four blocks and a gradient
    one = sm.plan(base, lora(), micro_batch=2, max_length=32, gradient_checkpointing=True)
    two = sm.plan(base, lora(**attention), micro_batch=2, max_length=32, gradient_checkpointing=True)
    assert one.memory.activations["low"] - two.memory.activations["low"] == 2 * stack * 4
    # in training the gradient of the donor's FFN, once, and the sums of all experts over the 32 tokens of a forward
    extra = 4 * (2 * 3 * HIDDEN * FFN + 6 * R * stack // 32)
    assert every.flops.training - some.flops.training == extra and every.flops.forward == some.flops.forward


# training


def one_step(model, batch, optimizer):
    Objective(model.train())(**batch)["loss"].backward()
    grads = {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    UPCYCLE.after_forward(model, model.sparsmith.configs[0])
    return grads


def taken_in(model, batch):
    """Block -> the experts that tokens with a part in the loss took."""
    seen, hooks = {}, []
    for index, ffn in sparse_blocks(model):
        note = lambda m, args, out, i=index: seen.__setitem__(i, set(out[2].flatten().tolist()))  # noqa: E731
        hooks.append(ffn.gate.register_forward_hook(note))
    with torch.no_grad():
        model.eval()(batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_experts_with_tokens_learn_and_the_others_keep_their_bits(way):
    """Spec test 10. With so few tokens some experts get none."""
    model = crafted(experts=E, moe={"experts_impl": way})
    batch = labelled_batch(1, 5, padded=False)
    batch["labels"] = batch["input_ids"].clone()
    with torch.no_grad():
        for _, ffn in sparse_blocks(model):
            ffn.gate.weight[1] = -5 * ffn.gate.weight[0]  # far from the rest: rarely in the middle
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    routers = [ffn.gate.weight.detach().clone() for _, ffn in sparse_blocks(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    taken = taken_in(model, batch)
    assert any(len(experts) < E for experts in taken.values()), "the test needs an expert without tokens"
    starts = [(a.detach().clone(), b.detach().clone()) for *_, a, b in stacks(model)]
    first = one_step(model, batch, optimizer)
    for (index, name, _, a, b), (_, old) in zip(stacks(model), starts, strict=True):
        for expert in range(E):
            grad, now, was = (slice_of(a, one, expert)[1] for one in (first[id(b)], b, old))
            with_tokens = expert in taken[index]
            assert bool(grad.any()) == with_tokens, (index, name, expert)
            assert torch.equal(now, was) != with_tokens, (index, name, expert)
    second = taken_in(model, batch)
    later = one_step(model, batch, optimizer)
    for (index, name, _, a, b), (old, _) in zip(stacks(model), starts, strict=True):
        for expert in range(E):
            grad, now, was = (slice_of(one, b, expert)[0] for one in (later[id(a)], a, old))
            # the first factor's gradient passes through the second, which moved where there were tokens
            assert bool(grad.any()) == (expert in taken[index] & second[index]), (index, name, expert)
            assert torch.equal(now, was) or bool(grad.any())
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen), "the base keeps its bits"
    for (_, ffn), was in zip(sparse_blocks(model), routers, strict=True):
        assert ffn.gate.weight.dtype == torch.float32 and not torch.equal(ffn.gate.weight, was)


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm"])
def test_dropout_noise_and_capacity_reach_wrapped_experts(way):
    settings = {"expert_dropout": 0.3, "jitter": 0.05, "capacity_factor": 0.5, "experts_impl": way}
    model, plain = as_trained(crafted(moe=settings)), as_trained(crafted(moe={"experts_impl": way}))
    assert torch.equal(logits(model), logits(plain)), "evaluation knows none of it"
    objective, losses = Objective(model.train()), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(objective(**labelled_batch())["loss"].item())
        UPCYCLE.after_forward(model, model.sparsmith.configs[0])
    assert losses[0] == losses[1] != losses[2]
    torch.manual_seed(0)
    objective(**labelled_batch())["loss"].backward()
    lost = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not lost
    settled = sm.settle(model)
    assert all(type(ffn.experts).__module__.startswith("transformers.") for _, ffn in sparse_blocks(settled))
    assert (logits(settled) - logits(plain)).abs().max() <= 1e-5


def test_recomputed_activations_change_nothing():
    grads = []
    for again in (False, True):
        model = as_trained(crafted(moe={"expert_dropout": 0.2, "jitter": 0.05, "capacity_factor": 1.0})).train()
        if again:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        Objective(model)(**labelled_batch())["loss"].backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def tuned(folder, steps=12, resume=None):
    config = lora(
        lora={"r": 2, "alpha": 2, "dropout": 0.0}, moe={"expert_dropout": 0.2, "jitter": 0.05, "capacity_factor": 1.0}
    )
    model = sm.craft(pico_model("qwen3"), config, seed=3)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="steps",
        save_steps=6,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=3,
    )
    tuner = sm.Tuner(model=model, args=args, train_dataset=RowDataset(20), data_collator=pad_rows)
    tuner.train(resume_from_checkpoint=resume)
    lines = {line["step"]: line["loss"] for line in tuner.state.log_history if "loss" in line}
    return lines, {name: p.detach() for rows in trained_roles(model).values() for name, p in rows}


def test_a_resumed_run_has_the_uncut_bits(tmp_path):
    losses, weights = tuned(tmp_path / "uncut")
    again, same = tuned(tmp_path / "again", resume=str(tmp_path / "uncut" / "checkpoint-6"))
    assert all(again[step] == losses[step] for step in range(7, 13))
    assert weights.keys() == same.keys() and all(torch.equal(weights[name], same[name]) for name in weights)


# what comes out


def expected(experts, tensor, a, b, scale):
    """W + scale B A of every expert, in float64, from the definition."""
    whole = getattr(experts, tensor).detach().double().clone()
    for expert in range(E):
        own_a, own_b = slice_of(a.detach().double(), b.detach().double(), expert)
        whole[expert] += scale * own_b @ own_a
    return whole


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_stacks_are_the_sums_rounded_once(name, dtype):
    family, settings, sparse = ROWS[name]
    model = as_trained(
        crafted(base=deep_model(family).to(dtype), lora={"alpha": 24, "r": R, "dropout": 0.0}, **settings)
    )
    assert {ffn.gate.weight.dtype for _, ffn in sparse_blocks(model)} == {torch.float32}
    assert {getattr(experts, tensor).dtype for _, tensor, experts, *_ in stacks(model)} == {dtype}
    wanted = {(i, t): expected(e, t, a, b, 24 / R) for i, t, e, a, b in stacks(model)}
    before = logits(model)
    settled = sm.settle(copy.deepcopy(model))
    apart = (logits(settled) - before).abs().amax(-1)
    if dtype == torch.float32:
        assert apart.max() <= 1e-4
    else:  # a token whose second and third expert are near a tie may take the other
        assert (apart <= 0.05).float().mean() >= 0.9
    assert not [n for n, _ in settled.named_modules() if "lora" in n or "base_layer" in n]
    found = {
        (i, t): getattr(ffn.experts, t) for i, ffn in sparse_blocks(settled) for t in ("gate_up_proj", "down_proj")
    }
    assert found.keys() == wanted.keys()
    for key, tensor in found.items():
        assert tensor.dtype == dtype
        off = (tensor.double() - wanted[key]).abs()
        unit = torch.finfo(dtype).eps * wanted[key].abs()
        assert (off <= 0.5 * unit * 1.01 + 1e-7).all(), key
    rows = [row for row in settle_report(settled).merged if ".experts." in row.name]
    assert {row.name for row in rows} == {f"model.layers.{i}.mlp.experts.{t}" for i, t in wanted} and len(
        rows
    ) == 2 * sparse
    assert all(
        row.lora_share > 0.1 and row.relative_error <= (1e-6 if dtype == torch.float32 else 4e-3) for row in rows
    )


def test_the_report_of_a_merge_is_the_naive_figure():
    model = as_trained(crafted(base=deep_model().to(torch.bfloat16)))
    index, tensor, experts, a, b = stacks(model)[0]
    exact, old = expected(experts, tensor, a, b, 1.0), getattr(experts, tensor).detach().double().clone()
    settled = sm.settle(model)
    stored = getattr(sparse_blocks(settled)[0][1].experts, tensor).double()
    row = next(r for r in settle_report(settled).merged if r.name == f"model.layers.{index}.mlp.experts.{tensor}")
    assert row.relative_error == pytest.approx(((stored - exact).norm() / exact.norm()).item(), rel=1e-3)
    assert row.lora_share == pytest.approx(((exact - old).norm() / old.norm()).item(), rel=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, a list", "qwen2_moe, every second"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_delta_comes_back(name, dtype, tmp_path):
    family, settings, _ = ROWS[name]
    base = deep_model(family).to(getattr(torch, dtype))
    base.save_pretrained(tmp_path / "base")
    dense = sm.load_base(sm_settings(tmp_path / "base", dtype=dtype))
    model = as_trained(sm.craft(dense, lora(**settings)))
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta")
    theirs = dict(again.named_parameters())
    assert theirs.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(p, theirs[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(again), logits(model))
    sm.save(again, tmp_path / "full", full=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    assert type(stock).__module__.startswith("transformers.")
    assert (logits(stock) - logits(sm.settle(model))).abs().max() <= (1e-5 if dtype == "float32" else 0.02)
    names = {file.name for file in (tmp_path / "delta").iterdir()}
    assert "sparsmith_lora.safetensors" in names and "adapter_model.safetensors" not in names, (
        "PEFT would open it as less"
    )
    if (name, dtype) in (("mixtral", "bfloat16"), ("qwen2_moe, every second", "float32")):
        report = sm.export(again, tmp_path / "exported")  # opened in a clean process, and compared
        assert not report.needs_code


def test_other_factors_are_refused(tmp_path):
    base = pico_model()
    base.save_pretrained(tmp_path / "base")
    model = sm.craft(sm.load_base(sm_settings(tmp_path / "base")), lora(lora={"r": 4, "alpha": 4, "dropout": 0.0}))
    sm.save(model, tmp_path / "delta")
    other = sm.craft(sm.load_base(sm_settings(tmp_path / "base")), lora(lora={"r": 4, "alpha": 8, "dropout": 0.0}))
    from sparsmith.crafting.delta import fill_delta

    with pytest.raises(CheckpointMismatch, match="alpha"):
        fill_delta(other, tmp_path / "delta")


def sm_settings(folder, **settings):
    from sparsmith.recipe.schema import ModelSettings

    return ModelSettings(path=str(folder), **{"dtype": "float32", **settings})


def test_experts_that_choose_take_a_lora_too():
    config = sm.UpcycleConfig(experts=4, tune="lora", lora={"r": 2}, moe={"router": "expert_choice"})
    model = sm.craft(pico_model(), config)
    assert check_roles(model) == sm.plan(pico_model(), config).trained
    objective = Objective(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(3):
        objective(**labelled_batch(seed=step))["loss"].backward()
        UPCYCLE.after_forward(model, config)
        optimizer.step()
        optimizer.zero_grad()
    moved = [p.abs().max() for n, p in model.named_parameters() if ".experts." in n and ".lora_B." in n]
    assert moved and all(one > 0 for one in moved)
    ids = pico_ids()
    with torch.no_grad():
        before = model.eval()(ids).logits
        assert (sm.settle(model)(ids).logits - before).abs().max() <= 1e-4
