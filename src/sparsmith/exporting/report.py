"""What an export says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it proved itself."""

    path: Path
    model_type: str
    needs_code: bool
    """True where plain transformers needs `trust_remote_code=True`; False for a stock architecture."""
    bytes: int
    parameters: dict[str, int]
    """`total`, and `active` per token."""
    proof: dict[str, Any] | None
    """{check, value, limit, passed, bitwise, ...}; None where it was not asked for."""
    settle: dict[str, Any] | None
    """Figures of the merge: per matrix the relative error; largest logit difference and mean KL on the probe."""
    conversion: dict[str, Any] | None = field(default=None)
    """With `dtype` or `fold_scale`: the exported model against the settled one on the probe."""

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}

    def __str__(self) -> str:
        proof = (
            "not proven"
            if self.proof is None
            else "logits equal"
            if self.proof["bitwise"]
            else "logits within rounding"
        )
        code = "trust_remote_code=True" if self.needs_code else "no remote code"
        return f"export: {self.path} ({self.bytes / 1e6:,.1f} MB, {self.model_type}, {code}); proof: {proof}"
