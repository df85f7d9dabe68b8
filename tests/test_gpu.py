"""What only a GPU shows: equal bits at real sizes, 2^31 elements, graphs."""
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import sample
from kernels import decode as decode_module
from kernels.attention import attention, attention_torch, make_layout
from kernels.decode import Rows, decode
from kernels.linear import linear
from kernels.logprob import logprob, sample as draw
from test_bitwise import gaps, ragged_prompts, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = dict(dtype=torch.bfloat16, device="cuda")
HEADS = [(12, 2, 128), (14, 2, 64)]                      # of Qwen2.5-1.5B and Qwen2.5-0.5B
GROUPS = [(200, [64, 1, 300]), (1024, [129, 700]), (1, [63])]
D, V = 1536, 151_936                                     # of Qwen2.5-1.5B


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), **BF16)


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


# ---- equal bits ----

def last_tokens(H, Hkv, K):
    """Last token of every rollout, by decoder and by training forward -> (M, H, K) each."""
    layout = make_layout(GROUPS, "cuda")
    q, k, v = (randn(len(layout.positions), heads, K, seed=i)
               for i, heads in enumerate((H, Hkv, Hkv)))
    trained = attention(q, k, v, layout)
    caches = [x[rows].transpose(1, 2).contiguous()
              for rows in (layout.prompts, layout.rollouts) for x in (k, v)]
    rows = Rows(len(layout.owner), len(GROUPS), H // Hkv, "cuda")
    rows.prompt_lens.copy_(layout.prompt_lens)
    rows.lengths.copy_(layout.rollout_lens)
    rows.place(layout.owner.tolist())
    last = layout.rollouts.gather(1, layout.rollout_lens[:, None] - 1).squeeze(1)
    return decode(q[last], k[last], v[last], *caches, rows), trained[last]


@pytest.mark.parametrize("H, Hkv, K", HEADS)
def test_decoding_gives_the_bits_of_the_training_forward(use_kernels, H, Hkv, K):
    use_kernels("bitwise")
    assert torch.equal(*last_tokens(H, Hkv, K))


@pytest.mark.xfail(reason="not promised; if it holds, SUFFIX_TILE may be 16 for bitwise, too")
@pytest.mark.parametrize("H, Hkv, K", HEADS)
def test_tiles_of_16_rows_decode_the_bits_of_tiles_of_64(use_kernels, monkeypatch, H, Hkv, K):
    use_kernels("bitwise")
    monkeypatch.setitem(decode_module.SUFFIX_TILE, "bitwise", 16)
    assert torch.equal(*last_tokens(H, Hkv, K))


def run_twice(function, *inputs):
    """-> result and gradients of two runs"""
    runs = []
    for _ in range(2):
        out = function(*inputs)
        runs.append((out, *torch.autograd.grad(out.sum(), inputs)))
    return runs


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
@pytest.mark.parametrize("H, Hkv, K", HEADS)
def test_attention_gives_the_same_bits_in_two_runs(use_kernels, backend, H, Hkv, K):
    use_kernels(backend)
    layout = make_layout(GROUPS, "cuda")
    inputs = [randn(len(layout.positions), heads, K, seed=i).requires_grad_()
              for i, heads in enumerate((H, Hkv, Hkv))]
    first, second = run_twice(partial(attention, layout=layout), *inputs)
    assert all(map(torch.equal, first, second))


def head_inputs(N):
    """Hidden states and weights whose logits have standard deviation 3."""
    return randn(N, D), randn(V, D, seed=1) * (3 / D ** 0.5)


def logprob_plus_entropy(hidden, weight, targets):
    logprobs, entropy = logprob(hidden, weight, targets)
    return logprobs + entropy


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_log_probs_give_the_same_bits_in_two_runs(use_kernels, backend):
    use_kernels(backend)
    inputs = [x.requires_grad_() for x in head_inputs(1024)]
    targets = torch.arange(1024, device="cuda")
    first, second = run_twice(partial(logprob_plus_entropy, targets=targets), *inputs)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("B", [64, 256])
def test_the_log_probs_of_drawn_tokens_are_the_trainers(use_kernels, B):
    use_kernels("bitwise")
    hidden, weight = head_inputs(1024)
    bits = torch.arange(B, device="cuda") * 0x1E3779B97F4A7C15
    tokens, sampled = draw(hidden[:B], weight, bits, 0.8)
    targets = F.pad(tokens, (0, 1024 - B))
    trained, _ = logprob(hidden, weight, targets, 0.8)
    assert torch.equal(sampled, trained[:B])


@pytest.mark.parametrize("inner, outer", [(D, 4 * D), (4 * D, D)])
def test_rows_of_a_product_have_the_same_bits_alone_and_among_4096(use_kernels, inner, outer):
    use_kernels("bitwise")
    x, weight = randn(4096, inner), randn(outer, inner, seed=1)
    everything = linear(x, weight)
    counts = [1, 2, 3, 8, 16, 17, 64, 65, 128, 256, 512, 513, 1024, 2048]
    assert [n for n in counts if not torch.equal(linear(x[:n], weight), everything[:n])] == []


# ---- large sizes, graphs, whole rollouts ----

def test_attention_past_2_to_the_31_elements(use_kernels):
    use_kernels("fast")
    S, H, Hkv, K = 1024, 16, 2, 128
    groups = [(S, [])] * (2**31 // (S * H * K) + 2)
    q, k, v = (randn(S * len(groups), heads, K, seed=i).requires_grad_()
               for i, heads in enumerate((H, Hkv, Hkv)))
    out = attention(q, k, v, make_layout(groups, "cuda"))
    assert out.numel() > 2**31
    dq, dk, dv = torch.autograd.grad(out[-S:].float().square().sum(), (q, k, v))
    last = [x[-S:].detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention_torch(*last, make_layout([(S, [])], "cuda"))
    assert relative(out[-S:], expected) < 3e-3
    gradients = torch.autograd.grad(expected.square().sum(), last)
    for ours, theirs in zip((dq, dk, dv), gradients):
        assert relative(ours[-S:], theirs) < 2e-2  # 2 * out was rounded to bf16 on the way


def test_decoding_past_2_to_the_31_elements(use_kernels):
    use_kernels("fast")
    B, H, Hkv, K = 160, 8, 8, 128
    R = 2**31 // (B * Hkv * K) + 64
    q, prompt = randn(B, H, K), [randn(1, Hkv, 5, K, seed=i) for i in (1, 2)]
    caches = [randn(B, Hkv, R, K, seed=i) for i in (3, 4)]
    rows = Rows(B, 1, 1, "cuda")
    rows.prompt_lens.fill_(5)
    rows.lengths.fill_(R)
    rows.place([0] * B)
    newest = [cache[:, :, -1].clone() for cache in caches]
    out = decode(q, *newest, *prompt, *caches, rows)[-1]
    k, v = (torch.cat([p[0], cache[-1]], dim=1).double() for p, cache in zip(prompt, caches))
    weights = (k @ q[-1].double()[:, :, None] / K ** 0.5).softmax(dim=1)         # (H, 5 + R, 1)
    assert caches[0].numel() > 2**31 and relative(out, (weights * v).sum(dim=1)) < 5e-3


def test_log_probs_past_2_to_the_31_logits(use_kernels):
    use_kernels("fast")
    N, D, V = 16_384, 64, 151_936
    hidden, weight = randn(N, D).requires_grad_(), (randn(V, D, seed=1) / 4).requires_grad_()
    targets = torch.arange(N, device="cuda") * 9 % V
    logprobs, entropy = logprob(hidden, weight, targets)
    (logprobs[-7:].sum() + entropy[-7:].sum()).backward()
    exact = hidden[-7:].detach().double().requires_grad_()
    log_p = (exact @ weight.detach().double().T).log_softmax(dim=-1)
    expected = log_p.gather(1, targets[-7:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=-1)
    for ours, theirs in zip((logprobs[-7:], entropy[-7:]), expected):
        assert (ours - theirs).abs().max() < 1e-3
    (expected[0].sum() + expected[1].sum()).backward()
    assert relative(hidden.grad[-7:], exact.grad) < 5e-3 and (hidden.grad[:-7] == 0).all()


@pytest.mark.parametrize("backend", ["fast", "bitwise"])
def test_a_captured_graph_decodes_what_eager_steps_decode(use_kernels, monkeypatch, backend):
    use_kernels(backend)
    model, prompts = tiny_model("qwen3", torch.bfloat16, 64), ragged_prompts(9)
    arguments = model, prompts, 5, 80, 0.8, range(0, 150, 10), 7
    captured = sample.generate(*arguments, max_rows=16)
    monkeypatch.setattr(sample, "make_step", partial(partial, sample.step))
    assert sample.generate(*arguments, max_rows=16) == captured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [64, 128])
def test_logp_gap_is_zero_for_long_ragged_groups(use_kernels, dtype, K):
    use_kernels("bitwise")
    model = tiny_model("qwen2", dtype, K)
    model.config.max_positions = 4096
    prompts = [prompt * 20 for prompt in ragged_prompts(12)]
    assert gaps(model, prompts, 8, 300, max_rows=40).max() == 0
