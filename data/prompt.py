"""Prompts: ids of a template around the ids of a context, or of a question in words.

The context is never decoded and tokenised again: a position may lie inside a word, where the
tokenizer would cut the text in another way. v0 to v6 have the structures of the paper's appendix D
in words of our own, its doubled backslash in v1 and v2 and its escaped newline in v4 included. The
paper trains with v0, and reports that fences and a list of candidates (v6) start best. "short" is
the context and <think>, for a model trained on strings by train_ntp.py.

Around them stand the turns of the checkpoint's own chat template, default system turn included,
rendered as transformers does it, but always on 26 Jul 2024, the date that stands in Llama 3.2's, so
that a prompt is the same every day. A thought that the template opens (R1) is not opened again. A
prompt without such turns begins with the tokenizer's BOS.
"""
import sys
from datetime import datetime
from functools import lru_cache
from typing import NamedTuple

from jinja2 import TemplateError, ext, nodes, sandbox  # comes with torch

from plumbing import parallel

FIND = "Think step by step to find the most probable next token, then give it as your final "
TASK = "Continue the text under ### Context by predicting its next token. "
ANSWER = TASK + FIND + r"answer in \boxed{}."
SPACE = (r" The continuation may begin with a space, for example \boxed{ para} or \boxed{ =}. "
         r"Do not use \text{}.")
CONTEXT = "\n\n### Context\n"
FENCED = CONTEXT + "```\n"

# name: (before the context, after it)
TEMPLATES = {
    "v0": (ANSWER + SPACE + CONTEXT, ""),
    "v1": (TASK + FIND + r"prediction in \\boxed{}." + SPACE + FENCED, "\n```"),
    "v2": ("You are a helpful assistant who is good at predicting the next token of a text. "
           "Continue the text under ### Context. " + FIND + r"prediction in \\boxed{}."
           + SPACE + FENCED, "\n```"),
    "v3": (TASK + "Think step by step: list several candidate tokens, then choose the most "
           r"probable one and give it in \boxed{}." + SPACE + FENCED, "\n```"),
    "v4": (ANSWER + FENCED + "We are asked to show\n```\n" r"\boxed{ that}"
           + FENCED + "Therefore 3 + 4 =\n```\n" r"\boxed{ 7}"
           + FENCED + "The cases are\n```\n" r"\boxed{:\n}" + FENCED, "\n```"),
    "v5": (ANSWER + SPACE + FENCED, "\n```"),
    "v6": ("Below is the beginning of a text. Which token comes next?\n```\n",
           "\n```\nList several tokens that could follow, weigh them step by step, and put the "
           r"most probable one in \boxed{}." + SPACE + " Predict the next token now."),
    "short": ("", "<think>"),
}
QUESTION_TEMPLATES = ("chat", "short")
SOLVE = "\n\nReason step by step and put the final answer in \\boxed{}."

# Turns of a tokenizer without a chat template, by a special token that it has: (user's turn,
# assistant's turn).
CHAT = {
    "<｜User｜>": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"),  # R1-Distill
    "<|start_header_id|>": (  # Llama 3
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),  # Qwen, SmolLM2
}
TODAY = datetime(2024, 7, 26)  # for chat templates that write the date
CONTENT = "\0"  # stands for the content while a chat template is rendered; no text holds it
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")


