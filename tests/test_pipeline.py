"""`make PRESET=tiny` in a copied tree: interrupted, continued, done once, rebuilt after a changed option."""

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
