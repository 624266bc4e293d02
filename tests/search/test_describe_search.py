"""A search's state in the open, as `search.json` has it."""

import json
import math

import numpy as np
import pytest
from helpers.searches import search

from nni_haloc.costs.analytic import mac_table, param_table
from nni_haloc.plan.budget import Limit
from nni_haloc.search.history import describe_search


@pytest.mark.parametrize("options", [{}, {"objective": "paper"}, {"temperature": 2.0}])
def test_a_search_is_described_in_plain_numbers(net, images, loaders, options):
    tables = [table(net, images[:1]) for table in (mac_table, param_table)]
    limits = [
        Limit(table, share * table.original)
        for table, share in zip(tables, (0.4, 0.9), strict=True)
    ]
    strategy = search(net, images, loaders, limits=limits, **options)
    content = json.loads(json.dumps(describe_search(strategy), allow_nan=False))
    assert content == describe_search(strategy)  # nothing but what JSON can hold, and no digit lost
    assert content["version"] == 1
    assert content["objective"] == options.get("objective", "settle")
    facts = [strategy.plan().chosen_by, *strategy.plan().chosen_by["also"]]
    for limit, fact in zip(content["limits"], facts, strict=True):
        assert {key: fact[key] for key in limit if key != "price"} | {
            "price": limit["price"]
        } == limit
    assert (max(limit["price"] for limit in content["limits"]) > 0) == (
        options != {"objective": "paper"}
    )
    assert content["layers"].keys() == strategy.mixed_layers.keys()
    for name, row in content["layers"].items():
        assert list(row) == list(strategy.mixed_layers[name].names)
        z = np.array([entry["logit"] for entry in row.values()])
        softmax = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        assert [entry["probability"] for entry in row.values()] == pytest.approx(
            softmax.tolist(), rel=1e-5
        )
        assert {c: entry["score"] for c, entry in row.items()} == strategy.scores()[name]
        assert {c: entry["cost"] for c, entry in row.items()} == {
            c: [table.costs[name][c] for table in tables] for c in row
        }
        if options != {"objective": "paper"}:  # a score is the logit with its price taken back
            paid = [
                entry["logit"]
                + sum(
                    limit["price"] * cost / limit["budget"]
                    for limit, cost in zip(content["limits"], entry["cost"], strict=True)
                )
                for entry in row.values()
            ]
            centred = [value - math.fsum(paid) / len(paid) for value in paid]
            assert [entry["score"] for entry in row.values()] == pytest.approx(centred, abs=1e-6)
