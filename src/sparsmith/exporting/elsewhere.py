"""How a slice is used with other runtimes, as commands to copy: alone, or as the draft model of the full one.

A draft model there is a second model: it has embeddings, head and cache of its own. Drafting with the first blocks of the one model, and
leaving early, is what `sparsmith generate` does.
"""

from __future__ import annotations

from pathlib import Path

NO_EARLY_EXIT = (
    "vLLM and llama.cpp have no early exit: there a slice runs alone, or as the draft model of the full one (same tokenizer; weights and "
    "cache are not shared)."
)
FULL = "FULL is the folder of `sparsmith export RUN FULL`."


def commands(slice_path: str | Path, *, stock: bool) -> tuple[tuple[str, str], ...]:
    """(runtime, command) pairs for a slice beside the full model's export, `FULL`.

    Args:
        stock: the slice is of a stock architecture; other runtimes know no other.
    """
    path = Path(slice_path).as_posix()
    code = "" if stock else ", trust_remote_code=True"
    own = (
        "transformers",
        f'draft = AutoModelForCausalLM.from_pretrained("{path}"{code})\n'
        f'full = AutoModelForCausalLM.from_pretrained("FULL"{code})\n'
        "full.generate(**inputs, assistant_model=draft)",
    )
    if not stock:
        return (own,)
    config = f'{{"method": "draft_model", "model": "{path}", "num_speculative_tokens": 4}}'
    name = Path(slice_path).name
    return (
        own,
        ("vLLM, alone", f"vllm serve {path}"),
        ("vLLM, as draft", f"vllm serve FULL --speculative-config '{config}'"),
        (
            "llama.cpp",
            f"python convert_hf_to_gguf.py {path} --outfile {name}.gguf\n"
            "python convert_hf_to_gguf.py FULL --outfile full.gguf\n"
            f"llama-server -m full.gguf --model-draft {name}.gguf",
        ),
    )


def told(slice_path: str | Path, *, stock: bool) -> str:
    """The commands as text for a terminal."""
    lines = [NO_EARLY_EXIT, FULL]
    for runtime, command in commands(slice_path, stock=stock):
        lines += [f"{runtime}:", *(f"  {line}" for line in command.splitlines())]
    if not stock:
        lines.append("Other runtimes do not know this architecture; the slices of a stock one they do.")
    return "\n".join(lines)


def card(slice_path: str | Path, *, stock: bool) -> str:
    """The commands as a section of the model card."""
    parts = [f"{NO_EARLY_EXIT} {FULL}"]
    for runtime, command in commands(slice_path, stock=stock):
        kind = "python" if runtime == "transformers" else "sh"
        parts.append(f"{runtime}:\n\n```{kind}\n{command}\n```")
    return "\n\n".join(parts)
