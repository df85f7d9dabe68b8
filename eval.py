r"""What is a thought worth? Accuracy with and without reasoning: the paper's Tables 1, 3, 6, 7 and 9.

    python eval.py lm --corpus C --checkpoints BASE RPT --mode both --positions 200 --out results.json
    python eval.py choices --data mmlu_pro.jsonl --checkpoints BASE RPT --mode both --samples 4
    python eval.py answers --data gsm8k_test.jsonl --checkpoints BASE RPT --limit 200 --dump thoughts.jsonl
    python eval.py patterns --dump thoughts.jsonl

lm: held-out positions are split by the entropy of one reference model, as in Table 1: easy, medium and hard
are entropy > 0.5, 1.0 and 1.5 nats, nested. Every checkpoint answers the same positions:
    ntp         the most probable next token after the context alone: right or wrong
    reasoning   K sampled thoughts with a prediction: mean reward, and pass@K (any of the K right)
    empty       the same with </think> as the first thing of the response, and a box next: what the thought adds
choices: multiple choice without examples. reasoning asks for the letter in \boxed{}; likelihood takes the
option whose text has the highest log-prob after the question (likelihood_norm: per byte of the option).
answers: an exact answer in \boxed{}. patterns: what the dumped thoughts look like.

Intervals are 95 % bootstrap intervals over documents or questions: positions of one document stand and fall
together. Percent everywhere.
"""
import argparse
import json
import sys

import numpy as np
import torch
from tqdm import tqdm

from data.answers import answers_equal
from plumbing.checkpoint import append, write
from plumbing.flags import speak_once
from data.filter import SPLITS, find_scores, load_positions
from data.prepare import load_corpus
from data.prompt import stop_ids, template_ids
from data.tokenizer import Tokenizer
from eval_tasks import (ASK, LETTERS, SOLVE, TOKENS_PER_PASS, is_letter, lettered, option_logprobs, patterns,
                        print_patterns, question_prompt, read_choices, read_questions, read_responses)
from kernels.attention import make_layout
from model import GPT
from reward import box_at_once, extract_prediction, prefix_match
from sample import generate, rollout_bar, truncation
from train_ntp import check_range, micro_batches
from task import make_question, sample_record, score

BOOTSTRAP = 1000
MODES = dict(both=["ntp", "reasoning"], all=["ntp", "reasoning", "empty"])  # others mean themselves


def load(checkpoint, device, corpus=None):
    """-> model and tokenizer of a checkpoint folder, which must be the corpus's tokenizer if there is one."""
    tokenizer = Tokenizer.load(checkpoint)
    if corpus:
        corpus.check(tokenizer, checkpoint)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return GPT.from_pretrained(checkpoint, dtype, device), tokenizer


def sample_responses(model, tokenizer, prompts, args, desc, start=()):
    """Prompts (lists of ids) -> args.samples rollouts for each, all of which begin with the ids `start`."""
    if len(start) >= args.max_new_tokens:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} leaves no room after an empty thought of "
                         f"{len(start)} tokens")
    with rollout_bar(len(prompts) * args.samples, desc) as progress:
        rollouts = generate(model, [prompt + list(start) for prompt in prompts], args.samples,
                            args.max_new_tokens - len(start), args.temperature, stop_ids(tokenizer),
                            (args.seed, 1 << 20), progress=progress, max_rows=args.max_rows, kv_gb=args.kv_gb,
                            truncate=truncation(args.top_k, args.top_p, args.min_p))
    for rollout in (r for group in rollouts for r in group):
        rollout.tokens = [*start, *rollout.tokens]
    return rollouts


# ---- what is counted ---------------------------------------------------------------------------------------
def interval(values, documents, seed):
    """(n,) values and the document of each -> ends of the 95 % bootstrap interval of their mean.

    Where all values are equal no resample differs; it is Wilson's interval then, of as many trials as documents.
    """
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, weights=values), np.bincount(document)
    if np.ptp(values) == 0:
        width = 1.96**2 / (len(sums) + 1.96**2)
        return values[0] * (1 - width) + np.array([0, width])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(BOOTSTRAP, len(sums)))
    return np.percentile(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), [2.5, 97.5])


