"""bench.py on the CPU: every row runs at tiny shapes, what fails says why, and the counts of work are right.

The timer is replaced: it calls the function once and says what a test planted.
"""
import argparse
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import time
import warnings

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")
from bench import train as bench_train
import sample
import train_rpt
from conftest import DEVICE
import bits
from bench import kernels as bench, measure
from kernels.attention import make_layout
from model import GPT, GPTConfig
from tiny import run_here

CPU = torch.device("cpu")
LIMITS = (790e12, 4.3e12)
MODEL = GPTConfig(vocab_size=40, width=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, ffn_width=24,
                  max_positions=64)
GROUPS = [(18, [8, 17]), (18, [5])]
BITS = dict(heads=[(2, 1, 16)], groups=[(17, [3, 18])], N=66, D=16, V=300, counts=[1, 65])
TINY = {1: (bench.attention_case, 2, 1, 16, [(20, [])] * 2), 2: (bench.attention_case, 2, 1, 16, GROUPS),
        3: (bench.decode_case, 4, 2, 20, 24, 4, 2, 16), 4: (bench.logprob_case, 40, 32, 300),
        5: (bench.sampling_case, 8, 32, 300)}
ON_THE_CPU = {1: "fast bitwise flash", 2: "fast bitwise flash", 3: "fast bitwise math",
              4: "fast bitwise naive compiled torch", 5: "fast bitwise compiled multinomial"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch, use_kernels):
    if DEVICE == "cuda":
        pytest.skip("there is a GPU: run bench.py itself")
    monkeypatch.setattr(measure, "time_ms", lambda f, graph=False: (f(), 1.0)[1])
    monkeypatch.setattr(measure, "peak_mb", lambda f: (f(), 7.0)[1])
    monkeypatch.setattr(torch, "compile", lambda f, **options: f)
    measure.compiled.cache_clear()


def run_row(monkeypatch, number):
    title, _, *rest = bench.ROWS[number]
    monkeypatch.setitem(bench.ROWS, number, (title, lambda name: TINY[number], *rest))
    records = bench.run_row(number, [("tiny",)], LIMITS, CPU, torch.float32)
    return {record["method"]: record for record in records}


@pytest.mark.parametrize("number", TINY)
def test_every_row_runs_and_what_cannot_run_here_says_why(monkeypatch, capsys, number):
    results, out = run_row(monkeypatch, number), capsys.readouterr().out
    for name, result in results.items():
        if name.split(" ")[0].strip(",") in ON_THE_CPU[number].split() or name.startswith("("):
            assert result["wrong"] == "" and result["fwd"] == 1.0, (name, result)
            assert max(result["errors"].values(), default=0) < (4 if number == 5 else 1e-4)
        else:
            assert 0 < len(result["reason"]) <= 70 and result["reason"] in out, (name, result)
    lines = [line for line in out.splitlines() if line.startswith("| tiny")]
    assert len(lines) == {1: 3, 2: 3, 3: 1, 4: 4, 5: 1}[number]
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1  # as many cells in every line


def test_the_mask_for_flex_attention_is_the_layouts():
    """It runs backward on a GPU only; its forward and its mask can be seen here."""
    _, methods = bench.attention_case(4, 2, 16, GROUPS, CPU, torch.float32)
    method = methods["flex"]()
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        out = method.call(*(x.detach() for x in method.inputs))
    assert method.check(out, ())["out"][0] < 1e-5


@pytest.mark.parametrize("causal", [True, False])
def test_varlen_gets_what_its_version_knows(monkeypatch, causal):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    older = lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: ("2.10", is_causal)
    newer = lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1): (
        "2.11", window_size == (-1, 0))
    newest = lambda q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False: (
        "2.12", window_size == (-1, 0) if enable_gqa else "grouped heads refused")
    for version in (older, newer, newest):
        monkeypatch.setattr(varlen, "varlen_attn", version)
        assert bench.varlen(*[None] * 7, causal)[1] is causal


