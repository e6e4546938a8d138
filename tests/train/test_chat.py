import dataclasses
import importlib.util
import json

import numpy as np
import pytest
import tokenizers

from jlora.train import chat, data, loading, models
from jlora.train.cli import main
from jlora.train.config import DataOptions
from jlora.train.tokenizers import Tokenizer, read_tokenizer

CHATML = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Like Llama 3: begins with BOS, trims what is said. `generation` is passed over.
HEADERS = (
    "{{- bos_token }}\n{%- for m in messages %}\n    {{- '<|im_start|>' + m['role'] + '\\n\\n' }}\n"
    "    {%- generation %}{{ m['content'] | trim + '<|im_end|>' }}{% endgeneration %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n\\n' }}{%- endif %}"
)
TEMPLATES = {"chatml": CHATML, "headers": HEADERS}
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]
CONVERSATION = [
    {"role": "user", "content": "Hi, wie geht’s?"},
    {"role": "assistant", "content": "Gut – 東京 🙂\n\n  and you?"},
    {"role": "user", "content": "assistant\nGut"},
    {"role": "assistant", "content": "ok"},
]


def make_tokenizer(template: str | None = CHATML) -> Tokenizer:
    """Bytes, the special tokens, and a last stage that takes white space out of the offsets, as in many files."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    return Tokenizer(inner, None, vocab["<|im_end|>"], 0, template, "<s>")


def learnt_texts(template: str, messages=CONVERSATION, max_length=400, **options) -> list[str]:
    """The runs of tokens that are targets."""
    tokenizer = make_tokenizer(template)
    dialogue = chat.ChatTemplate(tokenizer, "m").dialogue(chat.read_messages(messages, "f"))
    encoded = data.encode([dialogue], tokenizer, max_length, **options)
    runs, last = [], None
    for i in np.flatnonzero(encoded.mask[0]):
        runs = runs + [[]] if last is None or i != last + 1 else runs
        runs[-1].append(int(encoded.ids[0, i]))
        last = i
    return [tokenizer.inner.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(("template", "end"), [("chatml", "<|im_end|>\n"), ("headers", "<|im_end|>")])
def test_answers_and_nothing_else_are_learnt(template, end):
    said = [message["content"] for message in CONVERSATION if message["role"] == "assistant"]
    assert learnt_texts(TEMPLATES[template]) == [text + end for text in said]


def test_text_of_a_dialogue():
    dialogue = chat.ChatTemplate(make_tokenizer(HEADERS), "m").dialogue(chat.read_messages(CONVERSATION[:2], "f"))
    assert dialogue.prompt == "<s><|im_start|>user\n\nHi, wie geht’s?<|im_end|><|im_start|>assistant\n\n"
    assert dialogue.text == dialogue.prompt + "Gut – 東京 🙂\n\n  and you?<|im_end|>"
    assert dialogue.completion == CONVERSATION[1]["content"]


def test_what_was_learnt_in_tokens_of_a_prompt_is_what_generation_gets():
    tokenizer = make_tokenizer()
    dialogue = chat.ChatTemplate(tokenizer, "m").pair("2 + 2?", "4")
    encoded = data.encode([dialogue], tokenizer, 200)
    first = int(np.flatnonzero(encoded.mask[0])[0])
    assert encoded.ids[0, :first].tolist() == tokenizer.encode(dialogue.prompt)


def test_long_dialogues_are_cut_and_those_without_an_answer_left_out():
    tokenizer = make_tokenizer()
    render = chat.ChatTemplate(tokenizer, "m").dialogue
    dialogue = render(chat.read_messages(CONVERSATION, "f"))
    whole = data.encode([dialogue], tokenizer, 400)
    length = int(np.count_nonzero(whole.segment_ids))
    cut = data.encode([dialogue], tokenizer, length - 3)
    assert (cut.truncated, cut.dropped) == (1, 0) and cut.mask.sum() == whole.mask.sum() - 3
    before = len(tokenizer.encode(dialogue.text[: dialogue.spans[0][0]]))
    assert data.encode([dialogue, render(chat.read_messages(CONVERSATION[2:], "f"))], tokenizer, before).dropped == 1
    packed = data.encode([dialogue, dialogue], tokenizer, 2 * length, packing=True)
    assert packed.ids.shape[0] == 1 and packed.mask.sum() == 2 * whole.mask.sum()


def test_an_answer_at_the_very_beginning_has_nothing_to_predict_its_first_token():
    bare = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert learnt_texts(bare, [{"role": "assistant", "content": "abc"}]) == ["bc"]


FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
ALTERNATING = "{% if messages[0].role != 'user' %}{{ raise_exception('users speak first') }}{% endif %}"
BAD_TEMPLATES = {
    "earlier answers rewritten": (FORGETFUL, "message 2: the chat template of m writes the turns before it otherwise"),
    "refusal": (ALTERNATING, "refuses the roles assistant, user, assistant: users speak first"),
    "not jinja": ("{% for", "is not valid Jinja"),
    "outside the sandbox": ("{{ messages.__class__.__mro__ }}", "unsafe"),
}


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
def test_templates_that_do_not_serve(template, message):
    messages = CONVERSATION[1:] if template == ALTERNATING else CONVERSATION
    with pytest.raises(ValueError, match=message):
        chat.ChatTemplate(make_tokenizer(template), "m").dialogue(chat.read_messages(messages, "f"))


USER = {"role": "user", "content": "a"}
BAD_MESSAGES = {
    "missing role": ([USER, {"content": "b"}], "line 2, message 2 has no 'role': it has 'content'"),
    "missing content": ([{"role": "user"}], "line 2, message 1 has no 'content': it has 'role'"),
    "unknown role": (
        [USER, {"role": "bot", "content": "b"}],
        "the role 'bot'; known are system, user, assistant, tool",
    ),
    "empty": ([], "line 2: 'messages' is empty"),
    "no list": ("hello", "'messages' is 'hello'; wanted a list"),
    "no object": ([["user", "a"]], "message 1 is ['user', 'a']; wanted {'role'"),
    "content is no text": ([{"role": "user", "content": None}], "message 1 has the content None; wanted text"),
    "no answer": ([USER], "no message is of the role 'assistant', so there is nothing to learn: ['user']"),
}


@pytest.mark.parametrize(("messages", "message"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_bad_conversations_are_refused_before_any_step(messages, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": CONVERSATION}, {"messages": messages}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["finetune", "--data", "chat.jsonl"]) == 2
    error = capsys.readouterr().err
    assert message in error and "chat.jsonl, line 2" in error
    assert [path.name for path in tmp_path.iterdir()] == ["chat.jsonl"]


def chat_file(path, count=12):
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chat_model(stories, tmp_path_factory):
    """The bundled model with a chat template of plain characters."""
    path = tmp_path_factory.mktemp("chat") / "model"
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = dataclasses.replace(stories.tokenizer, chat_template=template)
    models.save_hf(dataclasses.replace(stories, optional_tokenizer=tokenizer), stories.params, path)
    return path


OPTIONS = "--steps 2 --batch-size 2 --max-length 96 --rank 2 --eval-batch-size 8 --max-new-tokens 4 --samples 1".split()


def test_a_chat_file_from_training_to_generation(chat_model, compile_once, tmp_path, capsys):
    run = tmp_path / "run"
    file = chat_file(tmp_path / "chat.jsonl")
    metrics = ["--metrics", "exact-match", "rouge"]
    assert main(["finetune", "--model", str(chat_model), "--data", file, *OPTIONS, *metrics, "--out", str(run)]) == 0
    saved = json.loads((run / "config.json").read_text())
    assert saved["options"]["data"]["chat_template"] == "auto"
    after = json.loads((run / "results.json").read_text())["after"]
    assert {"exact_match", "rouge1", "rouge2", "rougeL"} <= after.keys() and "bleu" not in after
    sample = json.loads((run / "completions.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].startswith("user: say ") and sample["prompt"].endswith("\nassistant: ")
    assert sample["references"][0].startswith("It is ")
    capsys.readouterr()
    assert main(["evaluate", "--run", str(run), "--max-new-tokens", "4", *metrics]) == 0
    assert f"exact match {after['exact_match']:.4f}" in capsys.readouterr().out


def test_prompts_and_completions_go_through_the_template_when_asked(chat_model, tiny_data, tmp_path, capsys):
    model = models.load(chat_model)
    pairs = [data.Example("say 1", "It is 1.")]
    plain, asked = (loading.render(pairs, DataOptions(chat_template=mode), model) for mode in ("none", "auto"))
    assert plain == pairs and asked[0].text == "user: say 1\nassistant: It is 1.\n"
    ids = loading.asked(["say 1"], DataOptions(chat_template="auto"), model)
    assert model.tokenizer.decode(ids[0]) == asked[0].prompt
    assert main(["generate", "--prompt", "a", "--chat-template", "auto"]) == 2
    assert "stories260k has no chat template" in capsys.readouterr().err
    assert main(["finetune", "--data", str(tiny_data), "--chat-template", "auto", "--out", str(tmp_path / "r")]) == 2
    assert "stories260k has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


NAMED = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]


@pytest.mark.parametrize("form", ["entry", "list", "file"])
def test_where_templates_are_found(form, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert content["chat_template"] == CHATML
    content["chat_template"] = {"entry": CHATML, "list": NAMED, "file": None}[form]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert read_tokenizer(tmp_path, {}).chat_template == CHATML


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="wants transformers")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_texts_are_those_of_transformers(template):
    import transformers

    ours = make_tokenizer(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=ours.inner, chat_template=template, bos_token="<s>", eos_token="<|im_end|>", pad_token="<s>"
    )
    render = chat.ChatTemplate(ours, "m").render
    for messages in (CONVERSATION, CONVERSATION[:1], [{"role": "system", "content": "{{ x }}"}, *CONVERSATION]):
        for answer in (False, True):
            want = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
            assert render(messages, answer) == want
