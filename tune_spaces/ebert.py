"""EBERT: how much of each layer a sample may compute, and how hard that is asked for.

``SPACE`` has the share of FLOPs to be left, both kinds of masks, and the FLOPs loss and the gates'
rate around what was released (4 and 0.02). ``PAPER`` is a grid over the targets at the released
settings. ``SCHEDULES`` is what population-based training may change on the way.
"""

from ray import tune

SPACE = {
    "method.ebert.target_flops_ratio": tune.uniform(0.3, 0.9),
    "method.ebert.masks": tune.choice(["gumbel", "topk"]),
    "method.ebert.flops_weight": tune.loguniform(1.0, 16.0),
    "method.ebert.gate_lr": tune.loguniform(2e-3, 5e-2),
    "method.ebert.gate_start": tune.uniform(0.0, 4.0),
    "train.lr": tune.loguniform(1e-5, 1e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
}

PAPER = {"method.ebert.target_flops_ratio": tune.grid_search([0.4, 0.5, 0.6, 0.8])}

SCHEDULES = {
    "train.lr": tune.loguniform(1e-5, 1e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
}
