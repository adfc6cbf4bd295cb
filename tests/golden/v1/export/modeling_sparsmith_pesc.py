"""Model code of this checkpoint: needs torch and transformers, nothing else. Made from sparsmith.ops.routing, sparsmith.ops.balance, sparsmith.ops.adapter_experts, sparsmith.ops.cost, sparsmith.methods.pesc.layers, sparsmith.methods.pesc.modeling of
sparsmith 0.1.0.

Open the folder with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`, or, where sparsmith is
installed, with `sparsmith.load(folder)`.
"""

from __future__ import annotations

# ---- ops.routing

# Routing: which experts a token takes, and with which gates.
#
# Paper: PESC (arXiv 2401.02731), Eq 7-9: z = x W_r^T, I = top-k(z), g = softmax(z_I). No noise, no capacity, nothing is dropped.
# Differs: gates are float32 whatever the model's number type; equal logits take the lowest index; k = 1 can pass a straight-through
# gate, because a softmax over one logit is the constant 1 and never trains the router.
#
# Shapes: T tokens, E experts, K experts per token.


from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What a router decided."""

    logits: Tensor | None
    """(T, E) float32; None where no router was asked (random, hash, dense)."""
    indices: Tensor
    """(T, K) int64, distinct in a row."""
    gates: Tensor
    """(T, K) float32, in [0, 1], rows sum to 1."""


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """(T, K) indices of the k largest, largest first; equal scores take the lowest index (`torch.topk` promises no order)."""
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def route_learned(logits_TE: Tensor, k: int, *, straight_through: bool = True) -> Routing:
    """Gates are the softmax over the k chosen logits.

    k = 1 with `straight_through`: gate p / stop_gradient(p) with p the softmax over all logits; exactly 1 forward, while the
    gradient of the loss reaches the router.
    """
    indices_TK = top_k(logits_TE.detach(), k)
    if k == 1 and straight_through:
        p_TK = logits_TE.softmax(dim=-1).gather(-1, indices_TK)
        return Routing(logits_TE, indices_TK, p_TK / p_TK.detach())
    return Routing(logits_TE, indices_TK, logits_TE.gather(-1, indices_TK).softmax(dim=-1))


def _scramble(x):
    """A bijection of 32-bit words (an int, or int64 tensor; products stay below 2**63), so that near inputs look unrelated."""
    for factor in (0x7FEB352D, 0x046CA68B):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def equal_gates(indices_TK: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(T, K) gates 1/K."""
    return torch.full(indices_TK.shape, 1 / indices_TK.shape[1], dtype=dtype, device=indices_TK.device)


def route_hashed(
    keys_T: Tensor, k: int, num_experts: int, *, seed: int, layer: int, dtype: torch.dtype = torch.float32
) -> Routing:
    """k distinct experts, each equally likely, fixed by (key, seed, layer); gates 1/k.

    With positions as keys it is random routing, with token ids hash routing. It holds no state: a recomputed or cached forward takes
    the same experts.
    """
    start = _scramble(_scramble(_scramble(seed & 0xFFFFFFFF) ^ (seed >> 32 & 0xFFFFFFFF)) ^ layer)
    word_T = _scramble((keys_T.reshape(-1) & 0xFFFFFFFF) ^ start)
    experts_E = _scramble(torch.arange(1, num_experts + 1, device=keys_T.device))
    indices_TK = top_k(_scramble(word_T[:, None] ^ experts_E), k)
    return Routing(None, indices_TK, equal_gates(indices_TK, dtype))


