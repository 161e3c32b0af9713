"""The question-answering recipe: windows, answers, SQuAD's own metric, its files, and questions on Python's docs."""

from __future__ import annotations

import json
import re
import shutil
import string
import subprocess
import sys
import sysconfig
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.pytorch import Trainer
from omegaconf import OmegaConf
from torchmetrics.text import SQuAD
from transformers import RobertaConfig, RobertaForQuestionAnswering

from ds_lightning.shards import shards
from recipes.bert import QuestionAnswering, decode, pretrained, tiny
from recipes.docs import RULES, Docs, documentation, split, trivial_rules
from recipes.squad import (
    Squad,
    collate,
    evaluation_windows,
    load_tokenizer,
    train_tokenizer,
    training_windows,
    vocabulary_of,
)
from tests.ranks import QUIET, fit_and_test_on_two_ranks

ROOT = Path(__file__).resolve().parents[1]

# Accents as marks of their own, a joined emoji, Chinese, no-break spaces, and white space of all kinds.
NAIVE = "nai\u0308ve cafe\u0301"
CONTEXTS = {
    f"The {NAIVE} opened in 1987 ,\n  near\tthe river .": [NAIVE, "1987", "the river"],
    "Thumbs 👍🏽 and ❤️ were sent by Zoë to 北京大学 yesterday.": ["👍🏽", "❤️", "Zoë", "北京大学", "京大"],
    "About 10\u00a0km\u2009north lies\u3000Łódź, the city.": ["10\u00a0km", "Łódź", "the city"],
    " ".join(f"word{i}" for i in range(60)) + " ends here": ["word0", "word23 word24 word25", "ends here"],
}


def columns(examples: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [example[name] for example in examples] for name in examples[0]}


