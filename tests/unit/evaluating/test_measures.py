from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from sparsmith.errors import DataError, ProofError
from sparsmith.evaluating import evaluate, exact_match, heldout_loss, rank_classification, sample_answers, side_by_side
from sparsmith.evaluating.batching import by_length, evaluation_mode
from sparsmith.evaluating.generation import greedy
from tests.kit.evalsets import BOS, EOS, char_tokenizer, eval_set
from tests.kit.pico import VOCAB, pico_model

TOKENIZER = char_tokenizer()


class Copier(torch.nn.Module):
    """A model that knows the next token: the table maps the last token to it. No cache of use, but one that can be asked."""

    def __init__(self, table: dict[int, int]) -> None:
        super().__init__()
        self.next_V = torch.nn.Parameter(torch.tensor([float(table.get(i, EOS)) for i in range(VOCAB)]))
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB), model_type="copier")

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False):
        logits = torch.nn.functional.one_hot(self.next_V[input_ids].long(), VOCAB) * 9.0
        return SimpleNamespace(logits=logits, past_key_values=SimpleNamespace(batch_select_indices=lambda keep: None))


def successor() -> Copier:
    """Writes the alphabet on from the prompt's last letter, and stops after `e`."""
    ids = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcde"]
    return Copier(dict(pairwise(ids)))


def test_exact_match_stops_at_eos_and_reads_the_answer():
    data = eval_set(TOKENIZER, [("a", "bcde"), ("zzz b", "cde"), ("c", "xx"), ("e", "de")], metrics=("exact_match",))
    scores, answers = exact_match(successor(), TOKENIZER, data)
    assert answers.texts == ("bcde", "cde", "de", "")
    assert scores["exact_match"].total == (1.0, 1.0, 0.0, 0.0)
    assert scores["finished"].total == (1.0,) * 4


def test_an_answer_is_cut_at_its_length():
    data = eval_set(TOKENIZER, [("a", "bcde"), ("c", "de")], metrics=("exact_match",), max_new_tokens=2)
    scores, answers = exact_match(successor(), TOKENIZER, data)
    assert answers.texts == ("bc", "de")
    assert scores["finished"].total == (0.0, 0.0)


def test_a_reference_without_an_answer_is_named():
    data = eval_set(TOKENIZER, [("a", "#### 4"), ("b", "four")], metrics=("exact_match",), extractor="after_marker")
    with pytest.raises(DataError, match=r"sums row 1 .*: found a reference without an answer"):
        exact_match(successor(), TOKENIZER, data)


def test_rows_leave_the_batch_when_they_stop():
    """Rows of unlike length with a stop token that comes at unlike times, against each alone."""
    model = pico_model(seed=3)
    prompts = [[BOS, *range(3 + i, 9 + 3 * i)] for i in range(9)]
    free = greedy(model, prompts, max_new_tokens=20, stop_ids=set())
    stops = {row[at] for row, at in zip(free, (3, 8, 15))}
    together = greedy(model, prompts, max_new_tokens=20, stop_ids=stops)
    assert {len(row) for row in together} != {20}
    for prompt, written, unstopped in zip(prompts, together, free):
        assert [written] == greedy(model, [prompt], max_new_tokens=20, stop_ids=stops)
        assert written == unstopped[: len(written)]
        assert len(written) == 20 or unstopped[len(written)] in stops


def test_a_checkpoints_generation_config_bends_nothing():
    model, prompt = pico_model(), [[BOS, 5, 6, 7]]
    plain = greedy(model, prompt, max_new_tokens=8, stop_ids=set())
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 9.0, True
    assert greedy(model, prompt, max_new_tokens=8, stop_ids=set()) == plain


def test_ties_share_the_hit(monkeypatch):
    rows = [("q", "a", ["a", "b"]), ("q", "b", ["a", "b", "c", "d"]), ("q", "c", ["a", "c"])]
    data = eval_set(TOKENIZER, rows, metrics=("rank",), options="options")
    scores = [[-1.0, -1.0], [-2.0, -2.0, -2.0, -3.0], [-1.0, -2.0]]
    monkeypatch.setattr("sparsmith.evaluating.rank.score_options", lambda *a, **k: scores)
    assert rank_classification(pico_model(), data)["rank"].total == (0.5, pytest.approx(1 / 3), 0.0)
    assert rank_classification(pico_model(), data)["rank_margin"].total == (0.0, 0.0, -1.0)


def test_length_changes_the_answer(monkeypatch):
    """Two tokens of -1 each beat one of -1.5 per token and per byte; `é` is one token here and two bytes."""
    data = eval_set(TOKENIZER, [("q", "ab", ["ab", "c"])], metrics=("rank",), options="options")
    monkeypatch.setattr("sparsmith.evaluating.rank.score_options", lambda *a, **k: [[-2.0, -1.5]])
    found = rank_classification(pico_model(), data)
    assert [found[m].total for m in ("rank", "rank_by_token", "rank_by_byte")] == [(0.0,), (1.0,), (1.0,)]


