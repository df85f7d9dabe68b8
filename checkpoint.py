"""A run's folder, and checkpoints that are complete or do not exist.

    RUN/args.json        what was asked for
    RUN/metrics.jsonl    one line for each step          RUN/samples.jsonl   some rollouts, word for word
    RUN/step_000090/     config.json, model.safetensors, tokenizer.json: loads alone, here and in transformers
                         trainer.pt: optimizer, step and data cursor; kept for the newest checkpoint only
    RUN/latest           name of the newest checkpoint

A checkpoint is written under another name and renamed, and `latest` moves last: a run that is killed at any
moment resumes from the last complete one. No random state is saved because none exists: data order and
sampling are functions of (seed, step).
"""
import glob
import json
import os
import shutil
import signal
import sys
from contextlib import suppress

import torch


def save_checkpoint(run, step, model, tokenizer, optimizer, **state):
    """Write RUN/step_{step}, then point `latest` at it. On a full disk: OSError, the old one stays."""
    folder = f"{run}/step_{step:06d}"
    partial = folder + ".partial"
    for leftover in glob.glob(f"{run}/step_*.partial"):  # of a run that was killed while saving
        shutil.rmtree(leftover)
    try:
        model.save_pretrained(partial)
        tokenizer.save(partial)
        try:
            torch.save(dict(step=step, optimizer=optimizer.state_dict(), **state), f"{partial}/trainer.pt")
        except RuntimeError as error:  # torch's way to say that a write failed
            raise OSError(f"{partial}/trainer.pt: cannot write ({str(error).splitlines()[0]})") from None
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{error}; is the disk full? The checkpoint before this one is intact") from None
    shutil.rmtree(folder, ignore_errors=True)   # a resumed run that comes by again
    os.rename(partial, folder)
    write(f"{run}/latest", os.path.basename(folder))
    for name in os.listdir(run):
        if name.startswith("step_") and name != os.path.basename(folder):
            with suppress(FileNotFoundError):
                os.remove(f"{run}/{name}/trainer.pt")


def latest_checkpoint(run):
    """Folder of the newest complete checkpoint, or None."""
    if not os.path.exists(f"{run}/latest"):
        return None
    with open(f"{run}/latest") as file:
        return f"{run}/{file.read().strip()}"


def load_trainer(folder, optimizer):
    """Restore the optimizer's moments in place -> the rest of the trainer's state, `step` among it."""
    state = torch.load(f"{folder}/trainer.pt", map_location="cpu", weights_only=True)
    settings = optimizer.state_dict()["param_groups"]  # of this command line: a changed --lr counts
    optimizer.load_state_dict(state.pop("optimizer") | dict(param_groups=settings))
    return state


def checkpoint_to_resume(args):
    """Folder of the checkpoint that --resume goes on from, or None; ValueError if it would erase a run."""
    checkpoint = latest_checkpoint(args.out_dir)
    if checkpoint and not args.resume:
        raise ValueError(f"{args.out_dir} already holds a run; --resume continues it, "
                         "another --out-dir starts afresh")
    return checkpoint


def open_run(args, checkpoint):
    """Make or reopen the run's folder; log lines behind the checkpoint go. Says which arguments changed."""
    run = args.out_dir
    if checkpoint:
        with open(f"{run}/args.json") as file:
            old = json.load(file) | dict(resume=args.resume)
        changed = ", ".join(f"{k} {old[k]} -> {v}" for k, v in vars(args).items() if k in old and old[k] != v)
        print(f"resuming from {checkpoint}" + (f"; changed: {changed}" if changed else ""), flush=True)
    os.makedirs(run, exist_ok=True)
    write(f"{run}/args.json", json.dumps(vars(args), indent=2))
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_log(f"{run}/{name}", int(checkpoint.rpartition("_")[2]) if checkpoint else 0)


def catch_interrupts():
    """-> a list that Ctrl-C or SIGTERM fills: the loop then ends its step and saves. A second one kills."""
    caught = []
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda number, frame: sys.exit(130) if caught else caught.append(number))
    return caught


def cut_log(path, step):
    """Drop the lines of steps after `step`: they will be written again. A torn last line goes with them."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            lines = [line for line in file if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        write(path, b"".join(lines).decode())


def append(path, records):
    """Add JSON lines to a log."""
    with open(path, "a") as file:
        file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def write(path, text):
    """Replace a file in one move."""
    with open(path + ".partial", "w") as file:
        file.write(text)
    os.replace(path + ".partial", path)
