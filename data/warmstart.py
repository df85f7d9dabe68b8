r"""Strings for a warm start: they teach the form to a model that has never boxed a prediction.

    python data/warmstart.py --corpus C --proxy DIR --template v6 --out S.jsonl
    python train_ntp.py --corpus C --init DIR --strings S.jsonl --documents-per-step 0 ...

A string is a prompt of RPT at a position that data/filter.py found hard, and then in one line:

    The text ends in " so the answer". It may go on with " is", " to" or ":". Most likely " is".
    </think>\boxed{ is}<eos>

The candidates are the true token and the proxy's best, in random order; the box holds the truth. So
the model learns the form and what candidates are for; which one is right is left to RPT. For
train_rpt.py --objective answers: a question, its solution as the thought, its answer in the box:

    python data/warmstart.py --solutions gsm8k_train.jsonl --proxy DIR --template chat --out S.jsonl
"""
import json
import random
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
import torch
from data.corpus import load_corpus
from data.positions import find_scores, load_positions
from data.prompt import (TEMPLATES, build_prompt, check_question_template, solve_prompt,
                         template_ids)
from data.questions import leave_out_long, read_solutions
from data.tokenizer import Tokenizer
from model import GPT, read_config
from plumbing.files import write
from reward import extract_prediction

TAIL = 6        # tokens of the context that are repeated
CANDIDATES = 3  # tokens that the thought weighs


def candidate_strings(args, tokenizer, rng):
    """Strings for --count hard positions of --corpus."""
    corpus = load_corpus(args.corpus)
    corpus.check(tokenizer, args.proxy)
    template = template_ids(tokenizer, args.template)
    scores = find_scores(corpus, args.proxy)
    positions = load_positions(corpus, scores, args.entropy_threshold, "train")
    positions = np.random.default_rng(args.seed).permutation(positions)[:args.count]
    model = GPT.from_pretrained(args.proxy, flags.compute_dtype(args), args.device)

    strings = []
    for t, start, _ in tqdm(positions, desc="strings", disable=None):
        start += len(tokenizer.bos)
        context, truth = corpus.tokens[start:t].tolist(), int(corpus.tokens[t])
        string = candidate_string(rng, model, tokenizer, context, truth, template,
                                  args.max_prompt_tokens)
        if string:
            strings.append(string)
    if not strings:
        raise ValueError(f"{args.out}: not one of {len(positions)} positions has a token that "
                         "prints")
    return strings


@torch.no_grad()
def candidate_string(rng, model, tokenizer, context, truth, template, longest):
    """context ids, true next id -> a string, its prompt at most `longest`; None if impossible."""
    max_positions = model.config.max_positions
    end = tokenizer.bos + context[len(tokenizer.bos) - min(longest, max_positions):]
    logits = model(torch.tensor([end], device=model.device))[0, -1]
    best = model.finite(logits).topk(CANDIDATES).indices.tolist()
    candidates = list(dict.fromkeys([truth, *best]))[:CANDIDATES]
    rng.shuffle(candidates)
    words = [readable(tokenizer.decode_bytes([id])) for id in candidates]
    tail = readable(tokenizer.decode_bytes(context[-TAIL:]))
    if None in words or tail is None:
        return None

    raw = tokenizer.token_bytes(truth)
    choice = f"{', '.join(words[:-1])} or {words[-1]}"
    thought = f"The text ends in {tail}. It may go on with {choice}. Most likely {readable(raw)}."
    string = make_string(tokenizer, None, thought, raw.decode())
    if extract_prediction(string["text"].encode()) != raw:  # a lone } fits no box
        return None
    max_prompt = min(longest, max_positions - len(string["response"]))
    return string | dict(prompt=build_prompt(context, *template, max_prompt))


def readable(raw):
    """Bytes -> text in quotes, with escapes for what does not print; None if it is not UTF-8."""
    try:
        return json.dumps(raw.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return None


def solution_strings(args, tokenizer, rng):
    """Strings for --count questions of --solutions."""
    check_question_template(args.template)
    solutions = read_solutions(args.solutions, args.skip_bad)
    solutions = rng.sample(solutions, min(args.count, len(solutions)))
    strings = []
    for question, solution, answer in solutions:
        prompt = solve_prompt(tokenizer, question, args.template)
        strings.append(make_string(tokenizer, prompt, solution, answer))
    sizes = [len(string["prompt"]) + len(string["response"]) for string in strings]
    kept = leave_out_long([question for question, _, _ in solutions], sizes,
                          read_config(args.proxy).max_positions, args.skip_long,
                          "take a --proxy with more positions")
    return [strings[i] for i in kept]


def make_string(tokenizer, prompt, thought, box):
    """-> {"prompt": ids, "response": ids, "text": the response: thought, box and end of text}."""
    response = (tokenizer.encode(thought) + tokenizer.encode("</think>", special=True)
                + tokenizer.encode(rf"\boxed{{{box}}}") + [tokenizer.eos_id])
    return dict(prompt=prompt, response=response, text=tokenizer.decode_bytes(response).decode())


def parse_args():
    parser = flags.Parser("Think/answer strings from the training text of a corpus, or from "
                          "solutions.")
    add = parser.add_argument
    add("--corpus", help="folder written by data/prepare.py and scored by data/filter.py")
    add("--solutions", metavar="FILE",
        help="JSON lines of questions with worked answers, instead of --corpus")
    flags.add_question_flags(add)
    add("--proxy", required=True, help="checkpoint that names the candidates and scored the corpus")
    add("--out", required=True, help="JSONL file to write")
    add("--count", type=flags.at_least(1), default=2000,
        help="positions or questions; those whose truth cannot be boxed get no string")
    add("--template", default="v0",
        help=f"how it is asked (data/prompt.py): {', '.join(TEMPLATES)}; --solutions: chat or "
             "short")
    add("--entropy-threshold", type=flags.at_least(0, float), default=0.5,
        help="only positions above this entropy, nats")
    add("--max-prompt-tokens", type=flags.at_least(1), default=512,
        help="longer contexts lose their beginning")
    add("--seed", type=flags.at_least(0), default=0,
        help="chooses positions and the order of candidates")
    flags.add_device_flag(add)
    args = parser.parse_args()
    if bool(args.corpus) == bool(args.solutions):
        raise ValueError("give either --corpus or --solutions: what shall the strings be made of?")
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    tokenizer = Tokenizer.load(args.proxy, for_model=True)
    make = solution_strings if args.solutions else candidate_strings
    strings = make(args, tokenizer, random.Random(args.seed))
    write(args.out, "".join(json.dumps(string, ensure_ascii=False) + "\n" for string in strings))
    print(f"{len(strings):,} strings written to {args.out}, the last one:")
    print("    " + strings[-1]["text"])
