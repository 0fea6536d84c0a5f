# make              the whole pipeline on the island, a small world of known truth, to run/report.html
# make test         the tests (TESTS=tests/test_sft.py and PYTEST_ARGS="-k resume" narrow them down)
# make test-all     the tests with the slow ones
# make chat         talk to the last stage's model
# make hacking      PPO without its KL penalty: what it costs to trust the reward model
# make seeds        the pipeline for each of SEEDS="1 2 3", then the mean of their reports
# make clean        remove the artifacts of this world, not .venv
#
# PRESET=tiny       everything small, in one or two minutes                       artifacts in run-tiny/
# SEED=7            another world                                                 artifacts in run-seed7/
# DATA=folder       your own text: folder/{pretrain,sft,preference,prompts}       artifacts in run-data/
# SCORER=f.py:name  with DATA: ranks answers sampled to preference's prompts, and judges those to prompts/
# VENV=none         use the Python at hand (PYTHON=python3) instead of .venv
#
# An artifact is built once. After Ctrl-C, or a crash, `make` continues where it was. Changed options or data
# rebuild what depends on them; an edited script does not, unless `make -B`.

DATA   =
SCORER =
PRESET = $(if $(DATA),data,default)
SEED   = 1
SEEDS  = 1 2 3
VENV   = .venv
PYTHON = python3

# ---------------------------------------------------------------------------------------------------------
# The numbers of each preset.

VOCAB_default    = 3072
ISLAND_default   = --scale 1
PREPARE_default  = --mix web=75 papers=15 code=10
PRETRAIN_default = --hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 4 \
                   --intermediate-size 704 --max-length 256 --batch-size 16 --steps 1100 --lr 3e-3
SFT_default      = --max-length 256 --batch-size 16 --epochs 4 --lr 1e-3 --replay $(RUN)/tokens
COLLECT_default  = --k 6
REWARD_default   = --epochs 2 --batch-size 32 --micro-batch 48 --lr 5e-4
PPO_default      = --steps 80 --batch-size 64 --kl 0.05 --lr 1e-4
HACKING_default  = --steps 100 --batch-size 64 --kl 0 --lr 2e-4
DPO_default      = --epochs 1 --batch-size 32 --micro-batch 32 --lr 2e-4 --beta 0.3
EVALUATE_default =

VOCAB_tiny       = 2048
ISLAND_tiny      = --scale 0.1
PREPARE_tiny     = $(PREPARE_default)
PRETRAIN_tiny    = --hidden-size 128 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 2 \
                   --intermediate-size 352 --max-length 128 --batch-size 16 --steps 60 --lr 3e-3
SFT_tiny         = --max-length 128 --batch-size 16 --epochs 1 --lr 3e-4
COLLECT_tiny     = --k 4 --limit 200
REWARD_tiny      = --epochs 1 --batch-size 32 --lr 3e-4 --max-length 128
PPO_tiny         = --steps 3 --batch-size 16 --minibatch 8 --max-length 88 --critic-warmup 1
HACKING_tiny     = --steps 3 --batch-size 16 --minibatch 8 --max-length 88 --critic-warmup 1 --kl 0
DPO_tiny         = --epochs 1 --batch-size 32 --lr 1e-4 --max-length 128
EVALUATE_tiny    = --limit 20

VOCAB_data       = 8192
PREPARE_data     =
PRETRAIN_data    = --hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 4 \
                   --intermediate-size 704 --max-length 256 --batch-size 16 --steps 1500 --lr 3e-3
SFT_data         = --max-length 256 --batch-size 16 --epochs 1 --lr 5e-4
COLLECT_data     = --k 4 --limit 1000
REWARD_data      = --epochs 1 --batch-size 32 --micro-batch 32 --lr 3e-4
PPO_data         = --steps 20 --batch-size 64 --kl 0.05
HACKING_data     = --steps 40 --batch-size 64 --kl 0
DPO_data         = --epochs 1 --batch-size 32 --lr 1e-4
EVALUATE_data    =

