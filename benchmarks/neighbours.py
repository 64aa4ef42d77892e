"""Whether a plug knows the person or their surroundings: a neighbour's history for the own one.

    python -m benchmarks.neighbours --workdir=RUN --methods=pplug

answers the held-out examples of `--mode=compare`'s workdir with everyone's own history and with
that of another person whose texts are most like theirs, by the cosine between the mean vectors of
the histories. `shuffled_user` draws anyone: where people share a project or a topic, what it costs
is in part that of another project. Differences are paired, over the workdir's seeds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.history import measure, opened
from benchmarks.timing import report
from pplug_jax.data.lamp import Example
from pplug_jax.feed.retrieval import nearest
from pplug_jax.methods.shown import with_profiles_of
from pplug_jax.methods.users import first_stranger
from pplug_jax.scoring.metrics import paired_difference, value_of
from pplug_jax.session import Models
from pplug_jax.session.inputs import histories

FLAGS = flags.FLAGS
flags.declare_key_flag("workdir")
flags.declare_key_flag("methods")

HEADER = ("method", "measure", "own", "a neighbour's", "difference (95% interval)", "p")


def neighbours(models: Models, examples: Sequence[Example]) -> list[Example]:
    """The examples with the history of the nearest other person; without one, with none.

    Another person's history is one that shares no text, as for `shuffled_user`.
    """
    read = histories(models, examples)
    vectors = np.zeros((len(examples), models.encoder.size), np.float32)
    for mean, history in zip(vectors, read, strict=True):
        if len(history.texts):
            mean[:] = models.store.vectors(history).astype(np.float32).mean(axis=0)
            mean /= np.linalg.norm(mean)
    texts = [history.texts for history in read]
    others = (
        first_stranger(texts, i, nearest(vectors, vector, len(vectors)))
        for i, vector in enumerate(vectors)
    )
    return list(with_profiles_of(examples, others))


def main(argv: Sequence[str]) -> None:
    del argv
    models, examples = opened()
    config = models.config
    users = [example.user for example in examples]
    given = [examples, neighbours(models, examples)]
    rows, records = [], []
    for name in FLAGS.methods or config.methods:
        own, other = (statistics for statistics, _ in measure(models, name, examples, given))
        for metric in own:
            samples = config.eval.bootstrap_samples
            found = paired_difference(metric, other[metric], own[metric], samples, users=users)
            values = [value_of(metric, statistics[metric]) for statistics in (own, other)]
            record: dict[str, Any] = {"method": name, "metric": metric, "values": values}
            records.append(record | found._asdict())
            interval = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
            shown = (f"{value:.3f}" for value in values)
            rows.append((name, metric, *shown, interval, f"{found.p_value:.4f}"))
            print(*rows[-1], sep="  ", flush=True)
    report("neighbours", config.llm.path, HEADER, rows, records)


if __name__ == "__main__":
    app.run(main)
