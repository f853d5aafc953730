"""Seeds that are added later count as if all runs had been read at once."""

from __future__ import annotations

import pytest
from quality import added, pooled, spread
from tables import ordered

from raybert.groups import Spread

COMMAND = "raybert compress task=mrpc teacher=mrpc-teacher-{0}/model train.seed={0} method=theseus"


def of(values: list[float]) -> dict[str, float]:
    """Their spread, as a result file has it."""
    found = spread(Spread.of(values))
    assert found is not None
    return found


def group(seeds: list[int], scores: list[float]) -> dict[str, object]:
    """A group as a result file has it."""
    costs = {"score": of(scores), "bytes": of([100.0] * len(scores))}
    return {
        "task": "mrpc",
        "label": "theseus",
        "encoder": "tiny",
        "n": len(seeds),
        "seeds": seeds,
        "scores": scores,
        "student": costs,
        "teacher": {**costs, "bytes": of([400.0])},
        "retained": of(scores),
        "ratio": of(scores),
        "speedup": {"torch 1x128": of([2.0])} if 1 in seeds else {},
        "onnx_score": None,
        "training_seconds": of(scores),
        "teacher_command": f"raybert finetune task=mrpc train.seed={seeds[0]}",
        "command": COMMAND.format(seeds[0]),
        "date": f"2026-01-0{seeds[0]}",
        "raybert": ["0.1.0"],
        "hardware": [{"cpu": "one"}],
    }


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_pooled_is_the_spread_of_all(cut):
    values = [0.97, 0.5, 1.37, 0.81]
    both = pooled(of(values[:cut]), of(values[cut:]))
    assert both == pytest.approx(of(values), rel=1e-3)


def test_seeds_join_the_group_of_the_same_command():
    found = added([group([1, 2], [0.8, 0.9])], [group([3], [0.7])])
    assert len(found) == 1
    assert found[0]["seeds"] == [1, 2, 3]
    assert found[0]["scores"] == [0.8, 0.9, 0.7]
    assert found[0]["student"]["score"] == pytest.approx(of([0.8, 0.9, 0.7]), rel=1e-3)
    assert found[0]["student"]["bytes"]["mean"] == 100
    assert found[0]["speedup"] == {"torch 1x128": of([2.0])}
    assert found[0]["date"] == "2026-01-03"


def test_another_command_is_another_group():
    other = group([3], [0.7])
    other["command"] = str(other["command"]).replace("theseus", "lobert")
    assert len(added([group([1], [0.8])], [other])) == 2


def test_a_seed_is_added_once():
    with pytest.raises(SystemExit, match="seed 1 is there already"):
        added([group([1], [0.8])], [group([1], [0.8])])


def test_a_table_goes_task_by_task_and_by_methods_before_chains():
    rows = [("b", "q8bert"), ("b", "theseus + lobert"), ("a", "q8bert"), ("b", "lobert")]
    groups = [{"task": task, "chain": chain} for task, chain in rows]
    found = [(group["task"], group["chain"]) for group in ordered(groups)]
    assert found == [("b", "lobert"), ("b", "q8bert"), ("b", "theseus + lobert"), ("a", "q8bert")]
