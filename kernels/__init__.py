"""The operations that decide what RPT costs, each in a file with its plain-torch twin.

    attention.py   packed groups, every prompt once
    decode.py      one token for each row, over a KV cache
    logprob.py     log-probs and sampling without logits in memory
    linear.py      matrix product
    pointwise.py   RMSNorm, rotary positions, SwiGLU

Three backends (--kernels, or the environment variable NANORPT_KERNELS):
    torch      plain PyTorch, on every device; the default on a CPU
    fast       Triton for everything but the matrix product, which is cuBLAS's
    bitwise    Triton throughout: a row's result does not depend on the rows beside it, so the
               sampler's log-probs are the trainer's to the last bit (logp_gap 0.0); the default
               on a GPU

Sizes that change from batch to batch are in `do_not_specialize`: otherwise Triton would compile a
kernel again for multiples of 16, in the middle of a run. Importing this folder needs neither Triton
nor a GPU; elsewhere only bench/ imports Triton.
"""
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    # macOS, Windows: torch is the only backend; these let Python read the kernels nevertheless.
    class tl:
        constexpr = None

    class triton:
        @staticmethod
        def jit(kernel=None, **options):
            return kernel or triton.jit

BACKENDS = ("torch", "fast", "bitwise")
# Triton's interpreter runs the kernels on a CPU: slow, for tests.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and hasattr(triton, "compile")
# bench/compile.py sets this: kernels are then compiled instead of launched.
COMPILE_ONLY = False
requested = os.environ.get("NANORPT_KERNELS") or None
if INTERPRETED:
    from kernels import interpreter
    interpreter.repair()


def set_backend(name):
    """Choose torch, fast or bitwise for the whole process; None: bitwise on a GPU, else torch."""
    global requested
    if name is not None and name not in BACKENDS:
        raise ValueError(f"--kernels (or NANORPT_KERNELS) {name!r} is none of "
                         f"{', '.join(BACKENDS)}")
    requested = name


def backend(device):
    """The backend that runs on this torch.device; ValueError for Triton where it cannot run."""
    set_backend(requested)  # checks what the environment asked for
    name = requested or ("bitwise" if device.type == "cuda" else "torch")
    can_run_triton = device.type == "cuda" or INTERPRETED or COMPILE_ONLY
    if name != "torch" and not can_run_triton:
        raise ValueError(f"--kernels (or NANORPT_KERNELS) {name}: Triton kernels need a GPU, the "
                         f"device is {device.type}; torch runs there (TRITON_INTERPRET=1 "
                         "interprets the kernels, for tests)")
    return name


def cache_dtype(compute_dtype, device):
    """Of cached keys and values: fp32 on a CPU, whose small products in bf16 are slow."""
    on_cpu = device.type == "cpu" and backend(device) == "torch"
    return torch.promote_types(compute_dtype, torch.float32) if on_cpu else compute_dtype


def launch_options(backend, num_warps, num_stages=2):
    # Fused, a*b+c is rounded once. What the compiler fuses depends on the code around it, so the
    # bitwise backend, where two kernels must agree to the bit, does without.
    return dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=backend != "bitwise")


def dot_precision(x):
    """`input_precision` of tl.dot: fp32 is multiplied in fp32, not in TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