VOCAB    = $(VOCAB_$(PRESET))
ISLAND   = $(ISLAND_$(PRESET))
PREPARE  = $(PREPARE_$(PRESET))
PRETRAIN = $(PRETRAIN_$(PRESET))
SFT      = $(SFT_$(PRESET))
COLLECT  = $(COLLECT_$(PRESET))
REWARD   = $(REWARD_$(PRESET))
PPO      = $(PPO_$(PRESET))
HACKING  = $(HACKING_$(PRESET))
DPO      = $(DPO_$(PRESET))
EVALUATE = $(EVALUATE_$(PRESET))

ifeq ($(VOCAB),)
$(error PRESET=$(PRESET): expected default or tiny)
endif
ifeq ($(PRESET)$(DATA),data)
$(error PRESET=data goes with DATA=folder)
endif

# ---------------------------------------------------------------------------------------------------------
# Where things are. `folder` names the artifacts' folder for a seed, so that worlds never mix.

folder = run$(if $(filter tiny,$(PRESET)),-tiny)$(if $(DATA),-data)$(if $(filter-out 1,$1),-seed$1)
RUN   := $(call folder,$(SEED))

ifeq ($(VENV),none)
PY      = $(PYTHON)
else
PY      = $(VENV)/bin/python
READY   = $(VENV)/.requirements
TESTING = $(VENV)/.requirements-dev
endif

# The island makes its own text, chats and prompts; the user's DATA brings them, and what it lacks is skipped.
ifeq ($(DATA),)
TEXT       = $(RUN)/island/pretrain
CHATS      = $(RUN)/island/sft.jsonl --valid $(RUN)/island/sft_valid.jsonl
ASKED      = $(RUN)/island/prompts.jsonl
ANNOTATED  = --written $(RUN)/island/written.jsonl --scorer data/island.py:annotate
RANKED     = $(RUN)/preferences.jsonl
COMPARED   = $(RUN)/island/comparisons.jsonl
PROMPTS    = $(RUN)/island/test.jsonl --scorer data/island.py:score
TEXT_IN    = $(RUN)/island/.finished
CHATS_IN   = $(RUN)/island/.finished
ASKED_IN   = $(RUN)/island/.finished
PROMPT_IN  = $(RUN)/island/.finished
COLLECTED  = preferences.jsonl preferences_test.jsonl
else
TEXT       = $(DATA)/pretrain
CHATS      = $(wildcard $(DATA)/sft)
ASKED      = $(wildcard $(DATA)/preference)
PART       = --train-part
ANNOTATED  = $(PART) --scorer $(SCORER)
RANKED     = $(ASKED) $(if $(SCORER),$(RUN)/preferences.jsonl)
PROMPTS    = $(addsuffix $(if $(SCORER), --scorer $(SCORER)),$(wildcard $(DATA)/prompts))
TEXT_IN    = $(RUN)/.options/data-pretrain
CHATS_IN   = $(if $(CHATS),$(RUN)/.options/data-sft)
ASKED_IN   = $(if $(ASKED),$(RUN)/.options/data-preference)
PROMPT_IN  = $(if $(PROMPTS),$(RUN)/.options/data-prompts)
COLLECTED  = $(if $(SCORER),$(if $(CHATS),$(if $(ASKED),preferences.jsonl)))
ifeq ($(wildcard $(TEXT)),)
$(error no folder $(TEXT): there is no text to begin with)
endif
endif
ALIGNED  = $(if $(CHATS),$(if $(ASKED),ppo dpo))
STAGES   = base $(if $(CHATS),sft) $(ALIGNED)
PACKED   = $(if $(CHATS),sft-int8 sft-int4) $(if $(ALIGNED),ppo-int4 int4)
MODELS   = $(STAGES:%=$(RUN)/%)
JUDGED   = $(MODELS) $(PACKED:%=$(RUN)/%)
JUDGES   = $(if $(ALIGNED),--reward $(RUN)/reward --reference $(RUN)/sft)
RANKED_TEST = $(if $(filter preferences_test.jsonl,$(COLLECTED)),--ranked $(RUN)/preferences_test.jsonl)

