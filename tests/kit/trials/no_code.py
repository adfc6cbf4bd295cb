"""Promise 16: nothing that is read can run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import sparsmith as sm
from sparsmith import durable
from sparsmith.data import read_rows
from sparsmith.errors import SparsmithError
from sparsmith.exporting import verify
from sparsmith.exporting.foreign import read_weights
from sparsmith.methods import registry
from sparsmith.recipe import load_recipe
from sparsmith.recipe.schema import TrainSource
from sparsmith.training.state import read_state
from tests.kit.checkpoints import DELTA, IDENTITY, edit_json, files_of, make_home
from tests.kit.recipes import GOOD
from tests.kit.refusals import unlike_refusal
from tests.kit.tally import Tally
from tests.kit.trials.damage import run_checkpoints
from tests.kit.trials.strict_loading import open_base

SOURCE = Path(sm.__file__).parent
# attribute calls that read a pickle or run text; yaml.load, torch.load without weights_only=True and the like are caught apart
FORBIDDEN = {
    "pickle": {"load", "loads", "Unpickler"},
    "marshal": {"load", "loads"},
    "yaml": {"load", "unsafe_load", "full_load"},
    "joblib": {"load"},
    "dill": {"load", "loads"},
    "shelve": {"open"},
    "os": {"system", "popen"},
}
SLOTS = (
    *(f"delta/{name}" for name in (DELTA, IDENTITY, "adapter_model.safetensors", "adapter_config.json", "manifest.json")),
    *(f"full/{name}" for name in ("model.safetensors", "config.json", "generation_config.json", IDENTITY, "manifest.json")),
    *(f"export/{name}" for name in ("model.safetensors", "tokenizer_config.json", "config.json")),
    *(f"base/{name}" for name in ("model.safetensors", "config.json", "pytorch_model.bin", "model.safetensors.index.json")),
)  # fmt: skip
DATA_SLOTS = ("r.pt", "r.pkl", "r.npy", "r.jsonl", "r.json", "r.csv", "r.parquet", "r.jsonl.gz")
CLASS_NAMES = ("os.system", "builtins.eval", "../pesc", "sparsmith.methods.pesc.config:PescConfig")
TAGS = (
    "!!python/object/apply:os.system [touch {mark}]",
    "!!python/object/new:os.system [touch {mark}]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:subprocess.check_output [[touch, {mark}]]",
    '!!python/tuple [!!python/object/apply:builtins.exec ["import os; os.system(touch {mark})"]]',
    "!custom {{run: touch {mark}}}",
)


TRAINER_PICKLES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "scaler.pt",
    "pytorch_model.bin",
)


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.mark}",))


def calls_that_run(tree: ast.AST) -> list[str]:
    """Calls in a source that could run what a file says."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        options = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id in ("eval", "exec", "__import__"):
            found.append(node.func.id)
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            home, name = node.func.value.id, node.func.attr
            if name in FORBIDDEN.get(home, ()):
                found.append(f"{home}.{name}")
            if (home, name) == ("torch", "load") and options.get("weights_only") is not True:
                found.append("torch.load without weights_only=True")
        for option, value in (
            ("weights_only", False),
            ("shell", True),
            ("allow_pickle", True),
            ("trust_remote_code", True),
        ):
            if options.get(option) is value:
                found.append(f"{option}={value} as a constant")
    return found


def source_calls() -> Tally:
    """No file of the package holds such a call."""
    tally = Tally()
    for file in sorted(SOURCE.rglob("*.py")):
        found = calls_that_run(ast.parse(file.read_text(encoding="utf-8")))
        tally.case(not found, f"{file.relative_to(SOURCE)}: {', '.join(found)}")
    return tally


def bombs(home: Path, work: Path, slots: Sequence[str] = SLOTS) -> Tally:
    """A pickle in the place of a file: refused by every way to open the folder, and never run."""
    tally, mark = Tally(), work / "ran"
    for slot in slots:
        copy = _fresh(home, work)
        bomb = copy / slot
        kind = slot.split("/")[0]
        if bomb.name in ("pytorch_model.bin", "model.safetensors.index.json"):  # read where the one file is not there
            (bomb.parent / "model.safetensors").unlink()
        bomb.write_bytes(pickle.dumps(Bomb(mark)))
        if bomb.name != durable.MANIFEST and kind != "base":
            durable.seal(bomb.parent)
        ways = {"delta": [partial(sm.load, base=copy / "base"), verify], "base": [open_base, _read_foreign]}
        faults = [unlike_refusal(partial(way, copy / kind)) for way in ways.get(kind, [sm.load, verify])]
        if bomb.name == "tokenizer_config.json":  # no part of the model: found by verify alone
            faults = faults[1:]
        if bomb.name == "config.json" and kind == "base":  # somebody else's weights are read without a config
            faults = faults[:1]
        _judge(tally, mark, f"a pickle as {slot}", faults)
    return tally


def data_bombs(work: Path) -> Tally:
    """A pickle as a file of rows."""
    tally, mark = Tally(), work / "ran"
    for name in DATA_SLOTS:
        (work / name).write_bytes(pickle.dumps(Bomb(mark)))
        source = TrainSource(name="rows", domain="d", path=name)
        _judge(
            tally,
            mark,
            f"a pickle as {name}",
            [unlike_refusal(partial(read_rows, source, "stop", work), names=(name,))],
        )
    return tally


