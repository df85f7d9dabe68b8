r"""What is a thought worth? Next-token accuracy with and without reasoning: the paper's Table 1.

    python eval.py lm --corpus C --checkpoints BASE RPT --positions 200 --out results.json

Held-out positions are split by the entropy of one reference model, as in Table 1: easy, medium and
hard are entropy > 0.5, 1.0 and 1.5 nats, nested. Every checkpoint answers the same positions:
    ntp         guessing: the most probable next token after the context alone
    reasoning   K sampled thoughts with a prediction: mean accuracy, and pass@K (any of the K right)
    empty       the rollout begins with </think>, and only a box that comes at once counts: a
                control that measures what the thought adds

A prediction is right by `reward.prefix_match`, whatever reward an objective gives it. Brackets are
95 % bootstrap intervals over documents, because positions of one document are correlated. All
figures are in percent. Exact answers: paper/answers.py. Multiple choice: paper/choices.py.
"""
import json
import sys

import numpy as np
import torch
from tqdm import tqdm

from data.corpus import load_corpus
from data.positions import SPLITS, choose_positions, find_scores
from data.prompt import stop_ids, template_ids
from data.tokenizer import Tokenizer
from model import GPT
from objectives import Group
from objectives.rpt import ask, predictions
from plumbing import flags
from plumbing.batch import cut, flatten
from plumbing.checkpoint import write
from plumbing.log import RolloutBar, append, in_words
from plumbing.truncate import truncation
from reward import box_at_once, extract_prediction, prefix_match
from sample import generate

BOOTSTRAP = 1000
TOKENS_PER_PASS = 8192  # of a forward pass over contexts; bounds memory
MODES = dict(both=["ntp", "reasoning"], all=["ntp", "reasoning", "empty"])  # or one alone


def load_model(checkpoint, device):
    """-> model and tokenizer of a checkpoint folder."""
    tokenizer = Tokenizer.load(checkpoint)
    return GPT.from_pretrained(checkpoint, flags.compute_dtype(device), device), tokenizer


# ---- guessing and thinking ----

@torch.no_grad()
def ntp_hits(model, corpus, positions, longest):
    """(n, 3) positions -> (n,) 1.0 where the likeliest token after the context is the true one.

    longest: tokens of context at most.
    """
    contexts = [corpus.tokens[max(start, t - longest):t].tolist() for t, start, _ in positions]
    guesses = []
    with tqdm(total=len(contexts), desc="next token", unit="position", disable=None) as bar:
        for run in cut(contexts, TOKENS_PER_PASS, len):
            tokens, layout = flatten([(context, []) for context in run], model.device)
            hidden = model.hidden(tokens, layout.positions, layout.attend)[layout.last_rows]
            guesses += (hidden @ model.head.to(hidden.dtype).T).argmax(dim=-1).tolist()
            bar.update(len(run))
    return (np.array(guesses) == corpus.tokens[positions[:, 0]]).astype(float)


def sample_rollouts(model, tokenizer, prompts, args, desc, start=()):
    """Prompts (lists of ids) -> args.samples rollouts for each, beginning with the ids `start`."""
    if len(start) >= args.max_new_tokens:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room after an empty "
                         f"thought of {len(start)} tokens")
    prompts = [prompt + list(start) for prompt in prompts]
    with RolloutBar(len(prompts) * args.samples, desc) as bar:
        groups = generate(model, prompts, args.samples, args.max_new_tokens - len(start),
                          args.temperature, stop_ids(tokenizer), (args.seed, 1 << 20),
                          max_rows=args.max_rows, kv_gb=args.kv_gb, on_tokens=bar,
                          truncate=truncation(args.top_k, args.top_p, args.min_p))
    for rollouts in groups:
        for rollout in rollouts:
            rollout.tokens = [*start, *rollout.tokens]
    return groups


