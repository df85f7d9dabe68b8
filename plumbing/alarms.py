"""What stops a training run, and what makes it speak up.

    blame      a loss or gradient that is not finite: which group it comes from, and the batch in a file
    watcher    a run that will learn nothing: one warning each, with the likely cause
"""
import json
import math

from plumbing import parallel
from plumbing.checkpoint import write

DEAD_STEPS = 20  # steps without any signal before a warning


def blame(groups, advantages, gradient_norm, path, what):
    """Find the first group whose gradient alone is not finite, save the batch -> the error to raise.

    groups, advantages: this rank's. gradient_norm: function of a part of them -> norm over all ranks.
    """
    everyone = parallel.gather_lists(list(zip(groups, advantages)))
    first = sum(parallel.gather_lists([len(groups)])[:parallel.RANK])
    bad, which = None, "No group has such a gradient alone"
    for i, (group, row) in enumerate(everyone):
        mine = first <= i < first + len(groups)
        if not math.isfinite(gradient_norm([group], [row]) if mine else gradient_norm([], [])):
            bad, which = i, (f"It comes from group {i + 1} of {len(everyone)}, position "
                             f"{group.question.position:,} in the data")
            break
    if parallel.RANK == 0:
        write(path, "".join(json.dumps(dict(
            bad=i == bad, position=g.question.position, prompt=g.question.prompt, rewards=g.rewards,
            advantages=row, responses=[r.tokens for r in g.rollouts],
            logprobs=[r.logprobs for r in g.rollouts])) + "\n" for i, (g, row) in enumerate(everyone)))
    return ValueError(f"{what}: the update was not applied, the last checkpoint is good. {which}; "
                      f"the batch is in {path}")


def watcher(max_new_tokens):
    """-> a function: metrics of a step -> warnings that are new in this run."""
    said, dead = set(), 0

    def watch(m):
        nonlocal dead
        dead = dead + 1 if m["frac_zero_std"] == 1 else 0
        alarms = dict(
            dead=(dead >= DEAD_STEPS,
                  f"no group has had different rewards for {DEAD_STEPS} steps, so nothing is learnt: the task is "
                  "too hard or too easy (another --entropy-threshold or --init), or --rollouts is too small"),
            form=(m["format_rate"] < 0.05,
                  f"{m['format_rate']:.0%} of the responses hold a box: the model does not know the form (warm "
                  "start: data/warmstart.py and train_ntp.py --strings), or has no room (--max-new-tokens)"),
            gap=(m["logp_gap"] > 0.05,
                 f"logp_gap is {m['logp_gap']:.2g}: sampler and trainer disagree about the same tokens, so this "
                 "is not on-policy; --kernels bitwise makes them agree, --importance-cap corrects some of it"),
            length=(m["len_mean"] > 0.95 * max_new_tokens,
                    f"responses have {m['len_mean']:.0f} tokens on average and --max-new-tokens is "
                    f"{max_new_tokens}: thoughts are cut off before they reach the box; raise it"))
        new = [name for name, (on, _) in alarms.items() if on and name not in said]
        said.update(new)
        return [alarms[name][1] for name in new]

    return watch
