"""How fast sampling and training are on a CPU, in fp32 and bf16, beside a floor and others.

    python bench/cpu.py                        # an hour on one thread; row 5 takes 11 GB
    python bench/cpu.py --rows 1,2 --repeats 5

    row 1  a decode step of SmolLM2-135M in 32 and in 256 rows
        2  a decode step of the demo's model in 256 rows
        3  sampling of SmolLM2, 8 prompts of 256 or 64 x 8 rollouts x 64 tokens: transformers
        4  an update of SmolLM2, 4 prompts of 256 x 8 rollouts x 64, and one of the demo's model
        5  a whole step of SmolLM2, 4 prompts of 256 x 8 rollouts x 64: TRL's GRPOTrainer

The floor is what the matrix products take alone: those of a decode step in the fastest way that
torch has for them, those of an update forward and backward, with the head for rollout tokens only.
"Other" is transformers' generate, and GRPOTrainer as its users would run it on a CPU, with the
settings that are its fastest (GRPO below). TRL is no requirement of this project: without it row 5
says how to install it.

Models have random weights and every group has a gradient. All numbers of a row take turns. In row 5
each is a process of its own, which steps once unmeasured. Where the threads worked for less than
80 % of the time, the seconds that they did work stand in brackets: the machine was busy, or cores
had nothing to do.
"""
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from pathlib import Path

if __name__ == "__main__":  # the repository, not bench/, is where imports start
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
from plumbing import flags  # before torch: how its threads wait
import torch
import torch.nn.functional as F
from bench.common import (DTYPES, SMOLLM2, alone, clocked, held_gb, medians, parse_args, print_row,
                          random_prompts, run_rows, timed)
from bench.sample import EMBEDDED
from bench.train import generate, prompts_of, random_groups, trainer, update
from kernels.logprob import CHUNK_LOGITS
from model import GPT
from objectives import Group, Question

BUDGET = 16_384      # tokens of a micro-batch, as train_rpt.py has by default
COLUMNS = ("row", "what", "ours fp32", "ours bf16", "floor fp32", "floor bf16", "other fp32",
           "other bf16", "floor / ours fp32", "floor / ours bf16", "best other / ours fp32",
           "best other / best ours")
FEATURES = "avx2", "avx512f", "avx512_bf16", "amx_bf16"
TRL = "trl==1.16.0"
END = "<end>"        # the word that ends a text, token 0
# What makes GRPOTrainer fastest on a CPU, with a prompt and its rollouts in each micro-batch. By
# default it computes in bf16 and recomputes activations, which took longer, with the whole batch at
# once, too. Weights in bf16 are no faster than bf16=True, and small updates would get lost in them.
GRPO = dict(fp32=dict(bf16=False, gradient_checkpointing=False),
            bf16=dict(bf16=True, gradient_checkpointing=False))


