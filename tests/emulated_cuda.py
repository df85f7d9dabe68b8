"""A CUDA device emulated on the CPU, for what only a GPU would refuse or wait for.

    python tests/emulated_cuda.py SCRIPT ARGS...     the script with --device cuda as its default

Tensors say that they are on cuda:0 and hold their data on the CPU. Triton kernels are interpreted.
Whoever breaks one of these rules gets an exception, and the exit code is not 0 even if it is caught:

  - An operation takes tensors of one device. CPU tensors may be scalars (0-dim) or indices.
  - A kernel takes tensors on the device.
  - While a CUDA graph is captured, the host neither waits for the device (item, tolist, bool,
    nonzero, .cpu(), ...) nor copies to it. Elsewhere both are counted, by line.

A capture records operations and computes nothing: it leaves memory as it was, and what it makes
holds NaN. `replay` runs the operations on the same addresses. At the end a report goes to stderr.
Everything else is as fast and as precise as the CPU. What is patched stays patched, so this runs as
a process of its own and is not imported.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import GridExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# The size of what they return depends on data, so that the host waits for it.
SIZED_BY_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
                 "repeat_interleave"}
CUDA = torch.device("cuda", 0)
NAME = "NVIDIA H100 80GB HBM3 (emulated)"

# What is replaced below.
real = SimpleNamespace(tensor=torch.tensor, to=torch.Tensor.to, launch=GridExecutor.__call__)
syncs, copies, broken = Counter(), Counter(), Counter()
captures = []
capturing = None       # the CUDAGraph that records at the moment
GigaBytes = 10**9


# ---- rules ----

def line():
    """The innermost line of this repository, but not of this file, that is being run."""
    frame = sys._getframe()
    while frame:
        path = os.path.abspath(frame.f_code.co_filename)
        ours = path.startswith(ROOT + os.sep) and path.endswith(".py")
        if ours and path != os.path.abspath(__file__):
            return f"{os.path.relpath(path, ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def refuse(what):
    broken[f"{line()}  {what}"] += 1
    raise RuntimeError(what)


def note(counter, what):
    counter[f"{line()}  {what}"] += 1
    if capturing is not None:
        refuse(f"{what} while a CUDA graph is captured")


def check(name, args, kwargs):
    """Is this operation allowed here? Does the host wait for it, does it copy to the device?"""
    mixed = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name in ("copy_", "_to_copy"):
        source = args[1] if name == "copy_" else args[0]
        goes_to_device = is_cuda(args[0] if name == "copy_" else kwargs.get("device", source))
        if is_cuda(source) and not goes_to_device:
            note(syncs, "copy to the host")
        elif goes_to_device and not is_cuda(source):
            note(copies, "copy to the device")
        return
    if name in INDEXING:
        target, indices, *rest = args
        check_indices(target, [index for index in indices if index is not None], rest)
        mixed = [x for x in (target, *rest) if isinstance(x, torch.Tensor)]
    if any(map(is_cuda, mixed)) and any(x.ndim and not is_cuda(x) for x in mixed):
        refuse(f"{name}: expected all tensors to be on the same device, but found at least two "
               "devices, cuda:0 and cpu")
    if name == "_local_scalar_dense" or name in SIZED_BY_DATA:
        note(syncs, name)


def check_indices(target, indices, rest):
    if not is_cuda(target):
        refuse("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
    if not all(map(is_cuda, indices)):
        note(copies, "copy of an index to the device")
    # Torch fills under a mask in place; for everything else it looks where the mask is true.
    is_fill = rest and rest[0].ndim == 0 and not is_cuda(rest[0])
    if any(index.dtype == torch.bool for index in indices) and not is_fill:
        note(syncs, "nonzero of a mask")


# ---- tensors ----

class CudaTensor(torch.Tensor):
    """`data_on_cpu` on the device. C++ takes it for a meta tensor, which every build knows."""
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, data):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, data.size(), strides=data.stride(), storage_offset=data.storage_offset(),
            dtype=data.dtype, device="meta")
        tensor.data_on_cpu = data
        return tensor

    def __repr__(self):
        return f"CudaTensor({self.data_on_cpu})"

    def data_ptr(self):
        return self.data_on_cpu.data_ptr()

    def untyped_storage(self):
        return self.data_on_cpu.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    # C++ would make a meta tensor of a list or a number; a GPU gets them from the host.
    def __getitem__(self, index):
        return super().__getitem__(from_host(index))

    def __setitem__(self, index, value):
        value = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=self.dtype)
        super().__setitem__(from_host(index), value)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


# C++ would ask a driver before it asks us: in torch.tensor, and for the number of "cuda".
def tensor(data, device=None, requires_grad=False, **options):
    on_host = real.tensor(data, **options)
    return on_host.to(device or on_host.device).requires_grad_(requires_grad)


def to(x, *args, **kwargs):
    args, kwargs = tree_map(numbered, (args, kwargs))
    return real.to(x, *args, **kwargs)


def numbered(device):
    return CUDA if device == "cuda" or device == torch.device("cuda") else device


def from_host(index):
    if isinstance(index, tuple):
        return tuple(map(from_host, index))
    return torch.tensor(index) if isinstance(index, list) else index


def is_cuda(x):
    """A tensor on the device, or the device itself, by the name that C++ knows or by its own."""
    return isinstance(x, CudaTensor) or isinstance(x, torch.device) and x.type in ("cuda", "meta")


def data_of(x):
    return x.data_on_cpu if isinstance(x, CudaTensor) else x


class EmulatedDevice(TorchDispatchMode):
    """For the operations that have no tensor yet, such as torch.zeros(3, device="cuda")."""

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or torch would import its compiler, which takes a second and more

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def run(func, args, kwargs):
    """One operation of torch, on the data of its tensors."""
    given = tree_leaves((args, kwargs))
    if not any(map(is_cuda, given)):
        return func(*args, **kwargs)
    check(func._schema.name.removeprefix("aten::"), args, kwargs)
    device = kwargs.get("device")
    on_host = {} if device is None else dict(device=torch.device("cpu"))
    compute = partial(compute_on_cpu, func, *tree_map(data_of, (args, kwargs | on_host)))
    if capturing is not None:
        capturing.keep(map(data_of, written_by(func, args, kwargs)))
    result = compute()
    if capturing is not None:
        capturing.record(compute, tensors_in(result), tensors_in(tree_map(data_of, given)))

    # What an operation has changed in place stays the same object; all the rest is new.
    known = {id(data_of(x)): x for x in given if isinstance(x, torch.Tensor)}
    if device is None or is_cuda(device):
        known |= {id(x): CudaTensor(x) for x in tensors_in(result) if id(x) not in known}
    return tree_map(lambda x: known.get(id(x), x), result)


def compute_on_cpu(func, args, kwargs):
    if func == torch.ops.aten.mm.dtype:  # with another dtype for the result: only on a GPU
        return args[0].float() @ args[1].float()
    if func == torch.ops.aten._fused_sdp_choice.default:
        return torch.nn.attention.SDPBackend.MATH.value
    return func(*args, **kwargs)


def written_by(func, args, kwargs):
    """The tensors that an operation changes in place."""
    values = dict(zip((argument.name for argument in func._schema.arguments), args)) | kwargs
    return tensors_in([values[argument.name] for argument in func._schema.arguments
                       if argument.name in values and argument.is_write])


def tensors_in(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


# ---- kernels, graphs, streams ----

def launch(executor, *args, **kwargs):
    """A Triton kernel on its grid."""
    if not all(map(is_cuda, tensors_in((args, kwargs)))):
        refuse(f"{executor.fn.__name__}: pointer argument cannot be accessed from Triton (cpu "
               "tensor?)")
    args, kwargs = tree_map(data_of, (args, kwargs))
    compute = partial(real.launch, executor, *args, **kwargs)
    if capturing is not None:
        capturing.keep(tensors_in(args))
        capturing.operations.append(compute)
    compute()


class CUDAGraph:
    def __init__(self, keep_graph=False):
        self.operations = []   # functions that `replay` calls
        self.before = {}       # address of memory: its bytes, and what they were before the capture
        self.made = []         # bytes of the memory that the capture has made

    def capture_begin(self, pool=None, capture_error_mode="global"):
        global capturing
        if len(streams) == 1:
            refuse("CUDA graphs must be captured on a non-default stream")
        if self.operations:
            refuse("this CUDAGraph instance already owns a captured graph")
        capturing = self
        captures.append(line())

    def keep(self, tensors):
        """Remember memory that is about to be written."""
        for memory in map(bytes_of, tensors):
            if memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()

    def record(self, compute, results, inputs):
        addresses = {x.untyped_storage().data_ptr() for x in inputs}
        self.made += [bytes_of(x) for x in results
                      if x.untyped_storage().data_ptr() not in addresses]

        def again():
            for result, new in zip(results, tensors_in(compute())):
                if result.data_ptr() != new.data_ptr():
                    result.copy_(new)

        self.operations.append(again)

    def capture_end(self):
        global capturing
        capturing = None
        for memory, before in self.before.values():
            memory.copy_(before)
        for memory in self.made:
            memory.fill_(255)  # NaN in every floating-point type

    def replay(self):
        if not self.operations:
            refuse("replay without a successful capture")
        for operation in self.operations:
            operation()


def bytes_of(tensor):
    """All the memory that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


