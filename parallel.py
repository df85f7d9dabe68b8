"""Data parallelism in a few calls. Without torchrun every one of them does nothing.

No wrapper around the model: ranks hold equal weights, each computes the gradient of its share of a batch, and
the gradients are summed before the step. The loss is divided by a global count first, so that the sum is the
batch's gradient however many ranks there are.
"""
import atexit
import os
import time

import torch
import torch.distributed as dist

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def start(device):
    """Join the other ranks of torchrun; -> this rank's device."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device cuda: torch finds no GPU here")
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if WORLD > 1:
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        atexit.register(leave)
    return device


def leave():
    """A gloo thread that still lets go of a tensor when the interpreter ends would abort the process."""
    dist.destroy_process_group()
    time.sleep(0.2)


def share(n):
    """This rank's contiguous part of n items, as a slice; parts differ by at most one."""
    return slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def sum_over_ranks(tensor):
    """Add up a tensor over all ranks, in place."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(model):
    """Replace every gradient by its sum over ranks; a rank without a share brings zeros and joins in."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        sum_over_ranks(parameter.grad)


def gather_lists(items):
    """A list of picklable items from each rank -> all of them in the order of ranks, on every rank."""
    lists = [items] * WORLD
    if WORLD > 1:
        dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def wait():
    """Go on when every rank is here."""
    if WORLD > 1:
        dist.barrier()


def print0(*words, **options):
    if RANK == 0:
        print(*words, **options, flush=True)