def machine():
    """The processor and the libraries, in words."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    pairs = [line.partition(":") for line in lines]
    known = {name.strip(): text.strip() for name, _, text in pairs}
    found = [name for name in FEATURES if name in known.get("flags", "").split()]
    libraries = [f"{name} {version(name)}" for name in ("transformers", "trl")]
    return ", ".join([known.get("model name", "unknown CPU"), " ".join(found),
                      f"torch uses {torch.backends.cpu.get_cpu_capability()}",
                      f"ONEDNN_MAX_CPU_ISA {os.environ.get('ONEDNN_MAX_CPU_ISA', 'not set')}",
                      *libraries])


def version(library):
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


# ---- a row ----

def take_turns(repeats, calls):
    """{name: call} -> {name: (seconds, CPU seconds)}"""
    return dict(zip(calls, timed(repeats, *calls.values())))


def in_words(times):
    seconds, cpu = times
    words = f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"
    if cpu < 0.8 * seconds * torch.get_num_threads():
        words += f" ({cpu:.2f} s of CPU)" if seconds >= 1 else f" ({1e3 * cpu:.1f} ms of CPU)"
    return words


def print_times(row, what, times, words=in_words):
    """times: {("ours", "floor" or "other", dtype): numbers, of which the first is compared}."""
    names = [(side, dtype) for side in ("ours", "floor", "other") for dtype in DTYPES]
    cells = [words(times[name]) if name in times else "" for name in names]
    ours, floor, other = ([times[side, dtype][0] for dtype in DTYPES if (side, dtype) in times]
                          for side in ("ours", "floor", "other"))
    ratios = [f"{least / taken:.2f}" for least, taken in zip(floor, ours)] or ["", ""]
    ratios += [f"{min(other) / taken:.2f}" for taken in (ours[0], min(ours)) if other] or ["", ""]
    print_row(row, what, *cells, *ratios)


def run_all(calls):
    for call in calls:
        call()


# ---- rows 1 and 2: a decode step ----

def ways_to_multiply(x, weight):
    """x (rows, D) times a weight (O, D) in each way that torch has for it on this CPU, as calls."""
    ways = [partial(F.linear, x, weight)]
    if x.dtype == torch.float32 and torch.backends.mkl.is_available():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, len(x))
        ways.append(partial(torch.ops.mkl._mkl_linear, x, packed, weight, None, len(x)))
    if x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
        ways.append(partial(torch.ops.mkldnn._linear_pointwise, x, packed, None, "none", [], ""))
    return ways


def fastest_products(model, rows, dtype):
    """-> the products of a decode step as calls: every matrix of the model once."""
    by_shape, calls = {}, []
    for weight in model.parameters():
        if weight.ndim == 2:  # the embedding counts, because it is the head
            by_shape.setdefault(weight.shape, []).append(weight.detach().to(dtype))
    for (_, width), weights in by_shape.items():
        x = torch.randn(rows, width, dtype=dtype)
        # All weights of a shape in turn, because a single one would stay in the cache.
        ways = list(zip(*(ways_to_multiply(x, weight) for weight in weights)))
        seconds = medians(3, *(partial(run_all, way) for way in ways))
        calls += ways[seconds.index(min(seconds))]
    return calls


def against_products(row, repeats, config, rows, prompt=64, new=(4, 20)):
    """A step is the difference of two lengths, so without prompts; 8 rows share a prompt."""
    calls = {}
    for name, dtype in DTYPES.items():
        model, prompts = GPT(config, dtype), random_prompts(config, rows // 8, prompt)
        for n in new:
            calls[n, name] = partial(generate, model, prompts, 8, n)
        calls["floor", name] = partial(run_all, fastest_products(model, rows, dtype))
    times, (short, long) = take_turns(repeats, calls), new
    for name in DTYPES:
        times["ours", name] = tuple((end - start) / (long - short) for start, end
                                    in zip(times[short, name], times[long, name]))
    print_times(row, f"decode step, {config.n_layers} layers of {config.width}, {rows} rows", times)


def decode_smollm2(repeats):
    for rows in (32, 256):
        against_products(1, repeats, SMOLLM2, rows)


def decode_embedded(repeats):
    against_products(2, repeats, EMBEDDED, 256)


# ---- row 3: sampling ----

def against_transformers(repeats, config=SMOLLM2, lengths=(256, 64), count=8, G=8, new=64):
    from transformers import AutoModelForCausalLM
    model, theirs = {}, {}
    for name, dtype in DTYPES.items():
        model[name] = GPT(config, dtype)
        with tempfile.TemporaryDirectory() as folder:
            model[name].save_pretrained(folder)
            theirs[name] = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    for length in lengths:
        prompts, calls = random_prompts(config, count, length), {}
        for name in DTYPES:
            calls["ours", name] = partial(generate, model[name], prompts, G, new)
            calls["other", name] = partial(
                theirs[name].generate, torch.tensor(prompts),
                attention_mask=torch.ones(count, length).long(), do_sample=True, top_k=0,
                num_return_sequences=G, max_new_tokens=new, min_new_tokens=new,
                eos_token_id=None, pad_token_id=0)
        print_times(3, f"{count} prompts of {length} x {G} x {new} tokens, transformers",
                    take_turns(repeats, calls))


# ---- row 4: an update ----

def forward_backward(x, weight, gradient):
    torch.autograd.grad(F.linear(x, weight), (x, weight), gradient)


def products_of_update(weights, rows, dtype):
    """A call that multiplies rows by each of the weights, forward and backward."""
    calls = []
    for weight in weights:
        weight = weight.detach().to(dtype).requires_grad_()
        x = torch.randn(rows, weight.shape[1], dtype=dtype, requires_grad=True)
        gradient = torch.randn(rows, len(weight), dtype=dtype)
        calls.append(partial(forward_backward, x, weight, gradient))
    return partial(run_all, calls)


def against_update(repeats, config, count, prompt, G, new):
    drawn, calls = count * G * new, {}
    tokens, chunk = count * prompt + drawn, min(drawn, CHUNK_LOGITS // config.vocab_size)
    groups = random_groups(config, count, prompt, [new] * G)
    for name, dtype in DTYPES.items():
        model, optimizer = trainer(config, dtype)
        block = [weight for weight in model.layers[0].parameters() if weight.ndim == 2]
        calls["ours", name] = partial(update, model, optimizer, groups, BUDGET)
        calls["block", name] = products_of_update(block, tokens, dtype)
        # The head's output is large, so ours has a chunk of it at a time, too.
        calls["head", name] = products_of_update([model.head], chunk, dtype)
    times = take_turns(repeats, calls)
    for name in DTYPES:
        times["floor", name] = [config.n_layers * block + drawn / chunk * head for block, head
                                in zip(times["block", name], times["head", name])]
    print_times(4, f"update, {config.n_layers} layers of {config.width}, {count} prompts of "
                f"{prompt} x {G} x {new} tokens", times)


def updates(repeats):
    against_update(repeats, SMOLLM2, count=4, prompt=256, G=8, new=64)
    against_update(repeats, EMBEDDED, count=32, prompt=40, G=8, new=30)


# ---- row 5: a whole step ----

def step(model, optimizer, prompts, G, new):
    groups = [Group(Question(prompt, [], [], 0), rollouts)
              for prompt, rollouts in zip(prompts, generate(model, prompts, G, new))]
    update(model, optimizer, groups, BUDGET)


def our_step(config, name, count, prompt, G, new):
    """-> seconds, CPU seconds and GB of a step, after one that is not measured."""
    model, optimizer = trainer(config, DTYPES[name])
    prompts = random_prompts(config, count, prompt)
    step(model, optimizer, prompts, G, new)
    return *clocked(partial(step, model, optimizer, prompts, G, new)), held_gb()


def random_rewards(completions, **_):
    return torch.rand(len(completions)).tolist()


def trl_trainer(folder, config, prompts, G, new, settings):
    """GRPOTrainer for two steps, as its users would set it up; prompts become as many words."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = [END, *map(str, range(1, config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, END))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    texts = [" ".join(words[i] for i in prompt) for prompt in prompts]
    return GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), random_rewards,
        GRPOConfig(folder, use_cpu=True, max_steps=2, num_generations=G,
                   per_device_train_batch_size=G, gradient_accumulation_steps=len(prompts),
                   max_completion_length=new, generation_kwargs=dict(min_new_tokens=new),
                   learning_rate=1e-9, beta=0.0, temperature=1.0, report_to="none",
                   logging_strategy="no", save_strategy="no", disable_tqdm=True, **settings),
        Dataset.from_dict(dict(prompt=texts)),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END,
                                                 pad_token=END))


