"""A GPU's first minutes: does everything run on it, is it right, where does the time go?

    python bench/gpu_check.py                       # about 8 minutes on an H100
    python bench/gpu_check.py --steps env,gap,rpt   # other steps than the usual ones
    python bench/gpu_check.py --plan                # what the steps ask, and how long they take
    python bench/gpu_check.py --tiny                # without a GPU: a rehearsal of every step

The most valuable facts come first. A step is a process of its own with a limit, so that one that
fails or hangs costs the others nothing; a result that is not right fails its step. Each fact is a
line of facts.jsonl in --out-dir, written at once, so that a kill loses nothing; the output of all
steps is in log.txt.

A rehearsal takes tiny shapes and the emulated device of tests/emulated_cuda.py. Its times mean
nothing; what it finds are mistakes that would have cost the time on a GPU.

`rpt` trains the base of the demo, which stages 1 to 3 of `python demo.py` make.
"""
import importlib.util
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import torch

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
import kernels
import sample
from bench.common import QWEN, SMOLLM2, limits, random_prompts
from kernels.attention import make_layout
from kernels.logprob import launch_logprob, sample as sample_tokens
from model import GPT, GPTConfig
from plumbing import flags
from plumbing.batch import flatten
from plumbing.files import latest_checkpoint

SMALL = dict(vocab_size=151_936, width=256, n_layers=2, n_heads=4, n_kv_heads=2, ffn_width=512,
             max_positions=2048)
TINY = dict(vocab_size=150, width=48, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=16,
            ffn_width=72, max_positions=128)
KERNEL_TESTS = ["test_linear", "test_decode", "test_attention_kernel", "test_logprob_kernel",
                "test_bitwise"]
BF16 = torch.bfloat16
EMULATOR = ["tests/emulated_cuda.py"]
is_tiny = False    # --tiny: a rehearsal
out_dir = Path()   # of facts.jsonl


def say(what, **facts):
    """Print a fact and append it to facts.jsonl, at once."""
    line = json.dumps(dict(what=what, **facts), default=str)
    print(line, flush=True)
    with open(out_dir / "facts.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def check(holds, what):
    if not holds:
        raise AssertionError(what)


def time_ms(call, repeats=20, warmup=3):
    """Median milliseconds of call() by the GPU's clock."""
    if is_tiny:
        call()
        return 1.0
    for _ in range(warmup):
        call()
    took = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(True), torch.cuda.Event(True)
        start.record()
        call()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end))
    return statistics.median(took)


def time_by_kernel(call, count=16):
    """-> [(kernel, launches, ms), ...] of one call, the longest first; graph nodes are kernels."""
    if is_tiny:
        call()
        return []
    from torch.profiler import ProfilerActivity, profile
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    rows = [(event.key[:70], event.count, round(event.self_device_time_total / 1e3, 3))
            for event in profiler.key_averages() if event.self_device_time_total > 0]
    return sorted(rows, key=lambda row: -row[2])[:count]


def random_model(config, compute_dtype=BF16, weight_dtype=BF16, device="cuda", scale=1):
    """scale: of the matrices; 6 makes distributions that are far from flat."""
    torch.manual_seed(0)
    with torch.device(device):
        model = GPT(config, compute_dtype).to(weight_dtype)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(scale)
    return model


def some(cases):
    """A rehearsal gives all cases the same tiny shape, so it takes one."""
    return cases[:1] if is_tiny else cases


# ---- what kind of machine is it? ----

