r"""Think/answer strings from any text: a warm start for a model that has never boxed a prediction; a control.

    python data/warmstart.py --corpus C --proxy SmolLM2-135M --template v6 --count 2000 --out strings.jsonl
    python train_ntp.py --corpus C --strings strings.jsonl --documents-per-step 0 --init SmolLM2-135M ...

Each string is a position of the training text that data/filter.py found hard, in the prompt of RPT, and a
response:

    The text ends in " so the answer". It may go on with " is", " to" or ":". Most likely " is".
    </think>\boxed{ is}<eos>

in one line. The candidates are the proxy's most probable tokens and the true one, in random order; the box is
always the truth. This teaches the form and what candidates are for. Finding out which one is right is left to
RPT.

    python data/warmstart.py --own --samples 8 --corpus C --proxy BASE --count 4800 --out own.jsonl

writes instead what the proxy itself has thought, where its prediction was right: training on these strings
(rejection sampling) is the control that asks whether RPT needs its wrong rollouts.

    python data/warmstart.py --solutions gsm8k_train.jsonl --proxy DIR --template chat --out strings.jsonl

writes questions with their solution as the thought and the exact answer in the box: a warm start for
train_rpt.py --task answers.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

if __name__ == "__main__":  # the repository, not data/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.checkpoint import write
from plumbing.flags import speak_once
from data.filter import find_scores, load_positions
from data.prepare import load_corpus
from data.prompt import build_prompt, stop_ids, template_ids
from data.tokenizer import Tokenizer
from eval_tasks import ASK, read_solutions, solve_prompt
from model import GPT, read_config
from reward import extract_prediction
from sample import generate, rollout_bar
from task import make_question, score

TAIL = 6         # tokens of the context that the thought repeats
CANDIDATES = 3   # tokens that it weighs


def readable(raw):
    """Bytes -> text in quotes, with escapes for what does not print; None where a character is cut."""
    try:
        return json.dumps(raw.decode(), ensure_ascii=False)
    except UnicodeDecodeError:
        return None


@torch.no_grad()
def write_string(rng, model, tokenizer, context, truth, template, room):
    """context ids and the true next id -> {"prompt", "response", "text"}; None if that cannot be written."""
    positions = model.config.max_positions
    window = torch.tensor([context[-min(room, positions):]], device=model.device)
    best = model(window)[0, -1].topk(CANDIDATES).indices.tolist()
    candidates = list(dict.fromkeys([truth, *best]))[:CANDIDATES]
    rng.shuffle(candidates)
    words = [readable(tokenizer.decode_bytes([id])) for id in candidates]
    raw, tail = tokenizer.token_bytes(truth), readable(tokenizer.decode_bytes(context[-TAIL:]))
    if None in words or tail is None:  # a character is cut
        return None
    thought = (f"The text ends in {tail}. It may go on with {', '.join(words[:-1])} or {words[-1]}. "
               f"Most likely {readable(raw)}.")
    response = (tokenizer.encode(thought) + tokenizer.encode("</think>", special=True)
                + tokenizer.encode(rf"\boxed{{{raw.decode()}}}") + [tokenizer.eos_id])
    if extract_prediction(tokenizer.decode_bytes(response)) != raw:  # a } alone does not fit into a box
        return None
    prompt = build_prompt(context, *template, min(room, positions - len(response)))
    return dict(prompt=prompt, response=response, text=tokenizer.decode_bytes(response).decode())


def candidate_strings(rng, model, tokenizer, corpus, positions, template, args):
    """(n, 3) positions -> {"prompt", "response", "text"} for those that can be written."""
    strings = []
    for t, start, _ in tqdm(positions, desc="strings", disable=None):
        context, truth = corpus.tokens[start:t].tolist(), int(corpus.tokens[t])
        strings.append(write_string(rng, model, tokenizer, context, truth, template, args.max_prompt_tokens))
    return [string for string in strings if string]


def own_strings(model, tokenizer, corpus, positions, template, args):
    """(n, 3) positions -> {"prompt", "response", "text"} for those of n x args.samples rollouts that are right."""
    room = min(args.max_prompt_tokens, model.config.max_positions - args.max_new_tokens)
    questions = [make_question(corpus, tokenizer, position, template, room) for position in positions]
    with rollout_bar(len(questions) * args.samples, "own rollouts") as progress:
        rollouts = generate(model, [q.prompt for q in questions], args.samples, args.max_new_tokens,
                            args.temperature, stop_ids(tokenizer), (args.seed, 1 << 21), progress=progress)
    groups = [score(tokenizer, question, r) for question, r in zip(questions, rollouts)]
    words = lambda ids: tokenizer.decode_bytes(ids).decode("utf-8", "backslashreplace")
    return [dict(prompt=g.question.prompt, response=r.tokens, text=words(r.tokens))
            for g in groups for r, reward in zip(g.rollouts, g.rewards) if reward]


def solution_strings(tokenizer, rng, args):
    """args.count of the questions in args.solutions -> {"prompt", "response", "text"} for those with room."""
    solutions, room, strings = read_solutions(args.solutions), read_config(args.proxy).max_positions, []
    for question, solution, truth in rng.sample(solutions, min(args.count, len(solutions))):
        prompt = solve_prompt(tokenizer, question, args.template)
        response = (tokenizer.encode(solution) + tokenizer.encode("</think>", special=True)
                    + tokenizer.encode(rf"\boxed{{{truth}}}") + [tokenizer.eos_id])
        if len(prompt) + len(response) <= room:
            text = tokenizer.decode_bytes(response).decode()
            strings.append(dict(prompt=prompt, response=response, text=text))
    return strings


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Think/answer strings from the training text of a corpus.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--corpus", default=None, help="folder written by data/prepare.py and scored by data/filter.py")
    add("--proxy", required=True, help="checkpoint that names the candidates and scored the corpus")
    add("--out", required=True, help="JSONL file to write")
    add("--count", type=int, default=2000, help="positions or questions; a string for each")
    add("--own", action="store_true", help="the proxy's own thoughts where they were right")
    add("--samples", type=int, default=8, metavar="K", help="--own: thoughts for each position")
    add("--temperature", type=float, default=1.0, help="--own: of sampling")
    add("--max-new-tokens", type=int, default=512, help="--own: tokens of a response")
    add("--solutions", default=None, metavar="FILE",
        help="JSON lines of questions with worked answers, instead of --corpus")
    add("--template", default="v0",
        help="prompt of data/prompt.py: v0 to v6, or short; --solutions: chat or short")
    add("--entropy-threshold", type=float, default=0.5, help="only positions above this entropy, nats")
    add("--max-prompt-tokens", type=int, default=512, help="longer contexts lose their beginning")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    args = parser.parse_args()
    if bool(args.corpus) == bool(args.solutions):
        raise ValueError("give either --corpus or --solutions: what shall the strings be made of?")
    if args.solutions and args.template not in ASK:
        raise ValueError(f"--solutions: --template {args.template} is none of {', '.join(ASK)}")
    for name in ("count", "max_prompt_tokens", "samples", "max_new_tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    tokenizer, rng = Tokenizer.load(args.proxy), random.Random(args.seed)
    if args.solutions:
        strings, why = solution_strings(tokenizer, rng, args), "solution has room in the model's positions"
    else:
        corpus = load_corpus(args.corpus)
        corpus.check(tokenizer, args.proxy)
        template = template_ids(tokenizer, args.template)
        positions = load_positions(corpus, find_scores(corpus, args.proxy), args.entropy_threshold, "train")
        positions = positions[np.random.default_rng(args.seed).permutation(len(positions))[:args.count]]
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = GPT.from_pretrained(args.proxy, dtype, args.device)
        if args.own:
            strings = own_strings(model, tokenizer, corpus, positions, template, args)
            why = f"of {len(positions)} positions was predicted by the proxy"
        else:
            strings = candidate_strings(rng, model, tokenizer, corpus, positions, template, args)
            why = f"of {len(positions)} positions has a token that prints"
    if not strings:
        raise ValueError(f"{args.out}: not one {why}")
    write(args.out, "".join(json.dumps(string, ensure_ascii=False) + "\n" for string in strings))
    print(f"{len(strings):,} strings written to {args.out}, the last one:\n    {strings[-1]['text']}")
