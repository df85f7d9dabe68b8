"""AdamW with moments in fp32 or in bf16, and the gradient clip.

The moments are allocated before the first step, so that memory does not grow after it; a resumed
run fills them in place. In bf16 they take 4 bytes a parameter instead of 8. Rounding to nearest
would freeze the second moment, because a step changes it by about 0.1 % (beta 0.999) while
neighbouring bf16 numbers are 0.4 % apart. So moments are rounded up or down at random such that the
mean is exact, with random bits that are a function of (step, parameter, part).
"""
import torch
from torch.optim.adamw import adamw

from plumbing import parallel

WEIGHT_DECAY = 0.01  # the paper's Table 5


def make_optimizer(model, lr, betas, weight_decay=WEIGHT_DECAY, bf16_moments=False):
    """-> AdamW over all parameters, its moments allocated."""
    kind = AdamW16 if bf16_moments else torch.optim.AdamW
    optimizer = kind(model.parameters(), lr=lr, betas=betas, weight_decay=weight_decay, fused=True)
    dtype = torch.bfloat16 if bf16_moments else None
    for weight in model.parameters():
        optimizer.state[weight] = dict(
            step=torch.zeros((), device=weight.device, dtype=torch.float32),
            exp_avg=torch.zeros_like(weight, dtype=dtype),
            exp_avg_sq=torch.zeros_like(weight, dtype=dtype))
    return optimizer


class AdamW16(torch.optim.AdamW):
    """AdamW in fp32, one parameter at a time; moments are bf16 between the steps."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            weights = group["params"]
            generator = torch.Generator(weights[0].device)
            # How many steps each weight has taken: none while it is frozen. Read all at once,
            # because to read a number means to wait for the GPU.
            taken = torch.stack([self.state[weight]["step"] for weight in weights]).tolist()
            for i, weight in enumerate(weights):
                if weight.grad is None:
                    continue
                step = int(taken[i]) + 1
                state = self.state[weight]
                kept = [parallel.local(state[name]) for name in ("exp_avg", "exp_avg_sq")]
                m, v = (moment.float() for moment in kept)
                adamw([parallel.local(weight)], [parallel.local(weight.grad)], [m], [v], [],
                      [state["step"]], fused=True, amsgrad=False, maximize=False,
                      beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                      weight_decay=group["weight_decay"], eps=group["eps"])
                part, parts = parallel.part(weight)
                generator.manual_seed((step * len(weights) + i) * parts + part)
                for moment, exact in zip(kept, (m, v)):
                    moment.copy_(round_at_random(exact, generator))


def round_at_random(x, generator):
    """fp32 -> bf16, up or down by 16 random bits such that the mean is exact."""
    bits = torch.randint(1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    return ((x.view(torch.int32) + bits) & -(1 << 16)).view(torch.float32).bfloat16()


def clip_gradients(model, largest):
    """Scale gradients to a norm over all ranks of at most `largest` -> the norm before."""
    return parallel.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), largest)).item()
