"""Pre-trained twins: a dense base and sparse ones of equal compute, from scratch, on the same tokens in the same order.

Paper: FLAN-MoE (arXiv 2305.14705) instruction-tunes models that were pre-trained sparse and holds them against dense ones
of equal FLOPs per token. These twins ask that question literally, at a size that a CPU trains.

| twin | architecture, all stock | an expert's width | combine weights |
|---|---|---|---|
| dense | Llama | - | - |
| top1 | Qwen2-MoE, no shared expert | the dense width | raw p of the expert taken (`norm_topk_prob` false) |
| top2 | Mixtral | half the dense width | p renormalised over the two |

Mixtral always renormalises: with one expert per token its weight would be 1 for ever and the router would learn nothing
from the language loss. Attention, norms, embedding and rotary angles are one shape in all three and begin equal, bit by bit.
So a token costs the same everywhere, up to the router (under 0.4 %).

Router losses are the layer's own (mean over layers), not the pooled form of transformers, which cannot see layers that
each collapse on another expert: balance E * sum_i f_i P_i with f over tokens (k at balance, E at collapse), coefficient
0.01, and z-loss, coefficient 0.001. Experts run through transformers' `grouped_mm` (one thread of an AMD EPYC, float32, 3,072
tokens, forward and backward of the top-2 twin: 1.0 s; `eager` 1.4 s; `batched_mm` 38 s).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import base_data
import torch
import transformers
from base_loop import Pace, Rows, build_optimisers, loop, measure, resume, save, tidy
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig

from sparsmith.embedded import base_path
from sparsmith.ops.balance import balance_loss, expert_counts, z_loss

BALANCE, Z = 0.01, 0.001  # coefficients
ROUTER_STD = 0.02
ROPE_THETA = 10000.0
SPARSE = {"top1": 1, "top2": 2}  # experts per token
FACTS = "twin.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes that the twins share; `ffn` is what one token passes through in each of them."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    ffn: int = 352
    context: int = 256
    experts: int = 8

    def faults(self, sparse: str | None) -> list[str]:
        """What cannot be built, in words; empty where all can."""
        k = SPARSE.get(sparse or "", 1)
        checks = {
            f"--hidden {self.hidden} is not a multiple of --heads {self.heads}": self.hidden % self.heads,
            f"--heads {self.heads} is not a multiple of --kv-heads {self.kv_heads}": self.heads % self.kv_heads,
            f"an expert's width, --ffn {self.ffn} / {k}, is not a multiple of 4 (rows of 16 bytes for grouped products)": sparse
            and self.ffn % (4 * k),
            f"{sparse} needs at least {k + 1} --experts, found {self.experts}": sparse and self.experts <= k,
        }
        return [fault for fault, wrong in checks.items() if wrong]


def build_config(shape: Shape, sparse: str | None, tokenizer) -> PreTrainedConfig:
    """The stock configuration of one twin."""
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "max_position_embeddings": shape.context,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if sparse is None:
        return LlamaConfig(**shared, intermediate_size=shape.ffn)
    k = SPARSE[sparse]
    shared |= {"num_experts_per_tok": k, "router_aux_loss_coef": BALANCE, "output_router_logits": False}
    if sparse == "top2":
        return MixtralConfig(**shared, intermediate_size=shape.ffn // k, num_local_experts=shape.experts)
    return Qwen2MoeConfig(
        **shared,
        intermediate_size=shape.ffn,
        moe_intermediate_size=shape.ffn // k,
        shared_expert_intermediate_size=0,
        num_experts=shape.experts,
        norm_topk_prob=False,
        qkv_bias=False,
    )


def build_model(shape: Shape, sparse: str | None, tokenizer, seed: int) -> PreTrainedModel:
    """An untrained twin. Whatever has the dense twin's name and shape has its first weights too."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(build_config(shape, None, tokenizer), dtype=torch.float32)
    if sparse is None:
        return model
    common = model.state_dict()
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # the shared expert that is not there has weights without elements
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        model = transformers.AutoModelForCausalLM.from_config(
            build_config(shape, sparse, tokenizer), dtype=torch.float32, experts_implementation="grouped_mm"
        )
    own = model.state_dict()
    common = {name: value for name, value in common.items() if name in own and own[name].shape == value.shape}
    model.load_state_dict(common, strict=False)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=ROUTER_STD)
        if hasattr(layer.mlp, "shared_expert_gate"):  # in the file, in no use: it gates an expert of width 0
            torch.nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
            layer.mlp.shared_expert_gate.weight.requires_grad_(False)
    return model


