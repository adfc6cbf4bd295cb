"""Train the small language model that ships inside the package, from scratch, on CPU.

A Llama of about two million weights with grouped-query attention, taught plain language modelling on permissively
licensed maths, code and general text in equal shares (`base_data.py`). It costs 10 to 20 million tokens: about 75
minutes on one core. Training is paced by steps (`--steps`, repeatable) or by the clock (`--minutes`, ends on time on a
shared machine); it can be stopped and resumed from its last checkpoint, and exported at any moment.

    python tools/train_base.py train  --out build/base --minutes 72
    python tools/train_base.py export --out build/base --to src/sparsmith/embedded/base
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import base_data
import numpy as np
import torch
import torch.nn.functional as F
from base_optim import Muon
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 512
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


class Rows:
    """Packed training rows, equal shares of every domain, a pure function of (seed, step): resuming needs no state."""

    def __init__(self, documents: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self.seed = seed
        self.encoded = {}
        for domain, texts in documents.items():
            ids = tokenizer(texts)["input_ids"]
            self.encoded[domain] = [np.array([*row, tokenizer.eos_token_id], dtype=np.int16) for row in ids]
        self.streams: dict[str, tuple[int, np.ndarray]] = {}

    def counts(self) -> dict[str, int]:
        return {domain: sum(map(len, rows)) for domain, rows in self.encoded.items()}

    def _row(self, domain: str, number: int) -> np.ndarray:
        documents = self.encoded[domain]
        per_epoch = sum(map(len, documents)) // CONTEXT
        epoch, place = divmod(number, per_epoch)
        if self.streams.get(domain, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, base_data.DOMAINS.index(domain), epoch]).permutation(
                len(documents)
            )
            self.streams[domain] = (epoch, np.concatenate([documents[i] for i in order]))
        return self.streams[domain][1][place * CONTEXT : (place + 1) * CONTEXT]

    def batch(self, step: int, per_domain: int) -> torch.Tensor:
        """(3 * per_domain, CONTEXT) token ids."""
        rows = [self._row(d, step * per_domain + i) for d in self.encoded for i in range(per_domain)]
        return torch.from_numpy(np.stack(rows)).long()


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How far training has come, in [0, 1], by steps where they are given, else by minutes spent."""

    steps: int | None
    minutes: float

    def progress(self, step: int, seconds: float) -> float:
        return min(1.0, step / self.steps if self.steps else seconds / (60 * self.minutes))

    def rate(self, step: int, seconds: float, warmup_steps: int = 60) -> float:
        """Factor on the peak learning rate: linear warm-up, then linear decay to zero."""
        return min((step + 1) / warmup_steps, 1.0) * max(0.0, 1.0 - self.progress(step, seconds))


def build_optimisers(model: LlamaForCausalLM, lr: float, adamw_only: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    embedding = [model.model.embed_tokens.weight]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": embedding, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    if adamw_only:
        groups.append({"params": blocks, "weight_decay": 0.1})
        return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]
    return [Muon(blocks, lr=lr, weight_decay=0.1), torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))]


def bits_per_char(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> float:
    """Bits to write the texts and their ends, per character; a long text is cut into windows with no shared context."""
    bits = 0.0
    with torch.inference_mode():
        for text in texts:
            ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            for start in range(0, len(ids), CONTEXT - 1):
                window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + CONTEXT - 1]]])
                logits = model(input_ids=window[:, :-1], use_cache=False).logits[0]
                bits += F.cross_entropy(logits, window[0, 1:], reduction="sum").item() / math.log(2)
    return bits / sum(map(len, texts))


def save(folder: Path, model: LlamaForCausalLM, optimisers: list, state: dict) -> None:
    """Checkpoint, whole or not at all."""
    temporary = folder / "checkpoint.tmp"
    payload = {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "state": state}
    torch.save(payload, temporary)
    temporary.replace(folder / "checkpoint.pt")


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
    if (out / "checkpoint.pt").exists():
        payload = torch.load(out / "checkpoint.pt")
        model.load_state_dict(payload["model"])
        for optimiser, saved in zip(optimisers, payload["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        state = payload["state"]
    print(json.dumps({"weights": model.num_parameters(), **state}), flush=True)
    loop(arguments, model, optimisers, pace, rows, state, lambda: measure(model, tokenizer, probe))
    save(out, model, optimisers, state)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, probe: dict[str, list[str]]) -> dict:
    return {domain: round(bits_per_char(model, tokenizer, texts), 4) for domain, texts in probe.items()}


def loop(arguments, model, optimisers, pace, rows, state, held_out_now) -> None:
    """Steps until the pace is done; logs, measures and saves on the way."""
    forward = torch.compile(model) if arguments.compile else model
    began = time.monotonic() - state["seconds"]
    saved = time.monotonic()
    running = 0.0
    while pace.progress(state["step"], state["seconds"]) < 1.0:
        factor = pace.rate(state["step"], state["seconds"])
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = arguments.lr * factor
        ids = rows.batch(state["step"], arguments.rows_per_domain)
        logits = forward(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        running = loss.item() if not running else 0.95 * running + 0.05 * loss.item()
        state["step"] += 1
        state["tokens"] += ids.numel()
        state["seconds"] = time.monotonic() - began
        if state["step"] % 20 == 0:
            line = {k: state[k] for k in ("step", "tokens")} | {"seconds": round(state["seconds"])}
            print(json.dumps(line | {"loss": round(running, 4), "lr": round(arguments.lr * factor, 6)}), flush=True)
        if time.monotonic() - saved > 60 * arguments.save_minutes:
            save(arguments.out, model, optimisers, state)
            print(json.dumps({"step": state["step"], "held_out_bits_per_char": held_out_now()}), flush=True)
            saved = time.monotonic()


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
    settings = arguments.to / "tokenizer_config.json"
    kept = {k: v for k, v in json.loads(settings.read_text()).items() if k not in ("is_local", "local_files_only")}
    kept["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that older readers know as well
    settings.write_text(json.dumps(kept, indent=2) + "\n")
    for file in arguments.to.iterdir():
        file.chmod(0o644)
    print(json.dumps(payload["state"]))


def main() -> None:
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
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
