"""Prompts: template ids + the context's own token ids + template suffix ids.

The context is never decoded and tokenised again: its last token would change where the text is cut inside a word.
v0 to v6 follow the structures of the paper's appendix D, in our own words; the paper trains with v0, and reports that
fences and a list of candidates (v6) start best. "short" is for a model that has met the strings of train_ntp.py: the
context, then <think>.
"""
SPACE = r"The continuation may begin with a space, for example \boxed{ para} or \boxed{ =}. Do not use \text{}."

# name: (before the context, after it)
TEMPLATES = {
    "v0": ("Continue the text under ### Context by predicting its next token. Think step by step to find the most "
           r"probable next token, then give it as your final answer in \boxed{}. " + SPACE + "\n\n### Context\n", ""),
    "v1": ("Continue the text under ### Context by predicting its next token. Think step by step to find the most "
           r"probable next token, then give it as your final prediction in \\boxed{}. " + SPACE + "\n\n### Context\n```\n", "\n```"),
    "v2": ("You are a helpful assistant who is good at predicting the next token of a text. Continue the text under "
           "### Context. Think step by step to find the most probable next token, then give it as your final "
           r"prediction in \\boxed{}. " + SPACE + "\n\n### Context\n```\n", "\n```"),
    "v3": ("Continue the text under ### Context by predicting its next token. Think step by step: list several candidate "
           r"tokens, then choose the most probable one and give it in \boxed{}. " + SPACE + "\n\n### Context\n```\n", "\n```"),
    "v4": ("Continue the text under ### Context by predicting its next token. Think step by step to find the most probable "
           r"next token, then give it as your final answer in \boxed{}." "\n\n### Context\n```\nWe are asked to show\n```\n"
           r"\boxed{ that}" "\n\n### Context\n```\nTherefore 3 + 4 =\n```\n" r"\boxed{ 7}"
           "\n\n### Context\n```\nThe cases are\n```\n" r"\boxed{:\n}" "\n\n### Context\n```\n", "\n```"),
    "v5": ("Continue the text under ### Context by predicting its next token. Think step by step to find the most "
           r"probable next token, then give it as your final answer in \boxed{}. " + SPACE + "\n\n### Context\n```\n", "\n```"),
    "v6": ("Below is the beginning of a text. Which token comes next?\n```\n",
           "\n```\nList several tokens that could follow, weigh them step by step, and put the most probable one in "
           r"\boxed{}. " + SPACE + " Predict the next token now."),
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
        user, assistant = next((turn for token, turn in CHAT.items() if token in tokenizer.special), ("", "\n\n"))
        before, after = user + before, after + assistant + "<think>\n"
    return tokenizer.encode(before, special=True), tokenizer.encode(after, special=True)


def build_prompt(context, before, after, room):
    """context ids -> prompt ids of at most `room` tokens; a longer context loses its beginning."""
    keep = room - len(before) - len(after)
    if keep < 1:
        raise ValueError(f"the template takes {len(before) + len(after)} tokens and the prompt may have {room}: "
                         "no room for any context; use a shorter template or more positions")
    return before + list(context[-keep:]) + after


def stop_ids(tokenizer):
    """Ids that end a response: the end of the text or of the chat turn."""
    return sorted({tokenizer.eos_id} | {tokenizer.special[t] for t in TURN_ENDS if t in tokenizer.special})
