"""results/claims.md, the front page of the results: every claim, with what was found at each scale.

It is made of the reports that lie in the folder (their runs.csv), whenever they were written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amod.files import write_atomically
from amod.studies.claims import HOW, Finding, examine, verdict_of
from amod.studies.plan import at_scale
from amod.studies.rows import METRICS, markdown, ours_of, read

VERDICTS = ("held", "contradicted", "undecided", "one seed", "measured elsewhere", "not tested")
MIXED = "not the same in all cells"
Study = Mapping[str, Any]
Scale = Mapping[str, Any]


def write_page(studies: Sequence[Study], scales: Sequence[Scale], untested: Sequence[Study], output: Path) -> Path:
    """Write claims.md into ``output``, the folder that has the reports in STUDY/SCALE; returns its path.

    ``studies`` and ``scales`` are the contents of conf/study and conf/scale; a scale without any report has no column.
    """
    reports = {path.parent.parent.name + "/" + path.parent.name for path in output.glob("*/*/runs.csv")}
    shown = [scale for scale in scales if any(f"{study['name']}/{scale['name']}" in reports for study in studies)]
    lines = [["claim", "the paper", *(scale["name"] for scale in shown), "verdict"], ["---"] * (3 + len(shown))]
    verdicts = []
    for study in studies:
        for number, claim in enumerate(study.get("claims", [])):
            here = [f"{study['name']}/{scale['name']}" in reports for scale in shown]
            found = [
                finding(study, number, scale, output) if there else None
                for scale, there in zip(shown, here, strict=True)
            ]
            told = [tell(study, scale, one) for scale, one in zip(shown, found, strict=True)]
            verdict = verdict_of([cell for one in found if one for cell in one.cells])
            verdicts.append((claim["text"], verdict))
            lines.append([claim["text"], str(claim.get("paper", "-")), *told, f"**{verdict}**"])
    for claim in untested:
        verdict = claim.get("verdict", "not tested")
        verdicts.append((claim["text"], verdict))
        rest = [claim["why"], *[""] * (len(shown) - 1)] if shown else []
        lines.append([claim["text"], str(claim.get("paper", "-")), *rest, f"**{verdict}**"])
    output.mkdir(parents=True, exist_ok=True)
    path = output / "claims.md"
    about = "; ".join(f"*{scale['name']}*: {scale['about']}" for scale in shown)
    text = (
        "# What held\n\nEvery claim of the paper, and ours where it says so, with the differences that were seen "
        f"(points of top-1 accuracy, of detectors of mAP, or epochs) at the scales that were run. {about}.\n\n"
        f"{summary(verdicts)}\n\n"
        f"{HOW} The verdict in the last column is about all cells of a line; *one seed* says that nothing has a spread "
        "yet.\n\n"
        f"{markdown(lines)}\n"
    )
    write_atomically(path, text.encode())
    return path


def summary(verdicts: Sequence[tuple[str, str]]) -> str:
    """How many claims have which verdict, the papers' and ours, from (claim, verdict)."""
    said = []
    for whose, ours in (("the papers'", False), ("ours", True)):
        words = [word for claim, word in verdicts if claim.startswith("ours: ") == ours]
        counted = Counter(word if word in VERDICTS else MIXED for word in words)
        told = ", ".join(f"{counted[word]} {word}" for word in (*VERDICTS, MIXED) if counted[word])
        said += [f"{len(words)} claims are {whose}: {told}."] if words else []
    return " ".join(said)


def finding(study: Study, number: int, scale: Scale, output: Path) -> Finding:
    """What the study's report at this scale says to its claim of that number."""
    here = at_scale(study, scale)
    rows = ours_of(here, scale, read(output / study["name"] / scale["name"] / "runs.csv"))
    return examine(here["claims"][number], rows, here["metric"])


def tell(study: Study, scale: Scale, found: Finding | None) -> str:
    """A cell of the page: what was found, on what, and where the report is."""
    if found is None or not any(cell.differences for cell in found.cells):
        return "not run"
    link = f"[{study['name']}]({study['name']}/{scale['name']}/report.md), {METRICS[found.metric]}"
    return "<br>".join([*(cell.text for cell in found.cells if cell.differences), link])
