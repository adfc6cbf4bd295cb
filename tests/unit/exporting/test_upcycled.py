"""A dense folder becomes a mixture's folder tensor by tensor, and holds the bits that crafting and saving would have written."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

import sparsmith as sm
from sparsmith import durable
from sparsmith.cli import main
from sparsmith.crafting.base_model import load_base
from sparsmith.errors import (
    CheckpointError,
    CheckpointMismatch,
    EnvironmentFault,
    MethodError,
    RefusedDonor,
    UsageError,
)
from sparsmith.exporting import donor as donors
from sparsmith.exporting import streamed, upcycled, verify
from sparsmith.recipe.schema import ModelSettings
from tests.kit import forks
from tests.kit.depths import deep_model
from tests.kit.evalsets import char_tokenizer
from tests.kit.pico import pico_ids, pico_model
from tests.unit.methods.upcycle.test_exact import ROWS
from tests.unit.methods.upcycle.test_refusals import DONORS

MORE = {
    **ROWS,
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, {}, "qwen2_moe"),
    "qwen3, tied": ("qwen3", {"tie_word_embeddings": True}, {"layers": "every-2"}, "qwen3_moe"),
    "llama, noise": ("llama", {}, {"copy_noise": 0.1}, "mixtral"),
    "qwen3, noise, raw weights": ("qwen3", {}, {"copy_noise": 0.1, "moe": {"combine": "switch"}}, "qwen3_moe"),
}
PLAIN = sm.UpcycleConfig(experts=4)


def saved(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    deep_model(family, **changes).to(dtype).save_pretrained(folder)
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def scatter(folder: Path, count: int = 5) -> None:
    """Spread the tensors of a folder over shards one by one, so that no FFN lies in one file."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(held)
    place = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(names)}
    for file in set(place.values()):
        save_file({n: held[n] for n in names if place[n] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    homes = [{place[f"model.layers.{i}.mlp.{one}_proj.weight"] for one in ("gate", "up", "down")} for i in range(4)]
    assert all(len(files) > 1 for files in homes)


@pytest.mark.parametrize("name", MORE)
def test_the_files_are_those_of_crafting_and_saving(name, tmp_path):
    family, changes, settings, target = MORE[name]
    base, config = saved(tmp_path / "base", family, **changes), sm.UpcycleConfig(experts=4, **settings)
    report = sm.convert(base, tmp_path / "out", config, seed=7, proof=False)
    model = sm.craft(load_base(ModelSettings(path=str(base))), config, seed=7, proof=False)
    sm.save(model, tmp_path / "full", full=True)
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "full"))
    for file in ("config.json", "generation_config.json", "sparsmith.json"):
        found, expected = (json.loads((tmp_path / kind / file).read_text()) for kind in ("out", "full"))
        assert found == expected, file
    assert report.model_type == target and not report.needs_code
    assert report.parameters["total"] == sum(p.numel() for p in model.parameters())
    assert report.parameters["total"] > report.parameters["active"] > 0
    with torch.no_grad():
        opened = sm.load(tmp_path / "out")
        assert torch.equal(opened(pico_ids()).logits, sm.load(tmp_path / "full")(pico_ids()).logits)


@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama, every second", "qwen3", "olmo2", "llama, noise"])
def test_a_donor_in_bfloat16_stays_in_it(name, tmp_path):
    family, changes, settings, _ = MORE[name]
    base = saved(tmp_path / "base", family, torch.bfloat16, **changes)
    config = sm.UpcycleConfig(experts=4, tune="lora", **settings)  # crafting for full tuning asks for float32
    sm.convert(base, tmp_path / "out", config, proof=False)
    model = sm.craft(load_base(ModelSettings(path=str(base), dtype="auto")), config, proof=False)
    sm.save(model, tmp_path / "full", full=True)
    found = tensors_of(tmp_path / "out")
    same(found, tensors_of(tmp_path / "full"))
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    sm.convert(base, tmp_path / "wide", config, proof=False, dtype="float32")
    wide = tensors_of(tmp_path / "wide")
    assert torch.equal(wide["model.embed_tokens.weight"], found["model.embed_tokens.weight"].float())


