r"""What is asked, and what counts as right: the two tasks that train_rpt.py trains on.

    lm        a position in ordinary text; right is what really follows          --reward, see REWARDS
    answers   a question with one exact answer, as in GSM8K; right is the answer (answers.py)

A Question goes to the sampler, a Group comes back: G rollouts, what they predict, what that is worth.
"""
from dataclasses import dataclass

import torch

from eval_tasks import solve_prompt
from kernels.attention import make_layout
from kernels.linear import linear
from data.prompt import build_prompt
from reward import conditional_dense, dense, extract_prediction, first_token_match, prefix_match
from train_ntp import micro_batches

TRUTH_TOKENS = 32     # true tokens a prediction may cover; the paper does not say
CONTEXT_LOGGED = 64   # tokens of the context in samples.jsonl
REWARDS = {           # of the paper's appendix A; dense ones get the model's probability for what is wrong
    "prefix": prefix_match, "first-token": first_token_match,
    "dense": first_token_match, "conditional-dense": first_token_match}


@dataclass
class Question:
    """What the model sees, and what would be right."""
    context: list            # lm: token ids before the position, as many as have room; answers: the question's
    prompt: list             # template, context (or its end), template
    truth: list | str        # lm: raw bytes of each of the next tokens of the document; answers: the answer
    position: int            # lm: of the first of them in the corpus; answers: number of the question


@dataclass
class Group:
    """G rollouts of one question."""
    question: Question
    rollouts: list
    predictions: list        # bytes in the box, or None
    rewards: list


def make_question(corpus, tokenizer, position, template, room):
    """position: (t, document start, document end) -> Question; a context without room loses its head."""
    t, start, end = position
    truth = [tokenizer.token_bytes(int(id)) for id in corpus.tokens[t:min(end, t + TRUTH_TOKENS)]]
    context = corpus.tokens[max(start, t - room):t].tolist()
    return Question(context, build_prompt(context, *template, room), truth, int(t))


def exact_question(tokenizer, number, question, truth, template, close, room):
    """The number-th question and its exact answer, both texts -> Question; ValueError where it has no room.

    close: ids that end the prompt, such as those that close the thought.
    """
    prompt = solve_prompt(tokenizer, question, template) + close
    if len(prompt) > room:
        raise ValueError(f"question {number + 1}, {question[:40]!r}..., takes {len(prompt)} tokens, and there "
                         f"is room for {room}: raise --max-prompt-tokens, lower --max-new-tokens or drop it")
    return Question(tokenizer.encode(question), prompt, truth, number)


def score(tokenizer, question, rollouts, match=prefix_match, extract=extract_prediction):
    """Rollouts of one question -> Group. extract: extract_prediction, or box_at_once behind a closed thought."""
    predictions = [extract(tokenizer.decode_bytes(r.tokens)) for r in rollouts]
    return Group(question, rollouts, predictions, [float(match(p, question.truth)) for p in predictions])


@torch.no_grad()
def make_dense(model, tokenizer, groups, tokens_per_pass, conditional=False):
    """Give wrong predictions the model's probability of their first token after the context (appendix A).

    conditional: only in groups with a right one. A response without a box stays at 0.
    """
    for batch in micro_batches(groups, tokens_per_pass, lambda g: len(g.question.context)):
        contexts = [g.question.context for g in batch]
        layout = make_layout([(len(context), []) for context in contexts], model.device)
        tokens = torch.tensor(sum(contexts, []), device=model.device)
        hidden = model.packed_hidden(tokens, layout)[layout.last_rows]                   # (N, D)
        probabilities = linear(hidden, model.head).float().softmax(dim=-1)               # (N, V)
        for group, row in zip(batch, probabilities):
            firsts = [tokenizer.encode((p or b"").decode("utf-8", "replace"))[:1] for p in group.predictions]
            guessed = [row[first].item() if first else 0.0 for first in firsts]
            if conditional:
                group.rewards = conditional_dense(group.rewards, guessed)
            else:
                group.rewards = [dense(match, p) for match, p in zip(group.rewards, guessed)]


def sample_record(tokenizer, step, group, i):
    """One rollout in words, for samples.jsonl."""
    text = lambda raw: None if raw is None else raw.decode("utf-8", "backslashreplace")
    truth = group.question.truth
    return dict(step=step, context=text(tokenizer.decode_bytes(group.question.context[-CONTEXT_LOGGED:])),
                truth=truth if isinstance(truth, str) else text(b"".join(truth[:4])),
                response=text(tokenizer.decode_bytes(group.rollouts[i].tokens)),
                extracted=text(group.predictions[i]), reward=group.rewards[i])
