"""Write the recipe's JSON schema and its table of keys from the settings classes. Run by `make schema`; a test holds them equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsmith.methods import registry
from sparsmith.recipe import json_schema

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = ROOT / "src/sparsmith/recipe/schema.json"
TABLE = ROOT / "docs/recipe-keys.md"


def schema_text() -> str:
    """The schema as the package ships it."""
    return json.dumps(json_schema(registry.config_classes()), indent=1, ensure_ascii=False) + "\n"


def table_text() -> str:
    """Every key with its kind, default and meaning, one table per group."""
    schema = json_schema(registry.config_classes())
    groups = {"recipe": schema, **schema["$defs"]}
    # what a recipe without stages must hold; with them it may stand at the top or in the stages
    alone: dict[str, Any] = {"recipe": schema["else"]["required"]}
    for key, told in schema["else"]["properties"].items():
        alone[schema["properties"][key]["$ref"].rsplit("/", 1)[1]] = told.get("required", [])
    head = "# Keys of a recipe\n\nWritten by `make schema` from the settings classes.\n"
    return head + "".join(_group(name, group, alone.get(name, [])) for name, group in groups.items())


def _group(name: str, group: dict[str, Any], alone: list[str]) -> str:
    """`alone`: keys that a recipe of one stage must hold."""
    about = " ".join(group.get("description", "").split())
    lines = [
        f"\n## {name}\n",
        *([f"{about}\n"] if about else []),
        "| key | kind | default | meaning |",
        "|---|---|---|---|",
    ]
    required = group.get("required", [])
    for key, field in group.get("properties", {}).items():
        default = f"`{json.dumps(field.get('default'))}`"
        if key in required or key in alone:
            default = "required" if key in required else "required (with `stages`, here or in them)"
        if name == "recipe" and key in ("methods", "stages"):
            default = "one of `methods` and `stages`"
        if name == "DataSettings" and key in ("train", "mixture"):
            default = "one of `train` and `mixture`"
        meaning = " ".join(field.get("description", "").split())
        lines.append(f"| `{key}` | {_kind(field)} | {default} | {meaning} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def _kind(field: dict[str, Any]) -> str:
    """A field's JSON schema in a word or two."""
    if "$ref" in field:
        return f"group {field['$ref'].rsplit('/', 1)[1]}"
    if "enum" in field or "const" in field:
        return " / ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    for union in ("anyOf", "oneOf"):
        if union in field:
            return " or ".join(dict.fromkeys(_kind(branch) for branch in field[union]))
    kind = {"integer": "whole number", "string": "text", "boolean": "true / false"}.get(str(field.get("type")), "")
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items') or field.get('prefixItems', [{}])[0])}"
    return kind or str(field.get("type", "anything"))


if __name__ == "__main__":
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    TABLE.write_text(table_text(), encoding="utf-8")
