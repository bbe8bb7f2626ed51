"""Where the assistant's turns lie in a rendered conversation.

A chat template is a program of the checkpoint, so only rendering shows where turn i lies. It begins
where render(messages before i, add_generation_prompt=True) ends, and ends after the first added
token behind its last word in render(messages up to i). The whole text must begin with both.
"""

import json
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from os.path import commonprefix

from data.tokenizer import Tokenizer
from infra.config import UserError

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of a thought
LOSS = ("weight", "train", "loss", "training")  # fields: 0 or false takes the loss off a turn
CLOSE = "</think>"  # ends a thought inside a content
DATE = "26 Jul 2024"  # "today", which must not change the data; Llama 3.2's default
MARK = 0xF0000  # the first of the private characters, which no text contains
REWRITTEN = "turns without loss (rewritten by the template)"
UNPROMPTED = "turns without loss (no prompt before them)"
BARE = "turns trained without the thought that the template begins"


def find_turns(row: dict, name: str, tokenizer: Tokenizer, template: str) -> tuple[str, list, list]:
    """The text of the conversation row[name]; begin, end and whether a token closes it for each trained
    turn; and notes to count. UserError: the template does not write all of the row.

    A turn is trained if it is written as it is with nothing behind it. Qwen3's template drops the
    thoughts of earlier turns.
    """
    messages, tools, turns, notes = row[name], row.get("tools"), [], []
    render = partial(tokenizer.render, template=template, date_string=DATE, tools=tools)
    try:
        whole = _whole(messages, tools, render)
    except UserError:
        if not _called(messages):
            raise
        # DeepSeek's template joins a call's arguments to other text.
        messages = deepcopy(messages)
        for function in _called(messages):
            arguments = function.get("arguments", {})
            function["arguments"] = json.dumps(arguments, ensure_ascii=False)
        whole = _whole(messages, tools, render)

    # The last turn comes first: it may be written in full where the template abridges it.
    last = len(messages) - 1
    for i in reversed(range(row["first"], last + 1)):
        message = messages[i]
        has_loss = all(message.get(field, True) for field in LOSS)
        if message["role"] != "assistant" or not has_loss:
            continue
        if i == 0:
            notes.append(UNPROMPTED)
            continue
        prompt = render(messages[:i], True)
        text = whole if i == last else render(messages[: i + 1], False)
        text, start = _follow(prompt, text, messages[: i + 1], render)
        if start is None and i == last:
            seen = f"expected {prompt!r:.200} before it, found {whole!r:.200}"
            raise UserError(f"the chat template does not answer where it asks for it; {seen}")
        end = None if start is None else _end_of_turn(text, start, i, message, tokenizer)
        if i == last:
            whole = text
        if end is None or not whole.startswith(text[: end[0]]):
            notes.append(REWRITTEN)
            continue
        if start < len(prompt):
            notes.append(BARE)
        turns.insert(0, (start, *end))
    return whole, turns, notes


def _whole(messages: list[dict], tools: list | None, render: Callable) -> str:
    """The text of a conversation. UserError if a private character in the place of a text, call or
    tool does not show.
    """
    whole, places = render(messages, False), []
    messages, tools = deepcopy(messages), deepcopy(tools)

    def mark(holder: dict, key: str, where: str) -> str:
        character = chr(MARK + len(places))
        places.append((character, holder.get(key), where))
        holder[key] = character
        return character

    for tool in tools or []:
        mark(tool.get("function", tool), "name", "field 'tools'")
    for i, message in enumerate(messages):
        if (message["content"] or "").strip():
            mark(message, "content", f"message {i}, the text of the {message['role']}")
        for function in _called([message]):
            mark(function, "name", f"message {i}, field 'tool_calls'")
            if arguments := function.get("arguments"):
                character = mark(function, "arguments", f"message {i}, arguments of a call")
                is_text = isinstance(arguments, str)
                function["arguments"] = f'{{"{character}": ""}}' if is_text else {character: ""}
    try:
        written = render(messages, False, tools=tools)
        written += render(messages[:-1], True, tools=tools)  # where Mistral's has the system text
    except UserError:  # it reads what it writes
        return whole
    for character, text, where in places:
        if character not in written:
            seen = f"expected {text!r:.200}, found {whole!r:.200}"
            raise UserError(f"the chat template ignores {where}; {seen}")
    return whole


def _called(messages: list[dict]) -> list[dict]:
    """The functions that messages call, each with name and arguments."""
    return [call.get("function", call) for m in messages for call in m.get("tool_calls") or []]


def _follow(prompt: str, text: str, messages: list, render: Callable) -> tuple[str, int | None]:
    """The text of a conversation as it is trained on, and where its last turn begins (None: unknown).

    It follows the prompt for it. But:

    - The prompt may have what the answered conversation lacks: Mistral writes the system text into the
      last user turn. The turn is moved behind the prompt.
    - The template may drop a thought, or the prompt begin it, as R1's does. The turn is written in full
      behind the prompt, as the model will have to continue it.
    - If the turn lacks the thought that the prompt begins, it follows the assistant's header alone.
    """
    start = len(prompt)
    if not text.startswith(prompt):
        # The header of an answer of one unmistakable character.
        probe = render([*messages[:-1], {"role": "assistant", "content": chr(MARK)}], False)
        header, found, _ = probe.partition(chr(MARK))
        # The prompt must end as the header does, but for a space before the answer.
        shared = len(commonprefix([prompt, header]))
        rest = header[shared:]
        rest = rest if prompt.endswith(rest) else rest.rstrip()
        if not found or not text.startswith(header) or not prompt.endswith(rest):
            return text, None
        start = shared + len(rest)
        if rest:
            text, start = prompt + text[start:], len(prompt)

    # The thought: begun by the prompt, in a field of its own or in the content.
    message = messages[-1]
    begun, written = prompt[start:].strip(), text[start:]
    content = message["content"] or ""
    thought = next((message[name] for name in REASONING if message.get(name)), "")
    if thought and begun:
        content = f"{thought}\n{CLOSE}\n\n{content}"
    answer = content.rpartition(CLOSE)[2].strip()
    found = written.find(answer)
    if CLOSE not in content or CLOSE in written and not begun or found < 0:
        return text, start
    if begun:
        content = content.lstrip().removeprefix(begun).removeprefix("\n")
    return prompt + content.rstrip() + written[found + len(answer) :], len(prompt)


def _end_of_turn(text: str, start: int, i: int, message: dict, tokenizer: Tokenizer) -> tuple[int, bool]:
    """Where message i, which begins at `start`, ends, and whether a token of its own ends it."""
    # Behind its last word. A template may strip the content, or drop its thought.
    content, at = (message["content"] or "").strip(), start
    answer = content if text.find(content, at) >= 0 else content.rpartition(CLOSE)[2].strip()
    parts = {name: message[name].strip() for name in REASONING if message.get(name)}
    for name, part in (parts | {"content": answer}).items():
        found = text.find(part, at)
        if found < 0 or message["content"] is None and text.startswith("None", start):
            seen = f"expected {part!r:.200}, found {text[start:]!r:.200}"
            raise UserError(f"the chat template ignores or changes '{name}' of message {i}; {seen}")
        at = found + len(part) if part else at
    # The token need not be special. Calls may have tokens of their own.
    closes = list(tokenizer.added_pattern.finditer(text, at))
    if message.get("tool_calls"):
        stops = {tokenizer.decode([stop]) for stop in tokenizer.stop_ids}
        closes = [close for close in closes if close[0] in stops] or closes[-1:]
    if closes:
        return closes[0].end(), True
    return len(text.rstrip()), False
