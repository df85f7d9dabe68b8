"""Prompts: template ids + the context's own token ids + template suffix ids.

The context is never decoded and tokenised again: its last token would change where the text is cut inside a
word. v0 to v6 follow the structures of the paper's appendix D, in our own words; the paper trains with v0,
and reports that fences and a list of candidates (v6) start best. "short" is for a model that has met the
strings of train_ntp.py: the context, then <think>.
"""
SPACE = (r"The continuation may begin with a space, for example \boxed{ para} or \boxed{ =}. "
         r"Do not use \text{}.")
CONTEXT = "\n\n### Context\n"
FENCED = CONTEXT + "```\n"

# name: (before the context, after it)
TEMPLATES = {
    "v0": ("Continue the text under ### Context by predicting its next token. Think step by step to find the "
           r"most probable next token, then give it as your final answer in \boxed{}. " + SPACE + CONTEXT,
           ""),
    "v1": ("Continue the text under ### Context by predicting its next token. Think step by step to find the "
           r"most probable next token, then give it as your final prediction in \\boxed{}. " + SPACE + FENCED,
           "\n```"),
    "v2": ("You are a helpful assistant who is good at predicting the next token of a text. Continue the "
           "text under ### Context. Think step by step to find the most probable next token, then give it as "
           r"your final prediction in \\boxed{}. " + SPACE + FENCED,
           "\n```"),
    "v3": ("Continue the text under ### Context by predicting its next token. Think step by step: list "
           r"several candidate tokens, then choose the most probable one and give it in \boxed{}. "
           + SPACE + FENCED,
           "\n```"),
    "v4": ("Continue the text under ### Context by predicting its next token. Think step by step to find the "
           r"most probable next token, then give it as your final answer in \boxed{}."
           + FENCED + "We are asked to show\n```\n" r"\boxed{ that}"
           + FENCED + "Therefore 3 + 4 =\n```\n" r"\boxed{ 7}"
           + FENCED + "The cases are\n```\n" r"\boxed{:\n}" + FENCED,
           "\n```"),
    "v5": ("Continue the text under ### Context by predicting its next token. Think step by step to find the "
           r"most probable next token, then give it as your final answer in \boxed{}. " + SPACE + FENCED,
           "\n```"),
    "v6": ("Below is the beginning of a text. Which token comes next?\n```\n",
           "\n```\nList several tokens that could follow, weigh them step by step, and put the most probable "
           r"one in \boxed{}. " + SPACE + " Predict the next token now."),
    "short": ("", ""),
}

# Chat turns around the instruction, by the special token that shows which convention a tokenizer follows.
CHAT = {
    "<｜User｜>": ("<｜begin▁of▁sentence｜><｜User｜>", "<｜Assistant｜>"),                        # R1-Distill
    "<|start_header_id|>": ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
                            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"),    # Llama 3
    "<|im_start|>": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),             # Qwen, SmolLM2
}
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>")


def template_ids(tokenizer, template):
    """Name of a template -> (ids before the context, ids after it). The last ids open the thought."""
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; there are {', '.join(TEMPLATES)}")
    before, after = TEMPLATES[template]
    if template == "short":
        after = "<think>"
    else:
        turns = (turn for token, turn in CHAT.items() if token in tokenizer.special)
        user, assistant = next(turns, ("", "\n\n"))
        before, after = user + before, after + assistant + "<think>\n"
    return tokenizer.encode(before, special=True), tokenizer.encode(after, special=True)


def build_prompt(context, before, after, room):
    """context ids -> prompt ids of at most `room` tokens; a longer context loses its beginning."""
    keep = room - len(before) - len(after)
    if keep < 1:
        raise ValueError(f"the template takes {len(before) + len(after)} tokens, the prompt may have {room}: "
                         "no room for context; use a shorter template, fewer new tokens or more positions")
    return before + list(context[-keep:]) + after


def stop_ids(tokenizer):
    """Ids that end a response: the end of the text or of the chat turn."""
    return sorted({tokenizer.eos_id} | {tokenizer.special[t] for t in TURN_ENDS if t in tokenizer.special})
