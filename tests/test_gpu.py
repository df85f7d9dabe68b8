"""What only a GPU can show: sizes past 2^31 elements, CUDA graphs, and what compute-sanitizer says."""
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from kernels.attention import attention, attention_reference, make_layout
from kernels.decode import Rows, decode
from kernels.logprob import logprob
from test_bitwise import gaps, ragged_prompts, tiny_model
from tiny import ROOT

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BF16 = dict(dtype=torch.bfloat16, device="cuda")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator("cuda").manual_seed(seed), **BF16)


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def test_attention_past_2_to_the_31_elements(use_kernels):
    use_kernels("fast")
    S, H, Hkv, K = 1024, 16, 2, 128
    groups = [(S, [])] * (2**31 // (S * H * K) + 2)
    q, k, v = (randn(S * len(groups), heads, K, seed=i).requires_grad_() for i, heads in enumerate((H, Hkv, Hkv)))
    out = attention(q, k, v, make_layout(groups, "cuda"))
    assert out.numel() > 2**31
    dq, dk, dv = torch.autograd.grad(out[-S:].float().square().sum(), (q, k, v))
    last = [x[-S:].detach().float().requires_grad_() for x in (q, k, v)]
    expected = attention_reference(*last, make_layout([(S, [])], "cuda"))
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
    out = decode(q, *prompt, *caches, rows)[-1]
    k, v = (torch.cat([p[0], cache[-1]], dim=1).double() for p, cache in zip(prompt, caches))
    weights = (k @ q[-1].double()[:, :, None] / K ** 0.5).softmax(dim=1)                 # (H, 5 + R, 1)
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


@pytest.mark.parametrize("kind", ["fast", "bitwise"])
def test_a_captured_graph_decodes_what_eager_steps_decode(use_kernels, monkeypatch, kind):
    use_kernels(kind)
    model, prompts = tiny_model("qwen3", torch.bfloat16, 64), ragged_prompts(9)
    run = lambda: [[(r.tokens, r.logprobs) for r in group] for group in
                   sample.generate(model, prompts, 5, 80, 0.8, range(0, 150, 10), 7, max_rows=16)]
    captured = run()
    monkeypatch.setattr(sample, "stepper", lambda *args: lambda: sample.step(*args))
    assert run() == captured


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [64, 128])
def test_logp_gap_is_zero_for_long_ragged_groups(use_kernels, dtype, K):
    use_kernels("bitwise")
    model = tiny_model("qwen2", dtype, K)
    model.config.max_positions = 4096
    assert gaps(model, [prompt * 20 for prompt in ragged_prompts(12)], 8, 300, max_rows=40).max() == 0


def test_compute_sanitizer_finds_nothing():
    if not shutil.which("compute-sanitizer"):
        pytest.skip("compute-sanitizer is not installed")
    ran = subprocess.run(["compute-sanitizer", "--error-exitcode", "9", sys.executable, "-m", "pytest", "-q", "-x",
                          "tests/test_decode.py", "tests/test_linear.py"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-2000:]
