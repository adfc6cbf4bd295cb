"""The one shape of an error that a user sees: where, what was found, what was expected, how to mend it.

Every fault that input can cause is raised as a `SparsmithError`; the CLI prints it as one line (or as JSON) and exits with
the kind's `exit_code`. A bare `ValueError`/`assert` elsewhere means a fault of ours.
"""

from __future__ import annotations

from difflib import get_close_matches


class SparsmithError(Exception):
    """A fault with a place and a mend.

    Args:
        where: the place: `file:line:key`, a tensor name, a module path, a flag.
        found: what stands there.
        expected: what would be right.
        mend: what the user can do now.
    """

    exit_code = 1

    def __init__(self, where: str, found: str, expected: str, mend: str) -> None:
        self.where, self.found, self.expected, self.mend = str(where), str(found), str(expected), str(mend)
        super().__init__(f"{where}: found {found}; expected {expected}. {mend}")

    def as_dict(self) -> dict[str, str]:
        """The error as data, for `--json`."""
        return {
            "kind": type(self).__name__,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "mend": self.mend,
        }

    def __reduce__(
        self,
    ):  # worker processes send errors back pickled; the default would call __init__ with one argument
        return (type(self), (self.where, self.found, self.expected, self.mend))


class UsageError(SparsmithError):
    """A command line or an argument that cannot be meant."""

    exit_code = 2


class RecipeError(SparsmithError):
    """One fault of a recipe. Several are raised together as `RecipeErrors`."""

    exit_code = 3


class RecipeErrors(RecipeError):
    """All faults of a recipe at once: `faults` holds each."""

    def __init__(self, faults: list[RecipeError]) -> None:
        self.faults = faults
        first = faults[0]
        super().__init__(first.where, first.found, first.expected, first.mend)
        self.args = ("\n".join(str(fault) for fault in faults),)

    def as_dict(self) -> dict:
        return {"kind": type(self).__name__, "faults": [fault.as_dict() for fault in self.faults]}

    def __reduce__(self):
        return (type(self), (self.faults,))


class DataError(SparsmithError):
    """A row, a file or a data set that cannot be used as it is."""

    exit_code = 4


class UnsupportedAnatomy(SparsmithError):
    """A model whose parts are not where the method needs them, or a family that is not known."""

    exit_code = 5


class UnknownAnatomy(UnsupportedAnatomy):
    """A family without a row in sparsmith.anatomy."""


class RefusedDonor(UnsupportedAnatomy):
    """A dense model that no stock mixture of experts can hold without changing its function."""


class CrossLayerStateError(UnsupportedAnatomy):
    """Blocks that share state beyond the hidden state, so that the last ones cannot be left out."""


class MethodError(SparsmithError):
    """A method's setting that cannot have its effect on this model, or methods that cannot be combined."""

    exit_code = 6


class TiedHeadError(MethodError):
    """A head that shall train apart from the embeddings it is tied to."""


class TargetUnreachable(MethodError):
    """A size that the gates asked for cannot bring about."""


class LayoutMismatch(MethodError):
    """A form of export that the settled model does not have."""


class ScheduleTooShort(MethodError):
    """Too few steps, or too small a learning rate, for a gate to close."""


class NonCausalRouter(MethodError):
    """A router that would show a text its own future: experts that choose among all tokens, in evaluation."""


class CheckpointError(SparsmithError):
    """A checkpoint that is damaged, incomplete or not ours."""

    exit_code = 7


class CheckpointMismatch(CheckpointError):
    """A checkpoint that is whole but does not belong to this base, config or build."""


class ProofError(SparsmithError):
    """A proof failed: something that must hold does not. The run is stopped."""

    exit_code = 8


class EmptyRole(ProofError):
    """A role that the recipe asks for holds no trained tensor."""


class RoleDidNotMove(ProofError):
    """A trained role has not changed after the first steps."""


class GuardFailed(ProofError):
    """The full model lost more to its control than the guard allows. Everything was saved and reported before."""


class ExportMismatch(ProofError):
    """An exported folder that computes something else than the settled model."""


class EnvironmentFault(SparsmithError):
    """Something of the machine is missing: a package, disk space, memory, a device."""

    exit_code = 9


class Interrupted(SparsmithError):
    """A run that was asked to stop by a signal, and stopped in order.

    Args:
        signal: the signal's number; the exit code is 128 + that.
    """

    exit_code = 143

    def __init__(self, where: str, found: str, expected: str, mend: str, signal: int = 15) -> None:
        super().__init__(where, found, expected, mend)
        self.exit_code = 128 + int(signal)

    def __reduce__(self):
        return (type(self), (self.where, self.found, self.expected, self.mend, self.exit_code - 128))


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    """A hint that names the nearest known word, or all of them where none is near."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.6)
    if close:
        return f"Did you mean `{close[0]}`?"
    return "Known: " + ", ".join(known) + "."