def test_bits_that_must_be_equal_are_and_a_difference_is_seen(capsys, monkeypatch):
    records = {record["test"]: record["result"] for record in bench.run_bits(BITS, CPU, torch.float32)}
    assert len(records) == 15
    for name, result in records.items():
        assert result == "equal" or name.startswith("cuBLAS"), (name, result)
    assert bits.verdict("promised", lambda: False) == "FAIL: differs"
    assert bits.verdict("a question?", lambda: [1, 17]) == "differs for 1, 17 rows"
    assert bits.verdict("broken", lambda: 1 / 0) == "ZeroDivisionError: division by zero"
    noisy = lambda x, weight: x @ weight.T + len(x) * 1e-3
    assert bits.rows_that_differ(noisy, torch.ones(8, 4), torch.ones(2, 4), [1, 7, 8]) == [1, 7]
    assert not bits.twice(lambda x: x * torch.rand(()), torch.ones(3, requires_grad=True))


# ---- work, rates, ratios -----------------------------------------------------------------------------------

def test_pairs_of_a_small_layout_are_counted_one_by_one():
    rng = random.Random(0)
    for _ in range(20):
        lengths = lambda count: [rng.randint(1, 5) for _ in range(count)]
        groups = [(rng.randint(1, 6), lengths(rng.randint(0, 3))) for _ in range(3)]
        seen = 0
        for start, end, prefix, prefix_end, _ in make_layout(groups).segments.tolist():
            for query, key in itertools.product(range(start, end), range(end)):
                seen += start <= key <= query or prefix <= key < prefix_end
        assert bench.pairs(groups) == seen


def test_ragged_groups_fill_a_multiple_of_128_with_rollouts_of_the_right_length():
    groups = bench.ragged_groups(100, 40, 8, 4000)
    tokens = sum(P + sum(rollouts) for P, rollouts in groups)
    assert tokens % 128 == 0 and 4000 <= tokens < 4000 + 100 + 8 * 40 + 128
    lengths = [length for _, rollouts in groups for length in rollouts][:-1]
    assert min(lengths) >= 10 and max(lengths) <= 40 and len(set(lengths)) > 10


def test_work_is_counted_by_hand():
    attention, _ = bench.attention_case(4, 2, 16, [(2, [1])], CPU, torch.float32)
    pairs = (1 + 2) + (2 + 1)  # the prompt's two rows; one row that sees prompt and itself
    assert pairs == bench.pairs([(2, [1])]) == 6
    assert attention == {"fwd": (4 * 6 * 64, 0), "bwd": (10 * 6 * 64, 0), "fwd+bwd": (14 * 6 * 64, 0)}
    decode, _ = bench.decode_case(4, 2, 20, 1, 4, 2, 16, CPU, torch.float32)  # every row has one token
    assert decode == {"fwd": (0, (2 * 20 + 4 * 1) * 2 * 2 * 16 * 4)}  # keys and values, heads, channels, fp32
    assert bench.logprob_case(8, 32, 100, CPU, torch.float32)[0] == {
        "fwd": (2 * 8 * 32 * 100, 0), "fwd+bwd": (6 * 8 * 32 * 100, 0)}
    assert bench.sampling_case(8, 32, 100, CPU, torch.float32)[0] == {"fwd": (2 * 8 * 32 * 100, 32 * 100 * 4)}


def test_a_cell_tells_time_rate_and_share_of_what_limits():
    result = dict(fwd=2.0, wrong="")
    assert measure.cell(result, "fwd", (790e9, 0), LIMITS) == "2.000 ms, 395 TFLOP/s, 50%"
    assert measure.cell(result, "fwd", (1e9, 4.3e9), LIMITS) == "2.000 ms, 2150 GB/s, 50%"
    assert measure.cell(result, "fwd", (790e9, 1e9), LIMITS) == "2.000 ms, 395 TFLOP/s, 50%"  # bytes take less
    assert measure.cell(dict(reason="not installed"), "fwd", (1, 0), LIMITS) == "not installed"


def test_the_ratio_is_that_of_the_best_right_alternative():
    planted = dict(fast=2.0, bitwise=1.0, slow=9.0, good=3.0, lying=0.1, bound=0.5)
    results = {name: dict(fwd=ms, wrong="") for name, ms in planted.items()}
    results["lying"]["wrong"] = "out off by 0.3"
    results |= {"(bound)": results.pop("bound"), "absent": dict(reason="not installed")}
    assert measure.against_best(results, "fwd") == "1.50 good"
    results["fast"]["wrong"] = "out off by 0.3"  # ours is wrong: there is nothing to boast of
    assert measure.against_best(results, "fwd") == "-"


