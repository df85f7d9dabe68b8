"""AdamW, with moments in fp32 or in bf16.

The moments exist from the start: what fits in the first step fits in all, and a resumed run fills them in place.
In bf16 they take 4 bytes of memory a parameter instead of 8. Rounding to nearest would freeze the second one: a
step changes it by about 0.1 % (beta 0.999), a bf16 number has steps of 0.4 %. So they are rounded up or down at
random, right on average (stochastic rounding); the random bits are a function of (step, parameter, part).
"""
import torch
from torch.optim.adamw import adamw

from plumbing import parallel


def make_optimizer(model, lr, betas, weight_decay, bf16_moments=False):
    """-> AdamW over all parameters, its moments allocated."""
    kind = AdamW16 if bf16_moments else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    for weight in model.parameters():
        zeros = lambda: torch.zeros_like(weight, dtype=torch.bfloat16 if bf16_moments else None)
        optimizer.state[weight] = dict(step=torch.zeros((), device=weight.device, dtype=torch.float32),
                                       exp_avg=zeros(), exp_avg_sq=zeros())
    return optimizer


class AdamW16(torch.optim.AdamW):
    """The same update in fp32, one parameter at a time; only what is kept until the next step is bf16."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            generator = torch.Generator(group["params"][0].device)
            for i, weight in enumerate(group["params"]):
                if weight.grad is None:
                    continue
                state = self.state[weight]
                kept = [parallel.local(state[name]) for name in ("exp_avg", "exp_avg_sq")]
                m, v = (moment.float() for moment in kept)
                adamw([parallel.local(weight)], [parallel.local(weight.grad)], [m], [v], [], [state["step"]],
                      fused=True, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1],
                      lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
                if i == 0:
                    step = int(state["step"])
                part, parts = parallel.part(weight)
                generator.manual_seed((step * len(group["params"]) + i) * parts + part)
                for moment, exact in zip(kept, (m, v)):
                    moment.copy_(round_at_random(exact, generator))


def round_at_random(x, generator):
    """fp32 -> bf16, up or down with the probabilities that make the mean exact: 16 random bits decide."""
    bits = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32).bfloat16()
