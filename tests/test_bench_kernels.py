"""bench/kernels.py on the CPU: rows run at tiny shapes, what fails says why, the work is right.

The timer is replaced: it calls the function once and says what a test planted.
"""
import argparse
import inspect
import itertools
import json
import random
import re
import warnings
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
from bench import common, kernels as bench
from plumbing import flags
from kernels import attention as attention_module
from kernels.attention import make_layout
from tiny import run_here

CPU = torch.device("cpu")
LIMIT = (790e12, 4.3e12)
TINY = {"1": ("tiny", 20), "2": ("tiny", 18, 2, 8), "3": ("tiny", 4, 2, 20, 24), "4": (40, 32),
        "5": (8, 32)}
RUNS_ON_A_GPU_ONLY = {"FlexAttention", "varlen_attn"}


@pytest.fixture(autouse=True)
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(bench.HEADS, "tiny", (4, 2, 16))
    monkeypatch.setattr(bench, "PACK", 40)
    monkeypatch.setattr(bench, "VOCABULARY", 300)
    monkeypatch.setattr(bench, "CHUNK", 16)
    monkeypatch.setattr(bench, "time_ms", count_one_ms)
    monkeypatch.setattr(bench, "peak_mb", count_seven_mb)
    with torch.compiler.set_stance("force_eager"):
        yield


def count_one_ms(function, graph=False):
    function()
    return 1.0


def count_seven_mb(function):
    function()
    return 7.0


def build(number):
    """-> work, methods"""
    torch.manual_seed(0)
    return bench.ROWS[number][1](CPU, torch.float32, *TINY[number])


def measure_tiny(number):
    """-> {method: record}"""
    records = bench.measure_shape(bench.ROWS[number][1], TINY[number], LIMIT, CPU, torch.float32)
    return {record["method"]: record for record in records}


@pytest.mark.parametrize("number", TINY)
def test_every_method_is_right_or_says_why_it_does_not_run_here(number, capsys):
    records, out = measure_tiny(number), capsys.readouterr().out
    for name, record in records.items():
        if name in RUNS_ON_A_GPU_ONLY:
            assert 0 < len(record["reason"]) <= 70 and record["reason"] in out
        else:
            assert record["wrong"] == "" and record["fwd"] == 1.0, (name, record)
            assert max(record["errors"].values(), default=0) < (4 if number == "5" else 1e-4)
            assert record.get("peak") == (7.0 if number in "124" else None)
    if number in "12":  # gradients of copies are only parts of ours
        compared = ["out", "dq", "dk", "dv"][:4 if number == "1" else 1]
        assert list(records["SDPA flash"]["errors"]) == compared
    alternatives = [name for name in records if name not in bench.OURS and not name.startswith("(")]
    assert len(alternatives) == 2
    lines = out.splitlines()
    assert [line.split(" | ")[1] for line in lines] == [*records, "best alternative / fast"]
    assert {line.count("|") for line in lines} == {7}


@pytest.mark.parametrize("number", ["1", "2"])
def test_the_mask_of_flex_attention_is_the_layouts(number):
    """Its backward pass runs on a GPU only; its forward and its mask can be seen here."""
    method = build(number)[1]["FlexAttention"]
    with warnings.catch_warnings(action="ignore"):  # that it is not compiled
        out = method.forward()
    assert method.check(out)["out"][0] < 1e-5


