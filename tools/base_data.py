"""Text for the embedded base: which public files it learns from, how a row becomes text, what is held out.

Only training files under permissive licences are listed. A row is held out by a hash of its question (or passage),
never by its position, so that the same question met in two files, or in two templates, lands on the same side.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOMAINS = ("maths", "code", "general")
TEMPLATE = "### Human:\n{prompt}\n### Assistant:\n{completion}"
HELD_OUT_PERMILLE = 15  # of each domain's questions
MAX_CHARS = 6000  # a longer document is cut: three long listings would otherwise outweigh thousands of questions
RUN_WORDS = 12  # two texts that share this many words in a row share a passage, a template or a source
MAX_SHARED = 0.2  # of a held-out document's runs, before it counts as seen
MBPP_TRAIN_IDS = range(601, 975)  # the benchmark's own training split; 11-510 is its test split

Document = tuple[str, str]  # (key that decides the split, text)


def instruction(prompt: str, completion: str) -> str:
    """One question and its answer in the form that the instruction data of the demo has too."""
    return TEMPLATE.format(prompt=prompt.strip(), completion=completion.strip())


def _lines(path: Path) -> Iterator[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as stream:
        yield from stream


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in _lines(path):
        if line.strip():
            yield json.loads(line)


def _tsv_rows(path: Path) -> Iterator[tuple[str, str, str]]:
    reader = csv.reader(_lines(path), delimiter="\t", quoting=csv.QUOTE_NONE)
    for question, answer, rationale in reader:
        yield question.replace("\\n", "\n"), answer, rationale.replace("\\n", "\n")


def _gsm8k(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        answer = re.sub(r"<<[^>]*>>", "", row["answer"])  # calculator marks, no use without a calculator
        yield row["question"], instruction(row["question"], answer)


def _cot(path: Path) -> Iterator[Document]:
    for question, answer, rationale in _tsv_rows(path):
        yield question, instruction(question, f"{rationale}\nThe answer is {answer}.")


def _mbpp(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        if row["task_id"] in MBPP_TRAIN_IDS:
            tests = "\n".join(row["test_list"])
            yield row["text"], instruction(f"{row['text']}\n{tests}", row["code"].replace("\r\n", "\n").expandtabs(4))


def _nl2bash(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["nl"], instruction(row["nl"], row["cmd"])


def _snippets(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["title"], instruction(row["description"], row["code"])
        yield row["title"], f"{row['code']}\n\n{row['example']}"


def _algorithms(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["signature"], row["function"]
        yield row["signature"], instruction(f"{row['doc']}\n{row['signature']}", row["function_no_doc"])


def _exercism(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        code = "\n\n".join(part["text"].strip() for part in row["solution"])
        brief = row["instructions"].replace("# Instructions", "").strip()
        if row["language"] == "python":
            yield row["exercise"], instruction(brief, code)
        else:
            yield row["exercise"], code


def _p3(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        passage = max(row["prompt"].split("\n"), key=len)  # many templates and questions share one passage
        yield passage, instruction(row["prompt"], row["completion"])


def _csqa2(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["question"], instruction(row["question"], row["answer"])


def _strategyqa(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["question"], f"{row['term']}: {row['description']}. " + " ".join(row["facts"])


def _webquestions(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        yield row["qText"], instruction(row["qText"], ", ".join(row["answers"][:3]))


def _seed_tasks(path: Path) -> Iterator[Document]:
    for row in _json_rows(path):
        for example in row["instances"]:
            prompt = f"{row['instruction']}\n{example['input']}"
            yield row["instruction"], instruction(prompt, example["output"])


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, whose it is, and how it is read."""

    name: str
    domain: str
    path: str
    origin: str
    licence: str
    read: Callable[[Path], Iterator[Document]]


def _source(name: str, domain: str, path: str, origin: str, licence: str, read: Callable) -> Source:
    return Source(name=name, domain=domain, path=path, origin=origin, licence=licence, read=read)


