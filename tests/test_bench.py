"""The benches of sampler and trainer at tiny shapes: both sides do the same work, counted right."""
import dataclasses
import re
import resource

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sample
from bench import common, sample as bench_sample, train as bench_train
from kernels.attention import make_layout
from model import GPT, GPTConfig
from tiny import run_here

MODEL = GPTConfig(vocab_size=40, width=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16,
                  ffn_width=24, max_positions=64)


def cells(capsys):
    """The table so far, row by row."""
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


# ---- the sampler ----

def test_batches_draw_the_rollouts_of_refilled_rows(capsys, monkeypatch):
    generate, drawn, shares, usual = sample.generate, [], [], sample.BUSY_SHARE["cpu"]

    def remember(model, prompts, **options):
        groups = generate(model, prompts, **options)
        tokens = [[rollout.tokens for rollout in group] for group in groups]
        drawn.append((options.get("first_prompt", 0), tokens))
        shares.append(sample.BUSY_SHARE["cpu"])
        return groups

    monkeypatch.setattr(sample, "generate", remember)
    tiny = dataclasses.replace(MODEL, max_positions=128)
    bench_sample.against_waiting(1, tiny, rows=8, count=16, mean=6, cap=30)
    refilled, *others = drawn[0][1], *drawn[1:]
    assert all(groups == refilled[first:first + len(groups)] for first, groups in others)
    # Two turns of 16 prompts one by one, for batches that keep finished rows and for others.
    alone = [(first, share) for (first, groups), share in zip(drawn, shares) if len(groups) == 1]
    assert sorted(alone) == sorted([(first, share) for first in range(16) for share in (0, usual)] * 2)
    lengths = [len(tokens) for group in refilled for tokens in group]
    assert 4 <= sum(lengths) / 128 <= 8 and 15 < max(lengths) <= 30  # geometric, mean 6
    mean, most = sum(lengths) / 128, max(lengths)
    for row in cells(capsys):
        assert row[1] == f"8 rows, 128 rollouts of {mean:.0f} tokens, {most} at most"
        assert 60 < float(re.search(r"([\d.]+)% of the rows in use", row[2])[1]) < 100


def test_a_decode_step_is_the_difference_of_two_lengths(capsys, monkeypatch, use_kernels):
    """The floor at 1,000 bytes/s: weights in bf16, the cache of a prompt of 3 and 8 rows with 2."""
    pytest.importorskip("triton")
    monkeypatch.setattr(bench_sample, "limits", lambda device: (1e12, 1000))
    monkeypatch.setattr(bench_sample, "medians", planted([10.0, 110.0]))
    tiny = dataclasses.replace(MODEL, n_layers=1)
    bench_sample.against_bandwidth(1, {"tiny": tiny}, batches=(8,), contexts=(3,), new=(1, 3),
                                   device="cpu")
    weights = sum(weight.numel() for weight in GPT(tiny).parameters())
    floor = (2 * weights + (3 + 8 * 2) * 2 * 16 * 2) / 1000
    for row, backend in zip(cells(capsys), ("fast", "bitwise"), strict=True):
        assert row[1] == f"tiny {backend}, 8 rows, context 3"
        assert row[2] == "50000.00 ms a step, 0 tok/s" and row[4] == f"{floor / 50:.2f}"


def planted(seconds):
    """A timer that calls everything once and says these seconds."""
    def medians(repeats, *calls):
        for call in calls:
            call()
        return seconds[:len(calls)]
    return medians


# ---- the update and the whole step ----

