"""One forward of SoFT against the models that it stands for: losses, gradients, and what is held in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sparsmith as sm
from sparsmith.errors import ProofError
from sparsmith.ops.depth_loss import Distillation, Exit, depth_losses
from sparsmith.training.objective import Objective
from tests.kit.depths import FAMILIES, LAYERS, deep_model, exits_for, labelled_batch, shallow

LOSS, GRADIENT = 1e-6, 1e-5


def objective(family: str = "llama", model: Any = None, **settings: Any) -> Objective:
    exits = settings.pop("exits", exits_for(family))
    crafted = sm.craft(model or deep_model(family), sm.SoftConfig(exits=exits, **settings), proof=False)
    return Objective(crafted.train())


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def separate_runs(
    model: Any, family: str, batch: Any, omega: dict[int, float]
) -> tuple[float, dict[str, torch.Tensor]]:
    """sum_n omega_n of the stock losses of |B| truncated models, and the gradients by name."""
    total, grads = 0.0, {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for depth, weight in omega.items():
        small = shallow(model, family, depth)
        loss = weight * small(**batch, use_cache=False).loss
        loss.backward()
        total += loss.item()
        for name, parameter in small.named_parameters():
            grads[name] += parameter.grad
    return total, grads


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_is_as_many_truncated_runs(family, recomputed):
    """Spec test 1, and of the full depth test 2: no norm is applied twice."""
    model, batch = deep_model(family), labelled_batch()
    loss_of = objective(family, model, weights="linear")
    if recomputed:
        loss_of.activation_checkpointing_enable()
    found = loss_of(**batch)["loss"]
    found.backward()
    depths = exits_for(family)
    omega = {n: n / sum(depths) for n in depths}
    wanted, grads = separate_runs(model, family, batch, omega)
    assert abs(found.item() - wanted) <= LOSS
    trained = {name: p for name, p in loss_of.model.named_parameters() if p.requires_grad}
    assert set(trained) == set(grads)
    for name, parameter in trained.items():
        assert relative(parameter.grad, grads[name]) <= GRADIENT, name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_depth_alone_is_the_stock_loss(family):
    model, batch = deep_model(family), labelled_batch()
    stock = model(**batch, use_cache=False).loss.item()
    assert abs(objective(family, model, exits=(LAYERS,))(**batch)["loss"].item() - stock) <= LOSS
    assert abs(objective(family, model, arm="sft")(**batch)["loss"].item() - stock) <= LOSS


def test_the_reentrant_form_is_refused():
    with pytest.raises(ProofError, match="reentrant"):
        objective().activation_checkpointing_enable({"use_reentrant": True})


def test_a_micro_batch_without_a_label_gives_every_tensor_a_gradient_of_zero():
    loss_of, batch = objective(), labelled_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = loss_of(**batch, num_items_in_batch=7)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in loss_of.model.parameters() if p.requires_grad)


# the losses alone, on states made up here

P, D, V = 23, 16, 40


def states(
    count: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[list[torch.Tensor], Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = [torch.randn(P, D, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]
    weight = torch.nn.Parameter((torch.randn(V, D, generator=generator, dtype=torch.float64) * 0.5).to(dtype))
    return [h.requires_grad_() for h in hidden], weight, torch.randint(0, V, (P,), generator=generator)


OMEGA = (0.2, 0.3, 0.5)


def naive(hidden: Any, weight: Any, labels: Any, cap: float | None, kl: Distillation | None) -> torch.Tensor:
    """Position by position, as the formula reads."""
    full = hidden[-1] @ weight.T
    full = (full if cap is None else cap * torch.tanh(full / cap)).detach()
    total = torch.zeros((), dtype=hidden[0].dtype)
    for place, (h, omega) in enumerate(zip(hidden, OMEGA)):
        for position in range(P):
            logits = weight @ h[position]
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
            loss = logits.logsumexp(0) - logits[labels[position]]
            if kl is not None and place < len(hidden) - 1:
                t = kl.temperature
                p, q = (full[position] / t).softmax(0), (logits / t).softmax(0)
                loss = (1 - kl.weight) * loss + kl.weight * t**2 * (p * (p.log() - q.log())).sum()
            total = total + omega * loss
    return total


def ours(hidden: Any, weight: Any, labels: Any, cap: float | None, kl: Any, impl: str, chunk: int) -> tuple[Any, Any]:
    def logits(h: torch.Tensor) -> torch.Tensor:
        out = h @ weight.T
        return out if cap is None else cap * torch.tanh(out / cap)

    exits = [Exit(n, w, h, logits, (weight,), (weight,)) for n, (h, w) in enumerate(zip(hidden, OMEGA), 1)]
    full = Exit(3, 0.0, hidden[-1].detach(), logits) if kl else None
    return depth_losses(exits, labels, impl=impl, chunk=chunk, kl=kl, full=full)


@pytest.mark.parametrize("kl", [None, Distillation(0.4, 2.0)], ids=["ce", "kl"])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["bare", "softcap"])
@pytest.mark.parametrize("chunk", [1, 7, P])
@pytest.mark.parametrize("impl", ["fused", "checkpoint", "torch"])
def test_every_way_is_the_naive_loop(impl, chunk, cap, kl):
    """Spec test 3."""
    if impl == "torch" and (cap or kl):
        pytest.skip("the library's loss takes a bare head and no KL")
    hidden, weight, labels = states()
    wanted = torch.autograd.grad(naive(hidden, weight, labels, cap, kl), [*hidden, weight])
    value, losses = ours(hidden, weight, labels, cap, kl, impl, chunk)
    assert abs(value.item() / naive(hidden, weight, labels, cap, kl).item() - 1) <= GRADIENT
    for found, grad in zip(torch.autograd.grad(3 * value, [*hidden, weight]), wanted):
        assert relative(found, 3 * grad) <= GRADIENT
    bare = [
        F.cross_entropy(h @ weight.T if cap is None else cap * (h @ weight.T / cap).tanh(), labels, reduction="none")
        for h in hidden
    ]
    told = torch.stack(bare).sum(1, keepdim=True) if impl == "torch" else torch.stack(bare)
    assert torch.allclose(losses, told, rtol=1e-5, atol=1e-5) and not losses.requires_grad


@pytest.mark.parametrize("kl", [None, Distillation(0.4, 2.0), Distillation(0.3)], ids=["ce", "hot kl", "kl"])
@pytest.mark.parametrize("cap", [None, 3.0], ids=["bare", "softcap"])
@pytest.mark.parametrize("impl", ["fused", "checkpoint"])
def test_in_double_precision_it_is_the_formula(impl, cap, kl):
    hidden, weight, labels = states(dtype=torch.float64)
    wanted = naive(hidden, weight, labels, cap, kl)
    value, _ = ours(hidden, weight, labels, cap, kl, impl, 7)
    assert value.dtype == torch.float64 and abs(value.item() - wanted.item()) <= 1e-12 * abs(wanted.item())
    grads = torch.autograd.grad(wanted, [*hidden, weight])
    for found, grad in zip(torch.autograd.grad(value, [*hidden, weight]), grads):
        assert relative(found, grad) <= 1e-12


@pytest.mark.parametrize("impl", ["fused", "checkpoint"])
def test_without_a_gradient_the_value_is_the_same(impl):
    hidden, weight, labels = states()
    with torch.no_grad():
        value, _ = ours(hidden, weight, labels, None, None, impl, 7)
    assert abs(value.item() - ours(hidden, weight, labels, None, None, impl, 7)[0].item()) <= 1e-4


def test_states_without_a_gradient_get_none_and_a_frozen_head_keeps_still():
    hidden, weight, labels = states()
    weight.requires_grad_(False)
    hidden[0].requires_grad_(False)
    exits = [Exit(n, w, h, lambda x: x @ weight.T) for n, (h, w) in enumerate(zip(hidden, OMEGA), 1)]
    value, _ = depth_losses(exits, labels, impl="fused", chunk=7)
    value.backward()
    assert hidden[0].grad is None and weight.grad is None and hidden[1].grad.any()


@pytest.mark.parametrize("impl", ["fused", "checkpoint", "torch"])
def test_positions_without_a_label_change_nothing(impl):
    """Dropped before norm and head: other tokens there, and other padding, give the same bits of the loss."""
    model, batch = deep_model(), labelled_batch()
    first = objective(model=model, ce={"impl": impl})(**batch)["loss"]
    wider = {name: torch.cat([t, t.new_zeros(3, 5) - (100 if name == "labels" else 0)], 1) for name, t in batch.items()}
    assert abs(objective(model=model, ce={"impl": impl})(**wider)["loss"].item() - first.item()) <= LOSS
    kept = batch["labels"][:, 1:].ne(-100)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][kept]
    only = objective(model=model, exits=(LAYERS,), ce={"impl": impl})(**batch)["loss"].item()
    assert abs(only - F.cross_entropy(logits, batch["labels"][:, 1:][kept]).item()) <= LOSS


@pytest.mark.parametrize("impl", ["fused", "torch", "checkpoint"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_way_trains_the_same_model(family, impl):
    if family == "gemma2" and impl == "torch":
        with pytest.raises(ProofError, match="more than one matrix"):
            objective(family, ce={"impl": impl})(**labelled_batch())
        return
    grads = []
    for settings in ({"impl": impl, "chunk": 5}, {}):
        loss_of = objective(family, ce=settings)
        loss_of(**labelled_batch())["loss"].backward()
        grads.append({name: p.grad for name, p in loss_of.model.named_parameters() if p.requires_grad})
    for name, grad in grads[0].items():
        assert relative(grad, grads[1][name]) <= GRADIENT, name


class Largest(TorchDispatchMode):
    """Every tensor that an operation makes, by number of elements; views of older memory are passed over."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.sizes.append(tensor.numel())
        return out