def template_ids(tokenizer, template):
    """Name of a template -> ids before the context, ids after it; the latter open the thought."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; there are {', '.join(TEMPLATES)}")
    return encode_turns(tokenizer, *TEMPLATES[template])


def encode_turns(tokenizer, before, after):
    """Texts around a context -> their ids, in chat turns and with an open thought.

    A template that opens the thought itself is taken as it stands, without turns.
    """
    turns = Turns("", "") if "<think>" in after else chat_turns(tokenizer)
    before, after = turns.user + before, after + turns.assistant
    if not after.rstrip().endswith("<think>"):
        after += "<think>\n"
    before = tokenizer.encode(before, special=True)
    if not turns.are_own and before[:len(tokenizer.bos)] != tokenizer.bos:
        before = tokenizer.bos + before
    return before, tokenizer.encode(after, special=True)


class Turns(NamedTuple):
    user: str               # text before what a user says
    assistant: str          # text after it
    are_own: bool = False   # from the checkpoint's chat template?
    strip: bool = False     # does the template drop white space around what a user says?


@lru_cache  # so that a template is rendered once, and its fault named once
def chat_turns(tokenizer):
    """-> the Turns of this tokenizer's checkpoint."""
    found = [turns for token, turns in CHAT.items() if token in tokenizer.special]
    usual = Turns(*found[0]) if found else Turns("", "\n\n")
    template = tokenizer.config.get("chat_template")
    if isinstance(template, list):  # several, each with a name
        template = {one["name"]: one["template"] for one in template}.get("default")
    if not template:
        return usual
    try:
        user, *others = render(template, tokenizer.config, CONTENT).split(CONTENT)
        if len(others) != 1:
            raise ValueError("it does not write once what a user says")
        # White space around it is kept, or all of it is dropped (Llama), or there is no rule.
        spaced = f"\n {CONTENT} \n"
        text, kept = render(template, tokenizer.config, spaced), user + spaced + others[0]
        if text not in (kept, user + CONTENT + others[0]):
            raise ValueError("it changes what a user says")
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TemplateError, TypeError,
            ValueError) as error:
        if parallel.RANK == 0:
            reason = " ".join(str(error).split())
            print(f"this checkpoint's chat template cannot be followed ({reason}); prompts have "
                  f"the turns {usual.user!r} and {usual.assistant!r} instead", file=sys.stderr)
        return usual
    return Turns(user, *others, are_own=True, strip=text != kept)


class Generation(ext.Extension):
    """{% generation %} marks what an assistant says; here it does nothing."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return nodes.Scope(body, lineno=line)


def render(template, config, content):
    """A chat template -> the text of a user's turn with this content, and how the answer begins.

    A template is a program of a stranger, so it runs in a sandbox, as in transformers.
    """
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols])
    environment.globals |= dict(raise_exception=refuse, strftime_now=TODAY.strftime)
    names = {name: token["content"] if isinstance(token, dict) else token
             for name, token in config.items()
             if name.endswith("_token") and isinstance(token, str | dict)}
    return environment.from_string(template).render(
        names, messages=[dict(role="user", content=content)], tools=None, documents=None,
        add_generation_prompt=True, enable_thinking=True)


def refuse(message):
    raise TemplateError(message)


def build_prompt(context, before, after, longest):
    """context ids -> prompt ids, `longest` at most; a longer context loses its beginning."""
    keep = longest - len(before) - len(after)
    if keep < 1:
        raise ValueError(f"the template takes {longest - keep} tokens, the prompt may have "
                         f"{max(0, longest)}: no room for context; lower --max-new-tokens, because "
                         "prompt and rollout share the model's positions, or take a shorter "
                         "--template")
    return before + list(context[-keep:]) + after


def question_prompt(tokenizer, text, template="chat"):
    """A question in words -> prompt ids that end with an open thought; template: chat or short."""
    before, after = encode_turns(tokenizer, "", "<think>" if template == "short" else "")
    if template == "chat" and chat_turns(tokenizer).strip:
        text = text.strip()
    # "user\n" and a question may share a token, a special token and a question do not.
    special, tail = {*tokenizer.special.values()}, []
    while before and before[-1] not in special:
        tail.insert(0, before.pop())
    text = tokenizer.decode_bytes(tail).decode() + text
    return before + tokenizer.encode(text) + after


def solve_prompt(tokenizer, question, template="chat"):
    """As question_prompt; in chat turns it also asks to reason and to box the answer."""
    return question_prompt(tokenizer, question + (SOLVE if template == "chat" else ""), template)


def check_question_template(template):
    if template not in QUESTION_TEMPLATES:
        raise ValueError(f"--template {template}: questions are asked with "
                         f"{' or '.join(QUESTION_TEMPLATES)}")


def stop_ids(tokenizer):
    """Ids that end a rollout: the end of the text or of the chat turn, and what the model names."""
    ends = {tokenizer.special[text] for text in TURN_ENDS if text in tokenizer.special}
    if tokenizer.eos or not tokenizer.stops:  # without any, eos_id complains
        ends.add(tokenizer.eos_id)
    return sorted(ends | tokenizer.stops)
