"""A recipe says which matrix gets what: ordered rules over module names, the first match wins. JSON both ways."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmquant import formats
from llmquant.errors import PlanError


@dataclass(frozen=True)
class Quality:
    """A preset. calibrated: whether it needs calibration; curvature: of the calibration windows, the share that finds
    out how the loss curves; tuning: steps of end-to-end tuning; options: of the solver, where a rule names none.
    """

    calibrated: bool = False
    curvature: float = 0.0
    tuning: int = 0
    options: dict[str, Any] = field(default_factory=dict)


QUALITIES = {
    "fast": Quality(),
    "balanced": Quality(calibrated=True, curvature=0.25),
    "best": Quality(calibrated=True, curvature=1.0, tuning=150, options={"starts": 3, "lean": True}),
}


@dataclass(frozen=True)
class Rule:
    """Modules whose name matches `pattern` (shell wildcards, as in "*.mlp.*") get `format`; None keeps them dense."""

    pattern: str
    format: str | None
    solver: str = "auto"  # gptq where there is calibration, else rtn
    options: dict[str, Any] = field(default_factory=dict)  # of the solver

    def check_kinds(self) -> None:
        """Raises TypeError where something is not of the kind that it must be."""
        if not isinstance(self.pattern, str) or not isinstance(self.solver, str):
            raise TypeError("pattern and solver are strings")
        if not (self.format is None or isinstance(self.format, str)):
            raise TypeError("format is a string or null")
        if not isinstance(self.options, dict) or not all(isinstance(name, str) for name in self.options):
            raise TypeError("options is an object")


@dataclass(frozen=True)
class Recipe:
    """Ordered rules, of which the first that matches a matrix counts.

    Examples:
        >>> down = llmquant.Rule("*.down_proj", "int8:g128")
        >>> recipe = llmquant.Recipe((down, llmquant.Rule("lm_head", None), llmquant.Rule("*", "int4:g128")))
        >>> recipe.rule_for("model.layers.0.mlp.down_proj").format, recipe.rule_for("lm_head").format
        ('int8:g128', None)
        >>> TEXT.write_text('[{"pattern": "*", "format": "mxfp4", "options": {"clip": "mse"}}]') > 0
        True
        >>> llmquant.Recipe.read(TEXT).rules[0].options
        {'clip': 'mse'}
    """

    rules: tuple[Rule, ...]

    @classmethod
    def uniform(cls, spec: str, *, skip: tuple[str, ...] = (), clip: str | None = None, solver: str = "auto") -> Recipe:
        """One format for everything but the modules that match `skip`. clip None: the solver's own."""
        kept = tuple(Rule(pattern, None) for pattern in skip)
        return cls((*kept, Rule("*", spec, solver, options={} if clip is None else {"clip": clip})))

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """A JSON list of rules: [{"pattern": ..., "format": ..., "solver": ..., "options": {...}}, ...]."""
        try:
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror}") from None
        except PlanError:
            raise
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, numbers or nests without end
            raise PlanError(f"{path}: not JSON: {error}") from None

    @classmethod
    def from_json(cls, rules: Any) -> Recipe:
        try:
            recipe = cls(tuple(Rule(**rule) for rule in rules))
            for rule in recipe.rules:
                rule.check_kinds()
        except TypeError as error:
            raise PlanError(
                f"not a recipe ({error}): it is a list of rules with pattern, format and perhaps solver and options"
            ) from None
        return recipe

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(rule) for rule in self.rules]

    def with_options(self, options: dict[str, Any]) -> Recipe:
        """With these options where a rule leaves the solver open, and does not say otherwise itself."""

        def changed(rule: Rule) -> Rule:
            return replace(rule, options={**options, **rule.options}) if rule.solver == "auto" else rule

        return Recipe(tuple(map(changed, self.rules)))

    def settled(self, calibrated: bool) -> Recipe:
        """With a solver's name in every rule."""
        return self.starting_from("gptq" if calibrated else "rtn")

    def starting_from(self, solver: str) -> Recipe:
        """With this solver where a rule leaves it open."""
        return Recipe(tuple(replace(rule, solver=solver) if rule.solver == "auto" else rule for rule in self.rules))

    def rule_for(self, name: str) -> Rule | None:
        """The first rule that matches the module, or None: it stays dense."""
        return next((rule for rule in self.rules if fnmatchcase(name, rule.pattern)), None)

    def check(self, names: list[str], calibrated: bool) -> None:
        """Raises PlanError for unknown formats, solvers and options, for solvers that cannot do what a rule asks of
        them, and for rules that match none of the modules.
        """
        from llmquant.solvers import CALIBRATED, REFUSALS, SOLVERS, TUNERS, wrong_option

        for rule in self.rules:
            fmt = None if rule.format is None else formats.get(rule.format)
            known: dict[str, Any] = {**SOLVERS, **TUNERS}
            if rule.solver not in known:
                raise PlanError(f"solver {rule.solver!r} is unknown: known are {', '.join(known)}")
            if rule.solver in CALIBRATED and not calibrated:
                raise PlanError(f"solver {rule.solver!r} needs calibration: use --quality balanced, or solver rtn")
            problem = wrong_option(known[rule.solver], rule.options)
            if problem is None and fmt is not None and rule.solver in REFUSALS:
                problem = REFUSALS[rule.solver](fmt)
            if problem is not None:
                raise PlanError(f"solver {rule.solver!r} of rule {rule.pattern!r} {problem}")
            if not any(fnmatchcase(name, rule.pattern) for name in names):
                raise PlanError(f"pattern {rule.pattern!r} matches no module that can be quantized, such as {names[0]}")
