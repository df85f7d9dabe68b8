"""A CUDA device emulated on the CPU: finds what a GPU would refuse, without one.

    python tests/emulated_cuda.py SCRIPT ARGS...     exit code 0: it ran and broke no rule

Tensors say that they are on cuda:0 and hold their data on the CPU; Triton kernels are interpreted.
Whoever breaks a rule gets an exception, and somebody who catches it does not save the exit code:

  - An operation takes tensors of one device, except for scalars (0-dim) and indices on the CPU.
  - A kernel takes tensors on the device.
  - While a CUDA graph is captured, the host neither waits for the device (item, tolist, nonzero,
    .cpu(), ...) nor copies to it. Elsewhere both are counted, by line; a report goes to stderr.

A capture records operations and leaves memory as it was; what it makes holds NaN. `replay` runs the
operations on the same addresses. Importing this file is of no use, because it patches torch.
"""
import os
import runpy
import sys
from collections import Counter
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined
import torch
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CUDA = torch.device("cuda", 0)
# What torch.cuda answers without a driver.
ANSWERS = dict(
    _lazy_init=None, is_available=True, device_count=1, current_device=0, set_device=None,
    empty_cache=None, get_device_name="NVIDIA H100 80GB HBM3 (emulated)", memory_allocated=0,
    get_device_properties=SimpleNamespace(total_memory=80 * 10**9, multi_processor_count=132),
    memory_reserved=0, max_memory_allocated=0, reset_peak_memory_stats=None,
    mem_get_info=(70 * 10**9, 80 * 10**9), graph_pool_handle=(0, 1), get_rng_state=None,
    set_rng_state=None)
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# The host waits for these, because it has to know a number or the size of a result.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
           "unique_consecutive", "repeat_interleave"}
real = SimpleNamespace(tensor=torch.tensor, to=torch.Tensor.to, launch=GridExecutor.__call__)

syncs, copies, broken = Counter(), Counter(), Counter()
captures = 0
capturing = None       # the CUDAGraph that records at the moment


# ---- rules ----

def refuse(what):
    broken[f"{line()}  {what}"] += 1
    raise RuntimeError(what)


def note(counter, what):
    counter[f"{line()}  {what}"] += 1
    if capturing:
        refuse(f"{what} while a CUDA graph is captured")


def line():
    """The innermost line of this repository, other than of this file, that is being run."""
    frame = sys._getframe()
    while frame:
        path = os.path.relpath(frame.f_code.co_filename, ROOT)
        if path.endswith(".py") and not path.startswith("..") and frame.f_globals is not globals():
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def check(name, args, kwargs):
    """Is this operation allowed here? Does the host wait for it, or copy to the device?"""
    together = tensors_in((args, kwargs))
    if name in ("copy_", "_to_copy"):
        *target, source = args[:2]
        to_device = is_cuda(target[0] if target else kwargs.get("device") or source)
        if to_device != is_cuda(source):
            note(*(copies, "copy to the device") if to_device else (syncs, "copy to the host"))
        return
    if name in INDEXING:
        target, indices, *values = args[:3]
        indices, together = tensors_in(indices), [target, *values]
        if not is_cuda(target) and any(map(is_cuda, indices)):
            refuse("indices should be on the cpu, as the indexed tensor is")
        if is_cuda(target) and not all(map(is_cuda, indices)):
            note(copies, "copy of an index to the device")
        # Torch fills under a mask; for all else it first looks where the mask is true.
        is_fill = values and values[0].ndim == 0 and not is_cuda(values[0])
        if not is_fill and any(index.dtype == torch.bool for index in indices):
            note(syncs, "nonzero of a mask")
    if any(map(is_cuda, together)) and any(x.ndim and not is_cuda(x) for x in together):
        refuse(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    if name in WAITING:
        note(syncs, name.replace("_local_scalar_dense", "item"))


# ---- tensors ----

class CudaTensor(torch.Tensor):
    """A tensor on the device. C++ takes it for a meta tensor, which every build of torch knows."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, data):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device="meta")
        tensor.on_cpu = data
        return tensor

    def __repr__(self):
        return f"CudaTensor({self.on_cpu})"

    def tolist(self):
        return self.cpu().tolist()

    # C++ would make meta tensors of lists and numbers; to a GPU they come from the host.
    def __getitem__(self, index):
        return super().__getitem__(from_host(index))

    def __setitem__(self, index, value):
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(from_host(index), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """For operations without such a tensor, as torch.zeros(3, device="cuda")."""
    # Otherwise torch would import its compiler, which takes a second and more.
    _should_skip_dynamo = classmethod(lambda cls: False)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def from_host(index):
    if isinstance(index, tuple):
        return tuple(map(from_host, index))
    return torch.tensor(index) if isinstance(index, list) else index


# C++ would ask a driver before it asks us: in torch.tensor, and for the number of "cuda".
def tensor(data, device=None, requires_grad=False, **options):
    on_host = real.tensor(data, **options)
    return on_host.to(device or on_host.device).requires_grad_(requires_grad)


def to(x, *args, **kwargs):
    args, kwargs = tree_map(lambda x: CUDA if x in ("cuda", torch.device("cuda")) else x,
                            (args, kwargs), is_leaf=lambda x: isinstance(x, torch.Tensor))
    return real.to(x, *args, **kwargs)


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


def is_cuda(x):
    """A tensor on the device, or the device by its name or by the one that C++ sees."""
    return isinstance(x, CudaTensor) or isinstance(x, torch.device) and x.type in ("cuda", "meta")


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def on_cpu(tree):
    return tree_map(lambda x: x.on_cpu if isinstance(x, CudaTensor) else x, tree)


def run(func, args, kwargs):
    """One operation of torch, on the data of its tensors."""
    if not any(map(is_cuda, tree_leaves((args, kwargs)))):
        return func(*args, **kwargs)
    check(func._schema.name.removeprefix("aten::"), args, kwargs)
    device = kwargs.get("device")
    on_host = {} if device is None else dict(device=torch.device("cpu"))
    compute = partial(compute_on_cpu, func, *on_cpu((args, kwargs | on_host)))
    values = dict(zip([argument.name for argument in func._schema.arguments], args)) | kwargs
    written = [values.get(argument.name) for argument in func._schema.arguments
               if argument.is_write]
    result = record(compute, tensors_in(on_cpu(written)), tensors_in(on_cpu((args, kwargs))))
    # What was changed in place stays the same object, all else is new.
    known = {id(on_cpu(x)): x for x in tensors_in((args, kwargs))}
    if device is None or is_cuda(device):
        known |= {id(x): CudaTensor(x) for x in tensors_in(result) if id(x) not in known}
    return tree_map(lambda x: known.get(id(x), x), result)


def compute_on_cpu(func, args, kwargs):
    if func == torch.ops.aten.mm.dtype:  # bf16 factors and an fp32 result: only on a GPU
        return args[0].float() @ args[1].float()
    if func == torch.ops.aten._fused_sdp_choice.default:
        return SDPBackend.MATH.value
    return func(*args, **kwargs)


def launch(executor, *args, **kwargs):
    """A Triton kernel on its grid."""
    if not all(map(is_cuda, tensors_in(args))):
        refuse(f"{executor.fn.__name__}: a pointer cannot be accessed from Triton (cpu tensor?)")
    args = on_cpu(args)
    record(partial(real.launch, executor, *args, **kwargs), tensors_in(args), tensors_in(args))


# ---- graphs and streams ----

def bytes_of(x):
    """All the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())


