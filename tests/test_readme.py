"""README.md and README.zh.md: every command runs, every function and file named is there, and they agree.

The commands of their ```sh blocks run in order, in a copy of the tree, with SMALL's options put behind them;
what they read is there (`mine/`, made of the README's own examples, and a Qwen3 folder). `make` is run by
test_pipeline.py.
"""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tiny import ROOT, SHAPE, command_line, documents, environment, run, tiny, write_jsonl

torch.set_num_threads(1)
READMES = [ROOT / name for name in ("README.md", "README.zh.md")]
TRAINING = ["--device", "cpu", "--dtype", "fp32", "--no-compile", "--batch-size", "4", "--warmup", "2"]
SMALL = {
    "data/island.py": ["--scale", "0.02"],
    "prepare.py": [],
    "tokenizer.py train": ["--vocab-size", "600"],
    "tokenizer.py encode": [],
    "tokenizer.py show": [],
    "tokenizer.py stats": [],
    "pretrain.py": [*SHAPE, *TRAINING, "--steps", "4", "--max-length", "128", "--eval-windows", "2"],
    "sft.py": [*TRAINING, "--epochs", "1", "--max-length", "64"],
    "collect.py": ["--limit", "12", "--k", "4", "--max-new-tokens", "4", "--device", "cpu"],
    "reward.py": [*TRAINING[:4], "--batch-size", "4", "--epochs", "1", "--max-length", "128"],
    "ppo.py": [*TRAINING[:4], "--batch-size", "4", "--minibatch", "2", "--steps", "1", "--max-length", "96",
               "--max-new-tokens", "4"],
    "dpo.py": [*TRAINING[:4], "--batch-size", "4", "--max-length", "64"],
    "quantize.py": ["--group", "16"],
    "evaluate.py": ["--limit", "1", "--max-new-tokens", "4", "--max-windows", "1", "--device", "cpu"],
    "model.py": ["--device", "cpu", "--max-new-tokens", "4"],
}


