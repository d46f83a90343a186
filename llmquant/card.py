"""The model card: README.md of a quantized folder, as the hub shows it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from llmquant.recipe import QUALITIES

LEFT = 0.02  # bits a weight of a budget that may be left without a word


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def alike(found: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """(name, reason), one for all names that differ in their numbers only."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, reason in found:
        groups.setdefault((re.sub(r"\d+", "*", name), reason), []).append(name)
    return [
        (names[0] if len(names) == 1 else f"{pattern} ({len(names)} of them)", reason)
        for (pattern, reason), names in groups.items()
    ]


def recovered(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Where numbers went wrong, and what was done. facts: a manifest."""
    return alike((found["name"], found["what"]) for found in facts.get("recoveries", []))


def allocated(found: dict[str, Any]) -> str:
    """How formats were chosen, in a line. found: what the manifest notes of it."""
    counts = Counter(part["format"] for part in found["sets"] for _ in part["names"])
    chosen = ", ".join(f"{spec} {counts[spec]}" for spec in found["formats"] if counts[spec])
    known = {"predicted": found.get("predicted_kl"), "measured": found.get("measured_kl")}
    kl = ", ".join(f"{name} {value:.4g}" for name, value in known.items() if value is not None)
    line = f"{found['aim']}, by {found['sensitivity']}: {chosen}"
    if found.get("bits_left", 0.0) >= LEFT:
        line += f"; {found['bits_left']:.3f} bits a weight are left: no mixture of these formats in between loses less"
    return f"{line}; KL with weights rounded to nearest, on {found['tokens']} tokens: {kl}" if kl else line


def tuned(found: dict[str, Any]) -> str:
    """What end-to-end tuning came to, in a line. found: what the manifest notes of it."""
    return f"{'kept' if found['kept'] else 'not kept'}: {learned(found)}"


def learned(found: dict[str, Any]) -> str:
    """What training came to, in a line. found: what the manifest notes of it."""
    first, least = found["divergences"][0][1], min(kl for _, kl in found["divergences"])
    return f"KL on held-out tokens {first:.4g} -> {least:.4g}"


def fitted(found: dict[str, Any]) -> str:
    """How calibration text fits the model, in a line. found: what the manifest notes of it."""
    said = f"its tokens cost the model {found['excess']:.2f} nats more than it expects"
    if not found["own_windows"]:
        return said
    return (
        f"{said}, which is above {found['bound']:g}: {found['own_windows']} of {found['windows']} windows are the "
        "model's own samples instead"
    )


def turned(found: dict[str, Any]) -> str:
    """Which rotation was chosen, and why, in a line. found: what the manifest notes of it."""
    if "reason" in found:
        return f"{found['chosen']}: {found['reason']}"
    tried = ", ".join(f"{mode} {kl:.4f}" for mode, kl in found["divergences"].items())
    refused = "".join(f"; {mode} cannot be: {why}" for mode, why in found.get("refused", {}).items())
    return f"{found['chosen']}: KL of plain rounding on random tokens: {tried}{refused}"


def verified(found: dict[str, Any]) -> str:
    """What a verification says of outputs and logits, in a line. found: what the manifest notes of it."""
    if "unchecked" in found:
        return str(found["unchecked"])
    bound = found["worst_bound"]
    return (
        f"on {found['tokens']} tokens: KL {found['kl_mean']:.4f}, the same likeliest token for "
        f"{found['top1_agreement']:.1%}; outputs of {found['worst_block']} off by {found['worst_error']:.4f} "
        f"({'trained' if bound is None else f'bound {bound:.4f}'})"
    )


def command(facts: dict[str, Any]) -> str:
    """The command that makes the folder again. facts: its manifest."""
    settings = facts["settings"]
    if "tune" in settings:
        rest = {key: value for key, value in settings.items() if key != "tune"}
        return f"{command({**facts, 'settings': rest})} -o out\n{_tune_command(facts)}"
    if "qat" in settings:
        return _qat_command(facts)
    words = ["llmquant", "quantize", facts["model"]]
    rules, calibration = settings["recipe"], settings["calibration"]
    share = 0.0 if calibration is None else calibration["curvature"]
    quality = next(
        name for name, one in QUALITIES.items() if (one.curvature, one.tuning) == (share, settings["tuning"])
    )
    *kept, last = rules
    given = QUALITIES[quality].options if last["solver"] == "auto" else {}
    options = {key: value for key, value in last["options"].items() if given.get(key) != value}
    budget = settings.get("budget")
    if all(rule["format"] is None for rule in kept) and last["pattern"] == "*" and set(options) <= {"clip"}:
        words += [] if budget else ["--format", last["format"]]
        words += [word for rule in kept for word in ("--skip", f"'{rule['pattern']}'")]
        words += [word for key, value in options.items() for word in (f"--{key}", value)]
        words += ["--solver", last["solver"]] if last["solver"] != "auto" else []
    else:
        words += ["--recipe", "rules.json"]
    if budget:
        asked = {"--target-bpw": budget["bits"], "--target-size": budget["nbytes"], "--max-kl": budget["kl"]}
        words += [str(word) for option in asked.items() if option[1] is not None for word in option]
        words += ["--formats", ",".join(budget["formats"])]
        words += ["--sensitivity", budget["sensitivity"]] if budget["sensitivity"] != "auto" else []
    words += ["--quality", quality] if quality != "balanced" else []
    words += ["--rotate", settings["rotate"]] if settings["rotate"] != "none" else []
    if calibration is not None:
        words += ["--calibration", calibration["source"], "--samples", str(calibration["samples"])]
        words += ["--length", str(calibration["length"])] if calibration["length"] else []
        words += [] if calibration["check"] else ["--no-calibration-check"]
    words += ["--seed", str(settings["seed"])]
    found = " ".join(words)
    return found if "rules.json" not in words else f"{found}\n\nrules.json:\n{json.dumps(rules, indent=1)}"


def _tune_command(facts: dict[str, Any]) -> str:
    course, calibration = facts["settings"]["tune"], facts["settings"]["tune"]["calibration"]
    words = ["llmquant tune out --reference", facts["model"], "--calibration", calibration["source"]]
    words += ["--samples", str(calibration["samples"])]
    words += ["--length", str(calibration["length"])] if calibration["length"] else []
    words += ["--steps", str(course["steps"]), "--batch", str(calibration["batch"]), "--top-k", str(course["top"])]
    return " ".join([*words, *(["--codes"] if course["codes"] else []), "--seed", str(course["seed"])])


def _qat_command(facts: dict[str, Any]) -> str:
    settings, calibration = facts["settings"], facts["settings"]["calibration"]
    course, (*others, last) = settings["qat"], settings["recipe"]
    uniform = not others and last["pattern"] == "*" and not last["options"]
    words = ["llmquant", "qat", facts["model"], *(["--format", last["format"]] if uniform else ["--recipe rules.json"])]
    words += ["--data", calibration["source"], "--samples", str(calibration["samples"])]
    words += ["--length", str(calibration["length"])] if calibration["length"] else []
    given = {key: value for key, value in course.items() if key != "looks"}
    words += [f"--{key.replace('_', '-')} {value}" for key, value in given.items()]
    found = " ".join([*words, "--seed", str(settings["seed"])])
    return found if uniform else f"{found}\n\nrules.json:\n{json.dumps(settings['recipe'], indent=1)}"


def text(facts: dict[str, Any]) -> str:
    """Markdown with the hub's front matter. facts: the folder's manifest."""
    specs = sorted({tensor["format"] for tensor in facts["tensors"]})
    named = [f"base_model: {facts['model']}", "base_model_relation: quantized"] if "/" in facts["model"] else []
    front = ["---", *named, "library_name: transformers", "tags:", "- llmquant", "- quantized", "---"]
    before, after = facts["bytes_before"], facts["bytes_after"]
    rows = [
        ("base model", facts["model"]),
        ("format", ", ".join(f"`{spec}`" for spec in specs)),
        ("size", f"{size(before)} -> {size(after)}"),
        ("bits a quantized weight, metadata counted", f"{facts['bits_per_weight']:.3f}"),
        ("matrices quantized", len(facts["tensors"])),
        ("kept as they are", ", ".join(f"`{kept['name']}`" for kept in facts["kept_dense"]) or "embeddings and head"),
        *([("formats chosen", allocated(facts["allocation"]))] if "allocation" in facts else []),
        *([("calibration text", fitted(facts["calibration_fit"]))] if "calibration_fit" in facts else []),
        *([("rotation", turned(facts["rotation"]))] if "rotation" in facts else []),
        *([("tuning of all blocks together", tuned(facts["tuning"]))] if "tuning" in facts else []),
        *([("trained while rounded", learned(facts["qat"]))] if "qat" in facts else []),
        *([("verified", verified(facts["verification"]))] if "verification" in facts else []),
        *((f"recovered: `{name}`", what) for name, what in recovered(facts)),
        *_measured(facts.get("evaluation") or {}),
    ]
    table = ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    worst = _worst(facts["tensors"])
    return (
        "\n".join([*front, "", f"# {facts['model']}, quantized", "", *table, "", *worst, *USE, *_again(facts)]) + "\n"
    )


def _measured(found: dict[str, Any]) -> list[tuple[str, str]]:
    if "kl_mean" in found:
        perplexity = f"{found['reference']['perplexity']:.4g} -> {found['model']['perplexity']:.4g}"
        return [("perplexity", perplexity), ("KL divergence, nats a token", f"{found['kl_mean']:.5f}")]
    return [("perplexity", f"{found['perplexity']:.4g}")] if "perplexity" in found else []


def _worst(tensors: list[dict[str, Any]]) -> list[str]:
    key = "output_error" if any("output_error" in tensor for tensor in tensors) else "error"
    known = sorted((t for t in tensors if key in t), key=lambda tensor: -tensor[key])[:5]
    lines = [f"| `{tensor['name']}` | {percent(tensor[key])} |" for tensor in known]
    return [f"| largest relative {key.replace('_', ' ')}s | |", "|---|---|", *lines, ""] if lines else []


USE = """## Use it

```python
import llmquant  # pip install llmquant; without it transformers returns a model of random numbers

model = llmquant.load("THIS FOLDER OR ID")
```

For vLLM, SGLang and plain transformers, where the format is one of compressed-tensors':

```
llmquant export FOLDER --to compressed-tensors -o OUT
vllm serve OUT
```

""".splitlines()


def _again(facts: dict[str, Any]) -> list[str]:
    return ["## Do it again", "", "```", *command(facts).splitlines(), "```", "", *_versions(facts)]


def _versions(facts: dict[str, Any]) -> list[str]:
    return [", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + "."]