def examples() -> list[dict[str, Any]]:
    return [
        {
            "id": f"{number}-{answer}",
            "title": f"article {number}",
            "context": context,
            "question": f"Where is {number}?",
            "answers": {"text": [answer], "answer_start": [context.index(answer)]},
        }
        for number, (context, answers) in enumerate(CONTEXTS.items())
        for answer in answers
    ]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([text for e in examples() for text in (e["question"], e["context"])], 300)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    """A folder with a model and its tokenizer, as `save_pretrained` leaves it."""
    folder: Path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    tiny(len(tokenizer), 16, 1, 2, 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def squad_file(path: Path, version: str) -> Path:
    """The examples in SQuAD's own nesting; in 2.0 also questions without an answer."""
    articles: dict[str, dict[str, Any]] = {}
    for e in examples():
        article = articles.setdefault(e["title"], {"title": e["title"], "paragraphs": [{"context": e["context"]}]})
        start = e["answers"]["answer_start"][0]
        question = {"id": e["id"], "question": e["question"]}
        question["answers"] = [{"text": e["answers"]["text"][0], "answer_start": start}]
        if version == "v2.0":
            question["is_impossible"] = False
        article["paragraphs"][0].setdefault("qas", []).append(question)
    if version == "v2.0":
        for title, article in articles.items():
            nothing = {"id": f"{title}-no", "question": "Why?", "is_impossible": True, "answers": []}
            nothing["plausible_answers"] = [{"text": "The", "answer_start": 0}]
            article["paragraphs"][0]["qas"].append(nothing)
    path.write_text(json.dumps({"version": version, "data": list(articles.values())}))
    return path


def one_question(**values: Any) -> str:
    """A file with one question, of which some values are wrong."""
    v = {"title": "t", "context": "abc", "question": "q", "text": "abc", "answer_start": 0, **values}
    answers = [{key: v[key] for key in ("text", "answer_start")}]
    question = {"id": 1, "question": v["question"], "answers": answers}
    return json.dumps({"data": [{"title": v["title"], "paragraphs": [{"context": v["context"], "qas": [question]}]}]})


@pytest.fixture
def cache(tmp_path, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# SQuAD's scores, from their definition.
def normalized(text: str) -> list[str]:
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact(answer: str, gold: list[str]) -> float:
    return float(any(normalized(answer) == normalized(g) for g in gold))


def f1(answer: str, gold: list[str]) -> float:
    def one(a: list[str], b: list[str]) -> float:
        if not a or not b:
            return float(a == b)
        common = sum((Counter(a) & Counter(b)).values())
        return 2 * common / (len(a) + len(b))

    return max(one(normalized(answer), normalized(g)) for g in gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("The  Cat!", ["a cat"]),
        ("big cat", ["cat", "the big black cat"]),
        ("dog", ["cat", "mouse"]),
        ("cat cat", ["cat"]),
        ("", [""]),
        ("", ["cat"]),
        ("cat", [""]),
        ("10\u00a0km", ["10 km"]),
        ("北京", ["北京大学", "北京"]),
        (NAIVE, [NAIVE.upper()]),
    ],
)
def test_metric_is_squads(answer, gold):
    metric = SQuAD()
    metric.update([{"id": "0", "prediction_text": answer}], [{"id": "0", "answers": {"text": gold}}])
    values = metric.compute()
    assert values["f1"] == pytest.approx(100 * f1(answer, gold))
    assert values["exact_match"] == 100 * exact(answer, gold)


@pytest.mark.parametrize(("max_length", "stride"), [(24, 4), (40, 10), (128, 32)])
def test_training_windows_give_back_the_answers(tokenizer, max_length, stride):
    for example in examples():
        one = columns([example])
        windows = training_windows(one, tokenizer, max_length, stride)
        offsets = evaluation_windows(one, tokenizer, max_length, stride)["offsets"][0]
        assert len(offsets) == len(windows["input_ids"])
        found = []
        for where, ids, first, last in zip(
            offsets, windows["input_ids"], windows["start_positions"], windows["end_positions"], strict=True
        ):
            assert len(where) == len(ids) <= max_length
            if last:
                found.append(example["context"][where[first][0] : where[last][1]])
            else:
                assert first == 0
        assert found
        assert set(found) == set(example["answers"]["text"])


def test_an_answer_cut_by_windows_trains_cls_where_it_is_not_whole(tokenizer):
    (long,) = (e for e in examples() if e["answers"]["text"] == ["word23 word24 word25"])
    windows = training_windows(columns([long]), tokenizer, 24, 0)
    whole = [end > 0 for end in windows["end_positions"]]
    assert sum(whole) <= 1 < len(whole)
    windows = training_windows(columns([{**long, "answers": {"text": [], "answer_start": []}}]), tokenizer, 24, 4)
    assert not any(windows["start_positions"] + windows["end_positions"])


def test_answers_keep_what_the_tokenizer_drops_and_lose_white_space(tokenizer):
    for context, answer in (
        ("see \u200briver here", "\u200briver"),
        ("\ufeffriver here", "\ufeffriver"),
        ("  the river was", "  the river"),
        ("near the river ", "river "),
    ):
        example = {**examples()[0], "context": context}
        example["answers"] = {"text": [answer], "answer_start": [context.index(answer)]}
        windows = training_windows(columns([example]), tokenizer, 128, 32)
        where = evaluation_windows(columns([example]), tokenizer, 128, 32)["offsets"][0][0]
        first, last = windows["start_positions"][0], windows["end_positions"][0]
        assert context[where[first][0] : where[last][1]] == answer.strip()


def test_golds_without_a_word_do_not_count_beside_others(tokenizer):
    for gold, want in ((["the", "river"], ["river"]), (["the"], [""]), ([], [""])):
        example = {**examples()[0], "answers": {"text": gold, "answer_start": [0] * len(gold)}}
        assert evaluation_windows(columns([example]), tokenizer, 128, 32)["answers"] == [want]


def test_questions_that_are_too_long_are_cut(tokenizer):
    example = {**examples()[0], "question": "  " + "river " * 100}
    windows = training_windows(columns([example]), tokenizer, 40, 10)
    assert all(len(ids) <= 40 for ids in windows["input_ids"])


def logits(length: int, **values: float) -> np.ndarray:
    row = np.full((1, length), -5.0)
    for position, value in values.items():
        row[0, int(position[1:])] = value
    return row


CONTEXT = "one two three four five six"
# [CLS] question [SEP] one two three four five six [SEP]
OFFSETS = np.array([[[0, 0]] * 3 + [[m.start(), m.end()] for m in re.finditer(r"\w+", CONTEXT)] + [[0, 0]]])


@pytest.mark.parametrize(
    ("starts", "ends", "options", "answer"),
    [
        ({"p4": 5}, {"p5": 5}, {}, "two three"),
        ({"p6": 5, "p3": 1}, {"p4": 5, "p7": 4}, {}, "four five"),  # an end before the start does not count
        ({"p1": 9, "p5": 3}, {"p2": 9, "p5": 3}, {}, "three"),  # nor do question and separators
        ({"p3": 9}, {"p8": 9, "p5": 1}, {"max_answer_length": 3}, "one two three"),
        # The question's tokens are among the n best, so that of the context's only the best start and end are left.
        ({"p1": 9, "p4": 3, "p6": 2}, {"p2": 9, "p5": 3, "p8": 4}, {"n_best": 2, "max_answer_length": 3}, "two three"),
        ({"p3": 9}, {"p8": 9}, {"max_answer_length": 6}, CONTEXT),
        ({"p8": 9}, {"p3": 9}, {"n_best": 1}, "six"),  # no span among the best: all are looked at
        ({"p0": 4, "p4": 3}, {"p0": 4, "p4": 3}, {}, "two"),  # SQuAD 1.1 always answers
        ({"p0": 4, "p4": 3}, {"p0": 4, "p4": 3}, {"null_threshold": 0.0}, ""),
        ({"p0": 4, "p4": 3}, {"p0": 4, "p4": 3}, {"null_threshold": 2.0}, "two"),
        ({"p0": 3, "p4": 3}, {"p0": 3, "p4": 3}, {"null_threshold": 0.0}, "two"),
    ],
)
def test_decoding(starts, ends, options, answer):
    assert decode(logits(10, **starts), logits(10, **ends), OFFSETS, CONTEXT, **options) == answer


def test_decoding_looks_at_all_windows():
    offsets = np.concatenate([OFFSETS, OFFSETS])
    starts = np.concatenate([logits(10, p3=1, p0=9), logits(10, p7=2, p0=1)])
    ends = np.concatenate([logits(10, p3=1, p0=9), logits(10, p8=2, p0=1)])
    assert decode(starts, ends, offsets, CONTEXT) == "five six"
    # The first window finds nothing, but the null score is the second's.
    assert decode(starts, ends, offsets, CONTEXT, null_threshold=0.0) == "five six"
    assert decode(starts, ends, offsets, CONTEXT, null_threshold=-3.0) == ""


def oracle(windows: dict[str, list[Any]], number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a perfect model: 1 at the answer's tokens in all windows that hold them."""
    example = examples()[number]
    offsets = torch.nn.utils.rnn.pad_sequence([torch.tensor(w) for w in windows["offsets"][number]], True).numpy()
    start = example["answers"]["answer_start"][0]
    end = start + len(example["answers"]["text"][0])
    inside = offsets[..., 1] > offsets[..., 0]
    return (inside & (offsets[..., 0] == start)) * 1.0, (inside & (offsets[..., 1] == end)) * 1.0, offsets


def test_a_perfect_model_finds_all_answers(tokenizer):
    windows = evaluation_windows(columns(examples()), tokenizer, 32, 8)
    assert max(map(len, windows["offsets"])) > 3
    for number, example in enumerate(examples()):
        assert decode(*oracle(windows, number), example["context"]) == example["answers"]["text"][0]


def test_batches_are_padded_and_keep_the_count_of_windows(tokenizer):
    windows = evaluation_windows(columns(examples()), tokenizer, 32, 8)
    samples = [{name: column[i] for name, column in windows.items()} for i in range(len(examples()))]
    batch = collate(samples, tokenizer.pad_token_id)
    assert sum(batch["windows"]) == len(batch["inputs"]["input_ids"]) == len(batch["offsets"])
    assert set(batch["inputs"]) == {"input_ids", "attention_mask", "token_type_ids"}
    assert batch["inputs"]["attention_mask"].sum() == sum(len(row) for e in samples for row in e["input_ids"])


def squad(saved: Path, path: Path, **kwargs: Any) -> Squad:
    options: dict[str, Any] = {"max_length": 40, "stride": 8, "batch_size": 2, **kwargs}
    return Squad(str(saved), train_file=str(path), val_file=str(path), **options)


@pytest.mark.parametrize(("version", "questions"), [("v1.1", 14), ("v2.0", 18)])
def test_squads_files_are_read_once(version, questions, saved, tmp_path, cache, monkeypatch):
    path = squad_file(tmp_path / "squad.json", version)
    first = squad(saved, path)
    first.prepare_data()
    monkeypatch.setattr("recipes.squad._windows", None)  # other ranks find them in the cache
    data = squad(saved, path)
    data.setup()
    assert len(data.test_set) == questions
    assert len(data.labels) == len(data.train_set) > questions
    assert set(data.labels) == {f"article {i}" for i in range(4)}
    answers = {sample["id"]: sample["answers"] for sample in data.test_set}
    assert answers["0-1987"] == ["1987"]
    assert [answers[id] for id in answers if id.endswith("-no")] == [[""]] * (questions - 14)
    parts = shards(data.labels, 2, "by_label", 0)
    assert len(set(data.labels[parts[0]]) & set(data.labels[parts[1]])) <= 1


def test_a_changed_file_is_read_again(saved, tmp_path, cache):
    path = squad_file(tmp_path / "squad.json", "v1.1")
    for version, questions in (("v1.1", 14), ("v2.0", 18)):
        squad_file(path, version)
        data = squad(saved, path)
        data.setup()
        assert len(data.test_set) == questions


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty. HINT"),
        ("  \n", "is empty. HINT"),
        ("{", "is not SQuAD's JSON. HINT"),
        ("[]", "is not SQuAD's JSON. HINT"),
        ('{"data": [{"title": "a"}]}', "is not SQuAD's JSON. HINT"),
        ('{"data": []}', "holds no questions. HINT"),
        (one_question(question=None), "is not SQuAD's JSON. HINT"),
        (one_question(title=3), "is not SQuAD's JSON. HINT"),
        (one_question(context=None), "is not SQuAD's JSON. HINT"),
        (one_question(context="\ud800 abc"), "is not SQuAD's JSON. HINT"),
        (one_question(text=5), "is not SQuAD's JSON. HINT"),
        (one_question(answer_start="0"), "is not SQuAD's JSON. HINT"),
        (one_question(answer_start=-1), "is not SQuAD's JSON. HINT"),
        (one_question(answer_start=9), "is not SQuAD's JSON. HINT"),
        ("[" * 100_000, "is not SQuAD's JSON. HINT"),
    ],
    ids=lambda text: text[:40],
)
def test_files_that_are_not_squads_are_refused(content, message, saved, tmp_path, cache):
    path = tmp_path / "squad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        squad(saved, path).prepare_data()
    assert "\n" not in str(caught.value)


