"""Writes the results of studies into docs/evidence.md: python -m experiments.report [--check].

docs/evidence.md and README.md are written by hand, except between `<!-- report: KEY -->` and `<!-- end -->`. KEY is

  overview               the figure of four studies (OVERVIEW_STUDIES), docs/evidence.png
  speed                  the inference times that experiments.speed has measured
  STUDY                  the study's tables and its picture, docs/evidence_STUDY.png
  STUDY/ARM/accuracy     one figure for a sentence: the mean over seeds, with its standard deviation
  STUDY/ARM/difference   one figure for a sentence: the mean difference from the control, with its 95 % interval
  STUDY/ARM-OTHER/difference   the same for two arms
  STUDY/ARM-STUDY/ARM/difference   the same for arms of two studies that are tested on the same images
  STUDY/ARM/mask         how the arm's mask empties: a table and a picture, docs/evidence_STUDY_ARM_mask.png

--check writes nothing, and fails if a page or a picture does not agree with the results. Outside of the marks, a figure
with a deviation or an interval is refused.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from castling_jax.errors import InputError, check_known
from castling_jax.plots import png
from castling_jax.storage import write_atomically
from castling_jax.tables import Row, markdown
from castling_jax.tools.cli import ending_in_a_sentence
from experiments import figure, mask
from experiments.estimates import Estimate, estimate, paired_difference
from experiments.results import SPEED_FIELDS, SPEED_FILE, Result, read_object, read_results
from experiments.study import RESULTS, ROOT, STUDIES, Study, load_study, study_names, trials_of

PAGE = ROOT / "docs" / "evidence.md"
README = ROOT / "README.md"
# Matches a figure as `_accuracy` and `_difference` write it.
FIGURE = re.compile(r"[\d.]+ ± [\d.]*\d|[+-][\d.]+ \[[+-][^\]]*\]")
MARKED = re.compile(r"(<!-- report: (\S+) -->)(.*?)(<!-- end -->)", re.DOTALL)
OVERVIEW = PAGE.parent / "evidence.png"
DIGEST = "Description"  # the text in a PNG file that identifies the results that it shows
OVERVIEW_TEXT = "Accuracy over inference time, and castling minus its controls"
OVERVIEW_STUDIES = "cifar10_main", "cifar10_equal_rates", "cifar10_softmax_rates", "cifar10_tokens"
NONE_YET = "(no result yet)"
ACCURACY_HEADER = "arm", "learning rate", "accuracy, %", "seeds", "parameters", "MACs", "steps"


def accuracies(results: Iterable[Result]) -> dict[int, float]:
    """Seed -> accuracy of the inference form on the split that the study tests on, in percent."""
    return {result["seed"]: 100 * result["accuracy_inference_form"] for result in results}


class Findings:
    """A study with the results so far.

    Args:
      name: name of the study.
      study: the STUDY that its file declares.
      results: results of its finished runs.
    """

    def __init__(self, name: str, study: Study, results: list[Result]):
        self.name, self.study, self.results = name, study, results
        self.chosen = {arm.name: self._best_rate(arm.name) for arm in study.arms}

    def of(self, arm: str, learning_rate: float | None) -> list[Result]:
        """The results of an arm at a learning rate."""
        return [one for one in self.results if (one["variant"], one["learning_rate"]) == (arm, learning_rate)]

    def _best_rate(self, arm: str) -> float | None:
        """The learning rate with the best mean validation accuracy; the test split must not choose anything."""
        rates = {result["learning_rate"] for result in self.results if result["variant"] == arm}
        validation = {
            rate: estimate(result["accuracy_validation"] for result in self.of(arm, rate)).mean
            for rate in sorted(rates)
        }
        return max(validation, key=lambda rate: validation[rate]) if validation else None

    def accuracy(self, arm: str) -> dict[int, float]:
        """Seed -> test accuracy in percent, at the chosen learning rate."""
        return accuracies(self.of(arm, self.chosen[arm]))

    def masks(self, arm: str) -> list[list[dict[str, Any]]]:
        """How the mask of each seed empties, at the chosen learning rate; [] for an attention without one."""
        return [result["mask"] for result in self.of(arm, self.chosen[arm]) if result.get("mask")]

    def difference(self, arm: str, other: str) -> Estimate | None:
        """The paired difference of two arms."""
        return paired_difference(self.accuracy(arm), self.accuracy(other))

    def texts(self) -> dict[str, str]:
        """Key -> text, for all keys that the page may use."""
        texts = {self.name: self._section()}
        for arm in self.chosen:
            by_seed = self.accuracy(arm)
            texts[f"{self.name}/{arm}/accuracy"] = _accuracy(estimate(by_seed.values())) if by_seed else NONE_YET
            texts[f"{self.name}/{arm}/difference"] = _difference(self.difference(arm, self.study.control))
            texts[f"{self.name}/{arm}/mask"] = self._mask(arm)
        for arm, other in itertools.permutations(self.chosen, 2):
            texts[f"{self.name}/{arm}-{other}/difference"] = _difference(self.difference(arm, other))
        return texts

    def _section(self) -> str:
        runs = len(trials_of(self.name, self.study))
        lines = [
            f"`python -m experiments.run {self.name}` makes these results, as `{STUDIES / self.name}.py` says: "
            f"{len(self.results)} of {runs} runs are finished. {self.study.about_data}"
        ]
        if not self.results:
            return "\n".join([*lines, "No results yet."])
        first = self.results[0]
        machines = sorted({f"{result['machine']} (JAX {result['versions']['jax']})" for result in self.results})
        lines += [
            f"The runs come from commit {first['commit'][:12]}, on {' and '.join(machines)}. Accuracies are of the "
            f"inference form on the {first['images']:,} images of `{first['data']['test_split']}`, with the standard "
            "deviation over seeds; parameters and MACs (an image) are of the inference form too.",
            "",
            *markdown(ACCURACY_HEADER, self._accuracy_rows(), "l"),
            "",
            *self._contrasts(),
            *self._differences(),
            f"![Accuracy of each seed and arm]({self.picture.name})",
        ]
        return "\n".join(lines)

    def _mask(self, arm: str) -> str:
        if not (runs := self.masks(arm)):
            return NONE_YET
        return "\n".join([*mask.table(runs), "", f"![How the mask empties]({self._mask_picture(arm).name})"])

    def _accuracy_rows(self) -> Iterable[Row]:
        for arm in self.study.arms:
            for rate in arm.learning_rates:
                if not (results := self.of(arm.name, rate)):
                    continue
                accuracy = estimate(accuracies(results).values())
                is_chosen = len(arm.learning_rates) > 1 and rate == self.chosen[arm.name]
                shown_rate = f"{rate:g} (chosen on validation)" if is_chosen else f"{rate:g}"
                yield (
                    arm.name,
                    shown_rate,
                    _accuracy(accuracy),
                    str(accuracy.n),
                    f"{results[0]['parameters']:,}",
                    f"{results[0]['macs'] / 1e6:,.2f} M",
                    f"{results[0]['steps']:,}",
                )

    def _contrasts(self) -> list[str]:
        """What the study was made for, as a table; nothing where it names no contrast."""
        rows = [
            (f"{arm} - {other}", _difference(difference), "0" if difference is None else str(difference.n))
            for arm, other in self.study.contrasts
            for difference in [self.difference(arm, other)]
        ]
        header = "contrast, written down before the runs", "difference, points [95 % interval]", "seeds"
        return [*markdown(header, rows, "l"), ""] if rows else []

    def _differences(self) -> list[str]:
        """Each arm's difference from the control, as a table; nothing while the control has no result."""
        rows = [
            (arm, _difference(difference), str(difference.n))
            for arm in self.chosen
            if arm != self.study.control and (difference := self.difference(arm, self.study.control))
        ]
        header = "arm, at its chosen rate", f"difference from {self.study.control}, points [95 % interval]", "seeds"
        return [*markdown(header, rows, "l"), ""] if rows else []

    @property
    def picture(self) -> Path:
        """Path of the picture of all arms."""
        return PAGE.parent / f"evidence_{self.name}.png"

    def _mask_picture(self, arm: str) -> Path:
        return PAGE.parent / f"evidence_{self.name}_{arm}_mask.png"

    def pictures(self) -> list["Picture"]:
        """The pictures that the texts may show; those of arms without a mask show nothing."""
        masks = [
            Picture(self._mask_picture(arm), runs, functools.partial(mask.draw, runs, f"{self.name}, {arm}"))
            for arm in self.chosen
            for runs in [self.masks(arm)]
        ]
        return [Picture(self.picture, self.results, self.figure), *masks]

    def figure(self) -> Figure:
        """A row for each arm and learning rate with results: a dot for each seed, and a bar for the mean of several."""
        rows = {
            f"{arm.name}, {rate:g}": [*accuracies(found).values()]
            for arm in self.study.arms
            for rate in arm.learning_rates
            if (found := self.of(arm.name, rate))
        }
        figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, values in enumerate(rows.values()):
            axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
            if len(values) > 1:
                axes.plot(estimate(values).mean, place, "|", color="black", markersize=18)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first arm on top, as in the tables
        split = self.results[0]["data"]["test_split"]
        axes.set(
            title=self.name, xlabel=f"accuracy of the inference form on '{split}' (%); a dot a seed, a bar their mean"
        )
        axes.grid(alpha=0.3)
        return figure


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of results.

    Attributes:
      path: where it is kept.
      shown: the results that it shows; it is there if there are any.
      figure: draws it.
    """

    path: Path
    shown: list[Any]
    figure: Callable[[], Figure]

    def digest(self) -> str | None:
        """SHA-256 of what it shows; None if that is nothing."""
        return hashlib.sha256(json.dumps(self.shown).encode()).hexdigest() if self.shown else None

    def draw(self) -> bytes:
        """A PNG that carries `digest`."""
        return png(self.figure(), metadata={DIGEST: self.digest()})


def _accuracy(accuracy: Estimate) -> str:
    return f"{accuracy.mean:.2f} " + (f"± {accuracy.sd:.2f}" if accuracy.n > 1 else "(screening: one seed)")


def _difference(difference: Estimate | None) -> str:
    if difference is None:
        return NONE_YET
    low, high = difference.interval
    return f"{difference.mean:+.2f} " + (f"[{low:+.2f}, {high:+.2f}]" if difference.n > 1 else "(screening: one seed)")


def read_findings(name: str) -> Findings:
    """Reads a study and the results of its finished runs.

    Raises:
      InputError: a result is damaged, belongs to another study, data or code, or contradicts itself or the others.
    """
    study = load_study(name)
    return Findings(name, study, read_results(name, study))


def across(studies: Iterable[Findings]) -> dict[str, str]:
    """Key -> text for two studies' arms, where both are tested on the same images."""
    texts: dict[str, str] = {}
    for one, other in itertools.permutations(studies, 2):
        if one.results and other.results and one.results[0]["data"] != other.results[0]["data"]:
            continue
        for arm, control in itertools.product(one.chosen, other.chosen):
            difference = paired_difference(one.accuracy(arm), other.accuracy(control))
            texts[f"{one.name}/{arm}-{other.name}/{control}/difference"] = _difference(difference)
    return texts


