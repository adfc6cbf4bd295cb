"""Which compute path is faster: an estimate from sizes and a row of figures per device.

    X        = E (1 - (1 - k/E)^T)                                   distinct experts that T tokens meet
    t_masked = max(4 T E r d / phi, 2 E r d b / beta) + lambda_m
    t_grouped = max(4 T k r d / (eta phi), (2 X r d b + 4 T k d b) / beta) + lambda_g

The smaller wins, ties go to `masked`. phi FLOP/s, beta bytes/s, eta the share of phi that grouped products reach, lambda seconds per
call. Shapes: T tokens, E experts, k per token, r adapter dim, d hidden, b bytes per element.
"""

from __future__ import annotations

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