def env():
    say("env", gpu=torch.cuda.get_device_name(), torch=torch.__version__, commit=flags.commit(),
        triton=kernels.triton.__version__, cuda=torch.version.cuda, python=sys.version.split()[0])
    size = 64 if is_tiny else 2**30
    source, target = (torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    say("copy", TBps=2 * size / time_ms(lambda: target.copy_(source)) / 1e9)
    N = 64 if is_tiny else 8192
    a, b = (torch.randn(N, N, device="cuda").to(BF16) for _ in range(2))
    say("product of 8192 x 8192", TFLOPs=2 * N**3 / time_ms(lambda: a @ b) / 1e9)

    # The least that a launch costs inside a graph: 1000 kernels, each waiting for the last one.
    counter = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(1000):
            counter.add_(1)
    say("a node of a graph", us=time_ms(graph.replay))


# ---- is it right? ----

def tests():
    """The kernels against fp64, compiled instead of interpreted."""
    files = [f"tests/{name}.py" for name in KERNEL_TESTS]
    run_pytest(["tests/test_linear.py", "-k", "order_of_programs"] if is_tiny else files)


def sizes():
    """What only a GPU can show: sizes past 2^31, long ragged groups."""
    # A rehearsal imports the file; its tests are skipped, and one of another file is not.
    more = ["tests/test_linear.py", "-k", "test_gpu or not_tf32"] if is_tiny else []
    run_pytest(["tests/test_gpu.py", *more])


def run_pytest(words):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "-m", "slow or not slow", *words]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8" if len(words) > 3 else "3"]
    device = "cpu" if is_tiny else "cuda"
    ran = subprocess.run(command, cwd=flags.ROOT, env=os.environ | dict(NANORPT_TEST_DEVICE=device),
                         encoding="utf-8", stdout=subprocess.PIPE)
    print(ran.stdout[-6000:])
    failed = [line[:200] for line in ran.stdout.splitlines() if line.startswith("FAILED")]
    say("pytest", tests=words, result=ran.stdout.strip().splitlines()[-1], failed=failed)
    check(ran.returncode == 0, "tests fail")


def gap():
    """Sampler against trainer, graphs against eager steps, one run against another."""
    cases = [(64, "llama", BF16, "bitwise"), (128, "qwen2", BF16, "bitwise"),
             (128, "qwen3", BF16, "bitwise"), (64, "llama", torch.float32, "bitwise"),
             (128, "qwen2", BF16, "fast"), (128, "qwen2", BF16, "torch")]
    n, longest, rows, count, prompt_len = 8, 200, 40, 12, 700
    shape = SMALL
    if is_tiny:
        n, longest, rows, count, prompt_len, shape = 3, 6, 4, 3, 9, TINY
        cases = cases[2:3] + cases[4:]
    rng = random.Random(0)
    prompts = [[rng.randrange(150) for _ in range(rng.randint(1, prompt_len))]
               for _ in range(count)]
    stops, wrong = range(0, shape["vocab_size"], 29), []
    for K, family, dtype, backend in cases:
        kernels.set_backend(backend)
        config = GPTConfig(**shape | dict(head_dim=16 if is_tiny else K, family=family,
                                          tied_head=family != "qwen3"))
        model, sampler = (random_model(config, dtype, dtype, scale=6) for _ in range(2))
        sampler.join_weights()
        generate = partial(sample.generate, sampler, prompts, n, longest, 0.8, stops, 7,
                           max_rows=rows, kv_gb=2)
        rollouts = generate()
        same = generate() == rollouts
        real, sample.make_step = sample.make_step, partial(partial, sample.step)
        eager = generate() == rollouts
        sample.make_step = real
        groups = [(prompt, [rollout.tokens for rollout in group])
                  for prompt, group in zip(prompts, rollouts)]
        tokens, layout = flatten(groups, model.device)
        with torch.no_grad():
            trained = model.logprobs(tokens, layout, 0.8)
        sampled = [p for group in rollouts for rollout in group for p in rollout.logprobs]
        drift = (trained - torch.tensor(sampled, device="cuda")).abs()
        say("logp_gap", backend=backend, family=family, K=K, dtype=dtype, tokens=len(sampled),
            largest=drift.max().item(), mean=drift.mean().item(), graph_is_eager=eager,
            two_runs_equal=same)
        wrong += [] if same and eager and (drift.max() == 0 or backend != "bitwise") else [family]
    check(not wrong, f"not equal to the bit: {wrong}")


