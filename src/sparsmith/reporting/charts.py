"""The page's charts, drawn from runs: what is shown of each, under which title, with which sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from sparsmith.reporting import maps, plots
from sparsmith.reporting.comparing import Metric
from sparsmith.reporting.folder import Points, Run
from sparsmith.reporting.palette import BASE
from sparsmith.reporting.plots import Curve


@dataclass(frozen=True)
class Chart:
    """An SVG with its caption."""

    svg: str
    caption: str
    title: str = ""


_HEALTH = {
    "load_entropy": ("Entropy of the load", "1 = all experts alike, 0 = one expert takes all."),
    "dead_experts": ("Dead experts", "Experts with less than a tenth of an even share, over all blocks."),
    "router_z": (
        "Router z",
        "Mean squared log-sum-exp of the router's logits; a steady climb means logits that run away.",
    ),
    "router_grad_norm": ("Gradient norm of the routers", "Before clipping; 0 would mean routers that do not learn."),
}

_BAND = (
    "The least and the most used expert of any block; the nearer both stay to 1, the more evenly the router spreads "
    "the tokens."
)


def chart(figure: Figure, caption: str, title: str = "") -> Chart:
    return Chart(plots.svg(figure, title or caption), caption, title)


def colours(runs: Sequence[Run]) -> dict[str, str]:
    """Base grey, the run that the report is about first in the palette."""
    return {"base": BASE, **plots.colours_of([run.name for run in runs])}


def loss_by_domain(runs: Sequence[Run]) -> Chart | None:
    panels: dict[str, dict[str, Curve]] = {}
    for run in runs:
        names = dict.fromkeys(
            d for p in [*run.steps, *run.evals] for d in [*p.get("domain_loss", {}), *p.get("eval_domain_loss", {})]
        )
        for domain in names:
            panels.setdefault(domain, {})[run.name] = Curve(
                *_series(run.steps, "domain_loss", domain), held_out=_series(run.evals, "eval_domain_loss", domain)
            )
        if not names and run.steps:
            panels.setdefault("all rows", {})[run.name] = Curve(
                [p["step"] for p in run.steps], [p["loss"] for p in run.steps]
            )
    return _curves(
        runs,
        panels,
        "Loss by domain",
        "Lower is better. A held-out line that turns up while the training line falls would mean overfitting.",
        ylabel="loss, nats per answer token",
        share_y=True,
    )


def loss_terms(runs: Sequence[Run]) -> Chart | None:
    return _curves(
        runs,
        _by_name(runs, "terms"),
        "Every term of the loss",
        "Each term of the loss as it was computed, before its weight; the balance term is 1 when all experts are used alike.",
        ylabel="value, unweighted",
    )


def pace(runs: Sequence[Run]) -> Chart | None:
    names = {
        "learning_rate": "learning rate",
        "grad_norm": "gradient norm, all trained tensors",
        "tokens_per_second": "tokens per second",
    }
    panels = {
        title: found
        for key, title in names.items()
        if (found := {run.name: Curve(*_flat(run.steps, key)) for run in runs if any(key in p for p in run.steps)})
    }
    return _curves(
        runs,
        panels,
        "Pace of the tuning",
        "A gradient norm that jumps marks a step to look at; a falling speed, a machine that was shared.",
        from_zero=True,
    )


def gradients(runs: Sequence[Run]) -> Chart | None:
    panels = {
        name.removeprefix("gradient/"): lines
        for name, lines in _by_name(runs, "health").items()
        if name.startswith("gradient/")
    }
    return _curves(
        runs,
        panels,
        "Gradient by role",
        "Every trained role receives a gradient; a line at 0 would be a role that does not learn.",
        ylabel="gradient norm",
        from_zero=True,
    )


def health(runs: Sequence[Run]) -> Iterator[Chart]:
    """Router load as a band, then each other figure."""
    told = {name.replace(".", "/") for name in _by_name(runs, "terms")}  # a loss term has its panel elsewhere
    panels = {
        name: lines
        for name, lines in _by_name(runs, "health").items()
        if not name.startswith("gradient/") and name not in told and "/loss_at_" not in name  # depths have a section
    }
    for low in [name for name in panels if name.endswith("load_min")]:
        high = low.replace("load_min", "load_max")
        if high in panels:
            lows, highs = panels.pop(low), panels.pop(high)
            bands = {run: (lows[run].steps, lows[run].values, highs[run].values) for run in lows if run in highs}
            yield chart(plots.band(bands, colours(runs)), _BAND, "Load of the experts")
    titles, words = {}, []
    for name in panels:
        title, meaning = _HEALTH.get(name.split("/")[-1], (name.replace("/", ": ").replace("_", " "), ""))
        titles[title] = panels[name]
        words += [f"{title}: {meaning}"] if meaning else []
    if over_time := _curves(runs, titles, "Health over time", " ".join(words)):
        yield over_time


def expert_load(run: Run) -> Iterator[Chart]:
    """Heat maps of every method that routes."""
    for method, table in (run.tables or {}).items():
        layers, load = table.get("layers"), table.get("load")
        if load:
            even = 100 / len(load[0])
            caption = f"Each row is a block and sums to 100 %; an even router would show {even:.3g} % everywhere."
            yield chart(maps.load_by_layer(load, layers), caption, f"{method}: load by block")
        by_domain = table.get("load_by_domain")
        domains = table.get("domains")
        if isinstance(by_domain, dict):
            domains, by_domain = by_domain.get("domains", domains), by_domain.get("load")
        if by_domain:
            names = [*(domains or []), *(f"domain {i}" for i in range(len(domains or []), len(by_domain)))][
                : len(by_domain)
            ]
            caption = (
                "Above: who works on the tokens of each domain. Below: the same, less the mean of the domains; blue is more than the mean, "
                "orange less. Strong colours below are experts that have specialised."
            )
            yield chart(maps.load_by_domain(by_domain, names, layers), caption, f"{method}: load by domain")


def metric_dots(metric: Metric, runs: Sequence[Run]) -> str:
    """The SVG of one metric's intervals."""
    return interval_dots(metric, colours(runs))