def route_dense(
    tokens: int, num_experts: int, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Routing:
    """Every token takes every expert with gate 1/E."""
    indices_TE = torch.arange(num_experts, device=device).expand(tokens, num_experts)
    return Routing(None, indices_TE, equal_gates(indices_TE, dtype))

# ---- ops.balance

# Losses and counts that keep a router's experts in use.
#
# Paper: PESC Eq 10 (the Switch loss): L = E * sum_i f_i p_i, p_i the mean over tokens of the softmax over *all* E logits, f_i the share
# of dispatched slots, no gradient through f. Differs: padding does not count; the released code takes the softmax over the chosen logits
# only, which makes the loss a constant.
#
# Shapes: T tokens, E experts, K experts per token.


import torch
from torch import Tensor, distributed


def expert_counts(indices_TK: Tensor, num_experts: int, mask_T: Tensor | None = None) -> Tensor:
    """(E,) float32: slots that went to each expert; tokens with mask False do not count."""
    flat = indices_TK.reshape(-1)
    if mask_T is None:
        weight = torch.ones(flat.shape, device=flat.device)
    else:
        weight = mask_T.to(torch.float32)[:, None].expand(indices_TK.shape).reshape(-1)
    # a one-hot sum, because scattered additions are not deterministic on CUDA
    hot = (flat[:, None] == torch.arange(num_experts, device=flat.device)).to(torch.float32)
    return weight @ hot


def masked_mean(values_T: Tensor, mask_T: Tensor | None, tokens: Tensor | None = None) -> Tensor:
    """Mean over the first dimension, over tokens with mask True; 0 where there are none. With `tokens` given, the sum over that number:
    this rank's part of a mean over the tokens of all ranks."""
    if mask_T is None:
        return values_T.mean(dim=0) if tokens is None else values_T.sum(dim=0) / tokens
    weight = mask_T.to(values_T.dtype)
    return (weight @ values_T) / (weight.sum().clamp(min=1) if tokens is None else tokens)


def balance_loss(
    logits_TE: Tensor,
    indices_TK: Tensor,
    mask_T: Tensor | None = None,
    *,
    norm: str = "slots",
    all_counts_E: Tensor | None = None,
) -> Tensor:
    """E * sum_i f_i p_i of one layer, a scalar.

    Args:
        logits_TE: router logits, all E of them.
        indices_TK: the experts taken.
        mask_T: bool, False = padding.
        norm: `slots`: f over T*K slots (1 when uniform, E/k collapsed); `tokens`: f over T tokens (k when uniform, E collapsed).
        all_counts_E: slots per expert over the rows of all ranks. The result is then this rank's part: summed over the ranks, value and
            gradient are those of one process that holds all the rows, because f carries no gradient and p is linear in the tokens.
    """
    num_experts, k = logits_TE.shape[-1], indices_TK.shape[-1]
    counts_E = expert_counts(indices_TK, num_experts, mask_T) if all_counts_E is None else all_counts_E
    tokens = counts_E.sum().clamp(min=1) / k
    p_E = masked_mean(logits_TE.softmax(dim=-1), mask_T, None if all_counts_E is None else tokens)
    counts_E, tokens = counts_E.to(p_E.dtype), tokens.to(p_E.dtype)
    f_E = counts_E / (tokens * k if norm == "slots" else tokens)
    return num_experts * (f_E.detach() * p_E).sum()


def z_loss(logits_TE: Tensor, mask_T: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(z)^2: keeps logits small. A scalar; with `tokens` given, this rank's part as in `masked_mean`."""
    return masked_mean(logits_TE.logsumexp(dim=-1) ** 2, mask_T, tokens)


def several_ranks() -> bool:
    """Whether this process is one of several that train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, without gradient; the tensor itself where there is one process."""
    if not several_ranks():
        return values
    total = values.detach().clone()
    distributed.all_reduce(total)
    return total


def load_entropy(load_E: Tensor) -> Tensor:
    """Entropy of the load over ln E: 1 when every expert has the same share, 0 when one has all. (.., E) -> (..)"""
    share = load_E / load_E.sum(dim=-1, keepdim=True).clamp(min=1e-12)
    logs = share.clamp(min=1e-12).log()
    return -(share * logs).sum(dim=-1) / torch.log(torch.tensor(float(load_E.shape[-1])))

# ---- ops.adapter_experts

# Bottleneck experts on the output of a shared FFN: y = h + s * sum_{i in I} g_i U_i act(D_i h).
#
# Paper: PESC (arXiv 2401.02731) Eq 7-9, folded: because gates sum to 1, sum_i g_i (h + a_i) = h + sum_i g_i a_i, and h is added once.
# Three paths of one function; they differ only by rounding.
#
# * `masked`: every expert for every token, gate 0 off the top-k. Two wide products, no gather; exact, as zero gates zero the gradients.
#   4 T E r d FLOPs forward. One [T, E*r] tensor is kept for the backward.
# * `grouped`: slots sorted by expert, `grouped_mm` down and up, the k slots of a token summed in fixed order. 4 T k r d FLOPs.
#   No host synchronisation: offsets are counted on the device. On the CPU, where a read costs nothing, the runs are padded to one length
#   while that adds few rows, and one `bmm` takes the place of a grouped product.
# * `loop`: the literal form, one expert after the other; for tests.
#
# Shapes: T tokens, D hidden (d), E experts, K per token (k), R adapter dim (r), S = T*K slots. down (E, R, D), up (E, D, R).


from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": lambda x: F.silu(x),
}
_BACKWARD = {
    "gelu": lambda grad, x: torch.ops.aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "silu": lambda grad, x: torch.ops.aten.silu_backward(grad, x),
}


def gate_matrix(indices_TK: Tensor, gates_TK: Tensor, num_experts: int) -> Tensor:
    """(T, E) float32: the gate where an expert was taken, else 0."""
    zeros = gates_TK.new_zeros(gates_TK.shape[0], num_experts)
    return zeros.scatter(1, indices_TK, gates_TK)


class _MaskedExperts(torch.autograd.Function):
    """The masked path with its backward by hand: one [T, E*R] tensor kept instead of four, and h added inside the last product."""

    @staticmethod
    def forward(ctx, h_TD, down_ED, up_DE, gates_TE, activation):
        pre_TE = h_TD @ down_ED.t()
        act = ACTIVATIONS[activation](pre_TE).view(*gates_TE.shape, -1)
        ctx.save_for_backward(h_TD, down_ED, up_DE, gates_TE, pre_TE)
        ctx.activation = activation
        weighted = torch.mul(act, gates_TE.unsqueeze(-1), out=act).view_as(pre_TE)
        return torch.addmm(h_TD, weighted, up_DE.t())

    @staticmethod
    def backward(ctx, grad_TD):
        h_TD, down_ED, up_DE, gates_TE, pre_TE = ctx.saved_tensors
        grad_TD = grad_TD.contiguous()
        gates = gates_TE.unsqueeze(-1)
        act = ACTIVATIONS[ctx.activation](pre_TE).view(*gates_TE.shape, -1)
        grad_act = (grad_TD @ up_DE).view_as(act)
        grad_gates = None
        if ctx.needs_input_grad[3]:
            grad_gates = (grad_act * act.to(gates.dtype)).sum(dim=-1)
        grad_up = None
        if ctx.needs_input_grad[2]:
            grad_up = grad_TD.t() @ torch.mul(act, gates, out=act).view_as(pre_TE)
        grad_act = torch.mul(grad_act, gates, out=grad_act).view_as(pre_TE)
        grad_pre = _BACKWARD[ctx.activation](grad_act, pre_TE)
        grad_down = grad_pre.t() @ h_TD if ctx.needs_input_grad[1] else None
        grad_h = torch.addmm(grad_TD, grad_pre, down_ED) if ctx.needs_input_grad[0] else None
        return grad_h, grad_down, grad_up, grad_gates, None


def masked_experts(
    h_TD: Tensor, down: Tensor, up: Tensor, indices_TK: Tensor, gates_TK: Tensor, *, activation: str = "gelu"
) -> Tensor:
    """The `masked` path. `gates_TK` carry the scale."""
    experts, _, hidden = down.shape
    gates_TE = gate_matrix(indices_TK, gates_TK, experts)
    up_DE = up.transpose(0, 1).reshape(hidden, -1)
    return _MaskedExperts.apply(h_TD, down.reshape(-1, hidden), up_DE, gates_TE, activation)


class _Runs(NamedTuple):
    """Rows in the order of their experts: S of them, or E*C where every run is padded to C rows."""

    token_S: Tensor
    """The token of each row; token 0 for padding, whose gate is 0."""
    gate_S: Tensor
    """The gate of each row."""
    slots_TK: Tensor
    """Where a token's k slots went."""
    offsets_E: Tensor | None
    """int32, the end of each expert's run, counted on the device; None where all runs have one length."""


# Padded rows that one batched product may cost, as a share of the slots: its gain over the grouped product is of that size.
_PADDING = 0.25


def _runs(indices_TK: Tensor, gates_TK: Tensor, num_experts: int) -> _Runs:
    """The sort is stable, so equal input gives equal order."""
    (tokens, k), device = indices_TK.shape, indices_TK.device
    slots = tokens * k
    expert_S, order_S = indices_TK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(expert_S, torch.arange(1, num_experts + 1, device=device))
    token_S, gate_S = order_S.div(k, rounding_mode="floor"), gates_TK.reshape(-1).index_select(0, order_S)
    rank_S = torch.arange(slots, device=device)
    if device.type == "cpu":
        starts_E = F.pad(ends_E[:-1], (1, 0))
        length = int((ends_E - starts_E).max()) if slots else 0
        rows = num_experts * length
        if 0 < rows <= (1 + _PADDING) * slots:
            rank_S = rank_S + (torch.arange(num_experts) * length - starts_E).index_select(0, expert_S)
            token_S = torch.zeros(rows, dtype=token_S.dtype).scatter_(0, rank_S, token_S)
            gate_S = gate_S.new_zeros(rows).scatter(0, rank_S, gate_S)
            slots_TK = torch.empty_like(order_S).scatter_(0, order_S, rank_S).view_as(indices_TK)
            return _Runs(token_S, gate_S, slots_TK, None)
    slots_TK = torch.empty_like(order_S).scatter_(0, order_S, rank_S).view_as(indices_TK)
    return _Runs(token_S, gate_S, slots_TK, ends_E.to(torch.int32))


def _product(rows_SA: Tensor, weight_EAB: Tensor, offsets_E: Tensor | None) -> Tensor:
    """(S, B): rows @ weight[e] for each expert's run of rows."""
    if offsets_E is None:
        return torch.bmm(rows_SA.view(weight_EAB.shape[0], -1, rows_SA.shape[1]), weight_EAB).flatten(0, 1)
    if rows_SA.dtype != torch.float64:
        return F.grouped_mm(rows_SA, weight_EAB, offs=offsets_E)
    hot_SE = _membership(rows_SA, offsets_E)  # grouped_mm knows no float64: the same sums at E times the cost
    return torch.einsum("se,sa,eab->sb", hot_SE, rows_SA, weight_EAB)


def _weight_gradient(left_SA: Tensor, right_SB: Tensor, offsets_E: Tensor | None, num_experts: int) -> Tensor:
    """(E, A, B): left^T @ right over each expert's run; zero for an expert without rows."""
    if offsets_E is None:
        left, right = (x.view(num_experts, -1, x.shape[1]) for x in (left_SA, right_SB))
        return torch.bmm(left.transpose(1, 2), right)
    if left_SA.dtype != torch.float64:
        return F.grouped_mm(left_SA.t(), right_SB, offs=offsets_E)
    return torch.einsum("se,sa,sb->eab", _membership(left_SA, offsets_E), left_SA, right_SB)


def _membership(rows_SA: Tensor, offsets_E: Tensor) -> Tensor:
    slot_S1 = torch.arange(rows_SA.shape[0], device=rows_SA.device)[:, None]
    return ((slot_S1 < offsets_E) & (slot_S1 >= F.pad(offsets_E[:-1], (1, 0)))).to(rows_SA.dtype)


def _sum_slots(rows_SD: Tensor, slots_TK: Tensor, start_TD: Tensor) -> Tensor:
    """start + the sum of each token's k rows, in fixed order; the start is added last, so that it is rounded once."""
    return F.embedding_bag(slots_TK, rows_SD, mode="sum").add_(start_TD)


class _GroupedExperts(torch.autograd.Function):
    """The grouped path with its backward by hand: h and the inner (S, R) tensor are kept, the gathered rows are gathered again.

    Every gradient that reaches `grouped_mm` is freshly gathered, so contiguous: an expanded one would be refused. Scattered additions
    would not be deterministic on CUDA; the k rows of a token are summed in order instead.
    """

    @staticmethod
    def forward(ctx, h_TD, down, up, gate_S, keep_SD, token_S, slots_TK, offsets_E, activation):
        rows_SD = h_TD.index_select(0, token_S)
        if keep_SD is not None:
            rows_SD *= keep_SD
        pre_SR = _product(rows_SD, down.transpose(1, 2), offsets_E)
        del rows_SD  # the next product of this size takes its memory
        ctx.save_for_backward(h_TD, down, up, gate_S, keep_SD, pre_SR, token_S, slots_TK, offsets_E)
        ctx.activation = activation
        inner_SR = ACTIVATIONS[activation](pre_SR)
        torch.mul(inner_SR, gate_S[:, None], out=inner_SR)
        return _sum_slots(_product(inner_SR, up.transpose(1, 2), offsets_E), slots_TK, h_TD)

    @staticmethod
    def backward(ctx, grad_TD):
        h_TD, down, up, gate_S, keep_SD, pre_SR, token_S, slots_TK, offsets_E = ctx.saved_tensors
        wants_h, wants_down, wants_up, wants_gate = ctx.needs_input_grad[:4]
        grad_SD = grad_TD.index_select(0, token_S)
        act_SR = ACTIVATIONS[ctx.activation](pre_SR)
        grad_act_SR = _product(grad_SD, up, offsets_E)
        grad_gate_S = (grad_act_SR * act_SR.to(gate_S.dtype)).sum(dim=-1) if wants_gate else None
        grad_up = None
        if wants_up:
            grad_up = _weight_gradient(grad_SD, torch.mul(act_SR, gate_S[:, None], out=act_SR), offsets_E, len(up))
        torch.mul(grad_act_SR, gate_S[:, None], out=grad_act_SR)
        grad_pre_SR = _BACKWARD[ctx.activation](grad_act_SR, pre_SR)
        grad_h_TD = grad_down = None
        if wants_down:
            rows_SD = torch.index_select(h_TD, 0, token_S, out=grad_SD)  # large and no longer needed
            if keep_SD is not None:
                rows_SD *= keep_SD
            grad_down = _weight_gradient(grad_pre_SR, rows_SD, offsets_E, len(down))
            del rows_SD
        del grad_SD
        if wants_h:
            grad_rows_SD = _product(grad_pre_SR, down, offsets_E)
            grad_h_TD = _sum_slots(grad_rows_SD if keep_SD is None else grad_rows_SD * keep_SD, slots_TK, grad_TD)
        return grad_h_TD, grad_down, grad_up, grad_gate_S, None, None, None, None, None


def grouped_experts(
    h_TD: Tensor,
    down: Tensor,
    up: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """The `grouped` path. `gates_TK` carry the scale; `dropout` is applied to h for each (token, expert) on its own."""
    runs = _runs(indices_TK, gates_TK, down.shape[0])
    keep_SD = None
    if dropout > 0:
        keep_SD = F.dropout(h_TD.new_ones(runs.token_S.shape[0], h_TD.shape[1]), dropout)
    return _GroupedExperts.apply(
        h_TD, down, up, runs.gate_S, keep_SD, runs.token_S, runs.slots_TK, runs.offsets_E, activation
    )


def loop_experts(
    h_TD: Tensor,
    down: Tensor,
    up: Tensor,
    indices_TK: Tensor,
    gates_TK: Tensor,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
) -> Tensor:
    """The `loop` path: expert by expert, as written. The reference of the others."""
    added_TD = torch.zeros_like(h_TD)
    for expert in range(down.shape[0]):
        token, slot = torch.where(indices_TK == expert)
        rows = h_TD[token]
        if dropout > 0:
            rows = F.dropout(rows, dropout)
        inner = ACTIVATIONS[activation](rows @ down[expert].t())
        inner = (inner * gates_TK[token, slot].unsqueeze(-1)).to(h_TD.dtype)
        added_TD = added_TD.index_add(0, token, inner @ up[expert].t())
    return h_TD + added_TD


def grouped_supported(hidden: int, adapter_dim: int) -> bool:
    """Whether `grouped_mm` takes these widths (rows must be whole multiples of 16 bytes) and this torch has it."""
    return hasattr(F, "grouped_mm") and hidden % 8 == 0 and adapter_dim % 8 == 0

# ---- ops.cost

# Which compute path is faster: an estimate from sizes and a row of figures per device.
#
#     X        = E (1 - (1 - k/E)^T)                                   distinct experts that T tokens meet
#     t_masked = max(4 T E r d / phi, 2 E r d b / beta) + lambda_m
#     t_grouped = max(4 T k r d / (eta phi), (2 X r d b + 4 T k d b) / beta) + lambda_g
#
# The smaller wins, ties go to `masked`. phi FLOP/s, beta bytes/s, eta the share of phi that grouped products reach, lambda seconds per
# call. Shapes: T tokens, E experts, k per token, r adapter dim, d hidden, b bytes per element.


from typing import NamedTuple


class DeviceRow(NamedTuple):
    """What the rule knows of a kind of device."""

    phi: float
    """FLOP/s of a dense product."""
    beta: float
    """Bytes/s of memory."""
    eta: float
    """Grouped products: share of phi."""
    lambda_masked: float
    """Seconds of overhead per call."""
    lambda_grouped: float


# cpu: `device_row` of benchmarks/pesc_layer.py, CPU time of one thread of an AMD EPYC (AVX2), float32, torch 2.13; it puts the change
# from masked to grouped near 10 tokens at d 768, r 64, E 8, k 2, where timing both paths puts it too (8 masked, 16 grouped).
# cuda: an estimate, not measured.
DEVICE_ROWS = {
    "cpu": DeviceRow(7.5e10, 2.8e10, 0.75, 2.5e-4, 3.5e-4),
    "cuda": DeviceRow(3e14, 2e12, 0.6, 2e-5, 8e-5),
}


def distinct_experts(tokens: int, num_experts: int, k: int) -> float:
    """Expected number of experts that at least one of the tokens takes."""
    return num_experts * (1 - (1 - k / num_experts) ** tokens)


def path_seconds(
    row: DeviceRow, *, tokens: int, num_experts: int, k: int, adapter_dim: int, hidden: int, width: int
) -> tuple[float, float]:
    """(masked, grouped) seconds of one forward; `width` = bytes per element."""
    rd = adapter_dim * hidden
    experts = distinct_experts(tokens, num_experts, k)
    masked = max(4 * tokens * num_experts * rd / row.phi, 2 * num_experts * rd * width / row.beta)
    traffic = 2 * experts * rd * width + 4 * tokens * k * hidden * width
    grouped = max(4 * tokens * k * rd / (row.eta * row.phi), traffic / row.beta)
    return masked + row.lambda_masked, grouped + row.lambda_grouped


def choose_path(
    device: str, *, tokens: int, num_experts: int, k: int, adapter_dim: int, hidden: int, width: int
) -> str:
    """`masked` or `grouped`; unknown kinds of device use the cuda row."""
    row = DEVICE_ROWS.get(device, DEVICE_ROWS["cuda"])
    masked, grouped = path_seconds(
        row, tokens=tokens, num_experts=num_experts, k=k, adapter_dim=adapter_dim, hidden=hidden, width=width
    )
    return "masked" if masked <= grouped else "grouped"

# ---- methods.pesc.layers

# The modules that PESC puts into a model: a router and E adapters around each block's FFN.
#
# Paper: PESC (arXiv 2401.02731) Eq 7-10. Differs: see README.md. This file is part of full checkpoints, so it imports torch and the ops.
#
# Shapes: B rows, S tokens per row, T = B*S tokens, D hidden, E experts, K per token, R adapter dim, G domains.


import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn


# G: domains told apart in the statistics. A fixed number, because counting them would wait for the device.
DOMAIN_SLOTS = 32


@dataclass(frozen=True)
class PescSettings:
    """Everything that the modules need, resolved (no `auto` left but the path), as it stands in a checkpoint's config."""

    num_experts: int
    top_k: int
    adapter_dim: int
    adapter_scale: float
    layers: tuple[int, ...]
    activation: str = "gelu"
    dropout: float = 0.0
    router: str = "learned"
    router_trainable: bool = True
    router_input_norm: str = "none"
    top1_gate: str = "straight_through"
    path: str = "auto"
    route_early: bool = False
    balance_alpha: float = 0.01
    balance_norm: str = "slots"
    router_z_coef: float = 0.0
    seed: int = 0
    blocks: str = "model.layers"
    """Dotted path of the blocks in the base."""
    ffn: str = "mlp"
    """Name of the FFN in a block."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PescSettings:
        """Strict: an unknown or missing key is an error."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"unknown keys in `pesc`: {sorted(unknown)}")
        return cls(**{**values, "layers": tuple(values["layers"])})

    def as_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"layers": list(self.layers)}


@dataclass
class RouteContext:
    """What the routers of one model share during one forward, and what they have counted since the last reading.

    One per model. `begin` opens a forward, `record` is called by every layer, `clear` closes it. A layer that is computed again
    (gradient checkpointing) finds its entry and leaves it: the first forward's tensors carry the gradient.
    """

    mask: Tensor | None = None
    """(T,) bool, False = padding"""
    ids: Tensor | None = None
    """(T,) token ids"""
    positions: Tensor | None = None
    """(T,)"""
    domain: Tensor | None = None
    """(T,) index of the token's domain, -1 = none"""
    layers: dict[int, Routing] = field(default_factory=dict)
    handed: Any = None
    """(token_mask, ids, positions, domain) given for the next forward, shapes (B, S)."""
    open: bool = False
    groups: Tensor | None = None
    """(T, G+1) 1 where a token is of the domain; the last column is for tokens of none; all 0 for padding"""
    counts: dict[int, Tensor] = field(default_factory=dict)
    """layer -> (G+1, E) slots taken since the last reading"""
    terms: dict[str, list[Tensor]] = field(default_factory=dict)
    """name -> detached values since the last reading; of several ranks, each holds its part of a value"""
    router_grads: list[Tensor] = field(default_factory=list)
    """The router's gradient norm in each layer, of the last backward"""

    def __deepcopy__(self, memo: dict[int, Any]) -> RouteContext:
        """A copied model starts with a context of its own: what is held here belongs to a forward of the original."""
        return RouteContext()

    def __reduce__(self):
        """A copied or pickled model starts with an empty context: what one forward left belongs to its own graph."""
        return (type(self), ())

    def hand(self, mask: Tensor | None, ids: Tensor, positions: Tensor | None, domain: Tensor | None) -> None:
        """Give the next forwards over `ids` their mask, positions and domains, (B, S) each."""
        self.handed = (mask, ids, positions, domain)

    def begin(
        self, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, shape: tuple[int, int], past: int
    ) -> None:
        """Open a forward over (B, S) = `shape` tokens of which `past` come before in a cache."""
        self.layers, self.open, self.domain, self.groups = {}, True, None, None
        if self.handed is not None and tuple(self.handed[1].shape) == shape and past == 0:
            mask, ids, handed_positions, domain = self.handed
            positions = handed_positions if handed_positions is not None else positions
            self.domain = None if domain is None else domain.reshape(-1)
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]
        mask = (
            mask.bool() if fits and mask is not None else None
        )  # a prepared 4-d mask, or a dict of them, says nothing here
        if positions is None or positions.dim() != 2:
            positions = _positions(mask, shape, past, ids)
        self.mask = None if mask is None else mask[:, -shape[1] :].reshape(-1)
        self.ids = None if ids is None else ids.reshape(-1)
        self.positions = positions.expand(shape).reshape(-1)

    def record(self, layer: int, routing: Routing, num_experts: int, count: bool) -> None:
        """Keep a layer's decision; count its load where asked. A layer that is already there is left."""
        if not self.open or layer in self.layers:
            return
        self.layers[layer] = routing
        if count:
            self._count(layer, routing.indices, num_experts)

    @torch.no_grad()
    def _count(self, layer: int, indices_TK: Tensor, num_experts: int) -> None:
        if self.groups is None:
            self.groups = _groups(self.domain, self.mask, indices_TK)
        taken_TE = torch.zeros(indices_TK.shape[0], num_experts, device=indices_TK.device).scatter(1, indices_TK, 1.0)
        rows = self.groups.to(indices_TK.device).t() @ taken_TE
        known = self.counts.get(layer)
        self.counts[layer] = rows if known is None else known.add_(rows)

    def losses(self, settings: PescSettings, over_ranks: bool = False) -> dict[str, Tensor]:
        """`balance` and `router_z` of the forward that has just run, each the mean over layers; nothing without router logits.

        With `over_ranks`, the means are over the tokens of all ranks' forwards, and a value is this rank's part of the sum.
        """
        routings = [(routing.logits, routing.indices) for routing in self.layers.values() if routing.logits is not None]
        if not routings:
            return {}
        device, balance, router_z = routings[0][0].device, [], []
        totals = self._totals(routings) if over_ranks and several_ranks() else [None] * len(routings)
        for (logits, indices), counts_E in zip(routings, totals):
            mask = None if self.mask is None else self.mask.to(logits.device)
            counts_E = None if counts_E is None else counts_E.to(logits.device)
            tokens = None if counts_E is None else counts_E.sum().clamp(min=1) / indices.shape[-1]
            norm = settings.balance_norm
            balance.append(balance_loss(logits, indices, mask, norm=norm, all_counts_E=counts_E).to(device))
            router_z.append(z_loss(logits, mask, tokens).to(device))
        return {"balance": torch.stack(balance).mean(), "router_z": torch.stack(router_z).mean()}

    @torch.no_grad()
    def _totals(self, routings: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Each layer's slots per expert over all ranks: one message for all layers."""
        device = routings[0][0].device
        rows = [
            expert_counts(i, z.shape[-1], None if self.mask is None else self.mask.to(z.device)) for z, i in routings
        ]
        return list(sum_over_ranks(torch.stack([row.to(device) for row in rows])))

    def note(self, name: str, value: Tensor) -> None:
        """Keep a figure (on its device) for the next reading."""
        self.terms.setdefault(name, []).append(value.detach())

    def clear(self) -> None:
        """Drop what belongs to one forward. Counts stay until they are read."""
        self.layers, self.handed, self.open = {}, None, False
        self.mask = self.ids = self.positions = self.domain = self.groups = None

    def reset_window(self) -> None:
        self.counts, self.terms, self.router_grads = {}, {}, []


def _groups(domain_T: Tensor | None, mask_T: Tensor | None, indices_TK: Tensor) -> Tensor:
    """(T, G+1) membership; a domain index out of range counts as none."""
    tokens, device = indices_TK.shape[0], indices_TK.device
    if domain_T is None:
        column_T = torch.full((tokens,), DOMAIN_SLOTS, device=device)
    else:
        domain_T = domain_T.to(device)
        column_T = torch.where((domain_T < 0) | (domain_T >= DOMAIN_SLOTS), DOMAIN_SLOTS, domain_T)
    groups = (column_T[:, None] == torch.arange(DOMAIN_SLOTS + 1, device=device)).to(torch.float32)
    return groups if mask_T is None else groups * mask_T.to(device)[:, None]


def _positions(mask: Tensor | None, shape: tuple[int, int], past: int, ids: Tensor | None) -> Tensor:
    """(B, S) or (1, S): the place of each token, padding on the left not counted."""
    if mask is not None and mask.shape[1] == shape[1] + past:
        return (mask.long().cumsum(dim=-1) - 1).clamp(min=0)[:, past:]
    device = ids.device if ids is not None else (mask.device if mask is not None else None)
    return torch.arange(past, past + shape[1], device=device)[None]


class Router(nn.Module):
    """z = x W^T in float32, autocast off. A bare parameter, so that LoRA and quantisation tools cannot touch it."""

    def __init__(self, num_experts: int, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden, dtype=torch.float32, device=device))

    @torch.no_grad()
    def reset(self, generator: torch.Generator | None = None) -> None:
        """Uniform in +-1/sqrt(d)."""
        _uniform(self.weight, generator)

    def forward(self, x_TD: Tensor, input_norm: str = "none") -> Tensor:
        """(T, E) logits, float32 (float64 for float64 input)."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.to(dtype)
            if input_norm == "rms":
                x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
            return x_TD @ self.weight.to(dtype).t()


class PescAdapters(nn.Module):
    """The stacked adapters and the router of one block. U = 0 at the start, so the block computes what it did before."""

    def __init__(self, settings: PescSettings, hidden: int, device: torch.device | None = None) -> None:
        super().__init__()
        experts, dim = settings.num_experts, settings.adapter_dim
        self.settings = settings
        self.last_path = ""
        """The compute path of the last forward."""
        self.down = nn.Parameter(torch.empty(experts, dim, hidden, dtype=torch.float32, device=device))
        self.up = nn.Parameter(torch.empty(experts, hidden, dim, dtype=torch.float32, device=device))
        self.router = Router(experts, hidden, device) if settings.router == "learned" else None
        if self.router is not None:
            self.router.weight.requires_grad_(settings.router_trainable)

    @torch.no_grad()
    def reset(self, layer: int) -> None:
        """Fresh weights from the stream of (seed, layer): D and W_r uniform in +-1/sqrt(d), U zero."""
        if self.down.is_meta:
            return
        generator = torch.Generator().manual_seed((self.settings.seed + 0x9E3779B1 * (layer + 1)) % 2**63)
        _uniform(self.down, generator)
        self.up.zero_()
        if self.router is not None:
            self.router.reset(generator)

    def path_for(self, h_TD: Tensor) -> str:
        """The compute path for this many tokens on this device."""
        wanted = self.settings.path
        if wanted != "auto":
            return wanted
        experts, dim, hidden = self.down.shape
        if not grouped_supported(hidden, dim):
            return "masked"
        if self.training and self.settings.dropout > 0:
            return "grouped"
        return choose_path(
            h_TD.device.type,
            tokens=h_TD.shape[0],
            num_experts=experts,
            k=experts if self.settings.router == "dense" else self.settings.top_k,
            adapter_dim=dim,
            hidden=hidden,
            width=h_TD.element_size(),
        )

    def forward(self, h_TD: Tensor, routing: Routing) -> Tensor:
        """y = h + s * sum_i g_i U_i act(D_i h), in h's number type; weights are cast from their float32 masters."""
        settings = self.settings
        self.last_path = path = self.path_for(h_TD)
        dropout = settings.dropout if self.training else 0.0
        with torch.autocast(h_TD.device.type, enabled=False):
            down, up = self.down.to(h_TD.dtype), self.up.to(h_TD.dtype)
            gates_TK = routing.gates * settings.adapter_scale
            if path == "masked":
                return masked_experts(h_TD, down, up, routing.indices, gates_TK, activation=settings.activation)
            compute = grouped_experts if path == "grouped" else loop_experts
            return compute(h_TD, down, up, routing.indices, gates_TK, activation=settings.activation, dropout=dropout)


