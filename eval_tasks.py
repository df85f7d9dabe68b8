r"""Questions with a known answer, and what thoughts look like: the parts of eval.py that know no sampling.

    choices    {"question", "options", "answer"}: the letter in \boxed{}, or the option of highest likelihood
    answers    {"question" or "problem", "answer" or "solution"}: the exact answer in \boxed{}
    patterns   keywords of the paper's Table 9, diversity and compression of responses

A file is JSON lines; a line that cannot be read stops with its number. read_questions gives (question, truth)
pairs, as training on exact answers wants them too.
"""
import json
import re
import string
import zlib
from typing import NamedTuple

import torch
from tqdm import tqdm

from data.answers import layout_free
from data.prepare import JSON_NAMES, check_text
from data.prompt import CHAT
from kernels.attention import make_layout
from reward import extract_prediction
from train_ntp import micro_batches

TOKENS_PER_PASS = 8192             # of a forward without gradient; bounds memory
LETTERS = string.ascii_uppercase   # names of options
SUBJECTS = ("category", "discipline", "subject", "topic")  # MMLU-Pro, SuperGPQA, others: the first there is
CHOOSE = "\n\nReason step by step, then put the letter of the right option, and only that, in \\boxed{}."
SOLVE = "\n\nReason step by step and put the final answer in \\boxed{}."
ASK = ("chat", "short")            # ways to ask; see question_prompt

KEYWORDS = {  # the paper's Table 9
    "transition": ["alternatively", "think differently"],
    "reflection": ["wait", "initial answer", "original answer", "looking back", "thought process"],
    "breakdown": ["break down", "break this down"],
    "hypothesis": ["probably", "something like"],
    "divergent": ["etc.", "or something", "either", "sometimes it refers", "otherwise", "exploring",
                  "options"],
    "deduction": ["summarize", "conclusion", "conclude", "finally", "logically", "consequently"],
}


class Choice(NamedTuple):
    question: str
    options: list   # texts; option i is named LETTERS[i]
    answer: int     # index of the right one
    subject: str    # "" where the line names none


# ---- reading -----------------------------------------------------------------------------------------------
def read_lines(path, parse):
    """JSONL -> [parse(object)]; ValueError with file and line number for the first line that is none."""
    parsed = []
    with open(path, "rb") as file:  # bytes: text mode would also break lines elsewhere
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig").strip()
                if not text:
                    continue
                record = json.loads(text, parse_float=str, parse_constant=refuse_constant)  # 0.50 stays 0.50
                json.dumps(record, ensure_ascii=False).encode()  # a lone surrogate stops here
                if not isinstance(record, dict):
                    raise ValueError(f"expected an object, got {JSON_NAMES[type(record)]}")
                parsed.append(parse(record))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number}: broken JSON at column {error.colno}: "
                                 f"{error.msg}") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number}: {error}") from None
    if not parsed:
        raise ValueError(f"{path}: no line in it")
    return parsed


def refuse_constant(name):
    raise ValueError(f"{name} is not JSON; some tools write it for a missing value, or for the word None")


