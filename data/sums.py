r"""The text of the embedded corpus, in which some tokens can be worked out but hardly guessed.

    Problem: Mia works out 5+4*7*3+2 from left to right and keeps the last digit.
    Solution: The digit is odd, namely one.

To know " one" one has to go from digit to digit (5, 9, 3, 9, 1), and a small transformer has too
few layers to take all the steps at once. The parity is easier to guess, and all other tokens are
easy. Only this file and data/toy.py know the steps: reward and RPT see nothing but the text.
"""
import random

NAMES = "Ada Ben Eva Leo Mia Max Tom Zoe".split()
VERBS = ["works out", "computes", "calculates"]
PARITY = ["even", "odd"]
WORDS = "zero one two three four five six seven eight nine".split()
OPERATIONS = ["+1", "+2", "+4", "*3", "*7"]  # all invertible modulo 10
STEPS = (2, 6)                               # fewest and most operations


def write_document(rng, steps=STEPS):
    """-> problem text, solution text, start digit, operations."""
    start = rng.randrange(10)
    operations = rng.choices(OPERATIONS, k=rng.randint(*steps))
    digit = start
    for operation in operations:
        digit = apply(digit, operation)
    problem = (f"Problem: {rng.choice(NAMES)} {rng.choice(VERBS)} {start}{''.join(operations)} "
               "from left to right and keeps the last digit.\nSolution:")
    return problem, f" The digit is {PARITY[digit % 2]}, namely {WORDS[digit]}.", start, operations


def apply(digit, operation):
    """apply(5, "+4") -> 9; only the last digit is kept."""
    sign, operand = operation[0], int(operation[1])
    return (digit + operand if sign == "+" else digit * operand) % 10


def tokenizer_corpus():
    """Texts to train the embedded tokenizer on, always the same ones."""
    rng = random.Random("tokenizer")
    documents = [write_document(rng) for _ in range(500)]
    texts = [problem + solution for problem, solution, *_ in documents]
    return texts + [r"\boxed{"] * 100