@torch.no_grad()
def _uniform(weight: Tensor, generator: torch.Generator | None) -> None:
    """Uniform in +-1/sqrt(last dimension), drawn on the CPU so that every device starts alike."""
    if weight.is_meta:
        return
    bound = 1 / math.sqrt(weight.shape[-1])
    weight.copy_(torch.empty(weight.shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))


class PescFFN(nn.Module):
    """Takes the place of a block's FFN: the original as `ffn`, computed once, and `pesc` beside it."""

    def __init__(self, ffn: nn.Module, settings: PescSettings, layer: int, hidden: int, context: RouteContext) -> None:
        super().__init__()
        weight = next(ffn.parameters(), None)
        self.ffn = ffn
        self.pesc = PescAdapters(settings, hidden, None if weight is None else weight.device)
        self.layer = layer
        self.context = context
        self.pesc.reset(layer)

    def route(self, x_TD: Tensor) -> Routing:
        """Experts and gates of each token, and their entry in the context."""
        settings, context = self.pesc.settings, self.context
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        if self.pesc.router is not None:
            logits_TE = self.pesc.router(x_TD, settings.router_input_norm)
            routing = route_learned(
                logits_TE, settings.top_k, straight_through=settings.top1_gate == "straight_through"
            )
        elif settings.router == "dense":
            routing = route_dense(x_TD.shape[0], settings.num_experts, x_TD.device, dtype)
        else:
            hashed = settings.router == "hash"
            keys_T = _keys(context, hashed, x_TD)
            seed = 0 if hashed else settings.seed
            routing = route_hashed(
                keys_T, settings.top_k, settings.num_experts, seed=seed, layer=self.layer, dtype=dtype
            )
        context.record(self.layer, routing, settings.num_experts, self.training or context.handed is not None)
        return routing

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        early = self.pesc.settings.route_early
        routing = self.route(x_TD) if early else None
        h = self.ffn(hidden_states, *args, **kwargs)
        if routing is None:
            routing = self.route(x_TD)
        return self.pesc(h.reshape(x_TD.shape[0], -1), routing).view_as(h)


