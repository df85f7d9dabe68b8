"""What bench/launches.py counts, and that it does not grow unnoticed."""
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from tiny import ROOT


def test_a_layer_makes_10_launches_and_small_operations_move_a_third_of_what_plain_torch_did():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "bench/launches.py"], cwd=ROOT, env=environment,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    # A token by hand, in kB: a row of D = 1,536 numbers, of the keys, of F = 8,960, all in bf16.
    D, keys, F = 3.072, 0.512, 17.92
    forward = 2 * 2 * D + 2 * (D + keys) + 3 * F                   # norms, rotation, SwiGLU
    backward = 5 * F + 2 * 3 * D + 2 * (D + keys) + 5 * 3 * D      # the same; x has five readers more
    over_heads = 2 * 2 * D + 2 * 2 * keys + 2 * 3 * keys           # fp32 sums, then a cast
    casts, biases = 46.8e6 * 6 / 16_384 / 1e3, D + 2 * keys        # of weights; read once
    expected = forward + backward + over_heads + casts + biases
    rows = re.findall(r"\| (bitwise|fast) \| (\d+) \| (\d+) \| ([\d.]+) \| (\d+) \|", ran.stdout)
    for backend, a_layer, all_layers, gigabytes, kilobytes in rows:
        assert int(a_layer) <= 10 and int(all_layers) < 28 * 10 + 32
        assert int(kilobytes) == pytest.approx(expected, rel=0.02)
        assert int(kilobytes) < 997 / 3  # what plain torch read and wrote
    assert [row[0] for row in rows] == ["bitwise", "fast"]
    assert "1 prefix_kernel" in ran.stdout and "index_put" not in ran.stdout
