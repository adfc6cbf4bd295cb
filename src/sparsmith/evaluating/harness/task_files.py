"""Task files: YAML in the harness's own words, the part of them that needs no code.

A task file of the harness may import Python functions, name data sets of the hub and use any metric that it can download. Here a file is
plain data: its texts are templates, its rows lie in files, its metrics are the four of `METRICS`. Every other key is refused by name, so
that nothing in a file is passed over in silence. One demand is ours: `fewshot_split` must be named and must be no split that is scored,
because the harness draws the shots from the scored rows where it is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsmith.errors import RecipeErrors, UsageError, nearest
from sparsmith.evaluating.harness.templates import find_fault
from sparsmith.recipe import yaml_tree
from sparsmith.recipe.paths import exists

BUILT_IN = Path(__file__).parent.parent / "tasks"
METRICS = ("acc", "acc_norm", "acc_bytes", "exact_match")
_CHOICE_METRICS = METRICS[:3]
_FILTERS = {"regex": {"regex_pattern", "group_select", "fallback"}, "take_first": set(), "lowercase": set()}
_MATCH_OPTIONS = ("regexes_to_ignore", "ignore_case", "ignore_punctuation", "ignore_numbers")
_TEXTS = ("doc_to_text", "doc_to_choice", "doc_to_target")
# key -> what it may be; a key of a dotted group stands under that group
_KEYS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "dataset_path": (str,),
    "dataset_kwargs": (dict,),
    "dataset_kwargs.data_files": (dict,),
    "training_split": (str,),
    "validation_split": (str,),
    "test_split": (str,),
    "fewshot_split": (str,),
    "fewshot_config": (dict,),
    "fewshot_config.sampler": (str,),
    "fewshot_config.doc_to_text": (str,),
    "fewshot_config.doc_to_target": (str,),
    "num_fewshot": (int,),
    "output_type": (str,),
    "description": (str,),
    "doc_to_text": (str,),
    "doc_to_choice": (str, list),
    "doc_to_target": (str,),
    "target_delimiter": (str,),
    "fewshot_delimiter": (str,),
    "generation_kwargs": (dict,),
    "generation_kwargs.until": (list,),
    "generation_kwargs.max_gen_toks": (int,),
    "generation_kwargs.do_sample": (bool,),
    "filter_list": (list,),
    "metric_list": (list,),
    "metadata": (dict,),
    "metadata.version": (int, float, str),
    "metadata.by": (str,),
    "metadata.chance": (int, float),
}
_NEEDED = ("task", "dataset_kwargs", "test_split", "fewshot_split", "output_type", "doc_to_text", "doc_to_target")
_WORDS = {
    str: "text",
    int: "a whole number",
    dict: "a group of keys",
    list: "a list",
    bool: "true or false",
    float: "a number",
}
_MEND_CODE = "Write it as a template; code is never taken from a task file."


@dataclass(frozen=True)
class TaskFile:
    """One task as its file says it."""

    name: str
    path: Path
    config: Mapping[str, Any]
    """The file's keys, checked."""

    @property
    def files(self) -> Mapping[str, str]:
        """Split -> file name."""
        return self.config["dataset_kwargs"]["data_files"]

    @property
    def shots(self) -> int:
        return self.config.get("num_fewshot", 0)

    @property
    def by(self) -> str | None:
        """The column whose every value is a task of its own."""
        return self.config.get("metadata", {}).get("by")

    @property
    def chooses(self) -> bool:
        """Whether options are scored; else text is written."""
        return self.config["output_type"] == "multiple_choice"


def built_in_tasks() -> list[str]:
    """Names of the tasks that ship with the package."""
    return sorted(path.stem for path in BUILT_IN.glob("*.yaml"))


def find_tasks(wanted: Sequence[str]) -> list[TaskFile]:
    """The tasks of names, of YAML files and of folders of such files, in the order given.

    Raises:
        UsageError: an unknown name, a folder without task files, or two tasks of one name.
        RecipeErrors: all faults of a task file, each with its place.
    """
    found: dict[str, TaskFile] = {}
    for text in wanted:
        for path in _paths(str(text)):
            task = read_task(path)
            if task.name in found:
                where = f"{found[task.name].path} and {path}"
                raise UsageError(where, f"the task `{task.name}` twice", "each task once", "Leave one of them out.")
            found[task.name] = task
    if not found:
        raise UsageError("tasks", "no task", "at least one", "Known: " + ", ".join(built_in_tasks()) + ".")
    return list(found.values())


