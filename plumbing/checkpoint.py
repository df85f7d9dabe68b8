"""A run's folder, and checkpoints that are complete or do not exist.

    RUN/args.json        what was asked for
    RUN/metrics.jsonl    one line for each step
    RUN/samples.jsonl    some rollouts, word for word
    RUN/step_000090/     a Hugging Face folder with its tokenizer, for us and for transformers
        trainer.json     step and data cursor
        optimizer/       the moments (plumbing/moments.py); kept for the newest checkpoint only
    RUN/latest           name of the newest checkpoint
    RUN/lock             which process writes here

A checkpoint is written under another name, flushed to the disk and then renamed, and `latest` is
updated last. So a run that ends at any moment, by kill -9 or a power cut, resumes from the last
complete checkpoint, on any number of ranks. There is no random state to save, because data order
and sampling are functions of (seed, step).
"""
import glob
import json
import os
import shutil
import signal
import time
from contextlib import suppress
from datetime import datetime

from plumbing import flags, parallel
from plumbing.files import (checkpoints, delete, latest_checkpoint, lock, number_of, open_tensors,
                            read_json, read_latest, remove, sign, sync, sync_tree, write)
from plumbing.hf import read_config, weight_files
from plumbing.moments import load_moments, read_index, save_moments

LOGS = "metrics.jsonl", "samples.jsonl"
SAME_PRESS = 0.7  # seconds, because terminals, torchrun and `timeout` may pass a Ctrl-C on twice


class Run:
    """The folder of a run: where it stands, and when it is over."""

    def __init__(self, args):
        """Look for the checkpoint that --resume continues; nothing of a run is written."""
        self.args = args
        self.folder = args.out_dir
        self.lock = None      # on rank 0, once there is a folder
        self.step = 0         # steps taken so far
        self.cursor = 0       # how much of the data they have used; train_ntp keeps two counts
        self.interrupts = []
        found = None
        if parallel.RANK == 0:
            if os.path.exists(f"{self.folder}/lock"):
                self.lock = lock(self.folder)
            found = checkpoint_to_resume(args)
            # A start that is refused changes no file.
            if self.lock:
                sign(self.lock)
        # A folder, or None in a new run, and what to say about the choice.
        self.checkpoint, self.remarks = parallel.gather_lists([found])[0]

    def open(self, model, optimizer):
        """Restore the trainer, open the folder and catch interrupts. All ranks call this."""
        parallel.on_rank_0(self.claim)
        if self.checkpoint:
            state = load_trainer(self.checkpoint, model, optimizer)
            self.step, self.cursor = state["step"], state.get("cursor", 0)
        self.interrupts = catch_interrupts()
        parallel.on_rank_0(open_folder, self.args, self.checkpoint, self.remarks)

    def claim(self):
        """Lock the folder, unless another run has trained in it while the model was loaded."""
        if not self.lock:
            self.lock = lock(self.folder)
            sign(self.lock)
        if checkpoint_to_resume(self.args)[0] != self.checkpoint:
            raise ValueError(f"{self.folder}: another process has trained here while this one "
                             "started; start the same command again")

    def is_over(self):
        """Was this the last step, or has any rank been interrupted? All ranks call this."""
        interrupted = any(parallel.gather_lists([bool(self.interrupts)]))
        return interrupted or self.step >= self.args.steps

    def is_due(self):
        """Is it time for a checkpoint?"""
        return self.step % self.args.save_every == 0

    def save(self, model, tokenizer, optimizer):
        """Write a checkpoint, and drop those that --keep does not want. All ranks call this."""
        save_checkpoint(self.folder, self.step, model, tokenizer, optimizer, cursor=self.cursor)
        if self.args.keep:
            parallel.on_rank_0(drop_checkpoints, self.folder, self.step, self.args)

    def farewell(self, hint=""):
        """Say how the run ended."""
        if self.step < self.args.steps:
            parallel.print0(f"stopped after step {self.step} and saved; "
                            "the same command with --resume continues")
        else:
            parallel.print0(f"done: {latest_checkpoint(self.folder)}{hint}")
        if self.lock:
            self.lock.close()


