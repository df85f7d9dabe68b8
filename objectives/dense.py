"""RPT with the paper's dense reward (appendix A): a wrong prediction earns its probability.

    1                     for a prediction that begins with the first true token
    P(its first token)    otherwise: the policy's probability after the context, without a thought
    0                     without a box

In objectives/conditional_dense.py groups without a right prediction get 0 throughout.
"""
import torch

from kernels.linear import linear
from objectives import first_token
from plumbing.batch import cut, flatten


class Objective(first_token.Objective):
    conditional = False

    @torch.no_grad()
    def score(self, policy, groups):
        super().score(policy, groups)
        for run in cut(groups, self.args.tokens_per_micro_batch, count_context):
            contexts = [(self.tokenizer.bos + group.question.context, []) for group in run]
            tokens, layout = flatten(contexts, policy.device)
            hidden = policy.hidden(tokens, layout.positions, layout.attend)[layout.last_rows]
            probabilities = linear(hidden, policy.head).float().softmax(dim=-1)          # (N, V)
            for group, of_next_token in zip(run, probabilities):
                group.scoring_tokens = count_context(group)
                if any(group.rewards) or not self.conditional:
                    self.fill_in(group, of_next_token)

    def fill_in(self, group, probabilities):
        """Give each wrong prediction the probability of its first token; probabilities: (V,)."""
        for i, prediction in enumerate(group.predictions):
            text = (prediction or b"").decode("utf-8", "replace")
            first = self.tokenizer.encode(text)[:1]
            if first and not group.rewards[i]:
                group.rewards[i] = probabilities[first[0]].item()


def count_context(group):
    return len(group.question.context)
