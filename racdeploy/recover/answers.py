"""The model's own answers as lessons: cut where they leave the dense model's path."""

from __future__ import annotations

from dataclasses import replace

from racdeploy.recover.course import Course
from racdeploy.recover.divergence import Head
from racdeploy.recover.lessons import dense_states
from racdeploy.recover.path import cut_answers
from racdeploy.traces.trace import Trace


def cut_own(course: Course) -> Course:
    """Return the course with answers up to where they left the path; empty ones are left out."""

    def cut() -> list[Trace]:
        return cut_answers(Head.of(course.dense, course.device), states, course.taught)

    # Processors may differ where two tokens are about as likely, so one process decides.
    where = (course.folder, "own", course.device, course.processes)
    with dense_states(course.dense, course.taught, *where) as states:
        traces = course.processes.ask_first(cut)

    taught = [trace for trace in traces if trace.completion_ids]
    return replace(course, taught=taught)