# ---- opening ----

def checkpoint_to_resume(args):
    """-> folder of the checkpoint that --resume continues or None, and remarks about the choice.

    ValueError if a run would be overwritten or cannot be continued.
    """
    run = args.out_dir
    has_checkpoints = bool(checkpoints(run))
    has_latest, has_log = (os.path.lexists(f"{run}/{name}") for name in ("latest", LOGS[0]))
    if not args.resume and (has_checkpoints or has_latest or has_log):
        raise ValueError(f"{run} already holds a run; --resume continues it, "
                         "another --out-dir starts afresh")
    if has_checkpoints:
        return newest_complete(run, hasattr(args, "rollouts"))
    if has_latest:
        raise ValueError(f"{run}/latest: there is no checkpoint beside it; put one back, delete "
                         "this file to start at step 0, or take another --out-dir")
    return None, [f"{run} holds no checkpoint: starting at step 0"] if has_log else []


def newest_complete(run, is_rpt):
    """-> the newest checkpoint that is complete, and remarks if that is not what `latest` names.

    ValueError if there is none, or if the run belongs to the other trainer.
    """
    newest, problems, weights = latest_checkpoint(run), [], None
    if os.path.basename(newest) != read_latest(run):
        problems.append(f"{run}/latest names no checkpoint")
    for folder in checkpoints(run):
        # `latest` may have been set back by hand.
        if number_of(folder) > number_of(newest):
            continue
        try:
            check_weights(folder)
            weights = weights or folder
            state = read_trainer(folder)
            read_index(f"{folder}/optimizer")
        except (OSError, ValueError) as error:
            problems.append(error)
            continue
        if isinstance(state.get("cursor"), int) != is_rpt:
            raise ValueError(f"{run} is a run of the other trainer: take --init {folder} and "
                             "another --out-dir")
        return folder, [f"{problem}: taking {folder}" for problem in problems]
    way_out = f"--init {weights} and another --out-dir start from its weights"
    raise ValueError(f"{problems[0]}; no checkpoint here has all that --resume needs"
                     + (f", but {way_out}" if weights else ""))


def check_weights(folder):
    """OSError or ValueError about what is missing or damaged in a Hugging Face folder."""
    read_config(folder)
    read_json(f"{folder}/tokenizer.json")
    for path in weight_files(folder):
        with open_tensors(path):
            pass


def read_trainer(folder):
    """trainer.json: `step`, and `cursor` unless it is old."""
    path = f"{folder}/trainer.json"
    state = read_json(path)
    cursor = state.get("cursor", {})
    counts = cursor.values() if isinstance(cursor, dict) else [cursor]
    are_counts = all(type(count) is int and count >= 0 for count in counts)
    step = state.get("step")
    if type(step) is not int or step != number_of(folder) or not are_counts:
        raise ValueError(f"{path}: expected the step of this folder and a data cursor, "
                         f"got {json.dumps(state)[:80]}")
    return state


def open_folder(args, checkpoint, remarks):
    """Make or reopen a run's folder, cut its logs at the checkpoint, print changed arguments."""
    run = args.out_dir
    for remark in remarks:
        print(remark, flush=True)
    if checkpoint:
        try:
            old = read_json(f"{run}/args.json") | dict(resume=args.resume)
        except (OSError, ValueError) as error:
            print(f"{error}: written anew", flush=True)
            old = {}
        changed = [f"{name} {old[name]} -> {value}" for name, value in vars(args).items()
                   if name in old and old[name] != value]
        about = f"; changed: {', '.join(changed)}" if changed else ""
        print(f"resuming from {checkpoint}{about}", flush=True)
    made = flags.versions() | dict(begun=f"{datetime.now():%Y-%m-%d %H:%M}")
    write(f"{run}/args.json", json.dumps(vars(args) | made, indent=2))
    step = number_of(checkpoint) if checkpoint else 0
    last, _ = [cut_log(f"{run}/{name}", step) for name in LOGS]
    if last < step:
        print(f"{run}/{LOGS[0]}: says nothing about steps {last + 1} to {step}", flush=True)