def think(model, tokenizer, corpus, positions, args, mode="reasoning"):
    """(n, 3) positions -> a Group of args.samples rollouts each; its rewards say which are right.

    Every template opens the thought. Mode "empty" closes it at once, with the same prompt and as
    many tokens, and counts a box only where nothing precedes it.
    """
    template = template_ids(tokenizer, args.template)
    longest = min(args.max_prompt_tokens, model.config.max_positions - args.max_new_tokens)
    questions = [ask(corpus, tokenizer, position, template, longest) for position in positions]
    start, extract = (), extract_prediction
    if mode == "empty":
        start, extract = tokenizer.encode("</think>", special=True), box_at_once
    prompts = [question.prompt for question in questions]
    groups = []
    rollouts = sample_rollouts(model, tokenizer, prompts, args, mode, start)
    for question, some in zip(questions, rollouts):
        predicted = predictions(tokenizer, some, extract)
        right = [prefix_match(prediction, question.truth) for prediction in predicted]
        groups.append(Group(question, some, predicted, right))
    return groups


def evaluate(checkpoint, corpus, positions, splits, args):
    """One checkpoint on all positions -> lines of results.json."""
    model, tokenizer = load_model(checkpoint, args.device)
    corpus.check(tokenizer, checkpoint)
    documents, results = positions[:, 1], []
    for mode in MODES.get(args.mode, [args.mode]):
        if mode == "ntp":
            # Guessing sees as much context as reasoning.
            longest = min(model.config.max_positions, args.max_prompt_tokens)
            hits = ntp_hits(model, corpus, positions, longest)
            for split, i in splits.items():
                results.append(result(checkpoint, mode, dict(split=split), hits[i], documents[i],
                                      args.seed))
            continue
        groups = think(model, tokenizer, corpus, positions, args, mode)
        counts = count(groups)
        for split, i in splits.items():
            some = {name: values[i] for name, values in counts.items()}
            results.append(thought_result(checkpoint, mode, dict(split=split), some, documents[i],
                                          args))
        if args.dump:
            about = dict(checkpoint=checkpoint, mode=mode)
            append(args.dump, [about | in_words(tokenizer, group, 0) for group in groups])
    return results


# ---- counting ----

def count(groups):
    """n Groups of K rollouts -> {what: array (n, K)}, with hits of one and of several tokens."""
    one = []
    for group in groups:
        first = group.question.truth[:1]
        one.append([prefix_match(prediction, first) for prediction in group.predictions])
    counts = count_any([group.rewards for group in groups], [group.predictions for group in groups],
                       [group.rollouts for group in groups])
    return counts | dict(one_token=np.array(one), multi_token=counts["rewards"] - np.array(one))


def count_any(rewards, predictions, rollouts):
    """Counts for rollouts of any kind: lists of n lists of K -> {what: array (n, K)}."""
    boxed = [[prediction is not None for prediction in row] for row in predictions]
    lengths = [[len(rollout.tokens) for rollout in row] for row in rollouts]
    return dict(rewards=np.array(rewards, dtype=float), format_rate=np.array(boxed, dtype=float),
                lengths=np.array(lengths, dtype=float))


def interval(values, documents, seed):
    """(n,) values and the document of each -> ends of the 95 % bootstrap interval of their mean.

    If all values are equal, all resamples are; then it is Wilson's interval for as many trials as
    there are documents.
    """
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, weights=values), np.bincount(document)
    if np.ptp(values) == 0:
        width = 1.96**2 / (len(sums) + 1.96**2)
        return values[0] * (1 - width) + np.array([0, width])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP, len(sums)))
    return np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])


def percent(share):
    return round(100 * float(share), 2)


def result(checkpoint, mode, part, values, documents, seed):
    """One line of results.json. part: {"split": name} or {"subject": name}."""
    low, high = interval(values, documents, seed)
    return dict(checkpoint=checkpoint, mode=mode, **part, accuracy=percent(values.mean()),
                low=percent(low), high=percent(high), n=len(values), seed=seed)


