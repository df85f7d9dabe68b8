"""What all command lines share: numbers with bounds, common flags, and errors in one line."""
import argparse
import errno
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import lru_cache
from traceback import format_exception

import torch

from kernels.linear import bf16_is_faster
from plumbing import parallel
from plumbing.files import read_json

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but not "(default: None)" and not for flags that have to be given."""

    def _get_help_string(self, action):
        if action.default is None or action.required:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises ValueError, so that `speak_once` prints one line."""

    def __init__(self, description, hint=""):
        """hint: what else may have been meant, for the line of an error."""
        super().__init__(description=description, formatter_class=Help)
        self.hint = hint
        # No run should die of a sample that the locale cannot print: it is shown as escapes.
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")

    def error(self, message):
        message = message.removeprefix("argument ").replace(": must be", " must be", 1)
        raise ValueError(f"{message} (--help lists all flags{self.hint})")


def at_least(low, kind=int):
    """-> a `type` for add_argument: a finite number that is at least `low`."""
    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value < math.inf:
            nature = "a whole number" if kind is int else "finite"
            raise argparse.ArgumentTypeError(f"must be at least {low} and {nature}, got {text}")
        return value
    return number


def add_update_flags(add):
    """Flags of both trainers that save memory."""
    add("--tokens-per-micro-batch", type=at_least(1), default=16384,
        help="tokens in one forward and backward pass; bounds memory")
    add("--checkpoint-activations", action="store_true",
        help="keep one activation a block and recompute the rest in the backward pass: "
             "a quarter more work")
    add("--bf16-moments", action="store_true",
        help="keep AdamW's moments in bf16: saves 4 bytes a parameter")
    add("--reshard", action="store_true",
        help="with several ranks: free a block's gathered weights after its forward pass and "
             "gather them again")
    add("--ranks-per-copy", type=at_least(0), default=0, metavar="N",
        help="with several ranks: N of them share one copy of the weights (HSDP); 0: all share one")


def add_sampling_flags(add):
    """Flags of scripts that sample and do not train, so may cut off improbable tokens."""
    add("--temperature", type=at_least(0, float), default=0.8, help="of sampling; 0 is greedy")
    add("--top-k", type=int, default=0, help="only the K most probable tokens; 0: all")
    add("--top-p", type=float, default=1.0,
        help="only the fewest tokens that have this much probability together")
    add("--min-p", type=float, default=0.0,
        help="only tokens with this share of the best one's probability")
    add_cache_flags(add)


def add_cache_flags(add):
    """How much is decoded at a time."""
    add("--max-rows", type=at_least(1), default=256, help="rollouts decoded at a time")
    add("--kv-gb", type=at_least(0, float),
        help="memory for keys and values, 10^9 bytes; default: 85 %% of what is free (on a CPU of "
             "what a container's limit leaves, and at most half of the machine)")


def add_question_flags(add):
    """What to do with questions that cannot be asked. By default the first one stops the run."""
    add("--skip-bad", action="store_true",
        help="leave out questions that cannot be read or have no exact answer, and count them")
    add("--skip-long", action="store_true",
        help="leave out questions that have no room, and count them")


def add_length_flag(add, usual):
    """--max-new-tokens, which `new_tokens` fills in where it is not given."""
    add("--max-new-tokens", type=at_least(1), metavar="N",
        help=f"tokens of a rollout; default: {usual}, or half of the model's positions if that is "
             "less")


def new_tokens(asked, usual, positions):
    """How many tokens a rollout may have: as asked, or as usual where the model has the room."""
    return asked or min(usual, positions // 2)


def add_run_flags(add, save_every):
    """Flags of both trainers about the run itself."""
    add("--save-every", type=at_least(1), default=save_every, help="steps between checkpoints")
    add("--keep", type=at_least(0), default=0, metavar="N",
        help="checkpoints that stay: the N newest ones; 0: all")
    add("--keep-every", type=at_least(0), default=0, metavar="M",
        help="--keep: also those of every M-th step; 0: no others")
    add("--resume", action="store_true", help="continue the run in --out-dir, if there is one")
    add("--seed", type=at_least(0), default=0, help="of data order and sampling")
    add_device_flag(add)


def add_device_flag(add, dtype=None):
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, choices=["cpu", "cuda"], help="where to compute")
    usual = "; default: bf16 on a GPU, fp32 on a CPU, whose figures are exact only in fp32"
    add("--dtype", default=dtype, choices=[*DTYPES, "auto"],
        help="of activations and matrix products, while weights stay fp32; auto: bf16 where it is "
             "faster, which takes some milliseconds to see" + usual * (not dtype))


@lru_cache
def commit():
    """The commit of this repository, with -dirty if files have changed since."""
    with suppress(OSError):  # no git
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT,
                             capture_output=True, encoding="utf-8")
        return git.stdout.strip() or "unknown"
    return "unknown"


def versions():
    """What a figure was made with."""
    return dict(commit=commit(), torch=torch.__version__)


def compute_dtype(args):
    """The torch dtype for --dtype. What `auto` chose stays in args, also when a run goes on."""
    is_gpu = str(args.device).startswith("cuda")
    if args.dtype == "auto" and getattr(args, "resume", False):
        with suppress(OSError, ValueError):
            args.dtype = read_json(f"{args.out_dir}/args.json").get("dtype")
    if args.dtype not in DTYPES:
        # All ranks do as the first, because measurements differ.
        fast = is_gpu or args.dtype == "auto" and parallel.gather_lists([bf16_is_faster()])[0]
        args.dtype = "bf16" if fast else "fp32"
    return DTYPES[args.dtype]


def speak_once(kind, error, traceback):
    """`sys.excepthook = speak_once` prints an error that the user can fix as one line; exit code 2.

    That is a ValueError or OSError raised in this repository, an OSError that names a file, or a
    full disk. Anything else is a bug and keeps its traceback. Ranks other than 0 wait: torchrun
    ends them before they repeat the message of rank 0 or complain that rank 0 has gone.
    """
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    file = os.path.abspath(traceback.tb_frame.f_code.co_filename) if traceback else ""
    # A virtual environment may lie inside the repository, but its errors are not ours.
    ours = file.startswith(ROOT + os.sep) and "site-packages" not in file
    names_a_file = isinstance(error, OSError) and error.filename is not None
    disk_is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    fixable = names_a_file or disk_is_full or ours and isinstance(error, (ValueError, OSError))

    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (fixable and os.environ["RANK"] == "0"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    if isinstance(error, KeyboardInterrupt):
        message, code = "interrupted: start the same command again", 130
    elif fixable:
        message, code = f"{os.path.basename(sys.argv[0])}: {error}", 2
    else:
        message, code = "".join(format_exception(error)).rstrip(), 1
    with suppress(OSError):  # the other end of a pipe may be closed
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    # An ordinary exit could wait forever for threads and process groups of a broken run.
    os._exit(code)
