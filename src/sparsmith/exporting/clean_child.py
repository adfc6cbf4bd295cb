"""Runs in a process of its own that has torch and transformers and cannot import sparsmith: opens an exported folder as
a stranger would and computes the logits of a probe.

Called as `python -I clean_child.py REQUEST.json`; imports nothing of this package.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

PACKAGE = "sparsmith"


def main(request_file: str) -> None:
    request = json.loads(Path(request_file).read_text())
    sys.modules[PACKAGE] = None  # type: ignore[assignment] # from here on `import sparsmith` raises
    try:
        importlib.import_module(PACKAGE)
    except ImportError:
        pass
    else:
        raise SystemExit("the package can be imported in the clean process")

    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    torch.set_num_threads(request["threads"])
    transformers.logging.set_verbosity_error()
    folder, work = request["folder"], Path(request["work"])
    answer: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if request["needs_code"]:
        answer["refused_without_code"] = refuses(getattr(transformers, request["opener"]), folder)
    opener: Any = getattr(transformers, request["opener"])
    model, info = opener.from_pretrained(
        folder,
        dtype=request["dtype"] if request["dtype"] == "auto" else getattr(torch, request["dtype"]),
        trust_remote_code=request["needs_code"],
        attn_implementation=request["attention"],
        output_loading_info=True,
    )
    model = model.to(request["device"]).eval()
    batch = {name: tensor.to(request["device"]) for name, tensor in load_file(work / "probe.safetensors").items()}
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, work / "logits.safetensors")
    answer["class"] = type(model).__name__
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        answer[kind] = sorted(map(str, info.get(kind) or ()))
    if request["text"] is not None:
        answer["token_ids"] = AutoTokenizer.from_pretrained(folder)(request["text"])["input_ids"]
    (work / "answer.json").write_text(json.dumps(answer))


def refuses(auto_class: Any, folder: str) -> bool:
    """Whether a plain load, with no code of the folder allowed, raises."""
    try:
        auto_class.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError):
        return True
    return False


if __name__ == "__main__":
    main(sys.argv[1])
