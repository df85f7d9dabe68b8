r"""Write the embedded corpus (data/sums.py) and all else that the demo needs.

    python data/toy.py --out runs/demo/corpus

The folder is a corpus with three more files. strings.jsonl has a think/answer string for each
training document, because a pre-trained model has seen reasoning of mixed quality: SKIPPED of them
do not think, at each step but the last STOPPED of the thoughts give up and take the digit they have
for the result, and WRONG get a random digit in one step and believe it.

    ... Solution: It is<think>5+4=9;9*7=3;3*3=9;9+2=1; one</think>\boxed{ one}<|end|>    to the end
    ... Solution: It is<think>5+4=9;9*7=3; three</think>\boxed{ three}<|end|>            gave up

So a base trained on them can take every step, but takes all of a problem in one of eight strings.
No decoding of eval.py mends that: the likeliest next token mostly gives up too, and who may not
write </think> has written the closing word already, behind which no thought goes on. A decoder that
forbids the closing words too, and counts the steps of each problem, would be as good as RPT:
that going on pays, and until when, is what is left to be found.

questions.jsonl and questions_val.jsonl have long sums that no document has, cut before the last
word, which is the exact answer: {"question": "Problem: ... It is", "answer": "one"}.
"""
import json
import random
import sys
import textwrap
from pathlib import Path

from tqdm import tqdm

if __name__ == "__main__":  # imports start at the repository
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.corpus import write_corpus
from data.sums import apply, write_document
from data.tokenizer import Tokenizer
from plumbing import flags
from plumbing.files import write

SKIPPED = 0.35           # share of strings without a thought
STOPPED = 0.55           # share of thoughts that end after a step, at each step but the last
WRONG = 0.1              # share of thoughts with a random digit, right one time in ten
COMPUTED = 0.9           # share of strings about computed tokens
QUESTION_STEPS = (4, 5)  # fewest and most operations
QUESTIONS = 2000, 200    # to train on, held out


def think(rng, document):
    """-> a thought about a Sum, and the digit that it arrives at.

    It may give up after any step but the last, and then takes the digit it has for the result.
    """
    mistake = rng.randrange(len(document.operations)) if rng.random() < WRONG else None
    digit, thought = document.start, ""
    for i, operation in enumerate(document.operations):
        if i > 0 and rng.random() < STOPPED:
            break
        result = rng.randrange(10) if i == mistake else apply(digit, operation)
        thought += f"{digit}{operation}={result};"
        digit = result
    return f"{thought} {document.answers[digit]}", digit


def think_string(rng, tokenizer, document):
    """A Sum -> prompt ids (the text before a token of the solution, <think>), response ids."""
    solution_ids = tokenizer.encode(document.solution)
    words = [tokenizer.token_bytes(id).decode() for id in solution_ids]
    computed = len(words) - 2  # the last word; a full stop follows
    t = computed if rng.random() < COMPUTED else rng.randrange(len(words))
    thought, answer = "", words[t]
    if rng.random() >= SKIPPED:
        thought, digit = think(rng, document)
        if t == computed:  # the answer believes the thought
            answer = " " + document.answers[digit]
    problem_ids = tokenizer.encode(document.problem)
    prompt = problem_ids + solution_ids[:t] + [tokenizer.special["<think>"]]
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
    known = {(document.start, *document.operations) for document in documents}
    lines = []
    while len(lines) < sum(QUESTIONS):
        document = write_document(rng, QUESTION_STEPS)
        if (document.start, *document.operations) not in known:
            known.add((document.start, *document.operations))
            asked, _, answer = document.solution.removesuffix(".").rpartition(" ")
            line = dict(question=document.problem + asked, answer=answer)
            lines.append(json.dumps(line) + "\n")
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
        unique[document.problem] = document
    documents = list(unique.values())

    tokenizer = Tokenizer.load("embedded")
    pairs = [(document.problem, document.solution) for document in documents]
    corpus = write_corpus(pairs, tokenizer, args.out, tokenizer="embedded")
    example = write_strings(f"{args.out}/strings.jsonl", rng, tokenizer, documents, corpus)
    write_questions(args.out, rng, documents)
    print(f"{len(corpus.docs):,} documents, {len(corpus.tokens):,} tokens, written to {args.out}; "
          "for example:")
    for line in example.split("\n"):
        print(textwrap.indent(textwrap.fill(line, 76), "    "))
