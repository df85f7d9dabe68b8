"""Prompts: ids of a template around the ids of a context, or of a question in words.

The context is never decoded and tokenised again: a position may lie inside a word, where the
tokenizer would cut the text in another way. v0 to v6 have the structures of the paper's appendix D
in words of our own, its doubled backslash in v1 and v2 and its escaped newline in v4 included. The
paper trains with v0, and reports that fences and a list of candidates (v6) start best. "short" is
the context and <think>, for a model trained on strings by train_ntp.py.
"""
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

# Special token that shows which chat format a tokenizer follows: (user's turn, assistant's turn).
CHAT = {
    "<｜User｜>": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"),  # R1-Distill
    "<|start_header_id|>": (  # Llama 3
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),  # Qwen, SmolLM2
}
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
    if "<think>" not in after:
        formats = [turns for token, turns in CHAT.items() if token in tokenizer.special]
        user, assistant = formats[0] if formats else ("", "\n\n")
        before = user + before
        after += assistant + "<think>\n"
    return tokenizer.encode(before, special=True), tokenizer.encode(after, special=True)


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
    return before + tokenizer.encode(text) + after


def solve_prompt(tokenizer, question, template="chat"):
    """As question_prompt; in chat turns it also asks to reason and to box the answer."""
    return question_prompt(tokenizer, question + (SOLVE if template == "chat" else ""), template)


def check_question_template(template):
    if template not in QUESTION_TEMPLATES:
        raise ValueError(f"--template {template}: questions are asked with "
                         f"{' or '.join(QUESTION_TEMPLATES)}")


def stop_ids(tokenizer):
    """Ids that end a rollout: the end of the text or of the chat turn."""
    ends = {tokenizer.special[text] for text in TURN_ENDS if text in tokenizer.special}
    return sorted(ends | {tokenizer.eos_id})
