r"""Files of questions with exact answers: JSON lines with the fields of GSM8K, Omni-MATH, ...

    {"question" or "problem": text, "answer" or "solution": text}

The answer may end with #### 42 or contain \boxed{42}. A bad line is a ValueError with its number,
or with `skip_bad` left out and counted. `leave_out_long` does it with questions without room.
"""
import json
import re

from data.answers import answers_equal
from data.corpus import JSON_NAMES, check_text, parse_json, raise_or_skip
from plumbing.parallel import print0
from reward import closing_brace

# ---- where the answer is ----

# A brace opens the box; without one it holds a number, a fraction, a root, pi or a letter.
ARGUMENT = rb"\s*(?:[0-9A-Za-z]|\{(?:[^{}]|\{[^{}]*\})*\})"
BOX = re.compile(rb"""\\(?:boxed|fbox|framebox)(?:\[[^][{}]*\])*\s*(?:\{|(?P<bare>
    (?<=\s)[A-Za-z]\b | [-+]?(?:[0-9]+(?:[.,/][0-9]+)*|\\pi\b|\\sqrt%b|\\[dt]?frac%b%b)))
    """ % (3 * (ARGUMENT,)), re.VERBOSE)
# What stands between two boxes of one answer: `\boxed{2}$ and $y = \boxed{5}`.
FILL = rb"(?:[\s$~}]|\\[()\s,;:]|\\q?quad|\\(?:text|mbox|mathrm)\{)*"
LINK = re.compile(FILL + rb"(,\s*and|[,;]|and|or)" + FILL + rb"([A-Za-z]\s*=\s*)?")


def boxed_answer(response):
    r"""bytes -> what the last \boxed{}, \boxed 9, \fbox{} or \framebox{} after the thought holds.

    Boxes with only a comma, "and" or "or" between them are one answer: `\boxed{2} and \boxed{5}` is
    "2, 5". Of a box inside a box the inner one counts. None without a box.
    """
    _, thought, answer = response.rpartition(b"</think>")
    return last_boxes(answer)[0] if thought else None


def last_boxes(text):
    """-> what the last boxes hold that belong together, or None; and where the first one begins."""
    joined, start = None, len(text)
    for box in reversed(list(BOX.finditer(text))):
        content, behind = box["bare"], text[box.end():start]
        if content is None:
            close = closing_brace(behind)
            if close is None:
                break
            content, behind = behind[:close], behind[close + 1:]
        link = LINK.fullmatch(behind)
        if joined is None:
            joined = content
        elif link:
            word = b" or " if link[1] == b"or" else b", "
            joined = content + word + (link[2] or b"") + joined
        else:
            break
        start = box.start()
    return joined, start


# ---- files ----

def read_questions(path, skip_bad=False):
    """-> [(question, exact answer)], both texts."""
    return read_lines(path, parse_question, skip_bad)


def read_solutions(path, skip_bad=False):
    """-> [(question, worked solution without its last #### line, exact answer)], all texts."""
    return read_lines(path, parse_solution, skip_bad)


def parse_question(record):
    name = "question" if record.get("question") is not None else "problem"
    question = check_text(field(record, "question", "problem"), f"'{name}'")
    return question, exact_answer(record)


def parse_solution(record):
    question = check_text(field(record, "question", "problem"), "'question'")
    solution = check_text(field(record, "solution", "answer"), "'solution'")
    thought = solution.rpartition("####")[0] or solution
    return question, thought.strip(), exact_answer(record)


# Words of a sentence, which an exact answer of several words does not have.
SENTENCE = re.compile(r"\b(?:is|are|was|were|has|have|gives?|gets?|equals?|so|thus|hence|therefore"
                      r"|answer|we|he|she|it|they)\b", re.IGNORECASE)


def exact_answer(record):
    r"""What follows the last ####, else what is in the last \boxed{}, else all of it; stripped.

    ValueError where it is not clear what the answer is, and where no prediction could equal it.
    """
    answer = text_field(field(record, "answer", "solution"), "the answer").strip()
    _, mark, truth = answer.rpartition("####")
    if not mark:
        boxed, start = last_boxes(answer.encode())
        truth = boxed.decode() if boxed is not None else check_short(answer)
        earlier, _ = last_boxes(answer.encode()[:start])
        if earlier and not answers_equal(earlier, truth):
            raise ValueError("no comma or 'and' joins the last boxes: is the exact answer "
                             f"{earlier.decode()} or {truth}?")
    check_text(truth.strip(), "the exact answer")
    if not answers_equal(boxed_answer(rf"</think>\boxed{{{truth}}}".encode()), truth):
        raise ValueError(f"no box can hold the exact answer {truth.strip()[:40]!r}")
    return truth.strip()


def check_short(answer):
    """-> answer; ValueError if it is a sentence or a worked solution, which no box would repeat."""
    words = len(re.findall("[A-Za-z]{2,}", answer))
    sentence = (words > 8 or words > 3 and answer[-1] == "."
                or len(answer.split()) > 1 and SENTENCE.search(answer))
    if sentence or re.search(r"\n|\\(?:boxed|fbox|framebox)", answer):
        raise ValueError("expected #### or \\boxed{} before the exact answer, or nothing but the "
                         f"answer, got {answer[:40]!r}...")
    return answer


def read_lines(path, parse, skip_bad=False):
    """JSONL -> [parse(object)]; blank lines are skipped."""
    parsed, skipped = [], [] if skip_bad else None
    # As bytes, because text mode also breaks lines at a lone \r.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                # Numbers with a point stay text, so that 0.50 is not turned into 0.5.
                record = parse_json(text, parse_float=str, parse_constant=refuse_constant)
                json.dumps(record, ensure_ascii=False).encode()  # refuses a lone surrogate
                if not isinstance(record, dict):
                    raise ValueError(f"expected an object, got {JSON_NAMES[type(record)]}")
                parsed.append(parse(record))
            except (ValueError, RecursionError) as error:
                hint = "" if skip_bad else "; --skip-bad leaves such lines out"
                raise_or_skip(f"{path} line {number}: {error}{hint}", skipped)
    found = f"{len(skipped):,} bad lines, the first: {skipped[0]}" if skipped else "no line in it"
    if not parsed:
        raise ValueError(f"{path}: {found}")
    if skipped:
        print0(f"left out: {found}")
    return parsed


def leave_out_long(texts, sizes, longest, skip_long, cure):
    """Questions and their sizes in tokens -> indices of those that have room.

    Without skip_long, or if none is left, a ValueError names the others, and `cure` as a way out.
    """
    long = [i for i, size in enumerate(sizes) if size > longest]
    if long:
        # By their words, because the questions may be a sample, in another order than the file's.
        few = [f"{texts[i][:40]!r} ({sizes[i]:,} tokens)" for i in long[:3]]
        problem = (f"no room for {len(long):,} of {len(texts):,} questions, longer than "
                   f"{max(0, longest):,} tokens: {', '.join(few)}"
                   + ", ..." * (len(long) > 3))
        if len(long) == len(texts):
            raise ValueError(f"{problem}; {cure}")
        if not skip_long:
            raise ValueError(f"{problem}; {cure}, or leave them out with --skip-long")
        print0(f"left out: {problem}")
    return [i for i, size in enumerate(sizes) if size <= longest]


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON; some tools write it for a missing value, or for the "
                     "word None")


def field(record, *names):
    """The first of these fields that a line has; null counts as missing."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"expected an object with {' or '.join(map(repr, names))}, "
                     f"got one with {', '.join(map(repr, record)) or 'nothing'}")


def text_field(value, name):
    return check_text(str(value) if type(value) is int else value, name)