def test_missing_files_and_hubs_are_refused_in_one_line(saved, tmp_path, monkeypatch, cache):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    options = {"max_length": 40, "stride": 8, "batch_size": 2}
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.json\. HINT: check data\.train_file"):
        squad(saved, tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"data\.train_file is alone\. HINT"):
        Squad(str(saved), train_file="some.json", **options)
    with pytest.raises(FileNotFoundError, match=r"no data set 'rajpurkar/squad' .*HINT: .*data\.train_file"):
        Squad(str(saved), **options).prepare_data()
    for load in (load_tokenizer, pretrained):
        for name in ("no/such-model", str(tmp_path)):
            with pytest.raises(FileNotFoundError, match=f"no .* '{name}'.*HINT: .*model.net.name") as caught:
                load(name)
            assert "\n" not in str(caught.value)


def test_bad_windows_are_refused(saved):
    with pytest.raises(ValueError, match=r"data\.stride is 16, but must be at least 0 and below 16 .*HINT"):
        Squad(str(saved), max_length=40, stride=16, batch_size=2)


def test_a_vocabulary_that_does_not_match_is_refused(saved):
    module = task(pretrained(str(saved)))
    own = vocabulary_of(load_tokenizer(str(saved)))
    data = SimpleNamespace(vocab_size=301, max_length=64, vocabulary=own)
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"tokenizer has 301 pieces, but the model's vocabulary \d+\. HINT"):
        module.setup("fit")
    data.vocab_size, data.max_length = 100, 65
    with pytest.raises(ValueError, match=r"data\.max_length is 65, but the model has 64 positions\. HINT"):
        module.setup("fit")
    data.max_length, data.vocabulary = 64, "of another tokenizer, no larger"
    with pytest.raises(ValueError, match=r"another vocabulary than the model .*HINT: data\.tokenizer=\${model"):
        module.setup("fit")
    data.vocabulary = own
    module.setup("fit")
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    module.on_load_checkpoint(checkpoint)
    data.vocabulary = "b"
    for other in (checkpoint, {}):  # an empty one is of another recipe
        with pytest.raises(ValueError, match=r"trained with another vocabulary\. HINT"):
            module.on_load_checkpoint(other)