def overview(
    main: Findings, equal_rates: Findings, softmax_rates: Findings, tokens: Findings, speed: list[dict[str, Any]]
) -> Picture:
    """The figure that sums up four studies; it shows nothing as long as one of them, or `speed`, is missing.

    Args:
      main: the findings of cifar10_main.
      equal_rates: the findings of cifar10_equal_rates.
      softmax_rates: the findings of cifar10_softmax_rates, the controls of castling in cifar10_equal_rates.
      tokens: the findings of cifar10_tokens.
      speed: the rows of experiments.speed's measurement.
    """
    lines: list[figure.Line] = []
    for attention in ("softmax", "linear_angular", "castling"):
        # castling's inference form is linear_angular's.
        measured = "linear_angular" if attention == "castling" else attention
        times = {row["tokens"]: row["milliseconds"]["median"] for row in speed if row["attention"] == measured}
        found = {count: tokens.accuracy(f"{attention}-{count}") for count in (64, 256)}
        lines.append((attention, {count: estimate(one.values()) for count, one in found.items() if one}, times))
    by_study = [_controls(main, main), _controls(equal_rates, equal_rates), _controls(equal_rates, softmax_rates)]
    is_whole = all(by_study) and all(accuracies and times for _, accuracies, times in lines)
    results = [findings.results for findings in (main, equal_rates, softmax_rates, tokens)]
    shown = [*results, speed] if is_whole else []
    return Picture(OVERVIEW, shown, functools.partial(figure.draw, lines, [*itertools.chain(*by_study)]))


