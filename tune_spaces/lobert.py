"""LoBERT: how much of the encoder's parameters to keep, and how to teach what is left.

``SPACE`` is about size first: the share of the encoder layers' parameters to keep, the same for all
layers or by energy, with or without calibration rows. Rate and distillation range around what was
released (rates 1e-5 to 5e-5; weights of the [CLS] vectors 10 to 1000; alpha 0.2 to 0.7,
temperatures 5 to 20), and further up for rates, since small models take larger ones. ``PAPER`` is
the released code's grid of 24. ``SCHEDULES`` is what population-based training may change on the
way.
"""

from ray import tune

SPACE = {
    "method.lobert.share": tune.uniform(0.2, 0.8),
    "method.lobert.allocate": tune.choice(["even", "energy"]),
    "method.lobert.data_aware": tune.choice([False, True]),
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
    "kd.cls": tune.choice([0.0, 10.0, 100.0, 500.0, 1000.0]),
}

PAPER = {
    "train.lr": tune.grid_search([5e-5, 2e-5, 1e-5]),
    "kd.cls": tune.grid_search([10.0, 100.0, 500.0, 1000.0]),
    "kd.normalize": tune.grid_search([True, False]),
}

SCHEDULES = {
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
    "kd.cls": tune.loguniform(1.0, 1000.0),
}
