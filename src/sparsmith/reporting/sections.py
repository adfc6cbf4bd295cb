"""What each section of the page says, as plain data for the template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from sparsmith.methods import registry
from sparsmith.reporting.folder import Run, compared_as
from sparsmith.reporting.words import UNIT, count, duration, percent, plain, short, size
from sparsmith.runs import RunFolder

Rows = list[tuple[str, ...]]


def method_words(run: Run) -> str:
    """`PESC`, `PESC + SoFT`, `dense LoRA, a control of PESC`."""
    found = []
    for method in run.methods:
        title, role = _title(str(method.get("method", "?"))), compared_as(method)
        words = role.upper() if len(role) <= 3 else role.replace("_", " ").replace("lora", "LoRA")
        found.append(f"{words}, a control of {title}" if role else title)
    return " + ".join(found) or "no method"


def _title(name: str) -> str:
    """The method's name as its paper writes it."""
    if name not in registry.names():
        return name.upper() if len(name) <= 4 else name.capitalize()
    return registry.get(name).title.split(":")[0]


def base_words(run: Run) -> str:
    """The base's name: the last part of its path; of a later stage, the stage that left it."""
    path = str((run.plan or {}).get("base") or (run.recipe.get("model") or {}).get("path") or "a dense base")
    last = PurePath(path.rstrip("/"))
    if last.name == RunFolder(Path()).settled.name and last.parent.name:
        return f"{last.parent.name}, settled"
    return last.name or path


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """(figure, unit or words, note) of the headline."""
    found: list[tuple[str, str, str]] = []
    plan = run.plan or {}
    if parameters := plan.get("parameters"):
        base = parameters.get("base") or parameters["total"]
        trained = parameters.get("trained_total", sum(parameters["trained"].values()))
        found += [
            (
                short(parameters["total"]),
                "parameters in all",
                f"{parameters['total'] / base:.3g}{UNIT}× the base’s {short(base)}",
            ),
            (
                short(parameters["active"]),
                "active per token",
                f"{percent(parameters['active'] / parameters['total'])} of all",
            ),
            (short(trained), "trained", f"{percent(trained / parameters['total'])} of all"),
        ]
    if flops := plan.get("flops_per_token"):
        found.append((f"{flops['overhead']:.3g}{UNIT}×", "forward FLOPs", "per token, over the base"))
    if run.facts.get("tokens_trained"):
        found.append(
            (short(run.facts["tokens_trained"]), "tokens tuned on", f"in {count(run.facts.get('steps', 0))} steps")
        )
    if "seconds" in run.facts:
        found.append((duration(run.facts["seconds"]), "from start to end", "evaluation included"))
    return found


def proofs(run: Run) -> list[dict[str, str]]:
    """Every check of `proof.json`, in its order: phase, check, value, limit, passed."""
    return [
        {
            "phase": phase,
            "check": str(check["check"]),
            "value": _values(check.get("value")),
            "limit": "" if check.get("limit") is None else plain(check["limit"]),
            "passed": "yes" if check.get("passed", False) else "no",
        }
        for phase, record in (run.proof or {}).items()
        for check in _checks(record)
    ]


def _checks(record: Any) -> Iterator[dict[str, Any]]:
    if isinstance(record, dict):
        if "check" in record:
            yield record
        for value in record.values():
            yield from _checks(value)
    elif isinstance(record, list):
        for value in record:
            yield from _checks(value)


def _values(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name}\u00a0{plain(figure)}" for name, figure in value.items())
    return plain(value)


def plan_tables(run: Run) -> list[dict[str, Any]]:
    """Tables of the plan: title, heads, rows."""
    plan = run.plan
    if not plan:
        return []
    changes = [(c["where"], c["what"].replace("->", "→"), plain(c["count"])) for c in plan["changes"]]
    found = [_table("What changes", ("modules", "change", "count"), changes, left=2), _parameters(plan["parameters"])]
    if memory := plan.get("memory"):
        found.append(_memory(memory))
    costs: Rows = []
    if flops := plan.get("flops_per_token"):
        names = {"base_forward": "forward, base", "forward": "forward, crafted", "training": "training"}
        costs += [(f"FLOPs per token: {words}", short(flops[key])) for key, words in names.items() if key in flops]
    costs += [(f"disk: {name.replace('_', ' ')}", size(value)) for name, value in (plan.get("disk") or {}).items()]
    return [*found, *([_table("Cost", ("", ""), costs)] if costs else [])]


