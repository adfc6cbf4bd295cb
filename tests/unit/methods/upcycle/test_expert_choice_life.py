"""Expert choice from its settings to its export: what is refused, what is kept, what is told."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

import sparsmith as sm
from sparsmith.crafting.apply import trained_roles
from sparsmith.crafting.delta import method_state
from sparsmith.crafting.record import record_of
from sparsmith.errors import LayoutMismatch, MethodError, NonCausalRouter, SparsmithError
from sparsmith.exporting.model_card import count_parameters
from sparsmith.methods.upcycle import choosing
from sparsmith.methods.upcycle.method import UPCYCLE
from sparsmith.methods.upcycle.modeling import SparsmithEcForCausalLM
from tests.kit.choice import DONORS, choosing_config, choosing_model, fitted
from tests.kit.pico import pico_config, pico_ids, pico_model
from tests.kit.rows import RowDataset, pad_rows
from tests.kit.two_ranks import StopAt

# settings

CHOICE = {"router": "expert_choice"}


@pytest.mark.parametrize(
    "moe, told",
    [
        ({"ec": {"ema": 0.5}}, "moe.*ec.*router expert_choice"),
        ({**CHOICE, "combine": "switch"}, "combine.*tokens choose"),
        ({**CHOICE, "combine": "straight_through"}, "combine.*tokens choose"),
        ({**CHOICE, "capacity_factor": 1.25}, "capacity_factor.*tokens choose"),
        ({**CHOICE, "second_expert_drop": True}, "second_expert_drop.*tokens choose"),
        ({**CHOICE, "balance_coef": 0.01}, "balance_coef.*0: every expert"),
        ({**CHOICE, "balance_norm": "slots"}, "balance_norm"),
        ({**CHOICE, "ec": {"capacity_factor": 0.5}}, "greater than or equal to 1"),
        ({**CHOICE, "ec": {"capacity_factor": 9.0}}, "at most experts, which is 8"),
        ({**CHOICE, "ec": {"ema": 1.0}}, "less than 1"),
        ({**CHOICE, "ec": {"train_select": "all"}}, "top_c"),
    ],
)
def test_settings_without_effect_are_refused(moe, told):
    with pytest.raises(ValidationError, match=f"(?s){told}"):
        sm.UpcycleConfig(moe=moe)


def test_top_k_means_nothing():
    with pytest.raises(ValidationError, match=r"(?s)top_k.*moe\.ec\.capacity_factor"):
        sm.UpcycleConfig(top_k=1, moe=CHOICE)


def test_the_balance_weight_is_0_by_itself_and_stays_so():
    config = sm.UpcycleConfig(moe=CHOICE)
    assert config.moe.balance_coef == 0.0 and config.moe.loss_weights == {"router_z": 0.001}
    assert sm.UpcycleConfig.model_validate(config.model_dump(mode="json")) == config
    assert sm.UpcycleConfig(moe={**CHOICE, "balance_coef": 0.0}) == config
    assert sm.UpcycleConfig().moe.balance_coef == 0.01


# the plan


@pytest.mark.parametrize("family", DONORS)
@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_plan_counts_the_mean(family, factor):
    config = choosing_config(ec={"capacity_factor": factor})
    plan = sm.plan(pico_config(family), config)
    model = sm.craft(pico_model(family), config)
    one_expert = 3 * 64 * 96
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    assert plan.total_params - plan.active_params == round(2 * (4 - factor) * one_expert)
    counted = count_parameters(model)
    assert (counted["total"], counted["active"]) == (plan.total_params, plan.active_params)
    router, extra = 2 * 2 * 4 * 64, 2 * 2 * round((factor - 1) * one_expert)
    gate = 2 * 2 * 64 if model.base.config.model_type == "qwen2_moe" else 0
    assert plan.flops.forward - plan.flops.base_forward == router + extra + gate
    assert any(f"{factor:g} experts take a token on average" in note for note in plan.notes)
    found = {role: sum(p.numel() for _, p in tensors) for role, tensors in trained_roles(model).items()}
    assert found == plan.trained


# what is kept


def steps(folder, stop=6, **moe):
    model = sm.craft(pico_model("llama"), choosing_config(ec={"ema": 0.9}, **moe), seed=1)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    tuner = sm.Tuner(
        model=model, args=args, train_dataset=RowDataset(80), data_collator=pad_rows, callbacks=[StopAt(stop)]
    )
    tuner.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    return model, [line for line in tuner.state.log_history if "loss" in line]


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole, log = steps(tmp_path / "whole", jitter=0.05)
    steps(tmp_path / "cut", stop=3, jitter=0.05)
    again, rest = steps(tmp_path / "cut", jitter=0.05)
    wanted, found = method_state(whole), method_state(again)
    assert len([name for name in wanted if name.endswith("thresholds")]) == 2
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert [line["loss"] for line in rest[-3:]] == [line["loss"] for line in log[-3:]]
    assert {"term/upcycle.router_z", "health/upcycle/disagreement", "health/upcycle/without_taker"} <= log[-1].keys()
    assert "term/upcycle.balance" not in log[-1] and "health/upcycle/balance" not in log[-1]


@pytest.mark.parametrize("family", DONORS)
def test_a_delta_comes_back(family, tmp_path):
    model, ids = fitted(choosing_model(family, apart=1.0, router=5.0)), pico_ids()
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=pico_model(family))
    assert type(again) is SparsmithEcForCausalLM
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_delta_of_an_unfitted_model_is_unfitted(tmp_path):
    sm.save(choosing_model(), tmp_path / "delta")
    with pytest.raises(NonCausalRouter):
        sm.load(tmp_path / "delta", base=pico_model("llama"))(input_ids=pico_ids())


def test_frozen_routers_keep_their_thresholds_moving(tmp_path):
    model = fitted(choosing_model(freeze_gate=True))
    assert "router" not in trained_roles(model)
    sm.save(model, tmp_path / "delta")
    again = sm.load(tmp_path / "delta", base=pico_model("llama"))
    for (_, one), (_, two) in zip(model.sparse_blocks(), again.sparse_blocks(), strict=True):
        assert (one.gate.thresholds > 0).all() and torch.equal(one.gate.thresholds, two.gate.thresholds)


# the export


@pytest.mark.parametrize("family", DONORS)
def test_the_folder_opens_elsewhere_with_its_own_file(family, tmp_path):
    model, ids = fitted(choosing_model(family, apart=1.0, loud=5.0, router=5.0)), pico_ids()
    report = sm.export(model, tmp_path / "out")
    assert report.model_type == "sparsmith_ec" and report.needs_code
    assert report.proof["passed"] and report.proof["value"] <= 1e-5 and report.proof["refused_without_code"] is True
    assert report.proof["class"] == "SparsmithEcForCausalLM"
    assert any("No stock architecture computes it" in caution for caution in report.cautions)
    loaded = sm.load(tmp_path / "out")
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_rounded_export_keeps_what_decides(tmp_path):
    model = fitted(choosing_model(apart=1.0, router=5.0))
    sm.export(model, tmp_path / "out", dtype="bfloat16", proof=False)
    loaded = sm.load(tmp_path / "out")
    kinds = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert {kind for name, kind in kinds.items() if ".gate." in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if ".gate." not in name} == {torch.bfloat16}
    for (_, one), (_, two) in zip(model.sparse_blocks(), loaded.sparse_blocks(), strict=True):
        assert torch.equal(one.gate.thresholds, two.gate.thresholds)
    assert loaded(input_ids=pico_ids()).logits.dtype == torch.bfloat16


def test_a_file_without_thresholds_is_unfitted(tmp_path):
    """transformers fills in what a file lacks; what it fills in here must not pass for thresholds."""
    sm.export(fitted(choosing_model()), tmp_path / "out", proof=False)
    file = tmp_path / "out" / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if "thresholds" not in n}, file, {"format": "pt"})
    loaded, info = SparsmithEcForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert len(info["missing_keys"]) == 2
    with pytest.raises(NonCausalRouter):
        loaded(input_ids=pico_ids())


def test_a_stock_form_is_refused_by_name(tmp_path):
    model = fitted(choosing_model())
    with pytest.raises(LayoutMismatch, match="router expert_choice, which no stock architecture computes"):
        sm.export(model, tmp_path / "out", form="uniform")
    with pytest.raises(MethodError, match="router expert_choice, which no stock architecture computes"):
        UPCYCLE.settled_config(choosing_config(), pico_config("llama"))
    assert not list(tmp_path.iterdir())


def test_a_model_of_the_own_type_is_no_donor():
    model = fitted(choosing_model())
    for config in (choosing_config(), sm.UpcycleConfig(donor="sparse"), sm.UpcycleConfig(donor="sparse", moe=CHOICE)):
        with pytest.raises(SparsmithError, match="already"):
            sm.craft(model, config)


def test_a_mixture_can_be_tuned_on_by_expert_choice():
    """Its tokens chose before, so its function moves, and that is told."""
    mixture = sm.settle(sm.craft(pico_model("llama"), sm.UpcycleConfig(experts=4)))
    config = sm.UpcycleConfig(donor="sparse", moe=CHOICE)
    plan = sm.plan(mixture.config, config)
    model = sm.craft(mixture, config)
    assert "router expert_choice on a mixture of token choice" in record_of(model).neutral["check"]
    assert plan.total_params == sum(p.numel() for p in model.parameters())
    assert type(mixture).__name__ == "MixtralForCausalLM" and mixture(input_ids=pico_ids()).logits.shape
    assert fitted(model)(input_ids=pico_ids()).logits.isfinite().all()


# health


def test_figures_are_those_of_the_window():
    model = fitted(choosing_model(router=40.0), batches=1).train()
    config = choosing_config()
    UPCYCLE.metrics(model, config)
    with torch.no_grad():
        model(input_ids=pico_ids(2, 12))
    UPCYCLE.after_forward(model, config)
    found = UPCYCLE.metrics(model, config)
    assert len(found["table/disagreement"]) == 2 and 0 < found["disagreement"] == max(found["table/disagreement"]) < 1
    assert (
        2.0 <= found["experts_per_token"] < 2.5
    )  # C is 6 of 12 tokens for each of 4 experts, and tokens of none have one
    assert abs(found["experts_per_token"] - 2.0 - found["without_taker"]) < 1e-9
    assert abs(found["load_max"] - 1) < 0.2 and "evaluation chooses otherwise" in UPCYCLE.health(found)
    assert UPCYCLE.metrics(model, config) == {}


def test_disagreement_above_a_tenth_is_told_once(capsys):
    from sparsmith.training.callbacks.health import Health

    told = choosing.warnings({"table/layers": [1, 3], "table/disagreement": [0.05, 0.2]})
    assert (
        list(told) == ["disagreement 3"]
        and "in block 3" in told["disagreement 3"]
        and "20.0%" in told["disagreement 3"]
    )
    model = fitted(choosing_model(router=40.0), batches=1)
    health = Health(model)
    for seed in (1, 2):
        model.train()(input_ids=pico_ids(2, 12, seed=seed))
        for _, ffn in model.sparse_blocks():
            ffn.gate.thresholds.fill_(0.9)
        model.train()(input_ids=pico_ids(2, 12, seed=seed))
        figures = health.take()
        assert figures["upcycle/disagreement"] > 0.1
    printed = capsys.readouterr().out
    assert printed.count("warning: upcycle: in block 0") == 1 and printed.count("warning: ") == 2


def test_the_dry_step_leaves_no_thresholds():
    from sparsmith.training.callbacks.dry_step import _undone

    model = choosing_model()
    with _undone(model):
        model.train()(input_ids=pico_ids())
        UPCYCLE.after_forward(model, choosing_config())
        assert all((ffn.gate.thresholds > 0).all() for _, ffn in model.sparse_blocks())
    assert all((ffn.gate.thresholds < 0).all() for _, ffn in model.sparse_blocks())
