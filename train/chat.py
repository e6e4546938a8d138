"""Conversations as the text that a chat model was taught them in, and where in it the answers stand.

A chat template is a Jinja program that comes with the model's tokenizer: from messages [{role, content}, ...] it makes
one text, with whatever marks the turns. It is run in a sandbox, as it came with a download. Only answers are learnt; to
find them, the beginnings of the conversation are rendered, each with the mark of a turn that the model is to write.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
import jinja2.sandbox

from jlora.train.tokenizers import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
Message = dict[str, str]


class Conversation(NamedTuple):
    """Messages, and where they were read: "chat.jsonl, line 7"."""

    messages: tuple[Message, ...]
    where: str

    @property
    def prompt(self) -> str:
        """What comes before the last answer, as a text by which to tell conversations apart."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "assistant")
        return json.dumps(self.messages[:last])


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation as text. What is learnt are the `spans` of it (start, end), one for each answer.

    `prompt` is the text up to the last answer, as generation gets it, and `completion` that answer.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    prompt: str
    completion: str


def read_messages(messages: Any, where: str) -> Conversation:
    """A conversation from a record, or an error that says what is wrong with it."""
    if not isinstance(messages, list) or not messages:
        what = "empty" if messages == [] else f"{messages!r}"
        raise ValueError(f"{where}: 'messages' is {what}; wanted a list of {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        place = f"{where}, message {i + 1}"
        if not isinstance(message, dict):
            raise ValueError(f"{place} is {message!r}; wanted {{'role': ..., 'content': ...}}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f"{place} has no {key!r}: it has {', '.join(map(repr, message)) or 'nothing'}")
        if message["role"] not in ROLES:
            raise ValueError(f"{place} has the role {message['role']!r}; known are {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise ValueError(f"{place} has the content {message['content']!r}; wanted text")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise ValueError(f"{where}: no message is of the role 'assistant', so there is nothing to learn: {roles}")
    return Conversation(tuple(messages), where)


class ChatTemplate:
    """The template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, name: str):
        """`name` of the model is for errors."""
        if tokenizer.chat_template is None:
            raise ValueError(
                f"{name} has no chat template (chat_template in tokenizer_config.json, chat_template.jinja, or "
                "tokenizer.chat_template of a GGUF file): it is no chat model, or the file was left behind. Give "
                "prompts and completions instead of messages, without --chat-template"
            )
        self._name = name
        try:
            self._template = _environment().from_string(tokenizer.chat_template)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of {name} is not valid Jinja: {error}") from error
        ids = {"eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
        named = {key: "" if i is None else tokenizer.inner.id_to_token(i) for key, i in ids.items()}
        self._tokens = {"bos_token": tokenizer.bos_token or "", **named}

    def render(self, messages: Sequence[Message], answer: bool = False) -> str:
        """The text of a conversation; with `answer`, up to where the model is to go on."""
        try:
            return self._template.render(messages=list(messages), add_generation_prompt=answer, **self._tokens)
        except jinja2.TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"the chat template of {self._name} refuses the roles {roles}: {error}") from error

    def prompt(self, text: str) -> str:
        """What a user says, up to where the model is to answer."""
        return self.render([{"role": "user", "content": text}], answer=True)

    def dialogue(self, conversation: Conversation) -> Dialogue:
        """A conversation as text with its answers marked.

        An answer is what the text of the turns up to it has more than that of the turns before it, rendered up to where
        the model is to go on: the words, and whatever ends the turn. Templates that write earlier turns otherwise once
        later ones have come do not allow that, which is an error.
        """
        messages, where = conversation
        try:
            whole = self.render(messages)
            spans = []
            for i, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                before, after = self.render(messages[:i], answer=True), self.render(messages[: i + 1])
                for text, longer, when in ((before, after, "the answer"), (after, whole, "the later turns")):
                    if not longer.startswith(text):
                        raise ValueError(
                            f"message {i + 1}: the chat template of {self._name} writes the turns before it otherwise "
                            f"once {when} came, {_difference(text, longer)}, so that the answer cannot be told from "
                            "them; make each answer the last of a conversation of its own, or render the text yourself"
                        )
                spans.append((len(before), len(after)))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return Dialogue(whole, tuple(spans), whole[: spans[-1][0]], messages[last]["content"])

    def pair(self, prompt: str, completion: str) -> Dialogue:
        """A prompt and its completion as the turns of a user and the model."""
        messages = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
        return self.dialogue(Conversation(messages, f"prompt {prompt[:40]!r}"))


def rendered(examples: Sequence[Any], tokenizer: Tokenizer, name: str, pairs: bool) -> Sequence[Any]:
    """The examples with dialogues in the place of conversations; with `pairs`, of prompts and completions, too.

    `name` is that of the model. Plain texts stay as they are.
    """
    chosen = [isinstance(e, Conversation) or (pairs and bool(e.prompt)) for e in examples]
    if not any(chosen):
        return examples
    template = ChatTemplate(tokenizer, name)

    def render(example: Any) -> Dialogue:
        is_chat = isinstance(example, Conversation)
        return template.dialogue(example) if is_chat else template.pair(example.prompt, example.completion)

    return [render(e) if change else e for e, change in zip(examples, chosen, strict=True)]


def encode(dialogue: Dialogue, tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Token ids of a dialogue, and which of them are learnt: those with a character in one of its spans."""
    ids, offsets = tokenizer.encode_spans(dialogue.text)
    learnt = [any(start < stop and end > begin for begin, stop in dialogue.spans) for start, end in offsets]
    return ids, learnt


def _difference(text: str, longer: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, longer, strict=False)) if a != b), min(len(text), len(longer)))
    return f"{longer[at : at + 20]!r} in place of {text[at : at + 20]!r}"


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, by which some templates mark answers: what is inside."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        parser.stream.skip()
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> jinja2.Environment:
    """What templates of the Hugging Face Hub may use."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment
