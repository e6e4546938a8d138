import jax
import numpy as np
import pytest

from jlora.train.generate import generate

BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high."
)


@pytest.fixture(scope="module")
def run(stories):
    """generate() for the bundled model, always with the same function so that compilations are shared."""
    apply = stories.module.apply

    def call(prompts, **options):
        options = {"max_new_tokens": 80, "eos_id": 1, "batch_size": 8} | options
        return generate(apply, stories.params, prompts, config=stories.config, **options)

    return call


@pytest.fixture(scope="module")
def prompts(stories):
    texts = ["One day, a boy", "The", "Lily wanted to play with her red ball, but her mom said no. Then", "\n", "Tim"]
    return [[1, *stories.tokenizer.encode(text)] for text in texts]


def greedy_without_cache(stories, stories_logits, prompt, steps):
    ids = list(prompt)
    while len(ids) < len(prompt) + steps:
        row = np.zeros((1, 128), np.int32)  # padded on the right: one compilation, and what comes after is not seen
        row[0, : len(ids)] = ids
        token = int(np.argmax(stories_logits(stories.params, row)[0, len(ids) - 1]))
        if token == 1:
            break
        ids.append(token)
    return ids[len(prompt) :]


def test_greedy_story_is_the_documented_one(stories, run):
    assert stories.tokenizer.decode(run([[1]])[0]).startswith(BEGINNING)


def test_cached_batch_equals_uncached_greedy(stories, stories_logits, run, prompts):
    got = run(prompts)
    assert got == [greedy_without_cache(stories, stories_logits, prompt, 80) for prompt in prompts]


def test_result_does_not_depend_on_the_batching(run, prompts):
    many = prompts * 3
    assert run(many) == run(many, batch_size=4)
    assert run([]) == []


def test_text_stops_before_its_end_token(run):
    first = run([[1]])[0]
    stop = first[20]
    assert run([[1]], eos_id=stop)[0] == first[: first.index(stop)]
    assert run([[1]], eos_id=(511, stop))[0] == first[: first.index(stop)]
    assert len(run([[1]], eos_id=None)[0]) == 80


def test_drawing_is_reproducible_and_each_prompt_has_its_own_stream(run):
    key = jax.random.key(3)
    options = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 16}
    four = run([[1]] * 4, key=key, **options)
    assert four == run([[1]] * 4, key=key, batch_size=1, **options)
    assert len({tuple(text) for text in four}) > 1
    assert four != run([[1]] * 4, key=jax.random.key(4), **options)


def test_small_nucleus_is_greedy(run):
    drawn = run([[1]], temperature=1.0, top_p=1e-6, key=jax.random.key(0), max_new_tokens=16)
    assert drawn[0] == run([[1]])[0][:16]


def test_draws_follow_the_distribution(stories, stories_logits, run):
    prompt = [1, *stories.tokenizer.encode("Once upon a time, there was a little")]
    ids = np.zeros((1, 66), np.int32)
    ids[0, : len(prompt)] = prompt
    logits = np.asarray(stories_logits(stories.params, ids))[0, len(prompt) - 1]
    probability = np.asarray(jax.nn.softmax(logits / 2.0))
    drawn = run([prompt] * 4096, temperature=2.0, key=jax.random.key(0), max_new_tokens=1, eos_id=None, batch_size=4096)
    frequency = np.bincount([tokens[0] for tokens in drawn], minlength=512) / 4096
    np.testing.assert_allclose(frequency, probability, atol=5 * np.sqrt(0.25 / 4096))
    assert abs(frequency - probability).sum() < 0.2


def test_one_compilation_per_bucket(stories, prompts):
    traces = 0

    def apply(*args):
        nonlocal traces
        traces += 1
        return stories.module.apply(*args)

    options = {"config": stories.config, "max_new_tokens": 4, "batch_size": 4}
    for part in (prompts[:3], prompts[1:4], [[1]] * 4):
        generate(apply, stories.params, part, **options)
    assert traces == 2  # filling the cache, and one step


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "prompt 0 has 0 tokens"),
        ([[1], [5] * 440], {}, "prompt 1 has 440 tokens; with max_new_tokens=80 .* of 512 positions takes 1 to 432"),
        ([[1]], {"temperature": 1.0}, "needs a key"),
        ([[1]], {"temperature": -1.0}, "temperature >= 0"),
        ([[1]], {"top_p": 0.0}, "0 < top_p <= 1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens >= 1"),
    ],
)
def test_requests_that_make_no_sense(run, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        run(prompts, **options)
