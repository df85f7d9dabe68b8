"""What do thoughts look like? Keywords and how varied they are: the paper's Figure 6 and Table 9.

    python paper/patterns.py --dump thoughts.jsonl --out patterns.json --picture patterns.png

--dump takes what eval.py, paper/answers.py or paper/choices.py dumped. The others are compared with
its first checkpoint; empty thoughts are left out. In patterns.json, for each checkpoint:
    transition ...      percent of responses with a keyword of this group
    change              of these percentages, relative to the first checkpoint, in percent
    words_mean          words of a response
    distinct_1, 2, 3    different n-grams of words / all of them, over all responses
    compression         bytes of all thoughts after zlib / before: low if they repeat each other
The picture has 95 % intervals. Keywords tell how a model talks, not whether it reasons.
"""
import json
import re
import sys
import zlib
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.questions import field, read_lines
from eval import wilson
from plot import COLOURS, COLUMN, GREY, SMALL, draw_whisker_bars, picture, short_names
from plumbing import flags
from plumbing.files import write

KEYWORDS = {  # the paper's Table 9
    "transition": ["alternatively", "think differently"],
    "reflection": ["wait", "initial answer", "original answer", "looking back", "thought process"],
    "breakdown": ["break down", "break this down"],
    "hypothesis": ["probably", "something like"],
    "divergent": ["etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring",
                  "options"],
    "deduction": ["summarize", "conclusion", "conclude", "finally", "logically", "consequently"],
}
FIGURES = ("words_mean", "distinct_1", "distinct_2", "distinct_3", "compression")


# ---- reading and counting ----

def read_responses(paths):
    """Files that --dump wrote -> {checkpoint: [response]}, in order."""
    responses = {}
    for path in paths:
        for checkpoint, response, mode in read_lines(path, parse_response):
            if mode in (None, "reasoning"):  # not thoughts that were forced, or left out
                responses.setdefault(checkpoint, []).append(response)
    if not responses:
        raise ValueError(f"{', '.join(map(str, paths))}: only empty thoughts, nothing to describe")
    return responses


def parse_response(record):
    checkpoint, response = field(record, "checkpoint"), field(record, "response")
    if not (isinstance(checkpoint, str) and isinstance(response, str)):
        raise ValueError("'checkpoint' and 'response' must be strings")
    return checkpoint, response, record.get("mode")


def keyword_regex(keywords):
    """Matches any of these in lower-cased text as whole words, so not the wait in waiter."""
    spaced = [r"\s+".join(map(re.escape, words.split())) for words in keywords]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)")


def describe(responses):
    """[response] -> {group of keywords: percent} and FIGURES."""
    line = {}
    for group, keywords in KEYWORDS.items():
        found = keyword_regex(keywords)
        hits = [found.search(response.lower()) is not None for response in responses]
        line[group] = 100 * sum(hits) / len(hits)

    words = [response.split() for response in responses]
    line["words_mean"] = sum(map(len, words)) / len(words)
    for n in (1, 2, 3):
        grams = []
        for some in words:  # no n-gram crosses from one response into the next
            grams += [tuple(some[i:i + n]) for i in range(len(some) - n + 1)]
        line[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None

    thoughts = "".join(map(thought_of, responses)).encode()
    line["compression"] = len(zlib.compress(thoughts, 9)) / len(thoughts) if thoughts else None
    return line


def thought_of(response):
    """The text before the last </think>; a response that was cut off is all thought."""
    thought, closed, _ = response.rpartition("</think>")
    return thought if closed else response


def compare(responses):
    """{checkpoint: [response]} -> a line of patterns.json for each."""
    lines = []
    for checkpoint, some in responses.items():
        line = dict(checkpoint=checkpoint, n=len(some)) | describe(some)
        first = lines[0] if lines else line
        line["change"] = {}
        for group in KEYWORDS:
            change = 100 * (line[group] / first[group] - 1) if first[group] else None
            line["change"][group] = change
        lines.append(line)
    return lines


# ---- showing ----

def print_patterns(lines):
    """Two tables with a row for each checkpoint: percentages with their change, and FIGURES."""
    width = max(len(line["checkpoint"]) for line in lines)
    titles = "  ".join(f"{group:>18}" for group in KEYWORDS)
    print(f"\n{'responses with, %':{width}}  {'n':>6}  {titles}")
    for line in lines:
        row = f"{line['checkpoint']:{width}}  {line['n']:>6}"
        for group, change in line["change"].items():
            change = "" if change is None else f" ({change:+.1f} %)"
            row += f"  {f'{line[group]:.1f}{change}':>18}"
        print(row)

    print(f"\n{'':{width}}  " + "  ".join(f"{name:>11}" for name in FIGURES))
    for line in lines:
        cells = ["-" if line[name] is None else f"{line[name]:.3f}" for name in FIGURES]
        print(f"{line['checkpoint']:{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))


def draw_patterns(lines, out):
    """A block of bars for each group of keywords; the bar of the first checkpoint is grey."""
    colours = [GREY, *COLOURS]
    if len(lines) > len(colours):
        raise ValueError(f"--picture has room for {len(colours)} checkpoints, got {len(lines)}")
    names = short_names([line["checkpoint"] for line in lines])
    height = 0.8 / len(lines)
    with picture(out, COLUMN, 1 + 0.86 * len(lines), SMALL) as figure:
        ax = figure.add_subplot()
        ax.grid(True, axis="x")
        for i, line in enumerate(lines):
            y = [block - 0.4 + (i + 0.5) * height for block in range(len(KEYWORDS))]
            values = [line[group] for group in KEYWORDS]
            intervals = [100 * np.array(wilson(value / 100, line["n"])) for value in values]
            draw_whisker_bars(ax, y, values, intervals, 0.85 * height, color=colours[i],
                              label=f"{names[i]} (n = {line['n']:,})")
        ax.set_yticks(range(len(KEYWORDS)), [group.capitalize() for group in KEYWORDS])
        ax.set_ylim(len(KEYWORDS) - 0.5, -0.5)
        ax.set_xlim(0, 1.12 * ax.dataLim.xmax)
        ax.set_xlabel("percent of responses with such a keyword")
        figure.legend(loc="outside upper left", ncols=2, fontsize=7, handlelength=1.2,
                      borderaxespad=0)


def parse_args():
    parser = flags.Parser("What thoughts look like: keywords, length, diversity.")
    add = parser.add_argument
    add("--dump", required=True, nargs="+", metavar="FILE", help="what another --dump wrote")
    add("--out", help="write the table here as JSON")
    add("--picture", help="draw the keywords here: .png, .pdf or .svg")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    lines = compare(read_responses(args.dump))
    print_patterns(lines)
    if args.out:
        write(args.out, json.dumps(lines, indent=1))
        print(f"written to {args.out}")
    if args.picture:
        draw_patterns(lines, args.picture)
        print(f"drawn in {args.picture}")
