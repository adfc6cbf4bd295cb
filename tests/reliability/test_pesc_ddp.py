"""Two gloo ranks train a PESC model whose ranks use different experts: no unused-parameter error, equal weights (spec test 9)."""

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from sparsmith.methods.base import CraftContext
from sparsmith.methods.pesc.config import PescConfig
from sparsmith.methods.pesc.method import PESC
from tests.kit import forks
from tests.kit.pico import pico_ids, pico_model

STEPS = 20


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    config = PescConfig(num_experts=16, top_k=1, adapter_dim=8)
    model = PESC.craft(pico_model(), config, CraftContext())
    model.requires_grad_(False)
    trained = [p for tensors in PESC.roles(model, config).values() for _, p in tensors]
    for parameter in trained:
        parameter.requires_grad_(True)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for step in range(STEPS):
        ids = pico_ids(1, 4, seed=2 * step + rank)
        parallel.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        PESC.after_forward(model, config)
    figures = PESC.metrics(model, config)
    torch.save(([p.detach() for p in trained], figures["table/load"]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def test_two_ranks(tmp_path):
    forks.ranks(_rank, (str(tmp_path),), tmp_path)
    (first, load), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert load == other
