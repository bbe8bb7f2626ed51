"""Where the assistant's turns lie in a rendered conversation, and the token ids of the text divided there.

A chat template is a program that comes with a checkpoint, so only rendering shows where turn i of a
conversation lies:

    it begins   where render(messages before i, add_generation_prompt=True) ends: the prompt of the model
    it ends     after the first special token behind its last word in render(messages up to i)

Both must be beginnings of the rendering of the whole conversation. find_turns() does it this way,
MarkedTemplate finds the same in one rendering where a template allows it, and encode_parts() encodes the
divided text.
"""

import copy
import math
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import pairwise

import regex

from data.tokenizer import Tokenizer
from infra.config import UserError

PLAIN_ROLES = (
    "system",
    "user",
    "assistant",
)  # every template renders these; whether it renders others is checked
REASONING = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # names of the field that holds an assistant's thought
CALLS = ("tool_calls", "function_call")  # names of the field that holds an assistant's calls
CLOSE = "</think>"  # ends a thought inside a content
DATE = "26 Jul 2024"  # "today" for Llama 3.2's template, its own default: data must not change with the day
MARK, PROBE = "\U000f0001turn\U000f0002", "\U000f0003"  # private characters that no text contains
REWRITTEN = "turns without loss (rewritten by the template)"
UNPROMPTED = "turns without loss (no prompt before them)"
BARE = "turns trained without the thought that the template begins"


# ---- turns -------------------------------------------------------------------------------------------------


def find_turns(
    row: dict, name: str, tokenizer: Tokenizer, template: str, marked: "MarkedTemplate | None" = None
) -> tuple[str, list[int], list[bool], Counter]:
    """The rendered conversation row[name] and its trained turns: turn k is text[cuts[2k]:cuts[2k + 1]].

    Also whether a special token ends each turn, and how many turns were treated specially, by kind. A turn is
    trained if it stands in the whole conversation as it does with nothing behind it. Else it is context
    without loss: Qwen3's template drops the thoughts of earlier turns. marked: finds the same turns in one
    rendering, where that is certain. UserError: the template cannot render the row, or ignores a field that
    matters.
    """
    # The turns to train on; of a plain conversation found in one rendering where the template allows it.
    messages, first, tools = row[name], row["first"], row.get("tools")
    trained = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant" and _has_loss(m)]
    plain = not tools and all(
        m["role"] in PLAIN_ROLES and m.keys().isdisjoint(REASONING + CALLS) for m in messages
    )
    if marked and plain and (found := marked.find_turns(messages, trained)):
        return *found, Counter()

    def render(messages: list[dict], ask: bool, tools: list | None = tools) -> str:
        return tokenizer.render(messages, ask, template, date_string=DATE, tools=tools)

    # The whole conversation, in which every field has to show.
    try:
        whole = render(messages, False)
    except UserError as e:
        for i, m in enumerate(messages):
            if m["content"] is None:
                raise UserError(
                    f"message {i}: has calls but no content, which the chat template cannot render ({e})"
                ) from None
        raise
    cuts, closed, notes = [], [], Counter()
    if not plain:
        _refuse_ignored(messages, tools, whole, render)
    for i in trained:
        message, is_last = messages[i], i == len(messages) - 1

        # The conversation up to this turn.
        try:
            prompt = render(messages[:i], True)
        except UserError:
            if i > 0:
                raise
            notes[UNPROMPTED] += 1  # the template reads a first message before there is one (Qwen2.5)
            continue
        text, start, note = _last_turn(messages[: i + 1], prompt, render)
        if is_last and start is None:
            raise UserError(
                f"chat template '{template}' does not write an answer where it asks for one; use another"
            )
        end, special = _end_of_turn(text, start or 0, message, tokenizer)

        # Is it the same in the whole conversation?
        if start is None or not (is_last or whole.startswith(text[:end])):
            notes[REWRITTEN] += 1
            continue
        for field in REASONING:
            if message.get(field, "").strip() not in text[start:end]:
                raise UserError(
                    f"message {i}: chat template '{template}' ignores field '{field}'; use one that reads it"
                )
        whole = text if is_last else whole
        cuts += [start, end]
        closed.append(special)
        notes.update([note] if note else [])
    return whole if not cuts or closed[-1] else whole[: cuts[-1]], cuts, closed, notes


def _has_loss(message: dict) -> bool:
    return message.get("weight", 1) != 0 and message.get("train", True) != 0


