"""MA-BERT: how softmax nets and norms are set up, and what is learnt from the teacher.

Nothing here changes the size: the method is there to let Q8BERT make a graph of integers of it.
``SPACE`` ranges around the paper's distillation (alpha 0.9, temperature 15, hidden states 1,
attention 100) and its moving statistics (0.9). ``PAPER`` compares one softmax net for all layers
with one for each. ``SCHEDULES`` is what population-based training may change on the way.
"""

from ray import tune

SPACE = {
    "method.ma_bert.shared": tune.choice([False, True]),
    "method.ma_bert.alpha": tune.uniform(0.8, 0.99),
    "method.ma_bert.layer_steps": tune.choice([50, 100, 200]),
    "train.lr": tune.loguniform(1e-5, 5e-4),
    "kd.alpha": tune.uniform(0.3, 0.95),
    "kd.temperature": tune.loguniform(2.0, 20.0),
    "kd.hidden": tune.loguniform(0.1, 10.0),
    "kd.attention": tune.loguniform(10.0, 1000.0),
}

PAPER = {"method.ma_bert.shared": tune.grid_search([False, True])}

SCHEDULES = {
    "train.lr": tune.loguniform(1e-5, 5e-4),
    "kd.alpha": tune.uniform(0.3, 0.95),
    "kd.hidden": tune.loguniform(0.1, 10.0),
    "kd.attention": tune.loguniform(10.0, 1000.0),
}
