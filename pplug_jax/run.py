"""One run of the command: say what will be done, then encode, train and evaluate."""

from pathlib import Path

import jax
import ml_collections

from pplug_jax.evaluate import evaluate
from pplug_jax.experiment import Experiment, claim_workdir, parameter_count
from pplug_jax.methods import METHODS
from pplug_jax.progress import console
from pplug_jax.train import fit


def describe(experiment: Experiment) -> None:
    """Prints what is about to be done."""
    config, llm = experiment.config, experiment.llm
    plug = experiment.new_plug()
    trainable, frozen = parameter_count(plug), parameter_count(llm)
    mesh = " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
    train, held_out = (len(experiment.examples[role]) for role in ("train", "eval"))
    if config.data.path:
        data = config.data.path
    else:
        data = "the embedded sample, made up by a generator (real data: --config.data.path=DIR with LaMP's files)"
    for name, text in {
        "task": config.task,
        "data": data,
        "examples": f"{train} to train on ({config.data.train_split}), {held_out} held out ({config.data.eval_split})",
        "frozen LLM": f"{config.llm.path}, {frozen:,} parameters, {config.llm.dtype}",
        "encoder": f"{config.encoder.path}, width {experiment.encoder.size}, {experiment.encoder.model.pooling} pooling",
        "trainable": f"{trainable:,} parameters, {trainable / (trainable + frozen):.1%} of all",
        "methods": ", ".join(config.methods),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {mesh}",
        "workdir": str(experiment.workdir),
    }.items():
        console.print(f"{name:>12}  {text}", highlight=False, markup=False, soft_wrap=True)


def run(config: ml_collections.ConfigDict, workdir: Path, mode: str) -> None:
    """Does what `mode` says; started again, it goes on where it stopped."""
    experiment = Experiment(config, workdir)
    claim_workdir(workdir, config)
    describe(experiment)
    new = experiment.encode_histories()
    console.print(
        f"history store: {len(experiment.store)} unique texts, {new} of them new", highlight=False
    )
    if mode in ("train", "train_and_evaluate"):
        for name in config.methods:
            if METHODS[name].trained:
                fit(experiment, METHODS[name])
    if mode in ("evaluate", "train_and_evaluate"):
        evaluate(experiment)