@contextmanager
def graph(cuda_graph, pool=None, stream=None, capture_error_mode="global"):
    torch.cuda.synchronize()
    with use_stream(stream or Stream()):
        cuda_graph.capture_begin(pool=pool, capture_error_mode=capture_error_mode)
        try:
            yield
        finally:
            cuda_graph.capture_end()


class Stream:
    def __init__(self, *_, **__):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        note(syncs, "synchronize")


class Event(Stream):
    def record(self, stream=None):
        pass

    def elapsed_time(self, end):
        return 1.0


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls)


streams = [Stream()]   # the default one, and those that are used inside it


@contextmanager
def use_stream(stream):
    streams.append(stream)
    try:
        yield
    finally:
        streams.pop()


# ---- the device and the report ----

def install():
    """Replace what torch and Triton would ask of a driver."""
    properties = SimpleNamespace(name=NAME, total_memory=80 * GigaBytes, major=9, minor=0,
                                 multi_processor_count=132)
    answers = dict(
        _lazy_init=None, is_available=True, device_count=1, current_device=0, set_device=None,
        empty_cache=None, get_device_name=NAME, get_device_properties=properties,
        get_device_capability=(9, 0), memory_allocated=0, memory_reserved=0, max_memory_allocated=0,
        reset_peak_memory_stats=None, mem_get_info=(70 * GigaBytes, 80 * GigaBytes),
        graph_pool_handle=(0, 1), get_rng_state=None, set_rng_state=None)
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda.synchronize = lambda *_: note(syncs, "synchronize")
    torch.cuda.current_stream = lambda *_: streams[-1]
    torch.cuda.is_current_stream_capturing = lambda: capturing is not None
    torch.cuda.stream, torch.cuda.graph = use_stream, graph
    torch.cuda.Stream, torch.cuda.Event, torch.cuda.CUDAGraph = Stream, Event, CUDAGraph
    torch.Generator = Generator
    torch.tensor, torch.Tensor.to, GridExecutor.__call__ = tensor, to, launch
    # A module that moves to another device gets new parameters; C++ could not change the old ones.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def report():
    print(f"\nemulated CUDA device: {len(captures)} captures", file=sys.stderr)
    for title, counter in (("syncs", syncs), ("copies", copies), ("broken rules", broken)):
        print(f"{title}: {counter.total()}", file=sys.stderr)
        for place, count in counter.most_common():
            print(f"{count:8}  {place}", file=sys.stderr)


def main():
    sys.argv = sys.argv[1:]
    script = os.path.abspath(sys.argv[0])
    sys.path[:1] = [os.path.dirname(script), ROOT]
    install()
    import sample
    sample.CHUNK["cuda"] = 2  # interpreted steps are slow, and most rollouts are short
    try:
        with EmulatedDevice():
            runpy.run_path(script, run_name="__main__")
    finally:
        report()
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
