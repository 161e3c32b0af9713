# Two commands do all set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: install demo parity wires shards benchmark lint types check test clean

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
parity: install
	$(COMPARE) recipe=wide_resnet --seeds 20
	$(COMPARE) recipe=wide_resnet trainer.devices=8 data.batch_size=8 --seeds 10
	$(COMPARE) recipe=deepfm data.split_seed=1
	$(COMPARE) recipe=deepfm data.split_seed=1 trainer.devices=8 data.batch_size=64 --seeds 3
	$(COMPARE) recipe=bert --tuning-seeds 1
	$(COMPARE) recipe=bert trainer.devices=8 data.batch_size=8 --tuning-seeds 1 --seeds 3

# Shards sorted by label: what helps, beside what does not.
NON_IID := data.partition=by_label --seeds 3 --tuning-seeds 1 --arms ddp plain=strategy=dssync
SGD := recommended="strategy=dssync strategy.average_gradients=true"
ADAM := recommended="strategy=dssync strategy.average_gradients=true strategy.average_optimizer_state=[exp_avg_sq]"
shards: install
	$(COMPARE) recipe=wide_resnet model.net.norm=group $(NON_IID) $(SGD)
	$(COMPARE) recipe=wide_resnet model.net.norm=group trainer.devices=8 data.batch_size=8 $(NON_IID) $(SGD)
	$(COMPARE) recipe=deepfm data.split_seed=1 $(NON_IID) $(ADAM)
	$(COMPARE) recipe=deepfm data.split_seed=1 trainer.devices=8 data.batch_size=64 $(NON_IID) $(ADAM)
	$(COMPARE) recipe=bert $(NON_IID) $(ADAM)
	$(COMPARE) recipe=bert trainer.devices=8 data.batch_size=8 $(NON_IID) $(ADAM)

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
