"""How the tables of bench.py are measured: check a result, time it, put it in a cell beside what is possible."""
import functools
import gc
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Callable

import torch

import kernels

# bf16 FLOP/s, bytes/s. H200: measured, 80 % and 90 % of its data sheet; the others: those shares of theirs.
LIMITS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12), "A100": (250e12, 1.8e12)}
OURS = ("fast", "bitwise")
WRONG_FROM = 0.05         # relative error. bf16 is good to about 0.004, sums kept in bf16 to about 0.02


@dataclass
class Method:
    call: Callable
    inputs: tuple             # of call; gradients are taken with respect to all of them
    check: Callable           # (result, gradients) -> {what: (error, the largest that is right)}
    dout: Any = None          # gradient of the result; None: ones, for a scalar
    graph: bool = False       # time it as a CUDA graph


def time_ms(f, graph=False):
    """Median milliseconds of f(). do_bench overwrites 256 MB before each call: nothing is left in the L2."""
    from triton.testing import do_bench
    return do_bench(captured(f) if graph else f, warmup=10, rep=60, return_mode="median")


def captured(f):
    """f() as a CUDA graph. Without it a step of decoding would take as long as Python takes to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        f()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def peak_mb(f):
    """MB that f() needs beyond what is allocated already, its results included."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    f()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(build, passes):
    """Build a Method, check it, time it -> {pass: ms, wrong, errors, peak} or {reason: why not}.

    passes: some of fwd, bwd, fwd+bwd. bwd is fwd+bwd without fwd, which is then a training forward.
    """
    try:
        method = build()
        both = lambda: torch.autograd.grad(method.call(*method.inputs), method.inputs, method.dout)
        alone = method.inputs if "bwd" in passes else [x.detach() for x in method.inputs]
        result, gradients = method.call(*method.inputs), ()
        if "fwd+bwd" in passes:
            gradients = torch.autograd.grad(result, method.inputs, method.dout)
            result = result.detach()
        errors = method.check(result, gradients)
        del result, gradients
        wrong = [f"{what} off by {error:.1e}" for what, (error, most) in errors.items() if not error <= most]
        ms = dict(fwd=time_ms(lambda: method.call(*alone), method.graph))
        if "fwd+bwd" in passes:
            ms |= {"peak": peak_mb(both), "fwd+bwd": time_ms(both)}
        if "bwd" in passes:
            ms["bwd"] = max(ms["fwd+bwd"] - ms["fwd"], 1e-6)
        return ms | dict(wrong=", ".join(wrong), errors={what: error for what, (error, _) in errors.items()})
    except Exception as error:  # other people's code on unknown shapes: whatever happens belongs in its cell
        return dict(reason=short(error))
    finally:
        method = both = alone = None
        gc.collect()
        with suppress(RuntimeError):  # after an illegal memory access nothing works, but the table goes on
            torch.cuda.empty_cache()


def short(error):
    """An exception in a few words."""
    if isinstance(error, ModuleNotFoundError):
        return "not installed"
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}".replace("|", "/")[:70].removesuffix(": ")


def cell(result, name, work, limits):
    """One pass of one method as text. work: FLOPs and bytes; what takes longer at the limit is the limit."""
    if "reason" in result:
        return result["reason"]
    (flops, moved), (peak, bandwidth), seconds = work, limits, result[name] / 1e3
    computing, moving = flops / peak, moved / bandwidth
    rate, unit = (flops / 1e12, "TFLOP/s") if computing > moving else (moved / 1e9, "GB/s")
    rate, least = f"{rate / seconds:.0f} {unit}", max(computing, moving)
    mark = f"WRONG ({result['wrong']}) " if result["wrong"] else ""
    return f"{mark}{result[name]:.3f} ms, {rate}, {least / seconds:.0%}"


def against_best(results, name):
    """Time of the best alternative / time of `fast`; in parentheses are bounds, not alternatives."""
    right = {method: r[name] for method, r in results.items() if "reason" not in r and not r["wrong"]}
    others = {method: ms for method, ms in right.items() if method not in OURS and not method.startswith("(")}
    if "fast" not in right or not others:
        return "-"
    best = min(others, key=others.get)
    return f"{others[best] / right['fast']:.2f} {best}"


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def ours(kind, operation):
    """operation, computed by the kernels of this kind."""
    def call(*inputs):
        kernels.use(kind)
        return operation(*inputs)
    return call


@functools.cache
def compiled(function, dynamic=None):
    """torch.compile. Past the limit of recompilations it would silently run eagerly; so it fails there."""
    import torch._dynamo
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=dynamic)


def randn(*shape, device, dtype, seed=0):
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device, dtype=dtype)
