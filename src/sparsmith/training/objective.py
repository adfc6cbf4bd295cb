"""The objective: a module around the crafted model whose forward takes a batch and returns the loss and its named terms.

Being the outermost module, it lets DDP, FSDP2 and checkpointing hooks see every parameter use; nothing of a library is patched.

    loss = sum over kept labels of CE / (kept labels of the whole accumulated batch) + sum over terms of weight * value * share

Of a classifier a row has one label, its class, and the kept labels are its rows; all else is the same. Of an encoder-decoder the labels
are the answer, and what the decoder is fed is shifted, not they.

`share` is this micro-batch's part of the kept labels, so that terms that are means over a micro-batch (a balance loss) are averaged over
the accumulation with the same weights as the task loss. Of several ranks each returns its part: the sum over ranks is the loss, and a term
that says `over_ranks` is weighted by the kept labels of all ranks' micro-batches, as one process with all their rows would.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsmith import anatomy
from sparsmith.crafting.record import record_of
from sparsmith.errors import ProofError
from sparsmith.methods.base import Batch, Method, MethodConfig
from sparsmith.ops.balance import sum_over_ranks
from sparsmith.ops.cross_entropy import token_cross_entropy

TASK = "task"


class Objective(nn.Module):
    """Loss of a crafted model on one micro-batch.

    Args:
        model: a model from `sparsmith.craft`.
        domains: number of domains whose losses are told apart (0 = none).
    """

    accepts_loss_kwargs = True

    def __init__(self, model: Any, domains: int = 0) -> None:
        super().__init__()
        self.model: Any = model
        self.domains = domains
        self.task = anatomy.task_of(model)
        self.classifies, self.pairs = self.task == anatomy.SEQ_CLS, self.task == anatomy.SEQ2SEQ
        # told that it is a language model the Trainer counts kept labels without position 0 of each row, as the shift below does
        self.loss_type = "ForCausalLM" if self.task == anatomy.CAUSAL_LM else "ForSequenceClassification"
        record = record_of(model)
        self._parts: tuple[tuple[Method, MethodConfig], ...] = record.parts
        self._owner = next((part for part in record.parts if part[0].owns_objective), None)
        self._checked = False

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        token_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        domain: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """One micro-batch of B rows of S tokens.

        Args:
            input_ids: (B, S) int64.
            labels: (B, S) int64, not shifted, -100 = no loss; of a classifier (B,) int64, the classes; of an encoder-decoder (B, T) int64,
                the answers.
            token_mask: (B, S) bool, False = padding.
            position_ids, attention_mask: as the model takes them; packed rows come without a mask.
            domain: (B, S) int64, -1 = none.
            decoder_input_ids: of an encoder-decoder (B, T) int64, what the decoder is fed.
            num_items_in_batch: kept labels of the whole accumulated batch over all ranks; default: of this micro-batch.

        Returns:
            `loss` (scalar), `terms` {name: detached scalar}, `domain_sum` and `domain_count` (domains,), `tokens` (scalar).
        """
        if token_mask is None:
            two_dim = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            token_mask = torch.ones_like(input_ids, dtype=torch.bool) if two_dim is None else two_dim.bool()
        batch = Batch(input_ids, labels, token_mask, domain, position_ids, attention_mask, decoder_input_ids)
        for method, config in self._parts:
            method.before_forward(self.model, config, batch)
        kept = self._targets(batch).ne(-100).sum()
        items = kept if num_items_in_batch is None else num_items_in_batch
        if self._owner is None:
            losses = self._losses(batch)
            task, statistics = losses.sum() / items, self._by_domain(batch, losses.detach())
        else:
            method, config = self._owner
            owned = method.task_loss(self.model, config, batch, items)
            task, statistics = owned.value, self._by_domain(batch, owned.token_losses)
        total = task
        terms = {TASK: task.detach()}
        found = self._method_terms(batch)
        share = kept / items
        joint = sum_over_ranks(kept) / items if any(term.over_ranks for term in found.values()) else share
        for name, term in found.items():
            portion = joint if term.over_ranks else share
            total = total + term.weight * portion * term.value
            terms[name] = (portion * term.value).detach()
        return {"loss": total, "terms": terms, "tokens": token_mask.sum(), **statistics}

    # what accelerate asks a model for when it shards it: these become units of their own, so that an evaluation, which calls the crafted
    # model and not this module, finds nothing that only the root would gather
    base_model_prefix = "decoder"

    @property
    def decoder(self) -> nn.Module:
        """The model without its head, where the final norm is."""
        return anatomy.backbone(self.model)

    def get_input_embeddings(self) -> nn.Module:
        """The crafted model's."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The crafted model's."""
        return self.model.get_output_embeddings()

    def _targets(self, batch: Batch) -> Tensor:
        """What is predicted: (B, S - 1) tokens, (B,) classes, or (B, T) tokens of an answer; -100 = not counted."""
        return batch.labels[:, 1:] if self.task == anatomy.CAUSAL_LM else batch.labels

    def _losses(self, batch: Batch) -> Tensor:
        if self.classifies:
            return self._class_losses(batch)
        return self._answer_losses(batch) if self.pairs else self._token_losses(batch)

    def _token_losses(self, batch: Batch) -> Tensor:
        """(P,) cross-entropies of the next token; positions without a label are dropped before norm-to-head work is done."""
        hidden = anatomy.backbone(self.model)(**_inputs(batch), use_cache=False).last_hidden_state
        targets = self._targets(batch)
        keep = targets.ne(-100)
        return token_cross_entropy(lambda h: anatomy.logits_of(self.model, h), hidden[:, :-1][keep], targets[keep])

    def _answer_losses(self, batch: Batch) -> Tensor:
        """(P,) cross-entropies of the tokens that the decoder writes."""
        assert batch.decoder_input_ids is not None
        read = anatomy.encode(self.model, batch.input_ids, batch.token_mask)
        hidden = anatomy.decode(self.model, batch.decoder_input_ids, read, batch.token_mask)
        keep = batch.labels.ne(-100)
        return token_cross_entropy(lambda h: anatomy.logits_of(self.model, h), hidden[keep], batch.labels[keep])

    def _class_losses(self, batch: Batch) -> Tensor:
        """(P,) cross-entropies of the rows that have a class."""
        logits = self.model(**_inputs(batch), use_cache=False).logits
        keep = batch.labels.ne(-100)
        return functional.cross_entropy(logits[keep].float(), batch.labels[keep], reduction="none")

    def _by_domain(self, batch: Batch, losses: Tensor | None) -> dict[str, Tensor]:
        if batch.domain is None or not self.domains or losses is None:
            return {}
        keep = self._targets(batch).ne(-100)
        domain = batch.domain[:, 0] if self.classifies else batch.domain[:, 1:]
        if self.pairs:  # an answer is of the domain of its prompt
            domain = batch.domain[:, :1].expand_as(batch.labels)
        # one slot more than domains: tokens of no domain (-1) fall into the last and are cut off
        index = domain[keep] % (self.domains + 1)
        sums = losses.new_zeros(self.domains + 1).index_add_(0, index, losses)
        counts = losses.new_zeros(self.domains + 1).index_add_(0, index, torch.ones_like(losses))
        return {"domain_sum": sums[:-1], "domain_count": counts[:-1]}

    def _method_terms(self, batch: Batch) -> dict[str, Any]:
        found = {}
        for method, config in self._parts:
            terms = method.loss_terms(self.model, config, batch)
            if not self._checked and torch.is_grad_enabled():
                _check_terms(method.name, terms, method.wanted_terms(config))
            found.update({f"{method.name}.{name}": term for name, term in terms.items()})
        self._checked = self._checked or torch.is_grad_enabled()
        return found

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Non-reentrant checkpointing only: with the reentrant form, routing terms would lose their gradient."""
        settings = dict(activation_checkpointing_kwargs or {})
        if settings.setdefault("use_reentrant", False):
            raise ProofError(
                "gradient checkpointing", "the reentrant form", "use_reentrant=False", "Leave `use_reentrant` out."
            )
        self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings, **options)

    def activation_checkpointing_disable(self) -> None:
        self.model.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Read by the Trainer when it sets DDP up."""
        return bool(getattr(self.model, "is_activation_checkpointing", False))


def _inputs(batch: Batch) -> dict[str, Tensor]:
    """What the model's forward is given of a batch."""
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    return {name: value for name, value in inputs.items() if value is not None}


def _check_terms(method: str, terms: dict[str, Any], wanted: tuple[str, ...]) -> None:
    """Every term asked for is there and has a gradient (checked on the first micro-batch); the guard sees that it is finite."""
    for name in wanted:
        term = terms.get(name)
        where = f"loss term {method}.{name}"
        if term is None or term.value is None:
            raise ProofError(
                where, "nothing", "a value in every step", "The method returned no such term; please report it."
            )
        if not term.value.requires_grad:
            raise ProofError(where, "a constant", "a value with a gradient", "Nothing that trains reaches this term.")
