"""Reinforcement Pre-Training (arXiv 2506.08007): think, then predict what follows.

    python train_rpt.py                                               a demo on a laptop: demo.py
    python train_rpt.py --init DIR --corpus C --out-dir RUN ...       your model and text
    torchrun --standalone --nproc_per_node=8 train_rpt.py ...         on eight GPUs, the same update

Each step, from top to bottom of the loop at the end of this file:
    ROLLOUT     take positions in the text; for each one sample G thoughts with a prediction
    REWARD      1 if the predicted bytes are what really follows, up to the end of a token  (eq. 3)
    ADVANTAGE   reward minus the mean reward of the G rollouts about the same position
    UPDATE      policy gradient on the rollout tokens, once per batch: on-policy     (GRPO, eq. 4)
    LOG, SAVE   one line, metrics.jsonl, samples.jsonl; every --save-every steps a checkpoint

objectives/ defines what is asked and what counts as right. Where the paper leaves things open, we
chose: advantages are not divided by their standard deviation (--normalize-advantage does it), the
loss is a mean over all rollout tokens of the batch, and "gradient clip 0.2" bounds its norm.
"""
import math
import runpy
import signal
import sys
from functools import partial

if __name__ == "__main__":  # nothing is there to be saved while torch is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)
from plumbing import flags, parallel  # before torch: how its threads wait
import torch

import kernels
import objectives
from data.prompt import stop_ids
from data.tokenizer import Tokenizer
from model import GPT, read_config
from objectives import Group
from plumbing.batch import idle_micro_batch, pack
from plumbing.checkpoint import Run
from plumbing.log import RolloutBar, StepLog, flops_of_run, save_batch
from plumbing.optimizer import clip_gradients, make_optimizer
from sample import generate

BETAS = 0.9, 0.999      # of AdamW, the paper's Table 5; weight decay: plumbing/optimizer.py
MAX_NEW_TOKENS = 8192   # of a rollout, the paper's Table 5
MAX_DRAWS = 4           # dynamic sampling draws at most this many batches of positions a step


def group_advantages(rewards, normalize=False):
    """(N, G) rewards -> (N, G) advantages of each rollout against its own group of G.

    A group whose advantages are all 0 costs no update: `Objective.examples` leaves it out.
    """
    # The first reward is subtracted first, because the mean of equal rewards may be rounded.
    advantages = rewards - rewards[:, :1]
    advantages = advantages - advantages.mean(dim=1, keepdim=True)
    if normalize:
        # With rewards of 0 and 1, a single hit in eight then weighs 2.5 instead of 0.9.
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return advantages


def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """(S,) each, an entry per rollout token -> (S,) losses, (S,) whether each ratio was clipped.

    In the first update of a batch the ratio is 1 and the gradient is that of -advantage x logprob:
    REINFORCE. In later updates a token gains nothing by moving beyond the clip.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio != clipped


def collect(sampler, objective, step, cursor, args, log):
    """Think about fresh positions -> this rank's groups to train on, all its groups, new cursor.

    Dynamic sampling trains only on groups with a signal, and draws again while there are too few.
    """
    dynamic = 0 <= args.dynamic_sampling_from <= step
    wanted = args.batch_size                            # groups, over all ranks
    groups, everything = [], []
    for draw in range(MAX_DRAWS if dynamic else 1):
        # All ranks take the same positions, and each asks about its share of them.
        positions = objective.take(cursor, args.batch_size)
        cursor += args.batch_size
        mine = parallel.share(args.batch_size)
        questions = [objective.question(position) for position in positions[mine]]
        prompts = [question.prompt for question in questions]
        total = len(prompts) * args.rollouts
        with RolloutBar(total, f"step {step + 1}", parallel.NO_BAR) as bar:
            rollouts = generate(
                sampler, prompts, args.rollouts, args.max_new_tokens, args.temperature,
                stop_ids(objective.tokenizer), seed=(args.seed, step, draw),
                first_prompt=mine.start, max_rows=args.max_rows, kv_gb=args.kv_gb, on_tokens=bar,
                is_end=objective.is_end)
        log.lap("gen")

        # The objective fills in what each rollout predicts and what that is worth.
        drawn = [Group(question, some) for question, some in zip(questions, rollouts)]
        objective.score(sampler, drawn)
        for group in drawn:
            # An edited reward may return a bool or a number of numpy's.
            group.rewards = [float(reward) for reward in group.rewards]
            # What is right stays what it was when somebody edits what is paid.
            truth = group.question.truth
            group.hits = [objective.is_right(p, truth) for p in group.predictions]
        everything += drawn

        # Every rank learns which groups of all ranks can train, so that all keep the same ones.
        trains = [not dynamic or objective.trains(group) for group in drawn]
        trains = parallel.gather_lists(trains)
        kept = [i for i in range(args.batch_size) if trains[i]][:wanted]
        groups += [drawn[i - mine.start] for i in kept if mine.start <= i < mine.stop]
        wanted -= len(kept)
        log.lap("reward")
        if not wanted:
            break
    return groups, everything, cursor


def policy_update(model, optimizer, batches, size, args):
    """One step along the policy gradient (or --updates-per-batch of them) -> its metrics.

    batches: this rank's MicroBatches. size: what the loss is divided by, summed over all ranks: by
    default the number of rollout tokens, those of groups without a gradient included. So the update
    is the same however the batch is cut into micro-batches and shares. An update that is not finite
    is not applied: ValueError.
    """
    idle = idle_micro_batch(model.device)
    sums = torch.zeros(3, dtype=torch.float64, device=model.device)   # loss, clipped, gap
    for _ in range(args.updates_per_batch):
        optimizer.zero_grad()
        for batch in parallel.padded(batches, idle):
            logprobs = model.logprobs(batch.tokens, batch.layout, args.temperature)  # (S,)
            if batch.old_logprobs is None:
                batch.old_logprobs = logprobs.detach()
            drift = batch.old_logprobs - batch.sampled_logprobs       # trainer - sampler
            losses, clipped = policy_loss(logprobs, batch.old_logprobs, batch.advantages,
                                          args.clip_low, args.clip_high)
            if args.importance_cap:
                # A token that the sampler drew too often counts less, one drawn too rarely more.
                losses = losses * drift.exp().clamp(max=args.importance_cap)
            loss = losses.sum() / size
            loss.backward()
            if batch is not idle:
                parts = loss.detach().double(), clipped.sum(), drift.abs().sum()
                sums += torch.stack(parts)

        grad_norm = clip_gradients(model, args.grad_clip)
        if not math.isfinite(grad_norm):
            path = f"{args.out_dir}/bad_batch.jsonl"
            save_batch(path, batches)
            raise ValueError(f"gradient norm is {grad_norm}: the update was not applied, the last "
                             f"checkpoint is good; the batch is in {path}")
        # Without a gradient AdamW would still decay the weights and coast on its momentum.
        if grad_norm > 0:
            optimizer.step()

    loss, clipped, gap = parallel.total(*sums.tolist())
    tokens = sum(len(batch.advantages) for batch in batches)
    trained = sum(len(batch.tokens) for batch in batches)
    tokens, trained = parallel.total(tokens, trained)
    updates = args.updates_per_batch
    tokens = updates * tokens or math.nan               # NaN: no group had a gradient
    return dict(loss=loss / updates, clip_frac=clipped / tokens, logp_gap=gap / tokens,
                grad_norm=grad_norm, trained_tokens=updates * trained)


def check_prompts_fit(longest_prompt, args):
    """ValueError before the run starts if a prompt and a rollout may not fit in a micro-batch."""
    least = longest_prompt + args.max_new_tokens
    if least > args.tokens_per_micro_batch:
        raise ValueError(f"a prompt of {longest_prompt} and a rollout of {args.max_new_tokens} "
                         "tokens do not fit in --tokens-per-micro-batch "
                         f"{args.tokens_per_micro_batch}: {least} is the least that would do; "
                         "lower --max-prompt-tokens or --max-new-tokens, or raise it")


def parse_args(words=None):
    parser = flags.Parser("Reinforcement Pre-Training. Without arguments: the demo.",
                          hint="; the demo with flags is python demo.py")
    add, at_least = parser.add_argument, flags.at_least
    # what to train on
    add("--init", required=True, help="checkpoint folder (Hugging Face layout) to start from")
    add("--out-dir", required=True, help="folder of this run")
    add("--objective", default="rpt", choices=objectives.names(),
        help="what is asked and what counts as right: a file in objectives/")
    add("--corpus", help="text: folder written by data/prepare.py and scored by data/filter.py")
    add("--data", metavar="FILE", help="answers: JSON lines, each a question and its answer")
    flags.add_question_flags(add)
    add("--proxy",
        help="checkpoint whose entropies choose the positions; default: the only one there is")
    add("--entropy-threshold", type=at_least(0, float), default=1.0,
        help="train on positions above this entropy, nats")
    add("--template", default="v0",
        help="text: a name in data/prompt.py, such as short; answers: chat or short")
    # sampling
    add("--steps", type=at_least(1), default=1000, help="training steps, a batch each")
    add("--match-compute", metavar="RUN",
        help="end before --steps, once this run has spent as many FLOPs as that one")
    add("--batch-size", type=at_least(1), default=256, help="positions in a batch, over all ranks")
    add("--rollouts", type=at_least(2), default=8, metavar="G", help="thoughts about each position")
    add("--max-prompt-tokens", type=at_least(1), default=4096,
        help="longer contexts lose their beginning")
    flags.add_length_flag(add, MAX_NEW_TOKENS)
    add("--temperature", type=at_least(1e-3, float), default=0.8, help="of sampling and the loss")
    add("--dynamic-sampling-from", type=int, default=500, metavar="STEP",
        help="from this step on replace groups whose rewards are all equal; -1: never")
    flags.add_cache_flags(add)
    # update
    add("--lr", type=at_least(0, float), default=1e-6, help="learning rate of AdamW, constant")
    add("--grad-clip", type=at_least(1e-3, float), default=0.2, help="largest gradient norm")
    add("--normalize-advantage", action="store_true",
        help="divide by the standard deviation of the group")
    add("--updates-per-batch", type=at_least(1), default=1,
        help="1 is on-policy; above 1 the probability ratio is clipped")
    add("--clip-low", type=at_least(0, float), default=0.2,
        help="clip the probability ratio at 1 minus this")
    add("--clip-high", type=at_least(0, float), default=0.2,
        help="clip the probability ratio at 1 plus this")
    add("--importance-cap", type=at_least(0, float), default=0.0, metavar="C",
        help="weight each token by min(C, trainer's / sampler's probability), for kernels that are "
             "not bitwise; 0: off")
    flags.add_update_flags(add)
    flags.add_run_flags(add, save_every=50)
    add("--kernels", default=kernels.requested,
        help="torch, fast or bitwise (kernels/__init__.py); default: NANORPT_KERNELS if set, else "
             "bitwise on a GPU, so that logp_gap is 0, and torch on a CPU")
    args = parser.parse_args(words)
    kernels.set_backend(args.kernels)
    args.kernels = kernels.backend(torch.device(args.device))
    return args


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    if len(sys.argv) == 1 and parallel.WORLD == 1:
        runpy.run_path(f"{flags.ROOT}/demo.py", run_name="__main__")
        sys.exit()
    args = parse_args()
    device = parallel.start(args.device)
    run = Run(args)
    budget = flops_of_run(args.match_compute) if args.match_compute else math.inf
    source = run.checkpoint or args.init
    tokenizer = Tokenizer.load(source, for_model=True)
    Objective = objectives.load(args.objective)
    config = read_config(source)
    args.max_new_tokens = flags.new_tokens(args.max_new_tokens, MAX_NEW_TOKENS,
                                           config.max_positions)
    objective = Objective(args, tokenizer, config)
    check_prompts_fit(objective.longest_prompt(), args)
    shard = partial(parallel.shard, reshard=args.reshard, ranks_per_copy=args.ranks_per_copy)
    model = GPT.from_pretrained(source, device=device, shard=shard,
                                compute_dtype=flags.compute_dtype(args))
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = make_optimizer(model, args.lr, BETAS, bf16_moments=args.bf16_moments)
    run.open(model, optimizer)
    log = StepLog(args, model, tokenizer)
    spent = flops_of_run(args.out_dir) if args.match_compute and run.step else 0
    if spent >= budget:
        args.steps = run.step
    parallel.print0(f"{log.parameters:,} parameters, {len(objective.positions):,} positions, "
                    f"steps {run.step} to {args.steps} of {args.batch_size} x {args.rollouts} "
                    "rollouts")

    for step in range(run.step, args.steps):
        # ROLLOUT and REWARD: think about fresh positions; the text itself tells what was right.
        log.start()
        sampler = parallel.gathered(model)              # whole on every rank; bf16 on a GPU
        groups, everything, cursor = collect(sampler, objective, step, run.cursor, args, log)
        del sampler                                     # frees memory for the update

        # ADVANTAGE: better or worse than the other rollouts about the same position?
        rewards = torch.tensor([group.rewards for group in groups]).view(-1, args.rollouts)
        advantages = group_advantages(rewards, args.normalize_advantage).tolist()        # (N, G)

        # UPDATE: one step along the policy gradient.
        examples, size = objective.examples(groups, advantages, step)
        batches = pack(examples, args.tokens_per_micro_batch, device)
        [size] = parallel.total(size)
        update = policy_update(model, optimizer, batches, max(size, 1), args)
        # Gradients and micro-batches make room for the next sampling.
        optimizer.zero_grad()
        del batches
        log.lap("train")

        # LOG and SAVE.
        run.step, run.cursor = step + 1, cursor
        spent += log.write(run.step, everything, update)["flops"]
        if spent >= budget:
            args.steps = run.step
        is_over = run.is_over()
        if is_over or run.is_due():
            run.save(model, tokenizer, optimizer)
        if is_over:
            break
    if run.step == args.steps and spent < budget < math.inf:
        parallel.print0(f"--steps {args.steps} came first: {spent:.2e} of the {budget:.2e} FLOPs "
                        f"of {args.match_compute} are spent")
    run.farewell(f", curves: python plot.py {args.out_dir}")