def _controls(study: Findings, controls: Findings) -> list[figure.Difference]:
    """A study's castling minus each arm of `controls` that was trained from random weights with several seeds."""
    if not (castling := study.accuracy("castling")):
        return []
    arms = [arm.name for arm in controls.study.arms if len(arm.seeds) > 1 and not arm.start and arm.name != "castling"]
    differences = {name: paired_difference(castling, controls.accuracy(name)) for name in arms}
    rate = study.chosen["castling"]
    return [(name, (rate, controls.chosen[name]), one) for name, one in differences.items() if one]


def read_speed() -> dict[str, Any]:
    """What experiments.speed has measured; without rows before it was run."""
    return read_object(SPEED_FILE, SPEED_FIELDS) if SPEED_FILE.exists() else {"rows": []}


def speed_table(speed: dict[str, Any]) -> str:
    """The measured inference times: a row for each attention, a column for each number of tokens."""
    if not speed["rows"]:
        return NONE_YET
    medians = {(row["attention"], row["tokens"]): row["milliseconds"]["median"] for row in speed["rows"]}
    attentions, counts = (list(dict.fromkeys(names)) for names in zip(*medians, strict=True))
    rows = [(name, *(f"{medians[name, count]:.2f}" for count in counts)) for name in attentions]
    machine = f"{speed['machine']['processor']}, JAX {speed['versions']['jax']}"
    about = f"Milliseconds an image on one core ({machine}), the median of {speed['repeats']} calls."
    header = "attention", *(f"{count:,} tokens" for count in counts)
    return "\n".join([f"{about} castling's inference form is linear_angular's.", "", *markdown(header, rows, "l")])


