"""Bad input to every script: one line on stderr (what and where), exit status 2, no traceback, no output.

A row is a script, the arguments that spoil its good ones (of an option given twice the last counts), and
words that the line must hold. Paths are in the folder that `world` makes.
"""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model import newest_state
from tiny import ROOT, SHAPE, dialogues, documents, preferences, run, sft_arguments, tiny, write_jsonl

torch.set_num_threads(1)
GOOD = {
    "prepare.py": "--input texts.jsonl --mix none --out out",
    "tokenizer.py train": "--input corpus/train --vocab-size 300 --out out",
    "tokenizer.py encode": "--tokenizer tokenizer --input corpus --out out",
    "pretrain.py": "--tokenizer tokenizer --data tokens --out out --steps 2 --batch-size 2 "
                   + " ".join(SHAPE),
    "sft.py": "--model base --data sft.jsonl --out out --epochs 1 --max-length 64 --no-compile --device cpu",
    "collect.py": "--model base --data prompts.jsonl --scorer letters.py:score --k 2 --max-new-tokens 4 "
                  "--device cpu --out out/preferences.jsonl",
    "reward.py": "--model base --data preferences.jsonl --out out --max-length 64 --device cpu",
    "ppo.py": "--model base --rules letters.py:score --data prompts.jsonl --out out --steps 1 --batch-size 4 "
              "--minibatch 4 --max-length 32 --max-new-tokens 8 --critic-warmup 0 --device cpu",
    "dpo.py": "--model base --data preferences.jsonl --out out --max-length 64 --device cpu",
    "quantize.py": "--model base --bits 4 --group 8 --out out",
    "evaluate.py": "--model base --data tokens --prompts prompts.jsonl --max-new-tokens 8 --device cpu "
                   "--out out/report.html",
    "model.py": "--model base --device cpu",
    "data/island.py": "--scale 0.05 --out out",
}
ROWS = """
prepare.py          | --input missing                     | missing: not found
prepare.py          | --input broken.jsonl                | broken.jsonl:3
prepare.py          | --input number.jsonl                | number.jsonl:2: `text` must be
prepare.py          | --input list.jsonl                  | list.jsonl:1
prepare.py          | --input nothing.jsonl               | nothing.jsonl: no text
prepare.py          | --input nothing                     | nothing: no .txt
prepare.py          | --input cut.jsonl.gz                | cut.jsonl.gz
prepare.py          | --input base/model.safetensors      | base/model.safetensors: .txt
prepare.py          | --mix web=lots                      | --mix web=lots
prepare.py          | --near-duplicate 2                  | --near-duplicate
prepare.py          | --processes 0                       | --processes
prepare.py          | --out prepared                      | prepared --overwrite
prepare.py          | --out sft.jsonl                     | sft.jsonl
tokenizer.py        |                                     | train encode
tokenizer.py        | retrain                             | train encode
tokenizer.py train  | --input missing                     | missing: not found
tokenizer.py train  | --input broken.jsonl                | broken.jsonl:3
tokenizer.py train  | --input number.jsonl                | number.jsonl:2
tokenizer.py train  | --input list.jsonl                  | list.jsonl:1
tokenizer.py train  | --input cut.jsonl.gz                | cut.jsonl.gz
tokenizer.py train  | --input nothing                     | nothing: no text
tokenizer.py train  | --input nothing.jsonl               | nothing.jsonl
tokenizer.py train  | --vocab-size 100                    | --vocab-size
tokenizer.py train  | --vocab-size many                   | --vocab-size many
tokenizer.py train  | --out tokenizer                     | tokenizer --overwrite
tokenizer.py train  | --out sft.jsonl                     | sft.jsonl
tokenizer.py encode | --tokenizer missing                 | missing tokenizer.json
tokenizer.py encode | --tokenizer garbled                 | garbled/tokenizer.json
tokenizer.py encode | --input missing                     | missing
tokenizer.py encode | --input nothing                     | nothing: no .jsonl
tokenizer.py encode | --input split                       | broken.jsonl:3
tokenizer.py encode | --processes 0                       | --processes
tokenizer.py encode | --out tokens                        | tokens --overwrite
pretrain.py         | --tokenizer missing                 | missing tokenizer.json
pretrain.py         | --tokenizer garbled                 | garbled/tokenizer.json
pretrain.py         | --tokenizer other                   | tokens/index.json another tokenizer
pretrain.py         | --data missing                      | missing/index.json
pretrain.py         | --data nothing                      | nothing/index.json
pretrain.py         | --data corpus                       | corpus/index.json
pretrain.py         | --data tokens-cut                   | web.en-00000.bin
pretrain.py         | --data tokens-empty                 | tokens-empty/index.json empty
pretrain.py         | --out base                          | base finished --overwrite
pretrain.py         | --out corpus --overwrite            | corpus not a run's folder
pretrain.py         | --out sft.jsonl                     | sft.jsonl
pretrain.py         | --out base-unfinished               | base-unfinished --resume --overwrite
pretrain.py         | --out base-unfinished --resume      | base-unfinished not what the run began with
pretrain.py         | --out run-garbled --resume          | run-garbled/run.json
pretrain.py         | --steps 0                           | --steps
pretrain.py         | --steps several                     | --steps several
pretrain.py         | --batch-size 0                      | --batch-size
pretrain.py         | --micro-batch -1                    | --micro-batch
pretrain.py         | --hidden-size 33                    | --hidden-size 33
pretrain.py         | --hidden-size 0                     | --hidden-size
pretrain.py         | --num-hidden-layers 0               | --num-hidden-layers
pretrain.py         | --num-attention-heads 0             | --num-attention-heads
pretrain.py         | --num-key-value-heads 3             | --num-key-value-heads 3
pretrain.py         | --intermediate-size 0               | --intermediate-size
pretrain.py         | --rope-theta 0                      | --rope-theta
pretrain.py         | --lr -1                             | --lr
pretrain.py         | --lr nan                            | --lr
pretrain.py         | --weight-decay -1                   | --weight-decay
pretrain.py         | --clip -1                           | --clip
pretrain.py         | --warmup -1                         | --warmup
pretrain.py         | --eval-windows -1                   | --eval-windows
pretrain.py         | --seed -1                           | --seed
pretrain.py         | --schedule square                   | --schedule square
pretrain.py         | --dtype fp8                         | --dtype fp8
pretrain.py         | --device abacus                     | --device abacus
pretrain.py         | --optimizer sgd                     | --optimizer sgd
pretrain.py         | --dropout 1                         | --dropout 1
pretrain.py         | --offload                           | --offload --parallel fsdp
pretrain.py         | --num-experts 2 --num-experts-per-tok 3 | --num-experts-per-tok 3
pretrain.py         | --model missing                     | missing: no such folder
pretrain.py         | --model base-cut                    | base-cut/model.safetensors: damaged
pretrain.py         | --model base --hidden-size 64       | --hidden-size 64 32
pretrain.py         | --model base --max-length 128       | --max-length 128 --rope-theta
pretrain.py         | --model base --tokenizer other      | --tokenizer other
pretrain.py         | --model base --out base             | --out base --model
pretrain.py         | --plan --tokenizer missing          | missing tokenizer.json
pretrain.py         | --plan --model base --hidden-size 64 | --hidden-size 64 32
pretrain.py         | --resume --overwrite                | --resume --overwrite
sft.py              | --model missing                     | missing: no such folder
sft.py              | --model corpus                      | corpus: not a model folder
sft.py              | --model sft.jsonl                   | sft.jsonl: no such folder
sft.py              | --model base-cut                    | base-cut/model.safetensors: damaged
sft.py              | --model base-weightless             | base-weightless/model.safetensors: no such file
sft.py              | --model config-garbled              | config-garbled/config.json
sft.py              | --model config-gemma                | config-gemma/config.json Gemma2ForCausalLM
sft.py              | --model config-wider                | config-wider model.embed_tokens.weight
sft.py              | --model adapter-lost                | adapter-lost nowhere
sft.py              | --model adapter-cut                 | adapter-cut/adapter_model.safetensors
sft.py              | --model adapter-keyless             | adapter-keyless/adapter_config.json
sft.py              | --model adapter-dora                | adapter-dora/adapter_config.json use_dora
sft.py              | --data missing                      | missing: not found
sft.py              | --data broken.jsonl                 | broken.jsonl:3
sft.py              | --data number.jsonl                 | number.jsonl:1
sft.py              | --data list.jsonl                   | list.jsonl:1
sft.py              | --data role.jsonl                   | role.jsonl:2: wizard
sft.py              | --data silent.jsonl                 | silent.jsonl:1 empty
sft.py              | --data unanswered.jsonl             | unanswered.jsonl:1
sft.py              | --data nothing.jsonl                | nothing.jsonl: no example
sft.py              | --data nothing                      | nothing: no text .jsonl
sft.py              | --data cut.jsonl.gz                 | cut.jsonl.gz
sft.py              | --valid missing                     | missing: not found
sft.py              | --valid role.jsonl                  | role.jsonl:2
sft.py              | --replay missing                    | missing/index.json
sft.py              | --replay tokens-other               | tokens-other/index.json another tokenizer
sft.py              | --replay-share 1                    | --replay-share
sft.py              | --max-length 100                    | --max-length 100
sft.py              | --prefix 4 --max-length 48          | --prefix base fine-tune
sft.py              | --prefix 4                          | --max-length
sft.py              | --lora 2 --freeze 1                 | --lora --prefix --freeze
sft.py              | --freeze 9                          | --freeze 9
sft.py              | --offload                           | --offload --parallel
sft.py              | --parallel fsdp --lora 2            | --lora --parallel base
sft.py              | --model prefix-other                | prefix-other missing prompt_embeddings
sft.py              | --out base                          | base
sft.py              | --out base --overwrite              | base --model
sft.py              | --out sft                           | sft finished --overwrite
sft.py              | --out sft-unfinished                | sft-unfinished --resume --overwrite
sft.py              | --lora -1                           | --lora
sft.py              | --merge                             | --merge --lora
sft.py              | --epochs 0                          | --epochs
sft.py              | --lr -1                             | --lr
sft.py              | --seed -1                           | --seed
sft.py              | --dtype bf17                        | --dtype bf17
evaluate.py         | --model missing                     | missing: no such folder
evaluate.py         | --model corpus                      | corpus: not a model folder
evaluate.py         | --model base-cut                    | base-cut/model.safetensors: damaged
evaluate.py         | --data missing                      | missing/index.json
evaluate.py         | --prompts missing                   | missing
evaluate.py         | --prompts broken.jsonl              | broken.jsonl:3
evaluate.py         | --prompts number.jsonl              | number.jsonl:1
evaluate.py         | --prompts role.jsonl                | role.jsonl:1
evaluate.py         | --prompts wizard.jsonl              | wizard.jsonl:1 wizard
evaluate.py         | --prompts nothing.jsonl             | nothing.jsonl: no prompts
evaluate.py         | --scorer missing.py:score           | missing.py
evaluate.py         | --scorer sft.jsonl                  | sft.jsonl file.py:function
evaluate.py         | --scorer scorer.py:missing          | scorer.py missing
evaluate.py         | --scorer scorer.py:score            | scorer ZeroDivisionError
evaluate.py         | --out reported.html                 | reported.html --overwrite
evaluate.py         | --rescore                           | leave out --model
evaluate.py         | --summary missing                   | missing
evaluate.py         | --batch-size 0                      | --batch-size
evaluate.py         | --dtype fp8                         | --dtype fp8
model.py            | --model missing                     | missing: no such folder
collect.py          | --model corpus                      | corpus: not a model folder
collect.py          | --data missing                      | missing: not found
collect.py          | --data broken.jsonl                 | broken.jsonl:3
collect.py          | --data nothing.jsonl                | nothing.jsonl: no prompt
collect.py          | --data wizard.jsonl                 | wizard.jsonl:1 wizard
collect.py          | --written broken.jsonl              | broken.jsonl:1
collect.py          | --scorer scorer.py:score            | scorer ZeroDivisionError
collect.py          | --scorer letters.py:none            | letters.py none
collect.py          | --key silver                        | silver
collect.py          | --k 1                               | --k
collect.py          | --out prompts.jsonl                 | prompts.jsonl --overwrite
collect.py          | --out base                          | base folder
reward.py           | --model corpus                      | corpus: not a model folder
reward.py           | --model adapter-lost                | adapter-lost nowhere
reward.py           | --data missing                      | missing: not found
reward.py           | --data preferences-broken.jsonl     | preferences-broken.jsonl:31
reward.py           | --data prompts.jsonl                | prompts.jsonl:1
reward.py           | --data nothing.jsonl                | nothing.jsonl: no ranking
reward.py           | --valid nothing.jsonl               | nothing.jsonl: no ranking
reward.py           | --max-length 600                    | --max-length 600
reward.py           | --out base                          | base --out
reward.py           | --out corpus --overwrite            | corpus not a run's folder
ppo.py              | --model corpus                      | corpus: not a model folder
ppo.py              | --reward base                       | base
ppo.py              | --data missing                      | missing: not found
ppo.py              | --data broken.jsonl                 | broken.jsonl:3
ppo.py              | --data nothing.jsonl                | nothing.jsonl: no prompt
ppo.py              | --rules letters.py:none             | letters.py none
ppo.py              | --minibatch 3                       | --batch-size 4 minibatches 3
ppo.py              | --top-k 5                           | --top-k temperature
ppo.py              | --max-new-tokens 64                 | --max-new-tokens
ppo.py              | --out base                          | base --out
dpo.py              | --model corpus                      | corpus: not a model folder
dpo.py              | --data missing                      | missing: not found
dpo.py              | --data preferences-broken.jsonl     | preferences-broken.jsonl:31
dpo.py              | --data prompts.jsonl                | prompts.jsonl:1
dpo.py              | --data nothing.jsonl                | nothing.jsonl: no pair
dpo.py              | --max-length 600                    | --max-length 600
dpo.py              | --offload                           | --offload --parallel
dpo.py              | --out base                          | base --out
quantize.py         | --model corpus                      | corpus: not a model folder
quantize.py         | --model base-cut                    | base-cut/model.safetensors: damaged
quantize.py         | --bits 5                            | --bits
quantize.py         | --group 5                           | groups of 5
quantize.py         | --method gptq                       | --calibration
quantize.py         | --method gptq --calibration missing | missing: not found
quantize.py         | --out base                          | base --out
quantize.py         | --out sft                           | sft --out
model.py            | --model corpus                      | corpus: not a model folder
model.py            | --model base-cut                    | base-cut/model.safetensors: damaged
model.py            | --model garbled                     | garbled/tokenizer.json
model.py            | --temperature -1                    | --temperature
model.py            | --min-p nan                         | --min-p
model.py            | --max-new-tokens 0                  | --max-new-tokens
model.py            | --device abacus                     | --device abacus
data/island.py      | --scale 0                           | --scale
data/island.py      | --scale many                        | --scale many
data/island.py      | --seed one                          | --seed one
data/island.py      | --out islanded                      | islanded finished --overwrite
data/island.py      | --out sft.jsonl                     | sft.jsonl
"""
ROWS = [tuple(cell.strip() for cell in line.split("|")) for line in ROWS.strip().splitlines()]
ROWS += [(script, f"{option} 1", option) for script in GOOD for option in ("--unknown", "--see")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder of good things and of everything that can be wrong with them."""
    folder = tmp_path_factory.mktemp("world")
    for name in ("corpus", "tokenizer", "tokens", "base"):
        shutil.copytree(tiny() / name, folder / name)
    write_jsonl(folder / "texts.jsonl", documents(40, "texts"))
    write_jsonl(folder / "sft.jsonl", dialogues(30, "bad"))
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "Where does the cat sleep?"}])
    write_jsonl(folder / "preferences.jsonl", preferences(30, "bad"))
    assert run("prepare", "--input", folder / "texts.jsonl", "--mix", "none", "--out",
               folder / "prepared") == 0
    for source, name in (("tokenizer", "other"), ("tokens", "tokens-other")):
        shutil.copytree(folder / source, folder / name)
    assert run("tokenizer", "train", "--input", folder / "corpus", "--vocab-size", 330, "--out",
               folder / "other", "--overwrite") == 0
    assert run("tokenizer", "encode", "--tokenizer", folder / "other", "--input", folder / "corpus", "--out",
               folder / "tokens-other", "--overwrite") == 0
    assert run("sft", *sft_arguments(folder, folder / "sft", epochs=1)) == 0
    assert run("sft", *sft_arguments(folder, folder / "adapter", epochs=1, lora=2)) == 0
    spoil_lines(folder)
    spoil_folders(folder)
    return folder


def spoil_lines(folder):
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy!"}
    good = [{"text": "The cat sleeps by the lake.", "messages": [question, answer], "prompt": "Hi"}] * 2
    wizard = {"role": "wizard", "content": "Hi"}
    write_jsonl(folder / "broken.jsonl", good)
    with open(folder / "broken.jsonl", "a") as file:
        file.write('{"text": "The cat\n')
    write_jsonl(folder / "number.jsonl", [{"text": "The cat sleeps.", "messages": 5, "prompt": 5},
                                          {"text": 5}])
    write_jsonl(folder / "list.jsonl", [["The cat sleeps by the lake."]])
    write_jsonl(folder / "role.jsonl", [{"messages": [question, answer]}, {"messages": [wizard, answer]}])
    write_jsonl(folder / "wizard.jsonl", [{"prompt": [wizard]}])
    write_jsonl(folder / "silent.jsonl", [{"prompt": "Hi", "completion": ""}])
    write_jsonl(folder / "unanswered.jsonl", [{"messages": [question]}])
    (folder / "nothing.jsonl").touch()
    (folder / "nothing").mkdir()
    (folder / "cut.jsonl.gz").write_bytes(bytes.fromhex("1f8b0800000000000003ab562a49ad28"))
    (folder / "split" / "train").mkdir(parents=True)
    shutil.copy(folder / "broken.jsonl", folder / "split" / "train")
    write_jsonl(folder / "preferences-broken.jsonl", preferences(30, "bad"))
    with open(folder / "preferences-broken.jsonl", "a") as file:
        file.write('{"prompt": "H')
    (folder / "letters.py").write_text("def score(prompt, answer, meta):\n    return {'gold': len(answer)}\n")
    (folder / "scorer.py").write_text("def score(prompt, answer, meta):\n    return {'gold': 1 / 0}\n")
    (folder / "reported.html").touch()
    (folder / "islanded").mkdir()
    (folder / "islanded" / "run.json").touch()


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")


def spoil_folders(folder):
    for source, name in (
        ("base", "garbled"), ("tokens", "tokens-cut"), ("tokens", "tokens-empty"), ("base", "base-cut"),
        ("base", "base-weightless"), ("base", "base-unfinished"), ("sft", "sft-unfinished"),
        ("base", "run-garbled"), ("base", "config-garbled"), ("base", "config-gemma"),
        ("base", "config-wider"), ("adapter", "adapter-lost"), ("adapter", "adapter-cut"),
        ("adapter", "adapter-keyless"), ("adapter", "adapter-dora"), ("adapter", "prefix-other")):
        shutil.copytree(folder / source, folder / name)
    for path in ("garbled/tokenizer.json", "tokens-cut/train/web.en-00000.bin", "base-cut/model.safetensors",
                 "config-garbled/config.json", "adapter-cut/adapter_model.safetensors"):
        cut(folder / path)
    change(folder / "tokens-empty" / "index.json", shards=[])
    (folder / "base-weightless" / "model.safetensors").unlink()
    for name in ("base-unfinished", "sft-unfinished"):
        change(folder / name / "run.json", finished=False)
    (folder / "run-garbled" / "run.json").write_text("{}")
    change(folder / "config-gemma" / "config.json", architectures=["Gemma2ForCausalLM"])
    change(folder / "config-wider" / "config.json", hidden_size=64)
    change(folder / "adapter-lost" / "adapter_config.json", base_model_name_or_path="nowhere")
    (folder / "adapter-keyless" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    change(folder / "adapter-dora" / "adapter_config.json", use_dora=True)
    change(folder / "prefix-other" / "adapter_config.json", peft_type="PREFIX_TUNING")


def told_in_one_line(script, arguments, words, capsys):
    name = script.split()[0]
    main = importlib.import_module(Path(name).stem).main
    status = main([*script.split()[1:], *arguments.split()])
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not line.startswith("base: ")]  # evaluate.py has answered with a model
    assert status == 2 and len(lines) == 1, lines
    assert (lines[0].startswith(Path(name).name + ": ")
            and all(word in lines[0] for word in words.split())), lines[0]
    unknown = "--unknown" in arguments or "--see " in arguments
    assert ("unrecognized" in lines[0]) == unknown, "the option that the row is about is gone"


@pytest.mark.parametrize("script, spoiled, words", ROWS, ids=[f"{s} {a}" for s, a, _ in ROWS])
def test_bad_input_is_told_in_one_line(world, monkeypatch, capsys, script, spoiled, words):
    monkeypatch.syspath_prepend(ROOT / "data")
    monkeypatch.chdir(world)
    shutil.rmtree("out", ignore_errors=True)
    told_in_one_line(script, f"{GOOD.get(script, '')} {spoiled}", words, capsys)
    finished = [p for p in Path("out").rglob("*.json")
                if "index" in p.name or '"finished": true' in p.read_text()]
    assert not finished and not Path("out/report.html").exists()


DAMAGED_STATES = {
    "tensors.safetensors": (cut, "damaged"),
    "state.json": (cut, "not valid JSON"),
    "state.json ": (lambda path: path.write_text("{}"), "not a state of this run"),
    "tensors.safetensors ": (Path.unlink, "no such file"),
    "tensors.safetensors  ": (lambda path: save_file({"other": torch.zeros(2)}, path),
                              "not a state of this run"),
}


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_a_damaged_state_is_named_and_the_one_before_it_goes_on(world, monkeypatch, capsys, name):
    monkeypatch.chdir(world)
    shutil.rmtree("run", ignore_errors=True)
    arguments = [str(a) for a in sft_arguments(Path("."), "run", epochs=1)]
    shutil.copytree("sft", "run")
    change(Path("run/run.json"), finished=False,
           options=json.loads(Path("run/run.json").read_text())["options"]
           | {"out": "run", "model": "base", "data": ["sft.jsonl"]})
    newest = newest_state("run")
    damage, words = DAMAGED_STATES[name]
    damage(newest / name.strip())
    told_in_one_line("sft.py", " ".join([*arguments, "--resume"]), f"{newest} {words}", capsys)
    shutil.rmtree(newest)
    assert run("sft", *arguments, "--resume") == 0


def test_what_is_no_run_is_never_removed(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    before = sorted(Path(".").rglob("*"))
    for out in (".", "corpus", "base"):
        assert run("sft", *sft_arguments(Path("."), out), "--overwrite") == 2
        assert sorted(Path(".").rglob("*")) == before
