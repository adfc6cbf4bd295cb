"""The auto rule, by its formula, on rows of figures that the test sets itself."""

import pytest

from sparsmith.ops import cost

CPU = cost.DeviceRow(1e11, 2e10, 0.5, 2e-5, 2e-4)
CUDA = cost.DeviceRow(3e14, 2e12, 0.6, 2e-5, 8e-5)


@pytest.mark.parametrize(
    ("row", "tokens", "experts", "k", "dim", "hidden", "width", "expected"),
    [
        (CPU, 1, 8, 2, 64, 768, 4, "masked"),
        (CPU, 8, 8, 2, 64, 768, 4, "masked"),
        (CPU, 1024, 8, 2, 64, 768, 4, "grouped"),
        (CPU, 4096, 8, 2, 512, 4096, 4, "grouped"),
        (CPU, 1024, 4, 2, 64, 768, 4, "masked"),
        (CPU, 1024, 2, 2, 64, 768, 4, "masked"),
        (CPU, 8192, 16, 4, 512, 4096, 4, "grouped"),
        (CUDA, 1, 8, 2, 512, 4096, 2, "masked"),
        (CUDA, 256, 8, 2, 512, 4096, 2, "masked"),
        (CUDA, 4096, 8, 2, 512, 4096, 2, "grouped"),
        (CUDA, 512, 8, 2, 64, 768, 2, "masked"),
        (CUDA, 16384, 8, 8, 512, 4096, 2, "masked"),
    ],
)
def test_the_rule(monkeypatch, row, tokens, experts, k, dim, hidden, width, expected):
    monkeypatch.setitem(cost.DEVICE_ROWS, "here", row)
    sizes = {"tokens": tokens, "num_experts": experts, "k": k, "adapter_dim": dim, "hidden": hidden, "width": width}
    distinct = experts * (1 - (1 - k / experts) ** tokens)
    masked = max(4 * tokens * experts * dim * hidden / row.phi, 2 * experts * dim * hidden * width / row.beta)
    traffic = 2 * distinct * dim * hidden * width + 4 * tokens * k * hidden * width
    grouped = max(4 * tokens * k * dim * hidden / (row.eta * row.phi), traffic / row.beta)
    found = cost.path_seconds(row, **sizes)
    assert found == pytest.approx((masked + row.lambda_masked, grouped + row.lambda_grouped))
    assert cost.choose_path("here", **sizes) == expected


def test_a_tie_goes_to_masked(monkeypatch):
    monkeypatch.setattr(cost, "path_seconds", lambda *a, **k: (1.0, 1.0))
    assert cost.choose_path("cpu", tokens=1, num_experts=8, k=2, adapter_dim=8, hidden=8, width=4) == "masked"


def test_unknown_devices_use_the_cuda_row():
    sizes = {"tokens": 4096, "num_experts": 8, "k": 2, "adapter_dim": 512, "hidden": 4096, "width": 2}
    assert cost.choose_path("xpu", **sizes) == cost.choose_path("cuda", **sizes)
