"""What a training run says: a line for each step, metrics.jsonl, samples.jsonl, warnings.

    log.start(); ...; log.lap("gen"); ...; log.lap("train"); log.write(step, groups, update)

docs/log.md explains every metric.
"""
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing import parallel
from plumbing.files import write

SAMPLES = 2               # rollouts a step in samples.jsonl; --rollouts is no less
CONTEXT_TOKENS = 64       # of the end of the context, in samples.jsonl
QUIET_STEPS = 20          # steps in which no group has a signal, before a warning
ABOUT = ("checkpoint", "mode", "context", "question", "truth")  # of a line of a dump
# bf16, dense, FLOP/s. On hardware that is not listed mfu is 0.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


class StepLog:
    """Times a step, computes its metrics, and writes them on rank 0."""

    def __init__(self, args, model, tokenizer):
        self.args = args
        self.tokenizer = tokenizer
        self.parameters = sum(weight.numel() for weight in model.parameters())
        self.peak_flops = math.inf
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
        for name, flops in PEAK_FLOPS.items():
            if name in gpu:
                self.peak_flops = flops
        self.warned = set()
        self.quiet_steps = 0
        self.can_replace = False       # the line on the screen?

    def start(self):
        """Begin a step."""
        self.seconds = dict(gen=0.0, reward=0.0, train=0.0)
        self.clock = parallel.clock()

    def lap(self, phase):
        """Add the slowest rank's time since the last lap to "gen", "reward" or "train"."""
        self.seconds[phase] += max(parallel.gather_lists([parallel.clock() - self.clock]))
        self.clock = parallel.clock()

    def write(self, step, groups, update):
        """Log a step -> its metrics. All ranks call this.

        groups: all that this rank has sampled. update: the metrics of `policy_update`.
        """
        # Ranks exchange numbers and a few samples, because 2,048 rollouts of 8,192 tokens would be
        # 240 MB for each of them to unpack. Rank 0 may have no group.
        numbers = parallel.gather_lists([in_numbers(group) for group in groups])
        samples = [in_words(self.tokenizer, group, i) for group in groups[:1]
                   for i in range(SAMPLES)]
        samples = parallel.gather_lists(samples)[:SAMPLES]
        metrics = dict(step=step) | rollout_metrics(numbers) | update
        metrics |= self.speed_metrics(metrics, sum(group["read"] for group in numbers))
        if parallel.RANK > 0:
            return metrics
        run = self.args.out_dir
        # JSON has no NaN, so a metric that this step could not measure becomes null.
        valid = {name: None if value != value else value for name, value in metrics.items()}
        append(f"{run}/metrics.jsonl", [valid])
        append(f"{run}/samples.jsonl", [dict(step=step) | sample for sample in samples])
        self.show(step, metrics)
        for warning in self.warnings(metrics):
            print(f"warning: {warning}", file=sys.stderr, flush=True)
            self.can_replace = False
        return metrics

    def show(self, step, metrics):
        """Print the step's line. On a terminal it replaces the one before; ten of a run stay."""
        steps, columns = self.args.steps, math.inf
        if sys.stdout.isatty():
            columns = shutil.get_terminal_size().columns
            if self.can_replace:
                print("\x1b[A\x1b[K", end="")  # one line up, and clear it
            self.can_replace = step * 10 // steps == (step - 1) * 10 // steps
        print(step_line(steps, metrics, columns), flush=True)

    def speed_metrics(self, metrics, read):
        """read: tokens that the policy has read to sample and to score."""
        seconds, trained = self.seconds, metrics["trained_tokens"]
        update_flops = 6 * self.parameters * trained
        flops_per_second = update_flops / seconds["train"] / parallel.WORLD
        return dict(
            lr=self.args.lr,
            gen_tok_s=metrics["tokens"] / seconds["gen"],
            train_tok_s=trained / seconds["train"],
            mfu=flops_per_second / self.peak_flops,
            flops=2 * self.parameters * read + update_flops,
            dt_gen=seconds["gen"], dt_reward=seconds["reward"], dt_train=seconds["train"])

    def warnings(self, metrics):
        """Metrics of a step -> new warnings about what is likely wrong with this run."""
        self.quiet_steps = self.quiet_steps + 1 if metrics["frac_zero_std"] == 1 else 0
        longest, found = self.args.max_new_tokens, {}
        if self.quiet_steps >= QUIET_STEPS:
            found["signal"] = (
                f"for {QUIET_STEPS} steps all rewards of each group have been equal, so nothing is "
                "learnt: the task is too hard or too easy (try another --entropy-threshold or "
                "--init), or --rollouts is too small")
        if metrics["format_rate"] < 0.05:
            found["form"] = (
                f"{metrics['format_rate']:.0%} of the rollouts hold a prediction or, where none is "
                "asked for, a closed thought: the model does not know the form (warm start: "
                "data/warmstart.py and train_ntp.py --strings), or has no room (--max-new-tokens)")
        if metrics["logp_gap"] > 0.05:
            found["gap"] = (
                f"logp_gap is {metrics['logp_gap']:.2g}: sampler and trainer disagree about the "
                "same tokens, so this is not on-policy; --kernels bitwise makes them agree, "
                "--importance-cap corrects some of it")
        if metrics["len_mean"] > 0.95 * longest:
            found["length"] = (
                f"rollouts have {metrics['len_mean']:.0f} tokens on average and --max-new-tokens "
                f"is {longest}: thoughts are cut off before they end; raise it")
        new = [name for name in found if name not in self.warned]
        self.warned.update(new)
        return [found[name] for name in new]