def test_both_sides_compute_the_same_rollouts_as_many_at_a_time_as_they_say(monkeypatch, capsys):
    seen, logprobs = [], GPT.logprobs

    def remember(model, tokens, layout, temperature):
        seen.append((layout.prompt_lens.tolist(), layout.rollout_lens.tolist()))
        return logprobs(model, tokens, layout, temperature)

    monkeypatch.setattr(GPT, "logprobs", remember)
    bench_train.against_own_prompts(1, MODEL, count=2, prompt=9, G=4, new=3)
    assert seen == [([9], [3] * 4)] * 2 + [([9] * 4, [3] * 4)] * 2
    first, memory = cells(capsys)
    assert float(re.search("gradient norm off by ([^ ]+)", first[3])[1]) < 1e-5
    gb, other_gb = float(memory[2].split()[0]), float(memory[3].split()[2])
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert 0.1 < gb <= other_gb <= most + 0.01  # the peak of a process only grows


def test_every_update_is_the_same_and_has_all_tokens():
    model, optimizer = bench_train.trainer(MODEL)
    before = [weight.clone() for weight in model.parameters()]
    groups = bench_train.random_groups(MODEL, 2, 5, [3, 4])
    first, second = (bench_train.update(model, optimizer, groups, 100) for _ in range(2))
    assert first == second and first["trained_tokens"] == 2 * (5 + 3 + 4) and first["grad_norm"] > 0
    for old, weight in zip(before, model.parameters()):
        assert torch.equal(old, weight)


def test_flops_of_an_update_are_those_that_torch_counts(use_kernels):
    """FLOPs of products are torch's own count, those of attention are counted by hand."""
    use_kernels("torch")
    groups = [(2, [1]), (4, [3, 2])]
    model, tokens = GPT(MODEL), 3 + 9
    with FlopCounterMode(display=False) as counter:
        model.logprobs(torch.arange(tokens), make_layout(groups)).sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    # A prompt sees itself causally, a rollout its prompt and itself; then layers, heads, channels,
    # and 4 FLOPs forward, 8 backward.
    pairs = (3 + 3) + (10 + (3 * 4 + 6) + (2 * 4 + 3))
    attention = 2 * 2 * 16 * pairs * (4 + 8)
    assert bench_train.model_flops(model, groups) == products + attention


def test_mfu_is_the_time_of_the_flops_over_the_time_taken(monkeypatch, capsys):
    """What runs on a GPU runs here interpreted. 1e6 FLOPs take a second at 1 MFLOP/s."""
    pytest.importorskip("triton")
    monkeypatch.setattr(bench_train, "limits", lambda device: (1e6, None))
    monkeypatch.setattr(bench_train, "medians", planted([0.5, 1.0, 3.0]))
    tiny = dataclasses.replace(MODEL, n_layers=1)
    bench_train.against_flops(1, {"tiny": tiny}, count=2, prompt=5, lengths=range(1, 4), new=3,
                              budget=20, device="cpu")
    rows = cells(capsys)
    least = bench_train.model_flops(GPT(tiny), [(5, [1, 2, 3])] * 2) / 1e6
    for backend, update, step in zip(("fast", "bitwise"), rows[0::2], rows[1::2], strict=True):
        assert update[1] == f"tiny {backend}, update: 2 prompts of 5, 3 rollouts each of 1 to 3"
        assert update[2] == "0.50 s, 44 tok/s" and update[4] == f"{least / 0.5:.3f}"  # 22 tokens
        assert step[2] == "4.00 s, 4 tok/s" and "25.0% of the step" in step[3]


# ---- the commands ----

@pytest.mark.parametrize("script, rows", [("sample", 2), ("train", 2)])
def test_rows_that_do_not_exist_or_need_a_gpu_are_named(script, rows):
    code, out, err = run_here(f"bench/{script}.py", "--rows", "9")
    assert (code, out) == (2, "") and f"--rows 9: expected numbers from 1 to {rows}" in err
    _, _, err = run_here(f"bench/{script}.py", "--rows", f"1,{rows}")
    assert f"--rows {rows} is timed on a GPU" in err


def test_medians_leave_out_the_first_turn(monkeypatch):
    times = iter([0, 90, 100, 102, 200, 205, 300, 303])
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(times))
    assert common.medians(3, list) == [3]
