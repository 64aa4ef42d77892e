"""What the frozen LLM is shown of the user."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.data.lamp import Example
from pplug_jax.data.retrieval import RETRIEVERS
from pplug_jax.methods import METHODS, histories, inputs_embeds


def examples(users: list[int]) -> list[Example]:
    """One example for each entry, with the profile of that user."""
    return [
        Example(str(i), "input", "gold", ({"title": f"user {user}", "abstract": ""},))
        for i, user in enumerate(users)
    ]


def test_every_method_can_be_run_and_every_plug_trained():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.retrieval is None or method.retrieval in RETRIEVERS
        assert method.history in ("own", "another", "none")
        assert method.plug is None or METHODS[method.plug].trained
    assert [name for name, method in METHODS.items() if method.trained] == [
        "pplug",
        "instruction_only",
    ]


def test_a_control_differs_from_the_method_that_it_controls_in_one_thing():
    plug = METHODS["pplug"]
    for name, changed in {
        "shuffled_user": {"history": "another"},
        "mean_persona": {"uniform": True},
    }.items():
        control = METHODS[name]
        assert control == dataclasses.replace(plug, name=name, about=control.about, **changed)


def test_own_and_no_history():
    given_examples = examples([0, 1, 2])
    own = histories(METHODS["pplug"], given_examples, seed=0)
    assert own == [example.profile for example in given_examples]
    assert histories(METHODS["instruction_only"], given_examples, seed=0) == [(), (), ()]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 5))
def test_another_history_is_never_the_users_own(users: list[int], seed: int):
    given_examples = examples(users)
    profiles = {example.profile[0]["title"] for example in given_examples}
    others = histories(METHODS["shuffled_user"], given_examples, seed)
    for example, other in zip(given_examples, others, strict=True):
        if len(profiles) > 1:
            assert other != example.profile
            assert other[0]["title"] in profiles
        else:
            assert other == ()


def test_another_history_is_a_function_of_the_seed():
    given_examples = examples(list(range(20)))
    first, again, other = (
        histories(METHODS["shuffled_user"], given_examples, seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_among_single_examples_every_history_is_given_once():
    given_examples = examples(list(range(20)))
    titles = [h[0]["title"] for h in histories(METHODS["shuffled_user"], given_examples, seed=3)]
    assert sorted(titles) == sorted(f"user {i}" for i in range(20))


class ToyLLM:
    """A token's embedding is its id, twice."""

    def embed(self, tokens: jnp.ndarray) -> jnp.ndarray:
        return jnp.stack([tokens, tokens], axis=-1).astype(jnp.bfloat16)


PROMPT = jnp.array([[1, 5, 6, 7], [1, 8, 0, 0]])
MASK = jnp.array([[True, True, True, True], [True, True, False, False]])
SOFT = jnp.array([[[-1, -1], [-2, -2]], [[-3, -3], [-4, -4]]], jnp.float32)


@pytest.mark.parametrize(
    ("prefix", "expected", "expected_mask"),
    [
        (0, [[-1, -2, 1, 5, 6, 7], [-3, -4, 1, 8, 0, 0]], [[1] * 6, [1, 1, 1, 1, 0, 0]]),
        (1, [[1, -1, -2, 5, 6, 7], [1, -3, -4, 8, 0, 0]], [[1] * 6, [1, 1, 1, 1, 0, 0]]),
    ],
)
def test_soft_tokens_stand_behind_the_prefix(
    prefix: int, expected: list[list[int]], expected_mask: list[list[int]]
):
    embeds, mask = inputs_embeds(ToyLLM(), SOFT, PROMPT, MASK, prefix)
    assert embeds.shape == (2, 6, 2)
    assert embeds.dtype == jnp.bfloat16  # the LLM's own, or its compiled step would change
    np.testing.assert_array_equal(embeds[..., 0].astype(int), expected)
    np.testing.assert_array_equal(mask, np.array(expected_mask, bool))


def test_without_soft_tokens_the_prompt_stands_alone():
    embeds, mask = inputs_embeds(ToyLLM(), None, PROMPT, MASK, 1)
    np.testing.assert_array_equal(embeds[..., 0].astype(int), PROMPT)
    np.testing.assert_array_equal(mask, MASK)
