"""The registry of plugs: a new kind is a file beside this one, and a line here."""

from pplug_jax.plugs import lora, lora_persona, persona

PLUGS = {
    "persona": persona.KIND,
    "lora": lora.KIND,
    "lora+persona": lora_persona.KIND,
}