def test_names_are_those_that_every_reader_knows(tmp_path):
    sm.convert(saved(tmp_path / "a"), tmp_path / "mixtral", PLAIN, proof=False)
    sm.convert(saved(tmp_path / "b", "qwen3"), tmp_path / "qwen", PLAIN, proof=False)
    mixtral, qwen = tensors_of(tmp_path / "mixtral"), tensors_of(tmp_path / "qwen")
    dense = tensors_of(tmp_path / "a")
    home = "model.layers.2.block_sparse_moe"
    for one, linear in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
        expected = dense[f"model.layers.2.mlp.{linear}_proj.weight"]
        assert all(torch.equal(mixtral[f"{home}.experts.{e}.{one}.weight"], expected) for e in range(4))
    assert mixtral[f"{home}.gate.weight"].shape == (4, 64)
    assert qwen["model.layers.3.mlp.gate.weight"].shape == (4, 64)
    assert "model.layers.3.mlp.experts.3.down_proj.weight" in qwen


def test_a_donor_in_five_shards(tmp_path):
    base = saved(tmp_path / "base")
    sm.convert(base, tmp_path / "one", PLAIN, proof=False)
    scatter(base)
    report = sm.convert(base, tmp_path / "many", PLAIN, proof=False, max_shard_size="200KB")
    same(tensors_of(tmp_path / "many"), tensors_of(tmp_path / "one"))
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 5 and all(file.stat().st_size < 200_000 + 8_000 for file in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * report.parameters["total"]
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "many" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    assert verify(tmp_path / "many").folders[0].tensors == len(index["weight_map"])
    with torch.no_grad():
        assert torch.equal(sm.load(tmp_path / "many")(pico_ids()).logits, sm.load(tmp_path / "one")(pico_ids()).logits)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_no_more_than_two_tensors_are_alive(noise, tmp_path, monkeypatch):
    """Of the donor and of the copies each: a model that is larger than the memory passes."""
    base = saved(tmp_path / "base")
    scatter(base)
    alive: dict[str, set[int]] = {"donor": set(), "written": set()}
    most = {"donor": 0, "written": 0}
    files: list[int] = []

    def count(kind: str, tensor: torch.Tensor) -> None:
        number = id(tensor)
        alive[kind].add(number)
        weakref.finalize(tensor, alive[kind].discard, number)
        most[kind] = max(most[kind], len(alive[kind]))

    real_read, real_write, real_open = donors.read, streamed.StreamWriter.write, donors.safe_open

    def reading(donor):
        for name, tensor in real_read(donor):
            count("donor", tensor)
            yield name, tensor
            del tensor

    def writing(self, name, tensor):
        count("written", tensor)
        real_write(self, name, tensor)

    def opening(*args):
        files.append(1)
        return real_open(*args)

    monkeypatch.setattr(upcycled, "read", reading)
    monkeypatch.setattr(streamed.StreamWriter, "write", writing)
    monkeypatch.setattr(donors, "safe_open", opening)
    gc.collect()
    sm.convert(base, tmp_path / "out", sm.UpcycleConfig(experts=8, copy_noise=noise), proof=False)
    assert len(files) == 5  # each opened once
    assert 0 < most["donor"] <= 2 and 0 < most["written"] <= 3, most


def test_a_clean_process_opens_it_and_the_card_says_what_it_is(tmp_path, capsys):
    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    char_tokenizer().save_pretrained(base)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, methods="[{method: upcycle, experts: 4, layers: every-2}]"))
    assert main(["export", str(recipe), str(tmp_path / "out"), "train.seed=9", "--max-shard-size", "300KB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    report = verify(tmp_path / "out").folders[0]
    assert f"become {report.parameters:,} in total" in lines[0] and "active per token" in lines[0]
    assert lines[1].startswith("export: ") and "proof: logits" in lines[1]
    proof = json.loads((tmp_path / "out" / "proof.json").read_text())
    assert proof["passed"] and proof["value"] <= 1e-5 and proof["class"] == "Qwen2MoeForCausalLM"
    card = (tmp_path / "out" / "README.md").read_text()
    for words in ("not tuned yet", "extension of this project", "are the dense model's", "every-2", "passed"):
        assert words in card, words
    assert str(tmp_path) not in card.split("## Recipe")[0]
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert sm.load(tmp_path / "out").sparsmith.seed == 9


def test_a_start_that_moves_on_purpose_is_told_and_not_judged(tmp_path):
    base = saved(tmp_path / "base")
    report = sm.convert(base, tmp_path / "out", sm.UpcycleConfig(experts=4, copy_noise=0.2))
    assert report.proof["value"] > 1e-3 and report.proof["limit"] is None and "copy_noise 0.2" in report.proof["check"]
    assert "logits moved by" in str(report) and "Not the donor's function" in str(report)


def test_a_conversion_that_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    real = upcycled.expert_copy
    monkeypatch.setattr(upcycled, "expert_copy", lambda *args: real(*args) * 1.01)
    with pytest.raises(sm.SparsmithError, match="logits that differ"):
        sm.convert(saved(tmp_path / "base"), tmp_path / "out", PLAIN)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_proof_that_does_not_fit_is_left_out_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(upcycled, "PROOF_BYTES", 1000)
    report = sm.convert(saved(tmp_path / "base"), tmp_path / "out", PLAIN)
    assert report.proof is None and "float32 need" in report.proof_skipped and report.proof_skipped in str(report)
    assert report.proof_skipped in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "proof.json").exists()
    assert "not asked for" in str(sm.convert(tmp_path / "base", tmp_path / "other", PLAIN, proof=False))


def test_a_tokenizer_without_a_class_of_its_own_is_written_with_one(tmp_path):
    base = saved(tmp_path / "base")
    char_tokenizer().save_pretrained(base)
    data = json.loads((base / "tokenizer_config.json").read_text())
    del data["tokenizer_class"]
    (base / "tokenizer_config.json").write_text(json.dumps(data))
    sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["tokenizer_class"]


# ---------------------------------------------------------------- nothing half-way


def _dies_at(number: int) -> None:
    """Let the process be killed at a write."""
    real, count = streamed.StreamWriter.write, iter(range(10_000))

    def write(self, name, tensor):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, name, tensor)

    streamed.StreamWriter.write = write


