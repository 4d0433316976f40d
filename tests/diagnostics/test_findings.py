from __future__ import annotations

import json

import pytest

from lightning_optim.diagnostics.coverage import Coverage, Parameter, patterns
from lightning_optim.diagnostics.findings import SEVERITIES, Diagnosis, Finding, to_json


def finding(severity, **kwargs):
    return Finding("diverged", severity, "The loss rose.", "Lower the learning rate.", **kwargs)


def test_json_has_the_documented_schema():
    evidence = {"ratio": 1 / 3, "loss": float("nan"), "steps": (1, 2)}
    diagnosis = Diagnosis("a/b", "NAMO", (finding("broken", since_step=3, where=("fc.weight",), evidence=evidence),))
    assert json.loads(to_json([diagnosis, Diagnosis("c", "SGD")])) == {
        "runs": [
            {
                "name": "a/b",
                "optimizer": "NAMO",
                "verdict": "broken",
                "findings": [
                    {
                        "cause": "diverged",
                        "severity": "broken",
                        "sentence": "The loss rose.",
                        "since_step": 3,
                        "where": ["fc.weight"],
                        "evidence": {"ratio": 0.333333, "loss": "nan", "steps": [1, 2]},
                        "remedy": "Lower the learning rate.",
                    }
                ],
            },
            {"name": "c", "optimizer": "SGD", "verdict": "healthy", "findings": []},
        ]
    }


def test_the_verdict_is_the_heaviest_severity():
    for i, severity in enumerate(SEVERITIES):
        assert Diagnosis("r", "", tuple(map(finding, SEVERITIES[i:]))).verdict == severity
    assert Diagnosis("r", "", measured=False).verdict == "unknown"


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.weight"], "a.weight"),
        (["blocks.0.fc.weight", "blocks.11.fc.weight"], "blocks.*.fc.weight"),
        (["layers.0.experts.1.up", "layers.0.experts.1.down"], "layers.*"),
        (["a", "b", "c", "d", "e"], "a, b, c and 2 more"),
        (["conv1.weight"], "conv1.weight"),
        (["0.weight", "2.weight"], "*.weight"),
    ],
)
def test_names_in_few_words(names, short):
    assert patterns(names) == short


def test_coverage_says_what_is_not_trained():
    coverage = Coverage(
        (
            Parameter("a", (10, 10), rule="AdamW"),
            Parameter("b", (10, 10), rule="AdamW", driven=False),
            Parameter("c", (10, 10), rule="AdamW", moved=False),
            Parameter("d", (10, 10), frozen=True),
            Parameter("e", (10, 10)),
        )
    )
    assert [p.state for p in coverage.parameters] == [
        "trained", "no gradient", "never moved", "frozen", "in no optimizer",
    ]  # fmt: skip
    assert len(coverage.warnings()) == 3
    assert coverage.summary().startswith("AdamW: 20 % of the parameters; frozen: 20 %: d; ")
    assert Coverage.from_dict(json.loads(json.dumps(coverage.as_dict()))) == coverage


@pytest.mark.parametrize(("size", "warned"), [(4, False), (6, True)])
def test_more_than_a_twentieth_in_the_fallback(size, warned):
    matrix = Parameter("fc", (100 - size, 10), kind="linear", rule="NAMO")
    left = Parameter("layers.0.experts.3.up", (size, 10), kind="other", rule="AdamW")
    coverage = Coverage((matrix, left), "NAMO")
    assert bool(coverage.warnings()) is warned
    assert coverage.summary().endswith(f"AdamW: {size} % other: layers.*.experts.*.up")
    assert not Coverage((matrix, Parameter("head", (500, 10), kind="head", rule="AdamW")), "NAMO").warnings()
    assert not Coverage((matrix, left)).warnings()
