"""Plan a run for TPU slices with the TPU's own compiler, without a TPU and without weights.

`python -m pplug_jax.main --mode=plan --config=configs/lamp5.py:llama3_8b --topology=v5e:4x4`

- chips.py: what the chips can do, and their slices
- programs.py: the very programs of a run, traced without arrays
- flops.py: a program's FLOPs, from its jaxpr
- hlo.py: its HBM and interconnect bytes, from what the compiler made of it
- roofline.py: its memory and the shortest time it can take
- training.py: what training needs of a slice, and how long it takes
- planner.py: the tables
"""

from pplug_jax.plan.planner import plan

__all__ = ["plan"]
