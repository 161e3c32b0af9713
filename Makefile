# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: install demo parity wires shards benchmark soak lint types check test clean

install: $(STAMP)

# Everything, at the versions of .ci/constraints.txt; run again only when what is to be installed changes.
$(STAMP): pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint .ci/constraints.txt --editable ".[recipes,dev]"
	@touch $@

demo: install
	$(RUN) -m recipes.demo

# DS-Sync beside DDP for every recipe, on 4 workers and on 8 that take half the batch each: a few hours. The same
# command goes on where an earlier one stopped.
COMPARE := $(RUN) -m recipes.compare
EIGHT_BERTS := --lrs 0.003 0.006 0.012 --tuning-seeds 1 --seeds 3 \
	--arms ddp dssync_adam="strategy=dssync_adam strategy.overlap=false"
parity: install
	$(COMPARE) recipe=wide_resnet --seeds 20
	$(COMPARE) recipe=wide_resnet trainer.devices=8 data.batch_size=8 --seeds 10 --tuning-seeds 1
	$(COMPARE) recipe=deepfm data.split_seed=1
	$(COMPARE) recipe=deepfm data.split_seed=1 trainer.devices=8 data.batch_size=64 --seeds 3
	$(COMPARE) recipe=bert data.split_seed=1 --arms ddp dssync_adam --lrs 0.003 0.006 0.012
	$(COMPARE) recipe=bert data.split_seed=1 trainer.devices=8 data.batch_size=8 $(EIGHT_BERTS)
	$(COMPARE) recipe=bert data.split_seed=1 trainer.devices=8 data.batch_size=8 trainer.max_epochs=12 \
		$(EIGHT_BERTS)

# Shards sorted by label: what helps, beside what does not, at fixed learning rates.
NON_IID := data.partition=by_label --seeds 3 --arms
IMAGES := model.net.norm=group $(NON_IID) ddp plain=strategy=dssync \
	averaged="strategy=dssync strategy.average_gradients=true" --lrs 0.1
CLICKS := data.split_seed=1 $(NON_IID) ddp="strategy=ddp model.optimizer.lr=0.001" \
	plain="strategy=dssync model.optimizer.lr=0.002" \
	averaged="strategy=dssync_adam strategy.average_gradients=true model.optimizer.lr=0.002"
QUESTIONS := data.split_seed=1 $(NON_IID) ddp="strategy=ddp model.optimizer.lr=0.006" \
	plain="strategy=dssync model.optimizer.lr=0.006" \
	averaged="strategy=dssync_adam strategy.average_gradients=true model.optimizer.lr=0.006"
shards: install
	$(COMPARE) recipe=wide_resnet $(IMAGES)
	$(COMPARE) recipe=wide_resnet trainer.devices=8 data.batch_size=8 $(IMAGES)
	$(COMPARE) recipe=deepfm $(CLICKS)
	$(COMPARE) recipe=deepfm trainer.devices=8 data.batch_size=64 $(CLICKS)
	$(COMPARE) recipe=bert $(QUESTIONS)
	$(COMPARE) recipe=bert trainer.devices=8 data.batch_size=8 $(QUESTIONS)

# DS-Sync's wire dtypes beside each other. A validation makes replicas equal: one at the end alone forgives a wire's
# rounding nothing.
WIRES := --arms fp32=strategy=dssync bf16="strategy=dssync strategy.wire_dtype=bf16" \
	int8="strategy=dssync strategy.wire_dtype=int8" --lrs 0.1
wires: install
	$(COMPARE) recipe=wide_resnet trainer.check_val_every_n_epoch=10 $(WIRES)
	$(COMPARE) recipe=wide_resnet trainer.check_val_every_n_epoch=10 trainer.devices=8 data.batch_size=8 $(WIRES)

# Needs root, Linux, ip and tc; under 10 minutes.
benchmark: install
	$(RUN) -m benchmarks.step_time --short

# Hosts that fail at random while a job trains: 15 minutes of faults, then the undisturbed run to hold it against. Needs
# root, Linux, ip and tc.
SEED ?= 0
soak: install
	$(RUN) -m tests.faults.soak --minutes 15 --seed $(SEED)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install
	$(VENV)/bin/mypy

# The part to run while working: under two minutes.
check: lint types
	$(RUN) -m pytest -q -m "not slow"

test: lint types
	$(RUN) -m pytest -q --durations=15

clean:
	rm -rf $(VENV) outputs multirun lightning_logs
