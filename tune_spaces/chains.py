"""Chains: which methods, and then their parameters.

``method`` chooses the chain; parameters of methods that a chain does not have are left out of its
recipe, and Optuna is not even asked for them. The chains are those that `raybert` allows in which
each method saves something more: layers go first, then ranks or what a sample can do without, then
bits. EBERT saves FLOPs and no bytes, so that only a search with ``flops`` or ``latency`` among its
objectives has a use for it. MA-BERT alone saves neither; Q8BERT after it makes integers of the
whole graph. ``SPACE`` is for a search of both accuracy and size; ``PAPER`` tries every chain at
each method's own defaults.
"""

from ray import tune

CHAINS = [
    "theseus",
    "lobert",
    "ebert",
    "q8bert",
    "theseus,lobert",
    "theseus,ebert",
    "theseus,q8bert",
    "lobert,q8bert",
    "ma_bert,q8bert",
    "theseus,lobert,q8bert",
    "theseus,ma_bert,q8bert",
]

SPACE = {
    "method": tune.choice(CHAINS),
    "method.theseus.layers": tune.choice([2, 3, 4, 6]),
    "method.theseus.initialise": tune.choice(["first", "spaced"]),
    "method.theseus.replacing_rate": tune.uniform(0.1, 0.9),
    "method.lobert.share": tune.uniform(0.3, 0.8),
    "method.lobert.data_aware": tune.choice([False, True]),
    "method.ebert.target_flops_ratio": tune.uniform(0.3, 0.9),
    "method.ebert.masks": tune.choice(["gumbel", "topk"]),
    "method.ma_bert.shared": tune.choice([False, True]),
    "method.q8bert.weight_bits": tune.randint(2, 9),
    "method.q8bert.activation_bits": tune.randint(4, 9),
    "method.q8bert.asymmetric": tune.choice([False, True]),
    "method.q8bert.per_channel": tune.choice([False, True]),
    "train.lr": tune.loguniform(1e-5, 2e-4),
    "kd.alpha": tune.uniform(0.0, 0.9),
    "kd.temperature": tune.loguniform(1.0, 20.0),
    "kd.cls": tune.choice([0.0, 10.0, 100.0]),
}

PAPER = {"method": tune.grid_search(CHAINS)}