def trl_step(config, name, count, prompt, G, new):
    """The same of GRPOTrainer."""
    from transformers import TrainerCallback
    ends = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_, **__):
            ends.append((time.perf_counter(), time.process_time()))

    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory() as folder:
        GPT(config).save_pretrained(folder)
        prompts = random_prompts(config, count, prompt)
        grpo = trl_trainer(folder, config, prompts, G, new, GRPO[name])
        grpo.add_callback(Watch())
        grpo.train()
    return *(end - start for start, end in zip(*ends)), held_gb()


def in_gb(numbers):
    return f"{numbers[0]:.2f} GB"


def against_trl(repeats, config=SMOLLM2, count=4, prompt=256, G=8, new=64):
    has_trl = importlib.util.find_spec("trl") is not None
    sides = dict(ours=our_step, other=trl_step) if has_trl else dict(ours=our_step)
    runs = {(side, name): [] for name in DTYPES for side in sides}
    for _ in range(repeats):
        for (side, name), numbers in runs.items():
            numbers.append(alone(sides[side], config, name, count, prompt, G, new))
    middle = {key: list(map(statistics.median, zip(*numbers))) for key, numbers in runs.items()}
    note = "GRPOTrainer" if has_trl else f"TRL is not installed: pip install {TRL}"
    print_times(5, f"step of {count} x {G} x {new} tokens, contexts of {prompt}; {note}",
                {key: numbers[:2] for key, numbers in middle.items()})
    print_times(5, "most memory held", {key: numbers[2:] for key, numbers in middle.items()}, in_gb)


ROWS = {"1": decode_smollm2, "2": decode_embedded, "3": against_transformers, "4": updates,
        "5": against_trl}

if __name__ == "__main__":
    sys.excepthook = flags.speak_once
    run_rows(ROWS, parse_args("Measure a CPU.", "1 decode step, 2 the same of the demo's model, "
                              "3 sampling, 4 update, 5 whole step", repeats=3), machine(), COLUMNS)
