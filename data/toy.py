r"""Write the embedded corpus (data/sums.py) and all else that the demo needs.

    python data/toy.py --out runs/demo/corpus

The folder is a corpus with three more files. strings.jsonl has a think/answer string for each
training document, because a pre-trained model has seen reasoning of mixed quality: SKIPPED of them
do not think, and WRONG of the others get a random digit in one step and believe it.

    ... Solution: The digit is<think>5+4=9;9*7=3;3*3=9;9+2=1; odd one</think>\boxed{ odd}<|end|>

questions.jsonl and questions_val.jsonl have long sums that no document has, cut before the last
word, which is the exact answer: {"question": "Problem: ... namely", "answer": "one"}.
"""
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.corpus import write_corpus
from data.sums import PARITY, WORDS, apply, write_document
from data.tokenizer import Tokenizer
from plumbing import flags
from plumbing.checkpoint import write

SKIPPED = 0.6            # share of strings without a thought
WRONG = 0.2              # share of thoughts with a random digit, right one time in ten
COMPUTED = 0.9           # share of strings about computed tokens
QUESTION_STEPS = (5, 6)  # fewest and most operations
QUESTIONS = 2000, 200    # to train on, held out


def think(rng, start, operations):
    """-> a thought, in WRONG of all cases with a random step, and the digit that it arrives at."""
    mistake = rng.randrange(len(operations)) if rng.random() < WRONG else None
    digit, thought = start, ""
    for i, operation in enumerate(operations):
        result = rng.randrange(10) if i == mistake else apply(digit, operation)
        thought += f"{digit}{operation}={result};"
        digit = result
    return f"{thought} {PARITY[digit % 2]} {WORDS[digit]}", digit


def think_string(rng, tokenizer, document):
    """A document -> prompt ids (the text before a token of the solution, <think>), response ids."""
    problem, solution, start, operations = document
    solution_ids = tokenizer.encode(solution)
    words = [tokenizer.token_bytes(id).decode() for id in solution_ids]
    computed = [t for t, word in enumerate(words) if word.strip() in (*PARITY, *WORDS)]
    t = rng.choice(computed) if rng.random() < COMPUTED else rng.randrange(len(words))
    thought, answer = "", words[t]
    if rng.random() >= SKIPPED:
        thought, digit = think(rng, start, operations)
        if t in computed:  # the answer believes the thought
            answer = " " + (PARITY[digit % 2] if t == computed[0] else WORDS[digit])
    prompt = tokenizer.encode(problem) + solution_ids[:t] + [tokenizer.special["<think>"]]
    return prompt, tokenizer.encode(rf"{thought}</think>\boxed{{{answer}}}<|end|>", special=True)


def write_strings(path, rng, tokenizer, documents, corpus):
    """Write a think/answer string for each training document -> the text of the last one."""
    lines = []
    for document, is_val in zip(tqdm(documents, desc="strings", disable=None), corpus.docs[:, 3]):
        if not is_val:
            prompt, response = think_string(rng, tokenizer, document)
            text = tokenizer.decode_bytes(prompt + response).decode()
            lines.append(json.dumps(dict(prompt=prompt, response=response, text=text)) + "\n")
    write(path, "".join(lines))
    return text


def write_questions(folder, rng, documents):
    """Write questions.jsonl and questions_val.jsonl, each with sums of its own."""
    known = {(start, *operations) for _, _, start, operations in documents}
    lines = []
    while len(lines) < sum(QUESTIONS):
        problem, solution, start, operations = write_document(rng, QUESTION_STEPS)
        if (start, *operations) not in known:
            known.add((start, *operations))
            asked, _, answer = solution.removesuffix(".").rpartition(" ")
            lines.append(json.dumps(dict(question=problem + asked, answer=answer)) + "\n")
    write(f"{folder}/questions.jsonl", "".join(lines[:QUESTIONS[0]]))
    write(f"{folder}/questions_val.jsonl", "".join(lines[QUESTIONS[0]:]))


def parse_args():
    parser = flags.Parser("Write the embedded corpus and its think/answer strings.")
    add = parser.add_argument
    add("--out", required=True, metavar="FOLDER", help="corpus folder to make")
    add("--documents", type=flags.at_least(1), default=40_000, help="problems with solutions")
    add("--seed", type=flags.at_least(0), default=0, help="same seed, same corpus")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    rng = random.Random(args.seed)
    # No problem twice, because write_corpus would drop it: document i has row i of docs.npy.
    unique = {}
    while len(unique) < args.documents:
        document = write_document(rng)
        unique[document[0]] = document
    documents = list(unique.values())

    tokenizer = Tokenizer.load("embedded")
    pairs = [document[:2] for document in documents]
    corpus = write_corpus(pairs, tokenizer, args.out, tokenizer="embedded")
    example = write_strings(f"{args.out}/strings.jsonl", rng, tokenizer, documents, corpus)
    write_questions(args.out, rng, documents)
    print(f"{len(corpus.docs):,} documents, {len(corpus.tokens):,} tokens, written to {args.out}; "
          "for example:\n    " + example.replace("\n", "\n    "))