class Routers:
    """Watches every router of a stock sparse model, by hooks: what it decided, its losses, and how its experts were used."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._gates = [layer.mlp.gate for layer in model.model.layers]
        self._place = {gate: layer for layer, gate in enumerate(self._gates)}
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (T, E) logits, (T, K) experts
        self.counts = torch.zeros(len(self._gates), self._gates[0].weight.shape[0])  # (layers, E) slots
        for gate in self._gates:
            gate.register_forward_hook(self._keep)

    def _keep(self, gate, inputs, decided) -> None:
        logits, _, indices = decided
        layer = self._place[gate]
        self.counts[layer] += expert_counts(indices, logits.shape[-1])
        if torch.is_grad_enabled():
            self._held[layer] = (logits.float(), indices)

    def penalty(self) -> tuple[Tensor, dict[str, float]]:
        """0.01 * balance + 0.001 * z of the last forward, with gradient; each unweighted. Both are means over the layers."""
        assert len(self._held) == len(self._gates), "a forward with gradient must come first"
        balance = torch.stack([balance_loss(z, i, norm="tokens") for z, i in self._held.values()]).mean()
        z = torch.stack([z_loss(z) for z, _ in self._held.values()]).mean()
        self._held = {}
        return BALANCE * balance + Z * z, {"balance": round(balance.item(), 4), "z": round(z.item(), 4)}

    def shares(self) -> list[list[float]]:
        """(layers, E): each expert's share of its layer's slots since the last call."""
        shares = self.counts / self.counts.sum(dim=-1, keepdim=True).clamp(min=1)
        self.counts.zero_()
        return [[round(share, 4) for share in row] for row in shares.tolist()]

    def load(self) -> dict[str, float]:
        """Since the last call: the busiest expert's share over the even share, worst layer, and how many experts got nothing."""
        shares = self.shares()
        return {
            "busiest": round(max(map(max, shares)) * len(shares[0]), 3),
            "unused": sum(share == 0 for row in shares for share in row),
        }