# A stage's whole command: it is kept in $(RUN)/.options, so that a changed option is seen.
island    = data/island.py --out $(RUN)/island --seed $(SEED) $(ISLAND)
prepare   = prepare.py --input $(TEXT) --out $(RUN)/corpus --seed $(SEED) $(PREPARE)
tokenizer = tokenizer.py train --input $(RUN)/corpus/train --vocab-size $(VOCAB) --out $(RUN)/tokenizer
tokens    = tokenizer.py encode --tokenizer $(RUN)/tokenizer --input $(RUN)/corpus --out $(RUN)/tokens
base      = pretrain.py --tokenizer $(RUN)/tokenizer --data $(RUN)/tokens --out $(RUN)/base --seed $(SEED) \
            $(PRETRAIN)
sft       = sft.py --model $(RUN)/base --data $(CHATS) --out $(RUN)/sft --seed $(SEED) $(SFT)
collect   = collect.py --model $(RUN)/sft --data $(ASKED) $(ANNOTATED) --out $(RUN)/preferences.jsonl \
            --seed $(SEED) $(COLLECT)
collect_test = collect.py --model $(RUN)/sft --data $(RUN)/island/written_test.jsonl --seed $(SEED) $(COLLECT) \
            --written $(RUN)/island/written_test.jsonl --scorer data/island.py:score --out $(RUN)/preferences_test.jsonl
reward    = reward.py --model $(RUN)/sft --data $(RANKED) $(COMPARED) --out $(RUN)/reward --seed $(SEED) $(REWARD)
ppo       = ppo.py --model $(RUN)/sft --reward $(RUN)/reward --data $(ASKED) $(PART) --out $(RUN)/ppo \
            --seed $(SEED) $(PPO)
hacking   = ppo.py --model $(RUN)/sft --reward $(RUN)/reward --data $(ASKED) $(PART) --out $(RUN)/hacking \
            --seed $(SEED) $(HACKING)
dpo       = dpo.py --model $(RUN)/sft --data $(RANKED) --out $(RUN)/dpo --seed $(SEED) $(DPO)
report    = evaluate.py --model $(JUDGED) --data $(RUN)/tokens $(if $(PROMPTS),--prompts $(PROMPTS)) \
            $(JUDGES) $(RANKED_TEST) --out $(RUN)/report.html $(EVALUATE)

# ---------------------------------------------------------------------------------------------------------
# The stages. FOLDER/.finished is made when the command has ended well, so half a folder never looks whole.

.PHONY: all test test-all chat hacking seeds clean help FORCE
.DELETE_ON_ERROR:

all: $(RUN)/report.html
ifneq ($(DATA),)
	@$(foreach part,sft preference prompts,$(if $(wildcard $(DATA)/$(part)),,echo "make: no $(DATA)/$(part): skipped" &&)) :
endif
	@echo "report: $(RUN)/report.html"

# These take a minute at most on the island and are made anew.
begin = @rm -rf $(@D)

# Trainers go on from their saved state, unless they had finished, or inputs have changed since they began.
# (The third command is for a kill between a trainer's end and the mark.)
begun = $(RUN)/.options/$(notdir $(@D)).begun
define train
@if [ -e $@ ] || { [ -e $(begun) ] && [ -n "`find $^ -newer $(begun)`" ]; }; then \
    rm -rf $(@D).old && { [ ! -e $(@D) ] || mv $(@D) $(@D).old; } && rm -rf $(@D).old; fi
@[ -e $(@D) ] || touch $(begun)
@if [ -e $(begun) ] && grep -qs '"finished": true' $(@D)/run.json; then exit 0; fi; \
    echo '$(PY) $($1) --resume'; exec $(PY) $($1) --resume
@touch $@
endef

$(RUN)/island/.finished: $(RUN)/.options/island | $(READY)
	$(begin)
	$(PY) $(island)
	@touch $@

$(RUN)/corpus/.finished: $(TEXT_IN) $(RUN)/.options/prepare | $(READY)
	$(begin)
	$(PY) $(prepare)
ifeq ($(DATA),)
	$(PY) data/island.py --check-cleaning $(RUN)/corpus
endif
	@touch $@

$(RUN)/tokenizer/.finished: $(RUN)/corpus/.finished $(RUN)/.options/tokenizer | $(READY)
	$(begin)
	$(PY) $(tokenizer)
	@touch $@

$(RUN)/tokens/.finished: $(RUN)/tokenizer/.finished $(RUN)/.options/tokens | $(READY)
	$(begin)
	$(PY) $(tokens)
	@touch $@