def largest_made(exits: int, impl: str, chunk: int, kl: bool) -> int:
    """Elements of the largest tensor that forward and backward make."""
    positions, hidden, vocab = 256, 8, 512
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(vocab, hidden, generator=generator))
    labels = torch.randint(0, vocab, (positions,), generator=generator)
    given = [torch.randn(positions, hidden, generator=generator).requires_grad_() for _ in range(exits)]
    made = [Exit(n, 1 / exits, h, lambda x: x @ weight.T, (weight,), (weight,)) for n, h in enumerate(given, 1)]
    distil = Distillation(0.5) if kl else None
    full = Exit(exits, 0.0, given[-1].detach(), lambda x: x @ weight.T) if kl else None
    with Largest() as seen:
        depth_losses(made, labels, impl=impl, chunk=chunk, kl=distil, full=full)[0].backward()
    return max(seen.sizes)


@pytest.mark.parametrize("kl", [False, True], ids=["ce", "kl"])
@pytest.mark.parametrize("impl", ["fused", "checkpoint"])
def test_no_tensor_is_larger_than_the_logits_of_a_chunk(impl, kl):
    """Spec test 4: chunk x vocabulary, the states, the head's gradient, and nothing that grows with the exits."""
    chunk = 16
    for exits in (2, 8):
        assert largest_made(exits, impl, chunk, kl) <= max(chunk * 512, 512 * 8, 256 * 8), exits


