from __future__ import annotations

import json

import pytest
import torch

from sparsmith import durable
from sparsmith.errors import CheckpointError, CheckpointMismatch, ProofError
from sparsmith.training.state import TREE, parameter_names, read_state, write_state


def stepped(optimizer_class=torch.optim.AdamW, **options):
    """(model, optimiser after two steps, schedule)."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = optimizer_class(model.parameters(), lr=0.1 + 0.2, **options)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (3 + step))
    for _ in range(2):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, optimizer, schedule


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_what_is_read_is_what_was_written(tmp_path, optimizer_class):
    model, optimizer, schedule = stepped(optimizer_class)
    names = parameter_names(model, optimizer)
    assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
    written = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    write_state(tmp_path, written, names=names, facts={"seconds": 0.1, "tokens": 7})
    found, facts = read_state(tmp_path, names=names)
    assert facts == {"seconds": 0.1, "tokens": 7}
    assert found["schedule"] == written["schedule"]
    assert found["optimizer"]["param_groups"] == written["optimizer"]["param_groups"], (
        "tuples and floats to the last bit"
    )
    assert found["optimizer"]["state"].keys() == written["optimizer"]["state"].keys()
    for number, state in written["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(found["optimizer"]["state"][number][key]), torch.as_tensor(value))


def test_a_state_of_other_parameters_is_refused_by_name(tmp_path):
    model, optimizer, _ = stepped()
    write_state(tmp_path, {"optimizer": optimizer.state_dict()}, names=parameter_names(model, optimizer), facts={})
    with pytest.raises(CheckpointMismatch, match=r"`1\.bias` stands on one side only"):
        read_state(tmp_path, names=["0.weight", "0.bias", "1.weight"])
    with pytest.raises(CheckpointMismatch, match="another order"):
        read_state(tmp_path, names=["0.bias", "0.weight", "1.weight", "1.bias"])


def test_nothing_non_finite_is_written(tmp_path):
    _, optimizer, _ = stepped()
    next(iter(optimizer.state.values()))["exp_avg"][0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="exp_avg"):
        write_state(tmp_path, {"optimizer": optimizer.state_dict()}, names=[], facts={})
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_object_that_json_cannot_hold_is_refused(tmp_path):
    with pytest.raises(ProofError, match="pickle"):
        write_state(tmp_path, {"schedule": {"function": print}}, names=[], facts={})


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree.update(state={"optimizer": {"$tensor": "not.there"}}),
        lambda tree: tree.update(state={"optimizer": {}}),
        lambda tree: tree.update(state=[]),
        lambda tree: tree.pop("facts"),
        lambda tree: tree.update(facts={"seconds": "1"}),
        lambda tree: tree.update(format=99),
        lambda tree: tree.update(state={"optimizer": {"$integers": {"x": 1}}}),
        lambda tree: tree.update(state={"optimizer": {"$tensor": ["a"]}}),
    ],
)
def test_a_forged_tree_is_refused(tmp_path, change):
    _, optimizer, _ = stepped()
    write_state(tmp_path, {"optimizer": optimizer.state_dict()}, names=[], facts={})
    tree = json.loads((tmp_path / TREE).read_text())
    change(tree)
    (tmp_path / TREE).write_text(json.dumps(tree))
    with pytest.raises(CheckpointError):
        read_state(tmp_path)


def test_the_marks_cannot_be_mistaken_for_keys(tmp_path):
    with pytest.raises(ProofError):
        write_state(tmp_path, {"optimizer": {"$tensor": 1}}, names=[], facts={})
    assert durable.MANIFEST not in [path.name for path in tmp_path.iterdir()]