def _paths(text: str) -> list[Path]:
    if text in built_in_tasks():
        return [BUILT_IN / f"{text}.yaml"]
    path = Path(text)
    if text and exists(path):
        files = sorted(path.glob("*.yaml")) + sorted(path.glob("*.yml")) if path.is_dir() else [path]
        if not files:
            raise UsageError(text, "a folder without task files", "files that end in .yaml", "Check the path.")
        return files
    mend = nearest(text, built_in_tasks())
    raise UsageError("tasks", f"`{text}`", "the name of a task, or a path of task files", mend)


def read_task(path: Path) -> TaskFile:
    """The task of one file.

    Raises:
        RecipeErrors: all its faults.
    """
    try:
        raw = path.read_bytes()
    except OSError as fault:
        raise UsageError(
            str(path), f"a file that cannot be read ({fault.strerror})", "a task file", "Check the path."
        ) from None
    tree = yaml_tree.parse(yaml_tree.decode(raw, str(path)), str(path))
    if not tree.faults:
        _check(tree)
    if tree.faults:
        raise RecipeErrors(tree.faults)
    return TaskFile(tree.data["task"], path, tree.data)


def _check(tree: yaml_tree.Tree) -> None:
    if not isinstance(tree.data, dict):
        tree.fault((), "no keys", "a task: `task: NAME`, ...", "Write the task's keys.")
        return
    for key in _NEEDED:
        if key not in tree.data:
            tree.fault((), f"no `{key}`", "a task that names it", f"Add `{key}: ...`.")
    _check_keys(tree, tree.data, ())
    if tree.faults:
        return
    _check_splits(tree)
    _check_output(tree)
    _check_metrics(tree)
    _check_templates(tree)


def _check_keys(tree: yaml_tree.Tree, group: Mapping[str, Any], path: tuple[str, ...]) -> None:
    prefix = "".join(f"{part}." for part in path)
    if prefix == "dataset_kwargs.data_files.":
        for name, file in group.items():
            if not isinstance(file, str) or not file.strip():
                tree.fault((*path, name), repr(file), "the name of a file", "Name one file.")
        return
    known = [key.removeprefix(prefix) for key in _KEYS if key.startswith(prefix) and "." not in key[len(prefix) :]]
    for key, value in group.items():
        kinds = _KEYS.get(prefix + key)
        if kinds is None:
            code = key in ("class", "process_docs", "process_results", "custom_dataset", "unsafe_code", "use_prompt")
            tree.fault(
                (*path, key), "a key that is not taken", "a known key", _MEND_CODE if code else nearest(key, known)
            )
        elif not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            tree.fault((*path, key), repr(value)[:60], " or ".join(_WORDS[kind] for kind in kinds), "Mend the value.")
        elif isinstance(value, dict):
            _check_keys(tree, value, (*path, key))


def _check_splits(tree: yaml_tree.Tree) -> None:
    data = tree.data
    if data.get("dataset_path", "json") != "json":
        tree.fault(
            ("dataset_path",),
            f"`{data['dataset_path']}`",
            "json: rows of local files",
            "Name files under dataset_kwargs.data_files.",
        )
    files = data["dataset_kwargs"].get("data_files", {})
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if key in data and data[key] not in files:
            tree.fault(
                (key,), f"`{data[key]}`", "a split of dataset_kwargs.data_files", nearest(data[key], list(files))
            )
    scored, shots = data["test_split"], data["fewshot_split"]
    if shots == scored or (shots in files and files.get(shots) == files.get(scored)):
        tree.fault(
            ("fewshot_split",),
            "the rows that are scored",
            "rows of another file",
            "Name a training or validation file.",
        )
    if data.get("num_fewshot", 0) < 0:
        tree.fault(("num_fewshot",), str(data["num_fewshot"]), "0 or more", "Mend the value.")
    sampler = data.get("fewshot_config", {}).get("sampler", "default")
    if sampler not in ("default", "first_n"):
        tree.fault(("fewshot_config", "sampler"), f"`{sampler}`", "default (drawn) or first_n", "Choose one.")


