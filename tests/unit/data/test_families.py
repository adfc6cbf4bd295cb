"""Which data sets a source holds, and what it has in common with what is trained on."""

from __future__ import annotations

import pytest

from sparsmith.data.families import (
    families_of,
    families_of_preset,
    family_of,
    shared_families,
    tag_of,
    training_sources,
    without_mmlu,
)
from sparsmith.data.family_table import ALIASES, BUNDLE_ALIASES, BUNDLES, SUBMIXTURES
from sparsmith.errors import UsageError
from sparsmith.recipe.schema import DataSettings, EvalSource, TrainSource


def train(name: str, **more) -> TrainSource:
    return TrainSource(**{"name": name, "domain": "d", "path": f"{name}_train.jsonl", **more})


def held(name: str, **more) -> EvalSource:
    return EvalSource(**{"name": name, "domain": "d", "path": f"{name}_test.jsonl", **more})


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("gsm8k", "gsm8k"),
        ("GSM8K_test", "gsm8k"),
        ("metamath_GSM8K_Backward", "gsm8k"),
        ("strategyqa_cot", "strategyqa"),
        ("StrategyQA", "strategyqa"),
        ("bool_q", "boolq"),
        ("BoolQ-dev", "boolq"),
        ("ARC-Challenge", "arc"),
        ("ai2_arc", "arc"),
        ("arc_easy_10templates", "arc"),
        ("WinoGrande", "winogrande"),
        ("csqa", "commonsense_qa"),
        ("csqa2_heldout", "commonsense_qa2"),
        ("flan_cot_ecqa", "commonsense_qa"),
        ("task1421_mathqa_other", "math_qa"),
        ("task685_mmmlu_answer_generation_clinical_knowledge", "mmlu"),
        ("flan_v2", "flan2022"),
        ("p3_heldout", "p3"),
        ("sums", None),
        ("cot", None),
        ("search", None),  # holds the letters of arc, not the word
    ],
)
def test_a_name_tells_its_family(name, family):
    assert family_of(name) == family


def test_the_own_tag_comes_first_and_unknown_names_lose_their_split():
    assert tag_of(train("gsm8k", family="my_sums")) == "my_sums"
    assert tag_of(train("rows", family="GSM8K")) == "gsm8k"
    assert tag_of(train("sums_train")) == tag_of(held("sums_held_out")) == "sums"
    assert tag_of(held("test")) == "test"


def test_no_name_means_two_families():
    spelt = [
        "".join(c for c in alias if c.isalnum())
        for table in (ALIASES, BUNDLE_ALIASES)
        for one in table.values()
        for alias in one
    ]
    assert len(spelt) == len(set(spelt))
    assert {family for part in SUBMIXTURES.values() for family in part} <= ALIASES.keys()
    assert {part for parts in BUNDLES.values() for part in parts} <= SUBMIXTURES.keys()


def test_the_flan_preset_flags_what_is_held_out_by_mistake():
    found = families_of_preset("flan2022")
    assert "cot" in found["gsm8k"] and "cot" in found["strategyqa"]
    assert "muffin" in found["boolq"] and "muffin" in found["arc"]
    assert {"svamp", "asdiv"} <= found.keys() and found["svamp"] == found["asdiv"] == ("niv2",)
    assert {"openbookqa", "piqa", "winogrande", "commonsense_qa", "unifiedqa_science"} <= found.keys()
    # the collection leaves the MMLU tasks of NIv2 out; these are its held-out suites
    assert not {"mmlu", "bbh", "mgsm", "tydiqa", "mbpp"} & found.keys()
    flagged = {
        name
        for name in ("gsm8k", "strategyqa", "boolq", "ARC-Easy", "mmlu", "mbpp", "sums")
        if shared_families(held(name), [], ["flan2022"])
    }
    assert flagged == {"gsm8k", "strategyqa", "boolq", "ARC-Easy"}
    with pytest.raises(UsageError, match="flan2022"):
        families_of_preset("flan2023")


def test_what_two_sources_share_is_told_with_its_reason():
    trained = [train("gsm8k_cot"), train("p3"), train("mine", path="one.jsonl")]
    assert shared_families(held("gsm8k_test"), trained) == {"family gsm8k": ["gsm8k_cot"]}
    assert shared_families(held("piqa"), trained) == {"family piqa (in p3)": ["p3"]}
    assert shared_families(held("other", path="one.jsonl"), trained) == {"same file": ["mine"]}
    assert shared_families(held("p3_heldout"), trained) == {"family p3": ["p3"]}
    assert shared_families(held("mmlu"), trained) == {}
    # a source tagged with the whole collection counts as all of it
    assert "family boolq (in flan2022)" in shared_families(held("boolq"), [train("rows", family="flan2022")])
    assert families_of(train("rows", family="cot"))["gsm8k"] == "gsm8k (in cot)"


def test_a_source_that_is_never_drawn_from_does_not_train():
    settings = DataSettings(train=(train("a", rate=0.0), train("b")))
    assert [source.name for source in training_sources(settings)] == ["b"]


def test_the_57_mmlu_tasks_of_niv2_are_dropped():
    names = [
        f"task{number:03d}_{'mmmlu_answer_generation' if number > 600 else 'quoref'}_x" for number in range(1, 1732)
    ]
    kept, dropped = without_mmlu(names)
    assert len(dropped) == 57 and len(kept) == 1731 - 57
    assert dropped[0].startswith("task664_") and dropped[-1].startswith("task737_")
    assert [name for name in names if name not in dropped] == kept
    assert (
        without_mmlu(["task663_a", "task668_b", "task684_c", "task738_d", "task6640_e", "task1664_winobias", "mmlu"])[1]
        == []
    )
    assert without_mmlu(["niv2:task0685_mmmlu", "tasks/task737_mmmlu.json"])[0] == []
    assert without_mmlu([]) == ([], [])
