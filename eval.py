r"""What is a thought worth? Next-token accuracy with and without reasoning: the paper's Table 1.

    python eval.py lm --corpus C --checkpoints BASE RPT --positions 200 --out results.json

Held-out positions are split by the entropy of one reference model, as in Table 1: easy, medium and
hard are entropy > 0.5, 1.0 and 1.5 nats, nested. Every checkpoint answers the same positions:
    ntp         guessing: the most probable next token after the context alone
    reasoning   K sampled thoughts with a prediction: mean accuracy, and pass@K (any of the K right)
    empty       the rollout begins with </think>, and only a box that comes at once counts: a
                control that measures what the thought adds
    swapped     the thought is one that was sampled about another position, a single one: if that
                does no harm, the box does not depend on the thought
    forced      </think> is not allowed among the first --forced tokens
    greedy      the most probable token at each place: one thought
    majority    what most of the K thoughts predict, which counts as one prediction

The last three show what a model can do without training if it is only decoded in another way.
--hits keeps what is right at each position, for differences of two modes (paper/paired.py).
A prediction is right by `reward.prefix_match`, whatever reward an objective gives it. All figures
are in percent. Brackets are 95 % bootstrap intervals over documents, because positions of one
document are correlated; where there are fewer than 10, or all agree, at least as wide as Wilson's
for so many trials. --out is written after each checkpoint. After a kill the same command begins
anew; to keep what is there, ask for the other checkpoints --beside it.
Exact answers: paper/answers.py. Multiple choice: paper/choices.py.
"""
import itertools
import json
import os
import sys
from collections import Counter
from functools import partial

from plumbing import flags  # before torch: how its threads wait
import numpy as np
import torch
from tqdm import tqdm

from data.corpus import load_corpus
from data.positions import SPLITS, answerable, choose_positions, find_scores
from data.prompt import TEMPLATES, stop_ids, template_ids
from data.tokenizer import Tokenizer
from model import GPT, read_config
from objectives import Group
from objectives.rpt import ask, predictions
from plumbing.batch import cut, flatten
from plumbing.checkpoint import check_weights
from plumbing.files import write
from plumbing.log import RolloutBar, dump, in_words, other_lines
from plumbing.truncate import truncation
from reward import box_at_once, extract_prediction, prefix_match
from sample import Rollout, generate

BOOTSTRAP = 1000        # resamples
FEW = 10                # documents, of which resamples alone would be too sure
BOX_TOKENS = 32         # of what follows a swapped thought, at most a quarter of a rollout
TOKENS_PER_PASS = 8192  # of a forward pass over contexts; bounds memory
MAX_NEW_TOKENS = 8192   # of a rollout, where the model has the room
DECODINGS = ["reasoning", "majority", "forced", "forced-majority", "greedy", "forced-greedy"]
MODES = dict(both=["ntp", "reasoning"], all=["ntp", "reasoning", "empty"],
             decodings=["ntp", *DECODINGS, "empty"])
SHOWN = ("checkpoint", "mode", "accuracy", "low", "high", "split", "n", "seed")  # in the table
VOTES = {"majority": "reasoning", "forced-majority": "forced"}  # whose rollouts have a vote
NEEDS = {"swapped": ["reasoning", "swapped"]} | {mode: [of] for mode, of in VOTES.items()}


def load_model(checkpoint, args):
    """-> model and tokenizer of a checkpoint folder."""
    tokenizer = Tokenizer.load(checkpoint, for_model=True)
    model = GPT.from_pretrained(checkpoint, flags.compute_dtype(args), args.device)
    return model.join_weights(), tokenizer


# ---- guessing and thinking ----

@torch.no_grad()
def ntp_hits(model, corpus, positions, longest, bos=()):
    """(n, 3) positions -> (n,) 1.0 where the likeliest token after the context is the true one.

    longest: tokens of context at most, the tokenizer's BOS in front of it included.
    """
    contexts = [corpus.tokens[max(start, t - longest):t].tolist() for t, start, _ in positions]
    for context in contexts:
        context[:len(bos)] = bos
    guesses = []
    with tqdm(total=len(contexts), desc="next token", unit="position", disable=None) as bar:
        for run in cut(contexts, TOKENS_PER_PASS, len):
            tokens, layout = flatten([(context, []) for context in run], model.device)
            hidden = model.hidden(tokens, layout.positions, layout.attend)[layout.last_rows]
            logits = model.finite(hidden @ model.head.to(hidden.dtype).T)                # (n, V)
            guesses += logits.argmax(dim=-1).tolist()
            bar.update(len(run))
    return (np.array(guesses) == corpus.tokens[positions[:, 0]]).astype(float)


