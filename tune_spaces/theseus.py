"""BERT-of-Theseus: how many layers are left, and how fast they replace the old ones.

``SPACE`` has depths that divide 12 or 6 layers (others are skipped for a model that they do not
divide), both schedules of the replacing rate, and distillation beside the task loss, which the
paper does without. ``PAPER`` is the paper's: the released depth, a constant rate from 0.1 to 0.9 or
a rising one, and the task loss alone. ``SCHEDULES`` is what population-based training may change on
the way.
"""

from ray import tune

SPACE = {
    "method.theseus.layers": tune.choice([2, 3, 4, 6]),
    "method.theseus.initialise": tune.choice(["first", "spaced"]),
    "method.theseus.schedule": tune.choice(["linear", "constant"]),
    "method.theseus.replacing_rate": tune.uniform(0.1, 0.9),
    "method.theseus.replacing_share": tune.uniform(0.2, 0.8),
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
}

PAPER = {
    "method.theseus.schedule": tune.grid_search(["constant", "linear"]),
    "method.theseus.replacing_rate": tune.grid_search([0.1, 0.3, 0.5, 0.7, 0.9]),
}

SCHEDULES = {
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "method.theseus.replacing_rate": tune.uniform(0.1, 0.9),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
}
