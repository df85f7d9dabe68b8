"""Data parallelism and sharding in a few calls, which change nothing without torchrun.

With several ranks FSDP2 spreads weights, gradients and the optimizer's moments: each rank keeps
1 / ranks of every parameter, a block is gathered when it is computed, and the backward pass sums
gradients over the ranks. A loss is divided by a global count first, so the sum is the gradient of
the batch, however many ranks there are. If one rank left out a collective call, all would hang; so
a rank with less work computes idle micro-batches (`padded`).
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
LOCAL_WORLD = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # ranks on this machine
NO_BAR = None if RANK == 0 else True  # tqdm's `disable`: bars only on a terminal of rank 0
# How long to wait for the rank with the longest thoughts; torchrun notices a rank that has died.
TIMEOUT = timedelta(hours=2)
device_of_rank = "cpu"                # set by `start`


def start(device):
    """Join the other ranks of torchrun -> this rank's device."""
    global device_of_rank
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
        # cuBLAS may cut a long sum, such as the gradient of a weight over all tokens, into parts
        # that it adds in bf16.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # What is left for the CPU is small: the index tensors of a layout took 0.8 ms with one
        # thread, and up to 107 ms with several of which one had to wait for its core.
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(4, torch.get_num_threads()))
    device_of_rank = device
    if WORLD > 1:
        # torch wraps the hook; its wrapper would lose the message of a hook that exits at once.
        hook = sys.excepthook
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
        sys.excepthook = hook
        atexit.register(leave)
    return device


def clock():
    """Seconds, once this rank's GPU has done what it was asked: launches only put work in line."""
    if device_of_rank != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def leave():
    """End the process group and wait: a gloo thread that outlives Python would abort it."""
    dist.destroy_process_group()
    time.sleep(0.2)


# ---- weights ----

def shard(model, reshard=False, ranks_per_copy=0):
    """Spread a model over all ranks (FSDP2), in place: each block on its own, then the rest.

    reshard: free a block's gathered weights after its forward pass and gather them again in the
    backward pass. ranks_per_copy: this many ranks share one copy of the weights (HSDP); 0: all.
    """
    if WORLD == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    ranks = ranks_per_copy or WORLD
    if WORLD % ranks:
        raise ValueError(f"--ranks-per-copy {ranks} does not divide {WORLD} ranks")
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (WORLD // ranks, ranks), mesh_dim_names=("copy", "part"))
    mesh = mesh if ranks < WORLD else mesh["part"]
    policy = MixedPrecisionPolicy(model.compute_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        module.set_gradient_divide_factor(1.0)          # sums, not means
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    register_fsdp_forward_method(model, "logprobs")


def gathered(model):
    """A copy of the model with whole weights in compute_dtype, on every rank, for sampling.

    A model that has such weights is returned as it is. All ranks call this. No result changes,
    because each use of a weight would cast it the same way.
    """
    is_sharded = hasattr(model, "reshard")
    if not is_sharded and model.embed_tokens.weight.dtype == model.compute_dtype:
        return model
    with torch.device("meta"):
        copy = type(model)(model.config, model.compute_dtype)
    copy.source = model.source
    for name, weight in model.named_parameters():
        module, leaf = name.rsplit(".", 1)
        weight = whole(weight.detach().to(model.compute_dtype))
        setattr(copy.get_submodule(module), leaf, torch.nn.Parameter(weight, requires_grad=False))
    return copy.join_weights()


def whole(tensor):
    """The whole of a tensor that is spread over the ranks, on every rank. All ranks call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(parameter):
    """This rank's part of a parameter: a plain tensor on the same memory."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def part(parameter):
    """Which part of a parameter this rank holds, and of how many parts."""
    mesh = getattr(parameter, "device_mesh", None)
    return (mesh.get_coordinate()[-1], mesh.size(-1)) if mesh else (0, 1)


def local_slice(parameter):
    """This rank's part as a slice of dimension 0; FSDP2 cuts like torch.chunk."""
    count = parameter.shape[0]
    index, parts = part(parameter)
    size = -(-count // parts)
    return slice(min(count, index * size), min(count, (index + 1) * size))


# ---- work and numbers ----

def share(n):
    """This rank's contiguous share of n positions; shares differ by at most one."""
    return slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def padded(batches, idle):
    """This rank's micro-batches, and idle ones until all ranks have equally many."""
    most = max(gather_lists([len(batches)]))
    return batches + [idle] * (most - len(batches))


def total(*numbers):
    """Numbers of this rank -> their sums over all ranks, as floats."""
    sums = torch.tensor(numbers, dtype=torch.float64)
    if WORLD > 1:
        sums = sums.to(device_of_rank)
        dist.all_reduce(sums)
    return sums.tolist()


def gather_lists(items):
    """A list of small items from each rank -> on every rank all items, in order of ranks."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def together(call, *arguments):
    """Call on every rank. If it raises OSError on one, all ranks end, so that none waits for it."""
    error = None
    try:
        call(*arguments)
    except OSError as caught:
        error = caught
    failed = gather_lists([error is not None])
    if any(failed):
        if failed.index(True) != RANK:
            os._exit(2)  # the rank that failed says why
        raise error


def on_rank_0(call, *arguments):
    """Call on rank 0 only; the others wait, and end with it if it raises OSError."""
    if RANK == 0:
        together(call, *arguments)
    else:
        together(do_nothing)


def do_nothing():
    pass


def print0(*words, **options):
    """Print on rank 0."""
    if RANK == 0:
        print(*words, **options, flush=True)