def test_roberta_has_fewer_positions_than_its_table():
    config = RobertaConfig(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=66, pad_token_id=1,
    )  # fmt: skip
    module = task(RobertaForQuestionAnswering(config))
    data = SimpleNamespace(vocab_size=50, max_length=64, vocabulary="a")
    module._trainer = SimpleNamespace(datamodule=data)  # type: ignore[assignment]
    module.setup("fit")
    module.net(torch.full((1, 64), 5))
    data.max_length = 65
    with pytest.raises(ValueError, match=r"data\.max_length is 65, but the model has 64 positions\. HINT"):
        module.setup("fit")


def test_broken_models_are_refused_in_one_line(saved, tmp_path):
    for name, spoil in (
        ("no tokenizer", lambda folder: [path.unlink() for path in folder.glob("*token*")]),
        ("other sizes", lambda folder: change(folder / "config.json", vocab_size=7)),
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"1234")),
    ):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        spoil(folder)
        load = load_tokenizer if name == "no tokenizer" else pretrained
        with pytest.raises((ValueError, FileNotFoundError), match="HINT") as caught:
            load(str(folder))
        assert "\n" not in str(caught.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_metrics_count_beyond_256_in_half_precision():
    module = task(torch.nn.Identity())
    module.to(torch.bfloat16)  # as `trainer.precision=bf16-true` does
    module.on_test_start()
    for i in range(600):
        gold: Any = {"id": str(i), "answers": {"text": ["cat"]}}
        module.test_metric.update([{"id": str(i), "prediction_text": "cat"}], [gold])
    assert module.test_metric.compute() == {"exact_match": 100, "f1": 100}


def test_pretrained_models_are_loaded_for_training(saved):
    net = pretrained(str(saved))
    assert all(module.training for module in net.modules())
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def task(net: torch.nn.Module) -> QuestionAnswering:
    return QuestionAnswering(net, partial(torch.optim.AdamW, lr=1e-3), null_threshold=0.0)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_metrics_of_two_ranks_equal_those_of_one_process(saved, tmp_path, cache):
    data, model = squad(saved, squad_file(tmp_path / "squad.json", "v2.0"), batch_size=3), task(pretrained(str(saved)))
    validated, tested = fit_and_test_on_two_ranks(data, model, max_epochs=2, default_root_dir=tmp_path)
    one = Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **QUIET)
    one.test(model, data, verbose=False)
    for name in ("f1", "exact_match"):
        expected = float(one.callback_metrics[f"test/{name}"])
        assert 0 <= expected <= 1
        assert float(tested[f"test/{name}"]) == pytest.approx(expected)
        assert float(validated[f"val/{name}"]) == pytest.approx(expected)


