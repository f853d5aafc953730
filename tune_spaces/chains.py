"""Chains: which methods, and then their parameters.

``method`` chooses the chain; parameters of methods that a chain does not have are left out of its
recipe, and Optuna is not even asked for them. The chains are those that `raybert` allows and that
end smaller than each of their parts: layers go first, then ranks, then bits. ``SPACE`` is for a
search of both accuracy and size; ``PAPER`` tries every chain at each method's own defaults.
"""

from ray import tune

CHAINS = [
    "theseus",
    "lobert",
    "q8bert",
    "theseus,lobert",
    "theseus,q8bert",
    "lobert,q8bert",
    "theseus,lobert,q8bert",
]

SPACE = {
    "method": tune.choice(CHAINS),
    "method.theseus.layers": tune.choice([2, 3, 4, 6]),
    "method.theseus.initialise": tune.choice(["first", "spaced"]),
    "method.theseus.replacing_rate": tune.uniform(0.1, 0.9),
    "method.lobert.share": tune.uniform(0.3, 0.8),
    "method.lobert.data_aware": tune.choice([False, True]),
    "method.q8bert.asymmetric": tune.choice([False, True]),
    "method.q8bert.per_channel": tune.choice([False, True]),
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.cls": tune.choice([0.0, 10.0, 100.0]),
}

PAPER = {"method": tune.grid_search(CHAINS)}
