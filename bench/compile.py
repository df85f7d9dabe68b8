"""Compile every kernel for Hopper (sm_90) on a machine without a GPU, and report what it would use there.

    python bench/compile.py                # a table: registers, spills, shared memory, tensor cores
    python bench/compile.py --json         # the same for scripts

The ordinary wrappers run, forward and backward, on tensors without data (device "meta"); a launch compiles
its kernel instead of running it. What keeps a kernel from being fast ends the command with exit status 1:

    shared memory above 227 KiB           it would not start
    wgmma serialised (ptxas C7510, C7515) the tensor cores would wait for every product
    no HGMMA though the tile has 64 rows  the tensor cores would run their slow path
    more than 64 bytes of spill stores    registers would live in memory
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

if __name__ == "__main__":  # the repository, not kernels/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
from plumbing.flags import speak_once

SHARED_LIMIT = 232_448   # bytes a block may have on sm_90
SPILL_LIMIT = 64         # bytes of spill stores
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def resources(kernel, signature, constants, aligned, options):
    """Compile one kernel with these argument types -> what it uses on sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource
    place = lambda name: (kernel.arg_names.index(name),)
    source = ASTSource(
        kernel, signature={n: "constexpr" if n in constants else signature[n] for n in kernel.arg_names},
        constexprs={place(n): value for n, value in constants.items()},
        attrs={place(n): [["tt.divisibility", 16]] for n in aligned})
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:  # Triton keeps no log of ptxas: once more, and listen
        ptx, cubin, ptxas = f"{folder}/kernel.ptx", f"{folder}/kernel.cubin", get_ptxas(90).path
        Path(ptx).write_text(compiled.asm["ptx"])
        fusion = [] if options["enable_fp_fusion"] else ["--fmad=false"]
        log = subprocess.run([ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", *fusion, "--gpu-name=sm_90a",
                              ptx, "-o", cubin], capture_output=True, text=True, check=True).stderr
        sass = subprocess.run([f"{os.path.dirname(ptxas)}/nvdisasm", "-c", cubin],
                              capture_output=True, text=True, check=True).stdout
    number = lambda pattern: int(re.search(pattern, log)[1])
    mma = re.findall(r"nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[\d+, (\d+)\].*?"
                     r"instrShape = \[([\d, ]+)\]", compiled.asm["ttgir"])
    return dict(registers=number(r"Used (\d+) registers"), spill=number(r"(\d+) bytes spill stores"),
                shared=compiled.metadata.shared, hgmma=len(re.findall(r"\bHGMMA\b", sass)),
                hmma=len(re.findall(r"\bHMMA\b", sass)), serialised="serialized" in log,
                mma=[f"v{version} {shape}, {warps} warps across" for version, warps, shape in mma])


