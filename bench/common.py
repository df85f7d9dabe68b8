"""What the benches share: the limits of a GPU, shapes, clocks, tables."""
import statistics
import sys
import time
from datetime import datetime

import torch

import kernels
from model import GPTConfig
from plumbing import flags

# bf16 FLOP/s and bytes/s that can be reached: 80 % and 90 % of the data sheets.
LIMITS = {"H200": (790e12, 4.3e12), "H100": (790e12, 3.0e12), "A100": (250e12, 1.8e12)}

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


def medians(repeats, *calls):
    """Median seconds of each call(). They take turns, `repeats` times after an unmeasured one."""
    seconds = [[] for _ in calls]
    for _ in range(repeats + 1):
        for times, call in zip(seconds, calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [statistics.median(times[1:]) for times in seconds]


def random_prompts(config, count, length):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (count, length), generator=generator).tolist()


# ---- the command line and the table ----

def parse_args(description, rows, repeats):
    """rows: what --rows chooses from, in words. repeats: the default."""
    parser = flags.Parser(description)
    parser.add_argument("--rows", help=f"{rows}; default: all that run here")
    parser.add_argument("--repeats", type=flags.at_least(1), default=repeats,
                        help="runs of which the median is taken")
    return parser.parse_args()


def run_rows(rows, args):
    """Print a header and some rows. rows: {number: function of --repeats}; the last needs a GPU."""
    *here, last = rows
    has_gpu = torch.cuda.is_available()
    chosen = list(rows) if has_gpu else here
    if args.rows:
        chosen = args.rows.split(",")
    if not set(chosen) <= rows.keys():
        raise ValueError(f"--rows {args.rows}: expected numbers from 1 to {last} with commas "
                         "between, such as 1,3")
    if last in chosen and not has_gpu:
        raise ValueError(f"--rows {last} is timed on a GPU, and torch finds none (CUDA)")
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, fp32, "
          f"commit {flags.commit()}, {now}\n"
          f"python {' '.join(sys.argv)}: medians of {args.repeats}\n")
    print_row("row", "what", "ours", "alternative", "alternative / ours")
    print_row(*["---"] * 5)
    requested = kernels.requested
    for row in chosen:
        kernels.set_backend(requested)  # rows on a GPU leave theirs behind
        rows[row](args.repeats)


def print_row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)
