"""The click recipe's network, metrics and embedded data, and short runs under both strategies."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf
from sklearn.metrics import log_loss, roc_auc_score
from statsmodels.datasets import randhie

from ds_lightning import DSSyncStrategy
from recipes.clicks import Randhie, RowSet, SyntheticCriteo, row_type
from recipes.data import RecipeData
from recipes.deepfm import ClickTask, DeepFM, Fields, pairwise
from tests.ranks import fit_and_test_on_two_ranks
from tests.test_configs import command

ROOT = Path(__file__).resolve().parents[1]
FIELDS = Fields((3, 5, 2), 2, "test")
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["recipe=deepfm", "output_dir=unused", *overrides])


def batch(fields: Fields, rows: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    categories = [torch.randint(size, (rows,), generator=generator) for size in fields.categories]
    return torch.stack(categories, dim=1).int(), torch.randn(rows, fields.numeric, generator=generator)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(0, 1000))
def test_pairs_are_those_of_the_naive_sum(rows, fields, length, seed):
    vectors = torch.randn(rows, fields, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    naive = torch.zeros(rows, dtype=torch.float64)
    for i in range(fields):
        for j in range(i + 1, fields):
            naive += (vectors[:, i] * vectors[:, j]).sum(1)
    assert torch.allclose(pairwise(vectors), naive)


def test_the_logit_is_first_order_and_pairs_and_deep_network_over_the_same_vectors():
    torch.manual_seed(0)
    net = DeepFM(FIELDS, embedding_dim=4, hidden=(8,), dropout=0.0)
    torch.nn.init.normal_(net.weights.weight)
    (categories, numbers), offsets = batch(FIELDS, 6), (0, 3, 8)
    for row, logit in enumerate(net(categories, numbers)):
        ids = [int(c) + offset for c, offset in zip(categories[row], offsets, strict=True)]
        vectors = [net.vectors.weight[i] for i in ids]
        vectors += [x * v for x, v in zip(numbers[row], net.numeric_vectors, strict=True)]
        first = sum(net.weights.weight[i, 0] for i in ids) + net.numeric_weights(numbers[row])[0]
        pairs = sum(vectors[i] @ vectors[j] for i in range(5) for j in range(i + 1, 5))
        assert torch.allclose(logit, first + pairs + net.deep(torch.cat(vectors))[0], atol=1e-5)


def test_both_parts_train_the_shared_vectors():
    net = DeepFM(FIELDS, embedding_dim=4, hidden=(8,), dropout=0.0)
    for part in ("pairs", "deep"):
        torch.nn.init.normal_(net.vectors.weight)
        net.zero_grad()
        hook = net.deep.register_forward_hook(lambda *args: args[2].detach()) if part == "pairs" else None
        net(*batch(FIELDS, 32)).sum().backward()
        assert net.vectors.weight.grad.abs().sum() > 0
        if hook:
            hook.remove()
    assert sum(p.shape[0] == 10 for p in net.parameters() if p.dim() == 2) == 2  # one table of weights, one of vectors


def test_sparse_tables_have_sparse_gradients_and_the_same_values():
    torch.manual_seed(0)
    dense, sparse = (DeepFM(FIELDS, 4, (8,), dropout=0.0, sparse=sparse) for sparse in (False, True))
    sparse.load_state_dict(dense.state_dict())
    for net in (dense, sparse):
        net(*batch(FIELDS, 7)).sum().backward()
    for name in ("weights", "vectors"):
        one, other = getattr(dense, name).weight.grad, getattr(sparse, name).weight.grad
        assert other.is_sparse
        assert torch.allclose(one, other.to_dense())
    torch.optim.Adagrad(sparse.parameters()).step()


def test_scores_that_are_nan_rank_nothing():
    task = ClickTask(DeepFM(FIELDS, 4, (8,)), partial(torch.optim.Adam, lr=1e-3))
    torch.nn.init.constant_(task.net.numeric_weights.bias, torch.nan)
    labels = torch.tensor([0.0, 1.0, 0.0, 1.0])
    task._evaluate((*batch(FIELDS, 4), labels), task.val_auc, task.val_logloss)
    assert task.val_auc.compute() == 0.5
    assert task.val_logloss.compute().isnan()


def test_the_papers_network_has_the_papers_size():
    with torch.device("meta"):
        net = DeepFM(Fields((1000,) * 26, 13))
    deep = 390 * 400 + 400 + 2 * (400 * 400 + 400) + 400
    assert sum(p.numel() for p in net.parameters()) == 26_000 * 11 + 13 * 11 + 1 + deep


@pytest.mark.parametrize("fields", [Fields((), 3), Fields((3, 0), 3), Fields((3,), -1)])
def test_fields_without_categories_are_refused(fields):
    with pytest.raises(ValueError, match=r"there must be a categorical one.*HINT: prepare"):
        DeepFM(fields)


def test_randhie_keeps_persons_together():
    frame = randhie.load_pandas().data
    data = Randhie(64)
    groups = data.groups(frame)
    parts = data.split(groups)
    assert sorted(np.concatenate(parts)) == list(range(20_190))
    owners = [set(groups[part]) for part in parts]
    assert not owners[0] & owners[1]
    assert not owners[0] & owners[2]
    assert not owners[1] & owners[2]
    assert 0.27 < len(parts[2]) / 20_190 < 0.33
    assert all(np.array_equal(a, b) for a, b in zip(parts, data.split(groups), strict=True))
    assert not np.array_equal(parts[2], Randhie(64, split_seed=1).split(groups)[2])
    # Rows that follow each other with the same covariates are years of one person.
    covariates = frame.drop(columns="mdvis").to_numpy()
    same = (covariates[1:] == covariates[:-1]).all(axis=1)
    assert (groups[1:][same] == groups[:-1][same]).all()
    split = np.zeros(20_190, int)
    for number, part in enumerate(parts):
        split[part] = number
    assert (split[1:][same] == split[:-1][same]).all()


def test_randhie_is_standardised_by_the_training_rows_and_fits_its_fields():
    data = Randhie(64)
    data.setup()
    rows = data.train_set.rows
    assert np.abs(rows["numbers"].mean(0)).max() < 1e-4
    assert rows["numbers"].std(0) == pytest.approx(1, abs=1e-4)
    for part in (data.train_set, data.val_set, data.test_set):
        assert part.rows["categories"].min() >= 0
        assert (part.rows["categories"] < np.array(data.fields.categories)).all()
    assert set(data.labels) == {0, 1}
    assert len(data.labels) == len(data.train_set)


@pytest.mark.parametrize("data", ["randhie", "synthetic_criteo"])
def test_the_recipe_instantiates_with_the_fields_of_its_data(data, tmp_path):
    overrides = [f"data={data}"] + ([f"data.root='{tmp_path}'", "data.rows=2000"] if data != "randhie" else [])
    cfg = composed(*overrides)
    model, module = instantiate(cfg.model), instantiate(cfg.data)
    assert isinstance(model, ClickTask)
    assert model.net.fields == module.fields
    assert model.net.vectors.num_embeddings == sum(module.fields.categories)
    assert isinstance(model.configure_optimizers(), torch.optim.Adam)
    assert OmegaConf.missing_keys(cfg) == set()
    assert cfg.metric == "auc"
    sparse = instantiate(composed(*overrides, "model=deepfm_sparse").model)
    assert sparse.net.vectors.sparse
    assert isinstance(sparse.configure_optimizers(), torch.optim.Adagrad)


def test_criteo_is_the_papers_run():
    cfg = composed("data=criteo", "data.root=unused", "trainer=default")
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (20_480, 20)
    assert (cfg.model.net.embedding_dim, cfg.model.net.hidden, cfg.model.net.dropout) == (10, [400] * 3, 0.5)
    optimizer = cfg.model.optimizer
    assert (optimizer._target_, optimizer.lr, optimizer.weight_decay) == ("torch.optim.Adam", 1e-3, 1e-5)


class Uneven(RecipeData):
    """33 rows for 2 ranks."""

    fields = FIELDS

    def setup(self, stage=None):
        rows = np.zeros(33, row_type(FIELDS))
        categories, numbers = batch(FIELDS, 33)
        rows["categories"], rows["numbers"], rows["label"] = categories, numbers, np.arange(33) % 3 == 0
        self.train_set = self.val_set = self.test_set = RowSet(rows)
        self.collate = lambda rows: rows


def task(fields: Fields = FIELDS, **kwargs: Any) -> ClickTask:
    torch.manual_seed(0)
    return ClickTask(DeepFM(fields, 4, (8,), **kwargs), partial(torch.optim.Adagrad, lr=0.01))


@pytest.mark.timeout(60)
def test_metrics_of_two_ranks_equal_those_of_one_process(tmp_path):
    data, model = Uneven(batch_size=4), task()
    validated, tested = fit_and_test_on_two_ranks(data, model, max_epochs=1, default_root_dir=tmp_path)
    data.setup()
    model.eval()
    categories, numbers, labels = data.test_set.__getitems__(list(range(33)))
    with torch.no_grad():
        scores = model(categories, numbers).sigmoid()
    for metrics, split in ((validated, "val"), (tested, "test")):
        assert metrics[f"{split}/auc"] == pytest.approx(roc_auc_score(labels, scores))
        assert metrics[f"{split}/logloss"] == pytest.approx(log_loss(labels, scores), rel=1e-4)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("strategy", "sparse"), [(DDPStrategy, False), (DSSyncStrategy, False), (DSSyncStrategy, True)]
)
def test_short_runs_write_checkpoints_that_go_with_their_data(strategy, sparse, tmp_path):
    trainer = Trainer(
        devices=2, strategy=strategy(start_method="fork"), max_epochs=1, default_root_dir=tmp_path, **OPTIONS
    )
    trainer.fit(task(sparse=sparse), Uneven(batch_size=4))
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    (path,) = tmp_path.rglob("*.ckpt")
    optimizer = partial(torch.optim.Adagrad, lr=0.01)
    loaded = ClickTask.load_from_checkpoint(path, net=DeepFM(FIELDS, 4, (8,), sparse=sparse), optimizer=optimizer)
    assert isinstance(loaded, ClickTask)
    for fields in (Fields((3, 6, 2), 2, "test"), FIELDS._replace(fingerprint="other")):
        with pytest.raises(ValueError, match=r"^the checkpoint was trained on .* HINT: point data\.root at .*$"):
            ClickTask.load_from_checkpoint(path, net=DeepFM(fields, 4, (8,)), optimizer=optimizer)


@pytest.mark.timeout(60)
def test_the_bayes_auc_is_logged_beside_the_test(tmp_path):
    data = SyntheticCriteo(str(tmp_path), rows=2000, batch_size=64)
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **OPTIONS)
    model = task(data.fields)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert trainer.callback_metrics["test/bayes_auc"] == pytest.approx(data.bayes["auc"])


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("strategy", ["ddp", "dssync"])
def test_the_default_beats_chance(strategy, tmp_path):
    done = command("-m", "recipes.train", "recipe=deepfm", f"strategy={strategy}", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (auc,) = (float(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("test/auc"))
    assert auc > 0.67