class RolloutBar:
    """For `generate(on_tokens=...)`: a progress bar over rollouts, on terminals only."""

    def __init__(self, total, desc, disable=None):
        self.bar = tqdm(total=total, desc=desc, unit="rollout", leave=False, disable=disable)
        self.start, self.tokens = time.perf_counter(), 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def __call__(self, drawn, ended):
        self.tokens += len(drawn)
        speed = self.tokens / (time.perf_counter() - self.start)
        self.bar.set_postfix_str(f"{speed:,.0f} tok/s", refresh=False)
        self.bar.update(ended - self.bar.n)


# ---- metrics ----

def in_numbers(group):
    """What the metrics need to know of a group: a number for each rollout, and tokens read."""
    tokens = [len(rollout.tokens) for rollout in group.rollouts]
    return dict(
        rewards=group.rewards,
        hits=group.hits,
        boxes=[None if p is None else len(p) for p in group.predictions],        # bytes
        tokens=tokens,
        logprobs=[sum(rollout.logprobs) for rollout in group.rollouts],
        truncated=[not rollout.finished for rollout in group.rollouts],
        measures=group.measures,
        # By the policy, to sample and score; a prompt counts once.
        read=len(group.question.prompt) + sum(tokens) + group.scoring_tokens)


def rollout_metrics(groups):
    """`in_numbers` of the groups of all ranks -> the metrics of their rollouts."""
    rewards = np.array([group["rewards"] for group in groups])                   # (N, G)
    boxes, tokens = of_rollouts(groups, "boxes"), sum(of_rollouts(groups, "tokens"))
    measures = {name: np.mean([number for group in groups for number in group["measures"][name]])
                for name in groups[0]["measures"]}
    matches = [box for box, hit in zip(boxes, of_rollouts(groups, "hits")) if hit]
    return measures | dict(
        reward=rewards.mean(),
        accuracy=np.mean(of_rollouts(groups, "hits")),
        reward_std=rewards.std(),
        frac_zero_std=(np.ptp(rewards, axis=1) == 0).mean(),  # no std, because that is rounded
        reward_pass_at_g=rewards.max(axis=1).mean(),
        match_len=np.mean(matches) if matches else math.nan,
        format_rate=np.mean([box is not None for box in boxes]),
        tokens=tokens,
        len_mean=tokens / len(boxes),
        frac_truncated=np.mean(of_rollouts(groups, "truncated")),
        entropy=-sum(of_rollouts(groups, "logprobs")) / tokens)                  # an estimate


def of_rollouts(groups, name):
    return [number for group in groups for number in group[name]]


