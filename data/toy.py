r"""The embedded corpus: text in which some tokens can be worked out but hardly guessed.

    Problem: Mia works out 5+4*7*3+2 from left to right and keeps the last digit.
    Solution: The digit is odd, namely one.

To know " one" one has to go from digit to digit (5, 9, 3, 9, 1), and a small transformer has too few layers to take
all the steps at once. The parity is easier to guess, and all other tokens are easy. This generator is the only
place that knows the steps; reward and RPT see nothing but the text.

    python data/toy.py --out runs/demo/corpus

writes a corpus folder (see data/prepare.py) and strings.jsonl: think/answer strings for the base model, one for
each training document, as a pre-trained model has met reasoning of mixed quality. SKIPPED of them do not think,
WRONG of the others slip once and believe it:

    ... Solution: The digit is<think>5+4=9;9*7=3;3*3=9;9+2=1; odd one</think>\boxed{ odd}<|end|>

questions.jsonl and questions_val.jsonl are sums that no document has, of the longer kind, cut before the last word,
which is the exact answer: {"question": "Problem: ... namely", "answer": "one"}.
"""
import argparse
import json
import random
import sys
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # the repository, not data/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing.checkpoint import write
from plumbing.flags import speak_once
from data.prepare import write_corpus
from data.tokenizer import Tokenizer

NAMES = "Ada Ben Eva Leo Mia Max Tom Zoe".split()
VERBS = ["works out", "computes", "calculates"]
WORDS = "zero one two three four five six seven eight nine".split()
OPERATIONS = ["+1", "+2", "+4", "*3", "*7"]  # 50 facts to learn; *3 and *7 lose no information modulo 10
STEPS = (2, 6)                               # operations in a problem, from and to
QUESTION_STEPS = (5, 6)                      # in a question
QUESTIONS = 2000, 200                        # to train on, held out
SKIPPED, WRONG = 0.6, 0.2                    # strings without a thought; thoughts with a slip
COMPUTED = 0.9                               # share of the strings that ask for a computed token


def write_document(rng, steps=STEPS):
    """-> problem text, solution text, start digit, operations."""
    start, operations = rng.randrange(10), rng.choices(OPERATIONS, k=rng.randint(*steps))
    digit = start
    for operation in operations:
        digit = apply(digit, operation)
    problem = (f"Problem: {rng.choice(NAMES)} {rng.choice(VERBS)} {start}{''.join(operations)} "
               "from left to right and keeps the last digit.\nSolution:")
    return problem, f" The digit is {parity(digit)}, namely {WORDS[digit]}.", start, operations


def apply(digit, operation):
    sign, operand = operation[0], int(operation[1])
    return (digit + operand if sign == "+" else digit * operand) % 10


def parity(digit):
    return "odd" if digit % 2 else "even"


def think(rng, start, operations):
    """-> the thought, and the digit that it arrives at; with a slip in WRONG of all cases."""
    slip = rng.randrange(len(operations)) if rng.random() < WRONG else None
    digit, thought = start, ""
    for i, operation in enumerate(operations):
        result = rng.randrange(10) if i == slip else apply(digit, operation)
        thought += f"{digit}{operation}={result};"
        digit = result
    return f"{thought} {parity(digit)} {WORDS[digit]}", digit


def think_string(rng, tokenizer, document):
    """A document -> prompt ids (the text up to a position of the solution, <think>), response ids."""
    problem, solution, start, operations = document
    given, asked = tokenizer.encode(problem), tokenizer.encode(solution)
    pieces = [tokenizer.token_bytes(id).decode() for id in asked]
    computed = [t for t, piece in enumerate(pieces) if piece.strip() in ("odd", "even", *WORDS)]
    t = rng.choice(computed) if rng.random() < COMPUTED else rng.randrange(len(asked))
    thought, answer = "", pieces[t]
    if rng.random() >= SKIPPED:
        thought, digit = think(rng, start, operations)
        if t in computed:  # believe the thought, right or wrong
            answer = f" {parity(digit)}" if t == computed[0] else f" {WORDS[digit]}"
    prompt = given + asked[:t] + [tokenizer.special["<think>"]]
    return prompt, tokenizer.encode(rf"{thought}</think>\boxed{{{answer}}}<|end|>", special=True)


def tokenizer_corpus():
    """Texts on which the embedded tokenizer is trained: documents and thoughts, always the same ones."""
    rng = random.Random("tokenizer")
    documents = [write_document(rng) for _ in range(500)]
    return [problem + solution for problem, solution, *_ in documents] + [r"\boxed{"] * 100


if __name__ == "__main__":
    sys.excepthook = speak_once
    parser = argparse.ArgumentParser(description="Write the embedded corpus and its think/answer strings.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FOLDER", help="corpus folder to make")
    parser.add_argument("--documents", type=int, default=40_000, help="problems with solutions")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    documents = {}
    while len(documents) < args.documents:  # every problem once, so that documents and rows of docs.npy correspond
        document = write_document(rng)
        documents[document[0]] = document
    tokenizer = Tokenizer.load("embedded")
    pairs = [document[:2] for document in documents.values()]
    corpus = write_corpus(pairs, tokenizer, args.out, tokenizer="embedded")
    strings = Path(args.out) / "strings.jsonl"
    with open(f"{strings}.partial", "w") as file:
        bar = tqdm(documents.values(), desc="strings", disable=None)
        for document, is_val in zip(bar, corpus.docs[:, 3]):
            if not is_val:
                prompt, response = think_string(rng, tokenizer, document)
                text = tokenizer.decode_bytes(prompt + response).decode()
                file.write(json.dumps(dict(prompt=prompt, response=response, text=text)) + "\n")
    Path(f"{strings}.partial").rename(strings)
    questions, known = {}, {repr(sum_) for _, _, *sum_ in documents.values()}  # no sum twice, and none of the text's
    while len(questions) < sum(QUESTIONS):
        problem, solution, *sum_ = write_document(rng, QUESTION_STEPS)
        asked, _, answer = solution.removesuffix(".").rpartition(" ")
        if repr(sum_) not in known:
            known.add(repr(sum_))
            questions[problem + asked] = answer
    records = [json.dumps(dict(question=q, answer=a)) + "\n" for q, a in questions.items()]
    write(f"{args.out}/questions.jsonl", "".join(records[:QUESTIONS[0]]))
    write(f"{args.out}/questions_val.jsonl", "".join(records[QUESTIONS[0]:]))
    print(f"{len(corpus.docs):,} documents, {len(corpus.tokens):,} tokens, written to {args.out}; for example:")
    print("    " + text.replace("\n", "\n    "))
