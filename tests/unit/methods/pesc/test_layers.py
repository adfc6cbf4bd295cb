from dataclasses import replace

import pytest
import torch

from sparsmith.methods.pesc.layers import PescAdapters, PescFFN, PescSettings, Router
from sparsmith.ops.route_context import DOMAIN_SLOTS, RouteContext
from sparsmith.ops.routing import Routing

SETTINGS = PescSettings(4, 2, 8, 0.25, layers=(0,), seed=5)
HIDDEN = 16


def layer(context=None, **changes) -> PescFFN:
    torch.manual_seed(0)
    ffn = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN))
    made = PescFFN(ffn, replace(SETTINGS, **changes), 0, HIDDEN, context or RouteContext())
    torch.nn.init.normal_(made.pesc.up, std=0.1)
    return made


def opened(rows, length, **given) -> RouteContext:
    context = RouteContext()
    context.begin(given.get("ids"), given.get("mask"), given.get("positions"), (rows, length), given.get("past", 0))
    return context


def test_settings_survive_a_dict_and_refuse_unknown_keys():
    assert PescSettings.from_dict(SETTINGS.as_dict()) == SETTINGS
    with pytest.raises(ValueError, match=r"adapter_size"):
        PescSettings.from_dict({**SETTINGS.as_dict(), "adapter_size": 8})
    with pytest.raises(TypeError):
        PescSettings.from_dict({"num_experts": 4, "layers": [0]})


def test_start_is_uniform_zero_and_reproducible():
    first, again, other = (PescAdapters(SETTINGS, HIDDEN) for _ in range(3))
    first.reset(0), again.reset(0), other.reset(1)
    bound = HIDDEN**-0.5
    for part in (first.down, first.router.weight):
        assert part.abs().max() <= bound and part.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert first.up.abs().max() == 0
    assert torch.equal(first.down, again.down) and not torch.equal(first.down, other.down)
    assert not torch.equal(first.down[0], first.down[1])


def test_router_computes_in_float32_under_autocast():
    router = Router(4, HIDDEN)
    router.reset()
    x = torch.randn(8, HIDDEN)
    expected = x @ router.weight.t()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(router(x), expected)
    assert router(x.bfloat16()).dtype == torch.float32 and router(x.double()).dtype == torch.float64


def test_rms_makes_the_router_blind_to_scale():
    router = Router(4, HIDDEN)
    router.reset()
    x = torch.randn(8, HIDDEN)
    torch.testing.assert_close(router(x * 1000, "rms"), router(x, "rms"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_route_early_is_bitwise_the_same(dtype):
    x = torch.randn(2, 5, HIDDEN).to(dtype)
    late, early = layer().to(dtype), layer(route_early=True).to(dtype)
    assert torch.equal(late(x), early(x))


def test_the_ffn_runs_once():
    made, calls = layer(), []
    made.ffn.register_forward_hook(lambda *_: calls.append(1))
    made(torch.randn(2, 5, HIDDEN))
    assert len(calls) == 1


def test_masters_are_float32_beside_a_bf16_ffn():
    made = PescFFN(torch.nn.Linear(HIDDEN, HIDDEN).bfloat16(), SETTINGS, 0, HIDDEN, RouteContext())
    assert {p.dtype for p in made.pesc.parameters()} == {torch.float32}
    x = torch.randn(3, 4, HIDDEN).bfloat16()
    assert made(x).dtype == torch.bfloat16
    made(x).sum().backward()
    assert made.pesc.up.grad.dtype == torch.float32


def test_autocast_with_float32_weights():
    made = layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(torch.randn(2, 5, HIDDEN))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert torch.isfinite(made.pesc.router.weight.grad).all()


def test_auto_takes_masked_where_grouped_cannot_run_and_grouped_for_dropout():
    h = torch.randn(4096, HIDDEN)
    odd = PescFFN(torch.nn.Linear(12, 12), SETTINGS, 0, 12, RouteContext())
    assert odd.pesc.path_for(torch.randn(4096, 12)) == "masked"
    made = layer(dropout=0.1)
    assert made.train().pesc.path_for(h[:1]) == "grouped" and made.eval().pesc.path_for(h[:1]) == "masked"
    assert layer(path="loop").pesc.path_for(h) == "loop"


def test_hash_follows_the_token_and_random_the_position():
    ids = torch.tensor([[5, 6, 5, 7], [7, 5, 6, 6]])
    for router, key in (("hash", ids), ("random", torch.arange(4).expand(2, 4))):
        context = opened(2, 4, ids=ids)
        made = layer(context, router=router)
        chosen = made.route(torch.randn(8, HIDDEN)).indices
        for value in key.unique():
            rows = chosen[key.reshape(-1) == value]
            assert (rows == rows[0]).all()
        assert made.pesc.router is None


def test_hash_without_ids_is_an_error():
    made = layer(opened(2, 4), router="hash")
    with pytest.raises(ValueError, match=r"token ids"):
        made(torch.randn(2, 4, HIDDEN))


def test_random_routing_ignores_left_padding_and_continues_in_a_cache():
    whole = layer(opened(1, 6, ids=torch.zeros(1, 6, dtype=torch.long)), router="random").route(torch.randn(6, HIDDEN))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    padded = layer(opened(1, 8, mask=mask), router="random").route(torch.randn(8, HIDDEN))
    assert torch.equal(padded.indices[2:], whole.indices)
    cached = layer(opened(1, 1, ids=torch.zeros(1, 1, dtype=torch.long), past=5), router="random")
    assert torch.equal(cached.route(torch.randn(1, HIDDEN)).indices, whole.indices[5:])


def test_the_context_keeps_the_first_entry_of_a_layer():
    context = opened(1, 3)
    first, second = (Routing(torch.randn(3, 4), torch.tensor([[0, 1]] * 3), torch.ones(3, 2)) for _ in range(2))
    context.record(0, first, 4, True)
    context.record(0, second, 4, True)
    assert context.layers[0] is first and context.counts[0].sum() == 6
    context.clear()
    context.record(0, second, 4, True)
    assert not context.layers and context.counts[0].sum() == 6


def test_loads_by_domain_leave_padding_out():
    context = RouteContext()
    ids = torch.zeros(1, 6, dtype=torch.long)
    mask, domain = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool(), torch.tensor([[0, 0, 1, -1, 40, 0]])
    context.hand(mask, ids, None, domain)
    context.begin(ids, None, None, (1, 6), 0)
    context.record(3, Routing(None, torch.tensor([[0], [1], [1], [2], [3], [0]]), torch.ones(6, 1)), 4, True)
    counts = context.counts[3]
    assert counts.shape == (DOMAIN_SLOTS + 1, 4)
    assert counts[0].tolist() == [1, 1, 0, 0] and counts[1].tolist() == [0, 1, 0, 0]
    assert counts[-1].tolist() == [0, 0, 1, 1] and counts.sum() == 5


def test_a_handed_batch_does_not_reach_a_forward_of_another_shape():
    context = RouteContext()
    ids = torch.zeros(1, 6, dtype=torch.long)
    context.hand(torch.zeros(1, 6).bool(), ids, None, None)
    context.begin(ids[:, :3], None, None, (1, 3), 0)
    assert context.mask is None
