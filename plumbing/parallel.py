"""Data parallelism and sharding in a few calls. Without torchrun every one of them does nothing.

Above one rank FSDP2 spreads weights, gradients and the optimizer's moments: each rank keeps 1 / ranks of the
rows of every parameter, gathers a block where it is computed, and the gradients are summed as they come out of
the backward. A loss is divided by a global count first, so that the sum is the batch's gradient however many
ranks there are. A collective that one rank leaves out is a hang: ranks with less work join in idly (`padded`).
"""
import atexit
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))
PATIENCE = timedelta(hours=2)  # for the rank with the longest thoughts; a dead one is torchrun's to notice


def start(device):
    """Join the other ranks of torchrun; -> this rank's device."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if WORLD > 1:
        hook = sys.excepthook  # torch wraps it, and would lose the last words of a process that leaves at once
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
        sys.excepthook = hook
        atexit.register(leave)
    return device


def leave():
    """A gloo thread that still lets go of a tensor when the interpreter ends would abort the process."""
    dist.destroy_process_group()
    time.sleep(0.2)


# ---- weights -----------------------------------------------------------------------------------------------
def shard(model, reshard=False, ranks_per_copy=0):
    """Spread a model over all ranks (FSDP2), in place: its blocks one by one, and what is left.

    reshard: free a block's gathered weights after its forward and gather them again in the backward.
    ranks_per_copy: this many ranks hold the weights together, the others hold copies (HSDP); 0: all ranks.
    """
    if WORLD == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    n = ranks_per_copy or WORLD
    if WORLD % n:
        raise ValueError(f"--ranks-per-copy {n} does not divide {WORLD} ranks")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (WORLD // n, n), mesh_dim_names=("copy", "part"))
    mesh = mesh if n < WORLD else mesh["part"]
    policy = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)          # sums, not means
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    register_fsdp_forward_method(model, "logprobs")


def is_sharded(model):
    return hasattr(model, "reshard")


def local(parameter):
    """This rank's rows of a parameter: a plain tensor on the same memory."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def part(parameter):
    """Which part of a parameter this rank holds, and of how many; copies (HSDP) hold the same parts."""
    mesh = getattr(parameter, "device_mesh", None)
    return (mesh.get_coordinate()[-1], mesh.size(-1)) if mesh else (0, 1)


def rows(parameter):
    """Which rows of the whole parameter these are, as a slice: FSDP2 cuts dimension 0 as torch.chunk does."""
    count, (index, parts) = parameter.shape[0], part(parameter)
    size = -(-count // parts)
    return slice(min(count, index * size), min(count, (index + 1) * size))


def whole(tensor):
    """The whole of a tensor that is spread over the ranks, on every rank. All ranks call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


# ---- work and numbers --------------------------------------------------------------------------------------
def share(n):
    """This rank's contiguous part of n items, as a slice; parts differ by at most one."""
    return slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def padded(batches):
    """This rank's micro-batches, and Nones until every rank has as many: FSDP gathers and reduces in each."""
    return batches + [None] * (max(gather_lists([len(batches)])) - len(batches))


def sum_over_ranks(tensor):
    """Add up a tensor over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_lists(items):
    """A list of picklable items from each rank -> all of them in the order of ranks, on every rank."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def together(call):
    """Call on every rank; when one raises OSError all of them end, and nobody waits for the lost one."""
    error = None
    try:
        call()
    except OSError as caught:
        error = caught
    failed = gather_lists([error is not None])
    if any(failed):
        if failed.index(True) != RANK:
            os._exit(2)  # that rank says why
        raise error


def on_rank_0(call):
    """Call on rank 0 alone; the others wait, and end with it when it raises OSError."""
    together(call if RANK == 0 else lambda: None)


def print0(*words, **options):
    if RANK == 0:
        print(*words, **options, flush=True)
