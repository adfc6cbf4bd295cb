"""Public files of many formats, where they are at hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsmith.data import load_data, read_rows
from sparsmith.recipe.schema import DataSettings, TrainSource

SHARED = Path(__file__).parents[4] / "shared"
DATA = SHARED / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="no ../shared/data beside the repository")

FILES = {
    "gsm8k": ("math/gsm8k_test.jsonl.gz", {"prompt": "question", "completion": "answer"}, 1319, "prompt_completion"),
    "nl2bash": ("code/nl2bash.jsonl.gz", {"prompt": "nl", "completion": "cmd"}, 12607, "prompt_completion"),
    "cot": (
        "general/flan_cot_qasc_train.tsv.gz",
        {"prompt": "0", "completion": "{2} So {1}."},
        1084,
        "prompt_completion",
    ),
    "p3": ("general/p3_train.jsonl.gz", {}, 15884, "prompt_completion"),
    "mbpp": ("code/mbpp.jsonl", {"prompt": "{text}\n{test_list[0]}", "completion": "code"}, 974, "prompt_completion"),
    "gpteacher": ("general/gpteacher_roleplay-instruct.json.gz", {}, 1923, "alpaca"),
    "adapters": ("eval/winogrande_test.jsonl.gz", {}, 1267, "alpaca"),
    "seeds": (
        "general/self_instruct_seed_tasks.jsonl",
        {"prompt": "{instruction}\n{instances[0].input}", "completion": "{instances[0].output}"},
        175,
        "prompt_completion",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_public_file_is_read(name):
    path, columns, count, form = FILES[name]
    found = read_rows(TrainSource(name=name, domain="d", path=path, columns=columns), "skip", DATA)
    assert (found.read, found.form) == (count, form)
    assert len(found.rows) + len(found.rejects) == count and len(found.rejects) <= 0.01 * count
    if name == "cot":
        assert "\n" in found.rows[0].messages[0]["content"] and "\\n" not in found.rows[0].messages[0]["content"]


@pytest.mark.parametrize("folder", ["stories3m", "stories260k"])
def test_real_tokenizers_give_one_bos_and_a_prompt_that_is_a_prefix(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    if not (SHARED / "models" / folder).is_dir():
        pytest.skip("no tokenizer beside the repository")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "models" / folder)
    made = TrainSource(
        name="g",
        domain="math",
        path="math/gsm8k_test.jsonl.gz",
        columns={"prompt": "question", "completion": "answer"},
        limit=40,
    )
    data = load_data(DataSettings(train=(made,), cache=str(tmp_path)), tokenizer, seed=1, base_dir=DATA, rows_needed=40)
    for index in range(40):
        ids, labels = data.train[index]["input_ids"], data.train[index]["labels"]
        assert (
            (ids == tokenizer.bos_token_id).sum() == 1
            and ids[0] == tokenizer.bos_token_id
            and labels[-1] == tokenizer.eos_token_id
        )
        start = int((labels >= 0).nonzero()[0])
        prompt, answer = tokenizer.decode(ids[1:start]).lstrip(), tokenizer.decode(ids[start:-1])
        assert prompt.startswith("### Human:\n") and prompt.endswith("\n### Assistant:\n") and answer.strip()
        assert tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids[1:start].tolist()