def _last_turn(messages: list[dict], prompt: str, render: Callable) -> tuple[str, int | None, str]:
    """A conversation as it is trained on, where its last turn begins in it (None: unknown), and a note or "".

    prompt: the conversation before that turn with the assistant asked to answer. The turn follows it, with
    two exceptions:

    - The template drops the turn's thought, or the prompt already begins it (R1's ends with "<think>\\n").
      Then the turn is written in full behind the prompt, just as the model will have to continue it.
    - The prompt begins a thought and the turn has none. Then the turn follows the assistant's header alone.
    """
    text, header = render(messages, False), prompt
    if not text.startswith(prompt):
        # The header is what the template writes before an answer that is a single unmistakable character.
        probe = render([*messages[:-1], {"role": "assistant", "content": PROBE}], False)
        header = probe.partition(PROBE)[0]
        if PROBE not in probe or not prompt.startswith(header) or not text.startswith(header):
            return text, None, ""
    full = _in_full(messages[-1], prompt[len(header) :], text[len(header) :])
    if full is not None:
        return prompt + full, len(prompt), ""
    return text, len(header), "" if header == prompt else BARE


def _in_full(message: dict, begun: str, written: str) -> str | None:
    """A turn with its thought, as it continues a prompt that ends with `begun` ("" or "<think>\\n"). None if
    the turn has no thought, or if `written`, the template's text of the turn, has it already.
    """
    tag, content = begun.strip(), message["content"] or ""
    close = "</" + tag[1:] if tag.startswith("<") else CLOSE
    thought = next((message[k] for k in REASONING if message.get(k)), "")
    if thought and tag:
        thought, answer = f"{thought}\n{close}\n\n", content
    elif close in content and (begun or close not in written):
        thought, _, answer = content.rpartition(close)
        if tag and thought.lstrip().startswith(tag):
            thought = thought.lstrip().removeprefix(tag).removeprefix(begun[len(begun.rstrip()) :])
        thought += close + answer[: len(answer) - len(answer.lstrip())]
    else:
        return None
    found = written.find(answer.strip())
    return None if found < 0 else thought + written[found:]


def _end_of_turn(text: str, start: int, message: dict, tokenizer: Tokenizer) -> tuple[int, bool]:
    """Where the turn that begins at `start` ends, and whether a special token ends it. Else its text does."""
    # Its last word. A template may strip the content, or write it without its thought.
    content = (message["content"] or "").strip()
    answer = content if content in text[start:] else content.rpartition(CLOSE)[2].strip()
    calls = [t for field in CALLS for t in _texts(message.get(field))]
    for part in (*(message.get(k, "") for k in REASONING), answer, *calls):
        found = text.find(part.strip(), start)
        start = start if found < 0 else found + len(part.strip())
    # Calls may be written with special tokens of their own, so a stop token is preferred there. Some
    # tokenizers do not flag the token that ends a turn as special; then it is the added token that stands
    # right behind the last word.
    closes = list(_special_tokens(tokenizer).finditer(text, start))
    stops = [c for c in closes if calls and c.group() in _stop_tokens(tokenizer)]
    close = (stops or closes or [_raw_tokens(tokenizer).match(text, start)])[0]
    return (close.end(), True) if close else (len(text.rstrip()), False)