def _check_output(tree: yaml_tree.Tree) -> None:
    data = tree.data
    kind = data["output_type"]
    if kind not in ("multiple_choice", "generate_until"):
        tree.fault(("output_type",), f"`{kind}`", "multiple_choice or generate_until", "Choose one.")
        return
    idle = ("generation_kwargs", "filter_list") if kind == "multiple_choice" else ("doc_to_choice",)
    for key in idle:
        if key in data:
            tree.fault((key,), f"a key without effect on {kind}", "no such key", "Leave it out.")
    if kind == "multiple_choice":
        if "doc_to_choice" not in data:
            tree.fault((), "no `doc_to_choice`", "the options of a row", "Add `doc_to_choice: ...`.")
        if "chance" in data.get("metadata", {}):
            tree.fault(
                ("metadata", "chance"), "a key without effect", "no such key: the options tell it", "Leave it out."
            )
        return
    settings = data.get("generation_kwargs", {})
    if not settings.get("until") or not all(isinstance(stop, str) and stop for stop in settings["until"]):
        tree.fault(("generation_kwargs",), "no texts to stop at", 'until: ["\\n\\n"]', "Name them.")
    if settings.get("max_gen_toks", 0) < 1:
        tree.fault(("generation_kwargs",), "no length", "max_gen_toks: 1 or more", "Name the most tokens of an answer.")
    if settings.get("do_sample", False):
        tree.fault(
            ("generation_kwargs", "do_sample"), "true", "false: answers are the likeliest tokens", "Leave it out."
        )
    if not 0 <= data.get("metadata", {}).get("chance", 0) < 1:
        tree.fault(("metadata", "chance"), str(data["metadata"]["chance"]), "0 or more, below 1", "Mend the value.")
    _check_filters(tree)


def _check_filters(tree: yaml_tree.Tree) -> None:
    filters = tree.data.get("filter_list", [])
    if len(filters) > 1:
        tree.fault(("filter_list",), f"{len(filters)} filters", "one", "Write one task for each.")
    for number, one in enumerate(filters):
        steps = one.get("filter") if isinstance(one, dict) and set(one) == {"name", "filter"} else None
        if not isinstance(steps, list):
            tree.fault(("filter_list", number), repr(one)[:60], "{name: ..., filter: [...]}", "Mend the filter.")
            continue
        for step in steps:
            name = step.get("function") if isinstance(step, dict) else None
            if name not in _FILTERS or not set(step) - {"function"} <= _FILTERS[name]:
                expected = "one of " + ", ".join(_FILTERS) + " with its settings"
                tree.fault(("filter_list", number), repr(step)[:60], expected, "Mend the filter.")


def _check_metrics(tree: yaml_tree.Tree) -> None:
    metrics = tree.data.get("metric_list", [])
    allowed = _CHOICE_METRICS if tree.data["output_type"] == "multiple_choice" else ("exact_match",)
    if not metrics:
        tree.fault((), "no `metric_list`", "one of " + ", ".join(allowed), "Add `metric_list: [{metric: ...}]`.")
    for number, metric in enumerate(metrics):
        name = metric.get("metric") if isinstance(metric, dict) else None
        if name not in allowed:
            tree.fault(
                ("metric_list", number), repr(metric)[:60], "{metric: " + " | ".join(allowed) + "}", "Mend the metric."
            )
            continue
        for key in set(metric) - {"metric", "aggregation", "higher_is_better"}:
            if name != "exact_match" or key not in _MATCH_OPTIONS:
                tree.fault(
                    ("metric_list", number, key), "a key without effect", "no such key", nearest(key, _MATCH_OPTIONS)
                )
        if metric.get("aggregation", "mean") != "mean" or metric.get("higher_is_better", True) is not True:
            tree.fault(
                ("metric_list", number), repr(metric)[:60], "aggregation mean, higher_is_better true", "Leave both out."
            )


def _check_templates(tree: yaml_tree.Tree) -> None:
    for path in [(key,) for key in _TEXTS] + [("fewshot_config", "doc_to_text"), ("fewshot_config", "doc_to_target")]:
        text = tree.get(path)
        if isinstance(text, str) and (fault := find_fault(text)):
            tree.fault(path, f"a template with a fault ({fault})", "a Jinja template", "Mend it.")
    if "{{" in tree.data.get("description", "") or "{%" in tree.data.get("description", ""):
        tree.fault(
            ("description",), "a template", "plain text, the same for every row", "Put what changes into doc_to_text."
        )
    choices = tree.data.get("doc_to_choice")
    if isinstance(choices, list) and (len(choices) < 2 or not all(isinstance(c, str) and c for c in choices)):
        tree.fault(
            ("doc_to_choice",), repr(choices)[:60], "two texts or more", "Mend the options (put `yes`, `1` in quotes)."
        )