def test_a_fast_wrong_kernel_is_marked(monkeypatch, capsys):
    monkeypatch.setattr(bench, "attention", lambda q, k, v, layout: q * 1.0 + 0 * (k.sum() + v.sum()))
    results = run_row(monkeypatch, 1)
    assert results["fast"]["wrong"].startswith("out off by ") and results["flash"]["wrong"] == ""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny")]
    assert all("| WRONG (out off by " in line and line.endswith("| - |") for line in lines)


def test_a_failure_costs_a_cell_or_a_line_but_never_the_table(monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 300 GiB")
    monkeypatch.setattr(bench, "attention", out_of_memory)
    results = run_row(monkeypatch, 1)
    assert results["fast"]["reason"] == results["bitwise"]["reason"] == "out of memory"
    assert results["flash"]["wrong"] == ""
    monkeypatch.setattr(bench, "exact_attention", out_of_memory)
    assert run_row(monkeypatch, 1) == {}
    assert capsys.readouterr().out.splitlines()[-1] == "| tiny | out of memory |"


def test_the_backward_is_what_both_take_without_the_forward(monkeypatch):
    x, planted = torch.ones(3, requires_grad=True), iter([3.0, 10.0])
    monkeypatch.setattr(measure, "time_ms", lambda f, graph=False: (f(), next(planted))[1])
    check = lambda out, gradients: dict(out=(out.sum().item() - 6, 0), dx=(gradients[0].sum().item() - 6, 0))
    method = measure.Method(lambda x: 2 * x, (x,), check, torch.ones(3))
    result = measure.measure(lambda: method, {"fwd": 0, "bwd": 0, "fwd+bwd": 0})
    assert (result["fwd"], result["bwd"], result["fwd+bwd"], result["wrong"]) == (3, 7, 10, "")


def test_nan_is_wrong():
    method = measure.Method(lambda x: x, (torch.ones(1),), lambda out, _: dict(out=(float("nan"), 0.05)))
    assert measure.measure(lambda: method, {"fwd": 0})["wrong"] == "out off by nan"


def test_no_shape_is_begun_after_the_minutes(capsys):
    assert bench.run_row(3, [("1.5B", 1, 1, 1, 1)], LIMITS, CPU, torch.float32, until=0) == []
    assert "| 1.5B 1 1 1 1 | not begun: the minutes are over |" in capsys.readouterr().out


# ---- the update and the whole step -------------------------------------------------------------------------

def test_both_sides_compute_the_same_rollouts_and_as_many_at_a_time_as_they_say(monkeypatch, capsys):
    seen, real = [], train_rpt.forward_pieces

    def forward_pieces(model, pieces, temperature):
        seen.append([(len(prompt), [len(r.tokens) for r, _ in responses]) for prompt, responses in pieces])
        return real(model, pieces, temperature)

    monkeypatch.setattr(train_rpt, "forward_pieces", forward_pieces)
    monkeypatch.setattr(bench_train, "alone", lambda function, *args: function(*args))
    bench_train.against_own_prompts(1, MODEL, count=2, prompt=9, G=4, new=3)
    own = (9, [3])
    assert seen == [[(9, [3] * 4)]] * 2 + [[own] * 4] * 2
    first, memory = capsys.readouterr().out.splitlines()
    assert float(re.search("gradient norm off by ([^ ]+)", first)[1]) < 1e-5
    (ours, other), ratio = map(float, re.findall(r"([\d.]+) GB", memory)), float(memory.split("|")[-2])
    assert 0.1 < ours <= other and abs(ratio - other / ours) < 0.05  # in one process the peak only grows


def test_a_process_alone_tells_its_own_memory_and_when_it_was_killed():
    parent = torch.ones(2**27)  # 0.54 GB, which ru_maxrss would count for the child, too
    peak = bench_train.peak_gb()
    assert 0.01 < bench_train.alone(bench_train.peak_gb) < peak - 0.4
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    assert parent.nbytes / 1e9 < peak <= most + 0.01
    with pytest.raises(ValueError, match="_exit: its process ended without a result; most likely memory"):
        bench_train.alone(os._exit, 9)


def test_a_slow_part_of_the_step_is_charged_to_itself(monkeypatch):
    model, optimizer = bench_train.trainer(MODEL)
    before = [weight.clone() for weight in model.parameters()]
    prompts = bench_train.random_prompts(MODEL, 2, 5)
    owners = {"prefill": (sample, "prefill"), "decoding": (sample, "draw_next"),
              "reward": (bench_train, "score"), "forward and backward": (train_rpt, "forward_pieces"),
              "optimizer": (optimizer, "step")}
    for slow, (owner, name) in owners.items():
        real = getattr(owner, name)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *args: (time.sleep(0.3), real(*args))[1])
            start = time.perf_counter()
            seconds, metrics = bench_train.step_seconds(model, optimizer, prompts, 2, 3, 100, seed=0)
            whole = time.perf_counter() - start
        assert list(seconds) == list(owners) and max(seconds, key=seconds.get) == slow, seconds
        assert seconds[slow] >= 0.3 and min(seconds.values()) > 0 and sum(seconds.values()) <= whole
        assert metrics["trained_tokens"] == 2 * (5 + 2 * 3)  # no group is dead
    assert all(map(torch.equal, before, model.parameters()))  # learning rate 0: every update is the same