def _texts(value) -> Iterator[str]:
    """The texts in a JSON value, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _refuse_ignored(messages: list[dict], tools: list | None, whole: str, render: Callable) -> None:
    """UserError for tools, calls or messages without which the template would write the same."""

    def same(messages: list[dict], tools: list | None) -> bool:
        try:
            return render(messages, False, tools) == whole
        except UserError:  # the template needs what was left out
            return False

    if tools and same(messages, None):
        raise UserError("the chat template ignores field 'tools'; use one that reads it")
    for i, message in enumerate(messages):
        for field in CALLS:
            changed = {k: v for k, v in message.items() if k != field} | {"content": message["content"] or ""}
            if message.get(field) and same([*messages[:i], changed, *messages[i + 1 :]], tools):
                raise UserError(
                    f"message {i}: the chat template ignores field '{field}'; use one that reads it"
                )
        if message["role"] not in PLAIN_ROLES and same([*messages[:i], *messages[i + 1 :]], tools):
            raise UserError(
                f"message {i}: the chat template ignores role {message['role']!r}; use one that writes it"
            )


def _added_tokens(tokenizer: Tokenizer) -> list[dict]:
    return tokenizer.description.get("added_tokens") or []


@cache
def _special_tokens(tokenizer: Tokenizer) -> regex.Pattern:
    return _any_of(
        {t["content"] for t in _added_tokens(tokenizer) if t.get("special")} | _stop_tokens(tokenizer)
    )


@cache
def _stop_tokens(tokenizer: Tokenizer) -> frozenset[str]:
    # generation_config.json may name ids that do not exist
    return frozenset(tokenizer.decode([i]) for i in tokenizer.stop_ids) - {""}


@cache
def _raw_tokens(tokenizer: Tokenizer) -> regex.Pattern:
    """The added tokens that are found in the text before it is normalized, and that take no white space with
    them.
    """
    flags = ("normalized", "lstrip", "rstrip", "single_word")
    return _any_of(t["content"] for t in _added_tokens(tokenizer) if not any(t.get(flag) for flag in flags))


def _any_of(texts: Iterable[str]) -> regex.Pattern:
    return regex.compile("|".join(regex.escape(t) for t in sorted(texts, key=len, reverse=True)) or "(?!)")


# ---- all turns in one rendering ----------------------------------------------------------------------------


class Watched(Sequence):
    """Messages that remember how far a template has looked: the highest index it has asked for, or infinity
    once it knows how many messages there are.
    """

    def __init__(self, messages: list[dict], begin: int = 0, seen: list[float] | None = None):
        self._messages, self._begin = messages, begin
        self._seen = [-1] if seen is None else seen  # a list, since slices share it

    def _look(self, i: float) -> None:
        self._seen[0] = max(self._seen[0], i)

    def __len__(self) -> int:
        self._look(math.inf)
        return len(self._messages) - self._begin

    def __getitem__(self, i):
        if isinstance(i, slice) and i.stop is None and i.step is None and (i.start or 0) >= 0:
            return Watched(self._messages, self._begin + (i.start or 0), self._seen)
        if isinstance(i, int) and i >= 0:
            self._look(self._begin + i)
            return self._messages[self._begin + i]
        self._look(math.inf)
        return self._messages[self._begin :][i]

    def __iter__(self) -> Iterator[dict]:
        for i in range(self._begin, len(self._messages)):
            self._look(i)
            yield self._messages[i]
        self._look(math.inf)


class MarkedTemplate:
    """A copy of a chat template that marks where each message ends, so that one rendering shows all turns.

    The mark stands at the end of the template's loop over the messages. A template that has not looked beyond
    message i when it gets there has written the same text as for a conversation that ends with i, because
    it has read nothing that differs. The text after the loop, which asks for an answer, must be the same for
    all conversations, and nothing before it may depend on add_generation_prompt; _mark() refuses other
    templates. Turns that remain uncertain are found by rendering every beginning of the conversation.
    """

    def __init__(self, tokenizer: Tokenizer, source: str):
        self.original, self.ask = tokenizer, None
        self.tokenizer = copy.copy(tokenizer)
        self.tokenizer.config = tokenizer.config | {"chat_template": source}

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str) -> "MarkedTemplate | None":
        """The marked copy of a tokenizer's template, or None if there can be none."""
        try:
            source = _mark(tokenizer._template_source(tokenizer.template_name(template)))
        except UserError:  # rows that need the template report it
            return None
        specials = sorted({t["content"] for t in _added_tokens(tokenizer) if t.get("special")})
        may_go_on = any(b.startswith(a) for a, b in pairwise(specials))  # a token behind the mark
        return None if source is None or may_go_on else cls(tokenizer, source)

    def find_turns(
        self, messages: list[dict], trained: list[int]
    ) -> tuple[str, list[int], list[bool]] | None:
        """Text, cuts and closed as from the function find_turns(), or None if they are not certain."""
        if not trained or any(CLOSE in messages[i]["content"] for i in trained):
            return None
        try:
            text, ends = self._render(messages, False)
            if self.ask is None:
                asked, ends_asked = self._render(messages, True)
                self.ask = asked[ends_asked[len(messages) - 1] :]
        except (UserError, KeyError):
            return None
        cuts = []
        for i in trained:
            if i not in ends or i - 1 not in ends or not text.startswith(self.ask, ends[i - 1]):
                return None
            start, content = ends[i - 1] + len(self.ask), messages[i]["content"].strip()
            found = text.find(content, start, ends[i])
            if found < 0:
                return None
            close = _special_tokens(self.original).search(text, found + len(content), ends[i])
            if not close:
                return None
            cuts += [start, close.end()]
        return text, cuts, [True] * len(trained)

    def _render(self, messages: list[dict], ask: bool) -> tuple[str, dict[int, int]]:
        """The text, and where each message ends in it, for those of which that is certain."""
        watched, marked, index = Watched(messages), [], {id(m): i for i, m in enumerate(messages)}

        def mark_turn(message: dict) -> str:
            i = index.get(id(message), -1)
            marked.append(i if watched._seen[0] <= i else None)
            return MARK

        text = self.tokenizer.render(watched, ask, date_string=DATE, mark_turn=mark_turn)
        parts, ends, at = text.split(MARK), {}, 0
        if len(parts) == len(marked) + 1 and len(index) == len(messages):
            for part, i in zip(parts, marked, strict=False):
                at += len(part)
                ends[i] = at
        return "".join(parts), ends


