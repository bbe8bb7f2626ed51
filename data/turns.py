"""Where the assistant's turns lie in a rendered conversation, and the token ids of the text divided there.

A chat template is a program that comes with a checkpoint, so only rendering shows where turn i of a
conversation lies:

    it begins   where render(messages before i, add_generation_prompt=True) ends: the prompt of the model
    it ends     after the first added token behind its last word in render(messages up to i)

Both must be beginnings of the rendering of the whole conversation.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from itertools import pairwise
from os.path import commonprefix

import regex

from data.tokenizer import Tokenizer
from infra.config import UserError

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields that hold an assistant's thought
CLOSE = "</think>"  # ends a thought inside a content
DATE = "26 Jul 2024"  # "today" for Llama 3.2's template, its own default: data must not change with the day
MARK = 0xF0000  # the first of the private characters, which no text contains
REWRITTEN = "turns without loss (rewritten by the template)"
UNPROMPTED = "turns without loss (no prompt before them)"
BARE = "turns trained without the thought that the template begins"


def find_turns(row: dict, name: str, tokenizer: Tokenizer, template: str) -> tuple[str, list, list[str]]:
    """The text of the conversation row[name]; (begin, end, closed) of each trained turn in it, closed by a
    token or not; and a note for each turn that is treated specially.

    A turn is trained if it stands in the whole conversation as it does with nothing behind it. Else it is
    context without loss: Qwen3's template drops the thoughts of earlier turns. UserError: the template cannot
    render the row, or leaves something out.
    """
    messages, tools, turns, notes = row[name], row.get("tools"), [], []

    def render(messages: list[dict], ask: bool = False, tools: list | None = tools) -> str:
        return tokenizer.render(messages, ask, template, date_string=DATE, tools=tools)

    whole = render(messages)
    _refuse_unwritten(messages, tools, render, whole)

    # The last turn comes first, since it may be written in full where the template abridges it.
    for i in reversed(range(row["first"], len(messages))):
        message, is_last = messages[i], i == len(messages) - 1
        if message["role"] != "assistant" or not (message.get("weight", 1) and message.get("train", True)):
            continue
        if i == 0:
            notes.append(UNPROMPTED)
            continue
        prompt, text = render(messages[:i], True), whole if is_last else render(messages[: i + 1])
        text, start = _follow(prompt, text, messages[: i + 1], render)
        if start is None and is_last:
            raise UserError(
                f"chat template '{template}' does not write an answer where it asks for one; "
                f"expected {prompt!r:.200} before it, found {whole!r:.200}"
            )
        end, closed = (0, False) if start is None else _end_of_turn(text, start, i, message, tokenizer)
        if start is None or not (is_last or whole.startswith(text[:end])):
            notes.append(REWRITTEN)
            continue
        whole = text if is_last else whole
        notes += [BARE] if start < len(prompt) else []
        turns.insert(0, (start, end, closed))
    return whole, turns, notes


def _follow(prompt: str, text: str, messages: list[dict], render: Callable) -> tuple[str, int | None]:
    """The text of a conversation as it is trained on, and where its last turn begins in it (None: unknown).

    prompt: the conversation before that turn with the assistant asked to answer. The turn follows it, with
    three exceptions:

    - The prompt has something that the answered conversation lacks: Mistral's system text stands in the last
      user turn. The turn is moved behind the prompt.
    - The template drops the turn's thought, or the prompt begins it (R1's ends with "<think>\\n"). The turn
      is written in full behind the prompt, as the model will have to continue it.
    - The prompt begins a thought and the turn has none. The turn follows the assistant's header alone.
    """
    start = len(prompt)
    if not text.startswith(prompt):
        # The header is what the template writes before an answer that is a single unmistakable character.
        probe = render([*messages[:-1], {"role": "assistant", "content": chr(MARK)}])
        header, found, _ = probe.partition(chr(MARK))
        # The prompt must end as the header does, but for a space that may begin the answer.
        shared = len(commonprefix([prompt, header]))
        rest = header[shared:] if prompt.endswith(header[shared:]) else header[shared:].rstrip()
        if not found or not text.startswith(header) or not prompt.endswith(rest):
            return text, None
        start = shared + len(rest)
        if rest:
            text, start = prompt + text[start:], len(prompt)

    # The thought: begun by the prompt, in a field of its own or in the content.
    begun, written, content = prompt[start:].strip(), text[start:], messages[-1]["content"] or ""
    thought = next((messages[-1][name] for name in REASONING if messages[-1].get(name)), "")
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
    """Where message i, a turn that begins at `start`, ends, and whether a token of its own ends it. Else its
    text does. UserError: the template writes another text than the message has.
    """
    # Behind its last word. A template may strip the content, or write it without its thought.
    content, at = (message["content"] or "").strip(), start
    answer = content if text.find(content, start) >= 0 else content.rpartition(CLOSE)[2].strip()
    for name, part in [*((name, message.get(name) or "") for name in REASONING), ("content", answer)]:
        found = text.find(part.strip(), at)
        if found < 0 or message["content"] is None and text.startswith("None", start):
            raise UserError(
                f"message {i}: the chat template ignores or changes field '{name}'; "
                f"expected {part!r:.200}, found {text[start:]!r:.200}"
            )
        at = found + len(part.strip()) if part else at
    # Some tokenizers do not flag the token that ends a turn as special. Calls may have tokens of their own.
    closes = list(_added_tokens(tokenizer).finditer(text, at))
    if message.get("tool_calls"):
        stops = {tokenizer.decode([stop]) for stop in tokenizer.stop_ids}
        closes = [close for close in closes if close[0] in stops] or closes[-1:]
    return (closes[0].end(), True) if closes else (len(text.rstrip()), False)


def _refuse_unwritten(messages: list[dict], tools: list | None, render: Callable, whole: str) -> None:
    """UserError for a text, call or tool that the template leaves out: private characters take the places of
    all of them, and each must show.
    """
    messages, tools, places = deepcopy(messages), deepcopy(tools), []

    def mark(where: str, holder: dict, key: str) -> None:
        places.append((chr(MARK + len(places)), where, holder.get(key)))
        holder[key] = places[-1][0]

    for tool in tools or []:
        mark("field 'tools'", tool.get("function", tool), "name")
    for i, message in enumerate(messages):
        if (message["content"] or "").strip():
            mark(f"message {i}, the text of the {message['role']}", message, "content")
        for call in message.get("tool_calls") or []:
            mark(f"message {i}, field 'tool_calls'", call.get("function", call), "name")
    try:  # Mistral's system text is in the prompt alone
        written = render(messages, tools=tools) + render(messages[:-1], True, tools)
    except UserError:  # it reads what it writes
        return
    for character, where, text in places:
        if character not in written:
            found = f"expected {text!r:.200}, found {whole!r:.200}"
            raise UserError(f"the chat template ignores {where}; {found}")


@cache
def _added_tokens(tokenizer: Tokenizer) -> regex.Pattern:
    """The tokens that are found in a text as a whole, and those that end an answer. None is white space."""
    tokens = {token["content"] for token in tokenizer.description.get("added_tokens") or []}
    tokens |= {tokenizer.decode([stop]) for stop in tokenizer.stop_ids}
    longest_first = sorted(filter(str.strip, tokens), key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")


def encode_parts(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the parts of a text: together those of the whole text, if no cut falls inside one of its tokens.

    SentencePiece begins each encoding with a space, so a part is encoded with what stands before it, from the
    last added token on: behind one, a text is encoded as if it stood alone. Where that merges over the cut,
    the part is encoded alone, as the prompt is when the model has to answer it.
    """
    parts, before = [], ""
    for begin, end in pairwise([0, *cuts, len(text)]):
        part = text[begin:end]
        head, both = tokenizer.encode(before) if before else [], tokenizer.encode(before + part)
        parts.append(both[len(head) :] if both[: len(head)] == head else tokenizer.encode(part))
        starts = [token.start() for token in _added_tokens(tokenizer).finditer(part)]
        before = part[starts[-1] :] if starts else part or before
    return parts
