"""What is asked of a refusal: a fault of ours, in one line each, that names the culprit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparsmith.errors import RecipeErrors, SparsmithError


def unlike_refusal(
    call: Callable[[], Any], kind: type[SparsmithError] = SparsmithError, names: tuple[str, ...] = ()
) -> str:
    """What is wrong with the refusal of `call`; empty where it was refused as it should be.

    Args:
        kind: of the fault. names: texts of which the message must hold each.
    """
    try:
        call()
    except kind as fault:
        lacking = [name for name in names if name not in str(fault)]
        if lacking:
            return f"refused without naming {lacking[0]}: {fault}"
        for each in fault.faults if isinstance(fault, RecipeErrors) else [fault]:
            if not (each.found and each.expected and each.mend) or "\n" in str(each):
                return f"not one whole line: {each}"
        return ""
    except Exception as fault:
        return f"{type(fault).__name__}: {fault}"
    return "opened"
