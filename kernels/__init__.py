"""The operations whose cost decides the cost of RPT, each in a file with its plain-torch reference.

    attention.py   packed groups, every prompt once            decode.py    one token a row over the KV cache
    logprob.py     log-prob, entropy, sampling without logits   rows.py      RMSNorm, SwiGLU, matrix product

Three kinds (--kernels, or the environment variable NANORPT_KERNELS):
    torch      the references: plain PyTorch, on every device; what a CPU uses
    fast       Triton where it beats torch; cuBLAS multiplies the matrices
    bitwise    Triton throughout: a row's result does not depend on the rows beside it, so the sampler's
               log-probs are the trainer's to the last bit (logp_gap 0.0); the default on a GPU

Nothing outside this folder imports Triton, and importing anything here needs neither Triton nor a GPU.
"""
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS, Windows: the references are all there is, and kernels need only be readable

    class tl:
        constexpr = None

    class triton:
        jit = staticmethod(lambda kernel: kernel)

KINDS = ("torch", "fast", "bitwise")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and hasattr(triton, "compile")  # slow, for tests
COMPILED_ONLY = False                          # bench/compile.py: wrappers run, kernels are compiled only
asked = os.environ.get("NANORPT_KERNELS") or None
if INTERPRETED:
    from kernels import interpreter
    interpreter.repair()


def use(kind):
    """Choose torch, fast or bitwise for the whole process; None: bitwise on a GPU, torch elsewhere."""
    global asked
    if kind is not None and kind not in KINDS:
        raise ValueError(f"--kernels (or NANORPT_KERNELS) {kind!r} is none of {', '.join(KINDS)}")
    asked = kind


def chosen(device):
    """The kind that runs on this device. ValueError for Triton kernels where they cannot run."""
    kind = asked or ("bitwise" if device.type == "cuda" else "torch")
    use(asked)
    if kind != "torch" and device.type != "cuda" and not (INTERPRETED or COMPILED_ONLY):
        raise ValueError(f"--kernels (or NANORPT_KERNELS) {kind}: Triton kernels need a GPU, the device is "
                         f"{device.type}; torch runs there (TRITON_INTERPRET=1 interprets them, for tests)")
    return kind


def options(kind, num_warps, num_stages=2):
    """Launch options. Without fusion a*b+c rounds twice in every kernel, whatever the compiler finds to fuse:
    the same formula then gives the same bits in two kernels."""
    return dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=kind != "bitwise")


def precision(x):
    """tl.dot in fp32 means fp32, not TF32."""
    return "ieee" if x.dtype == torch.float32 else "tf32"