def record(compute, written, inputs):
    """compute(), which writes to some tensors; a graph that is being captured remembers it."""
    if not capturing:
        return compute()
    for memory in map(bytes_of, written):
        capturing.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
    result = compute()
    results, addresses = tensors_in(result), {bytes_of(x).data_ptr() for x in inputs}
    capturing.made += [x for x in map(bytes_of, results) if x.data_ptr() not in addresses]

    def again():
        for old, new in zip(results, tensors_in(compute())):
            if old.data_ptr() != new.data_ptr():
                old.copy_(new)

    capturing.operations.append(again)
    return result


class CUDAGraph:
    def __init__(self, keep_graph=False):
        self.operations = []
        self.before = {}       # address of memory: its bytes, and what they were
        self.made = []         # memory that the capture has made

    def capture_begin(self, pool=None, capture_error_mode="global"):
        global capturing, captures
        if len(streams) == 1:
            refuse("CUDA graphs must be captured on a non-default stream")
        capturing, captures = self, captures + 1

    def capture_end(self):
        global capturing
        capturing = None
        for memory, before in self.before.values():
            memory.copy_(before)
        for memory in self.made:
            memory.fill_(255)  # NaN in every floating-point type

    def replay(self):
        if not self.operations:
            refuse("replay without a capture")
        for operation in self.operations:
            operation()


@contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    torch.cuda.synchronize()
    with stream or Stream():
        cuda_graph.capture_begin(pool=pool, capture_error_mode=capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()


def synchronize(*_):
    note(syncs, "synchronize")


class Stream:
    """A stream, which inside `with` is the current one, or an event."""
    synchronize = synchronize

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        streams.append(self)

    def __exit__(self, *_):
        streams.pop()

    def wait_stream(self, other):
        pass

    def record(self):
        pass

    def elapsed_time(self, end):
        return 1.0


streams = [Stream()]   # the default one, and those of `with`, the current one last


# ---- a script ----

def patch():
    for name, value in ANSWERS.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for function in (Stream, CUDAGraph, graph, synchronize):
        setattr(torch.cuda, function.__name__, function)
    torch.cuda.Event = Stream
    torch.cuda.stream = lambda stream: stream
    torch.cuda.current_stream = lambda *_: streams[-1]
    torch.tensor, torch.Tensor.to, torch.Generator = tensor, to, Generator
    GridExecutor.__call__ = launch
    # A module that moves gets new parameters, because C++ could not change the old ones.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def report():
    print(f"\nemulated CUDA device: {captures} captures", file=sys.stderr)
    for title, counter in (("syncs", syncs), ("copies", copies), ("broken rules", broken)):
        print(f"{title}: {counter.total()}", file=sys.stderr)
        for place, count in counter.most_common():
            print(f"{count:8}  {place}", file=sys.stderr)


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    script = os.path.abspath(sys.argv[0])
    patch()
    sys.path[0] = ROOT
    import sample
    sample.CHUNK["cuda"] = 2  # few steps for nothing, because interpreted ones are slow
    sys.path.insert(0, os.path.dirname(script))
    code = 0
    try:
        with Device():
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code
    finally:
        report()
    sys.exit(code or bool(broken))