def sample_rollouts(model, tokenizer, prompts, args, mode):
    """Prompts (lists of ids) -> args.samples rollouts for each, or a single greedy one."""
    close = tokenizer.encode("</think>", special=True)
    ends = stop_ids(tokenizer)
    n = 1 if "greedy" in mode else args.samples
    decode = partial(decode_with_bar, model, ends, args, mode)
    if mode == "empty":
        left = room_after(len(close), "an empty thought", args)
        groups = decode([prompt + close for prompt in prompts], n, left)
        for rollout in itertools.chain(*groups):
            rollout.tokens = close + rollout.tokens
        return groups
    if "forced" in mode:
        # Two calls, because `generate` has one rule for all places: first no token may end the
        # thought, then every token may be drawn. Each rollout is a prompt of its own in the second.
        left = room_after(args.forced, "--forced", args)
        groups = decode(prompts, n, args.forced, banned=[close[0], *ends])
        longer = [prompt + rollout.tokens for prompt, rollouts in zip(prompts, groups)
                  for rollout in rollouts]
        for rollout, [rest] in zip(itertools.chain(*groups), decode(longer, 1, left, number=1)):
            rollout.tokens += rest.tokens
            rollout.logprobs += rest.logprobs
            rollout.finished = rest.finished
        return groups
    return decode(prompts, n, args.max_new_tokens)


def decode_with_bar(model, ends, args, mode, prompts, n, max_new_tokens, number=0, banned=()):
    """`generate` with the flags of a command line; number: 1 where a rollout is continued."""
    with RolloutBar(len(prompts) * n, mode) as bar:
        return generate(model, prompts, n, max_new_tokens, temperature_of(mode, args), ends,
                        (args.seed, (1 << 20) + number), max_rows=args.max_rows, kv_gb=args.kv_gb,
                        on_tokens=bar,
                        truncate=truncation(args.top_k, args.top_p, args.min_p, banned))


def temperature_of(mode, args):
    return 0 if "greedy" in mode else args.temperature


def room_after(tokens, what, args):
    """How many tokens a rollout may have after its first ones; ValueError if none."""
    if tokens >= args.max_new_tokens:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room after {what} of "
                         f"{tokens} tokens")
    return args.max_new_tokens - tokens


def think(model, tokenizer, corpus, positions, args, mode="reasoning", known=None):
    """(n, 3) positions -> a Group of rollouts each; its rewards say which are right.

    Every template opens the thought. Mode "empty" closes it at once, with the same prompt and as
    many tokens, and counts a box only where nothing precedes it. Mode "swapped" takes the thoughts
    of `known`, Groups of the same positions.
    """
    template = template_ids(tokenizer, args.template)
    longest = min(args.max_prompt_tokens, model.config.max_positions - args.max_new_tokens)
    questions = [ask(corpus, tokenizer, position, template, longest) for position in positions]
    extract = box_at_once if mode == "empty" else extract_prediction
    prompts = [question.prompt for question in questions]
    if mode == "swapped":
        rollouts = behind_thoughts(model, tokenizer, prompts, swap(known, positions), args)
    else:
        rollouts = sample_rollouts(model, tokenizer, prompts, args, mode)
    groups = []
    for question, some in zip(questions, rollouts):
        predicted = predictions(tokenizer, some, extract)
        right = [prefix_match(prediction, question.truth) for prediction in predicted]
        groups.append(Group(question, some, predicted, right))
    return groups