def test_varlen_attention_gets_every_row_behind_its_prompt(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def by_loop(q, k, v, nth, ends, max_q, max_k, enable_gqa):
        rows = []
        for row, (start, end) in enumerate(itertools.pairwise(ends.tolist())):
            assert nth[row] == row and end - start <= max_k and max_q == 1
            scores = torch.einsum("hgk,thk->hgt", q[row].view(2, 2, 16), k[start:end]) / 4
            rows.append(torch.einsum("hgt,thk->hgk", scores.softmax(dim=-1), v[start:end]))
        return torch.stack(rows)

    monkeypatch.setattr(varlen, "varlen_attn", by_loop)
    assert measure_tiny("3")["varlen_attn"]["errors"]["out"] < 1e-5


# ---- work and ratios ----

def test_pairs_of_a_small_layout_are_counted_one_by_one():
    rng = random.Random(0)
    for _ in range(20):
        groups = []
        for _ in range(3):
            rollouts = [rng.randint(1, 5) for _ in range(rng.randint(0, 3))]
            groups.append((rng.randint(1, 6), rollouts))
        seen = 0
        for start, end, prefix, prefix_end, _ in make_layout(groups).segments.tolist():
            for query, key in itertools.product(range(start, end), range(end)):
                seen += start <= key <= query or prefix <= key < prefix_end
        assert common.pairs(groups) == seen


def test_work_is_counted_by_hand():
    # PACK 40 is two prompts of 20, or one prompt of 18 with two rollouts of 8.
    plain = 2 * (20 * 21 // 2)
    assert build("1")[0] == {"fwd": (4 * plain * 4 * 16, 0), "fwd+bwd": (14 * plain * 4 * 16, 0)}
    shared = 18 * 19 // 2 + 2 * (8 * 18 + 8 * 9 // 2)
    assert build("2")[0] == {"fwd": (4 * shared * 4 * 16, 0), "fwd+bwd": (14 * shared * 4 * 16, 0)}
    # Keys and values, two prompts of 20 and the rows' own tokens; KV heads, head size, fp32.
    work, methods = build("3")
    own = int(methods["fast"].call.keywords["rows"].lengths.sum())
    assert work == {"fwd": (0, 2 * (2 * 20 + own) * 2 * 16 * 4)} and 4 * 6 <= own <= 4 * 24
    assert build("4")[0] == {"fwd": (2 * 40 * 32 * 300, 0), "fwd+bwd": (6 * 40 * 32 * 300, 0)}
    assert build("5")[0] == {"fwd": (2 * 8 * 32 * 300, 300 * 32 * 4)}


def test_a_cell_tells_time_and_the_share_of_what_limits():
    work = dict(compute=(790e9, 0), moves=(1e9, 4.3e9), both=(790e9, 1e9))
    record = dict.fromkeys(work, 2.0)
    assert [bench.cell(record, name, work, LIMIT) for name in work] == ["2.000 ms, 50%"] * 3
    assert bench.cell(dict(reason="out of memory"), "fwd", work, LIMIT) == ""


def test_the_ratio_is_that_of_the_best_right_alternative():
    planted = {"fast": 2.0, "bitwise": 1.0, "slow": 9.0, "good": 3.0, "lying": 0.1, "(bound)": 0.5}
    records = [dict(method=name, fwd=ms, wrong="") for name, ms in planted.items()]
    records[4]["wrong"] = "out off by 0.3"
    records.append(dict(method="absent", reason="not installed"))
    assert bench.best_over_fast(records, "fwd") == "1.50 good"
    records[0]["wrong"] = "out off by 0.3"  # ours is wrong: there is nothing to boast of
    assert bench.best_over_fast(records, "fwd") == ""


# ---- what is wrong and what fails ----

class UniformAttention:
    """A fast kernel that has forgotten the softmax."""

    @staticmethod
    def apply(q, k, v, layout, backend):
        return q * 1.0 + 0 * (k.sum() + v.sum())


class TooLarge:
    @staticmethod
    def apply(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. | Tried to\nallocate 300 GiB")


def test_a_wrong_kernel_is_marked_and_has_no_ratio(monkeypatch, capsys):
    monkeypatch.setattr(attention_module, "PackedAttention", UniformAttention)
    records = measure_tiny("1")
    assert records["fast"]["wrong"].startswith("out off by ")
    assert records["SDPA flash"]["wrong"] == ""
    lines = capsys.readouterr().out.splitlines()
    assert all("| WRONG (out off by " in line for line in lines[:2])
    assert lines[-1] == "| tiny 20 | best alternative / fast |  |  |  |  |"


def test_a_method_that_fails_costs_its_line_and_a_shape_that_fails_its_table(monkeypatch, capsys):
    reason = "OutOfMemoryError: CUDA out of memory. / Tried to allocate 300 GiB"
    monkeypatch.setattr(attention_module, "PackedAttention", TooLarge)
    records = measure_tiny("2")
    assert records["fast"]["reason"] == records["bitwise"]["reason"] == reason
    assert records["SDPA flash"]["wrong"] == ""
    monkeypatch.setattr(bench, "in_fp32", TooLarge.apply)
    assert measure_tiny("2") == {}
    assert capsys.readouterr().out.splitlines()[-1] == f"| tiny 18 2 8 | {reason} |  |  |  |  |"


def test_nan_is_wrong():
    check = partial(bench.compare, dict(out=torch.ones(1)))
    method = bench.Method(torch.sqrt, [-torch.ones(1)], check)
    assert bench.measure(method)["wrong"] == "out off by nan"


def test_draws_from_another_distribution_are_wrong():
    _, methods = bench.sampling(CPU, torch.float32, 200, 32)
    method = methods["multinomial"]
    assert bench.measure(method)["wrong"] == ""
    hidden, weight = method.inputs
    logp, greedy = (hidden @ weight.T / bench.TEMPERATURE).log_softmax(dim=-1).max(dim=-1)
    errors = method.check((greedy, logp))
    assert errors["logp"][0] < 1e-5 and errors["mean logp, in standard errors,"][0] > 6
    assert method.check((greedy, logp + 1))["logp"][0] > 0.2


# ---- the command ----

def test_every_shape_has_the_arguments_of_its_function():
    for number, (_, function, shapes) in bench.ROWS.items():
        assert len(set(shapes)) == len(shapes)
        for shape in shapes:
            arguments = inspect.signature(function).bind(CPU, torch.bfloat16, *shape).arguments
            assert arguments.get("heads", "1.5B") in bench.HEADS
            if number in "12":  # FlexAttention has been known to fail on other sums
                _, P, G, R = (*shape, 0, 0)[:4]
                assert (P + G * R) % 128 == 0 and P + G * R <= 32_768


def no_git(*_, **__):
    raise FileNotFoundError("git")


def run(rows, minutes, path):
    bench.run(argparse.Namespace(rows=rows, quick=True, minutes=minutes, json=str(path)), CPU,
              torch.float32)


def test_a_whole_run_prints_header_tables_and_json_even_without_git(monkeypatch, capsys, tmp_path, request):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(flags.subprocess, "run", no_git)
    flags.commit.cache_clear()
    request.addfinalizer(flags.commit.cache_clear)
    for number in "45":
        title, function, _ = bench.ROWS[number]
        monkeypatch.setitem(bench.ROWS, number, (title, function, [TINY[number], (9, 9)]))
    run(["4", "5"], 8, tmp_path / "bench.json")
    out = capsys.readouterr().out
    assert re.match(r"NVIDIA H200, torch 2\S+, triton 3\S+, CUDA \S+, commit unknown, 20\d\d-", out)
    assert "790 TFLOP/s in bf16 and 4.3 TB/s" in out
    assert "| 40 32 | fast |" in out and "| 8 32 | fast |" in out and "| 9 9 |" not in out
    assert len({line.count("|") for line in out.splitlines() if line.startswith("|")}) == 1
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert out.startswith(saved["header"])
    assert {record["row"] for record in saved["results"]} == {"4", "5"}
    assert saved["results"][0]["fwd"] == 1.0


def test_a_kill_loses_no_shape_that_was_measured(monkeypatch, tmp_path):
    def measure(build, shape, *_):
        seen.append(shape)
        if len(seen) == 3:  # killed while its results are written
            monkeypatch.setattr("plumbing.checkpoint.os.replace", interrupt)
        return [dict(shape=shape)]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(bench, "measure_shape", measure)
    with pytest.raises(KeyboardInterrupt):
        run(["3", "4", "5"], 8, tmp_path / "bench.json")
    saved = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert [record["row"] for record in saved] == ["3", "4"]


def test_no_shape_is_begun_after_the_minutes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    run(["3"], 0, tmp_path / "bench.json")
    assert "| 1.5B 256 8 1024 1024 | not begun: the minutes are over |" in capsys.readouterr().out
    assert json.loads((tmp_path / "bench.json").read_text())["results"] == []


def test_the_command_names_what_is_missing_and_help_tells_units():
    code, out, err = run_here("bench/kernels.py")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert "torch finds none" in err and "python bench/compile.py shows what can be known" in err
    code, _, err = run_here("bench/kernels.py", "--rows", "1,7")
    assert code == 2 and "--rows 1,7: expected numbers from 1 to 5" in err
    code, out, _ = run_here("bench/kernels.py", "--help")
    words = " ".join(out.split())
    assert code == 0 and "after this many minutes (default: 8)" in words
    assert "times (ms), errors and peaks (MB)" in words