def _parameters(parameters: dict[str, Any]) -> dict[str, Any]:
    base = parameters.get("base") or parameters["total"]
    lines = [("base", base), ("total", parameters["total"]), ("active per token", parameters["active"])]
    lines += [(f"trained: {role}", n) for role, n in parameters["trained"].items()]
    rows = [(name, count(n), percent(n / base, 2)) for name, n in lines]
    return _table("Parameters", ("", "count", "of the base"), rows)


def _memory(memory: dict[str, Any]) -> dict[str, Any]:
    cases = list(memory["total"])
    rows: Rows = [(name, *[size(memory[name])] * len(cases)) for name in ("weights", "gradients", "optimizer")]
    rows.append(("activations", *(size(memory["activations"][case]) for case in cases)))
    rows.append(("together", *(size(memory["total"][case]) for case in cases)))
    return _table("Memory while tuning, estimated", ("", *cases), rows)


def _table(title: str, heads: Sequence[str], rows: Sequence[tuple], left: int = 1) -> dict[str, Any]:
    return {"title": title, "heads": list(heads), "rows": [list(row) for row in rows], "left": left}


_COUNTS = (
    "read",
    "rejected",
    "filtered",
    "limited",
    "over_long",
    "truncated",
    "all_masked",
    "kept",
    "tokens",
    "trained_tokens",
    "share",
)


def data_table(run: Run) -> dict[str, Any] | None:
    """One row per source: what was read, left out and kept."""
    counts = (run.data or {}).get("counts")
    if not counts:
        return None
    sources = [(part, name, figures) for part, named in counts.items() for name, figures in named.items()]
    heads = [key for key in _COUNTS if any(key in figures for *_, figures in sources)]
    heads = [
        key for key in heads if key in ("read", "kept", "share") or any(figures.get(key) for *_, figures in sources)
    ]
    told = ["domain", *(key for key in ("family", "licence") if any(figures.get(key) for *_, figures in sources))]
    rows = [
        (name, part, *(str(figures.get(key, "")) for key in told), *(_count(key, figures.get(key)) for key in heads))
        for part, name, figures in sources
    ]
    words = {"share": "share of stream", "trained_tokens": "answer tokens"}
    shown = (words.get(key, key.replace("_", " ")) for key in heads)
    return _table("Sources", ("source", "use", *told, *shown), rows, left=2 + len(told))


def _count(key: str, value: Any) -> str:
    if value is None:
        return ""
    return percent(value) if key == "share" else plain(value)


def fingerprints(run: Run) -> list[tuple[str, str]]:
    """(file's name, sha256)."""
    found = (run.data or {}).get("fingerprints") or {}
    return [(PurePath(str(path)).name, str(digest)) for path, digest in found.items()]


def fact_rows(run: Run) -> Rows:
    """Versions and machine."""
    rows: Rows = [("sparsmith", str(run.facts.get("sparsmith", "unknown")))]
    for key, value in run.facts.items():
        if isinstance(value, dict):
            rows += [
                (f"{key}: {name}", plain(entry) if not isinstance(entry, str) else entry)
                for name, entry in value.items()
            ]
        elif key in ("seconds", "train_seconds"):
            rows.append(("tuning alone" if key == "train_seconds" else "from start to end", duration(value)))
        elif key != "sparsmith":
            rows.append((key.replace("_", " "), plain(value)))
    return rows


def _answer(sample: dict[str, Any], system: str) -> tuple[str, str]:
    """(a system's answer, how sure it was where it is a class)."""
    probability = sample.get(f"{system}_probability")
    return sample.get(system, ""), f" (probability {probability})" if probability else ""


def samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompt, reference and every system's answer, paired by the prompt; the base first."""
    main, *others = runs
    found = []
    for sample in main.samples or []:
        answers = [("base", *_answer(sample, "base")), (main.name, *_answer(sample, "tuned"))]
        for run in others:
            twin = next((s for s in run.samples or [] if s["prompt"] == sample["prompt"]), None)
            answers += [(run.name, *_answer(twin, "tuned"))] if twin else []
        reference = sample.get("reference", "")
        shown = [
            {"name": name, "text": text + sure, "right": text.strip() == reference.strip()}
            for name, text, sure in answers
        ]
        found.append(
            {
                "domain": sample.get("domain", ""),
                "prompt": sample["prompt"].strip(),
                "reference": reference,
                "answers": shown,
            }
        )
    return found
