"""Renderers of a report: Markdown, terminal, JUnit XML, and one self-contained HTML file.

The data models are in :mod:`racdeploy.results`; nothing here measures or decides anything.
"""
