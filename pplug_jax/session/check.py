"""Check that an LLM can take what a config's methods show it."""

from pplug_jax.errors import ConfigError
from pplug_jax.llm import LLM
from pplug_jax.llm.prompts import Tokenizer
from pplug_jax.methods.shown import layout_of
from pplug_jax.methods.table import configured, methods_of
from pplug_jax.plugs.registry import PLUGS
from pplug_jax.settings import Settings


def check_methods(config: Settings, llm: LLM, tokenizer: Tokenizer) -> None:
    """Check that the LLM takes soft tokens where every method has them, and the longest example.

    Args:
        config: the settings.
        llm: the LLM's shapes.
        tokenizer: its tokenizer.

    Raises:
        ConfigError: it cannot; the message names the field.
    """
    data = config.data
    known = methods_of(config)
    # Of an older workdir's methods some may be gone.
    methods = [known[name] for name in config.methods if name in known]
    settings = [configured(config, method, 0) for method in methods]
    behind = any(layout_of(*pair).behind for pair in zip(methods, settings, strict=True))
    if behind and not llm.decoder_only:
        raise ConfigError(
            "config.plug.place 'behind': an LLM with an encoder reads the whole prompt at "
            "once, so nothing is gained behind it; take 'front'"
        )
    soft = max(
        PLUGS[method.kind].soft_tokens(changed, method.reading)
        for method, changed in zip(methods, settings, strict=True)
    )
    prompt = len(tokenizer.prefix) + data.max_input_length + len(tokenizer.suffix)
    prompt += len(tokenizer.ids(tokenizer.joint)) if behind else 0
    answer = max(data.max_target_length, config.eval.max_new_tokens)
    longest = llm.config.max_length
    if prompt + soft + answer > longest:
        raise ConfigError(
            f"config.data.max_input_length: prompt, soft tokens and answer may reach "
            f"{prompt + soft + answer} tokens, "
            f"but the LLM was made for {longest}"
        )
