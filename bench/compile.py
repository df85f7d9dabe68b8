"""Compile every kernel for Hopper (sm_90) without a GPU, and report the resources it would use.

    python bench/compile.py                # a table: instructions, registers, spills, shared memory
    python bench/compile.py --json         # the same for scripts

The ordinary wrappers run, forward and backward, on tensors without data (device "meta"); a launch
compiles its kernel instead of running it. The exit status is 1 if a kernel cannot be fast:

    shared memory above 227 KiB           it would not start
    wgmma serialised (ptxas C7510, C7515) the tensor cores would wait for every product
    no HGMMA though the tile has 64 rows  the tensor cores would run a slow instruction
    more than 160 bytes of spill stores   registers would be kept in memory
"""
import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
from kernels import attention, decode, linear, logprob, pointwise
from plumbing import flags

SHARED_LIMIT = 232_448   # bytes a block may have on sm_90
SPILL_LIMIT = 160        # bytes of spill stores; dQ has 136, faster than none
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def resources(kernel, signature, constants, aligned, options):
    """Compile one kernel with these argument types -> what it uses on sm_90."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    place = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        signature={name: signature.get(name, "constexpr") for name in kernel.arg_names},
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in aligned})
    compiled = kernels.triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

    # Triton keeps no log of ptxas, so run it once more and read what it prints.
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptxas = get_ptxas(90).path
        ptx.write_text(compiled.asm["ptx"], encoding="utf-8")
        fusion = [] if options["enable_fp_fusion"] else ["--fmad=false"]
        log = output([ptxas, "-v", "-lineinfo", "--regAllocOptLevel=2", *fusion,
                      "--gpu-name=sm_90a", ptx, "-o", cubin])
        sass = output([Path(ptxas).with_name("nvdisasm"), "-c", cubin])

    ttgir = compiled.asm["ttgir"]
    mma = re.findall(r"nvidia_mma<\{versionMajor = (\d).*?warpsPerCTA = \[\d+, (\d+)\].*?"
                     r"instrShape = \[([\d, ]+)\]", ttgir)
    return dict(instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/ ", sass, re.MULTILINE)),
                registers=int(re.search(r"Used (\d+) registers", log)[1]),
                spill=int(re.search(r"(\d+) bytes spill stores", log)[1]),
                shared=compiled.metadata.shared, serialised="serialized" in log,
                hgmma=len(re.findall(r"\bHGMMA\b", sass)), hmma=len(re.findall(r"\bHMMA\b", sass)),
                mma=[f"v{version} {shape}, {warps} warps across" for version, warps, shape in mma],
                sums=layouts_of_sums(ttgir))


def layouts_of_sums(ttgir):
    """How the operands of reductions are spread over threads and warps, which decides the order."""
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\..*)$", ttgir, re.MULTILINE))
    sums = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<([\dx]+)xf32, (#\w+)>\) -> ', ttgir,
                      re.DOTALL)
    return [f"{shape}: {layouts[name]}" for shape, name in sums]


def output(command):
    """What a command prints, to either stream."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          encoding="utf-8", check=True).stdout


def specialise(kernel, arguments):
    """What Triton's launcher would infer -> {name: type}, {name: constant}, aligned names."""
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        is_one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or is_one:
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -2**31 <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
    return signature, constants, aligned


@contextmanager
def compile_launches(report):
    """In this context a launch compiles its kernel and appends its resources to `report`."""
    from triton.runtime.jit import JITFunction
    seen = set()

    def run(self, *args, grid, warmup=False, **named):
        options = {name: named.pop(name) for name in OPTIONS if name in named}
        known = {name: value for name, value in named.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **known)
        bound.apply_defaults()
        types = specialise(self, bound.arguments)
        key = repr((self.__name__, types, options))
        if key not in seen:
            seen.add(key)
            used = resources(self, *types, options)
            report.append(dict(kernel=self.__name__, constants=types[1], options=options) | used)

    launch, JITFunction.run = JITFunction.run, run
    kernels.COMPILE_ONLY = True
    try:
        yield
    finally:
        JITFunction.run = launch
        kernels.COMPILE_ONLY = False


def floats(*shape):
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta").requires_grad_()


def integers(*shape):
    return torch.zeros(*shape, dtype=torch.long, device="meta")


