"""What the frozen LLM is shown of the user."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import lamp5
from pplug_jax.config import checked
from pplug_jax.errors import ConfigError
from pplug_jax.feed.retrieval import retrievers
from pplug_jax.llm.prompts import Front
from pplug_jax.methods.table import METHODS, configured, methods_of
from pplug_jax.methods.users import strangers
from pplug_jax.plugs.forward import inputs_embeds
from pplug_jax.plugs.reading import Reading
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.settings import Settings

VARIANTS = "{'k4': {'plug.num_persona_tokens': 4, 'plug.features': ('form',)}}"


def own_rows(users: list[int]) -> list[np.ndarray]:
    """An example for each entry, with a history of that user: the later, the longer."""
    return [np.arange(100 * user, 100 * user + i + 1) for i, user in enumerate(users)]


def test_every_method_can_be_run_and_every_plug_trained():
    for name, method in METHODS.items():
        assert method.name == name
        assert method.retrieval is None or method.retrieval in retrievers(None, 512, True)
        assert method.history in ("own", "another", "none")
        if method.plug is not None:  # a borrowed plug sees prompts as in its training
            trained = METHODS[method.plug]
            assert trained.trained
            assert (method.kind, method.answers) == (trained.kind, trained.answers)
        assert method.kind in PLUGS
        assert method.kind == "lora" or not method.user_lora


def test_a_methods_settings_are_fields_of_the_config():
    config = Settings().changed({"plug.num_persona_tokens": 9})  # no method's own
    before = config.flat()
    for method in METHODS.values():
        settings = dict(METHODS[method.plug].settings) if method.plug else {}
        assert configured(config, method, 7).flat() == before | settings | {"seed": 7}
    # The paper's plug, whatever the config's.
    paper = configured(config, METHODS["pplug_paper"], config.seed)
    assert paper == Settings()


def test_a_control_is_trained_as_what_it_controls():
    config = Settings(variants=VARIANTS)
    for name in ("shuffled_user", "mean_persona"):
        method = dataclasses.replace(METHODS[name], plug="k4")
        assert configured(config, method, 0).plug.num_persona_tokens == 4


def test_a_variant_is_pplug_with_other_settings():
    config = Settings(variants=VARIANTS)
    variant = methods_of(config)["k4"]
    plain = METHODS["pplug"]
    about = "pplug with plug.num_persona_tokens = 4, plug.features = ('form',)"
    settings = (("plug.num_persona_tokens", 4), ("plug.features", ("form",)))
    assert variant == dataclasses.replace(
        plain, name="k4", plug="k4", about=about, settings=settings
    )
    assert configured(config, variant, 0).plug.features == ("form",)
    assert configured(config, plain, 0).plug.features == ()


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        ("k16", "must be names with the settings that they change, as in"),
        ("{'k16': 16}", "must be names with the settings"),
        ("{16: {'plug.recency': True}}", "must be names with the settings"),
        ("{'a/b': {'plug.recency': True}}", "must be names with the settings"),
        ("{'bm25': {'plug.recency': True}}", "'bm25' is a method already"),
        ("{'x': {'plug.recensy': True}}", r"changes 'plug.recensy', .*did you mean 'plug.recency'"),
        ("{'x': {'plug.num_persona_tokens': 'four'}}", "= 'four', which is no int"),
        ("{'x': {'plug.num_persona_tokens': 1.5}}", "= 1.5, which is no int"),
        ("{'x': {'plug.recency': 1}}", "= 1, which is no bool"),
        ("{'x': {'plug.recency': True}, 'x': {}}", "'x' is given twice"),
        ("{'x': {'plug.recency': True, 'plug.recency': False}}", "'plug.recency' is given twice"),
        ("{'x': {'plug.num_persona_tokens': 0}}", "'x' cannot be: .*0 must be at least 1"),
        ("{'x': {'plug.num_persona_tokens': True}}", "= True, which is no int"),
        ("{'x': {'plug.num_persona_tokens': None}}", "= None, which is no int"),
        ("{'x': {'plug.place': 'sideways'}}", "plug.place 'sideways' is unknown"),
        ("{'x': {'plug.features': ('from',)}}", "'from' is unknown .did you mean 'form'"),
        ("{'x': {'plug.features': ('form', 'form')}}", "'form' is named twice"),
        ("{'x': {'train.accumulation': 3}}", "does not divide into"),
        ("{'x': {'seed': 1}}", "changes 'seed', which no plug's training reads"),
        ("{'x': {'train.validation': 0.1}}", "'train.validation', which is the same for all"),
        ("{'x': {'train.prompt_cache': 1.0}}", "'train.prompt_cache', which is the same for all"),
        ("{'x': {3: True}}", "must be names with the settings"),
    ],
)
def test_variants_that_cannot_be(variants: str, message: str):
    config = lamp5.get_config()
    config.variants = variants
    with pytest.raises(ConfigError, match=message):
        checked(config)


@pytest.mark.parametrize(
    ("methods", "message"),
    [((), "config.methods is empty"), (("none", "none"), "'none' is named twice")],
)
def test_methods_that_cannot_be(methods: tuple[str, ...], message: str):
    config = lamp5.get_config()
    config.methods = methods
    with pytest.raises(ConfigError, match=message):
        checked(config)


def test_a_control_differs_from_the_method_that_it_controls_in_one_thing():
    plug = METHODS["pplug"]
    for name, changed in {
        "shuffled_user": {"history": "another"},
        "mean_persona": {"reading": Reading(uniform=True)},
    }.items():
        control = METHODS[name]
        assert control == dataclasses.replace(plug, name=name, about=control.about, **changed)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 5))
def test_a_stranger_is_never_the_user(users: list[int], seed: int):
    # A user's histories differ from question to question, as in a split by time.
    for user, stranger in zip(users, strangers(own_rows(users), seed), strict=True):
        if len(set(users)) > 1:
            assert users[stranger] != user
        else:
            assert stranger is None


def test_a_stranger_has_a_history_and_shares_no_text_and_who_has_none_gets_none():
    own = [np.array([0, 1]), np.array([], int), np.array([1, 2]), np.array([3])]
    for seed in range(9):
        found = strangers(own, seed)
        assert found[0] == found[2] == 3
        assert found[1] is None
        assert found[3] in (0, 2)


def test_strangers_are_a_function_of_the_seed():
    own = own_rows(list(range(20)))
    first, again, other = (strangers(own, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_among_single_examples_everyone_is_a_stranger_once():
    assert sorted(strangers(own_rows(list(range(20))), seed=3)) == list(range(20))


class ToyLLM:
    """A token's embedding is its id, twice."""

    def embed(self, tokens: jnp.ndarray) -> jnp.ndarray:
        return jnp.stack([tokens, tokens], axis=-1).astype(jnp.bfloat16)


PROMPT = jnp.array([[1, 5, 6, 7], [1, 8, 0, 0]])
MASK = jnp.array([[True, True, True, True], [True, True, False, False]])
SOFT = jnp.array([[[-1, -1], [-2, -2]], [[-3, -3], [-4, -4]]], jnp.float32)


@pytest.mark.slow
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
    embeds, mask, context = inputs_embeds(ToyLLM(), SOFT, PROMPT, MASK, Front(prefix))
    assert context is None
    assert embeds.shape == (2, 6, 2)
    assert embeds.dtype == jnp.bfloat16  # the LLM's own, or its compiled step would change
    np.testing.assert_array_equal(embeds[..., 0].astype(int), expected)
    np.testing.assert_array_equal(mask, np.array(expected_mask, bool))


def test_without_soft_tokens_the_prompt_stands_alone():
    embeds, mask, _ = inputs_embeds(ToyLLM(), None, PROMPT, MASK, Front(1))
    np.testing.assert_array_equal(embeds[..., 0].astype(int), PROMPT)
    np.testing.assert_array_equal(mask, MASK)