def thought_result(checkpoint, mode, part, counts, documents, args):
    """{what: array (n, K)} -> one line of results.json."""
    rewards = counts["rewards"]
    line = result(checkpoint, mode, part, rewards.mean(axis=1), documents, args.seed)
    line["pass_at_k"] = percent(rewards.max(axis=1).mean())
    for name, values in counts.items():
        if name not in ("rewards", "lengths"):
            line[name] = percent(values.mean())
    return line | dict(samples=args.samples, temperature=args.temperature,
                       len_mean=round(float(counts["lengths"].mean()), 1))


def print_table(results):
    """One row for each checkpoint and mode: accuracy [95 % interval] on each split."""
    splits = [s for s in SPLITS if any(r["split"] == s for r in results)]
    rows = list(dict.fromkeys((r["checkpoint"], r["mode"]) for r in results))
    width = max(len(checkpoint) for checkpoint, _ in rows)
    titles = "  ".join(f"{s + f' > {SPLITS[s]}':>20}" for s in splits)
    print(f"\n{'next-token accuracy, %':{width}}  {'mode':9}  {titles}")
    for checkpoint, mode in rows:
        cells = {r["split"]: f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"
                 for r in results if (r["checkpoint"], r["mode"]) == (checkpoint, mode)}
        print(f"{checkpoint:{width}}  {mode:9}  " + "  ".join(f"{cells[s]:>20}" for s in splits))
    n = {r["split"]: r["n"] for r in results}
    print(f"{'positions':{width}}  {'':9}  " + "  ".join(f"{n[s]:>20}" for s in splits))


# ---- command line ----

def add_thought_flags(add, of):
    """Flags of every evaluation; of: what a thought is about, for the help."""
    add("--checkpoints", required=True, nargs="+", help="checkpoint folders, side by side")
    add("--samples", type=flags.at_least(1), default=1, metavar="K", help=f"thoughts for each {of}")
    add("--max-new-tokens", type=flags.at_least(1), default=8192, help="tokens of a rollout")
    flags.add_sampling_flags(add)
    add("--out", help="write the table here as JSON")
    add("--dump", help=f"append one rollout for each {of} here, as JSON lines")
    add("--seed", type=flags.at_least(0), default=0, help=f"chooses {of}s and thoughts")
    flags.add_device_flag(add)


def check_sampling(args):
    """Check --top-k, --top-p and --min-p before anything is loaded."""
    truncation(args.top_k, args.top_p, args.min_p)


def parse_args():
    parser = flags.Parser("Next-token accuracy on held-out text, by difficulty.")
    add = parser.add_argument
    add("task", choices=["lm"], help="next tokens of held-out text")
    add("--corpus", required=True,
        help="folder written by data/prepare.py and scored by data/filter.py")
    add("--proxy",
        help="checkpoint whose entropies split the positions; default: the only one there is")
    add("--mode", default="both", choices=["ntp", "reasoning", "empty", *MODES],
        help="both: ntp and reasoning; all: empty thoughts too")
    add("--positions", type=flags.at_least(1), default=200,
        help="held-out positions for each split")
    add("--template", default="v0", help="prompt of data/prompt.py: v0 to v6, or short")
    add("--max-prompt-tokens", type=flags.at_least(1), default=4096,
        help="longer contexts lose their beginning")
    add_thought_flags(add, "position")
    args = parser.parse_args()
    check_sampling(args)
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    corpus = load_corpus(args.corpus)
    scores = find_scores(corpus, args.proxy)
    positions, splits = choose_positions(corpus, scores, args.positions, args.seed)
    results = []
    for checkpoint in args.checkpoints:
        print(f"{checkpoint}: {len(positions)} held-out positions", flush=True)
        results += evaluate(checkpoint, corpus, positions, splits, args)
    print_table(results)
    if args.out:
        write(args.out, json.dumps(results, indent=1))
        print(f"written to {args.out}")