def test_a_row_without_options_is_named():
    data = eval_set(TOKENIZER, [("q", "a")])
    with pytest.raises(DataError, match=r"sums row 0.*found 0 options"):
        rank_classification(pico_model(), data)


def test_an_option_is_read_as_the_answer_would_be():
    """With the merge `=4`, the answer 4 after `=` keeps the boundary that training has, and so do the options."""
    data = eval_set(
        char_tokenizer(merges=[("=", "4")]), [("2+2=", "4", ["4", "5"])], metrics=("rank",), options="options"
    )
    row = data.rows[0]
    assert row.input_ids[:-1] == row.option_rows[0].input_ids
    assert rank_classification(pico_model(), data)["rank"].weight == (1.0,)


def test_a_loss_that_is_not_finite_names_the_row():
    model = pico_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[TOKENIZER.convert_tokens_to_ids("z")] = float("nan")
    data = eval_set(TOKENIZER, [("ab", "c"), ("az", "c")])
    with pytest.raises(ProofError, match=r"sums row 1 .*: found a held-out loss of nan"):
        heldout_loss(model, data)
    rank = eval_set(TOKENIZER, [("z", "c", ["c", "d"])], metrics=("rank",), options="options")
    with pytest.raises(ProofError, match=r"sums row 0 .*: found option scores"):
        rank_classification(model, rank)


def test_rows_without_an_answer_or_a_prompt_are_named():
    data = eval_set(TOKENIZER, [("ab", "c"), ("ab", "c")])
    data.rows[1].labels[:] = [-100] * len(data.rows[1].labels)
    with pytest.raises(DataError, match=r"sums row 1 .*: found no labelled"):
        heldout_loss(pico_model(), data)
    data.rows[0].prompt_ids.clear()
    with pytest.raises(DataError, match=r"sums row 0 .*: found a text without a prompt"):
        exact_match(pico_model(), TOKENIZER, data)
    data.rows.clear()
    with pytest.raises(DataError, match="sums: found no rows"):
        heldout_loss(pico_model(), data)


def test_modes_are_put_back_module_by_module():
    model = pico_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_hook_sees_every_token_once():
    seen = []
    data = eval_set(TOKENIZER, [("ab", "c"), ("abcdefg", "hij"), ("a", "b")], domain="code")
    heldout_loss(pico_model(), data, on_batch=seen.append, domains=["maths", "code"], batch_tokens=16)
    assert sum(int(batch.token_mask.sum()) for batch in seen) == sum(len(row.input_ids) for row in data.rows)
    for batch in seen:
        assert torch.equal(batch.domain, torch.where(batch.token_mask, 1, -1))
        assert batch.labels.shape == batch.input_ids.shape == batch.attention_mask.shape


def test_batches_hold_every_row_once_longest_first():
    lengths = [3, 9, 4, 9, 1, 100]
    batches = list(by_length(lengths, 20))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert batches[0] == [5]
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 for batch in batches[1:])


def test_evaluate_measures_what_each_set_asks_for_and_samples_pair_up():
    model = pico_model()
    sets = {
        "sums": eval_set(TOKENIZER, [("ab", "c"), ("abc", "de")], metrics=("loss", "exact_match"), max_new_tokens=4),
        "pick": eval_set(TOKENIZER, [("q", "a", ["a", "b"])], "pick", "text", metrics=("rank",), options="options"),
    }
    told = []
    result = evaluate(model, TOKENIZER, sets, progress=lambda *words: told.append(words))
    assert told == [("sums", "loss"), ("sums", "exact_match"), ("pick", "rank")]
    assert set(result.domains["maths"]) == {"loss", "exact_match", "finished"}
    assert set(result.domains["text"]) == {"rank", "rank_by_token", "rank_by_byte", "rank_margin"}
    assert result.sets["sums"]["loss"].n == 2
    assert len(result.answers["sums"]) == 2
    only = evaluate(model, None, sets, metrics=("loss",))
    assert only.rows["pick"] == {} and only.sets["sums"]["loss"] == result.sets["sums"]["loss"]
    one, two = (sample_answers(model, TOKENIZER, sets, per_set=1) for _ in range(2))
    pairs = side_by_side(one, two)
    assert [set(p) for p in pairs] == [{"domain", "set", "prompt", "reference", "base", "tuned"}] * 2


def test_no_sets_is_an_error():
    with pytest.raises(DataError, match="no evaluation sets"):
        evaluate(pico_model(), TOKENIZER, {})
