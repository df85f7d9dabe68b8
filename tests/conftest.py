"""What all tests share: the repository on the import path, one thread, and a tiny random GPT."""
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import GPT, GPTConfig

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture
def tiny_gpt():
    """Two layers, 40 tokens, weights 5 times the usual: its distributions are far from flat."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=40, width=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8,
                              ffn_width=48, max_positions=64))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(5)
    return model
