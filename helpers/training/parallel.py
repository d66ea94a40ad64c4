"""One run over several processes: DDP, or FSDP2."""

import atexit
import contextlib
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from helpers.training.config import TrainConfig


def join_processes(model: nn.Module, config: TrainConfig) -> tuple[int, int, torch.device]:
    """Return this process's rank, the number of processes and the device."""
    device = next(model.parameters()).device
    if config.parallel is None:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        model.to(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size(), device


def parallelise(model: nn.Module, config: TrainConfig, device: torch.device) -> nn.Module:
    """Replicate (DDP) or shard (FSDP2, in place) the weights of rank 0 over the processes."""
    if config.parallel == "ddp":
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    if config.parallel == "fsdp2" and not isinstance(model, FSDPModule):
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        for block in (block for blocks in reversed(lists) for block in blocks):  # inner ones first
            fully_shard(block, mesh=mesh)  # gathered when the forward pass comes to it, and freed after it
        fully_shard(model, mesh=mesh)
    return model


def synchronised(model: nn.Module, only_if: bool) -> contextlib.AbstractContextManager:
    """Exchange gradients in this backward pass only if it is the last before the update."""
    if isinstance(model, DistributedDataParallel) and not only_if:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(only_if)
    return contextlib.nullcontext()