def step_line(steps, m, columns=math.inf):
    """Metrics of a step -> the line on the screen; what matters less gives way to its width."""
    gap = f"{m['logp_gap']:.1e}" if m["logp_gap"] else "0.0"
    if math.isnan(m["logp_gap"]):  # no group had a gradient
        gap = "-"
    seconds = m["dt_gen"] + m["dt_reward"] + m["dt_train"]
    cells = {"step": f"{m['step']:05d}/{steps:05d}", "reward": f"{m['reward']:.3f}",
             "fmt": f"{m['format_rate']:.2f}", "zero_std": f"{m['frac_zero_std']:.2f}",
             "ent": f"{m['entropy']:.2f}", "len": f"{m['len_mean']:.0f}",
             "gnorm": f"{m['grad_norm']:.2f}", "gap": gap,
             "gen": f"{m['gen_tok_s']:,.0f} tok/s", "train": f"{m['train_tok_s']:,.0f} tok/s",
             "dt": f"{seconds:.1f}s"}
    for name in ("train", "gen", "gnorm", "dt", "fmt", "ent"):
        if len(joined(cells)) < columns:
            break
        del cells[name]
    return joined(cells)


def joined(cells):
    return " | ".join(f"{name} {value}" for name, value in cells.items())


# ---- files ----

def in_words(tokenizer, group, i):
    """Rollout i of a group as text, with its context, the truth and its reward."""
    question, prediction = group.question, group.predictions[i]
    truth = question.truth
    if not isinstance(truth, str):
        truth = text_of(b"".join(truth[:4]))
    context = text_of(tokenizer.decode_bytes(question.context[-CONTEXT_TOKENS:]))
    return dict(
        context="..." * (len(question.context) > CONTEXT_TOKENS) + context,
        truth=truth,
        response=text_of(tokenizer.decode_bytes(group.rollouts[i].tokens)),
        extracted=None if prediction is None else text_of(prediction),
        reward=group.rewards[i])


def text_of(raw):
    """Bytes -> text; bytes that are not UTF-8 become escapes."""
    return raw.decode("utf-8", "backslashreplace")


def save_batch(path, batches):
    """Write the micro-batches of all ranks, one a line, so that a bad one can be found."""
    records = parallel.gather_lists([dict(
        prompt_lens=batch.layout.prompt_lens.tolist(),
        rollout_lens=batch.layout.rollout_lens.tolist(),
        tokens=batch.tokens.tolist(), advantages=batch.advantages.tolist(),
        sampled_logprobs=batch.sampled_logprobs.tolist()) for batch in batches])
    if parallel.RANK == 0:
        Path(path).unlink(missing_ok=True)
        append(path, records)


def append(path, records):
    """Add JSON lines to a log."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(as_lines(records))


def as_lines(records):
    """Records -> JSON lines."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    # A lone surrogate, from a folder's name that is no text, becomes JSON's escape.
    return "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")


def dump(path, records):
    """Add rollouts to a file, in place of those about the same: a repeated command adds none."""
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe
        append(path, records)
    else:
        write(path, "".join(other_lines(path, records)) + as_lines(records))


def other_lines(path, records):
    """The lines of a dump, if there is one, that are not about the same as one of the records."""
    if not os.path.isfile(path):
        return []
    new, others = {about(record) for record in records}, []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                if about(json.loads(line)) not in new:
                    others.append(line.rstrip("\n") + "\n")
            except (ValueError, AttributeError):
                raise ValueError(f"{path} line {number}: not a line of a dump: {line[:60]!r}; "
                                 "choose another file") from None
    return others


def about(record):
    return json.dumps([record.get(name) for name in ABOUT])


def flops_of_run(run, parameters=0, updates_only=False):
    """FLOPs that an RPT run has spent on sampling, scoring and updates, or on updates alone."""
    name, factor = ("trained_tokens", 6 * parameters) if updates_only else ("flops", 1)
    numbers = [step.get(name) for step in read_metrics(run)]
    if None in numbers:
        raise ValueError(f"{run}/metrics.jsonl: step {numbers.index(None) + 1} has no '{name}'")
    return sum(factor * number for number in numbers)


def read_metrics(run):
    """Run folder -> a dict for each step. A last line torn by a kill is ignored."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so {run} is not the folder of a training "
                                "run")
    lines, steps = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            raise ValueError(f"{path} line {number}: not JSON: {line[:60]!r}") from None
        if not isinstance(step, dict) or "step" not in step:
            raise ValueError(f"{path} line {number}: expected an object with 'step', "
                             f"got {line[:60]!r}")
        steps.append(step)
    if not steps:
        raise ValueError(f"{path}: no complete line in it")
    return steps
