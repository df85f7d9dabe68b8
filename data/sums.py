r"""The text of the embedded corpus, in which some tokens can be worked out but hardly guessed.

    Problem: Mia works out 5+4*7*3+2 from left to right and keeps the last digit. Which digit is it?
    Solution: It is one.

To know " one" one has to go from digit to digit (5, 9, 3, 9, 1), and a small transformer has too
few layers to take all the steps at once. How hard the answer is to guess depends on the question:
small or large (0.7 nats), zero, low, middle or high (1.3), or which digit (2.3). All other tokens
of a solution are easy. (No question is about the parity, because counting the +1 would do for it.)
Only this file and data/toy.py know the steps: reward and RPT see nothing but the text.
"""
import random
from typing import NamedTuple

NAMES = "Ada Ben Eva Leo Mia Max Tom Zoe".split()
VERBS = ["works out", "computes", "calculates"]
OPERATIONS = ["+1", "+2", "+4", "*3", "*7"]  # all invertible modulo 10
STEPS = (2, 5)                               # fewest and most operations

# How a problem ends, and the answer for each last digit.
ANSWERS = {
    "Is it small or large?": 5 * ["small"] + 5 * ["large"],
    "Is it zero, low, middle or high?": ["zero"] + 3 * ["low"] + 3 * ["middle"] + 3 * ["high"],
    "Which digit is it?": "zero one two three four five six seven eight nine".split()}


class Sum(NamedTuple):
    """A document, and what only data/toy.py may look at."""
    problem: str
    solution: str
    start: int             # the first digit
    operations: list[str]
    answers: list[str]     # for each last digit


def write_document(rng, steps=STEPS):
    """-> a Sum with so many operations."""
    start = rng.randrange(10)
    operations = rng.choices(OPERATIONS, k=rng.randint(*steps))
    question = rng.choice(list(ANSWERS))
    digit = start
    for operation in operations:
        digit = apply(digit, operation)
    problem = (f"Problem: {rng.choice(NAMES)} {rng.choice(VERBS)} {start}{''.join(operations)} "
               f"from left to right and keeps the last digit. {question}\nSolution:")
    answers = ANSWERS[question]
    return Sum(problem, f" It is {answers[digit]}.", start, operations, answers)


def apply(digit, operation):
    """apply(5, "+4") -> 9; only the last digit is kept."""
    sign, operand = operation[0], int(operation[1])
    return (digit + operand if sign == "+" else digit * operand) % 10


def tokenizer_corpus():
    """Texts to train the embedded tokenizer on, always the same ones."""
    rng = random.Random("tokenizer")
    documents = [write_document(rng) for _ in range(500)]
    texts = [document.problem + document.solution for document in documents]
    return texts + [r"\boxed{"] * 100