@pytest.fixture(scope="module")
def few() -> list[dict[str, Any]]:
    return documentation(str(Path(sysconfig.get_paths()["stdlib"]) / "email"))


def test_questions_on_docs_have_their_answers_in_the_context(few):
    assert len(few) > 200
    assert len({e["id"] for e in few}) == len(few)
    different: dict[str, set[str]] = {}
    for e in few:
        (answer,), (start,) = e["answers"]["text"], e["answers"]["answer_start"]
        assert e["context"][start:].startswith(answer)
        assert answer.strip() == answer != ""
        different.setdefault(e["context"], set()).add(answer)
    assert min(map(len, different.values())) >= 2  # the question matters


def assert_no_leak(parts: dict[str, list[dict[str, Any]]]) -> None:
    def docstring(example: dict[str, Any]) -> str:
        return re.sub(r"\W+", " ", example["context"].partition("\n")[2]).lower()

    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not {e["title"] for e in parts[one]} & {e["title"] for e in parts[other]}
        assert not {docstring(e) for e in parts[one]} & {docstring(e) for e in parts[other]}


def test_splits_of_docs_share_nothing(few):
    for seed in range(3):
        parts = split(few, seed)
        assert sum(map(len, parts.values())) == len(few)
        assert parts == split(few, seed)
        assert_no_leak(parts)
    assert split(few, 0)["test"] != split(few, 1)["test"]


