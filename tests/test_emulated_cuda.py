"""The scripts on an emulated CUDA device: what a GPU would refuse in them, found without one.

Every test is a process of its own. Some run functions of this file, inside the emulator:

    python tests/emulated_cuda.py tests/test_emulated_cuda.py sampling bitwise bfloat16 qwen3
"""
import json
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("triton")
import kernels
import sample
from kernels.pointwise import rms_norm_kernel
from test_bitwise import drift, ragged_prompts, tiny_model
from test_cli import arguments
from test_runs import command
from tiny import ENVIRONMENT, ROOT, base, corpus


def emulated(*words, exit_code=0):
    """Run a script on the emulated device -> the report on stderr."""
    line = [sys.executable, "tests/emulated_cuda.py", *map(str, words)]
    # The models of other test files are made on the device, too.
    environment = ENVIRONMENT | dict(NANORPT_TEST_DEVICE="cuda")
    ran = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == exit_code, ran.stdout[-2000:] + ran.stderr[-4000:]
    assert ("broken rules: 0\n" in ran.stderr) == (exit_code == 0)
    return ran.stderr


def captures(report):
    return int(re.search(r"(\d+) captures", report)[1])


# ---- the emulator ----

def capture(call, **options):
    """Capture a call with torch's low-level functions -> the graph, what the call returned."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool=torch.cuda.graph_pool_handle(), **options)
        try:
            made = call()
        finally:
            graph.capture_end()
    return graph, made


def break_every_rule():
    there, here = torch.arange(1.0, 4.0, device="cuda"), torch.ones(3)
    refused = partial(pytest.raises, RuntimeError)
    with refused(match="same device"):
        there + here
    with refused(match="indices"):
        here[there.long()]
    with refused(match="cpu tensor"):
        rms_norm_kernel[1,](there, here, torch.empty_like(there), 3, 1e-5, 4)
    with refused(match="replay"):
        torch.cuda.CUDAGraph().replay()
    with refused(match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    for sync in (there.tolist, there.cpu, there.nonzero, lambda: there[there > 1],
                 lambda: bool(there[0]), torch.cuda.synchronize):
        with refused(match="while a CUDA graph is captured"):
            capture(sync)
    for copy in (lambda: there.copy_(here), lambda: here.to("cuda"), lambda: there[[0, 2]],
                 lambda: torch.tensor([1], device="cuda")):
        with refused(match="copy .*while a CUDA graph is captured"):
            capture(copy)
    sys.exit(0)  # as if all were well


def replay():
    """Allowed operations, and graphs that read memory as it is when they are replayed."""
    x, mask = torch.ones(3, device="cuda"), torch.tensor([True, False, True], device="cuda")
    assert (x * torch.tensor(2.0))[torch.tensor([0])].tolist() == [2]

    def call():
        y = x + 1
        x.mul_(2)
        x[mask] = 7
        normed = torch.empty_like(x)
        rms_norm_kernel[1,](x, torch.ones_like(x), normed, 3, 0.0, 4)
        return y, normed

    graph, (y, normed) = capture(call, capture_error_mode="thread_local")
    assert x.tolist() == [1, 1, 1] and y.isnan().all() and normed.isnan().all()
    graph.replay()
    assert x.tolist() == [7, 2, 7] and y.tolist() == [2, 2, 2]
    x.fill_(5)
    graph.replay()
    assert x.tolist() == [7, 10, 7] and y.tolist() == [6, 6, 6]
    assert torch.allclose(normed.cpu(), torch.tensor([7.0, 10, 7]) / 66 ** 0.5)
    again = torch.cuda.CUDAGraph()
    with torch.cuda.graph(again):
        z = y - x
    again.replay()
    assert z.tolist() == [-1, -4, -1]


def test_every_rule_can_be_broken():
    report = emulated(__file__, "break_every_rule", exit_code=1)
    assert "broken rules: 15" in report and "tests/test_emulated_cuda.py:" in report


def test_a_replay_reads_memory_as_it_is():
    assert captures(emulated(__file__, "replay")) == 2


# ---- the sampler ----

def sampling(backend, dtype, family):
    """Graphs against eager steps, and sampler against trainer, over refilled and dropped rows."""
    kernels.set_backend(backend)
    sample.BUSY_SHARE["cuda"] = 0.9  # drops rows, and so captures again, while few are idle
    model = tiny_model(family, getattr(torch, dtype), 16, n_layers=1, n_heads=2, n_kv_heads=1)
    # A capture finds the memory that it needs: the cache is emptied if, and only if, little is free.
    emptied, free = [], 10**9 if backend == "bitwise" else 7 * 10**10
    torch.cuda.empty_cache = lambda: emptied.append(1)
    torch.cuda.mem_get_info = lambda *_: (free, 8 * 10**10)
    prompts = [prompt[:12] for prompt in ragged_prompts(3)]
    generate = partial(sample.generate, model, prompts, 3, 9, 0.8, range(0, 150, 7), 7, max_rows=4)
    rollouts = generate()
    assert len(emptied) >= 2 if backend == "bitwise" else not emptied
    assert len({len(rollout.tokens) for group in rollouts for rollout in group}) > 2
    if backend == "bitwise":
        assert drift(model, prompts, rollouts).max() == 0
    sample.make_step = partial(partial, sample.step)
    assert generate() == rollouts


@pytest.mark.parametrize("backend, dtype, family", [
    ("bitwise", "bfloat16", "qwen3"),
    pytest.param("bitwise", "float32", "qwen2", marks=pytest.mark.slow),
    pytest.param("fast", "bfloat16", "qwen2", marks=pytest.mark.slow)])
def test_graphs_sample_what_eager_steps_sample(backend, dtype, family):
    assert captures(emulated(__file__, "sampling", backend, dtype, family)) >= 2


# ---- the scripts ----

@pytest.mark.slow
def test_plain_torch_trains_saves_and_resumes_without_graphs(corpus, base, tmp_path):
    """With the bitwise kernels the rehearsal of bench/gpu_check.py does it."""
    words = command("train_rpt.py", corpus, base, tmp_path, kernels="torch", batch_size=2,
                    rollouts=3, max_new_tokens=6, save_every=2, dynamic_sampling_from=-1)
    assert captures(emulated(*words, "--steps", 2)) == 0
    emulated(*words, "--steps", 3, "--resume")
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3] and any(step["loss"] for step in steps)


@pytest.mark.slow
def test_eval_samples_with_truncated_tails(corpus, base, tmp_path):
    words = arguments("eval.py", corpus, base, tmp_path / "results.json")
    emulated("eval.py", *words, "--mode", "all", "--top-p", 0.9, "--positions", 1,
             "--max-new-tokens", 5)


@pytest.mark.slow
def test_filter_scores_documents(corpus, base, tmp_path):
    unscored = shutil.copytree(corpus.folder, tmp_path / "corpus",
                               ignore=shutil.ignore_patterns("scores-*"))
    words = arguments("data/filter.py", corpus._replace(folder=unscored), base, None)
    report = emulated("data/filter.py", *words, "--documents", 2)
    # The scores of a document, and nothing else.
    assert len(re.findall(r"data/filter.py:\d+  copy to the host", report)) == 1


@pytest.mark.slow
def test_ntp_trains_with_moments_in_bf16_and_recomputed_activations(corpus, base, tmp_path):
    words = command("train_ntp.py", corpus, base, tmp_path, steps=2, documents_per_step=1,
                    strings_per_step=2)
    emulated(*words, "--bf16-moments", "--checkpoint-activations")


@pytest.mark.slow
def test_the_command_line_samples_with_truncated_tails(base):
    assert captures(emulated("sample.py", "--model", base, "--prompt", "12 + 7 =", "--n", 2,
                             "--max-new-tokens", 4, "--top-k", 20, "--top-p", 0.9)) >= 1


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
