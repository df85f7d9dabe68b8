r"""Strings for a warm start: they teach the form to a model that has never boxed a prediction.

    python data/warmstart.py --corpus C --proxy DIR --template short --out S.jsonl
    python train_ntp.py --corpus C --init DIR --strings S.jsonl --documents-per-step 1 \
        --max-tokens 128 ...

A string is a prompt of RPT, and as the thought a draft: how the model itself, which has seen the
same context, continues the text. The box holds the first token of the draft:

    [context: ... 7 and 8, so the sum is]<think> 15 and the last digit</think>\boxed{ 15}<eos>

So a model learns to look ahead, to write down what it sees, and to box where that begins. A
document in each update keeps it from closing thoughts in plain text. Strings hold no truth: which
drafts are right is left to RPT, which starts nearly as often right as the model is when it samples
the next token.

For train_rpt.py --objective answers: a question, its solution as the thought, its answer in a box:

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
from data.positions import answerable, find_scores, load_positions
from data.prompt import (TEMPLATES, build_prompt, check_question_template, solve_prompt, stop_ids,
                         template_ids)
from data.questions import leave_out_long, read_solutions
from data.tokenizer import Tokenizer
from model import GPT, read_config
from plumbing.files import write
from plumbing.log import RolloutBar, text_of
from reward import extract_prediction
from sample import generate


def draft_strings(args, tokenizer):
    """Lines for --count hard positions of --corpus: a prompt, and a response for each draft."""
    corpus = load_corpus(args.corpus)
    corpus.check(tokenizer, args.proxy)
    scores = find_scores(corpus, args.proxy)
    positions = load_positions(corpus, scores, args.entropy_threshold, "train",
                               answerable(tokenizer))
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
    lines = []
    for prompt, rollouts in zip(prompts, groups):
        responses = [draft_response(tokenizer, rollout) for rollout in rollouts]
        responses = [response for response in responses if response]
        if responses:
            lines.append(make_line(tokenizer, prompt, responses))
    if not lines:
        raise ValueError(f"{args.out}: not one draft about {len(positions)} positions has a first "
                         "token that fits into a box")
    return lines


def draft_response(tokenizer, rollout):
    """A Rollout of plain text -> ids of a thought and its box; None if no box can hold it."""
    draft = rollout.tokens[:-1] if rollout.finished else rollout.tokens
    response = draft + boxed(tokenizer, draft[:1])
    raw = tokenizer.decode_bytes(response)
    # A lone } fits no box, and a draft may close the thought itself.
    holds_it = draft and extract_prediction(raw) == tokenizer.decode_bytes(draft[:1])
    return response if holds_it and raw.count(b"</think>") == 1 else None


def boxed(tokenizer, ids):
    """The end of a thought, ids in a box, the end of the text. Boxing is then to copy a token."""
    return (tokenizer.encode("</think>", special=True) + tokenizer.encode(r"\boxed{") + ids
            + tokenizer.encode("}") + [tokenizer.eos_id])


def solution_strings(args, tokenizer):
    """Lines for --count questions of --solutions: a prompt, and a response."""
    check_question_template(args.template)
    solutions = read_solutions(args.solutions, args.skip_bad)
    solutions = random.Random(args.seed).sample(solutions, min(args.count, len(solutions)))
    lines, sizes = [], []
    for question, solution, answer in solutions:
        prompt = solve_prompt(tokenizer, question, args.template)
        response = (tokenizer.encode(solution) + tokenizer.encode("</think>", special=True)
                    + tokenizer.encode(rf"\boxed{{{answer}}}") + [tokenizer.eos_id])
        lines.append(make_line(tokenizer, prompt, [response]))
        sizes.append(len(prompt) + len(response))
    kept = leave_out_long([question for question, _, _ in solutions], sizes,
                          read_config(args.proxy).max_positions, args.skip_long,
                          "take a --proxy with more positions")
    return [lines[i] for i in kept]


def make_line(tokenizer, prompt, responses):
    """Ids -> a line for train_ntp.py --strings, which computes the prompt once for all of them."""
    texts = [text_of(tokenizer.decode_bytes(response)) for response in responses]
    return dict(prompt=prompt, responses=responses, texts=texts)


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
    add("--drafts", type=flags.at_least(1), default=6, help="for each position, a string each")
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
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    make = solution_strings if args.solutions else draft_strings
    lines = make(args, tokenizer)
    write(args.out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    strings = sum(len(line["responses"]) for line in lines)
    print(f"{strings:,} strings for {len(lines):,} prompts written to {args.out}, the last one:")
    print("    " + lines[-1]["texts"][-1])
