"""Differences of two ways to predict, on the same positions: what RPT changed, and where.

    python eval.py lm --corpus C --checkpoints BASE RPT --mode ntp reasoning --hits hits.jsonl ...
    python paper/paired.py hits.jsonl --corpus C --against BASE ntp --out paired.md

For each checkpoint and mode: its accuracy, and by how much that is above the accuracy of --against
(a checkpoint and a mode of it), with a 95 % bootstrap interval over documents. Both answer the
same positions, so what makes a position easy or hard for both cancels, and the interval is narrower
than those of two accuracies; with fewer than 10 documents there is none. Positions are grouped as
in eval.py (easy, medium, hard: nested), then by entropy, then the easy ones by their true token:

    number         has a digit
    word start     begins with a letter, or with white space and a letter, where no word goes on
    inside a word  a letter that continues a word
    symbol         all else: operators, brackets, white space, parts of a letter
"""
import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.corpus import load_corpus
from data.positions import SPLITS, find_scores
from data.tokenizer import Tokenizer
from plumbing import flags
from plumbing.files import write

RESAMPLES = 10_000
FEW = 10                               # documents, whose resamples would be too sure
BINS = [0.5, 1.0, 1.5, 2.0, np.inf]    # nats
KINDS = ["number", "word start", "inside a word", "symbol"]


def read_hits(path):
    """--hits of eval.py -> (n, 3) positions, {split: indices}, {(checkpoint, mode): (n,) hits}."""
    first, hits = None, {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                asked = record["positions"], record["splits"]
                values = np.array(record["hits"], dtype=float)
                name = str(record["checkpoint"]), str(record["mode"])
                if np.shape(asked[0]) != (len(values), 3) or not np.isfinite(values).all():
                    raise ValueError(f"{np.shape(values)} numbers, {np.shape(asked[0])} positions")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} line {number}: not what eval.py --hits writes "
                                 f"({error!r})") from None
            if first and asked != first:
                raise ValueError(f"{path} line {number}: other positions than in line 1; evaluate "
                                 "with the same --corpus, --positions and --seed")
            first, hits[name] = asked, values
    if not first:
        raise ValueError(f"{path}: no line in it")
    positions, splits = first
    return np.array(positions), splits, hits


def difference(first, second, documents, seed=0):
    """(n,) values of each, and documents -> mean of first - second, ends of its 95 % interval."""
    _, document = np.unique(documents, return_inverse=True)
    sums, counts = np.bincount(document, weights=first - second), np.bincount(document)
    drawn = np.random.default_rng(seed).integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return (first - second).mean(), low, high


def kind_of(before, token):
    """Bytes of the text before a token, and of the token -> one of KINDS."""
    before = before.decode("utf-8", "replace")
    text = token.decode("utf-8", "replace")
    word = text.lstrip()
    if any(letter.isdigit() for letter in text):
        return "number"
    if not word[:1].isalpha():
        return "symbol"
    continues = word == text and before[-1:].isalpha()
    return "inside a word" if continues else "word start"


def groupings(corpus, tokenizer, scores, positions, splits):
    """-> three {name of a group: (n,) whether each position is in it}."""
    place = np.arange(len(positions))
    yield {f"{name} > {SPLITS[name]}": np.isin(place, i) for name, i in splits.items()}
    entropy = np.load(scores, mmap_mode="r")[positions[:, 0], 0]
    if np.isnan(entropy).any():
        raise ValueError(f"{scores} has no entropy for some of these positions; choose the --proxy "
                         "and the --corpus of the evaluation")
    yield {f"{low} to {high} nats".replace("to inf", "or more"): (entropy > low) & (entropy <= high)
           for low, high in zip(BINS, BINS[1:])}
    # The easy positions are a fair sample of all above 0.5 nats; the others are there for the rest.
    easy, kinds = np.isin(place, splits["easy"]), []
    for t, start, _ in positions:
        before = tokenizer.decode_bytes(corpus.tokens[max(start, t - 4):t].tolist())
        kinds.append(kind_of(before, tokenizer.decode_bytes([int(corpus.tokens[t])])))
    yield {kind: easy & (np.array(kinds) == kind) for kind in KINDS}


def table(hits, groups, documents, against):
    """-> rows of Markdown: accuracy and difference of each checkpoint and mode, in percent."""
    sizes = {name: some.sum() for name, some in groups.items()}
    groups = {name: some for name, some in groups.items() if sizes[name]}
    rows = ["| checkpoint | mode | " + " | ".join(f"{g} (n = {sizes[g]})" for g in groups) + " |",
            "|---|---|" + "---|" * len(groups)]
    for name, values in hits.items():
        cells = []
        for some in groups.values():
            cell = f"{100 * values[some].mean():.1f}"
            if name != against and len(np.unique(documents[some])) < FEW:
                cell += f" ({100 * (values[some] - hits[against][some]).mean():+.1f})"
            elif name != against:
                gained = difference(values[some], hits[against][some], documents[some])
                cell += " ({:+.1f} [{:+.1f}, {:+.1f}])".format(*(100 * x for x in gained))
            cells.append(cell)
        rows.append(f"| {' | '.join([*name, *cells])} |")
    return rows


def parse_args():
    parser = flags.Parser("Paired differences of checkpoints and modes on the same positions.")
    add = parser.add_argument
    add("hits", help="file that eval.py --hits has written")
    add("--corpus", required=True, help="folder of the text that was evaluated on")
    add("--proxy", help="checkpoint whose entropies sort the positions; default: the only one")
    add("--against", nargs=2, metavar=("CHECKPOINT", "MODE"),
        help="what the others are compared with; default: the first line of the file")
    add("--out", help="also write the tables here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    positions, splits, hits = read_hits(args.hits)
    against = tuple(args.against) if args.against else next(iter(hits))
    if against not in hits:
        known = ", ".join(" ".join(name) for name in hits)
        raise ValueError(f"--against {' '.join(against)}: {args.hits} has {known}")
    corpus = load_corpus(args.corpus)
    if positions.max() > len(corpus.tokens):
        raise ValueError(f"{args.hits} is about another corpus than {args.corpus}")
    tokenizer = Tokenizer.load(f"{args.corpus}/tokenizer")
    scores, documents = find_scores(corpus, args.proxy), positions[:, 1]
    words = [f"Accuracy in percent (above {' '.join(against)} [95 % interval]), "
             f"{len(np.unique(documents))} documents"]
    for groups in groupings(corpus, tokenizer, scores, positions, splits):
        words += ["", *table(hits, groups, documents, against)]
    print("\n".join(words))
    if args.out:
        write(args.out, "\n".join(words) + "\n")
