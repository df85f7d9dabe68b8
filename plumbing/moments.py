"""The optimizer's moments on disk: each rank writes its rows, any number of ranks reads them.

    index.json                  {name: {"shape": [..], "parts": [[file, first row, end row], ..]}}
    rank_00000_0.safetensors    rows of rank 0; a file of less than FILE_BYTES, then the next one

Ranks that hold copies of the same rows (HSDP) write them once. Neither format can hold code.
"""
import json
import os

from plumbing import parallel
from plumbing.files import open_tensors, read_json, save_tensors, sync, write

FILE_BYTES = 2 * 10**9  # moments leave a GPU one file at a time


def moments(model, optimizer):
    """{name: tensor}: the optimizer's tensors by the names of their weights."""
    named = {}
    for name, weight in model.named_parameters():
        for key, tensor in optimizer.state[weight].items():
            # The count of steps becomes a tensor of one row, which shares its memory.
            named[f"{name}.{key}"] = tensor if tensor.ndim else tensor.view(1)
    return named


def save_moments(folder, model, optimizer):
    """Each rank writes its part; OSError if it cannot."""
    named = moments(model, optimizer)
    files, size, parts = [{}], 0, []
    for name, tensor in named.items():
        rows, (_, ranks) = parallel.local_slice(tensor), parallel.part(tensor)
        # The first ranks hold the first copy. There may be fewer rows than ranks.
        if parallel.RANK >= ranks or rows.start == rows.stop:
            continue
        part = parallel.local(tensor)
        if size + part.nbytes > FILE_BYTES and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = part
        size += part.nbytes
        parts.append((name, [file_name(len(files) - 1), rows.start, rows.stop]))

    # Ranks speak before they write, so that none waits for one whose disk is full.
    index = {name: dict(shape=list(tensor.shape), parts=[]) for name, tensor in named.items()}
    for name, part in parallel.gather_lists(parts):
        index[name]["parts"].append(part)
    os.makedirs(folder, exist_ok=True)
    for i, tensors in enumerate(files):
        path = f"{folder}/{file_name(i)}"
        tensors = {name: part.cpu().contiguous() for name, part in tensors.items()}
        save_tensors(tensors, path)
        sync(path)
    if parallel.RANK == 0:
        write(f"{folder}/index.json", json.dumps(index))


def file_name(i):
    return f"rank_{parallel.RANK:05d}_{i}.safetensors"


def load_moments(folder, model, optimizer):
    """Fill this rank's moments in place, reading only its rows; ValueError names what is wrong."""
    index, wanted = read_index(folder), {}
    for name, tensor in moments(model, optimizer).items():
        if index.get(name, {}).get("shape") != list(tensor.shape):
            raise ValueError(f"{folder}/index.json: {name} of shape {list(tensor.shape)} is not "
                             "in it; is this another model? Else take --init and another "
                             "--out-dir")
        mine, target = parallel.local_slice(tensor), parallel.local(tensor)
        for file, start, stop in index[name]["parts"]:
            low, high = max(start, mine.start), min(stop, mine.stop)
            if low < high:
                rows = target[low - mine.start:high - mine.start]
                shape, where = [stop - start, *tensor.shape[1:]], slice(low - start, high - start)
                wanted.setdefault(file, []).append((name, shape, where, rows))
    for file, pieces in wanted.items():
        with open_tensors(f"{folder}/{file}") as tensors:
            for name, shape, where, rows in pieces:
                found = tensors.get_slice(name)
                if found.get_shape() != shape:
                    raise ValueError(f"{folder}/{file}: {name} has other rows than index.json "
                                     "says")
                rows.copy_(found[where])
                if not rows.isfinite().all():
                    raise ValueError(f"{folder}/{file}: {name} is not finite (NaN or infinite)")


def read_index(folder):
    """index.json, once it is certain that all its files are there and whole; else ValueError."""
    path, files = f"{folder}/index.json", set()
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; only the newest checkpoint keeps its moments, "
                         "and older versions wrote others")
    index = read_json(path)
    try:
        for entry in index.values():
            names, starts, ends = zip(*entry["parts"])
            rows = [*starts, entry["shape"][0]]
            if rows != [0, *ends] or rows != sorted(rows) or {*map(type, rows)} != {int}:
                raise ValueError
            files.update(names)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected tensors whose parts make up all their rows") from None
    for file in files:
        with open_tensors(f"{folder}/{file}"):
            pass
    return index
