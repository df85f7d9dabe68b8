"""Count what a GPU would be asked to do, without a GPU: launches, and bytes of small operations.

    python bench/launches.py             # Qwen2.5-1.5B's shapes, bitwise and fast

A decode step of few rows waits for launches as much as for memory: a kernel inside a CUDA graph
costs 1 to 2 us however little it does. In an update, operations that are no products of matrices
cost the time to read and write their tensors. Both are counted on tensors without data: operations
of torch by a dispatch mode, kernels by their launches, bytes by the tensors that go in and out.
"""
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
import sample
from bench.common import QWEN
from kernels import linear
from kernels.attention import make_layout
from model import GPT, Block
from plumbing import flags

# Operations that launch nothing: views, and tensors whose content does not matter yet.
SILENT = {"view", "t", "transpose", "slice", "select", "unsqueeze", "squeeze", "expand", "permute",
          "as_strided", "detach", "split", "split_with_sizes", "chunk", "alias", "_unsafe_view",
          "unbind", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided",
          "new_empty", "new_empty_strided"}
PRODUCTS = {"mm", "addmm", "linear_kernel", "forward_kernel", "dq_kernel", "dkv_kernel"}
GROUPS = [(1024, [1024] * 8), (1024, [1024] * 6)]   # 16,384 tokens


class Count(TorchDispatchMode):
    """launches: {operation: how many}; bytes: {operation: read and written}."""

    def __enter__(self):
        from triton.runtime.jit import JITFunction
        self.launches, self.bytes = Counter(), Counter()
        self.run, JITFunction.run = JITFunction.run, lambda kernel, *args, **_: self.add(
            kernel.__name__, args)
        kernels.COMPILE_ONLY = True
        return super().__enter__()

    def __exit__(self, *error):
        from triton.runtime.jit import JITFunction
        JITFunction.run, kernels.COMPILE_ONLY = self.run, False
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function._schema.name.split("::")[1]
        if name not in SILENT:
            self.add(name, (args, kwargs, out))
        return out

    def add(self, name, tensors):
        tensors = [x for x in tree_leaves(tensors) if isinstance(x, torch.Tensor)]
        self.launches[name] += 1
        # A dimension of stride 0 repeats what is there once.
        self.bytes[name] += sum(x.itemsize * torch.Size(
            size for size, stride in zip(x.shape, x.stride()) if stride).numel() for x in tensors)

    def small_bytes(self):
        """Bytes of everything but products of matrices and attention."""
        return sum(count for name, count in self.bytes.items() if name not in PRODUCTS)


def decode_step(config, layers):
    """Launches of a decode step of 64 rows, 8 to a prompt."""
    # Widths do not change the number of launches, and small ones save time.
    small = replace(config, n_layers=layers, vocab_size=4000, width=384, ffn_width=1120)
    model = GPT(small, torch.bfloat16).to(torch.bfloat16)
    with torch.no_grad(), Count() as count:
        model.join_weights()
        cache = sample.Cache(model, [[1] * 20] * 8, 8, 30, 64, 1)
        cache.rows.prompt_lens.fill_(20)
        cache.rows.place([row // 8 for row in range(64)])
        cache.rows.lengths.fill_(3)
        step = partial(sample.step, model, cache, partial(sample.draw_next, model, 0.8, None))
        step()  # the first one also makes the table of rotary angles
        cache.tokens.zero_()
        count.launches.clear()
        step()
    return count.launches


def update_bytes(config):
    """Bytes of the small operations of one block, forward and backward, for GROUPS."""
    # On a GPU a product of bf16 matrices is returned in fp32 without casts.
    as_on_gpu = linear.product
    linear.product = lambda a, b: torch.empty_like(a @ b, dtype=torch.float32)
    layout = make_layout(GROUPS, "meta")
    T = len(layout.positions)
    for axis, block in (("query", 128), ("key", 64)):
        layout.tiles(axis, block)  # made once for all blocks
    with torch.device("meta"):
        block = Block(config)
        x = torch.empty(T, config.width, dtype=torch.bfloat16, requires_grad=True)
        rope = torch.empty(2, T, 1, config.head_dim // 2).unbind()
    with Count() as count:
        block(x, rope, partial(layout.attend, 0)).backward(torch.empty_like(x))
    linear.product = as_on_gpu
    return count.small_bytes(), T


def report(config):
    print("| | launches of a layer in a decode step | of all 28 layers | "
          "GB of small operations, a layer and 16,384 tokens | kB a token |\n|---|---|---|---|---|")
    for backend in ("bitwise", "fast"):
        kernels.set_backend(backend)
        few, many = decode_step(config, 2), decode_step(config, 4)
        layer = (many.total() - few.total()) // 2
        moved, tokens = update_bytes(config)
        print(f"| {backend} | {layer} | {few.total() + (config.n_layers - 2) * layer} | "
              f"{moved / 1e9:.2f} | {moved / tokens / 1e3:.0f} |")
    each = {name: (many[name] - few[name]) // 2 for name in many if many[name] != few[name]}
    print("\na layer: " + ", ".join(f"{count} {name}" for name, count in each.items()))


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    flags.Parser("Launches and bytes, counted without a GPU.").parse_args()
    if kernels.INTERPRETED or not hasattr(kernels.triton, "compile"):
        raise ValueError("nothing to count: Triton is not installed, or TRITON_INTERPRET=1 is set")
    report(QWEN["1.5B"])
