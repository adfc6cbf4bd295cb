"""Train the small language model that ships inside the package, from scratch, on CPU.

A Llama of about two million weights with grouped-query attention, taught plain language modelling on permissively
licensed maths, code and general text in equal shares (`base_data.py`). It costs 10 to 20 million tokens: about 75
minutes on one core. Training is paced by steps (`--steps`, repeatable) or by the clock (`--minutes`, ends on time on a
shared machine); it can be stopped and resumed from its last checkpoint, and exported at any moment.

    python tools/train_base.py train  --out build/base --minutes 72
    python tools/train_base.py export --out build/base --to src/sparsmith/embedded/base

The same loop trains pre-trained twins, a dense model and sparse ones of equal compute on the same tokens; see
`base_twins.py`.

    python tools/train_base.py twin --out build/dense --steps 800
    python tools/train_base.py twin --out build/top1 --steps 800 --sparse top1 --experts 8
    python tools/train_base.py twin --out build/top2 --steps 800 --sparse top2 --experts 8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import base_data
import base_twins
import torch
from base_loop import CONTEXT, Pace, Rows, build_optimisers, loop, measure, resume, save, tidy
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Assistant:\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '### Human:\n' + message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
DEFAULT_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE that keeps digits apart, so that numbers are spelled the way arithmetic works on them."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """The shape of the base: about two million weights, five query heads on one key-value head."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=6,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.02,
    )


def train(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    documents, held_out = base_data.load(arguments.data)
    if (out / "tokenizer" / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(out / "tokenizer")
    else:
        tokenizer = build_tokenizer([text for texts in documents.values() for text in texts])
        tokenizer.save_pretrained(out / "tokenizer")
    rows = Rows(documents, tokenizer, arguments.seed)
    probe = {domain: texts[:: max(1, len(texts) // 40)] for domain, texts in held_out.items()}
    model = LlamaForCausalLM(build_config(tokenizer))
    optimisers = build_optimisers(model, arguments.lr, arguments.adamw)
    pace = Pace(steps=arguments.steps, minutes=arguments.minutes)
    state = {"step": 0, "seconds": 0.0, "tokens": 0, "tokens_available": rows.counts()}
    state = resume(out, model, optimisers) or state
    print(json.dumps({"weights": model.num_parameters(), **state}), flush=True)
    loop(arguments, model, optimisers, pace, rows, state, lambda: measure(model, tokenizer, probe))
    save(out, model, optimisers, state)


def export(arguments: argparse.Namespace) -> None:
    """Write the last checkpoint as a stock folder: bfloat16 weights, tokenizer, generation settings."""
    payload = torch.load(arguments.out / "checkpoint.pt")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.out / "tokenizer")
    model = LlamaForCausalLM(build_config(tokenizer))
    model.load_state_dict(payload["model"])
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.to(torch.bfloat16).save_pretrained(arguments.to)
    tokenizer.save_pretrained(arguments.to)
    tidy(arguments.to)
    print(json.dumps(payload["state"]))


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    training = verbs.add_parser("train", help="train, or resume, in --out")
    training.add_argument("--data", type=Path, default=DEFAULT_DATA)
    training.add_argument("--out", type=Path, required=True)
    training.add_argument("--steps", type=int, help="number of steps; without it, --minutes decides")
    training.add_argument("--minutes", type=float, default=72.0)
    training.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    training.add_argument(
        "--rows-per-domain", type=int, default=4, help=f"rows of {CONTEXT} tokens per step and domain"
    )
    training.add_argument("--threads", type=int, default=1)
    training.add_argument("--seed", type=int, default=20)
    training.add_argument("--save-minutes", type=float, default=5.0)
    training.add_argument("--compile", action="store_true", help="torch.compile the step")
    training.add_argument("--adamw", action="store_true", help="AdamW for every weight, no Muon")
    training.set_defaults(run=train)
    exporting = verbs.add_parser("export", help="write the last checkpoint as a model folder")
    exporting.add_argument("--out", type=Path, required=True)
    exporting.add_argument("--to", type=Path, required=True)
    exporting.set_defaults(run=export)
    base_twins.add_verb(verbs, DEFAULT_DATA)
    arguments = parser.parse_args(given)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