def test_the_verifier_of_the_step_gets_boxes_to_look_at(monkeypatch):
    scored, real = [], bench_train.score
    monkeypatch.setattr(bench_train, "score", lambda *args: (scored.append(real(*args)), scored[-1])[1])
    prompts = bench_train.random_prompts(MODEL, 2, 5)
    bench_train.step_seconds(*bench_train.trainer(MODEL), prompts, 2, 3, 100, seed=0)
    assert [len(group.predictions) for group in scored] == [2, 2]
    assert all(prediction for group in scored for prediction in group.predictions)


def test_parts_of_a_step_are_shares_of_it(capsys):
    bench_train.parts_of_a_step(3, MODEL, count=2, prompt=5, G=2, new=3)
    out = capsys.readouterr().out
    assert 99 < sum(map(float, re.findall(r"([\d.]+)% of the step", out))) < 101
    tokens = [int(n) for n in re.findall(r"(\d+) tokens \|", out)]
    assert tokens == [10, 12, 12, 2 * (5 + 6), 12] and "step of 2 x 2 x 3 tokens, contexts of 5" in out


def test_flops_of_an_update_are_those_that_torch_counts(use_kernels):
    """torch counts matrix products; it sees the head's forward twice, for logits are computed again."""
    use_kernels("torch")
    groups = [(2, [1]), (4, [3, 2])]
    model, tokens, responses = GPT(MODEL), 3 + 9, 1 + 5
    with FlopCounterMode(display=False) as counter:
        model.logprobs(torch.arange(tokens), make_layout(groups))[0].sum().backward()
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm] - 2 * 40 * 32 * responses
    pairs = (3 + 3) + (10 + (3 * 4 + 6) + (2 * 4 + 3))  # prompts causally; a rollout its prompt and itself
    attention = 2 * 2 * 16 * pairs * (4 + 8)            # layers, heads, channels; forward and backward
    assert bench_train.model_flops(model, groups) == products + attention


def test_mfu_is_the_time_of_the_flops_over_the_time_taken(monkeypatch, capsys, no_gpu):
    """What runs on a GPU runs here interpreted; a machine of 1 MFLOP/s would need a second for 1e6 FLOPs."""
    monkeypatch.setattr(bench_train, "limits", lambda device: (1e6, None))
    monkeypatch.setattr(bench_train, "medians", lambda repeats, call: (call(0), [0.5])[1])
    tiny = dataclasses.replace(MODEL, n_layers=1)
    bench_train.against_flops(1, {"tiny": tiny}, count=2, prompt=5, lengths=range(1, 4), new=3, budget=20,
                              device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[4] for line in lines] == ["fast,", "fast,", "bitwise,", "bitwise,"]
    least = bench_train.model_flops(GPT(tiny), [(5, [1, 2, 3])] * 2) / 1e6
    for update, step in (lines[:2], lines[2:]):
        assert "| 0.50 s, 44 tok/s |" in update  # 22 tokens
        assert f"{least:.2f} s | {least / 0.5:.3f} |" in update
        assert re.search(r"logp_gap \d.* \| sampling [\d.]+ s, [\d.]+% of the step \| \|", step)
    assert "logp_gap 0.0e+00" in lines[3]  # bitwise