def flops_per_token(shape: Shape, sparse: str | None, vocabulary: int) -> dict[str, int]:
    """Forward FLOPs of one token by part, two per multiply-add; training takes three times as many.

    Attention scores are those of a full row of `context` tokens, without a discount for the causal mask. Norms, rotary
    angles, activations and softmaxes are not counted.
    """
    d, head = shape.hidden, shape.hidden // shape.heads
    k = SPARSE[sparse] if sparse else 1
    gates = shape.experts + (sparse == "top1") if sparse else 0  # Qwen2-MoE asks its absent shared expert's gate too
    parts = {
        "attention": shape.layers * 2 * d * head * (2 * shape.heads + 2 * shape.kv_heads),
        "scores": shape.layers * 4 * shape.heads * head * shape.context,
        "ffn": shape.layers * k * 6 * d * (shape.ffn // k),
        "router": shape.layers * 2 * d * gates,
        "head": 2 * d * vocabulary,
    }
    return parts | {"total": sum(parts.values())}


def parameters(model: PreTrainedModel, sparse: str | None) -> dict[str, int]:
    """Total, trained, and active: what one token meets, the experts it does not take left out."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if sparse is None:
        return {"total": total, "trained": trained, "active": total}
    experts = sum(p.numel() for layer in model.model.layers for p in layer.mlp.experts.parameters())
    idle = experts * (model.config.num_experts - SPARSE[sparse]) // model.config.num_experts
    return {"total": total, "trained": trained, "active": trained - idle}


def save_model(folder: Path, model: PreTrainedModel, tokenizer, context: int) -> None:
    """A plain model folder, float32, in `folder`; written aside first, so that a full disk leaves no half of it."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.model_max_length = context
    tokenizer.save_pretrained(temporary)
    settings = temporary / "config.json"
    told = json.loads(settings.read_text())
    told["rope_theta"] = ROPE_THETA  # older readers look here, and Mixtral's default is another
    settings.write_text(json.dumps(told, indent=2) + "\n")
    tidy(temporary)
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()


def train_twin(arguments: argparse.Namespace) -> None:
    """Train one twin, or go on with it, and write its folder and its facts."""
    shape = Shape(**{field: getattr(arguments, field) for field in Shape.__dataclass_fields__})
    if faults := shape.faults(arguments.sparse):
        raise SystemExit("; ".join(faults))
    if (arguments.out / FACTS).exists():
        raise SystemExit(f"{arguments.out / FACTS}: this twin is finished; choose another --out")
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents, held_out = base_data.load(arguments.data)
    clean = {domain: base_data.unseen(documents[domain], held_out[domain]) for domain in held_out}
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_path())
    rows = Rows(documents, tokenizer, arguments.seed, shape.context)
    model = build_model(shape, arguments.sparse, tokenizer, arguments.seed)
    optimisers = build_optimisers(model, arguments.lr)
    sizes = {name: size for name, size in asdict(shape).items() if arguments.sparse or name != "experts"}
    asked = {"twin": arguments.sparse or "dense", "shape": sizes, "seed": arguments.seed, "lr": arguments.lr}
    asked |= {"steps": arguments.steps, "rows_per_step": arguments.rows_per_domain * len(documents)}
    fresh = {"step": 0, "seconds": 0.0, "tokens": 0, "stream_sha256": "", "curve": [], "asked": asked}
    state = resume(arguments.out, model, optimisers) or fresh
    if state["asked"] != asked:
        raise SystemExit(f"{arguments.out} holds a checkpoint of other settings: {state['asked']}, asked for {asked}")
    facts = {
        **asked,
        "architecture": type(model).__name__,
        "parameters": parameters(model, arguments.sparse),
        "flops_per_token_forward": flops_per_token(shape, arguments.sparse, len(tokenizer)),
        "tokens_available": rows.counts(),
    }
    print(json.dumps(facts | {"from_step": state["step"]}), flush=True)
    routers = Routers(model) if arguments.sparse else None
    probe = {domain: texts[:: max(1, len(texts) // 20)] for domain, texts in clean.items()}

    def tell(line: dict) -> None:
        state["curve"].append(line)
        print(json.dumps(line), flush=True)

    def held_out_now() -> dict[str, float]:
        measured = measure(model, tokenizer, probe, shape.context)
        if routers:
            routers.shares()  # what was counted on the way is not training
        return measured

    pace = Pace(steps=arguments.steps, minutes=0.0)
    loop(arguments, model, optimisers, pace, rows, state, held_out_now, routers=routers, tell=tell)
    save(arguments.out, model, optimisers, state)
    finish(arguments, model, tokenizer, clean, routers, facts, state)


def finish(arguments, model, tokenizer, clean: dict[str, list[str]], routers, facts: dict, state: dict) -> None:
    """Measure, write the folder, then the facts, then drop the checkpoint: facts are there only where all else is."""
    if routers:
        routers.shares()
    measured = measure(model, tokenizer, clean, arguments.context)
    facts |= {
        "tokens": state["tokens"],
        "seconds": round(state["seconds"], 1),
        "stream_sha256": state["stream_sha256"],
        "stream_sha256_is": "a chain over the batches: sha256 of the digest before, in hex, and the ids as little-endian int64",
        "held_out_bits_per_char": measured,
        "held_out_documents": {domain: len(texts) for domain, texts in clean.items()},
    }
    if routers:
        facts |= {"router_losses": {"balance": BALANCE, "z": Z}, "held_out_expert_shares": routers.shares()}
    facts |= {
        "optimisers": "Muon for the blocks' matrices (each expert's gate, up and down alone), AdamW for embedding, norms, routers",
        "machine": f"{os.cpu_count()}-core {platform.machine()} CPU, {arguments.threads} thread(s), float32",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "curve": state["curve"],
    }
    save_model(arguments.out, model, tokenizer, arguments.context)
    temporary = arguments.out / (FACTS + ".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(arguments.out / FACTS)
    (arguments.out / "checkpoint.pt").unlink()
    print(json.dumps({"twin": facts["twin"], "held_out_bits_per_char": measured, "stream": state["stream_sha256"]}))


def add_verb(verbs, data: Path) -> None:
    """The verb `twin` of the training script."""
    twin = verbs.add_parser("twin", help="train one of the pre-trained twins, or resume it, in --out")
    twin.add_argument("--data", type=Path, default=data)
    twin.add_argument("--out", type=Path, required=True, help="folder of the finished model; its checkpoint on the way")
    twin.add_argument("--sparse", choices=sorted(SPARSE), help="a sparse twin; without it, the dense one")
    twin.add_argument("--steps", type=int, required=True, help="number of steps, the same for all twins")
    twin.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    twin.add_argument("--rows-per-domain", type=int, default=4, help="rows of --context tokens per step and domain")
    twin.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the rows")
    twin.add_argument("--threads", type=int, default=1)
    twin.add_argument("--save-minutes", type=float, default=5.0)
    for name, field in Shape.__dataclass_fields__.items():
        twin.add_argument(f"--{name.replace('_', '-')}", type=int, default=field.default)
    twin.set_defaults(run=train_twin, compile=False)
