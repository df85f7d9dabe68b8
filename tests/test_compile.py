"""Every kernel compiles for Hopper, without a GPU, to code that can be fast; bitwise pairs to the same products.

The installed Triton is the one that is asked; PYTHONPATH may put another in front.
"""
import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tiny import ROOT


@pytest.fixture(scope="module")
def report():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "bench/compile.py", "--json"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr  # spills, shared memory, serialised wgmma, no HGMMA: named there
    return json.loads(ran.stdout)


def find(report, kernel, **wanted):
    """The entries of a kernel with these constants."""
    return [entry for entry in report if entry["kernel"] == kernel
            and all(entry["constants"].get(name) == value for name, value in wanted.items())]


def test_every_kernel_was_compiled_in_both_kinds(report):
    kinds = {(entry["kernel"], entry["options"]["enable_fp_fusion"]) for entry in report}
    both = "forward_kernel dq_kernel dkv_kernel prefix_kernel suffix_kernel scan combine logits_gradient".split()
    assert kinds == {(name, fused) for name in both for fused in (True, False)} | {
        (name, False) for name in ("linear_kernel", "rms_norm_kernel", "swiglu_kernel")}
    for name in both[:5]:
        assert {entry["constants"]["K"] for entry in find(report, name)} == {64, 128}


def test_large_tiles_use_the_tensor_cores_and_registers_hold_everything(report):
    for entry in report:
        assert not entry["serialised"] and entry["shared"] <= 232_448 and entry["spill"] <= 64
        if entry["constants"].get("BM", 0) >= 64:
            assert entry["hgmma"] > 0 and entry["hmma"] == 0, entry


def products(entries):
    """The tensor-core instructions of kernels, each with how many warps share the columns of a row."""
    return {tuple(sorted(entry["mma"])) for entry in entries if not entry["options"]["enable_fp_fusion"]}


@pytest.mark.parametrize("K", [64, 128])
def test_bitwise_sampler_and_trainer_multiply_with_the_same_instruction(report, K):
    kernels = ("forward_kernel", "prefix_kernel", "suffix_kernel")  # 128 and 64 rows, the same tiles of keys
    entries = [entry for name in kernels for entry in find(report, name, K=K, BN=64)]
    assert len(entries) >= 3
    [instructions] = products(entries)
    assert len(instructions) > 0
    for name in ("linear_kernel", "scan"):
        assert {entry["constants"]["BM"] for entry in find(report, name)} == {64, 128}
        assert products(find(report, name)) == {("v3 16, 128, 16, 1 warps across",)}
