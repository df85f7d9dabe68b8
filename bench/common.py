"""What the benches share: the limits of a GPU, shapes, clocks, tables."""
import math
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime
from multiprocessing import get_context
from pathlib import Path

import torch

import kernels
from model import GPTConfig
from plumbing import flags

# bf16 FLOP/s and bytes/s that can be reached: 80 % and 90 % of the data sheets.
LIMITS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12), "A100": (250e12, 1.8e12)}

DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16)

SMOLLM2 = GPTConfig(vocab_size=49_152, width=576, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
                    ffn_width=1536, max_positions=2048)
QWEN = {
    "0.5B": GPTConfig(vocab_size=151_936, width=896, n_layers=24, n_heads=14, n_kv_heads=2,
                      head_dim=64, ffn_width=4864, max_positions=32_768, family="qwen2"),
    "1.5B": GPTConfig(vocab_size=151_936, width=1536, n_layers=28, n_heads=12, n_kv_heads=2,
                      head_dim=128, ffn_width=8960, max_positions=32_768, family="qwen2")}


def limits(device):
    """FLOP/s and bytes/s of this GPU; one that is not known counts as an H200."""
    gpu = torch.cuda.get_device_name() if str(device).startswith("cuda") else ""
    known = [limit for name, limit in LIMITS.items() if name in gpu]
    return known[0] if known else LIMITS["H200"]


def pairs(groups):
    """[(prompt_len, [rollout_len, ...]), ...] -> pairs of a query and a key that it sees."""
    total = 0
    for prompt, rollouts in groups:
        total += prompt * (prompt + 1) // 2
        total += sum(rollout * prompt + rollout * (rollout + 1) // 2 for rollout in rollouts)
    return total


def clocked(call):
    """-> seconds that call() took, and seconds that the CPU worked for it, added over threads."""
    start, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - cpu


def timed(repeats, *calls):
    """Median (seconds, CPU seconds) of each call.

    They take turns, `repeats` times after an unmeasured one.
    """
    turns = [list(map(clocked, calls)) for _ in range(repeats + 1)][1:]
    return [tuple(map(statistics.median, zip(*times))) for times in zip(*turns)]


def medians(repeats, *calls):
    """Median seconds of each call."""
    return [seconds for seconds, _ in timed(repeats, *calls)]


def held_gb(which="VmHWM"):
    """GB that this process held at most, or holds now ("VmRSS"); NaN where /proc has neither."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan
    held = re.search(rf"{which}:\s*(\d+) kB", status.read_text(encoding="utf-8"))
    return int(held[1]) * 1024 / 1e9


def alone(function, *arguments):
    """What the function returns in a fresh process, in which the memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def random_prompts(config, count, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (count, length), generator=generator).tolist()


# ---- the command line and the table ----

COLUMNS = "row", "what", "ours", "alternative", "alternative / ours"


def parse_args(description, rows, repeats):
    """rows: what --rows chooses from, in words. repeats: the default."""
    parser = flags.Parser(description)
    parser.add_argument("--rows", help=f"{rows}; default: all that run here")
    parser.add_argument("--repeats", type=flags.at_least(1), default=repeats,
                        help="runs of which the median is taken")
    return parser.parse_args()


def run_rows(rows, args, about="fp32", columns=COLUMNS, on_gpu=None):
    """Print a header and some rows.

    rows: {number: function of --repeats}; on_gpu: the number of the one that needs a GPU.
    about: what else to say of the machine or the numbers.
    """
    has_gpu = torch.cuda.is_available()
    chosen = [row for row in rows if has_gpu or row != on_gpu]
    if args.rows:
        chosen = args.rows.split(",")
    if not set(chosen) <= rows.keys():
        raise ValueError(f"--rows {args.rows}: expected numbers from 1 to {len(rows)} with commas "
                         "between, such as 1,2")
    if on_gpu in chosen and not has_gpu:
        raise ValueError(f"--rows {on_gpu} is timed on a GPU, and torch finds none (CUDA)")
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {about}, "
          f"commit {flags.commit()}, {now}\n"
          f"python {' '.join(sys.argv)}: medians of {args.repeats}\n")
    print_row(*columns)
    print_row(*["---"] * len(columns))
    requested = kernels.requested
    for row in chosen:
        kernels.set_backend(requested)  # rows on a GPU leave theirs behind
        rows[row](args.repeats)


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
