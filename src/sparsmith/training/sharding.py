"""FSDP2 through accelerate: which parts of a crafted model are gathered together.

Every block is a unit, the embeddings are one, final norm and head are one; the objective around them is the root. The launch asks for it
(`accelerate launch --use_fsdp --fsdp_version 2`, or ACCELERATE_USE_FSDP=true FSDP_VERSION=2 under torchrun); the recipe stays the same.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsmith import anatomy, ranks
from sparsmith.crafting.delta import remember_frozen
from sparsmith.crafting.record import record_of
from sparsmith.errors import EnvironmentFault


def set_up(accelerator: Any, model: nn.Module) -> bool:
    """Tell accelerate's plugin the units; returns whether the model will be sharded.

    Two of the plugin's choices are taken back. Its mixed precision would cast every parameter for the forward, the float32 router too:
    autocast is used as without sharding. Its loading by rank 0 alone would leave the others with an empty base to craft.

    Raises:
        EnvironmentFault: FSDP 1 was asked for, which cannot hold trained and frozen tensors of different types in one unit.
    """
    if ranks.sharded() and not ranks.on_cuda():
        _on_cpu(accelerator.state)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return False
    if plugin.fsdp_version != 2:
        raise EnvironmentFault(
            "FSDP_VERSION",
            str(plugin.fsdp_version),
            "2",
            "Launch with --fsdp_version 2, or set FSDP_VERSION=2.",
        )
    idle = [method.name for method, config in record_of(model).parts if method.leaves_idle(config)]
    if idle:
        raise EnvironmentFault(
            "FSDP",
            f"settings of `{idle[0]}` that leave blocks out of a step",
            "every block called in every step",
            "Use schedule all and no layer dropout, or DDP.",
        )
    for method, config in record_of(model).parts:
        reason = method.unsharded(config)
        if reason:
            raise EnvironmentFault(
                "FSDP", f"`{method.name}`, {reason}", "DDP", "Launch without FSDP (docs/several-gpus.md)."
            )
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in anatomy.blocks(model)})
    plugin.mixed_precision_policy = None
    plugin.cpu_ram_efficient_loading = False
    if ranks.is_first():
        remember_frozen(model)
    return True


def check_deepspeed(accelerator: Any, saves: bool) -> None:
    """Refuse what would lose work in silence.

    Raises:
        EnvironmentFault: ZeRO-3, or checkpoints under any stage.
    """
    stage = accelerator.state.deepspeed_plugin.zero_stage
    if stage == 3:
        raise EnvironmentFault(
            "DeepSpeed", "ZeRO stage 3", "stage 0, 1 or 2", "Use FSDP2 to shard the parameters: docs/several-gpus.md."
        )
    if saves:
        raise EnvironmentFault(
            "train.save_every",
            "checkpoints under DeepSpeed, which cuts the optimiser's state in a format of its own",
            "no save_every",
            "Leave it out (a cut run then starts again), or use DDP or FSDP2.",
        )


def for_reading(model: nn.Module) -> bool:
    """Cut a model's blocks over the ranks, in place, so that it can be measured where one device would not hold it.

    Embeddings, final norm and head stay whole on every rank. Nothing can be crafted from it afterwards. Returns whether it was cut: not
    where nothing is sharded, nor a 4-bit base, whose tensors cannot be.
    """
    if not ranks.sharded() or any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters()):
        return False
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = "cuda" if ranks.on_cuda() else "cpu"
    mesh = init_device_mesh(kind, (ranks.world(),))
    inside = set()
    for block in anatomy.blocks(model):
        inside |= set(block.modules())
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
    for module in model.modules():
        if module not in inside:
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)
    return True


def _on_cpu(state: Any) -> None:
    """accelerate (1.15) turns FSDP on for processes on accelerators only; of what it does then, nothing needs one."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin()
