"""A LoRA for each user: each is what the user's own items make of it, whoever else is there."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from pplug_jax.feed.batches import Tokenized
from pplug_jax.feed.store import History
from pplug_jax.llm.prompts import Front
from pplug_jax.plugs.lora import Lora
from pplug_jax.settings import LoraSettings, Settings
from pplug_jax.train.user_lora import fit_user_loras
from tests.support.tiny import ONE_DEVICE, make_llm

pytestmark = pytest.mark.slow

MODELS = SimpleNamespace(
    mesh=ONE_DEVICE,
    abstract_llm=SimpleNamespace(decoder_only=True),
    encoder=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(max_length=64))),
    store=SimpleNamespace(
        encoder=SimpleNamespace(size=4), read=lambda rows: [np.zeros((0, 4)) for _ in rows]
    ),
    tokenizer=SimpleNamespace(place=lambda behind: Front(1)),
)
USERS = [range(5), range(5, 7), range(7, 7), range(7, 8)]


def items(count: int = 8) -> list[Tokenized]:
    rng = np.random.default_rng(0)

    def tokens(length: int) -> np.ndarray:
        return rng.integers(2, 48, length, dtype=np.int32)

    none = History(0, np.zeros(0, int))
    return [Tokenized(tokens(5 + i), tokens(1 + i % 4), tokens(1), none, {}) for i in range(count)]


def fitted(users: list[range], seed: int = 0) -> Lora:
    lora = LoraSettings(rank=2, user_epochs=3, user_learning_rate=1e-2)
    config = Settings(seed=seed, lora=lora)
    return fit_user_loras(MODELS, make_llm(), config, items(), users)


def of_user(lora: Lora, i: int) -> list[np.ndarray]:
    return [np.asarray(x[:, i]) for x in jax.tree.leaves(lora)]


@pytest.fixture(scope="module")
def together() -> Lora:
    return fitted(USERS)


@pytest.mark.parametrize("i", [0, 1, 3])
def test_a_user_in_company_is_as_alone(together: Lora, i: int) -> None:
    alone = fitted([USERS[i]])
    for ours, theirs in zip(of_user(together, i), of_user(alone, 0), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        assert np.abs(ours).max() > 0


def test_who_has_no_items_keeps_the_llm(together: Lora) -> None:
    assert all(np.all(x == 0) for x in (np.asarray(v[:, 2]) for v in together.up.values()))
    nobody = fitted([range(0), range(0)])
    assert all(np.all(np.asarray(v[...]) == 0) for v in nobody.up.values())


def test_a_seed_decides_the_start() -> None:
    one, other = fitted([range(0)], 0), fitted([range(0)], 1)
    assert any(np.any(a != b) for a, b in zip(of_user(one, 0), of_user(other, 0), strict=True))