@contextmanager
def compile_launches(report):
    """Within: a launch compiles its kernel and appends its name, constants, options, resources to `report`."""
    from triton.runtime.jit import JITFunction
    seen = set()

    def run(self, *args, grid, warmup=False, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        bound = self.signature.bind(*args, **{n: value for n, value in named.items() if n in self.arg_names})
        bound.apply_defaults()
        signature, constants, aligned = {}, {}, []
        for parameter in self.params:                    # what the launcher would infer from the arguments
            name, value = parameter.name, bound.arguments[parameter.name]
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
                constants[name] = value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
                if value % 16 == 0:
                    aligned.append(name)
        key = repr((self.__name__, signature, constants, aligned, options))
        if key not in seen:
            seen.add(key)
            used = resources(self, signature, constants, aligned, options)
            report.append(dict(kernel=self.__name__, constants=constants, options=options) | used)

    real, JITFunction.run, kernels.COMPILED_ONLY = JITFunction.run, run, True
    try:
        yield report
    finally:
        JITFunction.run, kernels.COMPILED_ONLY = real, False


def launch_everything():
    """Call every wrapper, forward and backward, at shapes of Qwen2.5-1.5B and Qwen2.5-0.5B."""
    from kernels import attention, decode, logprob, linear as rows
    empty = lambda *shape, **kw: torch.empty(*shape, dtype=torch.bfloat16, device="meta", **kw).requires_grad_()
    number = lambda *shape: torch.zeros(*shape, dtype=torch.long, device="meta")
    for D, F, H, Hkv, K in ((1536, 8960, 12, 2, 128), (896, 4864, 14, 2, 64)):
        layout = attention.make_layout([(1024, [1024] * 8), (4096, [])], "meta")
        T = len(layout.positions)
        attention.attention(empty(T, H, K), empty(T, Hkv, K), empty(T, Hkv, K), layout).sum().backward()
        cache = [empty(32, Hkv, 1024, K).detach()] * 2 + [empty(256, Hkv, 1024, K).detach()] * 2
        decode.decode(empty(256, H, K).detach(), *cache, decode.Rows(256, 32, H // Hkv, "meta"))
        weight = empty(151_936, D)
        logprobs, _ = logprob.logprob(empty(16_384, D), weight, number(16_384))
        logprobs.sum().backward()
        logprobs, entropy = logprob.logprob(empty(16_384, D), weight, number(16_384))
        (logprobs.sum() + entropy.sum()).backward()
        for B in (64, 256):
            logprob.sample(empty(B, D).detach(), weight.detach(), number(B), 0.8)
        if kernels.asked == "bitwise":
            for N in (256, 16_384):
                rows.linear(empty(N, D), empty(F, D), empty(F))
                rows.linear(empty(N, F), empty(D, F))
            rows.rms_norm(empty(256, D), empty(D), 1e-6)
            rows.rms_norm(empty(256, H, K), empty(K), 1e-6)
            rows.swiglu(empty(256, F), empty(256, F))


def faults(entry):
    """What is wrong with a compiled kernel, in words."""
    rows = entry["constants"].get("BM", 0)
    return ([f"shared memory {entry['shared']:,} bytes"] * (entry["shared"] > SHARED_LIMIT)
            + ["wgmma serialised"] * entry["serialised"]
            + [f"{entry['spill']} bytes of spill stores"] * (entry["spill"] > SPILL_LIMIT)
            + ["no HGMMA"] * (rows >= 64 and entry["hmma"] > 0 and entry["hgmma"] == 0))


def title(entry):
    """Kernel, the constants that choose its code, and its launch options."""
    constants = " ".join(f"{name}={value}" for name, value in entry["constants"].items()
                         if type(value) is int and value > 1 or value is True)
    options = entry["options"]
    return (f"{entry['kernel']} {constants} w{options['num_warps']} s{options['num_stages']}"
            f"{'' if options['enable_fp_fusion'] else ' bitwise'}")


def table(report):
    """Lines of a Markdown table, one for each compiled kernel."""
    head = "| kernel, constants, warps, stages | registers | spill B | shared B | HGMMA | HMMA |"
    return "\n".join([head, "|---|---|---|---|---|---|"] + [
        f"| {title(e)} | {e['registers']} | {e['spill']} | {e['shared']:,} | {e['hgmma']} | {e['hmma']} |"
        for e in report])


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Compile every kernel for sm_90, without a GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    args = parser.parse_args()
    if kernels.INTERPRETED or not hasattr(kernels.triton, "compile"):
        raise ValueError("nothing to compile: Triton is not installed, or TRITON_INTERPRET=1 is set")
    report = []
    with compile_launches(report):
        for kind in ("fast", "bitwise"):
            kernels.use(kind)
            launch_everything()
    if args.json:
        print(json.dumps(report, default=str))
    else:
        print(f"triton {kernels.triton.__version__}, sm_90\n\n{table(report)}")
    wrong = [f"{title(entry)}: {fault}" for entry in report for fault in faults(entry)]
    for line in wrong:
        print(line, file=sys.stderr)
    sys.exit(1 if wrong else 0)
