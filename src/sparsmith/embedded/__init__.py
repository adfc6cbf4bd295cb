"""What the package brings along: a small trained base and a generator of tasks with exact answers.

With both, every verb can be tried offline, on CPU, with nothing downloaded. Nothing here imports torch.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sparsmith.errors import EnvironmentFault

__all__ = ["base_path"]


def base_path() -> Path:
    """Folder of the embedded base: a stock Llama checkpoint with its tokenizer, for `from_pretrained`.

    Raises:
        EnvironmentFault: the installed package lacks its weights, or lies in an archive and not in a folder.
    """
    folder = Path(str(resources.files(__package__))) / "base"
    if not (folder / "model.safetensors").is_file():
        raise EnvironmentFault(
            where=str(folder),
            found="no model.safetensors",
            expected="the base that ships with the package, in an unpacked installation",
            mend="Install sparsmith again with pip, or name another base with `model.path=`.",
        )
    return folder
