"""What all tests share: the repository on the import path, one thread, and a tiny random GPT.

    pytest                          the quick part, four to nine minutes on one core
    pytest -m slow                  the rest: whole runs on several ranks, compiled kernels, sieges
    pytest -m "slow or not slow"    everything

    NANORPT_TEST_DEVICE=cuda pytest -m "slow or not slow"
                                    the tests of the kernels alone, compiled, on a GPU

Everything else runs on the CPU even where there is a GPU, because whole runs are compared to the
bit; the kernels then run in Triton's interpreter.
"""
import os
import sys

DEVICE = os.environ.get("NANORPT_TEST_DEVICE", "cpu")
if DEVICE == "cpu":
    # Set before torch is imported and a kernel is defined; subprocesses inherit it.
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
import pytest
import torch

ON_A_GPU = ["test_attention_kernel.py", "test_bitwise.py", "test_decode.py", "test_gpu.py",
            "test_linear.py", "test_logprob_kernel.py"]
HERE = os.path.dirname(os.path.abspath(__file__))
if DEVICE != "cpu":
    collect_ignore = sorted(set(os.listdir(HERE)) - set(ON_A_GPU))
sys.path.insert(0, os.path.dirname(HERE))
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
