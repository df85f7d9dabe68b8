r"""RPT: at a position in ordinary text, think, then predict what follows (the paper's section 3).

    prompt     template, the text before the position, template, <think>
    rollout    ... </think> \boxed{prediction}
    reward     1 if the predicted bytes are the next true tokens, one or several; else 0  (eq. 3)

Positions are those where a proxy model's entropy is above --entropy-threshold nats and a box can
hold the true token.
"""
from data.corpus import load_corpus
from data.positions import answerable, find_scores, load_positions
from data.prompt import build_prompt, template_ids
from objectives import Base, Question
from reward import extract_prediction, prefix_match

TRUTH_TOKENS = 32  # the longest prediction that can be right; the paper does not say


class Objective(Base):
    extract = staticmethod(extract_prediction)  # bytes of a rollout -> the prediction, or None

    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        if not args.corpus:
            raise ValueError(f"--objective {args.objective} needs --corpus")
        self.corpus = load_corpus(args.corpus)
        self.corpus.check(tokenizer, args.init)
        self.template = template_ids(tokenizer, args.template)
        # Which positions to train on; to try another choice, edit these lines. Each row is
        # (index into corpus.tokens, start and end of its document), in any order.
        scores = find_scores(self.corpus, args.proxy)
        self.positions = load_positions(self.corpus, scores, args.entropy_threshold, "train",
                                        answerable(tokenizer))

    def question(self, position):
        return ask(self.corpus, self.tokenizer, position, self.template, self.longest)

    def longest_prompt(self):
        """The longest context makes the longest prompt."""
        lengths = self.positions[:, 0] - self.positions[:, 1]            # of the contexts
        return len(self.question(self.positions[lengths.argmax()]).prompt)

    def score(self, policy, groups):
        for group in groups:
            group.predictions = predictions(self.tokenizer, group.rollouts, self.extract)
            group.rewards = [self.reward(p, group.question.truth) for p in group.predictions]

    def reward(self, prediction, truth):
        """What a prediction is worth, any float. prediction: bytes, or None without a box.

        truth: the raw bytes of each of the next true tokens, TRUTH_TOKENS of them at most.
        """
        return prefix_match(prediction, truth)


def ask(corpus, tokenizer, position, template, longest):
    """A row of `load_positions` -> Question; a context that is too long loses its beginning."""
    t, start, end = map(int, position)
    truth = [tokenizer.token_bytes(int(id)) for id in corpus.tokens[t:min(end, t + TRUTH_TOKENS)]]
    context = corpus.tokens[max(start + len(tokenizer.bos), t - longest):t].tolist()
    return Question(build_prompt(context, *template, longest), truth, context, t)


def predictions(tokenizer, rollouts, extract=extract_prediction):
    """The bytes in the box of each rollout, or None."""
    return [extract(tokenizer.decode_bytes(rollout.tokens)) for rollout in rollouts]
