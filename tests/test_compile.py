"""Every kernel compiles for Hopper, without a GPU, to code that can be fast.

The installed Triton is the one that is asked; PYTHONPATH may put another in front.
"""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tiny import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "bench/compile.py", "--json"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    # What spills, does not fit, waits or misses the tensor cores is named on stderr.
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def find(report, kernel, **wanted):
    """The entries of a kernel with these constants."""
    return [entry for entry in report if entry["kernel"] == kernel
            and all(entry["constants"].get(name) == value for name, value in wanted.items())]


IN_BOTH = ("forward_kernel", "dq_kernel", "dkv_kernel", "prefix_kernel", "suffix_kernel",
           "logprob_scan_kernel", "logprob_combine_kernel", "dlogits_kernel", "sample_scan_kernel",
           "sample_token_kernel", "rms_norm_kernel", "rms_norm_backward_kernel", "rotate_kernel",
           "swiglu_kernel", "swiglu_backward_kernel")
BITWISE_ONLY = ("linear_kernel",)


def test_every_kernel_was_compiled_for_both_backends(report):
    found = {(entry["kernel"], entry["options"]["enable_fp_fusion"]) for entry in report}
    fast = {(name, True) for name in IN_BOTH}
    bitwise = {(name, False) for name in IN_BOTH + BITWISE_ONLY}
    assert found == fast | bitwise
    for name in IN_BOTH[:5]:
        assert {entry["constants"]["K"] for entry in find(report, name)} == {64, 128}


def test_large_tiles_use_the_tensor_cores_and_registers_hold_everything(report):
    for entry in report:
        assert not entry["serialised"] and entry["shared"] <= 232_448 and entry["spill"] <= 160
        if entry["constants"].get("BM", 0) >= 64:
            assert entry["hgmma"] > 0 and entry["hmma"] == 0, entry


def products(entries):
    """Tensor-core instructions of bitwise kernels, and how many warps share a row's columns."""
    bitwise = [entry for entry in entries if not entry["options"]["enable_fp_fusion"]]
    return {tuple(sorted(entry["mma"])) for entry in bitwise}


@pytest.mark.parametrize("K", [64, 128])
def test_bitwise_sampler_and_trainer_multiply_with_the_same_instruction(report, K):
    # 128 and 64 rows, the same tiles of keys
    entries = []
    for name in ("forward_kernel", "prefix_kernel", "suffix_kernel"):
        entries += find(report, name, K=K, BN=64)
    assert len(entries) >= 3
    [instructions] = products(entries)
    assert len(instructions) > 0
    for name, rows in dict(logprob_scan_kernel={128}, sample_scan_kernel={64, 128}).items():
        assert {entry["constants"]["BM"] for entry in find(report, name)} == rows
        assert products(find(report, name)) == {("v3 16, 128, 16, 1 warps across",)}
    # A tile of another width takes the same steps along D, 16 at a time.
    entries = find(report, "linear_kernel")
    widths = {entry["constants"]["BN"] for entry in entries}
    assert {entry["constants"]["BM"] for entry in entries} == {64, 128}
    assert widths == {16, 32, 64, 128, 256}
    assert products(entries) == {(f"v3 16, {width}, 16, 1 warps across",) for width in widths}


def test_no_number_of_tokens_or_rows_makes_a_kernel_compile_again():
    """Micro-batches of 513, 528 and 8,193 tokens share one variant of each kernel."""
    script = """
import torch
from bench import compile as bench
from kernels import attention, linear, logprob, pointwise

bench.resources = lambda kernel, *types: {}
report = []
with bench.compile_launches(report):
    for T in (513, 528, 8193):
        layout = attention.make_layout([(T - 3, [3])], "meta")
        q, k, v = (bench.floats(T, heads, 64) for heads in (4, 2, 2))
        q, k = pointwise.rotate(q, k, *torch.empty(2, T, 1, 32, device="meta"))
        x = attention.attention(q, k, v, layout).flatten(1)
        x = pointwise.rms_norm(linear.linear(x, bench.floats(256, 256)), bench.floats(256), 1e-5)
        logprobs, _ = logprob.logprob(x, bench.floats(1000, 256), bench.integers(T))
        logprobs.sum().backward()
        logprob.sample(x.detach(), bench.floats(1000, 256).detach(), bench.integers(T), 0.8)
        print(len(report))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= dict(NANORPT_KERNELS="bitwise", PYTHONPATH=f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True,
                         text=True)
    assert ran.returncode == 0, ran.stderr
    first, *others = map(int, ran.stdout.split())
    assert first >= 12 and others == [first, first]  # kernels compiled so far


def sums(report, *names):
    """Layouts of the reductions of bitwise kernels: {"256: #ttg.blocked...", ...}"""
    entries = [entry for name in names for entry in find(report, name)
               if not entry["options"]["enable_fp_fusion"]]
    assert len({entry["kernel"] for entry in entries}) == len(names)
    return {layout for entry in entries for layout in entry["sums"]}


def test_sampler_and_trainer_reduce_in_the_same_order(report):
    # The interpreter has one order; on a GPU another number of warps changed one log-prob in twelve.
    splits = {layout for layout in sums(report, "logprob_combine_kernel", "sample_token_kernel")
              if layout.startswith("256:")}
    assert len(splits) == 1
    # A row of a tile of logits or scores lies in one warp, as the product leaves it.
    rows = sums(report, "logprob_scan_kernel", "sample_scan_kernel", "forward_kernel", "prefix_kernel",
                "suffix_kernel")
    assert len(rows) >= 4
    assert all("#ttg.nvidia_mma" in layout and ", 1], instrShape" in layout for layout in rows)
