"""Questions on Python's own documentation: the question-answering data that every machine has.

`python -m recipes.docs` shows the sizes, some questions, and how far rules get that do not read the question.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from typing_extensions import override

from recipes.squad import QuestionData, evaluation_windows, load_tokenizer, train_tokenizer, training_windows

# Not the library's own documentation.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo"}
LONGEST = 50  # words of a docstring: most are shorter, and long windows take most of the time
SHARES = {"test": 0.16, "val": 0.05}  # of the questions
WHEN = r"[`*']*\s+(?:exception\s+)?(?:if|when)\s+"
END = r"(?=[.;](?:\s|$)|\n\n|\Z)"  # where a sentence ends
ERROR = r"[\w.]*(?:Error|Exception|StopIteration|StopAsyncIteration)"

# The wordings of a kind of question, and where its answer is: the group `answer` of a pattern in the context, which is
# the signature, a line break and the docstring. Groups of other names are put into the wordings.
KINDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("What does {name} do?", "What is {name} for?", "What is the purpose of {name}?"),
        rf"\A[^\n]*\n(?!Returns?\b)(?P<answer>[A-Z`'\"].{{8,250}}?){END}",
    ),
    (
        ("What does {name} return?", "What is returned by {name}?", "What is the result of {name}?"),
        rf"\b[Rr]eturns?:?\s+(?P<answer>(?!if\b|when\b|from\b|values?\b).{{3,150}}?){END}",
    ),
    (
        ("When does {name} return {value}?", "In which case is the result {value}?", "When is {name} {value}?"),
        rf"\b[Rr]eturns?\s+[`*']*(?P<value>[Tt]rue|[Ff]alse|None){WHEN}(?P<answer>.{{3,150}}?){END}",
    ),
    (
        ("What does {name} raise?", "Which exception does {name} raise?", "Which error can {name} cause?"),
        rf"\b(?:[Rr]ais(?:es?|ed|ing)|[Tt]hrows?)\s+(?:an?\s+|the\s+)?[`*']*(?P<answer>{ERROR})",
    ),
    (
        ("When does {name} raise {error}?", "In which case is {error} raised?", "What makes {name} raise {error}?"),
        rf"\b[Rr]aises?\s+(?:an?\s+)?[`*']*(?P<error>{ERROR}){WHEN}(?P<answer>.{{3,150}}?){END}",
    ),
    (
        ("What happens if {condition}?", "What if {condition}?", "What is done if {condition}?"),
        rf"(?:\n|(?<=\.)\s+)If\s+(?P<condition>[^,.]{{3,80}}),\s+(?:then\s+)?(?P<answer>.{{8,150}}?){END}",
    ),
    (
        ("Which arguments does {name} take?", "What are the arguments of {name}?", "What is passed to {name}?"),
        r"\A\w+\((?P<answer>[^\n]+)\)\n",
    ),
    (
        ("What does {name} inherit from?", "What is the base class of {name}?", "Which class is extended by {name}?"),
        r"\Aclass \w+\((?P<answer>[^\n]+)\)\n",
    ),
    (
        ("What is the first argument of {name}?", "Which argument of {name} comes first?"),
        r"\A\w+\((?P<answer>\w+),[^\n]*\n",
    ),
)
DEFAULT = (
    "What is the default value of {argument}?",
    "What is {argument} by default?",
    "Which value has {argument} if it is not given?",
)
DEFAULT_PATTERN = re.compile(r"(?<=[(\s])(?P<argument>\w+)=(?P<answer>[^\s,()\[\]{}=]+)(?=,|\)\n)")


def _wording(wordings: tuple[str, ...], context: str, **words: str) -> str:
    """One of the wordings, always the same for the same context."""
    return " ".join(wordings[zlib.crc32(context.encode()) % len(wordings)].format(**words).split())


def _questions(name: str, context: str) -> Iterator[tuple[str, str, int]]:
    """Questions, answers and where these start in the context."""
    for wordings, pattern in KINDS:
        if match := re.search(pattern, context, re.DOTALL):
            words = {key: word for key, word in match.groupdict().items() if key != "answer"}
            yield _wording(wordings, context, name=name, **words), match["answer"].rstrip(), match.start("answer")
    for match in list(DEFAULT_PATTERN.finditer(context[: context.index("\n") + 1]))[:2]:
        yield _wording(DEFAULT, context, argument=match["argument"]), match["answer"], match.start("answer")


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes that may be or hold a definition, in the order of `ast.walk`."""
    todo = deque([tree])
    while todo:
        node = todo.popleft()
        todo.extend(child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
        yield node


def _contexts(root: Path) -> Iterator[tuple[str, str, str]]:
    """Module, name and what `help()` would show of every documented class and function: signature and docstring."""
    for path in sorted(_files(root)):
        relative = path.relative_to(root)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of old escape sequences
                tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError, RecursionError):
            continue
        for node in _statements(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            docstring = ast.get_docstring(node)
            if not docstring or not docstring.strip() or len(docstring.split()) > LONGEST:
                continue
            if isinstance(node, ast.ClassDef):
                signature = f"class {node.name}({', '.join(map(ast.unparse, node.bases))})"
            else:
                arguments = re.sub(r"\A(self|cls)(, |\Z)", "", ast.unparse(node.args))
                signature = f"{node.name}({arguments})"
            yield relative.parts[0].removesuffix(".py"), node.name, f"{signature}\n{docstring}"


@cache
def documentation(root: str | None = None) -> list[dict[str, Any]]:
    """The questions, in the form of SQuAD's examples; a context has at least two of them with different answers.

    Args:
        root: folder of Python files; None: Python's standard library.
    """
    folder = Path(root or sysconfig.get_paths()["stdlib"])
    examples: list[dict[str, Any]] = []
    seen: set[str] = set()
    for module, name, context in _contexts(folder):
        docstring = context.partition("\n")[2]
        key = re.sub(r"\W+", " ", docstring).lower()
        found = list(_questions(name, context))
        # A docstring that two modules share must not be both learnt and tested.
        if key in seen or len({answer for _, answer, _ in found}) < 2:
            continue
        seen.add(key)
        for question, answer, start in found:
            answers = {"text": [answer], "answer_start": [start]}
            examples.append(
                {
                    "id": f"{module}-{len(examples)}",
                    "title": module,
                    "context": context,
                    "question": question,
                    "answers": answers,
                }
            )
    if not examples:
        raise FileNotFoundError(f"no documented Python files in {folder}. HINT: this Python has no library sources.")
    return examples


def split(examples: list[dict[str, Any]], seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Training, validation and test examples, by module: no module is in two of them."""
    sizes = Counter(example["title"] for example in examples)
    order = sorted(sizes)
    np.random.default_rng(seed).shuffle(order)
    part, taken = {}, Counter[str]()
    for module in order:
        fits = (name for name, share in SHARES.items() if taken[name] + sizes[module] <= share * len(examples))
        part[module] = next(fits, "train")
        taken[part[module]] += sizes[module]
    return {
        name: [example for example in examples if part[example["title"]] == name] for name in ("train", "val", "test")
    }


class Docs(QuestionData):
    """Extractive questions on the docstrings of Python's standard library, split by module; nothing is downloaded.

    Questions and answers are found by patterns, so they suit a small model trained from scratch. A context has several
    questions with different answers: the question must be read. The title, which a partition goes by, is the module.
    All is made at construction, once for all forked ranks.

    Args:
        tokenizer: hub name or local folder; None trains a vocabulary on the training split.
        vocab_size: of a vocabulary that is trained.
        **kwargs: see :class:`QuestionData`.
    """

    def __init__(self, tokenizer: str | None = None, vocab_size: int = 3000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.splits = split(documentation(), self.split_seed)
        if tokenizer is None:
            texts = [text for example in self.splits["train"] for text in (example["question"], example["context"])]
            trained = train_tokenizer(texts, vocab_size)
        else:
            trained = load_tokenizer(tokenizer)
        self.use(trained)
        columns = {
            name: {key: [example[key] for example in examples] for key in examples[0]}
            for name, examples in self.splits.items()
        }
        self.train_set = Windows(training_windows(columns["train"], trained, self.max_length, self.stride))
        self.val_set = Windows(evaluation_windows(columns["val"], trained, self.max_length, self.stride))
        self.test_set = Windows(evaluation_windows(columns["test"], trained, self.max_length, self.stride))
        self.labels = np.array(self.train_set.columns["title"])

    @override
    def setup(self, stage: str) -> None:
        if stage == "test" and self.rank == 0:
            rule, value = next(iter(trivial_rules(self.splits["test"]).items()))
            print(f"test/f1 of the best rule that does not read the question ({rule}): {value:.3f}", flush=True)


class Windows(Dataset[Any]):
    """Samples in memory, from columns."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    @override
    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: column[index] for name, column in self.columns.items()}


def _first_sentence(text: str) -> str:
    return re.split(r"(?<=\.)\s|\n\n", text)[0]


# Answers that do not look at the question, from the signature and the docstring.
RULES: dict[str, Callable[[str, str], str]] = {
    "whole context": lambda signature, docstring: f"{signature} {docstring}",
    "signature": lambda signature, docstring: signature,
    "arguments": lambda signature, docstring: signature.partition("(")[2].removesuffix(")"),
    "first argument": lambda signature, docstring: re.split(r"[,=)]", signature.partition("(")[2])[0],
    "docstring": lambda signature, docstring: docstring,
    "first sentence": lambda signature, docstring: _first_sentence(docstring),
    "first sentence without its first word": lambda signature, docstring: _first_sentence(docstring).partition(" ")[2],
    "last sentence": lambda signature, docstring: re.split(r"(?<=\.)\s|\n\n", docstring.strip())[-1],
    "longest sentence": lambda signature, docstring: max(re.split(r"(?<=\.)\s|\n\n", docstring), key=len),
    "first 5 words": lambda signature, docstring: " ".join(docstring.split()[:5]),
    "first 10 words": lambda signature, docstring: " ".join(docstring.split()[:10]),
}


def trivial_rules(examples: list[dict[str, Any]]) -> dict[str, float]:
    """F1 of each rule on these examples, best first; a model must do far better."""
    from torchmetrics.functional.text import squad

    result = {}
    for name, rule in RULES.items():
        answers = []
        for example in examples:
            signature, _, docstring = example["context"].partition("\n")
            answers.append({"id": example["id"], "prediction_text": rule(signature, docstring)})
        targets = [{"id": example["id"], "answers": example["answers"]} for example in examples]
        result[name] = float(squad(answers, targets)["f1"]) / 100
    return dict(sorted(result.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    parts = split(documentation())
    for name, examples in parts.items():
        contexts = len({example["context"] for example in examples})
        modules = len({example["title"] for example in examples})
        print(f"{name:6s} {len(examples):6d} questions on {contexts} contexts of {modules} modules")
    for example in parts["test"][:: len(parts["test"]) // 10]:
        print(f"\n{example['context']}\n  {example['question']}\n  -> {example['answers']['text'][0]}")
    print("\nF1 on the test split without reading the question:")
    for name, value in trivial_rules(parts["test"]).items():
        print(f"  {name:40s} {value:.3f}")