def test_killed_half_way_leaves_nothing(tmp_path):
    base = saved(tmp_path / "base")
    home = tmp_path / "home"
    home.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, methods="[{method: upcycle, experts: 4}]"))
    command = ["export", recipe, home / "out", "--no-proof"]
    assert forks.run(command, tmp_path / "log", _dies_at, 20) == -signal.SIGKILL
    assert not (home / "out").exists() and all(".writing-" in path.name for path in home.iterdir())
    assert forks.run(command, tmp_path / "log") == 0
    assert [path.name for path in home.iterdir()] == ["out"]
    assert verify(home / "out").folders[0].kind == "full"


def test_an_error_half_way_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    base = saved(tmp_path / "base")
    monkeypatch.setattr(upcycled, "router_weight", fail)
    with pytest.raises(KeyboardInterrupt):
        sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_too_little_space_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    base = saved(tmp_path / "base")
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1_000_000)
    with pytest.raises(EnvironmentFault, match=r"1,000,000 bytes free"):
        sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already there"):
        sm.convert(saved(tmp_path / "base"), tmp_path / "out", PLAIN, proof=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", DONORS)
def test_a_refused_donor_writes_nothing(name, tmp_path):
    family, changes, settings, match = DONORS[name]
    pico_model(family, **changes).save_pretrained(tmp_path / "base")
    with pytest.raises(RefusedDonor, match=match):
        sm.convert(tmp_path / "base", tmp_path / "out", sm.UpcycleConfig(experts=4, **settings))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_quantised_donors_and_mixtures_are_refused(tmp_path):
    base = saved(tmp_path / "base")
    sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    with pytest.raises(sm.SparsmithError, match=r"mixture of experts already"):
        sm.convert(tmp_path / "out", tmp_path / "again", PLAIN)
    edit(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(RefusedDonor, match="quantised donor"):
        sm.convert(base, tmp_path / "again", PLAIN)
    assert not (tmp_path / "again").exists()


def spoil(base: Path, kind: str) -> None:
    file = base / "model.safetensors"
    held = load_file(file)
    first = "model.layers.1.mlp.up_proj.weight"
    if kind == "missing":
        del held[first]
    elif kind == "foreign":
        held["model.layers.1.mlp.extra.weight"] = held[first].clone()
    elif kind == "reshaped":
        held[first] = held[first][:-1].contiguous()
    elif kind == "not finite":
        held[first][3, 4] = float("nan")
    elif kind == "bare names":
        held = {name.removeprefix("model."): tensor for name, tensor in held.items()}
    elif kind == "two heads":
        held["lm_head.weight"] = held["model.embed_tokens.weight"] + 1
    save_file(held, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "match"),
    [
        ("missing", r"layers\.1\.mlp\.up_proj"),
        ("foreign", "extra"),
        ("reshaped", "shape"),
        ("not finite", r"model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: found NaN"),
        ("bare names", "another layout"),
        ("two heads", "tie_word_embeddings"),
    ],
)
def test_spoilt_files_are_refused_by_name(kind, match, tmp_path):
    base = saved(tmp_path / "base", tie_word_embeddings=kind == "two heads")
    spoil(base, kind)
    with pytest.raises((CheckpointError, CheckpointMismatch), match=match):
        sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_follows_from_the_config_is_dropped_and_tied_weights_are_written_once(tmp_path):
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    sm.convert(base, tmp_path / "plain", PLAIN, proof=False)
    held = load_file(base / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(held, base / "model.safetensors", {"format": "pt"})
    sm.convert(base, tmp_path / "out", PLAIN, proof=False)
    same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "plain"))