def field(record, *names):
    """The first of these fields that a line has; null counts as absent."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise ValueError(f"expected an object with {' or '.join(map(repr, names))}, "
                     f"got one with {', '.join(map(repr, record)) or 'nothing'}")


def text_field(value, name):
    return check_text(str(value) if type(value) is int else value, name)


def read_choices(path):
    """A file in the fields of MMLU-Pro, of SuperGPQA, or plain {question, options, answer} -> [Choice]."""
    def parse(record):
        options = field(record, "options")
        if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
            raise ValueError(f"'options' must be a list of 2 to {len(LETTERS)} texts")
        options = [text_field(option, f"option {letter}") for option, letter in zip(options, LETTERS)]
        subject = next((record[name] for name in SUBJECTS if record.get(name)), "")
        return Choice(check_text(field(record, "question"), "'question'"), options,
                      right_option(field(record, "answer_letter", "answer_index", "answer"), options),
                      str(subject))
    return read_lines(path, parse)


def right_option(answer, options):
    """A letter, else the text of an option (both may fit: C is also a capacity); a number is an index."""
    if isinstance(answer, str) and answer in list(LETTERS[:len(options)]):
        return LETTERS.index(answer)
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if type(answer) is int and 0 <= answer < len(options):  # not True
        return answer
    raise ValueError(f"answer {answer!r} is no letter from A to {LETTERS[len(options) - 1]}, no index from 0 "
                     f"to {len(options) - 1} and no option")


def read_questions(path):
    """A file of questions (or problems) with answers (or solutions) -> [(question, truth)], both texts."""
    def parse(record):
        name = "question" if record.get("question") is not None else "problem"
        question = check_text(field(record, "question", "problem"), f"'{name}'")
        return question, exact_answer(text_field(field(record, "answer", "solution"), "the answer"))
    return read_lines(path, parse)


def read_solutions(path):
    """A file of questions with worked solutions -> [(question, solution up to a ####, truth)], all texts."""
    def parse(record):
        question = check_text(field(record, "question", "problem"), "'question'")
        solution = check_text(field(record, "solution", "answer"), "'solution'")
        truth = exact_answer(text_field(field(record, "answer", "solution"), "the answer"))
        return question, (solution.rpartition("####")[0] or solution).strip(), truth
    return read_lines(path, parse)


def exact_answer(answer):
    r"""What follows the last ####, else what the last \boxed{} holds, else all of it; without outer space."""
    _, mark, truth = answer.rpartition("####")
    if not mark:
        boxed = extract_prediction(b"</think>" + answer.encode())
        truth = answer if boxed is None else boxed.decode()
    return check_text(truth.strip(), "the exact answer")


# ---- asking and judging ------------------------------------------------------------------------------------
def question_prompt(tokenizer, text, template="chat"):
    """A question in words -> prompt ids that end with an open thought.

    chat: in the turns of the tokenizer's chat format; plain text where it has none. short: as the template
    of this name in data/prompt.py, the text and <think>.
    """
    if template == "short":
        user, assistant = "", "<think>"
    else:
        turns = (turn for token, turn in CHAT.items() if token in tokenizer.special)
        user, assistant = next(turns, ("", "\n\n"))
        assistant += "<think>\n"
    before, after = (tokenizer.encode(turn, special=True) for turn in (user, assistant))
    return before + tokenizer.encode(text) + after


def solve_prompt(tokenizer, question, template="chat"):
    """As question_prompt; in chat turns with the request to reason and to box the answer."""
    return question_prompt(tokenizer, question + (SOLVE if template == "chat" else ""), template)


def lettered(choice):
    """A Choice as the text that asks for a letter."""
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, choice.options))
    return f"{choice.question}\n\n{options}{CHOOSE}"


def is_letter(prediction, letter):
    r"""Is it B, however dressed: (B), B., \textbf{B}, $B$, or with its option, B. two? prediction: bytes, or None."""
    said = layout_free((prediction or b"").decode("utf-8", "replace"))
    return bool(re.fullmatch(rf"\(?{letter}(?:[).:].*)?", said, re.DOTALL))


@torch.no_grad()
def option_logprobs(model, tokenizer, choices):
    """-> for each Choice the log-probs of its options after the question, summed: [[nats] * options].

    One packed group is [question][option A][option B]..., so the question is computed once.
    """
    groups = []
    for choice in choices:
        prompt = tokenizer.encode(f"Question: {choice.question}\nAnswer:")
        options = [tokenizer.encode(" " + option) for option in choice.options]
        longest = len(prompt) + max(map(len, options))
        if longest > model.config.max_positions:
            raise ValueError(f"question {choice.question[:40]!r}... and an option take {longest} tokens, the "
                             f"model has {model.config.max_positions} positions; leave it out")
        groups.append((prompt, options))
    sums, size = [], lambda group: len(group[0]) + sum(map(len, group[1]))
    with tqdm(total=len(groups), desc="likelihood", unit="question", disable=None) as bar:
        for batch in micro_batches(groups, TOKENS_PER_PASS, size):
            layout = make_layout([(len(prompt), list(map(len, options))) for prompt, options in batch],
                                 model.device)
            tokens = [id for prompt, options in batch for ids in (prompt, *options) for id in ids]
            logprobs, _ = model.logprobs(torch.tensor(tokens, device=model.device), layout)      # (S,)
            parts = iter(logprobs.split([len(option) for _, options in batch for option in options]))
            sums += [[next(parts).sum().item() for _ in options] for _, options in batch]
            bar.update(len(batch))
    return sums


