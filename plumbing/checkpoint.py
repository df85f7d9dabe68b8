"""A run's folder, and checkpoints that are complete or do not exist.

    RUN/args.json        what was asked for
    RUN/metrics.jsonl    one line for each step
    RUN/samples.jsonl    some rollouts, word for word
    RUN/step_000090/     a Hugging Face folder with its tokenizer, for us and for transformers
        trainer.json     step and data cursor
        optimizer/       the moments, a file for each rank; kept for the newest checkpoint only
    RUN/latest           name of the newest checkpoint

A checkpoint is written under another name and then renamed, and `latest` is updated last. So a run
that is killed at any moment resumes from the last complete checkpoint, on any number of ranks.
There is no random state to save, because data order and sampling are functions of (seed, step).
"""
import glob
import json
import os
import shutil
import signal
import warnings
from datetime import datetime

from plumbing import flags, parallel


class Run:
    """The folder of a run: where it stands, and when it is over."""

    def __init__(self, args):
        """Look for the checkpoint that --resume continues; nothing is written."""
        self.args = args
        self.folder = args.out_dir
        self.checkpoint = checkpoint_to_resume(args)  # a folder, or None in a new run
        self.step = 0                                 # steps taken so far
        self.cursor = 0                               # positions used so far
        self.interrupts = []

    def open(self, model, optimizer):
        """Restore the trainer, open the folder and catch interrupts. All ranks call this."""
        if self.checkpoint:
            state = load_trainer(self.checkpoint, model, optimizer)
            self.step, self.cursor = state["step"], state.get("cursor", 0)
        self.interrupts = catch_interrupts()
        parallel.on_rank_0(open_folder, self.args, self.checkpoint)

    def is_over(self):
        """Was this the last step, or has any rank been interrupted? All ranks call this."""
        interrupted = any(parallel.gather_lists([bool(self.interrupts)]))
        return interrupted or self.step >= self.args.steps

    def is_due(self):
        """Is it time for a checkpoint?"""
        return self.step % self.args.save_every == 0

    def farewell(self, hint=""):
        """Say how the run ended."""
        if self.step < self.args.steps:
            parallel.print0(f"stopped after step {self.step} and saved; "
                            "the same command with --resume continues")
        else:
            parallel.print0(f"done: {latest_checkpoint(self.folder)}{hint}")


def checkpoint_to_resume(args):
    """Folder of the checkpoint that --resume continues, or None.

    ValueError if the run would be overwritten, or belongs to the other trainer.
    """
    checkpoint = latest_checkpoint(args.out_dir)
    if checkpoint and not args.resume:
        raise ValueError(f"{args.out_dir} already holds a run; --resume continues it, "
                         "another --out-dir starts afresh")
    if checkpoint:
        with open(f"{args.out_dir}/args.json", encoding="utf-8") as file:
            is_rpt = "rollouts" in json.load(file)
        if is_rpt != hasattr(args, "rollouts"):
            raise ValueError(f"{args.out_dir} is a run of the other trainer: take --init "
                             f"{checkpoint} and another --out-dir")
    return checkpoint


def latest_checkpoint(run):
    """Folder of the newest complete checkpoint, or None."""
    if not os.path.exists(f"{run}/latest"):
        return None
    with open(f"{run}/latest", encoding="utf-8") as file:
        return f"{run}/{file.read().strip()}"


def newest_hint(folder):
    """What to add to "no checkpoint in this folder" if it is the folder of a run."""
    newest = latest_checkpoint(folder)
    return f"; its newest checkpoint is {newest}" if newest else ""


def open_folder(args, checkpoint):
    """Make or reopen a run's folder, cut its logs at the checkpoint, print changed arguments."""
    run = args.out_dir
    if checkpoint:
        with open(f"{run}/args.json", encoding="utf-8") as file:
            old = json.load(file) | dict(resume=args.resume)
        changed = [f"{name} {old[name]} -> {value}" for name, value in vars(args).items()
                   if name in old and old[name] != value]
        about = f"; changed: {', '.join(changed)}" if changed else ""
        print(f"resuming from {checkpoint}{about}", flush=True)
    os.makedirs(run, exist_ok=True)
    made = flags.versions() | dict(begun=f"{datetime.now():%Y-%m-%d %H:%M}")
    write(f"{run}/args.json", json.dumps(vars(args) | made, indent=2))
    last_step = int(checkpoint.rpartition("_")[2]) if checkpoint else 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        cut_log(f"{run}/{name}", last_step)


