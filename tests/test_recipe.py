"""The recipe from end to end with a tiny model: every command fits the next."""
import json
import random
import subprocess
import sys

import pytest

from data.sums import write_document
from tiny import ENVIRONMENT, ROOT, base, corpus, write_lines


@pytest.mark.slow
def test_the_recipe_and_its_controls_end_in_a_table_and_a_picture(corpus, base, tmp_path):
    rng = random.Random(5)
    documents = [write_document(rng) for _ in range(200)]
    text = write_lines(tmp_path / "my text.jsonl",
                       *(dict(problem=one.problem, solution=one.solution) for one in documents))
    run = tmp_path / "a run"
    words = [sys.executable, "paper/recipe.py", "--model", base, "--text", text, "--out-dir", run, "--steps", 2,
             "--batch-size", 8, "--documents", 20, "--positions", 10, "--dtype", "fp32"]
    first, second = [*map(str, words)], [*map(str, words), "--controls"]
    ran = subprocess.run(first, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0 and "[10/10]" in ran.stdout, ran.stdout + ran.stderr
    assert (run / "rpt" / "table1.png").exists() and (run / "rpt" / "curves.png").exists()
    ran = subprocess.run(second, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout.count("done before") == 10, ran.stdout + ran.stderr
    lines = json.loads((run / "controls.json").read_text())
    ran = subprocess.run([*first, "--lr", "1"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert ran.returncode == 2 and "was begun with --lr 2e-05, not 1.0; take the same flags" in ran.stderr
    names = {line["checkpoint"].removeprefix(f"{run}/").split("/step_")[0] for line in lines}
    assert names == {base, "warm", "rpt", "ntp", "mixed", "own", "empty", "warm-blind", "blind"}
    table = (run / "controls.md").read_text()
    assert all(f"{name}/step" in table for name in names - {base})
    spent = {name: sum(json.loads(line)["flops"] for line in (run / name / "metrics.jsonl").open())
             for name in ("rpt", "ntp", "mixed", "empty", "blind")}
    assert all(flops >= 0.5 * spent["rpt"] for flops in spent.values())