def result(checkpoint, mode, part, values, documents, seed, **more):
    """One line of results.json; accuracies in percent. part: {"split": name} or {"subject": name}."""
    low, high = interval(values, documents, seed)
    percent = lambda x: round(100 * float(x), 2)
    line = dict(checkpoint=checkpoint, mode=mode, **part, accuracy=percent(values.mean()),
                low=percent(low), high=percent(high), n=len(values), seed=seed)
    return line | {name: percent(x.mean()) for name, x in more.items()}


def thought_result(checkpoint, mode, part, counted, documents, args):
    """Arrays (n, K), counted of every rollout -> one line of results.json."""
    rewards, lengths = counted["rewards"], counted["lengths"]
    shares = {name: x for name, x in counted.items() if name not in ("rewards", "lengths")}
    line = result(checkpoint, mode, part, rewards.mean(axis=1), documents, args.seed,
                  pass_at_k=rewards.max(axis=1), **shares)
    return line | dict(samples=args.samples, temperature=args.temperature,
                       len_mean=round(float(lengths.mean()), 1))


def count(rewards, predictions, rollouts):
    """What can be counted of any rollouts, [[of each] for each prompt] -> arrays (n, K)."""
    return dict(rewards=np.array(rewards, dtype=float),
                format_rate=np.array([[p is not None for p in row] for row in predictions], dtype=float),
                lengths=np.array([[len(r.tokens) for r in row] for row in rollouts], dtype=float))


# ---- lm ----------------------------------------------------------------------------------------------------
def choose_positions(corpus, scores, count, seed):
    """`count` held-out positions for each split -> positions (n, 3), {split: indices into them}."""
    positions = load_positions(corpus, scores, SPLITS["easy"], "val")
    positions = positions[np.random.default_rng(seed).permutation(len(positions))]
    entropy = np.load(scores, mmap_mode="r")[positions[:, 0], 0]
    splits = {name: np.flatnonzero(entropy > threshold)[:count] for name, threshold in SPLITS.items()}
    used = np.unique(np.concatenate(list(splits.values())))  # nested splits: most positions serve twice
    places = {name: np.searchsorted(used, chosen) for name, chosen in splits.items() if len(chosen)}
    return positions[used], places


@torch.no_grad()
def ntp_hits(model, corpus, positions, room):
    """(n, 3) positions -> (n,) 1.0 where the likeliest token after at most `room` tokens of context is true."""
    hits = []
    contexts = [corpus.tokens[max(start, t - room):t].tolist() for t, start, _ in positions]
    with tqdm(total=len(contexts), desc="next token", unit="position", disable=None) as bar:
        for batch in micro_batches(contexts, TOKENS_PER_PASS, len):
            layout = make_layout([(len(context), []) for context in batch], model.device)
            tokens = torch.tensor(sum(batch, []), device=model.device)
            hidden = model.packed_hidden(tokens, layout)[layout.last_rows]
            hits += (hidden @ model.head.to(hidden.dtype).T).argmax(dim=-1).tolist()
            bar.update(len(batch))
    return (np.array(hits) == corpus.tokens[positions[:, 0]]).astype(float)


def reasoning_groups(model, tokenizer, corpus, positions, args, mode="reasoning"):
    """(n, 3) positions -> a Group of args.samples scored rollouts for each.

    Every template opens the thought. Mode "empty" closes it at once, with the same prompt and the same room, and
    counts a box only where nothing stands before it.
    """
    template = template_ids(tokenizer, args.template)
    room = min(args.max_prompt_tokens, model.config.max_positions - args.max_new_tokens)
    questions = [make_question(corpus, tokenizer, position, template, room) for position in positions]
    start = tokenizer.encode("</think>", special=True) if mode == "empty" else ()
    rollouts = sample_responses(model, tokenizer, [q.prompt for q in questions], args, mode, start)
    extract = box_at_once if mode == "empty" else extract_prediction
    return [score(tokenizer, question, r, extract=extract) for question, r in zip(questions, rollouts)]