_FLAN = "google-research/FLAN @ e9e4ec6e27"
SOURCES = (
    _source(
        "GSM8K train", "maths", "math/gsm8k_train.jsonl.gz", "openai/grade-school-math @ 3101c7d507", "MIT", _gsm8k
    ),
    _source("GSM8K train, FLAN form", "maths", "general/flan_cot_gsm8k_train.tsv.gz", _FLAN, "Apache-2.0; MIT", _cot),
    _source("AQuA train, FLAN form", "maths", "general/flan_cot_aqua_train.tsv.gz", _FLAN, "Apache-2.0", _cot),
    _source("MBPP 601-974", "code", "code/mbpp.jsonl", "google-research/mbpp", "CC BY 4.0", _mbpp),
    _source(
        "NL2Bash", "code", "code/nl2bash.jsonl.gz", "TellinaTool/nl2bash @ 466c5fe873 (data/bash)", "MIT", _nl2bash
    ),
    _source(
        "30 seconds of Python",
        "code",
        "code/30_seconds_of_python.jsonl",
        "30-seconds/30-seconds-of-python @ bfdb98c737",
        "CC0-1.0",
        _snippets,
    ),
    _source(
        "TheAlgorithms",
        "code",
        "code/thealgorithms_python.jsonl.gz",
        "TheAlgorithms/Python @ f5988cc097",
        "MIT",
        _algorithms,
    ),
    _source("Exercism", "code", "code/exercism.jsonl.gz", "exercism/* tracks (python @ 9eb657d450)", "MIT", _exercism),
    _source(
        "P3 (sources under MIT, Apache-2.0, CC BY 4.0)",
        "general",
        "general/p3_train.jsonl.gz",
        "yizhongw/self-instruct @ 0b26ccaa41 (T0 train)",
        "Apache-2.0; MIT, Apache-2.0 or CC BY 4.0",
        _p3,
    ),
    _source(
        "CSQA2 train", "general", "general/csqa2_train.jsonl.gz", "allenai/csqa2 @ 3f57a4a6a1", "CC BY 4.0", _csqa2
    ),
    _source("CREAK train", "general", "general/flan_cot_creak_train.tsv.gz", _FLAN, "Apache-2.0; MIT", _cot),
    _source("QASC train", "general", "general/flan_cot_qasc_train.tsv.gz", _FLAN, "Apache-2.0; CC BY 4.0", _cot),
    _source(
        "StrategyQA train",
        "general",
        "general/strategyqa_train.jsonl.gz",
        "eladsegal/strategyqa @ 1ba1e97452",
        "MIT",
        _strategyqa,
    ),
    _source(
        "StrategyQA, FLAN form", "general", "general/flan_cot_strategyqa_train.tsv.gz", _FLAN, "Apache-2.0; MIT", _cot
    ),
    _source(
        "WebQuestions train",
        "general",
        "general/webquestions_trainmodel.jsonl",
        "brmson/dataset-factoid-webquestions @ 6688908533",
        "CC BY 4.0",
        _webquestions,
    ),
    _source(
        "Self-Instruct seed tasks",
        "general",
        "general/self_instruct_seed_tasks.jsonl",
        "yizhongw/self-instruct @ 0b26ccaa41",
        "Apache-2.0",
        _seed_tasks,
    ),
)


def is_held_out(key: str) -> bool:
    """Whether the question with this text stays out of training; the same on every machine and run."""
    plain = " ".join(key.lower().split())
    return int.from_bytes(hashlib.sha256(plain.encode()).digest()[:8], "big") % 1000 < HELD_OUT_PERMILLE


def load(folder: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Training and held-out documents per domain, in the order of the files."""
    train: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    held_out: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    for source in SOURCES:
        for key, text in source.read(folder / source.path):
            side = held_out if is_held_out(key) else train
            side[source.domain].append(text[:MAX_CHARS])
    return train, held_out


def _runs(text: str) -> list[int]:
    """Hashes of every run of RUN_WORDS words."""
    words = re.findall(r"\w+", text.lower())
    return [hash(" ".join(words[i : i + RUN_WORDS])) for i in range(len(words) - RUN_WORDS + 1)]


def _answer(text: str) -> str | None:
    """The completion of an instruction, where it is long enough not to recur by chance."""
    answer = text.rpartition("### Assistant:\n")[2] if "### Assistant:\n" in text else ""
    return answer if len(answer.split()) >= 4 else None


def unseen(train: list[str], held_out: list[str]) -> list[str]:
    """The held-out documents that are new in wording too.

    The split is by question. A passage can still return inside another question's text, and one command under another
    wording; a figure that counted those would partly measure memory. Dropped: documents with more than MAX_SHARED of
    their word runs in training, and instructions whose whole answer (four words or more) is a training answer.
    """
    runs = {run for text in train for run in _runs(text)}
    answers = {_answer(text) for text in train} - {None}

    def is_new(text: str) -> bool:
        own = _runs(text)
        return sum(run in runs for run in own) <= MAX_SHARED * len(own) and _answer(text) not in answers

    return [text for text in held_out if is_new(text)]
