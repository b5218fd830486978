"""Learning-rate schedules against their formulas."""

import math

import pytest

from sedd.training.learning_rate import LR_SCHEDULES, learning_rate_factor


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("constant", [1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.1, 0]),
        ("cosine", [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.cos(math.pi / 10)) / 2, 0]),
        ("wsd", [1, 1, 1, 1 - math.sqrt(0.5), 0]),
    ],
)
def test_factors(name: str, expected: list[float]) -> None:
    points = [0.0, 0.25, 0.5, 0.9, 1.0]
    assert [learning_rate_factor(name, done) for done in points] == pytest.approx(expected, abs=1e-8)
    if name != "constant":
        raised = [0.1 + 0.9 * value for value in expected]
        assert [learning_rate_factor(name, done, final=0.1) for done in points] == pytest.approx(raised, abs=1e-8)


def test_the_length_of_the_decay() -> None:
    assert learning_rate_factor("wsd", 0.75, decay=0.5) == pytest.approx(1 - math.sqrt(0.5))
    assert learning_rate_factor("wsd", 1.0, decay=0.0) == 1.0
    assert set(LR_SCHEDULES) == {"constant", "linear", "cosine", "wsd"}
