"""What the sampler believed of a token is what the trainer computes, to the last bit: logp_gap 0.0."""
import copy
import random

import pytest
import torch

pytest.importorskip("triton")
from conftest import DEVICE
from model import GPT, GPTConfig
from sample import generate
from plumbing import parallel
from plumbing.batch import flatten


def tiny_model(family, dtype, K, **shape):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(vocab_size=150, width=48, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=72) | shape
        model = GPT(GPTConfig(**shape, head_dim=K, max_positions=128, family=family,
                              tied_head=family != "qwen3"), dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 or name.endswith("bias"):
                weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.15)
    return model.to(DEVICE)


def gaps(model, prompts, G, max_new_tokens, **options):
    """|sampler - trainer| for every token of a batch of rollouts."""
    # The sampler's copy of a model has joined weights.
    sampler = copy.deepcopy(model).join_weights()
    rollouts = generate(sampler, prompts, G, max_new_tokens, 0.8, range(0, 150, 10), (3, 1), **options)
    return drift(model, prompts, rollouts)


def drift(model, prompts, rollouts):
    """|sampler - trainer| for every token of these rollouts, sampled at temperature 0.8."""
    groups = [(prompt, [rollout.tokens for rollout in group]) for prompt, group in zip(prompts, rollouts)]
    tokens, layout = flatten(groups, model.device)
    with torch.no_grad():
        logprobs = model.logprobs(tokens, layout, 0.8)
    sampled = torch.tensor([p for group in rollouts for r in group for p in r.logprobs], device=DEVICE)
    return (logprobs - sampled).abs()


def ragged_prompts(count, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(150) for _ in range(rng.randint(1, 40))] for _ in range(count)]


@pytest.mark.parametrize("family, dtype, K", [
    ("llama", torch.float32, 16),
    pytest.param("qwen2", torch.bfloat16, 16, marks=pytest.mark.slow),
    pytest.param("qwen3", torch.bfloat16, 32, marks=pytest.mark.slow)])
def test_logp_gap_is_zero_over_ragged_prompts_and_refilled_rows(use_kernels, family, dtype, K):
    model, prompts = tiny_model(family, dtype, K), ragged_prompts(4)
    use_kernels("torch")
    torch_gaps = gaps(model, prompts, 3, 12, max_rows=4)
    use_kernels("bitwise")
    bitwise_gaps = gaps(model, prompts, 3, 12, max_rows=4)
    print(f"{family} {dtype}: {len(bitwise_gaps)} tokens, mean gap {bitwise_gaps.mean().item()} bitwise, "
          f"{torch_gaps.mean().item():.1e} torch")
    assert len(bitwise_gaps) > 50  # 12 rollouts in 4 rows: all rows were refilled
    assert torch_gaps.max() > 0  # plain torch does not manage it, so this test can fail
    assert bitwise_gaps.max() == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_joined_weights_give_the_same_bits_and_take_no_memory_of_their_own(use_kernels, family):
    use_kernels("bitwise")
    model, tokens = tiny_model(family, torch.bfloat16, 16), torch.arange(6, device=DEVICE)[None]
    apart = model(tokens)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    assert model.join_weights() is model
    assert torch.equal(model(tokens), apart)
    assert all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
    attention = model.layers[0].self_attn
    together, _ = attention.q_proj.joined
    assert attention.v_proj.weight.untyped_storage().data_ptr() == together.data_ptr()
    together.mul_(2)  # it is the joined product that runs
    assert not torch.equal(model(tokens), apart)


@pytest.mark.parametrize("backend", ["torch", "bitwise"])
def test_the_gathered_copy_is_joined_where_kernels_run(use_kernels, backend):
    use_kernels(backend)
    model = tiny_model("qwen2", torch.bfloat16, 16).float()
    block = parallel.gathered(model).layers[0]
    assert all((layer.joined is not None) == (backend != "torch")
               for layer in (block.self_attn.q_proj, block.mlp.gate_proj))
    assert model.layers[0].mlp.gate_proj.joined is None     # the trainer's own stay apart
