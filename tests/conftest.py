"""What all tests share: the repository on the import path, one thread, and a tiny random GPT.

    pytest                          the quick part, at most 3 minutes on two cores
    pytest -m slow                  the rest: whole runs on several ranks, compiled kernels, sieges
    pytest -m "slow or not slow"    everything

Kernels run on the GPU where there is one (DEVICE), else in Triton's interpreter.
"""
import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import kernels
from model import GPT, GPTConfig

torch.set_num_threads(1)  # tensors are too small for a second thread


def pytest_configure(config):
    """Without -m and without a test named by ::, slow tests are left out."""
    config.addinivalue_line("markers", "slow: takes long; run it with -m slow")
    if not config.option.markexpr and not any("::" in word for word in config.args):
        config.option.markexpr = "not slow"


@pytest.fixture
def tiny_gpt():
    """Two layers, 40 tokens, weights 5 times the usual, so that distributions are far from flat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=40, width=32, n_layers=2, n_heads=4, n_kv_heads=2,
                              head_dim=8, ffn_width=48, max_positions=64))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model


@pytest.fixture(autouse=True)
def use_kernels():
    """use_kernels("fast") chooses this backend until the end of the test."""
    before = kernels.requested
    yield kernels.set_backend
    kernels.requested = before