def launch_everything(backend):
    """Call every wrapper, forward and backward, at shapes of Qwen2.5-1.5B and Qwen2.5-0.5B."""
    kernels.set_backend(backend)
    for D, F, H, Hkv, K in ((1536, 8960, 12, 2, 128), (896, 4864, 14, 2, 64)):
        layout = attention.make_layout([(1024, [1024] * 8), (4096, [])], "meta")
        T = len(layout.positions)
        out = attention.attention(floats(T, H, K), floats(T, Hkv, K), floats(T, Hkv, K), layout)
        out.sum().backward()

        prompts, own = floats(32, Hkv, 1024, K).detach(), floats(256, Hkv, 1024, K).detach()
        rows = decode.Rows(256, 32, H // Hkv, "meta")
        q, new = floats(256, H, K).detach(), floats(256, Hkv, K).detach()
        decode.decode(q, new, new, prompts, prompts, own, own, rows)

        weight = floats(151_936, D)
        logprobs, _ = logprob.logprob(floats(16_384, D), weight, integers(16_384))
        logprobs.sum().backward()
        logprobs, entropy = logprob.logprob(floats(16_384, D), weight, integers(16_384))
        (logprobs.sum() + entropy.sum()).backward()
        for B in (64, 256):
            logprob.sample(floats(B, D).detach(), weight.detach(), integers(B), 0.8)

        if backend == "bitwise":
            for N in (256, 16_384):
                linear.linear(floats(N, D), floats(F, D), floats(F))
                linear.linear(floats(N, F), floats(D, F), residual=floats(N, D))
                linear.linear(floats(N, D), floats(F, D))
            linear.linear(floats(256, D), floats(Hkv * K, D))
        cos, sin = torch.empty(2, 256, 1, K // 2, device="meta")
        q, k = pointwise.rotate(floats(256, H, K), floats(256, Hkv, K), cos, sin)
        for out in (pointwise.rms_norm(floats(256, D), floats(D), 1e-6),
                    pointwise.rms_norm(floats(256, H, K), floats(K), 1e-6),
                    q.sum() + k.sum(),
                    pointwise.swiglu(floats(256, F), floats(256, F))):
            out.sum().backward()


def faults(entry):
    """What is wrong with a compiled kernel, in words."""
    found = []
    if entry["shared"] > SHARED_LIMIT:
        found.append(f"shared memory {entry['shared']:,} bytes")
    if entry["serialised"]:
        found.append("wgmma serialised")
    if entry["spill"] > SPILL_LIMIT:
        found.append(f"{entry['spill']} bytes of spill stores")
    if entry["constants"].get("BM", 0) >= 64 and entry["hmma"] > 0 and entry["hgmma"] == 0:
        found.append("no HGMMA")
    return found


def title(entry):
    """Name of a kernel, the constants that choose its code, and its launch options."""
    options, words = entry["options"], [entry["kernel"]]
    for name, value in entry["constants"].items():
        if value is True or type(value) is int and value > 1:
            words.append(f"{name}={value}")
    words += [f"w{options['num_warps']}", f"s{options['num_stages']}"]
    return " ".join(words if options["enable_fp_fusion"] else [*words, "bitwise"])


def print_table(report):
    """A Markdown table, one line for each compiled kernel."""
    print(f"triton {kernels.triton.__version__}, sm_90\n")
    print("| kernel, constants, warps, stages | instructions | registers | spill B | shared B | "
          "HGMMA | HMMA |")
    print("|---|---|---|---|---|---|---|")
    for e in report:
        print(f"| {title(e)} | {e['instructions']:,} | {e['registers']} | {e['spill']} "
              f"| {e['shared']:,} | {e['hgmma']} | {e['hmma']} |")


def parse_args():
    parser = flags.Parser("Compile every kernel for sm_90, without a GPU.")
    parser.add_argument("--json", action="store_true", help="one JSON list instead of a table")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    if kernels.INTERPRETED or not hasattr(kernels.triton, "compile"):
        raise ValueError("nothing to compile: Triton is not installed, or TRITON_INTERPRET=1 is "
                         "set")
    report = []
    with compile_launches(report):
        for backend in ("fast", "bitwise"):
            launch_everything(backend)
    if args.json:
        print(json.dumps(report, default=str))
    else:
        print_table(report)

    slow = 0
    for entry in report:
        for fault in faults(entry):
            print(f"{title(entry)}: {fault}", file=sys.stderr)
            slow = 1
    sys.exit(slow)
