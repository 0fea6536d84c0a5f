# make              the whole pipeline on the island, a small world of known truth, to run/report.html
# make test         the tests (TESTS=tests/test_sft.py and PYTEST_ARGS="-k resume" narrow them down)
# make test-all     the tests with the slow ones
# make chat         talk to the newest model
# make seeds        the pipeline for each of SEEDS="1 2 3", then the mean of their reports
# make clean        remove the artifacts of this world, not .venv
#
# PRESET=tiny       everything small, in two minutes                              artifacts in run-tiny/
# SEED=7            another world                                                 artifacts in run-seed7/
# DATA=folder       your own text: folder/{pretrain,sft,preference,prompts}       artifacts in run-data/
# VENV=none         use the Python at hand (PYTHON=python3) instead of .venv
#
# An artifact is built once. After Ctrl-C, or a crash, `make` continues where it was. Changed options or data
# rebuild what depends on them; an edited script does not, unless `make -B`.

DATA   =
PRESET = $(if $(DATA),data,default)
SEED   = 1
SEEDS  = 1 2 3
VENV   = .venv
PYTHON = python3

# ---------------------------------------------------------------------------------------------------------
# The numbers of each preset.

VOCAB_default    = 3072
ISLAND_default   = --scale 1
PRETRAIN_default = --hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 4 \
                   --intermediate-size 704 --max-length 256 --batch-size 16 --steps 1100 --lr 3e-3
SFT_default      = --max-length 256 --batch-size 16 --epochs 4 --lr 1e-3 --replay $(RUN)/tokens
EVALUATE_default =

VOCAB_tiny       = 2048
ISLAND_tiny      = --scale 0.1
PRETRAIN_tiny    = --hidden-size 128 --num-hidden-layers 2 --num-attention-heads 2 --num-key-value-heads 2 \
                   --intermediate-size 352 --max-length 128 --batch-size 16 --steps 60 --lr 3e-3
SFT_tiny         = --max-length 128 --batch-size 16 --epochs 1 --lr 3e-4
EVALUATE_tiny    =

VOCAB_data       = 8192
PRETRAIN_data    = --hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4 --num-key-value-heads 4 \
                   --intermediate-size 704 --max-length 256 --batch-size 16 --steps 1500 --lr 3e-3
SFT_data         = --max-length 256 --batch-size 16 --epochs 1 --lr 5e-4
EVALUATE_data    =

VOCAB    = $(VOCAB_$(PRESET))
ISLAND   = $(ISLAND_$(PRESET))
PRETRAIN = $(PRETRAIN_$(PRESET))
SFT      = $(SFT_$(PRESET))
EVALUATE = $(EVALUATE_$(PRESET))

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
TEXT      = $(RUN)/island/pretrain
CHATS     = $(RUN)/island/sft.jsonl --valid $(RUN)/island/sft_valid.jsonl
PROMPTS   = $(RUN)/island/test.jsonl --scorer data/island.py:score
TEXT_IN   = $(RUN)/island/.finished
CHATS_IN  = $(RUN)/island/.finished
PROMPT_IN = $(RUN)/island/.finished
else
TEXT      = $(DATA)/pretrain
CHATS     = $(wildcard $(DATA)/sft)
PROMPTS   = $(wildcard $(DATA)/prompts)
TEXT_IN   = $(RUN)/.options/data-pretrain
CHATS_IN  = $(if $(CHATS),$(RUN)/.options/data-sft)
PROMPT_IN = $(if $(PROMPTS),$(RUN)/.options/data-prompts)
ifeq ($(wildcard $(TEXT)),)
$(error no folder $(TEXT): there is no text to begin with)
endif
endif
STAGES = base $(if $(CHATS),sft)
MODELS = $(STAGES:%=$(RUN)/%)

# A stage's whole command: it is kept in $(RUN)/.options, so that a changed option is seen.
island    = data/island.py --out $(RUN)/island --seed $(SEED) $(ISLAND)
prepare   = prepare.py --input $(TEXT) --out $(RUN)/corpus --seed $(SEED)
tokenizer = tokenizer.py train --input $(RUN)/corpus/train --vocab-size $(VOCAB) --out $(RUN)/tokenizer
tokens    = tokenizer.py encode --tokenizer $(RUN)/tokenizer --input $(RUN)/corpus --out $(RUN)/tokens
base      = pretrain.py --tokenizer $(RUN)/tokenizer --data $(RUN)/tokens --out $(RUN)/base --seed $(SEED) \
            $(PRETRAIN)
sft       = sft.py --model $(RUN)/base --data $(CHATS) --out $(RUN)/sft --seed $(SEED) $(SFT)
report    = evaluate.py --model $(MODELS) --data $(RUN)/tokens $(if $(PROMPTS),--prompts $(PROMPTS)) \
            --out $(RUN)/report.html $(EVALUATE)

# ---------------------------------------------------------------------------------------------------------
# The stages. FOLDER/.finished is made when the command has ended well, so half a folder never looks whole.

.PHONY: all test test-all chat seeds clean help FORCE
.DELETE_ON_ERROR:

all: $(RUN)/report.html
ifneq ($(DATA),)
	@$(foreach part,sft prompts,$(if $(wildcard $(DATA)/$(part)),,echo "make: no $(DATA)/$(part): skipped" &&)) :
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

$(RUN)/report.html: $(STAGES:%=$(RUN)/%/.finished) $(PROMPT_IN) $(RUN)/.options/report | $(READY)
	$(PY) $(report) --overwrite

# Written again only when the command differs, or a file of the user's data is newer.
COMMANDS = $(patsubst %,$(RUN)/.options/%,island prepare tokenizer tokens base sft report)
$(COMMANDS): $(RUN)/.options/%: FORCE
	@mkdir -p $(@D)
	@echo '$($*)' | cmp -s - $@ || echo '$($*)' > $@

$(RUN)/.options/data-%: FORCE
	@mkdir -p $(@D)
	@if [ ! -e $@ ] || [ -n "`find -L $(DATA)/$* -newer $@`" ]; then touch $@; fi
.PRECIOUS: $(RUN)/.options/data-%

# ---------------------------------------------------------------------------------------------------------
# Beside the pipeline.

$(VENV)/.requirements: requirements.txt
	@echo "setting up $(VENV), once"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

$(VENV)/.requirements-dev: requirements-dev.txt requirements.txt
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
