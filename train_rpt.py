"""Reinforcement Pre-Training (arXiv 2506.08007): think, predict what follows, be right.

    python train_rpt.py                                                      ten minutes on a laptop: demo.py
    python train_rpt.py --init DIR --corpus C --out-dir RUN --template v6    your model and text (README.md)
    torchrun --standalone --nproc_per_node=8 train_rpt.py --init DIR ...     on eight GPUs: the same update
    python train_rpt.py --plan --init DIR --gpus 8 --gpu-gb 80 ...           will it fit? Nothing is loaded

Every step, top to bottom at the end of this file:
    ROLLOUT     take B positions in the corpus; the context is the prompt; sample G thoughts with a prediction
    REWARD      1 if the predicted bytes are what really follows, up to the end of a token; else 0     (eq. 3)
    ADVANTAGE   reward minus the mean reward of the G rollouts of the same position
    UPDATE      policy gradient on the response tokens, once per batch: exactly on-policy        (GRPO, eq. 4)
    LOG         one line, metrics.jsonl, samples.jsonl

What the paper leaves open, and our choice: advantages are not divided by their standard deviation
(--normalize-advantage does), the loss is a mean over all response tokens of the batch, and "gradient clip
0.2" is read as the norm of the gradient. On-policy the loss is about 0 by construction; watch `reward` and
`grad_norm`.
"""
import argparse
import math
import sys
import time
from functools import partial

import numpy as np
import torch

import kernels
from plumbing import parallel
from plumbing.alarms import blame, watcher
from plumbing.checkpoint import (append, catch_interrupts, checkpoint_to_resume, latest_checkpoint, load_trainer, open_run,
                        save_checkpoint)
from plumbing.flags import speak_once
from data.filter import find_scores, load_positions
from data.prepare import load_corpus
from data.prompt import stop_ids, template_ids
from data.tokenizer import Tokenizer
from data.answers import answers_equal
from eval_tasks import ASK, read_questions
from kernels.attention import make_layout
from model import GPT, read_config
from plumbing.optimizer import make_optimizer
from plumbing.parallel import print0
from reward import box_at_once, extract_prediction
from sample import generate, rollout_bar
from task import REWARDS, exact_question, make_dense, make_question, sample_record, score
from train_ntp import check_range, clip_gradients, join_idly, micro_batches, shuffled

SAMPLES_LOGGED = 2                           # rollouts written to samples.jsonl each step
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bf16, dense; mfu is 0 on hardware not listed


def group_advantages(rewards, normalize=False):
    """(N, G) rewards -> (N, G) advantages of each rollout against its own group of G."""
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize:  # with 0/1 rewards this gives one hit in eight a weight of 2.5 instead of 0.9
        advantages = advantages / (rewards.std(dim=1, keepdim=True) + 1e-6)
    return advantages


def policy_loss(logprobs, old_logprobs, advantages, clip_low, clip_high):
    """(S,) each, one entry per response token -> loss of each token, and whether its ratio was clipped.

    In the first update of a batch the ratio is 1 and the gradient is advantage x grad logprob: REINFORCE.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages), ratio != clipped


def pack(groups, advantages, budget):
    """Groups and G advantages for each -> micro-batches, lists of (prompt, [(rollout, advantage), ...]).

    A micro-batch has at most `budget` tokens. A group that has more is split by rollouts, and its prompt is
    computed once for every part. ValueError for a rollout that does not fit with its prompt.
    """
    pieces = []
    for group, row in zip(groups, advantages):
        prompt, size = group.question.prompt, math.inf
        for rollout, advantage in zip(group.rollouts, row):
            check_budget(len(prompt), len(rollout.tokens), budget)
            if size + len(rollout.tokens) > budget:
                pieces.append((prompt, []))
                size = len(prompt)
            pieces[-1][1].append((rollout, advantage))
            size += len(rollout.tokens)
    return list(micro_batches(pieces, budget, piece_tokens))


def check_budget(prompt, response, budget):
    if prompt + response > budget:
        raise ValueError(f"a prompt of {prompt} and a response of {response} tokens do not fit in "
                         f"--tokens-per-micro-batch {budget}: {prompt + response} is the least that would do; "
                         "lower --max-prompt-tokens or --max-new-tokens, or raise it")


def piece_tokens(piece):
    prompt, responses = piece
    return len(prompt) + sum(len(rollout.tokens) for rollout, _ in responses)


def forward_pieces(model, pieces, temperature):
    """A micro-batch -> log-probs and entropy of its response tokens, (S,) each; a prompt runs once."""
    layout = make_layout([(len(prompt), [len(r.tokens) for r, _ in responses]) for prompt, responses in pieces],
                         model.device)
    tokens = [t for prompt, responses in pieces for t in prompt + [t for r, _ in responses for t in r.tokens]]
    return model.logprobs(torch.tensor(tokens, device=model.device), layout, temperature)


def accumulate(model, pieces, old, total_tokens, args):
    """Add a micro-batch to the gradients -> its log-probs (S,), and the sums loss, clipped tokens, gap (3,).

    old: log-probs before the first update of this batch; None in that update, where they are these.
    """
    if pieces is None:
        join_idly(model)
        return None, 0
    per_token = lambda values: torch.tensor(values, device=model.device)
    responses = [pair for _, responses in pieces for pair in responses]
    logprobs, entropy = forward_pieces(model, pieces, args.temperature)                  # (S,)
    old = logprobs.detach() if old is None else old
    advantages = per_token([a for rollout, a in responses for _ in rollout.tokens])      # (S,)
    drift = old - per_token([p for rollout, _ in responses for p in rollout.logprobs])   # trainer - sampler
    losses, clipped = policy_loss(logprobs, old, advantages, args.clip_low, args.clip_high)
    if args.importance_cap:  # what the sampler drew too often counts less, at most this many times
        losses = losses * drift.exp().clamp(max=args.importance_cap)
    if args.entropy_coef:  # its gradient would cost even where it is zero
        losses = losses - args.entropy_coef * entropy
    del entropy            # or what its gradient would need stays until the backward has ended
    loss = losses.sum() / total_tokens
    loss.backward()
    return old, torch.stack([loss.detach().double(), clipped.sum(), drift.abs().sum()])


def policy_step(model, optimizer, groups, advantages, args):
    """One batch -> updated weights and metrics. groups: this rank's; advantages: G floats for each of them.

    The loss is divided by the response tokens of all ranks: neither micro-batches nor ranks change anything.
    ValueError before an update that is not finite, with the batch saved.
    """
    on_device = lambda values: torch.tensor(values, dtype=torch.float64, device=model.device)
    response_tokens = lambda groups: sum(len(r.tokens) for g in groups for r in g.rollouts)
    total_tokens = parallel.sum_over_ranks(on_device([response_tokens(groups)])).item()
    work = [(g, a) for g, a in zip(groups, advantages) if any(a) or args.entropy_coef]  # no gradient else
    alive = [g for g, _ in work]
    batches = pack(alive, [a for _, a in work], args.tokens_per_micro_batch)
    trained = sum(piece_tokens(piece) for pieces in batches for piece in pieces)
    batches = parallel.padded(batches)

    def gradient(batches, old):
        """Gradients of these micro-batches, and no others -> the sums of `accumulate`; fills in old."""
        optimizer.zero_grad()
        sums = on_device([0, 0, 0])
        for i, pieces in enumerate(batches):
            old[i], part = accumulate(model, pieces, old[i], total_tokens, args)
            sums += part
        return parallel.sum_over_ranks(sums).tolist()

    def norm_of(groups, advantages):
        alone = parallel.padded(pack(groups, advantages, args.tokens_per_micro_batch))
        gradient(alone, [None] * len(alone))
        return clip_gradients(model, args.grad_clip)

    old, totals = [None] * len(batches), np.zeros(3)
    for _ in range(args.updates_per_batch):
        sums = gradient(batches, old)
        grad_norm = clip_gradients(model, args.grad_clip)
        if not math.isfinite(grad_norm + sums[0]):
            raise blame(groups, advantages, norm_of, f"{args.out_dir}/bad_batch.jsonl",
                        f"loss is {sums[0]:.4g} and gradient norm is {grad_norm:.4g}")
        if grad_norm > 0:  # all groups dead: AdamW would still decay the weights and coast on its momentum
            optimizer.step()
        totals += np.array(sums) / args.updates_per_batch
    responses, trained = parallel.sum_over_ranks(on_device([response_tokens(alive), trained])).tolist()
    responses = responses or math.nan                                                # no group had a gradient
    return dict(loss=totals[0], clip_frac=totals[1] / responses, logp_gap=totals[2] / responses,
                grad_norm=grad_norm, trained_tokens=trained * args.updates_per_batch)


def group_tokens(group):
    return len(group.question.prompt) + sum(len(r.tokens) for r in group.rollouts)


def rollout_metrics(groups):
    """Groups of all ranks -> what they say about the policy; the entropy is estimated by -mean logprob."""
    rollouts = [r for g in groups for r in g.rollouts]
    rewards = np.array([g.rewards for g in groups])                                      # (N, G)
    tokens = sum(len(r.tokens) for r in rollouts)
    hits = [len(p) for g in groups for p, reward in zip(g.predictions, g.rewards) if reward == 1]
    return dict(reward=rewards.mean(), reward_std=rewards.std(),
                frac_zero_std=(rewards.std(axis=1) == 0).mean(),
                reward_pass_at_g=rewards.max(axis=1).mean(), match_len=np.mean(hits) if hits else math.nan,
                format_rate=np.mean([p is not None for g in groups for p in g.predictions]),
                tokens=tokens, len_mean=tokens / len(rollouts),
                frac_truncated=np.mean([not r.finished for r in rollouts]),
                entropy=-sum(sum(r.logprobs) for r in rollouts) / tokens)


def step_line(steps, m):
    gap = m["logp_gap"]
    gap = "-" if math.isnan(gap) else f"{gap:.1e}" if gap else "0.0"  # NaN: no group had a gradient
    return (f"step {m['step']:05d}/{steps:05d} | reward {m['reward']:.3f} | fmt {m['format_rate']:.2f} | "
            f"zero_std {m['frac_zero_std']:.2f} | ent {m['entropy']:.2f} | len {m['len_mean']:.0f} | "
            f"gnorm {m['grad_norm']:.2f} | gap {gap} | gen {m['gen_tok_s']:,.0f} tok/s | "
            f"train {m['train_tok_s']:,.0f} tok/s | dt {m['dt_gen'] + m['dt_reward'] + m['dt_train']:.1f}s")


def parse_args(words=None):
    """words: of the command line; default: those of this process."""
    words = sys.argv[1:] if words is None else words
    plan = "--plan" in words             # needs no text and no folder, and is mostly for other machines
    parser = argparse.ArgumentParser(description="Reinforcement Pre-Training. Without arguments: the demo.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # what to train
    add("--init", required=True, help="checkpoint folder (Hugging Face layout) to start from")
    add("--corpus", default=None, help="lm: folder written by data/prepare.py and scored by data/filter.py")
    add("--proxy", default=None,
        help="checkpoint whose entropies choose the positions; default: the only one there is")
    add("--out-dir", required=not plan, help="folder of this run")
    add("--task", default="lm", choices=["lm", "answers"],
        help="lm: predict what follows in text; answers: solve questions with exact answers, from --data")
    add("--data", default=None, metavar="FILE", help="answers: JSON lines of question and answer")
    add("--reward", default="prefix", choices=REWARDS, help="lm: what a prediction is worth (appendix A)")
    add("--no-thought", action="store_true", help="the prompt closes the thought at once: a control")
    add("--entropy-threshold", type=float, default=1.0, help="train on positions above this entropy, nats")
    add("--template", default="v0", help="lm: v0 to v6 or short (data/prompt.py); answers: chat or short")
    # sampling
    add("--steps", type=int, default=1000, help="batches")
    add("--batch-size", type=int, default=256, help="positions in a batch, over all ranks")
    add("--rollouts", type=int, default=8, metavar="G", help="thoughts for each position")
    add("--max-prompt-tokens", type=int, default=4096, help="longer contexts lose their beginning")
    add("--max-new-tokens", type=int, default=8192, help="tokens of a response")
    add("--temperature", type=float, default=0.8, help="of sampling and of the loss")
    add("--dynamic-sampling-from", type=int, default=500, metavar="STEP",
        help="from here on replace groups whose rewards are all equal by new positions; -1: never")
    add("--max-rounds", type=int, default=4, help="batches that dynamic sampling draws for one step at most")
    add("--max-rows", type=int, default=256, help="rollouts decoded at a time")
    add("--kv-gb", type=float, default=None, help="memory for keys and values; default: half of what is there")
    # update
    add("--lr", type=float, default=1e-6, help="learning rate of AdamW(0.9, 0.999), constant")
    add("--weight-decay", type=float, default=0.01)
    add("--grad-clip", type=float, default=0.2, help="largest gradient norm")
    add("--updates-per-batch", type=int, default=1, help="1 is on-policy; above, the ratio is clipped")
    add("--clip-low", type=float, default=0.2, help="ratios below 1 - this earn nothing more")
    add("--clip-high", type=float, default=0.2, help="ratios above 1 + this earn nothing more")
    add("--importance-cap", type=float, default=0.0, metavar="C",
        help="weigh tokens by min(C, trainer's / sampler's probability): for kernels not bitwise; 0: off")
    add("--entropy-coef", type=float, default=0.0, help="weight of an entropy bonus")
    add("--normalize-advantage", action="store_true", help="divide by the group's standard deviation")
    # memory
    add("--tokens-per-micro-batch", type=int, default=16384, help="bounds memory; changes nothing else")
    add("--checkpoint-activations", action="store_true",
        help="keep one activation a block and compute the rest again in the backward: a quarter more work")
    add("--bf16-moments", action="store_true", help="AdamW's moments in bf16: 4 bytes a parameter less")
    add("--reshard", action="store_true",
        help="above one rank: free a block's gathered weights after its forward, gather them again")
    add("--ranks-per-copy", type=int, default=0, metavar="N",
        help="above one rank: N of them share the weights, the others hold copies (HSDP); 0: all share")
    # the run
    add("--save-every", type=int, default=50, help="steps between checkpoints")
    add("--resume", action="store_true", help="continue the run in --out-dir, if there is one")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if plan or torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    add("--kernels", default=kernels.asked,
        help="torch, fast or bitwise (kernels/__init__.py); default: NANORPT_KERNELS if set, else bitwise on a "
             "GPU, which is to make logp_gap 0, and torch on a CPU")
    # before the run
    add("--plan", action="store_true", help="print the memory that a run with these flags takes, and stop")
    add("--gpus", type=int, default=8, metavar="N", help="--plan: GPUs (processes with --device cpu)")
    add("--gpu-gb", type=float, default=80, metavar="GB", help="--plan: memory of each, 10^9 bytes")
    args = parser.parse_args(words)
    needed = "data" if args.task == "answers" else "corpus"
    if not (plan or getattr(args, needed)):
        raise ValueError(f"--task {args.task} needs --{needed}")
    if args.task == "answers" and args.reward != "prefix":
        raise ValueError(f"--reward {args.reward} is for --task lm: exact answers are right or wrong")
    if args.task == "answers" and args.template not in ASK:
        raise ValueError(f"--task answers: --template {args.template} is none of {', '.join(ASK)}")
    kernels.use(args.kernels)
    args.kernels = kernels.chosen(torch.device(args.device))
    check_range(args, 2, "rollouts")     # one has nothing to be better than
    check_range(args, 1, "steps batch_size max_prompt_tokens max_new_tokens max_rounds max_rows "
                         "updates_per_batch tokens_per_micro_batch save_every gpus gpu_gb")
    check_range(args, 0, "entropy_threshold lr weight_decay clip_low clip_high importance_cap entropy_coef "
                         "ranks_per_copy seed")
    check_range(args, 1e-3, "temperature grad_clip")
    return args


if __name__ == "__main__":
    sys.excepthook = speak_once
    if len(sys.argv) == 1 and parallel.WORLD == 1:
        import demo
        sys.exit(demo.run())
    args = parse_args()
    if args.plan:
        from bench import memory as plan
        sys.exit(plan.report(args))
    device = parallel.start(args.device)
    checkpoint = checkpoint_to_resume(args)
    tokenizer, config = Tokenizer.load(checkpoint or args.init), read_config(checkpoint or args.init)
    close = tokenizer.encode("</think>", special=True) if args.no_thought else []
    room = min(args.max_prompt_tokens, config.max_positions - args.max_new_tokens)
    if args.task == "lm":
        corpus = load_corpus(args.corpus)
        corpus.check(tokenizer, checkpoint or args.init)
        before, after = template_ids(tokenizer, args.template)
        items = load_positions(corpus, find_scores(corpus, args.proxy), args.entropy_threshold, "train")
        ask = partial(make_question, corpus, tokenizer, template=(before, after + close), room=room)
        longest = max(items, key=lambda position: position[0] - position[1])
    else:
        pairs = read_questions(args.data)
        items = np.arange(len(pairs))
        ask = lambda i: exact_question(tokenizer, i, *pairs[i], args.template, close, room)
        longest = max(items, key=lambda i: len(ask(i).prompt))                       # all of them have room
    judge = partial(score, tokenizer, match=answers_equal if args.task == "answers" else REWARDS[args.reward],
                    extract=box_at_once if args.no_thought else extract_prediction)
    check_budget(len(ask(longest).prompt), args.max_new_tokens, args.tokens_per_micro_batch)
    model = GPT.from_pretrained(
        checkpoint or args.init, device=device,
        compute_dtype=torch.bfloat16 if args.device == "cuda" else torch.float32,
        shard=partial(parallel.shard, reshard=args.reshard, ranks_per_copy=args.ranks_per_copy))
    model.checkpoint_activations = args.checkpoint_activations
    optimizer = make_optimizer(model, args.lr, (0.9, 0.999), args.weight_decay, args.bf16_moments)
    state = load_trainer(checkpoint, model, optimizer) if checkpoint else dict(step=0, cursor=0)
    cursor = state["cursor"]                                                             # items used so far
    parameters = sum(p.numel() for p in model.parameters())
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in gpu), None)
    interrupted, watch = catch_interrupts(), watcher(args.max_new_tokens)
    parallel.on_rank_0(lambda: open_run(args, checkpoint))
    what = "positions" if args.task == "lm" else "questions"
    print0(f"{parameters:,} parameters, {len(items):,} {what}, steps {state['step']} to {args.steps}, "
           f"{args.batch_size} {what} x {args.rollouts} rollouts each")

    for step in range(state["step"], args.steps):
        # ---- ROLLOUT and REWARD ----------------------------------------------------------------------------
        dynamic = 0 <= args.dynamic_sampling_from <= step
        seen, kept = [], []              # groups of this rank: all that were sampled, and those that train
        missing = args.batch_size        # groups still wanted, over all ranks
        dt_gen, dt_reward, stats = 0.0, 0.0, {}
        clock = time.perf_counter()
        policy = model.cast()            # whole, in bf16 on a GPU: the sampler of this step
        for draw in range(args.max_rounds if dynamic else 1):
            chosen = items[shuffled(len(items), cursor, args.batch_size, args.seed)]
            cursor += args.batch_size
            mine = parallel.share(args.batch_size)
            questions = [ask(item) for item in chosen[mine]]
            with rollout_bar(len(questions) * args.rollouts, f"step {step + 1}",
                             disable=None if parallel.RANK == 0 else True) as progress:
                rollouts = generate(policy, [q.prompt for q in questions], args.rollouts, args.max_new_tokens,
                                    args.temperature, stop_ids(tokenizer), (args.seed, step, draw),
                                    mine.start, args.max_rows, args.kv_gb, progress, stats)
            dt_gen += max(parallel.gather_lists([time.perf_counter() - clock]))          # of the slowest rank
            clock = time.perf_counter()
            groups = [judge(question, r) for question, r in zip(questions, rollouts)]
            if "dense" in args.reward:
                make_dense(policy, tokenizer, groups, args.tokens_per_micro_batch,
                           conditional=args.reward == "conditional-dense")
            alive = parallel.gather_lists([not dynamic or len(set(g.rewards)) > 1 for g in groups])
            useful = np.flatnonzero(alive)[:missing]                                     # equal on all ranks
            kept += [groups[i - mine.start] for i in useful if mine.start <= i < mine.stop]
            seen, missing = seen + groups, missing - len(useful)
            dt_reward, clock = dt_reward + time.perf_counter() - clock, time.perf_counter()
            if not missing:
                break
        del policy                       # its memory is for the update

        # ---- ADVANTAGE -------------------------------------------------------------------------------------
        rewards = torch.tensor([g.rewards for g in kept]).view(-1, args.rollouts)       # (N, G), of this rank
        advantages = group_advantages(rewards, args.normalize_advantage).tolist()

        # ---- UPDATE ----------------------------------------------------------------------------------------
        clock = time.perf_counter()
        metrics = policy_step(model, optimizer, kept, advantages, args)
        optimizer.zero_grad()            # their memory is for the next sampling
        dt_train = time.perf_counter() - clock

        # ---- LOG -------------------------------------------------------------------------------------------
        seen = parallel.gather_lists(seen)
        metrics = dict(step=step + 1) | rollout_metrics(seen) | metrics
        sampled = sum(group_tokens(g) for g in seen)                                     # prompts once
        if "dense" in args.reward:
            sampled += sum(len(g.question.context) for g in seen)
        trained = metrics["trained_tokens"]
        metrics |= dict(lr=args.lr, occupancy=stats.get("occupancy"),
                        gen_tok_s=metrics["tokens"] / dt_gen, train_tok_s=trained / dt_train,
                        mfu=6 * parameters * trained / dt_train / parallel.WORLD / peak if peak else 0.0,
                        flops=2 * parameters * sampled + 6 * parameters * trained,
                        dt_gen=dt_gen, dt_reward=dt_reward, dt_train=dt_train)
        stop = any(parallel.gather_lists([bool(interrupted)]))
        last = stop or step + 1 == args.steps
        if parallel.RANK == 0:
            record = {name: None if value != value else value for name, value in metrics.items()}  # NaN: none
            append(f"{args.out_dir}/metrics.jsonl", [record])
            append(f"{args.out_dir}/samples.jsonl", [sample_record(tokenizer, step + 1, seen[0], i)
                                                     for i in range(min(SAMPLES_LOGGED, args.rollouts))])
            print(step_line(args.steps, metrics), flush=True)
            for text in watch(metrics):
                print(f"warning: {text}", file=sys.stderr, flush=True)
        if last or (step + 1) % args.save_every == 0:
            save_checkpoint(args.out_dir, step + 1, model, tokenizer, optimizer, cursor=cursor)
        if stop:
            print0(f"stopped after step {step + 1} and saved; the same command with --resume continues")
            sys.exit(0)
    print0(f"done: {latest_checkpoint(args.out_dir)}, curves: python plot.py {args.out_dir}")
