"""Preferences: the loss by its formula, what is read and scored, and a run that learns them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_chat import CHATML, make_tokenizer

import jlora
from jlora.io import load_peft
from jlora.train import data as files
from jlora.train.call import Call
from jlora.train.cli import main
from jlora.train.config import DataOptions, EvalOptions
from jlora.train.tasks.dpo import DPO, Preference, read_preferences

VOCAB = 7
RANDOM = np.random.default_rng(0)


def table(variables, ids, positions, segment_ids):
    """A model that one can see through: the logits after a token are its row of a matrix."""
    return variables["params"]["kernel"][ids]


def batch_of(pairs: int = 3, length: int = 6) -> dict[str, np.ndarray]:
    ids = RANDOM.integers(0, VOCAB, (pairs, 2, length)).astype(np.int32)
    mask = np.zeros(ids.shape, np.float32)
    for n in range(pairs):
        mask[n, 0, 2 : 4 + n % 3] = mask[n, 1, 2 : 6 - n % 2] = 1
    return {"ids": ids, "mask": mask, "positions": 0 * ids, "segment_ids": 0 * ids + 1}


BATCH = batch_of()
BASE, POLICY = RANDOM.normal(size=(2, VOCAB, VOCAB))


def written(policy, base, beta: float, smoothing: float, free: bool = False) -> float:
    """The summed loss, token by token in float64."""
    log_probs = lambda w: w - np.log(np.exp(w).sum(1, keepdims=True))
    policy, base = log_probs(policy), log_probs(base)
    total = 0.0
    for pair, masks in zip(BATCH["ids"], BATCH["mask"], strict=True):
        reward = []
        for ids, mask in zip(pair, masks, strict=True):
            tokens = [t for t in range(1, len(ids)) if mask[t]]
            ours, theirs = (sum(w[ids[t - 1], ids[t]] for t in tokens) for w in (policy, base))
            reward.append(beta * (ours - (0.0 if free else theirs)))
        right = 1 / (1 + np.exp(reward[1] - reward[0]))
        total -= (1 - smoothing) * np.log(right) + smoothing * np.log(1 - right)
    return total


def call_of(policy, base) -> Call:
    return Call(table, {"kernel": jnp.asarray(policy)}, {"kernel": jnp.asarray(base)})


@pytest.mark.parametrize("beta, smoothing, free", [(0.1, 0.0, False), (0.7, 0.2, False), (0.5, 0.0, True)])
def test_loss_by_the_formula(x64, beta, smoothing, free):
    task = DPO(DataOptions(task="dpo", dpo_beta=beta, label_smoothing=smoothing, reference_free=free))
    filler = {name: np.concatenate([values, values[:1]]) for name, values in BATCH.items()}
    filler["mask"][-1] = 0
    loss = jax.jit(jax.value_and_grad(lambda *w, batch: task.loss(call_of(*w), batch, None), (0, 1), has_aux=True))
    for batch in (filler, BATCH):  # a row that fills up the batch has no part in it
        (value, count), (got, of_base) = loss(POLICY, BASE, batch=batch)
        assert count == 3
        np.testing.assert_allclose(value, written(POLICY, BASE, beta, smoothing, free), rtol=1e-5)
    step = np.zeros_like(POLICY)
    for i, j in [(0, 1), (3, 3), (6, 2), tuple(BATCH["ids"][0, 0, 1:3])]:
        step[i, j] = 1e-5
        sides = [written(POLICY + s * step, BASE, beta, smoothing, free) for s in (1, -1)]
        np.testing.assert_allclose(got[i, j], (sides[0] - sides[1]) / 2e-5, rtol=1e-3, atol=1e-5)
        step[i, j] = 0
    assert not np.any(of_base)


def test_where_there_is_no_gradient(x64):
    """Of logits that predict a prompt or padding; of a pair of equal completions; of one nobody is sure about."""
    loss = lambda w, batch, task: task.loss(call_of(w, BASE), batch, None)[0]
    gradient = lambda task, batch, at: jax.jit(jax.grad(loss), static_argnums=2)(at, batch, task)
    task = DPO(DataOptions(task="dpo"))
    one = {name: values[:1] for name, values in BATCH.items()}
    scored = {int(i) for i in one["ids"][..., :-1][one["mask"][..., 1:] > 0]}  # tokens before those that are learnt
    found = gradient(task, one, POLICY)
    assert len(scored) < VOCAB and {i for i in range(VOCAB) if np.any(found[i])} == scored
    alike = {name: np.repeat(values[:, :1], 2, axis=1) for name, values in BATCH.items()}
    np.testing.assert_allclose(gradient(task, alike, POLICY), 0, atol=1e-7)
    unsure = dataclasses.replace(DataOptions(task="dpo"), label_smoothing=0.5)
    np.testing.assert_allclose(gradient(DPO(unsure), BATCH, BASE), 0, atol=1e-7)


def test_the_reference_is_the_base_itself(stories):
    """Of an adapter that was trained, of one over a quantized base, and of weights that were trained as they are."""
    ids = np.array([[1, 5, 9, 3]], np.int32)
    inputs = ids, np.arange(4, dtype=np.int32)[None], np.ones_like(ids)
    plain = jax.jit(stories.module.apply)({"params": stories.params}, *inputs)
    apply = jax.jit(jlora.lift(stories.module.apply))
    usage = jlora.usage(lambda p, *x: stories.module.apply({"params": p}, *x), stories.params, *inputs)
    for method in (jlora.LoRA(2), jlora.Full()):
        adapted = jlora.adapt(stories.params, method, "**/q_proj/kernel", usage=usage, key=jax.random.key(0))
        moved = jax.tree.map(lambda x: x + 0.3, adapted.trainable)
        call = Call(apply, adapted.bind(moved), adapted.base)
        np.testing.assert_array_equal(call.reference(*inputs), plain)
        assert np.abs(call(*inputs) - plain).max() > 0.01
    quantized = jlora.quant.quantize(stories.params, jlora.quant.Int8, usage=usage)
    adapted = jlora.adapt(quantized, jlora.LoRA(2), "**/q_proj/kernel", usage=usage, key=jax.random.key(0))
    call = Call(apply, adapted.bind(), adapted.base)
    np.testing.assert_allclose(call.reference(*inputs), call(*inputs), atol=1e-5)


def pair_of(prompt: str, *completions: str) -> Preference:
    return Preference(*(files.Example(prompt, text) for text in completions))


PAIRS = [
    pair_of("the cat =", "The cat sat.", "No."),
    pair_of("the cat =", "Yes.", "The cat ran to the park and sat on a big ball, and it was very very happy."),
]


def test_rows(stories):
    task, data = DPO(DataOptions(task="dpo")), DataOptions(task="dpo", max_length=24)
    rows = task.encode(PAIRS, data, stories)
    assert {name: values.shape for name, values in rows.fields.items()} == dict.fromkeys(
        ("ids", "mask", "positions", "segment_ids"), (2, 2, 24)
    )
    assert rows.truncated == 1 and rows.dropped == 0 and rows.lengths.tolist()[1] == 24
    decode = lambda n, side: stories.tokenizer.decode(rows.fields["ids"][n, side][rows.fields["mask"][n, side] > 0])
    assert decode(0, 0).strip() == "The cat sat." and decode(0, 1).strip() == "No."
    long = pair_of("the cat " * 20, "a", "b")
    assert len(task.encode([*PAIRS, long], data, stories)) == 2
    assert task.encode([*PAIRS, long], data, stories).dropped == 1
    with pytest.raises(ValueError, match="none of the 1 pairs leaves a token"):
        task.encode([long], data, stories)


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


REFUSED = {
    "no column": ({"prompt": "a", "chosen": "b"}, r"line 1: no column 'rejected', found \['prompt', 'chosen'\]"),
    "empty": ({"prompt": "a", "chosen": "", "rejected": "c"}, "line 1: column 'chosen' is empty"),
    "blank": ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "column 'rejected' is ' .n', wanted text"),
    "no text": ({"prompt": "a", "chosen": 3, "rejected": "c"}, "column 'chosen' is 3, wanted text"),
    "the same": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same, which prefers nothing"),
    "no answer": (
        {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]},
        "column 'chosen': no message is of the role 'assistant'",
    ),
    "other prompts": (
        {s: [{"role": "user", "content": s}, {"role": "assistant", "content": s}] for s in ("chosen", "rejected")},
        "the messages before the last answer differ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("row, message", REFUSED.values(), ids=REFUSED)
def test_records_that_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_preferences(write(tmp_path / "prefs.jsonl", row), DataOptions(task="dpo"))


@pytest.mark.parametrize("kind", ["text prompt", "prompt of messages", "prompt in the lists", "texts by a template"])
def test_conversations(kind, stories, tmp_path):
    """Three ways to write one; only the last answer is scored."""
    user, *answers = [{"role": "user", "content": "Hi"}, *({"role": "assistant", "content": c} for c in ("yes", "no"))]
    prompt = {"text prompt": "Hi", "prompt of messages": [user], "texts by a template": "Hi"}.get(kind)
    sides = [[answer] if prompt else [user, answer] for answer in answers]
    if kind == "texts by a template":
        sides = ["yes", "no"]
    path = write(tmp_path / "prefs.jsonl", {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    model = dataclasses.replace(stories, optional_tokenizer=make_tokenizer(CHATML))
    data = DataOptions(task="dpo", data=path, eval_data=path, max_length=200, chat_template="auto")
    task = DPO(data)
    rows = task.encode(task.read(data, "", 0)[1], data, model)
    for side, word in enumerate(("yes", "no")):
        scored = rows.fields["ids"][0, side][rows.fields["mask"][0, side] > 0]
        assert model.tokenizer.inner.decode(scored, skip_special_tokens=False) == f"{word}<|im_end|>\n"
    held_out = task.hold_out(task.read(data, "", 0)[2], data, model, EvalOptions(max_new_tokens=8))
    assert held_out.prompts[0].endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    rows = [
        {"question": f"{a} {n} =", "chosen": f"The {a} has {n} balls.", "rejected": f"{n} {a} ran."}
        for a in ("cat", "dog", "bird", "fish")
        for n in range(8)
    ]
    return write(tmp_path_factory.mktemp("data") / "prefs.jsonl", *rows)


def test_a_run_learns(preferences, tmp_path, capsys, stories):
    out = tmp_path / "run"
    options = f"--task dpo --data {preferences} --prompt-column question --steps 12 --batch-size 4 --rank 2 --seed 1 "
    options += f"--dpo-beta 0.2 --eval-every 6 --log-every 6 --max-new-tokens 4 --samples 1 --out {out}"
    assert main(["finetune", *options.split()]) == 0
    results = json.loads((out / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["eval_loss"] == pytest.approx(np.log(2), abs=1e-4) and before["reward_accuracy"] == 0.5
    assert after["eval_loss"] < 0.5 and after["reward_accuracy"] == 1.0
    assert after["reward_margin"] > 0.5
    assert after["reward_margin"] == pytest.approx(after["chosen_reward"] - after["rejected_reward"])
    assert results["samples"][0].keys() == {"prompt", "before", "after"}
    assert json.loads((out / "config.json").read_text())["options"]["optimizer"]["learning_rate"] == 1e-3
    assert "share with the chosen ahead | 0.5000 | 1.0000" in (out / "README.md").read_text()
    load_peft(out / "adapter", stories.params)
    capsys.readouterr()
    assert main(["evaluate", "--run", str(out), "--no-generate"]) == 0
    assert f"reward margin {after['reward_margin']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        ("--task dpo", "--task dpo wants --data: a file with the columns 'prompt', 'chosen' and 'rejected'"),
        ("--task dpo --data FILE --packing", "--packing is for --task causal-lm"),
        ("--task dpo --data FILE --dpo-beta 0", "--dpo-beta must be above 0"),
        ("--task dpo --data FILE", "no column 'prompt', found ['question', 'chosen', 'rejected']"),
        ("--data FILE --label-smoothing 0.1", "--label-smoothing is for --task dpo"),
    ],
)
def test_refused_options(options, message, preferences, tmp_path, capsys):
    assert main(["finetune", *options.replace("FILE", preferences).split(), "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
