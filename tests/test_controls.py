"""The commands of controls.py without running them, and its table from results written by hand."""
import json
import re
import shlex

import pytest

from paper import controls
import train_rpt
from tiny import ROOT

WORDS = dict(run="R", seed=3, base="B", base_steps=3000, rpt_steps=150, positions=4800, trained="N T", tuned="B U",
             rpt_checkpoints="R/rpt/step_000010", ntp="N", rpt="T")


def test_every_flag_exists_and_every_control_starts_from_the_base_and_is_evaluated():
    commands = [shlex.split(command.format(**WORDS)) for _, command, _ in controls.stages_of(controls.TRAINED)]
    for script, *words in commands:
        flags = {word for word in words if word.startswith("--")}
        assert flags <= set(re.findall(r'add(?:_argument)?\(\s*"(--[a-z-]+)"', (ROOT / script).read_text())), script
    runs = {words[words.index("--out-dir") + 1]: words for words in commands if "--out-dir" in words}
    assert set(runs) == {f"R/{name}" for name in ["base", *controls.TRAINED, *(f"tuned-{name}" for name in controls.TUNED)]}
    for name in controls.TRAINED:
        assert runs[f"R/{name}"][runs[f"R/{name}"].index("--init") + 1] == "B"
    assert runs["R/tuned-ntp"][-1] == "N" and runs["R/tuned-rpt"][-1] == "T"
    assert runs["R/tuned-longer"][-3:] == ["B", "--steps", "200"]


def test_a_variant_differs_from_rpt_in_what_its_flags_say():
    def parsed(name):
        command = next(c for _, c, _ in controls.stages_of(["rpt", name]) if f"--out-dir {{run}}/{name} " in c)
        return vars(train_rpt.parse_args(shlex.split(command.format(**WORDS))[1:]))

    plain = parsed("rpt")
    differs = {name: {k: v for k, v in parsed(name).items() if v != plain[k] and k not in ("out_dir", "save_every")}
               for name in controls.VARIANTS}
    assert differs["no-thought"] == dict(no_thought=True, steps=800) and differs["dense"] == dict(reward="dense")
    assert differs["G-4"] == dict(rollouts=4, batch_size=64) and differs["G-16"] == dict(rollouts=16, batch_size=16)
    assert differs["normalised"] == dict(normalize_advantage=True)
    assert differs["dynamic"] == dict(dynamic_sampling_from=0)


def test_the_table_has_the_mean_of_the_seeds_and_each_of_them(tmp_path):
    for seed, shift in ((0, 0), (1, 2)):
        run = tmp_path / f"seed-{seed}"
        (run / "rpt").mkdir(parents=True)
        (run / "rpt" / "metrics.jsonl").write_text('{"flops": 1e9}\n{"flops": 2e9}\n')
        line = lambda name, mode, accuracy, **more: dict(checkpoint=f"{run}/{name}/step_000001", mode=mode,
                                                         accuracy=accuracy + shift, **more)
        (run / "results.json").write_text(json.dumps(
            [line(name, mode, accuracy, split=split, pass_at_k=90)
             for name, (ntp, reasoning) in dict(base=(20, 50), rpt=(21, 97)).items()
             for mode, accuracy in (("ntp", ntp), ("reasoning", reasoning)) for split in ("medium", "hard")]))
        (run / "answers.json").write_text(json.dumps([line(name, "reasoning", accuracy) for name, accuracy in
                                                      {"base": 10, "tuned-base": 30, "rpt": 40}.items()]))
    rows = controls.table(tmp_path, [0, 1]).splitlines()
    assert "| base | 21.0 (20.0, 22.0) | 51.0 (50.0, 52.0) | 90.0 (90.0, 90.0) | - | 0.0e+00 |" in rows
    assert "| rpt | 22.0 (21.0, 23.0) | 98.0 (97.0, 99.0) | 90.0 (90.0, 90.0) | - | 3.0e+09 |" in rows
    assert "| base | 11.0 (10.0, 12.0) | 31.0 (30.0, 32.0) | 0.0e+00 |" in rows
    assert "| rpt | 41.0 (40.0, 42.0) | - | 3.0e+09 |" in rows and "| ntp | - | - | 0.0e+00 |" in rows


@pytest.mark.parametrize("name", controls.TRAINED)
def test_one_control_alone_needs_no_other(name):
    stages = controls.stages_of(list(dict.fromkeys(["rpt", name])))
    made = {command.split("--out-dir {run}/")[1].split()[0] for _, command, _ in stages if "--out-dir" in command}
    tuned = {"tuned-base", "tuned-rpt", "tuned-longer"} | ({"tuned-ntp"} if name == "ntp" else set())
    assert made == {"base", "rpt", name} | tuned


def test_a_table_of_fewer_controls_is_made_again_and_a_complete_one_is_kept(tmp_path):
    def write(file, *names):
        (tmp_path / file).write_text(json.dumps([dict(checkpoint=f"{tmp_path}/{name}/step_000001") for name in names]))

    write("results.json", "base", "rpt", "ntp")
    write("answers.json", "base", "tuned-base", "rpt", "tuned-rpt", "tuned-longer")
    controls.forget_tables(tmp_path, ["rpt"])
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "answers.json"}
    controls.forget_tables(tmp_path, ["rpt", "ntp"])  # ntp is to be trained on questions too
    assert {path.name for path in tmp_path.iterdir()} == {"results.json"}
    controls.forget_tables(tmp_path, ["rpt", "ntp", "G-4"])
    assert not list(tmp_path.iterdir())