def count_groups(groups):
    """Groups -> arrays (n, K); of the right predictions, those of one true token and of several apart."""
    counted = count(*([getattr(g, name) for g in groups] for name in ("rewards", "predictions", "rollouts")))
    one = np.array([[prefix_match(p, g.question.truth[:1]) for p in g.predictions] for g in groups])
    right = np.array([[prefix_match(p, g.question.truth) for p in g.predictions] for g in groups])
    return counted | dict(one_token=one, multi_token=right - one)


def evaluate(checkpoint, corpus, positions, splits, args):
    """One checkpoint on all positions -> lines of results.json."""
    model, tokenizer = load(checkpoint, args.device, corpus)
    documents, results = positions[:, 1], []
    for mode in MODES.get(args.mode, [args.mode]):
        if mode == "ntp":
            room = min(model.config.max_positions, args.max_prompt_tokens)  # as much as reasoning gets
            hits = ntp_hits(model, corpus, positions, room)
            results += [result(checkpoint, mode, dict(split=split), hits[i], documents[i], args.seed)
                        for split, i in splits.items()]
            continue
        groups = reasoning_groups(model, tokenizer, corpus, positions, args, mode)
        counted = count_groups(groups)
        results += [thought_result(checkpoint, mode, dict(split=split),
                                   {name: x[i] for name, x in counted.items()}, documents[i], args)
                    for split, i in splits.items()]
        if args.dump:
            append(args.dump, [dict(checkpoint=checkpoint, mode=mode) | sample_record(tokenizer, 0, group, 0)
                               for group in groups])
    return results


def print_table(results):
    """One row for each checkpoint and mode: accuracy [95 % interval] on each split."""
    splits = [s for s in SPLITS if any(r["split"] == s for r in results)]
    rows = list(dict.fromkeys((r["checkpoint"], r["mode"]) for r in results))
    width = max(len(checkpoint) for checkpoint, _ in rows)
    titles = "  ".join(f"{s + f' > {SPLITS[s]}':>20}" for s in splits)
    print(f"\n{'next-token accuracy, %':{width}}  {'mode':9}  {titles}")
    for row in rows:
        cells = {r["split"]: f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]" for r in results
                 if (r["checkpoint"], r["mode"]) == row}
        print(f"{row[0]:{width}}  {row[1]:9}  " + "  ".join(f"{cells[s]:>20}" for s in splits))
    n = {r["split"]: r["n"] for r in results}
    print(f"{'positions':{width}}  {'':9}  " + "  ".join(f"{n[s]:>20}" for s in splits))


