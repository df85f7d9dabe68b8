r"""Strings for a warm start: they teach the form to a model that has never boxed a prediction.

    python data/warmstart.py --corpus C --proxy DIR --template short --out S.jsonl
    python train_ntp.py --corpus C --init DIR --strings S.jsonl --documents-per-step 0 ...

A string is a prompt of RPT, and as the thought a draft: how the model itself, which has seen the
same context, continues the text. The box holds the first token of the draft:

    [context] <think> 2, so the sum of the digits is</think>\boxed{2}<eos>

So a model learns to look ahead, to write down what it sees, and to box where that begins. No truth
is used: which drafts are right is left to RPT, which starts about as often right as the model is
when it samples the next token. For train_rpt.py --objective answers: a question, its solution as
the thought, its answer in the box:

    python data/warmstart.py --solutions gsm8k_train.jsonl --proxy DIR --template chat --out S.jsonl
"""
import json
import random
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
from data.corpus import load_corpus
from data.positions import find_scores, load_positions
from data.prompt import (TEMPLATES, build_prompt, check_question_template, solve_prompt, stop_ids,
                         template_ids)
from data.questions import leave_out_long, read_solutions
from data.tokenizer import Tokenizer
from model import GPT, read_config
from plumbing.files import write
from plumbing.log import RolloutBar, text_of
from reward import extract_prediction
from sample import generate


def draft_strings(args, tokenizer, rng):
    """Strings for --count hard positions of --corpus, those of a position side by side."""
    corpus = load_corpus(args.corpus)
    corpus.check(tokenizer, args.proxy)
    scores = find_scores(corpus, args.proxy)
    positions = load_positions(corpus, scores, args.entropy_threshold, "train")
    positions = np.random.default_rng(args.seed).permutation(positions)[:args.count]
    model = GPT.from_pretrained(args.proxy, flags.compute_dtype(args), args.device).join_weights()
    before, after = template_ids(tokenizer, args.template)
    longest_string = args.draft_tokens + len(boxed(tokenizer, [tokenizer.eos_id]))
    longest = min(args.max_prompt_tokens, model.config.max_positions - longest_string)
    prompts = []
    for t, start, _ in positions:
        context = corpus.tokens[start + len(tokenizer.bos):t].tolist()
        prompts.append(build_prompt(context, before, after, longest))

    # The model continues the very context that the prompt shows, without the template.
    contexts = [tokenizer.bos + prompt[len(before):len(prompt) - len(after)] for prompt in prompts]
    drafts = args.drafts if args.temperature else 1  # all greedy ones are the same
    with RolloutBar(len(prompts) * drafts, "drafts") as bar:
        groups = generate(model, contexts, drafts, args.draft_tokens, args.temperature,
                          stop_ids(tokenizer), (args.seed, 1 << 22), max_rows=args.max_rows,
                          kv_gb=args.kv_gb, on_tokens=bar)
    strings = []
    for prompt, rollouts in zip(prompts, groups):
        responses = [draft_string(tokenizer, rollout) for rollout in rollouts]
        strings += [dict(prompt=prompt) | string for string in responses if string]
    if not strings:
        raise ValueError(f"{args.out}: not one draft about {len(positions)} positions has a first "
                         "token that fits into a box")
    return strings


def draft_string(tokenizer, rollout):
    """A Rollout of plain text -> {"response": ids, "text": ...}; None if no box can hold it."""
    draft = rollout.tokens[:-1] if rollout.finished else rollout.tokens
    if not draft:
        return None
    response = draft + boxed(tokenizer, draft[:1])
    raw = tokenizer.decode_bytes(response)
    if extract_prediction(raw) != tokenizer.token_bytes(draft[0]):  # a lone } fits no box
        return None
    return dict(response=response, text=text_of(raw))


def boxed(tokenizer, ids):
    """The end of a thought, ids in a box, the end of the text. Boxing is then to copy a token."""
    return (tokenizer.encode("</think>", special=True) + tokenizer.encode(r"\boxed{") + ids
            + tokenizer.encode("}") + [tokenizer.eos_id])


def solution_strings(args, tokenizer, rng):
    """Strings for --count questions of --solutions."""
    check_question_template(args.template)
    solutions = read_solutions(args.solutions, args.skip_bad)
    solutions = rng.sample(solutions, min(args.count, len(solutions)))
    strings = []
    for question, solution, answer in solutions:
        prompt = solve_prompt(tokenizer, question, args.template)
        response = (tokenizer.encode(solution) + tokenizer.encode("</think>", special=True)
                    + tokenizer.encode(rf"\boxed{{{answer}}}") + [tokenizer.eos_id])
        text = text_of(tokenizer.decode_bytes(response))
        strings.append(dict(prompt=prompt, response=response, text=text))
    sizes = [len(string["prompt"]) + len(string["response"]) for string in strings]
    kept = leave_out_long([question for question, _, _ in solutions], sizes,
                          read_config(args.proxy).max_positions, args.skip_long,
                          "take a --proxy with more positions")
    return [strings[i] for i in kept]


def parse_args():
    parser = flags.Parser("Think/answer strings from what a model drafts at positions of a corpus, "
                          "or from solutions.")
    add = parser.add_argument
    add("--corpus", help="folder written by data/prepare.py and scored by data/filter.py")
    add("--solutions", metavar="FILE",
        help="JSON lines of questions with worked answers, instead of --corpus")
    flags.add_question_flags(add)
    add("--proxy", required=True, help="checkpoint that scored the corpus and drafts")
    add("--out", required=True, help="JSONL file to write")
    add("--count", type=flags.at_least(1), default=2000,
        help="positions or questions")
    add("--drafts", type=flags.at_least(1), default=6, help="strings for each position")
    add("--draft-tokens", type=flags.at_least(1), default=10, help="length of a draft")
    add("--temperature", type=flags.at_least(0, float), default=0.8,
        help="of drafts; 0: a single, greedy one for each position")
    add("--template", default="v0",
        help=f"how it is asked (data/prompt.py): {', '.join(TEMPLATES)}; --solutions: chat or "
             "short")
    add("--entropy-threshold", type=flags.at_least(0, float), default=0.5,
        help="only positions above this entropy, nats")
    add("--max-prompt-tokens", type=flags.at_least(1), default=512,
        help="longer contexts lose their beginning")
    flags.add_cache_flags(add)
    add("--seed", type=flags.at_least(0), default=0, help="chooses positions and drafts")
    flags.add_device_flag(add)
    args = parser.parse_args()
    if bool(args.corpus) == bool(args.solutions):
        raise ValueError("give either --corpus or --solutions: what shall the strings be made of?")
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    tokenizer = Tokenizer.load(args.proxy, for_model=True)
    make = solution_strings if args.solutions else draft_strings
    strings = make(args, tokenizer, random.Random(args.seed))
    write(args.out, "".join(json.dumps(string, ensure_ascii=False) + "\n" for string in strings))
    print(f"{len(strings):,} strings written to {args.out}, the last one:")
    print("    " + strings[-1]["text"])
