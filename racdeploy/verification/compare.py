"""Comparison of any models with a reference, each as it is deployed: no build and no bundle.

Reference and candidates answer the same questions, each on its engine with its own template,
tokenizer and end-of-sequence. The checks are those of a bundle; where template, thinking tags,
tokens or end-of-sequence differ from the reference's, that is a finding of its own check.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from racdeploy.errors import UsageError
from racdeploy.report.files import number_repeats
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.plan import ComparisonPlan, Plan
from racdeploy.results.report import COMPARED_ROLES, Report
from racdeploy.runtime.deployed import DeployedModel, is_url
from racdeploy.verification.evidence import ArmResult, Evidence, Findings, StopIds
from racdeploy.verification.examiner import Examiner
from racdeploy.verification.measurements import encode_probes, probe_prompts, probe_tokens
from racdeploy.verification.plan import Expectation
from racdeploy.verification.reference import Reference
from racdeploy.verification.report_builder import build_report
from racdeploy.verification.subject import Subject
from racdeploy.verification.token_comparison import TokenComparison

_notify = logging.getLogger("racdeploy").info
_NOT_PRUNED = {
    "sparsity": "no zeros were asked for",
    "backends": "each candidate is compared by itself",
}


def name_distinctly(models: Sequence[DeployedModel], sources: Sequence[str]) -> list[DeployedModel]:
    """Return the models, those of one name renamed to the shortest ends of their paths that differ.

    Args:
        sources: of each model, as on the command line.
    """
    counts = Counter(model.name for model in models)
    paths = [os.path.abspath(source) for source in sources]
    names = []
    for model, path in zip(models, paths, strict=True):
        is_alone = counts[model.name] == 1
        names.append(model.name if is_alone else _shorten_path(path, paths))

    # A bundle's name is a stranger's, and may be that of another candidate's path.
    distinct = number_repeats(names)
    return [model.renamed(name) for model, name in zip(models, distinct, strict=True)]


def check_named_once(sources: Sequence[str]) -> None:
    """Raise UsageError for a candidate that is given twice, also by another path to it."""
    given: dict[str, str] = {}
    for source in sources:
        place = source if is_url(source) else os.path.realpath(source)
        if place in given:
            raise UsageError(
                "candidate-given-twice",
                f"{given[place]} and {source} are the same candidate",
                remedy="give each candidate once",
            )
        given[place] = source


def _shorten_path(path: str, paths: Collection[str]) -> str:
    """Return the shortest end of a path that no other one of the paths has."""
    parts = Path(path).parts
    for count in range(1, len(parts)):
        end = parts[-count:]
        if sum(Path(each).parts[-count:] == end for each in paths) == 1:
            return "/".join(end)
    return path


@dataclass(frozen=True)
class ModelComparison:
    """Candidates against a reference, a model or its recorded answers, on the same problems.

    Args:
        tasks: specifications of the problems.
        examiner: its gate is corrected for the number of candidates.
    """

    reference: DeployedModel | Reference
    candidates: tuple[DeployedModel, ...]
    tasks: tuple[str, ...]
    examiner: Examiner

    def plan(self) -> Plan:
        """Return costs and power; raise UsageError for what would fail later."""
        models = list(self.candidates)
        if isinstance(self.reference, DeployedModel):
            models.append(self.reference)
        names = tuple(model.name for model in self.candidates)
        comparison = ComparisonPlan(reference=self.reference.name, candidates=names)
        return replace(self.examiner.plan(models, Expectation()), comparison=comparison)

    def run(self) -> list[tuple[Report, list[AnswerRecord]]]:
        """Answer with every model; return a report and the records of each candidate."""
        self.plan()
        reference = self.reference
        self._announce_other_tokens()

        with self.examiner.until_judged():
            if isinstance(reference, DeployedModel):
                reference = self.examiner.begin().record(reference, self.tasks)
            return [self._compare(model, reference) for model in self.candidates]

    def _announce_other_tokens(self) -> None:
        """Log which candidates tokenize otherwise, before the hours of their answers."""
        known = self.reference
        expected = known.probes if isinstance(known, Reference) else encode_probes(known.encoder)
        for model in self.candidates:
            probes = probe_tokens(model.encoder.encode_text, expected)
            counted = TokenComparison.count(probes or ())
            if counted.different:
                _notify(f"{model.name} has other tokens than {known.name}: {counted}")

    def _compare(
        self, model: DeployedModel, reference: Reference
    ) -> tuple[Report, list[AnswerRecord]]:
        subject = Subject.from_deployed(model)

        def weigh(examiner: Examiner) -> Evidence:
            dense = self._ask_reference(examiner, reference)
            pruned, _ = examiner.answer(subject, "pruned")
            findings = Findings(roles=COMPARED_ROLES)
            return examiner.weigh(subject, dense, pruned, findings)

        examiner = self.examiner.stop_when_clear(weigh)
        arm = self._ask_reference(examiner, reference)
        answered = reference.model_copy(update={"arm": arm})
        return self._report(model, subject, examiner, answered)

    def _ask_reference(self, examiner: Examiner, known: Reference) -> ArmResult:
        """Return the reference's answers to an examiner's prompts; ask where some are missing."""
        prompts = len(examiner.problems)
        last = known.arm.records[-1]
        is_known = last.prompt + 1 >= prompts
        if is_known or isinstance(self.reference, Reference):
            return known.arm.take(prompts)

        subject = Subject.from_deployed(self.reference)
        arm, _ = examiner.answer(subject, "dense")
        return arm

    def _report(
        self, model: DeployedModel, subject: Subject, examiner: Examiner, reference: Reference
    ) -> tuple[Report, list[AnswerRecord]]:
        """Return the report on a candidate, whose answers are clear, and the records."""
        encoder, tokenizer = model.encoder, model.settings.tokenizer
        # Both templates, beginning-of-sequence included.
        asked = {record.question: record.prompt_ids for record in reference.arm.records}
        findings = Findings(
            probes=probe_tokens(encoder.encode_text, reference.probes),
            prompts=probe_prompts(encoder, asked),
            stop_ids=StopIds(reference.stop_ids, model.eos_id, tokenizer.eos_ids),
            open_tags=(reference.open_tag, tokenizer.open_tag or ""),
            roles=COMPARED_ROLES,
            skip_reasons=_NOT_PRUNED,
        )
        evidence, notes = examiner.examine(subject, reference, findings)
        settings = examiner.settings.model_dump(mode="json")
        return build_report(
            evidence,
            notes,
            recipe={"tasks": list(reference.tasks), "verify": settings},
            model=model.name,
            target=model.entry.backend,
            reference=reference.name,
            fingerprint=examiner.fingerprint(model.url),
        )