def blocks(readme, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", readme.read_text("utf-8"), re.M | re.S)


def commands(readme):
    """The commands of the ```sh blocks, each a list of words; comments are left out."""
    lines = "".join(blocks(readme, "sh")).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script_of(words):
    """(words before a script's options, the options): ["pretrain.py"], ["--data", ...]."""
    first = next(i for i, word in enumerate(words) if word.endswith(".py"))
    last = first + 2 if words[first] == "tokenizer.py" else first + 1
    return words[first:last], words[last:]


def references(readme):
    return re.findall(r"`([\w/]+\.py):([\w.]+)`", readme.read_text("utf-8"))


def shorten(words, options):
    """options, less those that SMALL gives too, and more of SMALL's."""
    small = SMALL[" ".join(words)]
    if "--plan" in options:  # nothing runs
        return options
    flags = {word for word in small if word.startswith("--")}
    kept, skipping = [], False
    for word in options:
        skipping = word in flags if word.startswith("--") else skipping
        kept += [] if skipping else [word]
    return kept + small


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the tree, with the user's data that the README speaks of, and an open model."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "data", folder / "data")
    write_jsonl(folder / "mine" / "pretrain" / "web.jsonl", documents(40, "mine"))
    (folder / "mine" / "sft").mkdir()
    chats = blocks(READMES[0], "json")[0]
    (folder / "mine" / "sft" / "chats.jsonl").write_text(20 * chats, "utf-8")
    write_jsonl(folder / "mine" / "preference" / "pairs.jsonl",
                20 * [json.loads(line) for line in blocks(READMES[0], "json")[1].splitlines()])
    (folder / "mine" / "scorer.py").write_text(blocks(READMES[0], "python")[0], "utf-8")
    write_jsonl(folder / "mine" / "prompts" / "one.jsonl", [{"prompt": "Hi", "meta": {"expected": "Ahoy"}}])
    shutil.copytree(tiny() / "base", folder / "Qwen3-0.6B")
    (folder / "Qwen3-0.6B" / "run.json").unlink()
    return folder


def run_command(words, options, processes):
    """Run one command where we are; returns the exit status."""
    script = words[0]
    if processes > 1:
        line = command_line(ROOT / script, *options, processes=2)
        return subprocess.run(line, env=environment(), timeout=600).returncode
    name = script.removesuffix(".py").rpartition("/")[2]
    return run(name, *words[1:], *options)


def test_every_command_runs(clone, monkeypatch, capfd):
    monkeypatch.chdir(clone)
    monkeypatch.syspath_prepend(ROOT / "data")
    monkeypatch.setattr("builtins.input", lambda prompt="": "/quit")
    ran = []
    for line in commands(READMES[0]):
        if line[0] == "make":
            continue
        words, options = script_of(line)
        assert line[: -len(words + options)] in (["python"], ["torchrun", "--nproc-per-node", "8"]), line
        status = run_command(words, shorten(words, options), processes=1 if line[0] == "python" else 2)
        assert status == 0, (line, capfd.readouterr().err[-2000:])
        ran.append(" ".join(words))
    assert set(ran) == set(SMALL)


def test_make_knows_its_targets_and_settings():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for readme in READMES:
        said = re.findall(r"\bmake(?: ([a-z-]+))?(?: ([A-Z]+)=\w+)?(?=[`\s])", readme.read_text("utf-8"))
        assert {"test", "chat", "help"} <= {target for target, _ in said}
        assert {"PRESET", "DATA"} <= {setting for _, setting in said}
        for target, setting in said:
            assert not setting or re.search(rf"^{setting} +=", makefile, re.M), setting
    for target in ("test", "chat", "help"):
        assert re.search(rf"^{target}:", makefile, re.M)


def test_both_languages_have_the_same_commands_examples_and_tables():
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert blocks(english, "json") == blocks(chinese, "json")
    assert blocks(english, "python") == blocks(chinese, "python")
    assert references(english) == references(chinese)
    tables = [[re.findall(r"`[^`]+`", line) for line in readme.read_text("utf-8").splitlines()
               if line[:1] == "|"] for readme in READMES]
    assert tables[0] == tables[1]


def test_every_function_it_names_is_there(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "data")
    found = set(references(READMES[0]))
    assert len(found) > 50
    for file, name in found:
        thing = importlib.import_module(file.removesuffix(".py").rpartition("/")[2])
        for part in name.split("."):
            assert hasattr(thing, part), f"{file}:{name}"
            thing = getattr(thing, part)


def test_every_file_and_link_is_there():
    for readme in READMES:
        text = readme.read_text("utf-8")
        text, absent = re.split(r"^## (?:What is not there yet|还没有的)\n", text, flags=re.M)
        named = set(re.findall(r"\]\(([\w./]+)\)|`((?:data/|tests/)?\w+\.(?:py|toml|md))`", text))
        for name in {"".join(pair) for pair in named}:
            assert (ROOT / name).exists(), name
        for name in re.findall(r"`(\w+\.py)`", absent):
            assert not (ROOT / name).exists(), f"{name} is there now: say so"


def test_every_flag_is_one_of_its_script(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "data")
    known = {}
    for script in SMALL:
        name, *subcommand = script.split()
        run(name.removesuffix(".py").rpartition("/")[2], *subcommand, "--help")
        known[script] = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for readme in READMES:
        for line in commands(readme):
            if line[0] != "make":
                words, options = script_of(line)
                assert {o for o in options if o.startswith("--")} <= known[" ".join(words)], line
        in_prose = (set(re.findall(r"(?<![\w-])--[a-z][\w-]+", readme.read_text("utf-8")))
                    - {"--nproc-per-node"})
        assert in_prose <= set.union(*known.values())


def forks():
    section = re.split(r"^## ", READMES[0].read_text("utf-8"), flags=re.M)
    rows = next(s for s in section if s.startswith("Forking")).splitlines()
    return [files for row in rows if (files := re.findall(r"`([\w./]+)`", row)) and row.startswith("|")]


def test_a_forked_stage_needs_no_other_file(tmp_path):
    """Each row's files, copied into an empty folder: the first one's --help runs (all side by side)."""
    started = []
    for number, files in enumerate(forks()):
        folder = tmp_path / str(number)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
        environ = {k: v for k, v in environment().items() if k != "PYTHONPATH"}
        process = subprocess.Popen([sys.executable, files[0], "--help"], cwd=folder, env=environ, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        started.append((files, process))
    assert len(started) == 11
    for files, process in started:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0 and "--help" in out, (files, err)