def test_arguments_that_cannot_be_meant(tmp_path):
    base = saved(tmp_path / "base")
    with pytest.raises(MethodError, match="donor: sparse"):
        sm.convert(base, tmp_path / "out", sm.UpcycleConfig(donor="sparse"))
    with pytest.raises(MethodError, match="no conversion"):
        sm.convert(base, tmp_path / "out", sm.PescConfig(num_experts=4, adapter_dim=16))
    with pytest.raises(MethodError, match=r"expert_choice.*thresholds"):
        sm.convert(base, tmp_path / "out", sm.UpcycleConfig(experts=4, moe={"router": "expert_choice"}))
    with pytest.raises(UsageError, match="max_shard_size"):
        sm.convert(base, tmp_path / "out", PLAIN, max_shard_size="five")
    deep_model().double().save_pretrained(tmp_path / "wide")
    with pytest.raises(MethodError, match="float64"):
        sm.convert(tmp_path / "wide", tmp_path / "out", PLAIN)
    with pytest.raises(CheckpointError, match="nothing there"):
        sm.convert(tmp_path / "no" / "such" / "folder", tmp_path / "out", PLAIN)
    assert not (tmp_path / "out").exists()


def test_a_hub_id_is_fetched_with_its_revision(tmp_path, monkeypatch):
    import huggingface_hub

    base, asked = saved(tmp_path / "base"), []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        if name == "nobody/nothing":
            raise OSError("no such repository")
        return str(base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    sm.convert("somebody/dense", tmp_path / "out", PLAIN, proof=False, revision="v2")
    assert asked == [("somebody/dense", "v2")]
    assert json.loads((tmp_path / "out" / "sparsmith.json").read_text())["base"]["id"] == "somebody/dense"
    with pytest.raises(CheckpointError, match="no such repository"):
        sm.convert("nobody/nothing", tmp_path / "other", PLAIN, proof=False)


# ---------------------------------------------------------------- recipes

RECIPE = """\
model: {{path: "{base}"}}
methods: {methods}
data:
  train: [{{name: sums, domain: maths, path: sums.jsonl}}]
train: {{steps: 10, batch_size: 4, learning_rate: 1.0e-4}}
output: runs/test
"""


@pytest.mark.parametrize(
    ("methods", "words"),
    [
        ("[{method: pesc, num_experts: 4, adapter_dim: 16}]", "methods: found `pesc`"),
        ("[{method: upcycle, moe: {freeze_dense: true}}, {method: soft, exits: [2, 4]}]", "`upcycle`, `soft`"),
        ("[{method: upcycle, donor: sparse}]", "methods.0.donor: found `sparse`"),
        ("[{method: upcycle, control: dense}]", "methods.0.control: found `dense`"),
    ],
)
def test_other_recipes_are_refused_by_name(methods, words, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=saved(tmp_path / "base"), methods=methods))
    assert main(["export", str(recipe), str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_stages_and_quantised_recipes_are_refused(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    text = RECIPE.format(base=saved(tmp_path / "base"), methods="[{method: upcycle}]")
    recipe.write_text(text)
    assert main(["export", str(recipe), str(tmp_path / "out"), "model.quant=nf4"]) == 2
    assert "model.quant" in capsys.readouterr().err
    two = "stages: [{name: one, methods: [{method: soft, exits: [2, 4]}]}, {name: two, methods: [{method: upcycle}]}]"
    recipe.write_text(text.replace("methods: [{method: upcycle}]", two))
    assert main(["export", str(recipe), str(tmp_path / "out")]) == 2
    assert "2 stages (one, two)" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_recipes_number_type_is_taken_where_it_is_written(tmp_path):
    from sparsmith import app

    base = saved(tmp_path / "base", dtype=torch.bfloat16)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(base=base, methods="[{method: upcycle, experts: 2}]"))
    cases = {"donor": ([], {}, "bfloat16"), "recipe": (["model.dtype=float32"], {}, "float32")}
    cases["flag"] = (["model.dtype=float32"], {"dtype": "float16"}, "float16")
    for name, (overrides, options, expected) in cases.items():
        app.convert(recipe, tmp_path / name, overrides, proof=False, **options)
        assert json.loads((tmp_path / name / "config.json").read_text())["dtype"] == expected, name


# ---------------------------------------------------------------- the files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_writer_makes_what_the_library_reads(dtype, tmp_path):
    tensors = {"b": torch.randn(5, 3), "empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5), "a": torch.randn(2, 2)}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    coming = [streamed.Coming(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    with streamed.StreamWriter(tmp_path, coming, dtype, 1000) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish()
    same(load_file(tmp_path / "model.safetensors"), tensors)
    with safe_open(tmp_path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_how_tensors_are_spread_over_files():
    rows = [streamed.Coming(name, (count,)) for name, count in (("a", 10), ("b", 30), ("c", 5), ("d", 5), ("e", 0))]
    groups = streamed.grouped(rows, torch.float32, 80)
    assert [[one.name for one in group] for group in groups] == [["a"], ["b"], ["c", "d", "e"]]
    assert (streamed.bytes_of("5GB"), streamed.bytes_of("1.5 mb"), streamed.bytes_of(7)) == (5 * 10**9, 1_500_000, 7)
    for bad in ("", "0", "-3", "5 GiB", "GB"):
        with pytest.raises(UsageError):
            streamed.bytes_of(bad)
