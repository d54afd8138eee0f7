"""The model's own answers as lessons: cut where they leave the dense model's path."""

from __future__ import annotations

from dataclasses import replace

from racdeploy.recover.course import Course
from racdeploy.recover.divergence import Head
from racdeploy.recover.lessons import dense_states
from racdeploy.recover.path import cut_answers


def cut_own(course: Course) -> Course:
    """Return the course with answers up to where they left the path; empty ones are left out."""
    head = Head.of(course.dense, course.device)
    with dense_states(course.dense, course.taught, course.folder, "own", course.device) as states:
        cut = cut_answers(head, states, course.taught)

    taught = [trace for trace in cut if trace.completion_ids]
    return replace(course, taught=taught)