def fill(page: str, texts: dict[str, str], where: str) -> str:
    """Puts the texts of its keys into the page.

    Args:
      page: text of the page.
      texts: key -> text.
      where: name of the page, for messages.

    Raises:
      InputError: a key is unknown, a mark is broken, or a figure stands outside of the marks.
    """
    keys = _keys(page)
    # A mark that an editor broke over two lines would swallow the text up to the next one.
    if any(len(re.findall(rf"<!--\s*{word}", page, re.IGNORECASE)) != len(keys) for word in ("report:", "end")):
        raise InputError(f"'{where}' has a mark that is no '<!-- report: KEY -->' or '<!-- end -->' on one line.")
    for key in keys:
        check_known("key", key, texts)
    if typed := FIGURE.search(MARKED.sub("", page)):
        raise InputError(f"'{where}' has the figure '{typed[0]}' outside of marks, where it is not compared.")

    def replace(match: re.Match[str]) -> str:
        start, key, _, end = match.groups()
        in_a_sentence = "/" in key and "\n" not in texts[key]
        return f"{start}{texts[key]}{end}" if in_a_sentence else f"{start}\n\n{texts[key]}\n\n{end}"

    return MARKED.sub(replace, page)


def _keys(page: str) -> list[str]:
    return [key for _, key, _, _ in MARKED.findall(page)]


def report(*, check: bool) -> list[Path]:
    """Writes the pages and the pictures that differ from the results, and returns their paths; `check` only returns.

    Raises:
      InputError: a result or a page is wrong, or a study has no place in docs/evidence.md.
    """
    for folder in RESULTS.glob("*/"):
        check_known("folder of results", folder.name, study_names())
    studies = [read_findings(name) for name in study_names()]
    texts = {key: text for findings in studies for key, text in findings.texts().items()} | across(studies)
    pictures = [picture for findings in studies for picture in findings.pictures()]
    by_name = {findings.name: findings for findings in studies}
    texts["speed"] = speed_table(read_speed())
    if by_name.keys() >= {*OVERVIEW_STUDIES}:
        main, equal_rates, softmax_rates, tokens = (by_name[name] for name in OVERVIEW_STUDIES)
        pictures.append(overview(main, equal_rates, softmax_rates, tokens, read_speed()["rows"]))
        texts["overview"] = f"![{OVERVIEW_TEXT}]({OVERVIEW.name})" if pictures[-1].shown else NONE_YET
    before = {path: path.read_text() for path in (PAGE, README)}
    for name in by_name.keys() - {*_keys(before[PAGE])}:
        raise InputError(f"'{PAGE.name}' has no place for {name}: add <!-- report: {name} --> <!-- end --> to it.")
    pages = {path: fill(page, texts, path.name) for path, page in before.items()}
    stale = [path for path, page in pages.items() if page != before[path]]
    # Pictures that a page shows are kept. They are compared by their results, because their bytes depend on Matplotlib.
    shown = [picture for picture in pictures if any(picture.path.name in page for page in pages.values())]
    changed = {picture.path: picture for picture in shown if _digest_of(picture.path) != picture.digest()}
    removed = [picture.path for picture in pictures if picture not in shown and picture.path.exists()]
    if not check:
        for path in stale:
            write_atomically(path, pages[path].encode())
        for path, picture in changed.items():
            write_atomically(path, picture.draw())
        for path in removed:
            path.unlink()
    return [*stale, *changed, *removed]


def _digest_of(picture: Path) -> str | None:
    if not picture.exists():
        return None
    try:
        with Image.open(picture) as image:
            return image.info.get(DIGEST, "")
    except OSError:  # damaged: it is drawn anew
        return ""


@ending_in_a_sentence()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page or a picture is outdated")
    check = parser.parse_args().check
    stale = [str(path.relative_to(ROOT)) for path in report(check=check)]
    if check and stale:
        sys.exit(f"outdated: {', '.join(stale)}; run python -m experiments.report.")
    print(f"written: {', '.join(stale)}." if stale else "The pages and the pictures agree with the results.")


if __name__ == "__main__":
    main()