def _keys(context: RouteContext, hashed: bool, x_TD: Tensor) -> Tensor:
    keys_T = context.ids if hashed else context.positions
    if keys_T is None or keys_T.shape[0] != x_TD.shape[0]:
        need = "token ids: call the model with `input_ids`" if hashed else "positions: call the whole model"
        raise ValueError(f"The {'hash' if hashed else 'random'} router needs {need}.")
    return keys_T.to(x_TD.device)


def adapters_of(model: nn.Module) -> list[tuple[str, PescAdapters]]:
    """(name, module) of every block's adapters, in order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PescAdapters)]

# ---- methods.pesc.modeling

# A dense causal LM whose FFNs carry experts, as a transformers model of its own `model_type`.
#
# The dense model is the child `base`, its config is nested under `base_config`; forward and generate are the base's own. A plain loader
# that does not know `sparsmith_pesc` refuses the checkpoint, instead of dropping the experts in silence.
#
# This file is part of full checkpoints: it imports torch, transformers and `layers.py` only.


from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel


# copied from the base's config, because trainers and servers read them on the outer one
_SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


class SparsmithPescConfig(PreTrainedConfig):
    """The base's config, nested and whole, and the resolved settings of the experts (a plain dict)."""

    model_type = "sparsmith_pesc"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, base_config: Any = None, pesc: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if isinstance(base_config, dict):
            values = dict(base_config)
            base_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.base_config = base_config
        self.pesc = dict(pesc or {})
        if base_config is not None:
            for name in (*_SHARED, *_TOKENS, "use_cache"):
                if hasattr(base_config, name):
                    kwargs[name] = getattr(base_config, name)
            # the outer model hands its attention implementation down when it is built
            kwargs.setdefault("attn_implementation", base_config._attn_implementation)
        kwargs["tie_word_embeddings"] = False  # tying is the base's own affair
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> Any:
        """The base's, so that caches and generation see its layers."""
        return self if self.base_config is None else self.base_config.get_text_config(*args, **kwargs)