def test_docs_survive_files_that_do_not_parse(tmp_path):
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff")
    with pytest.raises(FileNotFoundError, match=r"no documented Python files in .*HINT"):
        documentation(str(tmp_path))
    (tmp_path / "good.py").write_text('def area(width, height=2):\n    """Measure it.\n\n    Return the area."""\n')
    documentation.cache_clear()
    answers = {e["question"]: e["answers"]["text"][0] for e in documentation(str(tmp_path))}
    assert len(answers) == 5
    assert {"Measure it", "the area", "width, height=2", "width", "2"} == set(answers.values())


def test_trivial_rules_are_scored_like_a_model(few):
    scores = trivial_rules(few)
    assert scores.keys() == RULES.keys()
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    whole = np.mean([f1(e["context"], e["answers"]["text"]) for e in few])
    assert scores["whole context"] == pytest.approx(whole, abs=0.002)
    assert max(scores.values()) < 0.5


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", ["recipe=bert", "output_dir=unused", *overrides])


def test_recipes_compose(saved):
    docs = composed()
    model = instantiate(docs.model)
    assert model.net.config.max_position_embeddings == docs.data.max_length
    assert (docs.strategy.average_optimizer_state, docs.strategy.optimizer_state_every) == (["exp_avg_sq"], 8)
    for name, target in (("ddp", "DDPStrategy"), ("dssync", "DSSyncStrategy")):  # the command line wins
        other = composed(f"strategy={name}").strategy
        assert other._target_.endswith(target)
        assert not other.get("average_optimizer_state")
    for name, threshold in (("squad", None), ("squad_v2", 0.0)):
        cfg = composed(f"data={name}")
        assert cfg.data.tokenizer == cfg.model.net.name == "bert-large-uncased-whole-word-masking"
        assert (cfg.data.batch_size, cfg.data.max_length, cfg.data.stride, cfg.trainer.max_epochs) == (6, 384, 128, 2)
        optimizer = cfg.model.optimizer
        assert (optimizer.lr, optimizer.eps, optimizer.weight_decay) == (3e-5, 1e-8, 0.0)
        assert cfg.model.null_threshold == threshold
        local = composed(f"data={name}", f"model.net.name={saved}")
        assert isinstance(instantiate(local.data), Squad)
        assert isinstance(instantiate(local.model), QuestionAnswering)
        assert OmegaConf.missing_keys(cfg) == set()


def run(*arguments: str, cwd: Path) -> str:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_HOME"] = str(cwd / "hub")
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_application_trains_on_squads_files_in_bf16_with_accumulation(saved, tmp_path):
    path = squad_file(tmp_path / "squad.json", "v2.0")
    files = ("data=squad_v2", f"data.train_file={path}", f"data.val_file={path}", "data.num_workers=0")
    small = ("data.max_length=40", "data.stride=8", "data.batch_size=2", f"model.net.name={saved}")
    other = ("trainer=smoke", "trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2")
    more = ("trainer.limit_train_batches=4", "data.partition=by_label")
    output = run("-m", "recipes.train", "recipe=bert", *files, *small, *other, *more, cwd=tmp_path)
    (results,) = (tmp_path / "outputs" / "bert").glob("*/results.json")
    values = json.loads(results.read_text())
    assert "test/f1" in output
    assert values["test/f1"] == values["val/f1"]  # one split, and the weights have not moved since


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_whole_documentation(tmp_path):
    parts = split(documentation())
    assert_no_leak(parts)
    assert len(parts["train"]) > 6000
    assert len(parts["test"]) > 1200
    assert next(iter(trivial_rules(parts["test"]).values())) < 0.45
    # Every process trains the same vocabulary.
    program = "from recipes.docs import Docs; print(Docs(max_length=96, stride=32, batch_size=16).vocabulary)"
    assert run("-c", program, cwd=tmp_path).strip() == Docs(max_length=96, stride=32, batch_size=16).vocabulary