def cut_log(path, step):
    """Drop lines after `step`, which come again, and broken ones -> the last step that is left."""
    kept, broken, last = [], [], 0
    if not os.path.exists(path):
        return last
    with open(path, "rb") as file:
        lines = file.readlines()
    for number, line in enumerate(lines, 1):
        here = step_of(line)
        if here is None:
            broken.append(number)
        elif here > step:
            break
        else:
            kept.append(line)
            last = here
    # A kill while the next step is logged tears a line, which is no loss.
    if broken and broken[-1] == len(lines) and last == step:
        broken.pop()
    if broken:
        print(f"{path}: dropped what is not JSON with a step: line "
              + ", ".join(map(str, broken)), flush=True)
    write(path, b"".join(kept))
    return last


def step_of(line):
    """The step of a line in a log, or None if it is torn or broken."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        step = json.loads(line)["step"]
        return step if type(step) is int and line.endswith(b"\n") else None


def catch_interrupts():
    """-> a list that Ctrl-C and others fill; the loop then ends its step, saves and exits with 0.

    A second Ctrl-C ends the process at once. A second SIGTERM does not, because torchrun sends one
    after every Ctrl-C.
    """
    caught = []

    def react(number, is_second_press):
        if is_second_press:
            os._exit(130)
        if not caught and parallel.RANK == 0:
            # Not print, because the signal may come while something else is being printed. The
            # empty line is for the step's line, which replaces the one above it on a terminal.
            with suppress(OSError):
                os.write(2, b"\nstopping after this step; "
                            b"a second Ctrl-C ends the run at once\n\n")
        caught.append(number)

    on_interrupts(react)
    return caught


def on_interrupts(react):
    """Call react(number, is_second_press) at Ctrl-C, SIGTERM, SIGHUP and SIGUSR1.

    SIGHUP says that the terminal is gone, SIGUSR1 is a scheduler's warning.
    """
    presses = []
    terminals = [handle for handle in (1, 2) if os.isatty(handle)]

    def handle(number, frame):
        if number == signal.SIGINT:
            presses.append(time.monotonic())
        if number == getattr(signal, "SIGHUP", None):
            # Printing to a terminal that is gone would end the run before it saves.
            for handle in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), handle)
        pressed = number == signal.SIGINT
        react(number, pressed and presses[-1] - presses[0] > SAME_PRESS)

    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows has only the first two
        # nohup starts a run with SIGHUP ignored, and so it stays.
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, handle)


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
        delete(leftover)


def save_the_rest(partial, tokenizer, state):
    tokenizer.save(partial)
    write(f"{partial}/trainer.json", json.dumps(state))


def publish(run, partial, folder):
    """Give a complete checkpoint its name, update `latest`, drop the moments of older ones."""
    sync_tree(partial)
    for name in LOGS:
        if os.path.exists(f"{run}/{name}"):
            sync(f"{run}/{name}")
    if os.path.lexists(folder):  # from before the run was resumed
        remove(folder)
    os.rename(partial, folder)
    sync(run)
    write(f"{run}/latest", os.path.basename(folder))
    for old in checkpoints(run):
        if old != folder and os.path.lexists(f"{old}/optimizer"):
            delete(f"{old}/optimizer")


def drop_checkpoints(run, step, args):
    """Keep the --keep newest checkpoints up to this step, and multiples of --keep-every."""
    older = [folder for folder in checkpoints(run) if number_of(folder) < step]
    for folder in older[args.keep - 1:]:
        if not args.keep_every or number_of(folder) % args.keep_every:
            remove(folder)


def load_trainer(folder, model, optimizer):
    """Restore the optimizer's moments in place -> the rest of the trainer's state, `step` among it.

    Settings such as the learning rate are those of this command line. ValueError for damaged files.
    """
    load_moments(f"{folder}/optimizer", model, optimizer)
    return read_trainer(folder)