def live_bytes(exits: int, impl: str) -> int:
    """The largest sum of bytes that are alive at once beside what was there before, by weak references to storages."""
    positions, hidden, vocab, chunk = 128, 8, 512, 16
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(vocab, hidden, generator=generator))
    labels = torch.randint(0, vocab, (positions,), generator=generator)
    given = [torch.randn(positions, hidden, generator=generator).requires_grad_() for _ in range(exits)]
    made = [Exit(n, 1 / exits, h, lambda x: x @ weight.T, (weight,)) for n, h in enumerate(given, 1)]
    before = {t.untyped_storage()._cdata for t in (weight, labels, *given)}
    alive: dict[int, int] = {}
    peak = 0

    class Live(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key = storage._cdata
                    if key not in before and key not in alive:
                        alive[key] = storage.nbytes()
                        weakref.finalize(storage, alive.pop, key, None)
            peak = max(peak, sum(alive.values()))
            return out

    with Live():
        depth_losses(made, labels, impl=impl, chunk=chunk)[0].backward()
    return peak


@pytest.mark.parametrize("impl", ["fused", "checkpoint"])
def test_more_exits_cost_their_states_alone(impl):
    state, logits = 128 * 8 * 4, 16 * 512 * 4
    two, eight = live_bytes(2, impl), live_bytes(8, impl)
    # of each exit the gradient of its state and the losses by position; a chunk's logits are there once
    assert 0 < eight - two <= 6 * (state + 4 * 128) + 4096
    assert eight <= 4 * logits + 512 * 8 * 4 + 8 * state + 4096
