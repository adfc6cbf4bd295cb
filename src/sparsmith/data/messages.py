"""Formats -> messages: every row becomes a list of `{"role", "content"}` with at least one assistant message.

| format | columns |
|---|---|
| alpaca | instruction, [input], output (or response, answer, completion), [system] |
| messages | messages (or conversations): role/content |
| sharegpt | conversations (or messages): from/value |
| prompt_completion | prompt (or question), completion (or response, answer), [system] |
| text | text; one message of the role `text`, trained whole |

`auto` takes the format of the first good row; every later row must follow it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsmith.data.columns import Columns, look_up
from sparsmith.data.rows import RowFault, kind_of

Messages = list[dict[str, str]]

NAMES = {
    "instruction": ("instruction",),
    "input": ("input",),
    "output": ("output", "response", "answer", "completion"),
    "prompt": ("prompt", "question"),
    "completion": ("completion", "response", "answer"),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system",),
    "text": ("text",),
}
_ANSWER_LIKE = ("code", "solution", "label", "summary", "target", "answer", "output", "response", "completion")
_ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant",
}  # fmt: skip


def find_format(values: Mapping[str, Any], columns: Columns) -> str:
    """The format of a row by its columns."""

    def has(ours: str) -> bool:
        return ours in columns or any(name in values for name in NAMES[ours])

    if has("messages"):
        turns = _field("messages", values, columns)
        first = turns[0] if isinstance(turns, list) and turns else None
        return "sharegpt" if isinstance(first, dict) and "from" in first else "messages"
    if "prompt" in columns or "completion" in columns:
        return "prompt_completion"
    if "text" in columns:
        return "text"
    if has("instruction") and has("output"):
        return "alpaca"
    if has("prompt") and has("completion"):
        return "prompt_completion"
    if has("text") and not any(name in values for name in _ANSWER_LIKE):
        return "text"
    names = ", ".join(f"`{name}`" for name in values) or "none"
    raise RowFault(
        f"columns whose meaning is not certain: {names}",
        "messages; instruction and output; prompt and completion; or text",
        "Name them in the recipe: columns: {prompt: ..., completion: ...}.",
    )


def to_messages(form: str, values: Mapping[str, Any], columns: Columns) -> Messages:
    """The messages of a row in the format `form`."""
    if form in ("messages", "sharegpt"):
        return _conversation(_field("messages", values, columns), form)
    if form == "text":
        return [{"role": "text", "content": _text("text", values, columns)}]
    if form == "alpaca":
        prompt = _text("instruction", values, columns)
        extra = _text("input", values, columns, empty=True) if _present("input", values, columns) else ""
        prompt = f"{prompt}\n\n{extra}" if extra.strip() else prompt
        answer = _text("output", values, columns)
    else:
        prompt, answer = _text("prompt", values, columns), _text("completion", values, columns)
    result = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    if _present("system", values, columns):
        system = _text("system", values, columns, empty=True)
        if system.strip():
            result.insert(0, {"role": "system", "content": system})
    return result


def _present(ours: str, values: Mapping[str, Any], columns: Columns) -> bool:
    return ours in columns or any(name in values for name in NAMES[ours])


def _field(ours: str, values: Mapping[str, Any], columns: Columns) -> Any:
    if ours in columns:
        return columns.value(ours, values)
    for name in NAMES[ours]:
        if name in values:
            return values[name]
    return look_up(NAMES[ours][0], values)


def _text(ours: str, values: Mapping[str, Any], columns: Columns, empty: bool = False) -> str:
    label = (
        columns.mapping.get(ours) if ours in columns else next((name for name in NAMES[ours] if name in values), ours)
    )
    return check_text(_field(ours, values, columns), str(label), ours, empty)


def check_text(value: Any, label: str, what: str, empty: bool = False) -> str:
    """`value` where it is a text that can be trained on; the fault otherwise."""
    if not isinstance(value, str):
        mend = (
            "Fill the row."
            if value is None or isinstance(value, dict)
            else f'To write it as text, use a template in `columns`: "{{{label}}}".'
        )
        raise RowFault(f"{kind_of(value)} as {what}", "a text", mend, label)
    if not empty and not value.strip():
        raise RowFault(f"an empty {what}", "a text", "Fill it, or remove the row.", label)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowFault(
            "half of a surrogate pair (\\ud800-\\udfff)", "Unicode text", "Write the whole character.", label
        ) from None
    return value


def _conversation(turns: Any, form: str) -> Messages:
    role_key, content_key = ("from", "value") if form == "sharegpt" else ("role", "content")
    if not isinstance(turns, (list, tuple)):
        raise RowFault(
            kind_of(turns), f"a list of messages, {{{role_key}: ..., {content_key}: ...}}", "Mend the row.", "messages"
        )
    result = [_message(turn, number, role_key, content_key) for number, turn in enumerate(turns)]
    _check_order(result)
    return result


def _message(turn: Any, number: int, role_key: str, content_key: str) -> dict[str, str]:
    place = f"messages[{number}]"
    if not isinstance(turn, dict):
        raise RowFault(kind_of(turn), f"an object with `{role_key}` and `{content_key}`", "Mend the row.", place)
    for key in (role_key, content_key):
        if key not in turn:
            raise RowFault(f"no `{key}`", f"an object with `{role_key}` and `{content_key}`", "Mend the row.", place)
    role = turn[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        raise RowFault(
            f"the role {kind_of(role).removeprefix('the text ')}",
            f"one of {', '.join(_ROLES)}",
            "Mend the role.",
            f"{place}.{role_key}",
        )
    content = turn[content_key]
    if (
        isinstance(content, list)
        and content
        and all(isinstance(part, dict) and part.get("type") == "text" for part in content)
    ):
        content = "".join(
            check_text(part.get("text"), f"{place}.{content_key}", "text part", empty=True) for part in content
        )
    what = "answer" if _ROLES[role] == "assistant" else "message"
    return {"role": _ROLES[role], "content": check_text(content, f"{place}.{content_key}", what)}


def _check_order(messages: Messages) -> None:
    expected = "[system], then user and assistant in turns, the assistant last"
    roles = [message["role"] for message in messages]
    talk = roles[1:] if roles[:1] == ["system"] else roles
    if not talk:
        raise RowFault("no message" if not roles else "a system message alone", expected, "Remove the row.", "messages")
    for number, role in enumerate(talk):
        if role != ("user", "assistant")[number % 2]:
            place = number + len(roles) - len(talk)
            raise RowFault(f"{role} as message {place}", expected, "Mend or remove the row.", f"messages[{place}]")
    if talk[-1] != "assistant":
        raise RowFault(
            "a last message from the user, without an answer",
            expected,
            "Add the answer, or cut the row there.",
            "messages",
        )
