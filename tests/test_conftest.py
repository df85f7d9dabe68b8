"""Where tests run: all on the CPU whatever the machine has, or those of the kernels on the GPU."""
import os
import subprocess
import sys

from tiny import ROOT

HIDDEN = ("NANORPT_TEST_DEVICE", "TRITON_INTERPRET")  # of this run, from the one that is started


def python(*words, **environment):
    """Run Python as on a machine with a GPU -> stdout."""
    inherited = {name: value for name, value in os.environ.items() if name not in HIDDEN}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True,
                          env=inherited | {"CUDA_VISIBLE_DEVICES": "0"} | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_unless_asked_to_no_test_and_no_subprocess_of_one_sees_a_gpu():
    code = ("import os, sys; sys.path.insert(0, 'tests')\n"
            "import conftest\n"
            "names = 'CUDA_VISIBLE_DEVICES', 'TRITON_INTERPRET'\n"
            "print([conftest.DEVICE, *map(os.environ.get, names)])")
    assert python("-c", code) == "['cpu', '', '1']\n"
    assert python("-c", code, NANORPT_TEST_DEVICE="cuda") == "['cuda', '0', None]\n"


def test_on_a_gpu_only_the_tests_of_the_kernels_run_and_all_of_them():
    listed = python("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m",
                    "slow or not slow", NANORPT_TEST_DEVICE="cuda")
    files = {line.split("::")[0] for line in listed.splitlines() if "::" in line}
    users = {path for path in ROOT.glob("tests/test_*.py")
             if "\nfrom conftest import DEVICE\n" in path.read_text(encoding="utf-8")}
    assert files == {f"tests/{path.name}" for path in users} | {"tests/test_gpu.py"}
