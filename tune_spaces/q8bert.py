"""Q8BERT: how coarse the integers may be, and where ranges end.

``SPACE`` goes down to 2 bits for weights, the least that the code allows, and to 4 for activations,
which suffer sooner; the moving average's decay ranges below the released 0.9999, which short runs
hardly fill. ``PAPER`` is the paper's comparison: moving averages or each batch's own range, at 8
bits. ``SCHEDULES`` is what population-based training may change on the way.
"""

from ray import tune

SPACE = {
    "method.q8bert.asymmetric": tune.choice([False, True]),
    "method.q8bert.weight_bits": tune.randint(2, 9),
    "method.q8bert.activation_bits": tune.randint(4, 9),
    "method.q8bert.per_channel": tune.choice([False, True]),
    "method.q8bert.ema_decay": tune.choice([0.9, 0.99, 0.999, 0.9999]),
    "train.lr": tune.loguniform(5e-6, 1e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
    "kd.cls": tune.choice([0.0, 10.0, 100.0]),
}

PAPER = {"method.q8bert.mode": tune.grid_search(["ema", "dynamic"])}

SCHEDULES = {
    "train.lr": tune.loguniform(5e-6, 1e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
}
