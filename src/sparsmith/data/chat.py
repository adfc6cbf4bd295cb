"""Rows by the tokenizer's own chat template.

Which tokens are the assistant's is asked of the template itself where it marks them (`{% generation %}`); a known template
without marks is replaced by TRL's training form of it; any other is rendered up to each answer and past it, and both texts must
agree on what they share. The token that ends a turn is trained, line breaks that the template puts after it are not. Where the
template ends a turn with no special token, eos is added to the last one.
"""

from __future__ import annotations

import re
from typing import Any

from sparsmith.data.messages import Messages
from sparsmith.data.rows import RowFault, one_line
from sparsmith.data.tokens import Segment, TokenRow, before_answer, encode_segments, one_bos, special_words
from sparsmith.errors import DataError

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatEncoder:
    """Encodes rows by the chat template."""

    recipe_template = "chat"
    classes: int | None = None
    pairs = False
    ending: tuple[int, ...] = ()

    def __init__(self, tokenizer: Any, loss_on: str = "response") -> None:
        if not tokenizer.chat_template:
            raise DataError(
                "data.template",
                "`chat`, with a tokenizer that has no chat template",
                "a template",
                "Write the template in the recipe.",
            )
        self.tokenizer, self.loss_on = tokenizer, loss_on
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.special = special_words(tokenizer)
        self.special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(
            tokenizer.all_special_ids
        )
        self.marked = marked_template(tokenizer)

    def encode(self, rows: list[Messages]) -> list[TokenRow | RowFault]:
        """Token rows of many conversations; a row that the template refuses comes back as its fault."""
        result: list[TokenRow | RowFault] = []
        for row in rows:
            try:
                result.append(self._encode(row))
            except RowFault as fault:
                result.append(fault)
        return result

    def prompt_text(self, messages: Messages) -> str:
        """What stands before the last answer (or after the last question), as text without bos."""
        text = self._render(before_answer(messages), add_generation_prompt=True)
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos else text

    def prompt_ids(self, messages: Messages) -> list[int]:
        """What stands before the last answer (or after the last question), as ids, the bos included."""
        messages = before_answer(messages)
        if messages[0]["role"] == "text":
            return []
        if self._spells(messages):
            ids = self._ids(messages, add_generation_prompt=True)
            return one_bos(ids, [False] * len(ids), self.bos, self.eos).ids
        text = self._render(messages, add_generation_prompt=True)
        return encode_segments(self.tokenizer, [[Segment(text)]], self.bos, self.eos)[0].ids

    def prompts_ids(self, rows: list[Messages]) -> list[list[int]]:
        """`prompt_ids` of many conversations."""
        return [self.prompt_ids(row) for row in rows]

    def _encode(self, messages: Messages) -> TokenRow:
        if messages[0]["role"] == "text":
            plain = self._spells(messages)
            end = Segment(ids=(self.eos,), trained=True) if self.eos is not None else Segment(ids=())
            return encode_segments(
                self.tokenizer, [[Segment(messages[0]["content"], True, plain), end]], self.bos, self.eos
            )[0]
        if self._spells(messages):
            ids, trained = self._spans_of_ids(messages)
        elif self.marked:
            ids, trained = self._marked(messages)
        else:
            ids, trained = self._spans_of_text(messages)
        ids, trained = self._train_ends(ids, trained)
        if not any(trained):
            raise RowFault(
                "no token that the chat template marks as the assistant's",
                "at least one",
                "Use a template in the recipe.",
                "messages",
            )
        if self.loss_on == "all":
            trained = [True] * len(ids)
        return one_bos(ids, trained, self.bos, self.eos)

    def _spells(self, messages: Messages) -> bool:
        return self.special is not None and any(self.special.search(message["content"]) for message in messages)

    def _call(self, messages: Messages, **more: Any) -> Any:
        try:
            return self.tokenizer.apply_chat_template(messages, **more)
        except Exception as fault:  # jinja and the template's own raise_exception, of many kinds
            raise RowFault(
                f"a row that the chat template refuses ({one_line(str(fault), 160)})",
                "a row that it renders",
                "Mend the row, or use a template in the recipe.",
                "messages",
            ) from None

    def _render(self, messages: Messages, **more: Any) -> str:
        return self._call(messages, tokenize=False, **more)

    def _ids(self, messages: Messages, **more: Any) -> list[int]:
        return self._call(messages, tokenize=True, return_dict=False, sanitize_control_tokens=True, **more)

    def _marked(self, messages: Messages) -> tuple[list[int], list[bool]]:
        out = self._call(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, chat_template=self.marked
        )
        return list(out["input_ids"]), [bool(one) for one in out["assistant_masks"]]

    def _spans_of_text(self, messages: Messages) -> tuple[list[int], list[bool]]:
        whole = self._render(messages)
        segments: list[Segment] = []
        done = 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:number], add_generation_prompt=True)
            after = self._render(messages[: number + 1])
            if not (whole.startswith(after) and after.startswith(before) and len(before) >= done):
                raise unstable_template()
            segments += [Segment(whole[done : len(before)]), Segment(whole[len(before) : len(after)], trained=True)]
            done = len(after)
        segments.append(Segment(whole[done:]))
        row = encode_segments(self.tokenizer, [[part for part in segments if part.text]], None, -1)[0]
        return row.ids, row.trained

    def _spans_of_ids(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """As `_spans_of_text`, on ids, for rows whose text spells a special token: the tokenizer keeps it as text."""
        whole = self._ids(messages)
        trained = [False] * len(whole)
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                before = self._ids(messages[:number], add_generation_prompt=True)
                after = self._ids(messages[: number + 1])
                if whole[: len(after)] != after or after[: len(before)] != before:
                    raise unstable_template()
                trained[len(before) : len(after)] = [True] * (len(after) - len(before))
        return whole, trained

    def _train_ends(self, ids: list[int], trained: list[bool]) -> tuple[list[int], list[bool]]:
        """Each answer up to and with its end-of-turn token."""
        ids, trained = list(ids), list(trained)
        place = 0
        while place < len(ids):
            if not trained[place]:
                place += 1
                continue
            stop = place
            while stop < len(ids) and trained[stop]:
                stop += 1
            special = [spot for spot in range(place, stop) if ids[spot] in self.special_ids]
            if special and not self._holds_text(ids[special[-1] + 1 : stop]):
                trained[special[-1] + 1 : stop] = [False] * (stop - special[-1] - 1)
            elif stop < len(ids) and ids[stop] in self.special_ids:
                trained[stop] = True
            elif stop == len(ids) and self.eos is not None:
                ids.append(self.eos)
                trained.append(True)
                stop += 1
            place = stop + 1
        return ids, trained

    def _holds_text(self, ids: list[int]) -> bool:
        return bool(ids) and bool(self.tokenizer.decode(ids).strip())


def marked_template(tokenizer: Any) -> str | None:
    """The chat template with `{% generation %}` marks: the tokenizer's own, or TRL's training form of a known one."""
    own = tokenizer.chat_template
    own = own.get("default", "") if isinstance(own, dict) else own
    if not tokenizer.is_fast:
        return None
    if _MARK.search(own):
        return own
    from trl.chat_template_utils import get_training_chat_template  # seconds to import, so only where it is needed

    try:
        return get_training_chat_template(tokenizer)
    except Exception:  # TRL knows no training form; rendering prefixes decides
        return None


def unstable_template() -> RowFault:
    """The fault of a template whose earlier turns change when later ones follow."""
    return RowFault(
        "a chat template that writes earlier turns anew when later ones follow, so that the answers' tokens cannot be told",
        "a template with {% generation %} marks",
        "Add the marks to the tokenizer's template, or set data.template to a text with {prompt}.",
        "messages",
    )


def make_encoder(
    tokenizer: Any, template: str | None, loss_on: str, classes: int | None = None, pairs: bool = False
) -> Any:
    """The encoder that the recipe asks for. `classes`: of a classifier how many there are; `pairs`: of an encoder-decoder."""
    from sparsmith.data.classes import ClassEncoder
    from sparsmith.data.pairs import PairEncoder
    from sparsmith.data.tokens import DEFAULT_TEMPLATE, TemplateEncoder

    if classes is not None:
        return ClassEncoder(tokenizer, template, classes)
    if pairs:
        return PairEncoder(tokenizer, template)
    if template == "chat" or (template is None and tokenizer.chat_template):
        return ChatEncoder(tokenizer, loss_on)
    return TemplateEncoder(tokenizer, template or DEFAULT_TEMPLATE, loss_on)
