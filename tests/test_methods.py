"""What the frozen LLM is shown of the user."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pplug_jax.data.retrieval import retrievers
from pplug_jax.embedder import Reading
from pplug_jax.methods import METHODS, histories, inputs_embeds


def own_rows(users: list[int]) -> list[np.ndarray]:
    """An example for each entry, with a history of that user: the later, the longer."""
    return [np.arange(100 * user, 100 * user + i + 1) for i, user in enumerate(users)]


def test_every_method_can_be_run_and_every_plug_trained():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.retrieval is None or method.retrieval in retrievers(None, True)
        assert method.history in ("own", "another", "none")
        assert method.plug is None or METHODS[method.plug].trained
    assert [name for name, method in METHODS.items() if method.trained] == [
        "pplug",
        "instruction_only",
        "pplug_no_instruction",
        "pplug_mean",
        "pplug_top4",
    ]


def test_a_control_differs_from_the_method_that_it_controls_in_one_thing():
    plug = METHODS["pplug"]
    for name, changed in {
        "shuffled_user": {"history": "another"},
        "mean_persona": {"reading": Reading(uniform=True)},
    }.items():
        control = METHODS[name]
        assert control == dataclasses.replace(plug, name=name, about=control.about, **changed)


def test_own_and_no_history():
    own = own_rows([0, 1, 2])
    for mine, same in zip(own, histories(METHODS["pplug"], own, seed=0), strict=True):
        np.testing.assert_array_equal(mine, same)
    assert [len(r) for r in histories(METHODS["instruction_only"], own, seed=0)] == [0, 0, 0]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 5))
def test_another_history_is_never_the_users_own(users: list[int], seed: int):
    # A user's histories differ from question to question, as in a split by time.
    others = histories(METHODS["shuffled_user"], own_rows(users), seed)
    for user, other in zip(users, others, strict=True):
        if len(set(users)) > 1:
            assert len(set(other // 100)) == 1
            assert other[0] // 100 in set(users) - {user}
        else:
            assert len(other) == 0


def test_another_history_is_none_that_is_empty_or_shares_a_text():
    own = [np.array([0, 1]), np.array([], int), np.array([1, 2]), np.array([3])]
    for seed in range(9):
        found = [rows.tolist() for rows in histories(METHODS["shuffled_user"], own, seed)]
        assert found[0] == found[2] == [3]
        assert found[1] in ([0, 1], [1, 2], [3])
        assert found[3] in ([0, 1], [1, 2])


def test_another_history_is_a_function_of_the_seed():
    own = own_rows(list(range(20)))
    first, again, other = (
        [rows.tolist() for rows in histories(METHODS["shuffled_user"], own, seed)]
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_among_single_examples_every_history_is_given_once():
    own = own_rows(list(range(20)))
    given = histories(METHODS["shuffled_user"], own, seed=3)
    assert sorted(rows[0] for rows in given) == [100 * i for i in range(20)]


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
