"""Whoever comes and goes, each is answered as if alone."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pplug_jax import Personalizer
from pplug_jax.errors import InputError
from pplug_jax.llm import LLM
from pplug_jax.llm.decoder import Context
from pplug_jax.runtime.mesh import make_mesh, place
from pplug_jax.serve.engine import Busy, Finished, Sampling, Token, Unwell, tokens_of
from pplug_jax.serve.engine.jax_engine import JaxEngine
from tests.support.engines import (
    CASES,
    LLAMA,
    LONGEST,
    SLOTS,
    Reader,
    T,
    alone,
    answer_of,
    engine_of,
    llm_of,
    prompt,
)
from tests.support.tiny import ONE_DEVICE

ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 15),  # the prompt
        st.integers(1, T),  # its most tokens
        st.sampled_from([0, 1, 2, 5, T + 1, T + 1, T + 1]),  # tokens after which they leave
        st.sampled_from([0, 0, 0, 0.001, 0.005]),  # seconds before they come
        st.sampled_from([0.0, 0.0, 1.0]),  # temperature
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arrivals=ARRIVALS)
def test_any_interleaving_answers_as_alone(family: str, arrivals: list[tuple]) -> None:
    engine = engine_of(family)
    readers = []
    for seed, max_tokens, leaves_after, pause, temperature in arrivals:
        time.sleep(pause)
        sampling = {"max_tokens": max_tokens, "temperature": temperature}
        readers.append(Reader(engine, prompt(engine.llm, seed), leaves_after, **sampling))
    for reader, (seed, max_tokens, leaves_after, _, temperature) in zip(
        readers, arrivals, strict=True
    ):
        reader.wait()
        if temperature:
            continue
        expected = alone(family, seed)
        if reader.reason == "cancelled":
            assert len(reader.tokens) >= leaves_after
            assert reader.tokens == expected[: len(reader.tokens)]
            continue
        assert reader.tokens == expected[:max_tokens]
        assert reader.reason == ("length" if len(expected) >= max_tokens else "stop")
    assert engine.running == engine.waiting == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gemma3_text", "t5"])
def test_the_prompts_differ_and_some_answers_end(family: str) -> None:
    """Or the test above would show little."""
    answers = [alone(family, seed) for seed in range(16)]
    assert len(set(map(tuple, answers))) > 8


@pytest.mark.slow
@pytest.mark.parametrize(("axes", "own_rows"), [((8, 1, 1), 0), ((2, 2, 2), 3)])
def test_several_devices_answer_as_one(axes: tuple[int, int, int], own_rows: int) -> None:
    mesh = make_mesh(*axes)
    limits = {"longest_prompt": LONGEST, "max_new_tokens": T, "slots": SLOTS, "own_rows": own_rows}
    engine = JaxEngine(place(llm_of(LLAMA), mesh), mesh, **limits)
    readers = [Reader(engine, prompt(engine.llm, seed)) for seed in range(12)]
    for seed, reader in enumerate(readers):
        assert reader.wait().tokens == alone(LLAMA, seed)
    engine.close()


@pytest.mark.slow
def test_draws_depend_on_the_seed_alone() -> None:
    engine = engine_of(LLAMA)

    def draw(seed: int, **sampling: Any) -> list[int]:
        return (
            Reader(engine, prompt(engine.llm, 3), temperature=1.5, seed=seed, **sampling)
            .wait()
            .tokens
        )

    drawn = [draw(seed) for seed in range(6)]
    assert len(set(map(tuple, drawn))) > 3
    beside = [
        Reader(engine, prompt(engine.llm, seed), temperature=1.0, seed=seed) for seed in range(20)
    ]
    again = [Reader(engine, prompt(engine.llm, 3), temperature=1.5, seed=seed) for seed in range(6)]
    assert [reader.wait().tokens for reader in again] == drawn
    for reader in beside:
        reader.wait()
    greedy = alone(LLAMA, 3)
    assert draw(0, top_p=1e-6) == greedy
    assert Reader(engine, prompt(engine.llm, 3), temperature=1e-3).wait().tokens == greedy


def test_draws_have_the_probabilities_that_the_llm_gives() -> None:
    from pplug_jax.serve.engine.slots import choose

    probabilities = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    logits = np.tile(
        np.log(probabilities, where=probabilities > 0, out=np.full(5, -np.inf)), (4000, 1)
    )
    many = np.ones(4000, np.float32)
    seeds, none = np.arange(4000, dtype=np.int32), np.zeros(4000, np.int32)
    for temperature, top_p, expected in (
        (1.0, 1.0, probabilities),
        (1.0, 0.7, np.array([0.5, 0.3, 0, 0, 0]) / 0.8),
        (0.5, 1.0, probabilities**2 / (probabilities**2).sum()),
        (0.0, 1.0, np.eye(5)[0]),
    ):
        token, log_probability = jax.jit(choose)(
            logits.astype(np.float32), temperature * many, top_p * many, seeds, none
        )
        found = np.bincount(token, minlength=5) / 4000
        np.testing.assert_allclose(found, expected, atol=0.03)
        np.testing.assert_allclose(np.exp(log_probability), probabilities[token], rtol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_asked() -> None:
    engine = engine_of(LLAMA)
    size = engine.llm.config.hidden_size
    with pytest.raises(InputError, match="the prompt has 21 tokens, and this server takes 20"):
        engine.submit(np.zeros((21, size)), Sampling(1), print)
    for count in (0, T + 1):
        with pytest.raises(InputError, match=f"max_tokens must be from 1 to {T}, not {count}"):
            engine.submit(np.zeros((1, size)), Sampling(count), print)


@pytest.fixture
def own() -> Iterator[Callable[..., JaxEngine]]:
    """An engine that a test may end."""
    made = []

    def make(family: str = LLAMA, **limits: Any) -> JaxEngine:
        limits = {"longest_prompt": LONGEST, "max_new_tokens": T, "slots": 2} | limits
        made.append(JaxEngine(llm_of(family), ONE_DEVICE, **limits))
        return made[-1]

    yield make
    for engine in made:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in CASES if family != "t5"])
def test_what_prompts_begin_with_is_read_once(own: Callable[..., JaxEngine], family: str) -> None:
    engine = own(family, own_rows=3)
    reads: list[int] = []
    read = engine._programs.read

    def counted(llm: LLM, rows: np.ndarray, mask: np.ndarray) -> Context:
        reads.append(int(mask.sum()))
        return read(llm, rows, mask)

    engine._programs = engine._programs._replace(read=counted)
    rng, size = np.random.default_rng(0), engine.llm.config.hidden_size
    prompts = [prompt(engine.llm, seed) for seed in range(5)]  # some are shorter than 3 rows
    shared = rng.normal(size=(LONGEST - 3, size)).astype(np.float32)
    prompts += [np.concatenate([shared, rng.normal(size=(3, size))]) for _ in range(4)]
    readers = [Reader(engine, rows) for rows in prompts]
    for rows, reader in zip(prompts, readers, strict=True):
        assert reader.wait().tokens == answer_of(family, rows)
    assert reads.count(LONGEST - 3) == 1 + sum(len(rows) == LONGEST for rows in prompts[:5])


@pytest.mark.slow
def test_too_many_are_refused_and_an_ending_engine_finishes(own: Callable[..., JaxEngine]) -> None:
    engine = own(waiting=3)
    held, go_on = threading.Event(), threading.Event()

    def hold(event: Token | Finished) -> None:
        held.set()
        go_on.wait(60)

    engine.submit(prompt(engine.llm, 0), Sampling(2), hold)
    assert held.wait(60)  # the engine's thread stands still
    waiting = [Reader(engine, prompt(engine.llm, seed)) for seed in range(3)]
    assert engine.waiting == 3
    with pytest.raises(Busy, match="3 requests wait already; try again later"):
        Reader(engine, prompt(engine.llm, 4))
    ending = threading.Thread(target=engine.close)
    ending.start()
    while not engine._ending:
        time.sleep(0.001)
    with pytest.raises(Busy, match="the server ends"):
        Reader(engine, prompt(engine.llm, 4))
    go_on.set()
    ending.join(60)
    for seed, reader in enumerate(waiting):
        assert reader.wait().tokens == alone(LLAMA, seed)


@pytest.mark.slow
def test_an_engine_that_fails_says_so(
    own: Callable[..., JaxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = own()
    assert [token.id for token in tokens_of(engine, prompt(engine.llm, 1), Sampling(T))] == alone(
        LLAMA, 1
    )

    def fail(count: int) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(engine, "_step", fail)
    with pytest.raises(Unwell, match="the engine failed: no room"):
        list(tokens_of(engine, prompt(engine.llm, 1), Sampling(T)))
    with pytest.raises(Unwell):
        Reader(engine, prompt(engine.llm, 1))
    with pytest.raises(Unwell):
        engine.check()


@pytest.mark.slow
def test_who_stops_reading_gives_the_place_up() -> None:
    engine = engine_of(LLAMA)
    reading = tokens_of(engine, prompt(engine.llm, 1), Sampling(T))
    next(reading)
    reading.close()
    deadline = time.monotonic() + 60
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.001)
    assert engine.running == 0


@pytest.mark.slow
@pytest.mark.parametrize("place", ["front", "behind"])
def test_people_are_answered_as_by_a_personalizer(finished: Any, place: str) -> None:
    loaded = Personalizer.from_checkpoint(finished)
    models = loaded.models
    models.config = models.config.changed({"eval.num_beams": 1, "plug.place": place})
    personalizer = Personalizer(models, loaded.plug)
    length, mesh = models.config.eval.max_new_tokens, models.mesh
    limits = {"longest_prompt": 128, "max_new_tokens": length, "slots": 8}
    engine = JaxEngine(models.llm, mesh, own_rows=personalizer.own_rows, **limits)
    input = "Generate a title for the following abstract of a paper: Rivers are measured."
    events: list[queue.SimpleQueue] = []
    histories = [[f"{user} text {i}" for i in range(user)] for user in range(5)]
    for history in histories:
        soft = personalizer.soft_prompt(input, history)
        events.append(queue.SimpleQueue())
        engine.submit(personalizer.inputs_embeds(input, soft), Sampling(length), events[-1].put)
    for history, told in zip(histories, events, strict=True):
        tokens = []
        while isinstance(event := told.get(timeout=60), Token):
            tokens.append(event.id)
        answer = personalizer.models.tokenizer.decode(np.array(tokens, np.int32))
        assert answer == personalizer.generate(input, history)
    engine.close()