$(RUN)/base/.finished: $(RUN)/tokens/.finished $(RUN)/.options/base | $(READY)
	$(call train,base)

$(RUN)/sft/.finished: $(RUN)/base/.finished $(CHATS_IN) $(RUN)/.options/sft | $(READY)
	$(call train,sft)

# A file, written whole or not at all.
$(RUN)/preferences.jsonl: $(RUN)/sft/.finished $(ASKED_IN) $(RUN)/.options/collect | $(READY)
	$(PY) $(collect) --overwrite

$(RUN)/preferences_test.jsonl: $(RUN)/sft/.finished $(RUN)/.options/collect_test | $(READY)
	$(PY) $(collect_test) --overwrite

$(RUN)/reward/.finished: $(RUN)/sft/.finished $(ASKED_IN) $(filter-out $(ASKED),$(RANKED)) $(RUN)/.options/reward | $(READY)
	$(call train,reward)

$(RUN)/ppo/.finished: $(RUN)/reward/.finished $(RUN)/.options/ppo | $(READY)
	$(call train,ppo)

$(RUN)/hacking/.finished: $(RUN)/reward/.finished $(RUN)/.options/hacking | $(READY)
	$(call train,hacking)

$(RUN)/dpo/.finished: $(RUN)/sft/.finished $(ASKED_IN) $(filter-out $(ASKED),$(RANKED)) $(RUN)/.options/dpo | $(READY)
	$(call train,dpo)

# The folder $@ is in, from the stage $1, in $2 bits.
define quantize
$(begin)
$(PY) quantize.py --model $(RUN)/$1 --bits $2 --out $(@D)
@touch $@
endef

$(RUN)/%-int8/.finished: $(RUN)/%/.finished | $(READY)
	$(call quantize,$*,8)

$(RUN)/%-int4/.finished: $(RUN)/%/.finished | $(READY)
	$(call quantize,$*,4)

$(RUN)/int4/.finished: $(RUN)/dpo/.finished | $(READY)
	$(call quantize,dpo,4)

hacking: $(RUN)/hacking/.finished $(RUN)/report.html
	$(PY) evaluate.py --rescore --hacking $(RUN)/hacking --out $(RUN)/report.html

$(RUN)/report.html: $(JUDGED:%=%/.finished) $(COLLECTED:%=$(RUN)/%) $(PROMPT_IN) $(RUN)/.options/report | $(READY)
	$(PY) $(report) --overwrite

# Written again only when the command differs, or a file of the user's data is newer.
COMMANDS = $(patsubst %,$(RUN)/.options/%,island prepare tokenizer tokens base sft collect collect_test reward \
           ppo hacking dpo report)
$(COMMANDS): $(RUN)/.options/%: FORCE
	@mkdir -p $(@D)
	@echo '$($*)' | cmp -s - $@ || echo '$($*)' > $@

$(RUN)/.options/data-%: FORCE
	@mkdir -p $(@D)
	@if [ ! -e $@ ] || [ -n "`find -L $(DATA)/$* -newer $@`" ]; then touch $@; fi
.PRECIOUS: $(RUN)/.options/data-%

# ---------------------------------------------------------------------------------------------------------
# Beside the pipeline.

# Told before there is a .venv of the wrong Python, which a later make would not change.
define recent
@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python 3.11 or later is needed, \
this is " + sys.version.split()[0] + ": try PYTHON=python3.12")'
endef

$(VENV)/.requirements: requirements.txt
	$(recent)
	@echo "setting up $(VENV), once"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements.txt
	$(recent)
	@echo "setting up $(VENV) for the tests, once"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

TESTS = tests
test: $(TESTING)
	$(PY) -m pytest -q $(PYTEST_ARGS) $(TESTS)

test-all: $(TESTING)
	$(PY) -m pytest -q -m "slow or not slow" $(PYTEST_ARGS) $(TESTS)

chat: $(MODELS:%=%/.finished)
	$(PY) model.py --model $(lastword $(MODELS))

seeds:
	@for seed in $(SEEDS); do $(MAKE) SEED=$$seed || exit 1; done
	$(PY) evaluate.py --summary $(foreach seed,$(SEEDS),$(call folder,$(seed))/report.json)

clean:
	rm -rf $(RUN)

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile
