"""Formats chosen for a budget: the knapsack is exact, costs are what they say, and a run keeps its budget."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import make_checkpoint
from test_pipeline import SMALL, contents, cut_after
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant import allocate, card, formats, knapsack, pipeline, sensitivity
from llmquant.blocks import StreamedModel
from llmquant.checkpoint import MANIFEST, Checkpoint
from llmquant.cli_budget import budget_of
from llmquant.errors import PlanError
from llmquant.job import Budget, silent
from llmquant.recipe import Recipe, Rule
from llmquant.stats import Stats

SPECS = ("int2:g32", "int3:g32", "int4:g32", "int8:g64")
WINDOWS = torch.randint(3, 300, (4, 16), generator=torch.Generator().manual_seed(2))


# ---- the knapsack


def by_trying_all(costs: np.ndarray, values: np.ndarray, limit: float) -> float | None:
    sets, candidates = costs.shape
    found = [
        sum(values[i, pick] for i, pick in enumerate(picks))
        for picks in itertools.product(range(candidates), repeat=sets)
        if sum(costs[i, pick] for i, pick in enumerate(picks)) <= limit
    ]
    return min(found, default=None)


def test_the_knapsack_finds_what_trying_all_choices_finds() -> None:
    random = np.random.default_rng(0)
    feasible = 0
    for case in range(120):
        shape = random.integers(1, 6), random.integers(1, 5)
        costs = random.integers(-3, 20, shape).astype(float) if case % 2 else random.random(shape)
        values = random.integers(0, 4, shape).astype(float) if case % 3 else random.random(shape) - 0.2
        if shape[1] > 1:
            costs[0, 0] = np.inf  # no candidate
        least = costs.min(1).sum()
        limit = random.uniform(least - 1, np.where(np.isfinite(costs), costs, -np.inf).max(1).sum() + 1)
        best, found = by_trying_all(costs, values, limit), knapsack.solve(costs, values, limit)
        assert (found is None) == (best is None)
        if found is None or best is None:
            continue
        feasible += 1
        assert found.value == pytest.approx(best, abs=1e-9)
        assert found.gap == 0
        assert found.cost == pytest.approx(sum(costs[i, pick] for i, pick in enumerate(found.picks)))
        assert found.cost <= limit + 1e-9
    assert feasible > 60


def test_a_knapsack_of_a_large_model_is_solved_exactly_and_a_thinned_one_tells_its_gap() -> None:
    random = np.random.default_rng(1)
    weights = np.array([6144 * 4096, 4096 * 4096, 28672 * 4096, 14336 * 4096] * 12, dtype=float)
    bits = np.array([2.25, 3.25, 4.25, 8.125])
    costs = weights[:, None] * bits / 8 + 16
    values = np.sqrt(weights)[:, None] * random.lognormal(size=(48, 1)) * 4.0**-bits * random.lognormal(0, 0.1, (48, 4))
    limit = weights.sum() * 3.4 / 8
    exact = knapsack.solve(costs, values, limit)
    thinned = knapsack.solve(costs, values, limit, states=40)
    assert exact is not None
    assert thinned is not None
    assert exact.gap == 0
    assert exact.cost <= limit
    assert limit - exact.cost < weights.sum() * 0.02 / 8
    assert thinned.gap > 0
    assert thinned.cost <= limit
    assert exact.value <= thinned.value <= exact.value + thinned.gap


# ---- sets and costs


@pytest.fixture(autouse=True)
def _little_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "SHOWN", replace(SMALL, curvature=1.0))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "llama")


def prepared(model: Path, output: Path, budget: Budget, **job: Any) -> pipeline.Prepared:
    settings: dict[str, Any] = {"calibration": None, **job}
    return pipeline.prepare(pipeline.Job(str(model), Recipe.uniform("int4:g32"), budget=budget, **settings), output)


def test_matrices_that_read_one_tensor_have_one_format_and_so_have_all_experts_of_a_layer(
    llama: Path, tmp_path: Path
) -> None:
    mixtral = make_checkpoint(tmp_path / "moe", "mixtral")
    for folder, expected in (
        (llama, [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]),
        (mixtral, [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_up_proj", "down_proj"}]),
    ):
        run = prepared(folder, tmp_path / "out", Budget(bits=4.0, formats=("int2:g16", "int4:g16")))
        sets, costs = sensitivity.estimated(
            run.model, run.checkpoint, WINDOWS, 2, list(run.plan.rows), ("int2:g16", "int4:g16"), None, silent
        )
        for block in range(len(run.model.block_names)):
            own = [part for part in sets if part.block == block]
            names = [{row.target.listed.rpartition(".")[2] for row in part.rows} for part in own]
            assert sorted(names, key=sorted) == sorted(expected, key=sorted)
            assert sum(len(part.rows) for part in own) == len(run.plan.of_block(block))
        assert (costs[:, 0] > costs[:, 1]).all()


def divergence(before: Tensor, after: Tensor) -> float:
    """KL of logits (tokens, vocabulary) in float64, token by token."""
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


@torch.no_grad()
def test_a_cost_is_the_divergence_of_the_whole_model_with_one_set_rounded(llama: Path, tmp_path: Path) -> None:
    run = prepared(llama, tmp_path / "out", Budget(bits=4.0, formats=SPECS))
    model = StreamedModel(Checkpoint(llama), dtype=torch.float32)
    with sensitivity.Whole(model, WINDOWS, 3, silent) as whole:
        sets = whole.sets(run.checkpoint, list(run.plan.rows), SPECS)
        alone = sensitivity.measured(whole, sets, silent)
        picks = tuple(place % len(SPECS) for place in range(len(sets)))
        again = sensitivity.measured_in_context(whole, sets, picks, np.ones_like(alone, dtype=bool), silent)

    original = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    before = original(WINDOWS).logits.flatten(0, 1)

    def by_hand(chosen: dict[int, int]) -> float:
        twin = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
        for place, pick in chosen.items():
            for row in sets[place].rows:
                fmt = formats.get(SPECS[pick]).stored_for(torch.float32)
                weight = twin.get_submodule(row.target.name).weight.data
                weight.copy_(fmt.decode(*fmt.quantize(weight)))
        return divergence(before, twin(WINDOWS).logits.flatten(0, 1))

    for place, pick in [(0, 0), (2, 1), (len(sets) - 1, 0), (len(sets) - 3, 2)]:
        assert alone[place, pick] == pytest.approx(by_hand({place: pick}), rel=1e-3, abs=1e-7)
        there = dict(enumerate(picks))
        change = by_hand({**there, place: pick}) - by_hand(there)
        assert again[place, pick] == pytest.approx(change, rel=1e-3, abs=1e-6)


def test_fishers_estimate_is_the_quadratic_form_of_the_kronecker_product() -> None:
    random = torch.Generator().manual_seed(0)
    x, change = torch.randn(50, 6, generator=random), torch.randn(5, 6, generator=random)
    stats = Stats.empty(6)
    stats.update(x, x)
    roots = torch.randn(2, 3, 3, generator=random)  # two blocks of three rows, the last of which is none
    curvature = roots @ roots.mT
    whole = torch.block_diag(*curvature)[:5, :5].double()
    vector = change.double().flatten()
    wanted = vector @ torch.kron(whole, (x.T @ x).double() / 50) @ vector / 2
    assert sensitivity.fisher(change, stats, curvature) == pytest.approx(float(wanted), rel=1e-5)


def test_fishers_estimate_is_near_the_divergence_where_little_changes(llama: Path, tmp_path: Path) -> None:
    found: dict[str, np.ndarray] = {}
    for how in ("kl", "fisher"):
        budget = Budget(bits=7.0, formats=("int6:g32", "int8:g32"), sensitivity=how)
        run = prepared(llama, tmp_path / how, budget)
        facts = pipeline.quantize(run, tmp_path / how)["allocation"]
        assert facts["sensitivity"] == how
        found[how] = np.array([part["costs"][0] for part in facts["sets"]])
    ratio = found["fisher"] / found["kl"]
    assert 0.5 < np.median(ratio) < 2
    assert ratio.min() > 0.2
    assert ratio.max() < 5


# ---- runs


@pytest.mark.parametrize("how", ["kl", "fisher", "hessian"])
def test_a_run_keeps_its_budget_and_its_recipe_gives_the_same_bytes(how: str, llama: Path, tmp_path: Path) -> None:
    budget = Budget(bits=4.3, formats=SPECS, sensitivity=how)
    facts = pipeline.quantize(prepared(llama, tmp_path / "out", budget), tmp_path / "out")
    assert 4.3 - 0.1 < facts["bits_per_weight"] <= 4.3
    assert facts["bits_per_weight"] == facts["allocation"]["bits_per_weight"]
    stored = sum(np.prod(tensor["shape"]) * tensor["bits_per_weight"] for tensor in facts["tensors"])
    assert stored / sum(np.prod(tensor["shape"]) for tensor in facts["tensors"]) <= 4.3
    assert len({tensor["format"] for tensor in facts["tensors"]}) > 1
    assert facts["allocation"]["bits_left"] == pytest.approx(4.3 - facts["bits_per_weight"])
    assert ("bits a weight are left" in card.allocated(facts["allocation"])) == (facts["bits_per_weight"] < 4.28)
    rules = Recipe.read(tmp_path / "out" / "recipe.json")
    assert {rule.pattern for rule in rules.rules} == {tensor["name"] for tensor in facts["tensors"]}
    again = pipeline.prepare(pipeline.Job(str(llama), rules, calibration=None), tmp_path / "again")
    pipeline.quantize(again, tmp_path / "again")
    one, other = contents(tmp_path / "out"), contents(tmp_path / "again")
    assert {*one} - {*other} == {"recipe.json"}
    assert {name for name in other if one[name] != other[name]} == {MANIFEST}


def test_a_cut_run_keeps_what_was_chosen_and_ends_the_same(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget(bits=3.5, formats=SPECS)
    pipeline.quantize(prepared(llama, tmp_path / "whole", budget), tmp_path / "whole")
    cut_after(llama, tmp_path / "cut", 1, budget=budget)

    def never(*_: object) -> None:
        raise AssertionError("measured a second time")

    monkeypatch.setattr(allocate, "measured", never)
    pipeline.quantize(prepared(llama, tmp_path / "cut", budget), tmp_path / "cut")
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_size_is_that_of_all_weights_and_rules_before_the_last_stay(llama: Path, tmp_path: Path) -> None:
    rules = Recipe((Rule("*.0.*.down_proj", "int8:g32"), Rule("*.o_proj", None), Rule("*", "int4:g32")))
    uniform = pipeline.prepare(pipeline.Job(str(llama), rules, calibration=None), tmp_path / "uniform").plan
    job = pipeline.Job(str(llama), rules, calibration=None, budget=Budget(nbytes=uniform.bytes_after, formats=SPECS))
    facts = pipeline.quantize(pipeline.prepare(job, tmp_path / "out"), tmp_path / "out")
    assert 0.97 * uniform.bytes_after < facts["bytes_after"] <= uniform.bytes_after
    kept = {tensor["name"]: tensor["format"] for tensor in facts["tensors"]}
    assert [fmt for name, fmt in kept.items() if "layers.0." in name and name.endswith("down_proj")] == [
        "int8:g32:fp16"
    ]
    assert not any(name.endswith("o_proj") for name in kept)


def test_the_smallest_size_with_a_divergence(llama: Path, tmp_path: Path) -> None:
    bits = []
    for how, most in (("kl", 0.002), ("fisher", 0.0005)):
        budget = Budget(kl=most, formats=SPECS, sensitivity=how)
        facts = pipeline.quantize(prepared(llama, tmp_path / how, budget), tmp_path / how)
        assert 0.25 * most < facts["allocation"]["measured_kl"] <= most
        bits.append(facts["bits_per_weight"])
    assert bits[0] < bits[1]
    impossible = Budget(kl=1e-9, formats=SPECS[:2])
    with pytest.raises(PlanError, match="cannot be met: with every matrix in the best"):
        pipeline.quantize(prepared(llama, tmp_path / "none", impossible), tmp_path / "none")


# ---- refusals


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(), "0 budgets"),
        (lambda: Budget(bits=3.0, kl=0.1), "2 budgets"),
        (lambda: Budget(bits=0.0), "above zero"),
        (lambda: Budget(bits=float("nan")), "above zero"),
        (lambda: Budget(bits=3.0, formats=("int4:g32", "int4:g32")), "at least two formats"),
        (lambda: Budget(bits=3.0, formats=("int4:g32", "int9:g32")), "'int9:g32' is unknown"),
        (lambda: Budget(bits=3.0, sensitivity="guess"), "'guess' is unknown"),
    ],
)
def test_budgets_that_say_nothing_are_refused(make: Callable[[], Budget], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make()


def test_what_cannot_be_met_is_refused_in_the_plan(llama: Path, tmp_path: Path) -> None:
    for budget, said in [
        (Budget(bits=2.0, formats=SPECS), "raise the budget, or give smaller formats"),
        (Budget(nbytes=1000, formats=SPECS), "for 1,000 bytes"),
        (Budget(kl=0.1, formats=SPECS, sensitivity="hessian"), "say nothing of divergence"),
    ]:
        with pytest.raises(PlanError, match=said):
            prepared(llama, tmp_path / "out", budget)


def test_a_large_model_is_not_measured_unless_asked(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepared(llama, tmp_path / "out", Budget(bits=4.0)).plan
    assert first.sensitivity == "kl"
    assert {row.format.spec for row in first.rows} == {"int6:g64:fp16"}  # int8:g128 is none for rows of 64
    monkeypatch.setattr(allocate, "AFFORDABLE", {"cpu": 1.0})
    assert prepared(llama, tmp_path / "out", Budget(bits=4.0)).plan.sensitivity == "fisher"
    plan = prepared(llama, tmp_path / "out", Budget(bits=4.0, sensitivity="kl")).plan
    assert plan.sensitivity == "kl"
    assert "for 4 bits a weight by kl" in plan.notes[-1]
    json.dumps(plan.to_json())


def test_words_of_the_command_line_become_a_budget_and_the_card_gives_them_back(llama: Path, tmp_path: Path) -> None:
    assert budget_of(None, None, None, None, "auto") is None
    assert budget_of(None, "1.5GB", None, None, "auto") == Budget(nbytes=1_500_000_000)
    budget = budget_of(4.5, None, None, "int3:g32, int5:g32", "hessian")
    assert budget == Budget(bits=4.5, formats=("int3:g32", "int5:g32"), sensitivity="hessian")
    with pytest.raises(PlanError, match="--formats and --sensitivity go with"):
        budget_of(None, None, None, "int3:g32,int5:g32", "auto")
    with pytest.raises(PlanError, match="--target-size 'much'"):
        budget_of(None, "much", None, None, "auto")
    assert budget is not None
    facts = pipeline.quantize(prepared(llama, tmp_path / "out", budget), tmp_path / "out")
    words = card.command(facts)
    assert "--target-bpw 4.5 --formats int3:g32,int5:g32 --sensitivity hessian --quality fast" in words
    assert "for 4.5 bits a weight, by hessian: " in card.text(facts)
