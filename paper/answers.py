r"""Accuracy on questions with an exact answer, after a thought, for the paper's Table 2.

    python paper/answers.py --data gsm8k_test.jsonl --checkpoints BASE RPT --limit 200 --samples 4 \
        --dump thoughts.jsonl --out answers.json

--data holds JSON lines of questions and answers (data/questions.py). A thought is right if its box
equals the answer by data/answers.py. Accuracy is the mean over all thoughts, pass_at_k the share of
questions with at least one right thought of K; in percent, with 95 % bootstrap intervals over
questions. The prompt holds no examples. Multiple choice: paper/choices.py.
"""
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.answers import answers_equal
from data.prompt import QUESTION_TEMPLATES, SOLVE, question_prompt
from data.questions import boxed_answer, leave_out_long, read_questions
from eval import (add_thought_flags, check_paths, check_sampling, count_any, evaluate_each,
                  fill_in_length, load_model, sample_rollouts, thought_result)
from objectives.rpt import predictions
from plumbing import flags
from plumbing.log import dump, text_of


def choose_questions(questions, limit, seed):
    """`limit` of the questions (0: all of them), chosen by the seed, in the order of the file."""
    chosen = np.random.default_rng(seed).permutation(len(questions))[:limit or None]
    return [questions[i] for i in sorted(chosen)]


def with_room(tokenizer, questions, texts, args, max_positions):
    """Questions, and each in words -> those that are not too long, their texts and prompts."""
    prompts = [question_prompt(tokenizer, text, args.template) for text in texts]
    kept = leave_out_long(texts, list(map(len, prompts)), max_positions - args.max_new_tokens,
                          args.skip_long, "lower --max-new-tokens")
    return [[some[i] for i in kept] for some in (questions, texts, prompts)]


def think(checkpoint, model, tokenizer, texts, prompts, truths, is_right, args):
    """n questions in words -> {what: array (n, K)}, counts for K thoughts about each.

    is_right(box, truth): whether the box, bytes or None, is right. --dump gets the first thought
    about each question.
    """
    groups = sample_rollouts(model, tokenizer, prompts, args, "reasoning")

    predicted, rewards, records = [], [], []
    for text, truth, rollouts in zip(texts, truths, groups):
        boxes = predictions(tokenizer, rollouts, boxed_answer)
        right = [float(is_right(box, truth)) for box in boxes]
        predicted.append(boxes)
        rewards.append(right)
        records.append(dict(
            checkpoint=checkpoint, mode="reasoning", question=text, truth=truth,
            response=text_of(tokenizer.decode_bytes(rollouts[0].tokens)),
            extracted=None if boxes[0] is None else text_of(boxes[0]),
            reward=right[0]))

    if args.dump:
        dump(args.dump, records)
    return count_any(rewards, predicted, groups)


def evaluate(checkpoint, questions, args):
    """One checkpoint on [(question, exact answer)] -> [its line of answers.json]."""
    model, tokenizer = load_model(checkpoint, args)
    request = SOLVE if args.template == "chat" else ""
    texts = [question + request for question, _ in questions]
    questions, texts, prompts = with_room(tokenizer, questions, texts, args,
                                          model.config.max_positions)
    truths = [truth for _, truth in questions]
    counts = think(checkpoint, model, tokenizer, texts, prompts, truths, answers_equal, args)
    alone = np.arange(len(texts))  # each question is a document of its own
    return [thought_result(checkpoint, "reasoning", dict(subject="all"), counts, alone, args)]


def evaluate_all(evaluate, questions, args):
    """Ask all checkpoints --limit of the questions, print the table, write --out."""
    fill_in_length(args)
    check_paths(args)
    questions = choose_questions(questions, args.limit, args.seed)
    evaluate_each(evaluate, print_subjects, f"{len(questions)} questions", (questions,), args)


def print_subjects(results):
    """One row for each subject, mode and checkpoint; checkpoints stand below each other."""
    widths = [max(len(line[key]) for line in results) for key in ("subject", "mode", "checkpoint")]
    row = "  ".join(f"{{:{width}}}" for width in widths) + "  {:>20}  {:>6}"
    print("\n" + row.format("", "", "", "accuracy, %", "n"))
    for line in sorted(results, key=lambda r: (r["subject"] != "all", r["subject"], r["mode"])):
        accuracy = f"{line['accuracy']:.1f} [{line['low']:.1f}, {line['high']:.1f}]"
        print(row.format(line["subject"], line["mode"], line["checkpoint"], accuracy, line["n"]))


def parse_question_args(parser, fields):
    """Add flags about questions and parse; fields: what a line of --data has, for the help."""
    add = parser.add_argument
    add("--data", required=True, metavar="FILE", help=f"JSON lines: {fields}")
    add("--limit", type=flags.at_least(0), default=0, metavar="N",
        help="ask this many questions, chosen by --seed; 0: all")
    add("--template", default="chat", choices=QUESTION_TEMPLATES,
        help="chat: turns of the checkpoint's chat format; short: text and <think>")
    flags.add_question_flags(add)
    add_thought_flags(add, "question")
    args = parser.parse_args()
    check_sampling(args)
    return args


def parse_args():
    parser = flags.Parser("Accuracy on questions with an exact answer.")
    return parse_question_args(
        parser, r"question, answer; the answer may end in #### N or hold a \boxed{N}")


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    evaluate_all(evaluate, read_questions(args.data, args.skip_bad), args)
