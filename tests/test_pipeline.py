"""`make`: interrupted, continued, done once, rebuilt after a changed option; what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def start_make(folder, *settings):
    command = ["make", "PRESET=tiny", "VENV=none", f"PYTHON={sys.executable}", *settings]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True)


def run_make(folder, *settings):
    """The stages that ran, in order, once each; `make` must succeed."""
    process = start_make(folder, *settings)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    commands = [line for line in output.splitlines() if line.startswith(sys.executable)]
    scripts = [Path(line.split()[1]).stem for line in commands]
    return list(dict.fromkeys(scripts))


def interrupt_make(folder, file):
    """Ctrl-C, as a terminal sends it (to make and to what it runs), a moment after a file has come to be."""
    process = start_make(folder)
    while not (folder / file).exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate()[0]
    assert process.returncode != 0 and "Traceback" not in output, output


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_is_interrupted_continues_and_rebuilds_what_changed(tmp_path):
    unwanted = shutil.ignore_patterns(".*", "run*", "__pycache__")
    folder = Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=unwanted))
    interrupt_make(folder, "run-tiny/base/metrics.jsonl")
    assert json.loads((folder / "run-tiny/base/run.json").read_text())["finished"] is False
    ran = run_make(folder)
    assert ran[:2] == ["pretrain", "sft"] and ran[-1] == "evaluate"
    assert set(ran[2:-1]) == {"collect", "reward", "ppo", "dpo", "quantize"}
    steps = [json.loads(line)["step"] for line in open(folder / "run-tiny/base/metrics.jsonl")]
    assert steps == sorted(steps) and set(range(1, max(steps) + 1)) == set(steps)
    report = json.loads((folder / "run-tiny/report.json").read_text())
    assert {"base", "sft", "ppo", "dpo", "int4"} <= set(report["stages"])
    assert len(report["ppo"]["ppo"]) == 3
    assert report["bytes"]["int4"] <= 0.3 * report["bytes"]["dpo"]
    assert "gold_accuracy" in report["reward"]["zh"]
    assert (folder / "run-tiny/report.html").stat().st_size > 1000
    assert run_make(folder) == []
    assert set(run_make(folder, "DPO=--epochs 1 --batch-size 16")) == {"dpo", "quantize", "evaluate"}


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_refuses_a_preset_that_is_none_and_plans_only_what_there_is_data_for(tmp_path):
    def plan(*settings):
        return subprocess.run(["make", "-n", "VENV=none", *settings], cwd=ROOT, capture_output=True, text=True)

    for settings, says in ((["PRESET=smal"], "PRESET=smal: expected"), (["PRESET=data"], "goes with DATA")):
        result = plan(*settings)
        assert result.returncode == 2 and says in result.stderr and ".py" not in result.stdout
    for part in ("pretrain", "preference"):  # no chats, so no stage that is made of them
        (tmp_path / part).mkdir()
        (tmp_path / part / "a.jsonl").write_text("{}\n")
    result = plan(f"DATA={tmp_path}", "SCORER=data/island.py:score", f"RUN={tmp_path}/run")
    assert result.returncode == 0 and "pretrain.py" in result.stdout and "evaluate.py" in result.stdout
    assert "sft.py" not in result.stdout and "preferences.jsonl" not in result.stdout