def fsdp():
    """FSDP2 over one rank of NCCL: streams, bf16 casts, custom autograd functions, checkpoints.

    A rehearsal takes gloo, on the CPU, because FSDP2 asks C++ for its devices.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (MixedPrecisionPolicy, fully_shard,
                                        register_fsdp_forward_method)
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    device, groups, config = "cuda", [(70, [50, 30])], GPTConfig(**SMALL, head_dim=64)
    if is_tiny:
        device, groups, config = "cpu", [(7, [5, 3])], GPTConfig(**TINY)
    config.family = "qwen2"
    dist.init_process_group("gloo" if is_tiny else "nccl",
                            device_id=None if is_tiny else torch.device("cuda:0"))
    mesh = init_device_mesh(device, (1,))
    policy = MixedPrecisionPolicy(BF16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    kernels.set_backend("bitwise")
    layout = make_layout(groups, device)
    tokens = torch.arange(len(layout.positions), device=device)
    gradients = []
    for sharded in (False, True):
        model = random_model(config, BF16, torch.float32, device)
        if sharded:
            model.checkpoint_activations = True
            for module in (*model.layers, model):
                fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            register_fsdp_forward_method(model, "logprobs")
        model.logprobs(tokens, layout, 0.8).sum().backward()
        whole = (weight.grad for weight in model.parameters())
        gradients.append([getattr(grad, "full_tensor", lambda: grad)() for grad in whole])
    off = [((ours - alone).norm() / alone.norm()).item() for alone, ours in zip(*gradients)]
    say("FSDP2, one rank", largest_relative_difference_of_a_gradient=max(off))
    dist.destroy_process_group()
    check(max(off) < 0.01, "gradients differ")  # FSDP2 rounds them to bf16


def rpt():
    """A real run: reward up, gap 0.0 in every step, save and resume."""
    base, corpus = latest_checkpoint("runs/demo/base"), "runs/demo/corpus"
    batch_size, n, new, steps, more_steps, script = 32, 8, 64, 40, 5, ["train_rpt.py"]
    if is_tiny:
        from tests.tiny import make
        (out_dir / "tiny").mkdir(exist_ok=True)
        base, corpus = (make(out_dir / "tiny") / name for name in ("base", "corpus"))
        batch_size, n, new, steps, more_steps, script = 2, 2, 5, 2, 1, EMULATOR + ["train_rpt.py"]
    if not base:
        raise ValueError("runs/demo/base: no checkpoint; stages 1 to 3 of python demo.py make it")
    run_dir = out_dir / "rpt"
    shutil.rmtree(run_dir, ignore_errors=True)  # of an earlier check
    words = (f"--template short --entropy-threshold 0.5 --batch-size {batch_size} --rollouts {n} "
             f"--max-new-tokens {new} --temperature 1.0 --lr 1e-4 --grad-clip 1.0 --save-every "
             f"{steps // 2} --init {base} --corpus {corpus} --out-dir {run_dir}").split()
    for last, more in ((steps, []), (steps + more_steps, ["--resume"])):
        begun = time.time()
        subprocess.run([sys.executable, *script, *words, "--steps", str(last), *more],
                       cwd=flags.ROOT, check=True)
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        rewards = [round(step["reward"], 3) for step in metrics]
        say("RPT run", steps=len(metrics), wall_s=round(time.time() - begun, 1), rewards=rewards,
            largest_gap=max(step["logp_gap"] or 0 for step in metrics), last_step=metrics[-1])
    check(not any(step["logp_gap"] for step in metrics), "logp_gap is not 0")
    check(len(rewards) == steps + more_steps, "the run was not resumed where it had ended")
    check(is_tiny or sum(rewards[-10:]) > sum(rewards[:10]), "the reward has not risen")


# ---- where does the time go? ----

def decode():
    """A decode step as a graph: ms, share of the floor, time by kernel, cost of a capture."""
    _, bandwidth = limits("cuda")
    for title, config, B, P, own in some([("1.5B", QWEN["1.5B"], 256, 1024, 512),
                                          ("SmolLM2", SMOLLM2, 256, 256, 256),
                                          ("1.5B", QWEN["1.5B"], 64, 1024, 512)]):
        if is_tiny:
            config, B, P, own = GPTConfig(**TINY), 8, 9, 8
        model, S = random_model(config).join_weights(), B // 8
        weights = sum(weight.numel() for weight in model.parameters()) * 2
        token_bytes = 4 * config.n_layers * config.n_kv_heads * config.head_dim
        floor = (weights + (S * P + B * own) * token_bytes) / bandwidth * 1e3
        for backend in ("bitwise", "fast"):
            kernels.set_backend(backend)
            cache = sample.Cache(model, [[1] * P] * S, 8, own + 64, B, 40)
            cache.rows.prompt_lens.fill_(P)
            cache.rows.place([row // 8 for row in range(B)])
            cache.rows.lengths.fill_(own)
            draw_tokens = partial(sample.draw_next, model, 0.8, None)
            with torch.no_grad():
                seconds = []
                for _ in range(3):
                    start = time.perf_counter()
                    decode_step = sample.make_step(model, cache, draw_tokens)
                    torch.cuda.synchronize()
                    seconds.append(round(time.perf_counter() - start, 3))
                cache.rows.lengths.fill_(own)
                ms = time_ms(decode_step)
                say("decode step", model=title, backend=backend, B=B, prompt=P, own=own, ms=ms,
                    tokens_per_s=B / ms * 1e3, floor_ms=floor, share_of_floor=floor / ms,
                    capture_s=seconds, kernels=time_by_kernel(decode_step))
            del cache, decode_step
            torch.cuda.empty_cache()


def rollouts():
    """All of sampling: prompts, refills and captures included."""
    for title, config, count, P, n, new in some([("SmolLM2", SMOLLM2, 32, 256, 32, 256),
                                                 ("1.5B", QWEN["1.5B"], 64, 512, 8, 256)]):
        if is_tiny:
            config, count, P, n, new = GPTConfig(**TINY), 3, 9, 2, 6
        model = random_model(config).join_weights()
        prompts = random_prompts(config, count, P)
        # Ids that end a rollout: one in 128, so that lengths differ.
        stops = range(0, config.vocab_size, 128)
        for backend in ("bitwise", "fast"):
            kernels.set_backend(backend)
            generate = partial(sample.generate, model, prompts, n, new, 1.0, stops)
            generate(seed=0)
            start = time.perf_counter()
            groups = generate(seed=1)
            seconds = time.perf_counter() - start
            tokens = sum(len(rollout.tokens) for group in groups for rollout in group)
            say("sampling", model=title, backend=backend, prompts=count, prompt=P, rollouts=n,
                tokens=tokens, seconds=seconds, tokens_per_s=tokens / seconds)


def update():
    """A micro-batch of 16k tokens, forward and backward, fp32 masters: ms, MFU, by kernel."""
    from bench.train import model_flops
    flops, _ = limits("cuda")
    for title, config in some([("1.5B", QWEN["1.5B"]), ("SmolLM2", SMOLLM2)]):
        groups = [(1024, [1024] * 8), (1024, [1024] * 6)]
        if is_tiny:
            config, groups = GPTConfig(**TINY), [(9, [5, 3])]
        model = random_model(config, BF16, torch.float32)
        layout = make_layout(groups, model.device)
        tokens = torch.full((len(layout.positions),), 3, device=model.device)
        least = model_flops(model, groups) / flops * 1e3
        for backend in ("bitwise", "fast"):
            kernels.set_backend(backend)

            def forward():
                return model.logprobs(tokens, layout, 0.8)

            def forward_backward():
                forward().sum().backward()

            forward_backward()
            ms, forward_ms = time_ms(forward_backward, 3, 1), time_ms(forward, 3, 1)
            peak = torch.cuda.max_memory_allocated() / 1e9
            say("micro-batch", model=title, backend=backend, tokens=len(tokens), ms=ms,
                forward_ms=forward_ms, tokens_per_s=len(tokens) / ms * 1e3, mfu=least / ms,
                peak_gb=peak, kernels=time_by_kernel(forward_backward, 24))
            model.zero_grad()


def head():
    """Log-probs of 16k tokens and sampling of 256 rows, over a vocabulary of 152k."""
    N, B, D, V = (20, 20, 16, 300) if is_tiny else (16_384, 256, 1536, 151_936)
    hidden = torch.randn(N, D, device="cuda").to(BF16)
    weight = (torch.randn(V, D, device="cuda") * 3 / D**0.5).to(BF16)
    targets = torch.zeros(N, dtype=torch.long, device="cuda")
    bits = torch.arange(B, device="cuda")
    kernels.set_backend("fast")
    scan = partial(launch_logprob, "fast", hidden, weight, targets, 1.0)
    draw = partial(sample_tokens, hidden[:B], weight, bits)
    say("head", scan_ms=time_ms(scan, 3, 1), sample_ms=time_ms(partial(draw, 0.8)),
        greedy_ms=time_ms(partial(draw, 0.0)),
        product_ms=time_ms(lambda: hidden[:B] @ weight.T))


def speed():
    """Attention, decoding, log-probs and sampling beside their alternatives: bench/kernels.py."""
    path = out_dir / "kernels.json"
    if is_tiny:
        rehearse_speed(path)
    else:
        subprocess.run([sys.executable, "bench/kernels.py", "--quick", "--rows", "3,1,2,5,4",
                        "--minutes", "1.5", "--json", str(path)], cwd=flags.ROOT, check=True)
    ours = [record for record in json.loads(path.read_text(encoding="utf-8"))["results"]
            if record["method"] in ("fast", "bitwise")]
    off = [record for record in ours if record.get("wrong") or "reason" in record]
    check(ours and not off, f"wrong, or does not run: {off}")


def rehearse_speed(path):
    """bench/kernels.py with tiny shapes, each call once."""
    from bench import kernels as bench
    shapes = [("tiny", 20), ("tiny", 18, 2, 8), ("tiny", 4, 2, 20, 24), (40, 32), (8, 32)]
    bench.HEADS["tiny"] = 2, 1, 16
    bench.PACK, bench.VOCABULARY, bench.CHUNK = 40, 300, 16
    bench.ROWS = {number: (title, build, [shape])
                  for shape, (number, (title, build, _)) in zip(shapes, bench.ROWS.items())}
    # Triton's clock needs a driver.
    kernels.triton.testing.do_bench = lambda call, **_: time_ms(call)
    args = SimpleNamespace(rows=list(bench.ROWS), quick=True, minutes=5, json=str(path))
    bench.run(args, torch.device("cuda"), torch.float32)


# ---- memory ----

def launches():
    """Every kernel at ragged shapes, forward and backward, without graphs."""
    shape = TINY if is_tiny else SMALL | dict(head_dim=64, vocab_size=2000)
    # Under the sanitizer nothing can be captured, because torch's allocator of memory is off.
    sample.make_step = partial(partial, sample.step)
    for backend in ("fast", "bitwise"):
        kernels.set_backend(backend)
        for dtype in (BF16, torch.float32):
            model = random_model(GPTConfig(**shape, family="qwen3"), dtype, torch.float32)
            layout = make_layout([(13, [5, 3]), (1, [2])], model.device)
            tokens = torch.arange(len(layout.positions), device=model.device)
            model.logprobs(tokens, layout, 0.8).sum().backward()
            [group, _] = sample.generate(model.join_weights(), [[1, 2, 3], [4]], 2, 3, 0.8, [], 0,
                                         max_rows=3)
            say("launches", backend=backend, dtype=dtype, tokens=group[0].tokens)


def sanitizer():
    """Does any kernel read or write outside its tensors? If compute-sanitizer is installed."""
    if not shutil.which("compute-sanitizer"):
        say("sanitizer", result="compute-sanitizer is not installed")
        return
    # Torch's allocator cuts tensors from larger blocks, whose inside nobody guards.
    environment = os.environ | dict(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    ran = subprocess.run(
        ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9",
         *command_of("launches")],
        cwd=flags.ROOT, env=environment, encoding="utf-8", stdout=subprocess.PIPE)
    print(ran.stdout[-6000:])
    say("sanitizer", result=ran.stdout.strip().splitlines()[-1])
    check(ran.returncode == 0, "memory errors")


# name: (function, seconds that it took on an H100, limit in seconds)
STEPS = {"env": (env, 5, 60), "tests": (tests, 70, 120), "gap": (gap, 70, 120),
         "fsdp": (fsdp, 16, 60), "rpt": (rpt, 45, 150), "decode": (decode, 30, 90),
         "update": (update, 45, 90), "head": (head, 7, 30), "rollouts": (rollouts, 25, 60),
         "sizes": (sizes, 65, 120), "speed": (speed, 80, 120),
         "launches": (launches, None, 120), "sanitizer": (sanitizer, 82, 300)}
# Long, and of use to who changes a kernel.
NOT_USUAL = {"launches", "sanitizer"}


def print_plan():
    for name, (function, expected, limit) in STEPS.items():
        text = (function.__doc__ or "Versions, bandwidth, FLOP/s, a launch.").splitlines()[0]
        star = "*" if name in NOT_USUAL else " "
        print(f"{name:9}{star} {expected or '?':>3} s, at most {limit:3} s   {text}")
    total = sum(expected for name, (_, expected, _) in STEPS.items() if name not in NOT_USUAL)
    print(f"together  {total:4} s on an H100, without those marked *")


def run_step(name):
    function, *_ = STEPS[name]
    try:
        function()
    except Exception as error:
        say("FAILED", step=name, error=f"{type(error).__name__}: {str(error)[:500]}")
        raise


def command_of(name):
    """The command line that runs a step in its own process."""
    words = [__file__, "--out-dir", str(out_dir), "--in-this-process", name]
    if is_tiny:
        words = (EMULATOR if name != "fsdp" else []) + words + ["--tiny"]
    return [sys.executable, *words]


def run_steps(names):
    """Each in a process of its own -> exit code: 0 if none failed."""
    log, rows = open(out_dir / "log.txt", "a", encoding="utf-8"), []
    interpreted = dict(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    environment = os.environ | (interpreted if is_tiny else {})
    for name in names:
        *_, limit = STEPS[name]
        # Interpreted kernels on a busy CPU have no such limit.
        limit *= 5 if is_tiny else 1
        start = time.monotonic()
        child = subprocess.Popen(command_of(name), cwd=flags.ROOT, env=environment,
                                 stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 encoding="utf-8", start_new_session=True)
        timer = Timer(limit, os.killpg, (child.pid, 9))
        timer.start()
        for line in child.stdout:
            print(line, end="", flush=True)
            log.write(line)
            log.flush()
        timer.cancel()
        seconds = time.monotonic() - start
        code = child.wait()
        result = "ok" if code == 0 else f"failed ({code})"
        if code == -9 and seconds >= limit:
            result = "over its limit"
        rows.append((name, seconds, result))
        say("step", step=name, seconds=round(seconds, 1), result=result)
        print(f"=== {name}: {result} after {seconds:.0f} s\n", flush=True)
    print("\n| step | seconds | result |\n|---|---|---|")
    for name, seconds, result in rows:
        print(f"| {name} | {seconds:.0f} | {result} |")
    return int(any(result != "ok" for *_, result in rows))


def parse_args():
    parser = flags.Parser("A GPU's first minutes: is everything right, where does the time go?")
    add = parser.add_argument
    add("--steps", help="some of them, with commas between; default: those without a * in --plan, "
                        "or all of them in a rehearsal")
    add("--plan", action="store_true", help="print the steps and their times, run nothing")
    add("--out-dir", default="runs/gpu_check", help="folder of facts.jsonl and log.txt")
    add("--tiny", action="store_true",
        help="rehearse the steps with tiny shapes, on an emulated device")
    add("--in-this-process", choices=STEPS, metavar="STEP", help="only this step, without a limit")
    args = parser.parse_args()
    usual = [name for name in STEPS if args.tiny or name not in NOT_USUAL]
    args.steps = args.steps or ",".join(usual)
    if not set(args.steps.split(",")) <= STEPS.keys():
        raise ValueError(f"--steps {args.steps}: expected some of {','.join(STEPS)}")
    return args


def main():
    """-> exit code"""
    global is_tiny, out_dir
    args = parse_args()
    is_tiny, out_dir = args.tiny, Path(args.out_dir).resolve()
    if args.plan:
        print_plan()
        return 0
    if not is_tiny and not torch.cuda.is_available():
        raise ValueError("this checks a GPU, and torch finds none (CUDA); --tiny rehearses it on "
                         "an emulated one")
    os.chdir(flags.ROOT)
    out_dir.mkdir(parents=True, exist_ok=True)
    if args.in_this_process:
        run_step(args.in_this_process)
        return 0
    return run_steps(args.steps.split(","))


if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    sys.exit(main())