class SparsmithPescForCausalLM(PreTrainedModel, GenerationMixin):
    """The crafted model. Build it by `sparsmith.craft`, or load it through `AutoModelForCausalLM`."""

    config_class = SparsmithPescConfig
    base_model_prefix = "base"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = {"pesc"}
    base: Any
    settings: PescSettings
    route_context: RouteContext

    def __init__(self, config: SparsmithPescConfig, base: Any = None) -> None:
        grafting = base is not None
        if base is None:
            wanted = {} if config._attn_implementation is None else {"attn_implementation": config._attn_implementation}
            base = AutoModelForCausalLM.from_config(config.base_config, dtype=config.dtype, **wanted)
        # the base has chosen what its family supports; asking for another would be refused or ignored
        config._attn_implementation_internal = base.config._attn_implementation
        super().__init__(config)
        self._grafting = grafting
        self.settings = PescSettings.from_dict(config.pesc)
        self.route_context = RouteContext()
        graft(base, self.settings, self.route_context)
        self.base = base
        self.generation_config = base.generation_config
        decoder = getattr(base, self.settings.blocks.split(".")[0])
        decoder.register_forward_pre_hook(_Opener(self.route_context), with_kwargs=True)
        self.post_init()

    def initialize_weights(self) -> None:
        """Experts start neutral (U = 0) wherever they are made; a base that was handed in keeps its weights."""
        for module in self.modules():
            if isinstance(module, PescFFN):
                adapters = module.pesc
                if not all(getattr(p, "_is_hf_initialized", False) for p in adapters.parameters()):
                    adapters.reset(module.layer)
                for part in adapters.modules():
                    part._is_hf_initialized = True  # type: ignore[assignment]
        if not self._grafting:
            super().initialize_weights()

    def get_input_embeddings(self) -> nn.Module:
        return self.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.base.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.base.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return getattr(self.base, self.settings.blocks.split(".")[0])

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Non-reentrant only: the reentrant form cuts the gradient of the routing losses."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError("PESC needs gradient checkpointing with use_reentrant=False.")
        if gradient_checkpointing_func is not None:
            kwargs["gradient_checkpointing_func"] = gradient_checkpointing_func
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def forward(self, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any):
        """As the base. With `labels` while training, the loss holds the weighted routing losses too."""
        output = self.base(*args, labels=labels, **kwargs)
        if labels is not None and self.training and output.loss is not None:
            losses = self.route_context.losses(self.settings)
            weights = {"balance": self.settings.balance_alpha, "router_z": self.settings.router_z_coef}
            for name, value in losses.items():
                if weights[name] and self.settings.router_trainable:
                    output.loss = output.loss + weights[name] * value.to(output.loss.device)
        return output

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.base.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(self, *args: Any, **kwargs: Any):
        """The base's own generate, with this model's generation settings."""
        self.base.generation_config = self.generation_config
        return self.base.generate(*args, **kwargs)


class _Opener:
    """Opens the route context when the decoder is called, by whichever way (model, generate, a loss that calls the decoder alone)."""

    def __init__(self, context: RouteContext) -> None:
        self.context = context

    def __call__(self, decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        embeds = kwargs.get("inputs_embeds")
        given = ids if ids is not None else embeds
        if given is None:
            return
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        self.context.begin(ids, kwargs.get("attention_mask"), kwargs.get("position_ids"), tuple(given.shape[:2]), past)


def graft(base: Any, settings: PescSettings, context: RouteContext) -> None:
    """Put a `PescFFN` around the FFN of every chosen block of `base`, in place."""
    blocks: Any = base
    for step in settings.blocks.split("."):
        blocks = getattr(blocks, step)
    hidden = base.config.hidden_size
    for layer in settings.layers:
        ffn = getattr(blocks[layer], settings.ffn)
        wrapped = PescFFN(ffn, settings, layer, hidden, context)
        wrapped.train(ffn.training)
        setattr(blocks[layer], settings.ffn, wrapped)
