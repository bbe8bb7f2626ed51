"""Chat templates: the programs in Jinja's language that write a conversation as text.

A checkpoint brings its own, in tokenizer_config.json or in files beside it. TEMPLATES are for base models
without one.
"""

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache
from pathlib import Path

from infra.config import UserError

FOLDER = "additional_chat_templates"  # where transformers keeps those that are not the default

# bos_token is empty where the tokenizer puts none in front of a text.
TEMPLATES = {
    # "plain" needs no special token but the eos that ends an answer. The space before an answer belongs to
    # the answer, since words carry their space.
    "plain": """{{ bos_token }}{% for m in messages -%}
        {{ {"user": "User: ", "assistant": "Assistant: "}.get(m.role, "") + m.content }}
        {{- eos_token if m.role == "assistant" }}{{ "\n" }}
    {%- endfor %}{{ "Assistant:" if add_generation_prompt }}""",
    "chatml": """{{ bos_token }}{% for m in messages -%}
        {{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}
    {%- endfor %}{{ "<|im_start|>assistant\n" if add_generation_prompt }}""",
    "zephyr": """{{ bos_token }}{% for m in messages -%}
        {{ {"user": "<|user|>", "assistant": "<|assistant|>"}.get(m.role, "<|" + m.role + "|>") }}
        {{- "\n" + m.content + eos_token + "\n" }}
    {%- endfor %}{{ "<|assistant|>\n" if add_generation_prompt }}""",
}


def read_templates(dir: Path) -> dict[str, str]:
    """Chat templates that newer checkpoints keep in files of their own, by name."""
    files = {p.stem: p for p in sorted((dir / FOLDER).glob("*.jinja"))}
    if (dir / "chat_template.jinja").exists():
        files["default"] = dir / "chat_template.jinja"
    templates = {}
    for name, path in files.items():
        try:
            templates[name] = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"{path}: cannot be read ({e})") from None
    return templates


def own_templates(config: dict) -> dict[str, str]:
    """The chat templates of a tokenizer_config.json, by name."""
    own = config.get("chat_template") or {}
    try:
        templates = {"default": own} if isinstance(own, str) else {t["name"]: t["template"] for t in own}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(t, str) for t in (*templates, *templates.values())):
        raise UserError("tokenizer_config.json: chat_template must be a text or a list of {name, template}")
    return templates


def named_tokens(config: dict) -> dict[str, str]:
    """The tokens that tokenizer_config.json names, such as bos_token: each a text or an object with its
    content.
    """
    tokens = {k: v for k, v in config.items() if k.endswith("_token") and isinstance(v, str | dict)}
    for key, value in tokens.items():
        tokens[key] = value.get("content") if isinstance(value, dict) else value
        if not isinstance(tokens[key], str):
            rule = "must be a text or have a text 'content'"
            raise UserError(f"tokenizer_config.json: {key} = {value!r}: {rule}")
    return tokens


def choose_template(config: dict, template: str) -> str:
    """The name that `template` stands for: auto is the checkpoint's "default", or "plain" if it has none."""
    own = own_templates(config)
    if template == "auto" and own and "default" not in own:
        raise UserError(f"template = 'auto': no chat template is the default; choose one of {', '.join(own)}")
    name = template if template != "auto" else "default" if own else "plain"
    if name not in own and name not in TEMPLATES:
        raise UserError(
            f"template = {template!r}: no such chat template; there are {', '.join(own | TEMPLATES)}"
        )
    return name


def template_source(config: dict, name: str, bos: str, eos: str) -> str:
    """Jinja source of a template. A built-in one sets its tokens itself, so any program renders it alike."""
    own = own_templates(config)
    if name in own:
        return own[name]
    tokens = (("bos_token", bos), ("eos_token", eos))
    lines = [f"{{%- set {key} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for key, text in tokens]
    return "".join(lines) + TEMPLATES[name]


@cache
def compile_template(source: str) -> Callable[..., str]:
    """A chat template as a function of its variables, in the environment transformers gives to templates."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the text to train on for TRL. Here it only has to be parsed."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source).render