def swap(groups, positions):
    """-> for each position the first thought about another one, of another document if possible."""
    n, swapped = len(groups), []
    for i in range(n):
        others = range(i + n // 2, i + n // 2 + n)
        foreign = (j % n for j in others if positions[j % n][1] != positions[i][1])
        swapped.append(groups[next(foreign, others[0] % n)].rollouts[0])
    return swapped


def behind_thoughts(model, tokenizer, prompts, rollouts, args):
    """Prompts, and a rollout for each -> its thought, with what the model answers behind it."""
    close = tokenizer.encode("</think>", special=True)
    answer = min(BOX_TOKENS, max(1, args.max_new_tokens // 4))
    room_after(len(close) + answer, "a thought and a box", args)
    longest = args.max_new_tokens - len(close) - answer
    given = [thought_of(tokenizer, rollout)[:longest] + close for rollout in rollouts]
    longer = [prompt + thought for prompt, thought in zip(prompts, given)]
    answers = decode_with_bar(model, stop_ids(tokenizer), args, "swapped", longer, 1, answer,
                              number=2)
    return [[Rollout(thought + rest.tokens)] for thought, [rest] in zip(given, answers)]


def thought_of(tokenizer, rollout):
    """The tokens of a rollout before its last </think>, or without its end if there is none."""
    tokens = rollout.tokens[:-1] if rollout.finished else rollout.tokens
    thought, close, _ = tokenizer.decode_bytes(tokens).rpartition(b"</think>")
    if not close:
        return tokens
    # A token may hold both the end of the thought and the beginning of </think>.
    ends = itertools.accumulate(len(tokenizer.decode_bytes([token])) for token in tokens)
    return tokens[:sum(end <= len(thought) for end in ends)]


def evaluate(checkpoint, corpus, positions, splits, args):
    """One checkpoint on all positions -> lines of results.json."""
    model, tokenizer = load_model(checkpoint, args)
    results, thoughts = [], {}
    asked = itertools.chain(*(MODES.get(mode, [mode]) for mode in args.mode))
    for mode in dict.fromkeys(asked):
        for needed in NEEDS.get(mode, [mode] if mode != "ntp" else []):
            if needed in thoughts:
                continue
            thoughts[needed] = think(model, tokenizer, corpus, positions, args, needed,
                                     thoughts.get("reasoning"))
            if args.dump:
                about = dict(checkpoint=checkpoint, mode=needed)
                dump(args.dump,
                     [about | in_words(tokenizer, group, 0) for group in thoughts[needed]])
        counts = None
        if mode == "ntp":
            # Guessing sees as much context as reasoning.
            longest = min(model.config.max_positions, args.max_prompt_tokens)
            hits = ntp_hits(model, corpus, positions, longest, tokenizer.bos)
        elif mode in VOTES:
            hits = majority_hits(thoughts[VOTES[mode]])
        else:
            counts = count(thoughts[mode])
            hits = counts["rewards"].mean(axis=1)
        if args.hits:
            which = {split: i.tolist() for split, i in splits.items()}
            dump(args.hits, [dict(checkpoint=checkpoint, mode=mode, splits=which,
                                  positions=positions.tolist(), hits=hits.tolist())])
        results += in_splits(checkpoint, mode, hits, counts, positions, splits, args)
    return results


def in_splits(checkpoint, mode, hits, counts, positions, splits, args):
    """(n,) hits, and counts of the thoughts or None -> a line of results.json for each split."""
    lines = []
    for split, i in splits.items():
        documents = positions[i, 1]
        part = dict(split=split, corpus=args.corpus, template=args.template, dtype=args.dtype)
        if counts is None:
            line = result(checkpoint, mode, part, hits[i], documents, args.seed)
        else:
            some = {name: values[i] for name, values in counts.items()}
            line = thought_result(checkpoint, mode, part, some, documents, args)
        if mode in VOTES:
            line |= dict(samples=args.samples, temperature=args.temperature)
        if "forced" in mode:
            line["forced"] = args.forced
        lines.append(line)
    return lines


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


def majority_hits(groups):
    """n Groups -> (n,) 1.0 where the prediction that most rollouts make is right."""
    hits = []
    for group in groups:
        # No box, no vote; of equally frequent predictions the first counts.
        votes = Counter(prediction for prediction in group.predictions if prediction is not None)
        winner = votes.most_common(1)[0][0] if votes else None
        hits.append(prefix_match(winner, group.question.truth))
    return np.array(hits)


def count_any(rewards, predictions, rollouts):
    """Counts for rollouts of any kind: lists of n lists of K -> {what: array (n, K)}."""
    boxed = [[prediction is not None for prediction in row] for row in predictions]
    lengths = [[len(rollout.tokens) for rollout in row] for row in rollouts]
    return dict(rewards=np.array(rewards, dtype=float), format_rate=np.array(boxed, dtype=float),
                lengths=np.array(lengths, dtype=float))


def interval(values, documents, seed):
    """(n,) values and the document of each -> ends of the 95 % bootstrap interval of their mean.

    Resamples of a few documents differ too little, and where all documents agree not at all. It
    then also covers Wilson's interval for as many trials as there are documents.
    """
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, weights=values), np.bincount(document)
    n = len(sums)
    drawn = np.random.default_rng(seed).integers(n, size=(BOOTSTRAP, n))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    if n >= FEW and high - low > 1e-9:  # more than rounding
        return np.array([low, high])
    lowest, highest = wilson(values.mean(), n)
    return np.clip([min(low, lowest), max(high, highest)], 0, 1)


def wilson(share, n):
    """95 % interval of a share of n trials; it makes sense at 0 and 1, too."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = (z2 * share * (1 - share) / n + (z2 / (2 * n))**2)**0.5 / (1 + z2 / n)
    return middle - half, middle + half


def read_beside(path, splits, seed):
    """-> the lines of a results.json; ValueError if they are about other positions."""
    with open(path, encoding="utf-8") as file:
        try:
            lines = json.load(file)
            shown = [[line[name] for name in SHOWN] for line in lines]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: not a results.json of eval.py ({error!r})") from None
    for *_, split, n, its_seed in shown:
        if (n, its_seed) != (len(splits.get(split, [])), seed):
            raise ValueError(f"{path} is about other positions: it says --seed {its_seed}, "
                             f"{n} {split} ones")
    return lines


def percent(share):
    return round(100 * float(share), 2)


def result(checkpoint, mode, part, values, documents, seed):
    """One line of results.json. part: {"split": name} or {"subject": name}."""
    low, high = interval(values, documents, seed)
    return dict(checkpoint=checkpoint, mode=mode, **part, accuracy=percent(values.mean()),
                low=percent(low), high=percent(high), n=len(values), seed=seed,
                **flags.versions())


def thought_result(checkpoint, mode, part, counts, documents, args):
    """{what: array (n, K)} -> one line of results.json."""
    rewards = counts["rewards"]
    line = result(checkpoint, mode, part, rewards.mean(axis=1), documents, args.seed)
    line["pass_at_k"] = percent(rewards.max(axis=1).mean())
    for name, values in counts.items():
        if name not in ("rewards", "lengths"):
            line[name] = percent(values.mean())
    return line | dict(samples=rewards.shape[1], temperature=temperature_of(mode, args),
                       len_mean=round(float(counts["lengths"].mean()), 1))


def print_table(results):
    """A block for each checkpoint, a row for each mode: accuracy [95 % interval] on each split."""
    splits = [s for s in SPLITS if any(r["split"] == s for r in results)]
    print("\n" + f"{'next-token accuracy, %':22}"
          + "".join(f"{s + f' > {SPLITS[s]}':>19}" for s in splits))
    for checkpoint in dict.fromkeys(r["checkpoint"] for r in results):
        print(checkpoint)
        mine = [r for r in results if r["checkpoint"] == checkpoint]
        for mode in dict.fromkeys(r["mode"] for r in mine):
            cells = {r["split"]: f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"
                     for r in mine if r["mode"] == mode}
            print(f"    {mode:18}" + "".join(f"{cells[s]:>19}" for s in splits))
    n = {r["split"]: r["n"] for r in results}
    print(f"{'positions':22}" + "".join(f"{n[s]:>19}" for s in splits))


# ---- command line ----

def add_thought_flags(add, of):
    """Flags of every evaluation; of: what a thought is about, for the help."""
    add("--checkpoints", required=True, nargs="+", help="checkpoint folders, side by side")
    add("--samples", type=flags.at_least(1), default=1, metavar="K", help=f"thoughts for each {of}")
    flags.add_length_flag(add, MAX_NEW_TOKENS)
    flags.add_sampling_flags(add)
    add("--out", help="write the table here as JSON, after each checkpoint")
    add("--dump", help=f"add one rollout for each {of} to this file, as JSON lines, in place of "
                       f"earlier ones of the same checkpoint about the same {of}")
    add("--seed", type=flags.at_least(0), default=0, help=f"chooses {of}s and thoughts")
    flags.add_device_flag(add)


def check_sampling(args):
    """Check --top-k, --top-p and --min-p before anything is loaded."""
    truncation(args.top_k, args.top_p, args.min_p)


def fill_in_length(args):
    """--max-new-tokens, where it is not given: the same for all checkpoints."""
    positions = min(read_config(checkpoint).max_positions for checkpoint in args.checkpoints)
    args.max_new_tokens = flags.new_tokens(args.max_new_tokens, MAX_NEW_TOKENS, positions)


def check_paths(args, corpus=None):
    """Look at every path before hours of work; make the folders of those to be written."""
    for checkpoint in args.checkpoints:
        tokenizer = Tokenizer.load(checkpoint, for_model=True)
        check_weights(checkpoint)
        if corpus:
            corpus.check(tokenizer, checkpoint)
    dumps = [path for path in (args.dump, getattr(args, "hits", None)) if path]
    for path in filter(None, (args.out, *dumps)):
        folder = os.path.dirname(path) or "."
        os.makedirs(folder, exist_ok=True)
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            raise ValueError(f"{path}: cannot be written; choose another file")
    for path in dumps:
        other_lines(path, [])


def evaluate_each(evaluate, show, what, asked, args, results=()):
    """Print `results` and the lines of each checkpoint, and write --out after each of them.

    what: is asked, in words. show: prints the table, also if a later checkpoint cannot be read.
    """
    results = list(results)
    try:
        for checkpoint in args.checkpoints:
            print(f"{checkpoint}: {what}", flush=True)
            results += evaluate(checkpoint, *asked, args)
            if args.out:
                write(args.out, json.dumps(results, indent=1))
                print(f"written to {args.out}", flush=True)
    finally:
        if results:
            show(results)


def parse_args():
    parser = flags.Parser("Next-token accuracy on held-out text, by difficulty.")
    add = parser.add_argument
    add("task", choices=["lm"], help="next tokens of held-out text")
    add("--corpus", required=True,
        help="folder written by data/prepare.py and scored by data/filter.py")
    add("--proxy",
        help="checkpoint whose entropies split the positions; default: the only one there is")
    add("--mode", default=["both"], nargs="+",
        choices=["ntp", *DECODINGS, "empty", "swapped", *MODES],
        help="one or several; both: ntp and reasoning; all: empty thoughts too; decodings: all but "
             "swapped")
    add("--forced", type=flags.at_least(1), default=1, metavar="K",
        help="modes that are forced: </think> is not allowed among the first K tokens")
    add("--positions", type=flags.at_least(1), default=200,
        help="held-out positions for each split")
    add("--template", default="v0",
        help=f"how it is asked (data/prompt.py): {', '.join(TEMPLATES)}")
    add("--max-prompt-tokens", type=flags.at_least(1), default=4096,
        help="longer contexts lose their beginning")
    add("--hits", metavar="FILE",
        help="add a line for each checkpoint and mode to this file: the share of thoughts that is "
             "right at each position")
    add("--beside", metavar="FILE",
        help="results.json of other checkpoints on the same positions, to show and keep first")
    add_thought_flags(add, "position")
    args = parser.parse_args()
    check_sampling(args)
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    fill_in_length(args)
    corpus = load_corpus(args.corpus)
    scores = find_scores(corpus, args.proxy)
    check_paths(args, corpus)
    fits = answerable(Tokenizer.load(args.checkpoints[0]))
    positions, splits = choose_positions(corpus, scores, args.positions, args.seed, fits)
    results = read_beside(args.beside, splits, args.seed) if args.beside else []
    what = f"{len(positions)} held-out positions, shared by the splits"
    evaluate_each(evaluate, print_table, what, (corpus, positions, splits), args, results)