# ---- patterns ----------------------------------------------------------------------------------------------
def keyword_regex(keywords):
    """Matches any of these in lower-cased text, as whole words: not the wait in waiter."""
    spaced = [r"\s+".join(map(re.escape, words.split())) for words in keywords]
    return re.compile(rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)")


def read_responses(paths):
    """Files that eval.py --dump wrote -> {checkpoint: [response]}, in order; empty thoughts are left out."""
    def parse(record):
        checkpoint, response = field(record, "checkpoint"), field(record, "response")
        if not (isinstance(checkpoint, str) and isinstance(response, str)):
            raise ValueError("'checkpoint' and 'response' must be strings")
        return checkpoint, response, record.get("mode")

    responses = {}
    for path in paths:
        for checkpoint, response, mode in read_lines(path, parse):
            if mode != "empty":
                responses.setdefault(checkpoint, []).append(response)
    if not responses:
        raise ValueError(f"{', '.join(map(str, paths))}: only empty thoughts, nothing to describe")
    return responses


def describe(responses):
    """Responses -> share with a keyword of each group (percent), mean words, distinct-1/2/3, compression."""
    lowered, words = [r.lower() for r in responses], [r.split() for r in responses]
    line = {}
    for group, keywords in KEYWORDS.items():
        found = keyword_regex(keywords)
        line[group] = 100 * sum(found.search(r) is not None for r in lowered) / len(lowered)
    line["words_mean"] = sum(map(len, words)) / len(words)
    for n in (1, 2, 3):  # unique n-grams of words over all of them, none across two responses
        grams = [tuple(w[i:i + n]) for w in words for i in range(len(w) - n + 1)]
        line[f"distinct_{n}"] = len(set(grams)) / len(grams) if grams else None
    thoughts = "".join(thought_of(r) for r in responses).encode()
    line["compression"] = len(zlib.compress(thoughts, 9)) / len(thoughts) if thoughts else None
    return line


def thought_of(response):
    """What stands before the last </think>; a response that ran out of room is all thought."""
    thought, closed, _ = response.rpartition("</think>")
    return thought if closed else response


def patterns(responses):
    """{checkpoint: [response]} -> a dict for each; its `change` is in percent of the first one's share."""
    lines = [dict(checkpoint=name, n=len(some)) | describe(some) for name, some in responses.items()]
    first = lines[0]
    for line in lines:
        line["change"] = {group: 100 * (line[group] / first[group] - 1) if first[group] else None
                          for group in KEYWORDS}
    return lines


def print_patterns(lines):
    """One row for each checkpoint and pattern."""
    width = max(len(line["checkpoint"]) for line in lines)
    change = lambda x: "" if x is None else f" ({x:+.1f} %)"
    print(f"\n{'responses with, %':{width}}  {'n':>6}  " + "  ".join(f"{group:>18}" for group in KEYWORDS))
    for line in lines:
        cells = [f"{line[group]:.1f}{change(line['change'][group])}" for group in KEYWORDS]
        print(f"{line['checkpoint']:{width}}  {line['n']:>6}  " + "  ".join(f"{cell:>18}" for cell in cells))
    names = ["words_mean", "distinct_1", "distinct_2", "distinct_3", "compression"]
    print(f"\n{'':{width}}  " + "  ".join(f"{name:>11}" for name in names))
    for line in lines:
        cells = ["-" if line[name] is None else f"{line[name]:.3f}" for name in names]
        print(f"{line['checkpoint']:{width}}  " + "  ".join(f"{cell:>11}" for cell in cells))
