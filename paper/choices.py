r"""Multiple choice without examples, as in MMLU-Pro and SuperGPQA: the paper's Tables 3, 6 and 7.

    python paper/choices.py --data mmlu_pro.jsonl --checkpoints BASE RPT --mode both --samples 4

    reasoning         think, then put the letter into \boxed{}
    likelihood        no thought: the option whose text has the highest log-prob after the question
    likelihood_norm   the same per byte of the option, because a long text is less likely

--data holds JSON lines {"question", "options", "answer"}; the answer is a letter, an index or the
text of an option. Each subject ("category", "discipline", "subject" or "topic") also gets a line of
its own. In percent, with 95 % bootstrap intervals over questions. Exact answers: paper/answers.py.
"""
import re
import string
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags
from data.answers import layout_free
from data.corpus import check_text
from data.questions import field, leave_out_long, read_lines, text_field
from eval import load_model, result, thought_result
from paper.answers import evaluate_all, parse_question_args, think, with_room
from plumbing.batch import cut
from plumbing.likelihood import count_tokens, read

TOKENS_PER_PASS = 8192            # of a forward pass over options; bounds memory
LETTERS = string.ascii_uppercase  # names of options
SUBJECTS = ("category", "discipline", "subject", "topic")  # the first that a line has
CHOOSE = ("\n\nReason step by step, then put the letter of the right option, and only that, "
          "in \\boxed{}.")


class Choice(NamedTuple):
    question: str
    options: list[str]  # option i is named LETTERS[i]
    answer: int         # index of the right one
    subject: str        # "" where the line names none


# ---- reading ----

def parse_choice(record):
    """A line as above, or in the fields of MMLU-Pro or SuperGPQA -> Choice."""
    options = field(record, "options")
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"'options' must be a list of 2 to {len(LETTERS)} texts")
    options = [text_field(option, f"option {letter}") for option, letter in zip(options, LETTERS)]
    question = check_text(field(record, "question"), "'question'")
    answer = right_option(field(record, "answer_letter", "answer_index", "answer"), options)
    named = [record[name] for name in SUBJECTS if record.get(name)]
    return Choice(question, options, answer, str(named[0]) if named else "")


def right_option(answer, options):
    """-> index. A letter is tried before the text of an option, which may be "C", too."""
    letters = LETTERS[:len(options)]
    if isinstance(answer, str) and answer in list(letters):  # a list has no "AB"
        return letters.index(answer)
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if type(answer) is int and 0 <= answer < len(options):  # True is not an index
        return answer
    raise ValueError(f"answer {answer!r} is no letter from A to {letters[-1]}, no index from 0 to "
                     f"{len(options) - 1} and no option")


# ---- reasoning ----

def lettered(choice):
    """A Choice as the text that asks for a letter."""
    options = [f"{letter}. {option}" for letter, option in zip(LETTERS, choice.options)]
    return choice.question + "\n\n" + "\n".join(options) + CHOOSE


def is_letter(box, letter):
    r"""Does the box say B? Also as (B), B., \textbf{B}, $B$, or with its option: B. two."""
    said = layout_free((box or b"").decode("utf-8", "replace"))
    return bool(re.fullmatch(rf"\(?{letter}(?:[).:].*)?", said, re.DOTALL))


# ---- likelihood ----

def option_logprobs(model, tokenizer, choices):
    """-> for each Choice the summed log-probs of its options after the question, in nats.

    Options continue their question, which is computed once.
    """
    texts, sums = [encode(tokenizer, choice) for choice in choices], []
    with tqdm(total=len(texts), desc="likelihood", unit="question", disable=None) as bar:
        for run in cut(texts, TOKENS_PER_PASS, count_tokens):
            for scores in read(model, run, TOKENS_PER_PASS):
                sums.append([sum(logprobs) for logprobs, _ in scores])
            bar.update(len(run))
    return sums


def encode(tokenizer, choice):
    """Choice -> its question and options, as `read` takes them."""
    question = tokenizer.bos + tokenizer.encode(f"Question: {choice.question}\nAnswer:")
    return question, [([], tokenizer.encode(" " + option)) for option in choice.options]


def likelihood_hits(model, tokenizer, choices):
    """-> {mode: (n,) 1.0 where the likeliest option is the right one}."""
    hits = dict(likelihood=[], likelihood_norm=[])
    for choice, sums in zip(choices, option_logprobs(model, tokenizer, choices)):
        sizes = [len(option.encode()) for option in choice.options]
        hits["likelihood"].append(np.argmax(sums) == choice.answer)
        hits["likelihood_norm"].append(np.argmax(np.divide(sums, sizes)) == choice.answer)
    return {mode: np.array(some, dtype=float) for mode, some in hits.items()}


# ---- both ----

def evaluate(checkpoint, choices, args):
    """One checkpoint -> lines of the table, for all questions and for each subject."""
    model, tokenizer = load_model(checkpoint, args)
    if args.mode in ("likelihood", "both"):
        sizes = []
        for question, options in (encode(tokenizer, choice) for choice in choices):
            sizes.append(len(question) + max(len(option) for _, option in options))
        kept = leave_out_long([choice.question for choice in choices], sizes,
                              model.config.max_positions, args.skip_long,
                              "take a checkpoint with more positions")
        choices = [choices[i] for i in kept]
    if args.mode in ("reasoning", "both"):
        choices, texts, prompts = with_room(tokenizer, choices, list(map(lettered, choices)), args,
                                            model.config.max_positions)
    subjects = np.array([choice.subject for choice in choices])
    parts = {"all": np.arange(len(choices))}
    for subject in sorted(set(subjects.tolist()) - {""}):
        parts[subject] = np.flatnonzero(subjects == subject)

    results = []
    if args.mode in ("likelihood", "both"):
        for mode, hits in likelihood_hits(model, tokenizer, choices).items():
            for subject, i in parts.items():
                part = dict(subject=subject)
                results.append(result(checkpoint, mode, part, hits[i], i, args.seed))
    if args.mode in ("reasoning", "both"):
        letters = [LETTERS[choice.answer] for choice in choices]
        counts = think(checkpoint, model, tokenizer, texts, prompts, letters, is_letter, args)
        for subject, i in parts.items():
            part = dict(subject=subject)
            some = {name: values[i] for name, values in counts.items()}
            results.append(thought_result(checkpoint, "reasoning", part, some, i, args))
    return results


def parse_args():
    parser = flags.Parser("Accuracy on multiple choice, by subject.")
    parser.add_argument("--mode", default="both", choices=["reasoning", "likelihood", "both"],
                        help="a letter after a thought, or the likeliest option text")
    return parse_question_args(
        parser, "question, options, answer; the fields of MMLU-Pro or SuperGPQA will do")


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    evaluate_all(evaluate, read_lines(args.data, parse_choice, args.skip_bad), args)
