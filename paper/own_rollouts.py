r"""A checkpoint's own rollouts that an objective finds worth imitating, as strings to train on.

    python paper/own_rollouts.py --corpus C --init BASE --count 4800 --rollouts 8 --out own.jsonl
    python train_ntp.py --corpus C --init BASE --strings own.jsonl --documents-per-step 0 ...

With the base's right rollouts (rejection sampling) this is a control: does RPT need its wrong ones?
With --objective ra3 it is that method's second stage: thoughts that pay, and the text behind them;
with rlp all thoughts, and the text behind them: the model learns how far to trust its thoughts.
"""
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not paper/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from data.prompt import TEMPLATES, stop_ids
from data.tokenizer import Tokenizer
from model import GPT
import objectives
from objectives import Group
from plumbing import flags
from plumbing.files import write
from plumbing.log import RolloutBar, text_of
from sample import generate


def own_strings(model, tokenizer, args):
    """Rollouts about --count positions -> {"prompt", "response", "text"} for each worth it."""
    objective = objectives.load(args.objective)(args, tokenizer, model.config)
    questions = [objective.question(position) for position in objective.take(0, args.count)]
    prompts = [question.prompt for question in questions]
    with RolloutBar(len(prompts) * args.rollouts, "own rollouts") as bar:
        rollouts = generate(model, prompts, args.rollouts, args.max_new_tokens, args.temperature,
                            stop_ids(tokenizer), (args.seed, 1 << 21), on_tokens=bar,
                            is_end=objective.is_end)
    groups = [Group(question, some) for question, some in zip(questions, rollouts)]
    objective.score(model, groups)
    strings = []
    for group in groups:
        for response in objective.lessons(group):
            text = text_of(tokenizer.decode_bytes(response))
            strings.append(dict(prompt=group.question.prompt, response=response, text=text))
    return strings


def parse_args():
    parser = flags.Parser("A checkpoint's own rollouts about training text, the right ones.")
    add, at_least = parser.add_argument, flags.at_least
    add("--objective", default="rpt", choices=["rpt", "rlp", "ra3"], help="what a rollout is worth")
    add("--corpus", required=True,
        help="folder written by data/prepare.py and scored by data/filter.py")
    add("--init", required=True, help="checkpoint that samples them")
    add("--proxy", help="checkpoint whose entropies choose the positions; default: the only one")
    add("--out", required=True, help="JSONL file to write")
    add("--count", type=at_least(1), default=2000, help="positions")
    add("--rollouts", type=at_least(1), default=8, metavar="G", help="thoughts about each position")
    add("--template", default="v0",
        help=f"how it is asked (data/prompt.py): {', '.join(TEMPLATES)}")
    add("--entropy-threshold", type=at_least(0, float), default=0.5,
        help="only positions above this entropy, nats")
    add("--max-prompt-tokens", type=at_least(1), default=512,
        help="longer contexts lose their beginning")
    add("--max-new-tokens", type=at_least(1), default=512, help="tokens of a rollout")
    add("--temperature", type=at_least(0, float), default=1.0, help="of sampling")
    add("--seed", type=at_least(0), default=0, help="chooses positions and rollouts")
    flags.add_device_flag(add)
    add("--tokens-per-micro-batch", type=at_least(1), default=16384,
        help="tokens in one forward pass to score with")
    return parser.parse_args()


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    args = parse_args()
    tokenizer = Tokenizer.load(args.init, for_model=True)
    model = GPT.from_pretrained(args.init, flags.compute_dtype(args), args.device)
    strings = own_strings(model, tokenizer, args)
    if not strings:
        raise ValueError(f"{args.out}: no rollout about {args.count} positions is worth it")
    write(args.out, "".join(json.dumps(string, ensure_ascii=False) + "\n" for string in strings))
    print(f"{len(strings):,} strings written to {args.out}, the last one:\n"
          f"    {strings[-1]['text']}")
