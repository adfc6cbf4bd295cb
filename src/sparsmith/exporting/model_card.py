"""The card of an exported model: what it is, how it is opened, how it was made, and how it proved itself. Figures are
copied, never made up; what is not known is left out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparsmith import anatomy
from sparsmith.crafting.base_model import auto_class
from sparsmith.crafting.identity import our_version
from sparsmith.crafting.record import record_of
from sparsmith.exporting.elsewhere import card
from sparsmith.exporting.report import ExportReport, accounting_rows, slice_words
from sparsmith.methods import registry

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sparsmith.methods.base import Method, MethodConfig

_OPEN = """```python
from transformers import {opener}, AutoTokenizer

model = {opener}.from_pretrained("{path}"{code})
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""

_UNUSED = "Those of tuning (`tune`, `lora`, `moe` but for `combine`) have had no effect yet."


def model_card(model: PreTrainedModel, report: ExportReport, facts: dict[str, Any]) -> str:
    """README.md with the hub's front matter. `facts` may hold `recipe` (text), `run`, `plan` and `proof` (plain
    data)."""
    parts = [
        _front_matter(model, report),
        f"# {report.path.name}\n\n{_what(model, report)}",
        "## Open it\n\n" + _opening(model, report),
        "## Size\n\n" + _table(("", "count"), _sizes(report)),
        "## Method\n\n" + _methods(model) + ("" if report.tuned else "\n\n" + _UNUSED),
        "## Proof\n\n" + _proofs(report, facts),
    ]
    if report.slice:
        parts.insert(3, "## Depth\n\n" + _depth(report))
    if report.accounting:
        parts.insert(4, "## What was removed\n\n" + _removed(report))
    elif report.cautions:
        parts.insert(2, "## Know\n\n" + "\n".join(f"- {text}" for text in report.cautions))
    if report.settle:
        parts.append("## Merge\n\n" + _merge(report.settle))
    if facts.get("data"):
        parts.append("## Data\n\n" + _data(facts["data"]["counts"]))
    if facts.get("run"):
        parts.append("## Run\n\n" + _table(("", ""), _flat(facts["run"])))
    if facts.get("recipe"):
        parts.append("## Recipe\n\n```yaml\n" + str(facts["recipe"]).strip() + "\n```")
    return "\n\n".join(parts) + "\n"


def count_parameters(model: PreTrainedModel) -> dict[str, int]:
    """`total`, counted on the tensors (tied ones once), and `active`: those that one token uses."""
    total = sum(p.numel() for p in model.parameters())
    base_config = getattr(model.config, "base_config", None) or model.config
    row, shape = anatomy.of(base_config), anatomy.shape_of(base_config)
    inactive = sum(method.inactive(model, config, row, shape) for method, config in record_of(model).parts)
    return {"total": total, "active": total - inactive}


def _front_matter(model: PreTrainedModel, report: ExportReport) -> str:
    methods = [method.name for method, _ in _made_by(model)]
    kinds = {anatomy.SEQ_CLS: "text-classification", anatomy.SEQ2SEQ: "text2text-generation"}
    pipeline = kinds.get(anatomy.task_of(model), "text-generation")
    lines = ["library_name: transformers", f"pipeline_tag: {pipeline}", "tags:", "- sparsmith"]
    lines += [f"- {name}" for name in methods]
    return "---\n" + "\n".join(lines) + "\n---"


def _what(model: PreTrainedModel, report: ExportReport) -> str:
    record = record_of(model)
    titles = ", then ".join(method.title for method, _ in _made_by(model))
    base = record.base.id.rstrip("/").split("/")
    name = "/".join(base[-2:]) if not record.base.id.startswith("/") else base[-1]
    made = f"Made with sparsmith {our_version()}" + (f" from `{name}`" if record.base.id else "")
    depth = " " + slice_words(report.slice) if report.slice else ""
    if not report.tuned:
        return f"{made} by sparse upcycling, **not tuned yet**. Model type `{report.model_type}`."
    return f"{made} by {titles}. Model type `{report.model_type}`.{depth}"


def _made_by(model: PreTrainedModel) -> tuple[tuple[Method, MethodConfig], ...]:
    """The methods and their settings; of a slice those of the model that it was cut from."""
    record = record_of(model)
    if record.slice is None:
        return record.parts
    methods = [(registry.get(row["method"]), row) for row in record.slice.configs]
    return tuple((method, method.config_class.model_validate(row)) for method, row in methods)


def _depth(report: ExportReport) -> str:
    cut = report.slice or {}
    rows = [
        ("exit", f"{cut['depth']} of {cut['of']}"),
        ("blocks", str(cut["blocks"])),
        ("exits of the parent", ", ".join(map(str, cut["exits"]))),
        ("hash of the parent", f"`{cut['parent']}`"),
    ]
    text = _table(("", ""), rows)
    return text + ("\n\n" + card(report.path.name, stock=not report.needs_code) if report.is_cut else "")


def _opening(model: PreTrainedModel, report: ExportReport) -> str:
    code = ", trust_remote_code=True" if report.needs_code else ""
    text = _OPEN.format(path=report.path.name, code=code, opener=auto_class(anatomy.task_of(model)).__name__)
    if report.needs_code:
        return text + (
            "\n\nThe folder brings its model code (`modeling_*.py`), which needs torch and transformers only. Where sparsmith is "
            "installed, `import sparsmith` is enough and no code of the folder runs. A loader that does not know the model type "
            "refuses the folder; do not force another class on it, which would drop the trained parts."
        )
    return text + "\n\nA stock architecture: no remote code is needed."


def _sizes(report: ExportReport) -> list[tuple[str, str]]:
    rows = [("parameters, total", f"{report.parameters['total']:,}")]
    rows.append(("parameters, active per token", f"{report.parameters['active']:,}"))
    return [*rows, ("bytes on disk", f"{report.bytes:,}")]


def _methods(model: PreTrainedModel) -> str:
    parts = []
    for method, config in _made_by(model):
        settings = config.model_dump(mode="json")
        rows = [(f"`{key}`", f"`{json.dumps(value)}`") for key, value in settings.items() if key != "method"]
        parts.append(f"[{method.title}]({method.paper})\n\n" + _table(("setting", "value"), rows))
    return "\n\n".join(parts)


def _proofs(report: ExportReport, facts: dict[str, Any]) -> str:
    rows = []
    for stage, proof in {**(facts.get("proof") or {}), "export": report.proof}.items():
        if isinstance(proof, dict) and "check" in proof:
            value = "equal bit for bit" if proof.get("bitwise") else _shown(proof.get("value"))
            rows.append((stage, str(proof["check"]), value, "passed" if proof.get("passed") else "FAILED"))
    if report.proof is None:
        rows.append(("export", "reload in a clean process", report.proof_skipped or "not asked for", "not run"))
    return _table(("stage", "check", "measured", "result"), rows)


def _removed(report: ExportReport) -> str:
    account = report.accounting or {}
    kinds = {kind: count for kind, count in account["deletable"]["kinds"].items() if count}
    rows = [(f"deleted: `{kind}`", f"{count:,}") for kind, count in kinds.items()]
    text = f"Form `{report.form}`.\n\n" + _table(("", ""), [*accounting_rows(account), *rows])
    return "\n\n".join([text, *report.cautions])


def _merge(settle: dict[str, Any]) -> str:
    errors = [row["relative_error"] for row in settle["merged"]]
    rows = [("matrices merged", str(len(errors)))]
    if errors:
        rows.append(("largest relative rounding error of a matrix", _shown(max(errors))))
    for key, label in (("merge", "merged against unmerged"), ("dequantise", "dequantised against NF4 kernels")):
        if settle[key]:
            rows.append((f"{label}: largest logit difference", _shown(settle[key]["max_logit_difference"])))
            rows.append((f"{label}: mean KL, nats per token", _shown(settle[key]["mean_kl"])))
    return _table(("", ""), rows)


def _data(counts: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A line per source; families and licences as the recipe names them."""
    rows = [
        (
            name,
            use,
            str(record["domain"]),
            f"{record['kept']:,}",
            *(str(record.get(key, "-")) for key in ("family", "licence")),
        )
        for use, sources in counts.items()
        for name, record in sources.items()
    ]
    return _table(("source", "use", "domain", "rows", "family", "licence"), rows)


def _flat(data: Any, path: str = "") -> list[tuple[str, str]]:
    if not isinstance(data, dict):
        return [(path, _shown(data))]
    return [row for key, value in data.items() for row in _flat(value, f"{path}.{key}" if path else str(key))]


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