# ---- choices and answers -----------------------------------------------------------------------------------
def choose_questions(questions, limit, seed):
    """`limit` of the questions (0: all of them), chosen by the seed, in the order of the file."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:limit or None]
    return [questions[i] for i in sorted(chosen)]


def think(model, tokenizer, asked, is_right, args, checkpoint):
    """[(what to ask, truth)] -> arrays (n, K), counted of K responses to each; dumps the first of each."""
    prompts = [question_prompt(tokenizer, text, args.template) for text, _ in asked]
    room = model.config.max_positions - args.max_new_tokens
    for prompt, (text, _) in zip(prompts, asked):
        if len(prompt) > room:
            raise ValueError(f"question {text[:40]!r}... takes {len(prompt)} tokens; --max-new-tokens leaves "
                             f"{room} of the model's {model.config.max_positions} positions: lower it")
    rollouts = sample_responses(model, tokenizer, prompts, args, "reasoning")
    responses = [[tokenizer.decode_bytes(r.tokens) for r in row] for row in rollouts]
    predictions = [[extract_prediction(response) for response in row] for row in responses]
    rewards = [[float(is_right(p, truth)) for p in row] for row, (_, truth) in zip(predictions, asked)]
    if args.dump:
        words = lambda raw: None if raw is None else raw.decode("utf-8", "backslashreplace")
        append(args.dump, [dict(checkpoint=checkpoint, mode="reasoning", question=text, truth=truth,
                                response=words(r[0]), extracted=words(p[0]), reward=reward[0])
                           for (text, truth), r, p, reward in zip(asked, responses, predictions, rewards)])
    return count(rewards, predictions, rollouts)


def evaluate_choices(checkpoint, choices, args):
    """One checkpoint on multiple choice -> lines of results.json, for all questions and for each subject."""
    model, tokenizer = load(checkpoint, args.device)
    subjects = np.array([choice.subject for choice in choices])
    parts = {"all": np.arange(len(choices))}
    parts |= {name: np.flatnonzero(subjects == name) for name in sorted(set(subjects.tolist()) - {""})}
    results = []
    if args.mode in ("likelihood", "both"):
        sums = option_logprobs(model, tokenizer, choices)
        sizes = [[len(option.encode()) for option in choice.options] for choice in choices]
        for mode, scored in (("likelihood", sums),
                             ("likelihood_norm", [np.divide(s, size) for s, size in zip(sums, sizes)])):
            hits = np.array([float(np.argmax(s) == choice.answer) for s, choice in zip(scored, choices)])
            results += [result(checkpoint, mode, dict(subject=name), hits[i], i, args.seed)
                        for name, i in parts.items()]
    if args.mode in ("reasoning", "both"):
        asked = [(lettered(choice), LETTERS[choice.answer]) for choice in choices]
        counted = think(model, tokenizer, asked, is_letter, args, checkpoint)
        results += [thought_result(checkpoint, "reasoning", dict(subject=name),
                                   {key: x[i] for key, x in counted.items()}, i, args)
                    for name, i in parts.items()]
    return results


def evaluate_answers(checkpoint, questions, args):
    """One checkpoint on questions with an exact answer -> a line of results.json."""
    model, tokenizer = load(checkpoint, args.device)
    asked = [(question + (SOLVE if args.template == "chat" else ""), truth) for question, truth in questions]
    counted, each = think(model, tokenizer, asked, answers_equal, args, checkpoint), np.arange(len(asked))
    return [thought_result(checkpoint, "reasoning", dict(subject="all"), counted, each, args)]


def print_subjects(results):
    """One row for each subject, mode and checkpoint, those to be compared below each other."""
    widths = [max(len(r[key]) for r in results) for key in ("subject", "mode", "checkpoint")]
    names = lambda *texts: "  ".join(f"{text:{width}}" for text, width in zip(texts, widths))
    print(f"\n{names('', '', 'accuracy, %')}  {'':>20}  {'n':>6}")
    for r in sorted(results, key=lambda r: (r["subject"] != "all", r["subject"], r["mode"])):
        cell = f"{r['accuracy']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"
        print(f"{names(r['subject'], r['mode'], r['checkpoint'])}  {cell:>20}  {r['n']:>6}")


# ---- command line ------------------------------------------------------------------------------------------
def add_sampling(add, of):
    """Flags of all tasks that run checkpoints; of: what is answered, for the help."""
    add("--checkpoints", required=True, nargs="+", help="checkpoint folders, side by side")
    add("--samples", type=int, default=1, metavar="K", help=f"thoughts for each {of}")
    add("--temperature", type=float, default=0.8, help="of sampling; 0 is greedy")
    add("--max-new-tokens", type=int, default=8192, help="tokens of a response")
    add("--top-k", type=int, default=0, help="sample only from the K most probable tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="only the fewest tokens that have this much probability")
    add("--min-p", type=float, default=0.0, help="only tokens with this share of the best one's probability")
    add("--max-rows", type=int, default=256, help="rollouts decoded at a time")
    add("--kv-gb", type=float, default=None, help="memory for keys and values; default: half of all there is")
    add("--out", default=None, help="write the table here as JSON")
    add("--dump", default=None, help=f"append one rollout for each {of} here, as JSON lines")
    add("--seed", type=int, default=0, help=f"chooses {of}s and thoughts")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    task = lambda name, about: tasks.add_parser(
        name, help=about, description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)

    lm = task("lm", "next tokens of held-out text, by difficulty")
    add = lm.add_argument
    add("--corpus", required=True, help="folder written by data/prepare.py and scored by data/filter.py")
    add("--proxy", default=None,
        help="checkpoint whose entropies split the positions; default: the only one there is")
    add("--mode", default="both", choices=["ntp", "reasoning", "empty", *MODES],
        help="both: ntp and reasoning; all: empty thoughts too")
    add("--positions", type=int, default=200, help="held-out positions for each split")
    add("--template", default="v0", help="prompt of data/prompt.py: v0 to v6, or short")
    add("--max-prompt-tokens", type=int, default=4096, help="longer contexts lose their beginning")
    add_sampling(add, "position")

    choices = task("choices", "multiple choice, by subject")
    choices.add_argument("--mode", default="both", choices=["reasoning", "likelihood", "both"],
                         help="a letter after a thought, or the likeliest option text")
    answers = task("answers", "questions with an exact answer")
    for add, fields in (
            (choices.add_argument, "question, options, answer; the fields of MMLU-Pro or SuperGPQA will do"),
            (answers.add_argument, "question, answer; the answer may end in #### N or hold a \\boxed{N}")):
        add("--data", required=True, metavar="FILE", help=f"JSON lines: {fields}")
        add("--limit", type=int, default=0, metavar="N",
            help="ask this many questions, chosen by --seed; 0: all")
        add("--template", default="chat", choices=ASK,
            help="chat: turns of the checkpoint's chat format; short: text and <think>")
        add_sampling(add, "question")

    looks = task("patterns", "what thoughts look like: keywords, length, diversity")
    add = looks.add_argument
    add("--dump", required=True, nargs="+", metavar="FILE", help="what the other tasks' --dump wrote")
    add("--out", default=None, help="write the table here as JSON")

    parser.epilog = "\n".join(p.format_help() for p in (lm, choices, answers, looks))
    args = parser.parse_args()
    if args.task != "patterns":
        check_range(args, 1, "samples max_new_tokens max_rows")
        check_range(args, 1, "positions max_prompt_tokens" if args.task == "lm" else "")
        check_range(args, 0, "temperature seed" + (" limit" if args.task != "lm" else ""))
        truncation(args.top_k, args.top_p, args.min_p)
    return args


if __name__ == "__main__":
    sys.excepthook = speak_once
    args = parse_args()
    results = []
    if args.task == "patterns":
        results = patterns(read_responses(args.dump))
        print_patterns(results)
    elif args.task == "lm":
        corpus = load_corpus(args.corpus)
        scores = find_scores(corpus, args.proxy)
        positions, splits = choose_positions(corpus, scores, args.positions, args.seed)
        for checkpoint in args.checkpoints:
            print(f"{checkpoint}: {len(positions)} held-out positions", flush=True)
            results += evaluate(checkpoint, corpus, positions, splits, args)
        print_table(results)
    else:
        read, measure = dict(choices=(read_choices, evaluate_choices),
                             answers=(read_questions, evaluate_answers))[args.task]
        questions = choose_questions(read(args.data), args.limit, args.seed)
        for checkpoint in args.checkpoints:
            print(f"{checkpoint}: {len(questions)} questions", flush=True)
            results += measure(checkpoint, questions, args)
        print_subjects(results)
    if args.out:
        write(args.out, json.dumps(results, indent=1))
        print(f"written to {args.out}")