# ---- the command -------------------------------------------------------------------------------------------

def test_every_shape_of_the_default_run_has_arguments():
    for number, (_, arguments, shapes, quick) in bench.ROWS.items():
        assert 0 < quick <= len(shapes) and len(set(shapes)) == len(shapes)
        for shape in shapes:
            case, *rest = arguments(*shape)
            assert case is TINY[number][0] and len(rest) == len(TINY[number]) - 1
            if number <= 2:
                assert sum(P + sum(rollouts) for P, rollouts in rest[-1]) % 128 == 0


def test_without_a_gpu_the_command_says_what_can_be_known():
    code, out, err = run_here("bench/sample.py", "kernels")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "torch finds none" in err and "python bench/compile.py shows what can be known" in err


def test_the_sampler_is_timed_on_equal_work(capsys, no_gpu):
    from bench.sample import EMBEDDED, against_bandwidth, against_products, against_transformers, against_waiting
    tiny = dataclasses.replace(EMBEDDED, width=32, n_layers=1, n_heads=2, head_dim=16, ffn_width=32)
    against_transformers(1, tiny, lengths=(5, 3), new=4)
    against_waiting(1, tiny, rows=8, count=16, mean=6, cap=30)
    against_products(1, tiny, rows=8, new=4)
    one_token = dataclasses.replace(tiny, vocab_size=8, head_dim=16)
    against_bandwidth(1, {"tiny": one_token}, batches=(8,), contexts=(3,), new=(1, 3), device="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1].strip() for line in lines if line.startswith("| 1")] == ["prompts of 5", "prompts of 3"]
    assert all(float(line.split(" | ")[-1].strip(" |")) >= 0 for line in lines if line.startswith("| "))
    [lengths, same] = re.findall(r"8 rows, 128 rollouts of (\d+) tokens, (\d+) at most", " ".join(lines))
    assert lengths == same and 4 <= int(lengths[0]) <= 8 and 15 < int(lengths[1]) <= 30  # geometric, mean 6


def test_rows_that_do_not_exist_are_named_and_help_tells_units():
    code, out, err = run_here("bench/sample.py", "kernels", "--rows", "1,7")
    assert code == 2 and "--rows 1,7: expected numbers from 1 to 6" in err
    code, out, _ = run_here("bench/sample.py", "--help")
    words = " ".join(out.split())
    assert code == 0 and "after this many minutes (default: 8)" in words
    assert "--rows 4 is timed on a GPU" in run_here("bench/sample.py", "sample", "--rows", "4")[2]
    assert "--rows 9: expected numbers from 1 to 4" in run_here("bench/sample.py", "sample", "--rows", "9")[2]
    assert "--rows 3 is timed on a GPU" in run_here("bench/sample.py", "train", "--rows", "1,3")[2]
    assert "--rows 4: expected numbers from 1 to 3" in run_here("bench/sample.py", "train", "--rows", "4")[2]
    assert "--repeats must be at least 1" in run_here("bench/sample.py", "train", "--repeats", "0")[2]
    assert "times (ms), errors and peaks (MB)" in words


def no_git(*_, **__):
    raise FileNotFoundError("git")


def test_a_whole_run_prints_header_tables_and_json_even_without_git(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch, "device", lambda name: CPU)
    monkeypatch.setattr(bench, "run_bits", lambda *_: [dict(row=6)])
    monkeypatch.setitem(bench.ROWS, 5, ("sampling", lambda name: TINY[5], [("tiny",), ("more",)], 1))
    monkeypatch.setattr(bench.subprocess, "run", no_git)
    args = argparse.Namespace(rows="5,6", quick=True, minutes=8, json=str(tmp_path / "bench.json"))
    bench.bench_kernels(args)
    out = capsys.readouterr().out
    assert re.match(r"NVIDIA H200, torch 2\S+, triton 3\S+, CUDA \S+, commit unknown, 20\d\d-", out)
    assert "790 TFLOP/s in bf16 and 4.3 TB/s" in out and "| tiny |" in out and "| more |" not in out
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert {record["row"] for record in saved["results"]} == {5, 6}
