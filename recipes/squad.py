"""Question-answering data: SQuAD from the hub or from files, cut into windows that a BERT can read.

A training sample is one window. An evaluation sample is one question with all its windows, so the rank that has it
finds its answer alone, and metrics over ranks are exact.
"""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.text.squad import _normalize_text
from typing_extensions import override

from recipes.data import RecipeData

# Ranks and loader workers are forked, and a fork must not happen between the threads of a tokenizer.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

Columns = dict[str, list[Any]]
LONGEST_QUESTION = 64  # tokens; longer ones are cut, as in BERT's own SQuAD code
INVISIBLE = ("Mn", "Me", "Cf")  # categories of characters that belong to the one before: accents, selectors, joiners


def from_hub(what: str, load: Callable[[str], Any], name: str) -> Any:
    """What `load` finds under a hub name or in a local folder, or an error that says what to do."""
    try:
        return load(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no {what} {name!r}: neither a local folder that holds one nor to be had from the hub. "
            "HINT: without a network point model.net.name at the folder of a saved model and its tokenizer."
        ) from error
    except Exception as error:  # of any kind, from whatever reads the files
        raise ValueError(
            f"the {what} {name!r} cannot be loaded ({type(error).__name__}): a file is broken, or config.json is "
            "not that of the weights. HINT: save or download it again, and name its folder."
        ) from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub name or a local folder."""
    from transformers import AutoTokenizer

    tokenizer = from_hub("tokenizer", AutoTokenizer.from_pretrained, name)
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {name!r} has no fast version, which knows where in a text its tokens are")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up where a folder has none
        raise FileNotFoundError(
            f"no tokenizer {name!r}: there is no vocabulary. HINT: save it there too, by tokenizer.save_pretrained, or "
            "point data.tokenizer at its folder; without a network model.net.name is the folder of both."
        )
    return tokenizer


def vocabulary_of(tokenizer: Any) -> str:
    """Tells one vocabulary from another."""
    return _digest(json.dumps(sorted(tokenizer.get_vocab().items())).encode())


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A lower-case WordPiece tokenizer for these texts; the same texts give the same vocabulary."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [text.lower() for text in texts]
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    # Ties between pairs go by the numbers of their pieces. Letters inside words would be numbered as they turn up, in
    # another order in every process; as special pieces they have their numbers from the start.
    fixed = [*special.values(), "[MASK]", *(f"##{letter}" for letter in sorted(set("".join(texts))))]
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        texts, vocab_size=vocab_size, special_tokens=fixed, limit_alphabet=vocab_size, show_progress=False
    )
    tokenizer = BertWordPieceTokenizer(trained.get_vocab(), lowercase=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        mask_token="[MASK]",
        **special,
    )


def _windows(examples: Columns, tokenizer: Any, max_length: int, stride: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """For each window the number of its example, its tokens, and where in the context these are.

    `offsets` is [0, 0] for all tokens but the context's.
    """
    longest = _longest_question(max_length)
    questions = [question.strip() for question in examples["question"]]
    cut = tokenizer(
        questions, truncation=True, max_length=longest, add_special_tokens=False, return_offsets_mapping=True
    )
    questions = [
        question[: spans[-1][1]] if spans else question
        for question, spans in zip(questions, cut["offset_mapping"], strict=True)
    ]
    encoded = tokenizer(
        questions,
        examples["context"],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for window, example in enumerate(encoded["overflow_to_sample_mapping"]):
        mine = np.array([part == 1 for part in encoded.sequence_ids(window)])
        offsets = np.array(encoded["offset_mapping"][window]) * mine[:, None]
        _widen(offsets, examples["context"][example])
        inputs = {name: encoded[name][window] for name in ("input_ids", "token_type_ids") if name in encoded}
        yield example, {**inputs, "offsets": offsets}


def _longest_question(max_length: int) -> int:
    return min(LONGEST_QUESTION, max_length // 2)


def _widen(offsets: np.ndarray[Any, Any], context: str) -> None:
    """Gives tokens the accents and joiners beside them that the tokenizer has dropped, so no answer loses them."""
    if context.isascii():
        return
    for token, (start, end) in enumerate(offsets):
        if start == end:
            continue
        first = start
        while first and unicodedata.category(context[first - 1]) in INVISIBLE:
            first -= 1
        if not first or context[first - 1].isspace():  # else they are the token's before
            start = first
        while end < len(context) and unicodedata.category(context[end]) in INVISIBLE:
            end += 1
        offsets[token] = start, end


def training_windows(examples: Columns, tokenizer: Any, max_length: int, stride: int) -> Columns:
    """Windows with the first and last token of the answer, or twice the first token ([CLS]) where it is not inside."""
    columns: Columns = {}
    for example, window in _windows(examples, tokenizer, max_length, stride):
        offsets = window.pop("offsets")
        answers = examples["answers"][example]
        first = last = 0
        if answers["text"]:
            text = answers["text"][0]
            start = answers["answer_start"][0] + len(text) - len(text.lstrip())  # white space is no token
            end = start + len(text.strip())
            inside = np.flatnonzero(offsets[:, 1])
            if len(inside) and offsets[inside[0], 0] <= start and end <= offsets[inside[-1], 1]:
                touched = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
                first, last = (int(touched[0]), int(touched[-1])) if len(touched) else (0, 0)
        row = {**window, "start_positions": first, "end_positions": last, "title": examples["title"][example]}
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
    return columns


def evaluation_windows(examples: Columns, tokenizer: Any, max_length: int, stride: int) -> Columns:
    """Examples with all their windows; an unanswerable question has the one answer "", as SQuAD 2.0 scores it.

    So has one whose answers are all without a word, and of others these do not count.
    """
    columns: Columns = {name: list(examples[name]) for name in ("id", "context")}
    columns["answers"] = [[t for t in answers["text"] if _normalize_text(t)] or [""] for answers in examples["answers"]]
    for example, window in _windows(examples, tokenizer, max_length, stride):
        for name, value in window.items():
            rows = columns.setdefault(name, [[] for _ in examples["id"]])
            rows[example].append(value.tolist() if name == "offsets" else value)
    return columns


def collate(samples: list[dict[str, Any]], pad_token_id: int) -> dict[str, Any]:
    """A batch, padded to its longest window: the `inputs` of the model, and what answers are found with.

    Of evaluation samples all windows follow each other in `inputs` and `offsets`; `windows` counts each sample's.
    """
    evaluation = "context" in samples[0]
    inputs: dict[str, Tensor] = {}
    for name in ("input_ids", "token_type_ids"):
        if name in samples[0]:
            rows = [row for sample in samples for row in (sample[name] if evaluation else [sample[name]])]
            inputs[name] = _padded(rows, pad_token_id if name == "input_ids" else 0)
            inputs["attention_mask"] = _padded([[1] * len(row) for row in rows], 0)
    if not evaluation:
        for name in ("start_positions", "end_positions"):
            inputs[name] = torch.tensor([sample[name] for sample in samples])
        return {"inputs": inputs}
    offsets = [torch.tensor(window) for sample in samples for window in sample["offsets"]]
    return {
        "inputs": inputs,
        "windows": [len(sample["input_ids"]) for sample in samples],
        # Not a tensor: it stays on the CPU.
        "offsets": torch.nn.utils.rnn.pad_sequence(offsets, batch_first=True).numpy(),
        **{name: [sample[name] for sample in samples] for name in ("id", "context", "answers")},
    }


def _padded(rows: list[list[int]], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


class QuestionData(RecipeData):
    """What data of questions, contexts and answers share. A subclass calls `use` in `setup`.

    Args:
        max_length: tokens of a window, question and context together.
        stride: tokens of the context that a window shares with the next.
        batch_size: training windows, or questions of an evaluation, per rank and step.
        num_workers: loader processes per rank.
        partition: which training windows a worker sees, by title; see :class:`RecipeData`.
        split_seed: of the partition and of whatever splits a subclass draws.
    """

    vocabulary: str  # tells one vocabulary from another
    vocab_size: int

    def __init__(
        self,
        max_length: int,
        stride: int,
        batch_size: int,
        num_workers: int = 0,
        partition: str = "iid",
        split_seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, partition, split_seed)
        room = max_length - _longest_question(max_length) - 4  # special tokens
        if not 0 <= stride < room:
            raise ValueError(
                f"data.stride is {stride}, but must be at least 0 and below {room} with data.max_length={max_length}. "
                "HINT: a stride is what two windows share; 128 of 384 is customary."
            )
        self.max_length = max_length
        self.stride = stride

    def use(self, tokenizer: Any) -> None:
        """Takes over the tokenizer's vocabulary and padding."""
        self.vocabulary = vocabulary_of(tokenizer)
        self.vocab_size = len(tokenizer)
        self.collate = partial(collate, pad_token_id=tokenizer.pad_token_id or 0)