@cache
def _mark(source: str) -> str | None:
    """A template's source with {{ mark_turn(message) }} at the end of its loop over the messages, or None if
    the template does not have the form that MarkedTemplate needs.
    """
    from jinja2 import Environment, TemplateSyntaxError, nodes

    # The last loop of the outermost level, and the tag that ends it.
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(source)
    except TemplateSyntaxError:
        return None
    depth, tag = 0, None
    for found in regex.finditer(r"\{%([-+]?)\s*(for|endfor)\b", source):
        depth += 1 if found[2] == "for" else -1
        tag = found if depth == 0 else tag
    places = [n for n, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if tag is None or not places:
        return None
    loop, rest = tree.body[places[-1]], nodes.Template(tree.body[places[-1] + 1 :])
    if not isinstance(loop.target, nodes.Name) or loop.else_ or loop.recursive:
        return None

    # The rest calls nothing and reads only add_generation_prompt, which nothing else reads, and fixed tokens.
    names, names_in_rest = list(tree.find_all(nodes.Name)), list(rest.find_all(nodes.Name))
    for name in names_in_rest:
        if name.ctx != "load" or name.name != "add_generation_prompt" and not name.name.endswith("_token"):
            return None
    changed = {n.name for n in names if n.ctx != "load"} | {m.name for m in tree.find_all(nodes.Macro)}
    asks, asks_in_rest = (
        sum(n.name == "add_generation_prompt" for n in some) for some in (names, names_in_rest)
    )
    if asks != asks_in_rest or changed & {n.name for n in names_in_rest} or any(rest.find_all(nodes.Call)):
        return None

    # The block opens as the tag does, so white space is treated alike. Without it the programs must be equal.
    block = "{%" + tag[1] + " if true %}{{ mark_turn(" + loop.target.name + ") }}{% endif %}"
    marked = source[: tag.start()] + block + source[tag.start() :]
    other = environment.parse(marked)
    other.body[places[-1]].body.pop()
    return marked if other == tree else None


# ---- tokens ------------------------------------------------------------------------------------------------


def encode_parts(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    """Ids of the parts of a text: together the ids of the whole text where the cuts fall between two of its
    tokens.

    Added tokens (<|im_end|>) divide the text into stretches that are encoded independently of each other. In
    a stretch where a cut falls inside a token, each part is encoded alone, as the prompt is when the model
    has to answer it.
    """
    borders = {0, len(text)}
    if _added_tokens_divide(tokenizer):
        borders |= {border for token in _raw_tokens(tokenizer).finditer(text) for border in token.span()}
    ordered, parts, done = sorted(borders), [[]], 0
    for cut in cuts:
        if cut < done:  # in a stretch that is encoded already
            continue
        begin = ordered[bisect(ordered, cut) - 1]  # the last border up to the cut
        if done < begin:
            parts[-1] += tokenizer.encode(text[done:begin])
        done = begin
        if cut == begin:
            parts.append([])
            continue
        done = ordered[bisect(ordered, cut)]
        inside = [c - begin for c in cuts if begin < c < done]
        head, *others = _encode_stretch(text[begin:done], inside, tokenizer)
        parts[-1] += head
        parts += others
    if done < len(text):
        parts[-1] += tokenizer.encode(text[done:])
    return parts


def _encode_stretch(text: str, cuts: list[int], tokenizer: Tokenizer) -> list[list[int]]:
    whole = tokenizer.encode(text)
    if len(cuts) > 1:
        alone = [tokenizer.encode(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]
        if sum(alone, []) == whole:
            return alone
    # SentencePiece begins each encoding with a space, so parts may differ although the cuts fall between
    # tokens.
    begun = [tokenizer.encode(text[:c]) for c in cuts]
    if all(whole[: len(b)] == b for b in begun):
        return [whole[a:b] for a, b in pairwise([0, *map(len, begun), len(whole)])]
    return [tokenizer.encode(text[a:b]) for a, b in pairwise([0, *cuts, len(text)])]


@cache
def _added_tokens_divide(tokenizer: Tokenizer) -> bool:
    """Whether the text behind an added token is encoded as if it stood alone."""
    token = next(
        _raw_tokens(tokenizer).finditer("".join(t["content"] for t in _added_tokens(tokenizer))), None
    )
    if token is None:
        return False
    a, b, whole = (tokenizer.encode(text) for text in ("a", token.group(), f"a{token.group()}a"))
    return len(b) == 1 and whole == a + b + a
