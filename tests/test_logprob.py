"""Log-probabilities and entropies against log_softmax in fp64."""
from functools import partial

import pytest
import torch

from kernels import logprob as module
from kernels.attention import make_layout
from kernels.logprob import logprob


def case(N=7, D=8, V=11, dtype=torch.float32):
    """hidden (N, D), weight (V, D), with gradients; targets (N,), with first and last token."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[0], targets[-1] = 0, V - 1
    return hidden, weight, targets


def oracle(hidden, weight, targets, temperature=1.0):
    """The same in fp64, one row at a time."""
    logprobs, entropies = [], []
    for h, target in zip(hidden.double(), targets):
        log_p = torch.log_softmax(weight.double() @ h / temperature, dim=0)
        logprobs.append(log_p[target])
        entropies.append(-(log_p.exp() * log_p).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def gradients(logprobs, entropy, inputs):
    """Gradients of a loss that weighs every row, and log-prob and entropy, differently."""
    rows = torch.linspace(-1, 2, len(logprobs), dtype=logprobs.dtype)
    return torch.autograd.grad((rows * logprobs).sum() + (rows.flip(0) * entropy).sum() / 3, inputs)


def assert_same(ours, theirs, atol):
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("temperature", [1.0, 0.8, 2.0])
def test_logprob_and_entropy_belong_to_the_tempered_distribution(temperature):
    hidden, weight, targets = case()
    ours = logprob(hidden, weight, targets, temperature)
    theirs = oracle(hidden, weight, targets, temperature)
    assert_same(ours, theirs, 1e-5)
    assert_same(gradients(*ours, (hidden, weight)), gradients(*theirs, (hidden, weight)), 1e-4)


@pytest.mark.parametrize("rows_per_chunk", [1, 2, 3, 7, 100])
def test_a_chunk_border_changes_nothing(monkeypatch, rows_per_chunk):
    hidden, weight, targets = case()
    expected = logprob(hidden, weight, targets, 0.8)
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows_per_chunk * len(weight))
    chunked = logprob(hidden, weight, targets, 0.8)
    assert_same(chunked, expected, 3e-6)  # of -13: two units in the last place
    assert_same(gradients(*chunked, (hidden, weight)), gradients(*expected, (hidden, weight)), 1e-5)


def test_no_chunk_is_larger_than_asked_for(monkeypatch):
    sizes, real = [], module.soft

    def count_rows(hidden, *rest):
        sizes.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(module, "soft", count_rows)
    monkeypatch.setattr(module, "CHUNK_LOGITS", 35)  # 3 rows of 11 logits
    logprob(*case())
    assert sizes == [3, 3, 1]


def test_logits_of_120_overflow_nothing():
    weight = torch.tensor([[120.0], [-120.0], [0.0]], requires_grad=True)
    hidden = torch.tensor([[1.0], [-1.0], [1.0]], requires_grad=True)
    logprobs, entropy = logprob(hidden, weight, torch.tensor([0, 0, 1]))
    assert logprobs.tolist() == [0, -240, -240]
    assert entropy.tolist() == [0, 0, 0]
    for gradient in gradients(logprobs, entropy, (hidden, weight)):
        assert gradient.isfinite().all()


def test_a_uniform_distribution_has_the_entropy_log_V():
    logprobs, entropy = logprob(torch.zeros(2, 4), torch.ones(8, 4), torch.tensor([0, 7]))
    assert logprobs.tolist() == pytest.approx([-2.0794415] * 2)  # log(1 / 8)
    assert entropy.tolist() == pytest.approx([2.0794415] * 2)


def test_no_rows_give_no_results_and_zero_gradients():
    hidden, weight, _ = case()
    logprobs, entropy = logprob(hidden[:0], weight, torch.zeros(0, dtype=torch.long))
    assert logprobs.shape == entropy.shape == (0,)
    # A rank without rows must still reach its gradients.
    (logprobs.sum() + entropy.sum()).backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_a_target_of_minus_one_marks_an_ignored_row():
    hidden, weight, targets = case()
    targets[3] = -1
    counts = targets != -1
    logprobs, entropy = logprob(hidden, weight, targets, 0.8)
    assert logprobs[3] == entropy[3] == 0
    expected = oracle(hidden[counts], weight, targets[counts], 0.8)
    assert_same((logprobs[counts], entropy[counts]), expected, 1e-5)
    d_hidden, d_weight = torch.autograd.grad(logprobs.sum() + entropy.sum(), (hidden, weight))
    assert (d_hidden[3] == 0).all() and (d_hidden[counts] != 0).any(dim=1).all()
    without = logprob(hidden[counts], weight, targets[counts], 0.8)
    assert_same(torch.autograd.grad(sum(x.sum() for x in without), (weight,)), (d_weight,), 1e-6)


def test_gradients_of_the_torch_backend_are_finite_differences_in_fp64():
    hidden, weight, targets = case(N=4, D=3, V=5, dtype=torch.float64)
    targets[1] = -1
    tempered = partial(logprob, targets=targets, temperature=0.8)
    assert torch.autograd.gradcheck(tempered, (hidden, weight))


def test_bf16_hidden_states_give_fp32_results_and_gradients_in_the_masters_dtype():
    hidden, weight, targets = case(dtype=torch.bfloat16)
    master = weight.detach().float().requires_grad_()
    logprobs, entropy = logprob(hidden, master, targets)
    assert logprobs.dtype == entropy.dtype == torch.float32
    # The logits were rounded to bf16.
    assert_same((logprobs, entropy), oracle(hidden, weight, targets), 0.05)
    logprobs.sum().backward()
    assert master.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("rows_per_chunk, times", [(100, 1), (3, 6)])
def test_a_backward_pass_computes_logits_again_only_if_they_are_several_chunks(
        tiny_gpt, monkeypatch, rows_per_chunk, times):
    """8 rollout tokens: as one chunk once, as three chunks twice each."""
    calls, real = [], module.soft
    monkeypatch.setattr(module, "soft", lambda *rest: calls.append(1) or real(*rest))
    monkeypatch.setattr(module, "CHUNK_LOGITS", rows_per_chunk * tiny_gpt.config.vocab_size)
    tokens, layout = torch.arange(13), make_layout([(5, [3, 5])])
    tiny_gpt.logprobs(tokens, layout).sum().backward()
    assert len(calls) == times
