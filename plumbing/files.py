"""Files that are complete or do not exist, and a folder that one process writes at a time."""
import json
import os
import re
import shutil
import socket
import time
from contextlib import contextmanager, suppress
from datetime import datetime

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def read_json(path):
    """The JSON object in a file; ValueError for anything else."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: broken JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {json.dumps(content)[:40]}")
    return content


def save_tensors(tensors, path):
    """Write a safetensors file with the permissions that any new file gets; OSError if it fails."""
    open(path, "wb").close()
    mode = os.stat(path).st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as reason:  # a full disk
        raise OSError(f"{path}: cannot write ({reason})") from None
    # safetensors renames a temporary file, which nobody else may read.
    os.chmod(path, mode)


@contextmanager
def open_tensors(path):
    """A safetensors file to read; ValueError if it is damaged or lacks a tensor."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or incomplete ({error}); copy or download it "
                         "again") from None


def write(path, text):
    """Replace a file at once: write another one and rename it. text: str or bytes."""
    with open(path + ".partial", "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    sync(path + ".partial")
    os.replace(path + ".partial", path)
    sync(os.path.dirname(path) or ".")


def sync(path):
    """Wait until a file, or the list of names in a folder, would survive a power cut."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_tree(folder):
    """`sync` for a folder and everything in it."""
    for place, _, names in os.walk(folder):
        for name in names:
            sync(f"{place}/{name}")
        sync(place)


def remove(checkpoint):
    """Delete a checkpoint under another name, so that a kill leaves no half of one."""
    os.rename(checkpoint, checkpoint + ".old.partial")
    delete(checkpoint + ".old.partial")


def delete(path):
    """Delete a file, a folder, or a link but not what it points to."""
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def lock(folder):
    """Make this process the only one that writes to a folder -> a file to `sign` and keep open.

    ValueError names the process that came first. The system drops the lock when the file is closed
    or the process ends, however it ends.
    """
    os.makedirs(folder, exist_ok=True)
    file = open(f"{folder}/lock", "a+", encoding="utf-8")
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        time.sleep(0.5)  # it may have come just now, and not have written its name
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise ValueError(f"{folder} is in use by {owner}: wait for it or end it, or take another "
                         "--out-dir") from None
    except (ImportError, OSError) as error:  # Windows, some network file systems
        print(f"warning: {folder} cannot be locked ({error}): make sure that only one process "
              "writes to it", flush=True)
    return file


def sign(locked):
    """Write into a lock whose it is."""
    locked.truncate(0)
    locked.write(f"pid {os.getpid()} on {socket.gethostname()} "
                 f"since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
    locked.flush()


# ---- the checkpoints of a run ----

def checkpoints(run):
    """Everything that is named like a checkpoint in the folder of a run, newest first."""
    # Not by glob, which would find RUN/step_000001 in "RUN/": another name than `save` gave it.
    names = os.listdir(run) if os.path.isdir(run) else []
    found = [f"{run}/{name}" for name in names if re.fullmatch(r"step_\d{6,}", name)]
    return sorted(found, key=number_of, reverse=True)


def number_of(checkpoint):
    """The steps after which it was saved."""
    return int(checkpoint.rpartition("_")[2])


def read_latest(run):
    """What the file `latest` says; "" if it cannot be read."""
    with suppress(OSError, ValueError), open(f"{run}/latest", encoding="utf-8") as file:
        return file.read().strip()
    return ""


def latest_checkpoint(run):
    """Folder of the newest checkpoint, or None: what `latest` names, unless only others exist."""
    name, found = read_latest(run), checkpoints(run)
    if found and f"{run}/{name}" not in found:
        return found[0]
    return f"{run}/{name}" if name else None


def newest_hint(folder):
    """What to add to "no checkpoint in this folder" if it is the folder of a run."""
    newest = latest_checkpoint(folder)
    return f"; its newest checkpoint is {newest}" if newest else ""
