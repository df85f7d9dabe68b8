r"""RLP, Reinforcement as a Pretraining Objective (arXiv 2510.01265): rewards what a thought adds.

    prompt       as in RPT
    rollout      a thought c and </think>, nothing else
    reward       r = log p(x_t | x_<t, c) - log p(x_t | x_<t), in nats; x_t: true token  (eq. 5)
    advantage    G / (G - 1) (r - mean r)                                                (eq. 7)
    loss         over thought tokens: a mean for each thought, then over thoughts        (eq. 8)

No prediction is sampled and no verifier asked, so a group has a signal unless its thoughts are the
same. Scores are taken at temperature 1, and no gradient flows through them. A thought that was cut
off is closed before it is scored, or the reward would depend on where its sentence broke off.

What differs: in the paper the second score is that of a moving average of the policy's weights. It
has not seen the thought, so it depends on the position alone and drops out of eq. 7; here there is
no second model, and the reward that is logged takes the policy itself. And our models put what they
predict into a box, so that is where the score is taken: behind </think> they would write \boxed,
whatever they think. For a model that has never boxed, PREDICT = "" is the paper's way. The paper's
constants: G 16, temperature 0.7, thoughts of 2,048 tokens, batch 512, lr 1e-6, no KL.
"""
from objectives import rpt
from plumbing.likelihood import count_tokens, read

CLOSE = "</think>"
PREDICT = r"\boxed{"   # between the thought and the true token


class Objective(rpt.Objective):
    TARGETS = 1        # true tokens to be scored

    def __init__(self, args, tokenizer, config):
        super().__init__(args, tokenizer, config)
        self.close = tokenizer.encode(CLOSE, special=True)
        self.predict = tokenizer.encode(PREDICT)
        # What is scored lies behind the longest rollout, and needs positions too.
        more = len(self.close + self.predict) + self.TARGETS
        self.longest = min(self.longest, config.max_positions - args.max_new_tokens - more)

    def is_end(self, tokens):
        """Is the thought closed? </think> may be several tokens, of a byte or more each."""
        return CLOSE.encode() in self.tokenizer.decode_bytes(tokens[-len(CLOSE):])

    def targets(self, question):
        """-> ids of the true tokens to be scored."""
        t = question.position
        return self.corpus.tokens[t:t + len(question.truth)][:self.TARGETS].tolist()

    def closed(self, rollout):
        """-> ids of a thought, closed, as far as the true token."""
        if self.is_end(rollout.tokens):
            return rollout.tokens + self.predict
        # It was cut off, or ended with a stop token.
        thought = rollout.tokens[:-1] if rollout.finished else rollout.tokens
        return thought + self.close + self.predict

    def thought(self, rollout):
        """-> the bytes of a thought, without what ends it."""
        return self.tokenizer.decode_bytes(self.closed(rollout)).partition(CLOSE.encode())[0]

    def with_thoughts(self, group):
        """-> the texts whose ends are scored, as `read` takes them."""
        targets = self.targets(group.question)
        return [(group.question.prompt, [(self.closed(r), targets) for r in group.rollouts])]

    def without(self, question):
        """-> the same without a thought: as much of the context as the prompt has."""
        lost = len(question.context) + sum(map(len, self.template)) - len(question.prompt)
        context = self.tokenizer.bos + question.context[lost:]
        return context, [([], self.targets(question))]

    def score(self, policy, groups):
        texts = [self.with_thoughts(group) for group in groups]
        plain = [self.without(group.question) for group in groups]
        budget = self.args.tokens_per_micro_batch
        scores = iter(sum(read(policy, sum(texts, []), budget), []))        # one for each rollout
        for group, some, base, [(before, _)] in zip(groups, texts, plain,
                                                    read(policy, plain, budget)):
            group.scored = [next(scores) for _ in group.rollouts]
            gains = [sum(after) - sum(before) for after, _ in group.scored]
            group.rewards = list(map(self.worth, gains, group.rollouts))
            # For the metrics: the likeliest token behind a closed thought stands for a prediction.
            group.predictions = [
                self.tokenizer.decode_bytes([guess]) if self.is_end(rollout.tokens) else None
                for rollout, (_, guess) in zip(group.rollouts, group.scored)]
            group.measures = dict(plain_logprob=[sum(before)] * len(group.rollouts))
            group.scoring_tokens = sum(map(count_tokens, [*some, base]))

    def worth(self, gain, rollout):
        return gain

    def lesson(self, group, rollout):
        """-> ids of a thought with the true text behind it, in a box if there is one."""
        text = self.closed(rollout) + self.targets(group.question)
        return text + self.tokenizer.encode("}" if PREDICT else "") + [self.tokenizer.eos_id]

    def lessons(self, group):
        """Every thought, right or wrong: they teach how far to trust it."""
        return [self.lesson(group, rollout) for rollout in group.rollouts]

    def examples(self, groups, advantages, step):
        examples, _ = super().examples(groups, advantages, step)
        unbiased = self.args.rollouts / (self.args.rollouts - 1)
        for example in examples:
            example.advantages = [[unbiased * a / len(thought) for a in thought]
                                  for thought in example.advantages]
        return examples, sum(len(group.rollouts) for group in groups)