def cut_log(path, step):
    """Drop lines of steps after `step`, which will be written again, and a torn last line."""
    if os.path.exists(path):
        with open(path, "rb") as file:
            lines = [line for line in file
                     if line.endswith(b"\n") and json.loads(line)["step"] <= step]
        write(path, b"".join(lines).decode())


def catch_interrupts():
    """-> a list that Ctrl-C or SIGTERM fills; the loop then ends its step, saves and exits with 0.

    A second Ctrl-C ends the process at once. A second SIGTERM does not, because torchrun sends one
    after every Ctrl-C.
    """
    caught = []

    def handle(number, frame):
        if number == signal.SIGINT and signal.SIGINT in caught:
            os._exit(130)
        if not caught and parallel.RANK == 0:
            # Not print, because the signal may come while something else is being printed. The
            # empty line is for the step's line, which replaces the one above it on a terminal.
            os.write(2, b"\nstopping after this step; a second Ctrl-C ends the run at once\n\n")
        caught.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return caught


# ---- saving and loading ----

def save_checkpoint(run, step, model, tokenizer, optimizer, **state):
    """Write RUN/step_{step}, then point `latest` at it. Every rank calls this.

    OSError when a file cannot be written, on a full disk for example; the checkpoint before this
    one stays.
    """
    folder = f"{run}/step_{step:06d}"
    partial = folder + ".partial"
    parallel.on_rank_0(remove_partial_saves, run)
    try:
        parallel.together(model.save_pretrained, partial)
        parallel.on_rank_0(save_the_rest, partial, tokenizer, dict(step=step, **state))
        parallel.together(save_moments, f"{partial}/optimizer", model, optimizer)
        parallel.on_rank_0(publish, run, partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{error}; is the disk full? The checkpoint before this one is "
                      "intact") from None


def remove_partial_saves(run):
    """Remove what a run that was killed while saving has left behind."""
    for leftover in glob.glob(f"{glob.escape(run)}/step_*.partial"):
        shutil.rmtree(leftover)


def save_the_rest(partial, tokenizer, state):
    tokenizer.save(partial)
    write(f"{partial}/trainer.json", json.dumps(state))


def publish(run, partial, folder):
    """Give a complete checkpoint its name, update `latest`, drop the moments of older ones."""
    shutil.rmtree(folder, ignore_errors=True)   # from before the run was resumed
    os.rename(partial, folder)
    write(f"{run}/latest", os.path.basename(folder))
    for old in glob.glob(f"{glob.escape(run)}/step_*/optimizer"):
        if os.path.dirname(old) != folder:
            shutil.rmtree(old)


def moments(model, optimizer):
    """{name: tensor}: the optimizer's tensors by the names of their weights."""
    named = {}
    for name, weight in model.named_parameters():
        for key, tensor in optimizer.state[weight].items():
            named[f"{name}.{key}"] = tensor
    return named


def save_moments(folder, model, optimizer):
    """Each rank writes its part; OSError on all ranks if one of them cannot."""
    from torch.distributed import checkpoint        # takes a second to import
    with warnings.catch_warnings(action="ignore"):  # about running in a single process
        try:
            checkpoint.save(moments(model, optimizer), checkpoint_id=folder,
                            no_dist=parallel.WORLD == 1)
        except checkpoint.CheckpointException as error:
            raise OSError(f"{folder}: cannot write ({first_cause(error)})") from error


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
            raise ValueError(f"{folder}/optimizer: damaged or incomplete "
                             f"({first_cause(error)})") from error
    with open(f"{folder}/trainer.json", encoding="utf-8") as file:
        return json.load(file)


def first_cause(error):
    """The reason that a CheckpointException gives for its first rank, in one line."""
    rank, (cause, _) = next(iter(error.failures.items()))
    if isinstance(cause, (AttributeError, TypeError, NameError)):  # a bug, not a damaged file
        raise cause
    return f"rank {rank}: {(str(cause) or repr(cause)).splitlines()[0]}"


def write(path, text):
    """Replace a file at once: write another one and rename it."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(path + ".partial", path)