class Squad(QuestionData):
    """SQuAD 1.1 or 2.0. Its development set is both validation and test set: the test set is not public.

    Windows are made once, on the first rank of a node, and cached on disk by `datasets`.

    Args:
        tokenizer: hub name or local folder.
        name: of the data set on the hub.
        train_file: JSON file in SQuAD's own format, instead of the hub's; needs `val_file` too.
        val_file: the same of the development set.
        **kwargs: see :class:`QuestionData`.
    """

    def __init__(
        self,
        tokenizer: str,
        name: str = "rajpurkar/squad",
        train_file: str | None = None,
        val_file: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if (train_file is None) != (val_file is None):
            given = "train_file" if train_file else "val_file"
            raise ValueError(f"data.{given} is alone. HINT: give both data.train_file and data.val_file, or neither.")
        for file in (train_file, val_file):
            if file is not None and not Path(file).is_file():
                raise FileNotFoundError(
                    f"no file {Path(file).resolve()}. HINT: check data.train_file and data.val_file."
                )
        self.tokenizer = tokenizer
        self.name = name
        self.files = {"train": train_file, "validation": val_file}

    @override
    def prepare_data(self) -> None:
        self._windows(load_tokenizer(self.tokenizer))

    @override
    def setup(self, stage: str | None = None) -> None:
        tokenizer = load_tokenizer(self.tokenizer)
        self.use(tokenizer)
        self.train_set, self.val_set = self._windows(tokenizer)
        self.test_set = self.val_set
        self.labels = np.array(self.train_set["title"])

    def _windows(self, tokenizer: Any) -> tuple[Any, Any]:
        # `datasets` finds windows again by all that they depend on; a tokenizer changes with its use, so ask it first.
        key = (tokenizer.backend_tokenizer.to_str(), self.max_length, self.stride)
        result = []
        for split, function in (("train", training_windows), ("validation", evaluation_windows)):
            examples = self._examples(split)
            windows = examples.map(
                function,
                batched=True,
                remove_columns=examples.column_names,
                new_fingerprint=_digest(json.dumps([examples._fingerprint, split, *key]).encode()),
                fn_kwargs={"tokenizer": tokenizer, "max_length": self.max_length, "stride": self.stride},
                desc=f"windows of {split}",
            )
            result.append(windows)
        return result[0], result[1]

    def _examples(self, split: str) -> Any:
        import datasets

        path = self.files[split]
        if path is None:
            try:
                found = datasets.load_dataset(self.name, split=split)
            except (OSError, ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
                # What `datasets` raises without a network, for unknown names and files that it cannot read.
                raise FileNotFoundError(
                    f"no data set {self.name!r} with a split {split!r} on the hub or in its cache. HINT: without a "
                    "network point data.train_file and data.val_file at SQuAD's JSON files."
                ) from error
            if missing := {"id", "title", "context", "question", "answers"} - set(found.column_names):
                raise ValueError(
                    f"the data set {self.name!r} lacks {', '.join(sorted(missing))}. HINT: data.name must be of "
                    "SQuAD's form; SQuAD's own JSON files go to data.train_file and data.val_file."
                )
            return found
        answers = {
            "text": datasets.Sequence(datasets.Value("string")),
            "answer_start": datasets.Sequence(datasets.Value("int32")),
        }
        names = ("id", "title", "context", "question")
        features = datasets.Features({**{name: datasets.Value("string") for name in names}, "answers": answers})
        content = {"path": path, "digest": _digest(Path(path).read_bytes())}
        try:
            return datasets.Dataset.from_generator(read_json, features=features, gen_kwargs=content)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(str(error.__cause__)) from error


def read_json(path: str, digest: str = "") -> Iterator[dict[str, Any]]:
    """The examples of a file in SQuAD's own format, 1.1 or 2.0.

    Args:
        path: of the file.
        digest: of the content; not read, but tells `datasets` when the file has changed.
    """
    text = Path(path).read_bytes()
    found = False
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    answers = [] if question.get("is_impossible") else question["answers"]
                    example = {
                        "id": str(question["id"]),
                        "title": article["title"],
                        "context": paragraph["context"],
                        "question": question["question"],
                        "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                    }
                    _check(example)
                    found = True
                    yield example
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = "empty" if not text.strip() else "not SQuAD's JSON"
        raise ValueError(
            f"{path} is {what}. HINT: it must hold data, a list of articles with title and paragraphs, these with "
            "context and qas, these with id, question and answers."
        ) from error
    if not found:
        raise ValueError(f"{path} holds no questions. HINT: point data.train_file and data.val_file at SQuAD's files.")


def _check(example: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for what JSON lets through and SQuAD's form does not."""
    answers = example["answers"]
    "".join([example["title"], example["context"], example["question"], *answers["text"]]).encode()
    places = range(len(example["context"]) + 1)
    if not all(type(start) is int and start in places for start in answers["answer_start"]):
        raise ValueError("an answer_start is no place in its context")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