def run_bombs(work: Path) -> Tally:
    """A pickle in every file of a run's checkpoint, sealed again, and under the names that the plain Trainer would open: never run."""
    tally, mark = Tally(), work / "ran"
    newest = run_checkpoints(work / "run")[0].folder
    for name in [str(file.relative_to(newest)) for file in files_of(newest)] + list(TRAINER_PICKLES):
        copy = work / "checkpoint-4"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(newest, copy)
        (copy / name).write_bytes(pickle.dumps(Bomb(mark)))
        if name in TRAINER_PICKLES:  # a file too many is refused before a seal; sealed, it is never opened
            _judge(tally, mark, f"a pickle as {name}", [unlike_refusal(partial(verify, copy), names=(name,))])
        if not name.endswith(durable.MANIFEST):
            durable.seal(copy / "model")
            durable.seal(copy)
        with suppress(SparsmithError):
            read_state(copy)
        with suppress(SparsmithError):
            sm.load(copy / "model")
        faults = [] if name in TRAINER_PICKLES else [unlike_refusal(partial(_open_all, copy))]
        _judge(tally, mark, f"a sealed pickle as {name}", faults)
    return tally


def configs(home: Path, work: Path) -> Tally:
    """Code beside the weights, kernels to be fetched, classes by a dotted name: in a base and in our own folders."""
    tally, mark = Tally(), work / "ran"
    code = f"import pathlib; pathlib.Path({str(mark)!r}).touch()\n"
    for model_type in ("llama", "somebody_elses"):
        copy = _fresh(home, work)
        (copy / "base" / "mine.py").write_text(code)
        auto_map = {
            "AutoConfig": "mine.Config",
            "AutoModelForCausalLM": "mine.Model",
            "AutoTokenizer": "mine.Tokenizer",
        }
        _change_config(copy / "base", model_type=model_type, auto_map=auto_map)
        with suppress(SparsmithError):  # a stock class is opened as such, an unknown one refused; neither runs mine.py
            open_base(copy / "base")
        with suppress(SparsmithError):
            sm.load(copy / "delta", base=copy / "base")
        _judge(tally, mark, f"auto_map of a base of the type {model_type}", [])
    for key in (
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "experts_implementation",
    ):
        for kind, way in (("base", open_base), ("full", sm.load)):
            copy = _fresh(home, work)
            _change_config(copy / kind, **{key: "owner/kernel"})
            _judge(
                tally, mark, f"{key} of a {kind}", [unlike_refusal(partial(way, copy / kind), names=("owner/kernel",))]
            )
    for name in CLASS_NAMES:
        copy = _fresh(home, work)
        edit_json(copy / "full" / IDENTITY, lambda data, name=name: data["configs"][0].update(method=name))
        _judge(
            tally,
            mark,
            f"the method {name}",
            [unlike_refusal(partial(way, copy / "full")) for way in (sm.load, verify)],
        )
    copy = _fresh(home, work)
    module = copy / "full" / "modeling_sparsmith_pesc.py"
    module.write_text(code + module.read_text())
    durable.seal(copy / "full")
    sm.load(copy / "full")  # with our own class, not with the file beside the weights
    _judge(tally, mark, "changed model code of a full checkpoint", [])
    return tally


def yaml_tags(work: Path) -> Tally:
    """Tags that would make an object, at three places of a recipe."""
    tally, mark = Tally(), work / "ran"
    for tag in TAGS:
        for old, key in (
            ("output: runs/test", "output"),
            ("seed: 7", "train.seed"),
            ("model: {path: embedded}", "model"),
        ):
            text = GOOD.replace("train:\n  steps", "train:\n  seed: 7\n  steps")
            file = work / "recipe.yaml"
            file.write_text(text.replace(old, f"{old.split(':')[0]}: {tag.format(mark=mark)}"))
            load: Callable[[], Any] = partial(load_recipe, file, (), registry.config_classes(), False)
            _judge(tally, mark, f"{tag} as {key}", [unlike_refusal(load, names=("recipe.yaml:",))])
    return tally


def run(folder: Path) -> Tally:
    """All of it."""
    home = make_home(folder / "home")
    tally = bombs(home, folder)
    for other in (run_bombs(folder), data_bombs(folder), configs(home, folder), yaml_tags(folder), source_calls()):
        tally.add(other)
    return tally


def _fresh(home: Path, work: Path) -> Path:
    copy = work / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(home, copy)
    return copy


def _open_all(folder: Path) -> None:
    """What a resume opens, one after the other."""
    durable.verify_folder(folder)
    durable.read_json(folder / "trainer_state.json")
    sm.load(folder / "model")
    read_state(folder)


def _read_foreign(folder: Path) -> list[Any]:
    return list(read_weights(folder))


def _change_config(folder: Path, **changes: Any) -> None:
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **changes}))
    if durable.has_manifest(folder):
        durable.seal(folder)


def _judge(tally: Tally, mark: Path, what: str, faults: list[str]) -> None:
    """One case: nothing ran, and every way refused."""
    tally.case(not mark.exists() and not any(faults), f"{what}: {'RAN' if mark.exists() else faults}")
    mark.unlink(missing_ok=True)
