"""Print a report: Markdown for a pull request, a terminal, JUnit, one self-contained HTML file.

The data are in :mod:`racdeploy.results`; nothing here measures or decides anything.
"""