def interval_dots(metric: Metric, colours: dict[str, str]) -> str:
    """`metric_dots` in given colours, by the systems' names."""
    percent = metric.unit == "share"
    unit = "%" if percent else metric.title.partition(", ")[2] or "nats"
    words = f"{metric.title.split(',')[0]}, {unit} ({'more' if metric.larger_is_better else 'less'} is better)"
    return plots.svg(plots.intervals(metric.figures, xlabel=words, colours=colours, percent=percent), metric.title)


def _curves(
    runs: Sequence[Run],
    panels: dict[str, dict[str, Curve]],
    title: str,
    caption: str,
    *,
    ylabel: str = "",
    **style: bool,
) -> Chart | None:
    """Panels of a curve per run; None where there is nothing to draw."""
    if not panels:
        return None
    return chart(plots.curves(panels, ylabel=ylabel, colours=colours(runs), **style), caption, title)


def _by_name(runs: Sequence[Run], group: str) -> dict[str, dict[str, Curve]]:
    panels: dict[str, dict[str, Curve]] = {}
    for run in runs:
        points = [{"step": p["step"], group: _flatten(p.get(group, {}))} for p in run.steps]
        for name in dict.fromkeys(name for point in points for name in point[group]):
            panels.setdefault(name, {})[run.name] = Curve(*_series(points, group, name))
    return panels


def _flatten(values: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update({f"{name}/{inner}": figure for inner, figure in _flatten(value).items()})
        elif isinstance(value, (int, float)):
            flat[name] = value
    return flat


def _series(points: Points, group: str, name: str) -> tuple[list[float], list[float]]:
    found = [(p["step"], p[group][name]) for p in points if name in p.get(group, {})]
    return [step for step, _ in found], [value for _, value in found]


def _flat(points: Points, key: str) -> tuple[list[float], list[float]]:
    found = [(p["step"], p[key]) for p in points if key in p]
    return [step for step, _ in found], [value for _, value in found]
