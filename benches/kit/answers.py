"""What the person who ran it wants to know: a sentence and a picture for each question, of this machine."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .case import OURS
from .results import Row, of_kind, samples_of
from .rounds import FROZEN, OK, Estimate, Samples, validity

PEFT, QLORA_PEFT = "PEFT", "PEFT + bitsandbytes"
WIDTH = 40  # characters of the longest bar
STEP, MEMORY, DECODING, LOSSES, ACCURACY = (
    "How much faster is a training step?",
    "How much memory is left?",
    "How much faster is decoding?",
    "Do the losses agree?",
    "How accurate is it?",
)


@dataclass
class Answer:
    question: str
    sentence: str
    short: str  # the README's cell
    file: str  # the picture's stem
    unit: str = ""
    bars: dict[str, Estimate] = field(default_factory=dict)  # what the picture shows
    lines: dict[str, list[float]] = field(default_factory=dict)  # or curves
    sure: bool = True  # nothing but a count, or quiet enough
    context: str = ""  # of what: the model, its shape

    def text(self) -> str:
        """For a terminal: question, sentence, bars."""
        shown = [self.question, f"  {self.sentence}", *([f"    {self.unit}:"] if self.bars else [])]
        most = max((bar.median for bar in self.bars.values()), default=1.0)
        width = max((len(name) for name in self.bars), default=0)
        for name, bar in self.bars.items():
            filled = round(WIDTH * bar.median / most) if bar.median == bar.median else 0
            shown.append(f"    {name:<{width}}  {'█' * filled}{'·' * (WIDTH - filled)}  {number(bar)}")
        return "\n".join(shown)


def number(value: Estimate) -> str:
    text = f"{value.median:.3g}" if value.median < 100 else f"{value.median:.0f}"
    return text if value.low == value.high else f"{text} [{value.low:.3g}, {value.high:.3g}]"


def speed(samples: Samples, over: str) -> Estimate:
    """How many times as fast as `over` fastpeft is."""
    return samples.ratio(over, OURS)


def _times(estimate: Estimate) -> str:
    return f"{estimate.median:.2f} times as fast as PEFT [{estimate.low:.2f}, {estimate.high:.2f}]"


def _noise(samples: Samples, reference: str | None) -> tuple[bool, str]:
    """(may the figure be claimed, what to say about that)"""
    if reference is None:
        return False, f"Rounds: {samples.about()}; nothing was run twice, so how noisy it is was not measured."
    state, reason = validity(samples, reference)
    said = reason.replace("A/A", f"{reference} run twice gave")
    return (
        state == OK,
        f"{'Quiet enough to count' if state == OK else 'NOISY, take it as a hint'}: {said}; rounds: {samples.about()}.",
    )


def _faster(row: Row, question: str, what: str, file: str) -> Answer | None:
    samples = samples_of(row)
    if samples is None or not samples.kept:
        return None
    gain = speed(samples, PEFT)
    sure, noise = _noise(samples, row.get("reference"))
    clear = gain.low > 1 or gain.high < 1
    verb = (
        f"{_times(gain)}"
        if clear
        else f"about as fast as PEFT: {gain.median:.2f} times [{gain.low:.2f}, {gain.high:.2f}]"
    )
    sentence = f"With fastpeft {what} is {verb} ({row['key']}). {noise}"
    names = [name for name in (PEFT, "PEFT same dtype", "composition", OURS, FROZEN) if name in samples.seconds]
    bars = {name: samples.ratio(name, PEFT) for name in names}
    short = f"{gain.median:.2f}x [{gain.low:.2f}, {gain.high:.2f}]{'' if sure else ' (noisy)'}"
    return Answer(question, sentence, short, file, "time, PEFT's = 1", bars, sure=sure, context=row["key"])


def step(rows: list[Row]) -> Answer | None:
    for row in (*of_kind(rows, "step"), *of_kind(rows, "training")):
        found = _faster(row, STEP, "a training step", "step")
        if found:
            return found
    return None


def decoding(rows: list[Row]) -> Answer | None:
    for row in of_kind(rows, "decode"):
        return _faster(row, DECODING, "the next token", "decoding")
    layers = [row for row in of_kind(rows, "row") if row["table"] == "lora_linear: layer" and row["case"]["m"] == 1]
    layers = [
        row for row in layers if row["case"]["direction"] == "fwd" and PEFT in row["time"] and not row["case"]["isa"]
    ]
    if not layers:
        return None
    return _faster(max(layers, key=lambda row: row["case"]["k"]), DECODING, "one LoRA layer at one token", "decoding")


def memory(rows: list[Row]) -> Answer | None:
    for row in of_kind(rows, "memory"):
        net = {way: data["net_bytes"] for way, data in row["memory"].items() if data["net_bytes"]}
        if OURS in net and PEFT in net:
            bars = {way: Estimate.exact(size / 2**20) for way, size in net.items()}
            share, saved = net[OURS] / net[PEFT], (net[PEFT] - net[OURS]) / 2**20
            left = f"leaves {saved:.0f} MiB more free than" if saved >= 0 else f"takes {-saved:.0f} MiB more than"
            sentence = f"A step with fastpeft {left} PEFT: {share:.2f} of its peak beside the model ({row['key']}). "
            sentence += "Resident peaks, counted once each in a fresh process."
            return Answer(MEMORY, sentence, f"{share:.2f}x", "memory", "MiB", bars, context=row["key"])
    return None


def losses(rows: list[Row]) -> Answer | None:
    for row in of_kind(rows, "training"):
        ours, other = row["gaps"][OURS], next(gap for way, gap in row["gaps"].items() if way != OURS)
        last = max(1, row["steps"] // 5)
        means = [sum(row["losses"][way][-last:]) / last for way in (PEFT, OURS)]
        agree = "Yes" if ours <= max(2 * other, 1e-3) else "Not quite"  # in fp32 PEFT's two settings are one
        sentence = (
            f"{agree}: in {row['steps']} steps fastpeft's loss is never further than {ours:.2g} from PEFT's; PEFT's own two "
            f"settings differ by up to {other:.2g}. Mean of the last {last}: {means[0]:.4f} and {means[1]:.4f}."
        )
        short = f"within {ours:.2g} (PEFT's two settings: {other:.2g})"
        about = f"{row['model']} on {row['text']}"
        return Answer(LOSSES, sentence, short, "losses", lines=row["losses"], context=about)
    return None


def accuracy(rows: list[Row]) -> Answer | None:
    for row in of_kind(rows, "accuracy"):
        found, count = row["accuracy"], row["held_out"]
        chance = {way: 1.96 * (a * (1 - a) / count) ** 0.5 for way, a in found.items()}
        bars = {way: Estimate(a, a - chance[way], a + chance[way]) for way, a in found.items()}
        others = ", ".join(f"{way} {a:.1%}" for way, a in found.items() if way != OURS)
        sentence = (
            f"After {row['steps']} steps fastpeft has {found[OURS]:.1%} of {count} held-out reviews right; {others} "
            f"({row['key']}). Intervals of ±{chance[OURS]:.1%} are what {count} reviews leave to chance; one seed."
        )
        short = f"{found[OURS]:.1%} (PEFT {found[PEFT]:.1%})"
        return Answer(ACCURACY, sentence, short, "accuracy", "share right", bars, context=row["key"])
    return None


def answers(rows: Iterable[Row]) -> list[Answer]:
    """In the order in which they are asked; questions that nothing was measured for are left out."""
    own = list(rows)
    found = (step(own), memory(own), decoding(own), losses(own), accuracy(own))
    return [answer for answer in found if answer is not None]
