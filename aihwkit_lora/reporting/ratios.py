"""Ratios with names, and with ranges that respect that one price list stands on both sides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from math import ceil

from aihwkit_lora.errors import ConfigurationError
from aihwkit_lora.metering.counts import Counts, Level
from aihwkit_lora.metering.events import EVENTS, Part
from aihwkit_lora.metering.interval import Interval
from aihwkit_lora.metering.pricing import Priced, Quantity, price
from aihwkit_lora.reporting.baselines import Case
from aihwkit_lora.reporting.records import Ratio

_UPDATE = (Part.WRITE, Part.OPTIMIZER)
"""What an update of weights takes once their gradient is known."""

_Ends = Mapping[str, tuple[Fraction, Fraction]]


def price_ratio(numerator: Counts, denominator: Counts, prices: Mapping[str, Quantity]) -> Interval:
    """Divide the cost of some counts by the cost of others, under the same prices.

    The range is over all prices within their ranges, each event's price the same above and below
    the line: what costs the same on both sides does not blur the ratio. Events whose prices are the
    same, or follow one another, such as conversions forwards and backwards by the same ADC, vary
    together. The ratio Σ n·p / Σ d·p rises with the price p of an event if and only if n/d of that
    event is above the ratio. So at its largest, the events with n/d above some threshold are at
    their high price and the rest at their low price, at its smallest the other way round, and it is
    enough to try every threshold. Computed in rational numbers and rounded once.

    Args:
        numerator: What is above the line.
        denominator: What is below the line.
        prices: Cost of one count of each event; events without a price are left out.
    Returns:
        The ratio at the best known prices, and its smallest and largest value.
    Raises:
        ConfigurationError: The denominator costs nothing, or nothing at its lowest prices, so
            that no largest ratio exists.

    Example:
        >>> from aihwkit_lora.metering import Status
        >>> pulse = Quantity(
        ...     value=2.0, low=1.0, high=4.0, unit="J", source="example", status=Status.ASSUMED
        ... )
        >>> thirty, ten = Counts({"set_pulses": 30}), Counts({"set_pulses": 10})
        >>> price_ratio(thirty, ten, {"set_pulses": pulse})
        Interval(value=3.0, low=3.0, high=3.0)
    """
    above, below = _by_price(numerator, prices), _by_price(denominator, prices)
    events = [event for event in prices if above[event] or below[event]]
    ends = {event: _ends(prices[event].interval) for event in events}
    best = {event: Fraction(prices[event].value) for event in events}
    if _cost(below, {event: low for event, (low, _) in ends.items()}) == 0:
        raise ConfigurationError(
            "ratio: expected a denominator that costs something at its lowest prices, got 0 from "
            f"the counts {dict(denominator)}. Choose another denominator, or price its events."
        )
    ratios = [
        _cost(above, corner) / _cost(below, corner)
        for corner in (best, *_corners(above, below, ends))
    ]
    return Interval(float(ratios[0]), float(min(ratios)), float(max(ratios)))


def energy_ratio(
    name: str,
    numerator: Counts,
    denominator: Counts,
    chip: Priced,
    *,
    above: str,
    below: str,
    includes: str,
) -> Ratio:
    """Name a ratio of two energies on one chip.

    Args:
        name: Of the ratio.
        numerator: What is above the line.
        denominator: What is below the line.
        chip: Whose energy prices to take.
        above: What the numerator is, in words.
        below: What the denominator is, in words.
        includes: What is counted on both sides, in words. Events that happened and that the chip
            has no price for are named behind it.
    Returns:
        The ratio with its range over the chip's prices.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> ratio = energy_ratio(
        ...     "write energy",
        ...     Counts({"set_pulses": 40}),
        ...     Counts({"set_pulses": 10}),
        ...     chips.get("rm-180nm"),
        ...     above="all weights rewritten",
        ...     below="one layer rewritten",
        ...     includes="pulses",
        ... )
        >>> ratio.value, ratio.numerator
        (4.0, 'all weights rewritten')
    """
    interval = price_ratio(numerator, denominator, chip.prices.energy)
    unpriced = price(numerator + denominator, chip).unpriced_energy
    return _named(name, interval, above, below, _without(includes, unpriced))


def parameter_ratio(full: int, adapted: int) -> Ratio:
    """How many times fewer scalars are trained.

    Args:
        full: Scalars that get a gradient if all weights are trained; 0 or more.
        adapted: Scalars that get one if adapters are; 1 or more.
    Raises:
        ConfigurationError: Nothing is adapted.

    Example:
        >>> round(parameter_ratio(336_384, 13_408).value, 1)
        25.1
    """
    _require_some(adapted, "trainable parameters", "adapted scalars")
    words = (f"all weights: {full:,}", f"adapters: {adapted:,}", "scalars that get a gradient")
    return _named("trainable parameters", _exactly(full, adapted), *words)


def update_count_ratio(full: Case, hybrid: Case) -> Ratio:
    """How many times fewer updates of single scalars an adaptation takes.

    Args:
        full: Training of all weights.
        hybrid: Training of adapters.
    Raises:
        ConfigurationError: Nothing is updated below the line.

    Example:
        >>> from aihwkit_lora import chips
        >>> def updates(n):
        ...     return Case(name=f"{n}", counts=Counts({"optimizer_updates": n}), chip=chip)
        >>> chip = chips.get("rm-180nm")
        >>> update_count_ratio(updates(1000), updates(20)).value
        50.0
    """
    above, below = (case.counts["optimizer_updates"] for case in (full, hybrid))
    _require_some(below, "update count", "optimizer_updates")
    words = (str(full), str(hybrid), "updates of one scalar by one optimiser step")
    return _named(_title("update count", full, hybrid), _exactly(above, below), *words)


def update_energy_ratio(full: Case, hybrid: Case) -> Ratio:
    """How many times less energy goes into optimiser and write–verify.

    Forward and backward passes, which both ways of training share, are left out.

    Args:
        full: Training of all weights.
        hybrid: Training of adapters.
    Raises:
        ConfigurationError: The updates below the line cost nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.reporting import FACES, baselines
        >>> chip, layers = chips.get("rm-180nm"), FACES.layers
        >>> full = baselines.train_on_arrays(layers, chip, FACES.full, written="every step")
        >>> hybrid = baselines.train_hybrid(layers, chip, FACES.hybrid)
        >>> f"{update_energy_ratio(full, hybrid).value:.0f}"
        '948'
    """
    includes = "optimiser, pulses and verification; neither forward nor backward passes"
    return case_ratio("update energy", _updates(full), _updates(hybrid), includes=includes)


def _updates(case: Case) -> Case:
    kept = (event for event in case.counts if EVENTS.get(event).part in _UPDATE)
    return replace(case, counts=case.counts.only(kept))


def training_energy_ratio(full: Case, hybrid: Case) -> Ratio:
    """How many times less energy all of training takes.

    Args:
        full: Training of all weights: on arrays, written every step or once, or all digital.
        hybrid: Training of adapters.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.reporting import FACES, baselines
        >>> chip, layers = chips.get("rm-180nm"), FACES.layers
        >>> full = baselines.train_on_arrays(layers, chip, FACES.full, written="once")
        >>> hybrid = baselines.train_hybrid(layers, chip, FACES.hybrid)
        >>> f"{training_energy_ratio(full, hybrid).value:.1f}"
        '13.3'
    """
    includes = "forward and backward passes, gradients, optimiser, pulses, verification"
    return case_ratio("training energy", full, hybrid, includes=includes)


def deployment_energy_ratio(written: Case, loaded: Case) -> Ratio:
    """How many times less energy brings an adapted model onto the chip.

    Args:
        written: All weights, written into arrays.
        loaded: Adapters, written into SRAM.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.reporting import FACES, baselines
        >>> chip, layers = chips.get("rm-180nm"), FACES.layers
        >>> written = baselines.deploy_on_arrays(layers, chip)
        >>> loaded = baselines.deploy_adapters(layers, chip, bits=8)
        >>> f"{deployment_energy_ratio(written, loaded).value:.0f}"
        '633'
    """
    includes = "pulses, verification, SRAM writes, off-chip reads"
    if not (written.counts + loaded.counts)["offchip_read_bits"]:
        includes = "pulses, verification, SRAM writes; no transfer from off the chip"
    return case_ratio("deployment energy", written, loaded, includes=includes)


def deployment_time_ratio(written: Case, loaded: Case, *, port_bits: int, cycle_s: float) -> Ratio:
    """How many times less time brings an adapted model onto the chip.

    Args:
        written: All weights, written into arrays, as parallel as the chip's write policy says.
        loaded: Adapters, written into SRAM.
        port_bits: Width of the SRAM's port; 1 or more.
        cycle_s: Time of one write through it, in seconds; above 0.
    Raises:
        ConfigurationError: The port has no width, no time, or nothing to write.

    Example:
        >>> from aihwkit_lora import chips
        >>> chip = chips.get("rm-180nm")
        >>> cells = Case(name="cells", counts=Counts({"set_slots": 100}), chip=chip)
        >>> adapter = Case(name="adapter", counts=Counts({"sram_write_bits": 640}), chip=chip)
        >>> deployment_time_ratio(cells, adapter, port_bits=64, cycle_s=1e-8).value
        1000.0
    """
    if not (port_bits >= 1 and cycle_s > 0.0):
        raise ConfigurationError(
            "deployment time: expected port_bits of 1 or more and cycle_s above 0, got "
            f"{port_bits} and {cycle_s}."
        )
    bits = loaded.counts["sram_write_bits"]
    _require_some(bits, "deployment time", "sram_write_bits")
    spent = price(written.counts, written.chip)
    load_s = ceil(bits / port_bits) * cycle_s
    interval = spent.latency_s / Interval(load_s, load_s, load_s)
    includes = f"pulses and verification; SRAM writes of {port_bits} bit in {cycle_s:g} s"
    includes = _without(_levelled(includes, written.counts), spent.unpriced_latency)
    words = (str(written), str(loaded), includes)
    return _named(_title("deployment time", written, loaded), interval, *words)


def inference_energy_ratio(baseline: Case, hybrid: Case) -> Ratio:
    """How many times less energy one sample takes.

    Args:
        baseline: Arrays alone, all digital, or a graphics card.
        hybrid: Arrays with adapters.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.metering.workload import DigitalExecution, Reuse
        >>> from aihwkit_lora.reporting import FACES, baselines
        >>> chip, layers = chips.get("rm-180nm"), FACES.layers
        >>> execution = DigitalExecution(reuse=Reuse.STATIONARY)
        >>> digital = baselines.infer_digital(layers, chip, execution)
        >>> hybrid = baselines.infer_hybrid(layers, chip, execution)
        >>> f"{inference_energy_ratio(digital, hybrid).value:.1f}"
        '1.3'
    """
    includes = "DAC, cells, ADC, shift-add; digital MACs, additions and SRAM traffic of one sample"
    return case_ratio("inference energy", baseline, hybrid, includes=includes)


def case_ratio(quantity: str, above: Case, below: Case, *, includes: str) -> Ratio:
    """Name a ratio of the energies of two cases.

    On one chip, its range is that of :func:`price_ratio`: a price that stands on both sides does
    not blur it. Two machines have nothing to do with each other, so that their prices vary
    independently: the range goes from all low above and all high below to the opposite.

    Args:
        quantity: What the ratio is of, such as ``"training energy"``. Its name is that and the
            names of the two cases.
        above: Numerator.
        below: Denominator.
        includes: What is counted, in words. How sure the counts are, and which events have no
            price, is said behind it.
    Raises:
        ConfigurationError: The denominator costs nothing.

    Example:
        >>> from aihwkit_lora import chips
        >>> from aihwkit_lora.reporting.baselines import rtx_4090
        >>> macs = Counts({"forward_macs": 1000})
        >>> card = Case(name="card", counts=macs, chip=rtx_4090(utilisation=1.0))
        >>> chip = Case(name="chip", counts=macs, chip=chips.get("rm-180nm"))
        >>> ratio = case_ratio("energy", card, chip, includes="MACs")
        >>> ratio.name, round(ratio.value, 2)
        ('energy, card ÷ chip', 0.45)
    """
    name = _title(quantity, above, below)
    includes = _levelled(includes, above.counts + below.counts)
    if above.chip.prices is below.chip.prices:
        return energy_ratio(
            name,
            above.counts,
            below.counts,
            above.chip,
            above=str(above),
            below=str(below),
            includes=includes,
        )
    paid = [price(case.counts, case.chip) for case in (above, below)]
    includes = _without(includes, {event for bill in paid for event in bill.unpriced_energy})
    return _named(name, paid[0].energy_j / paid[1].energy_j, str(above), str(below), includes)


def _title(quantity: str, above: Case, below: Case) -> str:
    return f"{quantity}, {above.name} ÷ {below.name}"


def _named(name: str, interval: Interval, above: str, below: str, includes: str) -> Ratio:
    return Ratio(
        name=name, **interval.to_dict(), numerator=above, denominator=below, includes=includes
    )


def _exactly(above: int, below: int) -> Interval:
    return Interval(above / below, above / below, above / below)


def _levelled(includes: str, counts: Counts) -> str:
    return includes if counts.level is Level.EXACT else f"{includes}; counts: {counts.level}"


def _without(includes: str, unpriced: Iterable[str]) -> str:
    missing = ", ".join(sorted(unpriced))
    return f"{includes}; without {missing}: no price" if missing else includes


def _require_some(below: int, ratio: str, what: str) -> None:
    if below < 1:
        raise ConfigurationError(
            f"{ratio}: expected a denominator of 1 or more {what}, got {below}."
        )


def _by_price(counts: Counts, prices: Mapping[str, Quantity]) -> Counts:
    """Add up events that share one price, such as conversions forwards and backwards by one ADC."""
    first = {prices[event]: event for event in reversed(list(prices))}

    def payer(event: str) -> str:
        own = prices[event]
        followed = prices.get(own.follows or event, own)
        return first[followed if followed.interval == own.interval else own]

    priced = (event for event in counts if event in prices)
    return Counts.sum(Counts({payer(event): counts[event]}) for event in priced)


def _ends(interval: Interval) -> tuple[Fraction, Fraction]:
    return Fraction(interval.low), Fraction(interval.high)


def _cost(counts: Counts, prices: Mapping[str, Fraction]) -> Fraction:
    return sum((counts[event] * one for event, one in prices.items()), Fraction(0))


def _corners(
    numerator: Counts, denominator: Counts, ends: _Ends
) -> Iterator[Mapping[str, Fraction]]:
    def rank(event: str) -> tuple[bool, Fraction]:
        below = denominator[event]
        return (False, Fraction(numerator[event], below)) if below else (True, Fraction(0))

    ranked = sorted(ends, key=rank)
    for threshold in range(len(ranked) + 1):
        rest = ranked[:threshold]
        yield {event: low if event in rest else high for event, (low, high) in ends.items()}
        yield {event: high if event in rest else low for event, (low, high) in ends.items()}
