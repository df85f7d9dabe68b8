"""What Triton's interpreter cannot see, made visible: reads and writes out of bounds, and races.

It runs programs one after another, on a heap where reading past a tensor is harmless; hence:

    guarded(x)           the tensor between two bands of NaN: a load out of bounds gives NaN
    canaries()           outputs full of NaN between finite bands: a store out of bounds shows there
    shuffled_grid(seed)  programs of a launch in another order: what depends on it was a race
"""
import contextlib

import numpy as np
import torch
from triton.runtime.interpreter import InterpreterBuilder as Builder

BAND = 256        # elements on either side
CANARY = 12345.0


def banded(x, band):
    """A copy of x between two bands -> the copy, the whole buffer."""
    buffer = torch.full((x.numel() + 2 * BAND,), band, dtype=x.dtype, device=x.device)
    inner = buffer[BAND:BAND + x.numel()].view(x.shape)
    inner.copy_(x)
    return inner, buffer


def guarded(x):
    """A copy of x with NaN before and behind it."""
    return banded(x.detach(), float("nan"))[0]


@contextlib.contextmanager
def canaries(monkeypatch):
    """torch.empty and empty_like give NaN between finite bands, which are checked at the end."""
    buffers, empty, empty_like = [], torch.empty, torch.empty_like

    def poisoned(x):
        if not x.is_floating_point():
            return x
        inner, buffer = banded(torch.full_like(x, float("nan")), CANARY)
        buffers.append(buffer)
        return inner

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **kw: poisoned(empty(*size, **kw)))
        patch.setattr(torch, "empty_like",
                      lambda x, **kw: poisoned(empty_like(x, **kw).contiguous()))
        yield
    assert buffers, "no output was allocated with torch.empty: nothing was guarded"
    for buffer in buffers:
        bands = torch.cat([buffer[:BAND], buffer[-BAND:]])
        assert (bands == CANARY).all(), "a kernel wrote outside its output"


@contextlib.contextmanager
def shuffled_grid(seed):
    """Run the programs of every launch in a random order."""
    real = Builder.set_grid_idx

    def set_grid_idx(self, x, y, z):
        X, Y, Z = (int(n) for n in self.grid_dim)
        order = np.random.default_rng(seed).permutation(X * Y * Z)
        place = int(order[(x * Y + y) * Z + z])
        real(self, place // (Y * Z), place // Z % Y, place % Z)

    Builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        Builder.set_grid_idx = real
