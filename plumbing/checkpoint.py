"""A run's folder, and checkpoints that are complete or do not exist.

    RUN/args.json        what was asked for
    RUN/metrics.jsonl    one line for each step          RUN/samples.jsonl   some rollouts, word for word
    RUN/step_000090/     config.json, model.safetensors, tokenizer.json: loads alone, here and in transformers
        trainer.json     step and data cursor
        optimizer/       the moments, a file for each rank; kept for the newest checkpoint only
    RUN/latest           name of the newest checkpoint

A checkpoint is written under another name and renamed, and `latest` moves last: a run that is killed at any
moment resumes from the last complete one, on as many ranks as it likes. No random state is saved because none
exists: data order and sampling are functions of (seed, step).
"""
import glob
import json
import os
import shutil
import signal
import warnings

from plumbing import parallel


def save_checkpoint(run, step, model, tokenizer, optimizer, **state):
    """Write RUN/step_{step}, then point `latest` at it. Every rank calls this. OSError when a file cannot be
    written, on a full disk for example; the checkpoint before stays."""
    folder = f"{run}/step_{step:06d}"
    partial = folder + ".partial"

    def clean():
        for leftover in glob.glob(f"{glob.escape(run)}/step_*.partial"):  # of a run that was killed while saving
            shutil.rmtree(leftover)

    def describe():
        tokenizer.save(partial)
        write(f"{partial}/trainer.json", json.dumps(dict(step=step, **state)))

    def publish():
        shutil.rmtree(folder, ignore_errors=True)   # a resumed run that comes by again
        os.rename(partial, folder)
        write(f"{run}/latest", os.path.basename(folder))
        for old in glob.glob(f"{glob.escape(run)}/step_*/optimizer"):
            if os.path.dirname(old) != folder:
                shutil.rmtree(old)

    parallel.on_rank_0(clean)
    try:
        parallel.together(lambda: model.save_pretrained(partial))
        parallel.on_rank_0(describe)
        parallel.together(lambda: save_moments(f"{partial}/optimizer", model, optimizer))
        parallel.on_rank_0(publish)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{error}; is the disk full? The checkpoint before this one is intact") from None


def moments(model, optimizer):
    """The optimizer's tensors by the names of their weights, whatever the number of ranks: {name: tensor}."""
    return {f"{name}.{key}": tensor for name, weight in model.named_parameters()
            for key, tensor in optimizer.state[weight].items()}


def save_moments(folder, model, optimizer):
    """Each rank writes its rows; OSError on all ranks when one cannot."""
    from torch.distributed import checkpoint  # a second to import
    with warnings.catch_warnings(action="ignore"):  # that this is a single process
        try:
            checkpoint.save(moments(model, optimizer), checkpoint_id=folder, no_dist=parallel.WORLD == 1)
        except checkpoint.CheckpointException as error:
            raise OSError(f"{folder}: cannot write ({first_cause(error)})") from error


def first_cause(error):
    """The first rank's reason among those that a CheckpointException carries, in one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, (AttributeError, TypeError, NameError)):  # a bug, not a file
        raise cause
    return f"rank {rank}: {(str(cause) or repr(cause)).splitlines()[0]}"


def latest_checkpoint(run):
    """Folder of the newest complete checkpoint, or None."""
    if not os.path.exists(f"{run}/latest"):
        return None
    with open(f"{run}/latest") as file:
        return f"{run}/{file.read().strip()}"


def load_trainer(folder, model, optimizer):
    """Restore the optimizer's moments in place -> the rest of the trainer's state, `step` among it.

    Settings such as the learning rate are those of this command line. ValueError for damaged files.
    """
    from torch.distributed import checkpoint
    with warnings.catch_warnings(action="ignore"):
        try:
            checkpoint.load(moments(model, optimizer), checkpoint_id=f"{folder}/optimizer",
                            no_dist=parallel.WORLD == 1)
        except checkpoint.CheckpointException as error:
            raise ValueError(f"{folder}/optimizer: damaged or incomplete ({first_cause(error)})") from error
    with open(f"{folder}/trainer.json") as file:
        return json.load(file)


def checkpoint_to_resume(args):
    """Folder of the checkpoint that --resume goes on from, or None.

    ValueError if the run would be erased, or is not one of this trainer.
    """
    checkpoint = latest_checkpoint(args.out_dir)
    if checkpoint and not args.resume:
        raise ValueError(f"{args.out_dir} already holds a run; --resume continues it, "
                         "another --out-dir starts afresh")
    if checkpoint:
        with open(f"{args.out_dir}/args.json") as file:
            if ("rollouts" in json.load(file)) != hasattr(args, "rollouts"):
                raise ValueError(f"{args.out_dir} is a run of the other trainer: take --init {checkpoint} and "
                                 "another --out-dir")
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
    """-> a list that Ctrl-C or SIGTERM fills: the loop then ends its step, saves and exits with 0.

    A second Ctrl-C ends at once. A second SIGTERM does not: torchrun sends one behind every Ctrl-C.
    """
    caught = []

    def handle(number, frame):
        if number == signal.SIGINT and signal.SIGINT in caught:
            os._exit(130)
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
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
