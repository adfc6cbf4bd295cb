import subprocess
import sys
from types import SimpleNamespace

import pytest

from sparsmith import anatomy
from sparsmith.errors import UnsupportedAnatomy

SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo", "switch_transformers")


@pytest.mark.parametrize(
    "config",
    [
        SimpleNamespace(model_type="phimoe", num_local_experts=8),
        SimpleNamespace(model_type="some_moe"),
        SimpleNamespace(model_type="deepseek_v3", n_routed_experts=256),
    ],
)
def test_mixtures_of_experts_are_refused_as_such(config):
    with pytest.raises(UnsupportedAnatomy, match=f"{config.model_type}.*mixture of experts already"):
        anatomy.of(config)


@pytest.mark.parametrize("family", anatomy.families())
def test_a_family_is_sparse_where_its_row_names_experts(family):
    assert bool(anatomy.of(SimpleNamespace(model_type=family)).experts) == (family in SPARSE)


def test_an_unknown_family_names_its_class_and_the_nearest():
    with pytest.raises(UnsupportedAnatomy, match=r"SimpleNamespace.*`lama`.*`llama`.*register"):
        anatomy.of(SimpleNamespace(model_type="lama"))


def test_a_row_of_ones_own():
    row = anatomy.Anatomy(model_types=("mine",), blocks="core.stack", ffn="feed")
    config = SimpleNamespace(model_type="mine")
    try:
        assert anatomy.register(row) is anatomy.of(config)
        assert "mine" in anatomy.families()
    finally:
        anatomy.unregister(row)
    with pytest.raises(UnsupportedAnatomy):
        anatomy.of(config)


def test_a_crafted_config_has_its_base_s_row():
    inner = SimpleNamespace(model_type="gpt2")
    assert anatomy.of(SimpleNamespace(model_type="sparsmith_pesc", base_config=inner)).head == "lm_head"


def test_importing_it_imports_no_torch():
    code = "import sys, sparsmith.anatomy; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
