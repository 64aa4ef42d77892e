"""Choose learning rates by the loss on held-out training users, with the same trials for all."""

import json

from etils import epath

from pplug_jax.errors import ConfigError
from pplug_jax.methods.table import asked_for, configured
from pplug_jax.runtime.console import say
from pplug_jax.runtime.distributed import wait_for_all
from pplug_jax.runtime.primary import is_primary
from pplug_jax.session import Models
from pplug_jax.storage.files import read_text, write_json
from pplug_jax.storage.workdir import TRIALS, checkpoints_path, trial_path
from pplug_jax.train.inputs import TrainingInputs
from pplug_jax.train.loop import Trainer
from pplug_jax.train.validate import validation_loss


def tune(models: Models, training: TrainingInputs) -> dict[str, float]:
    """Return the learning rate with the lowest loss on the held-out users, for each trained method.

    Every method gets the same trials. tune.json keeps the losses; a rate that diverges has none.

    Args:
        models: the run's models.
        training: makes each method's examples.

    Raises:
        ConfigError: a method diverges at all rates.
    """
    config = models.config
    path = models.workdir / TRIALS
    losses: dict[str, dict[str, float | None]] = (
        json.loads(read_text(path)) if path.is_file() else {}
    )
    for method in (method for method in asked_for(config) if method.trained):
        trials = losses.setdefault(method.name, {})
        for rate in config.tune.learning_rates:
            if str(rate) in trials:
                continue
            settings = configured(config, method, config.seed).changed(
                {"train.learning_rate": rate}
            )
            directory = trial_path(models.workdir, rate)
            tokenized = training(method, settings)
            try:
                weights = Trainer(models, method, settings, tokenized, directory).fit()
                trials[str(rate)] = validation_loss(
                    models, method, settings, weights, training.validation(method, settings)
                )
            except FloatingPointError:
                trials[str(rate)] = None
            if is_primary():
                epath.Path(checkpoints_path(directory, method.name)).rmtree()
            write_json(path, losses)
            wait_for_all(f"a trial of {method.name}")
    best = {}
    for name, trials in losses.items():
        rate_losses = {float(rate): loss for rate, loss in trials.items() if loss is not None}
        if not rate_losses:
            raise ConfigError(f"config.tune.learning_rates: {name} diverges at all of them")
        best[name] = rate = min(rate_losses, key=rate_losses.__getitem__)
        say(f"learning rate of {name}: {rate:g}, validation loss {rate_losses[rate]:.4f}")
    return best
